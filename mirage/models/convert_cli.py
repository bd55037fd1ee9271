"""`mirage convert SRC DST --layout native|published [--check]`: the command line of the checkpoint converter."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mirage.errors import UserError
from mirage.models.internvl_checkpoint import MAX_SHARD_BYTES, convert
from mirage.tracking.terminal_text import SafeConsole

GIGABYTE = 1_000_000_000


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mirage convert`."""
    parser = argparse.ArgumentParser(
        prog="mirage convert",
        description="Convert an InternVL checkpoint between the published layout and transformers' native one.",
    )
    parser.add_argument("src", type=Path, help="folder with config.json and safetensors weights")
    parser.add_argument("dst", type=Path, help="folder to make; must not exist")
    parser.add_argument("--layout", choices=("native", "published"), required=True, help="layout to write")
    parser.add_argument("--check", action="store_true", help="read the result back and compare every tensor")
    parser.add_argument(
        "--image-token-id", type=int, default=None, help="id of <IMG_CONTEXT> where the folder has no tokenizer"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / GIGABYTE, help="size of an output file, GB (default 5)"
    )
    return parser


def convert_command(argv: list[str]) -> int:
    """Run `mirage convert`. Returns the exit status; raises `UserError` for what the user can mend."""
    arguments = build_parser().parse_args(argv)
    if arguments.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb must be above 0, found {arguments.max_shard_gb}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = SafeConsole(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(f"{arguments.layout} layout", total=None)
        convert(
            arguments.src,
            arguments.dst,
            layout=arguments.layout,
            check=arguments.check,
            image_token_id=arguments.image_token_id,
            max_shard_bytes=int(arguments.max_shard_gb * GIGABYTE),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    checked = ", every tensor compared" if arguments.check else ""
    print(f"wrote {arguments.dst} in the {arguments.layout} layout{checked}")
    return 0
