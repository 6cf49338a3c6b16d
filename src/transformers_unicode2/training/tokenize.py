"""Turns the images of a data set into codes, once, so that training needs no encoder.

unicode2 tokenize --data data --model checkpoint --output tokens
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..checkpoints import check_checkpoint
from ..cli import at_least
from ..files import whole_file
from ..image_tables import ImageTable
from ..record import Record
from .tokens import NOTE, find_tables, hash_image_processor, hash_quantizer, hash_table, read_note


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 tokenize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of {split}-*.parquet with images and texts")
    parser.add_argument("--model", required=True, help="checkpoint whose quantizer makes the codes")
    parser.add_argument("--output", required=True, help="folder for {split}-*.parquet with codes and texts")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=at_least(1), default=64)
    return parser


def main(args: argparse.Namespace) -> None:
    """Files that are there must be of the same rows and quantizer. Files may be added to the data."""
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

    from transformers_unicode2 import UniCode2ForConditionalGeneration, UniCode2ImageProcessor

    quantizer = UniCode2ForConditionalGeneration.from_pretrained(model).get_quantizer()
    image_processor = UniCode2ImageProcessor.adopt(AutoImageProcessor.from_pretrained(model))

    def encode(images: list) -> list[list[int]]:
        pixels = image_processor(images, return_tensors="pt")
        return quantizer.encode_images(pixels["pixel_values"]).tolist()

    return encode


def write_codes(table: ImageTable, encode: Callable, file: Path, note: dict, batch_size: int) -> None:
    """Writes the rows of a table with the codes of their images, in the place of the images, batch by batch.

    Args:
        table: parquet file with a column `image`.
        encode: a list of RGB images to their codes, lists of integers.
        file: parquet file to write.
        note: what made the codes, kept in the file's metadata.
        batch_size: rows that are encoded at a time.

    Raises:
        `ValueError`: with file and row, when a row has no image or one that cannot be read.
    """
    import pyarrow as pa
    from datasets import Features, List, Value
    from pyarrow.parquet import ParquetWriter
    from tqdm import tqdm

    kept = {name: kind for name, kind in Features.from_arrow_schema(table.schema).items() if name != "image"}
    if "codes" in kept:
        raise ValueError(f"{table.file} has a column of codes already; give the images without it.")
    schema = Features({**kept, "codes": List(Value("int64"))}).arrow_schema
    schema, first = schema.with_metadata({**schema.metadata, NOTE: json.dumps(note, sort_keys=True)}), 0
    with ParquetWriter(file, schema) as writer, tqdm(total=len(table), unit="image", desc=table.file.name) as bar:
        for batch in table.batches(batch_size):
            images = [table.read_image(row, value) for row, value in enumerate(batch["image"].to_pylist(), first)]
            columns = [*(batch[name] for name in kept), pa.array(encode(images), pa.list_(pa.int64()))]
            writer.write_table(pa.Table.from_arrays(columns, names=[*kept, "codes"]).cast(schema))
            first += len(batch)
            bar.update(len(batch))


if __name__ == "__main__":
    main(make_parser().parse_args())
