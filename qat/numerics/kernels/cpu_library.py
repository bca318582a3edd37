"""The compiled CPU kernels: `cpu_kernels.cpp`, built on first use for the CPU at hand and called through ctypes.

The source is plain C++ behind a C interface, with neither PyTorch's headers nor pybind, so compiling takes two seconds
and happens once per machine: the library is cached in `$XDG_CACHE_HOME/mx-qat` under a hash of everything it depends
on.

Threads come from the OpenMP runtime that PyTorch has already loaded. A second runtime would start a second pool of
threads, and the two would fight for the same cores; hence the library is compiled with OpenMP but linked without it.

Without a compiler `is_available()` is False, after one warning. MX_QAT_CPU_KERNELS=0 switches the backend off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..formats import Format

SWITCH = "MX_QAT_CPU_KERNELS"
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
# -ffp-contract=off: a fused multiply-add would change bits. -fno-trapping-math only declares that nobody reads the
# floating-point exception flags; without it compilers keep branches that they could turn into SIMD selections.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-exceptions", "-fPIC")
# GCC tunes for 256 bits on many CPUs with AVX-512; these loops gain a few percent by its full width.
_X86_FLAGS = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_OPENMP_FLAG = "-fopenmp"
_OPENMP_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# glibc's largest threshold for mmap: memory for tensors from this size on is usually new, not freed memory used again.
_LARGE_BYTES = 32 << 20
# (stored, viewed) pairs that the library reads in one pass; other pairs are converted by PyTorch first.
FUSED_VIEWS = {(torch.float32, torch.bfloat16)}


def is_available() -> bool:
    """Whether the kernels can be used here; the first call compiles them or loads them from the cache."""
    return os.environ.get(SWITCH, "1") != "0" and _library() is not None


def prepare(x: torch.Tensor, fmt: Format, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """x checked and contiguous, in its own dtype where the library views it as `dtype` in the same pass.

    Raises:
        ValueError: a dtype, device or shape that the kernels or the format cannot take.
    """
    dtype = dtype or x.dtype
    check_dtype(dtype)
    check_tensor(x, tuple(NAMES))
    if x.dim() == 0 or not fmt.fits(x.shape[-1]):
        blocks = f"a multiple of {fmt.block}" if fmt.block else "a row of values"
        raise ValueError(f"x has shape {tuple(x.shape)}; for {fmt.name} its last dimension must be {blocks}")
    if x.dtype != dtype and (x.dtype, dtype) not in FUSED_VIEWS:
        x = x.to(dtype)
    return x.contiguous(), dtype


def check_tensor(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise a ValueError unless `tensor` is on the CPU in one of `dtypes`."""
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        raise ValueError(
            f"the CPU kernels got a {tensor.dtype} tensor on {tensor.device}; they take CPU tensors of dtype "
            f"{', '.join(map(str, dtypes))}"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a ValueError for a dtype that the kernels do not compute in."""
    if dtype not in NAMES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(map(str, NAMES))}")


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor, in large pages where that saves time."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _LARGE_BYTES:
        loaded().mx_expect_large(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    return out


@functools.cache
def function(verb: str, dtypes: tuple[torch.dtype, ...], pointers: int, *rest: type) -> Callable[..., None]:
    """One of the library's functions, called with pointers as int; other Python threads run meanwhile.

    Args:
        verb: the function's name without dtypes.
        dtypes: that its name ends in.
        pointers: how many of its arguments are pointers to tensors.
        rest: ctypes of the arguments behind them.
    """
    result = getattr(loaded(), "_".join([verb, *(NAMES[dtype] for dtype in dtypes)]))
    result.argtypes = [*[ctypes.c_void_p] * pointers, *rest]
    result.restype = None
    return result


def loaded() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    library = _library()
    if library is None:
        raise RuntimeError(
            "the CPU kernels are not available; ask is_available() and use the family's plain functions instead"
        )
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None after one warning."""
    try:
        compiler = _find_compiler()
        runtime = _share_openmp_runtime()
        if runtime:
            try:
                return ctypes.CDLL(str(_build(compiler, (*_FLAGS, *_X86_FLAGS, _OPENMP_FLAG))))
            except (OSError, subprocess.CalledProcessError) as error:  # e.g. clang's OpenMP next to GCC's runtime
                reason = f"{_reason(error)}; set CXX to GCC's g++ to use all"
        else:
            reason = "PyTorch has loaded no OpenMP runtime that they could use"
        library = ctypes.CDLL(str(_build(compiler, (*_FLAGS, *_X86_FLAGS))))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"the CPU kernels could not be built ({_reason(error)}); quantization runs in plain PyTorch "
            "instead, with the same results but about 100 times slower. Install g++ or clang++, or set "
            f"CXX to a C++ compiler; {SWITCH}=0 silences this",
            stacklevel=3,
        )
        return None
    if torch.get_num_threads() > 1:
        warnings.warn(f"the CPU kernels run on one thread: {reason}", stacklevel=3)
    return library


def _reason(error: Exception) -> str:
    """The first telling line of a compiler's or loader's complaint."""
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the first of c++, g++, clang++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise FileNotFoundError("no C++ compiler found: tried c++, g++ and clang++")


def _share_openmp_runtime() -> str | None:
    """Make the symbols of PyTorch's OpenMP runtime visible to libraries loaded from now on; its path, if any."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:  # not Linux
        return None
    of_torch_first = sorted(filter(_OPENMP_RUNTIME.search, mapped), key=lambda path: "/torch" not in path)
    for path in of_torch_first:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return path
    return None


def _build(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """Path of the compiled library, from the cache when nothing has changed.

    Raises:
        OSError, subprocess.CalledProcessError: the compiler could not be run, or failed.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.hpp")))]
    parts = (*sources, version, *compiler, *flags, _cpu_features())
    library = _cache_dir() / f"cpu_kernels-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        # Built in a temporary folder and moved into place: several processes may start at once, and none may load a
        # part of a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            object_file, finished = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
            for command in (
                [*compiler, *flags, "-c", str(_SOURCE), "-o", object_file],
                [*compiler, "-shared", object_file, "-o", finished],  # no -fopenmp: PyTorch's runtime serves
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(finished, library)
    return library


def _cache_dir() -> Path:
    """A folder for compiled libraries that outlives the process, or a temporary one where none can be written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = root / "mx-qat"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="mx-qat-"))


def _cpu_features() -> str:
    """What -march=native depends on: caches are shared between machines through network home folders."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)} | {platform.machine()}))
