"""Weights that make up for their own rounding (GPTQ), as training starts from them."""
