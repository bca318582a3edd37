"""AdamW in BF16 with stochastic rounding, against torch.optim.AdamW in FP32 and the definition of the rounding."""

from __future__ import annotations

import copy

import pytest
import torch

from training.optimizers.random_bits import keys, random_words
from training.optimizers.stochastic_adamw import Scalars, StochasticAdamW, first_row, round_stochastically, update_plain

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def words_of(pair: tuple[int, int], first: int, count: int) -> torch.Tensor:
    return random_words(pair, first, *torch.empty(2, count, dtype=torch.int32))


def reference_word(key0: int, key1: int, element: int) -> int:
    """The hash in Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    low, high = element % 2**32, element >> 32
    return mix(mix(low ^ key0 % 2**32) ^ (key1 + high * 0x9E3779B9) % 2**32)


@pytest.mark.parametrize("first", [0, 12345, 2**31 - 3, 2**32, 5 * 2**32 + 2**31])
def test_random_words_are_the_hash_of_the_element_s_number(first):
    pair = keys(3, 7, 11)
    words = words_of(pair, first, 8)
    assert [int(w) % 2**32 for w in words] == [reference_word(*pair, first + i) for i in range(8)]


def test_each_number_that_random_bits_depend_on_changes_half_of_them():
    base = words_of(keys(0, 1, 0), 0, 4096)
    others = [words_of(keys(*numbers), 0, 4096) for numbers in ((1, 1, 0), (0, 2, 0), (0, 1, 1))]
    others.append(words_of(keys(0, 1, 0), 2**32, 4096))
    for other in others:
        differing = sum(((base ^ other) >> bit & 1).float().mean() for bit in range(32)) / 32
        assert abs(differing - 0.5) < 0.01
    ones = torch.stack([(base >> bit & 1).float().mean() for bit in range(32)])
    assert ((ones - 0.5).abs() < 0.05).all()


def test_a_value_is_rounded_to_one_of_its_neighbours_with_the_right_probability():
    value = torch.tensor([1 + 0.3 / 128, -3 - 0.9 / 64])
    bits = torch.arange(65536, dtype=torch.int32)
    for x, below, above, fraction in ((value[0], 1, 1 + 1 / 128, 0.3), (value[1], -3, -3 - 1 / 64, 0.9)):
        rounded = round_stochastically(x.expand(65536).contiguous(), bits.clone())
        assert torch.equal(rounded.unique(), torch.tensor(sorted([below, above])))
        assert abs(float((rounded == above).float().mean()) - fraction) < 1e-4


def test_numbers_of_bf16_infinities_and_nan_stay():
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    rounded = round_stochastically(patterns, torch.full((65536,), 65535, dtype=torch.int32))
    assert torch.equal(rounded.nan_to_num(7), patterns.nan_to_num(7))
    assert torch.equal(rounded.isnan(), patterns.isnan())
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # a carry would make them zero
    assert round_stochastically(nan, torch.full((2,), 65535, dtype=torch.int32)).isnan().all()


def test_with_fp32_parameters_it_is_the_adamw_of_torch():
    torch.manual_seed(0)
    start, grads = torch.randn(5, 300), torch.randn(6, 5, 300)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = (ours, StochasticAdamW([ours], **SETTINGS)), (theirs, torch.optim.AdamW([theirs], **SETTINGS))
    for grad in grads:
        for parameter, optimizer in pairs:
            parameter.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_before_rounding_a_step_in_bf16_is_adamw_in_fp32():
    torch.manual_seed(0)
    start, grad = torch.randn(20000).bfloat16(), torch.randn(20000).bfloat16()
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours.grad, theirs.grad = grad, grad.float()
    optimizer = StochasticAdamW([ours], **SETTINGS)
    optimizer.step()
    torch.optim.AdamW([theirs], **SETTINGS).step()
    ulp = torch.exp2(torch.floor(torch.log2(theirs.abs())) - 7)
    error = ((ours.float() - theirs) / ulp).detach()
    assert float(error.abs().max()) < 1.001
    assert abs(float(error.mean())) < 0.02  # unbiased; its standard deviation is at most 0.5 / sqrt(20000)
    assert ours.dtype == torch.bfloat16 and optimizer.state[ours]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_updates_below_half_a_step_of_bf16_arrive_on_average(moments):
    start = torch.ones(20000)
    parameter = torch.nn.Parameter(start.bfloat16())
    optimizer = StochasticAdamW([parameter], lr=1e-4, weight_decay=0.0, moment_dtype=moments)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert abs(float(parameter.detach().float().mean()) - (1 - 20e-4)) < 2e-4
    assert torch.ones(1).bfloat16() - 1e-4 == 1  # rounded to nearest, the same update vanishes


def test_the_second_moment_does_not_get_stuck():
    parameter = torch.nn.Parameter(torch.zeros(20000).bfloat16())
    optimizer = StochasticAdamW([parameter], lr=0.0, betas=(0.9, 0.999))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(50):
        optimizer.step()
    mean = float(optimizer.state[parameter]["exp_avg_sq"].float().mean())
    assert abs(mean - 0.999**50) < 2e-3 and torch.ones(1).bfloat16() * 0.999 == 1


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_a_resumed_optimizer_takes_the_steps_of_one_that_was_not_interrupted(moments):
    def steps(parameters, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

    def make(values):
        parameters = [torch.nn.Parameter(v.clone()) for v in values]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
        return parameters, StochasticAdamW(groups, **SETTINGS, moment_dtype=moments, seed=5)

    torch.manual_seed(0)
    values = [torch.randn(33, 70).bfloat16(), torch.randn(70000).bfloat16(), torch.randn(9)]
    whole, optimizer = make(values)
    steps(whole, optimizer, range(2))
    resumed, other = make([p.detach() for p in whole])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, range(2, 4))
    steps(resumed, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(
        optimizer.state[a]["exp_avg_sq"].equal(other.state[b]["exp_avg_sq"])
        for a, b in zip(whole, resumed, strict=True)
    )


def test_parts_of_a_parameter_get_the_bits_of_the_whole():
    torch.manual_seed(0)
    tensors = [torch.randn(150000).bfloat16() for _ in range(3)] + [torch.rand(150000).bfloat16()]
    scalars, pair = Scalars.of(SETTINGS, 3), keys(1, 3, 2)
    whole, parts = ([t.clone() for t in tensors] for _ in range(2))
    update_plain(whole, scalars, pair, 0)
    for first, last in ((0, 70001), (70001, 150000)):
        update_plain([t[first:last] for t in parts], scalars, pair, first)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 130])
def test_the_first_row_of_a_shard_is_that_of_torch(rows):
    for parts in (1, 2, 3, 4):
        chunks = torch.arange(rows).chunk(parts)
        expected = [int(chunk[0]) for chunk in chunks] + [rows] * (parts - len(chunks))
        assert [first_row(rows, parts, part) for part in range(parts)] == expected


def test_other_dtypes_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(3).half())
    parameter.grad = torch.zeros(3).half()
    with pytest.raises(ValueError, match="float16"):
        StochasticAdamW([parameter]).step()
