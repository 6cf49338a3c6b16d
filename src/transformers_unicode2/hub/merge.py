"""Makes a whole checkpoint of an adapter and the checkpoint that it was trained on.

unicode2 merge adapter --output merged
"""

import argparse

from ..adapters import find_base, load_merged
from ..cards import write_card
from ..files import whole_folder
from ..record import Record, hash_source


def merge_adapter(adapter: str, output: str, base: str | None = None) -> bool:
    """Writes a checkpoint with the logits, up to rounding, of an adapter on its checkpoint, and in the dtype of that.

    Args:
        adapter (`str`): folder or Hub name of an adapter, as a stage with `lora` or PEFT writes it.
        output (`str`): folder to write.
        base (`str`, *optional*): folder or Hub name of the checkpoint, if it is not where the adapter says.

    Returns:
        Whether `output` was finished before.

    Raises:
        `ValueError`: when `adapter` is none, the checkpoint is another than it was trained on, or `output` holds
        anything else.
    """
    base, digest, note = find_base(adapter, base)
    made_of = {"command": "merge", "adapter": hash_source(adapter), "base": digest}
    with Record(output, made_of).making() as finished:
        if not finished:
            with whole_folder(output) as new:
                model, processor = load_merged(adapter, base, note)
                model.save_pretrained(new)
                processor.save_pretrained(new)
                write_card(new, output, f"The adapter `{adapter}`, merged into `{base}`.", [base])
    return finished


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 merge", description="Makes a whole checkpoint of an adapter and the one it was trained on."
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter: folder or Hub name")
    parser.add_argument("--base", help="its checkpoint, if it is not where the adapter says: folder or Hub name")
    parser.add_argument("--output", required=True, help="folder to write")
    return parser


def main(args: argparse.Namespace) -> None:
    finished = merge_adapter(args.adapter, args.output, args.base)
    print(f"{args.output} is finished; nothing to do" if finished else f"{args.output}: merged")


__all__ = ["merge_adapter"]
