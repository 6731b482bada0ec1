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


def rounds_of(cfgs: dict[str, Config]) -> dict:
    """For each configuration one round, ready to be timed."""
    def ready(cfg):
        run, state = start(cfg)
        return lambda: federated_round(run, state)
    return {name: ready(cfg) for name, cfg in cfgs.items()}


def grown(what: str, cfgs: list[Config], units, pairs: int) -> list[dict]:
    """Rows of seconds per unit of work, each over the first configuration's."""
    times = in_turns(pairs, **rounds_of({str(i): cfg for i, cfg in enumerate(cfgs)}))
    per_unit = {i: times[i] / units(cfgs[int(i)]) for i in times}
    rows = []
    for i, cfg in enumerate(cfgs[1:], 1):
        found = compare(per_unit, str(i), "0")
        rows.append(dict(what=what, K=cfg.num_clients, **describe(cfg), ours=found.pop(str(i)),
                         base=found.pop("0"), **found))
    return rows


def cohort_of(cfg: Config, clients: int, num_clients: int) -> Config:
    return replace(cfg, num_clients=num_clients, participation=clients / num_clients)


def time_rows(quick: bool, pairs: int) -> list[dict]:
    cfg = sized(quick, MINI, 10, dict(local_steps=4, batch_size=16), dict(local_steps=4))
    sizes, cohorts, steps = ([100, 1000, 10_000], [2, 5, 10], [2, 4, 8]) if not quick else (
        [100, 1000], [1, 2], [1, 2])
    few = replace(cfg, participation=cohorts[0] / 100)
    return [*grown("round, over K = 100", [cohort_of(cfg, cohorts[0], k) for k in sizes],
                   lambda cfg: 1, pairs),
            *grown(f"per client, over {cohorts[0]}", [cohort_of(cfg, n, 100) for n in cohorts],
                   lambda cfg: describe(cfg)["clients"], pairs),
            *grown(f"per step, over J = {steps[0]}", [replace(few, local_steps=j) for j in steps],
                   lambda cfg: cfg.local_steps, pairs)]


def memory_rows(cfg: Config) -> list[dict]:
    cfgs = [cohort_of(cfg, n, k) for n, k in ((2, 100), (10, 100), (2, 10_000))]
    found = [child(__file__, "--config", as_text(c))["peak"] for c in cfgs]
    return [dict(what="peak memory, over the first", K=c.num_clients, **describe(c), unit="MB",
                 ours=mb, base=found[0], ratio=mb / found[0]) for c, mb in zip(
                     cfgs, found, strict=True)]


def torchrun_row(cfg: Config, pairs: int) -> dict:
    """A round in a process per core, next to one process on all cores; each waits for the other."""
    cores = torch.cuda.device_count() or torch.get_num_threads()
    with (tempfile.TemporaryDirectory() as folder, resident(
            cfg, images := write_images(cfg, folder), cores) as ours,
            resident(cfg, images, 1) as base):
        turns = [(ours(), base()) for _ in range(pairs)]
    times = dict(zip(("ours", "base"), zip(*turns, strict=True), strict=True))
    return dict(what=f"{cores} processes by torchrun, over one", K=cfg.num_clients,
                **describe(cfg), **compare(times, "ours", "base"))


def precision_row(cfg: Config, pairs: int) -> dict:
    run, state = start(cfg)
    half = replace(run, cfg=replace(cfg, precision="bf16"))
    full = replace(run, cfg=replace(cfg, precision="float32"))
    times = in_turns(pairs, ours=lambda: federated_round(half, state),
                     base=lambda: federated_round(full, state))
    return dict(what="bf16, over float32", K=cfg.num_clients, **describe(cfg),
                **compare(times, "ours", "base"))


def one_process(cfg: Config):
    """Prints the peak memory of a round."""
    run, state = start(cfg)
    forget_peak()
    federated_round(run, state)
    print(json.dumps(dict(peak=peak())))


def main(args):
    rows = time_rows(args.quick, args.pairs)
    vits = sized(args.quick, replace(VITS, image_size=64), 2, dict(local_steps=4, batch_size=8),
                 dict(local_steps=4, batch_size=64))
    light = sized(args.quick, MINI, 2, dict(local_steps=1), {})
    one = sized(args.quick, replace(VITS, image_size=64), 1, dict(local_steps=1, batch_size=4),
                dict(local_steps=4, batch_size=64))  # not all CPUs know bf16: there it takes long
    rows.append(precision_row(light if args.quick else one, args.pairs))
    if not args.quick:
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
