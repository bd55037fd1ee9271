"""MOSSBench: harmless requests about pictures that look alarming; what a model refuses there is over-refusal.

Format checked against `data/images_information/information.json` and `data/images/` of github.com/xirui-li/MOSSBench
(300 rows). The hub's AIcell/MOSSBench (Parquet, config oversensitivity, picture in `decoded_image`) is read as the
repository's README describes it; its files were not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mirage.errors import UserError
from mirage.evals.rubrics.mossbench import MOSSBENCH
from mirage.evals.task import Card, Metric, Sample
from mirage.evals.tasks import parquet, published
from mirage.evals.tasks.labelled import LabelTask
from mirage.evals.tasks.published import Record

_FILES = ("data/images_information/information.json", "images_information/information.json", "information.json")
# The three kinds of stimulus in the order of the README.
_TYPES = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}


class MossBenchTask(LabelTask):
    """All rows. An empty answer is a refusal, as published: it does not do what was asked."""

    name = "mossbench"
    description = "MOSSBench: harmless requests about pictures that look alarming"
    home: ClassVar[str | None] = "mossbench"
    card = Card(
        size="300 (3 kinds of stimulus of 100)",
        licence="CC BY-SA 4.0, for tests only",
        source="mossbench/ below eval.benchmarks_dir is a clone of github.com/xirui-li/MOSSBench: "
        "data/images_information/information.json and data/images/; or AIcell/MOSSBench of the Hugging Face hub "
        "(Parquet)",
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("refused", "lower", "over-refusal: the answer declines a harmless request"),
    )
    rubric = MOSSBENCH
    rubrics = (MOSSBENCH,)
    events: ClassVar = {"refused": ("refused",), "complied": ()}
    empty_label: ClassVar[str | None] = "refused"

    def files(self, folder: Path) -> list[Path]:
        found = published.present_file(folder, _FILES)
        return [found] if found is not None else _parquet_files(folder)

    def read(self, folder: Path) -> Iterator[tuple[str, Sample]]:
        files = self.files(folder)
        if files and files[0].suffix == ".parquet":
            for path in files:
                for record in published.parquet_records(path, columns=("question", "pid", "metadata")):
                    image = published.picture_bytes(record, "decoded_image", "image")
                    if image is None:
                        raise UserError(f"{record.where}: neither 'decoded_image' nor 'image' holds a picture")
                    yield record.where, _sample(record, record.text("pid"), image)
            return
        path = published.find_file(folder, _FILES, task=self.name, source=self.card.source)
        for record in published.json_records(published.read_json(path), where=str(path)):
            image = published.picture_file(
                record,
                record.text("image"),
                key="image",
                roots=[path.parent.parent, path.parent, path.parent.parent / "images", path.parent / "images"],
                hint="copy data/images/ of the repository too",
            )
            yield record.where, _sample(record, record.text("pid", "_key"), image)


def _parquet_files(folder: Path) -> list[Path]:
    for split in ("train", "test"):
        for subfolder in ("", "oversensitivity"):
            found = parquet.find_files(folder, split=split, subfolder=subfolder)
            if found:
                return found
    return []


def _sample(record: Record, identity: str, image: Path) -> Sample:
    metadata: Any = record.value.get("metadata")
    over = metadata.get("over") if isinstance(metadata, dict) else None
    if not isinstance(over, str) or over not in _TYPES:
        raise UserError(f"{record.where}: 'metadata.over' must be one of {', '.join(_TYPES)}, found {over!r:.80}")
    return published.make_sample(
        identity, record.text("question"), [image], category=_TYPES[over], sub_category=over, decision="help"
    )
