"""Figure 2: operations and time of a step. Its bars are unreadable; what the text says is here."""

from dataclasses import dataclass
from typing import Literal

TITLE = "Operations and time of a training step"
PLACE = "Figure 2, sections 2 and 3.1; settings in Table 8"
METHODS = ("full", "lora", "paca")

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the text: one quantity as a share of another."""

    quantity: Literal["operations", "time"]
    what: tuple[str, Phase]
    """Method and phase."""
    of: tuple[str, Phase]
    ratio: float
    margin: float
    """How far from the ratio a measurement still says the same: what the words leave open."""
    quote: str
    section: str

    @property
    def key(self) -> str:
        """A unique name."""
        (method, phase), (of_method, of_phase) = self.what, self.of
        if method == of_method:
            return f"{self.quantity}-{method}-{phase}-{of_phase}"
        suffix = "" if phase == "step" else f"-{phase}"
        return f"{self.quantity}-{method}-{of_method}{suffix}"


CLAIMS = (
    Claim(
        quantity="operations",
        what=("lora", "step"),
        of=("full", "step"),
        ratio=0.67,
        margin=0.03,
        quote="the operation count of LoRA is approximately 33% lower than Full-FT",
        section="2",
    ),
    Claim(
        quantity="operations",
        what=("lora", "forward"),
        of=("full", "forward"),
        ratio=1.0,
        margin=0.03,
        quote="despite requiring a similar number of operations (of the forward propagation)",
        section="2",
    ),
    Claim(
        quantity="operations",
        what=("paca", "backward"),
        of=("paca", "forward"),
        ratio=1.0,
        margin=0.03,
        quote="the FLOPs required for forward and backward propagation in PaCA are nearly "
        "identical",
        section="3.1",
    ),
    Claim(
        quantity="time",
        what=("lora", "step"),
        of=("full", "step"),
        ratio=0.994,
        margin=0.03,
        quote="the saving in actual training time is only 0.6%",
        section="2",
    ),
    Claim(
        quantity="time",
        what=("lora", "forward"),
        of=("full", "forward"),
        ratio=1.33,
        margin=0.05,
        quote="the time required for forward propagation in LoRA increased by 33% compared to "
        "Full-FT",
        section="2",
    ),
    Claim(
        quantity="time",
        what=("paca", "step"),
        of=("lora", "step"),
        ratio=0.81,
        margin=0.05,
        quote="PaCA provides a 19% reduction in total training time compared to LoRA",
        section="3.1",
    ),
    Claim(
        quantity="time",
        what=("paca", "forward"),
        of=("lora", "forward"),
        ratio=0.82,
        margin=0.05,
        quote="by reducing forward propagation time by 18%",
        section="3.1",
    ),
    Claim(
        quantity="time",
        what=("paca", "backward"),
        of=("lora", "backward"),
        ratio=0.8,
        margin=0.05,
        quote="and backward propagation time by 20%",
        section="3.1",
    ),
    Claim(
        quantity="time",
        what=("paca", "backward"),
        of=("paca", "forward"),
        ratio=1.17,
        margin=0.05,
        quote="the actual runtime for backward propagation is 17% longer than forward propagation",
        section="3.1",
    ),
)
