"""What a study may say, and how it is read."""

import pytest

from pacatune.study import Arm, StudyConfig
from pacatune.study.config import read_study

ARMS = {"paca": Arm(rank=4), "lora": Arm(method="lora")}


STUDY = {"task": "smollm2-chat", "arms": ARMS}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Arm, {"method": "paka"}, r"`method` \('paka'\) must be one of paca"),
        (Arm, {"method": "full", "rank": 4}, r"`rank` \(4\) means nothing for 'full'"),
        (Arm, {"method": "shira", "alpha": 4.0}, r"`alpha` \(4.0\) means nothing for 'shira'"),
        (Arm, {"learning_rates": [1e-3, 1e-3]}, "must be different numbers"),
        (Arm, {"learning_rates": [-1.0]}, "must be different numbers above 0"),
        (StudyConfig, {"task": ""}, "`task` is ''; name a configuration's path"),
        (StudyConfig, {"arms": {}}, "`arms` is empty; name at least one arm"),
        (StudyConfig, {"reference": "dora"}, r"`reference` \('dora'\) must be one of the arms \["),
        (StudyConfig, {"seeds": [1, 1]}, "must be 1 to 20 different numbers"),
        (StudyConfig, {"seeds": list(range(21))}, "must be 1 to 20 different numbers"),
        (StudyConfig, {"seeds": [-1]}, "different numbers of at least 0"),
        (StudyConfig, {"tuning_seeds": 4}, r"`tuning_seeds` \(4\) must be in \[1, 3\]"),
        (StudyConfig, {"extend_grids": -1}, r"`extend_grids` \(-1\) must be at least 0"),
        (StudyConfig, {"forgetting_tokens": -1}, r"`forgetting_tokens` \(-1\) must be at least 0"),
        (StudyConfig, {"learning_rates": {"sgd": [1e-3]}}, r"`learning_rates` \('sgd'\) must be"),
        (StudyConfig, {"learning_rates": {"paca": [0.0]}}, r"`learning_rates.paca` \(\[0.0\]\) m"),
        (StudyConfig, {"rewind": [0.5, 1.0]}, r"`rewind` \(\[0.5, 1.0\]\) must be shares above 0"),
        (StudyConfig, {"command": "classify", "unrelated": "x"}, r"`unrelated` \('x'\) is for"),
        (StudyConfig, {"validation_fraction": 0.0}, r"`validation_fraction` \(0.0\) must be"),
    ],
)
def test_wrong_arms_and_studies(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**(STUDY if kind is StudyConfig else {}) | values)


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
