"""Rows that compare our measurement with a reference from the same run: verdict, table, JSON and plot."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

__all__ = ["COLORS", "Row", "Target", "apart", "arguments", "command_line", "draw", "figure_of", "finish"]

T = TypeVar("T")

PLOT_HEIGHT = 4.5
COLORS = {"ok": "tab:green", "MISSED": "tab:red", "": "tab:gray"}


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for the ratio, or for our value alone: a minimum, or a maximum if `is_most`."""

    bound: float
    is_most: bool = False
    of_ours: bool = False

    def __str__(self) -> str:
        return f"{'ours' if self.of_ours else 'ratio'} {'<=' if self.is_most else '>='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; both are medians, in `unit`. `value` is None if the reference is not installed."""

    what: str
    setting: str
    ours: float
    reference: str
    value: float | None
    unit: str
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over the reference."""
        return self.ours / self.value if self.value else math.nan

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty without one."""
        if self.target is None:
            return ""
        measured = self.ours if self.target.of_ours else self.ratio
        is_met = measured <= self.target.bound if self.target.is_most else measured >= self.target.bound
        return "ok" if is_met else "MISSED"


def command_line(about: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark: `json` and `plot`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    return parser


def arguments(about: str | None, quick: str) -> argparse.Namespace:
    """The options of benchmarks that compare: also `quick` and `runs`."""
    parser = command_line(about)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--runs", type=int, default=3, help="number of runs for the medians (default 3)")
    return parser.parse_args()


def finish(title: str, rows: Sequence[Row], options: argparse.Namespace, plot: Callable[[Any], None] | None = None) -> int:
    """Print the rows and draw them, by `plot` onto its axes or as ratios. Returns 1 if a target is missed, else 0."""
    if options.json:
        print(json.dumps([{**asdict(row), "ratio": _known(row.ratio), "verdict": row.verdict} for row in rows], indent=2))
    else:
        _show(title, rows)
    if options.plot:
        height = max(PLOT_HEIGHT, 0.4 * len(rows)) if plot is None else PLOT_HEIGHT
        draw(plot or (lambda axes: _ratios(axes, rows)), title, options.plot, height)
    return int(any(row.verdict == "MISSED" for row in rows))


def apart(measure: Callable[[], T]) -> T:
    """Run `measure` in a forked process and return its pickled result: nothing open or warm stays for the next run."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(measure).result()


def _show(title: str, rows: Sequence[Row]) -> None:
    table = Table("", "", "ours", "reference", "", "unit", "ratio", "target", "", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        value = "not installed" if row.value is None else figure_of(row.value)
        ratio = "" if row.value is None else figure_of(row.ratio)
        target = "" if row.target is None else str(row.target)
        verdict = f"{row.verdict} {row.note}".strip()
        table.add_row(row.what, row.setting, figure_of(row.ours), value, row.reference, row.unit, ratio, target, verdict)
    Console(width=170).print(title, table)


def figure_of(value: float) -> str:
    """Format a number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _ratios(axes: Any, rows: Sequence[Row]) -> None:
    shown = [row for row in reversed(rows) if row.value]
    labels = [f"{row.what}, {row.setting} / {row.reference}" for row in shown]
    bars = axes.barh(labels, [row.ratio for row in shown], color=[COLORS[row.verdict] for row in shown])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    for place, row in enumerate(shown):
        if row.target is not None and not row.target.of_ours:
            axes.plot([row.target.bound] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set(xlabel="ours / reference; the line is the target")
    axes.margins(x=0.15)


def draw(plot: Callable[[Any], None], title: str, file: Path, height: float = PLOT_HEIGHT) -> None:
    """Save what `plot` draws onto its axes as a picture; `height` is in inches."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, height))
    plot(axes)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
