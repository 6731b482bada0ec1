"""The cells of the experiments, as far as they are stored, and what is derived from them.

A cell counts once its run is done and the search for its rate has finished, or those for the rates
and choices that it takes from another section. Nothing is trained or computed: the session's store
is frozen.
"""
import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from notebooks import experiments
from notebooks.experiments import SECTIONS, Section, Session, open_session
from utils import Config, run_name


@dataclass(frozen=True)
class Cell:
    """One cell of an experiment: a run a seed."""
    label: tuple
    cfgs: list[Config]
    runs: pd.DataFrame      # of those that are done, in the columns of `experiments.frames`
    history: pd.DataFrame
    bracketed: bool         # rates on both sides of its own were tried, or none was searched

    @property
    def key(self) -> str:
        return "/".join(text_of(part) for part in self.label)


@dataclass(frozen=True)
class Search:
    """How far the search for a cell's rate is."""
    finished: bool
    bracketed: bool


Cells = dict[str, dict[tuple, Cell]]   # section -> label -> cell


def text_of(part) -> str:
    """A part of a label, such as 0.9, "Nc=10" or 4."""
    if isinstance(part, float):
        return f"{part:g}"
    return str(part)


def frozen_session(preset: str, seeds: int | None = None) -> Session:
    session = open_session(preset, seeds, on_cpu=True)
    return replace(session, store=replace(session.store, frozen=True))


def read_cells(session: Session) -> Cells:
    """Every cell of every section, and of the rules on the larger backbone, as "rules_larger"."""
    cells = {name: read_section(section, session) for name, section in SECTIONS.items()}
    larger = experiments.on_vits16(session)
    return cells | {"rules_larger": read_section(SECTIONS["rules"], larger)}


def read_section(section: Section, session: Session) -> dict[tuple, Cell]:
    seeds = experiments.seeds_of(section, session)
    # in a frozen store this trains nothing, and says whether there is anything to train
    ready = all(experiments.settle(other, session) for other in section.rests_on)
    results = {}
    searches = {}
    of_cell = {}
    for label, cfg in section.cells(session).items():
        of_cell[label] = [replace(cfg, seed=s) for s in seeds]
        searches[label] = search_of(cfg, section, session)
        if ready and searches[label].finished:
            for each in of_cell[label]:
                if experiments.is_done(each, session.store, section.test):
                    results[run_name(each)] = session.store.result(each)

    # once for all cells, since a frame takes longer to make than to look through
    runs, history = experiments.frames(results.values())
    # of the fitted head on frozen features, which all runs begin with
    runs["test_start"] = experiments.test_of_start(session)
    cells = {}
    for label, cfgs in of_cell.items():
        names = [run_name(cfg) for cfg in cfgs]
        ours = runs[runs.run.isin(names)]
        course = history[history.run.isin(names)]
        cells[label] = Cell(label, cfgs, ours, course, searches[label].bracketed)
    return cells


def search_of(cfg: Config, section: Section, session: Session) -> Search:
    if not (section.searched and session.scale.searches):
        return Search(finished=True, bracketed=True)
    like = experiments.searched_like(cfg, session)
    found = experiments.ladder(like, session.store)
    return Search(found.finished, found.bracketed)


# ------------------------------------------------------------------ the map of rates
@dataclass(frozen=True)
class Gains:
    """What training gains on validation over the untrained start, by rate, at seed 0."""
    courses: dict[float, list[float]]   # {rate: points at each evaluation}, rates ascending
    # {rate: length of a client's task vector in the first round, mean over the cohort}
    lengths: dict[float, float] = field(default_factory=dict)

    @cached_property
    def points(self) -> dict[float, float]:
        """{rate: points in the end}; minus infinity for a run that diverged."""
        return {lr: course[-1] if course else -math.inf for lr, course in self.courses.items()}

    @property
    def dip(self) -> float:
        """The lowest point on the way at the best rate, at most the start's zero."""
        return min(self.courses[self.best], default=-math.inf)

    @property
    def best(self) -> float:
        """The best rate; of equal ones the lowest."""
        return max(self.points, key=self.points.get)

    @cached_property
    def _range(self) -> experiments.Range:
        return experiments.range_around_best(pd.Series(self.points))

    @property
    def lowest(self) -> float | None:
        """The lowest of the rates around the best that gain, None where none gains."""
        return self._range.lowest if self._range.gain > 0 else None

    @property
    def highest(self) -> float | None:
        return self._range.highest if self._range.gain > 0 else None

    @property
    def reach(self) -> float | None:
        """The length of a client's first task vector at the highest of the rates that gain."""
        return self.lengths.get(self.highest)

    def above_best(self, factor: float) -> float | None:
        """Points at about `factor` times the best rate, None where that was not tried."""
        for rate, points in self.points.items():
            if math.isclose(rate, factor * self.best, rel_tol=0.15):
                return points
        return None


def read_gains(session: Session) -> dict[tuple, Gains]:
    """{(rule, sharding): Gains} of those rules and shardings of which a rate was tried.

    Of all stored runs that differ in the rate alone: those of searches and those of the map.
    """
    found = {}
    for label, cfg in SECTIONS["rules"].cells(session).items():
        like = experiments.searched_like(cfg, session)
        if experiments.of_stand_in(cfg, session):
            continue  # what is stored is of another sharding
        courses = {}
        lengths = {}
        for lr in experiments.stored_rates(like, session.store):
            result = session.store.result(replace(like, lr=lr))
            courses[lr] = course_of(result)
            for row in result["history"]:
                if row["round"] == 1:
                    lengths[lr] = row["client_norm"]
        if any(courses.values()):
            found[label] = Gains(courses, lengths)
    return found


def course_of(result: dict) -> list[float]:
    """Validation accuracy less that of the start (points), evaluation by evaluation."""
    if result["status"] == "diverged":
        return []
    seen = [100 * row["val_top1"] for row in result["history"] if "val_top1" in row]
    return [accuracy - seen[0] for accuracy in seen]


# ------------------------------------------------------------------ interference
def damage_cells(session: Session) -> dict[tuple, Cell]:
    """{(rule, sharding): cell} of what a cohort's first vectors cost others at equal gain.

    Its runs have a row a seed: `log_damage`, whose differences are logarithms of ratios, and
    `log_damage_<gain>` at other gains.
    """
    measured = experiments.trade_offs(session)
    keys = ["rule", "sharding", "seed"]
    found = experiments.damages(measured).rename(columns={"damage": "log_damage"})
    for gain in (*experiments.OTHER_GAINS, experiments.ONE_CLASS_GAIN):
        other = experiments.damages(measured, gain)
        other = other.rename(columns={"damage": f"log_damage_{gain:g}"})
        found = found.merge(other, on=keys, how="outer", sort=False)
    values = [name for name in found if name.startswith("log_")]
    found[values] = np.log(found[values].astype(float))

    cfgs = [replace(session.base, seed=seed) for seed in session.seeds]
    cells = {}
    for label, runs in found.groupby(keys[:2], sort=False):
        cells[label] = Cell(label, cfgs, runs, runs[:0], bracketed=True)
    return cells
