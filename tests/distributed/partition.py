"""Does to a module what DeepSpeed ZeRO-3 does, in one process, where DeepSpeed is not installed.

Each module gets another parameter dictionary; a parameter is empty outside of its module's forward
and backward pass; hooks on the module fill it before either and empty it after.
"""

from collections import OrderedDict

import torch

from tests.distributed import net


class PartitionedParameters(OrderedDict):
    """In place of a module's plain dictionary, as DeepSpeed's ZeROOrderedDict."""


def partition(model):
    for module in model.modules():
        if module._parameters:
            module._parameters = PartitionedParameters(module._parameters)
    for parameter in model.parameters():
        parameter.whole = parameter.data
        release([parameter])
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own:
            _add_hooks(module, own)
    return model


def gather(parameters):
    for parameter in parameters:
        parameter.data = parameter.whole


def release(parameters):
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _add_hooks(module, own):
    module.register_forward_pre_hook(lambda *_: gather(own))

    def after_forward(module, args, output):
        release(own)
        if output.requires_grad:
            output.register_hook(lambda grad: gather(own))

    module.register_forward_hook(after_forward)


def train_partitioned(model):
    """Five steps of one process whose parameters are empty between their passes."""
    before = net.frozen(model)
    partition(model)
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    losses = []
    for batch in net.batches():
        loss = net.loss_of(model, batch)
        loss.backward()
        gather(model.parameters())
        optimizer.step()
        release(model.parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    gather(model.parameters())
    return losses, net.adapter_of(model), net.is_unchanged(model, before)
