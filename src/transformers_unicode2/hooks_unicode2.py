"""Something to do once another library has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType


class ImportHook(MetaPathFinder):
    """Finds the module `name` as Python would, and calls `function` with it once it has run."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]):
        self.name, self.function = name, function

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.function(module)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls `function` with the module `name`: now if it is imported already, else when it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, ImportHook(name, function))


__all__ = ["when_imported"]
