"""`python -m tests.faults.tiny_pipeline PIPELINE OUT`: `data_gen run` with quick synthetic stages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_gen.cli import main
from mirage.errors import run_main
from tests.support import synthetic_run

if __name__ == "__main__":
    # Under its own name the registry finds the stages.
    synthetic_run.register()
    os.environ[synthetic_run.LOG_VARIABLE] = os.devnull
    pipeline, out = sys.argv[1], str(Path(sys.argv[2]))
    run_main(lambda: main(["run", pipeline, "--out", out, "--console", "plain"]))
