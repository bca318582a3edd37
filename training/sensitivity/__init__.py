"""A program that measures the accuracy lost per layer and proposes a mixed mapping for a bits budget."""
