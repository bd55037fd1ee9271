"""Recipes from files and overrides: typed values, one message for all mistakes, nearest keys, canonical output."""

from __future__ import annotations

import io
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from rapidfuzz.distance import OSA
from rich.console import Console

from mirage.config import load_recipe
from mirage.config.describe import print_schema
from mirage.config.keys import SYNONYMS, all_keys, nearest_key, nearest_word, resolve, split
from mirage.config.loader import (
    find_recipe,
    list_recipes,
    load_section,
    recipe_hash,
    require_weights,
    resolved_json,
    with_newer_options,
)
from mirage.config.schema import EvalConfig, Recipe
from mirage.config.values import Scalar, format_value, is_section, item_type, parse_scalar, strip_optional
from mirage.errors import UserError

BASE = """\
# A probe recipe.
model:
  family: internvl
  path: /weights
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "probe.yaml"
    file.write_text(BASE)
    return file


def message(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(args)
    return str(caught.value)


# Values


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.lr", "1e-5", 1e-5),
        ("train.lr", "3", 3.0),
        ("train.batch_samples", "010", 10),
        ("train.batch_samples", "1_000", 1000),
        ("train.max_steps", "null", None),
        ("train.max_steps", "7", 7),
        ("name", "no", "no"),
        ("name", "010", "010"),
        ("tracking.project", "3:30", "3:30"),
        ("tracking.project", "1e-5", "1e-5"),
        ("tracking.entity", "null", None),
        ("tracking.entity", '"null"', "null"),
        ("tracking.entity", "'none'", "none"),
        ("preprocessing.system_prompt", "", ""),
        ("preprocessing.thumbnail", "no", False),
        ("preprocessing.thumbnail", "True", True),
        ("train.zero_stage", "2", 2),
        ("train.betas", "0.9,0.95", (0.9, 0.95)),
        ("train.betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("model.train", "language", ("language",)),
        ("model.train", "vision, projector", ("vision", "projector")),
        ("model.train", '["vision", "projector"]', ("vision", "projector")),
        ("eval.tasks", "mis_easy,010,no", ("mis_easy", "010", "no")),
        ("tracking.tags", "[]", ()),
        ("data.dir", "a b/c=d", Path("a b/c=d")),
    ],
)
def test_override_is_read_by_the_type_of_its_field(recipe_file: Path, key: str, text: str, expected: Any) -> None:
    value: Any = load_recipe([f"recipe={recipe_file}", f"{key}={text}"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_file_values_are_read_by_type_too(recipe_file: Path) -> None:
    recipe_file.write_text(
        BASE
        + "name: 010\n"
        + "train: {lr: 1e-5, batch_samples: 010, max_steps: null}\n"
        + "tracking: {project: no, entity: 'null', tags: [3:30, off]}\n"
    )
    recipe = load_recipe([f"recipe={recipe_file}"])
    assert (recipe.train.lr, recipe.train.batch_samples, recipe.train.max_steps) == (1e-5, 10, None)
    assert (recipe.name, recipe.tracking.project, recipe.tracking.entity) == ("010", "no", "null")
    assert recipe.tracking.tags == ("3:30", "off")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=fast", "must be a number > 0, found 'fast'"),
        ("train.lr=nan", "must be a number > 0, found 'nan'"),
        ("train.lr=inf", "must be a number > 0, found 'inf'"),
        ("train.lr=0", "must be a number > 0, found 0"),
        ("train.lr=null", "must be a number"),
        ("train.batch_samples=1e2", "must be a whole number"),
        ("train.max_steps=none", "write null for no value"),
        ("tracking.entity=None", 'write null for no value, or "none" in quotes for the word'),
        ("train.precision=fp8", "must be one of bf16, fp32, found 'fp8'"),
        ("train.zero_stage=4", "must be one of 1, 2, 3, found '4'"),
        ("train.betas=0.9", "must have 2 items, found 1"),
        ("model.train=vision,eyes", "must be one of vision, projector, language, found 'eyes'"),
        ("preprocessing.thumbnail=maybe", "must be true or false"),
        ("data.sources=train", "must be a list of sections, like [{split: train}]"),
        ("train=fast", "is a section with keys of its own (lr, epochs, max_steps, batch_samples, ...)"),
        ("preprocessing.image_size=100", "must be a whole number > 0, a multiple of 28, found 100"),
        ("name=a/b", "must match ^[A-Za-z0-9][A-Za-z0-9._-]*$, found 'a/b'"),
        ("data.sources=[{split: train", "not valid YAML"),
    ],
)
def test_bad_value_says_what_is_wanted(recipe_file: Path, override: str, said: str) -> None:
    text = message(f"recipe={recipe_file}", override)
    assert text.startswith("1 problem in recipe probe + 1 override\n")
    assert said in text and override.split("=")[0] in text


def _schema_types(model: type[BaseModel] = Recipe) -> Iterator[tuple[str, Any]]:
    for key, field in all_keys(model):
        yield key, field.annotation


def test_every_schema_type_is_known_to_the_parser() -> None:
    for key, annotation in _schema_types():
        kind, _ = strip_optional(annotation)
        if is_section(kind):
            continue
        leaf = item_type(kind) if item_type(kind) is not None else kind
        if is_section(leaf):
            continue
        try:
            parse_scalar(Scalar("x"), leaf)
        except ValueError:
            continue
        assert leaf in (str, Path), key


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite)
def test_floats_come_back_exactly(value: float) -> None:
    assert parse_scalar(Scalar(repr(value)), float) == value
    assert parse_scalar(Scalar(format_value(value)), float) == value


@given(st.integers(), st.integers(min_value=0, max_value=5))
def test_integers_are_decimal_whatever_their_zeros(value: int, zeros: int) -> None:
    text = ("-" if value < 0 else "") + "0" * zeros + str(abs(value))
    assert parse_scalar(Scalar(text), int) == value


@given(st.text())
def test_text_is_kept_as_it_is(text: str) -> None:
    assert parse_scalar(Scalar(text, quoted=True), str) == text
    if text not in ("null", "Null", "NULL", "~"):
        assert parse_scalar(Scalar(text), str) == text


@given(st.text(min_size=1))
def test_any_text_for_a_number_is_a_number_or_a_plain_message(text: str) -> None:
    for kind in (int, float, bool, int | None):
        try:
            value = parse_scalar(Scalar(text), kind)
        except ValueError as error:
            assert str(error).startswith(("must be", "write null"))
        else:
            assert value is None or isinstance(value, (int, float))


@given(st.lists(st.sampled_from(["vision", "projector", "language"]), min_size=1, max_size=3, unique=True))
def test_lists_read_alike_with_commas_as_yaml_and_as_json(groups: list[str]) -> None:
    texts = [",".join(groups), "[" + ", ".join(groups) + "]", json.dumps(groups)]
    recipes = [load_recipe(["recipe=internvl_mis", f"model.train={text}"]) for text in texts]
    assert {recipe.model.train for recipe in recipes} == {tuple(groups)}


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_gives_a_recipe_or_a_user_error(key: str, text: str) -> None:
    try:
        load_recipe(["recipe=internvl_mis", f"{key}={text}"])
    except UserError as error:
        assert "problem" in str(error) or "recipe=" in str(error)


# Nested keys


def test_nested_optional_section_appears_with_its_first_key(recipe_file: Path) -> None:
    recipe = load_recipe([f"recipe={recipe_file}", "model.lora.rank=8", "model.train=projector"])
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (8, 32)
    assert load_recipe(["recipe=internvl_mis_lora", "model.lora=null"]).model.lora is None


def test_section_as_a_whole_and_list_items(recipe_file: Path) -> None:
    recipe = load_recipe([f"recipe={recipe_file}", "model.lora={rank: 8, dropout: 1e-1}", "model.train=[]"])
    assert recipe.model.lora is not None and recipe.model.lora.dropout == 0.1
    weights = load_recipe(["recipe=internvl_mis", "data.sources.0.weight=2", "data.sources.2.split=train_twins"])
    assert [(source.split, source.weight) for source in weights.data.sources] == [
        ("train", 2.0),
        ("train_general", 1.0),
        ("train_twins", 1.0),
    ]
    # No file names sources: the item is one of the default's.
    assert load_recipe([f"recipe={recipe_file}", "data.sources.0.weight=3"]).data.sources[0].weight == 3
    assert "the list has 1 items; the next position is 1" in message(f"recipe={recipe_file}", "data.sources.5.split=a")
    assert load_recipe([f"recipe={recipe_file}", "train.betas.1=0.95"]).train.betas == (0.9, 0.95)


def test_inner_mistakes_of_a_whole_section_are_found(recipe_file: Path) -> None:
    text = message(f"recipe={recipe_file}", "data.sources=[{split: train, weigth: 2, max_samples: many}]")
    assert "unknown key; did you mean data.sources.0.weight?" in text
    assert "data.sources.0.max_samples must be a whole number > 0 or null, found 'many'" in text


# Messages


def test_all_mistakes_in_one_message(recipe_file: Path) -> None:
    text = message(
        f"recipe={recipe_file}",
        "train.lrr=1e-5",
        "train.precision=fp8",
        "learning_rate=3",
        "trian.lr=1",
        "model.lora.r=8",
        "data.sources.0.weigth=2",
        "--train.lr=1",
        "train.epochs",
        "zzz=1",
        "model.path.x=2",
    )
    assert text == (
        "10 problems in recipe probe + 8 overrides\n"
        "  --train.lr=1             write it without dashes: train.lr=1\n"
        "  train.epochs             has no value; write train.epochs=value, without spaces around =\n"
        "  train.precision=fp8      must be one of bf16, fp32, found 'fp8'\n"
        "  train.lrr=1e-5           unknown key; did you mean train.lr?   (a number > 0, now 5e-6)\n"
        "  learning_rate=3          unknown key; did you mean train.lr?   (a number > 0, now 5e-6)\n"
        "  trian.lr=1               unknown key; did you mean train.lr?   (a number > 0, now 5e-6)\n"
        "  model.lora.r=8           unknown key; did you mean model.lora.rank?   (a whole number > 0, now 16)\n"
        "  data.sources.0.weigth=2  unknown key; did you mean data.sources.0.weight?   (a number > 0, now 1)\n"
        "  zzz=1                    unknown key; a recipe has name, run_dir, model, preprocessing, data, train, "
        "checkpoint, eval, tracking\n"
        "  model.path.x=2           unknown key; model.path has no keys of its own\n"
        "Run with --help to list every key."
    )


def test_mistake_in_a_file_names_file_and_line(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "trian:\n  lr: 1e-5\ntrain:\n  epochs: two\n  wd: 0.1\n")
    text = message(f"recipe={recipe_file}")
    assert f"{recipe_file}:5: trian  unknown key; did you mean train?   (a section: lr, epochs" in text
    assert f"{recipe_file}:8: train.epochs  must be a number > 0, found 'two'" in text
    assert f"{recipe_file}:9: train.wd  unknown key; did you mean train.weight_decay?" in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("num_epochs", "train.epochs"),
        ("epochs", "train.epochs"),
        ("batch_size", "train.batch_samples"),
        ("train.batch_size", "train.batch_samples"),
        ("eval.batchsize", "eval.batch_size"),
        ("output_dir", "run_dir"),
        ("rundir", "run_dir"),
        ("model.lora_rank", "model.lora.rank"),
        ("lora.rank", "model.lora.rank"),
        ("train.gradient_checkpoint", "train.gradient_checkpointing"),
        ("max_tile", "preprocessing.max_tiles"),
        ("eval.taks", "eval.tasks"),
        ("data.source", "data.sources"),
        ("data.sources.3.max_sample", "data.sources.3.max_samples"),
        ("preprocesing.image_size", "preprocessing.image_size"),
        ("train.warm-up_ratio", "train.warmup_ratio"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("completely_different_thing", None),
    ],
)
def test_nearest_key(typed: str, meant: str | None) -> None:
    assert nearest_key(split(typed)) == meant


def test_every_synonym_leads_to_a_key() -> None:
    for other, key in SYNONYMS.items():
        assert resolve(split(key)).field is not None, other


@settings(deadline=None)
@given(st.sampled_from([key for key, _ in all_keys() if "N" not in key.split(".")]), st.data())
def test_one_wrong_letter_is_understood(key: str, data: st.DataObject) -> None:
    parent, _, last = key.rpartition(".")
    position = data.draw(st.integers(0, len(last)))
    typed = f"{parent}.{last[:position]}q{last[position:]}" if parent else last[:position] + "q" + last[position:]
    assert OSA.distance(nearest_key(split(typed)) or "", typed) == 1


@pytest.mark.parametrize("line", ['name: "\\udc80x"', '"\\ud83d": 1'])
def test_half_a_character_is_refused(line: str, recipe_file: Path) -> None:
    recipe_file.write_text(f"{BASE}{line}\n")
    expected = f"{recipe_file}:5: an escape (\\ud800 to \\udfff) is half a character; write the character itself"
    assert message(f"recipe={recipe_file}") == expected


def test_key_given_twice(recipe_file: Path) -> None:
    assert "train.lr=2  given twice; the other one is train.lr=1" in message(
        f"recipe={recipe_file}", "train.lr=1", "train.lr=2"
    )
    assert "model.lora={alpha: 1} sets it too" in message(
        f"recipe={recipe_file}", "model.lora.rank=8", "model.lora={alpha: 1}"
    )
    assert "given twice" in message("recipe=internvl_mis", "recipe=qwen2vl_mis")
    recipe_file.write_text(BASE + "train:\n  lr: 1\n  lr: 2\n")
    assert message(f"recipe={recipe_file}") == f"{recipe_file}:7: 'lr' is given twice, first in line 6"


def test_unknown_recipe_lists_them_with_their_first_line() -> None:
    text = message("recipe=internvl_msi")
    assert text.startswith(
        "recipe=internvl_msi: no recipe has this name; did you mean recipe=internvl_mis?\nRecipes:\n"
    )
    assert re.search(r"\n  qwen2vl_mis_lora +Qwen2-VL-7B-Instruct, adapters", text)
    assert "_base" not in text
    assert message().startswith("no recipe is given; write recipe=NAME.\nRecipes:")
    assert message("recipe=no/such.yaml").startswith("recipe=no/such.yaml: there is no such file.")
    assert nearest_word("internvl", ["qwen2vl_mis", "tiny_internvl_mis"]) == "tiny_internvl_mis"


def test_rule_between_keys_points_to_the_override(recipe_file: Path) -> None:
    assert "\n  model.path=/w  give either model.path or model.tiny, not both\n" in message(
        "recipe=tiny_internvl_mis", "model.path=/w"
    )
    override = "preprocessing.min_pixels=9999999"
    assert f"\n  {override}  preprocessing.min_pixels=9999999 is above" in message(f"recipe={recipe_file}", override)
    recipe_file.write_text(BASE + "preprocessing: {min_pixels: 9999999}\n")
    assert f"{recipe_file}:5: preprocessing  preprocessing.min_pixels=9999999 is above" in message(
        f"recipe={recipe_file}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "a recipe is a list of 'key: value' lines"),
        ("model: {family: internvl\n", "not valid YAML"),
        ("a: &x [*x]\n", "an alias contains itself"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
        ("extends: nowhere\n", "extends: nowhere: there is no such recipe."),
        ("extends: [a, b]\n", "extends must be the name or path of one recipe"),
        ("", "model  is missing: Which model, where its weights are, and which parts are trained; a section"),
        (
            "model: {}\n",
            "model.family  is missing: Architecture family: internvl or qwen2_vl; one of internvl, qwen2_vl",
        ),
        ("model:\n  family: internvl\ntrain:\n", "is a section with keys of its own (lr, epochs, max_steps"),
        ("model: {family: [internvl]}\n", "must be one of internvl, qwen2_vl, found a list"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    found = message(f"recipe={file}")
    assert said in found and ("broken.yaml" in found or "in recipe broken" in found)


# Files


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(
        "name: top\nrun_dir: elsewhere\nmodel: {family: internvl, path: /w}\n"
        "train: {lr: 1, epochs: 7}\ndata: {sources: [{split: a}, {split: b}]}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: top.yaml\ntrain: {lr: 2}\nmodel: {lora: {rank: 4}, train: []}\n")
    (tmp_path / "leaf.yaml").write_text("extends: middle\ntrain: {lr: 3}\ndata: {sources: [{split: c}]}\n")
    recipe = load_recipe([f"recipe={tmp_path / 'leaf.yaml'}", "train.clip_norm=9"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.clip_norm) == (3, 7, 9)
    assert [source.split for source in recipe.data.sources] == ["c"]
    assert recipe.model.lora is not None and recipe.model.lora.rank == 4
    # A recipe does not write into the run of the one it extends.
    assert (recipe.name, recipe.run_dir) == ("leaf", Path("runs/leaf"))


def test_extends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    assert "extends goes in a circle: a.yaml -> b.yaml -> a.yaml" in message(f"recipe={tmp_path / 'a.yaml'}")


def test_recipes_of_the_current_folder_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "internvl_mis.yaml").write_text("# Mine.\nextends: _base\nmodel: {family: internvl}\n")
    monkeypatch.chdir(tmp_path)
    assert list_recipes()["internvl_mis"] == "Mine."
    assert find_recipe("internvl_mis") == Path("recipes/internvl_mis.yaml")
    # What it extends is found in the project's folder.
    assert load_recipe(["recipe=internvl_mis"]).data.sources[1].max_samples == 500


def test_name_and_run_dir_defaults(recipe_file: Path) -> None:
    assert load_recipe([f"recipe={recipe_file}"]).run_dir == Path("runs/probe")
    assert load_recipe([f"recipe={recipe_file}", "name=other"]).run_dir == Path("runs/other")
    assert load_recipe([f"recipe={recipe_file}", "run_dir=/x"]).name == "probe"


# Output


def test_recipe_is_frozen_and_resolved_json_is_canonical(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe([f"recipe={recipe_file}", "train.epochs=2"])
    with pytest.raises(ValidationError):
        recipe.train.lr = 1  # type: ignore[misc]
    default = load_recipe([f"recipe={recipe_file}"])
    assert resolved_json(recipe) == resolved_json(default) and recipe == default
    assert recipe_hash(recipe) != recipe_hash(load_recipe([f"recipe={recipe_file}", "train.epochs=3"]))
    assert len(recipe_hash(recipe)) == 12 and int(recipe_hash(recipe), 16) >= 0
    # A default that was never validated is the same recipe.
    assert resolved_json(Recipe.model_validate(json.loads(resolved_json(recipe)))) == resolved_json(recipe)
    saved = tmp_path / "saved.json"
    saved.write_text(resolved_json(recipe))
    assert load_recipe([f"recipe={saved}"]) == recipe


def test_an_option_that_a_run_was_written_without_has_its_default(recipe_file: Path) -> None:
    recipe = load_recipe([f"recipe={recipe_file}", "data.sources=[{path: /a}]", "data.num_workers=3"])
    now, before = json.loads(resolved_json(recipe)), json.loads(resolved_json(recipe))
    del before["data"]["check_pictures"], before["preprocessing"], before["data"]["sources"][0]["max_samples"]
    assert with_newer_options(before) == now
    before["data"]["num_workers"], before["data"]["gone"] = 2, True
    now["data"]["num_workers"], now["data"]["gone"] = 2, True
    assert with_newer_options(before) == now


@pytest.mark.parametrize("name", list(list_recipes()))
def test_resolved_json_loads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe([f"recipe={name}"])
    (tmp_path / "saved.json").write_text(resolved_json(recipe))
    assert load_recipe([f"recipe={tmp_path / 'saved.json'}"]) == recipe


def test_help_lists_every_key_with_its_sentence() -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    print_schema(console=console)
    text = console.export_text()
    for key, field in all_keys():
        assert f"\n{key} " in text or f"\n{key}\n" in text, key
        assert field.description or is_section(strip_optional(field.annotation)[0]), f"{key} has no docstring"
    assert "train.lr = 5e-6   a number > 0\n    Peak learning rate." in text
    assert "model.family = (required)   one of internvl, qwen2_vl" in text
    assert "a,b or [a, b]" in text


def test_section_alone() -> None:
    config = load_section("eval", ["tasks=mis_hard", "max_samples=5"], base={"batch_size": 3})
    assert config == EvalConfig(tasks=("mis_hard",), max_samples=5, batch_size=3)
    with pytest.raises(UserError) as caught:
        load_section("eval", ["taks=mis_hard", "judge=gpt"])
    assert str(caught.value).startswith(
        "2 problems in the eval settings\n  judge=gpt      must be one of rule, endpoint, guard, found 'gpt'\n"
    )
    assert "  taks=mis_hard  unknown key; did you mean tasks?" in str(caught.value)


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        require_weights(load_recipe(["recipe=qwen2vl_mis"]))
    assert "model.path is not set" in str(caught.value)
    for way in ("model.path=Qwen/Qwen2-VL-7B-Instruct", "recipe=tiny_qwen2vl_mis", "make datagen", "data/mis"):
        assert way in str(caught.value)
    with pytest.raises(UserError, match="is no folder"):
        require_weights(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path / 'none'}"]))
    with pytest.raises(UserError, match=r"has no config\.json"):
        require_weights(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path}"]))
    require_weights(load_recipe(["recipe=qwen2vl_mis", "model.path=Qwen/Qwen2-VL-7B-Instruct"]))
    require_weights(load_recipe(["recipe=tiny_qwen2vl_mis"]))


def test_yaml_of_the_recipes_reads_alike_by_a_plain_parser() -> None:
    # Somebody's editor and linter read the files as plain YAML; nothing in them may depend on our reading.
    for name in list_recipes():
        plain = yaml.safe_load(find_recipe(name).read_text())
        recipe = load_recipe([f"recipe={name}"]).model_dump()
        for section, values in plain.items():
            if section == "extends" or not isinstance(values, dict):
                continue
            for key, value in values.items():
                ours = recipe[section][key]
                if isinstance(value, str) and isinstance(ours, float):
                    assert float(value) == ours  # 1e-5, which YAML 1.1 calls text
                elif not isinstance(value, (dict, list)):
                    assert value == ours or (isinstance(ours, Path) and Path(value) == ours), (name, section, key)


def test_type_helpers() -> None:
    assert strip_optional(int | None) == (int, True) and strip_optional(int) == (int, False)
    assert get_origin(tuple[int, ...]) is tuple and get_args(tuple[int, ...])[0] is int
    assert item_type(tuple[float, float], 2) is None and item_type(str) is None
    assert isinstance(int | None, types.UnionType)


def test_bytes_that_are_no_text_on_a_command_line_are_refused() -> None:
    for key in ("name", "data.dir"):
        with pytest.raises(UserError, match=rf"{key}=a\\udcff  +must be (text|a path), found"):
            load_recipe(["recipe=tiny_internvl_mis", f"{key}=a\udcff"])


def test_yaml_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    """Aliases of aliases make billions of values out of a few lines; brackets by the thousand take time."""
    lines = ["a: &a0 [x, x]"] + [f"b{n}: &a{n + 1} [*a{n}, *a{n}, *a{n}]" for n in range(40)]
    for text, message in (
        ("\n".join(lines), "more than 20000 values"),
        ("a: " + "[" * 5000, "too many values inside each other"),
        ("a: " + "- " * 5000 + "x", "not valid YAML"),
        ("a: [" + "1, " * 30_000 + "]", "more than 20000 values"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"r\.yaml(:\d+)?: .*{message}"):
            load_recipe([f"recipe={tmp_path / 'r.yaml'}"])
