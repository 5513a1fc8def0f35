"""`pacatune merge`: write an adapter into its base model, a plain model folder."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pacatune.cli.options import ModelOptions, print_notes, quiet_libraries
from pacatune.files.folder import format_bytes
from pacatune.precision import Dtype


@dataclass(frozen=True, kw_only=True)
class Merge(ModelOptions):
    """Write an adapter into its base model: a folder that transformers loads alone."""

    adapter: str = field()
    device: str = "cpu"
    output: str
    """Folder to write."""
    dtype: Dtype = "auto"
    """Number type of the result; auto is the base's own."""
    base: Literal["original", "dequantized", "nf4"] | None = None
    """For adapters of a quantised base, whose weights the untrained ones are: those of the
    checkpoint before quantisation, those that were trained with (the default), or these quantised
    again, which costs accuracy."""
    no_verify: bool = False
    """Skip comparing outputs before and after (saves four forward passes and a load)."""

    def run(self, command: str) -> int:
        """Do it."""
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
        onto = "" if result.onto == "original" else f" ({result.onto})"
        print(f"base      {result.base}{onto}")
        print(f"merged    {result.num_modules} modules, {result.dtype}")
        error = result.error
        if error is None:
            print("verified  no (--no_verify)")
        else:
            print(
                f"verified  outputs are those of the adapter, rounded by {error.max_absolute:.1e} "
                f"({error.max_relative:.1e} of their size; {result.limit:.1e} is allowed); it "
                f"changes them by {result.effect:.1e}"
            )
        print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
        print_notes(result.notes)
        return 0


command = Merge
