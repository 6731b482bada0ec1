"""Runs notebooks headlessly and prints a table of what they stored: `make demo`, `make figures`.

    python tests/run_notebooks.py [--out FOLDER] [names ...]

The preset and whether to train come from the environment: PRESET, TRAIN.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path, out: Path | None) -> float:
    """Runs one notebook in notebooks/, keeps the executed copy in `out`; returns the seconds."""
    began, notebook = time.monotonic(), nbformat.read(path, as_version=4)
    try:
        nbclient.NotebookClient(
            notebook, timeout=None, extra_arguments=["--IPKernelApp.log_level=40"],
            resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        if out:
            out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, out / path.name)
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=lambda p: Path(p).absolute(), default=None)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        if not args.names or any(name in path.name for name in args.names):
            print(f"{path.name} ...", end=" ", flush=True)
            print(f"{execute(path, args.out):.0f} s", flush=True)
    sys.path.insert(0, str(ROOT))
    from utils import gather, open_store, stored
    store = open_store(os.environ.get("PRESET", "full"))
    runs, _ = gather(stored(store), store)
    columns = ["dataset", "algorithm", "server", "sharding", "local_steps", "rule", "sparsity",
               "calibration", "seed", "val", "test"]
    tested = runs.dropna(subset="test").sort_values(columns[1:-2])
    print(tested[columns].fillna({"rule": "dense"}).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
