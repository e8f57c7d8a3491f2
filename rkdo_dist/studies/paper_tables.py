"""Tables 1 to 4 of the paper: results of the runs beside the published numbers, with the tests of a paired design.

Every table states its protocol. "away" is our mean minus the published one in published standard deviations. Tests are
paired by seed (`statistics`), Holm-adjusted over the cells of a table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rkdo_dist.studies import published
from rkdo_dist.studies.paper import NAMES, OBJECTIVES, Cell, Request, Results
from rkdo_dist.studies.sheets import Sheet, mean_sd, number, of_values, spread
from rkdo_dist.studies.statistics import holm, verdict

_SIDE = ("here", "published", "second run", "away")


def all_tables(results: Results) -> list[Sheet]:
    """The four tables, in the paper's order."""
    return [table_1(results), table_2(results), table_3(results), table_4(results)]


def table_1(results: Results) -> Sheet:
    """Final loss. The test is on the attained share: the losses are different functions and cannot be compared."""
    request = results.request
    cells = [(d, e, results.loss(d, e)) for d, e in _places(request)]
    shares = [results.loss(d, e, attained=True) for d, e in _places(request)]
    sheet = Sheet(
        "table1",
        f"Table 1: mean loss of the last epoch ({request.said})",
        [
            "data set",
            "epochs",
            *_heads(),
            "RKDO lower\nhere",
            "RKDO lower\npublished",
            *(f"attained\n{NAMES[objective]}" for objective in OBJECTIVES),
            "the shares differ?",
        ],
        _loss_caption(results),
        names=2,
    )
    for (dataset, epochs, cell), share, p in zip(cells, shares, _adjusted(shares), strict=True):
        lower = [_percent(cell.percent(True)), _percent(cell.published_percent)]
        attained = [of_values(getattr(share, o), 1, percent=True) for o in OBJECTIVES]
        sheet.rows.append([results.title(dataset), str(epochs), *_sides(cell), *lower, *attained, _verdict(share, p)])
        row = {"dataset": results.known(dataset), "epochs": epochs, **_columns(request, cell)}
        row |= {"rkdo_lower_percent": cell.percent(True), "published_percent": cell.published_percent}
        ours = {k: v for k, v in _columns(request, share, p).items() if k not in ("protocol", "seeds")}
        ours = {k: v for k, v in ours.items() if not {"published", "away", "second"} & set(k.split("_"))}
        sheet.data.append(row | {f"attained_{k}": v for k, v in ours.items()})
    return sheet


def table_2(results: Results) -> Sheet:
    """Linear evaluation accuracy."""
    request = results.request
    places = list(_places(request))
    cells = [results.score(d, e, "linear_accuracy") for d, e in places]
    labels = [{"data set": results.title(d), "epochs": str(e)} for d, e in places]
    return _accuracies("table2", f"Table 2: linear evaluation accuracy ({request.said})", request, labels, cells)


def table_3(results: Results) -> Sheet:
    """Early RKDO against later I-Con; the published column is the paper's reading."""
    request = results.request
    sheet = Sheet(
        "table3",
        f"Table 3: early RKDO, later I-Con, linear evaluation accuracy ({request.said})",
        [
            "data set",
            "RKDO, early\nepochs",
            "RKDO, early\nhere",
            "RKDO, early\npublished",
            "I-Con, later\nepochs",
            "I-Con, later\nhere",
            "I-Con, later\npublished",
            "difference",
            "evidence?",
            "the paper reads",
        ],
        f"{_adjusted_words(request)} Fewer steps are a saving only where the accuracies are shown to be alike, which "
        "no evidence of a difference does not do.",
    )
    rows = [(d, published.TABLE_3[d]) for d in request.datasets]
    cells = [results.score(d, r.rkdo_epochs, "linear_accuracy", later=r.icon_epochs) for d, r in rows]
    for (dataset, row), cell, p in zip(rows, cells, _adjusted(cells), strict=True):
        theirs = [spread(*row.rkdo), spread(*row.icon), row.savings]
        theirs = ["-"] * 3 if dataset in results.strangers else theirs
        early = [str(row.rkdo_epochs), of_values(cell.rkdo), theirs[0]]
        later = [str(row.icon_epochs), of_values(cell.icon), theirs[1]]
        found = [_difference(cell), _verdict(cell, p), theirs[2]]
        sheet.rows.append([results.title(dataset), *early, *later, *found])
        epochs = {"rkdo_epochs": row.rkdo_epochs, "icon_epochs": row.icon_epochs}
        sheet.data.append(
            {
                "dataset": results.known(dataset),
                **epochs,
                **_columns(request, cell, p),
                "published_reading": theirs[2],
            }
        )
    return sheet


def table_4(results: Results) -> Sheet:
    """Four scores at two epochs."""
    request, epochs = results.request, published.TABLE_4_EPOCHS
    places = [(d, m) for d in request.datasets for m in published.METRICS]
    cells = [results.score(d, epochs, m) for d, m in places]
    labels = [{"data set": results.title(d), "score": published.METRICS[m]} for d, m in places]
    return _accuracies("table4", f"Table 4: scores at {epochs} epochs ({request.said})", request, labels, cells)


def agreement(results: Results) -> Iterator[str]:
    """A sentence per data set: how many cells of Table 1 lie within two published standard deviations."""
    for dataset in results.request.datasets:
        cells = [results.loss(dataset, e) for d, e in _places(results.request) if d == dataset]
        away = [c.away(o) for c in cells for o in OBJECTIVES if not math.isnan(c.away(o))]
        if away:
            close = sum(abs(a) <= 2 for a in away)
            yield (
                f"Table 1, {results.title(dataset)}: {close} of {len(away)} cells within two published standard "
                f"deviations (the farthest {max(away, key=abs):+.2f}; protocol {results.request.protocol})"
            )


def _accuracies(
    name: str, title: str, request: Request, labels: Sequence[Mapping[str, str]], cells: Sequence[Cell]
) -> Sheet:
    heads = ["RKDO over I-Con\nhere", "RKDO over I-Con\npublished", "difference", "evidence?"]
    heads += ["p\npublished", "p\nsecond run"]
    sheet = Sheet(name, title, [*labels[0], *_heads(), *heads], _adjusted_words(request), names=2)
    for label, cell, p in zip(labels, cells, _adjusted(cells), strict=True):
        relative = [_percent(cell.percent(), "+"), _percent(cell.published_percent, "+")]
        sheet.rows.append(
            [*label.values(), *_sides(cell), *relative, _difference(cell), _verdict(cell, p), *_theirs_p(cell)]
        )
        names = {key.replace("data set", "dataset"): value for key, value in label.items()}
        percents = {"percent": cell.percent(), "published_percent": cell.published_percent}
        sheet.data.append({**names, **_columns(request, cell, p), **percents})
    return sheet


def _adjusted_words(request: Request) -> str:
    if len(request.seeds) < 2:
        return "One seed: no spread is known, and nothing can be tested."
    return (
        "Mean ± sample standard deviation over seeds (in brackets that of the population, as in the paper). Second "
        "run: the author's own with the same seeds, released after the paper. p-values of the paired t-test over seeds "
        "are Holm-adjusted over the table's cells, the paper's are not; [95 % bootstrap interval]."
    )


def _places(request: Request) -> Iterator[tuple[str, int]]:
    return ((dataset, epochs) for dataset in request.datasets for epochs in request.epochs)


def _heads() -> list[str]:
    return [f"{NAMES[objective]}\n{what}" for objective in OBJECTIVES for what in _SIDE]


def _sides(cell: Cell) -> list[str]:
    """Ours, theirs, and how far away, for both objectives."""
    found = []
    for objective in OBJECTIVES:
        theirs = "-" if cell.published is None else spread(*getattr(cell.published, objective))
        again = "-" if cell.second is None else spread(*cell.second[OBJECTIVES.index(objective)])
        away = cell.away(objective)
        found += [_ours(getattr(cell, objective)), theirs, again, "-" if math.isnan(away) else f"{away:+.2f} sd"]
    return found


def _ours(values: Sequence[float]) -> str:
    """mean ± sample sd (population sd)."""
    return of_values(values) + (f" ({number(statistics.pstdev(values))})" if len(values) > 1 else "")


def _theirs_p(cell: Cell) -> list[str]:
    return [number(p, 3) for p in cell.published_p] or ["-", "-"]


def _percent(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.2f} %"


def _difference(cell: Cell) -> str:
    result = cell.paired
    if result is None or result.n < 2:
        return "-" if result is None else f"{result.difference:+.4f}"
    low, high = result.interval
    return f"{result.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _adjusted(cells: Sequence[Cell]) -> list[float]:
    return holm([math.nan if cell.paired is None else cell.paired.t_p for cell in cells])


def _verdict(cell: Cell, p: float) -> str:
    return "not run" if cell.paired is None else verdict(cell.paired, p, (NAMES["rkdo"], NAMES["icon"]))


def _columns(request: Request, cell: Cell, p: float | None = None) -> dict[str, Any]:
    """A cell for programs; with `p`, its tests too."""
    row: dict[str, Any] = {"protocol": request.protocol, "seeds": cell.seeds}
    for objective in OBJECTIVES:
        values = getattr(cell, objective)
        row[objective], row[f"{objective}_sd"] = mean_sd(values)
        row[f"{objective}_population_sd"] = statistics.pstdev(values) if values else math.nan
        theirs = (math.nan, math.nan) if cell.published is None else getattr(cell.published, objective)
        row[f"{objective}_published"], row[f"{objective}_published_sd"] = theirs
        again = (math.nan, math.nan) if cell.second is None else cell.second[OBJECTIVES.index(objective)]
        row[f"{objective}_second_run"], row[f"{objective}_second_run_sd"] = again
        row[f"{objective}_away"] = cell.away(objective)
    if p is None:
        return row
    found = cell.paired
    names = ("difference", "sd_difference", "t_p", "wilcoxon_p", "effect")
    row |= {name: math.nan if found is None else getattr(found, name) for name in names}
    row["interval_low"], row["interval_high"] = (math.nan, math.nan) if found is None else found.interval
    first, second = cell.published_p or (math.nan, math.nan)
    row |= {"holm_p": p, "verdict": _verdict(cell, p)}
    return row | {"published_p": first, "second_run_p": second}


def _loss_caption(results: Results) -> str:
    starts = {dataset: results.at_uniform(dataset) for dataset in results.request.datasets}
    gaps = [f"{100 * (b - a) / b:.1f} % on {results.title(d)}" for d, s in starts.items() if s for a, b in [s]]
    before = (
        f" Before any training RKDO's loss is lower by {', '.join(gaps)}: it is a different function." if gaps else ""
    )
    return (
        f"The two losses cannot be compared.{before} The attained share can: how far a loss has come from its "
        f"value for an untrained encoder to that for an ideal one. {_adjusted_words(results.request)}"
    )
