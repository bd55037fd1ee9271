"""The real command with rates by part, offloading and deterministic kernels: continued runs end with the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_train_resume import command, losses, run, weights

RATES = ["train.lr_groups.projector=2e-3", "train.lr_groups.embeddings=1e-4"]
OFFLOADED = ["train.offload_optimizer=true"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(arguments: list[str], *more: str) -> list[str]:
    """The arguments with `more` instead of what they say of the same keys."""
    keys = {word.partition("=")[0] for word in more}
    return [word for word in arguments if word.partition("=")[0] not in keys] + list(more)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, ["train.zero_stage=2", *OFFLOADED]),
        pytest.param(2, ["train.zero_stage=1"], marks=pytest.mark.slow),
        pytest.param(2, ["train.zero_stage=1", *OFFLOADED], marks=pytest.mark.slow),
        pytest.param(2, ["train.zero_stage=2"], marks=pytest.mark.slow),
        pytest.param(2, ["train.zero_stage=2", *OFFLOADED], marks=pytest.mark.slow),
        pytest.param(2, ["train.zero_stage=3", *OFFLOADED], marks=pytest.mark.slow),
        pytest.param(2, ["train.zero_stage=3", *OFFLOADED, "train.offload_parameters=true"], marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_way_to_shard_continues_with_several_rates(tmp_path, repo_root, shapes, cache, processes, options):
    run_dir, more = tmp_path / "run", [*options, *RATES, "train.max_steps=4"]
    arguments = settings(command("tiny_internvl_mis", run_dir, shapes, processes=processes), *more)
    run(arguments, repo_root, cache)
    last = run_dir / "checkpoint-000004"
    before, first_losses = weights(last), losses(run_dir)
    shutil.rmtree(last)
    assert "continues after step 2" in run(arguments, repo_root, cache)
    assert weights(last) == before and losses(run_dir) == first_losses


@pytest.mark.slow
def test_offloaded_and_sharded_runs_learn_the_same(tmp_path, repo_root, shapes, cache):
    found = {}
    for name, options in {
        "whole": ["train.zero_stage=2"],
        "offloaded": ["train.zero_stage=3", *OFFLOADED, "train.offload_parameters=true"],
    }.items():
        arguments = command("tiny_internvl_mis", tmp_path / name, shapes, processes=1)
        run(settings(arguments, *options, *RATES, "train.max_steps=3"), repo_root, cache)
        found[name] = losses(tmp_path / name)
    assert found["offloaded"] == pytest.approx(found["whole"], rel=1e-6)


@pytest.mark.slow
def test_deterministic_runs_are_the_same_with_and_without_losses_by_part(tmp_path, repo_root, shapes, cache):
    metrics, bytes_of = {}, {}
    for name, more in {"parts": [], "plain": ["tracking.loss_by_part=false"]}.items():
        arguments = command("tiny_internvl_mis", tmp_path / name, shapes, processes=1)
        more = ["train.max_steps=2", "train.deterministic=true", *RATES, *more]
        assert "arithmetic: deterministic" in run(settings(arguments, *more), repo_root, cache)
        metrics[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        bytes_of[name] = weights(tmp_path / name / "checkpoint-000002"), losses(tmp_path / name)
    assert bytes_of["parts"] == bytes_of["plain"]
    full, plain = metrics["parts"], metrics["plain"]
    assert full["train/lr_group/projector"] == pytest.approx(full["train/lr"] * 2e-3 / 1.5e-3)
    sources = [full[f"train/loss_source/{name}"] for name in ("train", "train_twins", "train_general")]
    assert min(sources) <= full["train/loss"] <= max(sources)
    assert {f"train/loss_segment/{name}" for name in ("perceive", "relate", "risk", "reply")} <= full.keys()
    assert not any("_source/" in name or "_segment/" in name for name in plain)


def test_an_operation_without_a_deterministic_kernel_is_named(repo_root):
    program = (
        "import os, torch; from mirage.training.determinism import prepare_determinism\n"
        "from mirage.training.failures import stop_on_failure\n"
        "from mirage.errors import run_main\n"
        "prepare_determinism(os.environ); print(os.environ['CUBLAS_WORKSPACE_CONFIG'])\n"
        "def main():\n"
        "    with stop_on_failure(None, []): torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))\n"
        "run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True, check=False)
    assert ":4096:8" in done.stdout and done.returncode == 2
    assert "torch has no deterministic kernel for put_ on this device" in done.stderr
    assert "Traceback" not in done.stderr
