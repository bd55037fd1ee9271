"""Whole evaluations of tiny checkpoints: ranks, kills, baselines, the hook, the command and the report."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mirage.config.schema import CheckpointConfig, EvalConfig, PreprocessingConfig, TinyConfig, TrackingConfig
from mirage.errors import UserError
from mirage.evals import evaluate as evaluate_module
from mirage.evals import evaluate_cli
from mirage.evals.evaluate import evaluate_checkpoint
from mirage.evals.evaluate_cli import run
from mirage.evals.hook import LOGGED_FILE, EvalCallback, results_dir
from mirage.evals.report import category_markdown, summary_markdown, summary_table
from mirage.evals.request import weights_fingerprint
from mirage.evals.results import RESULTS_FILE, Results, read_results, read_samples
from mirage.models.tiny import build_tiny
from mirage.training.checkpoint import leases, publish
from mirage.training.distributed import outside_training
from tests.support.dataset import write_dataset

TINY = TinyConfig(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=64,
    vision_hidden_size=32, vision_layers=1, vocab_size=400, warmup_steps=0,
)  # fmt: skip
SMALL = PreprocessingConfig(image_size=56, max_tiles=2)
CONFIG = EvalConfig(max_new_tokens=5, batch_size=3, max_unscored=0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder whose easy rows say what is held out about them."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["tags"] = row.get("tags", {}) | ({"holdout": "object"} if row["split"] == "easy" else {})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that answer differently."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        (root / f"m{seed}").mkdir()
        build_tiny(root / f"m{seed}", "internvl", TINY, SMALL, data_dir=data, seed=seed)
    return [root / "m0", root / "m1"]


@pytest.fixture
def run_dir(models: list[Path], tmp_path: Path) -> Path:
    """A run with two finished checkpoints."""
    folder = tmp_path / "run"
    for step, model in ((0, models[0]), (20, models[1])):
        aside = folder / f".checkpoint-{step:06d}.partial"
        shutil.copytree(model, aside / "model")
        publish(aside, folder / f"checkpoint-{step:06d}", step=step)
    return folder


def measure(checkpoint: Path, data: Path, out_dir: Path, **more: Any) -> Results:
    results = evaluate_checkpoint(checkpoint, config=CONFIG, data_dir=data, out_dir=out_dir, **more)
    assert results is not None
    return results


def no_loading(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was loaded again")


def test_results_hold_all_tasks_and_what_they_depend_on(run_dir: Path, data: Path, tmp_path: Path) -> None:
    results = measure(run_dir / "checkpoint-000020", data, tmp_path / "out")
    assert results == read_results(tmp_path / "out")
    assert (results.step, results.checkpoint) == (20, "checkpoint-000020")
    ready = json.loads((run_dir / "checkpoint-000020" / "READY").read_text())
    assert results.fingerprint == ready["fingerprint"]
    assert set(results.tasks) == set(CONFIG.tasks)
    assert results.preprocessing.max_tiles == 2 and results.decoding.max_new_tokens == 5
    rows = read_samples(tmp_path / "out")
    assert len(rows) == sum(task.num_samples for task in results.tasks.values())
    assert all(row["reason"] and isinstance(row["answer"], str) for row in rows)
    assert {row["tags"].get("holdout") for row in rows if row["task"] == "mis_easy"} == {"object"}
    for task in ("mis_easy", "mis_hard", "mis_real"):
        rates = [rate.percent for rate in results.tasks[task].rates.values()]
        assert sum(rate for rate in rates if rate is not None) in (0, pytest.approx(100))
    flat = results.metrics()
    assert {"eval/general/accuracy", "eval/general/accuracy_ci_high", "eval/general/n"} <= set(flat)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_complete_evaluation_returns_at_once(
    models: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(models[0], data, tmp_path / "out")
    stamp = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(evaluate_module, "load_model", no_loading)
    assert measure(models[0], data, tmp_path / "out") == first
    assert evaluate_checkpoint(models[0], config=CONFIG, data_dir=data, out_dir=tmp_path / "out", rank=1) is None
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == stamp
    with pytest.raises(AssertionError, match="loaded again"):  # other weights, other settings
        measure(models[1], data, tmp_path / "out")
    other = CONFIG.model_copy(update={"max_new_tokens": 6})
    with pytest.raises(AssertionError, match="loaded again"):
        evaluate_checkpoint(models[0], config=other, data_dir=data, out_dir=tmp_path / "out")


def test_two_ranks_give_the_bytes_of_one(models: list[Path], data: Path, tmp_path: Path) -> None:
    measure(models[0], data, tmp_path / "one")
    barrier = threading.Barrier(2)
    found: dict[int, Results | None] = {}

    def agree(failure: str | None) -> str | None:
        barrier.wait(60)
        return failure

    def rank(number: int) -> None:
        found[number] = evaluate_checkpoint(
            models[0],
            config=CONFIG,
            data_dir=data,
            out_dir=tmp_path / "two",
            rank=number,
            world_size=2,
            agree=agree,
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] is None and found[0] is not None
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_killed_evaluation_goes_on(
    models: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(models[0], data, tmp_path / "whole")
    calls = 0
    append = evaluate_module.AnswerStore.append

    def killed(store: Any, answers: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            with store.path.open("ab") as file:
                file.write(b'{"key": "half a li')
            raise KeyboardInterrupt
        append(store, answers)

    monkeypatch.setattr(evaluate_module.AnswerStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(models[0], data, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    measure(models[0], data, tmp_path / "out")
    for name in ("results.json", "samples.jsonl", "answers-0.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_baseline_gives_paired_tests_and_changes(run_dir: Path, data: Path, tmp_path: Path) -> None:
    measure(run_dir / "checkpoint-000000", data, tmp_path / "0")
    results = measure(run_dir / "checkpoint-000020", data, tmp_path / "20", baseline=tmp_path / "0")
    assert results.baseline is not None and results.baseline.step == 0
    before = {(row["task"], row["id"]): row for row in read_samples(tmp_path / "0")}
    for row in read_samples(tmp_path / "20"):
        old = before[row["task"], row["id"]]["verdict"]
        assert row["changed"] == (f"{old} -> {row['verdict']}" if old != row["verdict"] else "")
    for task in results.tasks.values():
        for name, paired in task.comparison.items():
            assert paired.num_pairs <= task.num_samples
            if task.num_unscored == 0 and paired.num_pairs == task.num_samples and paired.delta_points is not None:
                assert task.rates[name].percent == pytest.approx(paired.baseline_percent + paired.delta_points)


def test_max_samples_takes_the_same_ones_each_time(models: list[Path], data: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_samples": 2, "tasks": ("twins", "general")})
    chosen = []
    for number, model in enumerate(models):
        evaluate_checkpoint(model, config=config, data_dir=data, out_dir=tmp_path / str(number))
        chosen.append([(row["task"], row["id"]) for row in read_samples(tmp_path / str(number))])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 4


def test_another_tile_budget_is_recorded(models: list[Path], data: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_tiles": 4, "tasks": ("mis_real",)})
    results = evaluate_checkpoint(models[0], config=config, data_dir=data, out_dir=tmp_path)
    assert results is not None and results.preprocessing.max_tiles == 4


def test_unfinished_and_empty_checkpoints_are_refused(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoint-000020" / "READY").unlink()
    with pytest.raises(UserError, match="never finished"):
        weights_fingerprint(run_dir / "checkpoint-000020")
    (run_dir / "checkpoint-000000" / "READY").write_text("{}")
    with pytest.raises(UserError, match="names no fingerprint"):
        weights_fingerprint(run_dir / "checkpoint-000000")
    with pytest.raises(UserError, match=r"no config\.json"):
        weights_fingerprint(tmp_path)


class _Tracker:
    config, is_open, wandb_id = TrackingConfig(), True, None

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[str, int, list[Mapping[str, Any]]]] = []

    def log(self, metrics: Mapping[str, float], *, axis: str, step: int) -> None:
        assert axis == "eval"
        self.logged.append((step, dict(metrics)))

    def log_samples(self, name: str, rows: list[Mapping[str, Any]], *, step: int) -> None:
        self.tables.append((name, step, rows))

    def lacks_samples(self, name: str, *, step: int) -> bool:
        return False

    def summary(self, values: Mapping[str, Any]) -> None:
        assert {"select/asr", "select/score"} <= set(values)

    def alert(self, alert: Any) -> None:
        raise AssertionError(alert.text)


@pytest.fixture
def trainer(run_dir: Path, data: Path) -> Iterator[Any]:
    recipe = SimpleNamespace(
        eval=CONFIG,
        data=SimpleNamespace(dir=data),
        checkpoint=CheckpointConfig(every_steps=20),
        tracking=TrackingConfig(console="quiet"),
        name="r",
    )
    yield SimpleNamespace(
        recipe=recipe, run_dir=run_dir, rank=0, is_main=True, world_size=1, device=torch.device("cpu"),
        step=20, total_steps=20, tracker=_Tracker(),
    )  # fmt: skip


def test_the_hook_measures_logs_and_compares_with_step_0(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = EvalCallback()
    state = torch.random.get_rng_state()
    hook.on_checkpoint(trainer, trainer.run_dir / "checkpoint-000000", 0)
    hook.on_checkpoint(trainer, trainer.run_dir / "checkpoint-000020", 20)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [step for step, _ in trainer.tracker.logged] == [0, 20]
    assert trainer.tracker.logged[1][1]["eval/twins/n"] <= 4
    last = read_results(results_dir(trainer.run_dir, 20))
    assert last.baseline is not None and last.tasks["twins"].comparison
    name, step, rows = trainer.tracker.tables[-1]
    assert (name, step) == ("general", 20)
    assert {"id", "task", "image_paths", "question", "answer", "verdict", "reason", "category", "changed"} <= set(
        rows[0]
    )
    changed = [bool(row["changed"]) for row in rows]
    assert changed == sorted(changed, reverse=True)
    monkeypatch.setattr(evaluate_module, "load_model", no_loading)
    hook.on_start(trainer)  # nothing is left open
    assert len(trainer.tracker.logged) == 2


def test_an_evaluation_that_a_kill_cut_short_is_finished_at_the_next_start(trainer: Any) -> None:
    hook = EvalCallback()
    hook.on_checkpoint(trainer, trainer.run_dir / "checkpoint-000000", 0)
    (results_dir(trainer.run_dir, 0) / LOGGED_FILE).unlink()  # killed before its numbers were sent
    hook.on_start(trainer)
    assert [step for step, _ in trainer.tracker.logged] == [0, 0, 20]
    assert read_results(results_dir(trainer.run_dir, 20)).baseline is not None


def test_the_hook_checks_tasks_and_data_before_the_first_step(trainer: Any, tmp_path: Path) -> None:
    trainer.recipe.eval = CONFIG.model_copy(update={"data_dir": tmp_path / "none"})
    with pytest.raises(UserError, match="neither rows"):
        EvalCallback().on_start(trainer)
    trainer.recipe.eval = trainer.recipe.eval.model_copy(update={"mode": "off"})
    EvalCallback().on_start(trainer)


def test_the_hook_checks_the_judge_before_the_first_step(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "api_key_env": "NO_SUCH_KEY"}
    trainer.recipe.eval = EvalConfig.model_validate(
        CONFIG.model_dump() | {"judge": "endpoint", "judge_endpoint": server}
    )
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        EvalCallback().on_start(trainer)
    trainer.recipe.eval = EvalConfig.model_validate(CONFIG.model_dump() | {"endpoint": server})
    with pytest.raises(UserError, match="measures its own checkpoints"):
        EvalCallback().on_start(trainer)


def test_a_model_loaded_in_a_zero3_process_is_whole_and_the_setting_comes_back() -> None:
    from transformers.integrations import deepspeed

    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError, match="inside"), outside_training():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            torch.rand(3)
            raise RuntimeError("inside")
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert config.is_zero3()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_the_command_takes_the_runs_newest_checkpoint_and_its_settings(
    run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"eval": json.loads(CONFIG.model_dump_json()), "data": {"dir": str(data)}}
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    assert run(run_dir / "checkpoint-000000", ["device=cpu"]) == 0
    assert run(run_dir, ["device=cpu"]) == 0
    results = read_results(run_dir / "evals" / "step-000020")
    assert results.decoding.batch_size == 3 and results.baseline is not None
    assert "asr" in capsys.readouterr().out
    assert run(str(run_dir), ["tasks=twins", "device=cpu"]) == 0  # other settings do not overwrite the run's own
    assert read_results(run_dir / "evals" / "step-000020") == results
    (other,) = (run_dir / "evals").glob("other-*")
    assert set(read_results(other).tasks) == {"twins"}
    for path, settings, message in (
        (run_dir / "nothing", [], "there is nothing at"),
        (run_dir, ["task=twins"], "tasks"),
        (run_dir, ["device=tpu9"], "use cpu or cuda"),
        (run_dir, ["data_dir=/nowhere"], "neither rows"),
    ):
        with pytest.raises(UserError, match=message):
            run(path, settings)


def test_the_command_in_json_and_quiet_mode(
    run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data_dir={data}", "tasks=mis_hard,twins", "device=cpu", "max_new_tokens=4", "batch_size=3"]
    out_dir = tmp_path / "out"
    assert run(run_dir, [*settings, f"out_dir={out_dir}", "console=json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = {event["what"]: event for event in events if event["event"] == "progress"}
    total = sum(task.num_samples for task in read_results(out_dir).tasks.values())
    assert {what: (event["done"], event["total"]) for what, event in last.items()} == {
        "answers": (total, total), "verdicts": (total, total)
    }  # fmt: skip
    assert events[-1]["event"] == "summary" and events[-1]["metrics"] == read_results(out_dir).metrics()
    # What was answered before a kill is told from what is answered now.
    (out_dir / RESULTS_FILE).unlink()
    answers = out_dir / "answers-0.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:3]))
    assert run(run_dir, [*settings, f"out_dir={out_dir}", "console=plain"]) == 0
    printed = capsys.readouterr().out
    assert f"answers {total}/{total}" in printed and "2 of them from before" in printed and "\x1b" not in printed
    assert run(run_dir, [*settings, f"out_dir={tmp_path / 'other'}", "console=quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="console=loud: write one of console=rich"):
        run(run_dir, [*settings, "console=loud"])


def test_the_command_holds_a_lease_on_the_checkpoint(
    run_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[Path]] = []

    def look(*args: object, **kwargs: object) -> None:
        held.append(leases(run_dir / "checkpoint-000000"))
        raise UserError("enough")

    monkeypatch.setattr(evaluate_cli, "evaluate_checkpoint", look)
    with pytest.raises(UserError, match="enough"):
        run(run_dir / "checkpoint-000000", [f"data_dir={data}", "device=cpu"])
    assert len(held[0]) == 1 and leases(run_dir / "checkpoint-000000") == []


def test_the_report_compares_the_first_and_the_last_evaluation(
    trainer: Any, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="holds no evaluations"):
        summary_markdown(run_dir)
    EvalCallback().on_start(trainer)
    text = summary_markdown(run_dir)
    assert "| step 0 | step 20 | change | p |" in text
    assert "| mis_hard | asr ↓ |" in text and "Judge rule-v1" in text
    Console(width=80).print(summary_table(run_dir))
    printed = capsys.readouterr().out
    assert "step 20" in printed and "  accuracy" in printed and "mis_hard (n " in printed
    assert "…" not in printed  # nothing is cut off in a terminal of 80 columns
    categories = category_markdown(read_results(results_dir(run_dir, 20)), "mis_hard")
    assert "| Violent | 2 |" in categories and "Weapon-Related Violence | 2 |" in categories
