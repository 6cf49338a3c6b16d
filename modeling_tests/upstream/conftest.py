"""Brings the test suites of the installed Transformers, from its source distribution.

Pip fetches it once into a cache. The wheel has no tests, and nothing of them is copied into this repository. The source
distribution lacks four modules that the suites import; `STUBS` holds what they need of them.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": (
        "from pathlib import Path\n\n\n"
        "def url_to_local_path(url):\n    return str(Path(__file__).with_name('photo.png'))\n"
    ),
}


def fetch_suites(version: str) -> Path:
    """Folder with `tests/` of a release of Transformers. A run that is cut off leaves nothing half-made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformers_unicode2"
    target = cache / f"transformers-{version}-tests"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            work,
        ]
        subprocess.run([*command, f"transformers=={version}"], check=True)
        with tarfile.open(next(Path(work).glob("transformers-*.tar.gz"))) as archive:
            members = [m for m in archive if m.name.startswith(f"transformers-{version}/tests/")]
            archive.extractall(work, members=members, filter="data")
        made = Path(work) / f"transformers-{version}"
        for name, text in STUBS.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(text)
        write_photo(made / "utils/photo.png")
        try:
            made.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return target


def write_photo(path: Path) -> None:
    """Stands for the picture that the suites fetch from the Hub."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(path)


root = fetch_suites(transformers.__version__)
for folder in (root / "utils", root):
    sys.path.insert(0, str(folder))
