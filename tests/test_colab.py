"""The setup cell in Colab: a Drive that works, refuses, vanishes, is full, or delivers late.

`google.colab` is a stub; the cell is the notebooks' own. Whatever the Drive does, the result is the
undisturbed one, bit for bit.
"""
import errno
import json
import shutil
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from helpers import CFG, make_small

import utils
from notebooks import store as store_module
from utils import open_store, run_name, train

NOTEBOOKS = sorted(Path(utils.__file__).parent.glob("notebooks/0*.ipynb"))
RUN = replace(CFG, num_rounds=6, eval_every=1)


def setup_cell(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if c.cell_type == "code")


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Runs the setup cell as Colab would in /content; gives the cell's names."""
    make_small(monkeypatch)
    content = tmp_path / "content"
    content.mkdir()
    monkeypatch.chdir(content)
    monkeypatch.setattr(sys, "path", sys.path[:])  # which the cell adds to
    monkeypatch.delenv("RESULTS_DIR", raising=False)
    monkeypatch.delenv("TRAIN", raising=False)
    drive = content / "drive"

    def mount(at):
        (drive / "MyDrive" / "fl-task-arithmetic").mkdir(parents=True, exist_ok=True)
        # the project's folder on the Drive, as a user keeps it
        shutil.copy(utils.__file__, drive / "MyDrive" / "fl-task-arithmetic" / "utils.py")

    def start(mount=mount, notebook=NOTEBOOKS[2]):
        stub = types.ModuleType("google.colab")
        stub.drive = types.SimpleNamespace(mount=mount)
        monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", stub)
        names = {}
        exec(setup_cell(notebook).replace("/content", str(content)), names)
        return names
    start.drive, start.folder = mount, drive / "MyDrive" / "fl-task-arithmetic"
    return start


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    make_small(monkeypatch)
    return train(RUN, utils.Store(tmp_path / "undisturbed"))


def science(result: dict) -> dict:
    """A result without what differs between any two sessions."""
    return {k: v for k, v in result.items() if k not in ("seconds",)}


def fresh_session(colab, monkeypatch):
    """Colab gives a new machine: the local disk is empty, the Drive is as it was."""
    shutil.rmtree("results", ignore_errors=True)
    names = colab()
    return open_store("full", names["DRIVE"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_the_same_setup_cell_and_it_may_be_repeated(colab, path):
    assert setup_cell(path) == setup_cell(NOTEBOOKS[0])
    first, second = colab(notebook=path), colab(notebook=path)
    assert first["DRIVE"] == second["DRIVE"] == colab.folder
    assert first["HOME"] == colab.folder  # utils.py was found there


def test_with_a_drive_results_and_checkpoints_are_copied_there(colab, undisturbed):
    store = open_store("full", colab()["DRIVE"])
    assert science(train(RUN, store)) == science(undisturbed)
    for root in (Path("results"), colab.folder / "results"):
        assert json.loads((root / f"{run_name(RUN)}.json").read_text())["test"]
        assert list((root / "checkpoints" / run_name(RUN)).glob("*.safetensors"))


def test_a_refused_drive_is_a_loud_warning_and_local_storage(colab, undisturbed):
    def refuse(at):
        raise ValueError("mount failed: no authorisation")
    with pytest.warns(UserWarning, match="NO DRIVE.*no authorisation"), \
            pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(utils.__file__).parent / "notebooks")  # utils.py lies above
        names = colab(mount=refuse)
    assert names["DRIVE"] is None
    store = open_store("full", names["DRIVE"])
    assert store.drive is None
    assert store.root == Path(utils.__file__).parent / "results"


def disturb(monkeypatch, at: int, action):
    """Does `action` before round `at`."""
    honest = utils.federated_round

    def disturbed(run, state):
        if state.round == at:
            action()
        return honest(run, state)
    monkeypatch.setattr(utils, "federated_round", disturbed)


def test_a_drive_that_vanishes_midway_is_caught_up_with(colab, undisturbed, monkeypatch):
    store = open_store("full", colab()["DRIVE"])
    store.minutes = 0
    away = colab.folder.with_name("away")

    def vanish():
        colab.folder.rename(away)
        colab.folder.write_text("Transport endpoint is not connected")  # nothing can be made here

    def come_back():
        colab.folder.unlink()
        away.rename(colab.folder)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="only in .* for now"):
        disturb(patch, 2, vanish)
        disturb(patch, 4, come_back)
        assert science(train(RUN, store)) == science(undisturbed)
    names = {f.name for f in (colab.folder / "results").rglob("*") if f.is_file()}
    assert names >= {f.name for f in Path("results").rglob("*.json")}
    assert not store.late


def test_a_drive_that_stays_away_loses_nothing(colab, undisturbed, monkeypatch):
    store = open_store("full", colab()["DRIVE"])
    store.minutes = 0
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="only in .* for now"):
        disturb(patch, 3, lambda: shutil.rmtree(colab.folder) or colab.folder.write_text("gone"))
        assert science(train(RUN, store)) == science(undisturbed)
    assert science(store.result(RUN)) == science(undisturbed)


def test_a_full_drive_is_told_and_training_goes_on(colab, undisturbed, monkeypatch):
    store, honest = open_store("full", colab()["DRIVE"]), store_module._replace

    def full(path, content):
        if colab.folder in Path(path).parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(path, content)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left"):
        patch.setattr(store_module, "_replace", full)
        assert science(train(RUN, store)) == science(undisturbed)
    train(replace(RUN, seed=1, num_rounds=1), store)  # there is room again: the late ones follow
    assert (colab.folder / "results" / f"{run_name(RUN)}.json").exists()


@pytest.mark.parametrize("fault", ["truncated", "late", "empty"])
def test_a_new_session_resumes_from_the_newest_checkpoint_that_verifies(
        colab, undisturbed, monkeypatch, fault):
    store = open_store("full", colab()["DRIVE"])
    store.minutes = 0

    def cut():
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        disturb(patch, 4, cut)
        assert train(RUN, store)["status"] == "interrupted"
    checkpoints = sorted((colab.folder / "results/checkpoints" / run_name(RUN)).glob("*"))
    assert len(checkpoints) == 2
    content = checkpoints[-1].read_bytes()
    if fault == "late":
        checkpoints[-1].unlink()  # the Drive's own copying had not got that far
    else:
        checkpoints[-1].write_bytes(content[:len(content) // 2] if fault == "truncated" else b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = fresh_session(colab, monkeypatch)
        begun = []
        with monkeypatch.context() as patch:
            disturb(patch, 3, lambda: begun.append(3))
            assert science(train(RUN, store)) == science(undisturbed)
    assert begun == [3]  # round 4 was lost with its checkpoint, and is done again


def test_a_new_session_finds_a_finished_run_on_the_drive(colab, undisturbed, monkeypatch):
    train(RUN, open_store("full", colab()["DRIVE"]))
    store = fresh_session(colab, monkeypatch)
    monkeypatch.setattr(utils, "open_run", lambda *a: pytest.fail("trained again"))
    assert science(train(RUN, store)) == science(undisturbed)
