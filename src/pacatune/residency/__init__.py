"""Keeps adapted columns inside a frozen weight; whoever looks sees the pretrained ones.

PaCA is fast because the adapted columns sit in W itself: one GEMM, nothing beside it. The price is
that W is not the pretrained weight while they do. This package pays it: `weight` is the state of
one weight, `obstacles` says why columns must not be in it, `reading` computes with it, `passes`
says when they are, `put` writes them.

    write     W[:, indices] <- originals + scaling * delta    in a training pass, if delta changed
    restore   W[:, indices] <- originals                      before anybody else reads W

Three rules:
  * **Evaluation never writes.** A pass that trains (forward with a delta that asks for a gradient,
    and its backward), and a thread inside `resident(model)`, may write columns; a few comparisons
    say whether they are there already, so that is once per optimiser step, never per micro-batch.
    Every other pass reads W as it is: W' if the current columns are in it, otherwise the pretrained
    weight, to whose product it adds that of the columns; in 16 bits it makes a temporary W'. Any
    number of threads may do so.
  * **Who computes with W checks afterwards** that nobody changed its columns meanwhile (`epoch`),
    and otherwise computes again: no lock is held while a GEMM runs. Who changes them, or hands W
    out, holds the one lock.
  * **Nobody keeps W'.** A backward pass takes W from here and not from what its forward saved,
    which a hook may have copied, and brings it into the state that it needs.

Who may see W, and how each is served:
  * Everybody who reaches W through its module (attribute, parameters(), state_dict, deepcopy,
    pickle, .to(), FSDP) goes through the module's parameter dictionary, which restores before it
    answers (`watching.GuardedParameters`); so does the `.data` of a Parameter object.
  * Whoever already holds the Parameter object (an optimiser over all parameters, DDP) sees the
    pretrained weight again after every optimiser step, through torch's step hook. If nobody holds
    it, that write is saved. If another thread got hold of it, it is not written until he lets go.
  * While somebody holds another tensor over the same memory (the values of a state_dict, say), or
    a graph holds the weight (a traced one, or plain autograd's), or another process shares its
    memory, nothing is written, and the layer adds the product of its columns.
  * FSDP2 shows a temporary that it gathers for a pass: see `gathered.py`.

How a change of delta is noticed: its version counter (in-place arithmetic, load_state_dict), and
what `watching.DeltaParameter` counts besides (optimiser steps, since fused ones count no versions,
and uses of `.data`), its identity and scaling (another adapter).

Writes go through an alias of W with a version counter of its own, so autograd's saved-tensor check
never trips on them. Deltas, not columns, are what is trained: an untrained delta writes nothing but
the original bits.
"""

from pacatune.residency.gathered import GatheredResidency
from pacatune.residency.passes import Pass, resident
from pacatune.residency.weight import Residency

__all__ = ["GatheredResidency", "Pass", "Residency", "resident"]
