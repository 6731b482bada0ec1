"""After `make demo`: the notebooks again, and once more with a quarter of the results gone.

    python tests/rerun_demo.py

The second time nothing is trained: results, figures and tables keep their bytes. Then every fourth
result is deleted, every other one of these with its checkpoints: what comes back is what was
deleted, bit for bit, times aside.
"""
import json
import os
import shutil
import sys
from pathlib import Path

from run_notebooks import NOTEBOOKS, ROOT, execute

os.environ["PRESET"] = "demo"

HOME = Path(os.environ.get("RESULTS_DIR") or ROOT).expanduser()
RESULTS = HOME / "demo" if os.environ.get("RESULTS_DIR") else HOME / "results/demo"
FIGURES = HOME / "figures/demo"
# these draw all stored rates, so the second time also those of notebook 05's map
GROW = ("03_rates", "03_drift")
TIMES = ("seconds", "segments")  # what may differ between two runs of one configuration


def contents(folder: Path, *kinds: str) -> dict[str, bytes]:
    found = [path for kind in kinds for path in folder.glob(f"*.{kind}")]
    return {path.name: path.read_bytes() for path in sorted(found)}


def timeless(results: dict[str, bytes]) -> dict:
    """name -> what a result says but for its times, or the bytes of its predictions."""
    found = {}
    for name, content in results.items():
        found[name] = content
        if name.endswith(".json"):
            result = json.loads(content)
            found[name] = {k: v for k, v in result.items() if k not in TIMES}
    return found


def changed(before: dict, after: dict) -> list[str]:
    return sorted(name for name in before.keys() | after.keys()
                  if before.get(name) != after.get(name))


def rerun():
    for path in NOTEBOOKS:
        print(f"{path.name} again: {execute(path):.0f} s", flush=True)


def delete_a_quarter(names: list[str]):
    for i, name in enumerate(names[::4]):
        (RESULTS / name).unlink()
        if i % 2 == 0:
            shutil.rmtree(RESULTS / "checkpoints" / Path(name).stem, ignore_errors=True)


def main():
    stored = contents(RESULTS, "json", "npy")
    drawn = contents(FIGURES, "png", "pdf", "csv")
    names = [name for name in stored if name.endswith(".json")]
    if len(names) < 40:
        sys.exit(f"{RESULTS} has {len(names)} results: run `make demo` first")

    rerun()
    wrong = changed(stored, contents(RESULTS, "json", "npy"))
    assert not wrong, f"a second run made anew: {wrong}"
    wrong = [name for name in changed(drawn, contents(FIGURES, "png", "pdf", "csv"))
             if Path(name).stem not in GROW]
    assert not wrong, f"a second run drew otherwise: {wrong}"

    drawn = contents(FIGURES, "png", "pdf", "csv")
    execute(NOTEBOOKS[2])
    wrong = changed(drawn, contents(FIGURES, "png", "pdf", "csv"))
    assert not wrong, f"a third run drew otherwise: {wrong}"

    delete_a_quarter(names)
    rerun()
    wrong = changed(timeless(stored), timeless(contents(RESULTS, "json", "npy")))
    assert not wrong, f"results that were deleted came back otherwise: {wrong}"
    print(f"{len(names)} results and {len(drawn)} figures and tables are the same")


if __name__ == "__main__":
    main()
