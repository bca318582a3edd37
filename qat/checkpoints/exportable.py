"""Whether a prepared model can be packed, told from its skeleton: before it is trained, not after."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..layers.kv_cache import kv_cache_spec
from ..layers.quant_linear import is_quantlinear
from ..layers.sites import quantized_sites
from .dialects import check_schemes, get_dialect


def check_exportable(model: nn.Module, export_format: str) -> None:
    """Refuse what `export_checkpoint` would refuse of this model in the end.

    Args:
        model: prepared by `prepare_qat`; its parameters may be on the meta device.
        export_format: one of `dialects.EXPORT_FORMATS`.

    Raises:
        UserError: the format cannot hold a scheme, or the model's layers; or a quantized layer shares its weight with
            the embedding.
    """
    dialect, sites = get_dialect(export_format), quantized_sites(model)
    check_untied(model)
    schemes = {site.name: site.scheme for site in sites}
    rest = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not is_quantlinear(m)]
    try:
        check_schemes(dialect, schemes)
        dialect.config(schemes, rest, kv_cache_spec(model))
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
