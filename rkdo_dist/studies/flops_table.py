"""The table of `rkdo flops`: what a step costs by depth, counted and timed, beside what the paper counted."""

from __future__ import annotations

import dataclasses

from rich.table import Table

from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.studies.flops import PAPER, StepTimes, step_flops, step_times


def cost_table(config: Config, image_size: int, repeats: int) -> Table:
    """A column per depth (1, 3 and the configuration's own); a single one for objectives without recursion.

    Args:
        config: of the run.
        image_size: side of the squares that the encoder sees.
        repeats: steps to time; 0: count only.
    """
    field = config.field
    depths = sorted({1, 3, field.depth}) if field.objective == "rkdo" else [1]
    columns = [dataclasses.replace(config, field=dataclasses.replace(field, depth=depth)) for depth in depths]
    costs = [step_flops(column, image_size) for column in columns]
    table = Table(
        title=f"One step: {config.encoder.backbone}, {image_size} x {image_size}, {config.train.global_batch} pairs",
        caption="GFLOPs: a multiply-add is two operations; convolutions and matrix products only, so a level of the "
        "recursion costs time and no FLOPs. Time: this machine now, without reading, views and optimizer.",
    )
    table.add_column("")
    for depth in depths:
        table.add_column(f"{field.objective}, depth {depth}" if len(depths) > 1 else field.objective, justify="right")
    table.add_row("forward, GFLOPs", *(f"{cost.forward / 1e9:.4f}" for cost in costs))
    if _is_papers(config, image_size):
        table.add_row("  the paper", *(f"{PAPER[d] / 1e9:.4f}" if d in PAPER else "-" for d in depths))
    table.add_row("  of it the loss", *(f"{cost.loss_forward / 1e9:.4f}" for cost in costs))
    table.add_row("forward and backward, GFLOPs", *(f"{cost.step / 1e9:.4f}" for cost in costs))
    table.add_row("  of it the loss", *(f"{cost.loss_step / 1e9:.4f}" for cost in costs))
    if repeats:
        times = [step_times(c, image_size, parts.make_objective(c, 0.0), repeats) for c in columns]
        _add_times(table, times)
    return table


def _add_times(table: Table, times: list[StepTimes]) -> None:
    table.add_section()
    table.add_row("seconds, median step", *(f"{time.step:.4f}" for time in times))
    table.add_row("  of it the loss", *(f"{time.loss:.4f} ({time.loss_share:.1%})" for time in times))
    table.add_row("peak memory so far, MiB", *(f"{time.peak_bytes / 2**20:,.0f}" for time in times))


def _is_papers(config: Config, image_size: int) -> bool:
    encoder, train = config.encoder, config.train
    shape = (encoder.backbone, encoder.stem, encoder.embedding_dim, train.global_batch, image_size)
    return config.field.objective == "rkdo" and shape == ("resnet18", "imagenet", 64, 64, 32)
