import pytest
import torch

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from tests.vllm.conftest import (
    Trainer,
    adapted,
    answers,
    served_digests,
    start,
    stop,
    trained_digests,
)


@pytest.fixture(scope="module")
def trainer(model_path):
    return Trainer(adapted(model_path))


@pytest.fixture(scope="module")
def source(trainer):
    return ColumnSource(trainer.model)


@pytest.fixture(scope="module", autouse=True)
def base(llm):
    return served_digests(llm), answers(llm)


def test_ten_syncs_then_the_merged_folder_and_back(
    llm, base, trainer, source, model_path, tmp_path
):
    transport = VllmTransport(llm)
    transport.check_base(source)
    assert served_digests(llm) == base[0]  # a check writes nothing
    before = base[0]
    for _ in range(10):
        trainer.step()
        source.send(transport)
        served = served_digests(llm)
        assert served == trained_digests(trainer.model)
        assert served != before
        before = served
    own = answers(llm)
    assert own != base[1]

    transport.revert()
    assert served_digests(llm) == base[0]
    assert answers(llm) == base[1]

    with trainer.model.disable_adapter():
        source.forget()
        source.send(transport)
        assert served_digests(llm) == base[0]
    source.send(transport)
    assert served_digests(llm) == trained_digests(trainer.model)
    assert answers(llm) == own

    trainer.model.eval().save_pretrained(tmp_path / "adapter")
    from pacatune.cli import main

    merged = str(tmp_path / "merged")
    words = ["--model", model_path, "--adapter", str(tmp_path / "adapter"), "--output", merged]
    assert main(["merge", *words]) == 0
    other = start(merged)
    try:
        assert served_digests(other) == served_digests(llm)
        assert answers(other) == own
    finally:
        stop(other)


def test_prefixes_that_were_cached_are_forgotten(llm, trainer, source):
    from vllm import SamplingParams

    # Longer than a block of the cache, which has 128 tokens on a CPU.
    prompt = " ".join(f"item {number}" for number in range(45))
    sampling = SamplingParams(temperature=0, max_tokens=2, logprobs=1)

    def ask():
        (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
        assert 128 < len(answer.prompt_token_ids) < 250
        return [one.logprob for step in answer.outputs[0].logprobs for one in step.values()]

    transport = VllmTransport(llm)
    transport.revert()
    source.forget()
    trainer.step()
    old = ask()  # fills the cache
    source.send(transport)
    new = ask()
    assert new != old
    llm.reset_prefix_cache()
    assert ask() == new


@pytest.mark.parametrize("way", ["file", "process group"])
def test_columns_by_other_ways(way, llm, trainer, source, tmp_path, free_port):
    ways = {"file": {"folder": str(tmp_path)}}
    ways["process group"] = {"broadcast": ("127.0.0.1", free_port), "timeout": 60}
    transport = VllmTransport(llm, **ways[way])
    source.forget()
    for _ in range(2):
        trainer.step()
        source.send(transport)
        assert served_digests(llm) == trained_digests(trainer.model)
    assert len(list(tmp_path.glob("*.safetensors"))) == (2 if way == "file" else 0)
    transport.close()


def test_another_base_or_dtype_is_refused(llm, base, model_path):
    VllmTransport(llm).revert()
    model = adapted(model_path)
    with pytest.raises(Exception, match=r"the columns are for .* in torch\.float16"):
        ColumnSource(model, torch.float16).send(VllmTransport(llm))
    layer = model.base_model.model.model.layers[3].mlp.down_proj
    with torch.no_grad():
        layer.get_base_layer().weight[0, layer.paca_indices["default"][0]] += 1
    with pytest.raises(Exception, match="not the trainer's base"):
        VllmTransport(llm).check_base(ColumnSource(model))
    assert served_digests(llm) == base[0]


def test_a_trainer_goes_on_after_one_that_was_killed_within_a_sync(llm, trainer, source):
    llm.start_weight_update()
    transport = VllmTransport(llm)
    source.forget()
    source.send(transport)
    assert served_digests(llm) == trained_digests(trainer.model)
    llm.start_weight_update()
    with pytest.raises(Exception, match="already active"):  # another trainer's, which lives
        transport.revert()
    llm.finish_weight_update()
