"""MixedDataset: how many rows of an epoch are generic text, which come next, and how a batch marks them."""

from __future__ import annotations

import pytest

from data.sets.collating import SupervisedCollator
from data.sets.mixing import MixedDataset
from training.resume.sampling import EpochSampler, InterleavingSampler


def rows(first: int, count: int, packed: bool = False) -> list[dict]:
    made = [{"input_ids": [first + i] * 3, "labels": [-100, first + i, first + i]} for i in range(count)]
    return [{**row, "position_ids": [0, 1, 2]} for row in made] if packed else made


@pytest.mark.parametrize("share", [0.25, 0.5, 0.29, 0.9, 0.01])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_beginning_of_an_epoch_has_the_share_and_all_of_the_domain_is_read_once(share, count):
    mixed = MixedDataset(rows(0, count), rows(500, 5), share)
    order = mixed.interleave(list(range(count)), 0)
    assert len(order) == len(mixed) == count + mixed.generic_rows
    assert [i for i in order if i < count] == list(range(count))
    hundredths = round(share * 100)
    found = [sum(index >= count for index in order[:n]) for n in range(len(order) + 1)]
    assert found == [n * hundredths // 100 for n in range(len(order) + 1)]


def test_a_step_of_any_size_has_the_share_to_within_one_row():
    mixed = MixedDataset(rows(0, 90), rows(500, 40), 0.25)
    order = mixed.interleave(list(range(90)), 0)
    for size in (4, 6, 8):
        steps = [order[i : i + size] for i in range(0, len(order) - size, size)]
        assert {sum(i >= 90 for i in step) for step in steps} <= {size // 4, -(-size // 4)}


def test_generic_rows_continue_over_epochs_and_repeat_only_when_all_were_read():
    mixed = MixedDataset(rows(0, 9), rows(500, 7), 0.5, seed=3)
    found = [i for epoch in range(6) for i in mixed.interleave(list(range(9)), epoch) if i >= 9]
    assert len(found) == 6 * mixed.generic_rows
    turns = [found[i : i + 7] for i in range(0, len(found) - 7, 7)]
    assert all(sorted(turn) == list(range(9, 16)) for turn in turns) and turns[0] != turns[1]
    assert found != [
        i for e in range(6) for i in MixedDataset(rows(0, 9), rows(500, 7), 0.5, 4).interleave([*range(9)], e) if i >= 9
    ]


def test_the_order_is_a_function_of_seed_and_epoch_and_leaves_that_of_the_domain_alone():
    mixed = MixedDataset(rows(0, 20), rows(500, 7), 0.4)
    orders = []
    for _ in range(2):
        sampler = InterleavingSampler(EpochSampler(20, 5), mixed.interleave, len(mixed))
        sampler.set_epoch(2)
        orders.append(list(sampler))
        assert len(sampler) == len(orders[0])
    plain = EpochSampler(20, 5)
    plain.set_epoch(2)
    assert orders[0] == orders[1] and [i for i in orders[0] if i < 20] == list(plain)


@pytest.mark.parametrize("one_row", [False, True])
def test_a_batch_marks_the_tokens_of_generic_text_and_not_its_padding(one_row):
    mixed = MixedDataset(rows(1, 2, packed=True), rows(7, 1, packed=True), 0.4)
    batch = SupervisedCollator(0, one_row)([mixed[0], mixed[2], {**mixed[1], "input_ids": [2] * 3}])
    expected = [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert batch["generic"].tolist() == ([sum(expected, [])] if one_row else expected)
    assert ((batch["input_ids"] == 7) == (batch["generic"] == 1)).all()
    assert "generic" not in SupervisedCollator(0)(rows(1, 2))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_a_share_that_leaves_one_of_both_out_is_refused(share):
    with pytest.raises(ValueError, match="--distill_generic_share .* must lie between 0 and 1"):
        MixedDataset(rows(0, 2), rows(5, 2), share)
