"""What people read of a scaling study: two tables, one figure, and a page that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rkdo_dist.measure.scaling import Row, Study
from rkdo_dist.studies import html
from rkdo_dist.studies.palette import DARK, GREY, style
from rkdo_dist.studies.plots import encoded, pieces, pyplot
from rkdo_dist.studies.sheets import Sheet

_SHORT = {"forward/backward": "fwd/bwd", "optimizer": "optim."}
_PHASES = (
    "Medians of steps; phases in ms (data includes drawing the views); what a process sends in a step in MB, for "
    "columns with their gradients and for everything. Every collective counts as exchange, and so does waiting in it "
    "for a slower process; under fast sums DDP's all-reduce runs inside forward/backward."
)


def tables(study: Study) -> list[Sheet]:
    """What was measured; where the time of a step goes and what is sent."""
    heads = ["way", "procs", "batch", "step ms", "pairs/s", "efficiency", "peak MB", "same losses"]
    measured = Sheet("measured", f"Measured ({study.mode} scaling)", heads, names=2)
    names = list(dict.fromkeys(name for row in study.rows for name in row.phases))
    heads = ["way", "procs", *(_SHORT.get(name, name) for name in names), "columns", "all sent"]
    phases = Sheet("phases", "Where the time of a step goes, and what is sent", heads, _PHASES, names=2)
    for row in study.rows:
        efficiency = "shares cores" if row.oversubscribed else f"{100 * row.efficiency:.0f} %"
        peak = f"{row.peak / 1e6:.0f}"
        cells = [str(row.batch), _ms(row.seconds), f"{row.speed:.0f}", efficiency, peak, row.same]
        measured.rows.append([row.way, str(row.world), *cells])
        spent = [_ms(row.phases.get(name, 0.0)) for name in names]
        sizes = [f"{_columns(row) / 1e6:.3f}", f"{sum(row.sent.values()) / 1e6:.3f}"]
        phases.rows.append([row.way, str(row.world), *spent, *sizes])
    return [measured, phases]


def _columns(row: Row) -> float:
    """Bytes sent for columns and their gradients."""
    return sum(size for purpose, size in row.sent.items() if purpose.startswith("column"))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def notes(study: Study) -> list[str]:
    """What must be known to read the numbers."""
    found = [f"{study.machine}; {study.cores} CPU cores; {study.mode} scaling"]
    shared = sorted({row.world for row in study.rows if row.oversubscribed})
    if shared:
        listed = ", ".join(map(str, shared))
        found.append(f"{listed} processes share {study.cores} cores: the timings do not measure scaling")
    compared = [row for row in study.rows if row.exact_bytes is not None]
    differ = [f"{row.way} on {row.world}" for row in compared if not row.exact_bytes]
    if not compared:
        found.append("bytes: as far as the ledger sees them; not all of them have a formula or can be counted here")
    elif differ:
        found.append("bytes: FORMULA AND LEDGER DIFFER in " + ", ".join(differ))
    else:
        found.append(f"bytes: formula and ledger agree exactly in all {len(compared)} measurements (DDP's by its hook)")
    return found


def figure(study: Study) -> Any:
    """Throughput, efficiency and memory by size; phases and bytes of every measured point."""
    layout = [["speed", "efficiency", "memory"], ["phases", "bytes", "."]]
    drawn, axes = pyplot().subplot_mosaic(layout, figsize=(12.5, 8.4), layout="constrained")
    ways = {way: [row for row in study.rows if row.way == way] for way in dict.fromkeys(r.way for r in study.rows)}
    for number, (way, rows) in enumerate(ways.items()):
        size = {"markersize": 9 - 2 * min(number, 2), "fillstyle": "none"}  # lines that coincide are all seen
        look: dict[str, Any] = {**style(number).curve, **size, "label": way}
        x = [row.world for row in rows]
        axes["speed"].plot(x, [row.speed for row in rows], **look)
        axes["efficiency"].plot(x, [100 * row.efficiency for row in rows], **look)
        axes["memory"].plot(x, [row.peak / 1e6 for row in rows], **look)
    _by_size(study, axes)
    _by_point(study, axes)
    return drawn


def _below(panel: Any, columns: int) -> None:
    """A legend that hides nothing."""
    panel.legend(frameon=False, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.17), handlelength=3)


def _by_size(study: Study, axes: dict[str, Any]) -> None:
    worlds, first = sorted({row.world for row in study.rows}), study.rows[0]
    ideal = [first.speed / first.world * world for world in worlds]
    axes["speed"].plot(worlds, ideal, color=DARK, linestyle=":", linewidth=1.2, label="ideal")
    axes["efficiency"].axhline(100, color=DARK, linestyle=":", linewidth=1.2, label="ideal")
    axes["speed"].set(ylabel="pairs per second", title=f"Throughput ({study.mode} scaling)")
    axes["efficiency"].set(ylabel="% of the smallest size", title="Efficiency")
    axes["memory"].set(ylabel="MB", title="Peak memory of a process")
    shared = [row.world for row in study.rows if row.oversubscribed]
    for name in ("speed", "efficiency", "memory"):
        panel = axes[name]
        panel.set_xscale("log", base=2)
        panel.set_xticks(worlds, [str(world) for world in worlds])
        panel.minorticks_off()
        panel.set(xlabel="processes", ylim=(0, 1.15 * panel.get_ylim()[1]))
        if shared:
            said = f"more processes than {study.cores} cores"
            panel.axvspan(min(shared) / 2**0.5, max(shared) * 2**0.5, color=GREY, alpha=0.2, linewidth=0, label=said)
        _below(panel, 2)


def _by_point(study: Study, axes: dict[str, Any]) -> None:
    places = range(len(study.rows))
    left = [0.0] * len(study.rows)
    for number, name in enumerate(dict.fromkeys(name for row in study.rows for name in row.phases)):
        widths = [1e3 * row.phases.get(name, 0.0) for row in study.rows]
        axes["phases"].barh(places, widths, left=left, label=name, height=0.6, **style(number).bar)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _points(axes["phases"], study.rows, "Where the time of a step goes", "ms per step")
    sending = [row for row in study.rows if row.world > 1]
    places = range(len(sending))
    columns = [_columns(row) / 1e6 for row in sending]
    rest = [sum(row.sent.values()) / 1e6 - some for row, some in zip(sending, columns, strict=True)]
    axes["bytes"].barh(places, columns, label="columns and their gradients", height=0.6, **style(0).bar)
    axes["bytes"].barh(places, rest, left=columns, label="everything else", height=0.6, **style(1).bar)
    _points(axes["bytes"], sending, "Sent by a process in a step", "MB")


def _points(panel: Any, rows: list[Row], title: str, unit: str) -> None:
    """Names of bars, the first one on top."""
    panel.set_yticks(range(len(rows)), [f"{row.way}, {row.world}" for row in rows])
    panel.invert_yaxis()
    panel.set(title=title, xlabel=unit)
    _below(panel, 2)


def write(study: Study, folder: Path) -> Path:
    """Write `scaling.html`, which needs no other file, and `scaling.png` into a folder; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = encoded(figure(study), "png")
    (folder / "scaling.png").write_bytes(picture)
    said = html.tag("ul", *(html.tag("li", note) for note in notes(study)))
    shown = html.figure(pieces(figure(study), "svg"), "svg", "Scaling figure", "Medians of the measured steps.")
    body = [html.tag("h1", f"Scaling study, {study.mode}"), said]
    body += [html.section(sheet.title, sheet.name, html.sheet(sheet)) for sheet in tables(study)]
    return html.write(folder / "scaling.html", "Scaling study", *body, html.section("Figure", "figure", shown))
