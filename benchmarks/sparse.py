"""A round that trains a tenth of the weights, next to one that trains all: time and peak memory.

Of two masks with as many trainable entries, the least sensitive tenth (four calibration rounds) and
a random one. A weight of which the mask frees nothing needs no gradient: the random tenth frees
some of every weight, the least sensitive one of few. "gradients of all" is the least sensitive
tenth with the gradients of all maskable weights computed, and nothing else changed.
Peak memory is what a round takes on top of what the process holds before it, each in a process of
its own.
"""
import json
import tempfile
from dataclasses import replace
from functools import partial

import torch
from common import (
    MINI,
    VITS,
    as_text,
    child,
    compare,
    describe,
    forget_peak,
    in_turns,
    options,
    peak,
    report,
    sized,
    start,
    write_images,
)

from utils import WEIGHT_FILES, Config, federated_round

RULES = {"least_sensitive": True, "random": True, "gradients of all": False}  # skip_frozen


def sides(cfg: Config) -> dict[str, tuple[Config, bool]]:
    """Configuration and `skip_frozen` by name, the dense round first."""
    found = {"dense": (cfg, True)}
    for name, skip_frozen in RULES.items():
        rule = "random" if name == "random" else "least_sensitive"
        found[name] = (replace(cfg, rule=rule), skip_frozen)
    return found


def share_skipped(run) -> float:
    """Share of the maskable entries that lie in weights without a gradient."""
    sizes = {n: entries.numel() for n, entries in run.mask.items()}
    kept = sum(sizes[n] for n in run.trainable)
    return 1 - kept / sum(sizes.values())


def time_rows(cfg: Config, pairs: int) -> tuple[list[dict], dict]:
    """Rows of seconds over the dense round, and the masks by name."""
    work, masks, skipped = {}, {}, {}
    for name, (side, skip_frozen) in sides(cfg).items():
        run, state = start(side, skip_frozen=skip_frozen)
        work[name] = partial(federated_round, run, state)
        if run.mask is not None:
            masks[name] = run.mask
            skipped[name] = share_skipped(run)

    times = in_turns(pairs, **work)
    rows = []
    for name in masks:
        found = compare(times, name, "dense")
        found["ours"] = found.pop(name)
        found["skipped"] = skipped[name]
        rows.append(dict(what=f"round, {name}", **describe(cfg), **found))
    return rows, masks


def memory_rows(cfg: Config, masks: dict) -> list[dict]:
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(cfg, folder)
        for name, (side, _) in sides(cfg).items():
            path = f"{folder}/{name}.pt"
            torch.save(masks.get(name), path)
            command = ["--side", name, "--config", as_text(side)]
            command += ["--images", images, "--mask", path]
            found = child(__file__, *command)
            peaks[name] = found["peak"]

    rows = []
    dense = peaks.pop("dense")
    for name, ours in peaks.items():
        found = dict(unit="MB", ours=ours, dense=dense)
        found["ratio"] = ours / dense
        rows.append(dict(what=f"peak memory, {name}", **describe(cfg), **found))
    return rows


def one_side(name: str, cfg: Config, images: str, mask: str):
    """Prints the memory that the first round takes."""
    skip_frozen = RULES.get(name, True)
    run, state = start(cfg, images, torch.load(mask), skip_frozen)
    forget_peak()
    before = peak()
    federated_round(run, state)
    taken = peak() - before
    print(json.dumps(dict(peak=taken)))


def main(args):
    full = dict(local_steps=4, batch_size=64)
    mini = sized(args.quick, MINI, 4, dict(local_steps=4), full)
    cfgs = [mini]
    if args.quick:
        cfgs = [replace(mini, participation=0.01, calibration_images=4)]
    elif WEIGHT_FILES["vits16_tin"].is_file():
        vits = replace(VITS, weights="vits16_tin", image_size=96, calibration_images=128)
        small = dict(local_steps=4, batch_size=8)
        cfgs.append(sized(False, vits, 1, small, full))

    rows = []
    for cfg in cfgs:
        timed, masks = time_rows(cfg, args.pairs)
        rows += timed + memory_rows(cfg, masks)
    report(__file__, args, rows)


if __name__ == "__main__":
    args = options(__doc__, side="", config="", images="", mask="")
    if args.side:
        one_side(args.side, Config(**json.loads(args.config)), args.images, args.mask)
    else:
        main(args)
