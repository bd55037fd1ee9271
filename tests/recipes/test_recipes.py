"""Every shipped recipe: loads, plans, says what it is, and holds the paper's settings where it claims to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mirage.config import load_recipe
from mirage.config.loader import list_recipes
from mirage.data.mixing import mixture_counts
from mirage.data.sources import load_mixture
from mirage.train import main as train_main
from mirage.training.launch import deepspeed_config, find_launch
from mirage.training.plan_report import make_plan

NAMES = list(list_recipes())
FULL = ("internvl_mis", "internvl_mis_lora", "qwen2vl_mis", "qwen2vl_mis_lora")
# Baseline or ablation of the paper -> what it sees of the risky rows, and how they are answered.
BASELINES = {
    "internvl_textual": ("black", "reply"),
    "internvl_vlguard": ("one", "refusal"),
    "internvl_vlguard_r": ("one", "full"),
    "internvl_mis_nogeneral": ("all", "full"),
    "internvl_mis_sorry": ("all", "refusal"),
    "internvl_mis_textonly": ("none", "full"),
}
# What is only compared in miniature: the paper's own mixture beside the one with twins, and answers without reasoning.
MINI = {"mini_internvl_mis": "full", "mini_internvl_mis_paper": "full", "mini_internvl_direct": "reply"}


def _mini(name: str) -> str:
    return f"mini_{name.replace('_mis_', '_')}"


def test_the_recipes_are_these() -> None:
    assert sorted([*FULL, *BASELINES, *(f"tiny_{name}" for name in FULL), *map(_mini, BASELINES), *MINI]) == NAMES


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_from_mirage_in_what_the_paper_says(name: str, mini: bool) -> None:
    baseline = load_recipe([f"recipe={_mini(name) if mini else name}"])
    mirage = load_recipe([f"recipe={'mini_' if mini else ''}internvl_mis"])
    risky = baseline.data.sources[0]
    assert (risky.split, risky.pictures, risky.answers) == ("train", *BASELINES[name])
    for section in ("preprocessing", "checkpoint", "eval", "tracking"):
        assert getattr(baseline, section) == getattr(mirage, section)
    assert baseline.model.train == (("language",) if name == "internvl_textual" else ("projector", "language"))
    same = {"lr": mirage.train.lr, "epochs": mirage.train.epochs}
    assert baseline.train.model_copy(update=same) == mirage.train
    if name == "internvl_mis_nogeneral":
        assert all(source.split != "train_general" for source in baseline.data.sources)


@pytest.mark.parametrize(
    ("name", "lr", "epochs"),
    [("internvl_textual", 2e-5, 2), ("internvl_vlguard", 5e-6, 3), ("internvl_vlguard_r", 5e-6, 3)],
)
def test_settings_of_the_papers_baselines(name: str, lr: float, epochs: float) -> None:
    # Table 7; 2,000 unsafe samples and 1,000 benign ones, which the table counts as 33.33 % general.
    recipe = load_recipe([f"recipe={name}"])
    assert (recipe.train.lr, recipe.train.epochs) == (lr, epochs)
    assert mixture_counts([3927, 3927], recipe.data.sources) == [2000, 1000]


@pytest.mark.parametrize(("name", "answers"), MINI.items())
def test_the_conditions_in_miniature_show_the_same_pictures(name: str, answers: str) -> None:
    recipe = load_recipe([f"recipe={name}"])
    assert recipe.model.path == "shipped:internvl" and recipe.model.tiny is None
    assert [(source.pictures, source.answers) for source in recipe.data.sources[:-1]] in (
        [("all", answers)] * 2,
        [("all", answers)],
    )
    assert any(source.split == "train_twins" for source in recipe.data.sources) is not name.endswith("_paper")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_find_their_rows(name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path))
    # The few rows of this dataset do not do for a share.
    sources = load_recipe([f"recipe={_mini(name)}"]).data.sources
    asked = [
        {"split": item.split, "pictures": item.pictures, "answers": item.answers, "max_samples": item.max_samples}
        for item in sources
    ]
    recipe = load_recipe([f"recipe={_mini(name)}", f"data.dir={shapes}", f"data.sources={json.dumps(asked)}"])
    mixture = load_mixture(recipe.data, seed=0)
    assert mixture.left_out == []
    assert {entry.source for entry in mixture.rows} == {source.split for source in recipe.data.sources}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_dry_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe([f"recipe={name}"])
    assert recipe.name == name and recipe.run_dir == Path("runs") / name
    assert 20 < len(list_recipes()[name]) < 110
    assert train_main([f"recipe={name}", "data.dir=/no/such/folder", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"Recipe {name} " in out and "optimiser steps" in out and "Memory a" in out and "The run:" in out
    assert deepspeed_config(recipe, world_size=2, hidden_size=64, has_gpu=False)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(("name", "lr", "epochs"), [("internvl_mis", 5e-6, 2), ("qwen2vl_mis", 2e-6, 3)])
def test_settings_of_the_paper(name: str, lr: float, epochs: float) -> None:
    # Table 7: learning rate, warm-up, epochs; appendix B.2: language model and projector, all parameters of them.
    recipe = load_recipe([f"recipe={name}"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.warmup_ratio) == (lr, epochs, 0.03)
    assert recipe.model.train == ("projector", "language") and recipe.model.lora is None
    general = recipe.data.sources[1]
    assert (general.split, general.max_samples) == ("train_general", 500)
    assert recipe.eval.max_new_tokens == 1024
    plan = make_plan(load_recipe([f"recipe={name}", "data.dir=/no"]), world_size=8, memory_bytes=80 * 10**9)
    assert plan.memory.total < 80e9


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_lora")])
def test_adapter_recipes_differ_from_their_full_ones_only_in_what_is_trained(name: str) -> None:
    lora, full = load_recipe([f"recipe={name}"]), load_recipe([f"recipe={name.removesuffix('_lora')}"])
    assert lora.model.lora is not None and "projector" in lora.model.train and "language" not in lora.model.train
    for section in ("preprocessing", "data", "checkpoint", "eval", "tracking"):
        assert getattr(lora, section) == getattr(full, section)
    assert lora.train.model_copy(update={"lr": 1}) == full.train.model_copy(update={"lr": 1})


@pytest.mark.parametrize("name", [name for name in FULL if name.endswith("_lora")])
def test_adapter_recipes_fit_one_gpu(name: str) -> None:
    plan = make_plan(load_recipe([f"recipe={name}", "data.dir=/no"]), world_size=1, memory_bytes=80 * 10**9)
    assert plan.memory.total < 80e9


def test_files_begin_with_a_comment_that_says_what_they_are(repo_root: Path) -> None:
    for file in sorted((repo_root / "recipes").rglob("*.yaml")):
        assert file.read_text().startswith("# "), file


@pytest.mark.parametrize(
    ("file", "processes", "machines"),
    [("cpu2.yaml", 2, 1), ("zero3_8gpu.yaml", 8, 1), ("zero3_2nodes.yaml", 16, 2)],
)
def test_accelerate_files(repo_root: Path, file: str, processes: int, machines: int) -> None:
    path = repo_root / "recipes" / "accelerate" / file
    plain = yaml.safe_load(path.read_text())
    assert plain["distributed_type"] == "DEEPSPEED" and plain["num_machines"] == machines
    # accelerate itself reads it, and nothing in it contradicts the recipes it is for.
    launch = find_launch([["accelerate", "launch", "--config_file", str(path), "mirage/train.py"]])
    assert launch is not None and launch.value("num_processes") == processes
    recipe = load_recipe(["recipe=tiny_internvl_mis" if file == "cpu2.yaml" else "recipe=internvl_mis"])
    assert launch.value("zero_stage") in (None, recipe.train.zero_stage)
    assert launch.value("mixed_precision") in ("no", recipe.train.precision)
