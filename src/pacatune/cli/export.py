"""`pacatune export`: turn an adapter into an exact LoRA adapter for any server."""

import argparse
from typing import TYPE_CHECKING

from pacatune.cli.options import (
    add_base_options,
    check_base,
    new_parser,
    print_notes,
    quiet_libraries,
)
from pacatune.names import full_name
from pacatune.precision import DTYPES

if TYPE_CHECKING:
    from pacatune.adapters.export import ExportResult


def run(argv: list[str]) -> int:
    """Run `pacatune export` with the words after it; return the exit status."""
    options = _parse(argv)
    check_base(options, options.output)
    quiet_libraries()

    from pacatune.adapters.export import export_lora

    result = export_lora(
        options.model,
        options.adapter,
        options.output,
        dtype=options.dtype,
        keep_extra=options.keep_extra,
        verify=options.verify,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    _print_result(result, options.dtype)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "export",
        "Write an adapter in another method's format. LoRA of the same rank is exact: A selects "
        "the trained columns, B holds what was trained; of MosLoRA, B takes the mixer.",
    )
    add_base_options(parser, adapter_required=True, device="cpu")
    add = parser.add_argument
    add("--to", choices=("lora",), required=True, help="format to write")
    add("--output", metavar="DIR", required=True, help="folder to write")
    dtype = "number type of the tensors; float32 (the default) is exact"
    add("--dtype", type=full_name, choices=DTYPES[1:], default="float32", help=dtype)
    extra = (
        "carry modules_to_save, biases and token embeddings over; PEFT loads them, most servers "
        "do not"
    )
    add("--keep-extra", action="store_true", help=extra)
    verify = "load the result with PEFT alone in a new process and compare outputs"
    add("--verify", action="store_true", help=verify)
    return parser.parse_args(argv)


def _print_result(result: "ExportResult", dtype: str) -> None:
    from pacatune.files.folder import format_bytes

    rounding = f"rounded by at most {result.rounding:.1e} of their size"
    print(f"base      {result.base}")
    print(
        f"exported  {result.num_modules} modules as LoRA, {dtype}, "
        f"{rounding if result.rounding else 'exact'}"
    )
    if result.error is None:
        print("verified  no (--verify compares with plain PEFT)")
    else:
        print(
            f"verified  outputs in plain PEFT differ by at most {result.error.max_absolute:.1e} "
            f"({result.error.max_relative:.1e} of their size, "
            f"{result.limit:.1e} is allowed)"
        )
    print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
    print_notes(result.notes)
