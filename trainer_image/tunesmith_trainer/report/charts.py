"""The report's charts, drawn by matplotlib as SVG that lives inside the page: no request, no script, no global state.

Colours are placeholders that become CSS variables of the page, so one drawing serves light and dark. Texts stay texts
(they can be read aloud, searched and copied) and take the page's font. The same record gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.report.formatting import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["Chart", "Series", "bars", "curve", "heat_map", "histogram"]

INK, MUTED, LINE, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second", PAPER: "paper"}
STYLE: dict[Any, Any] = {  # matplotlib's type for its keys is a list of all of them
    "svg.fonttype": "none",
    "svg.hashsalt": "tunesmith",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
DOTS_PER_INCH = 72
NARROW = (420, 236)
WIDE = (960, 320)
MOST_POINTS = 400
"""Points of a line; of more, neighbours are drawn as their mean and range."""
MOST_CLASSES = 24


@dataclass(frozen=True)
class Chart:
    """A drawing with what a screen reader says of it."""

    name: str
    title: str
    note: str
    """One short line below the title: unit, or what the marks mean."""
    svg: str


@dataclass(frozen=True)
class Series:
    """Points of one line."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool = False
    """Draw each point: for few, measured now and then."""


@dataclass(frozen=True)
class _Thinned:
    steps: list[float]
    means: list[float]
    lowest: list[float]
    highest: list[float]


def thinned(steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS) -> _Thinned:
    """Join neighbours until at most `most` points are left, each with the mean and the range of what it stands for."""
    import numpy as np

    size = -(-len(values) // most) if values else 1
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    groups = [slice(start, start + size) for start in range(0, len(y), size)]
    return _Thinned(
        [float(x[part].mean()) for part in groups],
        [float(y[part].mean()) for part in groups],
        [float(y[part].min()) for part in groups],
        [float(y[part].max()) for part in groups],
    )


def smoothed(values: Sequence[float], part: float = 0.06) -> list[float]:
    """Return the running mean of the running median: it follows trends, and single spikes don't move it.

    Each runs over about `part` of the points; towards both ends over a third of that, so that it stays nearly centred.
    """
    widest = max(1, round(len(values) * part / 2))

    def run(numbers: Sequence[float], middle: Callable[[Sequence[float]], float]) -> list[float]:
        last = len(numbers) - 1
        halves = [max(widest // 3, min(widest, at, last - at)) for at in range(last + 1)]
        return [middle(numbers[max(0, at - half) : at + half + 1]) for at, half in enumerate(halves)]

    medians = run(values, statistics.median)
    return run(medians, statistics.fmean)


@contextmanager
def _axes(size: tuple[int, int], finished: list[str]) -> Iterator[Axes]:
    """Give axes to draw on, and put their SVG into `finished`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] / DOTS_PER_INCH, size[1] / DOTS_PER_INCH), dpi=DOTS_PER_INCH, layout="tight")
        figure.patch.set_visible(False)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        yield axes
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    finished.append(text.getvalue())


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """Make a file's SVG a part of a page: own ids, the page's colours and font, a title to be read aloud."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font(-family)?: ([^;\"]*?)(?:'DejaVu Sans'|DejaVu Sans)[^;\"]*", r"font\1: \2var(--sans)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    head = (
        f'<svg {view.group(0)} role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _draw(
    name: str, title: str, note: str, description: str, size: tuple[int, int], draw: Callable[[Axes], None]
) -> Chart:
    finished: list[str] = []
    with _axes(size, finished) as axes:
        draw(axes)
    return Chart(name, title, note, _inline(finished[0], name, title, description))


def _write_ticks(axis: Axis, write: Callable[[float], str], *, most: int = 5, whole: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def tick_text(value: float) -> str:
    """Write an axis value: as short as it can be, small ones with an exponent."""
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.4g}".replace("-", "−")


def curve(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    wide: bool = False,
    write: Callable[[float], str] = tick_text,
    limit: tuple[float, str] | None = None,
    events: Sequence[float] = (),
    from_zero: bool = False,
    smooth: bool = False,
) -> Chart:
    """Draw values over steps.

    Args:
        name: prefix of the SVG's ids.
        title: what is shown.
        series: the lines; the first in the accent colour.
        note: line below the title.
        wide: for the full width of the page instead of a column.
        write: how values stand on the axis and in the description.
        limit: a horizontal line and its name.
        events: steps to mark by a vertical line.
        from_zero: whether the axis starts at 0.
        smooth: draw the first series pale, and its running median over it.
    """

    def draw(axes: Axes) -> None:
        for line, colour in zip(series, (ACCENT, SECOND, MUTED), strict=False):
            _draw_line(axes, line, colour, smooth and line is series[0])
        for step in events:
            axes.axvline(step, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        _write_ticks(axes.yaxis, write)
        _write_ticks(axes.xaxis, tick_text, most=8 if wide else 5, whole=True)
        axes.set_xlabel("step", loc="right", fontsize=9)
        if from_zero:
            axes.set_ylim(bottom=0)
        if limit is not None and axes.get_ylim()[0] <= limit[0] <= axes.get_ylim()[1]:
            axes.axhline(limit[0], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                limit[1], (1, limit[0]), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", fontsize=9, color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            )  # fmt: skip
        if len(series) > 1:
            axes.legend(frameon=False, loc="upper right", fontsize=9, labelcolor=INK, handlelength=1.4)

    return _draw(name, title, note, _describe(series, write), WIDE if wide else NARROW, draw)


def _draw_line(axes: Axes, line: Series, colour: str, smooth: bool) -> None:
    points = thinned(line.steps, line.values)
    if line.marked:
        axes.plot(
            points.steps, points.means, color=colour, linewidth=1.6, marker="o", markersize=4, label=line.label,
            markeredgecolor=PAPER, markeredgewidth=0.8,
        )  # fmt: skip
        return
    if points.lowest != points.highest:
        axes.fill_between(points.steps, points.lowest, points.highest, color=colour, alpha=0.16, linewidth=0)
    if smooth and len(points.means) >= 20:
        axes.plot(points.steps, points.means, color=colour, linewidth=0.9, alpha=0.35)
        axes.plot(points.steps, smoothed(points.means), color=colour, linewidth=1.8, label=line.label)
    else:
        axes.plot(points.steps, points.means, color=colour, linewidth=1.5, label=line.label)


def _describe(series: Sequence[Series], write: Callable[[float], str]) -> str:
    parts = []
    for line in series:
        values = [value for value in line.values if math.isfinite(value)]
        if not values:
            continue
        where = f"step {line.steps[0]:g} to step {line.steps[-1]:g}"
        parts.append(
            f"{line.label}: from {write(values[0])} to {write(values[-1])} ({where}), lowest {write(min(values))}."
        )
    return " ".join(parts)


def histogram(
    name: str, title: str, edges: Sequence[float], counts: Sequence[int], *, note: str = "", limit: float | None = None
) -> Chart:
    """Draw counts between edges; `limit` marks maxLength where it lies within."""

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=ACCENT, alpha=0.85, linewidth=0)
        _write_ticks(axes.yaxis, tick_text, whole=True)
        axes.set_xlabel("tokens", loc="right", fontsize=9)
        axes.set_ylim(bottom=0)
        if limit is not None and edges[0] <= limit <= edges[-1] * 1.05:
            axes.axvline(limit, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                f"maxLength {limit:g}", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
                textcoords="offset points", ha="right", va="top", fontsize=9, color=SECOND,
            )  # fmt: skip

    most = max(range(len(counts)), key=lambda at: counts[at])
    description = (
        f"{count(sum(counts))} examples of {edges[0]:g} to {edges[-1] - 1:g} tokens, most of them from "
        f"{edges[most]:g} to {edges[most + 1] - 1:g}."
    )
    return _draw(name, title, note, description, NARROW, draw)


def bars(
    name: str, title: str, labels: Sequence[str], values: Sequence[tuple[float, float | None]], *, note: str = ""
) -> Chart:
    """Draw a share per class: the training data's as a bar, the held-out data's as a tick across it.

    Args:
        name: prefix of the SVG's ids.
        title: what is shown.
        labels: class names.
        values: (share in the training data, share in the held-out data or None), each from 0 to 1.
        note: line below the title.
    """
    shown = min(len(labels), MOST_CLASSES)
    height = max(120, 46 + 24 * shown)

    def draw(axes: Axes) -> None:
        places = range(shown)
        axes.barh(places, [values[at][0] for at in places], height=0.62, color=ACCENT, alpha=0.85)
        for at in places:
            held_out = values[at][1]
            if held_out is not None:
                axes.plot([held_out, held_out], [at - 0.42, at + 0.42], color=SECOND, linewidth=2.4)
            axes.annotate(
                f"{values[at][0] * 100:.1f} %", (max(values[at][0], held_out or 0), at), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=9, color=MUTED,
            )  # fmt: skip
        axes.set_yticks(list(places), [_short(label) for label in labels[:shown]], color=INK)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, max((max(value[0], value[1] or 0) for value in values[:shown]), default=1) * 1.18 or 1)

    said = ", ".join(f"{label} {share * 100:.1f} %" for label, (share, _) in zip(labels, values, strict=True))
    return _draw(name, title, note, f"Shares in the training data: {said}.", (NARROW[0], height), draw)


def heat_map(name: str, title: str, labels: Sequence[str], counts: Sequence[Sequence[int]], *, note: str = "") -> Chart:
    """Draw a confusion matrix: rows are the true classes, shade is the share of the row, numbers are counts.

    Of more than MOST_CLASSES classes those with the most mistakes are drawn.
    """
    chosen = most_confused(counts)
    side = max(230, min(520, 46 * len(chosen) + 110))
    longest = max((len(_short(labels[at])) for at in chosen), default=1)

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        numbers = len(chosen) <= 12
        for y, row in enumerate(chosen):
            total = sum(counts[row]) or 1
            for x, column in enumerate(chosen):
                share = counts[row][column] / total
                colour = ACCENT if row == column else SECOND
                cell = (x - 0.47, y - 0.47)
                axes.add_patch(Rectangle(cell, 0.94, 0.94, facecolor=LINE, alpha=0.35, linewidth=0))
                if share:  # never so dark, or in dark mode so light, that the number couldn't be read
                    axes.add_patch(Rectangle(cell, 0.94, 0.94, facecolor=colour, alpha=0.1 + 0.5 * share, linewidth=0))
                if numbers:
                    axes.annotate(count(counts[row][column]), (x, y), ha="center", va="center", fontsize=10)
        shown = [_short(labels[at]) for at in chosen]
        places = list(range(len(chosen)))
        turned = longest * len(chosen) > 42
        axes.set_xticks(places, shown, color=INK, rotation=90 if turned else 0)
        axes.set_yticks(places, shown, color=INK)
        axes.set_xlim(-0.5, len(chosen) - 0.5)
        axes.set_ylim(len(chosen) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("predicted", fontsize=9)
        axes.set_ylabel("true", fontsize=9)

    right = sum(counts[at][at] for at in range(len(labels)))
    total = sum(map(sum, counts))
    description = f"{count(right)} of {count(total)} examples on the diagonal: predicted as what they are."
    return _draw(name, title, note, description, (side + 40, side), draw)


def most_confused(counts: Sequence[Sequence[int]], most: int = MOST_CLASSES) -> list[int]:
    """Return the classes to draw, in their order: all, or those with the most mistakes (as truth or as answer)."""
    size = len(counts)
    if size <= most:
        return list(range(size))
    mistakes = [sum(counts[at]) + sum(row[at] for row in counts) - 2 * counts[at][at] for at in range(size)]
    return sorted(sorted(range(size), key=lambda at: -mistakes[at])[:most])


def _short(label: str) -> str:
    return label if len(label) <= 18 else label[:17] + "…"
