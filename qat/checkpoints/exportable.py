"""Whether a prepared model can be packed and proven, told from its skeleton: before it is trained, not after."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from ..errors import UserError
from ..layers.kv_cache import kv_cache_spec
from ..layers.sites import quantized_sites
from .dialects import check_schemes, get_dialect, resolved_format
from .folder import CheckpointFolder
from .input_transforms import check_transforms
from .loadable import why_not_loadable
from .matrices import matrices_of
from .skeleton import check_untied
from .stored_names import StoredNames, saved_names
from .targets import left_alone, target_schemes

logger = logging.getLogger(__name__)


def check_exportable(model: PreTrainedModel, export_format: str, source: CheckpointFolder | None = None) -> None:
    """Refuse what `export_checkpoint` would refuse of this model in the end, and warn of what `verify` cannot prove.

    Args:
        model: prepared by `prepare_qat`; its parameters may be on the meta device.
        export_format: one of `dialects.EXPORT_FORMATS`.
        source: where its weights come from, if that is a plain folder; its names are those of what is trained.

    Raises:
        UserError: the format cannot hold a scheme, or the model's layers; a quantized layer shares its weight with the
            embedding; or `source` does not have its weight.
    """
    sites = quantized_sites(model)
    check_untied(model)
    if source is None:
        names = saved_names(model)
    else:
        names = StoredNames(model, source.names)
        matrices_of(names, sites, source.path)
    try:
        dialect = get_dialect(resolved_format(export_format, model.config.model_type))
        check_schemes(dialect, sites)
        check_transforms(dialect, sites)
        rest = left_alone(model, sites, names, None if source is None else source.stored)
        config = dialect.config(target_schemes(model, sites, names), rest, kv_cache_spec(model))
    except UserError as error:
        raise UserError(f"--export_format {export_format}: {error}") from error
    if (reason := why_not_loadable(model, names, config)) is not None:
        logger.warning(
            "The packed folder's weights can be proven, its logits cannot, since transformers will not load it: %s",
            reason,
        )
