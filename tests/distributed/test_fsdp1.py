"""FullyShardedDataParallel (FSDP1): parameters are views into flat ones, modules are wrapped."""

import pytest
import torch

from tests.distributed import net
from tests.distributed.ways import WRAPPINGS, full_state, train_flat, wrap_flat

pytestmark = pytest.mark.slow
every_wrapping = pytest.mark.parametrize("wrapping", WRAPPINGS, ids=str)


@every_wrapping
def test_losses_adapter_and_base(pair, wrapping):
    net.assert_equal_to_one(pair.run(train_flat, **wrapping))


def load_flat(state_dict, **wrapping):
    wrapped = wrap_flat(net.adapt(), **wrapping)
    with full_state(wrapped):
        # Not by set_peft_model_state_dict: PEFT 0.21 takes its keys for unknown ones and goes on.
        wrapped.load_state_dict(state_dict)
    with torch.no_grad():
        return wrapped(input_ids=net.batches()[0]).logits


@every_wrapping
def test_state_dict_of_one_process(pair, wrapping):
    one = net.adapt()
    net.train(one)
    with torch.no_grad():
        expected = one(input_ids=net.batches()[0]).logits
    for logits in pair.run(load_flat, one.state_dict(), **wrapping):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
