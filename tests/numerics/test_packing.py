"""Packed rows compute what separate samples compute, in loss and gradients, for both families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirage.data.collate import collate
from mirage.data.render import Sample, dummy_sample
from mirage.models.adapter import ModelAdapter
from mirage.training.loss import PackedLossModel
from tests.support.models import flat_gradients, fresh, relative_difference, samples

FAMILIES = ("internvl", "qwen2_vl")
# Risky and benign pairs (two images), one image, none: numbers of the shapes mixture.
MIXED = [0, 9, 16, 17, 3, 19]


def losses_and_gradients(
    folder: Path, rows: list[list[Sample]], adapter: ModelAdapter, **options: object
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over packed rows, and its gradients."""
    model, _ = fresh(folder)
    packed = PackedLossModel(model)
    total = 0.0
    for row in rows:
        loss, _, _ = packed(collate(row, adapter, **options))  # type: ignore[arg-type]
        loss.backward()
        total += loss.item()
    return total, flat_gradients(model)


def reference(folder: Path, chosen: list[Sample], adapter: ModelAdapter) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss of each sample alone, as a sum over its supervised tokens."""
    model, _ = fresh(folder, attention="eager")
    total = 0.0
    for sample in chosen:
        inputs = {
            "input_ids": sample.input_ids.unsqueeze(0),
            "labels": sample.labels.unsqueeze(0),
            **adapter.token_inputs(sample.input_ids.unsqueeze(0)),
            **adapter.picture_inputs(sample.pictures),
        }
        loss = model(**inputs, use_cache=False).loss * sample.num_supervised_tokens
        loss.backward()
        total += loss.item()
    return total, flat_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_loss_chunks", [1, 7])
def test_packed_equals_transformers_on_separate_samples(tiny_folders, shapes, family, num_loss_chunks):
    folder = tiny_folders[family]
    _, adapter = fresh(folder)
    chosen = samples(shapes, folder, adapter, MIXED)
    loss, gradients = losses_and_gradients(folder, [chosen], adapter, num_loss_chunks=num_loss_chunks)
    expected_loss, expected = reference(folder, chosen, adapter)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_gradient_does_not_depend_on_the_cut(tiny_folders, shapes, family, reduction):
    folder = tiny_folders[family]
    _, adapter = fresh(folder)
    eight = samples(shapes, folder, adapter, [0, 8, 1, 9, 16, 17, 2, 10])
    cuts = {size: [eight[start : start + size] for start in range(0, 8, size)] for size in (1, 2, 4, 8)}
    results = {size: losses_and_gradients(folder, rows, adapter, reduction=reduction) for size, rows in cuts.items()}
    for size in (1, 2, 4):
        assert results[size][0] == pytest.approx(results[8][0], rel=1e-6)
        assert relative_difference(results[size][1], results[8][1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_blind_to_its_neighbours(tiny_folders, shapes, family):
    folder = tiny_folders[family]
    model, adapter = fresh(folder)
    one, other, third = samples(shapes, folder, adapter, [0, 9, 3])
    with torch.no_grad():
        after_one = model.model(**collate([one, third], adapter).inputs, use_cache=False).last_hidden_state
        after_other = model.model(**collate([other, third], adapter).inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(
        after_one[0, -third.num_tokens :], after_other[0, -third.num_tokens :], atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_picture_changes_nothing(tiny_folders, shapes, family):
    folder = tiny_folders[family]
    _, adapter = fresh(folder)
    text_only = samples(shapes, folder, adapter, [17, 19])
    assert not any(sample.pictures for sample in text_only)
    loss, gradients = losses_and_gradients(folder, [text_only], adapter)
    expected_loss, expected = reference(folder, text_only, adapter)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_difference(gradients, expected) < 1e-5
    towers = [gradients[name] for name in gradients if adapter.group_of(name) in ("vision", "projector")]
    assert towers and all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in towers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_runs_the_vision_tower(tiny_folders, family):
    _, adapter = fresh(tiny_folders[family])
    batch = collate([], adapter)
    assert batch.row_ids == ("dummy",)
    assert "pixel_values" in batch.inputs
    model, _ = fresh(tiny_folders[family])
    loss, correct, supervised = PackedLossModel(model)(batch)
    loss.backward()
    assert (loss.item(), correct.item(), supervised.item()) == (0.0, 0, 0)
    assert all(p.grad is not None for n, p in model.named_parameters() if adapter.group_of(n) == "vision")


@pytest.mark.parametrize("family", FAMILIES)
def test_first_label_of_a_sample_is_never_learnt(tiny_folders, shapes, family):
    folder = tiny_folders[family]
    _, adapter = fresh(folder)
    for sample in [*samples(shapes, folder, adapter, MIXED), dummy_sample(adapter)]:
        assert sample.labels[0] == -100
