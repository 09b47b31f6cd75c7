"""Which experts lie in the GPU's slots: policies that decide it while a model runs."""

from planner.routing.lru import Lru
from planner.routing.policy import ExpertPolicy
from planner.routing.static import Static

__all__ = ["ExpertPolicy", "Lru", "Static"]
