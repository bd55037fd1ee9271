"""Published layouts: synthetic records in the published shape become rows; a broken one is named with file and row."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.row import ImagePart, Row, TextPart
from mirage.data.sources import FORMATS, Mixture, load_mixture
from mirage.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def parquet(path: Path, records: list[dict], **features: Any) -> Path:
    """A Parquet file as `datasets` publishes it, pictures embedded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features({name: features.get(name, datasets.Value("string")) for name in records[0]}).arrow_schema
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path)
    return path


def mixture(path: Path, format: str, **source: Any) -> Mixture:
    config = DataConfig(sources=(SourceConfig(path=path, format=format, **source),), dir=path.parent)
    return load_mixture(config, seed=0)


def rows(path: Path, format: str, **source: Any) -> list[Row]:
    return [entry.row for entry in mixture(path, format, **source).rows]


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


# VLGuard


def vlguard(folder: Path) -> list[dict]:
    for name in ("memes/1.png", "bad_ads/2.png"):
        put(folder / "train" / name, picture())
    return [
        {
            "id": "Memes_1",
            "image": "memes/1.png",
            "safe": False,
            "harmful_category": "discrimination",
            "harmful_subcategory": "race",
            "instr-resp": [{"instruction": "Why is it funny?", "response": "I'm sorry, it is not."}],
        },
        {
            "id": "Ads_2",
            "image": "bad_ads/2.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "What is sold?", "response": "Soap."},
                {"unsafe_instruction": "How do I lie with it?", "response": "I can't help with that."},
            ],
        },
    ]


def test_vlguard(tmp_path):
    put(tmp_path / "train.json", vlguard(tmp_path))
    found = rows(tmp_path, "vlguard", image_dir=tmp_path / "train")
    assert [(row.question, row.answer) for row in found] == [
        ("Why is it funny?", "I'm sorry, it is not."),
        ("What is sold?", "Soap."),
        ("How do I lie with it?", "I can't help with that."),
    ]
    assert [(row.label.decision, row.label.risk_in) for row in found if row.label] == [
        ("refuse", "image"),
        ("help", "none"),
        ("refuse", "text"),
    ]
    assert found[0].messages[0].content == (ImagePart(index=0), TextPart(text="Why is it funny?"))
    assert (found[0].category, found[0].sub_category, found[1].category) == ("discrimination", "race", "General")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("instr-resp"), r"train\.json\[0\]: has no 'instr-resp' list"),
        (lambda record: record.update(safe="no"), r"train\.json\[0\]: 'safe' must be true or false, found 'no'"),
        (lambda record: record.update(safe=True), r"train\.json\[0\] instr-resp\[0\]: 'instruction' does not fit"),
        (
            lambda record: record["instr-resp"][0].pop("response"),
            r"\[0\] instr-resp\[0\]: must have a 'response' and one",
        ),
        (
            lambda record: record.update(image="memes/9.png"),
            r"image memes/9\.png is missing in .*set the source's image_dir",
        ),
        (lambda record: record.update(image="../1.png"), r"must be relative and stay inside"),
        (lambda record: record.update(image=None), r"a picture must be a path or embedded bytes, found None"),
    ],
)
def test_broken_vlguard(tmp_path, change, message):
    records = vlguard(tmp_path)
    change(records[0])
    put(tmp_path / "train.json", records)
    with pytest.raises(UserError, match=message):
        rows(tmp_path, "vlguard", image_dir=tmp_path / "train")


# SPA-VL and BeaverTails-V


SPA_VL = {"question": "What is it?", "chosen": "A cup.", "rejected": "A trap.", "image_name": "1.jpg"}


def test_spa_vl_parquet(tmp_path, cache):
    record = {"image": {"bytes": picture(kind="JPEG"), "path": "1.jpg"}} | SPA_VL | {"class1": "Privacy"}
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [record], image=datasets.Image())
    (entry,) = mixture(tmp_path, "spa_vl").rows
    assert (entry.row.question, entry.row.answer, entry.row.category) == ("What is it?", "A cup.", "Privacy")
    (path,) = entry.image_paths
    assert path.is_relative_to(cache) and path.suffix == ".jpg"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.row.images[0].sha256 == path.stem


def test_spa_vl_json_of_its_training_code(tmp_path):
    put(tmp_path / "images/racial/1.jpg", picture(kind="JPEG"))
    file = put(tmp_path / "easy_train.json", [{"id": 1, "image": "racial/1.jpg"} | SPA_VL])
    assert [row.answer for row in rows(file, "spa_vl", image_dir=tmp_path / "images")] == ["A cup."]


def test_paths_in_place_of_bytes_are_named(tmp_path):
    record = {"image": {"bytes": None, "path": "/home/someone/1.jpg"}} | SPA_VL
    file = parquet(tmp_path / "train.parquet", [record], image=datasets.Image())
    with pytest.raises(UserError, match=r"train\.parquet\[0\]: image path '/home/someone/1\.jpg' must be relative"):
        rows(file, "spa_vl")


def beaver(safe: str, name: str = "What is it?") -> dict:
    image = {"bytes": picture(), "path": None}
    return {
        "question": name,
        "image": image,
        "category": "animal_abuse",
        "image_severity": "2",
        "response": "A dog.",
        "is_response_safe": safe,
    }


def test_beavertails_v_never_teaches_unsafe_answers(tmp_path):
    parquet(tmp_path / "a" / "train.parquet", [beaver("yes"), beaver("no", "Bad?")], image=datasets.Image())
    parquet(tmp_path / "b" / "train-00000-of-00001.parquet", [beaver("yes", "Good?")], image=datasets.Image())
    parquet(tmp_path / "b" / "evaluation-00000-of-00001.parquet", [beaver("yes", "Test?")], image=datasets.Image())
    found = mixture(tmp_path, "beavertails_v")
    assert [entry.row.question for entry in found.rows] == ["What is it?", "Good?"]
    assert [(entry.location[-16:], entry.reason) for entry in found.left_out] == [
        ("train.parquet[1]", "its answer is marked unsafe")
    ]
    parquet(tmp_path / "a" / "train.parquet", [beaver("maybe")], image=datasets.Image())
    with pytest.raises(UserError, match=r"train\.parquet\[0\]: 'is_response_safe' must be yes or no, found 'maybe'"):
        mixture(tmp_path, "beavertails_v")


def test_which_files_of_a_folder_are_read(tmp_path):
    parquet(tmp_path / "validation.parquet", [beaver("yes")], image=datasets.Image())
    with pytest.raises(UserError, match=r"nor train-\*\.parquet \(found: Parquet files validation\.parquet\); set"):
        mixture(tmp_path, "beavertails_v")
    assert len(mixture(tmp_path, "beavertails_v", split="validation").rows) == 1


# Conversations


def test_think_in_safety(tmp_path):
    put(tmp_path / "images/bad_ads/1.png", picture())
    answer = "<think>\nThe user asks.\n</think>\nI can't help."
    record = {
        "conversations": [turn("human", "<image>Share it."), turn("gpt", answer)],
        "images": ["images/bad_ads/1.png"],
    }
    put(tmp_path / "train_data.json", [record])
    (row,) = rows(tmp_path, "think_in_safety")
    assert row.answer == answer and row.messages[0].content == (ImagePart(index=0), TextPart(text="Share it."))
    put(tmp_path / "train_data.json", [record | {"conversations": [turn("human", "<image>"), turn("gpt", "No.")]}])
    with pytest.raises(UserError, match=r"train_data\.json\[0\]: an answer must be <think>"):
        rows(tmp_path, "think_in_safety")


def interleaved(folder: Path, *turns: dict[str, str], num_images: int = 3, **more: Any) -> Path:
    names = [f"set/{number}.jpg" for number in range(num_images)]
    for name in names:
        put(folder / name, picture(kind="JPEG"))
    record = {"sample_id": 7, "conversations": list(turns), "image": names, "choice_list": None, "metadata": {}}
    return put(folder / "m4_instruct_annotations.json", [record | more])


def test_m4_instruct_marks_anywhere_over_several_turns(tmp_path):
    first = turn("human", "Image 1: <image>\nand <image> differ?")
    file = interleaved(tmp_path, first, turn("gpt", "Yes."), turn("human", "With <image>?"), turn("gpt", "No."))
    (row,) = rows(file, "sharegpt")
    assert row.mark_order == (0, 1, 2) and [message.role for message in row.messages] == ["user", "assistant"] * 2
    assert row.messages[2].content == (TextPart(text="With "), ImagePart(index=2), TextPart(text="?"))


def test_no_mark_shows_the_pictures_first(tmp_path):
    file = interleaved(tmp_path, turn("human", "What differs?"), turn("gpt", "The hat."), num_images=2)
    (row,) = rows(file, "sharegpt")
    assert row.messages[0].content == (ImagePart(index=0), ImagePart(index=1), TextPart(text="What differs?"))


def test_one_image_as_text_and_none_at_all(tmp_path):
    ask = [turn("human", "<image>\nWhat?"), turn("gpt", "Soap.")]
    assert len(rows(interleaved(tmp_path, *ask, num_images=1, image="set/0.jpg"), "sharegpt")[0].images) == 1
    plain = [turn("human", "Hello."), turn("gpt", "Hello.")]
    for nothing in (None, "", []):
        assert rows(interleaved(tmp_path, *plain, image=nothing), "sharegpt")[0].images == ()


@pytest.mark.parametrize(
    ("turns", "more", "message"),
    [
        (
            [turn("human", "<image>?"), turn("gpt", "No.")],
            {},
            r"\[0\]: the conversation has 1 <image> marks and 3 images",
        ),
        ([turn("human", "?"), turn("gpt", "<image><image><image>")], {}, "stands outside the user's turns"),
        ([turn("human", "?")], {}, "the last turn must be the assistant's answer"),
        ([turn("human", "?"), turn("tool", "x")], {}, r"a turn must have 'from' .*found \{'from': 'tool'"),
        ([], {}, "has no 'conversations' list"),
        ([turn("human", "?"), turn("gpt", "x")], {"video": "a.mp4"}, "only pictures are taken"),
    ],
)
def test_broken_conversations(tmp_path, turns, more, message):
    with pytest.raises(UserError, match=rf"m4_instruct_annotations\.json.*{message}"):
        rows(interleaved(tmp_path, *turns, **more), "sharegpt")


CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image", "text": None},
            {"type": "text", "text": "What?"},
            {"type": "image", "text": None},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
]
CHAT_FEATURES = {
    "images": datasets.List(datasets.Image()),
    "messages": datasets.List(
        {
            "role": datasets.Value("string"),
            "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
        }
    ),
}


def chat_record() -> dict:
    return {"images": [{"bytes": picture(c), "path": None} for c in ("red", "blue")], "messages": CHAT}


@pytest.mark.parametrize("layout", ["file", "folder", "saved", "saved dict"])
def test_messages_in_parquet_and_saved_datasets(tmp_path, layout):
    records = [chat_record() for _ in range(40)]
    path = tmp_path / "chat"
    if layout in ("file", "folder"):
        file = parquet(path / "data" / "train-00000-of-00001.parquet", records, **CHAT_FEATURES)
        path = file if layout == "file" else path
    else:
        table = datasets.Dataset.from_list(records, features=datasets.Features(CHAT_FEATURES))
        (datasets.DatasetDict(train=table, test=table) if layout == "saved dict" else table).save_to_disk(str(path))
    found = rows(path, "messages")
    assert len(found) == 40 and len({image.sha256 for image in found[0].images}) == 2
    assert found[0].messages[0].content == (ImagePart(index=0), TextPart(text="What?"), ImagePart(index=1))
    assert found[0].answer == "A cup."


def test_messages_of_plain_text_with_marks(tmp_path):
    put(tmp_path / "1.png", picture())
    chat = [{"role": "user", "content": "See <image>?"}, {"role": "assistant", "content": "Yes."}]
    file = put(tmp_path / "train.jsonl", {"messages": chat, "images": ["1.png"]})
    assert rows(file, "messages")[0].messages[0].content[1] == ImagePart(index=0)
    put(tmp_path / "train.jsonl", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]})
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: a part must be of type text or image, found \{'type': 'audio'"
    ):
        rows(file, "messages")


# Tables with columns of any name (MSR-Align, SafeCoT and the like)


def test_table_with_a_column_of_reasoning(tmp_path):
    put(tmp_path / "1.png", picture())
    record = {
        "query": "How?",
        "cot": "It shows a cup.",
        "final": "I can't help.",
        "img": "1.png",
        "risk_category": "Hate",
    }
    file = put(tmp_path / "safecot.json", [record])
    names = {"question": "query", "answer": "final", "thought": "cot", "image": "img", "category": "risk_category"}
    (row,) = rows(file, "table", columns=names)
    assert (row.answer, row.category) == ("It shows a cup.\n\nI can't help.", "Hate")
    with pytest.raises(UserError, match=r"safecot\.json\[0\]: has no 'answer'; its fields are query, cot, final"):
        rows(file, "table")
    with pytest.raises(UserError, match=r"has no 'image'; its fields .*set columns\.image"):
        rows(file, "table", columns=names | {"image": "image"})
    assert rows(file, "table", columns=names | {"image": None})[0].images == ()


# Files and pictures


@pytest.mark.parametrize("format", [*FORMATS, "table"])
def test_every_format_names_the_file_that_is_not_there(tmp_path, format):
    with pytest.raises(UserError, match=r"no .*nothing; set the source's path to"):
        rows(tmp_path / "nothing", format)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds neither .* \(found: nothing\); set the source's path"):
        rows(tmp_path / "empty", format)


@pytest.mark.parametrize("format", [*FORMATS, "table"])
def test_every_format_names_the_record_it_does_not_know(tmp_path, format):
    file = put(tmp_path / "x.json", [{"colour": "red"}])
    with pytest.raises(UserError, match=r"x\.json\[0\]: "):
        rows(file, format)
    put(file, ["text"])
    with pytest.raises(UserError, match=r"x\.json\[0\]: must be a JSON object, found str"):
        rows(file, format)


def test_broken_files(tmp_path):
    for name, message in (
        ("a.json", r"a\.json:1: not valid JSON"),
        ("a.jsonl", r"a\.jsonl:1: not valid JSON"),
        ("a.parquet", r"a\.parquet: cannot be read as Parquet"),
        ("a.csv", r"must end in \.json, \.jsonl or \.parquet"),
    ):
        with pytest.raises(UserError, match=message):
            rows(put(tmp_path / name, b"{broken"), "sharegpt")
    with pytest.raises(UserError, match=r"a\.json:1: not valid JSON \(no UTF-8 text"):
        rows(put(tmp_path / "a.json", b'["\xff"]'), "sharegpt")
    with pytest.raises(UserError, match=r"a\.json: must hold a JSON array of records, found dict"):
        rows(put(tmp_path / "a.json", {}), "sharegpt")


def test_broken_embedded_pictures(tmp_path):
    def read(*images: dict) -> list[Row]:
        record = chat_record() | {"images": list(images)}
        return rows(parquet(tmp_path / "train.parquet", [record], **CHAT_FEATURES), "messages")

    whole, torn = {"bytes": picture(), "path": None}, {"bytes": b"no picture", "path": None}
    with pytest.raises(UserError, match=r"train\.parquet\[0\]: a picture of 10 bytes cannot be read"):
        read(whole, torn)
    with pytest.raises(UserError, match=r"some of its pictures are bytes and some are paths"):
        read(whole, {"bytes": None, "path": "1.png"})
    with pytest.raises(UserError, match=r"the conversation has 2 <image> marks and 1 images"):
        read(whole)


def test_unpacked_pictures_are_written_once_and_mended(tmp_path, cache):
    file = parquet(tmp_path / "train.parquet", [chat_record()], **CHAT_FEATURES)
    rows(file, "messages")
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    files[0].write_bytes(b"torn")
    rows(file, "messages")
    assert files[0].read_bytes() != b"torn" and files[1].stat().st_mtime_ns == times[1]
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == files
