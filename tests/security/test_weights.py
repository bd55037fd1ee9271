"""Weights from others: no pickle is opened, code beside them runs only where the recipe asks, templates are bounded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer

from mirage.config.loader import load_recipe
from mirage.errors import UserError
from mirage.models import template_trial
from mirage.models.registry import find_weights, load_adapter, load_model
from mirage.models.safetensors_stream import TensorFolder
from mirage.training.inspection import inspect_recipe
from tests.integration.test_inspection import settings

CODE = """
from pathlib import Path
from transformers import Qwen2TokenizerFast
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
class Other(Qwen2TokenizerFast):
    pass
"""


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "pytorch_model-00001-of-00001.bin"])
def test_a_pickle_is_refused_unopened(name: str, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_folders["internvl"], folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, folder / name)
    for read in (find_weights, load_model, TensorFolder):
        with pytest.raises(UserError, match=rf"pickle.*{name}"):
            read(folder)
    assert not mark.exists()


@pytest.fixture
def with_code(tmp_path: Path, tiny_folders: dict[str, Path]) -> tuple[Path, Path]:
    """A model folder whose tokenizer brings code of its own, and the mark that the code would leave."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_folders["qwen2_vl"], folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": [None, "code_of_others.Other"]}}))
    (folder / "code_of_others.py").write_text(CODE.format(mark=str(mark)))
    return folder, mark


def test_code_beside_the_tokenizer_does_not_run(with_code: tuple[Path, Path]) -> None:
    folder, mark = with_code
    assert load_adapter(folder).tokenizer is not None
    load_model(folder)
    load_model(folder, evaluation=True)
    assert not mark.exists()


def test_the_recipe_can_ask_for_it_and_that_is_said(
    with_code: tuple[Path, Path], tmp_path: Path, shapes: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, mark = with_code
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    given = [item for item in settings(shapes, "tiny_qwen2vl_mis_lora") if not item.startswith("model.tiny")]
    given += ["model.tiny=null", f"model.path={folder}"]
    caplog.set_level(logging.WARNING)
    inspect_recipe(load_recipe(given), num_samples=1, num_steps=1, world_size=1)
    assert not mark.exists() and "trust_remote_code" not in caplog.text
    inspect_recipe(load_recipe([*given, "model.trust_remote_code=true"]), num_samples=1, num_steps=1, world_size=1)
    assert mark.exists()
    assert "model.trust_remote_code=true runs code that came with the weights" in caplog.text


@pytest.mark.parametrize(
    "template, why",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        ("{{ 'a' * 9000000000 }}", "more than 1024 MiB"),
        ("{% for a in range(2000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 1,000,000 characters"),
    ],
    ids=["time", "memory", "length"],
)
def test_a_chat_template_without_end_is_stopped(
    template: str, why: str, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "MAX_SECONDS", 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["qwen2_vl"])
    chat = [{"role": "user", "content": "x"}]
    template_trial.try_template(lambda: tokenizer.apply_chat_template(chat, tokenize=False), "here")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"here: its chat template .*{why} on a short conversation"):
        template_trial.try_template(lambda: tokenizer.apply_chat_template(chat, tokenize=False), "here")


def test_a_chat_template_reaches_no_python(tiny_folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["qwen2_vl"])
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
