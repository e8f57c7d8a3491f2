"""Rows of a stated precision, made from labels: a supervisor that is right as often as one wants.

    rkdo embed runs/base data/digits --out base.npz
    python examples/oracle_rows.py base.npz rows.npz --precision 0.5
    rkdo train ... field.supervisor=rows.npz field.delivery=sampled

Row i is (1 - relation) on i itself and `relation` evenly on `columns` others, of which a share `precision` are of i's
class. The others are of any other class at random; with --confusable of the two classes that most of the wrong ones
among the 20 nearest neighbours of i's class belong to, by the features of the file.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS, CONFUSED = 20, 2


def oracle_rows(
    labels: NDArray[np.int64],
    precision: float,
    relation: float = 0.5,
    columns: int = 50,
    seed: int = 17,
    wrong: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray]:
    """Entries `row`, `column`, `p` for `field.supervisor=FILE`, (n (1 + columns),) each.

    Args:
        labels: (n,) classes.
        precision: in [0, 1]; precision * columns is rounded.
        relation: mass that is not i's own, in (0, 1).
        wrong: (C, C), whether the wrong columns of class c may be of class d; None: any other class.

    Raises:
        ValueError: if a class has too few samples for so many columns, or a number is out of its range.
    """
    if not (0 <= precision <= 1 and 0 < relation < 1 and columns >= 1):
        raise ValueError(f"precision {precision}, relation {relation} or columns {columns} is out of its range")
    classes = int(labels.max()) + 1
    allowed = ~np.eye(classes, dtype=bool) if wrong is None else wrong
    right = round(precision * columns)
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = np.empty((len(labels), columns), dtype=np.int64)
    for c in range(classes):
        own, other = np.flatnonzero(labels == c), np.flatnonzero(allowed[c][labels])
        if len(own) <= right or len(other) < columns - right:
            raise ValueError(f"class {c}: {len(own)} samples and {len(other)} others cannot give {columns} columns")
        for i in own:
            same = draw.choice(own[own != i], right, replace=False)
            chosen[i] = np.concatenate([same, draw.choice(other, columns - right, replace=False)])
    row = np.repeat(np.arange(len(labels)), 1 + columns)
    column = np.concatenate([np.arange(len(labels))[:, None], chosen], axis=1).ravel()
    p = np.tile(np.r_[1 - relation, np.full(columns, relation / columns)], len(labels))
    return {"row": row, "column": column, "p": p}


def confused(features: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(C, C): the two other classes that occur most among the nearest neighbours (cosine) of a class's samples."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    near = labels[np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]]
    classes = int(labels.max()) + 1
    counts = np.stack([np.bincount(near[labels == c].ravel(), minlength=classes) for c in range(classes)])
    np.fill_diagonal(counts, -1)
    most = np.argsort(-counts, axis=1, kind="stable")[:, :CONFUSED]
    found = np.zeros(counts.shape, dtype=bool)
    np.put_along_axis(found, most, True, axis=1)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", help=".npz of rkdo embed")
    parser.add_argument("out", help=".npz for field.supervisor")
    parser.add_argument("--precision", type=float, required=True)
    parser.add_argument("--relation", type=float, default=0.5)
    parser.add_argument("--columns", type=int, default=50)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--confusable", action="store_true")
    parser.add_argument("--split", default="train")
    asked = parser.parse_args()
    with np.load(asked.features) as file:
        mine = file["splits"] == asked.split
        features, labels = file["features"][mine], file["labels"][mine]
        names = file["classes"]
    wrong = confused(features, labels) if asked.confusable else None
    if wrong is not None:
        for c, classes in enumerate(wrong):
            print(f"{names[c]}: {', '.join(names[classes])}")
    rows = oracle_rows(labels, asked.precision, asked.relation, asked.columns, asked.seed, wrong)
    np.savez(asked.out, **rows)
    other = rows["row"] != rows["column"]
    found = (labels[rows["row"]] == labels[rows["column"]])[other].mean()
    print(f"{asked.out}: {len(labels)} rows, {asked.columns} columns each, precision {found:.4f}")


if __name__ == "__main__":
    main()
