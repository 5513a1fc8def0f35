"""Figure 2: operations and time of a step. Its bars are unreadable; what the text says is here."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CLAIMS", "METHODS", "PLACE", "TITLE", "Claim", "Phase"]

TITLE = "Operations and time of a training step"
PLACE = "Figure 2, sections 2 and 3.1; settings in Table 8"
METHODS = ("full", "lora", "paca")

Phase = Literal["forward", "backward", "step"]
Quantity = Literal["operations", "time"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the text: one quantity as a share of another."""

    key: str
    quantity: Quantity
    method: str
    phase: Phase
    of_method: str
    of_phase: Phase
    ratio: float
    margin: float
    """How far from the ratio a measurement still says the same: what the words leave open."""
    quote: str
    section: str


def _claim(
    key: str, quantity: Quantity, what: tuple[str, Phase], of: tuple[str, Phase], **rest: object
) -> Claim:
    (method, phase), (of_method, of_phase) = what, of
    return Claim(
        key=key,
        quantity=quantity,
        method=method,
        phase=phase,
        of_method=of_method,
        of_phase=of_phase,
        **rest,  # type: ignore[arg-type]
    )


CLAIMS = (
    _claim(
        "operations-lora-full",
        "operations",
        ("lora", "step"),
        ("full", "step"),
        ratio=0.67,
        margin=0.03,
        quote="the operation count of LoRA is approximately 33% lower than Full-FT",
        section="2",
    ),
    _claim(
        "operations-lora-full-forward",
        "operations",
        ("lora", "forward"),
        ("full", "forward"),
        ratio=1.0,
        margin=0.03,
        quote="despite requiring a similar number of operations (of the forward propagation)",
        section="2",
    ),
    _claim(
        "operations-paca-backward-forward",
        "operations",
        ("paca", "backward"),
        ("paca", "forward"),
        ratio=1.0,
        margin=0.03,
        quote="the FLOPs required for forward and backward propagation in PaCA are nearly "
        "identical",
        section="3.1",
    ),
    _claim(
        "time-lora-full",
        "time",
        ("lora", "step"),
        ("full", "step"),
        ratio=0.994,
        margin=0.03,
        quote="the saving in actual training time is only 0.6%",
        section="2",
    ),
    _claim(
        "time-lora-full-forward",
        "time",
        ("lora", "forward"),
        ("full", "forward"),
        ratio=1.33,
        margin=0.05,
        quote="the time required for forward propagation in LoRA increased by 33% compared to "
        "Full-FT",
        section="2",
    ),
    _claim(
        "time-paca-lora",
        "time",
        ("paca", "step"),
        ("lora", "step"),
        ratio=0.81,
        margin=0.05,
        quote="PaCA provides a 19% reduction in total training time compared to LoRA",
        section="3.1",
    ),
    _claim(
        "time-paca-lora-forward",
        "time",
        ("paca", "forward"),
        ("lora", "forward"),
        ratio=0.82,
        margin=0.05,
        quote="by reducing forward propagation time by 18%",
        section="3.1",
    ),
    _claim(
        "time-paca-lora-backward",
        "time",
        ("paca", "backward"),
        ("lora", "backward"),
        ratio=0.80,
        margin=0.05,
        quote="and backward propagation time by 20%",
        section="3.1",
    ),
    _claim(
        "time-paca-backward-forward",
        "time",
        ("paca", "backward"),
        ("paca", "forward"),
        ratio=1.17,
        margin=0.05,
        quote="the actual runtime for backward propagation is 17% longer than forward propagation",
        section="3.1",
    ),
)
