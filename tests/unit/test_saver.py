"""Checkpoints written beside the training: what they hold is of their step, and no failure goes unheard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage.config.loader import load_recipe
from mirage.errors import UserError
from mirage.training import saver as saver_module
from mirage.training.checkpoint import fingerprint, read_ready
from mirage.training.saver import CheckpointSaver


class FakeTrainer:
    """One rank with one number for weights; `slow_disk` holds writing up until it is set."""

    def __init__(self, run_dir: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.recipe = load_recipe(["recipe=tiny_internvl_mis", f"run_dir={run_dir}"])
        self.run_dir, self.step, self.rank, self.world_size, self.is_main = run_dir, 0, rank, world_size, rank == 0
        self.engine = SimpleNamespace(weight=torch.zeros(3))
        self.meter = SimpleNamespace(checkpoint=contextlib.nullcontext)
        self.ready: list[tuple[str, int, bool]] = []
        self.slow_disk = threading.Event()
        self.failure: Exception | None = None

    def train(self) -> None:
        self.step += 1
        self.engine.weight += 1

    def collect_weights(self) -> Callable[[Path], None]:
        state = {"weight": self.engine.weight.clone()}

        def write(folder: Path) -> None:
            assert self.slow_disk.wait(20)
            folder.mkdir()
            if self.failure is not None:
                raise self.failure
            save_file(state, folder / "model.safetensors")

        return write

    def checkpoint_ready(self, folder: Path, step: int, *, is_due: bool) -> None:
        assert read_ready(folder) is not None
        self.ready.append((folder.name, step, is_due))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainer]:
    def collect(engine: Any, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        return {"weight/exp_avg": engine.weight.clone()}

    monkeypatch.setattr(saver_module, "collect_optimizer_state", collect)
    monkeypatch.setattr(saver_module, "gather_objects", lambda value: [value])
    made = FakeTrainer(tmp_path)
    yield made
    made.slow_disk.set()


def test_training_goes_on_and_the_checkpoint_is_of_its_step(trainer: FakeTrainer) -> None:
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.train()
    saver.start(is_due=True)
    for _ in range(3):
        saver.agree(saver.number())
        assert not saver.is_written and trainer.ready == []
        trainer.train()
    assert not (trainer.run_dir / "checkpoint-000001").exists()
    trainer.slow_disk.set()
    assert saver._part is not None and saver._part.own_done.wait(20)
    saver.agree(saver.number())
    assert saver.is_written
    saver.finish()
    assert trainer.ready == [("checkpoint-000001", 1, True)] and not saver.is_written

    folder = trainer.run_dir / "checkpoint-000001"
    for file in ("model/model.safetensors", "resume/rank-00000.safetensors"):
        assert all(tensor.tolist() == [1.0] * 3 for tensor in load_file(folder / file).values())
    ready = read_ready(folder)
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del written["READY"]
    assert ready is not None and ready["step"] == 1 and list(ready["files"]) == sorted(written)
    assert ready["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in written.items()}
    assert ready["fingerprint"] == fingerprint(ready["files"])
    assert json.loads(written["resume/state.json"].read_text())["step"] == 1
    saver.finish()
    assert len(trainer.ready) == 1


def test_not_written_until_every_rank_has(trainer: FakeTrainer) -> None:
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.world_size = 2
    trainer.slow_disk.set()
    saver.start(is_due=True)
    assert saver._part is not None and saver._part.own_done.wait(20)
    saver.agree(saver.number() + 0.0)
    assert not saver.is_written
    saver.agree(saver.number() + 1.0)
    assert saver.is_written


def test_one_at_a_time_and_for_a_signal(trainer: FakeTrainer) -> None:
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.slow_disk.set()
    for is_due in (True, False):
        trainer.train()
        saver.start(is_due=is_due)
    assert trainer.ready == [("checkpoint-000001", 1, True)]
    saver.finish()
    assert trainer.ready[1:] == [("checkpoint-000002", 2, False)]
    assert (read_ready(trainer.run_dir / "checkpoint-000002") or {})["on_signal"] is True


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (OSError(28, "No space left on device", "x"), UserError, r"checkpoint of step 1 could not be .*: x: no space"),
        (ValueError("odd"), ValueError, "odd"),
    ],
)
def test_what_cannot_be_written_stops_the_run_and_leaves_nothing(
    trainer: FakeTrainer, failure: Exception, raised: type[Exception], message: str
) -> None:
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.failure = failure
    trainer.train()
    saver.start(is_due=True)
    trainer.train()
    trainer.slow_disk.set()
    with pytest.raises(raised, match=message):
        saver.finish()
    assert trainer.ready == [] and list(trainer.run_dir.iterdir()) == []


def test_another_ranks_failure_is_this_ones_too(trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though this rank's part is sound, and it waits for that of the other."""
    trainer.world_size = 2
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.slow_disk.set()
    trainer.train()
    saver.start(is_due=True)
    monkeypatch.setattr(saver_module, "gather_objects", lambda value: [value, "no space left"])
    with pytest.raises(UserError, match=r"could not be written into .*: no space left"):
        saver.finish()
    assert trainer.ready == [] and list(trainer.run_dir.iterdir()) == []


def test_what_all_ranks_have_written_becomes_a_checkpoint_though_training_fails(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    ranks = [FakeTrainer(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    savers = [CheckpointSaver(rank) for rank in ranks]  # type: ignore[arg-type]
    for rank, saver in zip(ranks, savers):
        rank.train()
        saver.start(is_due=True)
    final = tmp_path / "checkpoint-000001"
    ranks[0].slow_disk.set()
    savers[1].wait(until_ready=True)
    assert [saver.number() for saver in savers] == [1.0, 1.0]
    ready = read_ready(final)
    assert ready is not None and {path.name for path in (final / "resume").iterdir()} == {
        "rank-00000.safetensors", "rank-00001.safetensors", "state.json",
    }  # fmt: skip
    listed = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert listed == {*ready["files"], "READY"}
    savers[0].wait(until_ready=True, seconds=0)


def test_without_every_ranks_part_there_is_no_checkpoint(trainer: FakeTrainer) -> None:
    trainer.world_size = 2
    saver = CheckpointSaver(trainer)  # type: ignore[arg-type]
    trainer.slow_disk.set()
    saver.start(is_due=True)
    saver.wait(until_ready=False)
    saver.wait(until_ready=True, seconds=0.5)
    assert saver.number() == 1.0 and not list(trainer.run_dir.glob("checkpoint-*"))
