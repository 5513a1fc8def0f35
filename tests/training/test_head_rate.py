"""A new head has a learning rate of its own, the same beside every method."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pacatune.training import train
from pacatune.training.config import HEAD_RATE
from tests.training.runs import QUIET, make_trainer, write_rows

WORDS = ("red", "green", "blue")


@pytest.fixture
def make_classifier(make_task_config, tmp_path):
    rows = [{"text": f"It is {WORDS[i % 3]} {i}.", "label": WORDS[i % 3]} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def make(method="paca", *, training=(), **options):
        return make_task_config(
            "classifier", method, data={"path": str(path)}, training=dict(training), **options
        )

    return make


def rates(config):
    """Rate of each trained parameter, by its name."""
    trainer = make_trainer(config)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    found = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_it_is_the_same_beside_every_method(make_classifier, method):
    found = rates(make_classifier(method, training={"learning_rate": 1e-4}))
    heads = {name for name in found if ".score." in f".{name}"}
    assert heads
    assert {found.pop(name) for name in heads} == {HEAD_RATE}
    assert {*found.values()} == {1e-4}


def test_of_the_head_alone(make_classifier):
    assert {*rates(make_classifier("head", training={"learning_rate": 0.02})).values()} == {0.02}
    with pytest.raises(ValueError, match=r"head_learning_rate` \(0.1\) is another rate than"):
        make_classifier("head", training={"learning_rate": 0.02, "head_learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"`training.head_learning_rate` \(0\) must be above 0"):
        make_classifier(training={"head_learning_rate": 0})


def test_a_head_of_its_own_learns_as_the_rest(make_classifier, tiny_model_dir, tmp_path):
    folder = tmp_path / "with-head"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    config = make_classifier(model={"path": str(folder)}, training={"learning_rate": 1e-4})
    assert {*rates(config).values()} == {1e-4}


def test_one_step_of_it(make_classifier):
    """Three times the rate, three times the step; what is beside the head moves as before."""
    plain = {"optim": "sgd", "max_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    plain |= {"weight_decay": 0.0, "max_grad_norm": 0.0, "eval_strategy": "no"}
    moved = []
    for rate in (0.01, 0.03):
        trainer = make_trainer(make_classifier(training=plain | {"head_learning_rate": rate}))
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        trainer.train()
        moved.append({name: p.detach() - before[name] for name, p in trained.items()})
    for name, step in moved[0].items():
        factor = 3 if ".score." in name else 1
        torch.testing.assert_close(moved[1][name], factor * step, rtol=1e-3, atol=1e-7)
    assert any(step.any() for name, step in moved[0].items() if ".score." in name)


def test_it_goes_on_where_it_stopped(make_classifier, tmp_path):
    """The moments of a resumed run belong to the same parameters."""
    steps = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no", "head_learning_rate": 0.01}
    out = tmp_path / "out"
    whole = train(make_classifier(training=steps), console=QUIET)
    for name in ("report.json", "checkpoint-6"):
        path = out / name
        path.unlink() if path.is_file() else [f.unlink() for f in path.iterdir()] and path.rmdir()
    again = train(make_classifier(training=steps), resume=True, console=QUIET)
    assert again.train_losses == whole.train_losses
