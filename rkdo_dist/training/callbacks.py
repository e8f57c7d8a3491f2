"""Callbacks: code of the user's that is told of steps, epochs, evaluations and checkpoints, and changes no result."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from rkdo_dist.exchange import group

EVENTS = ("on_step", "on_epoch", "on_evaluation", "on_checkpoint")


class Callback:
    """What a callback may have; any object with one of the four functions will do.

    Every function is called on every rank, with a dictionary of plain numbers and text that is its own copy. It must
    not use collectives. An exception ends the run on every rank with one line that names the callback, after the
    checkpoint of that step where one is due.

    Attributes:
        changes_results: whether it may change the encoder or anything else that decides results. Without it, a
            callback after which weights or modes of the encoder differ ends the run. With it, the run's
            environment.json names the callback under `changed_by`, for good: such a run is not what its configuration
            alone gives, and a continued run only equals an uninterrupted one if the callback does its part.
    """

    changes_results = False

    def on_step(self, facts: dict[str, Any]) -> None:
        """After every step: its record in metrics.jsonl."""

    def on_epoch(self, facts: dict[str, Any]) -> None:
        """After the last step of an epoch: the record of that step (`epoch` counts from 0)."""

    def on_evaluation(self, facts: dict[str, Any]) -> None:
        """After an evaluation: what `evaluations/<step>.json` holds."""

    def on_checkpoint(self, facts: dict[str, Any]) -> None:
        """When a checkpoint is complete: `step`, and `path` of its directory."""


def check(callbacks: Sequence[Any]) -> None:
    """Check that these can be callbacks.

    Raises:
        ValueError: naming the object that has none of the four functions, or one whose name is near to theirs.
    """
    for one in callbacks:
        name = name_of(one)
        if isinstance(one, type):
            raise ValueError(f"callbacks: {one.__name__} is a class: give an object, {one.__name__}()")
        told = [word for word in dir(one) if word.startswith("on_")]
        wrong = next((word for word in told if word not in EVENTS), None)
        if wrong is not None:
            near = difflib.get_close_matches(wrong, EVENTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"callbacks: {name} has {wrong}, which nothing calls{hint} There are {', '.join(EVENTS)}")
        if not told:
            raise ValueError(f"callbacks: {name} has none of {', '.join(EVENTS)}")
        if any(not callable(getattr(one, word)) for word in told):
            raise ValueError(f"callbacks: {name}.{told[0]} is not a function")


def name_of(callback: Any) -> str:
    """The name of a callback in messages: its class."""
    return (callback if isinstance(callback, type) else type(callback)).__name__


class Callbacks:
    """The callbacks of a run.

    Args:
        callbacks: checked already.
        encoder: which those that do not say `changes_results` must leave alone.
    """

    def __init__(self, callbacks: Sequence[Any], encoder: nn.Module) -> None:
        self._encoder = encoder
        self._called = {event: [one for one in callbacks if _has(one, event)] for event in EVENTS}

    def told_of(self, event: str) -> bool:
        """Whether any callback wants to know."""
        return bool(self._called[event])

    def attempt(self, event: str, facts: dict[str, Any]) -> group.Attempt[None]:
        """Call those that want to know; `raise_failure` raises what went wrong."""
        return group.Attempt(lambda: self._call(event, facts))

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        """`attempt` and `raise_failure` in one (collective)."""
        self.raise_failure(event, self.attempt(event, facts))

    def raise_failure(self, event: str, attempt: group.Attempt[None]) -> None:
        """Raise the same error on every rank if a callback has failed on any (collective where any is told of it).

        Raises:
            RankError: naming the callback.
        """
        if self.told_of(event):
            attempt.result(group.all_reduce_max(float(attempt.failed)) > 0, "calling the callbacks")

    def _call(self, event: str, facts: dict[str, Any]) -> None:
        for one in self._called[event]:
            before = self._fingerprint()
            try:
                getattr(one, event)(copy.deepcopy(facts))
            except Exception as error:  # code of the user's
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise group.RankError(
                    f"callback {name_of(one)}.{event} failed at step {facts['step']}: {reason}"
                ) from error
            if not getattr(one, "changes_results", False) and self._fingerprint() != before:
                raise group.RankError(
                    f"callback {name_of(one)}.{event} changed the encoder at step {facts['step']} without saying so: "
                    "leave its weights and modes alone, or set changes_results = True on the callback"
                )

    def _fingerprint(self) -> tuple[object, ...]:
        """Changes with every write to weights and buffers (but one through `.data`), and with the modules' modes."""
        tensors = [*self._encoder.parameters(), *self._encoder.buffers()]
        return sum(tensor._version for tensor in tensors), *(module.training for module in self._encoder.modules())


def _has(callback: Any, event: str) -> bool:
    """Whether a callback does anything at an event."""
    function = getattr(callback, event, None)
    return function is not None and getattr(function, "__func__", None) is not getattr(Callback, event)
