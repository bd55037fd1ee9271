"""The sweep files: real recipe keys, a metric that runs log, wandb's schema, and an agent's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirage.config.loader import load_recipe
from mirage.tracking import wandb_run
from mirage.tracking.sweep import sweep_arguments

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
# Of the package `sweeps` 0.3.0 (MIT), with which wandb checks a sweep; the package itself wants an older numpy.
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "wandb_sweep_schema.json").read_text())


def sweep(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def drawn(parameters: dict[str, Any]) -> dict[str, Any]:
    """One draw of each parameter, as the server sends it to an agent."""
    found = {}
    for name, parameter in parameters.items():
        values = parameter.get("values") or [parameter.get("value", parameter.get("min"))]
        found[name] = {"value": values[-1]}
    return found


def test_there_are_sweeps() -> None:
    assert [path.stem for path in SWEEPS] == ["mini_lr_general", "mis_lr_general"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_wandbs_schema_takes_the_sweep(path: Path) -> None:
    from jsonschema import Draft7Validator

    validator = Draft7Validator(SCHEMA)
    assert list(validator.iter_errors(sweep(path))) == []
    broken = sweep(path) | {"method": "guess"}
    assert list(validator.iter_errors(broken)), "the schema refuses nothing"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweep_minimises_what_a_run_ends_with(path: Path) -> None:
    config = sweep(path)
    assert config["metric"] == {"name": "select/score", "goal": "minimize"}
    assert (ROOT / config["program"]).is_file()
    assert {"train.lr"} < set(config["parameters"])
    assert any(name.endswith(".share") for name in config["parameters"])
    files = [word for word in config["command"] if word.startswith("recipes/")]
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("form", ["args", "args_no_hyphens"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_an_agents_arguments_make_a_recipe(path: Path, form: str) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    parameters = sweep(path)["parameters"]
    given = create_sweep_command_args({"args": drawn(parameters)})[form]
    environ = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "run1"}
    recipe = load_recipe(sweep_arguments(given, environ=environ))
    assert recipe.train.lr == parameters["train.lr"]["min"]
    place = next(int(name.split(".")[2]) for name in parameters if name.endswith(".share"))
    source = recipe.data.sources[place]
    assert source.split == "train_general" and source.max_samples is None
    assert source.share == next(value for name, value in parameters.items() if name.endswith(".share"))["values"][-1]
    assert recipe.run_dir == Path("runs/sweeps/abc/run1")


def test_only_an_agent_gives_a_run_a_folder_of_its_own() -> None:
    assert sweep_arguments(["recipe=x", "--train.lr=1"], environ={"WANDB_RUN_ID": "r"}) == ["recipe=x", "train.lr=1"]
    environ = {"WANDB_SWEEP_ID": "s/../../x", "WANDB_RUN_ID": "r"}
    assert sweep_arguments(["--run_dir=here"], environ=environ) == ["run_dir=here"]
    assert sweep_arguments([], environ=environ) == ["run_dir=runs/sweeps/s-..-..-x/r"]
    assert sweep_arguments(["--dry-run", "-x=1", "--=2"], environ={}) == ["--dry-run", "-x=1", "--=2"]


def test_a_sweeps_run_has_the_id_that_the_agent_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "given1")
    assert wandb_run.run_id(tmp_path / "..") != "given1", "without a sweep every run folder has an id of its own"
    (tmp_path / ".." / "wandb_id").unlink()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    assert wandb_run.run_id(tmp_path) == "given1"
    monkeypatch.setenv("WANDB_RUN_ID", "given2")
    assert wandb_run.run_id(tmp_path) == "given1", "a continued run stays the run that it was"
