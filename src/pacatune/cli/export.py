"""`pacatune export`: turn an adapter into one that others read, exactly."""

from dataclasses import dataclass, field
from typing import Literal

from pacatune.cli.options import BaseOptions, print_notes, quiet_libraries
from pacatune.files.folder import format_bytes


@dataclass(frozen=True, kw_only=True)
class Export(BaseOptions):
    """Write an adapter in a form that others read, or a LoRA as one that trains in place.

    LoRA of the same rank is exact: A selects the trained columns, B holds what was trained. A LoRA
    becomes an adapter of all columns (channels 1.0), whose factors are those of the LoRA.
    """

    adapter: str = field()
    to: Literal["lora", "paca"]
    """Form to write: lora, of an adapter of PaCA's; paca, of a LoRA."""
    output: str
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the LoRA's tensors; float32 is exact."""
    keep_extra: bool = False
    """Carry modules_to_save, biases and token embeddings over into the LoRA; PEFT loads them, most
    servers do not."""

    def run(self) -> int:
        """Do it."""
        self.check_base(self.output)
        quiet_libraries()
        if self.to == "paca":
            from pacatune.adapters.from_lora import adapter_from_lora

            num_modules = adapter_from_lora(self.adapter, self.output)
            print(f"exported  {num_modules} modules as PaCA over all columns, exact")
            print(f"written   {self.output}")
            return 0

        from pacatune.adapters.export import export_lora

        chosen = self.values("dtype", "keep_extra", "allow_other_base")
        result = export_lora(self.model, self.adapter, self.output, **chosen)
        rounding = f"rounded by at most {result.rounding:.1e} of their size"
        exactly = rounding if result.rounding else "exact"
        print(f"base      {result.base}")
        print(f"exported  {result.num_modules} modules as LoRA, {self.dtype}, {exactly}")
        print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
        print_notes(result.notes)
        return 0


command = Export
