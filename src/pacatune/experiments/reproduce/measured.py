"""One number of ours, with its spread and where it comes from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Measured", "Origin"]

Origin = Literal["simulated", "counted", "measured"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number and the interval it lies in; equal ends where it is exact."""

    value: float
    low: float
    high: float
    origin: Origin
    """simulated: by `pacatune estimate`; counted: exactly, of the real step; measured: here."""
    note: str = ""
    """What a reader must know about this one number."""

    @classmethod
    def exact(cls, value: float, origin: Origin, note: str = "") -> "Measured":
        """Return a number without spread."""
        return cls(value=value, low=value, high=value, origin=origin, note=note)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measured":
        """Return the number that `to_dict` wrote."""
        return cls(**values)
