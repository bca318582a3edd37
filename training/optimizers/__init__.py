"""Optimizers that Trainer does not have: AdamW without FP32 masters, Muon, steps while gradients are computed."""
