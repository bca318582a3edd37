"""A program: which layers lose most by quantization, and a mixed mapping for a budget of bits."""
