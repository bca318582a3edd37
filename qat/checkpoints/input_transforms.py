"""Transforms of inputs in a packed folder: compressed-tensors' `transform_config`, and the matrix of each layer.

The weights are packed as transformed, so an engine that passed over the transform would compute nonsense. vLLM reads
it: under the type "random-hadamard" it multiplies blocks of `head_dim` values by any stored matrix over
sqrt(head_dim). The type "hadamard" stores none, but takes a kernel for CUDA.

transformers (5.23) passes over `transform_config`, and would compute nonsense in silence. So such a folder has a
`quantization_status` that compressed-tensors' schema, by which transformers reads it, does not know: loading fails, and
the message has the text. vLLM does not read that setting. `load_transformed` loads the folder in transformers and lets
it transform inputs by compressed-tensors' own code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..layers.sites import Site
from ..layers.transformed import is_transformed
from ..numerics import hadamard
from ..numerics.hadamard import SIZE
from ..schemes.spec import VIEW_DTYPE
from .dialects import Dialect
from .dialects.compressed_tensors import CompressedTensors
from .folder import CheckpointFolder
from .matrices import Matrix
from .stored_names import StoredNames

KEY = "transform_config"
STATUS, REFUSAL = "quantization_status", "inputs need transforms: see README.md"  # pydantic shows 50 characters
_GROUP = "hadamard32"
_KIND, _PLACE = ("random-hadamard", SIZE), ("input", False)
_MODULE = f"{_GROUP}_input"  # what compressed-tensors and vLLM call the submodule of a layer
NOT_APPLIED = (
    f"it passes over {KEY}, and the weights are those for transformed inputs, so the {STATUS} in config.json makes it "
    "refuse; use qat.checkpoints.input_transforms.load_transformed(folder)"
)

APPLIED_BY_VLLM = (
    "Inputs are transformed: vLLM (0.32) does that without tensor parallelism and for layers without a bias, and fails "
    "at others, which it serves with the plugin in serving/; of other engines it is not known"
)


def transform_config(sites: Iterable[Site], names: StoredNames) -> dict[str, Any]:
    """The settings of a quantization_config that name the layers whose inputs are transformed; {} without any."""
    found = [spelling for site in sites if is_transformed(site) for spelling in names.spellings(site.name)]
    if not found:
        return {}
    (kind, size), (location, inverse) = _KIND, _PLACE
    apply = [{"targets": list(dict.fromkeys(found)), "location": location, "inverse": inverse, "ignore": []}]
    group = {"type": kind, "head_dim": size, "precision": "torch.float32", "apply": apply}
    return {KEY: {"config_groups": {_GROUP: group}}, STATUS: REFUSAL}


def stored_matrices(matrices: Mapping[str, list[Matrix]]) -> dict[str, torch.Tensor]:
    """The matrices to store, BF16 [32, 32] of 1 and -1, by their names in the packed folder."""
    together = (matrix for held in matrices.values() for matrix in held if is_transformed(matrix.site))
    return {f"{matrix.name}.{_MODULE}.weight": hadamard.matrix(dtype=VIEW_DTYPE) for matrix in together}


def check_transforms(dialect: Dialect, sites: Iterable[Site]) -> None:
    """Raise a UserError where inputs are transformed and the dialect has no words for it."""
    site = next(filter(is_transformed, sites), None)
    if site is not None and dialect.quant_method != CompressedTensors.quant_method:
        raise UserError(
            f"{site.label} has transformed inputs, which {dialect.name} cannot hold; use {CompressedTensors.name}, or "
            "train with --input_transform none"
        )


def is_stored(quantization_config: Mapping[str, Any] | None) -> bool:
    """Whether a packed folder has transformed inputs."""
    return bool(((quantization_config or {}).get(KEY) or {}).get("config_groups"))


def check_no_transforms(checkpoint: CheckpointFolder) -> None:
    """Raise a UserError for a packed folder with transformed inputs: its weights alone are not those of the model."""
    if is_stored(checkpoint.quantization_config) or any(map(is_matrix, checkpoint.stored)):
        raise UserError(
            f"{checkpoint.path} has transformed inputs ({KEY}): it can be evaluated as it is (--do_eval without "
            "--do_train and without a scheme; load_packed(rounds_again=False)), but not unpacked; give the BF16 "
            "checkpoint that it was made of"
        )


def check_matrices(checkpoint: CheckpointFolder, layers: Mapping[str, str], prepared: Iterable[Site]) -> None:
    """Raise a UserError where qat_config.json, config.json and the stored matrices disagree on transformed inputs.

    Args:
        layers: the packed layers, with the names of their sites.
        prepared: the sites of the model, prepared as qat_config.json says.
    """
    said = {site.name for site in prepared if is_transformed(site)}
    groups = ((checkpoint.quantization_config or {}).get(KEY) or {}).get("config_groups") or {}
    known = all(
        (group.get("type"), group.get("head_dim")) == _KIND
        and all((apply.get("location"), apply.get("inverse", False)) == _PLACE for apply in group.get("apply", ()))
        for group in groups.values()
    )
    if bool(groups) != bool(said) or not known:
        what = "is another" if groups else "is missing"
        raise UserError(
            f"{checkpoint.path}: qat_config.json says that the inputs of {len(said)} layers are transformed, and {KEY} "
            f"in config.json {what}, so engines would compute something else; export or copy the checkpoint again"
        )
    for layer, site in layers.items():
        if (site in said) != (f"{layer}.{_MODULE}.weight" in checkpoint.stored):
            raise UserError(
                f"{checkpoint.path} has {'no' if site in said else 'a'} matrix that transforms the inputs of {layer}, "
                "and its qat_config.json says the opposite; export or copy the checkpoint again"
            )


def check_matrix_values(checkpoint: CheckpointFolder) -> None:
    """Raise a UserError for a stored matrix that is not the one which layers here multiply by."""
    expected = hadamard.matrix(dtype=VIEW_DTYPE)
    with checkpoint.reading() as read:
        for name in filter(is_matrix, checkpoint.stored):
            if not torch.equal(read(name).to(VIEW_DTYPE), expected):
                raise UserError(
                    f"{checkpoint.path}: {name} is not Sylvester's matrix of {SIZE} rows, the only one that is "
                    "computed with here; evaluate it in vLLM, or give the BF16 checkpoint that it was made of"
                )


def is_matrix(name: str) -> bool:
    """Whether a tensor of a packed folder is the matrix of a transform."""
    return name.endswith(f".{_MODULE}.weight")


def accept(config: PreTrainedConfig) -> None:
    """Let transformers load a packed folder of this configuration, in place; `apply_stored` must follow."""
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get(STATUS) == REFUSAL:
        config.quantization_config = {**settings, STATUS: "compressed"}


def load_transformed(folder: str, **options: Any) -> PreTrainedModel:
    """A packed folder's model in transformers, which transforms its inputs as the folder says.

    It is for computing, not for saving: transformers saves the matrices, and not that inputs are to be transformed.

    Args:
        folder: the packed folder; one without transforms is loaded as it is.
        options: of `AutoModelForCausalLM.from_pretrained`, such as dtype and device_map.

    Raises:
        UserError: it is no packed folder, or lacks the matrix of a layer that its config.json names.
        ImportError: compressed-tensors is not installed.
    """
    CheckpointFolder.open(folder, "the packed folder")
    code = {key: options[key] for key in ("trust_remote_code",) if key in options}
    config = AutoConfig.from_pretrained(folder, **code)
    accept(config)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    apply_stored(model, folder)
    return model


@torch.no_grad()
def apply_stored(model: nn.Module, folder: str) -> int:
    """Let a model that transformers loaded from a packed folder transform its inputs as the folder says.

    Args:
        model: loaded with a configuration that `accept` was given; it is changed.
        folder: the packed folder.

    Returns:
        How many layers have transformed inputs now.

    Raises:
        UserError: the folder has no such matrix for a layer that its config.json names.
        ImportError: compressed-tensors is not installed.
    """
    from compressed_tensors.transform import TransformConfig, TransformFactory

    checkpoint = CheckpointFolder.open(folder, "the packed folder")
    config, applied = (checkpoint.quantization_config or {}).get(KEY), 0
    if not config:
        return 0
    for name, scheme in TransformConfig.model_validate(config).config_groups.items():
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
        with checkpoint.reading() as read:
            for module_name, module in model.named_modules():
                if (transform := module._modules.get(f"{name}_input")) is None:
                    continue
                stored = f"{module_name}.{name}_input.weight"
                if stored not in checkpoint.names:
                    raise UserError(f"{checkpoint.path} lacks {stored}, which its config.json names; pack it again")
                matrix = read(stored).to(transform.get_parameter("weight"))
                transform.weight = nn.Parameter(matrix, requires_grad=False)  # compressed-tensors made a random one
                applied += 1
    return applied
