"""`pacatune export`: turn an adapter into an exact LoRA adapter for any server."""

from dataclasses import dataclass, field
from typing import Literal

from pacatune.cli.options import BaseOptions, print_notes, quiet_libraries
from pacatune.files.folder import format_bytes


@dataclass(frozen=True, kw_only=True)
class Export(BaseOptions):
    """Write an adapter in another method's format.

    LoRA of the same rank is exact: A selects the trained columns, B holds what was trained; of
    MosLoRA, B takes the mixer.
    """

    adapter: str = field()
    device: str = "cpu"
    to: Literal["lora"]
    """Format to write."""
    output: str
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the tensors; float32 is exact."""
    keep_extra: bool = False
    """Carry modules_to_save, biases and token embeddings over; PEFT loads them, most servers do
    not."""
    verify: bool = False
    """Load the result with PEFT alone in a new process and compare outputs."""

    def run(self, command: str) -> int:
        """Do it."""
        self.check_base(self.output)
        quiet_libraries()

        from pacatune.adapters.export import export_lora

        how = self.values("dtype", "keep_extra", "verify", "device", "allow_other_base")
        result = export_lora(self.model, self.adapter, self.output, **how)
        rounding = f"rounded by at most {result.rounding:.1e} of their size"
        exactly = rounding if result.rounding else "exact"
        print(f"base      {result.base}")
        print(f"exported  {result.num_modules} modules as LoRA, {self.dtype}, {exactly}")
        error = result.error
        if error is None:
            print("verified  no (--verify compares with plain PEFT)")
        else:
            print(
                f"verified  outputs in plain PEFT differ by at most {error.max_absolute:.1e} "
                f"({error.max_relative:.1e} of their size, {result.limit:.1e} is allowed)"
            )
        print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
        print_notes(result.notes)
        return 0


command = Export
