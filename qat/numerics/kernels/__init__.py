"""The functions of `reference.py` made fast, one module per backend, each bit-equal to it.

`cpu` compiles `cpu_kernels.cpp` on first use; `triton_kernels` serves CUDA tensors with the kernels of `triton_device`.
Both offer `is_available()`.
"""
