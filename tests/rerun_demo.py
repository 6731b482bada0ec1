"""After `make demo`: the notebooks again, and once more with half of the results gone.

    python tests/rerun_demo.py

The second time nothing is trained and every figure and table keeps its bytes. Then every other
result is deleted, every fourth of these with its checkpoints: what comes back is what was deleted,
bit for bit, times aside.
"""
import json
import os
import shutil
import sys
from pathlib import Path

from run_notebooks import ROOT, execute

os.environ["PRESET"] = "demo"
sys.path.insert(0, str(ROOT))

RESULTS = Path(os.environ.get("RESULTS_DIR") or ROOT / "results") / "demo"
FIGURES = ROOT / "figures" / "demo"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
TIMES = ("seconds", "sha256", "code")  # what may differ between two runs of one configuration


def science() -> dict:
    """name -> the stored result without its times."""
    found = {p.name: json.loads(p.read_text()) for p in RESULTS.glob("*.json")}
    return {n: {k: v for k, v in r.items() if k not in TIMES} for n, r in found.items()}


def contents(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.*"))}


def rerun(limit: float):
    for path in NOTEBOOKS:
        seconds = execute(path, None)
        print(f"{path.name} again: {seconds:.0f} s", flush=True)
        assert seconds < limit, f"{path.name} took {seconds:.0f} s: was something trained again?"


def main():
    results, raw, figures = science(), contents(RESULTS), contents(FIGURES)
    assert len(results) > 40, f"{RESULTS} has {len(results)} results: run `make demo` first"
    rerun(limit=90)
    assert contents(RESULTS) == raw, "a second run wrote results anew"
    again = contents(FIGURES)
    assert again.keys() == figures.keys()
    assert not (changed := [n for n in figures if figures[n] != again[n]]), f"{changed} changed"
    for i, name in enumerate(sorted(raw)[::2]):
        (RESULTS / name).unlink()
        if i % 4 == 0:
            shutil.rmtree(RESULTS / "checkpoints" / Path(name).stem, ignore_errors=True)
    rerun(limit=900)
    back = science()
    assert back.keys() == results.keys()
    assert not (changed := [n for n in results if results[n] != back[n]]), f"{changed} changed"
    print(f"{len(results)} results and {len(figures)} figures and tables are the same")


if __name__ == "__main__":
    main()
