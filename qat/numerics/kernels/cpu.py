"""The CPU backend: `cpu_kernels.cpp`, compiled on first use for the CPU at hand and called through ctypes.

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

from ..formats import BLOCK_SIZE, MXFormat, check_scale_shape, mantissa_threshold

SWITCH = "MX_QAT_CPU_KERNELS"
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
# -ffp-contract=off: a fused multiply-add would change bits. -fno-trapping-math only says that nobody reads the
# floating-point exception flags; without it compilers keep branches that they could turn into SIMD selections.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-exceptions", "-fPIC")
_OPENMP_FLAG = "-fopenmp"
_OPENMP_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# glibc's largest threshold for mmap: memory for tensors from this size on is usually new, not freed memory used again.
_LARGE_BYTES = 32 << 20
# (stored, viewed) pairs that the library reads in one pass; other pairs are converted by PyTorch first.
_FUSED_VIEWS = {(torch.float32, torch.bfloat16)}


class _Format(ctypes.Structure):
    """`MxFormat` in cpu_kernels.cpp."""

    _fields_ = [
        ("bits", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("emin", ctypes.c_int32),
        ("emax", ctypes.c_int32),
        ("max_normal", ctypes.c_float),
        ("mantissa_threshold", ctypes.c_uint32),
        ("search", ctypes.c_int32),
    ]


def is_available() -> bool:
    """Whether the kernels can be used here; the first call compiles them or loads them from the cache."""
    return os.environ.get(SWITCH, "1") != "0" and _library() is not None


def fake_quantize(x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x's nearest values on the MX grid; same arguments and bits as `reference.fake_quantize`.

    Args:
        x: [..., K] float32, bfloat16 or float16 on the CPU, K a multiple of 32.
        fmt: element format.
        rule: scale rule, see `formats.SCALE_RULES`.
        dtype: the view of `x` that is quantized (default: its own dtype).

    Returns:
        [..., K] in `dtype`, contiguous.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    x, dtype = _prepare(x, dtype)
    out = _empty(x.shape, dtype)
    run = _function("mx_fake_quantize", x.dtype, dtype)
    if blocks := x.numel() // BLOCK_SIZE:
        run(x.data_ptr(), out.data_ptr(), blocks, _format(fmt, rule), torch.get_num_threads())
    return out


def quantize(
    x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes, uint8 [..., K * fmt.bits / 8], and biased E8M0 scales, uint8 [..., K / 32].

    Same arguments and bytes as `reference.quantize`; raises like `fake_quantize`.
    """
    x, dtype = _prepare(x, dtype)
    *rows, columns = x.shape
    packed = _empty((*rows, columns * fmt.bits // 8), torch.uint8)
    scale_e8m0_biased = _empty((*rows, columns // BLOCK_SIZE), torch.uint8)
    run = _function("mx_quantize", x.dtype, dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = x.data_ptr(), packed.data_ptr(), scale_e8m0_biased.data_ptr()
        run(*pointers, blocks, _format(fmt, rule), torch.get_num_threads())
    return packed, scale_e8m0_biased


def dequantize(
    packed: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype` (float32, bfloat16 or float16), as `reference.dequantize`."""
    *rows, blocks = scale_e8m0_biased.shape
    if packed.shape != (*rows, blocks * fmt.packed_bytes_per_block):
        raise ValueError(
            f"packed is {tuple(packed.shape)}; scales {tuple(scale_e8m0_biased.shape)} of {fmt.name} need "
            f"{(*rows, blocks * fmt.packed_bytes_per_block)}"
        )
    for tensor in (packed, scale_e8m0_biased):
        _check_tensor(tensor, (torch.uint8,))
    _check_dtype(dtype)
    packed, scale_e8m0_biased = packed.contiguous(), scale_e8m0_biased.contiguous()
    out = _empty((*rows, blocks * BLOCK_SIZE), dtype)
    run = _function("mx_dequantize", dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = packed.data_ptr(), scale_e8m0_biased.data_ptr(), out.data_ptr()
        run(*pointers, blocks, _format(fmt, "floor"), torch.get_num_threads())
    return out


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `reference.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = _prepare(x, dtype)
    _check_tensor(scale_e8m0_biased, (torch.uint8,))
    check_scale_shape(x, scale_e8m0_biased)
    scale_e8m0_biased = scale_e8m0_biased.contiguous()
    packed = _empty((*x.shape[:-1], x.shape[-1] * fmt.bits // 8), torch.uint8)
    run = _function("mx_quantize_to_scale", x.dtype, dtype)
    if blocks := scale_e8m0_biased.numel():
        pointers = x.data_ptr(), scale_e8m0_biased.data_ptr(), packed.data_ptr()
        run(*pointers, blocks, _format(fmt, "floor"), torch.get_num_threads())
    return packed


def _prepare(x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """x checked and contiguous, in its own dtype where the library views it as `dtype` in the same pass."""
    dtype = dtype or x.dtype
    _check_dtype(dtype)
    _check_tensor(x, tuple(_NAMES))
    if x.dim() == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be a multiple of {BLOCK_SIZE}")
    if x.dtype != dtype and (x.dtype, dtype) not in _FUSED_VIEWS:
        x = x.to(dtype)
    return x.contiguous(), dtype


def _check_tensor(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        raise ValueError(
            f"the CPU kernels got a {tensor.dtype} tensor on {tensor.device}; they take CPU tensors of dtype "
            f"{', '.join(map(str, dtypes))}"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _NAMES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(map(str, _NAMES))}")


@functools.cache
def _format(fmt: MXFormat, rule: str) -> _Format:
    return _Format(
        bits=fmt.bits,
        mantissa_bits=fmt.mantissa_bits,
        emin=fmt.emin,
        emax=fmt.emax,
        max_normal=fmt.max_normal,
        mantissa_threshold=mantissa_threshold(fmt, rule),
        search=rule == "search",
    )


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor, in large pages where that saves time."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _LARGE_BYTES:
        _loaded().mx_expect_large(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    return out


@functools.cache
def _function(verb: str, *dtypes: torch.dtype) -> Callable[..., None]:
    """One of the library's functions, called with pointers as int; other Python threads run meanwhile."""
    function = getattr(_loaded(), "_".join([verb, *(_NAMES[dtype] for dtype in dtypes)]))
    pointers = 2 if verb == "mx_fake_quantize" else 3
    function.argtypes = [*[ctypes.c_void_p] * pointers, ctypes.c_int64, ctypes.POINTER(_Format), ctypes.c_int]
    function.restype = None
    return function


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the CPU kernels are not available; ask is_available() and use qat.reference instead")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None after one warning."""
    try:
        compiler = _find_compiler()
        runtime = _share_openmp_runtime()
        if runtime:
            try:
                return ctypes.CDLL(str(_build(compiler, (*_FLAGS, _OPENMP_FLAG))))
            except (OSError, subprocess.CalledProcessError) as error:  # e.g. clang's OpenMP next to GCC's runtime
                reason = f"{_reason(error)}; name GCC's g++ in CXX to use all"
        else:
            reason = "PyTorch has loaded no OpenMP runtime that they could share"
        library = ctypes.CDLL(str(_build(compiler, _FLAGS)))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"the MX kernels for the CPU could not be built ({_reason(error)}); quantization runs in plain PyTorch "
            "instead, with the same results but about 100 times slower. Install g++ or clang++, or name a C++ compiler "
            f"in CXX; {SWITCH}=0 silences this",
            stacklevel=3,
        )
        return None
    if torch.get_num_threads() > 1:
        warnings.warn(f"the MX kernels for the CPU run on one thread: {reason}", stacklevel=3)
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
    parts = (_SOURCE.read_text(), version, *compiler, *flags, _cpu_features())
    library = _cache_dir() / f"cpu_kernels-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        # Built aside and moved into place: several processes may start at once, and none may load half a file.
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
