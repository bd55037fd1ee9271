"""Small drawings as SVG that follows the page's colours: lines over steps, and one rate against another.

Series differ by colour, by dash and by the shape of their marks, so that they are told apart without colour. Every
point says its numbers in a title element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

NUM_STYLES = 6
_WIDTH, _HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 38
# More points than this do not fit on so many pixels; a longer series is shown by the mean of each stretch.
MAX_POINTS = 240
_MAX_MARKED = 24


@dataclass(frozen=True)
class Point:
    """A value with its 95% interval, if it has one, and what its title says."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    x_low: float | None = None
    x_high: float | None = None
    label: str = ""
    """Written beside the point."""


@dataclass(frozen=True)
class Series:
    """Points in order, joined by a line. `style` chooses colour, dash and mark."""

    name: str
    points: Sequence[Point]
    style: int = 0
    faint: bool = False
    """Drawn thin and without marks, behind the others."""


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> Markup:
    """A figure with its caption and, for two series or more, a legend. Values that are not finite are left out.

    `title` is its caption and its text for those who cannot see it. With `log` the vertical scale is logarithmic where
    all values are above 0, and the caption says so. Empty where no series has a point.
    """
    shown = [Series(item.name, _finite(item.points), item.style, item.faint) for item in series]
    points = [point for item in shown for point in item.points]
    if not points:
        return Markup("")
    xs = [value for point in points for value in (point.x, point.x_low, point.x_high) if value is not None]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    log = log and min(ys) > 0
    heights = y_range or (_log_padded(min(ys), max(ys)) if log else _padded(min(ys), max(ys)))
    frame = _Frame(x_range or _padded(min(xs), max(xs)), heights, log)
    title = f"{title} (logarithmic)" if log else title
    parts = [_axes(frame, x_label, y_label)]
    parts += [_draw(item, frame) for item in sorted(shown, key=lambda item: not item.faint)]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(parts)
    )
    named = [item for item in shown if item.name and item.points]
    legend = Markup("").join(_legend_item(item) for item in named) if len(named) > 1 else Markup("")
    keys = Markup('<div class="legend">{}</div>').format(legend) if legend else Markup("")
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>').format(title, svg, keys)


def thin_out(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many points: each stretch of a longer series is its mean, at the mean of its places."""
    kept = _finite(points)
    if len(kept) <= most:
        return kept
    borders = [round(number * len(kept) / most) for number in range(most + 1)]
    found = []
    for start, end in itertools.pairwise(borders):
        part = kept[start:end]
        found.append(
            Point(math.fsum(point.x for point in part) / len(part), math.fsum(point.y for point in part) / len(part))
        )
    return found


def number_text(value: float) -> str:
    """A number on an axis: '0.00015' as 1.5e-4, '12000' as 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie on the drawing."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    log: bool = False

    def x(self, value: float) -> float:
        low, high = self.xs
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.ys
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _padded(low: float, high: float) -> tuple[float, float]:
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * 0.04
    # A range that touches 0 from above stays there.
    return (low if low >= 0 and low - pad < 0 else low - pad), high + pad


def _log_padded(low: float, high: float) -> tuple[float, float]:
    pad = (high / low) ** 0.04 if high > low else 2.0
    return low / pad, high * pad


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 7:
            return found
    return found[:: -(-len(found) // 6)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: _Frame, x_label: str, y_label: str) -> Markup:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    parts = []
    for value in _log_ticks(*frame.ys) if frame.log else _ticks(*frame.ys, 5):
        y = frame.y(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, right, y, y))
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 6, y + 4, number_text(value))
        )
    for value in _ticks(*frame.xs, 5):
        x = frame.x(value)
        parts.append(Markup('<line class="tick" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x, x, bottom, bottom + 4))
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, bottom + 16, number_text(value))
        )
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, right, bottom, bottom))
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (left + right) / 2, _HEIGHT - 5, x_label
        )
    )
    parts.append(
        Markup('<text class="name" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (top + bottom) / 2, y_label
        )
    )
    return Markup("").join(parts)


def _draw(series: Series, frame: _Frame) -> Markup:
    style = f"s{series.style % NUM_STYLES}"
    parts = []
    if len(series.points) > 1:
        line = " ".join(f"{frame.x(point.x)},{frame.y(point.y)}" for point in series.points)
        parts.append(Markup('<polyline points="{}"/>').format(line))
    for point in series.points:
        if point.low is not None and point.high is not None:
            x = frame.x(point.x)
            parts.append(_bar(x, x, frame.y(point.low), frame.y(point.high)))
        if point.x_low is not None and point.x_high is not None:
            y = frame.y(point.y)
            parts.append(_bar(frame.x(point.x_low), frame.x(point.x_high), y, y))
    if not series.faint and len(series.points) <= _MAX_MARKED:
        parts += [_mark(point, series.style, frame) for point in series.points]
    parts += [_label(point, frame) for point in series.points if point.label]
    return Markup('<g class="{} {}">{}</g>').format(style, "faint" if series.faint else "", Markup("").join(parts))


def _bar(x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="bar" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x1, x2, y1, y2)


def _mark(point: Point, style: int, frame: _Frame) -> Markup:
    return Markup('<path class="mark" d="{}"><title>{}</title></path>').format(
        _shape(style, frame.x(point.x), frame.y(point.y)), point.title
    )


def _shape(style: int, x: float, y: float) -> str:
    """A disc, square, triangle, diamond, downward triangle or cross around a place."""
    shapes = (
        f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x} {y - 4.6:.1f}l4.4 7.8h-8.8z",
        f"M{x} {y - 5}l5 5l-5 5l-5 -5z",
        f"M{x} {y + 4.6:.1f}l4.4 -7.8h-8.8z",
        f"M{x - 4} {y - 1.3:.1f}h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
    )
    return shapes[style % NUM_STYLES]


def _label(point: Point, frame: _Frame) -> Markup:
    """Beside the point, on the side with more room."""
    x, y = frame.x(point.x), frame.y(point.y)
    on_left = x > (_LEFT + _WIDTH) / 2
    below = y < _TOP + 24
    return Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        x - 8 if on_left else x + 8, y + 15 if below else y - 7, "end" if on_left else "start", point.label
    )


def _legend_item(series: Series) -> Markup:
    style = series.style % NUM_STYLES
    mark = "" if series.faint else _shape(style, 14, 7)
    return Markup(
        '<span><svg class="key" viewBox="0 0 28 14" aria-hidden="true"><g class="s{} {}">'
        '<polyline points="0,7 28,7"/><path class="mark" d="{}"/></g></svg>{}</span>'
    ).format(style, "faint" if series.faint else "", mark, escape(series.name))
