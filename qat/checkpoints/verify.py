"""Verify: prove that a packed folder holds the model that was trained.

Two proofs, both with code that took no part in packing:

* every packed weight, decompressed by the compressed-tensors library, against the weight that the forward pass computes
  with, element by element; every calibrated scale; and every other tensor against its source;
* the logits of the folder as transformers loads it, in a fresh process, against those of the fake-quantized model, bit
  by bit, both in BF16 on one device and with activations under the rule that this engine applies. Where it does not
  quantize activations, or computes in another way, the verdict says so.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..errors import UserError
from ..layers.share import describe_left, left_unquantized, quantized_share
from ..layers.sites import Site, quantized_sites
from ..schemes.config import QAT_CONFIG_NAME, QATConfig
from ..version import VERSION
from .device import choose_device, compute_on, in_words, most_bytes
from .dialects import Dialect, dialect_of
from .folder import CheckpointFolder
from .loadable import why_not_loadable
from .logits_proof import EXPERTS_IN, LogitsProof
from .matrices import matrices_of
from .skeleton import prepared_skeleton
from .tensor_scales import stored_scales
from .verdict import VERDICT_NAME, recorded_source, source_from, withdraw, write_verdict
from .verify_logits import NotLoadableError, VerificationError
from .verify_weights import WeightCount, compare_weights

logger = logging.getLogger(__name__)


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    tokens: int = 128,
    with_logits: bool = True,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> dict:
    """Compare the packed checkpoint in `folder` with the BF16 one in `source`; write the verdict into `folder`.

    Args:
        folder: a folder written by `export_checkpoint`.
        source: the checkpoint it was made of; default: the one that an earlier verdict names.
        tokens: length of the text whose logits are compared.
        with_logits: False compares weights only (no model is loaded), which the verdict then states.
        trust_remote_code: run Python code that comes with the two folders.
        device: that compares, such as "cpu" or "cuda:1"; default: a GPU with enough free memory, else the CPU. Logits
            that are not bit-equal on a GPU are computed again on the CPU, which decides.

    Returns:
        The verdict, as in `verification.json`. Where transformers cannot load a folder for a cause in its loader (see
        loadable.py), "verified" is about the weights, "logits" is None, and "why_no_logits" is the cause.

    Raises:
        UserError: one of the folders is not a checkpoint, or no source is known.
        VerificationError: something differs, and the message names the first tensor; or transformers cannot load the
            folder for no known cause.
        DiskFullError: no space is left for what the proof writes.

    A comparison that does not come to its end leaves the verdict `"verified": false` and the source; see verdict.py.
    """
    packed, dialect = _open_packed(Path(folder))
    checkpoint = CheckpointFolder.open(source or recorded_source(packed.path), "the source")
    withdraw(packed.path, checkpoint.path if (packed.path / QAT_CONFIG_NAME).is_file() else None)
    qat_config = QATConfig.load(packed.path)
    if qat_config is None:
        raise UserError(f"{folder} has no qat_config.json; only what this program's export wrote can be verified")
    model, config, names = prepared_skeleton(checkpoint, saved=qat_config, trust_remote_code=trust_remote_code)
    sites = quantized_sites(model)
    matrices = matrices_of(names, sites, checkpoint.path, dialect.packs_fused)
    scales = stored_scales(config.calibrated_scales, matrices, names)
    logits_proof = LogitsProof(packed, checkpoint, sites, dialect, tokens, trust_remote_code)
    place = choose_device(device, most_bytes(checkpoint, matrices), "comparing weights")
    logger.info("Comparing weights on %s", in_words(place))
    with ExitStack() as processes:
        if with_logits:
            logits_proof.begin(processes, device, most_bytes(checkpoint, matrices))
        count = compute_on(
            place, device, "comparing weights",
            lambda place: compare_weights(packed, checkpoint, matrices, dialect, scales, place),
        )  # fmt: skip
        verdict = _about_weights(packed, checkpoint, model, config, dialect, count)
        if with_logits and verdict["verified"]:
            verdict |= _about_logits_of(logits_proof, why_not_loadable(model, names, packed.quantization_config or {}))
    write_verdict(packed.path, verdict)
    _raise_unless_verified(verdict, packed.path, checkpoint.path)
    return verdict


def _open_packed(folder: Path) -> tuple[CheckpointFolder, Dialect]:
    """A packed folder and its dialect; one that is no longer whole is not verified any more."""
    try:
        packed = CheckpointFolder.open(folder, "the packed folder")
        return packed, dialect_of(packed.quantization_config, packed.path)
    except UserError:
        if (folder / VERDICT_NAME).is_file():
            withdraw(folder)
        raise


def _about_weights(
    packed: CheckpointFolder,
    checkpoint: CheckpointFolder,
    model: PreTrainedModel,
    config: QATConfig,
    dialect: Dialect,
    count: WeightCount,
) -> dict[str, Any]:
    """The verdict before there are logits."""
    return {
        "verified": count.elements_that_differ == 0,
        "source": source_from(packed.path, checkpoint.path),
        "export_format": dialect.name,
        "quantized_share": quantized_share(model),
        "left_unquantized": describe_left(model, left_unquantized(model, config)),
        "weights": {**vars(count), "bytes_over_nominal": _bytes_over_nominal(quantized_sites(model), count)},
        "logits": None,
        "why_no_logits": None,
        "versions": _versions(),
    }


def _about_logits_of(proof: LogitsProof, why: str | None) -> dict[str, Any]:
    """What the logits change in the verdict.

    Args:
        why: a known cause for which transformers cannot load the folder.

    Raises:
        NotLoadableError: it cannot, and there is no such cause.
    """
    try:
        logits = proof.finish()
    except NotLoadableError:
        if why is None:
            raise
        return {"why_no_logits": f"transformers cannot load the folder: {why}"}
    agrees = logits["bit_equal"] or logits["why_not_bit_equal"] is not None
    if why is None or agrees:
        return {"logits": logits, "verified": agrees}
    moved = f"its logits differ by up to {logits['largest_difference']}"
    return {"why_no_logits": f"transformers does not load the folder as it is packed ({moved}): {why}"}


def _bytes_over_nominal(sites: list[Site], count: WeightCount) -> float:
    """Packed bytes over the bits that the formats need (4.25 a value in MXFP4): 1.0 when nothing is stored twice."""
    weights = {id(site.weight): site for site in sites}.values()  # layers may share one
    bits = sum(s.weight.numel() * s.scheme.weight.format.bits_per_value(s.shape[1]) for s in weights)
    return count.packed_bytes * 8 / bits


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
        of_experts = scheme.startswith(EXPERTS_IN)
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
