"""From an adapter to an edit of codes: what is trained in a file of few bits goes back into it.

Of each trained column the codes are changed; scales, minima and every other byte are the file's. An
element whose update is less than half a step keeps its code, since steps are counted from the code
that is there and not from a value that was rounded to 16 bits.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pacatune.adapters.base import find_tokenizer, load_base
from pacatune.adapters.folder import Adapter, LoraAdapter, open_adapter
from pacatune.adapters.loading import attach, check_base
from pacatune.adapters.target import target_of_module
from pacatune.grid.checkpoint import FileColumns, PackedCheckpoint
from pacatune.grid.columns import WeightColumns
from pacatune.patch.base import open_checkpoint, patch_of
from pacatune.patch.edit import Patch
from pacatune.patch.folder import apply_to_folder, check_new
from pacatune.residency import resident

_TEXT = "The capital of France is Paris. In 1889, 41 metres (134 ft) remained to be built."
_NOTABLE = 0.1
"""Share of what training gained that may be lost in writing without a warning."""
_ADVICE = (
    "Where few moved, train with a higher learning rate or a lower `r` of the same alpha; where "
    "many lie at the end, with a lower rate"
)


@dataclass(kw_only=True)
class Rounding:
    """What writing an adapter as codes did."""

    num_codes: int = 0
    """Codes of the trained columns."""
    num_moved: int = 0
    """Those that changed."""
    num_clipped: int = 0
    """Those that their block's range has cut off."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How near what was written is to what was trained."""

    error: float
    """How far outputs on a text (random tokens, where there is no tokenizer) are from the trained
    model's, as a root mean square."""
    effect: float
    """How far the trained model's are from the base's."""
    losses: list[float]
    """Base, trained model and what was written; empty where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class PackedResult:
    """What `merge_packed` wrote, and how it was verified."""

    output: Path
    """The file or folder."""
    formats: dict[str, int]
    """How many tensors of each format have other codes, or other numbers."""
    num_bytes: int
    """Size of all its tensors' files."""
    rounding: Rounding
    verified: Verified | None
    """None if it was not."""
    notes: list[str]
    """What the user should know."""


def _open_paca(adapter: str | Path) -> Adapter:
    checked = open_adapter(adapter)
    if isinstance(checked, LoraAdapter):
        raise ValueError(
            f"{checked.folder} is a LoRA adapter, which changes every element of a weight, and "
            "most by less than a step of a quantised one; codes take PaCA's columns alone. "
            "`--base dequantized` writes a model in 16 bits."
        )
    return checked


def open_packed(model: str | Path) -> PackedCheckpoint:
    """Open a model whose weights are codes; a ValueError if it is none."""
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, PackedCheckpoint):
        raise ValueError(f"{model} holds plain numbers and no codes; merge it by `merge`.")
    return checkpoint


def make_packed(
    base: nn.Module, checkpoint: PackedCheckpoint, adapter: Adapter
) -> tuple[Patch, Rounding]:
    """Make the patch that writes an adapter's columns into a quantised checkpoint, as codes.

    Args:
        base: Its model, as transformers dequantises it.
        checkpoint: The GGUF file or the folder.
        adapter: A PaCA adapter that was trained on this model.

    Returns:
        The patch, and what rounding to codes did.

    Raises:
        ValueError: If the adapter trains more than columns, or a trained weight is not in the file
            as the model has it, or in a format whose codes cannot be trained.
    """
    if adapter.extra:
        raise ValueError(
            f"{adapter.folder} also trains what are no columns, first {next(iter(adapter.extra))!r}"
            "; codes are those of columns alone."
        )
    rounding = Rounding()
    changes = [_change(base, checkpoint, adapter, name, rounding) for name in adapter.modules]
    return patch_of(checkpoint, changes, base=Path(checkpoint.title).name), rounding


def merge_packed(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    verify: bool = True,
    measure: Callable[[nn.Module, str], float] | None = None,
    warn: Callable[[str], object] = warnings.warn,
    allow_other_base: bool = False,
) -> PackedResult:
    """Write an adapter into a copy of the file or folder of codes that it was trained in.

    Args:
        model: The GGUF file, or the folder.
        adapter: Folder or hub id of a PaCA adapter.
        output: A new .gguf file, or a new folder.
        device: Where to compute.
        verify: Load what was written, and compare its outputs with the trained model's.
        measure: The loss of a model on held-out data, which is compared then, too; it also gets a
            word that says which model it is.
        warn: Gets one line before anything is written under `output`, if rounding takes more than a
            tenth of what training gained of that loss.
        allow_other_base: Go on although the file is not the one the adapter was trained in.

    Raises:
        FileExistsError: If there is something under that name.
        ValueError: If the adapter is not PaCA's or of another model, a format is not known, or
            rounding takes more than half of what the adapter has gained: of the loss, or without
            one of the change of outputs. Nothing is written then.
    """
    output, checked = Path(output), _open_paca(adapter)
    check_new(model, output)
    checkpoint = open_packed(model)
    load = partial(load_base, task_type=checked.config.task_type, device=device, packed=None)
    base = load(str(model))
    notes = check_base(checked, base, allow_other_base=allow_other_base)
    patch, rounding = make_packed(base, checkpoint, checked)
    compared, verified = _Compared(base, find_tokenizer(str(model), checked.folder), measure), None

    def verify_written(path: Path) -> None:
        nonlocal verified
        compared.see(load(str(path)), "as written")
        verified = compared.verified(rounding, warn)

    if verify:
        compared.see(base, "the base")
        compared.see(attach(base, checked, allow_other_base=True)[0], "as trained")
    del base
    check = verify_written if verify else None
    result = apply_to_folder(model, patch, output, check=check)
    return PackedResult(
        output=output,
        formats=dict(Counter(checkpoint.entries[name].dtype for name in patch.after)),
        num_bytes=result.checkpoint_bytes,
        rounding=rounding,
        verified=verified,
        notes=[*notes, *result.notes],
    )


class _Compared:
    """What a base, a trained model and what was written say of a text, and their losses.

    Args:
        base: The base.
        tokenizer: Gives the tokens of the text; None: they are random.
        measure: As for `merge_packed`.
    """

    def __init__(
        self,
        base: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        measure: Callable[[nn.Module, str], float] | None,
    ) -> None:
        size = cast(Any, base).config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(size, (2, 32), generator=generator, device="cpu")
        if tokenizer is not None:
            tokens = cast(Tensor, tokenizer(_TEXT, return_tensors="pt")["input_ids"])
            self._tokens = tokens.clamp(max=size - 1)
        self._measure = measure
        self._outputs, self._losses = list[Tensor](), list[float]()

    @torch.no_grad()
    def see(self, model: nn.Module, which: str) -> None:
        """Note the outputs, (B, T, V) float32 on the CPU, and the loss of a model."""
        with resident(model):  # to the bit what a merge computes
            outputs: Tensor = model(input_ids=self._tokens.to(cast(Any, model).device))[0]
        self._outputs.append(outputs.float().cpu())
        if self._measure is not None:
            self._losses.append(self._measure(model, which))

    def verified(self, rounding: Rounding, warn: Callable[[str], object]) -> Verified:
        """Compare what was written; refuse it if more than half of what was trained is lost."""
        plain, expected, written = self._outputs
        error, effect = (
            float((expected - other).square().mean().sqrt()) for other in (written, plain)
        )
        lost, gained, what = error, effect, "changed the outputs"
        losses = self._losses
        # Outputs on any text say less than the loss on the data, if there is one that fell.
        if has_gain := bool(losses) and losses[0] > losses[1]:
            lost, gained, what = losses[2] - losses[1], losses[0] - losses[1], "lowered the loss"
        if gained and not lost <= gained / 2:  # so that NaN fails
            raise ValueError(
                f"rounding to codes takes {lost:.2g} of the {gained:.2g} by which training {what}; "
                f"nothing was written. {rounding_note(rounding)} {_ADVICE}, or write it all the "
                "same with --no_verify."
            )
        if has_gain and lost > gained * _NOTABLE:
            warn(
                f"writing takes {lost / gained:.0%} of what training gained: the held-out loss is "
                f"{losses[0]:.4f} of the base, {losses[1]:.4f} as trained, {losses[2]:.4f} as "
                f"written. {rounding_note(rounding)} {_ADVICE}."
            )
        return Verified(error=error, effect=effect, losses=losses)


def rounding_note(rounding: Rounding) -> str:
    """Say what became of the codes."""
    moved, clipped = (
        number / max(rounding.num_codes, 1) for number in (rounding.num_moved, rounding.num_clipped)
    )
    return (
        f"{moved:.1%} of {rounding.num_codes:,} trained codes moved; {clipped:.1%} lie at the end "
        "of their block's range."
    )


def _change(
    base: nn.Module, checkpoint: PackedCheckpoint, adapter: Adapter, module: str, rounding: Rounding
) -> tuple[WeightColumns, Tensor]:
    """Return what one module's columns are in the file and what they become; count the codes."""
    layer = target_of_module(base, module).module
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"module {module!r} is a {type(layer).__name__}, and codes are those of linear layers "
            "alone; leave it out of the targets."
        )
    update, indices = adapter.modules[module], adapter.modules[module].indices
    columns = layer.weight.detach().index_select(1, indices.to(layer.weight.device)).cpu()
    config = cast(Any, base).config.get_text_config()
    stored = FileColumns(checkpoint, f"{module}.weight", columns, indices, config)
    after, num_clipped = stored.moved(update.dense(), adapter.scaling(module))
    if stored.grid is not None:
        rounding.num_codes += after.numel()
        rounding.num_moved += int((stored.before != after).sum())
        rounding.num_clipped += int(num_clipped)
    old = WeightColumns(
        name=stored.name,
        dim=1,
        shape=checkpoint.entries[stored.name].shape,
        indices=indices,
        values=stored.before,
        grid="" if stored.grid is None else stored.grid.name,
    )
    return old, after
