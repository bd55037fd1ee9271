"""The split of a step, its work, the matmul peak and the profiler's window."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mirage.config.loader import load_recipe
from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan
from mirage.errors import UserError
from mirage.models.attention import PACKED_SDPA
from mirage.training import throughput
from mirage.training.checkpoint import last_resumable, publish
from mirage.training.plan import model_config, model_shape, parameter_counts, plan_adapter, sample_work
from mirage.training.profile import StepProfiler
from mirage.training.resume import check_same_run
from mirage.training.throughput import Clock, RunWork, StepMeter, describe_peak, matmul_peak

CPU = torch.device("cpu")
LENGTHS = {"num_tokens": [700, 900, 300, 500], "num_image_tokens": [512, 512, 0, 256], "num_images": [2, 2, 0, 1]}


def mixture(*settings: str) -> tuple[Any, Any, list[Any], LengthIndex]:
    """(recipe, adapter, rows, index) of four samples, nothing loaded."""
    recipe = load_recipe(["recipe=tiny_internvl_mis", "data.pack_tokens=2048", "train.batch_samples=4", *settings])
    adapter = plan_adapter(recipe, model_config(recipe)[0])
    rows = SimpleNamespace(num_images=np.array(LENGTHS["num_images"]))
    tokens, images = np.array(LENGTHS["num_tokens"], np.int32), np.array(LENGTHS["num_image_tokens"], np.int32)
    return recipe, adapter, rows, LengthIndex(tokens, images, np.full(4, 100, np.int32), np.ones(4))


def meter(monkeypatch: pytest.MonkeyPatch, *settings: str, world_size: int = 1) -> StepMeter:
    """A meter whose peak is 1 GFLOP/s a rank."""
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e9)
    recipe, adapter, rows, index = mixture(*settings)
    plan = PackPlan.from_recipe(index, recipe, world_size=world_size)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=PACKED_SDPA))
    trainer: Any = SimpleNamespace(
        recipe=recipe, adapter=adapter, rows=rows, index=index, plan=plan, model=model, device=CPU, step=1
    )
    return StepMeter(trainer)


COUNTED = {"train/tokens": 2400.0, "train/supervised_tokens": 400.0}


def test_parts_are_the_time_that_passed_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gather_numbers", lambda values, device: [values])
    found = meter(monkeypatch)
    seconds = {"forward": 0.06, "backward": 0.09, "optimizer": 0.03}
    started = time.perf_counter()
    with found.step(wait_seconds=0.25):
        for _ in range(2):
            with found.part("forward"):
                time.sleep(seconds["forward"] / 2)
            with found.part("backward"):
                time.sleep(seconds["backward"] / 2)
        time.sleep(0.04)
        with found.part("optimizer"):
            time.sleep(seconds["optimizer"])
    passed = time.perf_counter() - started
    metrics = found.metrics(COUNTED)
    parts = [metrics[f"train/{name}_seconds"] for name in ("data", "forward", "backward", "optimizer", "other")]
    assert sum(parts) == pytest.approx(metrics["train/step_seconds"], rel=1e-9)
    assert metrics["train/step_seconds"] == pytest.approx(0.25 + passed, abs=0.005)
    assert metrics["train/data_wait_share"] == pytest.approx(0.25 / metrics["train/step_seconds"])
    for part, (name, slept) in zip(parts[1:], seconds.items()):
        assert slept <= part < slept + 0.05, name
    assert 0.04 <= metrics["train/other_seconds"] < 0.09
    assert metrics["train/tokens_per_second"] * metrics["train/step_seconds"] == pytest.approx(2400)
    assert metrics["train/samples_per_second"] * metrics["train/step_seconds"] == pytest.approx(4)
    assert 1e7 < metrics["train/peak_memory_bytes"] < 1e12


def test_a_step_forgets_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gather_numbers", lambda values, device: [values])
    found = meter(monkeypatch)
    for slept in (0.05, 0.0):
        with found.step(wait_seconds=0.0), found.part("backward"):
            time.sleep(slept)
    assert found.metrics(COUNTED)["train/backward_seconds"] < 0.05


def test_a_checkpoint_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gather_numbers", lambda values, device: [values])
    found = meter(monkeypatch)
    with found.checkpoint():
        time.sleep(0.02)
    with found.step(wait_seconds=0.0):
        pass
    assert 0.02 <= found.metrics(COUNTED)["train/checkpoint_seconds"] < 0.1
    assert "train/checkpoint_seconds" not in found.metrics(COUNTED)


def test_numbers_over_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Waiting, all else, forward, backward, optimiser, busy; peak, memory.
    ranks = [[1.0, 9.0, 3.0, 4.0, 1.0, 6.0, 1e9, 5e9], [0.0, 10.0, 3.0, 5.0, 1.0, 2.0, 3e9, 7e9]]
    monkeypatch.setattr(throughput, "gather_numbers", lambda values, device: ranks)
    found = meter(monkeypatch, "train.gradient_checkpointing=true", world_size=2)
    metrics = found.metrics(COUNTED)
    assert metrics["train/step_seconds"] == 10 and metrics["train/data_seconds"] == 0.5
    assert metrics["train/other_seconds"] == 9.5 - 3 - 4.5 - 1
    assert metrics["train/imbalance_measured"] == 6 / 4
    assert metrics["train/imbalance_planned"] == found._trainer.plan.imbalance(0) > 1
    assert metrics["train/peak_memory_bytes"] == 7e9
    assert metrics["train/model_flops_per_second"] == pytest.approx(found.work.model_flops.sum() / 10)
    # Of what both devices can do together.
    assert metrics["train/mfu"] == pytest.approx(found.work.model_flops.sum() / 10 / 4e9)
    assert metrics["train/hfu"] == pytest.approx(metrics["train/mfu"] * 4 / 3, rel=0.05)
    assert metrics["train/pack_fill"] == pytest.approx(2400 / (2 * 2048))


def test_padding_is_what_the_attention_lays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gather_numbers", lambda values, device: [values])
    found = meter(monkeypatch)
    monkeypatch.setattr(throughput, "padded_positions", lambda lengths: len(lengths) * max(lengths))
    with found.step(wait_seconds=0.0):
        pass
    rows = [[LENGTHS["num_tokens"][n] for n in row] for micro in found._trainer.plan.step(0).rows for row in micro]
    share = 1 - 2400 / sum(len(row) * max(row) for row in rows)
    assert found.metrics(COUNTED)["train/attention_padding_share"] == pytest.approx(share)
    found._pads_attention = False
    assert found.metrics(COUNTED)["train/attention_padding_share"] == 0


@pytest.mark.parametrize("recipe", ["internvl_mis", "qwen2vl_mis", "internvl_mis_lora"])
def test_work_is_the_plans_sample_by_sample(recipe: str) -> None:
    recipe_, (rows, index) = load_recipe([f"recipe={recipe}"]), mixture()[2:]
    config = model_config(recipe_)[0]
    adapter = plan_adapter(recipe_, config)
    found = RunWork(recipe_, adapter, rows, index)
    counts, shape = parameter_counts(config, adapter, recipe_.model), model_shape(config, adapter)
    for number in range(4):
        lengths = {name: float(values[number]) for name, values in LENGTHS.items()} | {"num_supervised_tokens": 100.0}
        assert found.hardware_flops[number] == pytest.approx(sample_work(counts, shape, recipe_, **lengths).total)
        own = sample_work(counts, shape, recipe_, **lengths, recompute=False).total
        assert found.model_flops[number] == pytest.approx(own) and own < found.hardware_flops[number]


def test_work_counts_what_runs() -> None:
    def work(*settings: str, tied: bool = False) -> RunWork:
        recipe = load_recipe(["recipe=internvl_mis", *settings])
        config = model_config(recipe)[0]
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        return RunWork(recipe, plan_adapter(recipe, config), *mixture()[2:])

    whole, cached = work(), work("model.cache_vision_features=memory")
    # The sample without pictures needs no tower in either; the others need none when their features are kept.
    assert cached.model_flops[2] == whole.model_flops[2] and (cached.model_flops < whole.model_flops).sum() == 3
    # A tied head multiplies as an untied one does.
    assert work(tied=True).model_flops == pytest.approx(whole.model_flops)
    # Half of the layers recompute: half of what all of them cost.
    half, none = work("train.checkpoint_layers=16"), work("train.gradient_checkpointing=false")
    assert none.hardware_flops == pytest.approx(none.model_flops) and none.model_flops == pytest.approx(
        whole.model_flops
    )
    extra, all_extra = (run.hardware_flops - run.model_flops for run in (half, whole))
    assert extra == pytest.approx(all_extra / 2)


# The peak


def test_peak_is_a_rate_that_products_reach() -> None:
    matmul_peak.cache_clear()
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = matmul_peak(CPU, torch.float32)
    assert time.perf_counter() - started < 3
    assert torch.equal(torch.get_rng_state(), state)
    left = torch.randn(512, 512)
    best = min(_seconds(lambda: left @ left) for _ in range(20))
    assert 0.05 < 2 * 512**3 / best / peak < 20  # a rate in FLOP/s, whatever else the machine does
    # Once a process.
    assert matmul_peak(CPU, torch.float32) == peak and matmul_peak.cache_info().misses == 1


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_peak_in_words() -> None:
    assert describe_peak(118.4e9, "fp32").startswith("118 GFLOP/s in fp32")
    assert describe_peak(712e12, "bf16").startswith("712 TFLOP/s in bf16")


@pytest.mark.gpu
def test_clock_and_peak_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    assert matmul_peak(device, torch.bfloat16) > 1e12
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    clock.wait(clock.mark())
    issued, start = time.perf_counter(), clock.mark()
    for _ in range(50):
        matrix @ matrix
    end = clock.mark()
    issued = time.perf_counter() - issued
    clock.wait(end)
    # The host runs ahead; the marks tell the device's time.
    assert clock.seconds(start, end) > issued
    assert clock.seconds(start, end) == pytest.approx(50 * 2 * 8192**3 / matmul_peak(device, torch.bfloat16), rel=0.5)


# The profiler


@pytest.mark.parametrize(
    ("first_step", "total_steps", "name"),
    [
        (0, 100, "steps-000004-000006"),
        (40, 100, "steps-000044-000046"),
        (0, 4, "steps-000002-000004"),
        (0, 1, "steps-000001-000001"),
        (98, 100, "steps-000100-000100"),
    ],
)
def test_trace_of_a_few_steps(tmp_path: Path, capsys: Any, first_step: int, total_steps: int, name: str) -> None:
    profiler = StepProfiler(tmp_path, first_step=first_step, total_steps=total_steps)
    path = tmp_path / "profile" / f"{name}-rank0.trace.json.gz"
    assert profiler.path == path
    for step in range(first_step, min(total_steps, first_step + 8)):
        with profiler.step(), torch.profiler.record_function(f"own/{step + 1}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
    first, last = (int(part) for part in name.removeprefix("steps-").split("-"))
    trace = json.loads(gzip.decompress(path.read_bytes()))
    found = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("own/")}
    assert found == {f"own/{number}" for number in range(first, last + 1)}
    assert "aten::mm" in path.with_name(f"{name}-rank0.operators.txt").read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"{name}-rank0.{k}" for k in ("operators.txt", "trace.json.gz")
    ]
    assert str(path) in capsys.readouterr().out


def test_no_profile_where_no_step_is_left(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, first_step=7, total_steps=7)
    with profiler.step():
        pass
    assert profiler.path is None and list(tmp_path.iterdir()) == []


def test_a_run_may_be_continued_with_and_without_a_profile(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"run_dir={tmp_path}", "train.profile=true"])
    before = recipe.model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(before))
    checkpoint = tmp_path / "checkpoint-000002"
    aside = tmp_path / ".aside"
    (aside / "resume").mkdir(parents=True)
    publish(aside, checkpoint, step=2)
    assert last_resumable(tmp_path) == checkpoint
    check_same_run(tmp_path, load_recipe(["recipe=tiny_internvl_mis", f"run_dir={tmp_path}"]))
    with pytest.raises(UserError, match=r"train\.seed"):
        check_same_run(tmp_path, load_recipe(["recipe=tiny_internvl_mis", f"run_dir={tmp_path}", "train.seed=1"]))
    del before["data"]["check_pictures"]  # an earlier version's run
    (tmp_path / "recipe.json").write_text(json.dumps(before))
    check_same_run(tmp_path, load_recipe(["recipe=tiny_internvl_mis", f"run_dir={tmp_path}"]))
