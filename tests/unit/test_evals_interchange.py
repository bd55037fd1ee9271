"""Answers of other tools read and scored; tasks written for them, and read back equal."""

from __future__ import annotations

import base64
import contextlib
import csv
import importlib.util
import json
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import yaml
from PIL import Image

from mirage import cli
from mirage.config.schema import EvalConfig
from mirage.data.row import Message, TextPart
from mirage.errors import UserError
from mirage.evals.interchange import predictions
from mirage.evals.interchange.lmms_eval import write_folder
from mirage.evals.interchange.predictions import match_predictions, read_predictions
from mirage.evals.interchange.rescore import rescore
from mirage.evals.interchange.vlmevalkit import read_tsv, write_tsv
from mirage.evals.results import Results, read_results, read_samples
from mirage.evals.task import Sample
from mirage.evals.tasks import find_task
from mirage.files import file_sha256
from tests.support import general_benchmarks as sets
from tests.support.dataset import write_dataset

BENCHMARKS = Path(__file__).resolve().parents[1] / "fixtures" / "benchmarks"
CONFIG = EvalConfig(benchmarks_dir=BENCHMARKS)
REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))


def load(name: str, dataset: Path) -> list[Sample]:
    task = find_task(name)
    return task.load(task.folder(CONFIG, dataset))


def mis_folder(root: Path) -> Path:
    """A MIS_Test folder with three records, ids 0 to 2."""
    records = []
    for number in range(3):
        paths = {f"image_path{i}": f"easy_image/{number + 1}/object{i}.png" for i in (1, 2)}
        for path in paths.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(root / path)
        question = f"How do I join book club {number}?"
        records.append(
            {"id": number, "question": question, "category": "Violent", "sub_category": "Cybercrime", **paths}
        )
    (root / "mis_easy.json").write_text(json.dumps(records))
    return root


def mis_responses(root: Path, responses: Sequence[str], *, drop: str = "") -> Path:
    """What inference_vllm.py writes: each record with its response, one a line."""
    records = json.loads((root / "mis_easy.json").read_text())
    lines = [json.dumps({**record, "response": text}) for record, text in zip(records, responses, strict=False)]
    if drop:
        lines = [json.dumps({k: v for k, v in json.loads(line).items() if k != drop}) for line in lines]
    path = root / "qwen2_vl_7b.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def vlmevalkit_file(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Predictions as VLMEvalKit dumps them: every cell quoted in TSV, a list of records in JSON."""
    if path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=4))
        return path
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return path


def star_predictions(answers: Sequence[str]) -> list[dict[str, Any]]:
    rows = [{key: value for key, value in row.items() if key != "image"} for row in sets.mmstar_rows()]
    return [{**row, "prediction": answer} for row, answer in zip(rows, answers, strict=False)]


def score(path: Path, task: str, data_dir: Path, out: Path, **settings: Any) -> Results:
    results, folder = rescore(
        read_predictions(path), task=task, model="m", config=CONFIG, data_dir=data_dir, out_dir=out, **settings
    )
    assert folder == out and read_results(out) == results
    return results


# Answers of other tools


@pytest.mark.parametrize("ending", ["tsv", "json"])
def test_vlmevalkit_predictions(ending: str, tmp_path: Path, dataset: Path) -> None:
    answers = ["A", "The answer is B.", "I see a tree.", "Failed to obtain answer via API. "]
    path = vlmevalkit_file(tmp_path / f"Model_MMStar.{ending}", star_predictions(answers))
    result = score(path, "mmstar", dataset, tmp_path / "out").tasks["mmstar"]
    rates = {
        name: (result.rates[name].count, result.rates[name].n) for name in ("accuracy", "accuracy_strict", "no_option")
    }
    assert rates == {"accuracy": (2, 3), "accuracy_strict": (1, 3), "no_option": (1, 3)}
    assert result.num_unscored == 1 and not result.valid
    assert result.rates["accuracy"].bound_low == 50 and result.rates["accuracy"].bound_high == 75
    assert list(result.unscored_reasons) == ["no answer: VLMEvalKit wrote: Failed to obtain answer via API. "]
    rows = read_samples(tmp_path / "out")
    assert [row["verdict"] for row in rows] == ["right", "right", "no_option", "unscored"]


def test_an_answer_that_is_absent_is_unscored_and_an_empty_one_is_an_answer(tmp_path: Path, dataset: Path) -> None:
    path = vlmevalkit_file(tmp_path / "p.tsv", star_predictions(["A", ""]))
    result = score(path, "mmstar", dataset, tmp_path / "out").tasks["mmstar"]
    assert result.unscored_reasons == {"no answer: p.tsv holds no answer": 2}
    assert (result.rates["no_option"].count, result.rates["no_option"].n) == (1, 2)


def test_xlsx_predictions(tmp_path: Path, dataset: Path) -> None:
    book = openpyxl.Workbook()
    rows = star_predictions(["A", "B", "C", None])  # type: ignore[list-item]
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(tmp_path / "p.xlsx")
    result = score(tmp_path / "p.xlsx", "mmstar", dataset, tmp_path / "out").tasks["mmstar"]
    assert (result.rates["accuracy"].count, result.rates["accuracy"].n) == (3, 3)
    assert result.unscored_reasons == {"no answer: the cell of the answer is empty": 1}


def test_an_xlsx_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.xml", b" " * 60_000_000)
    assert (tmp_path / "p.xlsx").stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"p\.xlsx: 300,000,000 bytes unpacked, at most 268,435,456 are read"):
        read_predictions(tmp_path / "p.xlsx")


def xlsx_with(folder: Path, change: Callable[[str], str]) -> Path:
    """An xlsx file of one prediction whose sheet's XML is changed."""
    book = openpyxl.Workbook()
    book.active.append(["index", "prediction"])
    book.active.append([1, "A"])
    book.save(folder / "good.xlsx")
    with zipfile.ZipFile(folder / "good.xlsx") as good, zipfile.ZipFile(folder / "p.xlsx", "w") as archive:
        for name in good.namelist():
            text = good.read(name).decode()
            archive.writestr(name, change(text) if name.endswith("sheet1.xml") else text)
    return folder / "p.xlsx"


def test_entities_of_an_xlsx_are_not_unfolded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 1000}">' for n in range(9))
    path = xlsx_with(tmp_path, lambda text: f"<!DOCTYPE worksheet [{entities}]>" + text.replace("prediction", "&e8;"))
    with pytest.raises(UserError, match=r"p\.xlsx cannot be read as xlsx"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('ref="A1:B2"', 'ref="A1:ZZZZZZ99999999"'),
        ('r="B2"', 'r="ZZZZZZ2"'),
        ('r="B1"', 'r="ZZZZZZ1"'),
        ('<row r="2">', '<row r="999999999">'),
    ],
)
def test_an_xlsx_that_states_a_huge_sheet_takes_no_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    # A million empty rows take seconds.
    monkeypatch.setattr(predictions, "MAX_ROWS", 20_000)

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    path = xlsx_with(tmp_path, change)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            read_predictions(path)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024**2
    finally:
        tracemalloc.stop()


def test_a_part_of_an_xlsx_that_is_said_to_be_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = xlsx_with(tmp_path, lambda text: text)
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[0]
    content = path.read_bytes()
    place = content.index(b"PK\x01\x02") + 20
    assert int.from_bytes(content[place : place + 4], "little") == first.compress_size
    path.write_bytes(content[:place] + (2**30).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UserError, match=r"p\.xlsx: 1,073,7.* bytes unpacked"):
        read_predictions(path)


def test_xlsx_without_openpyxl_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "p.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"pip install 'mirage-vlm\[xlsx\]'; or have VLMEvalKit write PRED_FORMAT=tsv"):
        read_predictions(tmp_path / "p.xlsx")


@pytest.mark.parametrize("drop", ["", "id"])
def test_mis_responses(drop: str, tmp_path: Path) -> None:
    """Without ids, as the published card has it, a record's position stands for it."""
    folder = mis_folder(tmp_path / "mis")
    path = mis_responses(
        folder,
        [REFUSAL, "Sure, here's how to do it. First, walk to the library. Then ask for the list.", "…"],
        drop=drop,
    )
    results = score(path, "mis_easy", folder, tmp_path / "out")
    result = results.tasks["mis_easy"]
    assert [row["verdict"] for row in read_samples(tmp_path / "out")][:2] == ["rr", "asr"]
    assert result.num_samples == 3
    assert (results.decoding.model_dump()["tool"], results.decoding.model_dump()["file"]) == (
        "mis",
        "qwen2_vl_7b.jsonl",
    )


def test_lines_that_a_second_run_appended(tmp_path: Path) -> None:
    folder = mis_folder(tmp_path)
    path = mis_responses(folder, [REFUSAL] * 3)
    once = path.read_text()
    path.write_text(once + once)
    assert len(read_predictions(path).by_id) == 3
    path.write_text(once + once.replace("I can't", "I cannot"))
    with pytest.raises(UserError, match=r"line 4: id '0' is answered again, and differently, after .*line 1"):
        read_predictions(path)
    texts = {take: read_predictions(path, repeated=take).by_id["0"].text for take in ("first", "last")}  # type: ignore[arg-type]
    assert texts == {"first": REFUSAL, "last": REFUSAL.replace("I can't", "I cannot")}


def test_answers_to_other_questions_are_refused(tmp_path: Path, dataset: Path) -> None:
    path = vlmevalkit_file(tmp_path / "p.tsv", star_predictions(["A"] * 4))
    with pytest.raises(
        UserError, match=r"row 1: the question of id '0' is 'Which colour fills .*'qbench' asks 'Question: Is"
    ):
        match_predictions(read_predictions(path), load("qbench", dataset), task="qbench")
    with pytest.raises(UserError, match=r"none of its 4 ids is one of task 'mis_hard' \(the file has '0'"):
        match_predictions(read_predictions(path), load("mis_hard", dataset), task="mis_hard")


def test_answers_to_more_questions_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMMU_DEV_VAL's predictions hold the other split too."""
    rows = [{"index": i, "question": "", "prediction": "A"} for i in (1, 2, 3, 4)]
    path = vlmevalkit_file(tmp_path / "p.tsv", rows)
    out = f"out_dir={tmp_path / 'out'}"
    assert cli.dispatch(["rescore", str(path), "task=mmmu_val", f"benchmarks_dir={BENCHMARKS}", out]) == 0
    text = capsys.readouterr().out
    assert "1 answers of p.tsv are to questions that 'mmmu_val' does not ask" in text and "accuracy" in text
    monkeypatch.chdir(tmp_path)
    assert (
        cli.dispatch(["rescore", str(path), "task=mmmu_val", f"benchmarks_dir={BENCHMARKS}", "model=Some/Model"]) == 0
    )
    assert list((tmp_path / "runs" / "imported" / "Some-Model-mmmu_val").glob("*/results.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "ends in .tsv, .xlsx, .json, .jsonl; found .txt"),
        ("a.json", "{}", "expected a list of records, found dict"),
        ("a.json", "[1]", "record 0: must be a JSON object"),
        ("a.jsonl", '{"question": "q", "response": "r"}\n{"quest', "jsonl:2: not valid JSON"),
        ("a.jsonl", '{"question": "q", "response": null}', "response must be text, found None"),
        ("a.jsonl", '{"answer": "q"}', "VLMEvalKit's predictions have index and prediction"),
        ("a.jsonl", "", "holds no answers"),
        ("a.tsv", "index\tprediction\n\tA\n", "row 1: the id is empty"),
        ("a.tsv", "index\tprediction\n1\n", "row 1: the number of cells is not the header's"),
        ("a.jsonl", '{"doc_id": 0, "filtered_resps": ["A"]}', "doc.id is missing"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / name)


def test_two_models_are_compared_on_the_same_questions(tmp_path: Path, dataset: Path) -> None:
    first = vlmevalkit_file(tmp_path / "a.tsv", star_predictions(["A", "B", "A", "A"]))
    second = vlmevalkit_file(tmp_path / "b.tsv", star_predictions(["A", "B", "C", "A"]))
    score(first, "mmstar", dataset, tmp_path / "a")
    results = score(second, "mmstar", dataset, tmp_path / "b", baseline=tmp_path / "a")
    paired = results.tasks["mmstar"].comparison["accuracy"]
    assert (paired.num_pairs, paired.gained, paired.lost) == (4, 1, 0)


def test_a_finished_one_is_not_scored_again(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vlmevalkit_file(tmp_path / "a.tsv", star_predictions(["A"] * 4))
    before = score(path, "mmstar", dataset, tmp_path / "a")
    monkeypatch.setattr("mirage.evals.interchange.rescore.score_all", None)
    assert score(path, "mmstar", dataset, tmp_path / "a") == before
    vlmevalkit_file(path, star_predictions(["B"] * 4))
    with pytest.raises(TypeError):
        score(path, "mmstar", dataset, tmp_path / "a")


# Tasks for other tools


def comparable(samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    """Samples without the places of their pictures; pictures by content."""
    return [
        (replace(sample, image_paths=(), image_sha256=()), [file_sha256(path) for path in sample.image_paths])
        for sample in samples
    ]


@pytest.mark.parametrize(
    "name", ["mis_hard", "twins", "general", "mmmu_val", "muirbench", "mmbench", "tsv:Own_Questions"]
)
def test_an_exported_tsv_reads_back_equal(name: str, tmp_path: Path, dataset: Path) -> None:
    samples = load(name, dataset)
    path = tmp_path / "Exported.tsv"
    assert write_tsv(samples, path, task=name) == len(samples)
    assert comparable(read_tsv(path)) == comparable(samples)
    again = tmp_path / "again.tsv"
    write_tsv(read_tsv(path), again, task=name)
    assert again.read_bytes() == path.read_bytes()


def test_an_exported_choice_task_is_a_tsv_task(tmp_path: Path, dataset: Path) -> None:
    samples = load("general", dataset)
    write_tsv(samples, tmp_path / "General.tsv", task="general")
    assert comparable(find_task("tsv:General").load(tmp_path)) == comparable(samples)
    write_tsv(load("mis_hard", dataset), tmp_path / "Risky.tsv", task="mis_hard")
    with pytest.raises(UserError, match=r"neither options nor an answer, .*mirage rescore FILE"):
        find_task("tsv:Risky").load(tmp_path)


def test_exported_columns_are_vlmevalkits(tmp_path: Path, dataset: Path) -> None:
    write_tsv(load("mmmu_val", dataset), tmp_path / "x.tsv", task="mmmu_val")
    csv.field_size_limit(1 << 30)
    with (tmp_path / "x.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0])[:5] == ["index", "image", "question", "A", "B"]
    assert rows[0]["question"].startswith("Question: Is <image 1> warmer than <image 2>?")
    assert len(json.loads(rows[0]["image"])) == 2 and base64.b64decode(rows[1]["image"]) == sets.picture("green")
    assert [row["answer"] for row in rows] == ["A", '["4", "four"]', "B"]
    write_tsv(load("mis_hard", dataset), tmp_path / "y.tsv", task="mis_hard")
    with (tmp_path / "y.tsv").open(newline="") as file:
        risky = next(csv.DictReader(file, delimiter="\t"))
    assert risky["question"] == load("mis_hard", dataset)[0].question and "A" not in risky


def test_damaged_exports_are_named(tmp_path: Path, dataset: Path) -> None:
    path = tmp_path / "x.tsv"
    write_tsv(load("general", dataset)[:1], path, task="general")
    path.write_text(path.read_text().replace("messages", "massages"))
    with pytest.raises(UserError, match="column mirage is damaged"):
        read_tsv(path)
    with pytest.raises(UserError, match="no column mirage"):
        read_tsv(BENCHMARKS / "mmstar" / "MMStar.tsv")


def test_questions_of_several_turns_are_refused(tmp_path: Path, dataset: Path) -> None:
    (sample, *_) = load("mis_hard@safety_prompt", dataset)
    with pytest.raises(UserError, match="has 2 turns, or a system turn"):
        write_tsv([sample], tmp_path / "x.tsv", task="t")
    answer = Message(role="assistant", content=(TextPart(text="Hi"),))
    with pytest.raises(UserError, match="has 2 turns"):
        write_folder(
            find_task("mis_hard"),
            [replace(sample, messages=(*sample.messages[1:], answer))],
            tmp_path,
            max_new_tokens=8,
        )


class _Loader(yaml.SafeLoader):
    """YAML with lmms-eval's !function."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("name", ["mis_hard@drop1", "muirbench", "mmmu_val"])
def test_an_exported_folder_is_lmms_evals(name: str, tmp_path: Path, dataset: Path) -> None:
    import datasets

    samples = load(name, dataset)
    task_name = write_folder(find_task(name), samples, tmp_path, max_new_tokens=64)
    settings = yaml.load((tmp_path / f"{task_name}.yaml").read_text(), Loader=_Loader)
    assert settings["task"] == task_name and settings["generation_kwargs"]["max_new_tokens"] == 64
    files = {key: str(tmp_path / value) for key, value in settings["dataset_kwargs"]["data_files"].items()}
    docs = datasets.load_dataset(settings["dataset_path"], data_files=files, cache_dir=str(tmp_path / "hf"))["test"]
    functions = _functions(tmp_path / "utils.py")
    for doc, sample in zip(docs, samples, strict=True):
        (message,) = functions.doc_to_messages(doc)
        shown = [
            part["text"] if part["type"] == "text" else part["url"].size + part["url"].getpixel((0, 0))
            for part in message["content"]
        ]
        expected = []
        for part in sample.messages[0].content:
            if isinstance(part, TextPart):
                expected.append(part.text)
            else:
                with Image.open(sample.image_paths[part.index]) as image:
                    expected.append(image.size + image.convert("RGB").getpixel((0, 0)))  # type: ignore[operator]
        assert shown == expected
        scores = functions.process_results(doc, [f"({doc['answer']}) is right" if doc["letters"] else "Yes."])
        assert scores == ({"answered": 1, "accuracy": 1} if sample.choice else {"answered": 1})
    metrics = [item["metric"] for item in settings["metric_list"]]
    assert metrics == (["accuracy", "answered"] if samples[0].choice else ["answered"])
    for key in ("doc_to_visual", "doc_to_text", "doc_to_messages", "doc_to_target", "process_results"):
        assert callable(getattr(functions, settings[key].removeprefix("utils.")))


def _functions(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_functions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lmms_evals_samples_come_back(tmp_path: Path, dataset: Path) -> None:
    docs = [
        {"doc_id": n, "doc": {"id": s.id}, "filtered_resps": [REFUSAL]} for n, s in enumerate(load("mis_hard", dataset))
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    result = score(path, "mis_hard", dataset, tmp_path / "out").tasks["mis_hard"]
    assert result.rates["rr"].percent == 100


def test_the_command_exports_and_says_what_to_do(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export-task", "mis_hard", str(tmp_path / "v"), f"data_dir={dataset}", "max_samples=2"]
    assert cli.dispatch([*args, "format=vlmevalkit"]) == 0
    assert len(read_tsv(tmp_path / "v" / "mis_hard.tsv")) == 2
    assert "mirage rescore FILE task=mis_hard" in capsys.readouterr().out
    assert cli.dispatch([*args, "format=lmms-eval"]) == 0
    assert "--tasks mirage_mis_hard" in capsys.readouterr().out
    with pytest.raises(UserError, match="where NAME is vlmevalkit or lmms-eval"):
        cli.dispatch(args)
    with pytest.raises(UserError, match="rescore takes one FILE"):
        cli.dispatch(["rescore", "x.tsv"])
    with pytest.raises(UserError, match="repeated=both"):
        cli.dispatch(["rescore", "x.tsv", "task=mmstar", "repeated=both"])
