"""`pacatune patch WHAT`: adapters as exact edits of checkpoints."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pacatune.cli.options import BaseOptions, give_one, print_notes, quiet_libraries
from pacatune.files.folder import format_bytes

if TYPE_CHECKING:
    from pacatune.patch import Difference, Patch

DESCRIPTION = "Handle an adapter as an exact edit of a checkpoint: its columns, before and after."
_MOST_ROWS = 12


@dataclass(frozen=True, kw_only=True)
class Make(BaseOptions):
    """Write the patch that turns an adapter's base into the merged model.

    It holds the trained columns before and after, in the base's dtype, and the adapter itself.
    """

    adapter: str = field()
    output: str
    """File to write, such as p.safetensors."""
    no_adapter: bool = False
    """Leave the adapter's own tensors out: smaller, but `to-adapter` needs them."""

    def run(self) -> int:
        """Do it."""
        self.check_base()
        quiet_libraries()

        from pacatune.patch.adapter import make
        from pacatune.patch.file import refuse_existing, save

        refuse_existing(self.output)
        patch, notes = make(
            self.model,
            self.adapter,
            with_adapter=not self.no_adapter,
            allow_other_base=self.allow_other_base,
        )
        size = save(patch, self.output)
        kept = patch.adapter_bytes
        adapter = f", the adapter {format_bytes(kept)}" if kept else ""
        print(f"base      {patch.base}")
        print(f"columns   {patch.num_columns} of {len(patch.after)} tensors")
        print(
            f"written   {self.output} ({format_bytes(size)}: columns before and after "
            f"{format_bytes(2 * patch.num_bytes)}{adapter})"
        )
        print_notes(notes)
        return 0


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a patched model goes."""

    output: str | None = None
    """Folder to write."""
    in_place: bool = False
    """Change the folder itself; if that is interrupted, the next one rolls it back."""
    allow_other_base: bool = False
    """Go on although the base is not the one of the patch, as long as its columns are."""

    def __post_init__(self) -> None:
        """Refuse two targets, and none."""
        give_one(output=self.output, in_place=self.in_place, needed=True)

    def write(self, model: str, patch: "Patch", *, revert: bool = False) -> int:
        """Write a patched or reverted model, and print what was done."""
        from pacatune.patch import apply_in_place, apply_to_folder
        from pacatune.patch.base import find_folder

        settings: dict[str, Any] = {"revert": revert, "allow_other_base": self.allow_other_base}
        if self.output is None:
            result = apply_in_place(model, patch, **settings)
        else:
            result = apply_to_folder(find_folder(model), patch, self.output, **settings)
        size = format_bytes(result.checkpoint_bytes)
        print(
            f"{'reverted' if revert else 'applied':<9} {patch.num_columns} columns of "
            f"{len(patch.after)} tensors: {format_bytes(patch.num_bytes)} of {size}, in disk "
            f"pages of {format_bytes(result.page_bytes)}"
        )
        after = "" if self.in_place else ", and those written"
        print(f"verified  the columns before, bit for bit{after}")
        print(f"written   {result.folder} ({'in place' if self.in_place else size})")
        print_notes(result.notes)
        return 0


@dataclass(frozen=True, kw_only=True)
class Apply(_Target):
    """Write a patch into its base: the folder that `pacatune merge` writes, without loading it."""

    model: str
    """Folder or hub id of the base, or of the patched model."""
    patch: str
    """The patch."""

    reverts: ClassVar[bool] = False

    def run(self) -> int:
        """Do it."""
        quiet_libraries()

        from pacatune.patch import load

        return self.write(self.model, load(self.patch), revert=self.reverts)


class Revert(Apply):
    """Take a patch out of a model folder again: the base, bit for bit."""

    reverts = True


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two model folders bit by bit.

    Models that differ in few columns of each tensor give a patch, whoever trained them.
    """

    model: str
    """Folder or hub id of the base."""
    with_: str
    """Another one."""
    output: str | None = None
    """Write the patch from the first to the other."""

    def run(self) -> int:
        """Do it."""
        quiet_libraries()

        from pacatune.patch import diff, save
        from pacatune.patch.base import find_folder
        from pacatune.patch.file import refuse_existing

        if self.output is not None:
            refuse_existing(self.output)
        result = diff(find_folder(self.model), find_folder(self.with_, option="with"))
        _print_models(result)
        if self.output is None:
            return 0
        if result.patch is None:
            raise ValueError(
                f"{self.model} and {self.with_} give no patch: {result.refusal()}. Nothing was "
                "written."
            )
        size = save(result.patch, self.output)
        print(f"written   {self.output} ({format_bytes(size)})")
        print_notes(["a patch of two models has no adapter in it."])
        return 0


def _print_models(result: "Difference") -> None:
    print(f"equal     {result.num_equal} tensors")
    others = {"only A": result.only_a, "only B": result.only_b, "form": result.other_form}
    for title, names in others.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            print(f"{title:<9} {names[0]}{more}")
    print(f"changed   {len(result.changed)} tensors")
    for name, share in list(result.changed.items())[:_MOST_ROWS]:
        print(f"  {share:7.2%} of the columns  {name}")
    if len(result.changed) > _MOST_ROWS:
        print(f"  {len(result.changed) - _MOST_ROWS} more tensors")
    if result.patch is None:
        print(f"patch     no: {result.refusal()}")
    else:
        size = format_bytes(2 * result.patch.num_bytes)
        print(f"patch     {result.patch.num_columns} columns, {size} before and after")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Join patches of one base, which change no column twice."""

    patch: list[str]
    """Patches, the first one first."""
    output: str
    """File to write."""

    def run(self) -> int:
        """Do it."""
        from pacatune.patch import load, save, stack
        from pacatune.patch.file import refuse_existing

        refuse_existing(self.output)
        patch = stack([load(path) for path in self.patch])
        num_columns, num_tensors = patch.num_columns, len(patch.after)
        print(
            f"stacked   {len(self.patch)} patches: {num_columns} columns of {num_tensors} tensors"
        )
        print(f"written   {self.output} ({format_bytes(save(patch, self.output))})")
        print_notes(["a stack carries no adapter; keep the patches if you want theirs back."])
        return 0


@dataclass(frozen=True, kw_only=True)
class ToAdapter:
    """Write the adapter that a patch was made of: the same configuration and tensors."""

    patch: str
    """The patch."""
    output: str
    """Folder to write."""

    def run(self) -> int:
        """Do it."""
        quiet_libraries()

        from pacatune.patch import load

        patch = load(self.patch)  # refuses a wrong one before PEFT is imported

        from pacatune.patch import to_adapter

        print(f"written   {to_adapter(patch, self.output)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Recover:
    """Bring a model folder back to what it was before a patching in place was interrupted."""

    model: str
    """The model folder."""
    finish: bool = False
    """Complete what was begun instead of rolling it back."""

    def run(self) -> int:
        """Do it."""
        from pacatune.patch import recover

        notes = recover(self.model, finish=self.finish)
        print("\n".join(notes) or f"{self.model}: nothing was interrupted here.")
        return 0


SUBCOMMANDS = {
    "make": Make,
    "apply": Apply,
    "revert": Revert,
    "diff": Diff,
    "stack": Stack,
    "to-adapter": ToAdapter,
    "recover": Recover,
}
