"""Files of answers that other tools wrote: VLMEvalKit's tsv, xlsx and json, the MIS scripts' and lmms-eval's jsonl."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mirage.errors import UserError
from mirage.evals.task import Sample
from mirage.evals.tasks.tsv import MAX_CELL_CHARS
from mirage.safe_paths import open_regular
from mirage.strict_json import read_json, read_json_lines

Tool = Literal["vlmevalkit", "mis", "lmms-eval"]
# vlmeval/smp/file.py INFER_FAIL_MSG: stands in the cell where the model's answer never came.
VLMEVALKIT_FAILED = "Failed to obtain answer via API"
# Of an xlsx file; what openpyxl holds of it grows with it.
MAX_UNPACKED_BYTES = 256 * 1024**2
# The format's own limits. openpyxl fills a sheet up to the cell with the largest number, without end.
MAX_COLUMNS, MAX_ROWS = 16_384, 1_048_576
_MARK = re.compile(r"<image(?: \d+)?>")
# A record and where it stands.
_Record = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Prediction:
    """One answer of another tool; `failure` says why there is none. `question` None: the file does not hold it."""

    id: str
    text: str
    where: str
    failure: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class Predictions:
    """A file's answers by sample id."""

    path: Path
    tool: Tool
    by_id: Mapping[str, Prediction]


def read_predictions(path: Path, *, repeated: Literal["refuse", "first", "last"] = "refuse") -> Predictions:
    """The answers in a file, told by its ending and its keys.

    An id that is answered twice alike counts once; different answers are refused unless `repeated` says which one to
    take (the MIS scripts append to the file of an earlier run). Raises `UserError`.
    """
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if reader is None:
        raise UserError(f"{path}: a file of answers ends in {', '.join(_READERS)}; found {path.suffix or 'no ending'}")
    records = list(reader(path))
    if not records:
        raise UserError(f"{path} holds no answers")
    tool = _tool_of(records, path)
    found: dict[str, Prediction] = {}
    for number, (record, where) in enumerate(records):
        prediction = _MAKERS[tool](record, where, number)
        before = found.get(prediction.id)
        if before is not None and _same(before, prediction):
            continue
        if before is not None and repeated == "refuse":
            raise UserError(
                f"{where}: id {prediction.id!r} is answered again, and differently, after {before.where}; remove one "
                "run's lines, or write repeated=first or repeated=last"
            )
        if before is None or repeated == "last":
            found[prediction.id] = prediction
    return Predictions(path, tool, found)


def match_predictions(predictions: Predictions, samples: Sequence[Sample], *, task: str) -> dict[str, Prediction]:
    """The samples' answers by id; samples without one get a `Prediction` that says so.

    Raises `UserError` where no id is the task's, or an id is but its question is another one.
    """
    known = {sample.id: sample for sample in samples}
    if not known.keys() & predictions.by_id.keys():
        mine, theirs = next(iter(known)), next(iter(predictions.by_id))
        raise UserError(
            f"{predictions.path}: none of its {len(predictions.by_id)} ids is one of task {task!r} (the file has "
            f"{theirs!r}, the task {mine!r}); name the task whose questions were asked"
        )
    for key, sample in known.items():
        prediction = predictions.by_id.get(key)
        if prediction is not None and prediction.question is not None:
            _check_question(prediction, sample, task=task)
    absent = f"{predictions.path.name} holds no answer"
    return {
        key: predictions.by_id.get(key, Prediction(key, "", str(predictions.path), failure=absent)) for key in known
    }


def _check_question(prediction: Prediction, sample: Sample, *, task: str) -> None:
    asked = "".join(_MARK.sub("", prediction.question or "").split())
    if asked not in "".join(_MARK.sub("", sample.question).split()):
        raise UserError(
            f"{prediction.where}: the question of id {sample.id!r} is {(prediction.question or '')[:60]!r}, and task "
            f"{task!r} asks {sample.question[:60]!r}; name the task, or the data, whose questions were asked"
        )


def _same(one: Prediction, other: Prediction) -> bool:
    return (one.text, one.failure) == (other.text, other.failure)


# Files


def _tsv_records(path: Path) -> Iterator[_Record]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARS))
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t"), start=1):
                if None in row or None in row.values():
                    raise UserError(f"{path}: row {number}: the number of cells is not the header's")
                yield dict(row), f"{path}: row {number}"
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a tab-separated UTF-8 table: {error}") from error


def _xlsx_records(path: Path) -> Iterator[_Record]:
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"{path}: reading xlsx needs openpyxl: pip install 'mirage-vlm[xlsx]'; or have VLMEvalKit write "
            "PRED_FORMAT=tsv, which loses no cells"
        ) from error
    try:
        with open_regular(path) as file:
            _check_unpacked_size(file, path)
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).active
            sheet.reset_dimensions()
            names = next(sheet.iter_rows(max_row=1, max_col=MAX_COLUMNS, values_only=True), ())
            header = [str(name) for name in names[: _num_filled(names)]]
            rows = sheet.iter_rows(min_row=2, max_col=max(1, len(header)), values_only=True)
            for number, values in enumerate(rows, start=1):
                if number >= MAX_ROWS:
                    raise UserError(f"{path}: more than {MAX_ROWS:,} rows, more than the format has")
                if _num_filled(values):
                    yield dict(zip(header, values, strict=False)), f"{path}: row {number}"
    except UserError:
        raise
    except Exception as error:  # zip, XML and openpyxl raise many types on damaged files
        raise UserError(f"{path} cannot be read as xlsx ({str(error)[:100]})") from error


def _num_filled(cells: Sequence[Any]) -> int:
    """Cells up to the last one that holds something."""
    return max((number for number, value in enumerate(cells, start=1) if value is not None), default=0)


def _check_unpacked_size(file: BinaryIO, path: Path) -> None:
    # openpyxl holds the table of texts in memory; an archive never gives out more than the size it states.
    with zipfile.ZipFile(file) as archive:
        # zipfile makes room for what a part is said to take up in the file before it reads that.
        unpacked_bytes = sum(max(part.file_size, part.compress_size) for part in archive.infolist())
    if unpacked_bytes > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path}: {unpacked_bytes:,} bytes unpacked, at most {MAX_UNPACKED_BYTES:,} are read; write PRED_FORMAT=tsv"
        )


def _json_records(path: Path) -> Iterator[_Record]:
    value = read_json(path, remedy="write the file again")
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of records, found {type(value).__name__}")
    for number, record in enumerate(value):
        yield _object(record, f"{path}: record {number}"), f"{path}: record {number}"


def _jsonl_records(path: Path) -> Iterator[_Record]:
    for number, value in read_json_lines(path, remedy="a killed run leaves a cut line: remove it"):
        where = f"{path}: line {number}"
        yield _object(value, where), where


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


_READERS: dict[str, Callable[[Path], Iterator[_Record]]] = {
    ".tsv": _tsv_records,
    ".xlsx": _xlsx_records,
    ".json": _json_records,
    ".jsonl": _jsonl_records,
}


# Records


def _tool_of(records: Sequence[_Record], path: Path) -> Tool:
    keys = set(records[0][0])
    if {"index", "prediction"} <= keys:
        return "vlmevalkit"
    if "response" in keys and "question" in keys:
        return "mis"
    if keys & {"filtered_resps", "resps"}:
        return "lmms-eval"
    raise UserError(
        f"{path}: has the keys {', '.join(sorted(map(str, keys)))[:120]}; VLMEvalKit's predictions have index and "
        "prediction, the MIS scripts' responses question and response, lmms-eval's samples filtered_resps"
    )


def _vlmevalkit(record: dict[str, Any], where: str, number: int) -> Prediction:
    key = _id_of(record.get("index"), where)
    question = record.get("question")
    question = str(question) if question not in (None, "") else None
    value = record.get("prediction")
    if value is None:
        # An empty cell of xlsx is an empty answer or one that the format lost (open-compass/VLMEvalKit#1689).
        return Prediction(key, "", where, failure="the cell of the answer is empty", question=question)
    text = str(value)
    if VLMEVALKIT_FAILED in text:
        return Prediction(key, "", where, failure=f"VLMEvalKit wrote: {text[:80]}", question=question)
    return Prediction(key, text, where, question=question)


def _mis(record: dict[str, Any], where: str, number: int) -> Prediction:
    """A record of MIS_Test with `response` (DripNowhy/MIS evaluation/inference_vllm.py); without ids, the position."""
    response = record.get("response")
    if not isinstance(response, str):
        raise UserError(f"{where}: response must be text, found {response!r:.60}")
    if "question" not in record:
        raise UserError(f"{where}: has no question")
    key = _id_of(record["id"], where) if "id" in record else str(number)
    return Prediction(key, response, where, question=str(record["question"]))


def _lmms_eval(record: dict[str, Any], where: str, number: int) -> Prediction:
    doc = record.get("doc")
    if not isinstance(doc, dict) or "id" not in doc:
        raise UserError(f"{where}: doc.id is missing; log the samples of a task that `mirage export-task` wrote")
    value = record.get("filtered_resps", record.get("resps"))
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"{where}: one answer is needed, found {value!r:.60}")
    question = doc.get("question")
    return Prediction(_id_of(doc["id"], where), value, where, question=None if question is None else str(question))


_MAKERS: dict[Tool, Callable[[dict[str, Any], str, int], Prediction]] = {
    "vlmevalkit": _vlmevalkit,
    "mis": _mis,
    "lmms-eval": _lmms_eval,
}


def _id_of(value: Any, where: str) -> str:
    """An id as text; tables that pass through pandas or a spreadsheet turn 12 into 12.0."""
    if value is None or str(value).strip() == "":
        raise UserError(f"{where}: the id is empty")
    return re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())
