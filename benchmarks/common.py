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
from pathlib import Path

import numpy as np
import pandas as pd
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from notebooks.basics import from_rank_0  # noqa: E402
from utils import (  # noqa: E402
    Config,
    Data,
    Run,
    State,
    Store,
    cohort_size,
    device,
    dump,
    federated_round,
    open_run,
    ranks,
)

BASE = Config(dataset="synthetic", num_clients=100, lr=0.01, num_rounds=1000, schedule="constant")
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
    cfg = replace(cfg, participation=clients / cfg.num_clients,
                  **(gpu if torch.cuda.is_available() else cpu))
    return replace(cfg, batch_size=2, local_steps=min(1, cfg.local_steps)) if quick else cfg


def write_images(cfg: Config, folder: str) -> str:
    """A file with the run's images, so that no process has to make them."""
    path = f"{folder}/images.pt"
    torch.save({k: v.cpu() if isinstance(v, torch.Tensor) else torch.from_numpy(v)
                for k, v in vars(utils.load_data(cfg)).items()}, path)
    return path


def read_images(path: str) -> Data:
    found = torch.load(path, map_location=device())
    return Data(**found | {k: found[k].cpu().numpy() for k in ("train", "val")})


def start(cfg: Config, images: str = "") -> tuple[Run, State]:
    """A run at its beginning, its model in training mode, nothing stored."""
    if images:
        utils.load_data = lambda cfg: read_images(images)
    with tempfile.TemporaryDirectory() as folder:
        run, state = open_run(cfg, Store(Path(folder)))
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
    turns = [{name: seconds(f) for name, f in work.items()} for _ in range(pairs)]
    return {name: np.array([turn[name] for turn in turns]) for name in work}


def compare(times: dict, ours: str, other: str) -> dict:
    """Median seconds of both, and the ratio ours / other within each pair: median, quartiles.

    `cores` is the same ratio in processor time, which waiting for a busy machine does not touch.
    """
    a, b = (np.reshape(times[k], (len(times[k]), -1)) for k in (ours, other))
    low, middle, high = np.quantile(a[:, 0] / b[:, 0], (0.25, 0.5, 0.75)).tolist()
    found = {"unit": "s", ours: float(np.median(a[:, 0])), other: float(np.median(b[:, 0])),
             "ratio": middle, "q1": low, "q3": high, "pairs": len(a)}
    on_cpu = a.shape[1] == 2 and not torch.cuda.is_available()
    return found | (dict(cores=float(np.median(a[:, 1] / b[:, 1]))) if on_cpu else {})


def forget_peak():
    """From here on `peak` counts: making the synthetic images takes more than any round."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MB held at most since `forget_peak`: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


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
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), __file__, as_text(cfg), images,
             folder], stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})

        def one_round() -> float:
            answer = Path(folder, "answer")
            Path(folder, "go").touch()
            while not answer.exists():
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the processes ended:\n{log.read()[-4000:]}")
                time.sleep(0.01)
            took = float(answer.read_text())
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
    while True:
        from_rank_0(asked)
        took, _ = seconds(lambda: federated_round(run, state))
        if ranks()[0] == 0:
            (folder / "part").write_text(str(took))
            (folder / "part").rename(folder / "answer")


# ------------------------------------------------------------------ reporting
def machine() -> dict:
    found = {}
    if Path("/proc/cpuinfo").exists():
        found = dict(re.findall(r"(?m)^(model name|MemTotal)\s*:\s+(.+)$", "".join(
            Path(f"/proc/{f}").read_text() for f in ("cpuinfo", "meminfo"))))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=found.get("model name", platform.processor() or platform.machine()),
                cores=os.cpu_count(), threads=torch.get_num_threads(),
                ram_gb=round(int(found.get("MemTotal", "0 kB").split()[0]) / 2**20, 1), gpu=gpu,
                torch=torch.__version__, python=platform.python_version(),
                load=round(os.getloadavg()[0], 2))


def describe(cfg: Config) -> dict:
    """What a row of a table says of its workload."""
    return dict(model="mini" if cfg.architecture == "mini" else "ViT-S/16", px=cfg.image_size,
                B=cfg.batch_size, J=cfg.local_steps,
                clients=cohort_size(cfg.num_clients, cfg.participation))


def report(script: str, args, rows: list[dict], **facts):
    """Prints the machine and the rows; writes both to <out>/<script>_<cpu|gpu>.json."""
    facts = dict(machine=machine(), quick=args.quick, **facts)
    print(*(f"{k}: {v}" for k, v in facts["machine"].items()), sep="  ")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if device().type == "cuda" else "cpu"
    (args.out / f"{Path(script).stem}_{kind}.json").write_bytes(dump(facts | dict(rows=rows)))


if __name__ == "__main__":  # what `resident` starts
    serve(Config(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
