"""The contract that every format, rule and dialect keeps: what is trained is what is packed is what is read.

fake-quantize(w) = dequantize(quantize(w)) = what the dialect's own library makes of the file, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_tokenizer
from safetensors.torch import load_file

from qat import SCHEMES, QATConfig, get_scheme, prepare_qat
from qat.checkpoints.dialects import DIALECTS
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.unpack import load_packed
from qat.layers.sites import quantized_sites
from qat.numerics import ops

# A row for each scheme whose weights differ, rule of weights and dialect that holds it.
ROWS = [
    (name, rule, dialect.name)
    for name in SCHEMES
    for rule in get_scheme(name).weight.format.rules
    for dialect in DIALECTS.values()
    if not name.endswith("_RCEIL") and dialect.can_hold(get_scheme(name, rule)) is None
]
INPUTS = sorted(
    {(s.input.format.name, DIALECTS["compressed-tensors"].input_rule(s)) for s in map(get_scheme, SCHEMES) if s.input}
)


def make_source(folder: Path, scheme: str, rule: str, **kwargs) -> Path:
    """A trained-looking checkpoint of one layer whose weights span many magnitudes."""
    model = prepare_qat(make_llama(layers=1, **kwargs).bfloat16(), {torch.nn.Linear: scheme}, weight_scale_rule=rule)
    with torch.no_grad():
        for site in quantized_sites(model):
            rows = site.weight.shape[0]
            site.weight.mul_(torch.logspace(-6, 3, rows)[torch.randperm(rows), None])
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model.qat_config.save(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("scheme", "rule", "export_format"), ROWS)
def test_what_is_trained_is_what_is_packed_is_what_is_read(tmp_path, scheme, rule, export_format, bias, tied):
    source = make_source(tmp_path / "source", scheme, rule, attention_bias=bias, tie_word_embeddings=tied)
    packed = export_checkpoint(source, tmp_path / "packed", export_format)
    plain, tensors = (load_file(folder / "model.safetensors") for folder in (source, packed))
    dialect, (read, config) = DIALECTS[export_format], load_packed(packed)
    prepared = prepare_qat(
        make_llama(layers=1, attention_bias=bias, tie_word_embeddings=tied), {torch.nn.Linear: scheme}
    )
    sites = {site.tensor: site for site in quantized_sites(prepared)}
    assert len(sites) == 7 and config == QATConfig.load(source)
    for name, weight in plain.items():
        if name not in sites:
            assert torch.equal(tensors[name], weight), name
            continue
        spec = sites[name].scheme.weight.with_rule(rule)
        trained = ops.fake_quantize(weight, spec.format.name, rule, torch.bfloat16)
        quantized = ops.quantize(weight, spec.format.name, rule, torch.bfloat16)
        assert torch.equal(ops.dequantize(quantized, spec.format.name, torch.bfloat16), trained), name
        held = [tensors[n] for n in dialect.tensor_names(sites[name].name, spec)]
        assert torch.equal(dialect.decompress(held, spec), trained), name
        assert torch.equal(read.get_parameter(name), trained), name


@pytest.mark.parametrize(("fmt", "rule"), INPUTS)
def test_inputs_under_the_engines_rule_equal_what_its_library_makes_of_them(fmt, rule):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from qat.checkpoints.dialects.compressed_tensors import quantization_args
    from qat.numerics.families import get_format

    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 30)[:, None]
    args = QuantizationArgs(**quantization_args(get_format(fmt), dynamic=True))
    scale, zero = compute_dynamic_scales_and_zp(x.bfloat16(), args, torch.nn.Module())
    expected = fake_quantize(x.bfloat16(), scale, zero, args)
    assert torch.equal(ops.fake_quantize(x.bfloat16(), fmt, rule, torch.bfloat16), expected)
