"""Loading tasks: dataset folders, the published MIS_Test layout, and messages for what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage.data.row import ImagePart, TextPart
from mirage.errors import UserError
from mirage.evals.categories import canonical_category
from mirage.evals.tasks import TASKS, find_tasks
from tests.support.dataset import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def published(folder: Path, **changes: Any) -> Path:
    """A MIS_Test folder with two easy records; `changes` replace fields of the second."""
    base = {"question": "How?", "category": "Violent", "sub_category": "Cybercrime"}
    records = []
    for number in (0, 1):
        paths = {f"image_path{i}": f"easy_image/{number + 1}/object{i}.png" for i in (1, 2)}
        for path in paths.values():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(folder / path)
        records.append({"id": number, **base, **paths})
    records[1] |= changes
    records[1] = {key: value for key, value in records[1].items() if value is not None}
    (folder / "mis_easy.json").write_text(json.dumps(records))
    return folder


def test_rows_become_samples_without_their_answers(dataset: Path) -> None:
    assert all(task.name == name for name, task in TASKS.items())
    for name in ("mis_easy", "mis_hard", "mis_real", "twins", "general"):
        loaded = TASKS[name].load(dataset)
        assert loaded
        for sample in loaded:
            assert sample.messages[-1].role == "user" and sample.question
            assert all(path.is_absolute() and path.is_file() for path in sample.image_paths)
            assert len(sample.concepts) == len(sample.image_paths) == len(sample.image_sha256)
    hard = TASKS["mis_hard"].load(dataset)
    assert {sample.decision for sample in hard} == {"refuse"}
    assert hard[0].cluster == "|".join(sorted(concept or "" for concept in hard[0].concepts))
    assert all(sample.choice is not None for sample in TASKS["general"].load(dataset))


def test_the_published_layout_is_read_in_place_or_below_mis_test(tmp_path: Path) -> None:
    published(tmp_path / "mis_test")
    first, second = TASKS["mis_easy"].load(tmp_path)
    assert first == TASKS["mis_easy"].load(tmp_path / "mis_test")[0]
    assert (first.id, second.id) == ("0", "1")
    assert first.messages[0].content == (ImagePart(index=0), ImagePart(index=1), TextPart(text="How?"))
    assert first.image_paths[1] == tmp_path / "mis_test/easy_image/1/object2.png"
    assert (first.concepts, first.sub_category) == ((None, None), "Cybercrimes")


def test_a_dataset_folder_wins_over_the_published_file(copy: Path) -> None:
    published(copy)
    assert TASKS["mis_easy"].load(copy)[0].concepts[0] is not None


def test_image_marks_in_a_published_question_place_the_images(tmp_path: Path) -> None:
    published(tmp_path, question="Take <image> and <image>!")
    content = TASKS["mis_easy"].load(tmp_path)[1].messages[0].content
    assert [part.type for part in content] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path2": "easy_image/9/object2.png"}, r"record 1 \(id 1\): image_path2: no file"),
        ({"image_path1": "../outside.png"}, "must be a relative path inside"),
        ({"image_path1": "/etc/passwd"}, "must be a relative path inside"),
        ({"question": "Use <image>."}, "1 <image> marks and the record has 2 images"),
        ({"question": " "}, "question is empty"),
        ({"category": None}, "record 1: category: Field required"),
        ({"id": 0}, "id '0' occurs twice"),
    ],
)
def test_bad_published_records_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published(tmp_path, **changes)
    with pytest.raises(UserError, match=f"mis_easy.json.*{message}"):
        TASKS["mis_easy"].load(tmp_path)


def test_a_cut_published_file_is_named_with_the_place(tmp_path: Path) -> None:
    path = published(tmp_path) / "mis_easy.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"mis_easy\.json:1: not valid JSON \(.*, column \d+\)"):
        TASKS["mis_easy"].load(tmp_path)


def test_a_cut_row_is_named_with_its_line(copy: Path) -> None:
    rows = copy / "rows.jsonl"
    rows.write_text(rows.read_text()[:-40])
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: not valid JSON"):
        TASKS["general"].load(copy)


def test_a_missing_image_is_named_with_its_row(copy: Path) -> None:
    sample = TASKS["mis_real"].load(copy)[0]
    sample.image_paths[0].unlink()
    with pytest.raises(UserError, match=f"row {sample.id}: image images/.* is missing"):
        TASKS["mis_real"].load(copy)


def test_a_row_with_too_few_marks_is_refused(copy: Path) -> None:
    rows = copy / "rows.jsonl"
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    easy = next(record for record in records if record["split"] == "easy")
    easy["messages"][0]["content"].pop(0)
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+.*1 image marks.*2 images"):
        TASKS["mis_easy"].load(copy)


def test_missing_splits_and_folders_say_what_to_do(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match=r"neither rows\.jsonl nor mis_easy\.json"):
        TASKS["mis_easy"].load(tmp_path)
    published(tmp_path)
    with pytest.raises(UserError, match=r"take 'twins' out of eval\.tasks"):
        TASKS["twins"].load(tmp_path)
    rows = copy / "rows.jsonl"
    rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines() if '"split":"real"' not in line))
    with pytest.raises(UserError, match="no rows of split 'real'"):
        TASKS["mis_real"].load(copy)


def test_task_names_are_checked() -> None:
    assert [task.name for task in find_tasks(("twins", "mis_hard"))] == ["twins", "mis_hard"]
    with pytest.raises(UserError, match="did you mean 'mis_hard'"):
        find_tasks(("mis_hrad",))
    with pytest.raises(UserError, match="twice"):
        find_tasks(("twins", "twins"))
    with pytest.raises(UserError, match="empty"):
        find_tasks(())


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("Cybercrime", "Cybercrimes"),
        ("Human Trafficking and Exploitation", "Human Trafficking"),
        ("illegal_activity", "Illegal Activity"),
        ("Self Harm", "Self-Harm"),
        ("Abuse and Physical Alterations", "Abuse and Physical Altercations"),
        ("Something  New", "Something New"),
    ],
)
def test_category_aliases(raw: str, name: str) -> None:
    assert canonical_category(raw) == name
