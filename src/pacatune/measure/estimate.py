"""Answers "will it fit?": the simulated peak, what is uncertain about it, and the largest size."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

from pacatune.measure.setting import Setting
from pacatune.measure.simulate import Estimate, FakeTraining
from pacatune.names import choose

Quantity = Literal["seq_len", "batch_size", "rank"]
_LIMITS: dict[Quantity, tuple[int, int]] = {"seq_len": (2, 2**24), "batch_size": (1, 2**20)}


def estimate_memory(setting: Setting) -> Estimate:
    """Estimate what one device holds in a training step of a setting.

    Runs the step of the model's own class on tensors without memory: seconds, on any machine.

    Args:
        setting: Model, method, sizes and options of the step.

    Returns:
        The peak in bytes, what it consists of, and the range that a device needs.

    Raises:
        FileNotFoundError, ValueError: If the model or the options do not exist.
    """
    return FakeTraining(setting).step(setting.batch_size, setting.seq_len)


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
        return step.step(changed.batch_size, changed.seq_len)

    def room(number: int) -> int:
        return available_bytes - estimate(number).high_bytes

    largest = _last_with_room(room, low, high)
    return (largest, estimate(largest)) if largest else (0, None)


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
