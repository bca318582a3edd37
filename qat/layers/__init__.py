"""Modules and autograd: what can be quantized in a model, and how it trains."""
