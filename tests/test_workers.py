"""Runs side by side in processes: the same results, stopped, killed and gone on with."""
import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Mine

import utils
from notebooks import experiments
from notebooks.backup import BackedUpStore
from notebooks.experiments import Session, close_workers, train_all
from utils import Config, FedAvg, register_algorithm, run_name

# Workers are processes of their own: nothing that a test patches reaches them, so these are real
# runs, of the real small ViT, and as short as can be.
CFG = Config(weights="none", arch="mini", dataset="synthetic", image_size=32, batch_size=2,
             val_fraction=0.5, eval_images=20, num_clients=100, participation=0.02, local_steps=1,
             num_rounds=3, eval_every=1, head="train", lr=0.01, calibration_images=8,
             calibration_rounds=1)
GRID = [
    CFG,
    replace(CFG, classes_per_client=5),
    replace(CFG, algorithm="scaffold"),
    replace(CFG, lr=0.03, eval_every=2),
    replace(CFG, seed=1),
    replace(CFG, rule="random", head_rounds=1),
]


def session_of(path, workers=2, **options):
    store = BackedUpStore(path, minutes=0, quiet=True)
    return Session("small", CFG, store, path / "figures", (0,), workers,
                   experiments.SCALES["small"], **options)


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays():
    yield
    close_workers()
    assert multiprocessing.active_children() == []


def stored(path):
    """All results, without the seconds and what only tells where they were trained."""
    found = {}
    for file in sorted(Path(path).glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for name in ("seconds", "segments"):
            result.pop(name)
        found[file.name] = result
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one worker makes of the grid."""
    path = tmp_path_factory.mktemp("alone")
    assert train_all(GRID, session_of(path, workers=1)) == []
    return path


def test_two_workers_give_the_bits_of_one(tmp_path, alone):
    seen = []

    def watch(cfg, history):
        seen.append((run_name(cfg), history[-1]["round"]))
    assert train_all(GRID, session_of(tmp_path), watch=watch) == []
    assert stored(tmp_path) == stored(alone)
    for file in alone.glob("*.npy"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert len({name for name, _ in seen}) == len(GRID)
    assert (run_name(CFG), 3) in seen
    segments = [json.loads(f.read_text())["segments"] for f in tmp_path.glob("*.json")]
    assert {part["threads"] for parts in segments for part in parts} == {1}


def test_the_weights_of_what_workers_have_done_are_deleted_while_they_go_on(
        tmp_path, alone, monkeypatch):
    """But for those of one run that another section keeps, and of a head's own run."""
    def section(cfgs, keep):
        return experiments.Section("05", lambda session: dict(enumerate(cfgs)), ("i",),
                                   searched=False, keep=keep)
    monkeypatch.setattr(experiments, "SECTIONS", {"runs": section(GRID, False),
                                                  "kept": section(GRID[-2:-1], True)})
    session = session_of(tmp_path)
    monkeypatch.setattr(experiments, "section_runs", lambda name, session: list(
        experiments.SECTIONS[name].cells(session).values()))

    def weights():
        return {run_name(cfg) for cfg in GRID
                if session.store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")}
    most = []
    assert experiments.run_section("runs", session, lambda *_: most.append(len(weights()))) == []
    assert stored(tmp_path) == stored(alone)
    assert weights() == {run_name(GRID[-2])}
    assert max(most) <= 3  # of the two that are trained, and of the one that is kept


def test_workers_wait_for_the_next_call_of_any_session(tmp_path, alone):
    session = session_of(tmp_path / "first")
    assert train_all(GRID[:2], session, test=False) == []
    first = multiprocessing.active_children()
    assert len(first) == 2
    assert train_all(GRID[2:4], session) == []
    assert multiprocessing.active_children() == first

    first[0].kill()  # while it waits
    first[0].join()
    assert train_all(GRID, session) == []  # no warning: nothing is lost
    assert stored(session.store.root) == stored(alone)
    assert set(multiprocessing.active_children()) & set(first) == {first[1]}

    before = multiprocessing.active_children()
    assert train_all(GRID[:2], session_of(tmp_path / "second")) == []
    assert multiprocessing.active_children() == before
    names = {f"{run_name(cfg)}.json" for cfg in GRID[:2]}
    assert stored(tmp_path / "second").keys() == names


def test_another_definition_in_the_worker_is_not_trained_there(tmp_path):
    """An algorithm that was edited since its module was read."""
    class Edited(FedAvg):
        def local_gradient(self, gradients, weights, state, client):
            gradients["head.bias"].zero_()
    before = utils.ALGORITHMS["scaffold"]
    monkey = Edited
    monkey.__module__ = before.__module__
    register_algorithm("scaffold", monkey)
    try:
        cfgs = [replace(CFG, algorithm="scaffold", seed=s) for s in (0, 1)]
        with pytest.warns(UserWarning, match="trained in this process"):
            assert train_all(cfgs, session_of(tmp_path)) == []
        assert len(stored(tmp_path)) == 2
    finally:
        register_algorithm("scaffold", before)


def test_a_killed_worker_is_told_and_its_run_gone_on_with(tmp_path, alone):
    killed = []

    def kill(cfg, history):
        if not killed:
            killed.extend(multiprocessing.active_children())
            for process in killed:
                process.kill()
    with pytest.warns(UserWarning, match="died"):
        left = train_all(GRID, session_of(tmp_path), watch=kill)
    assert 1 <= len(left) <= len(killed)
    assert train_all(GRID, session_of(tmp_path, workers=1)) == []
    assert stored(tmp_path) == stored(alone)


def test_an_error_in_a_worker_is_raised_here(tmp_path):
    cfgs = [replace(CFG, num_clients=2, classes_per_client=1, seed=s) for s in (0, 1)]
    with pytest.raises(RuntimeError, match="cannot hold 100 classes"):
        train_all(cfgs, session_of(tmp_path))
    assert multiprocessing.active_children() == []


def test_an_interrupt_stops_all_workers_and_their_runs_are_gone_on_with(tmp_path, alone, capfd):
    long = [replace(cfg, num_rounds=300, eval_every=50) for cfg in GRID[:2]]

    def stop(cfg, history):
        raise KeyboardInterrupt
    session = session_of(tmp_path)
    assert train_all(long, session, watch=stop) == long
    assert "2 of 2 runs are left" in capfd.readouterr().out
    assert multiprocessing.active_children() == []
    rounds = [session.store.newest_checkpoint(cfg)[0]["round"] for cfg in long]
    assert all(0 < r < 300 for r in rounds)
    assert session.store.names("*.json") == []


def test_an_interrupt_while_a_worker_reads_its_task_is_answered(monkeypatch):
    """Its parent waits for the answer, and would for ever. A real signal, in the midst of recv."""
    class Pipe:
        sent = []
        read = 0

        def recv(self):
            self.read += 1
            if self.read > 1:
                raise EOFError
            os.kill(os.getpid(), signal.SIGINT)
            return "half of the task would be lost here"

        def send(self, answer):
            self.sent.append(answer)
    monkeypatch.setattr(os, "setsid", lambda: None)
    monkeypatch.setattr(experiments, "_follow_parent", lambda: None)
    experiments.serve(Pipe(), 0, utils.CODE_SHA256)
    assert Pipe.sent == [("done", "interrupted")]


def test_the_sessions_time_stops_workers(tmp_path):
    close_workers()
    assert train_all(GRID[:3], session_of(tmp_path, stop_at=-math.inf)) == GRID[:3]
    assert multiprocessing.active_children() == []


def test_what_a_cell_registered_is_trained_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(Mine, "__module__", "__main__")
    cfgs = [replace(CFG, algorithm="mine", seed=s) for s in (0, 1)]
    monkeypatch.setattr(experiments, "Pool", None)  # no worker is needed
    assert train_all(cfgs, session_of(tmp_path)) == []
