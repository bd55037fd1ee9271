"""A sweep's run: the arguments that `wandb agent` passes, and a run folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_OPTION = re.compile(r"^--[A-Za-z_][\w.-]*=")
_ID = re.compile(r"[^A-Za-z0-9_.-]+")


def sweep_arguments(args: Sequence[str], *, environ: Mapping[str, str]) -> list[str]:
    """Arguments as recipe keys: `--train.lr=1e-5`, as a sweep's agent writes it, becomes `train.lr=1e-5`.

    Under an agent (WANDB_SWEEP_ID and WANDB_RUN_ID are set) a run without `run_dir=` gets
    `run_dir=runs/sweeps/<sweep>/<run>`: the runs of a sweep must not continue one another.
    """
    plain = [arg[2:] if _OPTION.match(arg) else arg for arg in args]
    sweep, run = (_ID.sub("-", environ.get(name, "")) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    if sweep and run and not any(arg.startswith("run_dir=") for arg in plain):
        plain.append(f"run_dir={Path('runs') / 'sweeps' / sweep / run}")
    return plain
