"""The general sets: MMStar, MMMU val, MuirBench and BLINK as TSV or Parquet; Q-Bench, MMT-Bench and MMBench as TSV."""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mirage.errors import UserError
from mirage.evals import conventions
from mirage.evals.conventions import Parser
from mirage.evals.judge import Verdict
from mirage.evals.task import Card, Metric, Sample
from mirage.evals.tasks.embedded import KeptPicture
from mirage.evals.tasks.multiple_choice import FIRST, METRICS, all_right, missing, with_groups
from mirage.evals.tasks.parquet import find_files, picture_of, read_records
from mirage.evals.tasks.question import (
    DIRECT,
    Question,
    answer_list,
    make_sample,
    muirbench_prompt,
    vlmevalkit_prompt,
)
from mirage.evals.tasks.tsv import TsvRow
from mirage.evals.tasks.tsv_task import CircularTsvTask, TsvTask, direct_prompt
from mirage.strict_json import JsonError, parse_literal

# MMMU's subjects by discipline (mmmu-benchmark.github.io; eval/data_utils.py of MMMU-Benchmark/MMMU).
MMMU_SUBJECTS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
BLINK_CONFIGS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip
# Keys of `Sample.meta`: the other half's id; whether the set has it.
COUNTERPART = "counterpart"
PAIRED = "paired"
_HUB = "huggingface.co/datasets/"
_MIRROR = "opencompass.openxlab.space/utils/"


class TsvOrParquetTask(TsvTask):
    """A set published both ways. The folder holds the TSV, or the Parquet files as the hub has them; not both."""

    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def parquet_files(self, folder: Path) -> list[tuple[str, Path]]:
        """(config, file) of the set, in order; nothing where none is there. Raises `UserError` where some are."""

    @abstractmethod
    def sample_of_record(self, record: dict[str, Any], *, config: str, where: str) -> Sample:
        """One Parquet row as a sample."""

    def files(self, folder: Path) -> list[Path]:
        found = super().files(folder)
        parquet = [path for _, path in self.parquet_files(folder)] if folder.is_dir() else []
        if found and parquet:
            raise UserError(
                f"task {self.name!r}: {folder} holds both {self.file} and Parquet files, whose prompts may differ; "
                "keep one of them"
            )
        return found or parquet

    def load(self, folder: Path) -> list[Sample]:
        if not self.files(folder):
            raise missing(self, folder, put=f"neither {self.file} nor the Parquet form")
        if super().files(folder):
            return super().load(folder)
        samples: dict[str, Sample] = {}
        for config, path in self.parquet_files(folder):
            for number, record in enumerate(read_records(path, columns=self.columns)):
                sample = self.sample_of_record(record, config=config, where=f"{path}: row {number}")
                if sample.id in samples:
                    raise UserError(f"{path}: row {number}: id {sample.id!r} occurs twice; ids must differ")
                samples[sample.id] = sample
        return list(samples.values())


class MMStarTask(TsvOrParquetTask):
    """MMStar. In Parquet the question holds its options ('Options: A: ..., B: ...'), and is asked as lmms-eval does."""

    columns = ("index", "question", "image", "answer", "category", "l2_category")

    def parquet_files(self, folder: Path) -> list[tuple[str, Path]]:
        found = find_files(folder, split="val") or find_files(folder, split="mmstar")
        return [("val", path) for path in found]

    def sample_of_record(self, record: dict[str, Any], *, config: str, where: str) -> Sample:
        text = str(record["question"]).strip()
        question = Question(
            id=str(record["index"]),
            where=where,
            text=text,
            pictures=_pictures([record["image"]], where=where),
            category=str(record["category"]),
            sub_category=str(record["l2_category"]),
            options=listed_options(text),
            answer=str(record["answer"]).strip(),
        )
        # lmms_eval/tasks/mmstar: no full stop at the end.
        return make_sample(question, f"{text}\n{DIRECT.rstrip('.')}")


class MMMUTask(TsvOrParquetTask):
    """MMMU's validation split: 30 subjects, pictures in the text, some open questions (scored by normalised match)."""

    official: Parser = staticmethod(conventions.mmmu)
    columns = ("id", "question", "options", "answer", "question_type", "image_1")

    def parquet_files(self, folder: Path) -> list[tuple[str, Path]]:
        subjects = [subject for group in MMMU_SUBJECTS.values() for subject in group]
        return _configs(self, folder, subjects, split="validation")

    def sample_of_record(self, record: dict[str, Any], *, config: str, where: str) -> Sample:
        options = _lettered(option_list(record["options"], where=where))
        open_question = record["question_type"] == "open"
        question = Question(
            id=str(record["id"]),
            where=where,
            text=str(record["question"]),
            pictures=_pictures([record.get(f"image_{k}") for k in range(1, 8)], where=where),
            category=next((name for name, group in MMMU_SUBJECTS.items() if config in group), config),
            sub_category=config,
            options={} if open_question else options,
            answer=None if open_question else str(record["answer"]).strip(),
            answers=answer_list(str(record["answer"])) if open_question else (),
        )
        return make_sample(question, vlmevalkit_prompt(question.text, question.options, hint=None))


class MuirBenchTask(TsvOrParquetTask):
    """MuirBench: several pictures in the text. Each answerable question has an unanswerable counterpart."""

    official: Parser = staticmethod(conventions.muirbench)
    metrics: ClassVar[tuple[Metric, ...]] = (
        *METRICS,
        Metric("pair", "higher", "a question and its unanswerable counterpart are both right"),
    )
    columns = ("idx", "task", "image_relation", "question", "options", "answer", "image_list", "counterpart_idx")

    def parquet_files(self, folder: Path) -> list[tuple[str, Path]]:
        return [("test", path) for path in find_files(folder, split="test")]

    def load(self, folder: Path) -> list[Sample]:
        samples = super().load(folder)
        pairs = _pairs({sample.id: sample.meta.get(COUNTERPART, "") for sample in samples})
        grouped = with_groups(samples, pairs)
        return [_with_meta(sample, PAIRED, "yes" if sample.id in pairs else "") for sample in grouped]

    def samples(self, rows: Sequence[TsvRow]) -> list[Sample]:
        named = {row.index: row for row in rows}
        found = []
        for sample in super().samples(rows):
            counterpart = _id_text(named[sample.id].cells.get("counterpart_idx"))
            found.append(_with_meta(sample, COUNTERPART, counterpart))
        return found

    def sample_of_record(self, record: dict[str, Any], *, config: str, where: str) -> Sample:
        question = Question(
            id=str(record["idx"]),
            where=where,
            text=str(record["question"]),
            pictures=_pictures(record["image_list"], where=where),
            category=str(record["task"]),
            sub_category=str(record["image_relation"]),
            options=_lettered(record["options"]),
            answer=str(record["answer"]).strip(),
        )
        sample = make_sample(question, muirbench_prompt(question.text, question.options))
        return _with_meta(sample, COUNTERPART, _id_text(record["counterpart_idx"]))

    def counts(self, metric: str, sample: Sample) -> bool:
        return metric != "pair" or (FIRST in sample.meta and PAIRED in sample.meta)

    def settle(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Verdict]:
        return all_right(samples, verdicts, names={"accuracy": "pair"}, size=2)


class BlinkTask(TsvOrParquetTask):
    """BLINK's validation split: 14 configs. In Parquet the published `prompt` is asked as it stands."""

    columns = ("idx", "choices", "answer", "prompt", "image_1")

    def parquet_files(self, folder: Path) -> list[tuple[str, Path]]:
        return _configs(self, folder, BLINK_CONFIGS, split="val")

    def sample_of_record(self, record: dict[str, Any], *, config: str, where: str) -> Sample:
        question = Question(
            id=str(record["idx"]),
            where=where,
            text=str(record["prompt"]),
            pictures=_pictures([record.get(f"image_{k}") for k in range(1, 5)], where=where),
            category=config,
            sub_category=config,
            options=_lettered(record["choices"]),
            answer=str(record["answer"]).strip().strip("()"),
        )
        return make_sample(question, question.text)


def _pairs(counterparts: Mapping[str, str]) -> dict[str, str]:
    """Id -> name of its pair. A question whose counterpart is absent, or is another's as well, is in no pair."""
    pairs = {frozenset((key, other)) for key, other in counterparts.items() if other in counterparts and other != key}
    uses = Counter(key for pair in pairs for key in pair)
    return {key: min(pair) for pair in pairs if all(uses[key] == 1 for key in pair) for key in pair}


def _id_text(value: object) -> str:
    """An id as text; tables that pass through pandas turn 12 into 12.0."""
    return "" if value is None else re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())


def _with_meta(sample: Sample, key: str, value: str) -> Sample:
    return replace(sample, meta={**sample.meta, key: value}) if value else sample


def _configs(task: TsvTask, folder: Path, configs: Sequence[str], *, split: str) -> list[tuple[str, Path]]:
    """(config, file) in the configs' order. Raises `UserError` naming the configs that are missing among others."""
    found = {config: find_files(folder, split=split, subfolder=config) for config in configs}
    absent = [config for config in configs if not found[config]]
    if len(absent) == len(configs):
        return []
    if absent:
        raise UserError(
            f"task {task.name!r}: {folder} has {len(configs) - len(absent)} of {len(configs)} configs; put "
            f"{absent[0]}/{split}-*.parquet there" + (f", and {', '.join(absent[1:])}" if absent[1:] else "")
        )
    return [(config, path) for config in configs for path in found[config]]


def _pictures(values: Sequence[Any], *, where: str) -> tuple[KeptPicture, ...]:
    kept = (picture_of(value, where=where) for value in values)
    return tuple(picture for picture in kept if picture is not None)


def _lettered(options: Sequence[str]) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, (str(option) for option in options), strict=False))


def option_list(options: Any, *, where: str) -> list[str]:
    """MMMU's options: a list, or the text of one."""
    if isinstance(options, list):
        return [str(option) for option in options]
    try:
        items = parse_literal(str(options))
    except JsonError as error:
        raise UserError(f"{where}: options are no list: {str(options)[:80]!r}") from error
    return [str(item) for item in items] if isinstance(items, list) else []


def listed_options(question: str) -> dict[str, str]:
    """The options inside a question ('... Options: A: a cat, B: a dog'); letters without texts where there are none.

    With unknown texts a reply is read by its letter alone.
    """
    tail = question.rpartition("Options:")[2] if "Options:" in question else ""
    marks = list(_option_marks(tail))
    if len(marks) < 2:
        return dict.fromkeys("ABCD", "")
    ends = [start for _, start, _ in marks[1:]] + [len(tail)]
    return {letter: tail[begin:end].strip().rstrip(",;").strip() for (letter, _, begin), end in zip(marks, ends)}


def _option_marks(tail: str) -> Iterator[tuple[str, int, int]]:
    """(letter, start of the mark, end of it) of A, B, C, ... in order, as long as the next letter is there."""
    position = 0
    for letter in string.ascii_uppercase:
        found = re.compile(rf"(?:^|[\s,;(]){letter}\)?\s*[:.)]\s*").search(tail, position)
        if not found:
            return
        yield letter, found.start(), found.end()
        position = found.end()


GENERAL_SETS: tuple[TsvTask, ...] = (
    MMStarTask(
        "mmstar",
        "general ability: 1,500 questions that need the picture",
        Card(
            "1,500 questions, one picture each",
            "not stated on its card",
            f"Put MMStar.tsv ({_MIRROR}VLMEval/MMStar.tsv), or mmstar.parquet of {_HUB}Lin-Chen/MMStar, into mmstar/.",
        ),
        home="mmstar",
        file="MMStar.tsv",
    ),
    MMMUTask(
        "mmmu_val",
        "general ability: college questions in 30 subjects, some with several pictures, some open",
        Card(
            "900 questions, validation split",
            "Apache-2.0",
            f"Put MMMU_DEV_VAL.tsv ({_MIRROR}VLMEval/MMMU_DEV_VAL.tsv), or the 30 folders of {_HUB}MMMU/MMMU "
            "(Accounting/validation-*.parquet, ...), into mmmu_val/.",
        ),
        home="mmmu_val",
        file="MMMU_DEV_VAL.tsv",
        split="validation",
    ),
    TsvTask(
        "qbench",
        "general ability: low-level vision (LLVisionQA test)",
        Card(
            "1,495 questions, one picture each",
            "as its card says (Q-Future/Q-Bench)",
            f"Put Q-Bench1_TEST.tsv ({_HUB}zhangzicheng/qbench_tsv) into qbench/.",
        ),
        home="qbench",
        file="Q-Bench1_TEST.tsv",
    ),
    MuirBenchTask(
        "muirbench",
        "general ability: several pictures in 12 tasks, each question with an unanswerable counterpart",
        Card(
            "2,600 questions, 11,264 pictures",
            "CC-BY-4.0",
            f"Put MUIRBench.tsv ({_MIRROR}VLMEval/MUIRBench.tsv), or data/test-*.parquet of "
            f"{_HUB}MUIRBENCH/MUIRBENCH, into muirbench/.",
        ),
        home="muirbench",
        file="MUIRBench.tsv",
        prompt=direct_prompt,
    ),
    TsvTask(
        "mmt_mi",
        "general ability: MMT-Bench validation, several pictures a question, options up to I",
        Card(
            "3,127 questions, validation split",
            "as its card says (OpenGVLab/MMT-Bench)",
            f"Put MMT-Bench_VAL_MI.tsv ({_MIRROR}MMT-Bench/MMT-Bench_VAL_MI.tsv) into mmt_mi/.",
        ),
        home="mmt_mi",
        file="MMT-Bench_VAL_MI.tsv",
    ),
    BlinkTask(
        "blink",
        "general ability: 14 visual tasks, up to four pictures",
        Card(
            "1,901 questions, validation split",
            "Apache-2.0",
            f"Put BLINK.tsv ({_MIRROR}VLMEval/BLINK.tsv), or the 14 folders of {_HUB}BLINK-Benchmark/BLINK "
            "(Counting/val-*.parquet, ...), into blink/.",
        ),
        home="blink",
        file="BLINK.tsv",
    ),
    CircularTsvTask(
        "mmbench",
        "general ability: MMBench, each question asked with its options rotated",
        Card(
            "1,164 questions, 4,329 with rotations (dev, English)",
            "Apache-2.0 (open-compass/MMBench)",
            f"Put MMBench_DEV_EN.tsv ({_MIRROR}MMBench/MMBench_DEV_EN.tsv) into mmbench/; other splits: tsv:NAME.",
        ),
        home="mmbench",
        file="MMBench_DEV_EN.tsv",
    ),
)
