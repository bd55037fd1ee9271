"""Every page that is written, opened in a browser with markup wherever data can put text: nothing of it runs or loads.

Rows, questions, answers, judges' reasons, categories, tags, concepts, licences, file names, folder names and run names
hold payloads. A payload that ran would open a dialog, set `window.broken`, ask for an address or navigate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_gen.review import PAGE_FILE as REVIEW_PAGE
from data_gen.review import write_review
from data_gen.store import manifest_sha256
from mirage.config.loader import load_recipe
from mirage.data.row import Row, dump_row
from mirage.evals.calibration.sheet import export_sheet
from mirage.miniature.document import Bullets, Document, Figure, Section, Table, web_page
from mirage.report.page import write_report
from mirage.training.inspection import inspect_recipe
from mirage.training.inspection_page import write_inspection
from tests.integration.test_inspection import settings
from tests.support.browser import browser_page
from tests.support.dataset import write_dataset
from tests.support.evaluations import labels, write_evaluation

RUN = "window.broken=1;alert(1)"
PAYLOADS = (
    f"</script><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'><svg onload={RUN}>",
    f"\" onmouseover='{RUN}' autofocus onfocus='{RUN}' x='",
    f"' style='background:url(http://127.0.0.1:9/a)' onload='{RUN}",
    f"<iframe srcdoc='<script>parent.broken=1</script>'></iframe><iframe src='javascript:{RUN}'></iframe>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href='http://127.0.0.1:9/'>",
    "<link rel=stylesheet href='http://127.0.0.1:9/a.css'><img src='http://127.0.0.1:9/a.png'>",
    "{{ 7*7 }}{% for x in range(9) %}{{ cycler.__init__.__globals__ }}{% endfor %}${7*7}",
    f"<!--><details open ontoggle={RUN}>]]>\u2028\u2029<template><script>{RUN}</script></template>",
    f"<form action='http://127.0.0.1:9/'><button formaction='javascript:{RUN}'>x</button></form>",
    f"<a href='javascript:{RUN}'>x</a>",
)
EVERYTHING = " ".join(PAYLOADS)
# What a file may be called: no slash.
FILE_NAME = f"a\"'><img src=x onerror={RUN.replace('/', '')}>"


def evaluations(folder: Path) -> list[Path]:
    """Two evaluations of a run, all text of which is hostile."""
    folder.mkdir(parents=True)
    picture = folder / f"{FILE_NAME}.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    folders = [folder / "evals" / f"step-{step:06d}" for step in (0, 50)]
    for number, evaluation in enumerate(folders):
        given = {
            "mis_hard": labels(asr=9 - number, rsr=3 + number),
            "twins": labels(helped=6),
            "general": labels(right=6),
        }
        write_evaluation(
            evaluation,
            given,
            step=50 * number,
            image_paths=[picture],
            baseline=folders[0] if number else None,
            judge=EVERYTHING,
        )
        rows = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
        for place, row in enumerate(rows):
            text = PAYLOADS[place % len(PAYLOADS)]
            row |= dict.fromkeys(("question", "answer", "reason", "category", "sub_category", "changed"), text)
            row |= {"tags": {text: text}, "details": {text: text}}
        (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(json.dumps({"name": EVERYTHING, "model": {"path": EVERYTHING}, EVERYTHING: 1}))
    (folder / "summary.json").write_text(json.dumps({"kernels/attention": EVERYTHING, EVERYTHING: EVERYTHING}))
    return folders


def hostile_dataset(folder: Path) -> Path:
    """Rows whose every free text is hostile; the rows are valid."""
    write_dataset(folder, seed_rows=3)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = []
    for number, value in enumerate(map(json.loads, lines)):
        text = PAYLOADS[number % len(PAYLOADS)]
        for message in value["messages"]:
            message["content"][-1]["text"] = text
        value |= {"sub_category": text, "licence": text, "tags": {"phrasing": text, "x": text}, "checks": {"x": text}}
        for image in value["images"]:
            image |= {"concept": text, "licence": text, "attribution": text}
        if "segments" in value:
            value["segments"] = dict.fromkeys(value["segments"], text)
        rows.append(dump_row(Row.model_validate(value)))
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    manifest = {"name": EVERYTHING, "num_rows": len(rows)}
    manifest |= {"content_sha256": manifest_sha256(manifest)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def visit(page: Any, path: Path, *, is_own_text: bool = False) -> None:
    """Open the page, send events to everything in it, and see that no payload did anything.

    `is_own_text`: the page's words are the project's, with links in them; the policy alone holds what they bring.
    """
    asked: list[str] = []
    dialogs: list[str] = []

    def refuse(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    def note(request: Any) -> None:
        asked.append(request.url)

    page.on("dialog", refuse)
    page.on("request", note)
    page.goto(path.as_uri())
    page.wait_for_timeout(150)
    page.evaluate(
        """() => { for (const element of document.querySelectorAll('*')) {
             for (const name of ['mouseover', 'focus', 'toggle', 'load', 'error'])
               element.dispatchEvent(new Event(name, {bubbles: false})); }
           for (const details of document.querySelectorAll('details')) details.open = true; }"""
    )
    page.wait_for_timeout(150)
    assert page.url == path.as_uri(), "the page went elsewhere"
    assert not dialogs
    assert page.evaluate("window.broken") is None
    allowed = path.parent.parent.as_uri()
    assert not [url for url in asked if not url.startswith(("data:", "blob:", allowed))], asked
    assert page.evaluate(
        "[...document.querySelectorAll('iframe, form, link, base, embed, object, meta[http-equiv=refresh]')].length"
    ) == 0  # fmt: skip
    if not is_own_text:
        handlers = (
            "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => /^on/i.test(a.name))"
        )
        assert page.evaluate(f"{handlers}.length") == 0
    scripts = "[...document.scripts].filter(s => s.type !== 'application/json').length"
    assert page.evaluate(scripts) <= 1, "one script, the page's own"
    page.remove_listener("dialog", refuse)
    page.remove_listener("request", note)


def hostile_document() -> Document:
    """What the experiment's page is made of."""
    table = Table((EVERYTHING, EVERYTHING), tuple((text, text) for text in PAYLOADS))
    figure = Figure("f", EVERYTHING, f"<svg xmlns='http://www.w3.org/2000/svg'><script>{RUN}</script></svg>")
    link = f"[x](javascript:{RUN}) [y](a\"onmouseover='{RUN})"
    return Document(EVERYTHING, (EVERYTHING, link), (Section(EVERYTHING, (Bullets(PAYLOADS), table, figure)),))


def test_no_page_runs_what_the_data_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / f"run {FILE_NAME}"
    folders = evaluations(root / "report")
    dataset = hostile_dataset(root / FILE_NAME)
    experiment = root / "experiment" / "index.html"
    experiment.parent.mkdir()
    experiment.write_text(web_page(hostile_document()))
    inspected = inspect_recipe(
        load_recipe(settings(dataset, "tiny_internvl_mis")), num_samples=6, num_steps=1, world_size=1
    )
    write_review(dataset, root / "review")
    # No shared memory of the browser is asked: one after the other, each as it would be opened from disk.
    pages = {
        "report": write_report([root / "report"]).path,
        "calibration": export_sheet(folders, root / "sheet" / f"{FILE_NAME}.csv", n=99)[1],
        "review": root / "review" / REVIEW_PAGE,
        "inspection": write_inspection(inspected, root / "inspection"),
        "experiment": experiment,
    }
    with browser_page() as (page, _):
        for name, path in pages.items():
            text = path.read_text("utf-8")
            assert "Content-Security-Policy" in text and "unsafe-inline" not in text, name
            visit(page, path, is_own_text=name == "experiment")
            assert "broken=1" in page.evaluate("document.documentElement.textContent"), f"{name} shows no payload"
            if name == "calibration":
                assert page.evaluate(
                    "[...document.images].every(image => image.naturalWidth > 0) && document.images.length"
                )
