"""What kernels reach of the speed of light where nothing was measured, with the range of that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.device import DeviceKind
from planner.kernels import Kernel, Resource
from planner.model_spec import WeightKind

# A normal distribution has a tenth of its mass above so many standard deviations.
P90_SIGMAS = 1.2816


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """A share of the speed of light: the middle, the 10th and the 90th percentile."""

    utilisation: float
    low: float
    high: float

    @property
    def sigma(self) -> float:
        """Standard deviation of its logarithm, as if that were normal."""
        return math.log(self.high / self.low) / (2 * P90_SIGMAS)


# Published measurements. On GPUs: large reads 0.70-0.85 of nominal bandwidth and products of one
# token 0.69 in bfloat16 (gpt-fast on an A100), less where weights are unpacked; products of many
# tokens by aiconfigurator's tables; attention of decode by FlashInfer's and vLLM's figures, of
# prefill by FlashAttention's. On CPUs: STREAM reads 0.80-0.87 of nominal bandwidth, kernels that
# unpack less; products of many tokens of oneDNN.
_GPU_MEMORY: dict[WeightKind, Prior] = {
    "float32": Prior(utilisation=0.72, low=0.60, high=0.85),
    "bfloat16": Prior(utilisation=0.69, low=0.55, high=0.85),
    "float16": Prior(utilisation=0.69, low=0.55, high=0.85),
    "int8": Prior(utilisation=0.58, low=0.45, high=0.75),
    "int4": Prior(utilisation=0.48, low=0.35, high=0.65),
}
_GPU_COMPUTE: dict[WeightKind, Prior] = {
    "float32": Prior(utilisation=0.70, low=0.55, high=0.85),
    "bfloat16": Prior(utilisation=0.70, low=0.55, high=0.79),
    "float16": Prior(utilisation=0.70, low=0.55, high=0.79),
    "int8": Prior(utilisation=0.55, low=0.40, high=0.68),
    "int4": Prior(utilisation=0.45, low=0.32, high=0.58),
}
_CPU_MEMORY: dict[WeightKind, Prior] = {
    "float32": Prior(utilisation=0.76, low=0.62, high=0.87),
    "bfloat16": Prior(utilisation=0.74, low=0.60, high=0.86),
    "float16": Prior(utilisation=0.60, low=0.35, high=0.80),
    "int8": Prior(utilisation=0.70, low=0.55, high=0.84),
    "int4": Prior(utilisation=0.60, low=0.42, high=0.78),
}
_CPU_COMPUTE = Prior(utilisation=0.55, low=0.35, high=0.80)
_ATTENTION: dict[tuple[Kernel, bool], Prior] = {
    ("decode_attention", True): Prior(utilisation=0.55, low=0.42, high=0.75),
    ("prefill_attention", True): Prior(utilisation=0.50, low=0.30, high=0.70),
    ("decode_attention", False): Prior(utilisation=0.60, low=0.40, high=0.78),
    ("prefill_attention", False): Prior(utilisation=0.30, low=0.15, high=0.55),
}
_READ = Prior(utilisation=0.80, low=0.70, high=0.88)
_COPY = Prior(utilisation=0.91, low=0.85, high=0.98)
_ELEMENTS = Prior(utilisation=0.5, low=0.2, high=1.0)
# An expert's matrices are short reads: on a GPU half of the rate is reached at so many bytes.
GPU_HALF_RATE_BYTES = 2e6

# Python beside the kernels of an op and of a step, in operations of torch, which are Python too.
OP_LAUNCHES = Prior(utilisation=6.0, low=2.0, high=15.0)
STEP_LAUNCHES = Prior(utilisation=210.0, low=80.0, high=400.0)
EMBED_LAUNCHES = Prior(utilisation=24.0, low=10.0, high=60.0)
# Seconds of an event that one lane waits for another by: 5-20 us published for host polling.
HANDOVER_S = Prior(utilisation=10e-6, low=5e-6, high=20e-6)


def prior(kernel: Kernel, resource: Resource, kind: DeviceKind, weights: WeightKind) -> Prior:
    """What a kernel reaches of a device's speed of light, by the resource that bounds it.

    The emulated accelerator is a CPU. A device that unpacks weights as fast as its ceiling says
    reaches as much of that as of its memory's rate.
    """
    is_gpu = kind == "cuda"
    if kernel == "read":
        return _READ
    if kernel == "copy":
        return _COPY
    if kernel in ("decode_attention", "prefill_attention"):
        return _ATTENTION[kernel, is_gpu]
    if kernel not in ("linear", "experts"):
        return _ELEMENTS
    if resource == "compute":
        return _GPU_COMPUTE[weights] if is_gpu else _CPU_COMPUTE
    return (_GPU_MEMORY if is_gpu else _CPU_MEMORY)[weights]
