"""The report's page: the findings first, then the tables, curves and pictures they rest on; all in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkdo_dist import config as configuration
from rkdo_dist.measure.flops import step_flops
from rkdo_dist.rundir import SCORE_TITLES
from rkdo_dist.studies import audit, datasets, html
from rkdo_dist.studies.html import Element, figure, section, tag
from rkdo_dist.studies.plots import over, pieces, sentence
from rkdo_dist.studies.report import charts, pictures, words
from rkdo_dist.studies.report.groups import Group, last_common_epoch, overview, read_groups
from rkdo_dist.studies.sheets import Sheet, mean_sd, number, spread

_VERSIONS = ("torch", "torchvision", "numpy")
_TARGET = "linear_accuracy"  # of the resource curves

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Report:
    groups: list[Group]
    remarks: list[str]
    found: list[words.Comparison]


def write_report(directories: Sequence[Path], out: Path, progress: Progress = lambda what: None) -> Sheet:
    """Write the page of some runs.

    Args:
        directories: run directories; runs of one configuration under different seeds form a group.
        out: the file; its directory is made if it is not there.
        progress: told what is being done.

    Returns:
        The page's first table.

    Raises:
        RunError: for a directory that is not a run directory.
    """
    progress("reading the runs")
    groups, remarks = read_groups(directories)
    table = overview(groups)
    report = _Report(groups, remarks, words.comparisons(groups))
    progress("drawing curves")
    sections = [
        _summary(report),
        section(table.title, table.name, html.sheet(table)),
        _apart(report),
        _tests(report),
        _curves(report),
        _resources(report),
        *pictures.sections(report.groups, progress),
        _audits(report),
        _settings(report),
        _environment(report),
    ]
    labels = [group.label for group in groups]
    title = " against ".join(labels) if len(labels) < 3 else f"{', '.join(labels[:-1])} and {labels[-1]}"
    count = sum(len(group.runs) for group in groups)
    top = tag("header", tag("h1", title), tag("p", _scope(report, count), class_="scope"))
    html.write(out, f"{title} - rkdo report", top, *sections)
    return table


def _scope(report: _Report, count: int) -> str:
    first = report.groups[0].config
    seeds = sorted({run.seed for group in report.groups for run in group.runs})
    runs = "1 run" if count == 1 else f"{count} runs"
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    index = datasets.index_of(first)
    known = "" if index is None else datasets.name_of(index)
    data = known or Path(first.data.source or first.data.shards).name or "unnamed data"
    return f"{runs} on {data}, {first.encoder.backbone}, {named}."


def _paragraphs(sentences: Sequence[str], class_: str | None = None) -> Element:
    return tag("p", " ".join(sentences), class_=class_)


def _summary(report: _Report) -> Element:
    said: list[Element] = []
    pairs = words.pairs_of(report.groups)
    for first, second in pairs:
        if len(pairs) > 1:
            said.append(tag("h3", f"{first.label} and {second.label}"))
        said.append(_paragraphs(words.loss_gap(first, second)))
        said.append(_paragraphs(words.evidence(first, second, report.found), "verdict"))
    if not pairs:
        said.append(_paragraphs(["A single configuration: there is no loss gap to explain.", *_alone(report)]))
    unfinished = [r for g in report.groups for r in g.runs if not r.evaluations or not r.epochs]
    remarks = [*report.remarks, *(line for group in report.groups for line in words.supervisors(group))]
    for run in (run for group in report.groups for run in group.runs):
        if (step := run.collapsed) is not None:
            remarks.append(f"{run.path} collapsed: at step {step} its loss had long been that of an untrained encoder.")
    if unfinished:
        listed = ", ".join(str(run.path) for run in unfinished)
        remarks.append(f"Without a step or an evaluation so far: {listed}.")
    return section("What the loss gap consists of", "summary", *said, *(tag("p", r, class_="remark") for r in remarks))


def _alone(report: _Report) -> list[str]:
    group = report.groups[0]
    number = last_common_epoch([group])
    if number is None:
        return []
    epoch = group.mean_epoch(number)
    if epoch.at_ideal is None:
        values = f"its mean loss is {epoch.loss:.4f}, and {epoch.at_uniform:.4f} for an untrained encoder"
        return [f"In epoch {number + 1} {values}. {words.NO_IDEAL}"]
    share = "" if epoch.attained is None else f": an attained share of {epoch.attained:z.1%}"
    return [
        f"In epoch {number + 1} its mean loss is {epoch.loss:.4f}, between {epoch.at_uniform:.4f} for an untrained "
        f"encoder and {epoch.at_ideal:.4f} for ideal embeddings{share}."
    ]


def _apart(report: _Report) -> Element | None:
    """The parts of each loss in its last epoch."""
    numbers = [(group, last_common_epoch([group])) for group in report.groups]
    found = [(group.label, group.mean_epoch(n).means) for group, n in numbers if n is not None]
    if not found:
        return None
    levels = sorted({name for _, means in found for name in means if name.startswith("kl_")})
    titles = {
        "loss": "loss",
        "cross_entropy": "cross-entropy, summed over levels",
        "entropy_p": "entropy of p, summed over levels",
        **{name: f"KL of level {name.removeprefix('kl_')}" for name in levels},
        "positive_mass": "mass on the positive",
    }
    if any("relation_weight" in means for _, means in found):
        titles |= {
            "relation_weight": "weight of the relation",
            "relation_entropy": "entropy of the relation",
            "relation_precision": "share of the relation on the own class",
        }
    rows = [[title, *(number(means.get(name)) for _, means in found)] for name, title in titles.items()]
    note = "Means over the last epoch's steps, on training batches. The loss is cross-entropy minus entropy of p."
    shown = html.table(["", *(label for label, _ in found)], rows)
    return section("Parts of each loss", "parts", shown, tag("p", note, class_="note"))


def _tests(report: _Report) -> Element | None:
    rows = []
    for one in report.found:
        r = one.result
        if r.n < 2:
            continue
        rows.append([
            words.COMMON[one.name],
            f"{one.first.label} - {one.second.label}",
            f"{r.difference:+.4f}",
            f"{r.interval[0]:+.4f} to {r.interval[1]:+.4f}",
            f"{one.p:.3f}",
            one.says,
            f"{r.t_p:.3f}",
            f"{r.wilcoxon_p:.3f}",
            f"{r.effect:+.2f}" if math.isfinite(r.effect) else "-",
            spread(r.mean_a, r.sd_a),
            spread(r.mean_b, r.sd_b),
        ])  # fmt: skip
    if not rows:
        return None
    header = [
        "score", "first - second", "difference", "95 % interval", "p (Holm)", "verdict", "p (t)", "p (Wilcoxon)", "d_z",
        "mean ± sd of the first", "of the second",
    ]  # fmt: skip
    note = (
        f"Paired by seed at the last common evaluation. Holm's correction over the {len(rows)} rows; the interval is a "
        "bootstrap over seeds. With few seeds these tests have little power: no evidence is not evidence of equality."
    )
    return section("Paired comparisons", "tests", html.table(header, rows, "text"), tag("p", note, class_="note"))


def _curves(report: _Report) -> Element | None:
    losses, scores = charts.loss_chart(report.groups), charts.score_chart(report.groups)
    if losses is None:
        return None
    band = sentence(over([len(group.runs) for group in report.groups]))
    drawn = [_picture(losses, "Loss curves", f"Training. Left: values of different functions. {band}")]
    probes = charts.probe_chart(report.groups)
    if probes is not None:
        text = f"Online probes: test accuracy on a few images of the weights as they were at that step. {band}"
        drawn.append(_picture(probes, "Curves of online probes", text))
    if scores is not None:
        text = f"Evaluations: the same functions for every objective, on the test split. {band}"
        drawn.append(_picture(scores, "Curves of scores", text))
    return section("Curves", "curves", *drawn)


def _picture(drawing: Any, alt: str, caption: str) -> Element:
    return figure(pieces(drawing, "svg"), "svg", alt, caption)


def _resources(report: _Report) -> Element | None:
    flops = {group.number: cost for group in report.groups if (cost := _step_cost(group)) is not None}
    chart = charts.resource_chart(report.groups, flops, _TARGET)
    if chart is None:
        return None
    title = SCORE_TITLES[_TARGET]
    text = (
        f"Resources needed to reach a {title}, by evaluation. FLOPs are counted (a multiply-add is two, products and "
        "convolutions only); seconds are those of the runs' machines, and include whatever else these did."
    )
    drawn = _picture(chart, "Accuracy against steps, operations and seconds", text)
    levels, said = _levels(report.groups)
    if not levels:
        return section("Resources", "resources", drawn, tag("p", said, class_="note"))
    curves = [_means_of(group) for group in report.groups]
    rows = [
        [f"{level:.4f}", *(_spent(g, c, level, flops) for g, c in zip(report.groups, curves, strict=True))]
        for level in levels
    ]
    header = [f"{title} of at least", *(group.label for group in report.groups)]
    return section("Resources", "resources", drawn, html.table(header, rows), tag("p", said, class_="note"))


def _levels(groups: Sequence[Group]) -> tuple[list[float], str]:
    """Scores worth asking what they took, and a sentence on them: none that lie closer together than seeds do."""
    if min(len(group.runs) for group in groups) < 2:
        return [], "One seed: no spread is known, so no score is called reached or not reached."
    spreads = [mean_sd(values)[1] for group in groups for values in group.scores(_TARGET).values()]
    noise = max((spread for spread in spreads if spread == spread), default=math.inf)
    reached = [value for group in groups for value in _means_of(group).values()]
    low, high = min(reached), max(reached)
    count = min(5, 1 + int((high - low) / (2 * noise))) if noise else 5
    if count < 2 or low == high:
        return [], "All scores lie within two standard deviations over seeds: what a score took is not told apart."
    said = "Steps, operations and seconds at the first evaluation whose mean over seeds reaches this score."
    return [low + (high - low) * k / (count - 1) for k in range(count)], said


def _means_of(group: Group) -> dict[int, float]:
    return {step: mean_sd(values)[0] for step, values in group.scores(_TARGET).items()}


def _spent(group: Group, curve: dict[int, float], level: float, flops: dict[int, float]) -> str:
    for (step, value), seconds in zip(curve.items(), charts.mean_seconds(group, list(curve)), strict=True):
        if value >= level:
            counted = f", {step * flops[group.number] / 1e12:.3g} TFLOPs" if group.number in flops else ""
            return f"{step} steps{counted}, {seconds:.0f} s"
    return "not reached"


def _step_cost(group: Group) -> float | None:
    """Operations of a step; None where the size of the images is not known any more."""
    size = group.config.data.image_size
    if size is None and (index := datasets.index_of(group.config)) is not None and index.image_size is not None:
        size = index.image_size[0]
    return None if size is None else step_flops(group.config, size).step


def _audits(report: _Report) -> Element | None:
    """The audits of supervisors (`rkdo audit`) that lie in the run directories."""
    shown: list[Element] = []
    for group in report.groups:
        for run in group.runs:
            try:
                found = audit.find(run.path)
                if found is None:
                    continue
                drawn = audit.figure(found)
                made = [html.sheet(audit.table(found)), *(tag("p", text) for text in audit.sentences(found))]
            except (ValueError, OSError, KeyError, TypeError) as error:
                shown.append(tag("p", f"{run.path}: its audit cannot be read: {error!r}", class_="remark"))
                continue
            shown.append(tag("h3", f"{group.label}, seed {run.seed}, step {found['step']}"))
            if drawn is not None:
                text = "Share of a row's mass on the sample's own class, by how the row is made."
                shown.append(_picture(drawn, "Supervisors", text))
            shown += made
    return section("Supervisors", "audit", *shown) if shown else None


def _settings(report: _Report) -> Element:
    flat = [configuration.flatten(group.config) for group in report.groups]
    differing = [k for k in flat[0] if k not in ("run.seed", "run.dir") and len({str(one[k]) for one in flat}) > 1]
    same = [k for k in flat[0] if k not in (*differing, "run.seed", "run.dir")]
    shown = []
    if differing:
        rows = [[key, *(str(one[key]) for one in flat)] for key in differing]
        shown.append(html.table(["setting", *(group.label for group in report.groups)], rows, "text"))
    common = html.table(["setting", "all runs"], [[key, str(flat[0][key])] for key in same], "text")
    shown.append(tag("details", tag("summary", f"{len(same)} settings that are the same for all"), common))
    return section("Settings", "settings", *shown)


def _environment(report: _Report) -> Element:
    rows = []
    for group in report.groups:
        for run in group.runs:
            facts, versions = run.environment, run.environment.get("versions", {})
            precision = {"no": "float32"}.get(facts.get("precision", ""), facts.get("precision"))
            machine = ", ".join(str(fact) for fact in (facts.get("device"), precision) if fact)
            rows.append([
                str(run.path),
                group.label,
                str(run.seed),
                str(run.steps),
                str(run.skipped),
                str(facts.get("world_size", "-")),
                machine or "-",
                str(facts.get("commit") or facts.get("version", "-")),
                ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name)),
                str(facts.get("platform", "-")),
            ])  # fmt: skip
    header = [
        "run",
        "configuration",
        "seed",
        "steps",
        "skipped",
        "processes",
        "device",
        "commit",
        "versions",
        "platform",
    ]
    return section("Runs and environment", "environment", html.table(header, rows, "text"))
