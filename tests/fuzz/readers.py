"""Every reader of outside bytes: a good document for each, how it is read, and what an accepted one must satisfy."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirage.data.row import Row, canonical_json, dump_row
from tests.fuzz.mutate import Kind

BENCHMARKS = Path(__file__).resolve().parents[1] / "fixtures" / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader. `make(folder)` writes a good folder; `file` in it is damaged; `read(folder)` reads and checks."""

    name: str
    kind: Kind
    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    names_file: bool = True
    """Whether a refusal must name the file (or the folder): not for texts that come over the network."""
    refusals: tuple[type[Exception], ...] = ()
    """What the reader may raise besides UserError, where its caller makes one message or an unscored answer of it."""


READERS: dict[str, Reader] = {}


def _add(
    name: str, kind: Kind, file: str, make: Callable[[Path], Any], read: Callable[[Path], Any], **options: Any
) -> None:
    assert name not in READERS, name
    READERS[name] = Reader(name, kind, file, make, read, **options)


def _put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _picture(colour: str = "red", size: tuple[int, int] = (12, 9), kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def _hazards(folder: Path) -> None:
    """What damaged paths may lead to: a link out of the folder, a link in a circle, a pipe without a writer."""
    folder.mkdir(parents=True, exist_ok=True)
    outside = folder.parent / "outside.png"
    outside.write_bytes(_picture("blue"))
    (folder / "outside.png").symlink_to(outside)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")


def _plain(value: Any) -> None:
    """The contract of all that is kept: it can be written as JSON in UTF-8, with finite numbers."""
    canonical_json(value).encode("utf-8")


# Training data


def _dataset(folder: Path) -> None:
    from tests.support.dataset import write_dataset

    write_dataset(folder, edge=16, seed_rows=3)
    _hazards(folder)


def _check_row(row: Row, root: Path) -> None:
    dump_row(row).encode("utf-8")
    for image in row.images:
        real = Path(os.path.realpath(root / image.path))
        assert real.is_relative_to(os.path.realpath(root)), f"{image.path} leads outside"


def _mixture(format: str, **source: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from mirage.config.schema import DataConfig, SourceConfig
        from mirage.data.sources import load_mixture

        path = folder / source["file"] if "file" in source else folder
        options = {key: value for key, value in source.items() if key != "file"}
        config = DataConfig(dir=folder, sources=(SourceConfig(path=path, format=format, **options),))  # type: ignore[arg-type]
        for entry in load_mixture(config, seed=0).rows:
            _check_row(entry.row, entry.root)

    return read


def _eval_rows(folder: Path) -> None:
    from mirage.evals.tasks.rows import load_split

    for sample in load_split(folder, "hard", task="mis_hard"):
        _check_sample(sample)


def _check_sample(sample: Any) -> None:
    assert isinstance(sample.id, str) and all(path.is_file() for path in sample.image_paths)
    _plain([message.model_dump(mode="json") for message in sample.messages])
    _plain([sample.id, sample.category, sample.sub_category, sample.cluster, dict(sample.meta)])


_TURNS = [{"from": "human", "value": "<image>\n<image>\nHow?"}, {"from": "gpt", "value": "The first shows a cup."}]
_THINKING = [_TURNS[0], {"from": "gpt", "value": "<think>A cup.</think>\nPut it down."}]
_CHAT = [
    {"role": "user", "content": "<image>What?"},
    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
]
_PUBLISHED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "mis_train": (
        "mis_train.json",
        [{"id": 1, "category": "Violent", "sub_category": "x", "image": ["a.png", "b.png"], "conversations": _TURNS}],
        {},
    ),
    "sharegpt": ("train.json", [{"id": "s", "images": ["a.png", "b.png"], "conversations": _TURNS}], {}),
    "think_in_safety": ("train_data.json", [{"images": ["a.png", "b.png"], "conversations": _THINKING}], {}),
    "vlguard": (
        "train.json",
        [
            {"id": "m", "image": "a.png", "safe": False, "harmful_category": "privacy",
             "instr-resp": [{"instruction": "Why?", "response": "I can't."}]},
            {"id": "n", "image": "b.png", "safe": True, "instr-resp": [
                {"safe_instruction": "What?", "response": "Soap."}, {"unsafe_instruction": "How?", "response": "No."}]},
        ],
        {},
    ),
    "spa_vl": ("train.json", [{"image": "a.png", "question": "What?", "chosen": "A cup.", "class1": "Privacy"}], {}),
    "beavertails_v": (
        "train.json",
        [{"image": "a.png", "question": "What?", "response": "A dog.", "is_response_safe": "yes", "category": "x"}],
        {},
    ),
    "table": (
        "train.json",
        [{"image": "a.png", "query": "What?", "final": "A dog."}],
        {"question": "query", "answer": "final"},
    ),
}  # fmt: skip


def _published(file: str, content: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _put(folder / file, content)
        for name in ("a.png", "b.png"):
            _put(folder / name, _picture())
        _hazards(folder)

    return make


def _jsonl(records: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _chat_parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    record = {"messages": [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]}
    records = [record | {"images": [{"bytes": _picture(), "path": "a.png"}]} for _ in range(2)]
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(records), folder / "train.parquet")


def _row_parquet(folder: Path) -> None:
    from data_gen.parquet import export_parquet

    _dataset(folder.parent / "rows")
    export_parquet(folder.parent / "rows", folder)


def _saved_dataset(folder: Path) -> None:
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(
        [{"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]}]
    )
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    _put(folder / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})


_add("rows", "jsonl", "rows.jsonl", _dataset, _mixture("rows"))
_add("rows_eval", "jsonl", "rows.jsonl", _dataset, _eval_rows)
for _format, (_file, _content, _columns) in _PUBLISHED.items():
    _options: dict[str, Any] = {"columns": _columns} if _columns else {}
    _add(_format, "json", _file, _published(_file, _content), _mixture(_format, **_options))
_add(
    "messages",
    "jsonl",
    "train.jsonl",
    _published(
        "train.jsonl", _jsonl([{"messages": _CHAT, "images": ["a.png"]}, {"messages": _CHAT, "image": "b.png"}])
    ),
    _mixture("messages"),
)
_add("messages_parquet", "binary", "train.parquet", _chat_parquet, _mixture("messages", file="train.parquet"))
_add("rows_parquet", "binary", "data/train-00000-of-00001.parquet", _row_parquet, _mixture("rows_parquet"))
_add("saved_state", "json", "state.json", _saved_dataset, _mixture("messages"))
_add("saved_arrow", "binary", "data-00000-of-00001.arrow", _saved_dataset, _mixture("messages"))


# Pictures


def _read_picture(folder: Path) -> None:
    from mirage.data.picture_files import MAX_PIXELS, open_picture, picture_size

    path = folder / "picture"
    size = picture_size(path)
    image = open_picture(path)
    assert image.mode == "RGB" and image.size == size and size[0] * size[1] <= MAX_PIXELS


def _decode_picture(folder: Path) -> None:
    from data_gen.illustrators.decode import decode_picture

    content = (folder / "picture").read_bytes()
    found = decode_picture(content, where=str(folder / "picture"), max_edge_pixels=64)
    assert max(found.width, found.height) <= 64


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("P", (9, 9), number) for number in range(3)]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], transparency=0)
    return buffer.getvalue()


def _turned() -> bytes:
    image, buffer = Image.new("RGB", (12, 8), "red"), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


_PICTURES: dict[str, Callable[[], bytes]] = {
    "png": lambda: _picture(kind="PNG"),
    "png16": lambda: _bytes_of(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600), "PNG"),
    "jpeg": _turned,
    "jpeg_cmyk": lambda: _picture(kind="JPEG", mode="CMYK"),
    "gif": _animated,
    "webp": lambda: _picture(kind="WEBP", mode="RGBA"),
    "tiff": lambda: _picture(kind="TIFF", mode="CMYK"),
    "bmp": lambda: _picture(kind="BMP"),
}


def _bytes_of(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


for _name, _make in _PICTURES.items():
    _write = lambda folder, make=_make: _put(folder / "picture", make())  # noqa: E731
    _add(f"picture_{_name}", "binary", "picture", _write, _read_picture)
_add("seed_picture", "binary", "picture", lambda folder: _put(folder / "picture", _turned()), _decode_picture)


# Recipes


_RECIPE = b"""# A recipe of the tests.
model:
  family: internvl
  tiny: {hidden_size: 32}
data:
  dir: data/x
  sources:
    - {split: train, weight: 1.5}
    - {split: train_general, share: 0.1, name: "general"}
  pack_tokens: 2048
train: {lr: 1e-4, epochs: 1, betas: [0.9, 0.99], warmup_steps: null}
eval:
  tasks: mis_hard, mis_easy
  select: {general: ["general:accuracy"]}
"""
_OVERRIDES = b"""train.lr=1e-5
data.sources=[{split: train}, {split: train_general, share: 0.1}]
train.betas=0.9,0.95
model.tiny={hidden_size: 32}
eval.tasks=mis_hard
name="quoted"
"""


def _recipe(folder: Path) -> None:
    _put(folder / "recipe.yaml", _RECIPE)
    _put(folder / "arguments", _OVERRIDES)


def _load_recipe(folder: Path) -> None:
    from mirage.config.loader import load_recipe, resolved_json

    resolved_json(load_recipe([f"recipe={folder / 'recipe.yaml'}"])).encode("utf-8")


def _load_overrides(folder: Path) -> None:
    from mirage.config.loader import load_recipe, resolved_json

    # As Python hands a command line over: bytes that are no UTF-8 become half surrogates; no NUL.
    lines = (folder / "arguments").read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    recipe = load_recipe(["recipe=tiny_internvl_mis", *(line for line in lines if line)])
    resolved_json(recipe).encode("utf-8")


_add("recipe", "text", "recipe.yaml", _recipe, _load_recipe)
_add("overrides", "text", "arguments", _recipe, _load_overrides, names_file=False)


# Benchmarks: one task for each file of the committed fixtures.


def _task_reader(task: Any, home: str, file: str) -> None:
    suffix = Path(file).suffix
    kinds: Mapping[str, Kind] = {".json": "json", ".tsv": "tsv", ".csv": "csv", ".txt": "text", ".parquet": "binary"}

    def make(folder: Path) -> None:
        shutil.copytree(BENCHMARKS / home, folder, dirs_exist_ok=True)

    def read(folder: Path) -> None:
        for sample in task.load(folder):
            _check_sample(sample)

    kind: Kind = "text" if "sentences" in file else kinds[suffix]
    _add(f"task_{task.name}" + ("_sentences" if "sentences" in file else ""), kind, file, make, read)


def _add_tasks() -> None:
    from mirage.evals.tasks import TASKS

    seen = set()
    for task in TASKS.values():
        home = getattr(task, "home", None) or getattr(task, "_home", None)
        if home is None or not (BENCHMARKS / home).is_dir():
            continue
        for path in task.files(BENCHMARKS / home):
            if path not in seen and (path.suffix != ".json" or "processed" not in str(path) or path.name[:2] == "06"):
                seen.add(path)
                if not any(name.startswith(f"task_{task.name}") and "sentences" not in path.name for name in READERS):
                    _task_reader(task, home, path.relative_to(BENCHMARKS / home).as_posix())


_add_tasks()


def _mis_test(folder: Path) -> None:
    record = {"id": "1", "question": "How?", "category": "Violent", "sub_category": "x"}
    records = [record | {"id": str(n), "image_path1": "a.png", "image_path2": "b.png"} for n in range(3)]
    _published("mis_hard.json", records)(folder)


def _read_mis_test(folder: Path) -> None:
    from mirage.evals.tasks.mis_files import load_file

    for sample in load_file(folder / "mis_hard.json"):
        _check_sample(sample)


def _exchanged(folder: Path) -> None:
    from mirage.evals.interchange.vlmevalkit import write_tsv
    from mirage.evals.tasks.rows import load_split
    from tests.support.dataset import write_dataset

    folder.mkdir(parents=True, exist_ok=True)
    rows = write_dataset(folder.parent / "rows", edge=16, seed_rows=2)
    write_tsv(load_split(rows, "general", task="general")[:2], folder / "Own.tsv", task="general")


def _read_exchanged(folder: Path) -> None:
    from mirage.evals.interchange.vlmevalkit import read_tsv
    from mirage.evals.tasks.exchanged import right_answer

    for sample in read_tsv(folder / "Own.tsv"):
        _check_sample(sample)
        right_answer(sample)


_add("exchanged", "tsv", "Own.tsv", _exchanged, _read_exchanged)
_add("mis_test", "json", "mis_hard.json", _mis_test, _read_mis_test)


# What judges and servers reply


def _replies(folder: Path) -> None:
    _put(
        folder / "reply",
        b'<think>\nhm\n</think>\nSure:\n```json\n{"reason": "b", "perception": "level 2", "label": "safe"}\n```',
    )
    _put(folder / "guard", b"unsafe\nS1,S2")
    _put(folder / "wildguard", b"Harmful request: yes\nResponse refusal: no\nHarmful response: no")
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "text", "refusal": None}}
    _put(folder / "body", {"id": "x", "choices": [choice], "usage": usage})
    _put(folder / "image_body", {"data": [{"b64_json": "iVBORw0KGgo="}]})


def _read_reply(folder: Path) -> None:
    from mirage.endpoint.structured import parse_reply
    from mirage.evals.rubrics import MIS

    found = parse_reply(_text(folder / "reply"), MIS.schema)
    _plain(found.model_dump(mode="json"))
    MIS.read(found)


def _text(path: Path) -> str:
    """A reply as the transport hands it over, but for half surrogates, which it may not let pass."""
    return path.read_bytes().decode("utf-8", "surrogateescape" if path.stat().st_size % 2 else "replace")


def _read_guard(form: str, file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from mirage.evals.judges.guard_formats import read_guard

        found = read_guard(form, (folder / file).read_bytes().decode("utf-8", "replace"))  # type: ignore[arg-type]
        assert found.harmful in (True, False)

    return read


def _read_body(folder: Path) -> None:
    from mirage.endpoint.replies import completion_in, has_message, text_in, usage_in

    body = _sent(folder / "body")
    if isinstance(body, dict) and has_message(body):
        usage_in(body, _endpoint())
        completion_in(body)[0].encode("utf-8")
        text_in(body, max_tokens=9, diagnosis=_diagnosis()).encode("utf-8")


def _read_image_body(folder: Path) -> None:
    from mirage.endpoint.replies import has_picture, picture_in

    body = _sent(folder / "image_body")
    if isinstance(body, dict) and has_picture(body):
        picture_in(body)


def _endpoint() -> Any:
    from mirage.endpoint.config import EndpointConfig

    return EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")


def _diagnosis() -> Any:
    from mirage.endpoint.faults import Diagnosis

    return Diagnosis(_endpoint(), key="")


def _sent(path: Path) -> Any:
    """What the transport makes of a body, without a connection."""
    from mirage.endpoint.transport import Transport

    transport = object.__new__(Transport)
    transport._diagnosis = _diagnosis()
    return transport._read(path.read_bytes())


def _reply_failures() -> tuple[type[Exception], ...]:
    from mirage.endpoint.failures import EndpointFailure
    from mirage.endpoint.structured import BadReply
    from mirage.evals.judges.model_judge import BadVerdict

    return BadReply, BadVerdict, EndpointFailure


_said: dict[str, Any] = {"names_file": False, "refusals": _reply_failures()}
_add("judge_reply", "text", "reply", _replies, _read_reply, **_said)
_add("llama_guard", "text", "guard", _replies, _read_guard("llama_guard", "guard"), **_said)
_add("wildguard", "text", "wildguard", _replies, _read_guard("wildguard", "wildguard"), **_said)
_add("chat_body", "json", "body", _replies, _read_body, **_said)
_add("image_body", "json", "image_body", _replies, _read_image_body, **_said)


# Checkpoints and weights


def _weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from mirage.files import file_sha256
    from tests.support.evaluations import _PREPROCESSING

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, name in enumerate(names):
        save_file({f"layer.{n}.weight": torch.ones(2, 3)}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 48}, "weight_map": {f"layer.{n}.weight": name for n, name in enumerate(names)}}
    _put(folder / "model.safetensors.index.json", index)
    _put(folder / "config.json", {"model_type": "qwen2_vl", "hidden_size": 32, "vision_config": {"depth": 1}})
    _put(folder / "READY", {"step": 3, "fingerprint": "ab", "files": {names[0]: file_sha256(folder / names[0])}})
    _PREPROCESSING.save(folder)


def _read_weights(folder: Path) -> None:
    from mirage.models.safetensors_stream import TensorFolder

    found = TensorFolder(folder)
    for key in found.file_of:
        found.read(key)
    found.close()


def _read_config(folder: Path) -> None:
    from mirage.models.registry import _read_config, known_family

    if known_family(folder) is not None:
        _read_config(folder)


def _read_spec(folder: Path) -> None:
    from mirage.models.adapter import PreprocessingSpec

    found = PreprocessingSpec.load(folder)
    _plain(found.model_dump(mode="json") if found else None)


def _read_ready(folder: Path) -> None:
    from mirage.evals.request import weights_fingerprint

    weights_fingerprint(folder).encode("utf-8")


def _read_ready_manifest(folder: Path) -> None:
    from mirage.errors import UserError
    from mirage.training.checkpoint import ready_checkpoints, remove_torn

    for path in ready_checkpoints(folder):
        assert (path / "READY").is_file()
    try:
        remove_torn(folder)
    except UserError:
        assert (folder / "checkpoint-000003" / "model.safetensors").is_file(), "a damaged READY cost the checkpoint"
        raise


def _tokenizer(folder: Path) -> None:
    shutil.copytree(BENCHMARKS.parent / "internvl2_5_upstream" / "tokenizer", folder, dirs_exist_ok=True)


def _read_tokenizer(folder: Path) -> None:
    from mirage.models.internvl_tokenizer import load_tokenizer

    load_tokenizer(folder)


def _published_model(folder: Path) -> None:
    _put(folder / "config.json", (BENCHMARKS.parent / "internvl2_5_upstream" / "model" / "config.json").read_bytes())


def _read_published_config(folder: Path) -> None:
    from mirage.models.internvl_config import check_published, native_config
    from mirage.models.safetensors_stream import read_json

    path = folder / "config.json"
    published = read_json(path)
    check_published(published, path)
    native_config(published, image_token_id=5, tied=False, where=path)


def _failed_batch(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"labels": torch.zeros(4, dtype=torch.int64), "inputs/input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    tensors["token_weights"] = torch.ones(4)
    save_file(tensors, folder / "batch.safetensors", metadata={"values": json.dumps({"row_ids": ["a"]})})


def _read_batch(folder: Path) -> None:
    from mirage.training.failures import load_batch

    load_batch(folder / "batch.safetensors")


def _tensor_store(folder: Path) -> None:
    import torch

    from mirage.data.tensor_store import TensorStore

    TensorStore(folder, setting="tests").put("ab" * 32, {"pixels": torch.ones(3)})


def _read_tensor_store(folder: Path) -> None:
    from mirage.data.tensor_store import TensorStore

    found = TensorStore(folder, setting="tests").get("ab" * 32)
    assert found is None or found["pixels"].tolist() == [1.0, 1.0, 1.0], "a damaged entry was taken for a whole one"


_add("safetensors", "binary", "model-00001-of-00002.safetensors", _weights, _read_weights)
_add("safetensors_index", "json", "model.safetensors.index.json", _weights, _read_weights)
_add("model_config", "json", "config.json", _weights, _read_config)
_add("preprocessing", "json", "mirage_preprocessing.json", _weights, _read_spec)
_add("ready", "json", "READY", _weights, _read_ready)
_add(
    "ready_manifest",
    "json",
    "checkpoint-000003/READY",
    lambda folder: (_weights(folder / "checkpoint-000003"), _put(folder / "checkpoint-000003/model.safetensors", b"x")),
    _read_ready_manifest,
)
_add("tokenizer_config", "json", "tokenizer_config.json", _tokenizer, _read_tokenizer)
_add("published_config", "json", "config.json", _published_model, _read_published_config)
_add("failed_batch", "binary", "batch.safetensors", _failed_batch, _read_batch)


def _failure(folder: Path) -> None:
    sample = {"row_id": "a", "location": "rows.jsonl:1", "num_tokens": 9, "num_image_tokens": 4}
    pack = {"number": 1, "file": "pack-1.safetensors", "samples": [sample | {"num_supervised_tokens": 3}]}
    record = {"kind": "loss is not finite", "value": "nan", "message": "the loss is nan", "step": 3, "rank": 0}
    last = {"checkpoint": None, "checkpoint_step": 0, "base": "shipped:internvl"}
    _put(folder / "failure.json", record | {"packs": [pack]} | last)


def _read_failure(folder: Path) -> None:
    from mirage.training.failures import read_failure

    for pack in read_failure(folder)["packs"]:
        assert (folder / pack["file"]).parent == folder and "/" not in pack["file"]


_add("failure", "json", "failure.json", _failure, _read_failure)
_add("tensor_store", "binary", f"ab/{'ab' * 32}.safetensors", _tensor_store, _read_tensor_store)


# What evaluations leave


def _evaluation(folder: Path) -> None:
    from mirage.evals.answers import Answer, AnswerStore
    from mirage.evals.guards import GUARDS_FILE, guard_evaluation
    from mirage.evals.judges.verdict_cache import Said, VerdictCache
    from mirage.tracking.mirror import MetricsFile
    from tests.support.evaluations import write_evaluation

    first, last = folder / "evals" / "step-000000", folder / "evals" / "step-000003"
    write_evaluation(first, {"mis_hard": ["asr", "rsr", "unscored"], "general": ["right"]}, step=0)
    write_evaluation(last, {"mis_hard": ["rsr", "rsr", "rr"], "general": ["wrong"]}, step=3, baseline=first)
    from mirage.config.schema import EvalConfig

    guard_evaluation(last, first, config=EvalConfig())
    alarm = {"guard": "general", "rate": "pooled", "baseline_percent": 90.0, "percent": 20.0, "change_points": -70.0,
             "margin_points": 2.0, "adjusted_p_value": 0.001, "detectable_points": None}  # fmt: skip
    _put(last / GUARDS_FILE, {"request": "x", "alarms": [alarm]})
    _put(last / "state.json", {"step": 3, "tier": "full", "state": "failed", "reason": "r"})
    _put(folder / "recipe.json", {"name": "x", "run_dir": "y"})
    _put(folder / "summary.json", {"steps": 3, "loss": 1.5})
    metrics = MetricsFile(folder)
    metrics.append("train", 1, {"train/loss": 2.5, "train/lr": float("nan")})
    metrics.append("train", 2, {"train/loss": 2.25})
    metrics.close()
    AnswerStore(folder, rank=0).append([Answer("k1", "text", 3, "stop"), Answer("k2", "", 0, "stop", failure="filter")])
    cache = VerdictCache([folder / "verdicts.jsonl"])
    for number in range(3):
        key = hashlib.sha256(b"%d" % number).hexdigest()
        cache.put(key, Said("reply", "{}"), rubric="mis", sample=str(number))
    cache.close()


def _read_results(folder: Path) -> None:
    from mirage.evals.results import read_results

    _plain(read_results(folder / "evals" / "step-000003").model_dump(mode="json"))


def _read_report(folder: Path) -> None:
    from mirage.report.run_folder import read_runs

    (run,) = read_runs([folder])
    for evaluation in run.evaluations:
        _plain(evaluation.samples)
    _plain(run.recipe)


def _read_answers(folder: Path) -> None:
    from mirage.evals.answers import AnswerStore

    for answer in AnswerStore(folder, rank=0).read().values():
        _plain(dataclasses.asdict(answer))


def _read_verdicts(folder: Path) -> None:
    from mirage.evals.judges.verdict_cache import VerdictCache

    content = (folder / "verdicts.jsonl").read_bytes()
    cache = VerdictCache([folder / "verdicts.jsonl"])
    for key in list(cache._lines):
        said = cache.get(key)
        assert said is None or isinstance(said.text, str)
    cache.close()
    assert (folder / "verdicts.jsonl").read_bytes().startswith(content)


def _read_job(folder: Path) -> None:
    from mirage.evals.schedule import read_job

    found = read_job(folder, 3)
    assert found is not None and isinstance(found.step, int)


def _read_metrics(folder: Path) -> None:
    from mirage.tracking.mirror import read_metrics

    for record in read_metrics(folder / "metrics.jsonl"):
        assert isinstance(record["axis"], str) and isinstance(record["step"], int)


_add("results", "json", "evals/step-000003/results.json", _evaluation, _read_results)
_add("samples", "jsonl", "evals/step-000003/samples.jsonl", _evaluation, _read_report)
_add("guards", "json", "evals/step-000003/guards.json", _evaluation, _read_report)
_add("run_recipe", "json", "recipe.json", _evaluation, _read_report)
_add("run_metrics", "jsonl", "metrics.jsonl", _evaluation, _read_metrics)
_add("job", "json", "evals/step-000003/state.json", _evaluation, _read_job)
_add("answers", "jsonl", "answers-0.jsonl", _evaluation, _read_answers)
_add("verdicts", "jsonl", "verdicts.jsonl", _evaluation, _read_verdicts)


def _wandb(folder: Path) -> None:
    import struct
    import zlib

    from wandb.proto import wandb_internal_pb2

    records = []
    record = vars(wandb_internal_pb2)["Record"]()
    record.run.run_id = "abc"
    records.append(record)
    for step in range(2):
        record = vars(wandb_internal_pb2)["Record"]()
        for name, value in (("_step", step), ("train/step", step), ("train/loss", 1.5)):
            item = record.history.item.add()
            item.nested_key.append(name)
            item.value_json = json.dumps(value)
        records.append(record)
    content = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    for record in records:
        data = record.SerializeToString()
        content += struct.pack("<IHB", zlib.crc32(data, zlib.crc32(b"\x01")), len(data), 1) + data
    _put(folder / "wandb" / "run-1-abc" / "run-abc.wandb", content)


def _read_wandb(folder: Path) -> None:
    from mirage.tracking.wandb_file import read_sent

    read_sent(folder, "abc")


_add("wandb", "binary", "wandb/run-1-abc/run-abc.wandb", _wandb, _read_wandb)


# Sheets of labels, other tools' answers


def _sheet(folder: Path) -> None:
    items = {f"i{n}": {"source": "s", "task": "mis_hard", "verdict": "asr" if n % 2 else "rsr"} for n in range(4)}
    strata = [
        {"source": "s", "task": "mis_hard", "verdict": verdict, "size": 9, "drawn": 2} for verdict in ("asr", "rsr")
    ]
    sources = {"s": {"checkpoint": "c", "step": 1, "request": "r", "judge": "j"}}
    key = {"schema_version": 1, "sheet": "sheet.csv", "sources": sources, "options": {"mis_hard": ["asr", "rsr"]}}
    _put(folder / "sheet.key.json", key | {"strata": strata, "items": items})
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("item", "task", "question", "label_ann", "label_ben", "note"))
    writer.writerows((name, "mis_hard", "Why, now?", "asr", "unsure", "") for name in items)
    _put(folder / "sheet.csv", text.getvalue().encode())


def _read_sheet(folder: Path) -> None:
    from mirage.evals.calibration.labels import read_sheet

    found = read_sheet([folder / "sheet.csv"])
    assert found.labellers and all(item.weight >= 0 for item in found.items)


_add("sheet", "csv", "sheet.csv", _sheet, _read_sheet)
_add("sheet_key", "json", "sheet.key.json", _sheet, _read_sheet)


def _predictions(folder: Path) -> None:
    table = "index\tquestion\tprediction\n1\tQ?\tA\n2\tQ2?\tB\n"
    _put(folder / "a.tsv", table.encode())
    _put(folder / "b.json", [{"id": 1, "question": "Q?", "response": "A"}, {"id": 2, "question": "Q", "response": "B"}])
    _put(folder / "c.jsonl", _jsonl({"doc": {"id": n, "question": "Q"}, "filtered_resps": ["A"]} for n in range(2)))


def _workbook(folder: Path) -> None:
    import datetime

    import openpyxl
    from openpyxl.writer import excel

    book = openpyxl.Workbook()
    for row in (["index", "question", "prediction"], [1, "Q?", "A"], [2, "Q2?", "=1+1"], [3, "Q3?", None]):
        book.active.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "d.xlsx", "w") as archive:
        # The same bytes each time: a case is a number.
        book.properties.created = book.properties.modified = datetime.datetime(2026, 1, 1)
        excel.ExcelWriter(book, archive).write_data()


def _read_predictions(file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from mirage.evals.interchange.predictions import read_predictions

        for key, found in read_predictions(folder / file).by_id.items():
            _plain([key, found.text, found.failure])

    return read


_add("predictions_tsv", "tsv", "a.tsv", _predictions, _read_predictions("a.tsv"))
_add("predictions_json", "json", "b.json", _predictions, _read_predictions("b.json"))
_add("predictions_jsonl", "jsonl", "c.jsonl", _predictions, _read_predictions("c.jsonl"))
_add("predictions_xlsx", "zip", "d.xlsx", _workbook, _read_predictions("d.xlsx"))


# Data generation


_PIPELINE = b"""name: Test
seed: 010
seeds:
  - {path: seeds.jsonl, source: s, licence: CC0-1.0, attribution: a}
endpoints:
  text: {base_url: 'http://127.0.0.1:8000/v1', model: tiny, temperature: 1e-1, extra_body: {top_p: 0.9, name: '1'}}
stages:
  extract: {use: rule}
  compose: {use: model, endpoint: text}
  illustrate: {use: draw, pixels: 64}
  classify: {use: rule, train_share: 0.5}
  label: {use: rule}
  verify: {use: rule}
"""


def _pipeline(folder: Path) -> None:
    _put(folder / "pipeline.yaml", _PIPELINE)
    _put(folder / "seeds.jsonl", _jsonl([{"text": "a seed", "category": "x"}, {"id": "b", "image": "a.png"}]))
    _put(folder / "seeds.json", [{"text": "a seed"}, {"id": "b", "image": "a.png", "text": "t"}])
    _put(folder / "a.png", _picture(size=(40, 30)))
    _hazards(folder)


def _read_pipeline(folder: Path) -> None:
    from data_gen.pipeline import load_pipeline

    _plain(load_pipeline(folder / "pipeline.yaml").config.model_dump(mode="json"))


def _read_seeds(file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from data_gen.blobs import Blobs
        from data_gen.pipeline import SeedFile
        from data_gen.seed_files import read_seeds

        seed_file = SeedFile(path=Path(file), source="s", licence="CC0-1.0", attribution="a")
        for seed in read_seeds([seed_file], folder=folder, blobs=Blobs(folder / "blobs")):
            _plain(seed.model_dump(mode="json"))

    return read


def _manifest(folder: Path) -> None:
    from data_gen.store import manifest_sha256

    manifest: dict[str, Any] = {"files": {"rows.jsonl": "ab" * 32}, "counts": {"rows": 2}}
    _put(folder / "manifest.json", manifest | {"content_sha256": manifest_sha256(manifest)})


def _read_manifest(folder: Path) -> None:
    from data_gen.store import read_manifest

    _plain(read_manifest(folder))


def _decisions(folder: Path) -> None:
    _put(folder / "decisions.jsonl", _jsonl({"id": f"r{n}", "status": "accepted", "note": "ok"} for n in range(3)))


def _read_decisions(folder: Path) -> None:
    from data_gen.review import read_decisions

    for decision in read_decisions(folder / "decisions.jsonl").values():
        _plain(decision.model_dump())


def _stage_results(folder: Path) -> None:
    from data_gen.row_store import Record, StageResults

    results = StageResults(folder / "stages" / "label.jsonl")
    results.put(Record("a", "done", samples=({"tags": {"x": "y"}},)))
    results.put(Record("b", "failed", kind="refusal", message="no"))
    results.put(Record("c", "dropped", reason="short"))
    results.close()


def _read_stage_results(folder: Path) -> None:
    from data_gen.row_store import StageResults, read_results

    read_results(folder)
    results = StageResults(folder / "stages" / "label.jsonl")
    try:
        for key in list(results.keys()):
            results.get(key)
    finally:
        results.close()


def _library(folder: Path) -> None:
    text = b"licence: CC-BY-4.0\nattribution: Ann Example\nfolders:\n  - {folder: knives, names: [knife]}\n"
    text += b"pictures:\n  - {file: knives/a.png, names: [bread knife], licence: CC0-1.0, visible_harm: no}\n"
    _put(folder / "library.yaml", text)
    _put(folder / "captions.jsonl", _jsonl([{"file": "knives/a.png", "caption": "a knife"}]))
    _put(folder / "knives" / "a.png", _picture(size=(40, 30)))


def _read_library(folder: Path) -> None:
    from data_gen.illustrators.picture_folder import read_folder

    _plain([picture.facts() for picture in read_folder(folder).pictures])


def _leaks(folder: Path) -> None:
    import base64

    cell = base64.b64encode(_picture(size=(40, 30))).decode()
    record = {"id": "1", "question": "What is this thing?", "image": "a.png"}
    turns = [{"from": "human", "value": "And what is that?"}]
    _put(folder / "b.json", [record, {"id": "2", "conversations": turns, "images": ["a.png"]}])
    _put(folder / "b.jsonl", _jsonl([record, record | {"id": "3", "image": cell}]))
    _put(folder / "b.tsv", f"index\tquestion\timage\n1\tQ one?\t{cell}\n2\tQ two?\t1\n".encode())
    _put(folder / "b.csv", b"id,question,image_path\n1,\"Q, one?\",a.png\n2,Q two?,\"['a.png', 'a.png']\"\n")
    _put(folder / "a.png", _picture(size=(40, 30)))


def _leak_index(folder: Path) -> None:
    from data_gen.benchmark_index import build_index, save_index

    _leaks(folder)
    save_index(build_index(folder / "b.json", name="b"), folder / "b.index")


def _read_leaks(file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from data_gen.benchmark_files import read_benchmark

        for record in read_benchmark(folder / file):
            assert record.texts
            for image in record.images:
                assert image.open().mode == "RGB"

    return read


def _read_leak_index(folder: Path) -> None:
    from data_gen.benchmark_index import load_index

    found = load_index(folder / "b.index")
    for entry in range(len(found)):
        found.entry_grams(entry), found.entry_images(entry)


_add("pipeline", "text", "pipeline.yaml", _pipeline, _read_pipeline)
_add("seeds_jsonl", "jsonl", "seeds.jsonl", _pipeline, _read_seeds("seeds.jsonl"))
_add("seeds_json", "json", "seeds.json", _pipeline, _read_seeds("seeds.json"))
_add("manifest", "json", "manifest.json", _manifest, _read_manifest)
_add("decisions", "jsonl", "decisions.jsonl", _decisions, _read_decisions)
_add("stage_results", "jsonl", "stages/label.jsonl", _stage_results, _read_stage_results)
_add("library", "text", "library.yaml", _library, _read_library)
_add("captions", "jsonl", "captions.jsonl", _library, _read_library)
_add("leaks_json", "json", "b.json", _leaks, _read_leaks("b.json"))
_add("leaks_jsonl", "jsonl", "b.jsonl", _leaks, _read_leaks("b.jsonl"))
_add("leaks_tsv", "tsv", "b.tsv", _leaks, _read_leaks("b.tsv"))
_add("leaks_csv", "csv", "b.csv", _leaks, _read_leaks("b.csv"))
_add("leak_index", "binary", "b.index", _leak_index, _read_leak_index)
