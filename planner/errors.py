"""Errors of the planner: what a caller can fix, with both numbers and what to do."""


class PlannerError(Exception):
    """A request that the planner cannot answer as it stands."""


class ModelSpecError(PlannerError):
    """A model configuration that is missing something, lies, or is not supported."""


class ProfileError(PlannerError):
    """A hardware profile that cannot be read or used."""


class PlanError(PlannerError):
    """A plan that cannot be read, or was made for something else."""
