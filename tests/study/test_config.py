"""What a study may say, and how it is read."""

import pytest

from pacatune.study import Arm, StudyConfig
from pacatune.study.config import read_study

ARMS = {"paca": Arm(rank=4), "lora": Arm(method="lora")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "paka"}, r"`method` \('paka'\) must be one of paca"),
        ({"method": "full", "rank": 4}, r"`rank` \(4\) means nothing for 'full'"),
        ({"method": "shira", "alpha": 4.0}, r"`alpha` \(4.0\) means nothing for 'shira'"),
        ({"learning_rates": []}, r"`learning_rates` \(\[\]\) must be different numbers above 0"),
        ({"learning_rates": [1e-3, 1e-3]}, "must be different numbers"),
        ({"learning_rates": [-1.0]}, "must be different numbers above 0"),
    ],
)
def test_wrong_arms(values, message):
    with pytest.raises(ValueError, match=message):
        Arm(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": ""}, "`task` is ''; name a configuration's path"),
        ({"arms": {}}, "`arms` is empty; name at least one arm"),
        ({"reference": "dora"}, r"`reference` \('dora'\) must be one of the arms \['lora', 'paca'"),
        ({"seeds": []}, r"`seeds` \(\[\]\) must be 1 to 20 different numbers"),
        ({"seeds": [1, 1]}, "must be 1 to 20 different numbers"),
        ({"seeds": list(range(21))}, "must be 1 to 20 different numbers"),
        ({"seeds": [-1]}, "different numbers of at least 0"),
        ({"tuning_seeds": 4}, r"`tuning_seeds` \(4\) must be in \[1, 3\]"),
        ({"extend_grids": -1}, r"`extend_grids` \(-1\) must be at least 0"),
        ({"forgetting_tokens": -1}, r"`forgetting_tokens` \(-1\) must be at least 0"),
        ({"learning_rates": {"sgd": [1e-3]}}, r"`learning_rates` \('sgd'\) must be one of paca, "),
        ({"learning_rates": {"paca": [0.0]}}, r"`learning_rates.paca` \(\[0.0\]\) must be"),
        ({"validation_fraction": 0.0}, r"`validation_fraction` \(0.0\) must be above 0"),
    ],
)
def test_wrong_studies(values, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**{"task": "smollm2-chat", "arms": ARMS, **values})


def read(folder, text):
    path = folder / "study.yaml"
    path.write_text(text)
    return read_study(path)


def test_a_study_is_read(tmp_path):
    text = """
task: run.yaml
options: {training: {max_steps: 8}}
arms: {paca: {rank: 4, learning_rates: [1e-3, 2e-3], options: {lean: off}}, full: {method: full}}
seeds: [3, 4]
match: parameters
learning_rates: {full: [1e-5]}
"""
    paca = Arm(rank=4, learning_rates=[1e-3, 2e-3], options={"lean": "off"})
    assert read(tmp_path, text) == StudyConfig(
        task="run.yaml",
        options={"training": {"max_steps": 8}},
        arms={"paca": paca, "full": Arm(method="full")},
        seeds=[3, 4],
        match="parameters",
        learning_rates={"full": [1e-5]},
        reference="paca",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm: {}", r"study.yaml: unknown key 'arm'; did you mean 'arms'\? There are arms, "),
        ("arms: {p: {rang: 4}}", r"arm 'p': unknown key 'rang'; did you mean 'rank'"),
        ("arms: [paca]", r"`arms` is a list; it must map names to arms"),
        ("arms: {p: {rank: x}}", r"study.yaml: .*rank"),
        ("arms: {p: {rank: 1}}\nmetric: speed", r"study.yaml: .*metric"),
    ],
)
def test_files_that_are_no_study(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, f"task: a\n{text}\n")
