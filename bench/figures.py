"""Absolute figures, each with its upper bound: verdict, table, JSON and plot."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison import COLORS, draw, figure_of

__all__ = ["Figure", "finish"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement in `unit`, the median of several runs; `at_most` is None without a target."""

    what: str
    value: float
    unit: str
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty without one."""
        return "" if self.at_most is None else "ok" if self.value <= self.at_most else "MISSED"


def finish(title: str, figures: Sequence[Figure], options: argparse.Namespace) -> int:
    """Print the figures and draw them as shares of their targets. Returns 1 if a target is missed, else 0."""
    if options.json:
        print(json.dumps([{**asdict(one), "verdict": one.verdict} for one in figures], indent=2))
    else:
        table = Table("", "", "target", "", box=None, padding=(0, 2, 0, 0))
        for one in figures:
            target = "" if one.at_most is None else f"<= {figure_of(one.at_most)} {one.unit}"
            table.add_row(one.what, f"{figure_of(one.value)} {one.unit}", target, one.verdict)
        Console(width=140).print(title, table)
    if options.plot:
        draw(lambda axes: _shares(axes, figures), title, options.plot)
    return int(any(one.verdict == "MISSED" for one in figures))


def _shares(axes: Any, figures: Sequence[Figure]) -> None:
    shown = [(one, one.value / one.at_most) for one in reversed(figures) if one.at_most]
    labels = [f"{one.what}\n<= {one.at_most:g} {one.unit}" for one, _ in shown]
    bars = axes.barh(labels, [share for _, share in shown], color=[COLORS[one.verdict] for one, _ in shown])
    axes.bar_label(bars, [f"{figure_of(one.value)} {one.unit}" for one, _ in shown], padding=3)
    axes.axvline(1, color="black")
    axes.set(xlabel="measured / target; the line is the target")
    axes.margins(x=0.25)
