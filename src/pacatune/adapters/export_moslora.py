"""A MosLoRA adapter as LoRA: B M in place of B."""

import math
import re
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad

from pacatune.adapters.folder import LoraAdapter, find_tensors, module_rank, pattern_value
from pacatune.adapters.target import target_of_module
from pacatune.files.tensor_file import read_tensors
from pacatune.format.tensors import PEFT_PREFIX

_PARTS = "lora_B.weight", "lora_mixer.weight", "lora_A.weight", "lora_B.bias"
_B, _MIXER, _A, _BIAS = _PARTS
_PART = re.compile(r"(.*)\.lora_(A|B|mixer)\.weight")


@dataclass(frozen=True, kw_only=True)
class FoldedAdapter(LoraAdapter):
    """A MosLoRA adapter whose mixers are folded into B."""

    modules: dict[str, dict[str, Tensor]]
    """A, B and, where there is one, B's bias of each module, in float64."""
    extra: dict[str, Tensor]
    """All other tensors of the file by their name there."""

    def scaling(self, module: str) -> float:
        """Return alpha / rank of one module, or alpha / sqrt(rank)."""
        alpha = float(pattern_value(self.config.alpha_pattern, module, self.config.lora_alpha))
        rank = module_rank(self.config, module)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def check_base(self, base: nn.Module) -> list[str]:
        """Refuse a base without the adapted modules, or with other sizes; return notes."""
        for name, parts in self.modules.items():
            sizes = len(parts[_B]), parts[_A].shape[1]
            if (shape := target_of_module(base, name).layout.file_shape) != sizes:
                raise ValueError(
                    f"{self.folder}: module {name!r} has an update of {sizes}, but the base has "
                    f"{shape}; it was trained on another base."
                )
        return ["the mixer of each module is folded into its B; training cannot be resumed here."]

    def factors(self, module: str, times: float, rank: int) -> dict[str, Tensor]:
        """Return the factors of one module by their names, B multiplied and both of a rank."""
        parts = self.modules[module]
        missing = rank - len(parts[_A])
        filled = {_A: pad(parts[_A], (0, 0, 0, missing)), _B: pad(parts[_B], (0, missing)) * times}
        if _BIAS in parts:
            filled[_BIAS] = parts[_BIAS] * times
        return {f"{module}.{part}": factor for part, factor in filled.items()}


def fold_mixers(adapter: LoraAdapter) -> FoldedAdapter:
    """Read the tensors of a MosLoRA adapter and multiply each B by its mixer."""
    extra = read_tensors(find_tensors(adapter.folder))
    if not any(key.endswith(f".{_MIXER}") for key in extra):
        raise ValueError(
            f"{adapter.folder} holds no `lora_mixer`; save the adapter again. Only PaCA and "
            "MosLoRA become LoRA; what is LoRA already needs no export."
        )
    modules = {}
    for name in dict.fromkeys(found[1] for key in extra if (found := _PART.fullmatch(key))):
        module = name.removeprefix(PEFT_PREFIX)
        rank = module_rank(adapter.config, module)
        parts = {part: extra.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in extra}
        b, mixer, a = (tuple(parts[part].shape) if part in parts else () for part in _PARTS[:3])
        if (b, mixer, a) != ((*b[:1], rank), (rank, rank), (rank, *a[-1:])):
            raise ValueError(
                f"{adapter.folder}: module {module!r} must have lora_B (O, {rank}), lora_mixer "
                f"({rank}, {rank}) and lora_A ({rank}, I), and has {b}, {mixer} and {a}; the file "
                "is incomplete or of another run."
            )
        exact = {part: tensor.double() for part, tensor in parts.items()}
        exact[_B] = exact[_B] @ exact.pop(_MIXER)
        modules[module] = exact
    return FoldedAdapter(**vars(adapter), modules=modules, extra=extra)
