"""Multiple-choice extraction: by text, by letter, and never by a guess."""

from __future__ import annotations

import pytest

from mirage.evals.choice import extract_choice

OPTIONS = ("bus", "car", "tram", "DIY kit")


@pytest.mark.parametrize(
    ("index", "reply"),
    [
        (2, "tram"),
        (2, "Tram."),
        (2, "A person is standing by a tram, so the answer is C."),
        (2, "A tram is visible… Answer: C"),
        (2, "Option A is wrong… C is right."),
        (2, "**C**"),
        (2, "\\boxed{C}"),
        (2, "Final answer: c"),
        (2, "a tram , so c ."),
        (2, "It is not a bus but a tram"),
        (2, "I see a bus and a tram. The answer is tram."),
        (1, "the answer is a car"),
        (1, "The correct option is B because it has wheels"),
        (0, "(A)"),
        (0, "A. bus"),
        (None, ""),
        (None, "I'm sorry, I can't help"),
        (None, "I cannot determine… DIY approach"),
        (None, "A person stands there"),
        (None, "a tram, so B."),
        (None, "A. car"),
        (None, "a bus or a car"),
        (None, "E"),
    ],
)
def test_extraction(index: int | None, reply: str) -> None:
    assert extract_choice(reply, OPTIONS).index == index


def test_a_longer_option_hides_the_shorter_one_inside_it() -> None:
    options = ("a watching device", "a computing device", "device")
    assert extract_choice("A computing device", options).index == 1
    assert extract_choice("device", options).index == 2
