"""A replayed failure in the terminal: the failed packs' samples, their memory, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage.errors import UserError
from mirage.tracking.terminal_text import SafeConsole
from mirage.training.failures import FAILURES, memory_bytes
from mirage.training.replay import Replay, ReplayedPack, replay
from mirage.training.weights import DTYPES


def print_replay(result: Replay, *, console: Console | None = None) -> None:
    """The failure, a table of each pack's samples, and the verdict; plain text where the output is no terminal."""
    console = console or SafeConsole(highlight=False)
    if not console.is_terminal:
        # Wide enough that no line of a log file is folded.
        console = SafeConsole(file=console.file, highlight=False, no_color=True, width=160)
    record = result.record
    what = record["kind"] if record["value"] is None else f"{record['kind']} {record['value']}"
    console.print(Text(f"step {record['step']}, rank {record['rank']} of {record['world_size']}: {what}"))
    if record["message"]:
        console.print(Text(record["message"]), soft_wrap=True)
    console.print(Text(f"replayed with {result.weights}"))
    if result.bad_weights:
        console.print(Text(f"weights that are not finite: {', '.join(result.bad_weights[:5])}"))
    for pack in result.packs:
        console.print(_pack_table(pack))
        peak = f", peak on the device {_size(pack.peak_bytes)}" if pack.peak_bytes is not None else ""
        console.print(
            f"pack {pack.number} of {record['num_packs']}: loss sum {pack.loss:.4f}, gradient norm "
            f"{pack.gradient_norm:.4g}, kept for the backward pass {_size(pack.kept_bytes)}{peak}"
        )
    if record["kind"] == "out of memory":
        then = ", ".join(f"{name.replace('_', ' ')} {_size(value)}" for name, value in record["memory_bytes"].items())
        now = memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        console.print(Text(f"memory then: {then}; host free now {_size(now['host_free'])}"))
    console.print(Text(result.verdict, style="bold"), soft_wrap=True)


def _pack_table(pack: ReplayedPack) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    with_gradients = any(sample.gradient_norm is not None for sample in pack.samples)
    headers = ["row", "location", "tokens", "of pictures", "learnt", "loss", "kept"]
    for number, header in enumerate([*headers, *(["gradient"] if with_gradients else []), ""]):
        table.add_column(header, justify="right" if number >= 2 and header else "left")
    for sample in pack.samples:
        numbers = (sample.num_tokens, sample.num_image_tokens, sample.num_supervised_tokens)
        cells = [f"{sample.loss:.4f}", _size(sample.kept_bytes)]
        if with_gradients:
            cells.append("-" if sample.gradient_norm is None else f"{sample.gradient_norm:.4g}")
        note = "" if sample.finite_pictures else "its pictures are not finite"
        location = Text(sample.location or "-", overflow="fold")
        table.add_row(Text(sample.row_id), location, *(f"{number:,}" for number in numbers), *cells, note)
    return table


def _size(num_bytes: int | None) -> str:
    value = float(num_bytes or 0)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def run(paths: Sequence[str], *, weights: str | None, precision: str | None) -> None:
    """Replay one failure and print what is found."""
    if len(paths) != 1:
        raise UserError(f"replay takes one FOLDER (RUN_DIR/{FAILURES}/step-NNNNNN-rankR), found {len(paths)}")
    if precision is not None and precision not in DTYPES:
        raise UserError(f"precision={precision}: must be one of {', '.join(DTYPES)}")
    print_replay(replay(Path(paths[0]), weights=Path(weights) if weights else None, precision=precision))
