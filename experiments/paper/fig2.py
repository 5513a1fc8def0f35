"""Figure 2: operations and time of a step. Its bars are unreadable; what the text says is here."""

from pacatune.reports.rows import Row

TITLE = "Operations and time of a training step"
PLACE = "Figure 2, sections 2 and 3.1; settings in Table 8"
METHODS = ("full", "lora", "paca")

PHASES = {
    "step": "of a step",
    "forward": "of the forward pass",
    "backward": "of the backward pass",
    "backward / forward": "of the backward pass, as a share of the forward pass's",
}
# Quantity, phase, methods, ratio, words, section.
_STATED = (
    (
        "operations",
        "step",
        "LoRA / Full-FT",
        0.67,
        "the operation count of LoRA is approximately 33% lower than Full-FT",
        "2",
    ),
    (
        "operations",
        "forward",
        "LoRA / Full-FT",
        1.0,
        "despite requiring a similar number of operations",
        "2",
    ),
    (
        "operations",
        "backward / forward",
        "PaCA",
        1.0,
        "the FLOPs required for forward and backward propagation in PaCA are nearly identical",
        "3.1",
    ),
    (
        "time",
        "step",
        "LoRA / Full-FT",
        0.994,
        "the saving in actual training time is only 0.6%",
        "2",
    ),
    (
        "time",
        "forward",
        "LoRA / Full-FT",
        1.33,
        "the time required for forward propagation in LoRA increased by 33% compared to Full-FT",
        "2",
    ),
    (
        "time",
        "step",
        "PaCA / LoRA",
        0.81,
        "PaCA provides a 19% reduction in total training time compared to LoRA",
        "3.1",
    ),
    ("time", "forward", "PaCA / LoRA", 0.82, "by reducing forward propagation time by 18%", "3.1"),
    ("time", "backward", "PaCA / LoRA", 0.8, "and backward propagation time by 20%", "3.1"),
    (
        "time",
        "backward / forward",
        "PaCA",
        1.17,
        "the actual runtime for backward propagation is 17% longer than forward propagation",
        "3.1",
    ),
)
CLAIMS = tuple(
    Row(
        what=f"{what} {PHASES[phase]}",
        method=methods,
        value=ratio,
        unit="ratio",
        model="llama3-8b",
        origin="paper",
        note=f"Section {section}: '{words}'.",
    )
    for what, phase, methods, ratio, words, section in _STATED
)
"""Statements of the text: a quantity of a step, or of a phase of it, as a share of another."""
