"""RKDO's gradient against InfoNCE's, for every depth and coupling: a constant times the same direction.

    python examples/depth_and_coupling.py RUN [SHARDS]

RUN is a trained run of the paper's protocol, whose encoder embeds one training batch (of SHARDS, by default its own) in
float64. Columns: the constant that theory gives, sum of (1 - coupling)^t over the levels; norm and cosine of the
gradient without cooling and with a stopped supervisor, for which theory is exact; the same as released (cooling 0.1,
gradient through p).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from rkdo_dist import InfoNCELoss, RKDOLoss, load_encoder, parts
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.sheets import as_csv

DEPTHS, COUPLINGS = (1, 2, 3, 5), (0.1, 0.3, 0.5, 0.8)


def gradient(loss: nn.Module, views: list[Tensor]) -> Tensor:
    """Of both views' embeddings, flat."""
    leaves = [view.clone().requires_grad_() for view in views]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(*leaves), leaves)])


def main() -> None:
    """Print the table as CSV."""
    run = RunDirectory(sys.argv[1])
    config = run.config([f"data.shards={sys.argv[2]}"] if len(sys.argv) > 2 else [])
    index, encoder = parts.open_index(config), load_encoder(run.path)
    _, block = next(iter(evaluation_stream(index, config.data.split, config.train.global_batch)))
    draw = parts.make_views(config, index)
    with torch.no_grad():
        drawn = [encoder.features(draw(block.images, block.ids, 0, 0, view))[1] for view in (0, 1)]
    views = [nn.functional.normalize(embeddings.double(), dim=1) for embeddings in drawn]
    infonce = gradient(InfoNCELoss(0.5), views)
    rows = []
    for depth in DEPTHS:
        for coupling in COUPLINGS:
            row = {"depth": depth, "coupling": coupling}
            row["theory"] = sum((1 - coupling) ** t for t in range(1, depth + 1))
            for name, cooling, through in (("stopped", 0.0, "stop"), ("released", 0.1, "flow")):
                loss = RKDOLoss(depth, coupling, 0.5, cooling, supervisor_grad=through)
                found = gradient(loss, views)
                row[f"{name}_norm"] = float(found.norm() / infonce.norm())
                row[f"{name}_cosine"] = float(found @ infonce / (found.norm() * infonce.norm()))
            rows.append({key: f"{value:.5g}" for key, value in row.items()})
    sys.stdout.write(as_csv(rows))


if __name__ == "__main__":
    main()
