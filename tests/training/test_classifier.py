import io

import pytest
from rich.console import Console

from pacatune.data.config import TextClassConfig
from pacatune.training import RunConfig, preview, train
from pacatune.training.classifier import split_texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"`data.path` is ''; give a file, a folder or"),
        ({"eval_fraction": 1.0}, r"`data.eval_fraction` \(1.0\) must be in \[0, 1\)"),
        ({"num_train": 0}, r"`data.num_train` \(0\) must be at least 1"),
    ],
)
def test_data_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TextClassConfig(**{"path": "d", **options})


def test_split(tmp_path):
    rows = "".join(f'{{"text": "t{i}", "label": "{"aab"[i % 3]}"}}\n' for i in range(10))
    (tmp_path / "rows.jsonl").write_text(rows)
    path = str(tmp_path / "rows.jsonl")
    texts, held_out = split_texts(TextClassConfig(path=path, eval_fraction=0.2))
    assert (len(texts), len(held_out)) == (8, 2)
    assert {*texts["label"]} == {"a", "b"}
    again, _ = split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=6))
    assert again["text"][:] == texts["text"][:6]
    with pytest.raises(ValueError, match=r"`data.num_train` \(9\) must be at most 8"):
        split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=9))
    texts, held_out = split_texts(TextClassConfig(path=path, eval_path=path))
    assert (len(texts), len(held_out)) == (10, 10)


@pytest.mark.parametrize("method", ["paca", "head"])
def test_a_run(tmp_path, tiny_model_dir, method):
    words = ("red", "green", "blue")
    rows = "".join(
        f'{{"text": "It is {words[i % 3]} {i}.", "label": "{words[i % 3]}"}}\n' for i in range(60)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    config = RunConfig(
        task="classifier",
        method=method,
        model={"path": str(tiny_model_dir)},
        data={"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.2},
        training={
            "output_dir": str(tmp_path / "out"),
            "max_steps": 30,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
        },
    )
    report = train(config, console=Console(file=io.StringIO()))
    assert report.eval_metrics_after["accuracy"] > (0.9 if method == "paca" else 0.3)
    assert dict(report.table())["held-out accuracy after"]
    card = (tmp_path / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    exec(code, names := {})
    assert names["model"].config.num_labels == 3
    preview(config, 2, console=(console := Console(file=io.StringIO())))
    assert console.file.getvalue().count("It is ") == 2
