"""Which form each adapted layer of a model trains in, and why: nobody should have to guess."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pacatune.tuner.layer import PacaLayer


@dataclass(kw_only=True)
class ResidencyReport:
    """What `residency_report` found."""

    resident: list[str] = field(default_factory=list)
    """Names of the layers whose columns stand in the base weight: one product and no more."""
    additive: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names of the layers that add the product of their columns to the weight's."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"resident: {len(self.resident)} layers"]
        for reason, names in self.additive.items():
            more = f" and {len(names) - 1} more" if names[1:] else ""
            lines.append(f"not resident: {names[0]}{more}: {reason}")
        return "\n".join(lines)


def residency_report(model: nn.Module) -> ResidencyReport:
    """Tell in which form each adapted layer would train now, without running or changing anything.

    Resident: the columns are written into the weight once per optimizer step (in a compiled graph,
    too; under FSDP2 into the weight that it gathers), and a pass is one product. Additive: the
    weight is left alone, and the product of the columns is added. Both give the same results.

    Args:
        model: With PaCA layers anywhere in it; other layers are not mentioned.

    Returns:
        Names of the resident layers, and of the others by reason.

    Raises:
        TypeError: If `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a torch.nn.Module.")
    report = ResidencyReport()
    for name, module in model.named_modules():
        if isinstance(module, PacaLayer):
            reason = module.why_additive()
            found = report.resident if reason is None else report.additive.setdefault(reason, [])
            found.append(name)
    return report
