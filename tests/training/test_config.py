import copy

import pytest

from pacatune import installation
from pacatune.methods import CLASSIFIER_METHODS, METHODS, TEXT_METHODS
from pacatune.training import DataConfig, LoraSection, ModelConfig, RunConfig, TrainingConfig, train
from tests.training.runs import QUIET


def run_config(**options):
    """Declare a run on files that are not there; options override what a section says."""
    usual = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"use_cpu": True}}
    for name, section in usual.items():
        given = options.get(name, {})
        options[name] = section | given if isinstance(given, dict) else given
    return RunConfig(**options)


def test_an_old_trl_is_refused(monkeypatch):
    monkeypatch.setattr(installation, "version", lambda name: "1.15.0")
    with pytest.raises(ValueError, match=r"`pacatune train` needs TRL 1.16 or newer, and this is"):
        run_config()


def test_it_is_complete(tmp_path):
    """What is missing is asked for, and what was set on a section before is there."""
    training = TrainingConfig()
    training.max_steps, training.output_dir = 1, "a6"
    run = run_config(training=training)
    assert (run.training.max_steps, run.training.output_dir) == (1, "a6")
    with pytest.raises(ValueError, match=r"`data.path` is ''; giv"):
        RunConfig(model={"path": "m"})
    with pytest.raises(TypeError, match=r"`data` is a DataConfig; .*PreferenceDataConfig"):
        run_config(task="dpo", data=DataConfig(path="d"))


def test_sections_may_be_used_again():
    sections = {
        "model": ModelConfig(path="m"),
        "data": DataConfig(path="d"),
        "training": TrainingConfig(use_cpu=True),
        "lora": LoraSection(),
    }
    before = copy.deepcopy({name: vars(section) for name, section in sections.items()})
    for method in TEXT_METHODS:
        run = RunConfig(method=method, **sections)
        assert run.training.learning_rate == METHODS[method].text_rate
        assert run.model.quantization == METHODS[method].quantization
        assert run.lora.lora_dropout == (METHODS[method].dropout or 0)
    run = RunConfig(**sections, early_stopping_patience=2)
    assert run.training.load_best_model_at_end
    assert {name: vars(section) for name, section in sections.items()} == before


def test_what_is_filled_in():
    assert run_config(model={"dtype": "bf16"}).model.dtype == "bfloat16"
    assert run_config(training={"learning_rate": 0.1}).training.learning_rate == 0.1
    assert run_config(task="dpo").training.learning_rate == pytest.approx(5e-5)
    assert run_config(task="reward").training.learning_rate == 5e-4
    for method, rate in (("paca", 1e-3), ("lora", 1e-3), ("full", 1e-6)):
        run = run_config(task="grpo", reward=["a:f"], method=method)
        assert run.training.learning_rate == pytest.approx(rate)
    for method in CLASSIFIER_METHODS:
        rate = run_config(task="classifier", method=method).training.learning_rate
        assert rate == METHODS[method].head_rate
    assert run_config(method="qlora", model={"quantization": "fp4"}).model.quantization == "fp4"
    training = run_config().training
    assert (training.report_to, training.resolved().report_to) == ("tensorboard", ["tensorboard"])
    assert run_config().data.eval_fraction == DataConfig(path="d").eval_fraction > 0
    assert run_config(training={"eval_strategy": "no"}).data.eval_fraction == 0
    assert training.bf16 is not None
    # What says no length, or is not read, may be anything.
    run_config(training={"num_train_epochs": 0, "max_steps": 3, "max_length": None})
    run_config(method="dora", lora={"r": 4}, paca={"r": 16})
    run_config(training={"disable_dropout": False}, task="dpo", method="lora_dropout")
    run_config(training={"precompute_ref_log_probs": True}, task="dpo", method="full")


def test_what_trains_nothing():
    sizes = ["per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"]
    sizes += ["max_steps", "eval_steps", "save_steps", "save_total_limit", "max_length"]
    numbers = dict.fromkeys(sizes, 0) | {"logging_steps": -1, "learning_rate": float("inf")}
    for name, value in numbers.items():
        message = rf"`training.{name}` \({value}\) must be above 0; raise"
        with pytest.raises(ValueError, match=message):
            run_config(training={name: value})
        run = run_config()
        setattr(run.training, name, value)  # which is checked when it is trained, before all else
        with pytest.raises(ValueError, match=message):
            train(run, console=QUIET)


NO_EVALUATION = {"data": {"eval_fraction": 0}}
SWITCHED_OFF = {"training": {"eval_strategy": "no"}}
STOPS = {"early_stopping_patience": 2}
GRPO, BETA = {"task": "grpo", "reward": ["a:f"]}, {"training": {"beta": 0.1}}
NF4 = {"model": {"quantization": "nf4"}}
NEEDS_EVALUATION = "need evaluation data; set `data.eval_path` or"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"dtype": "bflaot16"}}, r"`model.dtype` \('bflaot16'\) .* mean 'bf"),
        ({"task": "spo"}, r"`task` \('spo'\) must be one of sft, dpo.* did you mean"),
        ({"method": "vera"}, r"`method` \('vera'\) must be one of paca, qpaca, lora, "),
        ({"lean": "off", "lean_level": 2}, r"`lean_level` \(2\) with `lean` \('off'\)"),
        ({"training": {"max_step": 3}}, "unknown option training.max_step; did you mean 'max"),
        ({"reward": ["a:f"]}, r"the task sft has no `reward` \(\['a:f'\]\); drop it"),
        ({"task": "classifier", "adapter": "a"}, r"task classifier has no `adapter` \('a'\); drop"),
        ({"training": ModelConfig(path="m")}, "a ModelConfig; .* pacatune.training.TrainingConfig"),
        # Evaluations
        (STOPS | {"training": {"eval_strategy": "epoch"}}, "the save and eval strategy to match"),
        (STOPS | NO_EVALUATION, NEEDS_EVALUATION),
        (NO_EVALUATION | {"training": {"save_strategy": "best"}}, NEEDS_EVALUATION),
        (SWITCHED_OFF | {"data": {"eval_path": "e"}}, r"\('no'\) evaluates .* `data.eval_path`"),
        (SWITCHED_OFF | {"data": {"eval_fraction": 0.2}}, "nothing, and `data.eval_fraction` ask"),
        # Options of other methods
        ({"method": "lora", "paca": {"r": 32}}, r"`paca.r` \(32\) is an option of paca, qpaca, an"),
        ({"method": "full", "lora": {"r": 4}}, r"`lora.r` \(4\) is an option of lora, lora_dropou"),
        ({"method": "shira", "lora": {"lora_alpha": 4.0}}, r"\(4.0\): what `method` \('shira'\) t"),
        ({"method": "full"} | NF4, r"\('nf4'\) with `method` \('full'\): quantised weights cannot"),
        # References and rewards
        ({"task": "dpo", "method": "full"}, r"`method` \('full'\) with `task` \('dpo'\): the ref"),
        ({"task": "dpo", "paca": {"bias": "all"}}, r"`paca.bias` \('all'\), which stays trained"),
        ({"task": "dpo", "method": "lora_dropout"}, r"`lora.lora_dropout` \(0.05, of `method`"),
        ({"task": "dpo", "adapter": "a"}, r"`adapter` \('a'\) .*: the reference is the model with"),
        (GRPO | BETA | {"method": "full"}, "or set `training.beta` to 0"),
        (GRPO | {"training": {"num_generations": 3}}, "must be divisible by"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run_config(**options).training.resolved()
