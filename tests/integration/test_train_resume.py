"""The real command: two gloo processes under ZeRO-3, killed and continued, end with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.sources import load_mixture

SMALL = [
    "model.tiny.hidden_size=64",
    "model.tiny.num_layers=2",
    "model.tiny.intermediate_size=128",
    "model.tiny.vision_hidden_size=32",
    "model.tiny.vocab_size=400",
    "model.tiny.warmup_steps=0",
    "train.batch_samples=8",
    "train.max_steps=6",
    "train.precision=fp32",
    "data.pack_tokens=512",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "eval.mode=off",
    "tracking.wandb=off",
    "tracking.console=plain",
]


def command(recipe: str, run_dir: Path, data_dir: Path, *more: str, processes: int = 2) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "recipes/accelerate/cpu2.yaml"] if processes == 2 else []
    return [*launch, "mirage/train.py", f"recipe={recipe}", f"run_dir={run_dir}", f"data.dir={data_dir}", *SMALL, *more]


def run(arguments: list[str], root: Path, cache: Path, *, code: int = 0) -> str:
    done = subprocess.run(
        arguments, cwd=root, env=environment(cache), text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MIRAGE_CACHE": str(cache)}


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if line["axis"] == "train"}


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((checkpoint / "model").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def kill_after(arguments: list[str], root: Path, cache: Path, marker: Path) -> None:
    """Start the command and kill -9 every process of it as soon as `marker` exists."""
    process = subprocess.Popen(
        arguments, cwd=root, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not marker.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    _kill_tree(process.pid)
    process.wait(timeout=60)


def _kill_tree(pid: int) -> None:
    import psutil

    # torchrun gives each rank a session of its own, so the whole tree is walked.
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


RATES = {
    "tiny_internvl_mis": ["train.lr_groups.projector=2e-3", "train.lr_groups.embeddings=1e-4"],
    "tiny_qwen2vl_mis_lora": ["train.lr_groups.lora=2e-3"],
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, repo_root, shapes, cache):
    """The folder of a recipe's undisturbed run on two processes, started when first asked for."""
    folders: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp(recipe) / "whole"
            run(command(recipe, folders[recipe], shapes, *RATES[recipe]), repo_root, cache)
        return folders[recipe]

    return get


# The checkpoint of step 2 is written once training has gone on by two steps, the next one never.
SLOW_DISK = """
import time
from mirage.errors import run_main
from mirage.train import leave, main
from mirage.training import saver
write = saver.write_optimizer_state
def slowly(tensors, folder, *, rank):
    began, metrics = time.monotonic(), folder.parent.parent / "metrics.jsonl"
    while "-000002" not in str(folder) or metrics.read_text().count('"train"') < 4:
        assert time.monotonic() - began < 60, "training did not go on, or was not killed"
        time.sleep(0.01)
    return write(tensors, folder, rank=rank)
saver.write_optimizer_state = slowly
if __name__ == "__main__":
    run_main(lambda: leave(main()))
"""


@pytest.mark.parametrize("recipe", ["tiny_internvl_mis", pytest.param("tiny_qwen2vl_mis_lora", marks=pytest.mark.slow)])
def test_killed_run_continues_to_the_same_bytes(tmp_path, repo_root, shapes, cache, whole_run, recipe):
    """Also where the checkpoint it continues from was written while training went on."""
    whole, broken, program = whole_run(recipe), tmp_path / "broken", tmp_path / "slow_disk.py"
    program.write_text(SLOW_DISK)
    arguments = command(recipe, broken, shapes, *RATES[recipe])
    slow = [str(program) if word == "mirage/train.py" else word for word in arguments]
    kill_after(slow, repo_root, cache, broken / "checkpoint-000002" / "READY")
    said = run(arguments, repo_root, cache)
    assert "continues after step 2" in said
    assert weights(whole / "checkpoint-000006") == weights(broken / "checkpoint-000006")
    assert losses(whole) == losses(broken)
    assert losses(whole)[6] < losses(whole)[1]
    assert not list(broken.glob(".checkpoint-*"))


@pytest.mark.slow
def test_checkpoints_that_a_kill_left_behind_are_retired_by_the_next_start(
    tmp_path, repo_root, shapes, cache, whole_run
):
    """A kill between the last checkpoint and the removal of older ones leaves all of them, and no step to do."""
    left = tmp_path / "left"
    shutil.copytree(whole_run("tiny_internvl_mis"), left, symlinks=True)
    arguments = command("tiny_internvl_mis", left, shapes, *RATES["tiny_internvl_mis"])
    said = run(["checkpoint.keep_last=1" if word == "checkpoint.keep_last=9" else word for word in arguments],
               repo_root, cache)  # fmt: skip
    assert "continues after step 6" in said
    assert [path.name for path in sorted(left.glob("checkpoint-*"))] == ["checkpoint-000006"]


def test_one_process_learns_the_same_as_two(tmp_path, repo_root, shapes, cache, whole_run):
    two, one = whole_run("tiny_internvl_mis"), tmp_path / "one"
    run(command("tiny_internvl_mis", one, shapes, *RATES["tiny_internvl_mis"], processes=1), repo_root, cache)
    assert len(losses(two)) == len(losses(one)) == 6
    for step, loss in losses(two).items():
        assert losses(one)[step] == pytest.approx(loss, rel=1e-5)


def test_other_settings_on_a_run_folder_are_refused(repo_root, shapes, cache, whole_run):
    run_dir = whole_run("tiny_internvl_mis")
    start = command("tiny_internvl_mis", run_dir, shapes, *RATES["tiny_internvl_mis"], processes=1)[3:]
    said = run([sys.executable, *start, "train.lr=1e-4"], repo_root, cache, code=2)
    assert "other settings: train.lr was 0.0015, is 0.0001" in said
    assert "done: step 6" in run([sys.executable, *start], repo_root, cache)


def test_bf16_with_recomputed_activations_and_chunked_head_learns(tmp_path, repo_root, shapes, cache):
    options = ["train.precision=bf16", "train.gradient_checkpointing=true", "train.loss_chunk_tokens=64"]
    plain = [arg for arg in command("tiny_qwen2vl_mis", tmp_path / "run", shapes) if "precision" not in arg]
    run([*plain, *options], repo_root, cache)
    seen = losses(tmp_path / "run")
    assert seen[6] < seen[1] - 0.5


def test_second_process_on_a_run_folder_is_refused(tmp_path, repo_root, shapes, cache):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with FileLock(run_dir / ".lock"):
        arguments = [sys.executable, *command("tiny_internvl_mis", run_dir, shapes, processes=1)[3:]]
        said = run(arguments, repo_root, cache, code=2)
    assert "another process is training in" in said


def test_text_only_rank_beside_a_rank_with_pictures(tmp_path, repo_root, shapes, cache):
    source = SourceConfig(split="train_general")
    rows = load_mixture(DataConfig(dir=shapes, sources=(source,)), seed=0).rows
    order = np.random.default_rng([0, 0]).permutation(len(rows))
    pairs = [order[step * 2 : step * 2 + 2] for step in range(6)]
    mixed = [len({bool(rows[number].row.images) for number in pair}) == 2 for pair in pairs]
    assert any(mixed), "the drawn steps must put a text-only sample beside one with a picture"
    seen = []
    for processes in (2, 1):
        run_dir = tmp_path / f"run{processes}"
        arguments = command("tiny_internvl_mis", run_dir, shapes, processes=processes)
        arguments = [arg for arg in arguments if not arg.startswith("train.batch_samples")]
        more = [
            "train.batch_samples=2",
            "data.sources=[{split: train_general}]",
            "model.train=vision,projector,language",
        ]
        run([*arguments, *more], repo_root, cache)
        seen.append(losses(run_dir))
    assert len(seen[0]) == 6
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
