"""Data sets of the training stages: parquet with images and texts, and the pre-tokenized form of it."""

import hashlib
import io
import json

import numpy as np
import torch

from ..processing_unicode2 import CAPTION_PROMPT


def load_images(folder: str, split: str = "train"):
    """Opens `{split}-*.parquet` of a folder (as `unicode2 scenes` writes it) with the images left as compressed bytes."""
    from datasets import Image, load_dataset

    rows = load_dataset("parquet", data_files=f"{folder}/{split}-*.parquet", split="train")
    return rows.cast_column("image", Image(decode=False))


def load_images_with_codes(folder: str, tokens: str, split: str = "train"):
    """`load_images` with the `codes` of the same rows, which `unicode2 tokenize` wrote to the folder `tokens`."""
    from datasets import concatenate_datasets, load_dataset

    images = load_images(folder, split)
    codes = load_dataset("parquet", data_files=f"{tokens}/{split}-*.parquet", split="train").select_columns("codes")
    if len(images) != len(codes):
        raise ValueError(f"{folder} has {len(images)} rows and {tokens} {len(codes)}; they must be the same rows.")
    return concatenate_datasets([images, codes], axis=1)


def decode_image(row: dict):
    """The `PIL.Image` of one row of `load_images`."""
    from PIL import Image

    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def pixel_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches images of one size as float32 `pixel_values` `(batch_size, 3, height, width)` in [-1, 1]."""
    images = np.stack([np.asarray(decode_image(row)) for row in rows])
    return {"pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1}


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


def refuse_other_quantizer(path, quantizer) -> None:
    """Keeps what made the codes beside them. Raises `ValueError` when those in the folder are of another encoder or codebook."""
    digest = hashlib.sha256()
    for name, tensor in sorted(quantizer.state_dict().items()):
        if not name.endswith("previews"):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy())
    begun = json.loads(path.read_text())["quantizer_sha256"] if path.is_file() else digest.hexdigest()
    if begun != digest.hexdigest():
        raise ValueError(
            f"{path.parent} holds codes of another encoder or codebook (SHA-256 {begun[:12]}, now {digest.hexdigest()[:12]}). "
            "Name another --output."
        )
    path.write_text(json.dumps({"quantizer_sha256": begun}) + "\n")


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
    from pathlib import Path

    from datasets import load_dataset
    from transformers import AutoImageProcessor

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    paths = sorted(Path(args.data).glob(f"{args.split}-*.parquet"))
    if not paths:
        raise ValueError(f"--data {args.data} has no {args.split}-*.parquet.")
    quantizer = UniCode2ForConditionalGeneration.from_pretrained(args.model).get_quantizer()
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    refuse_other_quantizer(output / f"{args.split}.json", quantizer)

    def encode(batch: dict) -> dict:
        images = [decode_image({"image": image}) for image in batch["image"]]
        return {"codes": quantizer.encode_images(image_processor(images, return_tensors="pt")["pixel_values"]).tolist()}

    for path in paths:
        target = output / path.name
        if not target.is_file():
            from datasets import Image

            rows = load_dataset("parquet", data_files=str(path), split="train").cast_column(
                "image", Image(decode=False)
            )
            rows = rows.map(encode, batched=True, batch_size=args.batch_size, remove_columns="image", desc=path.name)
            rows.to_parquet(str(target.with_suffix(".tmp")))
            target.with_suffix(".tmp").rename(target)


if __name__ == "__main__":
    main(make_parser().parse_args())
