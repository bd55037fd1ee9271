"""The pack plan: pure, complete, within budget, balanced, and the same samples for every world size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage.config.schema import DataConfig
from mirage.data.collate import reduction_weight, step_weight
from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan


def make_index(lengths: list[int]) -> LengthIndex:
    tokens = np.array(lengths)
    return LengthIndex(tokens, tokens // 2, np.maximum(1, tokens // 4), np.ones(len(lengths)))


def make_plan(lengths: list[int], **options: int | float) -> PackPlan:
    settings_ = {"batch_samples": 8, "pack_tokens": 512, "world_size": 2, "epochs": 2, "seed": 0, **options}
    return PackPlan(make_index(lengths), **settings_)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80),
    batch_samples=st.integers(1, 24),
    world_size=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
def test_every_sample_once_an_epoch_within_the_budget(lengths, batch_samples, world_size, epochs):
    plan = make_plan(lengths, batch_samples=batch_samples, world_size=world_size, epochs=epochs)
    seen = Counter()
    for step in range(plan.num_steps):
        rows = plan.step(step).rows
        assert all(len(micro_step) == world_size for micro_step in rows)
        for row in (row for micro_step in rows for row in micro_step):
            assert sum(lengths[number] for number in row) <= 512
            seen.update(row)
        assert sorted(plan.step_samples(step).tolist()) == plan.step(step).samples
    assert seen == Counter(dict.fromkeys(range(len(lengths)), epochs))


def test_step_holds_the_same_samples_whatever_the_machine():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    plans = [
        make_plan(lengths, world_size=size, pack_tokens=budget) for size, budget in ((1, 512), (4, 512), (8, 4096))
    ]
    for step in range(plans[0].num_steps):
        assert plans[0].step(step).samples == plans[1].step(step).samples == plans[2].step(step).samples


def test_plan_of_a_step_needs_no_step_before_it():
    lengths = np.random.default_rng(1).integers(20, 400, 100).tolist()
    in_order, alone = make_plan(lengths), make_plan(lengths)
    expected = [in_order.step(step) for step in range(in_order.num_steps)]
    assert alone.step(7) == expected[7]
    assert make_plan(lengths, seed=1).step(7) != expected[7]


def test_ranks_are_balanced_on_mis_like_lengths():
    lengths = np.random.default_rng(2).normal(1200, 250, 2000).clip(300, 2400).astype(int).tolist()
    plan = make_plan(lengths, batch_samples=128, world_size=8, pack_tokens=8192)
    imbalance = [plan.imbalance(step) for step in range(10)]
    assert max(imbalance) <= 1.05


def test_max_steps_stops_early():
    assert make_plan([100] * 100, max_steps=3).num_steps == 3


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_step_weight_is_the_sum_of_token_weights(reduction):
    index = make_index([40, 80, 160])
    counts = [10, 20, 40]
    expected = sum(count * float(reduction_weight(float(count), reduction)) for count in counts)
    assert step_weight(index, [0, 1, 2], reduction) == pytest.approx(expected)


def test_data_config_refuses_no_sources():
    with pytest.raises(ValueError, match="empty"):
        DataConfig(sources=())
