"""claims.toml held against the stored runs: what of it may be said.

A claim compares two cells of the experiments and says "above", "below" or "none" (no difference
found); "open" are comparisons of which the text says nothing yet.
"""
import math
import tomllib
from pathlib import Path

import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

from notebooks import experiments
from notebooks.experiments import Comparison
from report.cells import Cell, Cells
from utils import Config, Store

REPORT = Path(__file__).resolve().parent
EXPECTED = ("above", "below", "none", "open")


def read_claims() -> dict[str, dict]:
    """{id: {a, b, value_a, value_b, expected}}; the head of claims.toml explains them."""
    with open(REPORT / "claims.toml", "rb") as file:
        claims = tomllib.load(file)
    defaults = dict(value_a="test", value_b="test", expected="open")
    return {name: defaults | claim for name, claim in claims.items()}


def sides(claim: dict, cells: Cells) -> list[Cell]:
    """The two cells, as far as the preset has them."""
    found = []
    for section, *label in (claim["a"], claim["b"]):
        cell = cells[section].get(tuple(label))
        if cell is not None:
            found.append(cell)
    return found


def comparison(claim: dict, cells: Cells, store: Store) -> Comparison:
    """a - b in points, on the seeds that both have."""
    stored = [cell for cell in sides(claim, cells) if len(cell.runs)]
    if len(stored) < 2:
        return experiments.NOTHING
    a, b = stored
    if claim["value_a"] == claim["value_b"] == "test":
        return experiments.compare(done(a), done(b), store)

    left = a.runs.set_index("seed")[claim["value_a"]]
    right = b.runs.set_index("seed")[claim["value_b"]]
    pairs = pd.concat([left, right], axis=1, keys=["a", "b"]).dropna()
    if len(pairs) > 1:
        return experiments.paired_t(pairs.a - pairs.b)
    if len(pairs) == 1:
        only = pairs.iloc[0] / 100
        return on_validation(only.a, only.b, a.cfgs[0])
    return experiments.NOTHING


def done(cell: Cell) -> list[Config]:
    seeds = set(cell.runs.seed)
    return [cfg for cfg in cell.cfgs if cfg.seed in seeds]


def on_validation(a: float, b: float, cfg: Config) -> Comparison:
    """a - b of one run each, shares of the validation images.

    As if the images were two samples: those of one sample would give a narrower interval, but
    predictions on validation are not stored.
    """
    train = experiments.train_images(cfg)
    n = round(train * cfg.val_fraction / (1 - cfg.val_fraction))
    if cfg.eval_images:
        n = min(n, cfg.eval_images)
    counts = (round(a * n), n, round(b * n), n)
    low, high = confint_proportions_2indep(*counts, method="wald")
    p = float(test_proportions_2indep(*counts, method="wald").pvalue)
    return Comparison(100 * (a - b), 100 * low, 100 * high, p, math.nan, 1, "Wald")


# ------------------------------------------------------------------ verdicts
Judged = dict[str, tuple[Comparison, str]]   # id -> comparison, verdict


def judge(claims: dict[str, dict], cells: Cells, store: Store) -> Judged:
    """Every comparison with its verdict: "missing", "open", "stands" or "wrong".

    A claim is missing as long as a seed of either side is. "above" and "below" need a p value
    that is small after Holm's method over the claims of the same section.
    """
    judged = {}
    by_section = {}
    for name, claim in claims.items():
        by_section.setdefault(claim["a"][0], []).append(name)

    for names in by_section.values():
        found = [comparison(claims[name], cells, store) for name in names]
        adjusted = experiments.holm(found)
        for name, plain, by_holm in zip(names, found, adjusted, strict=True):
            seeds = [len(cell.cfgs) for cell in sides(claims[name], cells)]
            expected = claims[name]["expected"]
            if plain.seeds < max(1, min(seeds, default=1)):
                verdict = "missing"
            elif expected == "open":
                verdict = "open"
            elif stands(plain, by_holm.p, expected):
                verdict = "stands"
            else:
                verdict = "wrong"
            judged[name] = plain, verdict
    return judged


def stands(found: Comparison, p: float, expected: str) -> bool:
    """Whether the interval says what is expected, at Holm's p value `p`."""
    sure = p < 1 - experiments.CONFIDENCE
    if expected == "above":
        return found.low > 0 and sure
    if expected == "below":
        return found.high < 0 and sure
    return found.low <= 0 <= found.high
