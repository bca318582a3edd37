"""Packed checkpoints: written, read and proven equal to what was trained."""
