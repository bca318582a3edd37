"""The formats in which engines read packed checkpoints, one class each."""
