"""LogitsProof: transformers on the packed folder against the fake-quantized model, each in a fresh process.

Both compute on one device, so that equal operations give equal bits. On a GPU, libraries may choose other kernels for
the two models; logits that differ there are computed again on the CPU, which decides.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from ..errors import UserError
from ..layers.sites import EXPERTS, LINEAR, Site
from ..schemes.config import QATConfig
from ..schemes.presets import get_kv_cache_scheme
from ..schemes.spec import VIEW_DTYPE, Scheme
from .device import choose_device, free_bytes, free_host_bytes, in_words
from .dialects import Dialect
from .dialects.compressed_tensors import CACHE_RULE, CompressedTensors
from .fit import first_line
from .folder import CheckpointFolder
from .loadable import runs_as_linear
from .pipeline import CPU
from .verify_logits import Expected, VerificationError, begin_fake_quantized, begin_packed

logger = logging.getLogger(__name__)

EXPERTS_IN = "experts in "
_PROCESS_BYTES = 3 << 29  # of libraries, kernels and activations
_HOST_BYTES = 1 << 30  # of libraries
_CORES = 4  # on fewer, two models and the comparison of weights only take turns
_Both = tuple[Callable[[], torch.Tensor], Callable[[], Expected]]


@dataclass
class LogitsProof:
    """The logits part of the verdict.

    Where the file cannot hold the format of the activations, transformers leaves them as they are, and so does the
    model that it is compared with; `activations_not_quantized_by_engine` names such schemes. So it is with all experts
    that transformers keeps in fused parameters. `why_not_bit_equal` is the reason where a library computes a scheme in
    another way; the logits are then reported and prove nothing.

    Args:
        packed: the packed folder.
        checkpoint: its source.
        sites: what is quantized.
        dialect: of the packed folder.
        tokens: length of the text whose logits are compared.
        trust_remote_code: run Python code that comes with the two folders.
    """

    packed: CheckpointFolder
    checkpoint: CheckpointFolder
    sites: list[Site]
    dialect: Dialect
    tokens: int = 128
    trust_remote_code: bool = False
    _begun: Callable[[], tuple[torch.Tensor, Expected]] | None = field(init=False, default=None)

    def begin(self, processes: ExitStack, device: str | None = None, beside_bytes: int = 0) -> None:
        """Start the two processes where there are memory and cores for both; else `finish` runs one after the other.

        Args:
            processes: ends those that are started with its block.
            device: as in `verify`.
            beside_bytes: of GPU memory that are needed beside them.

        Raises:
            UserError: the tokenizer cannot be read, or there is no such device.
        """
        self._processes = processes
        self.text_name, self.input_ids = _real_text(self.packed, self.tokens, self.trust_remote_code)
        one = self._bytes_of_one() + _PROCESS_BYTES
        self.device = choose_device(device, one + beside_bytes, "computing logits")
        if self.device == CPU:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            at_once = cores >= _CORES and free_host_bytes() >= 2 * (self._bytes_of_one() + _HOST_BYTES)
        else:
            at_once = free_bytes(self.device) >= 2 * one + beside_bytes
        logger.info(
            "Computing logits on %s, %s", in_words(self.device), "both models at once" if at_once else "one by one"
        )
        self._begun = self._compute(self.device, at_once)

    def finish(self) -> dict[str, Any]:
        """Wait for the logits and compare them.

        Raises:
            NotLoadableError: transformers cannot load the packed folder.
            VerificationError: the logits of the fake-quantized model cannot be computed.
        """
        assert self._begun is not None
        if self.device == CPU:
            return self._compared(*self._begun())
        trouble = None
        try:
            found = self._compared(*self._begun())
            if not found["bit_equal"] and found["why_not_bit_equal"] is None:
                trouble = f"the logits differ by up to {found['largest_difference']}"
        except VerificationError as error:
            trouble = first_line(error)
        if trouble is None:
            return found
        logger.warning("on %s %s; they are computed again on the CPU", in_words(self.device), trouble)
        not_equal_on, self.device = in_words(self.device), CPU
        return self._compared(*self._compute(CPU, at_once=False)()) | {"not_bit_equal_on": not_equal_on}

    def _compute(self, device: torch.device, at_once: bool) -> Callable[[], tuple[torch.Tensor, Expected]]:
        """Start both processes at once, or have what is returned run one after the other; that gives their logits."""

        def begin_second() -> Callable[[], Expected]:
            return begin_fake_quantized(
                self._processes, self.checkpoint.path, self.packed.path, self.input_ids, self._engine_rules, device,
                self.trust_remote_code, any(self._rules_of_experts.values()),
            )  # fmt: skip

        def begin_first() -> Callable[[], torch.Tensor]:
            return begin_packed(self._processes, self.packed.path, self.input_ids, device, self.trust_remote_code)

        if not at_once:
            return lambda: (begin_first()(), begin_second()())
        first, second = begin_first(), begin_second()
        return lambda: (first(), second())

    def _compared(self, served: torch.Tensor, expected: Expected) -> dict[str, Any]:
        schemes, rules, experts = self._schemes, self._engine_rules, self._rules_of_experts
        linear = {site.scheme.name for site in self.sites if site.kind == LINEAR.name}
        plain = [n for n in schemes if n in linear and rules[n] is None and schemes[n].input is not None]
        plain += [f"{EXPERTS_IN}{n}" for n, rule in experts.items() if rule is None and schemes[n].input is not None]
        differ = [f"{n}: {reason}" for n, s in schemes.items() if (reason := self.dialect.logits_differ(s))]
        if expected.reads_matrices and self.dialect.quant_method == CompressedTensors.quant_method:
            differ.append("compressed-tensors takes one scale for all tokens where an input has no batch dimension")
        finite = bool(served.isfinite().all() and expected.logits.isfinite().all())
        bit_equal = finite and torch.equal(served, expected.logits)
        return {
            "text": self.text_name,
            "tokens": self.input_ids.numel(),
            "engine": f"transformers, {self.dialect.name}",
            "device": in_words(self.device),
            "not_bit_equal_on": None,
            "key_value_cache": _about_cache(self.packed),
            "engine_activation_rules": rules,
            "engine_activation_rules_of_experts": experts,
            "trained_activation_rules": {name: scheme.rules["input"] for name, scheme in schemes.items()},
            "activations_not_quantized_by_engine": plain,
            "bit_equal": bit_equal,
            "why_not_bit_equal": "; ".join(differ) if differ and finite and not bit_equal else None,
            "largest_difference": float((served.float() - expected.logits.float()).abs().max()),
            "mean_log_probability_difference_to_trained_rule": _log_probability_difference(
                served, expected.as_trained, self.input_ids
            ),
        }

    @property
    def _schemes(self) -> dict[str, Scheme]:
        return {site.scheme.name: site.scheme for site in self.sites}

    @property
    def _engine_rules(self) -> dict[str, str | None]:
        return {name: self.dialect.input_rule(scheme) for name, scheme in self._schemes.items()}

    @property
    def _rules_of_experts(self) -> dict[str, str | None]:
        """The same of experts, which transformers leaves alone unless it makes linear layers of them."""
        rules, method = self._engine_rules, self.dialect.quant_method
        experts = [site for site in self.sites if site.kind == EXPERTS.name]
        return {s.scheme.name: rules[s.scheme.name] if runs_as_linear(s.owner, method) else None for s in experts}

    def _bytes_of_one(self) -> int:
        """Memory that one model takes at most: all weights in BF16, beside them those that are packed."""
        values = sum(torch.Size(stored.shape).numel() for stored in self.checkpoint.stored.values())
        return values * VIEW_DTYPE.itemsize + self.packed.size_bytes


def _about_cache(packed: CheckpointFolder) -> dict[str, str] | None:
    """How keys and values were quantized on both sides, and in the training; None where they are not.

    transformers quantizes them in each attention layer, whether it generates or computes the logits of a text at once.
    """
    config = QATConfig.load(packed.path)
    if config is None or config.kv_cache_scheme is None:
        return None
    scheme, spec = get_kv_cache_scheme(config.kv_cache_scheme)
    return {"scheme": scheme, "engine_rule": CACHE_RULE, "trained_rule": spec.rule}


def _real_text(packed: CheckpointFolder, tokens: int, trust_remote_code: bool) -> tuple[str, torch.Tensor]:
    """`tokens` token ids [1, tokens] of Python's language reference; its bytes where there is no tokenizer."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[: 32 * tokens]
    if (packed.path / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                packed.path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # the tokenizers library raises bare ones
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{packed.path} is not proven: its tokenizer cannot be read ({reason})") from error
        ids = tokenizer(text, truncation=True, max_length=tokens)["input_ids"]
        return "Python's language reference", torch.tensor([ids])
    vocabulary = packed.config.get("vocab_size", 256)
    ids = [byte % vocabulary for byte in text.encode()]
    return "bytes of Python's language reference (there is no tokenizer)", torch.tensor([ids[:tokens]])


def _log_probability_difference(a: torch.Tensor, b: torch.Tensor, input_ids: torch.Tensor) -> float:
    """Mean absolute difference (nats) of the log-probabilities of the text's own tokens."""
    targets = input_ids[:, 1:, None]
    own = [logits[:, :-1].float().log_softmax(-1).gather(-1, targets) for logits in (a, b)]
    return float((own[0] - own[1]).abs().mean())
