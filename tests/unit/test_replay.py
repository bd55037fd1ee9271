"""Finding what is no number in a packed batch, pictures or gradients, and keeping the batch of such a step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mirage.config.loader import load_recipe
from mirage.data.collate import PackedBatch, collate
from mirage.training import failures
from mirage.training.loss import PackedLossModel
from mirage.training.replay import Replay, ReplayedPack, ReplayedSample, _run_pack
from tests.support.models import fresh, mixture, samples

FAMILIES = ("internvl", "qwen2_vl")
# Two pictures, one picture, none, two pictures.
CHOSEN = [0, 16, 17, 9]


def packed(folder, shapes) -> tuple[PackedLossModel, PackedBatch, ReplayedPack, object]:
    model, adapter = fresh(folder)
    batch = collate(samples(shapes, folder, adapter, CHOSEN), adapter)
    found = failures.packed_samples(batch, image_token_id=adapter.image_token_id, places={})
    rows = [
        ReplayedSample(s.row_id, s.location, s.num_tokens, s.num_image_tokens, s.num_supervised_tokens) for s in found
    ]
    return PackedLossModel(model), batch, ReplayedPack(1, rows), adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_pack(tiny_folders, shapes, family):
    model, batch, pack, adapter = packed(tiny_folders[family], shapes)
    _run_pack(model, batch, pack, adapter)
    assert pack.first_module is None and pack.first_gradient is None and math.isfinite(pack.gradient_norm)
    total = sum(sample.loss * sample.num_supervised_tokens for sample in pack.samples)
    assert total == pytest.approx(pack.loss, rel=1e-5)
    assert all(sample.finite_pictures and sample.kept_bytes > 0 for sample in pack.samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_that_are_no_numbers_are_traced_to_their_sample(tiny_folders, shapes, family):
    model, batch, pack, adapter = packed(tiny_folders[family], shapes)
    pixels = batch.inputs["pixel_values"].clone()
    pixels[-1] = torch.nan
    _run_pack(model, replace(batch, inputs={**batch.inputs, "pixel_values": pixels}), pack, adapter)
    assert [sample.finite_pictures for sample in pack.samples] == [True, True, True, False]
    assert [math.isfinite(sample.loss) for sample in pack.samples] == [True, True, True, False]
    assert pack.first_module.startswith(adapter.groups["vision"][0])
    assert pack.cause.startswith("given inputs that are not finite")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_that_is_no_number_is_traced_to_its_sample(tiny_folders, shapes, family):
    model, batch, pack, adapter = packed(tiny_folders[family], shapes)
    start, end = failures.spans(batch)[1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        # Only where the sample's own loss reaches, as a true overflow would.
        reached = gradient[0, start:end].abs().sum() > 0
        return gradient * torch.where(reached, torch.nan, 1.0)

    def watch(_module: object, _args: object, output: object) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(spoil)

    model.hf.model.language_model.register_forward_hook(watch)
    _run_pack(model, batch, pack, adapter)
    assert math.isfinite(pack.loss) and not math.isfinite(pack.gradient_norm)
    # The first weight that the backward pass reaches from there.
    assert pack.first_gradient == "model.language_model.norm.weight"
    assert [math.isfinite(s.gradient_norm) for s in pack.samples] == [True, False, True, True]
    found = Replay({"kind": "gradient norm"}, "w", [], [pack])
    assert pack.samples[1].row_id in found.verdict and pack.samples[0].row_id not in found.verdict


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_gradient_that_is_no_number_keeps_all_packs(tiny_folders, shapes, tmp_path, one_process):
    _, batch, _, adapter = packed(tiny_folders["internvl"], shapes)
    rows, _ = mixture(shapes, tiny_folders["internvl"])
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"run_dir={tmp_path / 'run'}"])
    trainer = SimpleNamespace(
        recipe=recipe, run_dir=recipe.run_dir, rank=0, world_size=1, step=41, micro_losses=[3.5, 2.5], rows=rows,
        adapter=adapter, base=tiny_folders["internvl"], device=torch.device("cpu"), barrier=lambda: None,
        saver=SimpleNamespace(finish=lambda: None),
    )  # fmt: skip
    failures.stop_unless_finite(trainer, 1.0, "gradient norm", [batch, batch])
    with pytest.raises(
        failures.TrainingStopped, match=r"the gradient norm of step 42 is inf; rank 0: rows .*; rows .*"
    ):
        failures.stop_unless_finite(trainer, math.inf, "gradient norm", [batch, batch])
    folder = failures.failure_folder(recipe.run_dir, step=42, rank=0)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "failure.json",
        "pack-1.safetensors",
        "pack-2.safetensors",
        "recipe.json",
    ]
    record = json.loads((folder / "failure.json").read_text())
    assert [pack["loss_sum"] for pack in record["packs"]] == ["3.5", "2.5"] and record["value"] == "inf"
    again = failures.load_batch(folder / "pack-2.safetensors")
    assert again.row_ids == batch.row_ids and again.num_loss_chunks == batch.num_loss_chunks
    assert set(again.inputs) == set(batch.inputs)
    for key, value in batch.inputs.items():
        assert torch.equal(again.inputs[key], value) if isinstance(value, torch.Tensor) else again.inputs[key] == value
    assert torch.equal(again.labels, batch.labels) and torch.equal(again.token_weights, batch.token_weights)


def test_a_rank_that_hears_of_a_failed_peer_points_to_it(tmp_path):
    trainer = SimpleNamespace(run_dir=tmp_path, rank=0, step=6)
    with pytest.raises(RuntimeError, match="Connection closed by peer"), failures.stop_on_failure(trainer, []):
        raise RuntimeError("gloo: Connection closed by peer")
    folder = failures.failure_folder(tmp_path, step=7, rank=1)
    folder.mkdir(parents=True)
    record = {"rank": 1, "kind": "out of memory", "message": "", "step": 7, "packs": [], "checkpoint": None}
    record |= {"checkpoint_step": 0, "base": "base"}
    (folder / "failure.json").write_text(json.dumps(record))
    stopped = pytest.raises(failures.TrainingStopped, match="rank 1 stopped at step 7: out of memory")
    with stopped, failures.stop_on_failure(trainer, []):
        raise RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), failures.stop_on_failure(trainer, []):
        raise RuntimeError("shapes do not match")
