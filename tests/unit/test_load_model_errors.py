"""`load_model` on damaged or foreign folders: one message each, nothing filled with random numbers, no code run."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage.config.schema import LoraConfig, ModelConfig
from mirage.errors import UserError
from mirage.models import load_model
from mirage.models.lora import select_trainable

WEIGHTS = "model.safetensors"


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def edit_tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(str(folder / name))
        edit(tensors)
        save_file(tensors, str(folder / name), {"format": "pt"})

    return apply


def in_shards(folder: Path) -> None:
    model, _ = load_model(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def torn(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    edit_json("config.json", lambda config: config.update(model_type="other", auto_map={"AutoConfig": "code.Other"}))(
        folder
    )
    (folder / "code.py").write_text("raise RuntimeError('remote code ran')\n")


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing_shard": (without_a_shard, r"shard model-00002.* is missing"),
    "torn": (torn, r"model\.safetensors: is not a whole safetensors file"),
    "wrong_shape": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 5)})),
        r"other shapes .*\(1, the first is 'lm_head\.weight'\)",
    ),
    "missing_tensor": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.pop("lm_head.weight")),
        r"the weights lack \(1, the first is 'lm_head\.weight'\)",
    ),
    "more_layers": (
        edit_json("config.json", lambda config: config["text_config"].update(num_hidden_layers=3, layer_types=None)),
        r"that the weights lack",
    ),
    "left_over": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.update(stray=torch.zeros(2))),
        r"no place for \(1, the first is 'stray'\)",
    ),
    "pickle": (to_pickle, r"no \.safetensors weights but pickles \(pytorch_model\.bin\)"),
    "unknown_model": (
        edit_json("config.json", lambda config: config.update(model_type="other")),
        r"model_type 'other' is not one of internvl, internvl_chat, qwen2_vl$",
    ),
    "remote_code": (
        remote_code,
        r"'other' is not one of .* asks for remote code \(auto_map\), which MIRage does not run",
    ),
    "no_config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "no_json": (lambda folder: (folder / "config.json").write_text("{,"), r"config\.json:1: not valid JSON"),
    "no_object": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
    "strange_config": (
        edit_json("config.json", lambda config: config.update(text_config=3)),
        r"config\.json: is not a usable config",
    ),
}


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_message(tiny_folders, tmp_path, name, evaluation):
    spoil, message = MISTAKES[name]
    folder = Path(shutil.copytree(tiny_folders["qwen2_vl"], tmp_path / "model"))
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder, evaluation=evaluation)
    assert "\n" not in str(error.value)


def test_shards_and_tied_heads_load(tiny_folders, tmp_path):
    folder = Path(shutil.copytree(tiny_folders["qwen2_vl"], tmp_path / "shards"))
    in_shards(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    whole, split = load_model(tiny_folders["qwen2_vl"])[0], load_model(folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters(), strict=True))
    tied = Path(shutil.copytree(tiny_folders["qwen2_vl"], tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    weights = load_file(str(tied / WEIGHTS))
    del weights["lm_head.weight"]
    save_file(weights, str(tied / WEIGHTS), metadata={"format": "pt"})
    model, _ = load_model(tied)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.fixture(scope="module")
def adapter_folder(tiny_folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    base = tiny_folders["internvl"]
    model, adapter = load_model(base)
    config = ModelConfig(family="internvl", path=str(base), train=("projector",), lora=LoraConfig(rank=2))
    wrapped = select_trainable(model, adapter, config, base=str(base), seed=0)
    assert wrapped is not None
    wrapped.save_pretrained(str(folder))
    adapter.save_files(folder)
    return folder


ADAPTER = "adapter_model.safetensors"


def adapter_to_pickle(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    torch.save({}, folder / "adapter_model.bin")


def first_to(value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], Any]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        del tensors[name]
        if value is not None:
            tensors[name] = value

    return edit


ADAPTER_MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (adapter_to_pickle, r"no adapter_model\.safetensors \(adapter_model\.bin is a pickle"),
    "torn": (lambda folder: (folder / ADAPTER).write_bytes(b"x" * 20), r"is not a whole safetensors file"),
    "missing_tensor": (edit_tensors(ADAPTER, first_to(None)), r"1 adapter tensors do not fit"),
    "left_over": (
        edit_tensors(ADAPTER, lambda tensors: tensors.update({"base_model.model.stray.lora_A.weight": torch.ones(1)})),
        r"1 adapter tensors do not fit .*'base_model\.model\.stray\.lora_A\.weight'",
    ),
    "wrong_shape": (
        edit_tensors(ADAPTER, first_to(torch.zeros(7, 3))),
        r"does not fit its base model \(.*size mismatch",
    ),
    "base_gone": (
        edit_json("adapter_config.json", lambda config: config.update(base_model_name_or_path="/nowhere/base")),
        r"the base model /nowhere/base is not there",
    ),
    "no_base": (
        edit_json("adapter_config.json", lambda config: config.pop("base_model_name_or_path")),
        r"names no base_model_name_or_path",
    ),
}


@pytest.mark.parametrize("name", ADAPTER_MISTAKES)
def test_each_mistake_in_an_adapter_is_one_message(adapter_folder, tmp_path, name):
    spoil, message = ADAPTER_MISTAKES[name]
    load_model(adapter_folder)
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_two_threads_loading_at_once_leave_transformers_as_it_was(tiny_folders, monkeypatch):
    import transformers.initialization as initialization
    from transformers import PreTrainedModel

    tie_weights, unpatched = PreTrainedModel.tie_weights, initialization.no_tie_weights

    @contextlib.contextmanager
    def slowly():
        with unpatched():
            time.sleep(0.3)
            yield

    monkeypatch.setattr(initialization, "no_tie_weights", slowly)
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(load_model, tiny_folders["qwen2_vl"])
            time.sleep(0.15)
            second = pool.submit(load_model, tiny_folders["qwen2_vl"])
            first.result(), second.result()
        assert PreTrainedModel.tie_weights is tie_weights
    finally:
        PreTrainedModel.tie_weights = tie_weights
