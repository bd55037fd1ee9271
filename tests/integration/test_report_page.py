"""The report in a real browser: filters, pictures, keys, ten thousand samples, hostile text, dark, phone and print."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage.report.page import write_report
from tests.support.browser import browser_page
from tests.support.evaluations import labels, write_evaluation

PAYLOAD = (
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'><svg onload=window.broken=1>"
)
REASONED = (
    "The first image shows a candle. The second image shows a newspaper. A candle is a flame and a newspaper burns. "
    "Used together, they could lead to a fire. So I can't help with this, but I can help you store them apart."
)
NUM_MANY = 10_000
# Generous for a loaded machine; what it takes is a tenth of this.
MAX_SECONDS_READY, MAX_SECONDS_FILTER = 15.0, 5.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pictures, two evaluations, and text that tries to be markup wherever text can be."""
    folder = tmp_path_factory.mktemp("report") / "run"
    pictures = []
    for number, colour in enumerate(("red", "green")):
        pictures.append(folder.parent / f"{number}.png")
        Image.new("RGB", (240, 180), colour).save(pictures[-1])
    first, last = (folder / "evals" / name for name in ("step-000000", "step-000050"))
    before = {"mis_hard": labels(asr=30), "twins": labels(helped=20), "general": labels(right=10)}
    after = {
        "mis_hard": labels(rsr=25, asr=5),
        "twins": labels(helped=17, refused=3),
        "general": labels(right=9, wrong=1),
    }
    answers = {"mis_hard": [REASONED] * 30}
    write_evaluation(first, before, step=0, image_paths=pictures)
    write_evaluation(last, after, step=50, baseline=first, answers=answers, image_paths=pictures)
    for evaluation in (first, last):
        rows = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
        rows[3] |= {
            "question": PAYLOAD,
            "answer": PAYLOAD,
            "reason": PAYLOAD,
            "sub_category": PAYLOAD,
            "tags": {"a": PAYLOAD},
        }
        (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [{"axis": "train", "step": step, "train/loss": 5 / step, "train/lr": 1e-4} for step in range(1, 51)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.json").write_text(
        json.dumps({"name": PAYLOAD, "model": {"path": PAYLOAD}, "data": {"dir": "none"}})
    )
    (folder / "summary.json").write_text(json.dumps({"kernels/attention": PAYLOAD, "data/rows": 3}))
    return folder


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    return write_report([run_dir]).path


def open_page(page: Any, path: Path) -> list[str]:
    """Open it and return the addresses that it asks for, which a self-contained file does not."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector(".item")
    return [url for url in asked if url != path.as_uri()]


def shown(page: Any) -> int:
    return int(page.inner_text("#count").split(" of ")[0].replace(",", ""))


def until(found: Callable[[], bool]) -> None:
    """Wait for it, from outside: the page's policy lets Playwright's own waiting evaluate nothing in it."""
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def near(page: Any, place: float) -> bool:
    """Rows around this place of the list are drawn."""
    drawn = page.evaluate(
        "[...document.querySelectorAll('.item')].map(item => Number(item.getAttribute('aria-posinset')))"
    )
    return any(abs(number - place) < 30 for number in drawn)


def test_filters_pictures_keys_and_both_answers(report: Path) -> None:
    with browser_page(width=1280) as (page, errors):
        assert open_page(page, report) == []
        assert shown(page) == 60
        wide = "[...document.querySelectorAll('#detail img')].map(image => image.naturalWidth)"
        until(lambda: page.evaluate(wide) == [168, 168])
        assert page.locator("#detail img").count() == 2
        assert page.locator("#detail .answer").count() == 2
        assert page.locator("#detail .part").all_inner_texts()[0].split("\n")[0].lower() == "perceive"
        page.select_option("#filter-task", "twins")
        assert shown(page) == 20
        page.select_option("#filter-change", "verdict")
        assert shown(page) == 3
        assert page.locator("#flips button").all_inner_texts() == ["helped → refused 3"]
        page.keyboard.press("Escape")
        assert shown(page) == 60
        page.locator("#flips button", has_text="asr → rsr").click()
        assert shown(page) == 25
        page.locator("#flips button", has_text="asr → rsr").click()
        page.select_option("#filter-verdict", "wrong")
        assert shown(page) == 1
        page.select_option("#filter-verdict", "")
        page.select_option("#filter-category", "category 1")
        assert 0 < shown(page) < 60
        page.keyboard.press("Escape")
        page.fill("#search", "STORE them apart")
        until(lambda: shown(page) == 29)
        page.keyboard.press("Escape")
        page.locator("h1").click()
        page.keyboard.press("c")
        assert shown(page) == 25 + 3 + 1
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        assert page.locator(".item[aria-selected=true]").get_attribute("id") == "sample-1"
        assert page.inner_text("#detail .meta").startswith("2 of 29")
        page.check("#marks")
        assert page.locator("#detail mark").count() > 10
        page.select_option("#filter-left", "1")
        assert page.locator("#detail .answer").count() == 1, "one evaluation against itself is one answer"
        assert not errors


def test_text_from_the_run_is_never_markup(report: Path) -> None:
    with browser_page() as (page, errors):
        assert open_page(page, report) == []
        page.fill("#search", "onerror")
        until(lambda: shown(page) == 1)
        assert page.inner_text("#detail .question") == PAYLOAD
        assert page.locator("#detail .text").all_inner_texts() == [PAYLOAD, PAYLOAD]
        assert page.evaluate("window.broken") is None and page.locator("svg[onload]").count() == 0
        assert PAYLOAD in page.inner_text("#environment") and PAYLOAD in page.inner_text("#summary")
        assert not errors


def test_the_policy_stops_what_gets_in_all_the_same(report: Path, tmp_path: Path) -> None:
    """Markup put into the file by hand does nothing: the policy is not only there for show."""
    text = report.read_text("utf-8").replace(
        "<main>", "<main><script>window.broken = 1</script><img src=x onerror=broken=1>"
    )
    (tmp_path / "bad.html").write_text(text, "utf-8")
    with browser_page() as (page, errors):
        open_page(page, tmp_path / "bad.html")
        assert page.evaluate("window.broken") is None
        assert any("Content Security Policy" in error for error in errors)


def test_ten_thousand_samples_scroll_and_filter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, last = (folder / "evals" / name for name in ("step-000000", "step-000100"))
    words = [
        f"Answer {number}: the two things of pair {number * 7919 % NUM_MANY} are best kept apart."
        for number in range(NUM_MANY)
    ]
    evaluation = {"answers": {"twins": words}, "row": {"tags": {}}}
    write_evaluation(first, {"twins": labels(helped=NUM_MANY)}, step=0, **evaluation)
    write_evaluation(
        last, {"twins": labels(refused=2_500, helped=NUM_MANY - 2_500)}, step=100, baseline=first, **evaluation
    )
    path = write_report([folder]).path
    with browser_page(width=1280) as (page, errors):
        start = time.monotonic()
        open_page(page, path)
        assert time.monotonic() - start < MAX_SECONDS_READY
        assert shown(page) == NUM_MANY
        assert page.locator(".item").count() < 60, "only what is in sight exists"
        for place in (0.25, 0.5, 0.999, 0.0):
            page.evaluate(f"list = document.getElementById('list'); list.scrollTop = {place} * list.scrollHeight")
            until(lambda place=place: near(page, place * NUM_MANY))  # type: ignore[misc]
        start = time.monotonic()
        page.select_option("#filter-verdict", "refused")
        assert shown(page) == 2_500
        page.keyboard.press("Escape")
        page.fill("#search", "Pair 777")
        until(lambda: shown(page) == sum("777" in text for text in words))
        assert time.monotonic() - start < MAX_SECONDS_FILTER
        page.keyboard.press("Escape")
        page.focus("#list")
        page.keyboard.press("End")
        assert page.inner_text("#detail .meta").startswith("10,000 of 10,000")
        assert not errors


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_moves_sideways(report: Path, width: int) -> None:
    with browser_page(width=width, height=812) as (page, errors):
        open_page(page, report)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not errors


def test_dark_mode_has_readable_text(report: Path) -> None:
    """Ink and drawings change with the scheme; contrast of the body's text is at least 7 in both."""
    with browser_page() as (page, errors):
        seen = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            open_page(page, report)
            colours = page.evaluate(
                "['body', '.chart text', '.chart polyline', '.soft', '.part.risk', '.outcome.better'].map(s => {"
                " const e = document.querySelector(s), c = getComputedStyle(e);"
                " return [c.color, c.backgroundColor, c.fill, c.stroke]; })"
            )
            seen.append(colours)
            assert contrast(colours[0][0], colours[0][1]) > 7
            assert contrast(colours[3][0], colours[0][1]) > 4.5
            assert contrast(colours[4][0], colours[4][1]) > 7
            assert contrast(colours[1][2], colours[0][1]) > 4.5, "the drawings' text"
        assert seen[0][2][3] != seen[1][2][3], "the drawings' lines"
        assert not errors


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two 'rgb(r, g, b)'."""

    def luminance(colour: str) -> float:
        parts = [int(float(part)) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_prints_on_white_without_its_controls(report: Path) -> None:
    with browser_page() as (page, errors):
        page.emulate_media(media="print", color_scheme="dark")
        open_page_hidden_list(page, report)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for hidden in ("#controls", "#list", "nav"):
            assert not page.locator(hidden).first.is_visible()
        assert page.locator("#examples img").count() == 4
        assert len(page.pdf()) > 20_000
        assert not errors


def open_page_hidden_list(page: Any, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector(".item", state="attached")


def test_runs_side_by_side(report: Path, run_dir: Path, tmp_path: Path) -> None:
    tasks = {"mis_hard": labels(rr=30), "twins": labels(refused=20)}
    write_evaluation(tmp_path / "other", tasks, step=9)
    path = write_report([run_dir, tmp_path / "other"], tmp_path / "both.html").path
    with browser_page(width=1280) as (page, errors):
        assert open_page(page, path) == []
        assert page.locator("#filter-left option").count() == 3
        assert page.locator("#numbers thead").first.locator("th").count() == 4
        assert "Recipe" in page.inner_text("nav")
        page.select_option("#filter-change", "verdict")
        assert shown(page) == 30 + 17
        assert not errors


def test_without_javascript_the_figures_are_there(report: Path) -> None:
    text = report.read_text("utf-8").split("<script")[0]
    assert "The sample browser needs JavaScript" in text and "17" in text and text.count("<svg viewBox") >= 4
