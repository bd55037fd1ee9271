"""`mirage dashboard`: write the workspace and the report to a file, or create and update them on wandb's server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.tracking.dashboard import SECTIONS, VIEW, TaskRates, build_workspace, dashboard_tasks
from mirage.tracking.dashboard_report import TITLE, build_report

_KEYS = ("entity", "project", "out", "tasks", "recipe")


def run(args: Sequence[str]) -> int:
    """Do what the arguments say: `key=value`, `--key=value` or `--key value`."""
    settings = parse(args)
    config = _eval_config(settings)
    tasks = dashboard_tasks(config.tasks)
    if "out" in settings:
        path = Path(settings["out"]).expanduser()
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"out={path}: must be a file in a folder that is there")
        entity, project = settings.get("entity", "ENTITY"), settings.get("project", "mirage")
        write_atomic(path, definition_json(entity=entity, project=project, tasks=tasks, config=config))
        print(f"{path}: workspace with {len(SECTIONS)} sections, and the report")
        return 0
    missing = [key for key in ("entity", "project") if key not in settings]
    if missing:
        raise UserError(
            f"dashboard lacks {' and '.join(f'{key}=' for key in missing)}: name the wandb user or team and the "
            "project, or write the definition with out=FILE.json"
        )
    for line in save(entity=settings["entity"], project=settings["project"], tasks=tasks, config=config):
        print(line)
    return 0


def parse(args: Sequence[str]) -> dict[str, str]:
    """The settings. Raises `UserError` for an unknown key, a key twice, and one without a value."""
    found: dict[str, str] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if key not in _KEYS:
            raise UserError(f"{word}: dashboard knows {', '.join(f'{name}=' for name in _KEYS)}")
        if not equals or not value:
            raise UserError(f"{word}: has no value; write {key}=VALUE")
        if key in found:
            raise UserError(f"{key} is given twice: {found[key]} and {value}")
        found[key] = value
    if {"tasks", "recipe"} <= set(found):
        raise UserError("give either tasks= or recipe=, not both: the recipe names its tasks")
    return found


def _eval_config(settings: dict[str, str]) -> EvalConfig:
    from mirage.config.loader import load_recipe

    if "recipe" in settings:
        return load_recipe([f"recipe={settings['recipe']}"]).eval
    if "tasks" in settings:
        return EvalConfig(tasks=tuple(task.strip() for task in settings["tasks"].split(",") if task.strip()))
    return EvalConfig()


def definition_json(*, entity: str, project: str, tasks: Sequence[TaskRates], config: EvalConfig) -> str:
    """Both definitions as wandb's server takes them, in one JSON text; the same input gives the same text."""
    workspace = build_workspace(entity=entity, project=project, tasks=tasks, select=config.select)
    report = build_report(entity=entity, project=project, tasks=tasks)
    found: dict[str, Any] = {
        "workspace": workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
        "report": report._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def save(*, entity: str, project: str, tasks: Sequence[TaskRates], config: EvalConfig) -> list[str]:
    """Create or update both on the server; returns their addresses in words.

    A section that someone added to the workspace stays, after the others. Raises `UserError` without a key and where
    the server refuses.
    """
    from mirage.tracking.wandb_run import has_key

    if not has_key():
        raise UserError(
            "no wandb key is set: run `wandb login` or set WANDB_API_KEY; out=FILE.json writes the definition "
            "without one"
        )
    try:
        workspace = build_workspace(entity=entity, project=project, tasks=tasks, select=config.select)
        _take_over(workspace, entity=entity, project=project)
        workspace.save()
        report = build_report(entity=entity, project=project, tasks=tasks)
        report.id = _report_id(entity=entity, project=project)
        report.save()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"wandb did not take the dashboard of {entity}/{project}: {text[:400]}") from error
    return [f"workspace: {workspace.url}", f"report: {report.url}"]


def _take_over(workspace: Any, *, entity: str, project: str) -> None:
    """Make `workspace` the next version of the one that is there, with the sections that others added."""
    from wandb_workspaces.workspaces import Workspace, internal

    workspace._internal_name = internal._url_query_str_to_internal_name(VIEW)
    try:
        view = internal.View.from_name(entity, project, workspace._internal_name)
    except ValueError:
        # There is none, or no project yet; wandb makes the project with the first run.
        return
    workspace._internal_id = view.id
    present = Workspace._from_model(view)
    own = {section.name for section in workspace.sections}
    workspace.sections = [*workspace.sections, *(section for section in present.sections if section.name not in own)]


def _report_id(*, entity: str, project: str) -> str:
    """The id of the report with our title; empty where there is none."""
    import wandb

    for report in wandb.Api().reports(f"{entity}/{project}"):
        if report.display_name == TITLE:
            return str(report.id)
    return ""
