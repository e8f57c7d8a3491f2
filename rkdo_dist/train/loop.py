"""The training loop, visible in one screen."""

from __future__ import annotations

import time

from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.train.job import Job
from rkdo_dist.train.journal import Journal
from rkdo_dist.train.step import Step


def run(job: Job, step: Step, journal: Journal, stop: StopRequest) -> int:
    """Train from the job's position to its end.

    Returns:
        0 when the run is complete, otherwise the exit code of the request to stop (`ranks.signals`); in both cases
        the last step is in a checkpoint.
    """
    began = time.perf_counter()
    if job.evaluation_due():
        job.evaluate(journal)
    for batch in job.batches():
        done = job.position
        job.set_learning_rate(done)
        result = job.attempt(step, batch, stop.code)
        job.position = done + 1
        ended = time.perf_counter()
        journal.step(job.record(batch, result, seconds=ended - began))
        began = ended
        if result.stop or job.due(job.config.train.checkpoint_every) or job.evaluation_due():
            job.save(journal)
        if result.stop:
            return result.stop
        if job.evaluation_due():
            job.evaluate(journal)
            began = time.perf_counter()
        if job.flat:
            journal.say(f"step {job.position}: the loss no longer falls by train.early_stop_slope a step; the run ends")
            break
    job.save(journal)
    if job.config.evaluate.at_end:
        job.evaluate(journal)
    return 0
