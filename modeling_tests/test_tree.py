"""The shape of the source: who imports whom, what travels to the Hub, how long files and functions are."""

import ast
import os
import sys
from pathlib import Path

import pytest

import transformers_unicode2
from transformers_unicode2 import UniCode2Config

PACKAGE = Path(transformers_unicode2.__file__).parent
FILES = {file.relative_to(PACKAGE): file for file in sorted(PACKAGE.rglob("*.py"))}
TRAVELS = [name for name in FILES if "_unicode2" in name.name]

HERE = Path(__file__).parent
TESTS = [file.relative_to(HERE) for file in sorted(HERE.rglob("test_*.py")) if file.parent.name != "upstream"]
# Test files that are not named after a source file, and why.
OF_SEVERAL = {
    Path("evaluation/test_kills.py"): "commands that draw, killed at random moments",
    Path("test_ecosystem_unicode2.py"): "the model beside what Transformers, Accelerate and PyTorch offer",
    Path("test_half_a_million.py"): "benchmarks/half_a_million.py",
    Path("test_hub_configs.py"): "hub_configs/",
    Path("test_hub_unicode2.py"): "saving and loading all that travels, by way of a Hub",
    Path("test_quantized_unicode2.py"): "the model in fewer bits, by several libraries",
    Path("test_readme.py"): "README.md and the documents of the recipes",
    Path("test_remote_code.py"): "what travels, in a process without the package",
    Path("test_tree.py"): "the tree",
    Path("training/test_forms.py"): "all forms of data, from files to two steps of training",
    Path("training/test_golden_examples.py"): "what the stages of unicode2-tiny are given, from data to labels",
    Path("training/test_smol_recipe.py"): "training_recipes/unicode2-smol/",
    Path("training/test_stand_ins.py"): "training_recipes/unicode2-tiny/stand_ins/",
    Path("training/test_training_recipes.py"): "training_recipes/",
}

# Folders that each folder may import from, beside the root of the package and itself.
ALLOWED = {
    "codebook": {"search"},
    "diffusion": set(),
    "evaluation": {"codebook", "diffusion", "scenes"},
    "hub": {"codebook", "diffusion"},
    "scenes": set(),
    "search": set(),
    "training": {"diffusion", "scenes", "search"},
}
# Root files that are no part of the library: commands, and what puts the fast search in its place.
ENTRANCES = {"__init__.py", "ask.py", "cli.py", "demo.py"}
# What a file that travels may import beside its siblings and the standard library.
LIBRARIES = {"PIL", "diffusers", "huggingface_hub", "jinja2", "numpy", "peft", "safetensors", "torch", "transformers"}
# Modules and functions that start processes, run what they compiled, or run code that an import does not name.
STARTERS = ("ctypes", "multiprocessing", "pty", "runpy", "subprocess", "torch.multiprocessing")
STARTERS += ("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "asyncio.subprocess")
STARTERS += ("concurrent.futures.process", "concurrent.futures.ProcessPoolExecutor", "importlib.import_module")
STARTERS += ("torch._inductor", "torch.compile", "torch.utils.cpp_extension")
STARTERS += ("__import__", "compile", "eval", "exec")
# Families of functions.
FAMILIES = ("exec", "fork", "popen", "posix_spawn", "spawn", "system")
STARTERS += tuple(f"os.{name}" for name in dir(os) if name.startswith(FAMILIES))
# In the order in which they import one another, lowest first; a row holds files that do not.
ORDER = (
    {"encoders", "pixels", "planning", "search", "turns"},
    {"configuration", "generation", "images", "loading"},
    {"processing", "quantization"},
    {"visual_head"},
    {"adapters"},
    {"modeling"},
)


def find_imports(name, at_once=False):
    """Modules that a file imports: those of the package as paths below it, others by their full names.

    With `at_once` only what it needs in order to be imported itself, not what its functions import when they run.

    `from .hub import compose` counts as both `hub` and `hub/compose`.
    """
    inside, outside = set(), set()
    tree = ast.parse(FILES[name].read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = name.parent if node.level == 1 else name.parent.parent
            module = base.joinpath(*(node.module or "").split("."))
            inside |= {module} | {module / alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    for module in [module for module in outside if module.split(".")[0] == "transformers_unicode2"]:
        inside.add(Path(*module.split(".")[1:]))
    return inside, {module for module in outside if module.split(".")[0] != "transformers_unicode2"}


def find_functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def measure(function, lines):
    """Lines of a function, without its docstring and without empty ones."""
    first = function.body[0]
    documented = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(function) is not None else ()
    numbers = range(function.lineno, function.end_lineno + 1)
    return sum(number not in documented and bool(lines[number - 1].strip()) for number in numbers)


@pytest.mark.parametrize("name", TRAVELS, ids=str)
def test_what_travels_imports_only_what_travels(name):
    inside, outside = find_imports(name)
    siblings = {module for module in inside if module.with_suffix(".py") in TRAVELS}
    others = {module for module in inside - siblings if module.parent not in siblings}
    # Never run: it has Diffusers download the code of the language model, which lies in the same folder on the Hub.
    allowed = {Path("diffusion/modeling_unicode2")} if name.name == "repository_unicode2.py" else set()
    assert not {module for module in others if not {module, module.parent} & allowed}
    assert all(module.parent == name.parent for module in siblings), "remote code is one flat folder"
    assert {module.split(".")[0] for module in outside} <= LIBRARIES | sys.stdlib_module_names
    assert "__future__" not in outside


def find_starters(text: str) -> set[str]:
    """What a source uses or imports of `STARTERS`, by whatever name it is imported."""
    tree, names, used = ast.parse(text), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            used |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            first, *rest = ast.unparse(node).split(".")
            used.add(".".join([names.get(first) or first, *rest]))
    return {word for word in used for starter in STARTERS if word == starter or word.startswith(f"{starter}.")}


@pytest.mark.parametrize("name", TRAVELS, ids=str)
def test_what_travels_starts_no_process_and_runs_no_text(name):
    assert not find_starters(FILES[name].read_text())


@pytest.mark.parametrize(
    "text",
    [
        "import subprocess",
        "import os as system\nsystem.posix_spawnp('a', ['a'], {})",
        "from os import system as run\nrun('a')",
        "import asyncio\nasyncio.create_subprocess_exec('a')",
        "from asyncio import create_subprocess_shell",
        "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()",
        "from concurrent.futures import ProcessPoolExecutor",
        "import importlib\nimportlib.import_module('subprocess')",
        "import runpy",
        "import torch\ntorch.compile(print)",
        "from torch.utils import cpp_extension",
        "exec('a')",
        "run = eval",
        "__import__('subprocess')",
    ],
)
def test_what_starts_a_process_is_noticed(text):
    assert find_starters(text)
    assert not find_starters("import re, torch\nre.compile('a')\ntorch.compiler.is_compiling()\nmodel.eval()")


def test_what_is_saved_is_what_travels(tmp_path, tiny_checkpoint):
    UniCode2Config.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "model")
    saved = {file.name for file in (tmp_path / "model").glob("*.py")}
    assert saved == {name.name for name in TRAVELS if name.parent == Path(".")}
    pytest.importorskip("diffusers")
    from transformers_unicode2 import UniCode2FluxPipeline

    UniCode2FluxPipeline.from_pretrained(tiny_checkpoint).save_config(tmp_path / "pipeline")
    assert {file.name for file in (tmp_path / "pipeline").glob("*.py")} == {name.name for name in TRAVELS}


def test_root_files_import_no_folder():
    for name in (name for name in FILES if name.parent == Path(".") and name.name not in ENTRANCES):
        folders = {module.parts[0] for module in find_imports(name)[0] if module.parts} & ALLOWED.keys()
        assert not folders, f"{name} imports {', '.join(sorted(folders))}"


@pytest.mark.parametrize("name", [name for name in FILES if len(name.parts) > 1], ids=str)
def test_folders_import_only_those_below_them(name):
    folder = name.parts[0]
    folders = {module.parts[0] for module in find_imports(name)[0] if module.parts} & ALLOWED.keys()
    assert folders <= ALLOWED[folder] | {folder}


def test_the_model_files_import_one_another_in_one_order():
    rank = {f"{name}_unicode2": place for place, row in enumerate(ORDER) for name in row}
    files = {name.stem for name in TRAVELS if name.parent == Path(".")}
    assert files == rank.keys()
    for file in files:
        imported = {module.parts[0] for module in find_imports(Path(f"{file}.py"))[0] if module.parts}
        assert all(rank[other] < rank[file] for other in imported & files), file


@pytest.mark.parametrize("folder, allowed", [("search", {"torch"}), ("scenes", {"numpy", "PIL"})])
def test_folders_that_know_nothing_of_the_library(folder, allowed):
    for name in (name for name in FILES if name.parts[0] == folder):
        _, outside = find_imports(name, at_once=True)
        extra = {module.split(".")[0] for module in outside} - sys.stdlib_module_names - allowed
        assert not extra, f"{name} imports {', '.join(sorted(extra))}"


@pytest.mark.parametrize("name", TESTS, ids=str)
def test_tests_mirror_the_tree(name):
    """A test file is named after what it tests, or begins with that name and is one of several."""
    sources = {file.with_suffix("") for file in FILES}
    parts = name.stem.removeprefix("test_").split("_")
    names = {name.parent / "_".join(parts[:count]) for count in range(1, len(parts) + 1)}
    assert names & sources or name in OF_SEVERAL


def test_what_is_no_mirror_is_there():
    assert OF_SEVERAL.keys() <= set(TESTS)


def test_files_and_functions_are_short():
    longest = {name: 550 if name == Path("modeling_unicode2.py") else 400 for name in FILES}
    texts = {name: file.read_text() for name, file in FILES.items()}
    long = {str(name): len(text.splitlines()) for name, text in texts.items()}
    long = {name: size for name, size in long.items() if size > longest[Path(name)]}
    for name, text in texts.items():
        for function in find_functions(ast.parse(text)):
            size = measure(function, text.splitlines())
            if function.name not in ("forward", "__call__", "main") and size > 35:
                long[f"{name}: {function.name}"] = size
    assert not long
