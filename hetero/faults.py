"""Faults: named points at which a run can be made to fail, to see that it fails well."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetero.errors import UsageError
from hetero.runtime.lanes import IsCalled
from hetero.runtime.step_run import Performer
from planner.step_graph import Op

VARIABLE = "HETERO_FAULTS"

# What fails at each point, as it would by itself.
POINTS: dict[str, str] = {
    "allocate": "another program has taken the accelerator's memory when a model is loaded",
    "pin": "the system refuses to pin host memory",
    "memory": "the accelerator has no memory left for a step",
    "copy": "a copy between host and accelerator fails",
    "compute": "the accelerator's compute fails",
    "cpu": "the CPU's compute fails",
    "interrupt": "Ctrl-C while the CPU computes",
    "logits": "a row of logits becomes NaN",
}


class InjectedFaultError(RuntimeError):
    """What a point raises for which nothing better is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A point fails when it is passed for the `first` time of `first`, and then on where it lasts.

    Examples
    --------
    >>> Fault.parse("copy:3")
    Fault(point='copy', first=3, lasts=False)
    """

    point: str
    first: int
    lasts: bool

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `point:3` (the third time) or `point:3+` (the third time and after).

        Raises
        ------
        UsageError
            Another form, or a point that there is not.
        """
        point, _, when = text.strip().partition(":")
        number = when.removesuffix("+")
        if point not in POINTS or not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise UsageError(
                f"{VARIABLE} has {text.strip()!r} but each part must be a point and when it fails, "
                f"as copy:3 or copy:3+; points are {', '.join(POINTS)}"
            )
        return cls(point=point, first=int(number), lasts=when.endswith("+"))


class Faults:
    """Which points fail, and when. Mutable: it counts how often each was passed.

    Parameters
    ----------
    faults : sequence of Fault
        At most one for each point; none in a usual run, which then passes no points.

    Examples
    --------
    >>> faults = Faults.parse("copy:2")
    >>> [faults.fires("copy") for _ in range(3)]
    [False, True, False]
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = {fault.point: fault for fault in faults}
        # Threads pass points at the same time: `next` is one step for the interpreter.
        self._counts: dict[str, Iterator[int]] = {
            fault.point: itertools.count(1) for fault in faults
        }
        self.fired: list[str] = []

    @classmethod
    def parse(cls, text: str) -> Faults:
        """Read several, with commas between them; nothing fails where the text is empty.

        Raises
        ------
        UsageError
            See `Fault.parse`.
        """
        return cls([Fault.parse(part) for part in text.split(",")] if text.strip() else [])

    def fires(self, point: str) -> bool:
        """Pass a point: is it to fail this time?"""
        fault = self._faults.get(point)
        if fault is None:
            return False
        count = next(self._counts[point])
        if count != fault.first and not (fault.lasts and count > fault.first):
            return False
        self.fired.append(point)
        return True

    def performer(self, performer: Performer) -> Performer:
        """What does the ops of a step, failing where it is to."""
        if not self._faults:
            return performer
        inner, until = performer.perform_run, performer.perform_until

        def perform(op: Op) -> None:
            self._pass(op)
            performer.perform(op)

        def perform_run(ops: tuple[Op, ...]) -> Sequence[float]:
            for op in ops:
                self._pass(op)
            assert inner is not None
            return inner(ops)

        def perform_until(op: Op, is_called: IsCalled) -> None:
            self._pass(op)
            assert until is not None
            until(op, is_called)

        return replace(
            performer,
            perform=perform,
            perform_run=None if inner is None else perform_run,
            perform_until=None if until is None else perform_until,
        )

    def _pass(self, op: Op) -> None:
        """Pass the points of an op."""
        if op.lane == "cpu":
            if self.fires("interrupt"):
                raise KeyboardInterrupt
            if self.fires("cpu"):
                raise InjectedFaultError(f"{op.name} was told to fail")
            return
        if self.fires("memory"):
            raise torch.OutOfMemoryError(f"{op.name} was told to find no memory")
        if self.fires("copy" if op.kind == "copy" else "compute"):
            raise InjectedFaultError(f"{op.name} was told to fail")

    def logits(self, logits_LV: Tensor) -> Tensor:
        """Logits on their way to the sampler, the last row of which may become NaN."""
        if len(logits_LV) and self.fires("logits"):
            logits_LV = logits_LV.clone()
            logits_LV[-1] = float("nan")
        return logits_LV


NO_FAULTS = Faults()
