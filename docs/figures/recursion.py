"""The figure of the front page: rows of a batch over the levels of the recursion, with an encoder that never moves.

    python docs/figures/recursion.py        writes docs/figures/recursion.svg

Rows are scikit-learn's digits, three of each of four classes; "embeddings" are centred pixels of an image and of the
same image shifted by one pixel. Nothing is trained: the loss falls because p moves towards q.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from rkdo_dist.field import recursion
from rkdo_dist.studies.palette import FIELD, style
from rkdo_dist.studies.plots import encoded, panels

COUPLING, TEMPERATURE, LEVELS, CLASSES, EACH = 0.5, 0.2, 4, (0, 1, 4, 6), 3


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """(12, 64) unit-norm rows of view 1 and view 2, sorted by class."""
    digits = load_digits()
    mean = digits.images.mean(0)
    chosen = np.concatenate([np.flatnonzero(digits.target == c)[:EACH] for c in CLASSES])
    images = digits.images[chosen]
    views = [images - mean, np.roll(images, 1, axis=2) - mean]
    u, v = (torch.nn.functional.normalize(torch.from_numpy(x.reshape(len(chosen), -1)), dim=1) for x in views)
    return u, v


def main() -> None:
    """Draw p(0)..p(3), q and the loss of every level."""
    u, v = embeddings()
    n = len(u)
    similarity = recursion.similarities(u, v)
    p0 = torch.eye(n, dtype=similarity.dtype)
    field = recursion.unroll(similarity, p0, [TEMPERATURE] * (LEVELS + 1), [COUPLING] * LEVELS)
    q = field.log_q[0].exp()
    supervisors = [p0, *field.p]
    losses = [recursion.kl_divergence(p, field.log_q[0]).mean().item() for p in supervisors]

    figure, axes = panels(2, 3, (6.9, 4.7))
    titles = ["p(0): the positive", "p(1)", "p(2)", "p(3)", "q: the encoder's softmax"]
    for axis, title, row in zip(axes, titles, [*supervisors[:4], q], strict=False):
        drawn = axis.imshow(row.numpy().clip(0.01), cmap=FIELD, norm="log", vmin=0.01, vmax=1)
        axis.set_title(title, fontsize=9.5)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    axes[0].set_ylabel("row i: view 1")
    axes[0].set_xlabel("column j: view 2")
    figure.colorbar(drawn, ax=axes[3:5], location="bottom", aspect=30, label="probability")
    levels = range(LEVELS + 1)
    axes[-1].bar(levels, losses, width=0.6, **style(0).bar)
    for level, loss in zip(levels, losses, strict=True):
        axes[-1].annotate(f"{loss:.3f}", (level, loss), ha="center", va="bottom", fontsize=8)
    axes[-1].set_title("loss: mean KL(p(t) || q)", fontsize=9.5)
    axes[-1].set(xlabel="level t, q fixed", ylabel="nats")
    axes[-1].set_xticks(list(levels))
    axes[-1].margins(y=0.18)
    Path(__file__).with_suffix(".svg").write_bytes(encoded(figure, "svg"))


if __name__ == "__main__":
    main()
