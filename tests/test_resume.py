"""Runs that are really killed, at moments nobody chose, end with the unbroken run's bits."""
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import tqdm
from helpers import CFG, make_small, resumed, same_state, timeless

import utils
from utils import Store

BASE = replace(CFG, num_rounds=40, num_epochs=24, eval_every=1)
RUNS = {"centralised": replace(BASE, algorithm="centralized", batch_size=30),
        "sparse": replace(BASE, rule="least_sensitive", head="ridge", sparsity=0.5),
        "mine": replace(BASE, algorithm="mine")}
KILLS = 6


def start(cfg, store) -> int:
    """The process id of a child that trains; it exits with 1 where training raises."""
    if child := os.fork():
        return child
    code = 1
    try:
        utils.train(cfg, store)
        code = 0
    finally:
        os._exit(code)


def kill(child, store, draw, wait: bool) -> bool:
    """SIGKILL after a random delay, with `wait` counted from the child's next checkpoint.

    True where it hit; the child may have finished before. A child that failed fails the test.
    """
    seen = store.names("checkpoints/*/*.safetensors")
    ended, status = 0, 0
    while wait and not ended and store.names("checkpoints/*/*.safetensors") == seen:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    time.sleep(draw.uniform(0, 0.1))
    if not ended:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "training failed after a kill"
    return False


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_again_and_again_ends_like_the_unbroken_one(tmp_path, monkeypatch, kind):
    make_small(monkeypatch)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # forks and its thread do not mix
    cfg, draw = RUNS[kind], random.Random(kind)
    whole, broken = (Store(tmp_path / name, minutes=0.0) for name in ("whole", "cut"))
    result, hits, rounds = utils.train(cfg, whole), 0, set()
    for attempt in range(KILLS):
        hits += kill(start(cfg, broken), broken, draw, wait=attempt > 0)
        state = resumed(cfg, broken)
        rounds.add(state.round if state else 0)
    assert hits >= 3, "the child was faster than its killer"
    assert len(rounds) >= 3, "too few kills within the run"
    again = utils.train(cfg, Store(broken.root, minutes=0.0))
    assert again["status"] == "finished"
    assert timeless(again) == timeless(result)
    end = resumed(cfg, broken)
    assert end.round == cfg.length
    assert same_state(end, resumed(cfg, whole))
