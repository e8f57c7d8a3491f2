"""Context of a job: its ranks meet, its messages reach people, the run directory gets its status."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.shards import verified_once
from rkdo_dist.diagnostics import logger
from rkdo_dist.exchange import group
from rkdo_dist.parts import open_index, require_source
from rkdo_dist.ranks import messages, runtime
from rkdo_dist.ranks.agreement import agree, same_request
from rkdo_dist.ranks.arithmetic import Precision
from rkdo_dist.ranks.launch import launched_ranks
from rkdo_dist.ranks.messages import Messages
from rkdo_dist.ranks.peers import ALIKE, PeerLostError, Peers
from rkdo_dist.ranks.runtime import Reduction, Runtime
from rkdo_dist.ranks.signals import INTERRUPTED, PREEMPTED, Stopped
from rkdo_dist.rundir import RunDirectory

_WORDS = {0: "complete", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


class Surroundings:
    """The result of `meet`. A run whose directory is `claimed` gets a status file, written by rank zero.

    Attributes:
        peers, messages: of this job.
        runtime: this process's place in it.
        index: of the shards, the same on every rank.
    """

    runtime: Runtime
    index: ShardIndex

    def __init__(self, others: Peers, said: Messages) -> None:
        self.peers, self.messages = others, said
        self._run: RunDirectory | None = None
        self._step: Callable[[], int] = lambda: 0

    def check_world(self, config: Config) -> None:
        """Whether these ranks can share the lanes of a step, with sums formed as they are in effect, and the strategy
        can do what is asked for.

        Raises:
            ConfigError: saying which setting to change.
        """
        run = dataclasses.replace(config.run, reduction=self.runtime.reduction)
        configuration.check_world(dataclasses.replace(config, run=run), self.runtime.world)
        configuration.check_strategy(config, self.runtime.zero_stage)

    def claimed(self, run: RunDirectory | None, step: Callable[[], int]) -> None:
        """From now on `run` is this job's, and its status is "running".

        Args:
            run: None on ranks other than zero.
            step: returns the number of steps done.
        """
        self._run, self._step = run, step
        self._write("running")

    def ended(self, code: int) -> None:
        """Write how the job ended: "complete", "preempted" or "interrupted"."""
        self._write(_WORDS[code])

    def failed(self, error: BaseException) -> None:
        """Write "failed", or "interrupted" for a second Ctrl-C, with the error's text."""
        with contextlib.suppress(OSError):  # the disk may be the very reason
            self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))

    def last_words(self, reason: str) -> None:
        """Say and write why the process ends, where the main thread cannot."""
        logger.error("%s", reason, extra={"rank": group.rank()})
        self.failed(PeerLostError(reason))

    def _write(self, word: str, message: str = "") -> None:
        if self._run is not None:
            self._run.write_status(word, self._step(), message)


@contextlib.contextmanager
def meet(
    config: Config, reduction: Reduction | None = None, open_data: Callable[[], ShardIndex] | None = None
) -> Iterator[Surroundings]:
    """Join the ranks that a launcher has started, check that they agree, open the shards' index (collective).

    While open, warnings of every rank reach people through rank zero; afterwards the process group is left.

    Args:
        reduction: in place of `run.reduction`.
        open_data: in place of opening `data.source`.

    Raises:
        ConfigError: if no data is named.
        ValueError: for a launch or an index that cannot be used, on every rank.
        RankError: for ranks that differ in settings, code or shards, naming what differs and the rank.
        PeerLostError: if a collective fails because another process is gone, now or while this is open.
    """
    require_source(config)
    wanted = config.run.reduction if reduction is None else reduction
    with joined(config.run.threads, config.run.timeout, wanted, config.run.matmul_precision) as around:
        same_request(config)
        agree(around.runtime.launch)
        around.index = group.together(open_data or (lambda: open_index(config)), "reading the index")
        agree({"the shards' index (digest)": around.index.digest()})
        with verified_once(around.index) as around.index:
            yield around


@contextlib.contextmanager
def joined(
    threads: int, timeout: int, reduction: Reduction, precision: Precision | None = None
) -> Iterator[Surroundings]:
    """Join the ranks that a launcher has started (collective): `meet` without what a configuration says.

    Args:
        threads, timeout, reduction, precision: of the settings `run`.

    Raises:
        LaunchError: for a launch that cannot be used, on every rank.
        PeerLostError: if a collective fails because another process is gone, or another rank fails by itself.
    """
    launched_ranks()  # refuses what others read as numbers
    with messages.collected(int(os.environ.get("RANK", "0"))) as said:
        around = Surroundings(Peers(timeout), said)
        intact = False
        try:
            try:
                with around.peers.explained():
                    around.runtime = runtime.start(threads, timeout, reduction, precision)
                    around.peers.meet(around.last_words)
                    yield around
                intact = True
            except ALIKE:
                intact = True
                raise
            finally:
                runtime.finish(intact)
        except Stopped as stopped:
            around.ended(stopped.code)
            raise
        except BaseException as error:
            around.failed(error)
            raise
