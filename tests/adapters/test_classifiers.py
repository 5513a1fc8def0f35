"""Adapters of classifiers and reward models, whose new head is saved with them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from pacatune.adapters.base import load_base, num_labels_of
from pacatune.adapters.folder import open_adapter
from pacatune.adapters.loading import answered_warnings, load_language_model
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import edit_json, logits_of, save_adapter


@pytest.fixture
def classifier(tiny_model_dir, tmp_path, num_labels):
    """The folder of a PaCA adapter with a head of so many classes."""
    folder = tmp_path / "classifier"
    save_adapter(tiny_model_dir, folder, task_type="SEQ_CLS", num_labels=num_labels)
    return folder


def adapted(model_dir, folder, num_labels):
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=num_labels)
    with answered_warnings():
        return PeftModel.from_pretrained(base, folder)


# 2 is transformers' default.
@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_merging_keeps_the_head(classifier, tiny_model_dir, tmp_path, num_labels):
    found = num_labels_of(str(tiny_model_dir), open_adapter(classifier))
    assert found == (None if num_labels == 2 else num_labels)
    assert merge(str(tiny_model_dir), classifier, tmp_path / "merged").is_verified
    logits = logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    assert logits.shape == (2, num_labels)
    expected = logits_of(adapted(tiny_model_dir, classifier, num_labels))
    assert torch.allclose(logits, expected, atol=1e-5)


def test_a_merged_lora_reward_model(tiny_model_dir, tmp_path):
    base = load_base(str(tiny_model_dir), task_type="SEQ_CLS", num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    merge(str(tiny_model_dir), tmp_path / "lora", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 1


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes, and the adapter has a head of 3"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "must name the classes from '0' on"),
        ([], "must name the classes from '0' on"),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}, "pad_token_id": "x"},
            r"`pad_token_id` \('x'\) must",
        ),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}, "problem_type": ["x"]},
            r"`problem_type` \(\['x'\]\) must be one of regression, single_label",
        ),
    ],
)
@pytest.mark.parametrize("num_labels", [3])
def test_what_a_stranger_says_of_the_head(classifier, tiny_model_dir, tmp_path, head, message):
    edit_json(classifier / "pacatune.json", head=head)
    with pytest.raises(ValueError, match=message):
        merge(str(tiny_model_dir), classifier, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("num_labels", [1])
def test_a_classifier_writes_no_text(classifier, tiny_model_dir):
    with pytest.raises(ValueError, match=r"reward model \(`task_type` = 'SEQ_CLS'\), which writes"):
        load_language_model(str(tiny_model_dir), classifier)
