"""Figures of quantization while a model trains, and the report at the end."""
