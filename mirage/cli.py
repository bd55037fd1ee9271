"""The `mirage` command: one verb, one function, nothing heavy imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mirage.errors import UserError, run_main


class Verb(NamedTuple):
    """One thing the command does."""

    run: Callable[[list[str]], int]
    usage: str
    help: str


def train(args: list[str]) -> int:
    """Train a recipe in this process; `accelerate launch mirage/train.py` is the same on several."""
    from mirage.train import main as train_main

    return train_main(args) or 0


def evaluate(args: list[str]) -> int:
    """Measure a checkpoint or a folder of weights on the recipe's tasks and print the summary.

    Without PATH, endpoint.base_url=URL and endpoint.model=NAME measure a model behind an OpenAI-compatible server.
    """
    paths, settings = _split(args)
    if not paths and any(item.startswith("endpoint.") for item in settings):
        from mirage.evals.evaluate_endpoint import run as run_endpoint

        return run_endpoint(settings)
    if len(paths) != 1:
        raise UserError(f"evaluate takes one PATH (a checkpoint, a run folder or weights), found {len(paths)}: {paths}")
    from mirage.evals.evaluate_cli import run

    return run(paths[0], settings) or 0


def worker(args: list[str]) -> int:
    """Measure a run's checkpoints beside its training (eval.mode=worker), or what is left of them after it."""
    device, rest = _take(args, "device")
    once, rest = _take(rest, "once")
    mode, rest = _take(rest, "console")
    if once not in (None, "true", "false"):
        raise UserError(f"once={once}: write once=true or once=false")
    if len(rest) != 1:
        raise UserError(f"worker takes one RUN_DIR, found {rest}")
    from mirage.evals.evaluate_cli import find_device, quiet_libraries
    from mirage.evals.worker import work
    from mirage.tracking.console import console_mode, make_console

    console = make_console(console_mode(mode))
    quiet_libraries()
    run_dir = Path(rest[0]).expanduser().absolute()
    num_failed = work(run_dir, device=find_device(device), once=once == "true", console=console)
    return 1 if num_failed else 0


def plan(args: list[str]) -> int:
    """Print what a recipe needs: parameters, steps, memory a GPU, work; nothing is loaded."""
    from mirage.config.loader import load_recipe

    gpus, rest = _take(args, "gpus")
    memory, rest = _take(rest, "gpu_memory")
    world_size = _whole("gpus", gpus)
    recipe = load_recipe([arg for arg in rest if arg != "--dry-run"])
    # Only now: a mistake in the recipe is told in half a second, the libraries take several.
    from mirage.training.plan import parse_memory, print_plan

    print_plan(
        recipe,
        world_size=world_size,
        memory_bytes=parse_memory(memory) if memory is not None else None,
    )
    return 0


def inspect(args: list[str]) -> int:
    """Show what a run would do: first samples with mask and tiles, lengths, packs, what is trained and saved."""
    from mirage.config.loader import load_recipe

    numbers: dict[str, int | None] = {}
    rest = args
    for key in ("samples", "steps", "gpus"):
        text, rest = _take(rest, key)
        numbers[key] = _whole(key, text)
    out, rest = _take(rest, "out")
    recipe = load_recipe(rest)
    from mirage.training.inspection import inspect_recipe
    from mirage.training.inspection_page import print_inspection, write_inspection

    inspection = inspect_recipe(
        recipe, num_samples=numbers["samples"] or 8, num_steps=numbers["steps"] or 3, world_size=numbers["gpus"]
    )
    folder = Path(out).expanduser() if out else recipe.run_dir / "inspect"
    print_inspection(inspection, write_inspection(inspection, folder))
    return 0


def check(args: list[str]) -> int:
    """Compare training with plain transformers on the first packs of a recipe; exit code 2 where they differ.

    Packed and separate loss, gradients of other cuts, masks, positions, pictures, isolation of samples. samples=N go
    through the model (4); gpus=N is the number of processes whose packs are looked at.
    """
    from mirage.config.loader import load_recipe

    samples, rest = _take(args, "samples")
    gpus, rest = _take(rest, "gpus")
    num_samples, world_size = _whole("samples", samples), _whole("gpus", gpus)
    recipe = load_recipe(rest)
    _quiet_libraries()
    from mirage.training.check import run

    run(recipe, num_samples=num_samples or 4, world_size=world_size)
    return 0


def replay(args: list[str]) -> int:
    """Run a failed step's batch once more and say which sample, module or weight is not a number, or takes the memory.

    FOLDER is RUN_DIR/failures/step-NNNNNN-rankR, or RUN_DIR where it has one failure. weights=CHECKPOINT and
    precision=fp32 replace the run's.
    """
    weights, rest = _take(args, "weights")
    precision, rest = _take(rest, "precision")
    paths, settings = _split(rest)
    if settings:
        raise UserError(f"replay knows weights= and precision=, found: {' '.join(settings)}")
    _quiet_libraries()
    from mirage.training.replay_report import run

    run(paths, weights=weights, precision=precision)
    return 0


def tasks(args: list[str]) -> int:
    """List the evaluation tasks: size, licence, metrics, judge, where the data comes from and whether it is there.

    NAME shows one in full. benchmarks_dir and data_dir say where to look, as in the recipe's eval section.
    """
    data_dir, rest = _take(args, "data_dir")
    benchmarks_dir, rest = _take(rest, "benchmarks_dir")
    names, settings = _split(rest)
    if settings or len(names) > 1:
        raise UserError(f"tasks takes one NAME, data_dir=DIR and benchmarks_dir=DIR, found: {' '.join(args)}")
    from mirage.config.schema import EvalConfig
    from mirage.evals.listing import list_tasks, show_task

    config = EvalConfig(benchmarks_dir=Path(benchmarks_dir)) if benchmarks_dir else EvalConfig()
    folder = Path(data_dir) if data_dir else None
    print(show_task(names[0], config, data_dir=folder) if names else list_tasks(config, data_dir=folder))
    return 0


def rescore(args: list[str]) -> int:
    """Score answers that another tool generated with this project's judges and statistics.

    FILE is VLMEvalKit's predictions (tsv, xlsx, json), a response file of the MIS scripts or lmms-eval's logged samples
    (jsonl). task=NAME says whose questions they answer; model=NAME names the model (the file's name); repeated=last or
    first says which of two different answers to take; settings are the recipe's eval keys, out_dir and baseline.
    """
    from mirage.evals.interchange.rescore import run

    return run(args)


def export_task(args: list[str]) -> int:
    """Write a task's questions for VLMEvalKit (a TSV) or for lmms-eval (a folder of YAML, functions and Parquet).

    Settings are the recipe's eval keys: data_dir, benchmarks_dir, max_samples, max_new_tokens.
    """
    from mirage.evals.interchange.export_cli import run

    return run(args)


def recipes(args: list[str]) -> int:
    """List the recipes; with `--keys`, every key of a recipe with its type, default and meaning."""
    keys = args == ["--keys"]
    _refuse([] if keys else args)
    if keys:
        from mirage.config.describe import print_schema

        print_schema()
        return 0
    from mirage.config.loader import recipe_table

    print(recipe_table())
    return 0


def report(args: list[str]) -> int:
    """Write one HTML file that opens from disk: what a run changed, its numbers, curves and every answer.

    Several RUN_DIRs stand side by side, the first is the reference; a folder of one evaluation (results.json) will do
    as well. out=FILE.html says where (report.html in the run's folder, comparison.html in the first of several);
    max_mb=20 is about how large the file may get. --markdown prints tables and examples as Markdown instead, or writes
    them to out=FILE.md.
    """
    markdown = "--markdown" in args
    out, rest = _take([arg for arg in args if arg != "--markdown"], "out")
    max_mb, rest = _take(rest, "max_mb")
    paths, settings = _split(rest)
    if settings:
        raise UserError(f"report knows out= and max_mb=, found: {' '.join(settings)}")
    missing = next((path for path in paths if not Path(path).expanduser().is_dir()), None)
    if missing is not None:
        raise UserError(f"{missing} is no folder; give the run_dir of a run")
    from mirage.report.command import run

    return run([Path(path).expanduser() for path in paths], out=out, max_mb=max_mb, markdown=markdown)


def best(args: list[str]) -> int:
    """Choose a run's best checkpoint by the rule of eval.select and say why; exit code 1 where none qualifies.

    out=FILE.json or out=FILE.md writes the decision; the other settings are keys of the recipe's eval section, such as
    select.max_general_drop=1 or guards=off.
    """
    out, rest = _take(args, "out")
    paths, settings = _split(rest)
    if len(paths) != 1:
        raise UserError(f"best takes one RUN_DIR, found: {' '.join(paths) or 'nothing'}")
    from mirage.evals.selection_cli import run

    return run(Path(paths[0]), settings, out=out)


def calibrate(args: list[str]) -> int:
    """Find out how far a judge can be trusted.

    export RESULTS_DIR... [out=labels.csv] [n=200] [tasks=a,b] writes a blind sheet of judged answers to label, with a
    page, the pictures, and a key. report SHEET... [key=FILE] [out=FILE.json] reads one or more filled-in copies:
    sensitivity, specificity, kappa, alpha, AC1 and corrected rates. judges RESULTS_DIR... [out=FILE.json] compares two
    judges on the same checkpoints.
    """
    words, settings = _split(args)
    from mirage.evals.calibration.cli import run

    return run(words, settings)


def convert(args: list[str]) -> int:
    """Convert InternVL weights between the published layout and transformers' own, bit for bit.

    --check reads the result back and compares every tensor; --image-token-id N says which id marks an image where the
    folder has no tokenizer; --max-shard-gb N sets the size of an output file (5).
    """
    from mirage.models.convert_cli import convert_command

    return convert_command(args)


def export(args: list[str]) -> int:
    """Write a checkpoint's model as a folder that plain transformers or peft loads, and prove it by reloading it.

    CHECKPOINT is a checkpoint, a run folder (its newest checkpoint) or weights. --merge adds a LoRA adapter to its
    base model's weights; --layout published writes InternVL's own layout (default native).
    """
    from mirage.training.export_cli import export_command

    return export_command(args)


def dashboard(args: list[str]) -> int:
    """Create or update a project's wandb workspace and its report, or write both to a file.

    entity=USER_OR_TEAM and project=NAME say where; out=FILE.json writes the definition and needs no server. The panels
    show the tasks of recipe=NAME, or tasks=a,b; without these the default ones. --entity E --project P is the same.
    """
    from mirage.tracking.dashboard_cli import run

    return run(args)


VERBS = {
    "train": Verb(train, "recipe=NAME [key=value ...] [--dry-run]", "train a recipe in this process"),
    "worker": Verb(
        worker, "RUN_DIR [device=cuda:1] [once=true] [console=json]", "measure a run's checkpoints beside its training"
    ),
    "evaluate": Verb(
        evaluate, "PATH [tasks=a,b] [data_dir=DIR] [max_samples=N] ...", "measure a checkpoint or weights"
    ),
    "plan": Verb(plan, "recipe=NAME [key=value ...] [gpus=8] [gpu_memory=80GB]", "parameters, steps and memory a GPU"),
    "inspect": Verb(
        inspect, "recipe=NAME [key=value ...] [samples=8] [steps=3] [out=DIR]", "samples, masks, tiles, packs of a run"
    ),
    "check": Verb(
        check, "recipe=NAME [key=value ...] [samples=4] [gpus=8]", "training against transformers on the first packs"
    ),
    "replay": Verb(
        replay, "FOLDER [weights=CHECKPOINT] [precision=fp32]", "the batch of a failed step, sample by sample"
    ),
    "report": Verb(report, "RUN_DIR... [out=FILE.html] [max_mb=20] [--markdown]", "a run's results as one HTML file"),
    "dashboard": Verb(
        dashboard,
        "entity=E project=P [recipe=NAME] [out=FILE.json]",
        "a project's wandb workspace and report, as code",
    ),
    "best": Verb(best, "RUN_DIR [out=FILE.json] [select.max_general_drop=2] ...", "a run's best checkpoint, and why"),
    "calibrate": Verb(
        calibrate, "export|report|judges PATH... [out=FILE] [n=200] ...", "a judge against people, or against another"
    ),
    "convert": Verb(
        convert, "SRC DST --layout native|published [--check] ...", "InternVL weights between their two layouts"
    ),
    "export": Verb(
        export, "CHECKPOINT DST [--merge] [--layout native|published]", "a checkpoint as a folder to give away"
    ),
    "rescore": Verb(rescore, "FILE task=NAME [model=NAME] [key=value ...]", "score answers of another tool"),
    "export-task": Verb(
        export_task, "TASK FOLDER format=vlmevalkit|lmms-eval [key=value ...]", "a task's questions for another tool"
    ),
    "recipes": Verb(recipes, "[--keys]", "list the recipes, or every key of one"),
    "tasks": Verb(tasks, "[NAME] [benchmarks_dir=DIR] [data_dir=DIR]", "list the evaluation tasks, or show one"),
}


def usage() -> str:
    """The command's help text."""
    width = max(len(name) for name in VERBS)
    lines = [
        f"  {name:<{width}}  {verb.help}\n  {'':<{width}}  mirage {name} {verb.usage}" for name, verb in VERBS.items()
    ]
    several = (
        "On several processes: accelerate launch --config_file recipes/accelerate/FILE mirage/train.py recipe=NAME"
    )
    return "\n".join(["Usage: mirage VERB [key=value ...]", "", *lines, "", several])


def dispatch(args: Sequence[str]) -> int:
    """Run the verb that `args` begins with. Raises `UserError` for an unknown one, naming the nearest."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, rest = VERBS.get(args[0]), list(args[1:])
    if verb is None:
        from mirage.config.keys import nearest_word

        near = nearest_word(args[0], list(VERBS))
        hint = f"did you mean `mirage {near}`? " if near else ""
        raise UserError(f"there is no verb {args[0]!r}; {hint}Verbs are {', '.join(VERBS)}")
    if {"-h", "--help"} & set(rest) and args[0] not in ("train",):
        print(f"mirage {args[0]} {verb.usage}\n{verb.run.__doc__}")
        return 0
    return verb.run(rest)


def _quiet_libraries() -> None:
    """Keep progress bars and notes on missing GPUs out of a verb's table, before the libraries are loaded."""
    import os

    import torch

    from mirage.training.launch import configure_libraries

    configure_libraries(os.environ, has_gpu=torch.cuda.is_available())


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths, settings): an argument with `=` after a plain word is a setting. Raises `UserError` for `--flags`."""
    for arg in args:
        if arg.startswith("-"):
            raise UserError(f"{arg}: there is no such option; write settings as key=value")
    settings = [arg for arg in args if "=" in arg and "/" not in arg.partition("=")[0]]
    return [arg for arg in args if arg not in settings], settings


def _take(args: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """The value of `key=value` (None without one) and the other arguments."""
    values = [arg.partition("=")[2] for arg in args if arg.startswith(f"{key}=")]
    if len(values) > 1:
        raise UserError(f"{key} is given twice: {' and '.join(values)}")
    return values[0] if values else None, [arg for arg in args if not arg.startswith(f"{key}=")]


def _whole(key: str, text: str | None) -> int | None:
    if text is not None and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"{key}={text}: must be a whole number > 0")
    return int(text) if text is not None else None


def _refuse(args: Sequence[str]) -> None:
    if args:
        raise UserError(f"takes no arguments here, found: {' '.join(args)}")


def main() -> None:
    """Entry point of the `mirage` script."""
    run_main(lambda: dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()
