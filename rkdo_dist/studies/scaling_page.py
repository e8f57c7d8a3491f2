"""What people read of a scaling study: tables for the terminal, and one HTML page with its figures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from rkdo_dist.files import write_atomic
from rkdo_dist.studies import cost
from rkdo_dist.studies.links import BASE, BETWEEN, INSIDE, interconnect
from rkdo_dist.studies.scaling import Row, Study, median_error

Cells = tuple[list[str], list[list[str]]]  # headings, rows


def measured_cells(study: Study) -> Cells:
    """The measured points."""
    heads = ["way", "procs", "batch", "step ms", "pairs/s", "efficiency", "peak MB", "same losses"]
    rows = []
    for row in study.rows:
        efficiency = "shares cores" if row.oversubscribed else f"{100 * row.efficiency:.0f} %"
        rows.append([
            row.way, str(row.world), str(row.batch), _ms(row.seconds), f"{row.speed:.0f}", efficiency,
            f"{row.peak / 1e6:.0f}", row.same,
        ])  # fmt: skip
    return heads, rows


def phase_cells(study: Study) -> Cells:
    """Where the time of the measured points went, and what they sent."""
    rows = []
    for row in study.rows:
        phases = [_ms(row.phases.get(name, 0.0)) for name in cost.PHASES]
        columns = sum(size for purpose, size in row.sent.items() if purpose.startswith("column"))
        sizes = [f"{columns / 1e6:.3f}", f"{sum(row.sent.values()) / 1e6:.3f}"]
        rows.append([row.way, str(row.world), *phases, *sizes])
    heads = {"forward/backward": "fwd/bwd"}
    return ["way", "procs", *(heads.get(name, name) for name in cost.PHASES), "columns", "all sent"], rows


MEASURED_NOTE = (
    "medians of steps; phases in ms (data includes drawing the views); what a process sends in a step in MB, for "
    "columns with their gradients and for everything. Every collective counts as exchange, and so does waiting in it "
    "for a slower process; under fast sums DDP's all-reduce runs inside forward/backward"
)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def notes(study: Study) -> list[str]:
    """What must be known to read the numbers."""
    found = [f"{study.machine}; {study.cores} CPU cores; {study.mode} scaling"]
    shared = sorted({row.world for row in study.rows if row.oversubscribed})
    if shared:
        listed = ", ".join(map(str, shared))
        found.append(
            f"{listed} processes share {study.cores} cores: their times say what such a run costs here, "
            "not how it scales"
        )
    compared = [row.exact_bytes for row in study.rows if row.exact_bytes is not None]
    if not compared:
        found.append("bytes: as far as the ledger sees them; not all of them have a formula or can be counted here")
    elif all(compared):
        found.append(f"bytes: formula and ledger agree exactly in all {len(compared)} measurements (DDP's by its hook)")
    else:
        found.append("bytes: FORMULA AND LEDGER DIFFER in " + ", ".join(
            f"{row.way} on {row.world}" for row in study.rows if row.exact_bytes is False
        ))  # fmt: skip
    error = median_error(study.rows)
    known = [abs(row.left_out) for row in study.rows if row.left_out is not None]
    if error is None:
        found.append("cost model: too few measurements to leave one out (two sizes above 1 are needed)")
    else:
        found.append(
            f"cost model: a measurement that was left out is predicted to {100 * error:.0f} % (median; worst "
            f"{100 * max(known):.0f} %, {len(known)} of {len(study.rows)} could be left out)"
        )
    return found


def model_cells(study: Study) -> Cells:
    """The constants of the cost model."""
    rows = [[name, f"{study.model.constants[name]:.3g}", unit] for name, unit in cost.CONSTANTS.items()]
    beta = study.model.constants["beta"]
    rows.append(["bandwidth = 1 / beta", f"{1e-6 / beta:.0f}" if beta > 0 else "not seen", "MB/s per process"])
    return ["constant", "fitted", "unit"], rows


def error_cells(rows: Sequence[Row]) -> Cells:
    """Model against measurement."""
    found = []
    for row in rows:
        left = "-" if row.left_out is None else f"{100 * row.left_out:+.1f} %"
        fitted = f"{100 * (row.predicted / row.seconds - 1):+.1f} %"
        found.append([row.way, str(row.world), _ms(row.seconds), _ms(row.predicted), fitted, left])
    return ["way", "procs", "measured ms", "model ms", "error, fitted", "error, left out"], found


def projection_cells(study: Study) -> Cells:
    """The projections."""
    rows = []
    for p in study.projections:
        share = p.phases["exchange"] / p.seconds
        rows.append([
            f"{p.mode}, {p.way}", str(p.world), f"{p.batch:,}", _ms(p.seconds), f"{p.batch / p.seconds:,.0f}",
            f"{100 * p.efficiency:.1f} %", f"{100 * share:.1f} %", f"{p.sent / 1e6:.1f}",
        ])  # fmt: skip
    return ["scaling, way", "devices", "batch", "step ms", "pairs/s", "efficiency", "exchange", "MB sent"], rows


def projection_note(study: Study) -> str:
    """What a projection is, and is not."""
    net = interconnect(study.links)
    faster = "as fast as the one measured" if study.speed == 1 else f"{study.speed:g} times as fast as the one measured"
    return (
        f"A PROJECTION, not a measurement: the fitted model on devices each {faster}, a core of its own for every "
        f"process, {net.per_node} devices a node, {net.inside.name} inside ({net.inside.bandwidth / 1e9:g} GB/s) and "
        f"{net.between.name} between nodes ({net.between.bandwidth / 1e9:g} GB/s per device), published peaks and "
        "NCCL's latencies. Nothing overlaps, nobody waits for a slow device, and networks carry nothing else. Strong "
        "scaling ends where a step has no more lanes; in weak scaling every device keeps the lanes of the smallest "
        "size measured, and its part of the field grows with the global batch, which no network can change"
    )


def terminal_tables(study: Study) -> list[Table | str]:
    """What `rkdo scale` prints."""
    shown: list[Table | str] = [_rich("Measured", measured_cells(study))]
    shown += [_rich("Where the time of a step goes, and what is sent", phase_cells(study)), MEASURED_NOTE]
    shown += [f"- {note}" for note in notes(study)]
    shown.append(_rich("Cost model", error_cells(study.rows)))
    if study.projections:
        shown += [_rich("PROJECTION (nothing here was run)", projection_cells(study)), projection_note(study)]
    return shown


def _rich(title: str, cells: Cells) -> Table:
    heads, rows = cells
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for number, head in enumerate(heads):
        text = number == 0 or head == "same losses"
        table.add_column(head, justify="left" if text else "right", overflow="fold")
    previous = None
    for row in rows:
        if previous not in (None, row[0]):
            table.add_section()
        table.add_row(*row)
        previous = row[0]
    return table


def write_page(study: Study, figures: dict[str, Path], path: Path) -> None:
    """Write the page; it needs no other file."""
    parts = [f"<h1>Scaling study, {study.mode}</h1>", _list(notes(study)), "<h2>Measured</h2>"]
    parts += [_table(measured_cells(study)), _table(phase_cells(study)), f"<p>{html.escape(MEASURED_NOTE)}.</p>"]
    for title, file in figures.items():
        if "Projection" not in title and "model" not in title:
            parts.append(_figure(title, file))
    parts += ["<h2>Cost model</h2>", f"<pre>{html.escape(cost.__doc__ or '')}</pre>", _table(model_cells(study))]
    parts += [_table(error_cells(study.rows))]
    parts += [_figure(title, file) for title, file in figures.items() if "model" in title]
    if study.projections:
        parts += ["<h2>Projection</h2>", f"<p class=warn>{html.escape(projection_note(study))}.</p>"]
        parts += [_table(projection_cells(study))]
        parts += [_figure(title, file) for title, file in figures.items() if "Projection" in title]
        parts += [
            "<h3>Links</h3>",
            _links(),
            f"<pre>{html.escape(interconnect(study.links).seconds.__doc__ or '')}</pre>",
        ]
    write_atomic(path, _HEAD + "\n".join(parts) + "</main></body></html>\n")


def _links() -> str:
    rows = [
        [
            key,
            link.name,
            f"{link.bandwidth / 1e9:g}",
            f"{1e6 * link.latency['LL']:g} / {1e6 * link.latency['Simple']:g}",
            link.source,
        ]
        for key, link in {**INSIDE, **BETWEEN}.items()
    ]
    base = " / ".join(f"{1e6 * value:g}" for value in BASE.values())
    heads = ["name", "link", "GB/s each way", f"us per step, LL / Simple (base {base})", "source of the bandwidth"]
    return _table((heads, rows)) + "<p>Latencies: NVIDIA/nccl, src/graph/tuning.cc.</p>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _table(cells: Cells) -> str:
    heads, rows = cells
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(title: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    text = html.escape(title)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scaling study</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0; }
main { max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .5rem 0 1rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e1e5ea; white-space: nowrap; }
th { background: #f4f6f8; } th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #616e7c; font-size: 13px; } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; }
.warn { border-left: 4px solid #b5473c; background: #fbf0ee; padding: .6rem .9rem; }
</style></head><body><main>
"""
