"""The miniature experiment's page: every table, the same bytes again, partial experiments, and the committed one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mirage.miniature.analysis import Experiment
from mirage.miniature.conditions import BASE, CONDITIONS, FAMILIES, MAIN
from mirage.miniature.document import Bullets, Document, Figure, Section, Table, markdown, web_page
from mirage.miniature.page import MARKDOWN, RESULTS, WEB_PAGE, build, write_page
from mirage.miniature.paper import MODELS, TABLE_1, TABLE_2, TABLE_4, TABLE_6, TABLE_11, figures
from mirage.miniature.results import read_results_file, write_results_file
from tests.support.browser import browser_page
from tests.support.miniature import content

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("experiment", "experiment_curves", "experiment_progress")
SECTIONS = (
    "What it shows, and what it does not",
    "The bars",
    "Table 1:",
    "Table 2:",
    "Table 4:",
    "Table 6:",
    "Table 11:",
    "Benign twins",
    "Held-out pairs",
    "Sentence structures",
    "Order of the pictures",
    "Number of pictures",
    "Line art",
    "One picture blank",
    "Reasoned labels",
    "Learning curves",
    "Paired tests",
    "Where it disagrees with the paper",
    "Every run",
)


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    docs = tmp_path_factory.mktemp("docs")
    write_page(write_results_file(content(), docs / RESULTS), docs=docs)
    return docs


def test_page_has_every_section_with_a_table_for_each_family(docs: Path) -> None:
    text = (docs / MARKDOWN).read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [next(name for name in SECTIONS if heading.startswith(name)) for heading in headings] == list(SECTIONS)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[2:15]:
        assert section.count("**InternVL, tiny**") == section.count("**Qwen2-VL, tiny**") == 1, section[:40]
        assert len(re.findall(r"^\| ---", section, re.MULTILINE)) == 2, section[:40]
    assert "Not measured" not in text and "Not complete" not in text
    for condition in CONDITIONS.values():
        assert f"({condition.letter}) {condition.title}" in text


def test_the_papers_numbers_stand_beside_ours(docs: Path) -> None:
    text = (docs / MARKDOWN).read_text(encoding="utf-8")
    table = text.split("## Table 2:")[1].split("## ")[0]
    row = next(line for line in table.splitlines() if line.startswith("| (c)") and "the right pictures" in line)
    assert row.split(" | ")[3] == "42.5" and row.endswith("63.3 |")
    assert "80.1 / 0.5 / 14.8 / 4.5" in text and "| 61.3 | 11.1 |" in text and "58.5 | 11.1 |" in text


def test_web_page_holds_the_same_tables_and_no_other_file(docs: Path) -> None:
    page, text = ((docs / name).read_text(encoding="utf-8") for name in (WEB_PAGE, MARKDOWN))
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.MULTILINE))
    assert page.count("<img") == 3 and "<script" not in page
    assert re.findall(r'src="(?!data:image/svg)', page) == []
    assert re.findall(r'(?:href|xlink:href)="(?!#)', page) == []
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_page_fits_a_phone(docs: Path) -> None:
    with browser_page(width=390) as (page, errors):
        page.goto((docs / WEB_PAGE).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390 and errors == []
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 30)"


def test_page_and_figures_are_the_same_bytes_again(docs: Path, tmp_path: Path) -> None:
    write_page(docs / RESULTS, docs=tmp_path)
    names = [MARKDOWN, WEB_PAGE, *(Path("figures") / f"{name}.{end}" for name in FIGURES for end in ("svg", "png"))]
    assert [(docs / name).read_bytes() == (tmp_path / name).read_bytes() for name in names] == [True] * len(names)
    width = int.from_bytes((docs / "figures" / "experiment.png").read_bytes()[16:20], "big")
    assert width == 1600


@pytest.mark.parametrize(
    ("families", "seeds", "conditions"),
    [(("internvl",), (0,), (BASE, MAIN)), (("qwen2_vl",), (1, 2), ("vlguard",)), (("internvl",), (0,), (BASE,))],
)
def test_a_part_of_the_experiment_makes_a_page_that_says_what_is_missing(
    families: tuple[str, ...], seeds: tuple[int, ...], conditions: tuple[str, ...], tmp_path: Path
) -> None:
    part = content(families=families, seeds=seeds, conditions=conditions)
    write_page(write_results_file(part, tmp_path / RESULTS), docs=tmp_path)
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert "**Not complete.** Missing:" in text and "(b) Textual SFT was not run" in text
    assert re.findall(r"^## Table", text, re.MULTILINE) == ["## Table"] * 5


def test_fewer_tasks_leave_gaps_and_no_error() -> None:
    part = content(families=("internvl",), seeds=(0,), conditions=(BASE, "vlguard", "mis", MAIN))
    for run in part["runs"]:
        run["outcomes"] = {task: text for task, text in run["outcomes"].items() if task in ("mis_hard", "twins")}
    part["tasks"] = {task: part["tasks"][task] for task in ("mis_hard", "twins")}
    text = markdown(build(Experiment(part)))
    assert "| – |" in text and "not measured" in text


def test_the_papers_tables_agree_with_each_other() -> None:
    for family in FAMILIES:
        assert set(TABLE_2[family]) == {"twins", "twins@white", "twins@text_only"}
        for key, (_, mean) in TABLE_6[family].items():
            in_ablation = TABLE_11[family].get(key)
            assert in_ablation is None or in_ablation[0] == mean
        for key, row in TABLE_11[family].items():
            if key in TABLE_1[family]:
                assert row[1:3] == TABLE_1[family][key][4:]
            if key in TABLE_4[family]:
                assert row[3:] == tuple(TABLE_4[family][key][task][0] for task in ("mis_easy", "mis_hard", "mis_real"))
        for analogue, by_condition in figures(family):
            assert set(by_condition) <= set(CONDITIONS) and len(by_condition) >= 2, analogue
    assert set(MODELS) == set(FAMILIES)


def test_forms_of_a_document() -> None:
    blocks = ("A `b` **c** [d](e.md) <f>", Bullets(("x", "y")), Table(("h", "n"), (("a|b", "met"),)))
    document = Document("T", blocks, (Section("S t", (Figure("f", 'a "b"', "<svg></svg>"),)),))
    assert markdown(document) == (
        "# T\n\nA `b` **c** [d](e.md) <f>\n\n- x\n- y\n\n| h | n |\n| --- | ---: |\n| a\\|b | met |\n\n"
        '## S t\n\n![a "b"](figures/f.png)\n'
    )
    page = web_page(document)
    assert '<p>A <code>b</code> <strong>c</strong> <a href="e.md">d</a> &lt;f&gt;</p>' in page
    assert '<td class="word">a|b</td><td class="met">met</td>' in page and '<h2 id="s-t">S t</h2>' in page
    assert '<img alt="a &quot;b&quot;" src="data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="></figure>' in page


def test_committed_page_is_what_the_committed_results_make() -> None:
    docs = ROOT / "docs"
    made = markdown(build(Experiment(read_results_file(docs / RESULTS))))
    assert (docs / MARKDOWN).read_text(encoding="utf-8") == made, "run python -m mirage.miniature.page"
    for name in FIGURES[:2]:
        assert (docs / "figures" / f"{name}.png").is_file()
