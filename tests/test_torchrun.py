"""Several processes give the result of one, and any number of them resumes a run."""
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import CFG, make_small, resumed, same_state

import notebooks.extension  # noqa: F401  (registers algorithms)
import utils
from utils import ROOT, Store

sys.path.insert(0, str(ROOT / "distributed"))

import launch  # noqa: E402
import torchrun  # noqa: E402
import train  # noqa: E402

BASE = replace(CFG, num_clients=8, participation=0.75)  # six in a round: three each, or two
KINDS = {"dense": BASE,
         "one client": replace(BASE, participation=0.1),  # the second process has none
         "messages": replace(BASE, algorithm="scaffold"),
         "all vectors": replace(BASE, algorithm="fisher"),
         "sparse": replace(BASE, rule="least_sensitive", calibration="vote", head="ridge",
                           calibration_clients=0.5),
         "head's own run": replace(BASE, rule="random", head="train")}
WAIT = 60  # seconds


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse(*args, **kwargs):
    raise AssertionError("computed on another rank than the first")


def start(cfgs: list, root) -> list[int]:
    """The process ids of forks that train, one a configuration, as torchrun's processes do.

    Only rank 0 has the store at `root`; whatever another wrote would lie in root/rank<its number>.
    Each leaves its result, or the error, in root/said<its number>. Only rank 0 may fit and
    calibrate.
    """
    port, children = free_port(), []
    root.mkdir(exist_ok=True)
    for rank, cfg in enumerate(cfgs):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(cfgs)),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                           TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo")
        store = Store(root, minutes=0.0)
        if rank > 0:
            # such that this rank would save at other times
            store = Store(root / f"rank{rank}", minutes=9.0)
            utils.fit_head = utils.calibrate_mask = refuse
        code = 1
        try:
            torchrun.init_process_group(cfg)
            said = torchrun.train(cfg, store)
            torchrun.destroy_process_group()
            code = 0
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            (root / f"said{rank}").write_text(json.dumps(said))
            os._exit(code)
    return children


def codes(children: list[int]) -> list[int]:
    """Exit codes; what still runs after `WAIT` is killed, so that nothing hangs."""
    end, found = time.monotonic() + WAIT, {}
    while len(found) < len(children):
        for child in set(children) - found.keys():
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            found |= {child: os.waitstatus_to_exitcode(status)} if ended else {}
        time.sleep(0.01)
    return [found[child] for child in children]


def said(root, number: int) -> list:
    return [json.loads((root / f"said{rank}").read_text()) for rank in range(number)]


def assert_alike(cfg, one: Store, several: Store):
    """The same run up to the order in which float32 sums were taken."""
    a, b = (resumed(cfg, store) for store in (one, several))
    assert a.round == b.round == cfg.num_rounds
    assert a.algorithm_state.keys() == b.algorithm_state.keys()
    memories = [(a.algorithm_state[g], b.algorithm_state[g]) for g in a.algorithm_state]
    for x, y in [(a.params, b.params), *memories]:
        assert x.keys() == y.keys()
        for n in x:
            torch.testing.assert_close(x[n], y[n], rtol=1e-3, atol=1e-5)
    for old, new in zip(a.history, b.history, strict=True):
        assert old.keys() == new.keys()
        assert new == pytest.approx(old, rel=1e-3)
    first, second = (store.result(cfg) for store in (one, several))
    assert first["key"] == second["key"]
    assert first.get("mask") == second.get("mask")
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_result_of_one_and_only_the_first_writes(tmp_path, kind):
    cfg, one, two = KINDS[kind], Store(tmp_path / "one"), Store(tmp_path / "two")
    utils.train(cfg, one)
    assert codes(start([cfg] * 2, two.root)) == [0, 0], said(two.root, 2)
    assert_alike(cfg, one, two)
    first, second = said(two.root, 2)
    assert first == second == two.result(cfg)
    assert not (two.root / "rank1").exists()
    if kind == "all vectors":  # combined on every rank as one process would
        assert same_state(resumed(cfg, one), resumed(cfg, two))

    _, untrained = utils.open_run(cfg, Store(tmp_path / "new"))
    moved = utils.task_vector(resumed(cfg, two).params, untrained.params)
    assert utils.flatten(moved).norm() > 1e-3


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_of_two_killed_processes_is_resumed_by_another_number(tmp_path, world_size):
    cfg = replace(KINDS["messages"], num_rounds=8, eval_every=1)
    one, cut = (Store(tmp_path / name, minutes=0.0) for name in ("one", "cut"))
    utils.train(cfg, one)
    children, end = start([cfg] * 2, cut.root), time.monotonic() + WAIT
    while len(cut.names("checkpoints/*/*.safetensors")) < 2:
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert codes(children) == [-signal.SIGKILL] * 2
    done = resumed(cfg, cut).round
    assert 0 < done < cfg.num_rounds
    assert codes(start([cfg] * world_size, cut.root)) == [0] * world_size
    assert_alike(cfg, one, cut)


def test_a_finished_run_is_found_by_all_and_trained_by_none(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    expected = utils.train(BASE, store)
    monkeypatch.setattr(utils, "client_update", refuse)
    monkeypatch.setattr(torchrun, "client_update", refuse)
    assert codes(start([BASE] * 2, store.root)) == [0, 0]
    assert said(store.root, 2) == [json.loads(json.dumps(expected))] * 2


# ------------------------------------------------------------------ refusals
def test_a_centralised_run_is_refused_before_processes_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="'centralized' has no clients for 2 processes"):
        torchrun.init_process_group(replace(CFG, algorithm="centralized"))
    assert not torch.distributed.is_initialized()


def test_processes_that_differ_are_refused_on_every_rank(tmp_path):
    root = tmp_path / "store"
    assert codes(start([BASE, replace(BASE, lr=0.1)], root)) == [1, 1]
    first, second = said(root, 2)
    assert first.startswith("ValueError: rank 1 and rank 0 differ in ['lr']")
    assert second.startswith("ValueError: rank 0 and rank 1 differ in ['lr']")


def test_an_error_of_the_first_rank_is_raised_on_every_rank(tmp_path):
    cfg, store = replace(BASE, name="mine", num_rounds=1), Store(tmp_path / "store")
    utils.train(cfg, store)
    assert codes(start([replace(cfg, lr=0.1)] * 2, store.root)) == [1, 1]
    for error in said(store.root, 2):
        assert error.startswith("ValueError: mine is stored as another run")


# ------------------------------------------------------------------ the command line
def test_fields_follow_the_preset_as_words():
    cfg = train.configure("small", "name=mine", "lr=3e-3", "rule=random", "micro_batch=None",
                          "algorithm=scaffold", "dirichlet_alpha=0.3")
    assert cfg == replace(utils.preset("small"), name="mine", lr=3e-3, rule="random",
                          micro_batch=None, algorithm="scaffold", dirichlet_alpha=0.3)
    with pytest.raises(ValueError, match="'lr' must be a field of Config with its value"):
        train.configure("small", "lr")


def test_results_are_where_the_project_keeps_them(monkeypatch):
    monkeypatch.delenv("RESULTS_DIR", raising=False)
    monkeypatch.delenv("TRAIN", raising=False)
    assert train.open_store("small").root == ROOT / "results"
    assert not train.open_store("small").frozen
    monkeypatch.setenv("RESULTS_DIR", "~/there")
    monkeypatch.setenv("TRAIN", "no")
    assert train.open_store("lite").root.name == "lite"  # where notebooks look for it
    store = train.open_store("demo")
    assert store.root == train.Path.home() / "there/demo"
    assert store.frozen


def test_the_command_line_leaves_its_group_when_done_and_not_when_it_failed(monkeypatch):
    """Else gloo's own threads now and then abort a process at its exit."""
    command = runpy.run_path(str(ROOT / "distributed/train.py"))["main"]

    def fake(cfg, store):
        assert torch.distributed.get_world_size() == 1
        if cfg.seed:
            raise RuntimeError("failed")
        return {"run": "name", "status": "finished"}

    monkeypatch.setattr(torchrun, "train", fake)
    alive = []
    for field in ("seed=0", "seed=1"):
        child = os.fork()
        if not child:
            os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(free_port()), TORCHELASTIC_RUN_ID="test")
            try:
                command("small", "dataset=synthetic", field)
            finally:
                os._exit(10 + torch.distributed.is_initialized())
        alive += codes([child])
    assert alive == [10, 11]


def test_flower_that_is_not_installed_is_named_as_a_package(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "search_paths", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"flower-superlink.*pip install .flwr\[simulation\]"):
        launch.main("demo")
    for name in ("flwr", "flower-superlink"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="ray cannot be found"):
        launch.main("demo")


def test_torchrun_starts_the_command_line(tmp_path, monkeypatch):
    monkeypatch.undo()  # the process it starts has the real model and data too
    fields = dict(dataset="synthetic", weights="none", val_fraction=0.9, eval_images=50,
                  num_clients=8, participation=0.5, local_steps=1, batch_size=4, num_rounds=2,
                  head="train")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "distributed/train.py"), "demo", "name=mine",
         *(f"{k}={v}" for k, v in fields.items())],
        env=os.environ | {"TRAIN": "", "RESULTS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    cfg = replace(utils.preset("demo", **fields), name="mine")
    store, one = Store(tmp_path / "demo"), Store(tmp_path)
    assert run.stdout.count("mine: finished, test") == 1  # rank 0's word alone
    utils.train(cfg, one)
    assert_alike(cfg, one, store)
