"""What goes where and how long it takes: arithmetic on small frozen values."""

from planner import strategies
from planner.errors import PlannerError
from planner.hardware import HardwareProfile
from planner.model_spec import LayerSpec, ModelSpec, RopeSpec
from planner.placement import Placement
from planner.plan import Plan
from planner.search import search
from planner.timeline import Timeline
from planner.workload import Objective, Workload

__all__ = [
    "HardwareProfile",
    "LayerSpec",
    "ModelSpec",
    "Objective",
    "Placement",
    "Plan",
    "PlannerError",
    "RopeSpec",
    "Timeline",
    "Workload",
    "search",
    "strategies",
]
