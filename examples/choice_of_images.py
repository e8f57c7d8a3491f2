"""How far the choice of the judged images shifts the paper's linear accuracy, the encoders being the same.

    rkdo embed RUN data/cifar10 --split test --what embeddings --out RUN.npz        for every run
    python examples/choice_of_images.py RUN.npz ...

Prints the mean accuracy of all encoders on the first 704 images, and mean and standard deviation over 50 choices of:
704 images and the 141 scored of them; the 141 scored of the first 704. Averaging over seeds does not remove this shift,
since all seeds are judged by the same images.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

SUBSET, CHOICES = 704, 50


def accuracy(encoders: list[tuple[NDArray, NDArray]], images: NDArray, seed: int) -> float:
    """Mean over the encoders of the protocol's score on these images, split by `seed`."""
    fitted, scored = train_test_split(images, test_size=0.2, random_state=seed)
    found = []
    for embeddings, labels in encoders:
        model = LogisticRegression(max_iter=1000, random_state=42).fit(embeddings[fitted], labels[fitted])
        found.append(model.score(embeddings[scored], labels[scored]))
    return float(np.mean(found))


def main() -> None:
    """The command."""
    encoders = []
    for name in sys.argv[1:]:
        with np.load(name) as file:
            encoders.append((file["embeddings"], file["labels"]))
    first = np.arange(SUBSET)
    print(f"{len(encoders)} encoders, the first {SUBSET} images: {accuracy(encoders, first, 42):.4f}")
    draw = np.random.Generator(np.random.PCG64(0))
    choices = [draw.permutation(len(encoders[0][1]))[:SUBSET] for _ in range(CHOICES)]
    for words, values in (
        (f"{SUBSET} images at random", [accuracy(encoders, images, 42) for images in choices]),
        ("another split of the first", [accuracy(encoders, first, seed) for seed in range(CHOICES)]),
    ):
        low, high = min(values), max(values)
        print(f"{words}: {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
