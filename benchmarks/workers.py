"""A grid of runs trained side by side in as many processes as there are cores, next to one.

Each turn trains the same runs into a new folder, from the start of the workers to the last result;
a run computes with one thread either way. The longer the runs, the less the start counts.
"""
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import MINI, compare, describe, options, report, seconds

from notebooks.backup import BackedUpStore
from notebooks.experiments import SCALES, Session, train_all
from utils import Config

WORKERS = 2


def train_grid(cfgs: list[Config], workers: int):
    """RuntimeError where a run is left."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = BackedUpStore(root, quiet=True)
        session = Session("small", cfgs[0], store, root / "figures", seeds=(0,), workers=workers,
                          scale=SCALES["small"])
        left = train_all(cfgs, session)
    if left:
        raise RuntimeError(f"{len(left)} of {len(cfgs)} runs are left")


def row_of(cfg: Config, runs: int, pairs: int) -> dict:
    cfgs = [replace(cfg, seed=seed) for seed in range(runs)]
    times = dict(ours=[], base=[])
    for _ in range(pairs):  # no warm-up: the start of the workers belongs to it
        for side, workers in (("ours", WORKERS), ("base", 1)):
            clock, _ = seconds(lambda workers=workers: train_grid(cfgs, workers))
            times[side].append(clock)
    what = f"{runs} runs in {WORKERS} processes, over one"
    found = compare(times, "ours", "base")
    return dict(what=what, rounds=cfg.num_rounds, **describe(cfg), **found)


def main(args):
    cfg = replace(MINI, participation=0.1, num_rounds=8, eval_every=8, eval_images=1000)
    runs = 4
    if args.quick:
        cfg = replace(cfg, participation=0.01, batch_size=2, num_rounds=1, eval_images=10)
        runs = 2
    report(__file__, args, [row_of(cfg, runs, args.pairs)])


if __name__ == "__main__":
    args = options(__doc__)
    if torch.cuda.is_available():
        print("On a GPU runs are trained one after the other: nothing to measure.")
    else:
        main(args)
