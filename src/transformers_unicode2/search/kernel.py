"""`kernel.c`, compiled on first use. Without a C compiler there is no kernel, and the search is left to torch, which
finds the same codes.

It is compiled once for a processor type into `$UNICODE2_CACHE`, by default `~/.cache/unicode2`. Where that cannot be
written to, it is compiled for each process. `UNICODE2_KERNEL=0` leaves the search to torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.c")
# Codes that the kernel looks at together, from any multiple of 16 on: the tables are padded by as many.
BLOCK = 64
# No contraction: the distances are the same as those of torch.
FLAGS = "-g -O3 -march=native -ffp-contract=off -fno-math-errno -fPIC".split()


class Struct(ctypes.Structure):
    """A struct of `kernel.c`. `dtypes` has the dtype of the tensor behind each pointer."""

    dtypes: dict[str, torch.dtype] = {}

    @classmethod
    def fill(cls, **values) -> "Struct":
        """The struct of all its fields by name; it keeps the tensors alive.

        Raises `TypeError` when a field is missing or surplus, and `ValueError` on a tensor of another dtype,
        elsewhere than on the CPU, or not contiguous.
        """
        names = {name for name, _ in cls._fields_}
        if names != values.keys():
            raise TypeError(f"{cls.__name__} has other fields than were given: {sorted(names ^ values.keys())}.")
        for name, dtype in cls.dtypes.items():
            tensor = values[name]
            if (tensor.dtype, tensor.device.type, tensor.is_contiguous()) != (dtype, "cpu", True):
                raise ValueError(
                    f"`{name}` of the kernel is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; it "
                    f"must be {dtype} on the CPU, contiguous."
                )
        struct = cls(**{name: value.data_ptr() if name in cls.dtypes else value for name, value in values.items()})
        struct.kept = values
        return struct


class Tables(Struct):
    dtypes = {
        "prefix": torch.int32,
        "rest": torch.int32,
        "constant": torch.float32,
        "units": torch.bfloat16,
        "rest_units": torch.bfloat16,
        "more": torch.bfloat16,
        "codes": torch.float32,
        "spans": torch.int64,
        "centre_norms": torch.float32,
        "extents": torch.float32,
    }
    _fields_ = [
        *((name, c_void_p) for name in dtypes),
        *((name, c_int64) for name in ("size", "dim", "prefix_size", "rest_size", "num_parts", "num_spans")),
        *((name, c_float) for name in ("first_cost", "second_cost", "distance_cost", "scan_cost")),
        *((name, c_float) for name in ("prefix_norm", "prefix_error", "rest_norm", "rest_error", "above", "error")),
    ]


class Queries(Struct):
    dtypes = {
        "prefix": torch.int8,
        "rest": torch.int8,
        "features": torch.float32,
        "scales": torch.float32,
        "lost": torch.float32,
        "norms": torch.float32,
        "squares": torch.float32,
        "near": torch.int64,
        "found": torch.int64,
    }
    _fields_ = [*((name, c_void_p) for name in dtypes), ("count", c_int64), ("num_near", c_int64)]


class Pairs(Struct):
    dtypes = {
        "features": torch.float32,
        "codes": torch.float32,
        "rows": torch.int64,
        "numbers": torch.int64,
        "distances": torch.float64,
        "found": torch.int64,
    }
    _fields_ = [*((name, c_void_p) for name in dtypes), ("dim", c_int64), ("count", c_int64)]


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """The compiled library, or `None` where it cannot be compiled or is not wanted."""
    if os.environ.get("UNICODE2_KERNEL") == "0":
        return None
    library = load_cached()
    try:
        library = library or load_private()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    options = (c_int64, ctypes.c_int, ctypes.c_double, c_void_p)
    library.search.argtypes = (ctypes.POINTER(Tables), ctypes.POINTER(Queries), *options)
    library.improve.argtypes = (ctypes.POINTER(Pairs),)
    library.workspace_size.argtypes, library.workspace_size.restype = (c_int64,) * 3, c_int64
    return library


def load_cached() -> ctypes.CDLL | None:
    """The library from the cache, compiled if it is not there or damaged; `None` without a folder that only this user
    writes to."""
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
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
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
    parts = (SOURCE.read_text(), FLAGS, find_openmp(), os.environ.get("CC"), platform.platform(), processor)
    return digest(repr(parts).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compile_kernel(work: Path, target: Path) -> Path:
    """Compiles the kernel in a folder, for another folder, and returns the library's path."""
    built, part = work / "search.so", work / "search.o"
    compiler, openmp = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS], find_openmp()
    logger.info("Compiling %s with %s into %s; UNICODE2_KERNEL=0 does without.", SOURCE, compiler[0], target)
    flags = ["-fopenmp"] if openmp else []
    commands = ([*flags, "-c", str(SOURCE), "-o", str(part)], ["-shared", str(part), *openmp, "-o", str(built)])
    for command in commands:
        subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=300)
    return built


def find_openmp() -> list[str]:
    """The GNU OpenMP library that torch brings, if it does: threads of another one would wait for a core while
    torch's spin on it."""
    return [str(file) for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")][:1]
