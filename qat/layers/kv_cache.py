"""Fake quantization of the key/value cache.

What an engine stores is what an attention layer hands to its cache: keys after rotary embedding, and values, before
heads are repeated. transformers' attention classes call `past_key_values.update(keys, values, ...)` if they were given
a cache. So a hook before each attention layer gives it one that quantizes, also in training, where there is no other:
the layer computes with what `update` returns. Masks are made at the level of the model and see nothing of it.

Keys have one scale a layer and values another, static and calibrated (see calibration.py). Engines find such layers by
the names of their projections (compressed-tensors, vLLM), and so does `cache_layers`; what they would serve otherwise
is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..numerics import ops
from ..schemes.spec import TensorSpec
from .operands import compute_dtype

_ARGUMENT = "past_key_values"  # of attention layers that engines know
_CACHES = (_ARGUMENT, "past_key_value", "layer_past")
_PROJECTIONS = ("k_proj", "qkv_proj")


class CacheQuantizer(nn.Module):
    """Fake-quantizes keys or values under a static scale, with straight-through gradients.

    Attributes:
        tensor: the name of the scale in a packed checkpoint, "model.layers.0.self_attn.k_scale".
        spec: format and rule.
        scale: an exact FP32 value; None before calibration. A number and no buffer: no cast of the model rounds it, and
            it needs no device.
    """

    def __init__(self, tensor: str, spec: TensorSpec) -> None:
        super().__init__()
        self.tensor = tensor
        self.spec = spec
        self.scale: float | None = None
        self.is_enabled = True

    def enable(self) -> None:
        """Quantize in `forward`."""
        self.is_enabled = True

    def disable(self) -> None:
        """Return inputs untouched in `forward`."""
        self.is_enabled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [batch, heads, time, head_dim] -> the same shape, in the dtype that attention computes in.

        Raises:
            UserError: the scale has not been calibrated.
        """
        if not self.is_enabled:
            return x
        if self.scale is None:
            raise UserError(
                f"{self.tensor} has no calibrated value; run qat.layers.calibration.calibrate_inputs on some samples "
                "first"
            )
        scale = torch.full((1,), self.scale, dtype=torch.float32, device=x.device)
        return ops.fake_quantize_static(x, scale, self.spec.rule, compute_dtype(x))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.spec.format.name}, rule={self.spec.rule}" if self.is_enabled else "disabled"


class QuantizingCache:
    """What an attention layer takes for its cache: it quantizes, then stores in the real one if there is one."""

    def __init__(self, attention: Any, cache: Any) -> None:
        self._attention = attention
        self._cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `Cache.update`: the keys and values to attend to, [batch, heads, time, head_dim] each."""
        keys, values = self._attention.key_quantizer(keys), self._attention.value_quantizer(values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """How many positions are stored."""
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        cache = self.__dict__.get("_cache")
        if cache is None:
            kind = type(self.__dict__.get("_attention")).__name__
            raise AttributeError(f"{kind} reads {name!r} of its cache, and there is none where nothing is generated")
        return getattr(cache, name)


def _through_quantizers(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, _ARGUMENT: QuantizingCache(attention, kwargs.get(_ARGUMENT))}


def quantize_cache(layers: dict[str, nn.Module], spec: TensorSpec) -> None:
    """Let attention layers (from `cache_layers`) quantize their keys and values, in place."""
    for name, attention in layers.items():
        attention.key_quantizer = CacheQuantizer(f"{name}.k_scale", spec)
        attention.value_quantizer = CacheQuantizer(f"{name}.v_scale", spec)
        attention.register_forward_pre_hook(_through_quantizers, with_kwargs=True)


def cache_quantizers(model: nn.Module) -> list[CacheQuantizer]:
    """Those of a prepared model, in its order; keys before values."""
    return [module for module in model.modules() if isinstance(module, CacheQuantizer)]


def kv_cache_spec(model: nn.Module) -> TensorSpec | None:
    """How a prepared model quantizes its keys and values; None: not at all."""
    return next((quantizer.spec for quantizer in cache_quantizers(model)), None)


def check_cache_calibrated(model: nn.Module) -> None:
    """Raise a UserError that names the first scale of the cache that is not calibrated."""
    for quantizer in cache_quantizers(model):
        if quantizer.scale is None:
            raise UserError(
                f"{quantizer.tensor} is not calibrated, so engines would take 1.0; give --dataset to scripts/export.py "
                "(calibrated_scales to export_checkpoint)"
            )


def set_cache_rule(model: nn.Module, rule: str) -> None:
    """Quantize the cache under `rule`: what an engine with a rule of its own does."""
    for quantizer in cache_quantizers(model):
        quantizer.spec = quantizer.spec.with_rule(rule)


# ---- Which layers have a cache ----


def cache_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by name; recurrent layers, which keep a state instead, are not among them.

    Raises:
        UserError: one of them does not expose keys and values as engines cache them, or there is none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_attention(module):
            continue
        if reason := _why_not(module) or ("is the layer of another name, too" if module in found.values() else None):
            raise UserError(
                f"the key/value cache cannot be quantized: {name} ({type(module).__name__}) {reason}; leave "
                "kv_cache_scheme out"
            )
        found[name] = module
    if not found:
        raise UserError(
            f"the key/value cache cannot be quantized: {type(model).__name__} has no attention layer that takes a "
            "cache; leave kv_cache_scheme out"
        )
    return found


def _is_attention(module: nn.Module) -> bool:
    """Whether it computes keys and values that are to be cached: not what contains it, no recurrence, no encoder."""
    if "attention" not in type(module).__name__.lower():
        return False
    if _takes_cache(module):
        return _updates(module) or _has_projections(module)
    takes_state = "cache_params" in _parameters(module)
    return _has_projections(module) and not takes_state and getattr(module, "is_causal", True)


def _why_not(module: nn.Module) -> str | None:
    """Why keys and values of an attention layer cannot be quantized as engines cache them."""
    of_config = getattr(module, "config", None)
    if any(getattr(owner, "kv_lora_rank", None) for owner in (module, of_config)):
        return "caches a latent that keys and values are made of (multi-head latent attention)"
    if getattr(module, "is_kv_shared_layer", False):
        return "reads the cache of another layer"
    if _ARGUMENT not in _parameters(module):
        return f"does not expose its keys and values: its forward takes no {_ARGUMENT}"
    if not _updates(module):
        return "keeps something else than keys and values in its cache"
    if not _has_projections(module):
        return f"does not expose its keys and values: engines look for {' or '.join(_PROJECTIONS)}"
    inner = next((name for name, child in module.named_modules() if name and _takes_cache(child)), None)
    if inner is not None:
        return f"keeps more than keys and values in its cache ({inner} has a part of it)"
    return None


def _takes_cache(module: nn.Module) -> bool:
    return any(name in _parameters(module) for name in _CACHES)


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(type(module).forward).parameters


def _has_projections(module: nn.Module) -> bool:
    return any(getattr(module, name, None) is not None for name in _PROJECTIONS)


def _updates(module: nn.Module) -> bool:
    """Whether the code of its forward names `update`, as in `past_key_values.update(...)`."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "update" in code.co_names
