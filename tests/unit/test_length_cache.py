"""Lengths on disk: the same index with and without, known rows are not rendered, and nothing else is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data import length_cache, lengths, tensor_store
from mirage.data.length_cache import LengthCache, open_length_cache, rendering_key
from mirage.data.lengths import LengthIndex, index_rows
from mirage.data.row_list import DIGEST_BYTES, RowList
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.models.registry import load_adapter

SOURCES = (
    SourceConfig(split="train"),
    SourceConfig(split="train_twins", weight=2.0),
    SourceConfig(split="train_twins", pictures="one", name="one"),
)


class Counter:
    """Indexes a dataset folder and says which rows were rendered for it."""

    def __init__(self, tiny: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.adapter = folder, cache, load_adapter(tiny)
        self.rendered: list[str] = []
        render = lengths.render_text

        def counted(entry, adapter):  # type: ignore[no-untyped-def]
            self.rendered.append(entry.row.id)
            return render(entry, adapter)

        monkeypatch.setattr(lengths, "render_text", counted)

    def rows(self, **settings: object) -> RowList:
        return load_mixture(self.config(**settings), seed=0).rows

    def config(self, **settings: object) -> DataConfig:
        values = {"sources": SOURCES, "max_left_out": 99, **settings}
        return DataConfig(dir=self.folder, **values)  # type: ignore[arg-type]

    def index(self, *, cached: bool = True, **settings: object) -> LengthIndex:
        self.rendered.clear()
        cache = LengthCache(self.cache, self.adapter) if cached else None
        return index_rows(self.rows(**settings), self.adapter, self.config(**settings), cache=cache)[1]


@pytest.fixture
def counter(tiny_folders, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    # A chunk for each second row or so: 20 rows stand for thousands.
    monkeypatch.setattr(length_cache, "_CHUNK_MASK", 1)
    folder = Path(shutil.copytree(shapes, tmp_path / "data"))
    return Counter(tiny_folders["internvl"], folder, tmp_path / "lengths", monkeypatch)


def same(one: LengthIndex, other: LengthIndex) -> bool:
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in ("num_tokens", "num_image_tokens", "num_supervised_tokens", "weights")
    )


def edit(folder: Path, row_id: str, change: Callable[[list[dict]], object]) -> None:
    """Change the messages of a row; the other lines stay as they are."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    number = next(number for number, line in enumerate(lines) if json.loads(line)["id"] == row_id)
    record = json.loads(lines[number])
    change(record["messages"])
    lines[number] = json.dumps(record)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def lengthen(messages: list[dict]) -> None:
    messages[1]["content"][0]["text"] += " And keep it out of the rain, now and later."


def test_a_second_start_renders_nothing_and_has_the_same_index(counter: Counter) -> None:
    plain = counter.index(cached=False)
    assert len(counter.rendered) == len(plain) > 20
    assert same(counter.index(), plain) and len(counter.rendered) == len(plain)
    assert same(counter.index(), plain) and counter.rendered == []
    assert np.any(plain.weights == 2.0) and np.any(plain.weights == 1.0)


def test_a_changed_row_is_rendered_anew_and_far_ones_are_not(counter: Counter) -> None:
    counter.index()
    edit(counter.folder, counter.rows().row_id(0), lengthen)
    counter.index()
    rows, rendered = counter.rows(), list(counter.rendered)
    assert rows.row_id(0) in rendered and len(rendered) < len(rows) / 2
    assert same(counter.index(), counter.index(cached=False))


def test_a_row_under_another_view_is_another_row(counter: Counter) -> None:
    counter.index(sources=SOURCES[1:2])
    one = (SourceConfig(split="train_twins", pictures="none", weight=2.0),)
    seen = counter.index(sources=one)
    assert len(counter.rendered) == len(seen)
    assert same(seen, counter.index(cached=False, sources=one))


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of, whatever other tests have made of the loggers."""
    said: list[str] = []
    for module in (length_cache, tensor_store):
        monkeypatch.setattr(module.LOGGER, "warning", lambda text, *values: said.append(text % values))
    return said


def test_a_damaged_file_is_made_again(counter: Counter, warned: list[str]) -> None:
    plain = counter.index()
    files = sorted(counter.cache.glob("??/*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:-3])
    files[2].write_bytes(files[3].read_bytes())  # another chunk's numbers
    assert same(counter.index(), plain) and 3 <= len(counter.rendered) < len(plain)
    assert sum(text.endswith("is damaged and made again") for text in warned) == 3
    assert same(counter.index(), plain) and counter.rendered == []


def test_a_kill_loses_the_chunk_that_is_being_rendered(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    render = lengths.render_text

    def killed(entry, adapter):  # type: ignore[no-untyped-def]
        if len(counter.rendered) == 15:
            raise KeyboardInterrupt
        return render(entry, adapter)

    with monkeypatch.context() as patch:
        patch.setattr(lengths, "render_text", killed)
        with pytest.raises(KeyboardInterrupt):
            counter.index()
    longest = max(len(digests) // DIGEST_BYTES for _, digests in length_cache.chunks(counter.rows()))
    plain = counter.index()
    assert len(plain) - 15 <= len(counter.rendered) <= len(plain) - 15 + longest
    assert same(plain, counter.index(cached=False))


def test_what_cannot_be_rendered_keeps_its_message(counter: Counter) -> None:
    row_id = counter.rows(sources=SOURCES[1:2]).row_id(3)
    edit(counter.folder, row_id, list.pop)
    settings = {"sources": SOURCES[1:2], "on_bad_row": "skip"}
    first = counter.index(**settings)
    assert same(counter.index(**settings), first) and counter.rendered == [row_id]
    with pytest.raises(UserError, match="has no assistant text to learn"):
        counter.index(sources=SOURCES[1:2])


def test_the_key_changes_with_all_that_rendering_depends_on(tiny_folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter():  # type: ignore[no-untyped-def]
        return load_adapter(tiny_folders["internvl"])

    first = rendering_key(adapter())
    assert rendering_key(adapter()) == first != rendering_key(load_adapter(tiny_folders["qwen2_vl"]))
    changed = adapter()
    changed.spec = changed.spec.model_copy(update={"system_prompt": "Answer in one sentence."})
    assert rendering_key(changed) != first
    changed = adapter()
    changed.tokenizer.add_tokens(["a token of its own"])
    assert rendering_key(changed) != first
    changed = adapter()
    changed.config.downsample_ratio = 0.25
    assert rendering_key(changed) != first
    monkeypatch.setattr(length_cache.inspect, "getsource", lambda module: "other code")
    assert rendering_key(adapter()) != first


def test_no_cache_for_few_rows_or_where_it_cannot_be_written(
    tiny_folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    adapter = load_adapter(tiny_folders["internvl"])
    assert open_length_cache(adapter, 10) is None and open_length_cache(adapter, 10_000) is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "file"))
    assert open_length_cache(adapter, 10_000) is None
    assert len(warned) == 1 and "are not kept" in warned[0]
