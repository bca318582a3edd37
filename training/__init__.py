"""What happens around the model while it trains: arguments, loading, the trainer, metrics and checkpoints."""
