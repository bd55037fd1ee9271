"""The ledger: every row of the sources is trained on or listed with a reason, and the counts add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mirage.config.loader import load_recipe
from mirage.data.lengths import index_rows
from mirage.data.pack import PackPlan
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.models.registry import load_adapter
from mirage.training.ledger import NOT_DRAWN, NOT_REACHED, TOO_LONG, UNUSABLE, Ledger, LedgerCallback


@pytest.fixture
def make(tiny_folders, shapes):
    """A function from settings to (ledger, plan, rows, number of rows in the sources)."""
    adapter = load_adapter(tiny_folders["internvl"])

    def build(*settings: str):
        recipe = load_recipe(["recipe=tiny_internvl_mis", f"data.dir={shapes}", "train.batch_samples=4", *settings])
        mixture = load_mixture(recipe.data, seed=0)
        rows, index, too_long = index_rows(mixture.rows, adapter, recipe.data)
        plan = PackPlan.from_recipe(index, recipe, world_size=2)
        left_out = {UNUSABLE: mixture.left_out, TOO_LONG: too_long, NOT_DRAWN: mixture.not_drawn}
        return Ledger(left_out, rows, index, plan), plan, rows

    return build


def test_every_row_is_trained_on_or_listed(make, tmp_path):
    everything = {entry.row.id for entry in make()[2]}
    ledger, plan, rows = make(
        "data.sources=[{split: train, max_samples: 5}, {split: train_twins}, {split: train_general}]",
        "data.pack_tokens=103",
        "data.on_too_long=drop",
        "data.max_left_out=99",
        "train.max_steps=3",
    )
    ledger.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {NOT_DRAWN, TOO_LONG, NOT_REACHED}
    assert all(line["location"] and line["source"] and line["reason"] for line in lines)
    listed = [line["row_id"] for line in lines]
    trained = {rows[number].row.id for step in range(plan.num_steps) for number in plan.step_samples(step)}
    assert len(listed) == len(set(listed)) and not trained & set(listed)
    assert trained | set(listed) == everything
    assert sum(line["kind"] == NOT_DRAWN for line in lines) == 3
    assert len(trained) == 12 == sum(ledger.times_seen(3))


def test_bad_rows_of_every_kind_are_listed_and_share_one_limit(tiny_folders, shapes, tmp_path):
    """One that cannot be read and one without an answer: found at two places, counted together."""
    folder = Path(shutil.copytree(shapes, tmp_path / "data"))
    lines = (folder / "rows.jsonl").read_text().splitlines()
    numbers = [number for number, line in enumerate(lines) if json.loads(line)["split"] == "train"][:2]
    lines[numbers[0]] = lines[numbers[0]].replace('"category"', '"categori"')
    record = json.loads(lines[numbers[1]])
    record["messages"].pop()
    lines[numbers[1]] = json.dumps(record)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    adapter = load_adapter(tiny_folders["internvl"])

    def index(limit: int) -> list[str]:
        settings = ["data.on_bad_row=skip", f"data.max_left_out={limit}", "data.sources=[{split: train}]"]
        data = load_recipe(["recipe=tiny_internvl_mis", f"data.dir={folder}", *settings]).data
        mixture = load_mixture(data, seed=0)
        rows, _, too_long = index_rows(mixture.rows, adapter, data, unusable=mixture.left_out, num_bad=mixture.num_bad)
        assert len(rows) == 6 and not too_long
        return [entry.reason for entry in mixture.left_out]

    reasons = index(2)
    assert "categori" in reasons[0] and "has no assistant text to learn" in reasons[1] and len(reasons) == 2
    with pytest.raises(UserError, match=r"2 rows cannot be trained on and data\.max_left_out is 1"):
        index(1)


def test_counts_and_words(make):
    ledger, plan, rows = make("train.epochs=1.5")
    counts = ledger.counts()
    names = {entry.source for entry in rows}
    for column in ("rows", "tokens", "image_tokens", "supervised_tokens"):
        assert counts[f"data/{column}"] == sum(counts[f"data/{name}/{column}"] for name in names) > 0
    assert {key: value for key, value in counts.items() if key.startswith("data/rows_")} == dict.fromkeys(
        ("data/rows_unusable", "data/rows_too_long", "data/rows_not_drawn", "data/rows_not_reached"), 0
    )
    assert f"data: {len(rows)} rows" in ledger.start_text() and "not trained on" not in ledger.start_text()
    half = len(rows) // 2
    assert ledger.end_text(plan.num_steps) == f"rows trained on: {half} twice, {len(rows) - half} once"
    assert ledger.end_text(1) == f"rows trained on: 4 once, {len(rows) - 4} never"


def test_a_row_taken_several_times_is_reached_once(make):
    ledger, _, rows = make("data.sources=[{split: train, epochs: 2}, {split: train_general}]", "train.max_steps=1")
    unreached = [entry.row_id for entry in ledger.left_out[NOT_REACHED]]
    assert len(unreached) == len(set(unreached)) == len({entry.row.id for entry in rows}) - 4
    assert "not drawn" not in ledger.start_text() and f"{len(unreached)} not reached" in ledger.start_text()


def test_the_console_and_the_tracker_get_the_counts(make, capsys):
    ledger, _, rows = make("tracking.console=plain", "train.max_steps=2")
    said: dict[str, object] = {}
    trainer = SimpleNamespace(
        is_main=True, ledger=ledger, step=2, recipe=load_recipe(["recipe=tiny_internvl_mis", "tracking.console=plain"]),
        tracker=SimpleNamespace(summary=said.update),
    )  # fmt: skip
    LedgerCallback().on_start(trainer)
    LedgerCallback().on_end(trainer)
    assert said["data/rows"] == len(rows) and said["data/rows_seen"] == 8 == said["data/samples_seen"]
    shown = capsys.readouterr().out
    assert "ledger.jsonl lists them" in shown and "rows trained on: 8 once" in shown
    trainer.is_main = False
    LedgerCallback().on_start(trainer)
    assert capsys.readouterr().out == ""
