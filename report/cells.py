"""The cells of the experiments, as far as they are stored, and what is derived from them.

A cell counts once the search for its rate has finished and its run is done. Nothing is trained or
computed: the session's store is frozen.
"""
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from notebooks import experiments, extension
from notebooks.experiments import SECTIONS, Section, Session, open_session
from utils import Config, Store, run_name


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
Range = tuple[str, str, str]           # lowest rate, highest rate, best gain


def text_of(part) -> str:
    """A part of a label, such as 0.9, "Nc=10" or 4."""
    if isinstance(part, float):
        return f"{part:g}"
    return str(part)


def frozen_session(preset: str) -> Session:
    session = open_session(preset, on_cpu=True)
    store = Store(session.store.root, frozen=True)
    return replace(session, store=store)


def read_cells(session: Session) -> Cells:
    """Every cell of every section."""
    return {name: read_section(section, session) for name, section in SECTIONS.items()}


def read_section(section: Section, session: Session) -> dict[tuple, Cell]:
    seeds = session.seeds if section.every_seed else session.seeds[:1]
    results = {}
    searches = {}
    of_cell = {}
    for label, cfg in section.cells(session).items():
        of_cell[label] = [replace(cfg, seed=s) for s in seeds]
        searches[label] = search_of(cfg, section, session)
        if searches[label].finished:
            for each in of_cell[label]:
                if experiments.is_done(each, session.store, section.test):
                    results[run_name(each)] = session.store.result(each)

    # once for all cells, since a frame takes longer to make than to look through
    runs, history = experiments.frames(results.values())
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


# ------------------------------------------------------------------ ranges of rates
def ranges(cells: dict[tuple, Cell]) -> dict[tuple, Range | None]:
    """`gaining` of every (rule, sharding) of the map of rates."""
    runs = {}
    for (rule, sharding, _), cell in cells.items():
        runs.setdefault((rule, sharding), []).append(cell.runs)
    return {key: gaining(pd.concat(found)) for key, found in runs.items()}


def gaining(runs: pd.DataFrame) -> Range | None:
    """The rates around the best at which training gains on validation over the untrained start.

    A rate at an end of those tried gets "\\le" or "\\ge", for the range may go on there. No rates
    where nothing gains, None without runs.
    """
    gains = (runs.val - runs.start).set_axis(runs.lr).sort_index()
    if gains.isna().all():
        return None
    best = int(gains.argmax())
    gain = f"{gains.iloc[best]:+.1f}"
    if gains.iloc[best] <= 0:
        return "", "", gain

    first = best
    while first > 0 and gains.iloc[first - 1] > 0:
        first -= 1
    last = best
    while last < len(gains) - 1 and gains.iloc[last + 1] > 0:
        last += 1

    low = f"{gains.index[first]:g}"
    high = f"{gains.index[last]:g}"
    if first == 0:
        low = "\\le " + low
    if last == len(gains) - 1:
        high = "\\ge " + high
    return low, high, gain


# ------------------------------------------------------------------ interference
def interference(cfg: Config, store: Store) -> tuple[str, str] | None:
    """Of one cohort before the first round: the mean cosine of two clients, and damage over gain.

    The second is "" where clients gain nothing. None where it is not measured.
    """
    found = extension.diagnose(cfg, store, at="start", images=500)
    if not found:
        return None
    pairs = ~np.eye(len(found["clients"]), dtype=bool)
    cosine = np.array(found["cosine"])[pairs].mean()
    ratio = found["single"]["ratio"]
    if ratio is None:
        return f"{cosine:.2f}", ""
    return f"{cosine:.2f}", f"{ratio:.2f}"
