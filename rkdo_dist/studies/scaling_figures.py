"""Figures of a scaling study (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rkdo_dist.studies.cost import PHASES
from rkdo_dist.studies.scaling import Row, Study

_COLOURS = {"exact": "#1b5e8c", "fast": "#d9822b", "ring": "#4b9a52"}
_PHASE_COLOURS = ("#9aa5b1", "#1b5e8c", "#d9822b", "#b5473c", "#4b9a52", "#d5dae0")


def draw(study: Study, folder: Path) -> dict[str, Path]:
    """Write the figures as PNG files; by title, in the order in which they are read."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "Throughput, efficiency and memory": (_throughput, "throughput.png"),
        "Where the time of a step goes": (_phases, "phases.png"),
        "Bytes that a process sends in a step": (_bytes, "bytes.png"),
        "The cost model against measured steps": (_model, "model.png"),
    }
    if study.projections:
        drawn["Projection (not measured)"] = (_projection, "projection.png")
    found = {}
    for title, (function, name) in drawn.items():
        found[title] = folder / name
        _save(function(study), found[title])
    return found


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def _axes(columns: int, width: float = 4.6) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, 3.7), constrained_layout=True, squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes[0]


def _ways(study: Study) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in study.rows:
        found.setdefault(row.way, []).append(row)
    return found


def _worlds(axis: Any, worlds: list[int], what: str = "processes") -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(worlds, [str(w) for w in worlds])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(what)


def _throughput(study: Study) -> Any:
    figure, (speed, efficiency, memory) = _axes(3)
    worlds = sorted({row.world for row in study.rows})
    for way, rows in _ways(study).items():
        x, colour = [r.world for r in rows], _COLOURS[way]
        speed.plot(x, [r.speed for r in rows], marker="o", color=colour, label=way)
        efficiency.plot(x, [100 * r.efficiency for r in rows], marker="o", color=colour, label=way)
        memory.plot(x, [r.peak / 1e6 for r in rows], marker="o", color=colour, label=way)
    first = study.rows[0]
    ideal = [first.speed / first.world * w for w in worlds]
    speed.plot(worlds, ideal, color="black", linestyle=":", linewidth=1, label="ideal")
    efficiency.axhline(100, color="black", linestyle=":", linewidth=1)
    speed.set(ylabel="pairs per second", title=f"Throughput ({study.mode} scaling)", ylim=(0, None))
    efficiency.set(ylabel="% of the smallest size", title="Efficiency", ylim=(0, None))
    memory.set(ylabel="MB", title="Peak memory of a process", ylim=(0, 1.2e-6 * max(r.peak for r in study.rows)))
    shared = [r.world for r in study.rows if r.oversubscribed]
    for axis in (speed, efficiency, memory):
        _worlds(axis, worlds)
        if shared:
            axis.axvspan(min(shared) / 2**0.5, max(shared) * 2**0.5, color="#b5473c", alpha=0.1, linewidth=0)
    if shared:
        speed.text(
            max(shared) * 1.35, 0.02, f"more processes than\n{study.cores} cores: no scaling", ha="right", va="bottom",
            fontsize=8, color="#b5473c", transform=speed.get_xaxis_transform(),
        )  # fmt: skip
    speed.legend(frameon=False, loc="upper left")
    return figure


def _phases(study: Study) -> Any:
    ways = _ways(study)
    figure, axes = _axes(len(ways))
    top = max(sum(row.phases.values()) for row in study.rows)
    for axis, (way, rows) in zip(axes, ways.items(), strict=True):
        bottom = [0.0] * len(rows)
        for name, colour in zip(PHASES, _PHASE_COLOURS, strict=True):
            heights = [1e3 * row.phases.get(name, 0.0) for row in rows]
            axis.bar([str(r.world) for r in rows], heights, bottom=bottom, color=colour, label=name, width=0.6)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axis.set(title=way, xlabel="processes", ylabel="ms per step", ylim=(0, 1.08e3 * top))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=len(PHASES))
    return figure


def _bytes(study: Study) -> Any:
    figure, (everything, columns) = _axes(2, 5.6)
    worlds = [w for w in sorted({row.world for row in study.rows}) if w > 1]
    ways = _ways(study)
    for number, (way, rows) in enumerate(ways.items()):
        place = [n + (number - (len(ways) - 1) / 2) * 0.26 for n in range(len(worlds))]
        by_world = {row.world: row for row in rows}
        for axis, wanted in ((everything, ""), (columns, "column")):
            sizes = [sum(s for p, s in by_world[w].sent.items() if p.startswith(wanted)) / 1e6 for w in worlds]
            axis.bar(place, sizes, width=0.24, color=_COLOURS[way], label=way)
    everything.set(title="All purposes", ylabel="MB per process and step")
    columns.set(title="Columns and their gradients: gathered against ring", ylabel="MB per process and step")
    for axis in (everything, columns):
        axis.set_xticks(range(len(worlds)), [str(w) for w in worlds])
        axis.set_xlabel("processes")
        if worlds:
            axis.legend(frameon=False)
    return figure


def _model(study: Study) -> Any:
    figure, (fit, error) = _axes(2, 5.6)
    largest = max(row.seconds for row in study.rows) * 1.1e3
    fit.plot([0, largest], [0, largest], color="black", linestyle=":", linewidth=1)
    for way, rows in _ways(study).items():
        measured, colour = [1e3 * r.seconds for r in rows], _COLOURS[way]
        fit.scatter(measured, [1e3 * r.predicted for r in rows], color=colour, label=f"{way}, fitted")
        held = [r for r in rows if r.left_out is not None]
        if held:
            x, y = [1e3 * r.seconds for r in held], [1e3 * r.seconds * (1 + (r.left_out or 0)) for r in held]
            fit.scatter(x, y, facecolors="none", edgecolors=colour, label=f"{way}, left out")
    fit.set(xlabel="measured, ms per step", ylabel="model, ms per step", title="Model against measurement")
    fit.legend(frameon=False, fontsize=8)
    known = [(f"{r.way} {r.world}", 100 * (r.left_out or 0), r.way) for r in study.rows if r.left_out is not None]
    error.barh([k[0] for k in known], [k[1] for k in known], color=[_COLOURS[k[2]] for k in known])
    error.axvline(0, color="black", linewidth=0.8)
    error.invert_yaxis()
    error.set(xlabel="% (predicted / measured - 1)", title="Error on each point when it was left out")
    return figure


def _projection(study: Study) -> Any:
    figure, (speed, efficiency) = _axes(2, 5.6)
    worlds = sorted({p.world for p in study.projections})
    for mode, way in dict.fromkeys((p.mode, p.way) for p in study.projections):
        done = [p for p in study.projections if (p.mode, p.way) == (mode, way)]
        style = {"marker": "s" if mode == "weak" else "o", "linestyle": "--" if mode == "weak" else ":"}
        x, colour = [p.world for p in done], _COLOURS[way]
        speed.plot(x, [p.batch / p.seconds for p in done], color=colour, label=f"{mode}, {way}", **style)
        efficiency.plot(x, [100 * p.efficiency for p in done], color=colour, **style)
    speed.set_yscale("log")
    speed.set(ylabel="pairs per second", title=f"PROJECTION, {study.links}")
    efficiency.set(ylabel="% of one device", title="PROJECTED efficiency", ylim=(0, 105))
    for axis in (speed, efficiency):
        _worlds(axis, worlds, "devices")
    speed.legend(frameon=False, fontsize=8)
    return figure
