"""What every figure of this folder shares: matplotlib without a display, one style, PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"rkdo": "#1f5fa8", "icon": "#c8541e", "infonce": "#4a8c3f"}
DATASET_COLOURS = {"cifar10": "#1f5fa8", "cifar100": "#c8541e", "stl10": "#4a8c3f"}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files only."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "rkdo", "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True})
    from matplotlib import pyplot as plt

    return plt


def seeds(count: int) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Save as PNG and SVG (the same bytes for the same figure) and close."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot().close(figure)
    return paths
