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
from helpers import CFG, make_small, resumed

import utils
from utils import ROOT, Store

BASE = replace(CFG, num_clients=8, participation=0.75)  # six in a round: three each, or two
KINDS = {"dense": BASE, "momentum": replace(BASE, server="momentum"),
         "scaffold": replace(BASE, algorithm="scaffold"),
         "sparse": replace(BASE, rule="least_sensitive", calibration="vote", head="ridge",
                           calibration_clients=0.5)}
WAIT = 60  # seconds


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(cfg, root, world: int) -> list[int]:
    """The process ids of `world` forks that train as torchrun's processes do.

    Only rank 0 has the store at `root`; whatever another wrote would lie in root/rank<its number>.
    Each leaves its result, or the error, in root/said<its number>.
    """
    port, children = free_port(), []
    root.mkdir(exist_ok=True)
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                           TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo")
        code = 1
        try:
            said = utils.train(cfg, Store(root if rank == 0 else root / f"rank{rank}", minutes=0.0))
            code = 0
        except Exception as error:
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


def assert_alike(cfg, one: Store, several: Store):
    """The same run up to the order in which float32 sums were taken."""
    a, b = (resumed(cfg, store) for store in (one, several))
    assert a.round == b.round == cfg.num_rounds
    assert a.memory.keys() == b.memory.keys()
    for x, y in [(a.params, b.params), *((a.memory[g], b.memory[g]) for g in a.memory)]:
        assert x.keys() == y.keys()
        for n in x:
            torch.testing.assert_close(x[n], y[n], rtol=1e-3, atol=1e-5)
    for old, new in zip(a.history, b.history, strict=True):
        assert old.keys() == new.keys()
        assert new == pytest.approx(old, rel=1e-3)
    first, second = (store.result(cfg) for store in (one, several))
    assert first["identity"] == second["identity"]
    assert first.get("mask") == second.get("mask")
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_result_of_one_and_only_the_first_writes(tmp_path, kind):
    cfg, one, two = KINDS[kind], Store(tmp_path / "one"), Store(tmp_path / "two")
    utils.train(cfg, one)
    assert codes(start(cfg, two.root, 2)) == [0, 0]
    assert_alike(cfg, one, two)
    said = [json.loads((two.root / f"said{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] == two.result(cfg)
    assert not (two.root / "rank1").exists()
    moved = utils.task_vector(resumed(cfg, two).params, utils.open_run(cfg, Store(tmp_path / "new"))
                              [1].params)
    assert utils.flat(moved).norm() > 1e-3


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_of_two_killed_processes_is_resumed_by_another_number(tmp_path, world):
    cfg = replace(KINDS["scaffold"], num_rounds=8, eval_every=1)
    one, cut = (Store(tmp_path / name, minutes=0.0) for name in ("one", "cut"))
    utils.train(cfg, one)
    children, end = start(cfg, cut.root, 2), time.monotonic() + WAIT
    while len(cut.names("checkpoints/*/*.safetensors")) < 2:
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert codes(children) == [-signal.SIGKILL] * 2
    done = resumed(cfg, cut).round
    assert 0 < done < cfg.num_rounds
    assert codes(start(cfg, cut.root, world)) == [0] * world
    assert_alike(cfg, one, cut)


def test_centralised_runs_are_refused_in_every_process(tmp_path):
    assert codes(start(replace(CFG, algorithm="centralized"), tmp_path / "two", 2)) == [1, 1]
    for rank in (0, 1):
        said = json.loads((tmp_path / "two" / f"said{rank}").read_text())
        assert said.startswith("ValueError: algorithm='centralized' has no clients for 2 processes")
    assert not Store(tmp_path / "two").names("**/*.json")


def test_a_centralised_run_is_refused_before_processes_meet(tmp_path, monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="has no clients for 2 processes"):
        utils.train(replace(CFG, algorithm="centralized"), Store(tmp_path))
    assert not torch.distributed.is_initialized()


def test_the_command_line_leaves_its_group_when_done_and_not_when_it_failed(monkeypatch):
    """Else gloo's own threads now and then abort a process at its exit."""
    command = runpy.run_path(str(ROOT / "distributed/train.py"))["main"]

    def train(cfg, store):
        assert utils.ranks() == (0, 1)
        assert torch.distributed.is_initialized()
        if cfg.seed:
            raise RuntimeError("failed")
        return {"run": "name", "status": "finished"}

    monkeypatch.setitem(command.__globals__, "train", train)
    alive = []
    for field in ("seed=0", "seed=1"):
        if not (child := os.fork()):
            os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(free_port()), TORCHELASTIC_RUN_ID="test")
            try:
                command("demo", field)
            finally:
                os._exit(10 + torch.distributed.is_initialized())
        alive += codes([child])
    assert alive == [10, 11]


def test_torchrun_starts_the_command_line(tmp_path, monkeypatch):
    monkeypatch.undo()  # the process it starts has the real model and data too
    fields = dict(dataset="synthetic", weights="none", val_fraction=0.9, eval_images=50,
                  num_clients=8, participation=0.5, local_steps=1, batch_size=4, num_rounds=2)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "distributed/train.py"), "demo", *(f"{k}={v}" for k, v in fields.items())],
        env=os.environ | {"TRAIN": "", "RESULTS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    cfg, store, one = utils.preset("demo", **fields), Store(tmp_path / "demo"), Store(tmp_path)
    assert run.stdout.count(f"{utils.run_name(cfg)}: finished, test") == 1  # rank 0's word alone
    utils.train(cfg, one)
    assert_alike(cfg, one, store)
