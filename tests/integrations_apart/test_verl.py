"""verl's own registry, FSDP engine and order of calls, with columns between real processes."""

import asyncio
import multiprocessing
from importlib import import_module

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from verl.checkpoint_engine.base import CheckpointEngineRegistry

from pacatune import PacaConfig

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ["q_proj", "down_proj"]


def build():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    config = PacaConfig(r=4, paca_alpha=8, target_modules=TARGETS)
    return get_peft_model(base, config)


def merged(model):
    """The adapted weights, merged, by the checkpoint's names."""
    model.merge_adapter()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if any(f"{one}.base_layer.weight" in name for one in TARGETS)
    }
    model.unmerge_adapter()
    return found


class Actor:
    """What the actor's worker does at a sync, without the GPU that its engine asks for."""

    def __init__(self):
        fsdp = import_module("verl.workers.engine.fsdp.transformer_impl")
        import_module("pacatune.integrations.verl")
        self.checkpoint_engine = CheckpointEngineRegistry.new("pacatune", 0, is_master=True)
        self.engine = object.__new__(fsdp.FSDPEngineWithLMHead)
        self.engine.module = build()

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)

    def sync(self):
        weights, peft_config = self.engine.get_per_tensor_param()
        assert peft_config is None
        return asyncio.run(self.checkpoint_engine.send_weights(weights, global_steps=1))

    def served(self):
        return merged(self.engine.module)


class Rollout:
    def __init__(self, *_):
        import_module("pacatune.integrations.verl")
        self.checkpoint_engine = CheckpointEngineRegistry.new("pacatune", 0)

    def sync(self):
        async def receive():
            return {name: one async for name, one in self.checkpoint_engine.receive_weights()}

        return asyncio.run(receive())


class Process:
    def __init__(self, kind, *args):
        context = multiprocessing.get_context("fork")  # verl has a package `tests`, too
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, kind, args), daemon=True)
        self.process.start()

    def ask(self, *call):
        self.connection.send(call)

    def answer(self):
        assert self.connection.poll(120)
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def call(self, *call):
        self.ask(*call)
        return self.answer()


def serve(connection, kind, args):
    torch.set_num_threads(1)
    one = kind(*args)
    while True:
        name, *values = connection.recv()
        owner = one if hasattr(one, name) else one.checkpoint_engine
        try:
            answer = getattr(owner, name)(*values)
        except Exception as error:
            answer = RuntimeError(str(error))
        connection.send(answer)


def sync(actor, rollouts):
    """As verl's CheckpointEngineManager does it; return what each worker returned."""
    workers = [actor, *rollouts]
    metadata = [one.call("prepare") for one in workers]
    engine = CheckpointEngineRegistry.get("pacatune")
    for_actor, for_rollouts = engine.build_topology(1, len(rollouts), metadata)
    orders = [(actor, for_actor, 0)]
    orders += [(one, for_rollouts, number) for number, one in enumerate(rollouts)]
    names = ("rank", "host", "port", "size", "is_whole")
    for one, given, number in orders:
        assert set(given) == set(names)
        one.ask("init_process_group", *(given[name][number] for name in names))
    for one in workers:
        one.answer()
    for one in workers:
        one.ask("sync")
    found = [one.answer() for one in workers]
    for one in workers:
        one.call("finalize")
    return found


def test_rollouts_hold_what_the_actor_trains():
    import_module("pacatune.integrations.verl")
    actor, rollouts = Process(Actor), [Process(Rollout), Process(Rollout)]
    everything = 2 * 4 * 2 * (32 + 32)  # bytes, columns, layers, outputs of both targets
    for step in range(3):
        actor.call("step", step)
        metrics, *served = sync(actor, rollouts)
        is_part = step > 0  # later syncs have what was changed, compressed
        assert metrics["sync/num_bytes"] in (range(1, everything) if is_part else [everything])
        expected = actor.call("served")
        assert len(expected) == 4
        for found in served:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    metrics, *_ = sync(actor, rollouts)
    assert metrics["sync/num_bytes"] < 50  # nothing was changed
    rollouts.append(Process(Rollout))  # verl adds a replica
    metrics, *served = sync(actor, rollouts)
    assert metrics == {"sync/num_bytes": everything}
    assert all(torch.equal(found[name], expected[name]) for found in served for name in expected)


def test_other_models_are_left_to_verl_and_refused_here():
    fsdp = import_module("verl.workers.engine.fsdp.transformer_impl")
    ours = import_module("pacatune.integrations.verl")
    engine = ours.ColumnCheckpointEngine(0, is_master=True)
    assert fsdp.FSDPEngine.get_per_tensor_param.__wrapped__
    with pytest.raises(ValueError, match="the actor is no PaCA model of verl's FSDP engine"):
        asyncio.run(engine.send_weights(iter([("a", torch.ones(1))])))
