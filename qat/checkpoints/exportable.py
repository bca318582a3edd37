"""Whether a prepared model can be packed, told from its skeleton: before it is trained, not after."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..layers.kv_cache import kv_cache_spec
from ..layers.sites import quantized_sites
from .dialects import check_schemes, get_dialect, resolved_format
from .stored_names import StoredNames
from .targets import left_alone, target_schemes


def check_exportable(model: PreTrainedModel, export_format: str) -> None:
    """Refuse what `export_checkpoint` would refuse of this model in the end.

    Args:
        model: prepared by `prepare_qat`; its parameters may be on the meta device.
        export_format: one of `dialects.EXPORT_FORMATS`.

    Raises:
        UserError: the format cannot hold a scheme, or the model's layers; or a quantized layer shares its weight with
            the embedding.
    """
    sites = quantized_sites(model)
    check_untied(model)
    names = StoredNames(model, model.state_dict())
    try:
        dialect = get_dialect(resolved_format(export_format, model.config.model_type))
        check_schemes(dialect, sites)
        dialect.config(target_schemes(sites, names), left_alone(model, sites, names), kv_cache_spec(model))
    except UserError as error:
        raise UserError(f"--export_format {export_format}: {error}") from error


def check_untied(model: nn.Module) -> None:
    """Refuse a quantized layer that shares its weight with the embedding.

    Raises:
        UserError: there is one; the message names it.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for site in quantized_sites(model):
        if any(site.weight is weight for weight in embeddings):
            raise UserError(
                f"{site.name} shares its weight with the embedding, which stays BF16; add {site.name!r} to `ignore`"
            )
