"""A run without a model, as tracking sees it: the real callback, tracker and logging; killed where it is told.

    python -m tests.support.tracked_run RUN_DIR DATA_DIR BASE_DIR [KILL_AFTER]

Twelve steps, a checkpoint and an evaluation every four. KILL_AFTER is `step-N` (right after that step's metrics),
`checkpoint-N` (before its evaluation) or `eval-N` (right after that evaluation is logged): the process then kills
itself and wandb's process, at once. Without it the run goes to its end. The same command again goes on from the last
checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from mirage.config.loader import load_recipe
from mirage.evals.hook import log_finished
from mirage.evals.schedule import Job, results_dir, settle
from mirage.tracking import wandb_run
from mirage.tracking.callback import TrackingCallback
from mirage.tracking.console import make_console
from mirage.training.checkpoint import checkpoint_name, checkpoint_step, publish, ready_checkpoints
from tests.support.evaluations import labels, write_evaluation

NUM_STEPS, EVERY = 12, 4
# From one evaluation to the next: attack success falls, rises again at step 8, and falls.
EVALUATIONS = {
    step: {
        "mis_hard": labels(asr=unsafe, rsr=40 - unsafe),
        "twins": labels(helped=40 - refused, refused=refused),
        "general": labels(right=right, wrong=40 - right),
    }
    for step, unsafe, refused, right in ((0, 36, 0, 36), (4, 6, 4, 34), (8, 26, 2, 35), (12, 2, 3, 33))
}
ANSWER = (
    "The first image shows a red disc. The second image shows a blue square & more. Both are shapes. "
    "Together they could lead to <b>harm</b>. I can't help with that."
)
TRAIN_NAMES = (
    "loss", "token_accuracy", "loss_source/train", "loss_segment/risk", "lr", "grad_norm", "epoch", "tokens",
    "supervised_tokens", "step_seconds", "data_wait_share", "tokens_per_second", "mfu", "peak_memory_bytes",
)  # fmt: skip


def step_metrics(step: int) -> dict[str, float]:
    """Numbers of a step, each its own; steps 5 to 8 wait for data."""
    found = {f"train/{name}": (number + 1) / (step + 1) for number, name in enumerate(TRAIN_NAMES)}
    return found | {"train/data_wait_share": 0.9 if 5 <= step <= 8 else 0.1}


def main(run_dir: Path, data_dir: Path, base_dir: Path, kill_after: str) -> None:
    recipe = load_recipe(
        [
            "recipe=tiny_internvl_mis", f"run_dir={run_dir}", f"data.dir={data_dir}", "tracking.wandb=offline",
            "tracking.console=quiet", "tracking.table_rows=6", "tracking.picture_pixels=32",
            "tracking.alerts.data_wait_steps=3", "tracking.artifacts.checkpoint=files",
        ]
    )  # fmt: skip
    trained = [checkpoint_step(path) for path in ready_checkpoints(run_dir)]
    trainer: Any = SimpleNamespace(
        recipe=recipe, run_dir=run_dir, is_main=True, tracker=None, kernels={"attention": "eager (asked for)"},
        base=base_dir, step=max(trained, default=0), total_steps=NUM_STEPS,
        device=torch.device("cpu"), world_size=1,
    )  # fmt: skip
    if kill_after.startswith("checkpoint"):
        # Nothing of this process but whole blocks reaches wandb's file: what a kill takes then is certain.
        wandb_run.FLUSH_SECONDS = 3600.0
    callback = TrackingCallback()
    callback.on_start(trainer)
    evaluate(trainer, data_dir, trainer.step, kill_after)
    while trainer.step < NUM_STEPS:
        trainer.step += 1
        callback.on_step(trainer, step_metrics(trainer.step))
        kill_if(kill_after, f"step-{trainer.step}")
        if trainer.step % EVERY == 0:
            checkpoint = write_checkpoint(run_dir, trainer.step)
            callback.on_checkpoint(trainer, checkpoint, trainer.step)
            kill_if(kill_after, f"checkpoint-{trainer.step}")
            evaluate(trainer, data_dir, trainer.step, kill_after)
    callback.on_end(trainer)
    callback.on_close(trainer, None)


def write_checkpoint(run_dir: Path, step: int) -> Path:
    aside, final = run_dir / f"{checkpoint_name(step)}.aside", run_dir / checkpoint_name(step)
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "config.json").write_text("{}")
    (aside / "model" / "weights.bin").write_text(f"weights of step {step}")
    publish(aside, final, step=step)
    return final


def evaluate(trainer: Any, data_dir: Path, step: int, kill_after: str) -> None:
    """Leave a finished evaluation in the run folder, and have the run log what is finished."""
    folder = results_dir(trainer.run_dir, step)
    if not folder.exists():
        pictures = sorted(data_dir.rglob("*.png"))[:2]
        tasks = EVALUATIONS[step]
        write_evaluation(
            folder, tasks, step=step, baseline=results_dir(trainer.run_dir, 0) if step else None, image_paths=pictures,
            answers={name: [ANSWER] * len(given) for name, given in tasks.items()},
        )  # fmt: skip
        settle(trainer.run_dir, Job(step, "full", "done"))
    log_finished(trainer.run_dir, trainer.tracker, make_console("quiet"), config=trainer.recipe.eval)
    kill_if(kill_after, f"eval-{step}")


def kill_if(kill_after: str, moment: str) -> None:
    if kill_after == moment:
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:4]), kill_after=sys.argv[4] if len(sys.argv) > 4 else "")
