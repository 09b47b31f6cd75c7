"""Typed access to an untrusted config.json: every value in bounds, every failure names its key."""

from __future__ import annotations

from typing import Any

from planner.errors import ModelSpecError

_MAX_INTEGER = 1 << 20
_MAX_NUMBER = 1e30


def shown(value: object) -> str:
    """An untrusted value for a message: short, on one line, without control characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigReader:
    """Reads the values of a decoded config.json."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def integer(self, *keys: str, default: int | None = None, limit: int = _MAX_INTEGER) -> int:
        """A whole number in 1..limit under the first of `keys` that is set."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ModelSpecError(
                    f"config.json: {key} is {shown(value)} but must be a whole number"
                )
            if not 1 <= value <= limit:
                raise ModelSpecError(
                    f"config.json: {key} is {shown(value)} but must be in 1..{limit}"
                )
            return value
        if default is None:
            raise ModelSpecError(f"config.json: {' or '.join(keys)} is missing")
        return default

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelSpecError(f"config.json: {key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelSpecError(f"config.json: {key} is {shown(value)} but must be a number")
        if not 0 < value <= _MAX_NUMBER:  # a NaN compares false
            raise ModelSpecError(
                f"config.json: {key} is {shown(value)} but must be positive and at most 1e30"
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelSpecError(f"config.json: {key} is {shown(value)} but must be true or false")
        return value

    def strings(self, key: str) -> list[str] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelSpecError(
                f"config.json: {key} is {shown(value)} but must be a list of strings"
            )
        return value

    def layer_indices(self, key: str) -> list[int]:
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise ModelSpecError(
                f"config.json: {key} is {shown(value)} but must be a list of layer numbers"
            )
        return value

    def section(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ModelSpecError(f"config.json: {key} is {shown(value)} but must be an object")
        return value
