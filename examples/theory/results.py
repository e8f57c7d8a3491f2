"""What `rkdo verify-theory` shows: a table of the statements, a list of the findings, a figure and a JSON file."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from examples.theory import statements
from examples.theory.conditions import Finding
from examples.theory.statements import Tally
from rkdo_dist.files import write_atomic
from rkdo_dist.studies.palette import DARK, style
from rkdo_dist.studies.plots import panels, save
from rkdo_dist.studies.sheets import Sheet


def statement_table(tallies: list[Tally]) -> Sheet:
    """A row per statement: how many cases, whether all held, and how close the closest came."""
    table = Sheet(
        "statements",
        "Section 6.2 of the paper on explicit distributions,\nexact inner minimisation, float64",
        ("statement", "what is measured", "cases", "holds", "worst", "tightest", "empty"),
        "worst: the largest left - right (rounding, where positive); tightest: the\nlargest left / right; empty: the "
        "bound is infinite or undefined",
    )
    for tally in tallies:
        holds = "yes" if tally.holds else f"NO: {tally.cases - tally.held:,}"
        closest = (f"{tally.slack:.1e}", f"{tally.tightest:.4f}", f"{tally.empty:,}")
        table.rows.append([tally.statement, tally.bound, f"{tally.cases:,}", holds, *closest])
    return table


def finding_text(number: int, finding: Finding, width: int) -> str:
    """A finding with its counterexample and the numbers, in lines of at most `width` characters."""
    wrapped = textwrap.TextWrapper(width, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
    paragraphs = (f"{finding.statement}: {finding.kind}", finding.finding, f"The counterexample: {finding.example}")
    lines = [line for text in paragraphs for line in wrapped.wrap(f"   {text}")]
    lines[0] = f"{number:>2}{lines[0][2:]}"
    lines += [f"   {name}: {value:.4g}" for name, value in finding.numbers.items()]
    return "\n".join(lines)


def write_results(out: Path, tallies: list[Tally], findings: list[Finding]) -> list[Path]:
    """`theory.json`, `theory.png` and `theory.svg` in `out`, which is made if it is not there.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "statements": [_finite({**vars(tally), "holds": tally.holds}) for tally in tallies],
        "findings": [{**vars(finding), "numbers": _finite(finding.numbers)} for finding in findings],
    }
    write_atomic(out / "theory.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
    return [out / "theory.json", *save(figure(), out, "theory")]


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON does not have, as words."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }


def figure() -> Any:
    """Bound against measurement, four panels."""
    drawing, axes = panels(2, 2, (11.5, 9.4))
    for draw, panel in zip((_lemma_panel, _theorem_panel, _capacity_panel, _error_panel), axes, strict=True):
        draw(panel)
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.17), handlelength=3.2)  # hides nothing
    return drawing


def _bound(panel: Any, x: Any, y: Any, label: str, line: str = "--") -> None:
    panel.plot(x, y, color=DARK, linestyle=line, linewidth=1.2, label=label)


def _lemma_panel(panel: Any) -> None:
    draw = np.random.default_rng(2)
    alphas = np.linspace(0, 1, 41)
    for number, (a, b) in enumerate(((0.03, 1.0), (0.3, 1.0), (1.0, 1.0), (10.0, 10.0))):
        p, q = draw.dirichlet(np.full(16, a), 32), draw.dirichlet(np.full(16, b), 32)
        first = statements.loss(p, q)
        shares = [statements.loss(statements.supervisor(p, q, alpha), q) / first for alpha in alphas]
        label = f"p from Dirichlet({a:g}), q from Dirichlet({b:g})"
        panel.plot(alphas, shares, **style(number).curve, markevery=(2 * number, 8), label=label)
    _bound(panel, alphas, 1 - alphas, "bound: 1 - alpha")
    _bound(panel, alphas, (1 - alphas) ** 2, "(1 - alpha)$^2$: p close to q", ":")
    panel.set(xlabel="alpha", ylabel="loss after the supervisor's step / before", title="Lemma 1")


def _theorem_panel(panel: Any) -> None:
    draw, alpha = np.random.default_rng(3), 0.5
    p = np.eye(16)[np.arange(16)]
    steps = np.arange(13)
    for number, family in enumerate(statements.families(draw, p.shape)):
        trace = statements.recurse(p, family.member(draw, p.shape), family.fit, alpha, steps[-1])
        losses = np.array(trace.losses) / trace.losses[0]
        shown = losses[losses >= 1e-16]  # 0 has no place on this axis
        ended = ": 0 from t = 1, not drawn" if len(shown) == 1 else ""
        size = {"markersize": 11.0 - 2 * number, "fillstyle": "none"}  # lines that coincide are all seen
        panel.plot(steps[: len(shown)], shown, **{**style(number).curve, **size}, label=family.name + ended)
    frozen = statements.recurse(p, draw.dirichlet(np.ones(16), 16), None, alpha, steps[-1])
    panel.plot(steps, np.array(frozen.losses) / frozen.losses[0], **style(4).curve, label="q never fitted")
    _bound(panel, steps, (1 - alpha) ** steps, "bound: (1 - alpha)$^t$")
    panel.set(yscale="log", xlabel="t", ylabel="L(t) / L(0)", title="Theorem 3, one-hot p(0), alpha = 1/2")


def _capacity_panel(panel: Any) -> None:
    draw = np.random.default_rng(4)
    p = draw.dirichlet(np.full(16, 0.1), 16)
    family = statements.blocks(4)
    trace = statements.recurse(p, family.member(draw, p.shape), family.fit, 0.3, 15)
    steps = range(len(trace.losses))
    panel.plot(steps, trace.losses, **style(0).curve, label="L(t)")
    panel.plot(steps, trace.static, **style(1).curve, label="loss against p(0)")
    _bound(panel, steps, [0.7**t * trace.losses[0] for t in steps], "(1 - alpha)$^t$ L(0)")
    _bound(panel, (0, steps[-1]), [statements.loss(p, family.fit(p))] * 2, "L* of p(0): L(t) goes through it", ":")
    top = panel.get_ylim()[1]
    panel.set(xlabel="t", ylabel="loss (nats)", title="Eq. 14: rows constant on blocks of 4, alpha = 0.3")
    panel.set_ylim(-0.03 * top, top)  # a marker at 0 is whole


def _error_panel(panel: Any) -> None:
    schedules = (
        ("eps = 0.1 / t$^2$", lambda t: 0.1 / t**2),
        ("eps = 0.1 / t (not summable)", lambda t: 0.1 / t),
        ("eps = 0.05", lambda t: 0.05),
    )
    for number, (name, error) in enumerate(schedules):
        losses = statements.with_errors(error, 0.5, 150)
        bounds = [losses[0]]
        for t, before in enumerate(losses[:-1], start=1):
            bounds.append(0.5 * before + error(t))
        look = {**style(number).curve, "linestyle": "-", "markevery": 0.08}
        panel.plot(range(1, len(losses)), losses[1:], **look, label=name)
        panel.plot(range(1, len(losses)), bounds[1:], color=style(number).colour, linestyle="--", linewidth=1)
    panel.plot([], [], color=DARK, linestyle="--", linewidth=1, label="bound of the step (eq. 15)")
    panel.set(
        xscale="log", yscale="log", xlabel="t", ylabel="L(t) (nats)", title="Eq. 15: errors met exactly, alpha = 1/2"
    )
