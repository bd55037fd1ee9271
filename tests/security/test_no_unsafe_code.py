"""The product has no pickle, no unsafe loader, no shell, no eval and unpacks no archive, as its syntax trees show.

A name here is a door through which a file or a reply could run code or write outside its folder. Whoever needs one
changes this test, and says why in ALLOWED.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mirage", "data_gen")

MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "zipfile", "tarfile")
# Dotted names as they are written at a call.
CALLS = (
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "shutil.unpack_archive",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.save", "torch.jit.load",
    "torch.hub.load", "np.save", "np.savez", "numpy.save", "pd.read_pickle", "jinja2.Environment", "Environment",
)  # fmt: skip
# Parameters that must not have this value; for torch.load and np.load see below.
KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False, "autoescape": False}
# (file, what) -> why it is right there.
ALLOWED = {
    (
        "data_gen/ray_executor.py",
        "import pickle",
    ): "objects of the driver for its own Ray workers, which Ray pickles too; no file and no reply is read with it",
    ("data_gen/ray_executor.py", "pickle.dumps"): "see above",
    ("data_gen/ray_executor.py", "pickle.loads"): "see above",
    (
        "mirage/evals/interchange/predictions.py",
        "import zipfile",
    ): "adds up the sizes that an xlsx file states before openpyxl opens it; nothing is unpacked",
    ("mirage/evals/interchange/predictions.py", "zipfile.ZipFile"): "see above",
}


@lru_cache(maxsize=1)
def product() -> dict[str, list[ast.AST]]:
    """The nodes of every source file of the product that import or call something, by its path."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): relevant(path.read_text("utf-8")) for path in paths}


def relevant(source: str) -> list[ast.AST]:
    """Imports and calls of a Python source."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; what stands before a call or an index is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, what) of each forbidden thing."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in CALLS]
        else:
            names = []
        for name in names:
            if name.partition(".")[0] in MODULES or name in CALLS:
                yield node.lineno, f"import {name}"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _call_findings(node))


def _call_findings(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    given = {item.arg: item.value for item in call.keywords if item.arg}
    if name in CALLS or name.partition(".")[0] in MODULES:
        yield name
    if name.endswith((".extractall", ".extract_all")):
        yield name
    if name in ("torch.load", "np.load", "numpy.load"):
        wanted, value = ("weights_only", True) if name == "torch.load" else ("allow_pickle", False)
        if not (isinstance(given.get(wanted), ast.Constant) and given[wanted].value is value):  # type: ignore[attr-defined]
            yield f"{name} without {wanted}={value}"
    for keyword, value in KEYWORDS.items():
        if isinstance(given.get(keyword), ast.Constant) and given[keyword].value is value:  # type: ignore[attr-defined]
            yield f"{keyword}={value}"


def test_the_products_code_has_none() -> None:
    assert len(product()) > 300
    found = [
        f"{name}:{line}: {what}"
        for name, nodes in product().items()
        for line, what in findings(nodes)
        if (name, what) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_every_allowance_is_used() -> None:
    for name, what in ALLOWED:
        assert what in {item for _, item in findings(product()[name])}, (name, what)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import zipfile as z",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "archive.extractall(folder)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "tempfile.mktemp()",
        "jinja2.Environment(autoescape=True)",
    ],
)
def test_each_door_would_be_seen(source: str) -> None:
    assert list(findings(relevant(source))), source


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "re.compile(x)", "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)", "subprocess.run(['ls'])", "SandboxedEnvironment(autoescape=True)",
    ],
)  # fmt: skip
def test_what_is_safe_passes(source: str) -> None:
    assert not list(findings(relevant(source))), source


def test_no_console_lets_escape_sequences_through() -> None:
    """`SafeConsole` is the only console that is built; `tests/security/test_terminal.py` shows what it does."""
    for name, nodes in product().items():
        built = {dotted(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not built & {"Console", "rich.console.Console", "rich.print"}, name
