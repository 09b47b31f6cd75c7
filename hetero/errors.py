"""Errors that a user can fix, and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `hetero` exits with."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    FAILED_ROWS = 3
    DOES_NOT_FIT = 4
    MODEL_INVALID = 5
    ENVIRONMENT = 6
    OUTPUT_LOCKED = 7
    INTERRUPTED = 130
    TERMINATED = 143


class HeteroError(Exception):
    """Something a user can fix: what was wrong, both numbers, and what to do."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UsageError(HeteroError):
    """A request that contradicts itself or asks for what does not exist."""

    exit_code = ExitCode.USAGE


class RequestError(UsageError):
    """One prompt or its sampling parameters cannot be served."""


class PlanMismatchError(UsageError):
    """A plan made for another model or another machine."""


class MemoryBudgetError(HeteroError):
    """Something does not fit the memory that was planned or given."""

    exit_code = ExitCode.DOES_NOT_FIT


class ModelFolderError(HeteroError):
    """A model folder that is incomplete, damaged, hostile or not supported."""

    exit_code = ExitCode.MODEL_INVALID


class EnvironmentProblemError(HeteroError):
    """The machine lacks what was asked for (a GPU, a driver, a package)."""

    exit_code = ExitCode.ENVIRONMENT
