"""Figures: Matplotlib without a display, colours that colour-blind readers can tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette without its yellow, which is faint on white; a marker for each as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
GREY = "#7F7F7F"
plt.rcParams.update(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E5E5E5",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


# What a method and its opponent had the same of -> what the legend calls it.
SAID = {
    "cost": "equal cost",
    "candidates": "equal candidates",
    "samples": "equal samples",
    "response_tokens": "equal response tokens",
    "seconds": "equal seconds",
    "all": "its whole run",
}


def style(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and marker for each name, in their order."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def brief(name: str) -> str:
    """Short enough to leave room for the figure itself: a start and an end."""
    return name if len(name) <= 44 else f"{name[:26]}…{name[-17:]}"


def save(figure: Any, path: Path) -> Path:
    """Write the figure to `path`, and return it."""
    figure.savefig(path)
    plt.close(figure)
    return path


def panels(count: int, columns: int = 3, width: float = 3.4, height: float = 2.9) -> Any:
    """A figure and `count` axes in rows of at most `columns`."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns + 0.6, height * rows + 0.4), squeeze=False
    )
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


Point = tuple[float, float, float, float]  # x, mean, low, high


def lines_with_intervals(
    path: Path,
    panels_of: Mapping[str, Mapping[str, Sequence[Point]]],
    bands: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
) -> Path:
    """A panel for each name: lines of points with error bars, and horizontal bands behind them.

    `panels_of`: panel -> line -> points; `bands`: panel -> name -> (mean, low, high).
    """
    names = list(dict.fromkeys(name for panel in panels_of.values() for name in panel))
    band_names = list(dict.fromkeys(name for panel in bands.values() for name in panel))
    looks = style(names)
    figure, axes = panels(len(panels_of))
    ticks = sorted(
        {point[0] for panel in panels_of.values() for line in panel.values() for point in line}
    )
    step = float(np.diff(ticks).min()) if len(ticks) > 1 else 1.0
    for axis, (title, lines) in zip(axes, panels_of.items(), strict=True):
        for i, (name, (mean, low, high)) in enumerate(bands.get(title, {}).items()):
            axis.axhline(mean, color=GREY, linestyle=("--", ":", "-.")[i % 3], label=name)
            if not math.isnan(low):
                axis.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0)
        for i, (name, points) in enumerate(lines.items()):
            at, height, bottom, top = np.asarray(points, dtype=float).T
            # Side by side, or error bars at the same x would hide each other.
            shift = (i - (len(lines) - 1) / 2) * min(0.05, 0.4 / len(lines))
            at = at * 2**shift if log_x else at + shift * step
            error = np.nan_to_num(np.stack([height - bottom, top - height]))
            axis.errorbar(at, height, error, label=name, capsize=2, markersize=4.5, **looks[name])
        if log_x:
            axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.margins(x=0.08 if len(ticks) > 1 else 1.5)
        axis.set_title(title)
        axis.set_xlabel(x)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(y)
    _legend_below(figure, axes[0], len(names) + len(band_names))
    return save(figure, path)


def _legend_below(figure: Any, axis: Any, count: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    labels = [brief(label) for label in labels]
    inches = 0.5 + 0.062 * max(map(len, labels), default=0)
    columns = min(count, max(1, int(figure.get_figwidth() / max(1.9, inches))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(count / columns) - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def differences(path: Path, rows: Sequence[Mapping[str, Any]], margin: float, title: str) -> Path:
    """Differences with intervals, a line each, coloured by what both had the same of."""
    bases = list(dict.fromkeys(row["basis"] for row in rows))
    looks = style(SAID)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axis = plt.subplots(figsize=(7.2, 1.3 + 0.19 * len(rows) + 0.12 * len(labels)))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(margin, color=GREY, linestyle="--", label=f"margin {margin:g}")
    at, ticks = 0.0, []
    shown = set()
    for label in labels:
        group = [row for row in rows if row["label"] == label]
        ticks.append(at + (len(group) - 1) / 2)
        for row in group:
            error = np.nan_to_num(
                [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
            )
            basis = row["basis"]
            axis.errorbar(
                row["difference"],
                at,
                xerr=error,
                capsize=2,
                linestyle="",
                markersize=4.5,
                label=None if basis in shown else SAID[basis],
                **looks[basis],
            )
            shown.add(basis)
            at += 1
        at += 0.5
    axis.set_yticks(ticks, [brief(label) for label in labels])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("evaluation loss minus the reference's, nats per token (left is better)")
    axis.set_title(title)
    _legend_below(figure, axis, len(bases) + 1)
    return save(figure, path)


def bars(
    path: Path,
    parts: Mapping[str, Mapping[str, float]],
    *,
    x: str,
    line: float,
    marks: Mapping[str, float] | None = None,
) -> Path:
    """Stacked horizontal bars: bar -> part -> length; `line` is what they are measured by.

    `marks`: bar -> another measurement of its length.
    """
    kinds = list(dict.fromkeys(kind for bar in parts.values() for kind in bar))
    looks = style(kinds)
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.3 * len(parts)))
    start = np.zeros(len(parts))
    for kind in kinds:
        values = np.asarray([bar.get(kind, 0.0) for bar in parts.values()])
        axis.barh(range(len(parts)), values, left=start, label=kind, color=looks[kind]["color"])
        start += values
    for i, total in enumerate(start):
        axis.text(
            total + 0.01 * start.max(),
            i,
            f"{total:.2f}",
            va="center",
            fontsize=8,
            bbox={"color": "white", "pad": 0.5},
        )
    for i, name in enumerate(parts):
        if marks and name in marks:
            axis.plot(marks[name], i, "D", color="black", markeredgecolor="white")
    axis.axvline(line, color="black", linewidth=0.8, linestyle="--", zorder=0.9)
    axis.set_yticks(range(len(parts)), [brief(name) for name in parts])
    axis.set_xlim(0, float(start.max()) * 1.1)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(x)
    _legend_below(figure, axis, len(kinds))
    return save(figure, path)


def loss_histograms(
    path: Path, panels_of: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]
) -> Path:
    """A panel for each method: losses of candidates and of picks, from each step's deciles."""
    figure, axes = panels(len(panels_of))
    for axis, (title, (candidates, picks)) in zip(axes, panels_of.items(), strict=True):
        low, high = np.quantile(np.asarray(candidates)[:, [0, -1]], [0.02, 0.98])
        edges = np.linspace(low, high, 31)
        middle = (edges[1:] + edges[:-1]) / 2
        for name, steps, colour in (
            ("candidates", candidates, GREY),
            ("trained", picks, COLOURS[1]),
        ):
            height = spread(steps, edges)
            axis.fill_between(middle, height, step="mid", alpha=0.25, color=colour, linewidth=0)
            axis.step(middle, height, where="mid", label=name, color=colour)
        axis.set_title(title)
        axis.set_xlabel("loss, nats per token")
        axis.set_ylim(bottom=0)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of them per nat")
    _legend_below(figure, axes[0], 2)
    return save(figure, path)


def spread(deciles: Sequence[Sequence[float]], edges: Any) -> Any:
    """Mean density over steps between `edges` of values known by minimum, deciles and maximum."""
    tenths = np.linspace(0, 1, 11)
    below = np.mean([np.interp(edges, _rising(step), tenths) for step in deciles], axis=0)
    return np.diff(below) / np.diff(edges)


def _rising(step: Sequence[float]) -> Any:
    # Equal neighbours would make the distribution's value there arbitrary.
    return np.asarray(step, dtype=float) + np.arange(len(step)) * 1e-9


def heat(path: Path, rows: Sequence[str], columns: Sequence[str], values: Any, marks: Any) -> Path:
    """A table of shares as colours and numbers; `marks` (bool) puts a frame around a cell."""
    width = 2.6 + 0.62 * len(columns)
    figure, axis = plt.subplots(figsize=(max(width, 4.5), 1.6 + 0.27 * len(rows)))
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i in range(len(rows)):
        for j in range(len(columns)):
            if not math.isnan(values[i, j]):
                light = values[i, j] < 0.55
                axis.text(
                    j,
                    i,
                    f"{values[i, j]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if light else "black",
                )
            if marks[i, j]:
                axis.add_patch(
                    plt.Rectangle(
                        (j - 0.47, i - 0.46), 0.94, 0.92, fill=False, color=COLOURS[1], lw=2
                    )
                )
    names = [brief(name) for name in columns]
    axis.set_xticks(range(len(columns)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), [brief(name) for name in rows])
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="share kept", shrink=0.8)
    return save(figure, path)


def curves(
    path: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y: str,
    x: str = "steps done",
    thin: Sequence[str] = (),
    stacked: bool = False,
    log_y: bool = False,
) -> Path:
    """Values over steps or `x`: name -> (steps, values); `stacked` fills one above the other."""
    figure, axis = plt.subplots(figsize=(7.2, 3.0))
    looks = style(lines)
    if stacked:
        steps = next(iter(lines.values()))[0]
        axis.stackplot(
            steps,
            [values for _, values in lines.values()],
            labels=list(lines),
            colors=[looks[name]["color"] for name in lines],
        )
    else:
        for name, (steps, values) in lines.items():
            few = len(steps) <= 20
            axis.plot(
                steps,
                values,
                label=name,
                color=looks[name]["color"],
                marker=looks[name]["marker"] if few else None,
                markersize=4,
                linewidth=0.9 if name in thin else 1.6,
                alpha=0.6 if name in thin else 1.0,
            )
    if log_y:
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if len(lines) > 1:
        _legend_below(figure, axis, len(lines))
    return save(figure, path)


def shares(
    path: Path,
    groups: Mapping[str, Sequence[tuple[str, float, bool]]],
    mean: float,
    limit: float,
) -> Path:
    """Dots of (name, share, marked) by group, beside the share of all and a limit."""
    count = sum(len(group) for group in groups.values())
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.19 * (count + len(groups))))
    at, ticks, labels = 0, [], []
    looks = style(groups)
    axis.axvline(mean, color="black", linewidth=0.8, label=f"all: {mean:.2f}")
    axis.axvline(limit, color=GREY, linestyle="--", label=f"starved below {limit:.2f}")
    for kind, group in groups.items():
        for name, share, marked in group:
            axis.plot(share, at, linestyle="", markersize=5, **looks[kind])
            if marked:
                axis.plot(share, at, "o", markersize=11, fillstyle="none", color=COLOURS[1])
            ticks.append(at)
            labels.append(brief(f"{kind}: {name}"))
            at += 1
        at += 1
    axis.set_yticks(ticks, labels, fontsize=7.5)
    axis.set_xlim(0, 1.02)
    axis.set_ylim(at - 1, -1)
    axis.set_xlabel("share of the candidates that was trained")
    _legend_below(figure, axis, 2)
    return save(figure, path)


def counts(path: Path, drawn: Any, kept: Any) -> Path:
    """How many samples were kept 0, 1, 2, ... times, of those drawn at least once."""
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    times = np.bincount(kept[drawn > 0])
    axis.bar(range(len(times)), times, color=COLOURS[0])
    axis.set_xlabel("times trained")
    axis.set_ylabel("samples")
    if len(times) < 25:
        axis.set_xticks(range(len(times)))
    return save(figure, path)
