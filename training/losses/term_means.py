"""Log each term of the training loss separately."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from .metrics import get_metrics_with_perplexity


class TermMeans:
    """Means of each term of the loss over the labelled tokens since the last log entry, of all processes.

    Sums stay on the device until they are logged, so a step waits for nothing. A term that a batch has as a whole (the
    load-balancing loss of routers) counts for each labelled token of it.

    Args:
        names: of the terms ("ce", "kl"), in the order of their columns; all processes have the same.
        accelerator: of the run.
        skip_non_finite: leave out batches with a sum that is NaN or infinite, as Trainer does with its loss under
            `logging_nan_inf_filter`.
    """

    def __init__(self, names: Sequence[str], accelerator: Accelerator, skip_non_finite: bool = True) -> None:
        self.names, self.accelerator, self.skip_non_finite = tuple(names), accelerator, skip_non_finite
        self._sums = torch.zeros(len(self.names) + 1, device=accelerator.device)  # the last one counts tokens

    def add(
        self, token_losses: torch.Tensor, whole: torch.Tensor | None = None, counted: torch.Tensor | None = None
    ) -> None:
        """Count a batch: losses [n, terms] of its n labelled tokens, unweighted, and a last term as a scalar.

        Args:
            counted: bool [n], the tokens that count; default: all of them.
        """
        losses = token_losses.detach().float()
        tokens = losses.new_full((1,), len(losses))
        if counted is not None:
            losses, tokens = torch.where(counted[:, None], losses, 0.0), counted.sum().float().view(1)
        sums, tokens = losses.sum(0).to(self._sums.device), tokens.to(self._sums.device)
        if whole is not None:
            sums = torch.cat([sums, whole.detach().float().to(sums.device).view(1) * tokens])
        sums = torch.cat([sums, tokens])
        if self.skip_non_finite:
            sums = torch.where(sums.isfinite().all(), sums, 0.0)
        self._sums += sums

    def take(self) -> dict[str, float]:
        """The means by name, in nats a token, and the perplexity where cross-entropy is among them; then begin anew.

        A cross-entropy that is the whole loss is not repeated. All processes must call this together.
        """
        if not self.names:
            return {}
        *sums, tokens = self.accelerator.reduce(self._sums, "sum").tolist()
        self.clear()
        if not tokens:
            return {}
        means = {name: total / tokens for name, total in zip(self.names, sums, strict=True)}
        figures = {} if self.names == ("ce",) else dict(means)
        if "ce" in means:
            figures["perplexity"] = get_metrics_with_perplexity({"loss": means["ce"]})["perplexity"]
        return figures

    def clear(self) -> None:
        """Reset all sums."""
        self._sums = torch.zeros_like(self._sums)

    def state(self) -> dict[str, float]:
        """This process's sums by name, for a checkpoint between two log entries."""
        return dict(zip((*self.names, "tokens"), self._sums.tolist(), strict=True))

    def restore(self, states: list[dict[str, float]]) -> None:
        """Continue from the sums of all processes, however many there were; sums of other terms are dropped."""
        names = (*self.names, "tokens")
        if self.accelerator.is_main_process and all(state.keys() == set(names) for state in states):
            sums = torch.tensor([[state[name] for name in names] for state in states]).sum(0)
            self._sums += sums.to(self._sums)
