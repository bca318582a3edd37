"""Supervised fine-tuning data: read conversations, format and label them, batch them."""
