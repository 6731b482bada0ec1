"""Our round against Flower's simulation engine (Ray), on the same workload and cores.

The Flower app is its PyTorch quickstart: a ServerApp with FedAvg, a ClientApp that loads the
weights it is sent, trains on its partition and returns them. It is spared the costs that are not
the engine's: its actors keep the model and the images between calls, and evaluate nothing. In each
pair our round follows Flower's while the actors wait, on as many cores as Flower has actors: with
local steps in as many processes by torchrun, without any in one. These processes wait in their turn
while Flower works. Flower's start is all that its first round takes over the median later one.
Peak memory is summed over all processes (proportional set size), each side alone, ours in one, of
a lighter round: ten clients with one step of four images each.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import (
    VITS,
    as_text,
    compare,
    describe,
    options,
    report,
    resident,
    sized,
    start,
    write_images,
)

from utils import Config, federated_round

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import flower_app
    import flwr
    import ray
    MISSING = ""
except ImportError as error:
    MISSING = f"{error}: pip install 'flwr[simulation]' and start this again."


def simulate(cfg: Config, images: str, rounds: int, between):
    from flwr.simulation import run_simulation
    cores, gpus = torch.get_num_threads(), torch.cuda.device_count()
    resources = {"num_cpus": 1, "num_gpus": gpus / cores}
    config = {"init_args": {"num_cpus": cores, "num_gpus": gpus, "log_to_driver": False},
              "client_resources": resources}
    try:
        run_simulation(flower_app.server(cfg, rounds, between), flower_app.client(
            as_text(cfg), images), num_supernodes=cfg.num_clients, backend_config=config)
    except Exception:  # the server's thread would wait for clients for ever
        traceback.print_exc()
        os._exit(1)


# ------------------------------------------------------------------ measurements
def times_of(cfg: Config, images: str, pairs: int, processes: int) -> tuple[dict, float]:
    """Seconds a round of both, in turns, and of Flower's start."""
    times = dict(ours=[], flower=[])
    with resident(cfg, images, processes) as our_round:
        began = [time.perf_counter()]

        def between(t):
            times["flower"].append(time.perf_counter() - began[0])
            times["ours"].append(our_round())
            began[0] = time.perf_counter()

        simulate(cfg, images, pairs + 1, between)
    until_ready = sum(times["flower"][:2])  # to the end of the first round
    times = {side: values[2:] for side, values in times.items()}
    return times, until_ready - float(np.median(times["flower"]))


def children(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found, parents = [pid], {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(encoding="utf-8").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        except OSError:  # gone in the meantime
            pass
    for process in found:
        found += parents.get(process, [])
    return found


def held(pid: int) -> float:
    """MB of proportional set size of a process and its descendants."""
    total = 0
    for process in children(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return total / 2**10


def peak_of(cfg: Config, images: str, side: str) -> float:
    """MB that one side holds at most over all its processes, while it makes two rounds."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    most, command = 0.0, [sys.executable, __file__, "--side", side, "--config", as_text(cfg),
                          "--images", images]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(0.3)  # each look halts the process that it looks at
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} failed:\n{log.read()[-4000:]}")
    return most


def one_side(side: str, cfg: Config, images: str):
    if side == "flower":
        return simulate(cfg, images, 2, lambda t: None)
    run, state = start(cfg, images)
    for _ in range(2):
        state = federated_round(run, state)


def rows_of(cfg: Config, images: str, pairs: int, what: str) -> list[dict]:
    cores = torch.cuda.device_count() or torch.get_num_threads()
    processes = cores if cfg.local_steps else 1
    times, begin = times_of(cfg, images, pairs, processes)
    words = describe(cfg) | dict(processes=processes)
    rows = [dict(what=what, **words, **compare(times, "ours", "flower")),
            dict(what=f"{what}: start", **words, unit="s", flower=begin)]
    print(*rows, sep="\n", flush=True)
    return rows


def main(args):
    four = sized(args.quick, replace(VITS, image_size=64, precision="float32"), 4,
                 dict(local_steps=4, batch_size=8), dict(local_steps=4, batch_size=64))
    if args.quick:
        four = replace(four, weights="mini", arch="mini", image_size=32, num_clients=4,
                       participation=0.5)
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(four, folder)
        none = four if args.quick else replace(four, participation=0.1)
        rows = rows_of(replace(none, local_steps=0), images, args.pairs, "overhead")
        if not args.quick:
            rows += rows_of(four, images, args.pairs, "round")
            light = replace(none, local_steps=1, batch_size=4)
            found = {side: peak_of(light, images, side) for side in ("ours", "flower")}
            rows.append(dict(what="peak memory", **describe(light), unit="MB", **found,
                             ratio=found["ours"] / found["flower"]))
    report(__file__, args, rows, flower=flwr.__version__, ray=ray.__version__,
           actors=torch.get_num_threads())


if __name__ == "__main__":
    args = options(__doc__, side="", config="", images="")
    if MISSING:
        print(MISSING)
    elif args.side:
        one_side(args.side, Config(**json.loads(args.config)), args.images)
    else:
        main(args)
