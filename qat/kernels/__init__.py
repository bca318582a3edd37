"""The functions of `reference.py` made fast, one module per backend, each bit-equal to it.

`cpu` compiles `cpu_kernels.cpp` on first use; `triton_kernels` serves CUDA tensors. Both offer `is_available()`.
"""
