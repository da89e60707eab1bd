"""What every benchmark does with its figures: say where they were taken, judge them, write JSON, draw a plot.

Law: it computes nothing but PASS and MISSED; a figure that misses its target is shown like any other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Collects the rows of one benchmark; `save` writes them to `out`."""

    name: str
    packages: Sequence[str] = ("numpy", "torch", "numba")
    facts: dict[str, Any] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, what: str, measured: float, target: float, *, at_least: bool) -> bool:
        """Record and print one target; returns whether it is met."""
        met = measured >= target if at_least else measured <= target
        relation = ">=" if at_least else "<="
        self.targets.append({"what": what, "measured": measured, "relation": relation, "target": target, "met": met})
        print(f"{'PASS  ' if met else 'MISSED'} {what}: {measured:.4g} (target {relation} {target:g})", flush=True)
        return met

    def save(self, out: str | Path | None) -> None:
        if out is None:
            return
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"benchmark": self.name, "machine": describe_machine(self.packages), **self.facts, "targets": self.targets}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest of some seeds' results."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `low` and `high` shade its spread over seeds."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def plot(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: str = "",
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw curves into an SVG file.

    Args:
        log: axes that are logarithmic, some of "xy".
        lines: label -> height of a dashed horizontal line, say a target.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "p2pflock"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for curve in curves:
        (line,) = axes.plot(curve.x, curve.y, marker="o" if len(curve.x) < 15 else "", label=curve.label, linewidth=1.6)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
    for label, height in (lines or {}).items():
        axes.axhline(height, color="grey", linestyle="--", linewidth=1, label=label)
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
