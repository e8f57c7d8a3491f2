"""Everything that can be known before the first step, checked in one place: `rkdo train` and `rkdo doctor` call it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.samples import Reading, check_first
from rkdo_dist.encoders import is_code
from rkdo_dist.evaluate.evaluation import EvaluationPlan, Metric, plan_evaluation
from rkdo_dist.evaluate.probes import check_probes
from rkdo_dist.exchange import group
from rkdo_dist.ranks.agreement import agree, agreed_kernel, differing
from rkdo_dist.ranks.arithmetic import arithmetic
from rkdo_dist.ranks.messages import warn_once
from rkdo_dist.ranks.surroundings import Surroundings
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import memory, tracking
from rkdo_dist.training.job import Job, build
from rkdo_dist.training.reproducible import check_deterministic, check_half_precision
from rkdo_dist.training.saving import branch
from rkdo_dist.training.trial import in_precision


def made_ready(
    config: Config,
    around: Surroundings,
    run: RunDirectory,
    backbone: nn.Module | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> tuple[Job, EvaluationPlan]:
    """A run at its beginning and its evaluations, after all checks that need no step; nothing is written (collective).

    Args:
        backbone, metrics: as `training.main.Given`.

    Raises:
        ValueError: for a mistake in the request, on every rank alike.
    """
    rt, index = around.runtime, around.index
    around.check_world(config)
    group.on_main(lambda: tracking.check(config.run.trackers), "looking at run.trackers")
    plan = group.together(lambda: _fitting_plan(config, index), "comparing the configuration with the data")
    sharing = memory.sharing(rt)
    if backbone is None:
        group.together(lambda: memory.require(config, rt, index, sharing), "estimating memory")
    job = group.together(lambda: build(config, rt, index, run, backbone=backbone, metrics=metrics), "building the run")
    if backbone is None:
        group.together(lambda: memory.require_activations(config, rt, index, job.encoder, sharing), "estimating memory")
    branch(job)
    job.supervise()
    agree(job.facts())
    numbers = arithmetic(rt.device)
    if rt.reduction == "exact":
        agree(numbers)  # ranks apply the same update, each by its own arithmetic
    elif odd := differing(numbers):
        warn_once(f"ranks compute by different arithmetic ({odd}): a run again need not give the same numbers")
    group.together(lambda: _check_gradients(job), "trying the encoder")
    job.kernel = agreed_kernel(job.objective(0), rt.device)
    if config.encoder.weights != "none" or config.run.branch != "none" or is_code(config.encoder.backbone):
        # Read from a file of this node, or made by code of the user's: nothing here has seen to it that they are alike.
        agree({"the encoder's weights (digest)": job.encoder.digest()})
    job.compile()  # last: it takes a minute
    return job, plan


def _check_gradients(job: Job) -> None:
    forward = in_precision(job.encoder, job.runtime)
    about = (forward, job.encoder, job.config.encoder.backbone, job.views.size)
    if job.runtime.reduction == "exact":
        check_deterministic(*about)
    if job.runtime.precision != "no":
        check_half_precision(*about)


def _fitting_plan(config: Config, index: ShardIndex) -> EvaluationPlan:
    """The plan of evaluations, if configuration, index and the first samples of every split that is used fit."""
    parts.check_data(config, index)
    plan = plan_evaluation(config, index)
    check_probes(config, index)
    for name in dict.fromkeys((config.data.split, *plan.splits)):
        check_first(Reading(index, index.split(name), config.data.image_size, config.data.on_corrupt))
    return plan
