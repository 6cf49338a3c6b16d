"""`kernel.c`, compiled on first use. Without a C compiler there is no kernel, and the search is left to torch, which
finds the same codes.

It is compiled once for a processor type into `$UNICODE2_CACHE`, by default `~/.cache/unicode2`. Where that cannot be
written to, it is compiled for each process. A warning says so whenever it is compiled, and when that fails.
`UNICODE2_KERNEL=0` leaves the search to torch.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

# Python's own: its warnings are shown where nothing else is set up.
logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.c")
# Codes that the kernel looks at together, from any multiple of 16 on: the tables are padded by as many.
BLOCK = 64
# No contraction: the distances are the same as those of torch.
FLAGS = "-g -O3 -march=native -ffp-contract=off -fno-math-errno -fPIC".split()


class Struct(ctypes.Structure):
    """A struct of `kernel.c`. `arrays` has what is behind each pointer: the dtype, then factors of the least number of
    elements, which are numbers or names of fields."""

    arrays: dict[str, tuple] = {}

    @classmethod
    def fill(cls, **values) -> "Struct":
        """The struct of all its fields by name; it keeps the tensors alive.

        Raises `TypeError` when a field is missing or surplus, and `ValueError` on a tensor of another dtype,
        elsewhere than on the CPU, not contiguous, or too small.
        """
        names = {name for name, _ in cls._fields_}
        if names != values.keys():
            raise TypeError(f"{cls.__name__} has other fields than were given: {sorted(names ^ values.keys())}.")
        for name, (dtype, *factors) in cls.arrays.items():
            tensor, least = values[name], math.prod(values.get(factor, factor) for factor in factors)
            if (tensor.dtype, tensor.device.type, tensor.is_contiguous()) != (dtype, "cpu", True):
                raise ValueError(
                    f"`{name}` of the kernel is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; it "
                    f"must be {dtype} on the CPU, contiguous."
                )
            if tensor.numel() < least:
                raise ValueError(f"`{name}` of the kernel has {tensor.numel()} elements; it reads {least:g}.")
        struct = cls(**{name: value.data_ptr() if name in cls.arrays else value for name, value in values.items()})
        struct.kept = values
        return struct


class Tables(Struct):
    arrays = {
        # Numbers of 8 and of 4 bits, in words of 32.
        "prefix": (torch.int32, "size", "prefix_size", 8 / 32),
        "rest": (torch.int32, "size", "rest_size", 4 / 32),
        "constant": (torch.float32, "size"),
        "units": (torch.bfloat16, "size", 2),
        "rest_units": (torch.bfloat16, "size", 2),
        "more": (torch.bfloat16, "size", 2),
        "codes": (torch.float32, "size", "dim"),
        "spans": (torch.int64, "num_spans", 3),
        "centre_norms": (torch.float32, "num_parts"),
        "extents": (torch.float32, "num_parts", 4),
    }
    _fields_ = [
        *((name, c_void_p) for name in arrays),
        *((name, c_int64) for name in ("size", "dim", "prefix_size", "rest_size", "num_parts", "num_spans")),
        *((name, c_float) for name in ("first_cost", "second_cost", "distance_cost", "scan_cost")),
        *((name, c_float) for name in ("prefix_norm", "prefix_error", "rest_norm", "rest_error", "above", "error")),
    ]


class Queries(Struct):
    # The widths of the first three are those of the tables.
    arrays = {
        "prefix": (torch.int8, "count"),
        "rest": (torch.int8, "count"),
        "features": (torch.float32, "count"),
        "scales": (torch.float32, "count", 2),
        "lost": (torch.float32, "count", 2),
        "norms": (torch.float32, "count"),
        "squares": (torch.float32, "count", 4),
        "near": (torch.int64, "count", "num_near"),
        "found": (torch.int64, "count"),
    }
    _fields_ = [*((name, c_void_p) for name in arrays), ("count", c_int64), ("num_near", c_int64)]


class Pairs(Struct):
    # How many features and codes there are is not known here.
    arrays = {
        "features": (torch.float32, "dim"),
        "codes": (torch.float32, "dim"),
        "rows": (torch.int64, "count"),
        "numbers": (torch.int64, "count"),
        "distances": (torch.float64, 1),
        "found": (torch.int64, 1),
    }
    _fields_ = [*((name, c_void_p) for name in arrays), ("dim", c_int64), ("count", c_int64)]


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """The compiled library, or `None` where it cannot be compiled or is not wanted."""
    if os.environ.get("UNICODE2_KERNEL") == "0":
        return None
    try:
        if not shutil.which(find_compiler()[0]):
            return None
        library = load_cached() or load_private()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("%s could not be compiled, so codes are searched more slowly, with torch: %s", SOURCE, error)
        return None
    options = (c_int64, ctypes.c_int, ctypes.c_double, c_void_p)
    library.search.argtypes = (ctypes.POINTER(Tables), ctypes.POINTER(Queries), *options)
    library.improve.argtypes = (ctypes.POINTER(Pairs),)
    library.workspace_size.argtypes, library.workspace_size.restype = (c_int64,) * 3, c_int64
    return library


def load_cached() -> ctypes.CDLL | None:
    """The library from the cache, compiled if it is not there or damaged; `None` without a folder that only this user
    writes to.

    Raises `CalledProcessError` or `TimeoutExpired` when the compiler fails.
    """
    try:
        folder = Path(os.environ.get("UNICODE2_CACHE") or Path.home() / ".cache" / "unicode2")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = fingerprint()
        if not is_private(folder):
            return None
        for file in folder.glob(f"{key}-*.so"):
            # A damaged one would end the process.
            if is_private(file) and file.stem == f"{key}-{digest(file.read_bytes())}":
                return ctypes.CDLL(str(file))
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = compile_kernel(Path(work), folder)
            built.chmod(0o700)
            target = folder / f"{key}-{digest(built.read_bytes())}.so"
            # Whole, whoever else compiles at the same time.
            os.replace(built, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ValueError):
        return None


def load_private() -> ctypes.CDLL:
    """The library, compiled in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        return ctypes.CDLL(str(compile_kernel(Path(work), Path(work))))


def is_private(path: Path) -> bool:
    """Whether nobody but this user, or root, can write to a file or folder."""
    status = path.stat()
    return os.name != "posix" or (status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022)


def fingerprint() -> str:
    """Of the source, the compiler and the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    processor = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    parts = (SOURCE.read_text(), FLAGS, find_openmp(), find_compiler(), platform.platform(), processor)
    return digest(repr(parts).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compile_kernel(work: Path, target: Path) -> Path:
    """Compiles the kernel in a folder, for another folder, and returns the library's path."""
    built, part = work / "search.so", work / "search.o"
    compiler, openmp = [*find_compiler(), *FLAGS], find_openmp()
    logger.warning("Compiling %s with %s into %s; UNICODE2_KERNEL=0 does without.", SOURCE, compiler[0], target)
    flags = ["-fopenmp"] if openmp else []
    commands = ([*flags, "-c", str(SOURCE), "-o", str(part)], ["-shared", str(part), *openmp, "-o", str(built)])
    for command in commands:
        subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=300)
    return built


def find_compiler() -> list[str]:
    """The command of the C compiler."""
    return shlex.split(os.environ.get("CC") or "cc")


def find_openmp() -> list[str]:
    """The GNU OpenMP library that torch brings, if it does: threads of another one would wait for a core while
    torch's spin on it."""
    return [str(file) for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")][:1]
