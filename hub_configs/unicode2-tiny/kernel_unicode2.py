"""The nearest-code search of `search_unicode2.py` as a C kernel, compiled on first use; without a C compiler there is none.

It is compiled once for a processor type into `$UNICODE2_CACHE`, by default `~/.cache/unicode2`, or, where that cannot be written to,
for each process. `UNICODE2_KERNEL=0` leaves the search to torch. Both find the same codes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from .kernel_source_unicode2 import SOURCE

BLOCK = 64  # codes that the kernel looks at together, from any multiple of 16 on: the tables are padded by as many
FLAGS = (
    "-g -O3 -march=native -ffp-contract=off -fno-math-errno -fPIC".split()
)  # no contraction: the same distances as torch has
POINTERS = ("prefix", "rest", "constant", "units", "rest_units", "more", "codes", "spans", "centre_norms", "extents")
SIZES = ("size", "dim", "prefix_size", "rest_size", "num_parts", "num_spans")


class Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("costs", ctypes.c_float * 4),
        ("limits", ctypes.c_float * 6),
    ]


class Queries(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("prefix", "rest", "features", "scales", "lost", "norms", "squares", "near")
        ),
        *((name, ctypes.c_int64) for name in ("count", "num_near")),
        ("found", ctypes.c_void_p),
    ]


@functools.cache
def load_kernel():
    """The compiled library, or `None` where it cannot be compiled or is not wanted."""
    if os.environ.get("UNICODE2_KERNEL") == "0":
        return None
    library = load_cached()
    try:
        library = library or load_private()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    numbers = (ctypes.c_int64, ctypes.c_int, ctypes.c_double)
    library.search.argtypes = (ctypes.POINTER(Tables), ctypes.POINTER(Queries), *numbers, ctypes.c_void_p)
    pointers = (ctypes.c_void_p,) * 4
    library.improve.argtypes = (*pointers[:2], ctypes.c_int64, ctypes.c_int64, *pointers)
    library.workspace_size.argtypes, library.workspace_size.restype = (ctypes.c_int64,) * 3, ctypes.c_int64
    return library


def load_cached() -> ctypes.CDLL | None:
    """The library from the cache, compiled if it is not there or damaged; `None` without a folder that only this user writes to."""
    try:
        folder = Path(os.environ.get("UNICODE2_CACHE") or Path.home() / ".cache" / "unicode2")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = fingerprint()
        if not is_private(folder):
            return None
        for file in folder.glob(f"{key}-*.so"):
            if (
                is_private(file) and file.stem == f"{key}-{digest(file.read_bytes())}"
            ):  # a damaged one would end the process
                return ctypes.CDLL(str(file))
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = compile_kernel(Path(work))
            built.chmod(0o700)
            target = folder / f"{key}-{digest(built.read_bytes())}.so"
            os.replace(built, target)  # whole, whoever else compiles at the same time
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def load_private() -> ctypes.CDLL:
    """The library, compiled in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        return ctypes.CDLL(str(compile_kernel(Path(work))))


def is_private(path: Path) -> bool:
    """Whether nobody but this user, or root, can write to a file or folder."""
    status = path.stat()
    return os.name != "posix" or (status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022)


def fingerprint() -> str:
    """Of the source, the compiler and the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    processor = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return digest(repr((SOURCE, FLAGS, find_openmp(), os.environ.get("CC"), platform.platform(), processor)).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compile_kernel(work: Path) -> Path:
    """Compiles the kernel in a folder and returns the library's path."""
    built, part = work / "search.so", work / "search.o"
    compiler, openmp = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS], find_openmp()
    flags = ["-fopenmp"] if openmp else []
    commands = ([*flags, "-c", "-x", "c", "-", "-o", str(part)], ["-shared", str(part), *openmp, "-o", str(built)])
    for command in commands:
        subprocess.run([*compiler, *command], input=SOURCE.encode(), check=True, capture_output=True, timeout=300)
    return built


def find_openmp() -> list[str]:
    """The GNU OpenMP library that torch brings, if it does: threads of another one would wait for a core while torch's spin on it."""
    return [str(file) for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")][:1]
