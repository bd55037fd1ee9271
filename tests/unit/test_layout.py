"""The shape of the checkout: names that shadow nothing, modules that say what they are for, nothing of one machine."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FUNCTION_LINES = 70
# Functions that may be longer, each with the reason.
LONG_FUNCTIONS: dict[str, str] = {}

# Written in two halves, so that this file does not hold what it looks for.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "root", "farm")]
REGISTRY_HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "npm" + "js.org"]


@cache
def checkout_files() -> tuple[Path, ...]:
    """Tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return tuple(sorted({ROOT / name for name in names if name and (ROOT / name).is_file()}))


def python_files(*, tests: bool) -> list[Path]:
    return [
        path
        for path in checkout_files()
        if path.suffix == ".py" and (tests or path.relative_to(ROOT).parts[0] != "tests")
    ]


@cache
def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_checkout_is_seen() -> None:
    """The other tests here would pass on an empty list."""
    names = {relative(path) for path in checkout_files()}
    assert {"setup.cfg", "Makefile", "mirage/errors.py", "tests/unit/test_layout.py"} <= names


def test_no_module_of_mirage_shadows_another() -> None:
    """`accelerate launch mirage/train.py` puts `mirage/` first on `sys.path`: each name in it hides any other."""
    own = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "mirage").iterdir()}
    own -= {"__init__", "__pycache__", "py"}
    installed = set(importlib.metadata.packages_distributions()) - {"mirage", "data_gen"}
    assert own & set(sys.stdlib_module_names) == set()
    assert own & installed == set()


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in python_files(tests=True):
        tree = ast.parse(text_of(path) or "")
        is_package_marker = path.name == "__init__.py" and not tree.body and "tests" in path.parts
        if not ast.get_docstring(tree) and not is_package_marker:
            silent.append(relative(path))
    assert silent == []


def long_functions(tree: ast.Module) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                found.append((node.name, num_lines))
    return found


def test_functions_stay_short() -> None:
    found = {
        f"{relative(path)}:{name}": num_lines
        for path in python_files(tests=True)
        for name, num_lines in long_functions(ast.parse(text_of(path) or ""))
    }
    assert {name: lines for name, lines in found.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(found), "an allowance nobody needs any more"


@pytest.mark.parametrize("needles", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_nothing_of_one_machine(needles: list[str]) -> None:
    pattern = re.compile("|".join(rf"(?<![A-Za-z0-9_.]){re.escape(needle)}" for needle in needles))
    found = [
        f"{relative(path)}:{number}: {line.strip()[:100]}"
        for path in checkout_files()
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_large_file_is_in_the_checkout() -> None:
    large = {relative(path): path.stat().st_size for path in checkout_files() if path.stat().st_size > 2_000_000}
    shipped = {f"mirage/models/shipped/{family}/model.safetensors" for family in ("internvl", "qwen2_vl")}
    assert large.keys() <= shipped and all(size <= 4 * 1024**2 for size in large.values()), large


def test_base_install_needs_no_torchvision() -> None:
    """torchvision, and what pulls it in, replaces a CPU torch by a CUDA build of several gigabytes."""
    options = setup_cfg()
    base = options["options"]["install_requires"].split("\n") + options["options.extras_require"]["dev"].split("\n")
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in base if line}
    assert "torch" in names
    assert names & {"torchvision", "timm", "qwen-vl-utils", "liger-kernel", "flash-attn", "triton", "vllm"} == set()


def test_every_dependency_has_an_upper_bound() -> None:
    options = setup_cfg()
    lines = [line for line in options["options"]["install_requires"].split("\n") if line]
    assert [line for line in lines if not re.search(r">=[\d.]+,<[\d.]+$", line)] == []


def test_extras_exist() -> None:
    assert {"gpu", "api", "vllm", "dev"} <= set(setup_cfg()["options.extras_require"])


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"
