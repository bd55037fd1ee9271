"""From `recipe=NAME key=value ...` to a frozen `Recipe`: files, `extends:`, overrides, one message for all mistakes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from mirage.config.keys import KeyPath, UnknownKey, join, nearest_key, nearest_word, resolve, split
from mirage.config.schema import Recipe
from mirage.config.values import (
    Scalar,
    describe_field,
    fixed_length,
    format_value,
    is_section,
    item_type,
    parse_scalar,
    strip_optional,
)
from mirage.config.yaml_tree import Node, YamlError, parse_yaml, read_yaml
from mirage.errors import UserError
from mirage.safe_paths import printable
from mirage.strict_json import read_json_object

RECIPES_DIR = "recipes"
_EXTENSIONS = (".yaml", ".yml", ".json")
# A run's own name and folder: a recipe that extends another one must not write into the other's run.
_NOT_INHERITED = ("name", "run_dir")
# Where a family's weights are published (paper, section 4), and the recipe that needs none.
_WEIGHTS = {
    "internvl": ("OpenGVLab/InternVL2_5-8B", "tiny_internvl_mis"),
    "qwen2_vl": ("Qwen/Qwen2-VL-7B-Instruct", "tiny_qwen2vl_mis"),
}
# A dotted key in a message.
_KEY = re.compile(r"(?<![a-z_])[a-z_]++(?:\.[a-z_0-9]+)+")
_MAX_SHOWN, _MAX_SHOWN_CHARS = 40, 200
# Stands where a value was refused: validation reports the place again and the loader leaves that report out.
_REFUSED = object()


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands and what is wrong with it."""

    where: str
    message: str


@dataclass
class _Build:
    """A recipe in the making: plain data merged so far, where each key was given, and the mistakes."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unknown: list[tuple[str, KeyPath]] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)

    def refuse(self, where: str, path: KeyPath, message: str) -> Any:
        self.problems.append(Problem(where, message))
        self.refused.add(path)
        return _REFUSED


def load_recipe(args: Sequence[str]) -> Recipe:
    """The recipe named by `recipe=NAME` with the overrides `key.sub=value` merged over it.

    NAME is a file in `recipes/` (of the current folder, else of the project) or a path to YAML or JSON. Raises
    `UserError` with every mistake at once.
    """
    name, overrides, problems = _split_args(args)
    if name is None:
        raise UserError(f"no recipe is given; write recipe=NAME.\n{recipe_table()}")
    file = find_recipe(name)
    build = _Build(problems=problems)
    for layer, nodes in _extends_chain(file):
        _add_file(build, layer, nodes, inherited=layer != file)
    for key, text in overrides:
        _add_override(build, key, text)
    if build.data.get("name", _REFUSED) is _REFUSED and ("name",) not in build.refused:
        build.data["name"] = file.stem
    if "run_dir" not in build.data:
        build.data["run_dir"] = Path("runs") / str(build.data.get("name", file.stem))
    recipe = _validate(build)
    _add_unknown_problems(build)
    if recipe is None or build.problems:
        raise UserError(_report(build.problems, file.stem, len(overrides)))
    return recipe


def load_section(section: str, args: Sequence[str], *, base: Mapping[str, Any] | None = None) -> BaseModel:
    """One section of the recipe tree from `key=value` arguments over the plain data `base`; no recipe is needed.

    Keys are written without the section's name (`mirage evaluate PATH tasks=mis_hard`). Raises `UserError` with every
    mistake at once.
    """
    name, overrides, problems = _split_args([f"{section}.{arg}" for arg in args])
    assert name is None
    build = _Build(data={section: dict(base or {})}, problems=problems)
    for key, text in overrides:
        _add_override(build, key, text)
    kind = strip_optional(resolve((section,)).annotation)[0]
    value = None
    try:
        value = kind.model_validate(build.data[section])
    except ValidationError as error:
        _add_validation_problems(build, error, prefix=(section,))
    _add_unknown_problems(build)
    if value is None or build.problems:
        report = _report(build.problems, f"the {section} settings", 0, subject="")
        raise UserError(report.replace(f"{section}.", ""))
    return value


def resolved_json(recipe: Recipe) -> str:
    """The whole recipe as canonical JSON: sorted keys, every default written, one text for equal recipes."""
    # Validating once more gives defaults their declared types (2 and 2.0 must not be two recipes).
    canonical = Recipe.model_validate(recipe.model_dump())
    return json.dumps(canonical.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)


def read_resolved(file: Path) -> Recipe:
    """The recipe in the recipe.json that a run has written. Raises `UserError` where it is damaged or unknown here."""
    try:
        return Recipe.model_validate(read_json_object(file, remedy="the run folder is damaged"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} is not a recipe of this version ({where}: {first['msg']})") from error


def with_newer_options(written: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recipe.json with the options that its version did not have, each at its default.

    The default of a new option is what was done before there was the option, so runs go on after an update.
    """
    return _with_defaults(Recipe, written)


def _with_defaults(section: type[BaseModel], written: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(written)
    for key, info in section.model_fields.items():
        kind, value = strip_optional(info.annotation)[0], whole.get(key)
        if key not in whole:
            if not info.is_required():
                whole[key] = to_jsonable_python(info.get_default(call_default_factory=True))
        elif is_section(kind) and isinstance(value, dict):
            whole[key] = _with_defaults(kind, value)
        elif (item := item_type(kind)) and is_section(item) and isinstance(value, list):
            whole[key] = [_with_defaults(item, part) if isinstance(part, dict) else part for part in value]
    return whole


def recipe_hash(recipe: Recipe) -> str:
    """First 12 hex digits of the SHA-256 of `resolved_json`."""
    return hashlib.sha256(resolved_json(recipe).encode()).hexdigest()[:12]


# Files


def recipe_folders() -> list[Path]:
    """Where recipe names are looked up: `recipes/` here, then beside the package."""
    folders = [Path(RECIPES_DIR), Path(__file__).resolve().parents[2] / RECIPES_DIR]
    return [
        folder
        for i, folder in enumerate(folders)
        if folder.is_dir() and folder.resolve() not in [other.resolve() for other in folders[:i]]
    ]


def list_recipes() -> dict[str, str]:
    """Names that `recipe=` takes and the first comment line of each file."""
    found: dict[str, str] = {}
    for folder in recipe_folders():
        for file in sorted(folder.glob("*.yaml")):
            if not file.name.startswith("_"):
                found.setdefault(file.stem, _first_comment(file))
    return dict(sorted(found.items()))


def recipe_table() -> str:
    """The list of recipes as text."""
    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    lines = [f"  {name:<{width}}  {comment}".rstrip() for name, comment in recipes.items()]
    return "\n".join(["Recipes:", *lines]) if lines else f"There is no {RECIPES_DIR}/ folder here with recipes in it."


def find_recipe(name: str) -> Path:
    """The file of a recipe name or path; raises `UserError` with the list of recipes."""
    if "/" in name or name.endswith(_EXTENSIONS):
        file = Path(name).expanduser()
        if file.is_file():
            return file
        raise UserError(f"recipe={name}: there is no such file.\n{recipe_table()}")
    for folder in recipe_folders():
        if (file := folder / f"{name}.yaml").is_file():
            return file
    near = nearest_word(name, list(list_recipes()))
    hint = f"; did you mean recipe={near}?" if near else "."
    raise UserError(f"recipe={name}: no recipe has this name{hint}\n{recipe_table()}")


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ").strip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def _extends_chain(file: Path) -> list[tuple[Path, dict[str, Node]]]:
    """`file` and what it extends with what they say, the most basic first."""
    chain = [(file, _read(file))]
    while (parent := _parent(*chain[-1])) is not None:
        if parent.resolve() in [link.resolve() for link, _ in chain]:
            circle = " -> ".join(link.name for link in [*(link for link, _ in chain), parent])
            raise UserError(f"{chain[-1][0]}: extends goes in a circle: {circle}")
        chain.append((parent, _read(parent)))
    return chain[::-1]


def _parent(file: Path, root: Mapping[str, Node]) -> Path | None:
    node = root.get("extends")
    if node is None:
        return None
    if not isinstance(node.value, Scalar) or node.value.is_null:
        raise UserError(f"{file}:{node.line}: extends must be the name or path of one recipe")
    name = node.value.text
    if "/" in name or name.endswith(_EXTENSIONS):
        # A path is meant from the file that says it, so that a folder of recipes can be moved as a whole.
        candidates = [file.parent / Path(name).expanduser()]
    else:
        candidates = [folder / f"{name}.yaml" for folder in [file.parent, *recipe_folders()]]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"{file}:{node.line}: extends: {name}: there is no such recipe.\n{recipe_table()}")
    return found


def _read(file: Path) -> dict[str, Node]:
    root = read_yaml(file)
    if root is None:
        return {}
    if not isinstance(root.value, dict):
        raise UserError(f"{file}:{root.line}: a recipe is a list of 'key: value' lines")
    return root.value


# Merging


def _add_file(build: _Build, file: Path, nodes: Mapping[str, Node], *, inherited: bool) -> None:
    left_out = ("extends", *(_NOT_INHERITED if inherited else ()))
    kept = {key: node for key, node in nodes.items() if key not in left_out}
    data = _section(build, Node(kept, 1), Recipe, (), str(file))
    build.data = _merge(build.data, data)


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`: sections key by key, everything else (lists too) as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new


def _value(build: _Build, node: Node, annotation: Any, path: KeyPath, file: str) -> Any:
    """A YAML piece as plain data of the field's type; mistakes go to `build`."""
    kind, optional = strip_optional(annotation)
    where = f"{file}:{node.key_line or node.line}: {join(path)}" if file else join(path)
    build.origins[path] = where
    if is_section(kind):
        if isinstance(node.value, dict):
            return _section(build, node, kind, path, file)
        if optional and isinstance(node.value, Scalar) and node.value.is_null:
            return None
        keys = ", ".join(list(kind.model_fields)[:4])
        return build.refuse(where, path, f"is a section with keys of its own ({keys}, ...), found {_shown(node)}")
    if item_type(kind) is not None:
        return _items(build, node, annotation, path, file)
    if not isinstance(node.value, Scalar):
        return build.refuse(where, path, f"must be {_described(path)}, found {_shown(node)}")
    try:
        wanted = _described(path) if isinstance(path[-1], str) else None
        return parse_scalar(node.value, annotation, wanted=wanted)
    except ValueError as error:
        return build.refuse(where, path, str(error))


def _section(build: _Build, node: Node, kind: Any, path: KeyPath, file: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    assert isinstance(node.value, dict)
    for key, item in node.value.items():
        inner = (*path, key)
        if key in kind.model_fields:
            data[key] = _value(build, item, kind.model_fields[key].annotation, inner, file)
        else:
            build.unknown.append((f"{file}:{item.key_line}: {join(inner)}" if file else join(inner), inner))
    return data


def _items(build: _Build, node: Node, annotation: Any, path: KeyPath, file: str) -> Any:
    kind, optional = strip_optional(annotation)
    where = build.origins[path]
    if isinstance(node.value, Scalar):
        if node.value.is_null:
            return None if optional else build.refuse(where, path, f"must be {_described(path)}; it cannot be null")
        if is_section(item_type(kind)):
            return build.refuse(
                where, path, f"must be a list of sections, like [{{split: train}}]; found {_shown(node)}"
            )
        node = Node([Node(Scalar(text), node.line) for text in _comma_parts(node.value.text)], node.line, node.key_line)
    if not isinstance(node.value, list):
        return build.refuse(where, path, f"must be {_described(path)}, found {_shown(node)}")
    length = fixed_length(kind)
    if length is not None and len(node.value) != length:
        return build.refuse(where, path, f"must have {length} items, found {len(node.value)}")
    return tuple(_value(build, item, item_type(kind, i), (*path, i), file) for i, item in enumerate(node.value))


def _comma_parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    return parts[:-1] if parts[-1] == "" else parts


def _described(path: KeyPath) -> str:
    target = resolve(path)
    assert target.field is not None
    return describe_field(target.field)


def _shown(node: Node) -> str:
    if isinstance(node.value, Scalar):
        return "nothing" if node.value.is_null else repr(node.value.text)
    return "a section" if isinstance(node.value, dict) else "a list"


# Overrides


def _split_args(args: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], list[Problem]]:
    """The recipe's name, the overrides in order and what is wrong with the arguments' form."""
    given: dict[str, str] = {}
    problems: list[Problem] = []
    for arg in args:
        key, equals, text = arg.partition("=")
        bare = key.lstrip("-")
        if not equals or not bare:
            problems.append(Problem(arg, f"has no value; write {bare or 'key'}=value, without spaces around ="))
        elif key != bare:
            problems.append(Problem(arg, f"write it without dashes: {bare}={text}"))
        elif key in given:
            problems.append(Problem(arg, f"given twice; the other one is {key}={given[key]}"))
        else:
            given[key] = text
    for key, text in given.items():
        for other in given:
            if key.startswith(other + ".") and other != "recipe":
                problems.append(Problem(f"{key}={text}", f"given twice: {other}={given[other]} sets it too"))
    name = given.pop("recipe", None)
    return name, list(given.items()), problems


def _add_override(build: _Build, key: str, text: str) -> None:
    path, where = split(key), f"{key}={text}"
    if path == ("extends",):
        build.problems.append(Problem(where, "extends: belongs in a recipe file"))
        return
    try:
        target = resolve(path)
    except UnknownKey:
        build.unknown.append((where, path))
        return
    node = _override_node(build, where, path, text, target.annotation)
    if node is None:
        return
    before = len(build.problems), len(build.unknown)
    value = _value(build, node, target.annotation, path, "")
    # In messages the override as typed stands for every key in it.
    build.problems[before[0] :] = [Problem(where, _at(p.where, key) + p.message) for p in build.problems[before[0] :]]
    build.unknown[before[1] :] = [(where, unknown) for _, unknown in build.unknown[before[1] :]]
    build.origins.update({known: where for known in build.origins if known[: len(path)] == path})
    try:
        build.data = _set(build.data, path, value, Recipe)
    except IndexError as error:
        build.problems.append(Problem(where, str(error)))


def _at(where: str, key: str) -> str:
    return "" if where == key else f"{where} "


def _override_node(build: _Build, where: str, path: KeyPath, text: str, annotation: Any) -> Node | None:
    """Flow YAML (`[a, b]`, `{rank: 8}`) or text in quotes as YAML, everything else as the plain text."""
    kind, _ = strip_optional(annotation)
    compound = is_section(kind) or item_type(kind) is not None
    flow = compound and text[:1] in ("[", "{")
    in_quotes = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if not flow and not in_quotes:
        return Node(Scalar(text), 0)
    try:
        return parse_yaml(text)
    except YamlError as error:
        build.refuse(where, path, str(error))
        return None


def _set(data: Any, path: KeyPath, value: Any, kind: Any) -> Any:
    """`data` with `value` at `path`; sections and list items on the way are made from the schema's defaults."""
    if not path:
        return _merge(data, value)
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        items = list(data)
        if head > len(items):
            raise IndexError(f"the list has {len(items)} items; the next position is {len(items)}")
        inner, _ = strip_optional(item_type(kind, head))
        if head == len(items):
            if fixed_length(kind) is not None:
                raise IndexError(f"the list has {len(items)} items, numbered from 0")
            items.append(_set({} if is_section(inner) else None, rest, value, inner))
        else:
            items[head] = _set(items[head], rest, value, inner)
        return tuple(items)
    section = dict(data) if isinstance(data, dict) else {}
    schema_field = kind.model_fields[head]
    inner, _ = strip_optional(schema_field.annotation)
    old = section.get(head)
    if head not in section and rest and item_type(inner) is not None:
        default = schema_field.get_default(call_default_factory=True)
        old = tuple(item.model_dump() if is_section(type(item)) else item for item in default)
    section[head] = _set(old, rest, value, inner)
    return section


# Validation and messages


def _validate(build: _Build) -> Recipe | None:
    try:
        recipe = Recipe.model_validate(build.data)
    except ValidationError as error:
        _add_validation_problems(build, error)
        return None
    # Once more, so that defaults have their declared types too.
    return Recipe.model_validate(recipe.model_dump())


def _add_validation_problems(build: _Build, error: ValidationError, *, prefix: KeyPath = ()) -> None:
    for item in error.errors(include_url=False):
        path: KeyPath = (*prefix, *item["loc"])
        if not any(path[: len(refused)] == refused for refused in build.refused):
            message = _plain_message(item, path)
            build.problems.append(Problem(_origin(build, path, message), message))


def _add_unknown_problems(build: _Build) -> None:
    build.problems += [Problem(where, _unknown_message(path, build)) for where, path in build.unknown]


def _origin(build: _Build, path: KeyPath, message: str) -> str:
    """Where `path` was given. A rule between keys names them: an override among those is the likely cause."""
    named = [split(word) for word in _KEY.findall(message)]
    overrides = [build.origins[key] for key in named if key in build.origins and "=" in build.origins[key]]
    return " ".join(overrides) if overrides else build.origins.get(path, join(path))


def _plain_message(item: Any, path: KeyPath) -> str:
    """pydantic's finding in the words of the schema."""
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    try:
        target = resolve(path)
    except UnknownKey:
        return item["msg"]
    if item["type"] == "missing":
        doc = (target.field.description or "").rstrip(".") if target.field else ""
        if is_section(target.annotation):
            doc = (target.annotation.__doc__ or "").rstrip(".")
        return f"is missing: {doc}; {describe_field(target.field) if target.field else 'it must be given'}"
    if item["type"] == "string_pattern_mismatch":
        return f"must match {item['ctx']['pattern']}, found {item['input']!r}"
    found = "" if isinstance(item["input"], dict | list) else f", found {format_value(item['input'])}"
    return f"must be {describe_field(target.field) if target.field else item['msg']}{found}"


def _unknown_message(path: KeyPath, build: _Build) -> str:
    near = nearest_key(path)
    if near is not None:
        return f"unknown key; did you mean {near}?   ({_summary(near, build)})"
    try:
        resolve(path)
    except UnknownKey as error:
        kind, _ = strip_optional(resolve(error.valid).annotation)
        if is_section(kind):
            keys = ", ".join(kind.model_fields)
            return f"unknown key; {join(error.valid) or 'a recipe'} has {keys}"
    return f"unknown key; {join(path[:-1])} has no keys of its own"


def _summary(key: str, build: _Build) -> str:
    """Type and present value of a valid key, for a suggestion."""
    path = split(key)
    target = resolve(path)
    assert target.field is not None
    kind, _ = strip_optional(target.annotation)
    if is_section(kind):
        return "a section: " + ", ".join(kind.model_fields)
    now: Any = build.data
    for part in path:
        try:
            now = now[part]
        except (KeyError, IndexError, TypeError):
            if target.field.is_required():
                return describe_field(target.field)
            now = target.field.get_default(call_default_factory=True)
            break
    return describe_field(target.field) + ("" if now is _REFUSED else f", now {format_value(now)}")


def _report(problems: Sequence[Problem], recipe: str, num_overrides: int, *, subject: str = "recipe ") -> str:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    overrides = f" + {num_overrides} override{'s' if num_overrides != 1 else ''}" if num_overrides else ""
    shown = [(f"{printable(problem.where):.{_MAX_SHOWN_CHARS}}", _short(problem.message)) for problem in problems]
    width = min(max(len(where) for where, _ in shown), 44)
    lines = [f"  {where:<{width}}  {message}" for where, message in shown[:_MAX_SHOWN]]
    if len(shown) > _MAX_SHOWN:
        lines.append(f"  and {len(shown) - _MAX_SHOWN} more")
    return "\n".join([f"{count} in {subject}{recipe}{overrides}", *lines, "Run with --help to list every key."])


def _short(message: str) -> str:
    """A problem's words in one line of bounded length; half surrogates of a command line as escapes."""
    text = message.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 2 * _MAX_SHOWN_CHARS else f"{text[: 2 * _MAX_SHOWN_CHARS]} ..."


def require_weights(recipe: Recipe) -> None:
    """Raise `UserError` unless the recipe says where the model comes from; `mirage plan` does without."""
    model = recipe.model
    if model.tiny is not None:
        return
    hub_id, tiny = _WEIGHTS[model.family]
    if model.path is None:
        raise UserError(
            f"recipe {recipe.name}: model.path is not set, so there are no weights to train.\n"
            f"  model.path=/path/to/folder     a local folder with config.json and *.safetensors\n"
            f"  model.path={hub_id}   a hub id; it is downloaded once\n"
            f"  recipe={tiny}       a small model that is built here and needs no download\n"
            f"The data folder is data.dir={recipe.data.dir}; `make datagen` writes one."
        )
    path = Path(model.path).expanduser()
    looks_local = model.path.startswith(("/", ".", "~")) or model.path.count("/") > 1 or path.is_dir()
    if looks_local and not (path / "config.json").is_file():
        found = "has no config.json" if path.is_dir() else "is no folder"
        raise UserError(f"model.path={model.path}: {found}; give a folder of weights or a hub id such as {hub_id}")


def describe() -> None:
    """Print the tree of keys with types, defaults and one sentence each."""
    from mirage.config.describe import print_schema

    print_schema()
