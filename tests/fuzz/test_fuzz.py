"""The short form of the campaign: a few damaged documents for every reader, the same ones in each run."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import campaign
from tests.fuzz.campaign import Bench, Tally, main, time_limit
from tests.fuzz.mutate import documents, mutate
from tests.fuzz.readers import READERS

NUM_EXAMPLES = 6


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Benches keep pictures in caches of their own; the caller's comes back afterwards."""
    before = os.environ.get("MIRAGE_CACHE")
    yield
    os.environ.pop("MIRAGE_CACHE", None)
    if before is not None:
        os.environ["MIRAGE_CACHE"] = before


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_document_is_read_well_or_refused_with_one_message(name: str, tmp_path: Path) -> None:
    bench = Bench(name, tmp_path)
    assert bench.read(bench.good) == "accepted"

    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(documents(bench.good, bench.reader.kind))
    def one(content: bytes) -> None:
        with time_limit(20, wall_seconds=120):
            assert bench.read(content) in ("accepted", "refused")

    one()


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=200))
def test_mutators_damage_any_bytes(content: bytes) -> None:
    for seed in range(5):
        assert isinstance(mutate(Random(seed), content, "binary"), bytes)


def test_a_case_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = Bench("rows", tmp_path / "a"), Bench("rows", tmp_path / "b")
    assert [first.case(3, number) for number in range(20)] == [second.case(3, number) for number in range(20)]
    assert len({first.case(3, number) for number in range(20)}) > 15


def test_the_campaign_saves_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(folder: Path) -> None:
        if b"\\" in (folder / "decisions.jsonl").read_bytes():
            raise KeyError("id")

    monkeypatch.setitem(READERS, "decisions", _with_read("decisions", broken))
    assert main(["--cases", "60", "--readers", "decisions", "--out", str(tmp_path)]) == 1
    saved = sorted((tmp_path / "failures").glob("decisions-*"))
    assert saved and b"\\" in saved[0].read_bytes() and "KeyError" in capsys.readouterr().out


def test_the_campaign_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "SHARE_CASES", 10)
    arguments = ["--readers", "decisions", "--out", str(tmp_path), "--cases"]
    assert main([*arguments, "20"]) == 0
    done: list[range] = []
    monkeypatch.setattr(campaign, "run_share", lambda name, seed, numbers, out: done.append(numbers) or Tally(name))
    assert main([*arguments, "30"]) == 0 and done == [range(20, 30)]


def _with_read(name: str, read: object) -> object:
    import dataclasses

    return dataclasses.replace(READERS[name], read=read)
