"""How a round's cost grows, each row next to its base: ratios near 1 where it should be flat.

In the number of clients K at a fixed cohort a round should cost the same; per client it should not
depend on the cohort's size, nor per step on the local steps J. Peak memory, of a process alone,
should depend on none of them. Then torchrun with a process per core or GPU against one process, and
bf16 autocast against float32.
"""
import json
import tempfile
from dataclasses import replace

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
    resident,
    sized,
    start,
    write_images,
)

from utils import Config, federated_round


def ready(cfg: Config):
    """A round, ready to be timed."""
    run, state = start(cfg)
    return lambda: federated_round(run, state)


def row_of(what: str, cfg: Config, found: dict) -> dict:
    return dict(what=what, K=cfg.num_clients, **describe(cfg), **found)


def grown(what: str, cfgs: list[Config], units, pairs: int) -> list[dict]:
    """Rows of seconds per unit of work, each over the first configuration's."""
    work = {str(i): ready(cfg) for i, cfg in enumerate(cfgs)}
    times = in_turns(pairs, **work)
    per_unit = {}
    for i, cfg in enumerate(cfgs):
        per_unit[str(i)] = times[str(i)] / units(cfg)

    rows = []
    for i, cfg in enumerate(cfgs[1:], 1):
        found = compare(per_unit, str(i), "0")
        found["ours"] = found.pop(str(i))
        found["base"] = found.pop("0")
        rows.append(row_of(what, cfg, found))
    return rows


def cohort_of(cfg: Config, clients: int, num_clients: int) -> Config:
    return replace(cfg, num_clients=num_clients, participation=clients / num_clients)


def clients_of(cfg: Config) -> int:
    return describe(cfg)["clients"]


def time_rows(quick: bool, pairs: int) -> list[dict]:
    cfg = sized(quick, MINI, 10, dict(local_steps=4, batch_size=16), dict(local_steps=4))
    sizes = [100, 1000, 10_000]
    cohorts = [2, 5, 10]
    steps = [2, 4, 8]
    if quick:
        sizes = [100, 1000]
        cohorts = [1, 2]
        steps = [1, 2]

    first = cohorts[0]
    by_size = [cohort_of(cfg, first, k) for k in sizes]
    by_cohort = [cohort_of(cfg, n, 100) for n in cohorts]
    few = cohort_of(cfg, first, 100)
    by_steps = [replace(few, local_steps=j) for j in steps]
    rows = grown("round, over K = 100", by_size, lambda cfg: 1, pairs)
    rows += grown(f"per client, over {first}", by_cohort, clients_of, pairs)
    rows += grown(f"per step, over J = {steps[0]}", by_steps, lambda cfg: cfg.local_steps, pairs)
    return rows


def memory_rows(cfg: Config) -> list[dict]:
    rows = []
    base = None
    sizes = [(2, 100), (10, 100), (2, 10_000)]
    for clients, num_clients in sizes:
        grown_cfg = cohort_of(cfg, clients, num_clients)
        ours = child(__file__, "--config", as_text(grown_cfg))["peak"]
        base = base or ours
        found = dict(unit="MB", ours=ours, base=base, ratio=ours / base)
        rows.append(row_of("peak memory, over the first", grown_cfg, found))
    return rows


def torchrun_row(cfg: Config, pairs: int) -> dict:
    """A round in a process per core, next to one process on all cores; each waits for the other."""
    cores = torch.cuda.device_count() or torch.get_num_threads()
    times = dict(ours=[], base=[])
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(cfg, folder)
        with resident(cfg, images, cores) as ours, resident(cfg, images, 1) as base:
            for _ in range(pairs):
                times["ours"].append(ours())
                times["base"].append(base())
    what = f"{cores} processes by torchrun, over one"
    return row_of(what, cfg, compare(times, "ours", "base"))


def precision_row(cfg: Config, pairs: int) -> dict:
    run, state = start(cfg)
    half = replace(run, cfg=replace(cfg, precision="bf16"))
    full = replace(run, cfg=replace(cfg, precision="float32"))
    times = in_turns(
        pairs,
        ours=lambda: federated_round(half, state),
        base=lambda: federated_round(full, state),
    )
    return row_of("bf16, over float32", cfg, compare(times, "ours", "base"))


def one_process(cfg: Config):
    """Prints the peak memory of a round."""
    run, state = start(cfg)
    forget_peak()
    federated_round(run, state)
    print(json.dumps(dict(peak=peak())))


def main(args):
    rows = time_rows(args.quick, args.pairs)
    small = replace(VITS, image_size=64)
    full = dict(local_steps=4, batch_size=64)
    # Not all CPUs know bf16, and there it takes long: a single step.
    one = sized(False, small, 1, dict(local_steps=1, batch_size=4), full)
    if args.quick:
        one = sized(True, MINI, 2, dict(local_steps=1), {})
    rows.append(precision_row(one, args.pairs))

    if not args.quick:
        vits = sized(False, small, 2, dict(local_steps=4, batch_size=8), full)
        rows += memory_rows(replace(vits, local_steps=1))
        if torch.cuda.device_count() != 1:  # two processes cannot share one GPU by NCCL
            rows.append(torchrun_row(vits, args.pairs))
    report(__file__, args, rows)


if __name__ == "__main__":
    args = options(__doc__, config="")
    if args.config:
        one_process(Config(**json.loads(args.config)))
    else:
        main(args)
