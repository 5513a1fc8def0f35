import pytest
import torch
from peft import get_peft_model

from pacatune.training.language import Task
from pacatune.training.task import count_trainable


@pytest.mark.parametrize("method", ["paca", "dora", "full"])
def test_plan_is_what_is_trained(make_config, method):
    config = make_config(method)
    planned = Task(config).plan
    model = Task(config).load_model()
    if planned.adapter is not None:
        model = get_peft_model(model, planned.adapter)
    assert planned.num_trainable_parameters == count_trainable(model)
    assert len(planned.targets) == (0 if method == "full" else 14)


def test_options_reach_peft_and_transformers(make_config):
    section = {"r": 4, "paca_alpha": 8, "random_seed": 7, "rank_pattern": {"q_proj": 2}}
    paca = Task(make_config(paca=section)).plan.adapter
    assert {name: getattr(paca, name) for name in section} == section
    dora = Task(make_config("dora", lora={"r": 4, "lora_dropout": 0.5})).plan.adapter
    assert (dora.use_dora, dora.r, dora.lora_dropout) == (True, 4, 0.5)
    assert Task(make_config("full")).plan.adapter is None
    config = make_config(model={"dtype": "bfloat16"})
    task = Task(config)
    assert task.dtype == task.load_model().dtype == torch.bfloat16
    config = make_config(training={"model_init_kwargs": {"no_such_argument": 1}})
    with pytest.raises(TypeError, match="no_such_argument"):
        Task(config).load_model()
