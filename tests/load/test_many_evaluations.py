"""Ten thousand evaluations of a run: choosing among them takes time in proportion, and the same one wins."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mirage.config.schema import SelectConfig
from mirage.evals.evaluations import Evaluation
from mirage.evals.selection import select_best
from tests.support.evaluations import labels, write_evaluation

NUM_KINDS, NUM_EVALUATIONS = 25, 10_000
# A tenth of this on a quiet core; comparing each with each, as objects, takes many minutes.
MAX_SECONDS = 180.0


def kinds(folder: Path) -> list[Evaluation]:
    """Evaluations whose attack success falls while their over-refusal rises."""
    return [
        Evaluation.of(
            write_evaluation(
                folder / f"kind{number}",
                {
                    "mis_hard": labels(asr=26 - number, rsr=14 + number),
                    "twins": labels(helped=40 - number // 5, refused=number // 5),
                    "general": labels(right=20),
                },
                step=number,
            )
        )
        for number in range(NUM_KINDS)
    ]


@pytest.mark.slow
def test_the_best_of_ten_thousand(tmp_path: Path) -> None:
    few = kinds(tmp_path)
    many = {
        f"step-{number:06d}": replace(few[number * NUM_KINDS // NUM_EVALUATIONS], step=number)
        for number in range(NUM_EVALUATIONS)
    }
    config = SelectConfig(max_over_refusal_rise=100.0)
    expected = select_best({f"step-{item.step:06d}": item for item in few}, config=config)
    started = time.monotonic()
    found = select_best(many, config=config)
    assert time.monotonic() - started < MAX_SECONDS
    assert len(found.candidates) == NUM_EVALUATIONS
    assert expected.step is not None and found.step == expected.step * NUM_EVALUATIONS // NUM_KINDS
    front = {
        item.step * NUM_KINDS // NUM_EVALUATIONS
        for item in found.candidates
        if item.excluded is None and item.step is not None
    }
    assert front == {item.step for item in expected.candidates if item.excluded is None}
