"""InternVL checkpoints between the published layout (`InternVLChatModel`) and transformers' native hub layout.

Both ways, bit for bit, one tensor at a time, without running any code that comes with the checkpoint.

Published layout: InternLM2 fuses query, key and value by key/value head (`wqkv`, rows ordered [kv_head, group + 2,
head_dim]: the group's queries, then key, then value; upstream `modeling_internlm2.py`); InternViT stacks them (`qkv`).
Other language models keep transformers' own names. The originals of the small files (config, tokenizer, code) travel
unread in the native folder's `published/`, so that the way back restores them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from transformers import AutoTokenizer, GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from mirage.errors import UserError
from mirage.models.adapter import SPEC_FILE, PreprocessingSpec
from mirage.models.internvl import InternVLAdapter
from mirage.models.internvl_config import (
    INTERNLM2,
    PUBLISHED_MODEL_TYPE,
    TOKENS_AFTER_IMAGE_TOKEN,
    check_published,
    differing_fields,
    native_config,
    published_config,
)
from mirage.models.internvl_tokenizer import MODEL_FILE, load_tokenizer, save_tokenizer
from mirage.models.safetensors_stream import (
    DTYPES,
    OutputTensor,
    TensorFolder,
    TensorInfo,
    as_bytes,
    read_json,
    sync_folder,
    write_synced,
    write_tensors,
)

Layout = Literal["native", "published"]
Kind = Literal["same", "stacked", "grouped"]
Progress = Callable[[int, int], None]

ORIGINALS = "published"
# Part of the cache key: a change of what conversion writes makes new entries.
CONVERTER_VERSION = 1
MAX_SHARD_BYTES = 5_000_000_000
SMALL_FILE_SUFFIXES = ("", ".json", ".jinja", ".md", ".model", ".py", ".txt")
IMAGE_TOKEN = "<IMG_CONTEXT>"
TURN_END = "<|im_end|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Native hub names -> published names; the first rule that matches wins.
_VISION_LAYER = r"^vision_tower\.encoder\.layer\.(\d+)\."
_TEXT_LAYER = r"^language_model\.model\.layers\.(\d+)\."
_VISION_RULES = (
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (_VISION_LAYER + r"attention\.projection_layer\.", r"vision_model.encoder.layers.\1.attn.proj."),
    (_VISION_LAYER + r"attention\.[qkv]_proj\.", r"vision_model.encoder.layers.\1.attn.qkv."),
    (_VISION_LAYER + r"attention\.([qk])_norm\.", r"vision_model.encoder.layers.\1.attn.\2_norm."),
    (_VISION_LAYER + r"layernorm_before\.", r"vision_model.encoder.layers.\1.norm1."),
    (_VISION_LAYER + r"layernorm_after\.", r"vision_model.encoder.layers.\1.norm2."),
    (_VISION_LAYER + r"lambda_([12])$", r"vision_model.encoder.layers.\1.ls\2"),
    (_VISION_LAYER + r"mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
)
_INTERNLM2_RULES = (
    (r"^language_model\.lm_head\.", "language_model.output."),
    (r"^language_model\.model\.embed_tokens\.", "language_model.model.tok_embeddings."),
    (_TEXT_LAYER + r"self_attn\.[qkv]_proj\.", r"language_model.model.layers.\1.attention.wqkv."),
    (_TEXT_LAYER + r"self_attn\.o_proj\.", r"language_model.model.layers.\1.attention.wo."),
    (_TEXT_LAYER + r"mlp\.gate_proj\.", r"language_model.model.layers.\1.feed_forward.w1."),
    (_TEXT_LAYER + r"mlp\.up_proj\.", r"language_model.model.layers.\1.feed_forward.w3."),
    (_TEXT_LAYER + r"mlp\.down_proj\.", r"language_model.model.layers.\1.feed_forward.w2."),
    (_TEXT_LAYER + r"input_layernorm\.", r"language_model.model.layers.\1.attention_norm."),
    (_TEXT_LAYER + r"post_attention_layernorm\.", r"language_model.model.layers.\1.ffn_norm."),
)
# Names inside the running model -> names in a saved folder, as transformers' own saving writes them.
_HUB_RULES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)


@dataclass(frozen=True)
class Entry:
    """One published tensor and the native tensors it is made of (one, or query, key and value)."""

    published: str
    natives: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True)
class KeyMap:
    """Every parameter of a model in both layouts: names, shapes, and how fused tensors are cut."""

    entries: tuple[Entry, ...]
    native_shapes: Mapping[str, tuple[int, ...]]
    num_kv_heads: int
    head_dim: int

    def published_shape(self, entry: Entry) -> tuple[int, ...]:
        """Shape of the published tensor of `entry`."""
        shapes = [self.native_shapes[name] for name in entry.natives]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if entry.kind != "same" else shapes[0]

    def split(self, entry: Entry, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The native tensors of a published one."""
        if entry.kind == "same":
            return [tensor]
        if entry.kind == "stacked":
            return [part.contiguous() for part in tensor.chunk(3)]
        rows = tensor.view(self.num_kv_heads, -1, self.head_dim, *tensor.shape[1:])
        parts = (rows[:, :-2], rows[:, -2], rows[:, -1])
        return [part.reshape(-1, *tensor.shape[1:]).contiguous() for part in parts]

    def fuse(self, entry: Entry, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The published tensor of its native ones: the inverse of `split`."""
        if entry.kind == "same":
            return tensors[0]
        if entry.kind == "stacked":
            return torch.cat(list(tensors))
        rows = [part.view(self.num_kv_heads, -1, self.head_dim, *part.shape[1:]) for part in tensors]
        return torch.cat(rows, dim=1).reshape(-1, *tensors[0].shape[1:])


def key_map(config: InternVLConfig, *, language: str) -> KeyMap:
    """The key map of a native config whose published language architecture is `language`.

    The native side is read off transformers' own class, built without memory on the meta device.
    """
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    shapes = {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["language_model.lm_head.weight"]
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(published_name(name, language=language), []).append(name)
    entries = []
    for name, natives in groups.items():
        kind: Kind = "same" if len(natives) == 1 else "stacked" if name.startswith("vision_model.") else "grouped"
        order = sorted(natives, key=lambda native: "qkv".index(_projection(native))) if kind != "same" else natives
        entries.append(Entry(name, tuple(order), kind))
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KeyMap(tuple(entries), shapes, text.num_key_value_heads, head_dim)


def hub_name(name: str) -> str:
    """A parameter's name in a saved folder; names that are already of that form stay."""
    return _rename(name, _HUB_RULES)


def published_name(name: str, *, language: str) -> str:
    """The published tensor that holds the native hub tensor `name`."""
    return _rename(name, (*_VISION_RULES, *(_INTERNLM2_RULES if language == INTERNLM2 else ())))


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _projection(name: str) -> str:
    match = re.search(r"\.([qkv])_proj\.", name)
    if match is None:
        raise RuntimeError(f"{name} shares a published tensor and is no query, key or value")
    return match.group(1)


# Conversion


@dataclass(frozen=True)
class _Job:
    """A checked conversion: what to write, from where, and how to compare it afterwards."""

    source: TensorFolder
    keys: KeyMap
    layout: Layout
    name_in_source: Mapping[str, str]
    write_files: Callable[[Path], None]


def convert(
    src: Path,
    dst: Path,
    *,
    layout: Layout,
    check: bool = False,
    image_token_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the model in `src` to the new folder `dst` in the other layout.

    `layout` is the layout to write: "native" from a published folder, "published" from a native one. `check` reads the
    written tensors back, converts them the other way and compares every byte with the source. `image_token_id` is
    needed only where the folder has no tokenizer and an unusual vocabulary. `progress(done, total)` takes bytes.

    `dst` appears whole or not at all: everything is written beside it, synced, and renamed. Raises `UserError` for
    anything that the user can mend; then `dst` does not exist.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        raise UserError(f"{src}: is not a folder; give the folder that holds config.json and the weights")
    if dst.exists() or dst.is_symlink():
        raise UserError(f"{dst}: exists already; name a new folder or remove this one")
    job = _native_job(src, image_token_id) if layout == "native" else _published_job(src)
    total_bytes = sum(info.num_bytes for info in job.source.info.values()) * (2 if check else 1)
    partial = dst.with_name(f"{dst.name}.partial")
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total_bytes)

    with _built_aside(partial, dst):
        _check_space(partial, job)
        write_tensors(partial, _outputs(job), max_shard_bytes=max_shard_bytes, progress=advance)
        job.write_files(partial)
        if check:
            _compare(job, partial, advance)
        job.source.close()


@contextlib.contextmanager
def _built_aside(partial: Path, dst: Path) -> Iterator[None]:
    """Make the folder `partial`, and rename it to `dst` when the body succeeds; leave nothing when it fails."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield
        for path in partial.rglob("*"):
            if path.is_dir():
                sync_folder(path)
        sync_folder(partial)
        partial.rename(dst)
        sync_folder(dst.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{dst}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_space(partial: Path, job: _Job) -> None:
    needed = sum(info.num_bytes for info in job.source.info.values())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"{partial.parent}: has {free / 1e9:.1f} GB free and the model needs {needed / 1e9:.1f} GB")


def _native_job(src: Path, image_token_id: int | None) -> _Job:
    where = src / "config.json"
    published = read_json(where)
    if published.get("model_type") == "internvl":
        raise UserError(f"{where}: is in the native layout already; use --layout published to go the other way")
    check_published(published, where)
    language = published["llm_config"]["architectures"][0]
    source = TensorFolder(src)
    head = "language_model.output.weight" if language == INTERNLM2 else "language_model.lm_head.weight"
    tied = head not in source.info and bool(published["llm_config"].get("tie_word_embeddings", False))
    if head in source.info and published["llm_config"].get("tie_word_embeddings", False):
        _check_tied_copy(source, head, language)
    vocab_size = published["llm_config"].get("vocab_size")
    token_id = image_token_id if image_token_id is not None else _image_token_id(src, vocab_size, where)
    config = native_config(published, image_token_id=token_id, tied=tied, where=where)
    keys = key_map(config, language=language)
    _check_tensors(source, {entry.published: keys.published_shape(entry) for entry in keys.entries}, {})
    config.dtype = DTYPES[source.info[published_name("language_model.model.norm.weight", language=language)].dtype]

    def write_files(folder: Path) -> None:
        _copy_small_files(src, folder / ORIGINALS)
        _write_native_files(src, folder, config, published)

    return _Job(source, keys, "native", {}, write_files)


def _published_job(src: Path) -> _Job:
    where = src / "config.json"
    raw = read_json(where)
    if raw.get("model_type") == PUBLISHED_MODEL_TYPE:
        raise UserError(f"{where}: is in the published layout already; use --layout native to go the other way")
    if raw.get("model_type") != "internvl":
        raise UserError(f"{where}: model_type is {raw.get('model_type')!r}; expected 'internvl'")
    config = _read_native_config(src)
    stored = src / ORIGINALS / "config.json"
    published = read_json(stored) if stored.exists() else published_config(config.to_dict())
    language = published["llm_config"]["architectures"][0]
    tied = bool(config.tie_word_embeddings)
    described = native_config(published, image_token_id=config.image_token_id, tied=tied, where=stored)
    differing = differing_fields(config, described)
    if differing:
        raise UserError(
            f"{where}: {', '.join(differing[:5])} differ from {stored}, the published config this model came with; "
            f"mend one of them, or remove the folder {ORIGINALS}/ to have a new config written"
        )
    source = TensorFolder(src)
    keys = key_map(config, language=language)
    names = {hub_name(name): name for name in source.info}
    _check_tensors(source, dict(keys.native_shapes), names)
    for entry in keys.entries:
        if len({source.info[names[native]].dtype for native in entry.natives}) > 1:
            raise UserError(f"{src}: {', '.join(entry.natives)} differ in type; they become one tensor")
    if not stored.exists():
        dtype = DTYPES[source.info[names["language_model.model.norm.weight"]].dtype]
        published["torch_dtype"] = str(dtype).removeprefix("torch.")

    def write_files(folder: Path) -> None:
        _write_published_files(src, folder, published)

    return _Job(source, keys, "published", names, write_files)


def _read_native_config(src: Path) -> InternVLConfig:
    try:
        return InternVLConfig.from_pretrained(src, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a config that does not fit
        raise UserError(
            f"{src / 'config.json'}: is not a usable InternVL config ({str(error).splitlines()[0]})"
        ) from error


def _check_tied_copy(source: TensorFolder, head: str, language: str) -> None:
    embedding = published_name("language_model.model.embed_tokens.weight", language=language)
    if embedding in source.info and not torch.equal(as_bytes(source.read(head)), as_bytes(source.read(embedding))):
        raise UserError(
            f"{source.folder / 'config.json'}: llm_config.tie_word_embeddings is true and {head} differs from "
            f"{embedding}; set it to false if the model has a head of its own"
        )


def _check_tensors(source: TensorFolder, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> None:
    """Raise `UserError` unless the folder holds exactly the expected tensors in their shapes.

    `names` gives the folder's own spelling of an expected name where that differs.
    """
    spelling = names or {name: name for name in source.info}
    missing = sorted(set(expected) - set(spelling))
    if missing:
        raise UserError(
            f"{source.folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; fetch it again"
        )
    unknown = sorted(set(spelling) - set(expected))
    if unknown:
        raise UserError(
            f"{source.folder}: holds {len(unknown)} tensors config.json has no place for, such as {unknown[0]!r}"
        )
    for name, shape in expected.items():
        found = source.info[spelling[name]].shape
        if found != shape:
            raise UserError(
                f"{source.folder}: tensor {spelling[name]!r} has shape {list(found)}, and config.json "
                f"makes it {list(shape)}"
            )


def _outputs(job: _Job) -> list[OutputTensor]:
    """What to write, in the order in which the source's files hold it."""
    position = {name: (job.source.file_of[name], index) for index, name in enumerate(sorted(job.source.info))}
    if job.layout == "published":
        entries = sorted(job.keys.entries, key=lambda entry: position[job.name_in_source[entry.natives[0]]])
        return [_fused_output(job, entry) for entry in entries]
    entries = sorted(job.keys.entries, key=lambda entry: position[entry.published])
    return [output for entry in entries for output in _split_outputs(job, entry)]


def _fused_output(job: _Job, entry: Entry) -> OutputTensor:
    sources = [job.name_in_source[name] for name in entry.natives]
    info = TensorInfo(job.source.info[sources[0]].dtype, job.keys.published_shape(entry))
    return OutputTensor(
        entry.published, info, lambda: job.keys.fuse(entry, [job.source.read(name) for name in sources])
    )


def _split_outputs(job: _Job, entry: Entry) -> list[OutputTensor]:
    dtype = job.source.info[entry.published].dtype

    def make(slot: int) -> Callable[[], torch.Tensor]:
        # Read again for each part: a fused tensor is small beside a shard, and nothing is kept between parts.
        return lambda: job.keys.split(entry, job.source.read(entry.published))[slot]

    return [
        OutputTensor(name, TensorInfo(dtype, job.keys.native_shapes[name]), make(slot))
        for slot, name in enumerate(entry.natives)
    ]


def _compare(job: _Job, written: Path, advance: Callable[[int], None]) -> None:
    """Read `written` back, convert each tensor the other way and compare bytes with the source."""
    target = TensorFolder(written)
    if job.layout == "native":
        _check_tensors(target, dict(job.keys.native_shapes), {})
    for entry in job.keys.entries:
        if job.layout == "native":
            pairs = [(job.keys.fuse(entry, [target.read(name) for name in entry.natives]), entry.published)]
        else:
            names = [job.name_in_source[name] for name in entry.natives]
            pairs = list(zip(job.keys.split(entry, target.read(entry.published)), names, strict=True))
        for tensor, name in pairs:
            original = job.source.read(name)
            if tensor.dtype != original.dtype or not torch.equal(as_bytes(tensor), as_bytes(original)):
                raise UserError(f"{written}: tensor {name!r} reads back differently; the disk may be failing")
            advance(original.nbytes)
    target.close()


# Small files


def _copy_small_files(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights (config, tokenizer, licence, code that is never run), unread."""
    folder.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in SMALL_FILE_SUFFIXES and not path.name.endswith(".index.json")
        if path.is_file() and wanted and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def copy_published_files(native: Path, folder: Path) -> None:
    """Carry a converted model's originals into a checkpoint trained from it, so that it can be published again."""
    if (native / ORIGINALS).is_dir():
        _copy_small_files(native / ORIGINALS, folder / ORIGINALS)


def _write_native_files(src: Path, folder: Path, config: InternVLConfig, published: Mapping[str, Any]) -> None:
    config.save_pretrained(folder)
    written = read_json(folder / "config.json")
    if written.get("tie_word_embeddings") is not bool(config.text_config.tie_word_embeddings):
        raise RuntimeError("the native config does not say at its top level whether the output head is tied")
    tokenizer = _tokenizer(src)
    generation = GenerationConfig(**_generation_ids(src, config))
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
        generation.eos_token_id = tokenizer.convert_tokens_to_ids(TURN_END)
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)
    spec = PreprocessingSpec(
        family="internvl",
        image_size=config.vision_config.image_size[0],
        max_tiles=int(published.get("max_dynamic_patch", 12)) if published.get("dynamic_image_size", True) else 1,
        thumbnail=bool(published.get("use_thumbnail", True)),
        min_pixels=1,
        max_pixels=1,
        system_prompt=None,
        number_images=True,
    )
    InternVLAdapter(tokenizer, config, spec).image_processor_config(folder)
    if (src / SPEC_FILE).exists():
        shutil.copyfile(src / SPEC_FILE, folder / SPEC_FILE)


def _generation_ids(src: Path, config: InternVLConfig) -> dict[str, Any]:
    path = src / "generation_config.json"
    stored = read_json(path) if path.exists() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: stored.get(name, getattr(config.text_config, name, None)) for name in names}


def _tokenizer(src: Path) -> Any:
    """The folder's tokenizer as plain transformers loads it, or None when the folder has none."""
    if (src / MODEL_FILE).exists():
        return load_tokenizer(src)
    if not any((src / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return None
    path = src / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if settings.get("auto_map") and not (src / "tokenizer.json").exists():
        raise UserError(f"{path}: asks for remote code (auto_map), which MIRage never runs; add a tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(src, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files that do not fit
        raise UserError(f"{path}: the tokenizer does not load ({str(error).splitlines()[0]})") from error


def _write_published_files(src: Path, folder: Path, published: Mapping[str, Any]) -> None:
    originals = src / ORIGINALS
    if originals.is_dir():
        _copy_small_files(originals, folder)
    else:
        for name in (*TOKENIZER_FILES, "preprocessor_config.json", "generation_config.json"):
            if (src / name).exists():
                shutil.copyfile(src / name, folder / name)
    if not (originals / "config.json").exists():
        write_synced(folder / "config.json", json.dumps(published, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    if (src / SPEC_FILE).exists():
        shutil.copyfile(src / SPEC_FILE, folder / SPEC_FILE)


def _image_token_id(src: Path, vocab_size: Any, where: Path) -> int:
    """Id of `<IMG_CONTEXT>`: the tokenizer's, else where every published vocabulary has it."""
    if not isinstance(vocab_size, int):
        raise UserError(f"{where}: llm_config.vocab_size must be a number, found {vocab_size!r}")
    for entries in _added_token_entries(src):
        if IMAGE_TOKEN in entries:
            return entries[IMAGE_TOKEN]
    guess = max(0, vocab_size - TOKENS_AFTER_IMAGE_TOKEN)
    print(
        f"note: {src} has no tokenizer that names {IMAGE_TOKEN}; taking id {guess}, its place in the "
        "published vocabularies (--image-token-id sets another)",
        file=sys.stderr,
    )
    return guess


def _added_token_entries(src: Path) -> Iterator[dict[str, int]]:
    """Ids of added tokens by content, from each tokenizer file that lists them."""
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        if not (src / name).exists():
            continue
        content = read_json(src / name)
        if name == "added_tokens.json":
            yield {token: int(number) for token, number in content.items()}
        elif name == "tokenizer.json":
            yield {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or []}
        else:
            decoder = content.get("added_tokens_decoder") or {}
            yield {entry["content"]: int(number) for number, entry in decoder.items()}


# Cache of converted folders


def native_folder(published: Path, cache_dir: Path) -> Path:
    """The native form of a published folder, converted on the first call and kept in `cache_dir` by content hash.

    Safe to call from several processes: one converts, the others wait. File hashes are remembered by size and times, so
    that a large checkpoint is read once, not on every start.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    key = content_hash(published, memory=cache_dir / "hashes.json")
    folder = cache_dir / key
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(published, folder, layout="native")
    return folder


def content_hash(folder: Path, *, memory: Path | None = None) -> str:
    """SHA-256 (32 hex digits) over the names and bytes of the folder's own files and the converter's version.

    `memory` is a JSON file that keeps file hashes between calls, keyed by path, size, inode and times.
    """
    lock = FileLock(f"{memory}.lock") if memory is not None else contextlib.nullcontext()
    digest = hashlib.sha256(f"converter {CONVERTER_VERSION}\n".encode())
    with lock:
        known: dict[str, str] = {}
        if memory is not None and memory.exists():
            with contextlib.suppress(UserError):
                known = read_json(memory)
        before = len(known)
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{path.name} {_file_hash(path, known)}\n".encode())
        if memory is not None and len(known) != before:
            aside = memory.with_name(f"{memory.name}.partial")
            write_synced(aside, json.dumps(known, indent=1, sort_keys=True))
            aside.replace(memory)
    return digest.hexdigest()[:32]


def _file_hash(path: Path, known: dict[str, str]) -> str:
    real = path.resolve()
    stat = real.stat()
    key = f"{real}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    if key not in known:
        with real.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[key]
