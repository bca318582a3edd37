"""Verify: prove that a packed folder holds the model that was trained.

Two proofs, both with code that took no part in packing:

* every packed weight, decompressed by the compressed-tensors library, against the weight that the forward pass computes
  with, element by element; every calibrated scale; and every other tensor against its source;
* the logits of the folder as transformers loads it, in a fresh process, against those of the fake-quantized model, bit
  by bit, both in BF16 on the CPU and with activations under the rule that this engine applies. Where it does not
  quantize activations, or computes in another way, the verdict says so.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ..errors import UserError
from ..files.json_file import read_object
from ..layers.share import describe_left, left_unquantized, quantized_share
from ..layers.sites import EXPERTS, LINEAR, Site, quantized_sites
from ..schemes.config import QATConfig
from ..schemes.presets import get_kv_cache_scheme
from ..version import VERSION
from .dialects import Dialect, dialect_of
from .dialects.compressed_tensors import CACHE_RULE, CompressedTensors
from .fit import first_line
from .folder import CONFIG_NAME, CheckpointFolder
from .in_transformers import VERDICT_NAME
from .loadable import runs_as_linear, why_not_loadable
from .matrices import matrices_of
from .skeleton import prepared_skeleton
from .tensor_scales import stored_scales
from .verify_logits import NotLoadableError, VerificationError, fake_quantized_logits, packed_logits
from .verify_weights import WeightCount, compare_weights

logger = logging.getLogger(__name__)

_EXPERTS_IN = "experts in "


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    tokens: int = 128,
    with_logits: bool = True,
    trust_remote_code: bool = False,
) -> dict:
    """Compare the packed checkpoint in `folder` with the BF16 one in `source`; write the verdict into `folder`.

    Args:
        folder: a folder written by `export_checkpoint`.
        source: the checkpoint it was made of; default: the one that an earlier verdict names.
        tokens: length of the text whose logits are compared.
        with_logits: False compares weights only (no model is loaded), which the verdict then states.
        trust_remote_code: run Python code that comes with the two folders.

    Returns:
        The verdict, as in `verification.json`. Where transformers cannot load a folder for a cause in its loader (see
        loadable.py), "verified" is about the weights, "logits" is None, and "why_no_logits" is the cause.

    Raises:
        UserError: one of the folders is not a checkpoint, or no source is known.
        VerificationError: something differs, and the message names the first tensor; or transformers cannot load the
            folder for no known cause, and it has no verdict.
    """
    packed = CheckpointFolder.open(folder, "the packed folder")
    dialect = dialect_of(packed.quantization_config, packed.path)
    checkpoint = CheckpointFolder.open(source or _recorded_source(packed.path), "the source")
    (packed.path / VERDICT_NAME).unlink(missing_ok=True)  # that of files that may have been others
    qat_config = QATConfig.load(packed.path)
    if qat_config is None:
        raise UserError(f"{folder} has no qat_config.json; only what this program's export wrote can be verified")
    model, config, names = prepared_skeleton(checkpoint, saved=qat_config, trust_remote_code=trust_remote_code)
    sites = quantized_sites(model)
    matrices = matrices_of(names, sites, checkpoint.path, dialect.packs_fused)
    scales = stored_scales(config.calibrated_scales, matrices, names)
    count = compare_weights(packed, checkpoint, matrices, dialect, scales)
    verdict: dict[str, Any] = {
        "verified": count.elements_that_differ == 0,
        "source": os.path.relpath(checkpoint.path.resolve(), packed.path.resolve()),
        "export_format": dialect.name,
        "quantized_share": quantized_share(model),
        "left_unquantized": describe_left(model, left_unquantized(model, config)),
        "weights": {**vars(count), "bytes_over_nominal": _bytes_over_nominal(sites, count)},
        "logits": None,
        "why_no_logits": None,
        "versions": _versions(),
    }
    if with_logits and verdict["verified"]:
        why = why_not_loadable(model, names, packed.quantization_config or {})
        try:
            logits = compare_logits(packed, checkpoint, sites, dialect, tokens, trust_remote_code)
            agrees = logits["bit_equal"] or logits["why_not_bit_equal"] is not None
        except NotLoadableError:
            if why is None:
                raise
            logits, agrees = None, False
        if why is None or agrees:
            verdict |= {"logits": logits, "verified": agrees}
        elif logits is None:  # a cause in transformers' loader
            verdict["why_no_logits"] = f"transformers cannot load the folder: {why}"
        else:
            moved = f"its logits differ by up to {logits['largest_difference']}"
            verdict["why_no_logits"] = f"transformers does not load the folder as it is packed ({moved}): {why}"
    (packed.path / VERDICT_NAME).write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
    _raise_unless_verified(verdict, packed.path, checkpoint.path)
    return verdict


def compare_logits(
    packed: CheckpointFolder,
    checkpoint: CheckpointFolder,
    sites: list[Site],
    dialect: Dialect,
    tokens: int = 128,
    trust_remote_code: bool = False,
) -> dict:
    """The logits part of the verdict: transformers on the packed folder against the fake-quantized model.

    Where the file cannot hold the format of the activations, transformers leaves them as they are, and so does the
    model that it is compared with; `activations_not_quantized_by_engine` names such schemes. So it is with all experts
    that transformers keeps in fused parameters. `why_not_bit_equal` is the
    reason where a library computes a scheme in another way; the logits are then reported and prove nothing.
    """
    text_name, input_ids = _real_text(packed, tokens, trust_remote_code)
    schemes = {site.scheme.name: site.scheme for site in sites}
    engine_rules = {name: dialect.input_rule(scheme) for name, scheme in schemes.items()}
    experts = {s.scheme.name: engine_rules[s.scheme.name] if runs_as_linear(s.owner, dialect.quant_method) else None
               for s in sites if s.kind == EXPERTS.name}  # fmt: skip
    served = packed_logits(packed.path, input_ids, trust_remote_code)
    expected, as_trained, reads_matrices = fake_quantized_logits(
        checkpoint.path, packed.path, input_ids, engine_rules, trust_remote_code, any(experts.values())
    )
    linear = {site.scheme.name for site in sites if site.kind == LINEAR.name}
    plain = [n for n in schemes if n in linear and engine_rules[n] is None and schemes[n].input is not None]
    plain += [f"{_EXPERTS_IN}{n}" for n, rule in experts.items() if rule is None and schemes[n].input is not None]
    differ = [f"{n}: {reason}" for n, scheme in schemes.items() if (reason := dialect.logits_differ(scheme))]
    if reads_matrices and dialect.quant_method == CompressedTensors.quant_method:
        differ.append("compressed-tensors takes one scale for all tokens where an input has no batch dimension")
    finite = bool(served.isfinite().all() and expected.isfinite().all())
    bit_equal = finite and torch.equal(served, expected)
    return {
        "text": text_name,
        "tokens": input_ids.numel(),
        "engine": f"transformers, {dialect.name}",
        "key_value_cache": _about_cache(packed),
        "engine_activation_rules": engine_rules,
        "engine_activation_rules_of_experts": experts,
        "trained_activation_rules": {name: scheme.rules["input"] for name, scheme in schemes.items()},
        "activations_not_quantized_by_engine": plain,
        "bit_equal": bit_equal,
        "why_not_bit_equal": "; ".join(differ) if differ and finite and not bit_equal else None,
        "largest_difference": float((served.float() - expected.float()).abs().max()),
        "mean_log_probability_difference_to_trained_rule": _log_probability_difference(served, as_trained, input_ids),
    }


def _about_cache(packed: CheckpointFolder) -> dict[str, str] | None:
    """How keys and values were quantized on both sides, and in the training; None where they are not.

    transformers quantizes them in each attention layer, whether it generates or computes the logits of a text at once.
    """
    config = QATConfig.load(packed.path)
    if config is None or config.kv_cache_scheme is None:
        return None
    scheme, spec = get_kv_cache_scheme(config.kv_cache_scheme)
    return {"scheme": scheme, "engine_rule": CACHE_RULE, "trained_rule": spec.rule}


def _bytes_over_nominal(sites: list[Site], count: WeightCount) -> float:
    """Packed bytes over the bits that the formats need (4.25 a value in MXFP4): 1.0 when nothing is stored twice."""
    weights = {id(site.weight): site for site in sites}.values()  # layers may share one
    bits = sum(s.weight.numel() * s.scheme.weight.format.bits_per_value(s.shape[1]) for s in weights)
    return count.packed_bytes * 8 / bits


def _recorded_source(folder: Path) -> Path:
    path = folder / VERDICT_NAME
    if path.is_file():
        recorded = folder / str(read_object(path).get("source", ""))
        if (recorded / CONFIG_NAME).is_file():
            return recorded.resolve()
        raise UserError(f"{path} names {recorded} as the source, which is not there; give --source")
    raise UserError(f"{folder} names no source to compare with (it has no {VERDICT_NAME}); give --source")


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


def _versions() -> dict[str, str]:
    import compressed_tensors

    return {
        "mx-qat": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
    }


def _raise_unless_verified(verdict: dict, folder: Path, source: Path) -> None:
    weights, logits = verdict["weights"], verdict["logits"]
    if weights["elements_that_differ"]:
        raise VerificationError(
            f"{folder} is not the model in {source}: {weights['elements_that_differ']:,} elements differ, "
            f"first in {weights['first_difference']}; export it again"
        )
    if logits is not None and not verdict["verified"]:
        raise VerificationError(
            f"{folder}: all weights are equal, but the logits of {logits['engine']} differ from the fake-quantized "
            f"model's by up to {logits['largest_difference']}; see {VERDICT_NAME}"
        )
    logger.info(
        "Verified %s: %d weights, %d elements, none differs%s", folder, weights["packed_weights"],
        weights["elements_compared"], "" if logits is None else f"; {_about_logits(logits)}",
    )  # fmt: skip
    if reason := verdict["why_no_logits"]:
        logger.warning("%s: the weights are proven, the logits are not: %s", folder, reason)
    for scheme in logits["activations_not_quantized_by_engine"] if logits else ():
        of_experts = scheme.startswith(_EXPERTS_IN)
        why = "" if of_experts else ", since the file cannot hold their format"
        logger.warning(
            "%s: %s leaves the activations of %s unquantized%s; the logits are those of its weights alone, %.4f nats a "
            "token from those of the training",
            folder, logits["engine"], scheme, why, logits["mean_log_probability_difference_to_trained_rule"],
        )  # fmt: skip


def _about_logits(logits: dict) -> str:
    if logits["bit_equal"]:
        return f"logits of {logits['tokens']} tokens are bit-equal"
    return f"logits are not proven and differ by up to {logits['largest_difference']}: {logits['why_not_bit_equal']}"
