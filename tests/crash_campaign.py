"""Kills runs at chosen moments, over and over, and compares what becomes of them: `make trust`.

    python tests/crash_campaign.py [--kills N] [--seed S] [--kinds ...]

Every cell of the printed table is a kind of run and a moment: so many processes died there by
SIGKILL. After each death nothing stored is half written and no stored round is lost; each run ends,
in the same folders, with the unbroken run's bits. Linux only: children are forks.
"""
import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import pytest
import torch
import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from helpers import CFG, make_small, resumed, same_state, timeless  # noqa: E402

import utils  # noqa: E402
from notebooks.backup import BackedUpStore  # noqa: E402
from utils import Config, Store  # noqa: E402

BASE = replace(CFG, num_clients=4, participation=0.5, num_rounds=8, num_epochs=8, eval_every=1)
KINDS = {"centralised": replace(BASE, algorithm="centralized", batch_size=50),
         "dense": BASE,
         "sparse": replace(BASE, rule="least_sensitive", head="ridge", sparsity=0.5),
         "fitted head": replace(BASE, head="logistic", rule="random"),
         "with memory": replace(BASE, algorithm="mine")}
MOMENTS = {"step": "within a local step, its gradient computed",
           "write": "a checkpoint, head or mask half written",
           "rename": "written, not yet renamed", "renamed": "just renamed, not yet in the backup",
           "copy": "half copied to the backup", "copied": "copied there, not yet renamed",
           "json": "the result half written", "json rename": "written, not yet renamed",
           "json copy": "half copied to the backup",
           "delete": "an old checkpoint emptied, not yet deleted",
           "any": "after a random time"}


@contextmanager
def watched(store: Store, reach):
    """Calls `reach(moment, path)` at the moments of this process that concern the store."""
    honest = {name: getattr(os, name) for name in ("fsync", "replace", "truncate")}
    step = utils.SparseSGDM.step

    def moment(path, backup, local, result):
        if str(path).startswith(str(store.backup)):
            return "json copy" if ".json" in str(path) and backup == "copy" else backup
        return result if ".json" in str(path) else local

    def fsync(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        reach(moment(path, "copy", "write", "json"), path)
        honest["fsync"](file)

    def rename(part, path):
        reach(moment(path, "copied", "rename", "json rename"), part)
        honest["replace"](part, path)
        reach(moment(path, "", "renamed", ""), path)

    def truncate(path, size):
        honest["truncate"](path, size)
        reach("delete", path)

    with pytest.MonkeyPatch.context() as patch:
        for name, double in (("fsync", fsync), ("replace", rename), ("truncate", truncate)):
            patch.setattr(os, name, double)
        patch.setattr(utils.SparseSGDM, "step", lambda *args: (reach("step", None), step(*args))[1])
        yield


def child(cfg: Config, store: Store, moment: str, nth: int, share: float, safe: mmap) -> int:
    """The process id of a fork that trains and dies at the `nth` time of the moment.

    A file that is being written then keeps a `share` of its bytes. `safe` tells the parent the
    newest round whose checkpoint is in its place.
    """
    if pid := os.fork():
        return pid
    left, code = [nth], 1

    def reach(name, path):
        if name == "renamed" and (found := re.search(r"(\d{7})_\w{64}\.safetensors", str(path))):
            safe[0] = int(found[1])
        left[0] -= name == moment
        if name == moment and left[0] == 0:  # from 0 on it is never reached
            if name in ("write", "copy", "json", "json copy"):
                os.truncate(path, int(share * os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        with watched(store, reach):
            utils.train(cfg, store)
        code = 0
    finally:
        os._exit(code)


def died(pid: int, seconds: float) -> bool:
    """Whether the child was killed, by itself or else after `seconds`; an error is raised here."""
    ended, end = 0, time.monotonic() + seconds
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise AssertionError("training failed after a kill")
    return os.WIFSIGNALED(status)


def files(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*")
            if f.is_file() and f.suffix != ".part" and f.name != "lock"}


def check_remains(cfg: Config, store: Store, safe: int):
    """Nothing is half written, and the newest round that was stored is found."""
    for place in (store.root, store.backup):
        for name, content in files(place).items():
            if name.endswith(".json"):
                json.loads(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old checkpoint that was being deleted
        state = resumed(cfg, store)
    assert (state.round if state else 0) >= safe, f"round {safe} was stored and is lost"


def check_end(cfg: Config, result: dict, store: Store, whole: Store):
    """The run ended like the unbroken one, bit by bit, and the backup has all its files."""
    expected = timeless(whole.result(cfg))
    found = timeless(result)
    for key in expected:
        assert found[key] == expected[key], f"{key} differs from the unbroken run's"
    end = resumed(cfg, store)
    assert end.round == cfg.length
    assert same_state(end, resumed(cfg, whole))
    assert files(store.root) == files(store.backup), "the backup differs"
    assert not list(store.root.glob("checkpoints/*/*.part")), "stale files were left"


def unbroken(cfg: Config, folder: Path) -> tuple[Store, Counter, float]:
    """The reference run, how often it passes each moment, and its seconds."""
    counts, began = Counter(), time.monotonic()
    store = BackedUpStore(folder / "root", 0.0, quiet=True, backup=folder / "backup")
    with watched(store, lambda name, path: counts.update([name])):
        utils.train(cfg, store)
    return store, counts, time.monotonic() - began


def cell(cfg: Config, moment: str, kills: int, draw: random.Random, folder: Path, reference):
    """`kills` deaths of runs at one moment, each run resumed to its end; returns how many ran."""
    whole, counts, seconds = reference
    hits, runs, store = 0, 0, None
    while hits < kills or store:
        if store is None:
            runs += 1
            place, safe = folder / f"{moment}{runs}", mmap(-1, 8)
        store = BackedUpStore(place / "root", 0.0, quiet=True, backup=place / "backup")
        nth = draw.randint(1, max(1, counts[moment] // 2)) if hits < kills else 0
        limit = draw.uniform(0, 0.7 * seconds) if moment == "any" and nth else 600
        if died(child(cfg, store, moment, nth, draw.random(), safe), limit):
            hits += 1
            check_remains(cfg, replace(store, frozen=True), safe[0])
        else:
            check_end(cfg, utils.train(cfg, store), store, whole)
            store = None
    return runs


def campaign(folder: Path, kills: int, seed: int, kinds=tuple(KINDS), moments=tuple(MOMENTS)):
    """At least `kills` deaths, spread evenly over kinds and moments; a row (kind, moment, kills,
    runs) for each, raising AssertionError at the first run that ends otherwise."""
    rows, each = [], -(-kills // (len(kinds) * len(moments)))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_small(patch)
        patch.setattr(tqdm.tqdm, "monitor_interval", 0)  # forks and its thread do not mix
        for kind in kinds:
            reference = unbroken(KINDS[kind], folder / kind / "whole")
            for moment in moments:
                draw = random.Random(f"{seed} {kind} {moment}")
                runs = cell(KINDS[kind], moment, each, draw, folder / kind, reference)
                rows.append((kind, moment, each, runs))
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=165)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args, began = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = campaign(Path(folder), args.kills, args.seed, args.kinds)
    print(f"{'kills by SIGKILL':46}" + "".join(f"{kind:>13}" for kind in args.kinds))
    for moment, text in MOMENTS.items():
        cells = [next(r[2] for r in rows if r[:2] == (kind, moment)) for kind in args.kinds]
        print(f"{moment + ': ' + text:46.46}" + "".join(f"{n:13}" for n in cells))
    print(f"{sum(r[2] for r in rows)} kills in {sum(r[3] for r in rows)} runs, all of which ended "
          f"with the unbroken run's bits; {time.monotonic() - began:.0f} s, seed {args.seed}")


if __name__ == "__main__":
    main()
