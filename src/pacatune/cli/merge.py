"""`pacatune merge`: write an adapter into its base model, a plain model folder."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pacatune.cli.options import ModelOptions, print_notes, quiet_libraries
from pacatune.files.folder import format_bytes
from pacatune.files.json_file import read_json_object
from pacatune.grid import is_packed
from pacatune.precision import Dtype


@dataclass(frozen=True, kw_only=True)
class Merge(ModelOptions):
    """Write an adapter into its base model: a folder that transformers loads alone.

    Of a base in few bits (a GGUF file, a folder of FP8 or INT4), PaCA's trained columns become
    codes of a copy of it.
    """

    adapter: str = field()
    device: str = "cpu"
    output: str
    """Folder to write; of a GGUF file a new .gguf file."""
    dtype: Dtype = "auto"
    """Number type of the result; auto is the base's own."""
    base: Literal["original", "dequantized", "nf4"] | None = None
    """For adapters of a quantised base, whose weights the untrained ones are: those of the
    checkpoint before quantisation, those that were trained with (the default), or these quantised
    again, which costs accuracy. Of a base in few bits: dequantized writes a model in 16 bits."""
    held_out: bool = False
    """For a base in few bits: compare losses on the data that the run held out, too. Reads its
    config.yaml, and what that names: for runs of your own."""
    no_verify: bool = False
    """Skip reading back what was written (saves a load; where codes are written, three passes over
    a text, too)."""

    def run(self) -> int:
        """Do it."""
        model = self.model or base_of(self.adapter)
        if model is not None and self.base is None and is_packed(model):
            return self._run_packed(model)
        if self.held_out:
            raise ValueError(
                "`held_out` is for columns that become codes of a base in few bits, and this merge "
                "writes plain numbers; drop it."
            )
        self.check_base(self.output)
        quiet_libraries()

        from pacatune.adapters.merge import merge

        how: Any = self.values("dtype", "device", "allow_other_base")
        result = merge(
            self.model,
            self.adapter,
            self.output,
            verify=not self.no_verify,
            onto=self.base,
            **how,
        )
        kind = "" if result.onto == "original" else f" ({result.onto})"
        print(f"base      {result.base}{kind}")
        print(f"merged    {result.num_modules} modules, {result.dtype}")
        if result.rounding is not None:
            print(f"rounding  {100 * result.rounding:.2g} % of what the adapter changes")
        print(f"verified  {'read back, bit for bit' if result.is_verified else 'no (--no_verify)'}")
        print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
        print_notes(result.notes)
        return 0

    def _run_packed(self, model: str) -> int:
        """Write the trained columns as codes of a quantised model."""
        if self.dtype != "auto":
            raise ValueError(
                f"`dtype` ({self.dtype!r}): a quantised model keeps its own formats; drop it."
            )
        if self.held_out and self.no_verify:
            raise ValueError(
                "`held_out` compares losses, and `no_verify` compares nothing; drop one of them."
            )
        self.check_base()
        quiet_libraries()

        from pacatune.patch.packed import merge_packed, rounding_note

        how: Any = self.values("device", "allow_other_base")
        if self.held_out:
            from pacatune.training.held_out import HeldOut

            how["measure"] = HeldOut(Path(self.adapter).expanduser()).loss
        how["warn"] = lambda text: print(f"warning: {text}", file=sys.stderr)
        result = merge_packed(model, self.adapter, self.output, verify=not self.no_verify, **how)
        print(f"base      {model}")
        formats = ", ".join(f"{number} of {name}" for name, number in result.formats.items())
        print(f"merged    {formats}: {rounding_note(result.rounding)}")
        if (verified := result.verified) is None:
            print("verified  no (--no_verify)")
        else:
            print(
                f"verified  outputs differ from the trained model's by {verified.error:.1e}; the "
                f"adapter changes them by {verified.effect:.1e}"
            )
        if verified is not None and verified.losses:
            base, trained, written = verified.losses
            print(f"held out  loss {base:.4f}, {trained:.4f} as trained, {written:.4f} as written")
        print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
        print_notes(result.notes)
        return 0


def base_of(adapter: str) -> str | None:
    """Return the base that a local adapter names, without opening anything else of it."""
    path = Path(adapter).expanduser() / "adapter_config.json"
    name = read_json_object(path).get("base_model_name_or_path") if path.is_file() else None
    return name if isinstance(name, str) else None


command = Merge
