"""`MultipleNegativesRankingLoss` of sentence-transformers in bounded memory, over the sentences of all processes.

    from examples.sentence_transformers import RankingLoss
    loss = RankingLoss(model)                  # in place of losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, loss=loss, ...)

Anchors are the rows, positives their columns; further columns of the data set are hard negatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rkdo_dist import InfoNCELoss


class RankingLoss(nn.Module):
    """The value of `MultipleNegativesRankingLoss(model, scale)` with cosine similarity, in bounded memory."""

    def __init__(self, model: Any, scale: float = 20.0, exchange: str = "gather") -> None:
        super().__init__()
        self.model = model
        self.loss = InfoNCELoss(temperature=1 / scale, exchange=exchange, normalise=True)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of tokenised columns: anchors, positives, hard negatives."""
        return self.of_embeddings([self.model(features)["sentence_embedding"] for features in sentence_features])

    def of_embeddings(self, embeddings: Sequence[Tensor]) -> Tensor:
        """The loss of embedded columns, each (b, d) of any length."""
        anchors, positives, *negatives = embeddings
        return self.loss(anchors, positives, extra_columns=torch.cat(negatives) if negatives else None)
