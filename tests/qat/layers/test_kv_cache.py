"""The quantized key/value cache: numerics, gradients, generation, kinds of attention, calibration, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers import make_llama
from torch import nn
from transformers import DynamicCache

from qat import QATConfig, get_quantization_format, prepare_qat
from qat.errors import UserError
from qat.layers.calibration import calibrate_inputs, calibrated_scales, needs_calibration, set_calibrated_scales
from qat.layers.kv_cache import CacheQuantizer, cache_layers, cache_quantizers, set_cache_rule
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import quantizers_off
from qat.numerics import fp8, ops

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]])
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "head_dim": 16,
}  # fmt: skip


def make_model(kind: str, **changes) -> nn.Module:
    """A random model of an architecture of transformers, with sizes of ours where it has them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def with_cache(model: nn.Module, coarse: float = 1.0) -> nn.Module:
    """The model with a quantized cache only: scales `coarse` times the calibrated ones show in every logit."""
    prepare_qat(model, {nn.Linear: "MXFP8"}, kv_cache_scheme="FP8")
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.disable()
            module.input_quantizer.disable()
    calibrate_inputs(model, [{"input_ids": IDS}])
    set_calibrated_scales(model, {name: value * coarse for name, value in calibrated_scales(model).items()})
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **inputs) -> torch.Tensor:
    return model(ids, use_cache=False, **inputs).logits


# ---- Numerics ----


def test_values_under_a_static_scale_by_hand():
    scale = torch.tensor([0.5])
    x = torch.tensor([0.0, 0.5, -0.55, 0.53125, 224.0, 1e4, -torch.inf, torch.nan, 2**-10, 2**-12])
    expected = torch.tensor([0.0, 0.5, -0.5625, 0.5, 224.0, 224.0, -224.0, torch.nan, 2**-10, 0.0])
    found = fp8.fake_quantize_static(x, scale, "absmax", torch.float32)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_rule_equals_compressed_tensors(dtype):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = (torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    scale = fp8.tensor_scale(x.abs().amax() / 2)  # a quarter saturates or so
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    expected = fake_quantize(x, scale.to(dtype), None, args)
    assert torch.equal(fp8.fake_quantize_static(x, scale, "absmax_native", dtype), expected)
    other = fp8.fake_quantize_static(x, scale, "absmax", dtype)
    assert torch.equal(other, expected) == (dtype == torch.float32)


def test_gradients_pass_straight_through_also_where_values_saturate_and_in_the_dtype_of_the_input():
    x = (torch.randn(2, 3, 5, 8) * 100).requires_grad_()
    out = ops.fake_quantize_static(x, torch.tensor([0.01]), "absmax", torch.bfloat16)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert out.dtype == torch.bfloat16 and bool((out.abs() <= 4.5).all())
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, grad.float())


def test_weight_gradients_equal_those_of_a_composition_by_autograd():
    model = with_cache(make_model("Llama"), 4.0)
    reference = copy.deepcopy(make_model("Llama"))

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    class Cache:
        def __init__(self, k, v):
            self.k, self.v = torch.tensor(k), torch.tensor(v)

        def update(self, keys, values, layer):
            return Straight.apply(keys, self.k), Straight.apply(values, self.v)

    for own, other in zip(model.model.layers, reference.model.layers, strict=True):
        cache = Cache(own.self_attn.key_quantizer.scale, own.self_attn.value_quantizer.scale)
        other.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, cache=cache: (args, {**kwargs, "past_key_values": cache}), with_kwargs=True
        )
    losses = [m(IDS, labels=IDS, use_cache=False).loss for m in (model, reference)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    assert all(torch.allclose(p.grad, grads[name], rtol=1e-4, atol=1e-7) for name, p in model.named_parameters())


# ---- Kinds of attention ----

WINDOW = {"sliding_window": 4, "use_sliding_window": True}
KINDS = {
    "Llama": {}, "Mistral": {"sliding_window": 4}, "Qwen2": {"layer_types": ["sliding_attention"] * 2, **WINDOW},
    "Qwen3": {}, "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16}, "Phi3": {}, "Olmo2": {},
    "GptOss": {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_generation_step_by_step_gives_the_logits_of_the_whole_text(kind):
    model = with_cache(make_model(kind, attn_implementation="eager", **KINDS[kind]), 8.0)
    whole = logits(model)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for ids in IDS.split([5, *[1] * 7], dim=1):
            steps.append(model(ids, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-4)
    with quantizers_off(model):
        assert float((logits(model) - whole).abs().max()) > 1e-4  # the cache does change logits


def test_what_is_stored_are_the_quantized_keys_after_rotation_and_values_before_heads_repeat():
    model, cache = with_cache(make_model("Llama"), 8.0), DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    attention, plain = model.model.layers[0].self_attn, DynamicCache()
    with torch.no_grad(), quantizers_off(model):
        model(IDS, past_key_values=plain, use_cache=True)
    for stored, exact, quantizer in (
        (cache.layers[0].keys, plain.layers[0].keys, attention.key_quantizer),
        (cache.layers[0].values, plain.layers[0].values, attention.value_quantizer),
    ):
        assert stored.shape == (2, 2, 12, 16)
        codes = (exact / quantizer.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(stored, codes * torch.tensor(quantizer.scale)) and not torch.equal(stored, exact)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_sdpa_equals_eager_attention(kind):
    found = []
    for attention in ("eager", "sdpa"):
        model = with_cache(make_model(kind, **KINDS[kind]), 1.0)
        model.set_attn_implementation(attention)
        set_calibrated_scales(model, dict.fromkeys(calibrated_scales(model), 0.25))
        found.append(logits(model))
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_equal_rows_of_their_own(attention):
    model = with_cache(make_model("Llama", attn_implementation=attention), 8.0)
    positions = torch.arange(12).repeat(2)[None]
    packed = logits(model, IDS.reshape(1, -1), position_ids=positions)
    assert torch.allclose(packed.reshape(2, 12, -1), logits(model), atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = with_cache(make_model("Llama"), 8.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_under_autocast_keys_and_values_are_seen_in_bfloat16_as_they_are_served():
    model, seen = with_cache(make_model("Llama")), []
    model.model.layers[0].self_attn.key_quantizer.register_forward_hook(
        lambda m, args, out: seen.append((args[0], out))
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    ((keys, quantized),) = seen
    assert keys.dtype == torch.float32 and quantized.dtype == torch.bfloat16
    scale = torch.tensor([model.model.layers[0].self_attn.key_quantizer.scale])
    assert torch.equal(quantized, fp8.fake_quantize_static(keys.bfloat16(), scale, "absmax", torch.bfloat16))


def test_a_compiled_model_computes_the_same():
    model = with_cache(make_model("Llama", num_hidden_layers=1), 8.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-6)


def test_layers_sharded_by_hooks_of_their_own_keep_the_cache_quantized():
    model = with_cache(make_model("Llama"), 8.0)
    expected = logits(model)
    for layer in model.model.layers:  # what FSDP2 does to a layer: a subclass of its own, made at run time
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert torch.equal(logits(model), expected)


# ---- Calibration and configuration ----


def test_scales_are_the_largest_keys_and_values_of_the_unquantized_model_over_448():
    model, largest = make_model("Llama"), {}
    prepare_qat(model, {nn.Linear: "MXFP4"}, kv_cache_scheme="fp8")
    assert needs_calibration(model)
    cache = DynamicCache()
    with torch.no_grad(), quantizers_off(model):
        model(IDS, past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.layers):
        for part, tensor in (("k", layer.keys), ("v", layer.values)):
            largest[f"model.layers.{i}.self_attn.{part}_scale"] = float(tensor.abs().max() / 448)
    calibrate_inputs(model, [{"input_ids": row[None]} for row in IDS])
    assert calibrated_scales(model) == pytest.approx(largest, rel=1e-6) and not needs_calibration(model)
    assert model.qat_config.calibrated_scales == calibrated_scales(model)


def test_inputs_keys_and_values_are_calibrated_in_one_pass():
    model = prepare_qat(make_model("Llama"), {nn.Linear: "NVFP4"}, kv_cache_scheme="FP8")
    calibrate_inputs(model, iter([{"input_ids": IDS}]))
    ends = {name.rpartition(".")[2] for name in calibrated_scales(model)}
    assert ends == {"input_global_scale", "k_scale", "v_scale"} and len(calibrated_scales(model)) == 2 * 9
    assert not needs_calibration(model)


def test_resume_restores_scales_bit_for_bit(tmp_path):
    model = with_cache(make_model("Llama"), 1.1)
    model.qat_config.save(tmp_path)
    config = QATConfig.load(tmp_path)
    again = prepare_as_saved(make_model("Llama"), config)
    assert config.kv_cache_scheme == "FP8" and again.qat_config == model.qat_config
    scales = [q.scale for q in cache_quantizers(again)]
    assert scales == [q.scale for q in cache_quantizers(model)] and all(map(float.is_integer, map(_in_steps, scales)))


def _in_steps(value: float) -> float:
    """The value in units of FP32's last bit."""
    return value / 2.0 ** (torch.frexp(torch.tensor(value, dtype=torch.float64)).exponent.item() - 24)


def test_a_cast_of_the_model_rounds_no_scale():
    model = with_cache(make_model("Llama"))
    before = calibrated_scales(model)
    assert calibrated_scales(model.bfloat16()) == before


def test_the_scheme_of_the_cache_is_a_part_of_the_training():
    plain, cached = (
        QATConfig({"torch.nn.Linear": "MXFP4"}),
        QATConfig({"torch.nn.Linear": "MXFP4"}, kv_cache_scheme="FP8"),
    )
    assert not plain.same_training(cached) and cached.same_training(cached)
    assert cached.summary.endswith("key/value cache FP8") and "cache" not in plain.summary


def test_quantizers_off_and_the_format_include_the_cache():
    model = with_cache(make_model("Llama"), 8.0)
    assert get_quantization_format(model) == "key/value cache fp8_tensor"
    with quantizers_off(model):
        assert get_quantization_format(model) is None
        assert torch.equal(logits(model), logits(make_model("Llama").eval()))
    assert all(quantizer.is_enabled for quantizer in cache_quantizers(model))


def test_the_summary_counts_the_attention_layers(capsys):
    prepare_qat(make_llama(), {nn.Linear: "MXFP4"}, kv_cache_scheme="FP8")
    assert "key/value cache of 2 attention layers in FP8" in capsys.readouterr().out


def test_the_engine_s_rule_replaces_that_of_the_training():
    model = with_cache(make_model("Llama").bfloat16())
    before = logits(model)
    set_cache_rule(model, "absmax_native")
    assert not torch.equal(logits(model), before)


# ---- Refusals ----


def test_an_uncalibrated_cache_is_refused_by_name():
    model = prepare_qat(make_model("Llama"), {nn.Linear: "MXFP8"}, kv_cache_scheme="FP8")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k_scale has no calibrated value"):
        logits(model)


def test_an_unknown_scheme_is_refused_and_leaves_the_model_alone():
    model = make_model("Llama")
    with pytest.raises(UserError, match="kv_cache_scheme 'FP4' is unknown; choose one of FP8"):
        prepare_qat(model, {nn.Linear: "MXFP8"}, kv_cache_scheme="FP4")
    assert get_quantization_format(model) is None and not cache_quantizers(model)


LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip
REFUSED = {
    "DeepseekV3": (LATENT, r"layers\.0\.self_attn \(DeepseekV3Attention\) caches a latent"),
    "GPTNeoX": ({}, r"gpt_neox\.layers\.0\.attention \(GPTNeoXAttention\) .* takes no past_key_values"),
    "Bloom": ({"n_head": 4}, r"h\.0\.self_attention \(BloomAttention\) .* takes no past_key_values"),
    "Rwkv": ({}, "has no attention layer that takes a cache"),
    "Mamba": ({}, "has no attention layer that takes a cache"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_do_not_expose_keys_and_values_are_refused_by_name(kind):
    changes, message = REFUSED[kind]
    with torch.device("meta"):
        model = make_model(kind, **changes)
    with pytest.raises(UserError, match=message):
        prepare_qat(model, {nn.Linear: "FP8"}, kv_cache_scheme="FP8", ignore=())
    assert get_quantization_format(model) is None and not any(map(_is_quantizer, model.modules()))


def _is_quantizer(module: nn.Module) -> bool:
    return isinstance(module, CacheQuantizer)


def test_gpt2_whose_projection_engines_do_not_know_is_refused():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UserError, match="engines look for k_proj or qkv_proj"):
        cache_layers(model)


def test_layers_that_read_the_cache_of_another_layer_are_refused():
    model = make_model("Llama")
    model.model.layers[1].self_attn.is_kv_shared_layer = True
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn \(LlamaAttention\) reads the cache of another"):
        cache_layers(model)


def test_a_recurrence_that_engines_take_for_attention_is_refused():
    changes = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}
    with torch.device("meta"):
        model = make_model("MiniMax", **changes)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn \(MiniMaxLightningAttention\) keeps something else"):
        cache_layers(model)


def test_a_vision_tower_keeps_no_cache():
    model = make_model("Llama")
    model.vision = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    assert list(cache_layers(model)) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_recurrent_layers_of_a_hybrid_model_are_no_attention():
    changes = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "num_experts_per_tok": 1,
    }  # fmt: skip
    with torch.device("meta"):
        model = make_model("Qwen3Next", **changes)
    assert list(cache_layers(model)) == ["model.layers.1.self_attn"]
