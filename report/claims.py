"""claims.toml held against the stored runs: what of it may be said.

A claim compares two cells of the experiments and says "above", "below", "none" (no difference
found), "unsure" (one that Holm's method leaves open) or "equal" (within the margin); "open" are
comparisons whose direction the text leaves open.
"""
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pandas as pd
from scipy.stats import norm

from notebooks import experiments
from notebooks.experiments import Comparison
from report.cells import Cell, Cells
from utils import Store

REPORT = Path(__file__).resolve().parent
EXPECTED = ("above", "below", "none", "unsure", "equal", "open")
TEST_IMAGES = 10_000

Claim = dict
Judged = dict[str, tuple[Comparison, str]]   # id -> comparison, verdict


def read_claims() -> dict[str, Claim]:
    """{id: {a, b, value_a, value_b, expected, family}}; the head of claims.toml explains them."""
    with open(REPORT / "claims.toml", "rb") as file:
        claims = tomllib.load(file)
    defaults = dict(value_a="test", value_b="test", expected="open")
    return {name: defaults | dict(family=claim["a"][0]) | claim for name, claim in claims.items()}


def sides(claim: Claim, cells: Cells) -> list[Cell]:
    """The two cells, as far as the preset has them."""
    found = []
    for section, *label in (claim["a"], claim["b"]):
        cell = cells[section].get(tuple(label))
        if cell is not None:
            found.append(cell)
    return found


# ------------------------------------------------------------------ comparisons
def comparison(claim: Claim, cells: Cells, store: Store | None = None) -> Comparison:
    """a - b in points, on the seeds that both have.

    Of one seed each, on the same test images if `store` tells which of them were right.
    """
    both = sides(claim, cells)
    if len(both) < 2:
        return experiments.NOTHING
    a, b = both
    left = a.runs.set_index("seed")[claim["value_a"]]
    right = b.runs.set_index("seed")[claim["value_b"]]
    pairs = pd.concat([left, right], axis=1, keys=["a", "b"]).dropna()
    is_log = claim["value_a"].startswith("log_")
    if len(pairs) > 1:
        found = experiments.paired_t(pairs.a - pairs.b)
        if is_log:
            # the margin within which two are equal is one of points
            found = replace(found, p_equivalent=math.nan, unit="nats of log ratio")
        return found
    # one accuracy has an interval, since it is of many images; another measure has none
    if len(pairs) == 0 or is_log:
        return experiments.NOTHING
    images = validation_images(a)
    if claim["value_a"] == "test":
        images = min(TEST_IMAGES, a.cfgs[0].eval_images or TEST_IMAGES)
    if claim["value_a"] == claim["value_b"] == "test":
        found = on_same_images(a, b, pairs.index[0], store)
        if found.seeds:
            return found
    return of_one_seed(pairs.a.iloc[0], pairs.b.iloc[0], images)


def on_same_images(a: Cell, b: Cell, seed: int, store: Store | None) -> Comparison:
    """`experiments.compare` of one seed; NOTHING where predictions or the data set are missing."""
    if store is None:
        return experiments.NOTHING
    one, other = ([cfg for cfg in cell.cfgs if cfg.seed == seed] for cell in (a, b))
    try:
        return experiments.compare(one, other, store)
    except FileNotFoundError:
        return experiments.NOTHING


def validation_images(cell: Cell) -> int:
    cfg = cell.cfgs[0]
    train = experiments.train_images(cfg)
    images = round(train * cfg.val_fraction / (1 - cfg.val_fraction))
    return min(images, cfg.eval_images or images)


def of_one_seed(a: float, b: float, images: int) -> Comparison:
    """a - b of one run each, in % of so many images, by the normal approximation.

    As if the images were two samples. Both runs see the same ones, so that the interval is too
    wide rather than too narrow; which images a run gets right is not stored for validation.
    """
    difference = a - b
    variance = a * (100 - a) + b * (100 - b)
    error = math.sqrt(variance / images)
    if error == 0:
        return experiments.NOTHING
    half = norm.ppf(0.5 + experiments.CONFIDENCE / 2) * error
    p = 2 * norm.sf(abs(difference) / error)
    p_equal = norm.sf((experiments.MARGIN - abs(difference)) / error)
    return Comparison(difference, difference - half, difference + half, p, p_equal, 1,
                      "two samples")


# ------------------------------------------------------------------ verdicts
def judge(claims: dict[str, Claim], cells: Cells, store: Store | None = None) -> Judged:
    """Every comparison with its verdict: "missing", "open", "stands" or "wrong".

    "above" and "below" need a p value that is small after Holm's method over the claims of the
    same family.
    """
    families = {}
    for name, claim in claims.items():
        families.setdefault(claim["family"], []).append(name)

    judged = {}
    for names in families.values():
        found = [comparison(claims[name], cells, store) for name in names]
        adjusted = experiments.holm(found)
        for name, plain, by_holm in zip(names, found, adjusted, strict=True):
            judged[name] = plain, verdict(claims[name], plain, by_holm.p, cells)
    return judged


def verdict(claim: Claim, found: Comparison, p: float, cells: Cells) -> str:
    """See `judge`. A claim is missing as long as a seed of either side is."""
    wanted = [len(cell.cfgs) for cell in sides(claim, cells)]
    if found.seeds == 0 or found.seeds < min(wanted):
        return "missing"
    if claim["expected"] == "open":
        return "open"
    if stands(found, p, claim["expected"]):
        return "stands"
    return "wrong"


def stands(found: Comparison, p: float, expected: str) -> bool:
    """Whether the interval says what is expected, at Holm's p value `p`."""
    sure = p < 1 - experiments.CONFIDENCE
    if expected == "above":
        return found.low > 0 and sure
    if expected == "below":
        return found.high < 0 and sure
    if expected == "unsure":
        return not sure and not found.low <= 0 <= found.high
    if expected == "equal":
        return found.equivalent
    return found.low <= 0 <= found.high
