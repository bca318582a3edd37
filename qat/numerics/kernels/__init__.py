"""The functions of the families made fast, one module for each family and device, each bit-equal to its family's file.

A module names the formats that it SERVES and offers `is_available()`. The CPU's are C++, compiled on first use
(`cpu_library.py`); the GPU's are Triton.
"""

from . import (
    cpu,
    cpu_fp8,
    cpu_hadamard,
    cpu_int4,
    cpu_merge,
    cpu_nvfp4,
    triton_fp8,
    triton_hadamard,
    triton_int4,
    triton_kernels,
    triton_merge,
    triton_nvfp4,
    triton_rows,
)

KERNELS = {
    "cpu": (cpu, cpu_fp8, cpu_int4, cpu_nvfp4),
    "cuda": (triton_kernels, triton_fp8, triton_int4, triton_nvfp4),
}
MERGING = {"cpu": cpu_merge, "cuda": triton_merge}  # of low-rank adapters, see ../low_rank.py
E4M3_ROWS = {"cuda": triton_rows}  # see ../e4m3_rows.py
HADAMARD = {"cpu": cpu_hadamard, "cuda": triton_hadamard}  # see ../hadamard.py

__all__ = [
    "E4M3_ROWS",
    "HADAMARD",
    "KERNELS",
    "MERGING",
    "cpu",
    "cpu_fp8",
    "cpu_hadamard",
    "cpu_int4",
    "cpu_merge",
    "cpu_nvfp4",
    "triton_fp8",
    "triton_hadamard",
    "triton_int4",
    "triton_kernels",
    "triton_merge",
    "triton_nvfp4",
    "triton_rows",
]
