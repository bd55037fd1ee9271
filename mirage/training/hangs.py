"""A rank that hangs: the others, whose collective timed out, find out which one it is and say so."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from mirage.errors import UserError
from mirage.training import distributed

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

# The ranks that waited in one collective give up within moments of each other.
ANSWER_TIMEOUT = timedelta(seconds=60)
# gloo's words (gloo/transport/tcp/unbound_buffer.cc and pair.cc, torch/distributed).
_TIMEOUT_WORDS = ("Timed out waiting", "timed out after", "Timed out after")
_GONE_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankHangs(UserError):
    """A rank does not take part any more. Names it and the step."""


def open_roll_call(world_size: int) -> Any:
    """A process group of its own for `name_hung_rank`; None for one process. A collective."""
    if world_size == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=ANSWER_TIMEOUT)


@contextlib.contextmanager
def name_hung_rank(trainer: Trainer, group: Any) -> Iterator[None]:
    """Around training: turns a collective that timed out into `RankHangs` with the rank named, and one whose partner
    has ended into a message that points to the partner's own.

    gloo raises where it times out. NCCL's watchdog ends the process instead, with its own message.
    """
    try:
        yield
    except RuntimeError as error:
        if group is not None and any(word in str(error) for word in _GONE_WORDS):
            raise UserError(
                f"another rank ended at step {trainer.step + 1}: its own message, if it could leave one, says why; a "
                "rank that was killed leaves none. The same command goes on from the last checkpoint"
            ) from error
        if group is None or not any(word in str(error) for word in _TIMEOUT_WORDS):
            raise
        missing = missing_ranks(group, rank=trainer.rank)
        named = ", ".join(f"rank {rank}" for rank in missing) or "a rank that answers again"
        minutes = distributed.COLLECTIVE_TIMEOUT.total_seconds() / 60
        hangs = RankHangs(
            f"{named} did not take part in step {trainer.step + 1} for {minutes:g} minutes: it hangs, or its machine "
            "does. Look at that process (py-spy dump --pid), its disk and its GPU; the same command goes on from the "
            "last checkpoint"
        )
        # Where the first rank hangs, the others have to speak.
        hangs.one_rank_only = 0 in missing
        raise hangs from error


def missing_ranks(group: Any, *, rank: int) -> list[int]:
    """The ranks that do not answer a roll call of the group, to which all others come. Seen from rank 0, all of them;
    another rank learns only whether rank 0 is there."""
    try:
        torch.distributed.monitored_barrier(group, timeout=ANSWER_TIMEOUT, wait_all_ranks=True)
    except RuntimeError as error:
        named = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error))
        if rank == 0 and named:
            return [int(word) for word in named[1].split(",") if word.strip()]
        return [0] if rank != 0 else []
    return []
