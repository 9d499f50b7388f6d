"""Fig. 5 of the paper from benchmarks/quality.json: mIoU a class, name against token, a panel a method and set.

python -m benchmarks.classes        # writes docs/classes.png; needs matplotlib
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("DAAM", "OVAM", "OVAM, own tau")
SETS = {"voc-sim": "one object", "captions": "several objects"}
KINDS = {"name": "#8a94a6", "token": "#4f46e5"}  # and their colours


def panels(figures: Mapping[str, Any]) -> list[tuple[str, list[str], dict[str, np.ndarray]]]:
    """(title, classes sorted by the token's mIoU, mIoU in percent by kind) of each method on each set."""
    found = []
    for key, about in SETS.items():
        table = [row for row in figures["sets"][key]["rows"] if row["table"] == "Methods"]
        rows = {(row["name"], row["asked"]): row["by_class"] for row in table}
        for method in METHODS:
            own = {kind: rows[method, kind] for kind in KINDS}
            classes = sorted(own["token"], key=own["token"].get)
            values = {kind: np.array([own[kind][name] for name in classes]) for kind in KINDS}
            found.append((f"{method}, {about}", classes, values))
    return found


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Two dots a class, joined by a line: the way from the name to the token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(len(SETS), len(METHODS), sharex=True).ravel()
    for axis, (title, classes, values) in zip(axes, panels(figures), strict=True):
        places = range(len(classes))
        axis.hlines(places, values["name"], values["token"], color="#d5d9e2", zorder=1)
        for kind, color in KINDS.items():
            axis.scatter(values[kind], places, s=22, color=color, label=kind, zorder=2)
        axis.set_yticks(places, classes, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 100)
        axis.grid(axis="x", color="#eef0f4")
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].legend(loc="lower right", fontsize=8, frameon=False)
    figure.supxlabel("mIoU, %", fontsize=9)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes", description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/quality.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/classes.png"))
    options = parser.parse_args(arguments)
    draw(json.loads(options.figures.read_text()), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
