"""`unicode2 <command>`: finds the command's module, nothing else."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

# Command: module, its functions for the parser and for the work, what it does
COMMANDS = {
    "demo": ("demo", "make_parser", "main", "ask about an image, draw a prompt"),
    "ask": ("ask", "make_parser", "main", "ask any checkpoint or adapter about images, or draw with it"),
    "evaluate scenes": ("evaluation.scenes", "make_parser", "main", "score a checkpoint on drawn scenes"),
    "evaluate captions": ("evaluation.captions", "make_parser", "main", "whether a checkpoint reads its images"),
    "evaluate understanding": ("evaluation.understanding", "make_parser", "main", "score Table 1 by lmms-eval"),
    "evaluate generation": ("evaluation.generation", "make_parser", "main", "draw GenEval or DPG-Bench"),
    "evaluate geneval": ("evaluation.geneval", "make_parser", "main", "score GenEval by Transformers' Mask2Former"),
    "evaluate dpg": ("evaluation.dpg", "make_parser", "main", "score DPG-Bench by a model that answers questions"),
    "evaluate reconstruction": ("evaluation.reconstruction", "make_parser", "main", "redraw pictures and compare"),
    "evaluate model-index": ("evaluation.model_index", "make_parser", "main", "put figures into a model card"),
    "evaluate compare": ("evaluation.compare", "make_parser", "main", "compare two score cards, item by item"),
    "codebook build": ("codebook.build", "make_parser", "main", "build a codebook from images (Algorithm 1)"),
    "codebook report": ("codebook.report", "make_parser", "main", "write a page about how images use a codebook"),
    "codebook grow": ("codebook.grow", "make_parser", "main", "add codes to a codebook; existing ids stay"),
    "codebook preview": ("codebook.preview", "make_parser", "main", "draw a thumbnail of each code"),
    "init": ("hub.compose", "make_parser", "main", "make a checkpoint of language model, encoder and codebook"),
    "merge": ("hub.merge", "make_parser", "main", "make a whole checkpoint of an adapter and its base"),
    "assemble": ("hub.assemble", "make_parser", "main", "make one repository of checkpoint, mapper and decoder"),
    "tokenize": ("training.tokenize", "make_parser", "main", "turn the images of a data set into codes"),
    "scenes": ("scenes.write", "make_parser", "main", "write drawn scenes and emoji to parquet"),
}

# Module that may be missing: extra that brings it
EXTRAS = {
    "diffusers": "diffusion",
    "faiss": "codebook",
    "datasets": "codebook",
    "trl": "training",
    "matplotlib": "codebook",
    "skimage": "evaluation",
    "torchmetrics": "evaluation",
    "lmms_eval": "benchmarks",
}


def main() -> None:
    words = sys.argv[1:]
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if words[:1] == ["--version"]:
        from . import __version__

        print(f"unicode2 {__version__}")
        return
    if name is None:
        # Those of a group alone, after its name
        group = words[0] if words and any(one.startswith(f"{words[0]} ") for one in COMMANDS) else ""
        shown = {one: row for one, row in COMMANDS.items() if one.startswith(f"{group} " if group else "")}
        width = max(map(len, shown)) + 2
        rows = "\n".join(f"  {one:<{width}}{row[-1]}" for one, row in shown.items())
        usage = f"usage: unicode2 <command> [options]\n\n{rows}"
        if not words or {"-h", "--help"} & set(words):
            print(usage)
            sys.exit(0)
        print(f"{usage}\n\nunicode2: there is no command {' '.join(words[:2])}", file=sys.stderr)
        sys.exit(2)
    module, make_parser, run, _ = COMMANDS[name]
    module = import_module(f".{module}", __package__)
    arguments = getattr(module, make_parser)().parse_args(words[len(name.split()) :])
    with sentences(f"unicode2 {name}"):
        getattr(module, run)(arguments)


@contextmanager
def sentences(name: str) -> Iterator[None]:
    """Makes of an error one sentence on stderr, after the name of a command, and exit status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = f"'transformers_unicode2[{EXTRAS[error.name]}]'" if error.name in EXTRAS else error.name
        print(f"{name}: needs {error.name}; pip install {package}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # Known by the class or the text of the error only
        if lacks_memory(error):
            what = "there is not enough memory"
        elif is_damage(error):
            what = "the checkpoint is damaged or its sizes disagree"
        else:
            raise
        print(f"{name}: {what}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def lacks_memory(error: Exception) -> bool:
    """Whether an error of Python, NumPy or torch says that an array does not fit in memory."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def at_least(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option: a finite number of the type of `least`, neither below that nor above `most`."""
    kind, limits = type(least), f"at least {least:g}" if most == math.inf else f"from {least:g} to {most}"

    def convert(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be {limits}.")
        return value

    # Names the type in argparse's message about a text that is no number
    convert.__name__ = kind.__name__
    return convert


# Types of options: a share of something, and what every generator takes.
SHARE = at_least(0.0, 1)
SEED = at_least(0, 2**32 - 1)


def first_line(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A line that ends so says nothing without the next
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def is_damage(error: Exception) -> bool:
    """Whether an error is what the libraries raise of a truncated file or of a config that does not fit the weights."""
    names = {kind.__name__ for kind in type(error).__mro__}
    known = bool(names & {"SafetensorError", "StrictDataclassError"})
    return known or isinstance(error, RuntimeError) and "mismatched" in str(error)


if __name__ == "__main__":
    main()
