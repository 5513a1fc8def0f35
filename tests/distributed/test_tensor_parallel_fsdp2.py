"""Two processes share each weight, and two such pairs have half of the batch each."""

import pytest
import torch

from tests.distributed import net
from tests.distributed.tensor_parallel import adapt, load, marks, whole

pytestmark = marks


def half(ids):
    return ids.chunk(2)[torch.distributed.get_rank() // 2]


def train_four(folder, when):
    if when == "sharded before":
        model = adapt(load(folder, tp_size=2, fsdp_size=2))
    else:
        model = shard_after(folder)
    adapter = {}
    losses = net.train(model, part=half)
    for name, tensor in net.adapter_of(model).items():
        adapter[name] = whole(tensor)
    return losses, adapter


def shard_after(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    base = load(folder, parts=False)
    apply_tensor_parallelism(base, mesh["tp"], base._expand_parallel_plan(base.tp_plan))
    base._device_mesh, base._tp_size = mesh, 2
    model = adapt(base)
    for block in base.model.layers:
        fully_shard(block, mesh=mesh["fsdp"])
    return fully_shard(model, mesh=mesh["fsdp"])


@pytest.mark.parametrize("when", ["sharded before", "sharded after"])
def test_with_fsdp2(four, save_base, when):
    net.assert_equal_to_one(four.run(train_four, save_base(), when), atol=1e-12)


class Rows(torch.utils.data.Dataset):
    rows = net.batches().flatten(0, 1)[:32]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train_by_trainer(folder, output, num_pairs):
    import os

    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    parts = num_pairs > 0
    if parts:  # accelerate takes such models on accelerators only
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None
        os.environ.update(LOCAL_RANK=os.environ["RANK"], ACCELERATE_USE_CPU="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sizes = {"tp_size": 2, "fsdp_size": num_pairs} if parts else {}
    model = adapt(load(folder, "float32", parts=parts, **sizes))
    args = TrainingArguments(
        output,
        per_device_train_batch_size=8 // max(num_pairs, 1),
        max_steps=6,
        learning_rate=1e-2,
        max_grad_norm=0.01,
        logging_steps=1,
        save_only_model=True,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=Rows())
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [(line["loss"], line["grad_norm"]) for line in log], net.adapter_of(model)


@pytest.mark.parametrize("processes", ["pair", "four"])
def test_trainer(request, save_base, tmp_path, processes):
    from peft import PeftModel

    log, adapter = train_by_trainer(save_base(), str(tmp_path / "one"), 0)
    group = request.getfixturevalue(processes)
    num_pairs = 1 if processes == "pair" else 2
    for found in group.run(train_by_trainer, save_base(), str(tmp_path / "parts"), num_pairs):
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(log), rtol=0, atol=1e-5)
        for name, tensor in adapter.items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5)
    base = load(save_base(), "float32", parts=False)
    saved = PeftModel.from_pretrained(base, tmp_path / "parts" / "checkpoint-6")
    for name, tensor in net.adapter_of(saved).items():
        torch.testing.assert_close(tensor, adapter[name], rtol=0, atol=1e-5)
