"""What the benchmarks share: runs, timing in turns, peak memory, facts of the machine, reports.

Every script measures both sides of a ratio in turns in one process, because a machine's speed
drifts; it reports the median over the pairs and their quartiles, never the quotient of two runs.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

sys.path.insert(1, str(HERE.parent / "distributed"))

import utils  # noqa: E402
from utils import (  # noqa: E402
    Config,
    Data,
    Params,
    Run,
    State,
    cohort_size,
    device,
    federated_round,
    open_run,
    to_json,
)

# A random head: fitting one would take longer than what is measured.
BASE = Config(dataset="synthetic", num_clients=100, lr=0.01, num_rounds=1000, schedule="constant",
              head="train")
MINI = replace(BASE, weights="mini", arch="mini", image_size=32, batch_size=32)
VITS = replace(BASE, weights="none", arch="vits16")


def options(doc: str, **more) -> argparse.Namespace:
    """The command line of every script; `more` are its own options with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--pairs", type=int, help="pairs of measurements (5, quick: 2)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    args.pairs = args.pairs or (2 if args.quick else 5)
    return args


def as_text(cfg: Config) -> str:
    """The configuration for a process that is started with it: `Config(**json.loads(text))`."""
    return json.dumps(asdict(cfg))


def sized(quick: bool, cfg: Config, clients: int, cpu: dict, gpu: dict) -> Config:
    """`cfg` with a cohort of `clients` out of 100, and sizes that suit the machine."""
    sizes = gpu if torch.cuda.is_available() else cpu
    cfg = replace(cfg, participation=clients / cfg.num_clients, **sizes)
    if quick:
        cfg = replace(cfg, batch_size=2, local_steps=min(1, cfg.local_steps))
    return cfg


def write_images(cfg: Config, folder: str) -> str:
    """A file with the run's images, so that no process has to make them."""
    path = f"{folder}/images.pt"
    tensors = {}
    for name, value in vars(utils.load_data(cfg)).items():
        tensors[name] = torch.as_tensor(value).cpu()
    torch.save(tensors, path)
    return path


def read_images(path: str) -> Data:
    found = torch.load(path, map_location=device())
    for name in ("train", "val"):
        found[name] = found[name].cpu().numpy()
    return Data(**found)


def start(cfg: Config, images: str = "", mask: Params | None = None,
          skip_frozen: bool = True) -> tuple[Run, State]:
    """A run at its beginning, its model in training mode, nothing stored.

    A sparse run has a random head, and calibrates its mask unless one is given.
    """
    if images:
        utils.load_data = lambda cfg: read_images(images)
    head = None
    if cfg.rule:
        weights = utils.build_model(cfg).state_dict()
        head = {n: weights[n] for n in utils.HEAD}
    run, state = open_run(cfg, None, head, mask, skip_frozen)
    run.model.train()
    return run, state


# ------------------------------------------------------------------ measuring
def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work) -> tuple[float, float]:
    """Of the clock and of this process's cores, its threads together."""
    wait()
    began = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def in_turns(pairs: int, **work) -> dict[str, np.ndarray]:
    """`seconds` (pairs, 2) of each function, one after the other, after a warm-up."""
    for f in work.values():
        f()
    times = {name: [] for name in work}
    for _ in range(pairs):
        for name, f in work.items():
            times[name].append(seconds(f))
    return {name: np.array(found) for name, found in times.items()}


def compare(times: dict, ours: str, other: str) -> dict:
    """Median seconds of both, and the ratio ours / other within each pair: median, quartiles.

    `cores` is the same ratio in processor time, which waiting for a busy machine does not touch.
    """
    pairs = len(times[ours])
    a = np.reshape(times[ours], (pairs, -1))
    b = np.reshape(times[other], (pairs, -1))
    ratios = a / b
    low, middle, high = np.quantile(ratios[:, 0], (0.25, 0.5, 0.75)).tolist()

    found = {"unit": "s"}
    found[ours] = float(np.median(a[:, 0]))
    found[other] = float(np.median(b[:, 0]))
    found |= dict(ratio=middle, q1=low, q3=high, pairs=pairs)
    if a.shape[1] == 2 and not torch.cuda.is_available():
        found["cores"] = float(np.median(ratios[:, 1]))
    return found


def forget_peak():
    """From here on `peak` counts: making the synthetic images takes more than any round."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak() -> float:
    """MB held at most since `forget_peak`: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status)[1]
    return int(kilobytes) / 2**10


def child(*command: str, **environment: str) -> dict:
    """What a Python command prints as its last line, JSON, in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment
    done = subprocess.run([sys.executable, *command], env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def resident(cfg: Config, images: str, processes: int):
    """A function that has processes of their own make one round: its seconds.

    All cores in one process, or by torchrun shared out to several. They sleep in between.
    """
    threads = max(1, torch.get_num_threads() // processes)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command += [__file__, as_text(cfg), images, folder]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

        def one_round() -> float:
            answer = Path(folder, "answer")
            Path(folder, "go").touch()
            while not answer.exists():
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the processes ended:\n{log.read()[-4000:]}")
                time.sleep(0.01)
            took = float(answer.read_text(encoding="utf-8"))
            answer.unlink()
            return took
        try:
            one_round()
            yield one_round
        finally:
            process.terminate()
            process.wait()


def serve(cfg: Config, images: str, folder: Path):
    """A process of `resident`: a round whenever there is a file `go`, until it is stopped."""
    def asked():
        while not (folder / "go").exists():
            time.sleep(0.01)
        (folder / "go").unlink()

    run, state = start(cfg, images)
    wait_for_turn, one_round, is_first = asked, federated_round, True
    if torch.distributed.is_torchelastic_launched():
        import torchrun
        torchrun.init_process_group(cfg)
        is_first = torch.distributed.get_rank() == 0
        wait_for_turn = partial(torchrun.broadcast_object, asked)
        one_round = partial(federated_round, train_cohort=torchrun.train_cohort)
    while True:
        wait_for_turn()
        took, _ = seconds(lambda: one_round(run, state))
        if is_first:
            (folder / "part").write_text(str(took), encoding="utf-8")
            (folder / "part").rename(folder / "answer")


# ------------------------------------------------------------------ reporting
def proc_facts(file: str) -> dict:
    """"name: value" lines of a file in /proc; nothing where there is none."""
    path = Path("/proc") / file
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^([\w ]+?)\s*:\s+(.+)$", text))


def machine() -> dict:
    kilobytes = proc_facts("meminfo").get("MemTotal", "0 kB").split()[0]
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return dict(
        cpu=proc_facts("cpuinfo").get("model name", platform.machine()),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        ram_gb=round(int(kilobytes) / 2**20, 1),
        gpu=gpu,
        torch=torch.__version__,
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
    )


def describe(cfg: Config) -> dict:
    """What a row of a table says of its workload."""
    models = {"mini": "mini", "vits16": "ViT-S/16"}
    return dict(
        model=models[cfg.arch],
        px=cfg.image_size,
        B=cfg.batch_size,
        J=cfg.local_steps,
        clients=cohort_size(cfg.num_clients, cfg.participation),
    )


def report(script: str, args, rows: list[dict], **facts):
    """Prints the machine and the rows; writes both to <out>/<script>_<cpu|gpu>.json."""
    facts = dict(machine=machine(), quick=args.quick, **facts)
    print(*(f"{k}: {v}" for k, v in facts["machine"].items()), sep="  ")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    args.out.mkdir(parents=True, exist_ok=True)
    facts["rows"] = rows
    kind = "gpu" if device().type == "cuda" else "cpu"
    (args.out / f"{Path(script).stem}_{kind}.json").write_bytes(to_json(facts))


if __name__ == "__main__":  # what `resident` starts
    serve(Config(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
