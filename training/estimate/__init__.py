"""Estimate the memory of a training run before it starts: `python -m training.estimate`, see docs/estimate.md.

Nothing here knows the formulas of a family. The real model with its real quantized layers computes one step on fake
tensors, which have shapes and dtypes and no memory; what autograd keeps and what exists at a time is counted by
storages (`dry_run.py`, `live_bytes.py`). Only what has a closed form is computed: optimizer states, sharding.
"""
