import pytest

from pacatune.training.classifier import TextClassConfig, split_texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"`data.path` is ''; give a file with columns text and label"),
        ({"eval_fraction": 1.0}, r"`data.eval_fraction` \(1.0\) must be in \[0, 1\)"),
        ({"max_length": 0}, r"`data.max_length` \(0\) must be at least 1"),
    ],
)
def test_data_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TextClassConfig(**{"path": "d", **options})


def test_split(tmp_path):
    rows = "".join(f'{{"text": "t{i}", "label": "{"aab"[i % 3]}"}}\n' for i in range(10))
    (tmp_path / "rows.jsonl").write_text(rows)
    path = str(tmp_path / "rows.jsonl")
    train_texts, held_out = split_texts(TextClassConfig(path=path, eval_fraction=0.2))
    assert (len(train_texts.texts), len(held_out.texts)) == (8, 2)
    assert train_texts.classes() == ["a", "b"]
    again, _ = split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=6))
    assert again.texts == train_texts.texts[:6]
    assert again.fingerprint() != train_texts.fingerprint()
    with pytest.raises(ValueError, match=r"has 10 rows, of which 2 are held out; `data.num_train`"):
        split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=9))
