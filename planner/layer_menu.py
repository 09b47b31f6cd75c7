"""Menu: every way in which a layer can be placed, with its seconds and bytes, as arrays."""

# A choices for attention, R for the router (or the dense feed-forward), X for the experts; two
# phases p. A state is a triple of choices, S = A * R * X of them in that order.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from planner.cost_model import Pricer
from planner.kv_blocks import layer_kv_bytes
from planner.model_spec import DENSE_SHARES, ModelSpec, Module
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    Device,
    LayerPlacement,
    ModulePlacement,
    Runs,
)
from planner.simulate import LONG_KINDS
from planner.step_graph import LANES, Lane, Op, OpKind, Part, Payload
from planner.workload import PHASES, Phase, Workload

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DEVICES: tuple[Device, ...] = ("gpu", "cpu")
# Numbers of resident experts that a menu has, of many: more lie between them.
_MAX_COUNTS = 17


@dataclass(frozen=True, slots=True)
class Choice:
    """A module in both phases; its weights live where both need them.

    `kv_on_cpu` is of attention, in decode steps (`LayerPlacement`).
    """

    prefill: ModulePlacement
    decode: ModulePlacement
    kv_on_cpu: bool = False

    def __getitem__(self, phase: int) -> ModulePlacement:
        return self.decode if phase else self.prefill

    def kv(self, phase: Phase) -> Device:
        """Where a phase keeps the cache."""
        if phase == "prefill":
            return self.prefill.device
        return "cpu" if self.kv_on_cpu else self.decode.device


_HOST = (ON_CPU, STREAMED)
_WHOLE = (
    Choice(ON_GPU, ON_GPU),
    *(Choice(prefill, decode) for prefill in _HOST for decode in _HOST),
)
_NO_GPU = (Choice(ON_CPU, ON_CPU),)
_DIVIDED_RUNS: tuple[Runs, ...] = ("cpu", "stream")
# Attention whose projections run on the GPU, by where its weights are.
_ON_BOTH = (
    Choice(ON_GPU, ON_GPU, True),
    Choice(ON_CPU, STREAMED, True),
    Choice(STREAMED, STREAMED, True),
)
# More than any step takes: of states that contradict themselves.
_IMPOSSIBLE_S = 1e30
# Seconds that are added up over modules: the longest path of ops, a path that the CPU's work is on
# as if lanes did not slow each other down, copies to the GPU, the CPU's work that they may slow,
# and all that the CPU and the GPU do.
_SUMS = ("chain", "undisturbed", "h2d", "cpu", "cpu lane", "gpu lane")
# Loads of a menu, in the order of how much copies to the GPU count in them.
LOADS = ("chain", "chain beside copies", "copies beside chain", "copies")


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedSteps:
    """The steps of a phase: how often each runs in a workload, and what its ops cost.

    `num_second` is how many of a step's sequences are a second sub-batch.
    """

    steps: tuple[tuple[float, Pricer], ...]
    max_fetched: int
    num_second: int = 0

    def seconds(self, op: Op) -> Floats:
        """Seconds of an op in each kind of step, once."""
        return np.array([price(op) for _, price in self.steps])

    @property
    def counts(self) -> Floats:
        return np.array([count for count, _ in self.steps])


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """States of a layer, or of the model's ends: columns of one length.

    Attributes
    ----------
    choices : tuple
        Of each module, in the order of `states`.
    states : array (S,)
        The triple of choices that each column is of, as one number.
    loads_s : array (4, 2, S)
        Seconds of a workload in each phase, by `LOADS`: of the longest path of ops through the
        layer, of its copies to the GPU, and between them of what each costs the other where they
        share the CPU's memory (`_loads_s`). Where a phase runs in two sub-batches: what the GPU
        does, what the CPU does beside copies, copies beside the CPU's work, half of both
        sub-batches' paths. A step takes no less than any, added up over layers.
    move_s : array (S,)
        Of moving its KV cache between the phases.
    bytes : array (2, S)
        Weights and KV on the GPU, and on the CPU.
    streamed_bytes : array (2, S)
        Weights that are copied whole in each step of a phase.
    is_split, uses_gpu : array (2, S)
        In each phase: are there experts that a step divides; does the GPU compute?
    """

    choices: tuple[tuple[Choice, ...], ...]
    states: NDArray[np.int64]
    loads_s: Floats
    move_s: Floats
    bytes: Floats
    streamed_bytes: Floats
    is_split: Bools
    uses_gpu: Bools

    def only(self, wanted: Bools) -> Menu:
        """The menu of some of its columns."""
        return Menu(
            choices=self.choices,
            states=self.states[wanted],
            loads_s=self.loads_s[:, :, wanted],
            move_s=self.move_s[wanted],
            bytes=self.bytes[:, wanted],
            streamed_bytes=self.streamed_bytes[:, wanted],
            is_split=self.is_split[:, wanted],
            uses_gpu=self.uses_gpu[:, wanted],
        )

    def column_of(self, other: Menu, column: int) -> int:
        """Where a column of a part of this menu (`only`) is in the whole."""
        return int(np.searchsorted(self.states, other.states[column]))

    def picked(self, column: int) -> list[Choice]:
        """The choice of each module."""
        state, found = int(self.states[column]), list[Choice]()
        for options in reversed(self.choices):
            state, at = divmod(state, len(options))
            found.append(options[at])
        return found[::-1]


def layer_placements(menu: Menu, column: int) -> tuple[LayerPlacement, LayerPlacement]:
    """A layer in both phases."""
    picked = menu.picked(column)
    return _layer(picked, 0), _layer(picked, 1)


def _layer(picked: Sequence[Choice], phase: int) -> LayerPlacement:
    attention, second, *others = (choice[phase] for choice in picked)
    return LayerPlacement(
        attention=attention,
        router=second if others else None,
        ffn=others[0] if others else second,
        kv_on_cpu=picked[0].kv_on_cpu and PHASES[phase] == "decode",
    )


# What an op is, its lane, and its seconds in each kind of step.
_OpSeconds = tuple[OpKind, Lane, Floats]


class _Prices:
    """Seconds of the ops of one layer, or outside of layers, in each kind of step of a phase."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int | None,
        steps: dict[Phase, PricedSteps],
        has_gpu: bool,
    ) -> None:
        self.spec = spec
        self.layer = layer
        self.has_gpu = has_gpu
        _, price = steps["decode"].steps[0]
        slowdowns = price.costs.slowdowns
        self.slowdowns = (slowdowns.get(("h2d", "cpu"), 1.0), slowdowns.get(("cpu", "h2d"), 1.0))
        self._steps = steps
        self._counts = {phase: found.counts for phase, found in steps.items()}
        self._known: dict[tuple[object, ...], Floats] = {}

    @property
    def num_second(self) -> int:
        """Sequences of a second sub-batch of decode steps."""
        return self._steps["decode"].num_second

    def is_in_two(self, phase: Phase) -> bool:
        """Do the steps of a phase run as two sub-batches?"""
        return self._steps[phase].num_second > 0

    def op(
        self,
        phase: Phase,
        kind: OpKind,
        lane: Lane,
        *,
        module: Module | None = None,
        payload: Payload | None = None,
        part: Part = "all",
        num_resident: int = 0,
        sub_batches: tuple[int, ...] = (0, 1),
    ) -> Floats:
        """Of the whole step; where it runs in two, of these sub-batches together."""
        steps = self._steps[phase]
        key = (phase, kind, lane, module, payload, part, num_resident, sub_batches)
        if key not in self._known:
            is_shared = not steps.num_second or (payload == "weights" and part != "fetched")
            numbers: tuple[int | None, ...] = (None,) if is_shared else sub_batches
            op = Op(
                index=0,
                kind=kind,
                lane=lane,
                layer=self.layer,
                module=module,
                payload=payload,
                part=part,
                num_resident=num_resident,
                max_fetched=steps.max_fetched if part in ("fetched", "rest") else 0,
                num_second_seqs=0 if is_shared else steps.num_second,
            )
            self._known[key] = np.sum(
                [steps.seconds(replace(op, sub_batch=number)) for number in numbers], axis=0
            )
        return self._known[key]

    def move(self, phase: Phase, payload: Payload, target: Device) -> Floats:
        return self.op(phase, "copy", "h2d" if target == "gpu" else "d2h", payload=payload)

    def stream(
        self, phase: Phase, module: Module, num_resident: int = 0, *, part: Part | None = None
    ) -> Floats:
        part = part or ("missed" if num_resident else "all")
        return self.op(
            phase,
            "copy",
            "h2d",
            module=module,
            payload="weights",
            part=part,
            num_resident=num_resident,
        )

    def total(self, phase: Phase, seconds: Floats) -> float:
        """Over all steps of the workload."""
        return float(seconds @ self._counts[phase])


def layer_menu(
    spec: ModelSpec,
    layer: int,
    wave: Workload,
    steps: dict[Phase, PricedSteps],
    *,
    has_gpu: bool,
    kv_move_s: Callable[[Lane], float],
    num_waves: int,
    chunk_tokens: int,
    has_large_caches: bool = True,
    first_on_cpu: bool = False,
) -> Menu:
    """Price every state of a layer.

    Parameters
    ----------
    layer : int
        A layer of the kind; all of one shape have one menu.
    wave : Workload
        Sequences that run together.
    steps : dict
        Steps of each phase, and how often each runs in the whole workload.
    kv_move_s : callable
        Seconds of moving the layer's cache of a wave in a direction.
    chunk_tokens : int
        New tokens of a prefill step.
    has_large_caches : bool
        Is it worth trying to keep a cache on the CPU whose attention's projections are on the GPU?
    first_on_cpu : bool
        Where decode runs in two sub-batches: is the first one's cache on the CPU too?
    """
    prices = _Prices(spec, layer, steps, has_gpu)
    this = spec.layers[layer]
    whole = _WHOLE if has_gpu else _NO_GPU
    attention = whole
    if steps["decode"].num_second:
        attention = tuple(Choice(where, where, first_on_cpu) for where in (ON_GPU, STREAMED))
    elif has_gpu and has_large_caches and this.attention is None:
        attention = (*whole, *_ON_BOTH)
    modules: list[tuple[Module, tuple[Choice, ...]]] = [("attention", attention)]
    if not this.is_moe:
        modules.append(("dense", (*whole, *_divided(spec, layer, has_gpu=has_gpu))))
    else:
        modules.append(("router", whole))
        modules.append(("experts", _expert_choices(this.num_experts, steps, has_gpu=has_gpu)))
    columns = [_columns(prices, module, options, wave, chunk_tokens) for module, options in modules]
    shape = tuple(len(options) for _, options in modules)
    sums = np.zeros((len(_SUMS), 2, *shape))
    uses_gpu, is_split = np.zeros((2, *shape), bool), np.zeros((2, *shape), bool)
    streamed, held = np.zeros((2, *shape)), np.zeros((2, *shape))
    for at, phase in enumerate(PHASES):
        for axis, column in enumerate(columns):
            for row in range(len(_SUMS)):
                sums[row, at] += _along(column.sums_s[row, at], axis, shape)
            streamed[at] += _along(column.streamed_bytes[at], axis, shape)
            uses_gpu[at] |= _along(column.uses_gpu[at], axis, shape)
            is_split[at] |= _along(column.is_split[at], axis, shape)
        crossing = _crossings(prices, phase, columns[0], columns[1])
        sums[:, at] += crossing.reshape(*crossing.shape, *(1,) * (len(shape) - 2))
        if this.is_moe:
            sums[:, at] += _experts(prices, phase, columns[1], modules[2][1])
    for device in range(2):
        for axis, column in enumerate(columns):
            held[device] += _along(column.bytes[device], axis, shape)
    share = steps["decode"].num_second / wave.num_seqs
    moves = np.array([_kv_move_s(choice, kv_move_s, share) for choice in attention])
    move_s = np.zeros(shape) + _along(moves * num_waves, 0, shape)
    menu = Menu(
        choices=tuple(options for _, options in modules),
        states=np.arange(move_s.size),
        loads_s=_loads_s(sums.reshape(len(_SUMS), 2, -1), prices),
        move_s=move_s.ravel(),
        bytes=held.reshape(2, -1),
        streamed_bytes=streamed.reshape(2, -1),
        is_split=is_split.reshape(2, -1),
        uses_gpu=uses_gpu.reshape(2, -1),
    )
    # but for contradictions: experts on both devices whose router is on the CPU
    return menu.only(np.asarray((menu.loads_s[0] < _IMPOSSIBLE_S).all(axis=0)))


def _loads_s(sums: Floats, prices: _Prices) -> Floats:
    """The loads of `Menu` from sums of seconds.

    Let copies to the GPU take h seconds and the CPU's work c, and let both work at the same time
    for o seconds, in which each gets 1 / slowdown as much done. A step then takes at least

        chain + o (1 - 1 / slow_cpu)                        all work on the chain is in turn,
        h + o (1 - 1 / slow_copy)                           so are copies, and
        h + c - o (1 / slow_copy + 1 / slow_cpu - 1)        in all these seconds one of both works.

    The loads beside the chain and the copies are the mixes of the third with each of the others in
    which o cancels. Where the third rises with o, o = 0 is the least, and both mixes are h + c.

    Two sub-batches are not in turn, but what either lane does is: the CPU's lane is in the place of
    the chain. The GPU's lane is a load of its own, as is half of both paths.
    """
    chain_s, undisturbed_s, h2d_s, cpu_s, cpu_lane_s, gpu_lane_s = sums
    slow_copy, slow_cpu = prices.slowdowns
    of_copies = min(1.0, slow_copy * (1.0 - 1.0 / slow_cpu))
    of_cpu = min(1.0, slow_cpu * (1.0 - 1.0 / slow_copy))

    def beside_copies(in_turn_s: Floats) -> Floats:
        mixed_s: Floats = (1.0 - of_copies) * in_turn_s + of_copies * (h2d_s + cpu_s)
        return mixed_s

    copies_s = h2d_s + of_cpu * cpu_s
    found = np.stack([chain_s, beside_copies(undisturbed_s), copies_s, h2d_s])
    # Of two paths one is at least as long as half of both; here they are added up.
    paths_s = np.where(chain_s < _IMPOSSIBLE_S, undisturbed_s / 2, chain_s)
    in_two = np.stack([gpu_lane_s, beside_copies(cpu_lane_s), copies_s, paths_s])
    is_in_two = [prices.is_in_two(phase) for phase in PHASES]
    found[:, is_in_two] = in_two[:, is_in_two]
    return found


def ends_menu(spec: ModelSpec, steps: dict[Phase, PricedSteps], *, has_gpu: bool) -> Menu:
    """The embedding, and the head with what follows it, on either device."""
    prices = _Prices(spec, None, steps, has_gpu)
    options = (Choice(ON_GPU, ON_GPU), Choice(ON_CPU, ON_CPU)) if has_gpu else _NO_GPU
    count = len(options)
    before_s, after_s = (np.zeros((len(_SUMS), 2, count * count)) for _ in range(2))
    held = np.zeros((2, count, count))
    on_gpu = np.zeros((2, count, count), bool)
    for first, embedding in enumerate(options):
        for second, head in enumerate(options):
            at, state = (first, second), first * count + second
            for row, phase in enumerate(PHASES):
                embeds, heads = embedding[row].device, head[row].device
                embed: _OpSeconds = ("embed", embeds, prices.op(phase, "embed", embeds))
                before_s[:, row, state] = _in_turn(prices, phase, [embed])
                parts: list[_OpSeconds] = [
                    ("head", heads, prices.op(phase, "head", heads, module="head")),
                    ("sample", "cpu", prices.op(phase, "sample", "cpu")),
                ]
                if heads == "gpu":
                    parts.append(("copy", "d2h", prices.move(phase, "logits", "cpu")))
                after_s[:, row, state] = _in_turn(prices, phase, parts)
                on_gpu[row][at] = "gpu" in (embeds, heads)
            for row, device in enumerate(DEVICES):
                lives = [choice.decode.lives == device for choice in (embedding, head)]
                held[row][at] = lives[0] * spec.weight_bytes("embedding")
                held[row][at] += lives[1] * spec.weight_bytes("head")
                held[row][at] -= all(lives) * spec.tied_bytes
    num_states = count * count
    head_s = _loads_s(after_s, prices)
    for row, phase in enumerate(PHASES):
        if not prices.is_in_two(phase):
            # The head waits for all layers, and so for all copies: it is in turn with either.
            head_s[:, row] = after_s[_SUMS.index("chain"), row]
    return Menu(
        choices=(options, options),
        states=np.arange(num_states),
        loads_s=_loads_s(before_s, prices) + head_s,
        move_s=np.zeros(num_states),
        bytes=held.reshape(2, -1),
        streamed_bytes=np.zeros((2, num_states)),
        is_split=np.zeros((2, num_states), bool),
        uses_gpu=on_gpu.reshape(2, -1),
    )


def _in_turn(prices: _Prices, phase: Phase, parts: Sequence[_OpSeconds]) -> Floats:
    """Sums (`_SUMS`) of ops that run one after the other."""
    by_lane: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
    long_s = 0.0
    for kind, lane, seconds in parts:
        total_s = prices.total(phase, seconds)
        by_lane[lane] += total_s
        long_s += total_s if lane == "cpu" and kind in LONG_KINDS else 0.0
    chain_s = sum(by_lane.values())
    return np.array([chain_s, chain_s, by_lane["h2d"], long_s, by_lane["cpu"], by_lane["gpu"]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """One module's choices: what does not depend on the other modules'."""

    sums_s: Floats
    bytes: Floats
    streamed_bytes: Floats
    uses_gpu: Bools
    is_split: Bools
    on_gpu: Bools


def _columns(
    prices: _Prices,
    module: Module,
    options: tuple[Choice, ...],
    wave: Workload,
    chunk_tokens: int,
) -> _Columns:
    count, spec, layer = len(options), prices.spec, prices.layer
    assert layer is not None
    sums = np.zeros((len(_SUMS), 2, count))
    held, streamed = np.zeros((2, count)), np.zeros((2, count))
    on_gpu, uses_gpu = np.zeros((2, count), bool), np.zeros((2, count), bool)
    is_split = np.zeros((2, count), bool)
    for at, choice in enumerate(options):
        num_bytes, num_resident = spec.weight_bytes(module, layer), choice.prefill.num_resident
        parts = (0, num_bytes)
        if num_resident:
            parts = spec.part_bytes(module, layer, num_resident)
        elif choice.prefill.lives == "gpu":
            parts = (num_bytes, 0)
        held[:, at] = parts
        for index, device in enumerate(DEVICES):
            if module == "attention":
                held[index, at] += layer_kv_bytes(
                    spec,
                    wave,
                    layer,
                    device,
                    prefill=choice.kv("prefill"),
                    decode=choice.kv("decode"),
                    chunk_tokens=chunk_tokens,
                    num_second=prices.num_second,
                )
        for row, phase in enumerate(PHASES):
            where = choice[row]
            on_gpu[row, at] = where.device == "gpu"
            uses_gpu[row, at] = "gpu" in where.devices
            is_split[row, at] = where.runs == "split"
            if module == "attention":
                sums[:, row, at] += _attention(prices, phase, choice)
            elif module == "dense" and where.is_mixed:
                sums[:, row, at] += _divided_block(prices, phase, where)
            elif module != "experts":
                kind: OpKind = "router" if module == "router" else "dense"
                seconds = prices.op(phase, kind, where.device, module=module)
                sums[:, row, at] += _in_turn(prices, phase, [(kind, where.device, seconds)])
            if where.runs == "stream":
                copy_s = prices.stream(phase, module, where.num_resident)
                sums[_SUMS.index("h2d"), row, at] += prices.total(phase, copy_s)
                streamed[row, at] = parts[1]
    return _Columns(
        sums_s=sums,
        bytes=held,
        streamed_bytes=streamed,
        uses_gpu=uses_gpu,
        is_split=is_split,
        on_gpu=on_gpu,
    )


def _attention(prices: _Prices, phase: Phase, choice: Choice) -> Floats:
    """Sums of attention: of each sub-batch as its cache has it."""
    device, parts = choice[PHASES.index(phase)].device, list[_OpSeconds]()
    is_in_two = prices.is_in_two(phase)
    for number in (0, 1) if is_in_two else (0,):
        only = (number,) if is_in_two else (0, 1)
        if number == 0 and choice.kv(phase) == device:
            op = prices.op(phase, "attention", device, module="attention", sub_batches=only)
            parts.append(("attention", device, op))
            continue
        kinds: tuple[tuple[OpKind, Lane, Payload | None], ...] = (
            ("qkv", "gpu", None),
            ("copy", "d2h", "qkv"),
            ("attend", "cpu", None),
            ("copy", "h2d", "attended"),
            ("attention_output", "gpu", None),
        )
        for kind, lane, payload in kinds:
            op = prices.op(
                phase,
                kind,
                lane,
                module="attention" if lane == "gpu" else None,
                payload=payload,
                sub_batches=only,
            )
            parts.append((kind, lane, op))
    return _in_turn(prices, phase, parts)


def _crossings(prices: _Prices, phase: Phase, attention: _Columns, second: _Columns) -> Floats:
    """Sums of taking the hidden states from one to the other, (6, A, R)."""
    at = PHASES.index(phase)
    before, after = attention.on_gpu[at], second.on_gpu[at]
    found = np.zeros((len(_SUMS), len(before), len(after)))
    if not prices.has_gpu:
        return found
    up = _in_turn(prices, phase, [("copy", "h2d", prices.move(phase, "hidden", "gpu"))])
    down = _in_turn(prices, phase, [("copy", "d2h", prices.move(phase, "hidden", "cpu"))])
    found += up[:, None, None] * (~before[:, None] & after)
    found += down[:, None, None] * (before[:, None] & ~after)
    return found


def _experts(
    prices: _Prices, phase: Phase, router: _Columns, options: tuple[Choice, ...]
) -> Floats:
    """Sums from the router's end to the combined output, (6, 1, R, X)."""
    at = PHASES.index(phase)
    by_device: dict[bool, Floats] = {}
    for is_gpu in (True, False) if prices.has_gpu else (False,):
        device: Device = "gpu" if is_gpu else "cpu"
        places = dict.fromkeys(choice[at] for choice in options)
        found_by_place = {where: _expert_block(prices, phase, device, where) for where in places}
        by_device[is_gpu] = np.array([found_by_place[choice[at]] for choice in options])
    rows = np.array([by_device[bool(is_gpu)] for is_gpu in router.on_gpu[at]])
    found: Floats = np.moveaxis(rows, -1, 0)[:, None]
    return found


def _expert_block(prices: _Prices, phase: Phase, router: Device, where: ModulePlacement) -> Floats:
    """Sums of a layer's experts; more than any step takes where they cannot be so."""
    if where.is_mixed:
        if router == "cpu":
            return np.full(len(_SUMS), _IMPOSSIBLE_S)
        return _mixed_block(prices, phase, where)
    device = where.device
    parts: list[_OpSeconds] = [
        ("dispatch", device, prices.op(phase, "dispatch", device)),
        ("experts", device, prices.op(phase, "experts", device, module="experts")),
        ("combine", router, prices.op(phase, "combine", router)),
    ]
    if device != router:
        down: Payload = "routing" if router == "gpu" else "expert_output"
        up: Payload = "expert_output" if router == "gpu" else "routing"
        parts.append(("copy", "d2h", prices.move(phase, down, "cpu")))
        parts.append(("copy", "h2d", prices.move(phase, up, "gpu")))
    return _in_turn(prices, phase, parts)


def _mixed_block(prices: _Prices, phase: Phase, where: ModulePlacement) -> Floats:
    """The same of experts on both devices: the longest path to their sum."""
    part: Part = "rest" if where.runs == "split" else "missed"

    def experts(lane: Lane, part: Part) -> Floats:
        num = where.num_resident
        return prices.op(phase, "experts", lane, module="experts", part=part, num_resident=num)

    def dispatch(lane: Lane, part: Part) -> Floats:
        return prices.op(phase, "dispatch", lane, part=part, num_resident=where.num_resident)

    combine = prices.op(phase, "combine", "gpu")
    on_gpu = np.zeros_like(combine)
    if where.num_resident:
        on_gpu = dispatch("gpu", "resident") + experts("gpu", "resident")
    if where.runs == "stream":
        on_gpu = on_gpu + dispatch("gpu", "missed") + experts("gpu", "missed")
        return _in_turn(prices, phase, [("experts", "gpu", on_gpu + combine)])
    sort, work = dispatch("cpu", part), experts("cpu", part)
    routed = prices.move(phase, "routing", "cpu") + sort
    back = prices.move(phase, "expert_output", "gpu")
    fetch, fetched = np.zeros_like(combine), np.zeros_like(combine)
    if where.runs == "split":
        fetch = prices.stream(phase, "experts", where.num_resident, part="fetched")
        fetched = dispatch("gpu", "fetched") + experts("gpu", "fetched")

    def paths(fetch_end: Floats, work_end: Floats) -> tuple[Floats, Floats]:
        """To where the outputs are added up: past the CPU's work, and past all else."""
        gpu_end = on_gpu
        if where.runs == "split":
            gpu_end = np.maximum(on_gpu, routed + fetch_end) + fetched
        others = np.maximum(gpu_end, routed + fetch_end + back)
        return routed + work_end + back + combine, others + combine

    chain = np.maximum(*paths(*_side_by_side(fetch, work, prices.slowdowns)))
    past_work, others = paths(fetch, work)
    slow_copy, slow_cpu = prices.slowdowns
    if where.runs == "split" and slow_copy >= slow_cpu:
        # Copies beside the work delay the fetched experts as much as they delay the work.
        past_work = np.maximum(past_work, routed + fetch + np.maximum(fetched, back) + combine)
    # The CPU's work may become so much longer before it is on the longest path.
    undisturbed = np.maximum(past_work, others - (slow_cpu - 1.0) * work)
    lanes = (sort + work, on_gpu + fetched + combine)
    rows = (chain, undisturbed, fetch + back, work, *lanes)
    return np.array([prices.total(phase, row) for row in rows])


def _divided_block(prices: _Prices, phase: Phase, where: ModulePlacement) -> Floats:
    """The same of a dense feed-forward whose columns are divided."""

    def dense(lane: Lane, part: Part) -> Floats:
        num = where.num_resident
        return prices.op(phase, "dense", lane, module="dense", part=part, num_resident=num)

    combine, on_gpu = prices.op(phase, "combine", "gpu", module="dense"), dense("gpu", "resident")
    if where.runs == "stream":
        on_gpu = on_gpu + dense("gpu", "missed") + combine
        return _in_turn(prices, phase, [("dense", "gpu", on_gpu)])
    there, work = prices.move(phase, "dense_input", "cpu"), dense("cpu", "missed")
    back = prices.move(phase, "dense_output", "gpu")
    past_work, others = there + work + back + combine, on_gpu + combine
    chain = np.maximum(past_work, others)
    # The CPU's work may become so much longer before it is on the longest path.
    undisturbed = np.maximum(past_work, others - (prices.slowdowns[1] - 1.0) * work)
    rows = (chain, undisturbed, back, work, work, others)
    return np.array([prices.total(phase, row) for row in rows])


def _side_by_side(
    copy_s: Floats, cpu_s: Floats, slowdowns: tuple[float, float]
) -> tuple[Floats, Floats]:
    """When a copy and work of the CPU end that begin together and slow each other down.

    Where both together get less done than one after the other, a step might find an order in which
    they do not meet: then nothing is said of what they cost each other.
    """
    slow_copy, slow_cpu = slowdowns
    if 1.0 / slow_copy + 1.0 / slow_cpu < 1.0:
        return copy_s, cpu_s
    both_s = np.minimum(copy_s * slow_copy, cpu_s * slow_cpu)
    return (
        both_s + (copy_s - both_s / slow_copy),
        both_s + (cpu_s - both_s / slow_cpu),
    )


def _divided(spec: ModelSpec, layer: int, *, has_gpu: bool) -> tuple[Choice, ...]:
    """How many columns of a dense feed-forward are resident, and how the others run."""
    if not has_gpu:
        return ()
    counts = {
        spec.dense_columns(layer, count): count
        for count in range(DENSE_SHARES - 1, 0, -1)
        if spec.can_divide(layer, count)
    }
    return tuple(
        Choice(
            ModulePlacement(lives="cpu", runs=prefill, num_resident=count),
            ModulePlacement(lives="cpu", runs=decode, num_resident=count),
        )
        for count in sorted(counts.values())
        for prefill in _DIVIDED_RUNS
        for decode in _DIVIDED_RUNS
    )


def _expert_choices(
    num_experts: int, steps: dict[Phase, PricedSteps], *, has_gpu: bool
) -> tuple[Choice, ...]:
    """How many experts are resident, and how the others run in each phase."""
    if not has_gpu:
        return _NO_GPU
    runs: dict[Phase, tuple[Runs, ...]] = {
        phase: ("cpu", "stream", "split") if steps[phase].max_fetched else ("cpu", "stream")
        for phase in PHASES
    }
    counts = list(range(num_experts))
    if num_experts > _MAX_COUNTS:
        counts = sorted({round(at * num_experts / (_MAX_COUNTS - 1)) for at in range(_MAX_COUNTS)})
        counts = [count for count in counts if count < num_experts]
    return (
        Choice(ON_GPU, ON_GPU),
        *(
            Choice(
                ModulePlacement(lives="cpu", runs=prefill, num_resident=count),
                ModulePlacement(lives="cpu", runs=decode, num_resident=count),
            )
            for count in counts
            for prefill in runs["prefill"]
            for decode in runs["decode"]
        ),
    )


def _kv_move_s(choice: Choice, kv_move_s: Callable[[Lane], float], share: float) -> float:
    """Seconds of taking the caches to where decode wants them, a share of them to the CPU."""
    before, after = choice.kv("prefill"), choice.kv("decode")
    found = share * kv_move_s("d2h") if share and before == "gpu" else 0.0
    if before != after:
        found += (1.0 - share) * kv_move_s("h2d" if after == "gpu" else "d2h")
    return found


def _along(column: NDArray[Any], axis: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """A column of one module, to be added along its axis."""
    return column.reshape([-1 if at == axis else 1 for at in range(len(shape))])
