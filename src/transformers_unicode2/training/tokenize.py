"""Turns data into chats with the codes of their images, once, so that training needs no encoder.

    unicode2 tokenize --data llava.json --image-root images --model checkpoint --output tokens
    unicode2 tokenize --data captions.csv pictures/ --task both --model checkpoint --output tokens
    accelerate launch -m transformers_unicode2.training.tokenize --data captions.csv --model checkpoint --output tokens

Data may be LLaVA's JSON, JourneyDB's, chats, captions or questions: in JSON, CSV, parquet, WebDataset tars, folders of
images or data sets of the Hub. `--task` says what becomes of captions. Several tasks write a folder each. Rows
that make no chat, that the model's chat template cannot write, or whose images cannot be read are listed in
`refused-{split}.log`. A run that was killed resumes, and the output is the same for any number of processes and
workers. An output does not go on with other pictures than it was begun with.
"""

import argparse
import fnmatch
import glob
import hashlib
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..checkpoints import check_checkpoint, check_name
from ..cli import SHARE, at_least
from ..files import explained, make_folders, remove, remove_unfinished, write_file
from ..images_unicode2 import one_line
from ..processes import agree, follow_launcher, join
from ..record import Record, hash_file
from ..tokens import CROP, hash_image_processor, hash_quantizer, hash_rows
from .columns import FORMATS
from .folders import list_files
from .image_files import check_image_files, collect_notes, notes_file, write_notes
from .row_index import Job, RowIndex, check_blocks, index_rows
from .shards import write_shard
from .sources import describe, open_source
from .tables import is_image, is_other_image
from .templates import CAPTION_PROMPT, USUAL, read_tasks

# Folder of rows that are chats already, beside the folders of several tasks
CHATS = "chats"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 tokenize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="files, folders or names of data sets")
    add("--model", required=True, help="checkpoint, or quantizer alone, that makes the codes: a folder or Hub name")
    add("--output", required=True, help="folder for {split}-*.parquet with messages and codes")
    add("--format", choices=FORMATS, help="what the rows are (default: recognised by their columns)")
    add("--image-root", help="folder that the paths of images are relative to (default: that of the file with them)")
    add("--image-column", help="column with the image (default: recognised by its name)")
    add("--caption-column", help="column with the caption (default: recognised by its name)")
    add(
        "--task",
        help=f"what becomes of rows that are no chats: {', '.join(USUAL)}, both (read and draw), or a YAML file with\n"
        "templates, see training_recipes/README.md (default: the questions that rows have, or read)",
    )
    add("--center-crop", action="store_true", help="encode the middle square of each image (default: all of it)")
    add("--split", default="train", help="of the data and of the output (default: %(default)s)")
    add("--streaming", action="store_true", help="read data sets of the Hub without a copy on disk, twice")
    add(
        "--max-bad-share",
        type=SHARE,
        default=0.01,
        help="largest share of rows that may be unusable and are left out (default: %(default)s)",
    )
    add(
        "--num-workers",
        type=at_least(0),
        help="processes that decode and resize images, for each encoder (default: one a core, 8 at most)",
    )
    add("--batch-size", type=at_least(1), default=64, help="images encoded at a time (default: %(default)s)")
    add("--rows-per-shard", type=at_least(1), default=10_000, help="rows of a parquet file (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    """A folder that was begun resumes; one that was made of something else is refused."""
    import torch

    follow_launcher()
    state = join(cpu=not torch.cuda.is_available())
    try:
        run(args, state)
    finally:
        # Gloo's threads can abort the process if they live until the interpreter ends.
        state.destroy_process_group()


def run(args: argparse.Namespace, state) -> None:
    from .image_codes import encode_images

    check_places(args)
    jobs, processor = open_jobs(args), load_processor(args.model)
    made_of, work = agree(lambda: describe_inputs(args, jobs, processor)), Path(args.output, f"work-{args.split}")
    with explained(args.output), ExitStack() as stack:
        if agree(lambda: enter(args, jobs, work, made_of, stack)):
            return
        if agree(lambda: not (work / "indexed").is_file()):
            agree(lambda: print(*(describe(job.source) for job in jobs), sep="\n", flush=True))
            agree(lambda: index_rows(jobs, work, args.rows_per_shard, processor))
        index = RowIndex(jobs, work)
        agree(lambda: check_refused(index, {}, args))
        agree(lambda: print(*name_unread(args.data, index), sep="\n", end="", flush=True))
        quantizer, image_processor = load_quantizer(args.model, state.device)
        workers = args.num_workers
        if workers is None:
            workers = min(8, max(1, os.cpu_count() // state.num_processes))
        encode_images(index, quantizer, image_processor, args.batch_size, workers, state, args.center_crop)
        state.wait_for_everyone()
        write_shards(index, args, quantizer.config.codebook_config.codebook_size, made_of, state)
        state.wait_for_everyone()
        agree(lambda: write_notes(notes_file(args.output, args.split), collect_notes(index.blocks)))
    agree(lambda: finish(index, args))


def check_places(args: argparse.Namespace) -> None:
    """Raises `ValueError` when the output would be among the data."""
    output = Path(args.output).resolve()
    for data in args.data:
        if Path(data).is_dir() and output.is_relative_to(Path(data).resolve()):
            raise ValueError(f"--output {args.output} is inside --data {data}; choose a folder beside it.")
        # Of the output itself, and of its folders of tasks
        written = (output / f"{args.split}-0.parquet", output / "task" / f"{args.split}-0.parquet")
        if not Path(data).exists() and any(matches(file.parts, Path(os.path.abspath(data)).parts) for file in written):
            raise ValueError(f"--data {data} would take in what is written to --output {args.output}; choose another.")
        inside = [file for file in glob.glob(data, recursive=True) if Path(file).resolve().is_relative_to(output)]
        if inside:
            raise ValueError(f"--output {args.output} has {inside[0]} of --data {data} in it; choose another folder.")


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path is among those of a glob with `**`."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def load_processor(model: str):
    """The `UniCode2Processor` of a checkpoint; `None` of a quantizer that is alone, which knows no chats."""
    from transformers_unicode2 import UniCode2Config, UniCode2Processor

    is_model = read_config(model).get("model_type") == UniCode2Config.model_type
    return UniCode2Processor.from_pretrained(model) if is_model else None


def open_jobs(args: argparse.Namespace) -> list:
    """Each task with each source. Chats are as they are, whatever the tasks."""
    tasks = {None: None} if args.task is None else read_tasks(args.task)
    prompt = read_config(args.model).get("caption_prompt") or CAPTION_PROMPT
    options = {name: getattr(args, name) for name in ("format", "image_root", "split", "streaming")}
    options |= {"image_column": args.image_column, "caption_column": args.caption_column, "caption_prompt": prompt}
    jobs = []
    for number, data in enumerate(args.data, 1):
        table = None
        for name, task in tasks.items():
            source = open_source(data, task=task, **options)
            # What was found out of its files is found out once
            table = table or source.table
            source = replace(source, table=table)
            if source.task is None:
                jobs.append(Job(CHATS if len(tasks) > 1 else "", number, source))
                break
            jobs.append(Job(name if len(tasks) > 1 else "", number, source))
    return jobs


def read_config(model: str) -> dict:
    """The entries of a checkpoint's configuration. Raises `ValueError` when there is no such checkpoint."""
    from transformers_unicode2 import UniCode2Config

    check_name(model)
    check_checkpoint(model)
    try:
        return UniCode2Config.get_config_dict(model)[0]
    except OSError as error:
        raise ValueError(f"There is no folder {model}, and the Hub gives no checkpoint of this name.") from error


def describe_inputs(args: argparse.Namespace, jobs: list, processor) -> dict:
    """What the output is made of; the places of models and data do not matter."""
    files = {}
    for job in jobs:
        if job.number not in files:
            files[job.number] = hash_rows(job.source.table)
    return {
        "command": "tokenize",
        "quantizer": hash_quantizer(args.model),
        "image processor": hash_image_processor(args.model),
        "data": {str(number): digest for number, digest in files.items()},
        "chats": {f"{job.folder} {job.number}".strip(): job.source.digest() for job in jobs},
        "chat template": processor and hashlib.sha256(processor.chat_template.encode()).hexdigest(),
        "rows_per_shard": args.rows_per_shard,
        **({CROP: True} if args.center_crop else {}),
    }


def enter(args: argparse.Namespace, jobs: list, work: Path, made_of: dict, stack: ExitStack) -> bool:
    """Holds the output for this run. Returns whether it is finished."""
    # Folders of all tasks, so that those of other tasks are noticed
    output, owns = Path(args.output), (f"{args.split}-*.parquet", f"*/{args.split}-*.parquet", refused_name(args))
    record = Record(output, made_of, owns, args.split, passing=(work.name,))
    finished = stack.enter_context(record.making())
    if finished:
        notes = notes_file(output, args.split)
        if not notes.is_file():
            raise ValueError(
                f"{notes} is missing, so that pictures that changed would not be noticed; delete {output} and run the "
                "same command again."
            )
        check_image_files(jobs, np.load(notes), (len(jobs), None))
        remove(work)
        print(f"{output} is finished; nothing to do{count_refused(args)}")
    else:
        make_folders(work)
        remove_unfinished(work)
        check_blocks(jobs, work)
    return finished


def finish(index, args: argparse.Namespace) -> None:
    """Says what was written, and removes what is no longer needed."""
    from .image_codes import ImageCodes

    num_refused, count = len(list_refused(args)), sum(block["num_rows"] for block in index.blocks)
    num_images = len(index.images) - len(ImageCodes(index.work).errors)
    print(f"{args.output}: {count - num_refused:,} chats with {num_images:,} different images{count_refused(args)}")
    remove(index.work)


def list_refused(args: argparse.Namespace) -> list[str]:
    """The lines of the file about the rows that are left out."""
    file = Path(args.output, refused_name(args))
    return file.read_text().splitlines() if file.is_file() else []


def count_refused(args: argparse.Namespace) -> str:
    """How many rows are left out, as the end of a sentence."""
    count = len(list_refused(args))
    are = "row is" if count == 1 else "rows are"
    return f"; {count} {are} left out, see {Path(args.output, refused_name(args))}" if count else ""


def refused_name(args: argparse.Namespace) -> str:
    return f"refused-{args.split}.log"


def name_unread(data: list[str], index) -> list[str]:
    """Lines about image files, beside those that rows of a folder name, that no row names."""
    named = {os.path.realpath(image["path"]) for image in index.images if image["path"]}
    # Of equal files one is kept, whichever rows name
    keys, lines = {image["key"] for image in index.images}, []
    for folder in filter(os.path.isdir, data):
        files = [file for file in list_files(Path(folder)) if is_image(file)]
        places = {file.parent for file in files if os.path.realpath(file) in named}
        unread = [file for file in files if file.parent in places and os.path.realpath(file) not in named]
        unread = [file for file in unread if hash_file(file) not in keys]
        others = [file for file in list_files(Path(folder)) if is_other_image(file)]
        if others:
            lines.append(
                f"{folder}: {len(others)} files are images of kinds that are not read, such as {others[0].name}\n"
            )
        if unread:
            lines.append(
                f"{folder}: no row names {len(unread)} of {len(files)} image files, such as {unread[0].name}\n"
            )
    return lines


def load_quantizer(model: str, device):
    """The quantizer of a checkpoint, or one that is alone, with its image processor."""
    from transformers import AutoImageProcessor

    from transformers_unicode2 import UniCode2ImageProcessor, UniCode2Quantizer

    image_processor = UniCode2ImageProcessor.adopt(AutoImageProcessor.from_pretrained(model))
    return UniCode2Quantizer.from_pretrained(model).to(device), image_processor


def check_refused(index, errors: dict[int, str], args: argparse.Namespace) -> None:
    """Lists the rows that cannot be used in a file.

    Raises `ValueError` when they are too many. The next run then reads the rows again, of repaired files or with
    another `--image-root`, and keeps the codes.

    Args:
        index: `RowIndex` of all rows.
        errors: reasons of the images that cannot be read, by their numbers.
    """
    refused, count = index.find_refused(errors), sum(block["num_rows"] for block in index.blocks)
    lines = [f"{one_line(row['name'])} row {row['row']}: {one_line(row['reason'])}." for row in refused]
    file = Path(args.output, refused_name(args))
    if refused:
        write_file(file, "".join(f"{line}\n" for line in lines).encode())
    else:
        remove(file)
    if len(refused) > args.max_bad_share * count or len(refused) == count:
        missing = [row["missing"] for row in refused if row["missing"] is not None]
        reason = lines[0][:-1] if lines else "there are none"
        if missing:
            name = "names an image file that is" if len(missing) == 1 else "name image files that are"
            reason += f"; {len(missing)} of them {name} not there (--image-root says where images are)"
        index.forget()
        raise ValueError(
            f"{len(refused)} of {count} rows cannot be used, and --max-bad-share allows a share of "
            f"{args.max_bad_share:g}; {file} lists them, and the first is {reason}."
        )


def write_shards(index, args: argparse.Namespace, codebook_size: int, made_of: dict, state) -> None:
    """Writes the shards that are not there yet, of this process's share. Rows that are refused are left out."""
    from .image_codes import ImageCodes

    codes, output = ImageCodes(index.work), Path(args.output)
    agree(lambda: check_refused(index, codes.errors, args))
    for number, name in index.list_shards()[state.process_index :: state.num_processes]:
        file = output / name.format(args.split)
        chats = [chat for chat in index.read_chats(number) if not codes.errors.keys() & set(chat["images"])]
        if not file.is_file() and chats:
            make_folders(file.parent)
            source = index.jobs[index.blocks[number]["job"]].number
            rows = [{**chat, "codes": [codes[image] for image in chat["images"]], "source": source} for chat in chats]
            write_shard(file, rows, codebook_size, index.extras, made_of)


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["tokenize"]
    run_command()
