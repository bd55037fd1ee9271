"""`mirage convert`: bit-identical both ways, whole or not at all, one clear message for each mistake."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from mirage.errors import UserError
from mirage.models.convert_cli import convert_command
from mirage.models.export_gate import ExportError, check_export
from mirage.models.internvl_checkpoint import content_hash, convert, copy_published_files, native_folder
from mirage.models.safetensors_stream import TensorFolder, as_bytes
from tests.support.published import FIXTURES, small_config, write_published

MODEL = FIXTURES / "model"
TOKENIZER = FIXTURES / "tokenizer"
VOCABULARY = 1509


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder as users have it: config, shards, tokenizer, code that must not run, a licence."""
    folder = tmp_path_factory.mktemp("convert") / "published"
    config = small_config(llm={"vocab_size": VOCABULARY, "num_hidden_layers": 2}, vision={"num_hidden_layers": 2})
    config["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    write_published(folder, config, num_shards=3, dtype=torch.bfloat16)
    for path in TOKENIZER.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "expected_ids.json").unlink()
    (folder / "modeling_internvl_chat.py").write_text("raise RuntimeError('remote code ran')\n")
    (folder / "LICENSE").write_text("MIT\n")
    return folder


@pytest.fixture(scope="module")
def native(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "native"
    convert(published, folder, layout="native", check=True, max_shard_bytes=200_000)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = TensorFolder(one), TensorFolder(other)
    assert left.info == right.info
    assert all(torch.equal(as_bytes(left.read(name)), as_bytes(right.read(name))) for name in left.info)


def small_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json")
    }


# Both ways


def test_round_trip_is_bit_identical(published: Path, native: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "again", layout="published", check=True, max_shard_bytes=300_000)
    assert_same_tensors(published, tmp_path / "again")
    assert small_files(tmp_path / "again") == small_files(published)
    convert(tmp_path / "again", tmp_path / "native", layout="native")
    assert_same_tensors(native, tmp_path / "native")
    assert small_files(tmp_path / "native") == small_files(native)


def test_native_folder_loads_in_plain_transformers(native: Path) -> None:
    model, report = InternVLForConditionalGeneration.from_pretrained(native, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert json.loads((native / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.config.image_token_id == 1502
    assert model.generation_config.eos_token_id == 7
    tokenizer = AutoTokenizer.from_pretrained(native)
    for case in json.loads((TOKENIZER / "expected_ids.json").read_text()):
        assert tokenizer(case["text"])["input_ids"] == case["ids_with_bos"]
    index = json.loads((native / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        # The library's own reader accepts every shard.
        assert load_file(str(native / file))


def test_config_and_weights_alone_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    for path in MODEL.iterdir():
        if path.name == "config.json" or "safetensors" in path.name:
            shutil.copyfile(path, tmp_path / "source" / path.name)
    convert(tmp_path / "source", tmp_path / "native", layout="native")
    assert "--image-token-id" in capsys.readouterr().err
    assert json.loads((tmp_path / "native" / "config.json").read_text())["image_token_id"] == 512 - 7
    convert(tmp_path / "native", tmp_path / "again", layout="published")
    assert_same_tensors(MODEL, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (MODEL / "config.json").read_text()
    )


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("Qwen2ForCausalLM", {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}),
        ("Qwen3ForCausalLM", {"model_type": "qwen3", "head_dim": 8}),
        ("LlamaForCausalLM", {"model_type": "llama"}),
    ],
)
def test_other_language_models(architecture: str, extra: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(llm={"architectures": [architecture], "rope_scaling": None, **extra})
    write_published(tmp_path / "published", config)
    convert(tmp_path / "published", tmp_path / "native", layout="native", image_token_id=3, check=True)
    model, report = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.model_type == extra["model_type"]
    convert(tmp_path / "native", tmp_path / "again", layout="published", check=True)
    assert_same_tensors(tmp_path / "published", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_tied_language_model(tmp_path: Path) -> None:
    config = small_config(
        llm={"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "rope_scaling": None}
    )
    write_published(tmp_path / "published", config)
    shard = tmp_path / "published" / "model-00001-of-00001.safetensors"
    (tmp_path / "published" / "model.safetensors.index.json").unlink()
    tensors = load_file(str(shard))
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, str(shard))
    convert(tmp_path / "published", tmp_path / "native", layout="native", image_token_id=3, check=True)
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    convert(tmp_path / "native", tmp_path / "again", layout="published", check=True)
    assert_same_tensors(tmp_path / "published", tmp_path / "again")


def test_native_weights_of_other_origin_get_a_published_config(native: Path, tmp_path: Path) -> None:
    """A model saved by transformers itself, without the originals, is published and read back the same."""
    model = InternVLForConditionalGeneration.from_pretrained(native)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "published", layout="published", check=True)
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    assert config["llm_config"]["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert config["torch_dtype"] == "bfloat16"
    convert(tmp_path / "published", tmp_path / "native", layout="native", image_token_id=1502)
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_trained_weights_with_carried_originals(published: Path, native: Path, tmp_path: Path) -> None:
    model = InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "trained")
    copy_published_files(native, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "published", layout="published", check=True)
    assert (tmp_path / "published" / "config.json").read_bytes() == (published / "config.json").read_bytes()
    assert (tmp_path / "published" / "tokenizer.model").read_bytes() == (TOKENIZER / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    config["text_config"]["rope_parameters"]["factor"] = 4.0
    (tmp_path / "trained" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"text_config\.rope_parameters\.factor differ"):
        convert(tmp_path / "trained", tmp_path / "other", layout="published")


# Mistakes


def edit_config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensor(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(str(path))
        edit(tensors)
        save_file(tensors, str(path))

    return apply


def to_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def escape(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))


FIRST = "language_model.model.layers.0.attention.wqkv.weight"
MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing_shard": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        r"shard model-00002.* is missing",
    ),
    "torn_shard": (truncate, r"model-00002.*is not a whole safetensors file"),
    "shard_outside": (escape, r"names '\.\./model-00002.*beside the index"),
    "index_disagrees": (
        edit_tensor(lambda tensors: tensors.pop(min(tensors))),
        r"lists tensor .* which does not hold it",
    ),
    "wrong_shape": (
        edit_config(lambda config: config["llm_config"].update(intermediate_size=161)),
        r"tensor 'language_model\.model\.layers\.0\.feed_forward\.w[123]\.weight' has shape",
    ),
    "missing_tensor": (
        edit_config(lambda config: config["llm_config"].update(num_hidden_layers=3)),
        r"7 tensors are missing",
    ),
    "unknown_tensor": (
        edit_config(lambda config: config["vision_config"].update(num_hidden_layers=1)),
        r"has no place for",
    ),
    "no_index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), r"3 safetensors files and no"),
    "pickle": (to_pickle, r"pickle checkpoint \(pytorch_model\.bin\)"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "bad_json": (lambda folder: (folder / "config.json").write_text("{,"), r"config\.json:1: not valid JSON"),
    "unknown_language_model": (
        edit_config(
            lambda config: config["llm_config"].update(architectures=["Other"], auto_map={"AutoModel": "other.Other"})
        ),
        r"'Other', and it would need remote code \(auto_map\), which MIRage never runs; known are InternLM2ForCausalLM",
    ),
    "unknown_model": (
        edit_config(lambda config: config.update(model_type="other", auto_map={"AutoModel": "other.Other"})),
        r"model_type is 'other' and asks for remote code",
    ),
    "unknown_vision": (
        edit_config(lambda config: config["vision_config"].update(architectures=["Eva"])),
        r"vision architecture 'Eva' is unknown",
    ),
    "old_shuffle": (edit_config(lambda config: config.update(ps_version="v1")), r"ps_version must be 'v2'"),
    "no_number": (edit_config(lambda config: config["llm_config"].pop("hidden_size")), r"hidden_size must be a number"),
    "unmerged_lora": (edit_config(lambda config: config.update(use_llm_lora=16)), r"merge the LoRA weights"),
    "tied_with_own_head": (
        edit_config(lambda config: config["llm_config"].update(tie_word_embeddings=True)),
        r"tie_word_embeddings is true and language_model\.output\.weight differs",
    ),
    "damaged_tokenizer": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"x"),
        r"is not a sentencepiece model",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_message_and_leaves_nothing(name: str, published: Path, tmp_path: Path) -> None:
    spoil, message = MISTAKES[name]
    source = copy_of(published, tmp_path / "source")
    spoil(source)
    with pytest.raises(UserError, match=message) as error:
        convert(source, tmp_path / "out" / "native", layout="native")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_wrong_direction_and_existing_target(published: Path, native: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in the native layout already"):
        convert(native, tmp_path / "new", layout="native")
    with pytest.raises(UserError, match="in the published layout already"):
        convert(published, tmp_path / "new", layout="published")
    with pytest.raises(UserError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "new", layout="native")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(published, tmp_path / "there", layout="native")
    assert not list((tmp_path / "there").iterdir())


def test_check_finds_a_changed_byte(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mirage.models.internvl_checkpoint as module

    write = module.write_tensors

    def spoil(folder: Path, *args: Any, **settings: Any) -> None:
        write(folder, *args, **settings)
        path = sorted(folder.glob("*.safetensors"))[0]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    monkeypatch.setattr(module, "write_tensors", spoil)
    with pytest.raises(UserError, match="reads back differently"):
        convert(published, tmp_path / "native", layout="native", check=True)
    assert not list(tmp_path.iterdir())


def test_killed_conversion_leaves_no_target_and_the_next_one_is_whole(published: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from mirage.models.internvl_checkpoint import convert\n"
        "convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), layout='native', "
        "progress=lambda done, total: time.sleep(0.2))\n"
    )
    target = tmp_path / "native"
    process = subprocess.Popen([sys.executable, "-c", script, str(published), str(target)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("native.partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "native.partial").exists() and not target.exists()
    convert(published, target, layout="native", check=True)
    assert not (tmp_path / "native.partial").exists()
    convert(published, tmp_path / "other", layout="native")
    for path in target.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "other" / path.relative_to(target)).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["native", "published"])
def test_peak_memory_is_about_one_shard_and_one_tensor(layout: Any, tmp_path: Path) -> None:
    config = small_config(
        llm={"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8000},
    )
    source = tmp_path / "published"
    write_published(source, config, num_shards=5, dtype=torch.bfloat16)
    if layout == "published":
        convert(source, tmp_path / "native", layout="native", image_token_id=3, max_shard_bytes=20_000_000)
        source = tmp_path / "native"
    infos = TensorFolder(source).info.values()
    total, largest = sum(info.num_bytes for info in infos), max(info.num_bytes for info in infos)
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total > 2 * (shard + largest)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    convert(source, tmp_path / "out", layout=layout, image_token_id=3, max_shard_bytes=20_000_000)
    assert _resident_bytes("VmHWM") - before < 1.15 * (shard + largest)


def _resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


# Command line


def test_command(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_command([str(published), str(tmp_path / "native"), "--layout", "native", "--check"]) == 0
    assert "every tensor compared" in capsys.readouterr().out
    assert convert_command([str(tmp_path / "native"), str(tmp_path / "back"), "--layout", "published"]) == 0
    assert_same_tensors(published, tmp_path / "back")
    with pytest.raises(UserError, match="above 0"):
        convert_command([str(published), str(tmp_path / "x"), "--layout", "native", "--max-shard-gb", "0"])


# Cache


def _native_folder(arguments: tuple[Path, Path]) -> str:
    return str(native_folder(*arguments))


def test_cache_is_shared_keyed_by_content_and_safe_between_processes(published: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        first, second = pool.map(_native_folder, [(published, cache)] * 2)
    assert first == second
    moved = copy_of(published, tmp_path / "moved")
    assert native_folder(moved, cache) == Path(first)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    remembered = content_hash(moved, memory=cache / "hashes.json")
    assert remembered == content_hash(moved)
    edit_config(lambda config: config.update(max_dynamic_patch=6))(moved)
    assert content_hash(moved, memory=cache / "hashes.json") == content_hash(moved) != remembered
    assert native_folder(moved, cache) != Path(first)


# The export gate


@pytest.fixture(scope="module")
def prompt(native: Path) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 1400, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 5:9] = 1502
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))}


def logits_of(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**prompt, use_cache=False).logits


@pytest.fixture(scope="module")
def model(native: Path) -> Any:
    return InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32)


def test_gate_passes_both_layouts(model: Any, native: Path, published: Path, prompt: Any) -> None:
    reference = logits_of(model, prompt)
    before = sorted(published.parent.iterdir())
    assert check_export(native, inputs=prompt, reference_logits=reference) < 1e-5
    assert check_export(published, inputs=prompt, reference_logits=reference) < 1e-5
    assert sorted(published.parent.iterdir()) == before


def test_gate_refuses_wrong_exports(model: Any, native: Path, prompt: Any, tmp_path: Path) -> None:
    reference = logits_of(model, prompt)
    for bad in (reference * 1.01, torch.full_like(reference, float("nan")), reference[:, :, :-1]):
        with pytest.raises(ExportError, match="logits"):
            check_export(native, inputs=prompt, reference_logits=bad)
    tied = copy_of(native, tmp_path / "tied")
    edit_config(lambda config: config.update(tie_word_embeddings=True))(tied)
    with pytest.raises(ExportError, match="tie_word_embeddings"):
        check_export(tied, inputs=prompt, reference_logits=reference)
    for name, keys, message in (
        ("wrapped", lambda key: f"module.{key}", "wrapper's name"),
        ("unknown", lambda key: key.replace("mlp.fc1", "mlp.fc3"), "missing keys|unexpected keys"),
    ):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tensors = load_file(str(folder / "model.safetensors"))
        save_file(
            {keys(key): tensor for key, tensor in tensors.items()}, str(folder / "model.safetensors"), {"format": "pt"}
        )
        with pytest.raises(ExportError, match=message):
            check_export(folder, inputs=prompt, reference_logits=reference)


def test_gate_loads_adapters_with_plain_peft(native: Path, prompt: Any, tmp_path: Path) -> None:
    base = InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q|v)_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(base, config)
    reference = logits_of(wrapped, prompt)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    assert check_export(tmp_path / "adapter", inputs=prompt, reference_logits=reference, base=native) < 1e-5
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(str(weights))
    save_file(dict(list(tensors.items())[1:]), str(weights))
    with pytest.raises(ExportError, match="do not match the base model"):
        check_export(tmp_path / "adapter", inputs=prompt, reference_logits=reference, base=native)
