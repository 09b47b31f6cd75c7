"""Speed of light: the least seconds that a device's ceilings allow for a call of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from planner.device import DeviceProfile
from planner.errors import ProfileError
from planner.kernels import KernelCall, Resource

# Elements of norms and the like that a device without a measured rate goes over: one for so many
# bytes of its memory's rate, though most of them lie in caches.
_BYTES_PER_ELEMENT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOfLight:
    """The least seconds of a call by the resources that it needs at the same time."""

    parts: dict[Resource, float]

    @property
    def resource(self) -> Resource:
        """The resource that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        return max(self.parts.values())


def speed_of_light(call: KernelCall, device: DeviceProfile) -> SpeedOfLight:
    """max(FLOPs / their rate, bytes / read rate, weights / the rate of unpacking them).

    Kernels that go over an array once count elements instead; one that has no work of these kinds
    (`op`, `step`) takes a nanosecond, so that its seconds can be interpolated like the others.

    Raises
    ------
    ProfileError
        The device has no rate for products of this format.
    """
    if call.num_elements:
        rate = device.elements_per_s or device.read_bytes_per_s / _BYTES_PER_ELEMENT
        return SpeedOfLight(parts={"memory": call.num_elements / rate})
    memory: Resource = "link" if call.kernel == "copy" else "memory"
    parts: dict[Resource, float] = {memory: call.bytes / device.read_bytes_per_s}
    flops = call.flops
    if flops:
        flop_per_s = device.flop_per_s.get(call.format)
        if flop_per_s is None:
            raise ProfileError(
                f"the profile of {device.name} has no rates for {call.format}; "
                "measure again with: hetero profile"
            )
        parts["compute"] = flops / flop_per_s
    dequant_per_s = device.dequant_per_s.get(call.format)
    if dequant_per_s is not None:
        parts["dequant"] = call.num_weights / dequant_per_s
    if not any(parts.values()):
        return SpeedOfLight(parts={"launch": 1e-9})
    return SpeedOfLight(parts=parts)
