import numpy as np
import pytest
from safetensors.numpy import save_file

from pacatune.training import PacaSection
from pacatune.training.output import (
    check_folder,
    last_checkpoint,
    refuse_missing_weights,
    run_folder,
    what_is_intact,
)

STATE = '{"global_step": 1}'


def make_run(folder, *names):
    """Make a folder that a run has filled."""
    run = run_folder(folder)
    run.begin()
    for name in ("config.yaml", *names):
        is_folder = name.startswith("checkpoint")
        run.write(f"{name}/trainer_state.json" if is_folder else name, STATE)


@pytest.fixture
def check(make_config):
    def check_output(folder, resume=False, overwrite=False, **options):
        config = make_config(training={"output_dir": str(folder)}, **options)
        check_folder(config, resume=resume, overwrite=overwrite)

    return check_output


def test_folders_without_results_are_fine(check, tmp_path):
    check(tmp_path / "new")
    (tmp_path / "empty/inner").mkdir(parents=True)
    check(tmp_path / "empty")
    make_run(tmp_path / "out", "runs/log")
    check(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["checkpoint-3", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_other_run_is_refused(check, tmp_path, name):
    folder = tmp_path / "out"
    make_run(folder, name)
    with pytest.raises(
        FileExistsError,
        match=rf"holds another run \({name}\); choose another `training.output_dir`, continue "
        "with --resume, or delete it with --overwrite",
    ):
        check(folder)
    check(folder, overwrite=True)
    check(folder, resume=True)


def test_finished_run_is_not_offered_to_be_resumed(check, tmp_path):
    make_run(tmp_path / "out", "report.json")
    with pytest.raises(FileExistsError, match=r"`training.output_dir`, or delete it with --over"):
        check(tmp_path / "out")
    with pytest.raises(ValueError, match="is finished; there is nothing to resume"):
        check(tmp_path / "out", resume=True)


def test_resuming_minds_only_what_a_run_writes(check, tmp_path):
    folder = tmp_path / "out"
    make_run(folder, "checkpoint-2")
    (folder / "config.yaml").write_text("# why I chose this\n")
    (folder / "job.log").touch()
    check(folder, resume=True)
    (folder / "checkpoint-2" / "mine").touch()
    (folder / "README.md").touch()
    with pytest.raises(FileExistsError, match=r"\(README.md, checkpoint-2/mine\)"):
        check(folder, resume=True)


@pytest.mark.parametrize("where", ["model", "data", "adapter", "selection"])
def test_what_a_run_reads_is_not_in_its_output_folder(
    make_config, tiny_model_dir, data_path, tmp_path, where
):
    """Not even where the files are those of an earlier run."""
    folder = tmp_path / "out"
    make_run(folder, "report.json", "model/config.json", "columns.safetensors")
    options = {
        "model": {"model": {"path": str(folder / "model")}},
        "data": {"data": {"path": str(folder / "report.json")}},
        "adapter": {"adapter": str(folder)},
        "selection": {"paca": PacaSection(selection=str(folder / "columns.safetensors"))},
    }[where]
    config = make_config(**options)
    with pytest.raises(ValueError, match=rf"{where}.* lies in the output folder .*out, which this"):
        check_folder(config, resume=False, overwrite=True)
    config.training.output_dir = str(folder / "below")
    check_folder(config, resume=False, overwrite=False)


def test_columns_in_the_configuration_are_no_path(check, tmp_path):
    check(tmp_path / "out", paca=PacaSection(r=2, selection={"layers.0.q_proj": [0, 1]}))


def test_file_instead_of_folder(check, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match=r"out is a file; choose another: `training.output"):
        check(tmp_path / "out")


def test_place_that_cannot_be_written(check, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"nothing can be written in {tmp_path}; choose"):
        check(tmp_path / "new" / "deep")


def test_resume_and_overwrite_exclude_each_other(check, tmp_path):
    with pytest.raises(ValueError, match="--resume and --overwrite exclude each other"):
        check(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("names", [(), ("config.yaml", "checkpoint-2")])
def test_resume_of_nothing(check, tmp_path, names):
    for name in names:
        (tmp_path / "new" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no run to resume; start it without --resume"):
        check(tmp_path / "new", resume=True)


@pytest.mark.parametrize("state", [None, "", '{"global_step": 9', "[]", "{}"])
def test_last_checkpoint_is_the_last_complete_one(tmp_path, state):
    make_run(tmp_path, "checkpoint-2", "checkpoint-10", "checkpoint-9")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    path.unlink() if state is None else path.write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_what_is_intact(tmp_path):
    assert what_is_intact(tmp_path).startswith("no checkpoint was saved before; make room")
    make_run(tmp_path, "checkpoint-2")
    assert "checkpoint-2 is intact: make room" in what_is_intact(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "lacking"),
    [({"layer.paca_delta": np.ones((0, 2), np.float32)}, "layer.paca_delta"), ({}, "every weight")],
)
def test_missing_weights_are_refused(tmp_path, tensors, lacking):
    save_file({"ok": np.ones((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    refuse_missing_weights(tmp_path)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"b.safetensors lacks {lacking}: .*stage3_gather_16bit"):
        refuse_missing_weights(tmp_path)
