"""Answers "will it fit?": the simulated peak, what is uncertain about it, and the largest size."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pacatune.measure.setting import Setting
from pacatune.measure.simulate import FakeTraining, Measured
from pacatune.measure.tracker import Category
from pacatune.names import choose
from pacatune.reports.rows import Row

Quantity = Literal["seq_len", "batch_size", "rank"]

# Outside PyTorch's allocator: the CUDA context, the code of kernels, the workspaces of cuBLAS. An
# idle process with PyTorch's kernels loaded shows some 0.4 GiB on an A100 and 0.6 on an H100.
_CONTEXT_BYTES = (int(0.4 * 2**30), int(0.7 * 2**30))
# Share of what comes and goes within a step that the allocator holds beyond it: it rounds blocks up
# to 512 bytes or 2 MiB, keeps gaps between them, and what it has cached. No GPU was measured here:
# the upper end is what the paper's Table 1 needs, whose LLaMA2-7B with PaCA is 0.20 of it above the
# simulated peak and the largest context. What stays for the whole run is allocated once.
_FRAGMENTATION = (0.0, 0.2)
_STATIC: tuple[Category, ...] = ("weights", "adapter", "optimizer", "gathered")

_LIMITS: dict[Quantity, tuple[int, int]] = {"seq_len": (2, 2**24), "batch_size": (1, 2**20)}


@dataclass(frozen=True)
class Estimate:
    """The memory of one setting on one device, in bytes."""

    setting: Setting
    measured: Measured

    @property
    def peak_bytes(self) -> int:
        """Most that tensors take at once; what `torch.cuda.max_memory_allocated` would show."""
        return self.measured.peak_bytes

    @property
    def low_bytes(self) -> int:
        """Least that the device needs: the peak and a small CUDA context."""
        return self._device_bytes(0)

    @property
    def high_bytes(self) -> int:
        """Most that the device should need: a large context, and gaps between blocks."""
        return self._device_bytes(1)

    def _device_bytes(self, end: int) -> int:
        by_category = self.measured.by_category
        moving = sum(number for name, number in by_category.items() if name not in _STATIC)
        return self.peak_bytes + _CONTEXT_BYTES[end] + int(moving * _FRAGMENTATION[end])

    def fits(self, available_bytes: int) -> Literal["yes", "perhaps", "no"]:
        """Say whether a device with this much memory is enough, for the whole spread."""
        if self.high_bytes <= available_bytes:
            return "yes"
        return "perhaps" if self.low_bytes <= available_bytes else "no"

    def rows(self, method: str) -> list[Row]:
        """Return the parts of the peak, their sum, and what a device needs, in GiB."""
        parts: dict[str, int] = dict(self.measured.by_category.items())
        parts["peak"] = self.peak_bytes
        parts |= {"a device needs": self.low_bytes, "or as much as": self.high_bytes}
        names: dict[str, Any] = {"what": "memory", "method": method, "model": self.setting.model}
        return [
            Row(setting=part, value=number / 2**30, unit="GiB", origin="simulated", **names)
            for part, number in parts.items()
        ]

    def to_values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "by_category": dict(self.measured.by_category),
            "peak_phase": self.measured.phase,
            "saved_bytes": self.measured.saved_bytes,
            "saved_by_module": self.measured.saved_by_module,
            "device_bytes": {"low": self.low_bytes, "high": self.high_bytes},
            "setting": asdict(self.setting),
            "notes": self.measured.notes,
        }


def estimate_memory(setting: Setting) -> Estimate:
    """Estimate what one device holds in a training step of a setting.

    Runs the step of the model's own class on tensors without memory: seconds, on any machine.

    Raises:
        FileNotFoundError, ValueError: If the model or the options do not exist.
    """
    return Estimate(setting, FakeTraining(setting).step(setting.batch_size, setting.seq_len))


def find_max(
    setting: Setting, quantity: Quantity, available_bytes: int
) -> tuple[int, Estimate | None]:
    """Find the largest sequence length, batch or rank that fits with the whole spread.

    The setting's own value of the quantity is not used. Returns the number and its estimate, 0 and
    None if nothing fits.

    Raises:
        ValueError: If the quantity is unknown, or full training is asked for its rank.
    """
    choose(quantity, get_args(Quantity), option="quantity")
    if quantity == "rank" and not setting.row.has_adapter:
        raise ValueError("`method` ('full') has no rank; look for seq_len or batch_size.")
    # The first model also knows the largest rank.
    training = FakeTraining(setting.but(rank=1) if quantity == "rank" else setting)
    low, high = (1, training.max_rank()) if quantity == "rank" else _LIMITS[quantity]

    @functools.cache
    def estimate(number: int) -> Estimate:
        changed = setting.but(**{quantity: number})
        step = FakeTraining(changed) if quantity == "rank" and number > 1 else training
        return Estimate(changed, step.step(changed.batch_size, changed.seq_len))

    def room(number: int) -> int:
        return available_bytes - estimate(number).high_bytes

    found = _last_with_room(room, low, high)
    return (found, estimate(found)) if found else (0, None)


def _last_with_room(room: Callable[[int], int], low: int, high: int) -> int:
    """Return the largest number in [low, high] with room(number) >= 0, 0 if there is none.

    `room` falls, nearly in a straight line: where the line through both ends meets zero is tried
    first, then its neighbour, which often ends the search; then the middle, which bounds it.
    """
    if room(low) < 0:
        return 0
    beyond = min(high, low * 512)
    while room(beyond) >= 0:
        if beyond == high:
            return high
        low, beyond = beyond, min(high, beyond * 8)
    while beyond - low > 1:
        share = room(low) / (room(low) - room(beyond))
        guess = low + int((beyond - low) * share)
        for number in (guess, guess + 1, (low + beyond) // 2):
            if not low < number < beyond:
                continue
            if room(number) >= 0:
                low = number
            else:
                beyond = number
    return low
