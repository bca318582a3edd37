"""The contract that every format, rule and dialect keeps: what is trained is what is packed is what is read.

fake-quantize(w) = dequantize(quantize(w)) = what the dialect's own library makes of the file, bit for bit. Each scheme
has a row for each dialect that holds it, and one for each scale rule if no scheme before it has its format of weights.
Rows take turns with biases and tied embeddings.
"""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from helpers import make_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qat import SCHEMES, QATConfig, get_scheme, prepare_qat
from qat.checkpoints.dialects import DIALECTS
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import load_packed
from qat.layers.calibration import calibrated_layers, set_calibrated_scales
from qat.layers.sites import quantized_sites
from qat.numerics import ops
from qat.numerics.families import get_format

_FIRST = {get_scheme(name).weight.format: name for name in reversed(SCHEMES)}
ROWS = [
    (name, rule, dialect.name)
    for name in SCHEMES
    for rule in get_scheme(name).weight.format.rules
    for dialect in DIALECTS.values()
    if dialect.name != "mxfp4"  # which holds experts only
    and dialect.can_hold(get_scheme(name, rule)) is None
    and (name in _FIRST.values() or rule == get_scheme(name).weight.format.rules[0])
]
TURNS = cycle(product((False, True), repeat=2))  # bias, tied
INPUTS = sorted(
    {
        (s.input.format.name, rule)
        for s in map(get_scheme, SCHEMES)
        if s.input and (rule := DIALECTS["compressed-tensors"].input_rule(s))
    }
)


def make_model(bias: bool, tied: bool) -> LlamaForCausalLM:
    """A random Llama of one layer that all blocks divide."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, attention_bias=bias, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_source(folder: Path, scheme: str, rule: str, bias: bool, tied: bool) -> Path:
    """A trained-looking checkpoint of one layer whose weights span many magnitudes."""
    model = prepare_qat(make_model(bias, tied).bfloat16(), {torch.nn.Linear: scheme}, weight_scale_rule=rule)
    with torch.no_grad():
        for site in quantized_sites(model):
            rows = site.weight.shape[0]
            site.weight.mul_(torch.logspace(-6, 3, rows)[torch.randperm(rows), None])
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    set_calibrated_scales(model, {f"{name}.input_global_scale": 37.3125 for name in calibrated_layers(model)})
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder


@pytest.mark.parametrize(("row", "turn"), list(zip(ROWS, TURNS, strict=False)), ids=str)
def test_what_is_trained_is_what_is_packed_is_what_is_read(tmp_path, row, turn):
    (scheme, rule, export_format), (bias, tied) = row, turn
    source = make_source(tmp_path / "source", scheme, rule, bias, tied)
    packed = export_checkpoint(source, tmp_path / "packed", export_format)
    plain, tensors = (load_file(folder / "model.safetensors") for folder in (source, packed))
    dialect, (read, config) = DIALECTS[export_format], load_packed(packed)
    sites = {s.tensor: s for s in quantized_sites(prepare_qat(make_model(bias, tied), {torch.nn.Linear: scheme}))}
    assert len(sites) == 7 and config == QATConfig.load(source)
    for name, scale in config.calibrated_scales.items():
        assert tensors.pop(name).tolist() == [scale]
    for name, weight in plain.items():
        if name not in sites:
            assert torch.equal(tensors.pop(name), weight), name
            continue
        spec, divisor = sites[name].scheme.weight.with_rule(rule), None
        if spec.format.tensor_scale:
            fused = [plain[n] for n in plain if n.split(".")[-3:-1] in _fused_with(name)]
            divisor = 448.0 * 6.0 / torch.stack([w.abs().max() for w in fused]).max().float().reshape(1)
        trained = ops.fake_quantize(weight, spec.format.name, rule, torch.bfloat16, divisor)
        quantized = ops.quantize(weight, spec.format.name, rule, torch.bfloat16, divisor)
        assert torch.equal(ops.dequantize(quantized, spec.format.name, torch.bfloat16), trained), name
        held = [tensors.pop(n) for n in dialect.tensor_names(sites[name].name, spec)]
        assert torch.equal(dialect.decompress(held, spec), trained), name
        assert torch.equal(read.get_parameter(name), trained), name
    assert not tensors, "tensors that nobody asked for"


def _fused_with(name: str) -> list[list[str]]:
    """What engines fuse with the weight `name`, itself among it, as ends of names: [["self_attn", "q_proj"], ...]."""
    parent, own = name.split(".")[-3:-1]
    groups = (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], [own])
    return [[parent, other] for other in next(group for group in groups if own in group)]


@pytest.mark.parametrize(("fmt", "rule"), INPUTS)
def test_inputs_under_the_engines_rule_equal_what_its_library_makes_of_them(fmt, rule):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from qat.checkpoints.dialects.compressed_tensors import quantization_args

    x = torch.randn(2, 30, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 30)[:, None]
    args = QuantizationArgs(**quantization_args(get_format(fmt), dynamic=True))
    divisor = torch.tensor([3.4567]) if get_format(fmt).tensor_scale else None
    scale, zero = compute_dynamic_scales_and_zp(x.bfloat16(), args, torch.nn.Module(), divisor)
    expected = fake_quantize(x.bfloat16(), scale, zero, args, divisor)
    assert torch.equal(ops.fake_quantize(x.bfloat16(), fmt, rule, torch.bfloat16, divisor), expected)
