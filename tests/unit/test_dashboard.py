"""The dashboard as code: its definition without a server, its names against what runs log, and saving it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mirage.cli import dispatch
from mirage.config.schema import EvalConfig, TrackingConfig
from mirage.errors import UserError
from mirage.evals.hook import log_finished
from mirage.evals.schedule import Job, results_dir, settle
from mirage.evals.tasks import TASKS
from mirage.miniature.paper import TABLE_4
from mirage.tracking import dashboard_cli, wandb_run
from mirage.tracking.console import make_console
from mirage.tracking.dashboard import SECTIONS, dashboard_tasks
from mirage.tracking.dashboard_report import TITLE, paper_table
from mirage.tracking.mirror import read_metrics
from mirage.tracking.names import describe_metric, summary_of
from mirage.tracking.run import Tracker
from tests.support.dashboards import asked_names, panels_of
from tests.support.evaluations import labels, write_evaluation


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("dashboard") / "dashboard.json"
    assert dispatch(["dashboard", "--entity", "team", "--project=safety", f"out={path}"]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every name that the evaluations of a run with the default tasks log, and its summary's."""
    run_dir = tmp_path_factory.mktemp("run")
    given = {
        "mis_easy": labels(asr=5, rsr=3, rr=1, hr=1), "mis_hard": labels(asr=5, rsr=5),
        "mis_real": labels(asr=3, rsr=3), "twins": labels(helped=6, refused=4),
        "general": labels(right=8, wrong=1, no_option=1),
    }  # fmt: skip
    assert set(given) == set(EvalConfig().tasks)
    tracker = Tracker.open(run_dir, TrackingConfig(wandb="off"), name="x", recipe={}, is_main=True)
    for step in (0, 4):
        first = results_dir(run_dir, 0) if step else None
        write_evaluation(results_dir(run_dir, step), given, step=step, baseline=first)
        settle(run_dir, Job(step, "full", "done"))
    assert log_finished(run_dir, tracker, make_console("quiet"), config=EvalConfig()) == [0, 4]
    tracker.close()
    records = read_metrics(run_dir / "metrics.jsonl")
    return {name for record in records for name in record} | set(json.loads((run_dir / "summary.json").read_text()))


def test_the_workspace_has_its_sections_with_panels(definition: dict[str, Any]) -> None:
    bank = definition["workspace"]["spec"]["section"]["panelBankConfig"]
    assert [section["name"] for section in bank["sections"]] == list(SECTIONS)
    assert all(section["panels"] for section in bank["sections"])
    assert (definition["workspace"]["entity"], definition["workspace"]["project"]) == ("team", "safety")


def test_ids_are_unique_and_the_text_is_the_same_each_time(definition: dict[str, Any], tmp_path: Path) -> None:
    for part in definition.values():
        identities = [panel["__id__"] for panel in panels_of(part)]
        assert len(identities) == len(set(identities)) > 10
    dispatch(["dashboard", "entity=team", "project=safety", f"out={tmp_path / 'again.json'}"])
    assert json.loads((tmp_path / "again.json").read_text()) == definition


def test_every_evaluation_name_of_a_panel_is_logged(definition: dict[str, Any], logged: set[str]) -> None:
    for part in definition.values():
        names, patterns = asked_names(part)
        asked = {name for name in names if name.startswith(("eval/", "select/", "samples/"))} - {"eval/step"}
        assert len(asked) > 8 and asked <= logged, sorted(asked - logged)
    _, patterns = asked_names(definition["workspace"])
    evaluated = [pattern for pattern in patterns if pattern.startswith("^eval/")]
    assert len(evaluated) == 12, "four rates by category in three splits"
    for pattern in evaluated:
        assert any(re.search(pattern, name) for name in logged), pattern


def test_panels_say_their_unit(definition: dict[str, Any]) -> None:
    plots = [panel for panel in panels_of(definition["workspace"]) if panel["viewType"] == "Run History Line Plot"]
    assert len(plots) > 30
    assert [panel["config"]["chartTitle"] for panel in plots if not panel["config"].get("yAxisTitle")] == []


def test_every_logged_name_is_described(logged: set[str]) -> None:
    evaluated = {name for name in logged if name.startswith("eval/")}
    assert len(evaluated) > 100
    assert [name for name in evaluated if describe_metric(name) is None] == []


def test_best_values_follow_what_the_tasks_call_better() -> None:
    seen = set()
    for task in TASKS.values():
        for metric in task.metrics:
            wanted = {"lower": "min", "higher": "max"}.get(metric.better)
            if wanted:
                assert summary_of(f"eval/{task.name}/{metric.name}") == wanted, f"{task.name}: {metric.name}"
                seen.add(wanted)
    assert seen == {"min", "max"}
    assert summary_of("train/loss") == "min" and summary_of("eval/mis_hard/asr_ci_low") == "last"


def test_the_report_holds_the_papers_numbers(definition: dict[str, Any]) -> None:
    text = json.dumps(definition["report"])
    for family in ("internvl", "qwen2_vl"):
        table = paper_table(family)
        for rates in TABLE_4[family]["mis"].values():
            assert all(f"{rate:.2f}" in table for rate in rates if rate is not None)
        assert "| MIRage (MIS) |" in table and json.dumps(table)[1:60] in text
    assert "select/base_asr" in text


def test_a_recipe_names_the_tasks(tmp_path: Path) -> None:
    dispatch(["dashboard", "tasks=xstest,mis_multi,multi_twins", f"out={tmp_path / 'a.json'}"])
    names, _ = asked_names(json.loads((tmp_path / "a.json").read_text())["workspace"])
    assert {"eval/mis_multi/asr", "eval/xstest/refused", "eval/multi_twins/refused"} <= names
    assert not any("/mis_hard/" in name for name in names)
    dispatch(["dashboard", "recipe=mini_internvl_mis", f"out={tmp_path / 'b.json'}"])
    names, _ = asked_names(json.loads((tmp_path / "b.json").read_text())["workspace"])
    assert "eval/mis_hard/asr" in names


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "lacks entity= and project="),
        (["entity=a"], "lacks project="),
        (["entity=a", "--entity", "b"], "given twice"),
        (["--entity", "--project=x"], "has no value"),
        (["entity="], "has no value"),
        (["entty=a"], "dashboard knows entity="),
        (["tasks=a", "recipe=b"], "not both"),
        (["tasks=nope", "out=x.json"], "nope"),
        (["out=no/such/folder/x.json"], "must be a file in a folder"),
        (["entity=a", "project=b"], "no wandb key"),
    ],
)
def test_mistakes_are_told(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dispatch(["dashboard", *args])


class Server:
    """wandb's server as far as views go: it keeps what is upserted and gives it back."""

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}
        self.app_url = "https://wandb.test"

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            identity = variables.get("id") or f"id-{len(self.views)}"
            self.views[identity] = {**variables, "id": identity}
            project = {"name": variables["projectName"], "entityName": variables["entityName"]}
            return {"upsertView": {"view": {**variables, "id": identity, "project": project}, "inserted": True}}
        found = [view for view in self.views.values() if view["name"] == variables.get("viewName")]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    import wandb

    server = Server()

    class Api:
        def __init__(self) -> None:
            self._service_api = server

        def projects(self, entity: str) -> list[Any]:
            return [type("Project", (), {"name": "p"})()]

        def reports(self, path: str) -> list[Any]:
            kept = [view for view in server.views.values() if view["type"] == "runs"]
            return [type("Report", (), {"id": view["id"], "display_name": view["displayName"]})() for view in kept]

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(wandb_run, "has_key", lambda: True)
    return server


def test_saving_again_updates_and_keeps_what_people_added(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["dashboard", "entity=e", "project=p"]) == 0
    assert [view["displayName"] for view in server.views.values()] == ["MIRage", TITLE]
    assert "https://wandb.test/e/p" in capsys.readouterr().out
    workspace = next(view for view in server.views.values() if view["type"] == "project-view")
    spec = json.loads(workspace["spec"])
    sections = spec["section"]["panelBankConfig"]["sections"]
    sections.insert(0, {**sections[0], "name": "Somebody's own"})
    sections[1]["name"] = "Safety"
    workspace["spec"] = json.dumps(spec)
    assert dispatch(["dashboard", "entity=e", "project=p"]) == 0
    assert len(server.views) == 2
    saved = json.loads(server.views[workspace["id"]]["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in saved] == [*SECTIONS, "Somebody's own"]


def test_a_server_that_refuses_is_one_message(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionError("permission\ndenied")

    monkeypatch.setattr(server, "execute_graphql", refuse)
    with pytest.raises(UserError, match="did not take the dashboard of e/p: permission denied"):
        dashboard_cli.save(entity="e", project="p", tasks=dashboard_tasks(["mis_hard"]), config=EvalConfig())
