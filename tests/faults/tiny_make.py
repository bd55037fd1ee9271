"""`python -m data_gen ...` whose size `small` is made in a second, its pictures drawn by two processes."""

from __future__ import annotations

from data_gen import build, settings
from data_gen.cli import main
from mirage.errors import run_main
from tests.support.datagen import tiny_settings

if __name__ == "__main__":
    settings.SIZES["small"] = tiny_settings().size
    build.MAX_WORKERS = 2
    run_main(main)
