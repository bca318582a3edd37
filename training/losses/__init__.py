"""Losses from hidden states, divergences, perplexity."""
