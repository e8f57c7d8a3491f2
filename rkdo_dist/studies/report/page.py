"""The page: what the runs say first, then the tables, curves and pictures that it rests on; all in one file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.files import write_atomic
from rkdo_dist.rundir import SCORE_TITLES, YARDSTICK_TITLES
from rkdo_dist.studies.flops import step_flops
from rkdo_dist.studies.report import charts, gallery, words
from rkdo_dist.studies.report.html import Element, figure, section, table, tag
from rkdo_dist.studies.report.runs import Group, grouped, read
from rkdo_dist.studies.report.style import STYLE

_VERSIONS = ("torch", "torchvision", "numpy")
_TARGET = "linear_accuracy"  # of the resource curves
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Report:
    groups: list[Group]
    remarks: list[str]
    found: list[words.Comparison]


def write_report(directories: Sequence[Path], out: Path, progress: Progress = lambda what: None) -> None:
    """Write the page of some runs.

    Args:
        directories: run directories; runs of one configuration under different seeds form a group.
        out: the file; its directory is made if it is not there.
        progress: told what is being done.

    Raises:
        RunError: for a directory that holds no run.
    """
    progress("reading the runs")
    groups, remarks = grouped([read(directory) for directory in directories])
    report = _Report(groups, remarks, words.comparisons(groups))
    progress("drawing curves")
    sections = [
        _summary(report),
        _scores(report),
        _apart(report),
        _tests(report),
        _curves(report),
        _resources(report),
        *gallery.sections(report.groups, progress),
        _settings(report),
        _environment(report),
    ]
    labels = [group.label for group in groups]
    title = " against ".join(labels) if len(labels) < 3 else f"{', '.join(labels[:-1])} and {labels[-1]}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} - rkdo report"),
        tag("style", Element(STYLE)),
    )
    count = sum(len(group.runs) for group in groups)
    top = tag("header", tag("h1", title), tag("p", _scope(report, count), class_="scope"))
    body = tag("body", tag("main", top, *(section for section in sections if section is not None)))
    page = "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)


def _scope(report: _Report, count: int) -> str:
    first = report.groups[0].config
    seeds = sorted({run.seed for group in report.groups for run in group.runs})
    runs = "1 run" if count == 1 else f"{count} runs"
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    data = Path(first.data.source or first.data.shards).name or "unnamed data"
    return f"{runs} on {data}, {first.encoder.backbone}, {named}."


def _paragraphs(sentences: Sequence[str], class_: str | None = None) -> Element:
    return tag("p", " ".join(sentences), class_=class_)


def _summary(report: _Report) -> Element:
    parts: list[Element] = []
    pairs = words.pairs_of(report.groups)
    for first, second in pairs:
        if len(pairs) > 1:
            parts.append(tag("h3", f"{first.label} and {second.label}"))
        parts.append(_paragraphs(words.loss_gap(first, second)))
        parts.append(_paragraphs(words.evidence(first, second, report.found), "verdict"))
    if not pairs:
        parts.append(_paragraphs(["One configuration alone: there is no loss gap to take apart.", *_alone(report)]))
    unfinished = [r for g in report.groups for r in g.runs if not r.evaluations or not r.epochs]
    remarks = [*report.remarks]
    if unfinished:
        listed = ", ".join(str(run.path) for run in unfinished)
        remarks.append(f"Without a step or an evaluation so far: {listed}.")
    return section("What the loss gap consists of", "summary", *parts, *(tag("p", r, class_="remark") for r in remarks))


def _alone(report: _Report) -> list[str]:
    group = report.groups[0]
    number = words.last_common_epoch([group])
    if number is None:
        return []
    epoch = words.mean_epoch(group, number)
    share = "" if epoch.attained is None else f", {epoch.attained:z.1%} of the way"
    return [
        f"In epoch {number + 1} its mean loss is {epoch.loss:.4f}, between {epoch.at_uniform:.4f} for an encoder that "
        f"knows nothing and {epoch.at_ideal:.4f} for ideal embeddings{share}."
    ]


def _scores(report: _Report) -> Element:
    rows: list[list[str]] = []
    lasts = [_last_step(group) for group in report.groups]
    rows.append(["after step", *(str(step) if step else "-" for step in lasts)])
    rows.append(["seeds", *(str(len(group.runs)) for group in report.groups)])
    for name, title in (SCORE_TITLES | YARDSTICK_TITLES).items():
        shown = [_mean_sd(_values(group, step, name)) for group, step in zip(report.groups, lasts, strict=True)]
        if any(cell != "-" for cell in shown):
            rows.append([title, *shown])
    note = (
        "Mean and standard deviation over seeds of the last evaluation that all runs of a configuration have. The own "
        "objective is a different function for every objective: its values do not compare."
    )
    return section(
        "Scores", "scores", table(["", *(g.label for g in report.groups)], rows), tag("p", note, class_="note")
    )


def _last_step(group: Group) -> int | None:
    judged = [set(run.evaluations) for run in group.runs if run.evaluations]
    return max(set.intersection(*judged), default=None) if judged else None


def _values(group: Group, step: int | None, name: str) -> list[float]:
    if step is None:
        return []
    return [value for run in group.runs if (value := run.score(step, name)) is not None]


def _mean_sd(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return "-"
    mean = _number(statistics.fmean(values), digits)
    return f"{mean} ± {_number(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def _number(value: float, digits: int = 4) -> str:
    """Some digits after the point, or an exponent where none of them would show."""
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits / 2 else f"{value:.{digits}f}"


def _apart(report: _Report) -> Element | None:
    """The last epoch's loss and its parts."""
    epochs = [(g, words.last_common_epoch([g])) for g in report.groups]
    found = [(g, words.mean_epoch(g, number), number) for g, number in epochs if number is not None]
    if not found:
        return None
    names = sorted({name for _, epoch, _ in found for name in epoch.parts if name.startswith("kl_")})
    lines = [
        ("epoch", lambda e, n: str(n + 1)),
        ("loss", lambda e, n: f"{e.loss:.4f}"),
        ("at uniform (knows nothing)", lambda e, n: f"{e.at_uniform:.4f}"),
        ("at the ideal simplex", lambda e, n: f"{e.at_ideal:.4f}"),
        ("share of the way attained", lambda e, n: "-" if e.attained is None else f"{e.attained:z.1%}"),
        ("cross-entropy, summed over levels", lambda e, n: _part(e.parts.get("cross_entropy"))),
        ("entropy of p, summed over levels", lambda e, n: _part(e.parts.get("entropy_p"))),
        *(
            (f"KL of level {name.removeprefix('kl_')}", lambda e, n, name=name: _part(e.parts.get(name)))
            for name in names
        ),
        ("mass on the positive", lambda e, n: _part(e.parts.get("positive_mass"))),
    ]
    rows = [[title, *(cell(epoch, number) for _, epoch, number in found)] for title, cell in lines]
    note = "Means over the last epoch's steps, on training batches. The loss is cross-entropy minus entropy of p."
    header = ["", *(group.label for group, _, _ in found)]
    return section("Each loss taken apart", "apart", table(header, rows), tag("p", note, class_="note"))


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tests(report: _Report) -> Element | None:
    rows = []
    for one in report.found:
        r = one.result
        if r.n < 2:
            continue
        rows.append([
            words.COMMON[one.name],
            one.first.label,
            f"{_number(r.mean_a)} ± {_number(r.sd_a)}",
            one.second.label,
            f"{_number(r.mean_b)} ± {_number(r.sd_b)}",
            f"{r.difference:+.4f}",
            f"{r.interval[0]:+.4f} to {r.interval[1]:+.4f}",
            f"{r.t_p:.3f}",
            f"{one.p:.3f}",
            f"{r.wilcoxon_p:.3f}",
            f"{r.effect:+.2f}" if math.isfinite(r.effect) else "-",
            one.says,
        ])  # fmt: skip
    if not rows:
        return None
    header = [
        "score", "first", "mean ± sd", "second", "mean ± sd", "difference", "95 % interval", "p (t)", "p (Holm)",
        "p (Wilcoxon)", "d_z", "verdict",
    ]  # fmt: skip
    note = (
        f"Paired by seed at the last common evaluation. Holm's correction over the {len(rows)} rows; the interval is a "
        "bootstrap over seeds. With few seeds these tests have little power: no evidence is not evidence of equality."
    )
    return section("Paired comparisons", "tests", table(header, rows, "text"), tag("p", note, class_="note"))


def _curves(report: _Report) -> Element | None:
    losses, scores = charts.loss_chart(report.groups), charts.score_chart(report.groups)
    if losses is None:
        return None
    band = "Lines: mean over seeds. Bands: one standard deviation."
    drawn = [figure(losses, "svg+xml", "Loss curves", f"Training. Left: values of different functions. {band}")]
    if scores is not None:
        text = f"Evaluations: the same functions for every objective, on the test split. {band}"
        drawn.append(figure(scores, "svg+xml", "Curves of scores", text))
    return section("Curves", "curves", *drawn)


def _resources(report: _Report) -> Element | None:
    flops = {group.number: cost for group in report.groups if (cost := _step_cost(group)) is not None}
    chart = charts.resource_chart(report.groups, flops, _TARGET)
    if chart is None:
        return None
    title = SCORE_TITLES[_TARGET]
    text = (
        f"What it took to reach a {title}, at every evaluation. FLOPs are counted (a multiply-add is two, products and "
        "convolutions only); seconds are those of the runs' machines, and include whatever else these did."
    )
    curves = [charts.score_curve(group, _TARGET) for group in report.groups]
    reached = [value for _, means in curves for value in means]
    low, high = min(reached), max(reached)
    levels = [low + (high - low) * k / 4 for k in range(5)] if high > low else [high]
    rows = [
        [f"{level:.4f}", *(_spent(g, c, level, flops) for g, c in zip(report.groups, curves, strict=True))]
        for level in levels
    ]
    header = [f"{title} of at least", *(group.label for group in report.groups)]
    return section(
        "Resources",
        "resources",
        figure(chart, "svg+xml", "Accuracy against steps, operations and seconds", text),
        table(header, rows),
        tag("p", "Steps, TFLOPs and seconds at the first evaluation whose mean over seeds is there.", class_="note"),
    )


def _spent(group: Group, curve: tuple[list[int], list[float]], level: float, flops: dict[int, float]) -> str:
    for step, seconds, value in zip(curve[0], charts.mean_seconds(group, curve[0]), curve[1], strict=True):
        if value >= level:
            counted = f", {step * flops[group.number] / 1e12:.3g} TFLOPs" if group.number in flops else ""
            return f"{step} steps{counted}, {seconds:.0f} s"
    return "not reached"


def _step_cost(group: Group) -> float | None:
    """Operations of a step; None where the size of the images is not known any more."""
    size = group.config.data.image_size
    if size is None:
        try:
            index: ShardIndex = parts.open_index(group.config)
        except (ValueError, OSError):
            return None
        size = None if index.image_size is None else index.image_size[0]
    return None if size is None else step_flops(group.config, size).step


def _settings(report: _Report) -> Element:
    flat = [configuration.flatten(group.config) for group in report.groups]
    differing = [k for k in flat[0] if k not in ("run.seed", "run.dir") and len({str(one[k]) for one in flat}) > 1]
    same = [k for k in flat[0] if k not in (*differing, "run.seed", "run.dir")]
    parts = []
    if differing:
        rows = [[key, *(str(one[key]) for one in flat)] for key in differing]
        parts.append(table(["setting", *(group.label for group in report.groups)], rows, "text"))
    common = table(["setting", "all runs"], [[key, str(flat[0][key])] for key in same], "text")
    parts.append(tag("details", tag("summary", f"{len(same)} settings that are the same for all"), common))
    return section("Settings", "settings", *parts)


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
    return section("Runs and environment", "environment", table(header, rows, "text"))
