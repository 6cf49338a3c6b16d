"""What tasks of lmms-eval are made of, read from their files without running them.

A task is a YAML file, those that it includes, and the functions that it names by `!function module.function`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

# What code that asks a judge names: modules of clients, and variables with a key
CLIENTS = ("openai", "anthropic", "llm_judge")
KEY = re.compile(r"(?!YOUR_)[A-Z0-9_]+_API_KEY")
# Of a client whose key is not named beside it
DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Named:
    """A function that a YAML file names, with the folder of that file."""

    folder: Path
    module: str
    function: str

    @property
    def file(self) -> Path:
        return self.folder.joinpath(*self.module.split(".")).with_suffix(".py")


def read_yaml(file: Path) -> tuple[dict, set[Path]]:
    """A task with what it includes, and the YAML files of both. Raises `ValueError` on a file that is none."""

    class Loader(yaml.FullLoader):
        pass

    def construct(loader, node):
        module, _, function = node.value.rpartition(".")
        return Named(file.parent, module, function)

    Loader.add_constructor("!function", construct)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no YAML of a task ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no YAML of a task: it is {type(content).__name__}, where entries must be.")
    included, files, names = {}, {file}, content.pop("include", [])
    for name in reversed([names] if isinstance(names, str) else names):
        place = Path(name) if Path(name).is_file() else file.parent / name
        part, more = read_yaml(place)
        included, files = {**included, **part}, files | more
    return {**included, **content}, files


def list_yaml(index: dict[str, dict], name: str) -> Iterator[Path]:
    """The YAML files of a task, group or tag of lmms-eval's index, see `TaskManager.task_index`."""
    entry = index.get(name)
    if entry is None:
        return
    parts = entry["task"] if isinstance(entry.get("task"), list) else []
    if entry["yaml_path"] != -1:
        yield Path(entry["yaml_path"])
        inside = read_yaml(Path(entry["yaml_path"]))[0].get("task")
        parts = inside if isinstance(inside, list) else parts
    for part in parts:
        part = part.get("task", "") if isinstance(part, dict) else part
        if part != name and isinstance(part, str):
            yield from list_yaml(index, part)


def find_functions(value) -> Iterator[Named]:
    """All functions that a task names, at any depth."""
    if isinstance(value, Named):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from find_functions(part)


def list_files(file: Path, root: Path) -> set[Path]:
    """The files of a task below a folder, resolved: YAML, and modules with those there that they import."""
    content, files = read_yaml(file)
    todo = [named.file for named in find_functions(content)]
    while todo:
        module = todo.pop()
        if module is not None and module not in files and module.is_file():
            files.add(module)
            todo += [find_module(module, name) for name, _ in read_module(module)[1].values()]
    return {one.resolve() for one in files if one.resolve().is_relative_to(root.resolve())}


@lru_cache(maxsize=256)
def read_module(file: Path) -> tuple[dict[str, ast.AST], dict[str, tuple[str, str]]]:
    """Statements of a module by the names that they bind, and module and object of imported names.

    Raises `ValueError` when it is no Python.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no Python ({error}).") from error
    bound, imported = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(one.asname or one.name.split(".")[0]): (one.name, "") for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {(one.asname or one.name): (node.module or one.name, one.name) for one in node.names}
    for node in tree.body:
        defines = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for one in [node] if defines else ast.walk(node):
            if defines or isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                bound[node.name if defines else one.id] = node
    return bound, imported


def find_module(file: Path, name: str) -> Path | None:
    """The file of a module that another one imports: beside it, or in the package that it is of."""
    places = [folder.joinpath(*name.split(".")).with_suffix(".py") for folder in file.parents]
    return next((place for place in places if place.is_file()), None)


def find_keys(file: Path, function: str) -> set[str]:
    """Variables with keys of judges that a function asks, itself or by what it uses; empty if it asks none."""
    todo, seen, keys, clients = [(file, function)], set(), set(), False
    while todo:
        file, name = todo.pop()
        if (file, name) in seen or not file.is_file():
            continue
        seen.add((file, name))
        bound, imported = read_module(file)
        module, inner = imported.get(name, ("", ""))
        if {*module.split(".")} & {*CLIENTS}:
            clients = True
        elif name not in bound and module and find_module(file, module):
            todo.append((find_module(file, module), inner))
        for node in ast.walk(bound[name]) if name in bound else ():
            if isinstance(node, ast.Name):
                todo.append((file, node.id))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                todo += [(file, one.asname or one.name.split(".")[0]) for one in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and KEY.fullmatch(node.value):
                keys.add(node.value)
    return keys or ({DEFAULT_KEY} if clients else set())


def find_judge(file: Path) -> set[str]:
    """Variables with keys of the judges that a task asks about answers; empty if it asks none."""
    content, _ = read_yaml(file)
    asked = (content.get(name) for name in ("process_results", "metric_list", "filter_list", "class"))
    return set().union(*(find_keys(one.file, one.function) for part in asked for one in find_functions(part)))
