"""gpt-oss's native dialect (`quant_method` "mxfp4"): the weights of experts in MXFP4, everything else in BF16.

OpenAI publishes gpt-oss in it; transformers, vLLM and others read it. A projection of all experts of a layer is two
tensors, which have output channels first, whatever the parameter has:

    X_blocks  U8 [E, N, K / 32, 16]   codes; element 2i of a block in the low nibble of byte i, 2i + 1 in the high one
    X_scales  U8 [E, N, K / 32]       E8M0

The rows of `gate_up_proj` alternate between gate and up, as those of the parameter do; biases keep their names. The
format has no place for quantized linear layers, nor for a format of activations: engines choose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...errors import UserError
from ...layers.sites import EXPERTS, LINEAR
from ...numerics.formats import Quantized
from ...schemes.patterns import EXPRESSION
from ...schemes.spec import VIEW_DTYPE, Scheme, TensorSpec

MODEL_TYPE = "gpt_oss"
FORMAT = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
EXPERTS_PATTERN = "*.experts"
# As in OpenAI's folders: what a reader must not replace by a quantized module.
_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


class NativeMXFP4:
    """See `Dialect`."""

    name = quant_method = FORMAT
    packs_fused = True

    def can_hold(self, scheme: Scheme, kind: str = LINEAR.name) -> str | None:
        """See `Dialect.can_hold`."""
        if kind != EXPERTS.name:
            return (
                f"is quantized in {scheme.name}, and gpt-oss's native format holds experts only; map '*.experts' "
                "alone, or use the export format compressed-tensors"
            )
        if scheme.weight.format.name != FORMAT:
            return (
                f"has weights in {scheme.weight.format.name}, and gpt-oss's native format holds MXFP4 only; use a "
                "scheme such as MXFP4A16, or the export format compressed-tensors"
            )
        return None

    def config(self, sites: Mapping[str, Scheme], rest: list[str], kv_cache: TensorSpec | None = None) -> dict:
        """See `Dialect.config`."""
        if alone := next((name for name in rest if name.startswith(EXPRESSION) and "experts" in name), None):
            raise UserError(
                f"the experts {alone} are left alone, and gpt-oss's native format holds those of all layers; map "
                "'*.experts', or use the export format compressed-tensors"
            )
        if kv_cache is not None:
            raise UserError(
                "the key/value cache is quantized, which gpt-oss's native format cannot hold; use the export format "
                "compressed-tensors"
            )
        return {"quant_method": self.quant_method, "modules_to_not_convert": list(_NOT_CONVERTED)}

    def tensor_names(self, site: str, spec: TensorSpec) -> tuple[str, ...]:
        """See `Dialect.tensor_names`; `site` is the name of a parameter, such as "...mlp.experts.down_proj"."""
        return f"{site}{BLOCKS}", f"{site}{SCALES}"

    def input_rule(self, scheme: Scheme) -> str | None:
        """See `Dialect.input_rule`: transformers dequantizes the weights and leaves activations as they are."""
        return None

    def logits_differ(self, scheme: Scheme) -> str | None:
        """See `Dialect.logits_differ`."""
        return None

    def serve_options(self, schemes: Iterable[Scheme]) -> list[str]:
        """See `Dialect.serve_options`."""
        return []

    def decompress(self, tensors: list[torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """See `Dialect.decompress`: [E * N, K], by the function with which transformers loads gpt-oss."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = tensors
        return convert_moe_packed_tensors(blocks, scales, dtype=VIEW_DTYPE).transpose(1, 2).flatten(0, 1)

    def tensors(self, quantized: Quantized, spec: TensorSpec) -> list[torch.Tensor]:
        """See `Dialect.tensors`: of codes [E, N, K / 2] and scales [E, N, K / 32]."""
        scales = quantized.scales[0]
        return [quantized.codes.reshape(*scales.shape, -1), scales]


def experts_only(mapping: Mapping[str, str]) -> dict[str, str]:
    """A mapping whose entry for all linear layers and experts, if there is one, is for experts alone."""
    return {EXPERTS_PATTERN if key == LINEAR.key else key: scheme for key, scheme in mapping.items()}
