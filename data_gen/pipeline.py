"""The pipeline file: YAML that names seeds, endpoints and which implementation does each stage, checked as a whole."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_gen.settings import SizeName
from data_gen.stage import Stage
from data_gen.stages.decontaminate import DecontaminateOptions
from data_gen.stages.deduplicate import DeduplicateOptions
from data_gen.tools import Tools
from mirage.config.keys import nearest_word
from mirage.config.values import Scalar, is_section, strip_optional
from mirage.config.yaml_tree import Node, read_yaml
from mirage.endpoint.config import EndpointConfig
from mirage.errors import UserError
from mirage.strict_json import parse_json

StageName = Literal["extract", "compose", "detoxify", "twins", "illustrate", "classify", "label", "verify"]
STAGE_ORDER: tuple[str, ...] = get_args(StageName)
NEEDED_FOR_SEEDS = ("extract", "compose", "illustrate", "classify", "label", "verify")
NEEDED_FOR_PLAN = ("compose", "illustrate", "classify", "label", "verify")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")

# (stage, use) -> where the class is; imported when a pipeline names it, since some need an extra.
REGISTRY: dict[tuple[str, str], str] = {
    ("extract", "rule"): "data_gen.stages.extract:RuleExtract",
    ("extract", "model"): "data_gen.model_stages.extract:ModelExtract",
    ("compose", "rule"): "data_gen.stages.compose:RuleCompose",
    ("compose", "model"): "data_gen.model_stages.compose:ModelCompose",
    ("detoxify", "rule"): "data_gen.stages.detoxify:RuleDetoxify",
    ("detoxify", "model"): "data_gen.model_stages.detoxify:ModelDetoxify",
    ("twins", "model"): "data_gen.model_stages.twins:ModelTwins",
    ("illustrate", "draw"): "data_gen.illustrators.draw:DrawIllustrate",
    ("illustrate", "library"): "data_gen.illustrators.library:LibraryIllustrate",
    ("illustrate", "retrieve"): "data_gen.illustrators.retrieve:RetrieveIllustrate",
    ("illustrate", "diffuse"): "data_gen.illustrators.diffuse:DiffuseIllustrate",
    ("illustrate", "images_api"): "data_gen.illustrators.images_api:ImagesApiIllustrate",
    ("classify", "rule"): "data_gen.stages.classify:RuleClassify",
    ("classify", "model"): "data_gen.model_stages.classify:ModelClassify",
    ("label", "rule"): "data_gen.stages.label:RuleLabel",
    ("label", "model"): "data_gen.model_stages.label:ModelLabel",
    ("verify", "rule"): "data_gen.stages.verify:RuleVerify",
    ("verify", "model"): "data_gen.model_stages.verify:ModelVerify",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SeedFile(_Strict):
    """A JSONL or JSON file of seeds, and what holds for all of its seeds that do not say it themselves."""

    path: Path = Field(description="JSONL or JSON list, relative to the pipeline file")
    source: str | None = Field(default=None, min_length=1)
    licence: str | None = Field(default=None, min_length=1)
    attribution: str | None = Field(default=None, min_length=1)


class EarlyStopOptions(_Strict):
    """When to end a run because an endpoint is down: over `share` of a stage's last `window` calls failed."""

    window: int = Field(default=50, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)


class BenchmarkSource(_Strict):
    """A test set that no training row may hold: a dataset folder, MIS_Test, TSV, JSON, JSONL, Parquet, or an index."""

    path: Path = Field(description="relative to the pipeline file")
    name: str | None = Field(default=None, min_length=1, description="how evidence names it; default: the file's name")
    image_root: Path | None = Field(default=None, description="where its image paths start; default: beside the file")
    texts_only: bool = False


class Decontamination(DecontaminateOptions):
    """The benchmarks that rows are compared with, and what counts as a leak."""

    benchmarks: tuple[BenchmarkSource, ...] = ()


class PipelineConfig(_Strict):
    """A pipeline file. Either `seeds` or `plan` says what the rows start from."""

    name: str = Field(default="MIRage pipeline", min_length=1, description="title of the dataset card")
    seed: int = Field(default=0, ge=0, description="root of every random choice")
    limit: int | None = Field(default=None, ge=1, description="only the first so many seeds or planned rows")
    seeds: tuple[SeedFile, ...] = ()
    plan: SizeName | None = Field(default=None, description="the offline generator's plan in this size, as seeds")
    endpoints: dict[str, EndpointConfig] = Field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = Field(description="stage -> {use: implementation, and its options}")
    deduplicate: DeduplicateOptions = Field(default_factory=DeduplicateOptions)
    decontaminate: Decontamination = Field(default_factory=Decontamination)
    concurrency: int | None = Field(default=None, ge=1, description="samples in flight; default: by the endpoints")
    early_stop: EarlyStopOptions | None = Field(default_factory=EarlyStopOptions)


@dataclass(frozen=True)
class StageChoice:
    """A stage of the pipeline: the class that does it and its checked options."""

    name: str
    use: str
    stage_class: type[Stage]
    options: BaseModel

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Names of the endpoints that the options mention."""
        return tuple(sorted(set(_endpoint_names(self.options.model_dump(mode="json")))))


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline file."""

    path: Path
    config: PipelineConfig
    stages: tuple[StageChoice, ...]
    """In the order in which they run."""

    def build_stages(self, tools: Tools) -> list[Stage]:
        """The stages, ready to run."""
        return [choice.stage_class(tools, choice.options) for choice in self.stages]  # type: ignore[call-arg]

    @property
    def num_in_flight(self) -> int:
        """Samples in flight: enough to keep every endpoint busy."""
        asked = {name for choice in self.stages for name in choice.endpoints}
        return self.config.concurrency or max(8, sum(self.config.endpoints[name].concurrency for name in asked))


@dataclass(frozen=True)
class _Problem:
    line: int
    key: str
    message: str


def load_pipeline(path: Path) -> Pipeline:
    """Read and check a pipeline file. Raises UserError with every mistake at once, each with its line and key."""
    root = _read(path)
    problems: list[_Problem] = []
    config = _validated(PipelineConfig, root, (), problems)
    stages = _choices(root, problems)
    if config is not None:
        problems += _cross_problems(config, stages, root)
    if problems or config is None:
        unique = sorted(set(problems), key=lambda problem: (problem.line, problem.key, problem.message))
        count = f"{len(unique)} problem{'s' if len(unique) != 1 else ''}"
        lines = [f"  line {p.line}: {p.key}: {p.message}" for p in unique]
        raise UserError("\n".join([f"{count} in pipeline {path}", *lines]))
    return Pipeline(path=path, config=config, stages=stages)


def _read(path: Path) -> Node:
    root = read_yaml(path)
    if root is None or not isinstance(root.value, dict):
        raise UserError(f"{path}: a pipeline is a list of 'key: value' lines, with seeds: and stages:")
    return root


def _plain(node: Node, annotation: Any) -> Any:
    """The YAML as plain data. Text stays text, so that the field's type decides what `1e-5`, `010` or `no` mean."""
    kind, _ = strip_optional(annotation)
    if isinstance(node.value, Scalar):
        if node.value.is_null:
            return None
        return _guess(node.value) if kind is Any else node.value.text
    if isinstance(node.value, list):
        item = (get_args(kind) or (Any,))[0] if get_origin(kind) in (tuple, list, set, frozenset) else Any
        return [_plain(entry, item) for entry in node.value]
    if is_section(kind):
        fields = kind.model_fields
        return {
            key: _plain(entry, fields[key].annotation if key in fields else str) for key, entry in node.value.items()
        }
    item = (*get_args(kind), Any)[1] if get_origin(kind) in (dict, Mapping) else Any
    return {key: _plain(entry, item) for key, entry in node.value.items()}


def _guess(scalar: Scalar) -> Any:
    """A value whose type nothing tells: JSON's number, true or false, else text."""
    if scalar.quoted:
        return scalar.text
    try:
        value = parse_json(scalar.text)
    except ValueError:
        return scalar.text
    return value if isinstance(value, bool | int | float) else scalar.text


def _validated(kind: type[BaseModel], node: Node, prefix: tuple[str, ...], problems: list[_Problem]) -> Any:
    """`node` as `kind`, or None with the mistakes noted."""
    try:
        return kind.model_validate(_plain(node, kind))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            place = tuple(part for part in item["loc"] if part != "[key]")
            key = ".".join(str(part) for part in (*prefix, *place)) or "the file"
            problems.append(_Problem(_line(node, place), key, _message(kind, place, item)))
        return None


def _line(node: Node, place: Iterable[str | int]) -> int:
    """The line of the deepest part of `place` that the file has."""
    line = node.key_line or node.line
    for part in place:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            break
        line = node.key_line or node.line
    return line


def _message(kind: type[BaseModel], place: tuple[str | int, ...], item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(str(place[-1]), _fields_at(kind, place[:-1]), what="key")
    if item["type"] == "missing":
        return "is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    found = "" if isinstance(item["input"], dict | list) else f", found {item['input']!r}"
    return f"{item['msg'][:1].lower()}{item['msg'][1:]}{found}"


def _fields_at(kind: Any, place: tuple[str | int, ...]) -> list[str]:
    """Keys of the section at `place` of a model."""
    for part in place:
        kind, _ = strip_optional(kind)
        if is_section(kind) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        elif get_origin(kind) in (dict, Mapping, tuple, list):
            kind = get_args(kind)[1 if get_origin(kind) in (dict, Mapping) else 0]
    kind, _ = strip_optional(kind)
    return list(kind.model_fields) if is_section(kind) else []


def _unknown(word: str, known: list[str], *, what: str) -> str:
    near = nearest_word(word, known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}" if known else "there is none here"
    return f"unknown {what}; {hint}"


def _choices(root: Node, problems: list[_Problem]) -> tuple[StageChoice, ...]:
    """The stages that the file names, in running order; mistakes are noted."""
    assert isinstance(root.value, dict)
    section = root.value.get("stages")
    if section is None or not isinstance(section.value, dict):
        return ()
    chosen: dict[str, StageChoice] = {}
    for name, node in section.value.items():
        if name not in STAGE_ORDER:
            problems.append(_Problem(node.key_line, f"stages.{name}", _unknown(name, [*STAGE_ORDER], what="stage")))
        elif isinstance(node.value, dict) and (choice := _choice(name, node, problems)) is not None:
            chosen[name] = choice
    return tuple(chosen[name] for name in STAGE_ORDER if name in chosen)


def _choice(name: str, node: Node, problems: list[_Problem]) -> StageChoice | None:
    assert isinstance(node.value, dict)
    use = node.value.get("use")
    known = [implementation for stage, implementation in REGISTRY if stage == name]
    if use is None or not isinstance(use.value, Scalar):
        problems.append(_Problem(node.key_line, f"stages.{name}.use", f"is missing; one of {', '.join(known)}"))
        return None
    text = use.value.text
    if text not in known:
        near = nearest_word(text, known)
        hint = f"; did you mean {near}?" if near else ""
        problems.append(
            _Problem(use.key_line, f"stages.{name}.use", f"must be one of {', '.join(known)}, found {text!r}{hint}")
        )
        return None
    try:
        stage_class = load_stage_class(name, text)
    except UserError as error:
        problems.append(_Problem(use.key_line, f"stages.{name}.use", str(error)))
        return None
    rest = Node({key: entry for key, entry in node.value.items() if key != "use"}, node.line, node.key_line)
    options = _validated(options_class(stage_class), rest, ("stages", name), problems)
    return None if options is None else StageChoice(name, text, stage_class, options)


def load_stage_class(name: str, use: str) -> type[Stage]:
    """The class of an implementation. Raises UserError if what it needs is not installed."""
    module, _, class_name = REGISTRY[name, use].partition(":")
    try:
        return getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{use} needs the package {error.name}, which is not installed") from None


def options_class(stage_class: type[Stage]) -> type[BaseModel]:
    """The options model of a stage class: its `options_type`, or the type of the constructor's `options`."""
    declared = getattr(stage_class, "options_type", None)
    if declared is not None:
        return declared
    hint, _ = strip_optional(get_type_hints(stage_class.__init__).get("options", types.NoneType))
    if not is_section(hint):
        raise TypeError(f"{stage_class.__name__}.__init__ does not declare the type of its options")
    return hint


def _endpoint_names(options: Any) -> Iterator[str]:
    if isinstance(options, dict):
        for key, value in options.items():
            if key == "endpoint" and isinstance(value, str):
                yield value
            else:
                yield from _endpoint_names(value)
    elif isinstance(options, list):
        for value in options:
            yield from _endpoint_names(value)


def _cross_problems(config: PipelineConfig, stages: tuple[StageChoice, ...], root: Node) -> Iterator[_Problem]:
    """Mistakes between sections."""
    if bool(config.seeds) == (config.plan is not None):
        yield _Problem(1, "seeds", "give either seeds: (files) or plan: (small, mini or paper), found both or neither")
    needed = NEEDED_FOR_PLAN if config.plan is not None else NEEDED_FOR_SEEDS
    missing = [name for name in needed if name not in config.stages]
    if missing:
        yield _Problem(_line(root, ("stages",)), "stages", f"rows need {', '.join(missing)}, which the file leaves out")
    idle = [name for name in config.stages if name in STAGE_ORDER and name not in needed]
    if config.plan is not None and idle:
        yield _Problem(_line(root, ("stages", idle[0])), "stages", f"planned rows do not go through {', '.join(idle)}")
    used = set()
    for choice in stages:
        checked_plan = getattr(choice.options, "plan", None)
        if config.plan is not None and checked_plan is not None and checked_plan != config.plan:
            place = ("stages", choice.name, "plan")
            yield _Problem(_line(root, place), ".".join(place), f"must be {config.plan}, as the file's plan is")
        for name in choice.endpoints:
            used.add(name)
            if name not in config.endpoints:
                place = ("stages", choice.name, "endpoint")
                hint = _unknown(name, list(config.endpoints), what="endpoint")
                yield _Problem(_line(root, place), ".".join(place), f"{name!r}: {hint}")
    if len(stages) == len(config.stages):
        for name in config.endpoints:
            if name not in used:
                yield _Problem(_line(root, ("endpoints", name)), f"endpoints.{name}", "no stage uses it")


def is_local(endpoint: EndpointConfig) -> bool:
    """Whether an endpoint is on this machine, so that its calls cost nothing by the token."""
    return (urlsplit(endpoint.base_url).hostname or "") in LOCAL_HOSTS
