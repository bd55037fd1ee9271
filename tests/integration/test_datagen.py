"""The dataset folder: same bytes every time, whole or absent, and readable in every layout it offers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from data_gen.build import make_dataset
from data_gen.cli import main
from data_gen.stages.draft import TRAIN_SPLITS
from data_gen.store import build_lock
from data_gen.taxonomy.facts import load_taxonomy
from mirage.config.schema import SourceConfig
from mirage.data.row import Row, dump_row
from mirage.data.sources import SourcedRow, read_rows, read_source
from mirage.errors import UserError
from mirage.evals.rule_judge import RuleJudge
from mirage.evals.tasks import TASKS, mis_files
from mirage.evals.tasks.rows import load_split, sample_of_row
from tests.support.datagen import tiny_settings

TAXONOMY = load_taxonomy()


def _make(target: Path, *, seed: int = 0, **more):
    return make_dataset(target, taxonomy=TAXONOMY, settings=tiny_settings(seed=seed), num_workers=1, **more)


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("datagen") / "mis"
    _make(target)
    return target


@pytest.fixture(scope="module")
def rows(folder) -> list[Row]:
    return list(read_rows(folder))


def test_two_runs_give_the_same_bytes(folder, tmp_path):
    outcome = _make(tmp_path / "again")
    assert json.loads((folder / "manifest.json").read_text()) == outcome.manifest
    assert _folder_hash(tmp_path / "again") == _folder_hash(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_worker_processes_do_not_change_the_bytes(folder, tmp_path):
    make_dataset(tmp_path / "two", taxonomy=TAXONOMY, settings=tiny_settings(), num_workers=2)
    assert _folder_hash(tmp_path / "two") == _folder_hash(folder)


def test_another_seed_gives_other_rows_and_the_same_counts(folder, tmp_path):
    manifest = _make(tmp_path / "other", seed=1).manifest
    first = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["rows.jsonl"] != first["files"]["rows.jsonl"]
    for split, counts in first["counts"]["splits"].items():
        other = manifest["counts"]["splits"][split]
        assert (other["rows"], other["decision"]) == (counts["rows"], counts["decision"])


def test_finished_folder_is_kept(folder):
    before = (folder / "rows.jsonl").stat().st_mtime_ns
    assert _make(folder).was_complete
    assert (folder / "rows.jsonl").stat().st_mtime_ns == before


def test_other_settings_need_overwrite(tmp_path):
    target = tmp_path / "mis"
    _make(target, seed=1)
    with pytest.raises(UserError, match=r"seed is 1, asked for 0.*--overwrite"):
        _make(target)
    assert not _make(target, overwrite=True).was_complete
    assert _make(target).was_complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mis"]


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no dataset folder"):
            _make(tmp_path / "home", overwrite=overwrite)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_two_builds_of_one_folder_do_not_mix(tmp_path):
    with build_lock(tmp_path / "mis"), pytest.raises(UserError, match="another process"):
        _make(tmp_path / "mis")


def test_damage_is_found(tmp_path, capsys):
    target = tmp_path / "mis"
    _make(target)
    assert main(["verify", "--out", str(target)]) == 0
    picture = next((target / "images").rglob("*.png"))
    content = picture.read_bytes()
    picture.write_bytes(content + b"x")
    with pytest.raises(UserError, match="does not match its hash"):
        main(["verify", "--out", str(target)])
    picture.write_bytes(content)
    lines = (target / "rows.jsonl").read_text().splitlines(keepends=True)
    (target / "rows.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"rows\.jsonl does not match.*--overwrite"):
        _make(target)
    (target / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="own hash"):
        _make(target)


def test_interrupted_build_continues(folder, tmp_path):
    drawn = []

    def stop_after_100(items, description, total):
        for item in items:
            drawn.append(description)
            if len(drawn) == 100:
                raise KeyboardInterrupt
            yield item

    target = tmp_path / "mis"
    with pytest.raises(KeyboardInterrupt):
        _make(target, progress=stop_after_100)
    assert not target.exists()
    aside = tmp_path / ".mis.building"
    with (aside / ".pictures.jsonl").open("a") as journal:
        journal.write('{"name":"torn')
    whole = sorted((aside / "images").rglob("*.png"))
    whole[0].write_bytes(whole[0].read_bytes()[:10])
    redrawn = []

    def count(items, description, total):
        redrawn.append((description, total))
        yield from items

    _make(target, progress=count)
    total = len(list((folder / "images").rglob("*.png")))
    assert redrawn[0][0] == "drawing pictures" and total - 99 < redrawn[0][1] <= total - 90
    assert _folder_hash(target) == _folder_hash(folder)


KILLED = """
import sys
from pathlib import Path
from data_gen.build import make_dataset
from data_gen.taxonomy.facts import load_taxonomy
from tests.support.datagen import tiny_settings
make_dataset(Path(sys.argv[1]), taxonomy=load_taxonomy(), settings=tiny_settings(), num_workers=1)
"""


def test_killed_build_gives_the_same_bytes(folder, tmp_path, repo_root):
    target, journal = tmp_path / "mis", tmp_path / ".mis.building" / ".pictures.jsonl"
    command = [sys.executable, "-c", KILLED, str(target)]
    child = subprocess.Popen(command, cwd=repo_root, env=os.environ | {"PYTHONPATH": str(repo_root)})
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 2000):
        assert child.poll() is None and time.monotonic() < deadline, "the build ended before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists()
    _make(target)
    assert _folder_hash(target) == _folder_hash(folder)


def test_manifest_lists_every_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present == {*manifest["files"], "manifest.json"}
    for name, digest in manifest["files"].items():
        if name.startswith("images/"):
            assert name == f"images/{digest[:2]}/{digest}.png"


def test_rows_read_back_and_pictures_open(folder, rows):
    lines = (folder / "rows.jsonl").read_text("utf-8").splitlines()
    assert [dump_row(row) for row in rows] == lines
    for row in rows:
        for image in row.images:
            with Image.open(folder / image.path) as picture:
                assert picture.size == (image.width, image.height)
            assert image.licence and image.attribution and image.concept


def test_published_train_layout_holds_the_same_samples(folder, rows):
    records = json.loads((folder / "mis_train" / "mis_train.json").read_text())
    assert list(records[0]) == ["id", "category", "sub_category", "image", "conversations"]
    assert [record["id"] for record in records] == list(range(1, len(records) + 1))
    assert records[0]["image"] == ["images/1/object1.png", "images/1/object2.png"]
    read = list(read_source(SourceConfig(path=folder / "mis_train", format="mis_train"), folder))
    train = [row for row in rows if row.split == "train"]
    assert all(isinstance(entry, SourcedRow) for entry in read)
    assert [entry.row.messages for entry in read] == [row.messages for row in train]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for entry in read for path in entry.image_paths] == [
        image.sha256 for row in train for image in row.images
    ]


@pytest.mark.parametrize("split", ["easy", "hard", "real"])
def test_published_test_layout_holds_the_same_samples(folder, rows, split):
    path = folder / "mis_test" / f"mis_{split}.json"
    records = json.loads(path.read_text())
    assert list(records[0]) == ["id", "question", "category", "sub_category", "image_path1", "image_path2"]
    assert (records[0]["id"], records[0]["image_path1"]) == (0, f"{split}_image/1/object1.png")
    wanted = [row for row in rows if row.split == split]
    assert [record["question"] for record in records] == [row.question for row in wanted]
    samples = mis_files.load_file(path)
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for sample in samples for p in sample.image_paths] == [
        image.sha256 for row in wanted for image in row.images
    ]


def test_rule_judge_agrees_with_the_labels(folder, rows):
    judge = RuleJudge()
    for row in rows:
        if row.split not in TRAIN_SPLITS or row.label is None:
            continue
        sample = sample_of_row(row, folder)
        if row.label.decision == "help":
            verdict = judge.assess_benign(sample, row.answer)
            assert (verdict.outcome, verdict.objects_right) == ("helped", True), row.answer
        else:
            verdict = judge.assess_risky(sample, row.answer)
            assert (verdict.safe, verdict.perception) == (True, 1), row.answer
            if "helpful_answer" in row.tags:
                assert not judge.assess_risky(sample, row.tags["helpful_answer"]).safe, row.tags["helpful_answer"]


@pytest.mark.parametrize("split", ["easy", "hard", "real", "twins", "general", "contrast", "multi", "line"])
def test_evaluation_loads_every_test_split(folder, split):
    samples = load_split(folder, split, task=split)
    assert len(samples) == tiny_settings().size.rows[split]
    asks_to_choose = [sample for sample in samples if sample.choice is not None]
    assert len(asks_to_choose) == {"general": len(samples), "line": 2}.get(split, 0)


@pytest.mark.parametrize(
    ("risky", "benign", "split"),
    [
        ("mis_multi", "multi_twins", "multi"),
        ("contrast", "contrast_twins", "contrast"),
        ("mis_line", "line_twins", "line"),
    ],
)
def test_tasks_share_a_split_with_siblings(folder, rows, risky, benign, split):
    wanted = [row for row in rows if row.split == split]
    judge = RuleJudge()
    for task, decision in ((TASKS[risky], "refuse"), (TASKS[benign], "help")):
        samples = task.load(folder)
        assert [sample.id for sample in samples] == [
            row.id for row in wanted if row.label and row.label.decision == decision
        ]
        for sample in samples:
            nouns = [f"a {concept}" for concept in sample.concepts]
            answer = f"They are {', '.join(nouns)}. " if nouns else ""
            declined = asyncio.run(task.score(sample, answer + "I can't help with using them together.", judge))
            helped = asyncio.run(task.score(sample, answer + "You can use them together.", judge))
            assert {declined.label, helped.label} == ({"rsr", "asr"} if decision == "refuse" else {"refused", "helped"})


def test_line_art_has_its_multiple_choice_task(folder, rows):
    samples = TASKS["line_general"].load(folder)
    assert [sample.id for sample in samples] == [row.id for row in rows if row.split == "line" and row.choice]
    right = samples[0].choice.options[samples[0].choice.answer]
    assert asyncio.run(TASKS["line_general"].score(samples[0], right, RuleJudge())).label == "right"
    general = {sample.id: sample for sample in TASKS["general"].load(folder)}
    assert all(sample.question == general[sample.meta["sibling_of"]].question for sample in samples)


def test_line_art_is_in_no_published_layout(folder):
    line = {image.sha256 for row in read_rows(folder, splits=("line",)) for image in row.images}
    published = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "mis_test").rglob("*.png")}
    assert line and published and not line & published


def test_card_reports_what_the_manifest_holds(folder):
    card, manifest = (folder / "README.md").read_text(), json.loads((folder / "manifest.json").read_text())
    for line in manifest["limitations"]:
        assert line in card
    assert {"line, in folds", "train to line"} <= set(manifest["shortcuts"]) and "| line | 12 |" in card
    for name, figure in manifest["shortcuts"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| {name} | "))
        pairs, margin, *cells = line.strip("| ").split(" | ")[1:]
        assert (int(pairs), margin) == (figure["pairs"], f"{figure['margin']:.3f}")
        assert sorted(cells) == sorted(f"{value:.3f}" for value in figure["accuracies"].values())
    for side, figures in manifest["diversity"].items():
        assert f"| {side} | {figures['rows']} | {figures['distinct_questions']} |" in card
        for category, cover in figures["pair_coverage"].items():
            assert re.search(rf"\| {category} \|.* {cover['pairs']} of {cover['of']} \|", card)
    assert str(manifest["text"]["distinct_train_words"]) in card
    assert "OpenMoji, CC BY-SA 4.0" in card


def test_command_line(tmp_path, repo_root):
    command = [sys.executable, "-m", "data_gen", "make", "--out", str(tmp_path / "x")]
    wrong_seed = subprocess.run([*command, "--seed", "-1"], cwd=repo_root, capture_output=True, text=True)
    assert wrong_seed.returncode == 2 and "whole number from 0 up" in wrong_seed.stderr
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "letter.txt").write_text("dear")
    refused = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
