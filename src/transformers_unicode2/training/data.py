"""Data sets of the training stages: parquet with images and texts, and the pre-tokenized form of it."""

import glob
from pathlib import Path

import numpy as np
import torch

from ..files import explained, whole_file
from ..hub import check_checkpoint
from ..image_tables import ImageTable, read_cell
from ..images_unicode2 import decode_image
from ..processing_unicode2 import CAPTION_PROMPT
from ..record import Record
from .tokens import find_tables, hash_image_processor, hash_quantizer, hash_table, read_note, write_codes


def load_images(folder: str, split: str = "train"):
    """Opens `{split}-*.parquet` of a folder (as `unicode2 scenes` writes it) with the images left as compressed bytes, also those that a
    table keeps by path. Raises `ValueError`, with file or row, when there is no image."""
    from datasets import Features, Image

    tables = [ImageTable(file) for file in find_tables(folder, split, "--data")]
    rows = load_rows(folder, split)
    if not any(table.may_lack_contents() for table in tables):
        return rows.cast_column("image", Image(decode=False))
    if isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image(decode=False))

    def fetch(row: dict, index: int) -> dict:
        try:
            return {"image": {"bytes": read_cell(row["image"], Path(folder), absolute=True), "path": None}}
        except ValueError as error:
            raise ValueError(f"{folder} row {index} of all {split}-*.parquet: {error}.") from error

    features = Features({**rows.features, "image": Image(decode=False)})
    return rows.map(fetch, with_indices=True, features=features, load_from_cache_file=False, desc="reading images")


def load_rows(folder: str, split: str):
    """Opens `{split}-*.parquet` of a folder, whatever characters its name has; the cache of `datasets`, on whatever disk, keeps them."""
    from datasets import config, load_dataset

    with explained(config.HF_DATASETS_CACHE):
        return load_dataset("parquet", data_files=f"{glob.escape(str(folder))}/{split}-*.parquet", split="train")


def load_images_with_codes(folder: str, tokens: str, split: str = "train"):
    """`load_images` with the `codes` of the same rows, which `unicode2 tokenize` wrote to the folder `tokens`."""
    from datasets import concatenate_datasets

    images, codes = load_images(folder, split), load_rows(tokens, split).select_columns("codes")
    if len(images) != len(codes):
        raise ValueError(f"{folder} has {len(images)} rows and {tokens} {len(codes)}; they must be the same rows.")
    return concatenate_datasets([images, codes], axis=1)


def pixel_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches images of one size, rows of `load_images`, as float32 `pixel_values` `(batch_size, 3, height, width)` in [-1, 1].

    Raises `ValueError` when an image cannot be read, or they are of several sizes.
    """
    images = [decode_image(row["image"]["bytes"]) for row in rows]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"Images of one size are needed; these are {sizes[0]} and {sizes[-1]} pixels wide and high.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return {"pixel_values": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1}


CAPTION_PROMPTS = {"caption": CAPTION_PROMPT, "dense_caption": "describe the image in detail."}
TASKS = (*CAPTION_PROMPTS, "questions", "text_to_image", "planned_text_to_image", "unconditional")


def build_turns(row: dict, task: str, image: str, max_turns: int = 4) -> list[dict]:
    """The chat of one row for one of `TASKS`; `image` is the text that stands for the image, `max_turns` limits the questions.

    `text_to_image` asks for the image by its caption or, in every third row, by its dense caption. `planned_text_to_image` asks by
    the caption, too, and the answer is the dense caption, then the image.
    """
    if task == "text_to_image":
        prompt = row["dense_caption"] if row["row"] % 3 == 0 else row["caption"]
        pairs = [(prompt, image)]
    elif task == "planned_text_to_image":
        pairs = [(row["caption"], row["dense_caption"] + image)]
    elif task == "questions":
        pairs = list(zip(row["questions"], row["answers"]))[:max_turns]
        pairs[0] = (image + pairs[0][0], pairs[0][1])
    else:
        pairs = [(image + CAPTION_PROMPTS[task], row[task])]
    return [
        turn
        for prompt, answer in pairs
        for turn in ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    ]


def build_examples(
    rows,
    tasks: dict[str, float],
    processor,
    visual_token_offset: int,
    max_turns: int = 4,
    learn_all_images: bool = False,
):
    """Pre-tokenized rows to training sequences over the unified vocabulary.

    Args:
        rows: data set with `codes` and the texts, as `unicode2 tokenize` writes it.
        tasks: task to the share of the rows that take part in it, at most 1; row and task alone decide which.
        processor: `UniCode2Processor`.
        visual_token_offset: first visual token id.
        max_turns: questions asked about one image at most.
        learn_all_images: images in questions are learnt, too, as without any condition.

    Returns:
        Data set of `input_ids`, `labels`, -100 where nothing is learnt: all but the answers, and their `length`. An
        `"unconditional"` example is an image behind nothing but the begin-of-image id, which is what classifier-free guidance
        compares with.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"Unknown tasks {', '.join(unknown)}; the tasks are {', '.join(TASKS)}.")

    def expand(batch: dict, indices: list[int]) -> dict:
        output = {"input_ids": [], "labels": [], "length": []}
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in batch.items()}
            row["row"] = index
            visual = [visual_token_offset + code for code in row["codes"]]
            for number, (task, share) in enumerate(tasks.items()):
                if np.random.default_rng([index, number]).random() >= share:
                    continue
                if task == "unconditional":
                    ids = [processor.boi_token_id, *visual]
                    mask = [0] + [1] * len(visual)
                else:
                    turns = build_turns(row, task, processor.image_token, max_turns)
                    ids, mask = processor.encode_turns(turns, visual)
                output["input_ids"].append(ids)
                learnt = [flag or (learn_all_images and id_ >= visual_token_offset) for id_, flag in zip(ids, mask)]
                output["labels"].append([id_ if flag else -100 for id_, flag in zip(ids, learnt)])
                output["length"].append(len(ids))
        return output

    return rows.map(expand, batched=True, with_indices=True, remove_columns=rows.column_names, desc="building examples")


def make_parser():
    import argparse

    parser = argparse.ArgumentParser(
        prog="unicode2 tokenize",
        description="Turns the images of a data set into codes, once, so that training needs no encoder.",
    )
    parser.add_argument("--data", required=True, help="folder of {split}-*.parquet with images and texts")
    parser.add_argument("--model", required=True, help="checkpoint whose quantizer makes the codes")
    parser.add_argument("--output", required=True, help="folder for {split}-*.parquet with codes and texts")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, default=64)
    return parser


def main(args) -> None:
    """Each file that is there already must have been made of the same rows by the same quantizer; files may be added to the data."""
    paths = find_tables(args.data, args.split, "--data")
    check_checkpoint(args.model)
    made_of = {
        "command": "tokenize",
        "quantizer": hash_quantizer(args.model),
        "image processor": hash_image_processor(args.model),
        "data": {path.name: hash_table(path) for path in paths},
    }
    record = Record(args.output, made_of, (f"{args.split}-*.parquet",), args.split, growing=("data",))
    with record.making() as finished:
        if finished:
            print(f"{args.output} is finished; nothing to do")
            return
        encode, output = make_encoder(args.model), Path(args.output)
        for path in paths:
            note = {**made_of, "data": made_of["data"][path.name]}
            if not (output / path.name).is_file():
                with whole_file(output / path.name) as file:
                    write_codes(ImageTable(path), encode, file, note, args.batch_size)
            elif read_note(output / path.name) != note:
                raise ValueError(
                    f"{output / path.name} has codes of something else; delete it and run the command again."
                )


def make_encoder(model: str):
    """A function from RGB images to the codes that the quantizer of a checkpoint makes of them, lists of integers."""
    from transformers import AutoImageProcessor

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    quantizer = UniCode2ForConditionalGeneration.from_pretrained(model).get_quantizer()
    image_processor = AutoImageProcessor.from_pretrained(model)

    def encode(images: list) -> list[list[int]]:
        pixels = image_processor(images, return_tensors="pt")
        return quantizer.encode_images(pixels["pixel_values"]).tolist()

    return encode


if __name__ == "__main__":
    main(make_parser().parse_args())
