"""Loads the test suites of Diffusers from a checkout, which no package on a registry has.

`git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers`, and its path in `DIFFUSERS_SOURCE`.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SOURCE = os.environ.get("DIFFUSERS_SOURCE")


def load_suite(module: str):
    """Module of the suites, such as `pipelines.testing_utils`. Without a checkout, the calling file is skipped.

    Transformers' suites are the package `tests`, so these are `diffusers_tests`.
    """
    if SOURCE is None:
        pytest.skip("DIFFUSERS_SOURCE names no checkout of Diffusers", allow_module_level=True)
    if "diffusers_tests" not in sys.modules:
        folder = Path(SOURCE).resolve() / "tests"
        spec = importlib.util.spec_from_file_location(
            "diffusers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["diffusers_tests"])
    return importlib.import_module(f"diffusers_tests.{module}")
