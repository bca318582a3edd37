"""GPTQ as the start of training, against its definition: optimal brain surgery column by column."""

import copy
import logging

import pytest
import torch
from helpers import make_llama, make_mixture
from transformers import GPT2Config, GPT2LMHeadModel

from qat import prepare_qat
from qat.compensation import moments
from qat.compensation.gptq import compensate, compensated, inverse_factor
from qat.compensation.moments import groups_of, lots, second_moments
from qat.errors import UserError
from qat.layers.kv_cache import cache_quantizers
from qat.layers.sites import quantized_sites
from qat.numerics import ops
from qat.schemes.spec import TensorSpec

SPECS = {
    "mxfp4": TensorSpec.of("mx_fp_search", 4),
    "mxfp8": TensorSpec.of("mx_fp", 8),
    "int4": TensorSpec.of("int", 4),
    "nvfp4": TensorSpec.of("nv_fp", 4),
    "fp8": TensorSpec.of("fp", 8),
}
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": row[None]} for row in IDS]


def correlated(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mix


def make_weight(columns: int) -> torch.Tensor:
    return torch.randn(24, columns, generator=torch.Generator().manual_seed(2)) * 0.02


def divisor_of(weight: torch.Tensor, spec: TensorSpec) -> torch.Tensor | None:
    return ops.tensor_divisor([weight], spec.format.name, torch.float32) if spec.format.tensor_scale else None


def rounded(weight: torch.Tensor, spec: TensorSpec, divisor=None) -> torch.Tensor:
    return ops.fake_quantize(weight, spec.format.name, spec.rule, torch.float32, divisor)


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, spec: TensorSpec, divisor) -> torch.Tensor:
    """Round a column, solve for the columns that are left, go on: each time with an inverse of what is left of H."""
    left, fmt = weight.double().clone(), spec.format
    kept = torch.empty_like(left)
    whole = ops.quantize(weight, fmt.name, spec.rule, torch.float32, divisor)
    for column in range(weight.shape[1]):
        block = fmt.block or weight.shape[1]
        first = column // block * block
        if column == first and fmt.block:
            whole = ops.quantize(left[:, first : first + block].float(), fmt.name, spec.rule, torch.float32, divisor)
        codes = ops.quantize_to_scale(
            left[:, first : first + block].float(), whole.scales[0], fmt.name, torch.float32, divisor
        )
        values = ops.dequantize(type(whole)(codes, whole.scales), fmt.name, torch.float32)[:, column - first]
        kept[:, column] = left[:, column]
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (left[:, column] - values) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
        left[:, column] = values
    return kept


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("columns", [64, 160])
def test_columns_make_up_for_the_error_of_those_before_as_optimal_brain_surgery_does(kind, columns):
    spec, weight, x = SPECS[kind], make_weight(columns), correlated(1200, columns)
    divisor, hessian = divisor_of(weight, spec), (x.T @ x).double()
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    found = compensated(weight, inverse_factor(x.T @ x, 0.05), spec, divisor)[0]
    expected = by_definition(weight, hessian, spec, divisor)
    # A column that lies in the middle of two values may be rounded either way, and those behind it in its row follow.
    same = (found.double() - expected).abs().amax(1) < 1e-6
    assert same.sum() >= 0.8 * len(weight)
    assert (found - weight).abs().max() > 1e-4


@pytest.mark.parametrize("kind", SPECS)
def test_the_error_in_the_outputs_falls(kind):
    spec, weight, x = SPECS[kind], make_weight(256), correlated(2000, 256)
    divisor = divisor_of(weight, spec)
    start, values = compensated(weight, inverse_factor(x.T @ x, 0.01), spec, divisor)
    error = {name: (x @ (w - weight).T).square().mean() for name, w in (
        ("nearest", rounded(weight, spec, divisor)), ("gptq", values), ("start", rounded(start, spec, divisor))
    )}  # fmt: skip
    assert error["gptq"] < 0.8 * error["nearest"]
    assert error["start"] < (0.8 if spec.format.block else 1.02) * error["nearest"]


def test_inputs_that_do_not_correlate_leave_the_weight_as_it_is():
    weight = make_weight(64)
    for moment in (torch.diag(torch.arange(1.0, 65)), torch.zeros(64, 64)):
        start, values = compensated(weight, inverse_factor(moment, 0.1), SPECS["mxfp4"])
        assert torch.equal(start, weight)
        assert torch.equal(values, rounded(weight, SPECS["mxfp4"]))


@pytest.mark.parametrize("transform", [False, True])
def test_moments_are_those_of_the_inputs_as_they_are_rounded(transform):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 32, bias=False))
    prepare_qat(model, {"0": "MXFP4", "1": "MXFP8"}, (), input_transforms={"1": "hadamard"} if transform else {})
    x = torch.randn(5, 64)
    x[2] *= 100
    found = second_moments_of(model, x)
    matrix = torch.eye(1)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    hidden = model[0](x).detach()
    hidden = (hidden.unflatten(-1, (-1, 32)) @ matrix / 32**0.5).flatten(-2) if transform else hidden
    for moment, given, fmt in ((found[0], x, "mxfp4"), (found[1], hidden, "mxfp8")):
        values = ops.fake_quantize(given, fmt, "floor", torch.float32)
        values = values / values.norm(dim=-1, keepdim=True)  # each token counts alike
        torch.testing.assert_close(moment, values.T @ values)
        assert float(moment.trace()) == pytest.approx(5)


def second_moments_of(model, x: torch.Tensor) -> list[torch.Tensor]:
    return second_moments(model, [{"input": x[:2]}, {"input": x[2:]}], quantized_sites(model), "")


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in BATCHES])


def prepared(make=make_llama, scheme: str = "MXFP4", **options):
    model = make().eval()
    plain = copy.deepcopy(model)
    prepare_qat(model, {torch.nn.Linear: scheme}, ("lm_head",), **options)
    return model, plain


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("make", "scheme", "options"),
    [
        (make_llama, "MXFP4", {}),
        (make_llama, "MXFP4FP8", {"input_transforms": "hadamard", "weight_scale_rule": "search"}),
        (make_llama, "INT4_G32", {}),
        (make_gpt2, "MXFP4A16", {}),
    ],
)
def test_a_models_logits_come_nearer_to_those_of_the_unquantized_model(make, scheme, options):
    model, plain = prepared(make, scheme, **options)
    before = (outputs(model) - outputs(plain)).square().mean()
    result = compensate(model, BATCHES, damping=0.01)
    assert (outputs(model) - outputs(plain)).square().mean() < 0.9 * before
    assert (result.layers, result.experts, result.left) == (len(quantized_sites(model)), 0, {})


def test_what_is_calibrated_later_is_not_rounded_and_on_again_afterwards():
    model, plain = prepared(scheme="NVFP4", kv_cache_scheme="FP8")
    result = compensate(model, BATCHES)
    quantizers = [site.module.input_quantizer for site in quantized_sites(model)] + cache_quantizers(model)
    assert all(quantizer.is_enabled for quantizer in quantizers)
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    assert sum(changed) == result.layers == len(quantized_sites(model))


def test_what_is_not_the_weight_of_a_quantized_linear_layer_stays_and_is_named(caplog):
    model, plain = prepared(make_mixture)
    with caplog.at_level(logging.INFO, "qat.compensation.gptq"):
        result = compensate(model, BATCHES)
    linear = {site.tensor for site in quantized_sites(model) if site.kind != "experts"}
    changed = {
        name for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed == linear
    assert result.experts > 0
    assert f"left as they are: {result.experts} stacks of experts" in caplog.text


def test_a_layer_that_no_sample_reaches_is_named_in_a_warning(caplog):
    model, _ = prepared()
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with caplog.at_level(logging.WARNING, "qat.compensation.gptq"):
        result = compensate(model, BATCHES)
    assert list(result.left)[0] == "model.layers.1.self_attn.q_proj" and len(result.left) == 7
    assert "no sample reaches it: model.layers.1.self_attn.q_proj" in caplog.text


class Routed(torch.nn.Module):
    """Four linear experts; a sample is sent to the one that its first token says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(128, 64)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, input_ids):
        return self.experts[int(input_ids[0, 0]) % 4](input=self.embed(input_ids))


def test_a_layer_is_reached_if_any_sample_reaches_it_and_may_be_called_by_keyword():
    model = Routed()
    before = [expert.weight.detach().clone() for expert in model.experts]
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ())
    ids = [torch.tensor([[first, 5, 9, 23]]) for first in (0, 1, 2)]
    result = compensate(model, [{"input_ids": row} for row in ids])
    assert (result.layers, list(result.left)) == (3, ["experts.3"])
    moved = [not torch.equal(expert.weight, old) for expert, old in zip(model.experts, before, strict=True)]
    assert moved == [True, True, True, False]


def test_a_weight_that_several_modules_share_or_that_is_not_rounded_stays(caplog):
    model = make_llama(tie_word_embeddings=True).eval()
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    down = model.model.layers[0].mlp.down_proj
    down.weight_quantizer.disable()
    before = model.lm_head.weight.detach().clone(), down.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "qat.compensation.gptq"):
        result = compensate(model, BATCHES)
    assert set(result.left) == {"model.layers.0.mlp.down_proj", "lm_head"}
    assert torch.equal(model.lm_head.weight, before[0]) and torch.equal(down.weight, before[1])
    assert "shares its weight with another module" in caplog.text


def test_layers_behind_see_the_inputs_that_the_weights_before_them_give(monkeypatch):
    """With memory for one input at a time each lot is that of a model whose earlier layers are done."""
    at_once, apart = prepared()[0], prepared()[0]
    compensate(at_once, BATCHES)
    monkeypatch.setattr(moments, "MEMORY", 1)
    compensate(apart, BATCHES)
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    weights = [dict(model.named_parameters()) for model in (at_once, apart)]
    assert torch.equal(weights[0][first], weights[1][first])
    assert not torch.equal(weights[0][last], weights[1][last])


def test_inputs_that_are_not_finite_are_named():
    model, _ = prepared()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(UserError, match="inputs of model.layers.1.self_attn.q_proj are NaN or infinite"):
        compensate(model, BATCHES)


def test_layers_with_the_same_input_share_its_moments_and_lots_fit_the_memory(monkeypatch):
    model, _ = prepared()
    groups = groups_of(model, BATCHES[:1], moments.linear_sites(model))
    names = [[site.name.rpartition(".")[2] for site in group] for group in groups]
    assert names[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    monkeypatch.setattr(moments, "MEMORY", 4 * 2 * groups[0][0].shape[1] ** 2)
    found = list(lots(groups))
    assert [group for lot in found for group in lot] == groups
    assert len(found) > 2
    for lot in found:
        assert len(lot) == 1 or sum(4 * group[0].shape[1] ** 2 for group in lot) <= moments.MEMORY


def test_no_sample_is_refused():
    with pytest.raises(UserError, match="at least one sample"):
        compensate(prepared()[0], [])


@pytest.mark.parametrize("options", [{}, {"input_transforms": "hadamard"}])
@pytest.mark.parametrize("rule", ["even", "search"])
def test_where_nothing_is_trained_weights_in_mx_formats_are_the_values_that_gptq_chooses(options, rule):
    untouched, chosen, kept = (prepared(weight_scale_rule=rule, **options)[0] for _ in range(3))
    compensate(chosen, BATCHES, rounds=True)
    compensate(kept, BATCHES)

    def seen(weight: torch.Tensor) -> torch.Tensor:
        return ops.transform(weight.contiguous(), torch.float32) if options else weight

    # The first layer's: later ones see other inputs.
    site, of_chosen, of_kept = (quantized_sites(model)[0] for model in (untouched, chosen, kept))
    spec = site.module.weight_quantizer.spec
    moment = second_moments(untouched, BATCHES, [site], "")[0]
    columns, values = compensated(seen(site.weight.detach()), inverse_factor(moment, 0.1), spec)
    torch.testing.assert_close(seen(of_chosen.weight.detach()), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen(of_kept.weight.detach()), columns, rtol=0, atol=1e-6)
    assert not torch.equal(values, rounded(columns, spec))  # whose scales are chosen again
    for own in (seen(site.weight.detach()) for site in quantized_sites(chosen)):
        saved = seen(seen(own).bfloat16().float())  # transformed twice is not at all
        torch.testing.assert_close(rounded(saved.contiguous(), spec), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "search"])
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
@pytest.mark.parametrize("options", [{}, {"input_transforms": "hadamard"}])
def test_values_that_gptq_chooses_stay_where_the_rule_keeps_them_once_they_are_saved(options, scheme, rule):
    untouched, chosen = (prepared(scheme=scheme, weight_scale_rule=rule, **options)[0] for _ in range(2))
    compensate(chosen, BATCHES, rounds=True)

    def seen(weight: torch.Tensor) -> torch.Tensor:
        return ops.transform(weight.contiguous(), torch.float32) if options else weight

    site, of_chosen = (quantized_sites(model)[0] for model in (untouched, chosen))
    spec = site.module.weight_quantizer.spec
    moment = second_moments(untouched, BATCHES, [site], "")[0]
    columns, values = compensated(seen(site.weight.detach()), inverse_factor(moment, 0.1), spec)
    own = of_chosen.weight.detach()
    blocks = [tensor.unflatten(-1, (-1, 32)) for tensor in (seen(own), values, columns)]
    is_value, is_column = (torch.isclose(blocks[0], other, rtol=0, atol=1e-6).all(-1) for other in blocks[1:])
    assert (is_value | is_column).all()
    assert is_value.any()
    if rule in ("even", "search") and scheme == "MXFP4":
        assert is_value.all()
    for saved in (own, own.bfloat16().float()):
        read = rounded(seen(saved).contiguous(), spec).unflatten(-1, (-1, 32))
        assert torch.equal(read[is_value & ~is_column], blocks[1][is_value & ~is_column])

    def error(weight: torch.Tensor) -> float:
        difference = (weight - seen(site.weight.detach())).double()
        return ((difference @ moment.double()) * difference).sum().item()

    saved, saved_columns = (seen(weight.bfloat16().float()).contiguous() for weight in (own, seen(columns)))
    assert error(rounded(saved, spec)) < 1.01 * error(rounded(saved_columns, spec))


def test_formats_that_scale_by_the_largest_value_keep_unrounded_weights_where_nothing_is_trained():
    for scheme in ("INT4_G32", "NVFP4A16"):
        models = [prepared(scheme=scheme)[0] for _ in range(2)]
        for model, rounds in zip(models, (False, True), strict=True):
            compensate(model, BATCHES, rounds=rounds)
        assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
