"""`mirage inspect`: the page shows what training would do, on the shapes dataset."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirage.cli import dispatch
from mirage.config.loader import load_recipe
from mirage.data.pictures import PictureLoader
from mirage.data.render import render_sample
from mirage.data.row import TextPart
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.models.registry import load_adapter
from mirage.training.inspection import inspect_recipe
from mirage.training.inspection_page import render_page
from mirage.training.weights import find_base
from tests.support.browser import browser_page
from tests.support.dataset import write_dataset

EVIL = '<script>alert("x")</script> & "ü𝄞'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes, one text of which is markup with letters of several bytes."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "train_general":
            row["messages"][0]["content"][-1]["text"] = EVIL
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path_factory.getbasetemp() / "inspect-cache"))


def settings(data: Path, recipe: str) -> list[str]:
    small = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 96, "vision_hidden_size": 32, "warmup_steps": 0}
    sizes = [f"model.tiny.{key}={value}" for key, value in small.items()]
    return [f"recipe={recipe}", f"data.dir={data}", "train.batch_samples=12", "data.pack_tokens=1024", *sizes]


@pytest.mark.parametrize("recipe_name", ["tiny_internvl_mis", "tiny_qwen2vl_mis_lora"])
def test_the_inspection_is_what_training_does(recipe_name: str, data: Path) -> None:
    recipe = load_recipe(settings(data, recipe_name))
    found = inspect_recipe(recipe, num_samples=40, num_steps=2, world_size=2)
    assert len(found.samples) == recipe.train.batch_samples and len(found.steps) == 2
    rows = {entry.row.id: entry for entry in load_mixture(recipe.data, seed=recipe.train.seed).rows}
    adapter = load_adapter(find_base(recipe), preprocessing=recipe.preprocessing)
    loader = PictureLoader(adapter, cache_bytes=1 << 24)
    for sample in found.samples:
        trained = render_sample(rows[sample.row_id], adapter, loader)
        assert sample.num_tokens == trained.num_tokens == sum(token.count for token in sample.tokens)
        learnt = "".join(token.text for token in sample.tokens if token.kind == "supervised")
        answers = [message.text for message in rows[sample.row_id].row.messages if message.role == "assistant"]
        assert learnt == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert sum(token.count for token in sample.tokens if token.kind == "supervised") == sample.num_supervised_tokens
        assert len(sample.pictures) == len(rows[sample.row_id].row.images)
        assert sample.num_image_tokens == sum(picture.num_tokens for picture in trained.pictures)
        asked = next(part for part in rows[sample.row_id].row.messages[0].content if isinstance(part, TextPart))
        assert asked.text in "".join(token.text for token in sample.tokens if token.kind == "prompt")
    for step in found.steps:
        assert all(len(micro_step) == 2 and max(micro_step) <= 1024 for micro_step in step.row_tokens)
        assert 0 < step.fill <= 1 <= step.imbalance
    assert sum(part.trained + part.adapters for part in found.parts) == found.counts.num_trained
    assert bool(found.lora_modules) == ("lora" in recipe_name)


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_tiles_are_the_picture(family: str, tiny_folders: dict[str, Path]) -> None:
    adapter = load_adapter(tiny_folders[family])
    ramp = np.linspace(0, 255, 112).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (56, 1)), np.tile(ramp[:56, None], (1, 112)), np.full((56, 112), 90)], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8))
    tiles = adapter.picture_images(adapter.preprocess(image, num_images=1))
    whole = tiles[0] if family == "qwen2_vl" else Image.new("RGB", (112, 56))
    if family == "internvl":
        assert len(tiles) == 3  # two tiles and the thumbnail
        for number in (0, 1):
            whole.paste(tiles[number], (56 * number, 0))
    assert whole.size == image.size and np.abs(np.asarray(whole).astype(int) - pixels).max() <= 1


def test_placeholders_are_collapsed_and_letters_are_whole(data: Path) -> None:
    recipe = load_recipe(settings(data, "tiny_internvl_mis"))
    found = inspect_recipe(recipe, num_samples=12)
    for sample in found.samples:
        runs = [token for token in sample.tokens if token.kind == "image"]
        assert len(runs) == len(sample.pictures)
        assert not any("\ufffd" in token.text for token in sample.tokens)


def test_the_page_escapes_the_data(data: Path) -> None:
    recipe = load_recipe(settings(data, "tiny_internvl_mis"))
    page = render_page(inspect_recipe(recipe, num_samples=12))
    assert "<script" not in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert EVIL in text
    assert page.count('class="supervised"') > 20 and "×" in page


def test_the_verb_writes_page_and_sheet(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen"
    arguments = [*settings(data, "tiny_qwen2vl_mis_lora"), f"out={out}", "samples=3", "steps=1", "gpus=1"]
    assert dispatch(["inspect", *arguments]) == 0
    with Image.open(out / "tiles.png") as sheet:
        assert sheet.width >= 400 and len(sheet.convert("RGB").getcolors(1 << 20) or []) > 5
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "tiles.png"]
    shown = capsys.readouterr().out
    assert "balance" in shown and "layers get adapters" in " ".join(shown.split())
    assert str(out) in shown.replace("\n", "")
    first = (out / "index.html").read_bytes()
    assert dispatch(["inspect", *arguments]) == 0 and (out / "index.html").read_bytes() == first


def test_the_page_opens_clean_and_fits_a_phone(data: Path, tmp_path: Path) -> None:
    """No console error: its policy allows all that it does."""
    recipe = load_recipe(settings(data, "tiny_internvl_mis"))
    (tmp_path / "index.html").write_text(render_page(inspect_recipe(recipe, num_samples=4)), "utf-8")
    with browser_page(width=375, height=812) as (page, errors):
        page.goto((tmp_path / "index.html").as_uri())
        assert (
            page.evaluate("[...document.images].every(image => image.naturalWidth > 0)") and page.locator("img").count()
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate("[...document.querySelectorAll('.used')].every(bar => bar.getBBox().width > 0)")
        assert not errors


@pytest.mark.parametrize("wrong, message", [("samples=0", "samples=0"), ("steps=x", "steps=x"), ("gpus=-1", "gpus=-1")])
def test_numbers_that_are_none_are_refused(wrong: str, message: str, data: Path) -> None:
    with pytest.raises(UserError, match=f"{message}: must be a whole number > 0"):
        dispatch(["inspect", *settings(data, "tiny_internvl_mis"), wrong])
