"""Entry of `python -m data_gen`."""

from __future__ import annotations

from data_gen.cli import main
from mirage.errors import run_main

if __name__ == "__main__":
    run_main(main)
