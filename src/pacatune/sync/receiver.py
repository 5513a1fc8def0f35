"""The server's side: writes a trainer's columns into weights that may be joined and split.

It keeps what its own base holds there, so it can take everything back: R/I of the weights, 44 MB
for LLaMA3-8B with 16 columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pacatune.names import names_of
from pacatune.ops.columns import bits
from pacatune.patch.memory import (
    find_tensor,
    refuse_aliases,
    refuse_missing,
    tensors_of,
    transaction,
)
from pacatune.sync.message import Columns, Positions
from pacatune.sync.placement import FUSIONS, Piece, Server

if TYPE_CHECKING:
    from pacatune.sync.transport import Transport

_FIX = (
    "Serve the base that is trained, not quantised, and make the source with its dtype: "
    "`ColumnSource(model, dtype=...)`; give `rename` and `fusions` if the server has other names."
)


class ColumnReceiver:
    """Writes a `ColumnSource`'s columns into a model, all of a sync or none of it.

    The model's own tensors are changed in place; nothing is replaced, so graphs and engines that
    hold them see the new columns. Call it between the model's forward passes, or hold a lock.

    Args:
        model: A plain model without adapters, or its tensors by name; in an engine that splits
            tensors, those of this rank.
        tp_rank: This process's tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
        fusions: Module that joins others -> their names in order of rows; None: vLLM's and
            SGLang's (`qkv_proj`, `gate_up_proj`).
        rename: Takes a name of the checkpoint, returns the server's.
        is_partial: Leave out tensors that are not here: those of other pipeline stages.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        fusions: Mapping[str, Sequence[str]] | None = None,
        rename: Callable[[str], str] | None = None,
        is_partial: bool = False,
    ) -> None:
        if not 0 <= tp_rank < tp_size:
            raise ValueError(f"`tp_rank` ({tp_rank}) must be in [0, tp_size={tp_size}).")
        self.model, self.tp_rank, self.tp_size = model, tp_rank, tp_size
        self.fusions = FUSIONS if fusions is None else fusions
        self.rename, self.is_partial = rename, is_partial
        self.number = 0
        """Number of the sync that the weights hold; 0: the base."""
        self._last_plan: _Plan | None = None
        self._written: _Plan | None = None  # whose columns are in the weights

    def apply(self, columns: Columns) -> bool:
        """Write a sync's columns.

        Returns:
            Whether anything was written: False for a sync that the weights hold already, or one
            before it.

        Raises:
            ValueError: If the model lacks a tensor, holds it in another shape or dtype, quantised,
                adapted or distributed, or two of the names are one tensor. Nothing was written
                then.
        """
        plan, written = self._plan(columns.positions), self._written
        is_same_run = written is not None and written.positions.run == columns.positions.run
        if is_same_run and columns.number <= self.number:
            return False
        values, tensors = plan.values(columns), self._checked(plan)
        with transaction() as put:
            if written is not plan:
                self._put_back(put, tensors)
                plan.originals = [piece.place(tensors).read() for piece in plan.pieces]
            for piece in plan.pieces:
                put(piece.place(tensors), piece.part_of(values))
        self._written, self.number = plan, columns.number
        return True

    def receive(self, transport: "Transport", *, timeout: float | None = None) -> Columns:
        """Wait for the next sync and apply it.

        Returns:
            Its columns.

        Raises:
            TimeoutError, ConnectionError, EOFError: If nothing came; the weights stay.
            ValueError: As for `apply`.
        """
        columns = transport.receive(timeout)
        self.apply(columns)
        return columns

    def revert(self) -> None:
        """Write the base's columns back, bit for bit."""
        if self._written is None:
            return
        tensors = self._checked(self._written)
        with transaction() as put:
            self._put_back(put, tensors)
        self._written, self.number = None, 0

    def check_base(self, columns: Columns) -> None:
        """Compare this model's base with the trainer's in the trained columns; nothing is written.

        Args:
            columns: `source.base_columns()`.

        Raises:
            ValueError: If a column differs.
        """
        plan = self._plan(columns.positions)
        values, held = plan.values(columns), plan.originals
        if self._written is not plan:
            if self._written is not None:
                raise ValueError(
                    "the weights hold columns of another adapter; call `revert` first."
                )
            tensors = self._checked(plan)
            held = [piece.place(tensors).read() for piece in plan.pieces]
        wrong = [
            piece.columns.name
            for piece, own in zip(plan.pieces, held, strict=True)
            if not torch.equal(bits(piece.part_of(values).to(own.device)), bits(own))
        ]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(plan.pieces)} tensors, first {wrong[0]!r}, are not the "
                "trainer's base in the trained columns; serve the base that is trained."
            )

    def _put_back(self, put: Callable[..., None], tensors: Mapping[str, Tensor]) -> None:
        """Write the base's columns where those of a sync are."""
        if self._written is not None:
            for piece, old in zip(self._written.pieces, self._written.originals, strict=True):
                put(piece.place(tensors), old)

    def _plan(self, positions: Positions) -> "_Plan":
        """Return where columns at these positions belong."""
        if self._last_plan is None or self._last_plan.positions is not positions:
            self._last_plan = self._new_plan(positions)
        return self._last_plan

    def _new_plan(self, positions: Positions) -> "_Plan":
        tensors, prefix = tensors_of(self.model)
        server = Server(tensors, self.fusions, self.tp_rank, self.tp_size)
        pieces: list[Piece] = []
        for columns in positions.sets:
            own = (columns.name, columns.parameter)
            renamed = own if self.rename is None else map(self.rename, own)
            names = [alias for name in renamed for alias in names_of(name, prefix)]
            held = server.pieces(columns, names, positions.shapes)
            if not held and not self.is_partial:
                refuse_missing(names, tensors, _FIX)
            pieces += held
        if not pieces:
            raise ValueError(
                "the model has none of the trainer's tensors, such as "
                f"{positions.sets[0].name!r}; serve the model that is trained."
            )
        plan = _Plan(positions, [piece for piece in pieces if not piece.is_empty])
        self._checked(plan)
        places = ((piece.columns.name, piece.place(tensors).tensor) for piece in plan.pieces)
        refuse_aliases(places, "the trainer")
        return plan

    def _checked(self, plan: "_Plan") -> Mapping[str, Tensor]:
        """Return the model's tensors, seen to be what the plan is for."""
        tensors = tensors_of(self.model)[0]
        for piece in plan.pieces:
            find_tensor(tensors, [piece.target], piece.shape, piece.columns.dtype, _FIX)
        return tensors


@dataclass(eq=False)
class _Plan:
    positions: Positions
    pieces: list[Piece]
    originals: list[Tensor] = field(default_factory=list)
    """What the model's base holds in each of them."""

    def values(self, columns: Columns) -> dict[str, Tensor]:
        """Return the columns by name, where most of them are written."""
        device = self.pieces[0].indices.device if self.pieces else columns.buffer.device
        return self.positions.by_name(columns.buffer.to(device))
