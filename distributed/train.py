"""One run from the command line, in one process or, by torchrun, in several.

    python distributed/train.py demo rule=least_sensitive num_rounds=20
    torchrun --nproc-per-node 2 distributed/train.py lite classes_per_client=5

A preset, then fields of `Config` with values in Python's notation (bare words are text). Under
torchrun each process trains its share of every cohort and one all-reduce a round sums the task
vectors, on GPUs by NCCL and else by gloo; the run may be resumed with another number of them.
"""
import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import Config, leave_ranks, open_store, preset, ranks, train  # noqa: E402


def value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def configure(name: str, *changes: str) -> Config:
    return preset(name, **{k: value(v) for k, _, v in (c.partition("=") for c in changes)})


def main(name: str, *changes: str):
    cfg = configure(name, *changes)
    result = train(cfg, open_store(name))
    if ranks()[0] == 0:
        test = f", test {result['test']['top1']:.2%}" if "test" in result else ""
        print(f"{result['run']}: {result['status']}{test}")
    leave_ranks()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
