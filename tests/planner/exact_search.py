"""The fastest placement of a small model, by branch and bound over every state of every layer.

It shares the menus and the prices with the search, and nothing of how it chooses: layers are taken
in order, each in every state, and a branch ends where the sums of what is chosen, with the best of
what is left, are no faster than what is known. What is left is simulated and its memory counted.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from random import Random

import numpy as np

from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.hardware import HardwareProfile
from planner.layer_menu import LOADS, Floats, Menu
from planner.memory import available_bytes
from planner.model_spec import LayerSpec, ModelSpec
from planner.search_space import Draft, Space, placement_of
from planner.workload import Workload
from tests.planner.tiny import real_machine, tiny_spec

CHUNK_TOKENS = 8
_RATES = (1e3, 5e3, 25e3, 100e3, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A small model, a machine in whose proportions anything may bind, and a workload."""

    spec: ModelSpec
    machine: HardwareProfile
    workload: Workload


def random_case(draw: Random, max_layers: int = 4) -> Case:
    """Up to four layers, dense or of two to six experts.

    Feed-forwards are narrow, so that there are few divisions, but in models of one or two layers.
    """
    num_experts = draw.choice((2, 3, 4, 6))
    letters = "".join(draw.choice("dm") for _ in range(draw.randint(1, max_layers)))
    spec = tiny_spec(letters, is_tied=draw.random() < 0.3)
    experts = LayerSpec(
        intermediate_size=6,
        num_experts=num_experts,
        num_experts_per_token=max(1, min(2, num_experts - 1)),
    )
    dense = LayerSpec(intermediate_size=draw.choice((2, 3, 16) if len(letters) < 3 else (2, 3)))
    layers = tuple(experts if layer.is_moe else dense for layer in spec.layers)
    return Case(
        spec=dataclasses.replace(spec, layers=layers),
        machine=real_machine(
            cpu_bytes=1000 * draw.randint(1, 40),
            gpu_bytes=1000 * draw.randint(1, 40),
            link_bytes_per_s=draw.choice(_RATES),
            cpu_flop_per_s=draw.choice(_RATES),
            cpu_read_bytes_per_s=draw.choice(_RATES),
        ),
        workload=Workload(
            prompt_len=draw.randint(1, 24),
            output_len=draw.randint(1, 24),
            num_seqs=draw.randint(1, 4),
        ),
    )


@dataclass(slots=True, kw_only=True)
class Exact:
    """Seconds of the fastest placement, and whether all were looked at. Mutable while it looks."""

    seconds: float
    max_simulated: int
    num_simulated: int = 0
    menus: list[Menu] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.num_simulated < self.max_simulated


def fastest(case: Case, known_s: float = math.inf, max_simulated: int = 4000) -> Exact:
    """Look for anything faster than `known_s`; ends early after so many simulations."""
    costs = CostModel(case.machine)
    wave = Wave(case.spec, costs, case.workload, case.workload.num_seqs)
    space = Space(wave, CHUNK_TOKENS)
    menus = [space.menu_of[index] for index in range(case.spec.num_layers)]
    menus.append(space.menus[-1])
    left_s, left_bytes = [np.zeros((len(LOADS), 2))], [np.zeros(2)]
    for menu in reversed(menus):
        left_s.insert(0, left_s[0] + menu.loads_s.min(axis=2))
        left_bytes.insert(0, left_bytes[0] + menu.bytes.min(axis=1))
    limit = np.array([available_bytes(case.machine, device) for device in ("gpu", "cpu")])
    found = Exact(seconds=known_s, max_simulated=max_simulated, menus=menus)

    def look(at: int, loads_s: Floats, held: Floats, move_s: float, chosen: list[int]) -> None:
        if not found.is_complete:
            return
        if at == len(menus):
            draft = Draft(layers=tuple(chosen[:-1]), ends=chosen[-1])
            candidate = Candidate(placement_of(space, draft), wave)
            found.num_simulated += 1
            if candidate.lacking_bytes == 0:
                found.seconds = min(found.seconds, candidate.times.e2e_s)
            return
        menu = menus[at]
        all_s = loads_s[:, :, None] + menu.loads_s
        all_bytes = held[:, None] + menu.bytes
        moves_s = move_s + menu.move_s
        least_s = (all_s + left_s[at + 1][:, :, None]).max(axis=0).sum(axis=0) + moves_s
        held_least = all_bytes + left_bytes[at + 1][:, None]
        fits = np.asarray((held_least <= limit[:, None]).all(axis=0))
        for column in np.argsort(least_s, kind="stable").tolist():
            if space.base_s + least_s[column] >= found.seconds * (1 - 1e-9):
                return
            if fits[column]:
                rest = (all_s[:, :, column], all_bytes[:, column], float(moves_s[column]))
                look(at + 1, *rest, [*chosen, column])

    look(0, np.zeros((len(LOADS), 2)), np.zeros(2), 0.0, [])
    return found
