"""The three names that a training script needs; each lives in a module of its own."""

from data.supervised import make_supervised_data_module
from training.losses.metrics import get_metrics_with_perplexity
from training.trainer import QATTrainer

__all__ = ["QATTrainer", "get_metrics_with_perplexity", "make_supervised_data_module"]
