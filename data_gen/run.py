"""Run a pipeline: seeds through the stages into one dataset folder, with every result kept for the next run."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.assemble import assemble, pictures_of
from data_gen.blobs import Blobs
from data_gen.engine import LINEAGE_KEY_DIGITS, EarlyStop, RunOutcome, StageEvent, run_stages
from data_gen.estimate import Estimate, estimate, require_known_cost
from data_gen.pipeline import Pipeline
from data_gen.planned import from_plan, planned_samples
from data_gen.publish import KIND, Progress, fits_published_layout, no_progress, write_dataset
from data_gen.ray_executor import run_over_ray
from data_gen.row_store import RowStore, identity_sha256, read_results
from data_gen.run_card import render_run_card
from data_gen.run_report import Report, make_report, write_report
from data_gen.sample import Sample
from data_gen.seed_files import read_seeds
from data_gen.set_steps import SetSteps, prepare_set_steps
from data_gen.settings import settings_for
from data_gen.stage import FailureKind, Stage
from data_gen.stages import export, plan
from data_gen.store import MANIFEST_FILE, build_lock, check_files, open_build_folder, publish, read_manifest
from data_gen.taxonomy.facts import Taxonomy, load_taxonomy
from data_gen.tools import Tools
from mirage.data.row import SCHEMA_VERSION, Row, canonical_json
from mirage.endpoint.client import Endpoint
from mirage.errors import UserError
from mirage.files import write_atomic

PUBLISHED_FILE = "published.txt"  # in the work folder: hashes of the manifests that it published, the last two


@dataclass(frozen=True)
class RunResult:
    """What a run did. `manifest` is None where the run was interrupted before everything had ended."""

    report: Report
    report_path: Path
    manifest: dict[str, Any] | None
    was_complete: bool = False


@dataclass(frozen=True)
class RunHooks:
    """Where a run says what it does; all of them may be left out."""

    on_estimate: Callable[[Estimate], None] = lambda _: None
    on_plan: Callable[[int, Sequence[str]], None] = lambda num_samples, stages: None
    on_result: Callable[[StageEvent], None] | None = None
    progress: Progress = no_progress


def work_folder(target: Path) -> Path:
    """Where the results behind the dataset folder `target` are kept between runs."""
    return target.parent / f".{target.name}.work"


def run_pipeline(
    pipeline: Pipeline,
    target: Path,
    *,
    taxonomy: Taxonomy,
    retry_failed: Collection[FailureKind] = (),
    accept_unknown_cost: bool = False,
    overwrite: bool = False,
    num_shards: int | None = None,
    hooks: RunHooks | None = None,
) -> RunResult:
    """Bring every seed through the pipeline's stages and publish the rows as the dataset folder `target`.

    With `num_shards` the stages run over Ray in so many tasks. Results are kept beside `target`: the same call after a
    kill asks nothing twice and ends with the same manifest.

    Raises UserError for mistakes in seeds or options, an endpoint that is down or refuses, a cost that is neither known
    nor accepted, and a `target` that holds something else.
    """
    hooks = hooks or RunHooks()
    work = work_folder(target)
    with build_lock(target), RowStore(work) as store:
        _refuse_foreign(target, work, overwrite=overwrite)
        blobs, taxonomy = Blobs(work), _facts(pipeline, taxonomy)
        blobs.remove_torn()
        steps = prepare_set_steps(pipeline)
        samples = _samples(pipeline, taxonomy, blobs)
        stages, _ = _stages(pipeline, taxonomy, blobs)
        expected = estimate(pipeline, len(samples), read_results(work))
        hooks.on_estimate(expected)
        if not accept_unknown_cost:
            require_known_cost(pipeline, expected)
        hooks.on_plan(len(samples), [stage.name for stage in stages])
        if num_shards is not None:
            outcome = run_over_ray(pipeline, samples, store, num_shards=num_shards, retry_failed=retry_failed)
        else:
            outcome = run_samples(
                pipeline,
                samples,
                store,
                blobs=blobs,
                taxonomy=taxonomy,
                retry_failed=retry_failed,
                on_result=hooks.on_result,
            )
        if outcome.num_unfinished:
            report = make_report(outcome, row_ids={})
            return RunResult(report, write_report(report, work), None)
        return _publish(pipeline, target, outcome, stages, steps, hooks=hooks)


def _refuse_foreign(target: Path, work: Path, *, overwrite: bool) -> None:
    """Raise UserError if `target` holds anything but what this work folder published, unless it may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_FILE).is_file():
        raise UserError(f"{target} exists and is no dataset folder (no {MANIFEST_FILE}); name another --out")
    if overwrite:
        return
    if read_manifest(target)["content_sha256"] not in _published(work):
        raise UserError(f"{target} holds another dataset; name another --out or add --overwrite")


def _published(work: Path) -> list[str]:
    path = work / PUBLISHED_FILE
    return path.read_text("utf-8").split() if path.is_file() else []


def _samples(pipeline: Pipeline, taxonomy: Taxonomy, blobs: Blobs) -> list[Sample]:
    config = pipeline.config
    if config.plan is not None:
        drafts = plan.plan(taxonomy, settings=settings_for(seed=config.seed, size=config.plan))
        return planned_samples(taxonomy, drafts)[: config.limit]
    seeds = read_seeds(config.seeds, folder=pipeline.path.parent, blobs=blobs, limit=config.limit)
    return [Sample(position=(number,), seed=seed) for number, seed in enumerate(seeds)]


def _facts(pipeline: Pipeline, taxonomy: Taxonomy) -> Taxonomy:
    """The part of the facts that the plan's size uses; seeds from outside are read with all of them."""
    config = pipeline.config
    return taxonomy if config.plan is None else settings_for(seed=config.seed, size=config.plan).select(taxonomy)


def _stages(pipeline: Pipeline, taxonomy: Taxonomy, blobs: Blobs) -> tuple[list[Stage], dict[str, Endpoint]]:
    endpoints = {name: Endpoint(config) for name, config in pipeline.config.endpoints.items()}
    tools = Tools(taxonomy=taxonomy, blobs=blobs, root_seed=pipeline.config.seed, endpoints=endpoints)
    return pipeline.build_stages(tools), endpoints


def run_samples(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    store: RowStore,
    *,
    blobs: Blobs,
    taxonomy: Taxonomy | None = None,
    retry_failed: Collection[FailureKind] = (),
    on_result: Callable[[StageEvent], None] | None = None,
) -> RunOutcome:
    """Bring samples through the pipeline's stages in this process; Ctrl-C stops when what is in flight is stored."""
    stages, endpoints = _stages(pipeline, _facts(pipeline, taxonomy or load_taxonomy()), blobs)
    options = pipeline.config.early_stop

    async def run() -> RunOutcome:
        stop = asyncio.Event()
        with _stopped_by_interrupt(stop):
            try:
                return await run_stages(
                    samples,
                    stages,
                    store,
                    root_seed=pipeline.config.seed,
                    concurrency=pipeline.num_in_flight,
                    retry_failed=retry_failed,
                    progress=on_result,
                    early_stop=EarlyStop(options.window, options.share) if options else None,
                    is_intact=lambda sample: all((blobs.root / image.path).is_file() for image in sample.images),
                    stop=stop,
                )
            finally:
                for endpoint in endpoints.values():
                    await endpoint.aclose()

    return asyncio.run(run())


@contextmanager
def _stopped_by_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`, so that what is in flight is stored; the second one interrupts at once."""
    loop = asyncio.get_running_loop()

    def on_interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
    except (NotImplementedError, ValueError, RuntimeError):  # not the main thread, or not a Unix
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _publish(
    pipeline: Pipeline, target: Path, outcome: RunOutcome, stages: list[Stage], steps: SetSteps, *, hooks: RunHooks
) -> RunResult:
    """Rows, steps over the whole set, report, and the dataset folder, unless it is there with the same content."""
    work = work_folder(target)
    done = outcome.done
    if pipeline.config.plan is not None:
        settings = settings_for(seed=pipeline.config.seed, size=pipeline.config.plan)
        done = from_plan(done, key=identity_sha256(settings.model_dump(mode="json"))[:LINEAGE_KEY_DIGITS])
    assembled = assemble(done)
    rows, drops = steps.apply(assembled, done, work=work)
    by_id = {row.id: place for place, row in zip(assembled.places, assembled.rows)}
    report = make_report(
        outcome, row_ids={by_id[row.id]: row.id for row in rows}, set_drops=[*assembled.dropped, *drops]
    )
    report_path = write_report(report, work)
    if not rows:
        raise UserError(
            f"no row came through: {report.total('dropped')} dropped, {report.total('failed')} failed; {report_path} "
            "says why for each"
        )
    description = describe(pipeline, stages, steps)
    build = open_build_folder(target, key=hashlib.sha256(canonical_json(description).encode()).hexdigest())
    pictures = pictures_of(rows)
    for path in hooks.progress(pictures, "linking pictures", len(pictures)):
        build.link_file(work / path, path)
    figures = _figures(rows, report)
    manifest = write_dataset(
        build,
        rows,
        readme=render_run_card(pipeline, rows, description=description, figures=figures),
        description=description,
        figures=figures,
        progress=hooks.progress,
    )
    # Noted before it is visible, with the one before: a kill in between leaves either, and both are this pipeline's.
    # Killed there twice, the folder still holds the one before.
    content = manifest["content_sha256"]
    before = [known for known in _published(work) if known != content]
    write_atomic(work / PUBLISHED_FILE, "\n".join([*before[-1:], content]) + "\n")
    if _is_whole(target, manifest):
        shutil.rmtree(build.path)
        return RunResult(report, report_path, manifest, was_complete=True)
    publish(build, target, keep={MANIFEST_FILE, *manifest["files"]})
    return RunResult(report, report_path, manifest)


def _is_whole(target: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether `target` holds just this dataset, undamaged (of pictures only that they are there)."""
    if not (target / MANIFEST_FILE).is_file():
        return False
    there = read_manifest(target)
    return there["content_sha256"] == manifest["content_sha256"] and not check_files(target, there, texts_only=True)


def describe(pipeline: Pipeline, stages: list[Stage], steps: SetSteps) -> dict[str, Any]:
    """What a run's folder is made from: seed, stages with what decides their results, and the steps over the set."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "pipeline": {
            "name": pipeline.config.name,
            "seed": pipeline.config.seed,
            "stages": [
                {
                    "stage": stage.name,
                    "implementation": stage.implementation,
                    "version": stage.version,
                    "identity": dict(stage.identity()),
                }
                for stage in stages
            ],
            "set_steps": steps.describe(),
        },
    }


def _figures(rows: tuple[Row, ...], report: Report) -> dict[str, Any]:
    images = pictures_of(rows).values()
    return {
        "counts": export.count_rows(rows),
        "run": report.figures(),
        "not_in_published_layout": sum(not fits_published_layout(row) for row in rows),
        "licences": dict(sorted({f"{image.licence}: {image.attribution}": "pictures" for image in images}.items())),
    }
