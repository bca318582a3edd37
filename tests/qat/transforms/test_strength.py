"""The strength of each activation is the one whose layers, quantized, have the least output error."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama, make_mixture

from qat import prepare_qat
from qat.layers.sites import quantized_sites, quantizers_off
from qat.transforms.observation import observe
from qat.transforms.smoothing import smooth
from qat.transforms.strength import GRID, OF_EXPERTS, best_strengths, output_errors

IDS = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(1))  # as many as are kept of a sample
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]


class OneNorm(torch.nn.Module):
    """Two linear layers read a norm in which two channels stick out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = torch.nn.Embedding(128, 64), torch.nn.LayerNorm(64)
        self.one, self.two = torch.nn.Linear(64, 96), torch.nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[[3, 40]] *= 20

    def forward(self, input_ids):
        x = self.norm(self.embed(input_ids))
        return SimpleNamespace(logits=torch.cat((self.one(x), self.two(x)), -1))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """MXFP4 by its definition: 2 ** floor(log2 of the largest) / 4 scales the nearest of eight magnitudes."""
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    odd = torch.arange(8) % 2 * 1e-9  # of two that are equally near, the even code
    nearest = (blocks.abs() / scale).unsqueeze(-1).sub(grid).abs().add(odd).argmin(-1)
    return (blocks.sign() * grid[nearest] * scale).flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (x.unflatten(-1, (-1, 32)) @ matrix / 32**0.5).flatten(-2)


def expected_errors(model: OneNorm, transforms: bool) -> list[float]:
    """By brute force, of the one activation over all rows of all samples."""
    x = torch.cat([model.norm(model.embed(batch["input_ids"]))[0] for batch in BATCHES]).detach()
    weight = torch.cat((model.one.weight, model.two.weight)).detach()
    errors = []
    for alpha in GRID:
        s = x.abs().amax(0) ** alpha
        s = s / s.log().mean().exp()
        inputs, weights = x / s, weight * s
        if transforms:
            inputs, weights = hadamard(inputs), hadamard(weights).bfloat16().float()
        exact = x.double() @ weight.double().T
        squares = torch.stack(((rounded(inputs) @ rounded(weights).T - exact).pow(2), exact.pow(2)))
        of_rows = torch.stack([columns.sum(-1) for columns in squares.split((96, 32), -1)])  # of one and of two
        errors.append(float((of_rows[:, 0] / of_rows[:, 1]).mean()))
    return errors


@pytest.mark.parametrize("transforms", [False, True])
def test_the_choice_is_that_of_brute_force_over_the_grid(transforms):
    model = OneNorm()
    expected = expected_errors(model, transforms)
    options = {"input_transforms": {"*": "hadamard"}} if transforms else {}
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, (), "floor", "floor", **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with quantizers_off(model):
        activations = observe(model, BATCHES).activations
    assert best_strengths(model, BATCHES, activations) == [GRID[expected.index(min(expected))]]
    x = torch.cat([model.norm(model.embed(batch["input_ids"]))[0] for batch in BATCHES])
    with torch.no_grad():
        errors = output_errors(activations[0], quantized_sites(model), x)
    torch.testing.assert_close(errors, torch.tensor(expected, dtype=torch.float64), rtol=0.01, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_token_of_large_outputs_counts_as_much_as_another():
    model = prepare_qat(OneNorm(), {torch.nn.Linear: "MXFP4"}, ())
    with quantizers_off(model), torch.no_grad():
        (activation,) = observe(model, BATCHES).activations
        x = model.norm(model.embed(IDS))[0]
    larger = x.clone()
    larger[0] *= 1024  # a power of two, which MX scales take: the relative error of the row stays
    with torch.no_grad():
        errors = [output_errors(activation, quantized_sites(model), rows) for rows in (x, larger)]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-6, atol=0)


def test_a_token_of_no_output_counts_as_exact():
    model = prepare_qat(OneNorm(), {torch.nn.Linear: "MXFP4"}, ())
    with torch.no_grad():
        for layer in (model.one, model.two):  # of 0.5 in channels 0 and 1 and of -0.5 in channel 1, the sum is zero
            layer.weight[:, 1] = -layer.weight[:, 0]
    with quantizers_off(model), torch.no_grad():
        (activation,) = observe(model, BATCHES).activations
        x = model.norm(model.embed(IDS))[0]
        nothing, cancelling = torch.zeros(1, 64), torch.zeros(1, 64)
        cancelling[0, :2] = 0.5
    with torch.no_grad():
        errors = [
            output_errors(activation, quantized_sites(model), torch.cat((x, *more)))
            for more in ((), (nothing, cancelling))
        ]
    torch.testing.assert_close(errors[1], errors[0] * len(x) / (len(x) + 2), rtol=1e-6, atol=0)


def test_auto_smooths_each_activation_by_its_own_strength_and_the_function_stays(caplog):
    caplog.set_level("INFO")
    weights = []
    expected = make_llama().eval()(IDS).logits
    for _ in range(2):
        model = prepare_qat(make_llama().eval(), {torch.nn.Linear: "MXFP4"}, weight_scale_rule="search")
        result = smooth(model, BATCHES, "auto")
        with quantizers_off(model):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        weights.append(model.state_dict())
    assert sum(result.strengths.values()) == result.inputs == 8 and len(result.strengths) > 1
    assert result.smoothed == 8 - result.strengths.get(0.0, 0)
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())
    strengths = ", ".join(f"{alpha:g} x {count}" for alpha, count in result.strengths.items())
    assert f"of 8 activations; alpha auto: {strengths}; logits move by " in caplog.text


def test_of_equal_errors_the_least_strength_is_taken_and_a_model_without_outliers_stays_as_it_is(caplog):
    model = OneNorm()
    with torch.no_grad():
        model.norm.weight.fill_(1)
        for parameter in (model.embed.weight, model.one.weight, model.two.weight):
            parameter.copy_(torch.randint(0, 2, parameter.shape) * 2.0 - 1)
        model.embed.weight[:, ::2] = -model.embed.weight[:, 1::2]  # of mean 0
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = smooth(model, BATCHES, "auto")
    assert (result.smoothed, result.inputs, result.strengths) == (0, 1, {0.0: 1})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = "OneNorm continues without smoothing, which --smooth_alpha auto asks for: smoothed 0 of 1 activations"
    assert f"{expected}; alpha auto: 0 x 1" in caplog.text


def test_an_error_during_a_trial_leaves_the_weights_as_they_were(monkeypatch):
    model = prepare_qat(OneNorm(), {torch.nn.Linear: "MXFP4"}, ())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    trials = iter(range(9))

    def fails(module, args):
        if module.weight_quantizer.is_enabled and next(trials) == 8:
            raise MemoryError

    model.two.register_forward_pre_hook(fails)
    with pytest.raises(MemoryError):
        smooth(model, BATCHES, "auto")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_processes_smooth_by_the_strengths_that_they_agreed_on():
    found = []
    for agreed in (lambda own: [0.3] * len(own), None):
        model = prepare_qat(make_llama().eval(), {torch.nn.Linear: "MXFP4"})
        found.append(smooth(model, BATCHES, "auto", agreed).strengths)
    assert found[0] == {0.3: 8} != found[1]


def test_inputs_with_a_tensor_scale_are_calibrated_for_each_strength_and_stay_uncalibrated():
    model = prepare_qat(OneNorm(), {torch.nn.Linear: "NVFP4"}, ())
    with quantizers_off(model):
        activations = observe(model, BATCHES).activations
    (chosen,) = best_strengths(model, BATCHES, activations)
    assert chosen in GRID and all(site.module.input_quantizer.divisor is None for site in quantized_sites(model))


def test_what_quantized_experts_read_takes_a_fixed_strength_and_the_rest_its_own(caplog):
    caplog.set_level("INFO")
    fixed, auto = (prepare_qat(make_mixture().eval(), {torch.nn.Linear: "MXFP4"}) for _ in range(2))
    before = auto(IDS).logits
    smooth(fixed, BATCHES, OF_EXPERTS)
    result = smooth(auto, BATCHES, "auto", lambda own: [0.3] * len(own))
    assert (result.strengths, result.of_experts, result.inputs) == ({0.3: 4}, 4, 8)
    assert "alpha auto: 0.3 x 4, 0.7 x 4 that experts read; logits" in caplog.text
    weights = fixed.state_dict()
    same = {name for name, value in auto.state_dict().items() if torch.equal(value, weights[name])}
    ends = ("post_attention_layernorm.weight", "mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj")
    changed = [
        name for name in weights if "layers.0." in name and not name.endswith(("q_norm.weight", "k_norm.weight"))
    ]
    assert all((name in same) == name.endswith(ends) for name in changed)
    with quantizers_off(auto), quantizers_off(fixed):
        torch.testing.assert_close(auto(IDS).logits, fixed(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(auto(IDS).logits, before)
