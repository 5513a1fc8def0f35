"""An adapter's configuration from a stranger: nothing unknown passes, nothing is tried for ever."""

import json

import pytest
from peft import TaskType

from pacatune.adapters.folder import AUTO_CLASSES, read_config, read_lora_config
from tests.adapters.fixtures import edit_json

HANGS = "(([a-z_.0-9]+)+)+!"
NO_PATTERN = r"`{}` \('{}'\) is no regular expression"
COLUMN_RATES = {"normalize": "weight", "column_rates": {HANGS: [4.0]}}


@pytest.fixture
def edited(adapter_copy):
    """Return a function that changes adapter_config.json and gives its path."""
    return lambda **changes: edit_json(adapter_copy / "adapter_config.json", **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter_config.json"


def test_a_saved_configuration_is_read(edited):
    config = read_config(edited(rank_pattern={"v_proj": 2}, paca_alpha=4.5))
    assert config.peft_type == "PACA"
    assert (config.r, config.paca_alpha, config.rank_pattern) == (4, 4.5, {"v_proj": 2})
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj"}


def test_the_keys_of_another_reader_are_enough(path):
    config = {"peft_type": "PACA", "r": 8, "paca_alpha": 16, "target_modules": "all-linear"}
    path.write_text(json.dumps({**config, "random_seed": 1, "init_weights": True}))
    assert read_config(path).paca_alpha == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paca_alfa": 8}, "unknown key 'paca_alfa'; the nearest known one is 'paca_alpha'"),
        ({"auto_map": {}}, "unknown key 'auto_map'; the nearest .* 'auto_mapping'"),
        ({"peft_type": "LORA"}, "gives `peft_type` = 'LORA'; it must be 'PACA'"),
        ({"peft_type": None}, "gives `peft_type` = None; it must be 'PACA'"),
        ({"r": "8"}, r"gives `r` = '8' \(str\); it must be int"),
        ({"r": 8.0}, r"gives `r` = '8.0' \(float\); it must be int"),
        ({"r": True}, r"gives `r` = 'True' \(bool\); it must be int"),
        ({"r": 0}, r"`r` \(0\) must be an integer of at least 1"),
        ({"paca_alpha": None}, r"`paca_alpha` \(None\) must be a finite number"),
        ({"rank_pattern": {"q": "x"}}, r"gives `rank_pattern` = .* it must be dict\[str, int\]"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` \(0\) must be"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` \(\[1\]\) must be a dictionary"),
        ({"target_modules": [1]}, r"gives `target_modules` = .* list\[str\] \| str \| None"),
        ({"modules_to_save": "head"}, r"gives `modules_to_save` = .* list\[str\] \| None"),
        ({"bias": "some"}, "gives `bias` = 'some' .*'none', 'all', 'paca_only'"),
        ({"selection": "unheard_of"}, r"`selection` \('unheard_of'\) must be one of"),
        ({"random_seed": 0.5}, r"gives `random_seed` = '0.5' .*; it must be int \| None"),
        ({"task_type": "NONSENSE"}, "Invalid task type: 'NONSENSE'"),
        ({"target_modules": "(q_proj"}, NO_PATTERN.format("target_modules", r"\(q_proj")),
        ({"exclude_modules": ["*"]}, NO_PATTERN.format("exclude_modules", r"\*")),
        ({"rank_pattern": {"[": 4}}, NO_PATTERN.format("rank_pattern", r"\[")),
        ({"alpha_pattern": {"[": 4}}, NO_PATTERN.format("alpha_pattern", r"\[")),
        ({"selection": {"[": [4]}}, NO_PATTERN.format("columns", r"\[")),
        ({"rank_pattern": {HANGS: 4}}, "`rank_pattern` .* too many ways"),
        ({"alpha_pattern": {HANGS: 4}}, "`alpha_pattern` .* too many ways"),
        ({"target_modules": HANGS}, "`target_modules` .* too many ways"),
        ({"exclude_modules": HANGS}, "`exclude_modules` .* too many ways"),
        ({"selection": {HANGS: [4]}}, "`columns` .* too many ways"),
        ({"columns": {HANGS: [4]}}, "`columns` .* too many ways"),
        (COLUMN_RATES, "`column_rates` .* too many ways"),
    ],
)
def test_a_wrong_configuration_is_refused(edited, changes, message):
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{message}"):
        read_config(edited(**changes))


def test_keys_of_another_peft_do_not_matter_while_they_are_off(path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.5, "use_future": False, "new": None}
    path.write_text(json.dumps(config))
    assert read_lora_config(path).lora_alpha == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "gives `peft_type` = 'IA3'; only adapters of the methods"),
        ({"use_future": True}, "holds the unknown key 'use_future'; the nearest"),
        ({"runtime_config": {"a": 1}}, "holds the unknown key 'runtime_config'"),
        ({"megatron_config": {"a": 1}}, "sets `megatron_config`, which makes PEFT import a module"),
        ({"target_modules": "("}, NO_PATTERN.format("target_modules", r"\(")),
        ({"target_modules": [1]}, NO_PATTERN.format("target_modules", "1")),
        ({"task_type": "NONSENSE"}, "Invalid task type"),
        ({"rank_pattern": {HANGS: 4}}, "`rank_pattern` .* too many ways"),
        ({"target_modules": HANGS}, "`target_modules` .* too many ways"),
        ({"use_dora": True, "target_modules": 3}, NO_PATTERN.format("target_modules", "3")),
    ],
)
def test_a_wrong_lora_configuration_is_refused(path, changes, message):
    path.write_text(json.dumps({"peft_type": "LORA", **changes}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{message}"):
        read_lora_config(path)


def test_task_types_are_those_of_peft():
    assert list(AUTO_CLASSES) == [task.value for task in TaskType]
