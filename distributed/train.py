"""One run from the command line, in one process or, by torchrun, in several.

    python distributed/train.py demo rule=least_sensitive num_rounds=20
    torchrun --nproc-per-node 2 distributed/train.py lite classes_per_client=5 algorithm=scaffold

A preset, then fields of `Config` with values in Python's notation (bare words are text). Results
go to results/, those of "demo" to results/demo/, or to the like of $RESULTS_DIR.
"""
import ast
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist  # noqa: E402

import notebooks.extension  # noqa: E402, F401  (registers the algorithms beyond FedAvg)
import utils  # noqa: E402
from utils import ROOT, Config, Store, part_of, preset  # noqa: E402


def parse_value(text: str):
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def configure(name: str, *changes: str) -> Config:
    """The preset with changes like "lr=0.1"; ValueError for a word without "="."""
    values = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} must be a field of Config with its value: field=value")
        values[field] = parse_value(text)
    own_name = values.pop("name", "")  # which is not the preset's
    return replace(preset(name, **values), name=own_name)


def open_store(name: str) -> Store:
    """The project's store; TRAIN=no in the environment freezes it."""
    root = Path(os.environ.get("RESULTS_DIR") or ROOT / "results")
    return Store(root / part_of(name), frozen=os.environ.get("TRAIN") == "no")


def report(result: dict):
    test = ""
    if "test" in result:
        test = f", test {result['test']['top1']:.2%}"
    print(f"{result['run']}: {result['status']}{test}")


def main(name: str, *changes: str):
    cfg = configure(name, *changes)
    if not dist.is_torchelastic_launched():
        report(utils.train(cfg, open_store(name)))
        return

    import torchrun
    torchrun.init_process_group(cfg)
    result = torchrun.train(cfg, open_store(name))
    if dist.get_rank() == 0:
        report(result)
    torchrun.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
