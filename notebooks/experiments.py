"""What is run: every experiment once, its search for learning rates, its results as tables.

Notebooks, the report and `make budget` all read this file; nothing here draws. In reading order:

    session       where a preset's runs live, with which seeds, workers and deadline
    scale         the values of every experiment, by preset, and why
    experiments   session -> {label: Config}, all of them in the table SECTIONS
    rate search   a ladder of learning rates that goes on until its best is bracketed
    training      many runs, one after the other or side by side in processes of their own
    tables        stored results as pandas frames, and which of them are of other code
    statistics    intervals over seeds, paired comparisons, equivalence
    budget        what a preset costs, counted from the configurations
    command line  python -m notebooks.experiments run SECTION | budget

To change what an experiment runs, edit SCALES; to add one, write a function and a row in SECTIONS.
"""
import argparse
import atexit
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import timm
import torch
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import utils
from notebooks import extension  # registers its algorithms
from notebooks.backup import BackedUpStore
from utils import (
    ALGORITHMS,
    CODE_SHA256,
    ROOT,
    RULES,
    Config,
    Store,
    cohort_size,
    device,
    hardware,
    open_run,
    part_of,
    preset,
    run_key,
    run_name,
    sensitivity,
    train,
    uninterrupted,
)

Label = tuple           # what tells an experiment's cells apart, such as ("random", "Nc=1")
Cells = dict[Label, Config]
Watch = Callable[[Config, tuple[dict, ...]], None]  # called with a run and its history so far
After = Callable[[Config], None]                    # called with a run as soon as it is done


# ------------------------------------------------------------------ session
@dataclass(frozen=True)
class Session:
    """Where a preset's runs live and how they are trained; made by `open_session`."""
    preset: str
    base: Config                 # the preset's configuration, which every experiment changes
    store: BackedUpStore
    figures: Path
    seeds: tuple[int, ...]
    workers: int
    scale: "Scale"
    stop_at: float = math.inf    # seconds of time.monotonic
    figures_backup: Path | None = None
    tensorboard: bool = False


def or_synthetic(cfg: Config) -> Config:
    """`cfg`, or its like on synthetic images, with a warning, where its data cannot be loaded."""
    try:
        utils.load_data(cfg)
        return cfg
    except FileNotFoundError as error:
        return utils.on_synthetic(cfg, str(error))


def open_session(preset_name: str, seeds: int | Iterable[int] | None = None,
                 drive: Path | None = None, hours: float | None = None, on_cpu: bool = False,
                 workers: int | None = None, tensorboard: bool = False) -> Session:
    """The session of a preset.

    `seeds` is their number or a list of them (default: those of the preset's scale). Results are in
    results/ of the project or in $RESULTS_DIR, figures in figures/ or in $RESULTS_DIR/figures, in
    the folders of `part_of`; with a `drive` folder both are copied there. `hours` is the time
    after which training stops by itself. `workers` is how many runs are trained side by side
    (default: 1 on a GPU, else the number of cores). TRAIN=no in the environment freezes the store.
    "demo" takes synthetic images where CIFAR-100 cannot be had, with a warning.

    Raises ValueError for an unknown preset, and RuntimeError where "full" or "lite" would train
    without a GPU, unless `on_cpu`.
    """
    base = preset(preset_name, dataset="cifar100")
    frozen = os.environ.get("TRAIN") == "no"
    needs_gpu = preset_name in ("full", "lite")
    if needs_gpu and device().type == "cpu" and not (on_cpu or frozen):
        raise RuntimeError(
            f"Preset {preset_name!r} is for a GPU and this machine has none: a single run would "
            "take days. In Colab choose Runtime > Change runtime type > T4 GPU; or set "
            "PRESET = 'small', which is for a CPU; or ask for it with ON_CPU = True.")
    if preset_name == "demo":
        base = or_synthetic(base)
    if seeds is None:
        seeds = SCALES[preset_name].seeds
    if isinstance(seeds, int):
        seeds = range(seeds)
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} must name one at least, and none twice")
    # what is shown of one seed alone is of the first
    base = replace(base, seed=seeds[0])
    if workers is None:
        workers = 1 if device().type != "cpu" else os.cpu_count() or 1

    root, figures = _folders(drive, preset_name)
    backup = None
    figures_backup = None
    if drive is not None:
        make_folders_on(Path(drive).expanduser(), preset_name)
        backup = Path(drive).expanduser() / "results" / part_of(preset_name)
        figures_backup = Path(drive).expanduser() / "figures" / part_of(preset_name)
    stop_at = math.inf
    if hours is not None:
        stop_at = time.monotonic() + 3600 * hours
    store = BackedUpStore(root, frozen=frozen, backup=backup)
    return Session(preset_name, base, store, figures, seeds, max(1, workers), SCALES[preset_name],
                   stop_at, figures_backup, tensorboard)


def make_folders_on(drive: Path, preset_name: str):
    """The project's folders on a drive; a warning where it is not there, or takes nothing.

    Not the folder above them: in the place of a drive that is gone it would hide that it is.
    """
    try:
        drive.mkdir(exist_ok=True)
        for name in ("results", "figures"):
            (drive / name / part_of(preset_name)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"{drive} cannot be made, nothing is copied there: {error}", stacklevel=3)


def _folders(drive: Path | None, preset_name: str) -> tuple[Path, Path]:
    """Working copies of results and figures."""
    part = part_of(preset_name)
    asked = os.environ.get("RESULTS_DIR")
    if asked:
        home = Path(asked).expanduser()
        return home / part, home / "figures" / part
    home = ROOT
    if drive is not None and ROOT.is_relative_to(Path(drive).expanduser()):
        home = Path.cwd()  # the project itself is on the drive, which is slow
    return home / "results" / part, home / "figures" / part


def write_figure(session: Session, name: str, content: bytes) -> Path:
    """Writes figures/<name>, and its copy on the drive; where it is now."""
    path = session.figures / name
    utils.write_whole(path, content)
    if session.figures_backup is None:
        return path
    try:
        # A folder made in the place of a drive that is gone would hide that it is.
        if not session.figures_backup.is_dir():
            raise FileNotFoundError(f"{session.figures_backup} is gone")
        utils.write_whole(session.figures_backup / name, content)
    except OSError as error:
        warnings.warn(f"{name} could not be copied to the drive: {error}", stacklevel=2)
    return path


# ------------------------------------------------------------------ scale
@dataclass(frozen=True)
class Scale:
    """The values of every experiment in one preset. Lengths are J * T, local steps of a run."""
    headline: int                  # FedAvg IID and the six models
    sweep: int                     # everything that has many cells
    protocol: int
    search: int | None             # of a rate's search; None: the length of the run itself
    searches: bool                 # False takes the first guesses
    lengths: tuple[int, ...]       # of FedAvg IID, until it has converged
    epochs: tuple[int, ...]        # of centralised training
    baseline_epochs: int           # those of the baseline, whose rate they all take
    search_epochs: int
    decays: tuple[float, ...]
    batches: tuple[int, ...]
    schedules: tuple[str, ...]
    shardings: tuple               # Nc of the grid; None is IID
    local_steps: tuple[int, ...]   # J of the grid
    nc: int                        # "non-IID" of the six models
    sparsities: tuple[float, ...]
    calibration_rounds: tuple[int, ...]
    sweep_shardings: tuple         # of the sweeps over sparsity and calibration rounds
    rules: tuple[str, ...]
    rule_shardings: tuple
    half_rules: tuple[str, ...]    # of masks that free half of the weights
    half_shardings: tuple
    half_once_rules: tuple[str, ...]  # one calibration round, at the first two of these shardings
    map_rules: tuple               # of the map of accuracy against rate; None is dense
    map_shardings: tuple
    map_rungs: tuple[int, ...]     # of its rates, factors of 3 from each one's own
    more_rounds: int               # times the sweeps' rounds, where their gains are small
    # {rule: rungs}: rates of the longer runs, factors of 3 from those of the shorter ones
    longer_rungs: dict[str | None, tuple[int, ...]]
    consensus: tuple[tuple[str, float], ...]  # how clients' scores combine, share of the clients
    client_images: int             # that a client scores in a round of it
    recalibration_skews: tuple     # Nc of masks that change
    skews: tuple                   # Nc of consensus and methods
    pulls: tuple[float, ...]       # mu of FedProx
    too_large: tuple[str, ...] = ()  # of METHODS: what needs more memory than the preset's machine
    # {field: {value: value}}: cells with the first take the rate that is searched with the second
    stand_ins: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)  # where a session asks for no others
    more_seeds: tuple[int, ...] = ()    # beside these, of the sections that ask for them


ALL_RULES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude",
             "random", "query_key")
CONSENSUS = (("central", 0.1), ("mean", 0.1), ("max", 0.1), ("vote", 0.1), ("central", 1.0),
             ("max", 1.0), ("vote", 1.0))

# small: every cell's rate at its own length, so that a cell costs five runs or six. Sweeps have
# the ends of a range and the default between them, and the grid alone the shardings between IID,
# ten classes and one. The baseline's four epochs are as many SGD steps as the federated runs that
# it is compared with: 5,628 beside 5,120, all clients together.
_SMALL = Scale(
    headline=512, sweep=256, protocol=128, search=None, searches=True, lengths=(512, 1024),
    epochs=(1, 2, 4, 8), baseline_epochs=4, search_epochs=1, decays=(1e-4, 5e-4, 5e-3),
    batches=(32, 64, 128),
    schedules=("cosine", "constant", "step", "warmup_cosine"),
    shardings=(None, 50, 10, 5, 1), local_steps=(4, 8, 16), nc=10,
    sparsities=(0.0, 0.5, 0.9, 0.99), calibration_rounds=(1, 4, 8),
    sweep_shardings=(None, 10, 1), rules=ALL_RULES, rule_shardings=(None, 10, 1),
    half_rules=("least_sensitive", "random"), half_shardings=(None, 10, 1),
    half_once_rules=("least_sensitive", "shuffled"),
    map_rules=(None, "least_sensitive", "most_sensitive", "random"),
    map_shardings=(None, 10, 1), map_rungs=(-3, -2, -1, 0, 1, 2, 3), more_rounds=4,
    # all weights one rung more, for of the others none is best at an end
    longer_rungs={None: (0, 1, 2, 3, 4, -1, -2), "least_sensitive": (0, 1, 2, 3, -1, -2),
                  "random": (0, 1, 2, 3, -1, -2)},
    consensus=CONSENSUS[:4], client_images=128, recalibration_skews=(10, 1), skews=(10, 1),
    pulls=(0.01, 10.0), more_seeds=(3, 4))

# lite: a T4 for at most 10 hours, with one seed. A search costs four runs, so rates are searched
# at a quarter of the sweeps' length, at three shardings; what is shown is as long as can be.
# SCAFFOLD keeps the weights of all clients, 8.7 GB of ViT-S/16, and twice that while it is stored.
_LITE = replace(
    _SMALL, headline=512, sweep=256, protocol=64, search=64, baseline_epochs=8,
    epochs=(1, 2, 4, 8, 16), decays=(1e-4, 5e-4), batches=(64, 128),
    sparsities=(0.0, 0.5, 0.8, 0.9, 0.95, 0.99), calibration_rounds=(1, 2, 4, 8),
    rule_shardings=(None, 10, 5, 1), half_shardings=(None, 10), consensus=CONSENSUS,
    map_rules=(None, "least_sensitive", "random"), map_shardings=(None, 1),
    map_rungs=(-2, -1, 0, 1, 2, 3), more_seeds=(),
    longer_rungs=dict.fromkeys((None, "least_sensitive", "random"), (0, 1, 2, -1)),
    too_large=("SCAFFOLD",),
    stand_ins={
        "classes_per_client": {50: None, 5: 10}, "calibration_rounds": {1: 4, 2: 4, 8: 4},
        "rule": {"shuffled": "random"}, "algorithm": {"fedexp": "fedavg", "fedprox": "fedavg"}})

# full: at most 40 hours, with one seed; an image costs 5.7 times that of lite, so the runs are
# shorter, and the map ends at ten times the best rate, which is what is asked of it.
_FULL = replace(_LITE, headline=384, sweep=192, lengths=(384, 768), more_rounds=3,
                sparsities=(0.0, 0.5, 0.8, 0.9, 0.99), consensus=CONSENSUS[:4],
                recalibration_skews=(10,), map_rungs=(-1, 0, 1, 2))

# demo: every line of code in minutes; its accuracies say nothing.
_DEMO = replace(
    _SMALL, headline=16, sweep=8, protocol=8, searches=False, lengths=(16,), epochs=(1, 2),
    baseline_epochs=1, search_epochs=1, decays=(5e-4,), batches=(64,),
    schedules=("cosine", "constant"),
    nc=10, sparsities=(0.5, 0.9), calibration_rounds=(1, 4), sweep_shardings=(None, 10),
    rule_shardings=(None, 1), half_shardings=(10,), map_rules=(None, "least_sensitive"),
    map_shardings=(1,), map_rungs=(0, 1), more_rounds=2,
    longer_rungs={None: (0, 1), "least_sensitive": (0, 1)}, consensus=CONSENSUS[:4],
    client_images=12, recalibration_skews=(5,), skews=(5,), seeds=(0,), more_seeds=())

SCALES = {"full": _FULL, "lite": _LITE, "small": _SMALL, "demo": _DEMO}

# The headline tables with another backbone: rules beside a random tenth and all weights, and the
# six models at the sweeps' length, so that their federated runs are the same ones. The centralised
# run is about as long, with the weight decay, batch size and schedule that "small" chose.
_BACKBONE = replace(
    _SMALL, headline=256, baseline_epochs=2, search_epochs=2, decays=(5e-3,), batches=(32,),
    schedules=("cosine",), rules=("least_sensitive", "random"), more_seeds=())


def on_vits16(session: Session) -> Session:
    """The session of "small" with a ViT-S/16 at 96 px: is what it finds one of its backbone?

    The weights are those trained on Tiny-ImageNet, `weights/vits16_tin.safetensors`; batches,
    clients and lengths stay. Meant are `rules` and the centralised two of `six_models`, on a GPU.
    """
    base = replace(session.base, weights="vits16_tin", arch="vits16", image_size=96, lr=0.3)
    return replace(session, base=base, scale=_BACKBONE)


# ------------------------------------------------------------------ experiments
def sharding_label(cfg: Config) -> str:
    """"IID", "Nc=10", "Dir(0.3)" or "centralised"."""
    if cfg.centralized:
        return "centralised"
    if cfg.classes_per_client:
        return f"Nc={cfg.classes_per_client}"
    if cfg.dirichlet_alpha:
        return f"Dir({cfg.dirichlet_alpha:g})"
    return "IID"


def nc_label(nc: int | None) -> str:
    return "IID" if nc is None else f"Nc={nc}"


def rule_label(rule: str | None) -> str:
    return rule or "dense"


def with_steps(cfg: Config, steps: int, evaluations: int = 4) -> Config:
    """`cfg` with T so that J * T = `steps`, evaluated so many times on the way."""
    rounds = max(1, steps // max(1, cfg.local_steps))
    return replace(cfg, num_rounds=rounds, eval_every=max(1, rounds // evaluations))


def protocol(session: Session) -> Cells:
    """Augmentation x head x (dense, sparse), IID: what the defaults follow from."""
    cells = {}
    for augmentation in ("none", "flip", "crop_flip"):
        for head in ("logistic", "lda", "ridge"):
            for rule in (None, "least_sensitive"):
                cfg = with_steps(session.base, session.scale.protocol)
                cfg = replace(cfg, augmentation=augmentation, head=head, rule=rule)
                cfg = replace(cfg, lr=first_guess(cfg))
                cells[augmentation, head, rule_label(rule)] = cfg
    return cells


def _centralized_base(session: Session) -> Config:
    base = session.base
    cfg = replace(base, algorithm="centralized", num_epochs=session.scale.search_epochs,
                  eval_every=1)
    return replace(cfg, lr=first_guess(cfg))


def centralized_decays(session: Session) -> Cells:
    """Weight decay, each at its own rate, after a few epochs."""
    base = _centralized_base(session)
    cells = {(wd,): replace(base, weight_decay=wd) for wd in session.scale.decays}
    return {label: at_own_rate(cfg, session) for label, cfg in cells.items()}


def centralized_batches(session: Session) -> Cells:
    """Batch size at the best weight decay, each at its own rate."""
    start = best(centralized_decays(session).values(), session.store)
    cells = {(b,): replace(start, batch_size=b) for b in session.scale.batches}
    return {label: at_own_rate(cfg, session) for label, cfg in cells.items()}


def centralized_schedules(session: Session) -> Cells:
    """Schedule at the best weight decay and batch size, each at its own rate."""
    start = best(centralized_batches(session).values(), session.store)
    cells = {(s,): replace(start, schedule=s) for s in session.scale.schedules}
    return {label: at_own_rate(cfg, session) for label, cfg in cells.items()}


def best_centralized(session: Session) -> Config:
    """The centralised configuration that was chosen on validation, at its final length."""
    start = best(centralized_schedules(session).values(), session.store)
    return at_own_rate(replace(start, num_epochs=session.scale.baseline_epochs), session)


def centralized(session: Session) -> Cells:
    """The centralised baseline, with curves on the test set that no choice ever reads."""
    return {("centralised",): replace(best_centralized(session), test_curve=True)}


def centralized_epochs(session: Session) -> Cells:
    """The baseline's configuration at other lengths, each at its own rate.

    At the baseline's rate a run of four times its length loses for half of its course what it
    learnt: it would seem that more epochs are worse.
    """
    start = best_centralized(session)
    cells = {}
    for n in session.scale.epochs:
        cfg = at_own_rate(replace(start, num_epochs=n), session)
        cells[n,] = replace(cfg, test_curve=True)
    return cells


def _headline(session: Session, nc: int | None) -> Config:
    cfg = replace(session.base, classes_per_client=nc)
    return with_steps(cfg, session.scale.headline, evaluations=8)


def fedavg_iid(session: Session) -> Cells:
    """FedAvg with IID clients at lengths that double, each at its own rate: has it converged?"""
    cells = {}
    for steps in session.scale.lengths:
        cfg = at_own_rate(with_steps(session.base, steps, evaluations=8), session)
        cells[cfg.num_rounds,] = cfg
    return cells


def grid(session: Session) -> Cells:
    """Sharding x local steps J, with J * T constant, each at its own rate."""
    scale = session.scale
    cells = {}
    for j in scale.local_steps:
        for nc in scale.shardings:
            cfg = replace(session.base, classes_per_client=nc, local_steps=j)
            cells[nc_label(nc), j] = at_own_rate(with_steps(cfg, scale.sweep), session)
    return cells


def six_models(session: Session) -> Cells:
    """{centralised, FedAvg IID, FedAvg non-IID} x {dense, sparse}, each at its own rate."""
    scale = session.scale
    dense = {
        "centralised": centralized(session)["centralised",],
        "IID": _headline(session, None),
        nc_label(scale.nc): _headline(session, scale.nc),
    }
    cells = {}
    for where, cfg in dense.items():
        for rule in (None, "least_sensitive"):
            model = replace(cfg, rule=rule, lr=session.base.lr)
            cells[where, "sparse" if rule else "dense"] = at_own_rate(model, session)
    return cells


def _sparse(session: Session, nc: int | None, **changes) -> Config:
    cfg = replace(session.base, rule="least_sensitive", classes_per_client=nc, **changes)
    return at_own_rate(with_steps(cfg, session.scale.sweep), session)


def sparsity(session: Session) -> Cells:
    """Share of the weights that the mask freezes, each at its own rate.

    None frozen is the control of what masks cost: all weights but the head, which every sparse run
    leaves as it was fitted.
    """
    return {(nc_label(nc), s): _sparse(session, nc, sparsity=s)
            for s in session.scale.sparsities for nc in session.scale.sweep_shardings}


def calibration(session: Session) -> Cells:
    """Number of calibration rounds R, each at its own rate."""
    return {(nc_label(nc), r): _sparse(session, nc, calibration_rounds=r)
            for r in session.scale.calibration_rounds for nc in session.scale.sweep_shardings}


def rules(session: Session) -> Cells:
    """Mask rules, and all weights, by sharding, each at its own rate."""
    scale = session.scale
    cells = {}
    for nc in scale.rule_shardings:
        for rule in (None, *scale.rules):
            cfg = replace(session.base, rule=rule, classes_per_client=nc)
            cfg = at_own_rate(with_steps(cfg, scale.sweep), session)
            cells[rule_label(rule), nc_label(nc)] = cfg
    return cells


def half(session: Session) -> Cells:
    """Rules that free half of the weights, each at its own rate: where a tenth is too little for
    a score to matter, is a half? Their names begin with "half_", beside those of `rules`."""
    cells = {}
    for nc in session.scale.half_shardings:
        for rule in session.scale.half_rules:
            cfg = replace(session.base, rule=rule, classes_per_client=nc, sparsity=0.5)
            cfg = at_own_rate(with_steps(cfg, session.scale.sweep), session)
            cells[f"half_{rule}", nc_label(nc)] = cfg
    return cells


def half_once(session: Session) -> Cells:
    """Halves of masks of one calibration round, each at its own rate: does what the least sensitive
    half gains hang on the number of rounds, and is it the weights or their layers ("shuffled")?

    Only of one round are the layers of the two the same.
    """
    cells = {}
    for nc in session.scale.half_shardings[:2]:
        for rule in session.scale.half_once_rules:
            cfg = replace(session.base, rule=rule, classes_per_client=nc, sparsity=0.5,
                          calibration_rounds=1)
            cfg = at_own_rate(with_steps(cfg, session.scale.sweep), session)
            cells[f"half_once_{rule}", nc_label(nc)] = cfg
    return cells


def rate_map(session: Session) -> Cells:
    """Accuracy against the rate, around the best one of each rule and sharding, with whatever else
    its ladder has tried."""
    scale = session.scale
    cells = {}
    for nc in scale.map_shardings:
        for rule in scale.map_rules:
            cfg = replace(session.base, rule=rule, classes_per_client=nc)
            cfg = searched_like(with_steps(cfg, scale.sweep), session)
            own = rung_of(at_own_rate(cfg, session).lr)
            rates = {rate_of(own + step) for step in scale.map_rungs}
            if scale.searches:
                rates.update(stored_rates(cfg, session.store))
            for lr in sorted(rates):
                cells[rule_label(rule), nc_label(nc), lr] = replace(cfg, lr=lr)
    return cells


def longer_rates(session: Session) -> Cells:
    """Are small gains at the strongest skew a matter of rounds? Several times as many, at rates
    around each rule's own of the shorter runs."""
    scale = session.scale
    cells = {}
    for rule, rungs in scale.longer_rungs.items():
        cfg = replace(session.base, rule=rule, classes_per_client=scale.map_shardings[-1])
        own = at_own_rate(with_steps(cfg, scale.sweep), session)
        for step in rungs:
            lr = rate_of(rung_of(own.lr) + step)
            cells[rule_label(rule), lr] = replace(
                with_steps(own, scale.sweep * scale.more_rounds), lr=lr)
    return cells


def longer(session: Session) -> Cells:
    """The rules at the strongest skew with more rounds, each at the best of these rates."""
    candidates = {}
    for (rule, _), cfg in longer_rates(session).items():
        candidates.setdefault((rule,), []).append(cfg)
    return {label: best(cfgs, session.store) for label, cfgs in candidates.items()}


def speed_matched(session: Session) -> Cells:
    """Rules at rates proportional to 1 / (Fisher mass freed); "random" keeps its own.

    Masses are looked up: `measure_masses` has them measured before the section is trained.
    """
    scale = session.scale
    cells = {}
    for nc in scale.map_shardings:
        at_sweep = with_steps(replace(session.base, classes_per_client=nc), scale.sweep)
        reference = at_own_rate(replace(at_sweep, rule="random"), session)
        mass = fisher_mass(reference, session.store, measure=False)
        for rule in filter(None, scale.map_rules):
            cfg = replace(reference, rule=rule)
            own = fisher_mass(cfg, session.store, measure=False)
            # Before the masses are measured the cells can be counted, not trained.
            factor = mass / own if mass and own else 2
            if rule != "random":
                cfg = replace(cfg, lr=float(f"{reference.lr * factor:.3g}"))
            cells[rule_label(rule), nc_label(nc)] = cfg
    return cells


def measure_masses(session: Session):
    """Measures the Fisher mass of every mask of `speed_matched`, which hangs on no rate."""
    for cfg in speed_matched(session).values():
        fisher_mass(cfg, session.store)


def fisher_mass(cfg: Config, store: Store, measure: bool = True) -> float | None:
    """Share of the Fisher information (a trace) on the weights that the run's mask frees.

    Scored once, on `calibration_images` of the training part, at the start; kept in the store's
    notes. None where there is none yet and a frozen store, or the caller, wants none measured.
    """
    # what the mask depends on, and nothing that training alone reads
    like = replace(cfg, lr=1e-3, num_rounds=1, local_steps=0, classes_per_client=None)

    def compute():
        run, _ = open_run(like, store)
        draw = utils.rng("mask", cfg.seed, 1)
        index = draw.permutation(run.data.train)[:cfg.calibration_images]
        fisher = sensitivity(run.model, run.data.images[index], utils.rng("labels", cfg.seed))
        total = sum(f.sum().item() for f in fisher.values())
        freed = sum(f[run.mask[n].to(f.device)].sum().item() for n, f in fisher.items())
        return {"mass": freed / total}
    key = dict(run_key(like), images=cfg.calibration_images)
    found = store.compute_or_load("fisher_mass", key, compute if measure else None)
    return found.get("mass")


def consensus(session: Session) -> Cells:
    """Who calibrates: one place, or clients whose scores the server combines.

    All see as many images, `client_images` times the number of scoring clients; a client of few
    images would handicap a maximum and a vote. At the rate of the mask that is calibrated in one
    place: the masks are nearly the same.
    """
    cells = {}
    for nc in session.scale.skews:
        start = _sparse(session, nc)
        for how, share in session.scale.consensus:
            scorers = utils.cohort_size(start.num_clients, share)
            cfg = replace(start, calibration=how, calibration_clients=share,
                          calibration_images=session.scale.client_images * scorers)
            cells[how, share, nc_label(nc)] = cfg
    return cells


# Which tenth, and when it is chosen: the algorithm, in the names of notebooks/extension.py.
RECALIBRATION = {
    ("least_sensitive", "once"): "calibrated_once",
    ("least_sensitive", "every quarter"): "recalibrated",
    ("random", "once"): "drawn_once",
    ("random", "every quarter"): "redrawn",
}


def recalibration(session: Session) -> Cells:
    """A tenth that clients choose once, or anew while they train, at the rate of its rule.

    A mask that changes trains more weights in all than one that does not: a random one shows what
    that alone does.
    """
    cells = {}
    for nc in session.scale.recalibration_skews:
        for (rule, when), algorithm in RECALIBRATION.items():
            cfg = with_steps(replace(session.base, classes_per_client=nc), session.scale.sweep)
            rate = at_own_rate(replace(cfg, rule=rule), session).lr
            cells[rule, when, nc_label(nc)] = replace(cfg, algorithm=algorithm, lr=rate)
    return cells


# What the server does: the label, and what it changes, in the names of notebooks/extension.py.
METHODS = {
    "FedAvg": {},
    "FedExP": dict(algorithm="fedexp"),
    "FedAvgM": dict(algorithm="fedavgm", server_lr=0.3),
    "FedAdam": dict(algorithm="fedadam", server_lr=1e-3),
    "FedProx": dict(algorithm="fedprox"),
    "SCAFFOLD": dict(algorithm="scaffold"),
}
MERGES = {
    "FedAvg": {},
    "sign election": dict(algorithm="sign_election"),
    "TIES": dict(algorithm="ties"),
    "Fisher": dict(algorithm="fisher"),
    "held-out lengths": dict(algorithm="held_out"),
}
# The same directions at the norm of FedAvg's update, and so at FedAvg's own rate.
MATCHED = {
    "sign election, matched": dict(algorithm="sign_election_matched"),
    "TIES, matched": dict(algorithm="ties_matched"),
    "Fisher, matched": dict(algorithm="fisher_matched"),
    "held-out lengths, matched": dict(algorithm="held_out_matched"),
}


def methods(session: Session) -> Cells:
    """Server algorithms of the literature, dense and masked, each at its own rate."""
    fitting = {name: changes for name, changes in METHODS.items()
               if name not in session.scale.too_large}
    return _by_server(fitting, session)


def pulls(session: Session) -> Cells:
    """FedProx on all weights, each mu at its own rate.

    The pull is felt where eta J mu is not small against 1: with few steps a mu of 0.01 is FedAvg
    but for rounding, and says nothing of FedProx.
    """
    cells = {}
    for nc in session.scale.skews:
        for mu in session.scale.pulls:
            cfg = replace(session.base, classes_per_client=nc, algorithm="fedprox", prox_mu=mu)
            cfg = with_steps(cfg, session.scale.sweep)
            cells[mu, nc_label(nc)] = at_own_rate(cfg, session)
    return cells


def merges(session: Session) -> Cells:
    """Servers that merge task vectors, dense and masked, each at its own rate."""
    return _by_server(MERGES, session)


def matched_merges(session: Session) -> Cells:
    """The merges at the norm of FedAvg's update and at FedAvg's rate: what their direction does."""
    cells = {}
    for label, cfg in _by_server({"FedAvg": {}}, session).items():
        for name, changes in MATCHED.items():
            cells[name, *label[1:]] = replace(cfg, **changes)
    return cells


def _by_server(table: dict[str, dict], session: Session) -> Cells:
    scale = session.scale
    cells = {}
    for nc in scale.skews:
        for rule in (None, "least_sensitive"):
            for label, changes in table.items():
                cfg = replace(session.base, classes_per_client=nc, rule=rule, **changes)
                cfg = at_own_rate(with_steps(cfg, scale.sweep), session)
                cells[label, "masked" if rule else "dense", nc_label(nc)] = cfg
    return cells


@dataclass(frozen=True)
class Section:
    """One experiment: its cells, and how they are run."""
    notebook: str                   # that shows it
    cells: Callable[[Session], Cells]
    columns: tuple[str, ...]        # what the parts of a label are
    searched: bool = True           # every cell's rate is searched first
    every_seed: bool = True         # False: seed 0 alone
    more_seeds: bool = False        # a finding hangs on it: see `seeds_of`
    test: bool = True               # False: a choice, made on validation alone
    keep: bool = False              # the weights of finished runs, for what is measured on them
    rests_on: tuple[str, ...] = ()  # sections whose rates, or choices, its cells take
    measure: Callable[[Session], None] | None = None  # what its cells need measured first


# In the order in which they tell most: within a notebook and over all of them.
SECTIONS = {
    "protocol": Section("02", protocol, ("augmentation", "head", "weights trained"),
                        searched=False, every_seed=False, test=False),
    "centralized_decays": Section("01", centralized_decays, ("weight_decay",),
                                  every_seed=False, test=False),
    "centralized_batches": Section("01", centralized_batches, ("batch_size",), every_seed=False,
                                   test=False, rests_on=("centralized_decays",)),
    "centralized_schedules": Section("01", centralized_schedules, ("schedule",), every_seed=False,
                                     test=False, rests_on=("centralized_batches",)),
    "centralized": Section("01", centralized, ("model",), rests_on=("centralized_schedules",)),
    "centralized_epochs": Section("01", centralized_epochs, ("epochs",), every_seed=False,
                                  rests_on=("centralized_schedules",)),
    "fedavg_iid": Section("02", fedavg_iid, ("rounds",)),
    "grid": Section("03", grid, ("sharding", "local_steps")),
    "six_models": Section("04", six_models, ("data", "weights trained"), keep=True,
                          rests_on=("centralized_schedules",)),
    "sparsity": Section("04", sparsity, ("sharding", "sparsity"), keep=True),
    "calibration": Section("04", calibration, ("sharding", "calibration_rounds"), keep=True),
    "rules": Section("05", rules, ("rule", "sharding"), keep=True, more_seeds=True),
    "half": Section("05", half, ("rule", "sharding"), more_seeds=True),
    "half_once": Section("05", half_once, ("rule", "sharding"), more_seeds=True),
    "rate_map": Section("05", rate_map, ("rule", "sharding", "lr"), searched=False,
                        every_seed=False, test=False, rests_on=("rules",)),
    "longer_rates": Section("05", longer_rates, ("rule", "lr"), searched=False, every_seed=False,
                            test=False, rests_on=("rules",)),
    "longer": Section("05", longer, ("rule",), searched=False, rests_on=("longer_rates",)),
    "speed_matched": Section("05", speed_matched, ("rule", "sharding"), searched=False,
                             rests_on=("rules",), measure=measure_masses),
    "methods": Section("05", methods, ("method", "weights trained", "sharding")),
    "pulls": Section("05", pulls, ("mu", "sharding")),
    "merges": Section("05", merges, ("method", "weights trained", "sharding")),
    "matched_merges": Section("05", matched_merges, ("method", "weights trained", "sharding"),
                              searched=False, rests_on=("merges",)),
    "consensus": Section("05", consensus, ("combined by", "share of clients", "sharding"),
                         searched=False, keep=True, rests_on=("rules",)),
    "recalibration": Section("05", recalibration, ("rule", "calibrated", "sharding"),
                             searched=False, rests_on=("rules",)),
}


def seeds_of(section: Section, session: Session) -> tuple[int, ...]:
    """The seeds of a section's runs: the session's, the first of them, or more than these.

    More only where the session has those of its preset: who asks for one seed gets one.
    """
    if not section.every_seed:
        return session.seeds[:1]
    scale = session.scale
    if section.more_seeds and session.seeds == scale.seeds:
        return scale.seeds + scale.more_seeds
    return session.seeds


def section_runs(name: str, session: Session) -> list[Config]:
    """The runs of a section, all of seed 0 before any of the next."""
    section = SECTIONS[name]
    seeds = seeds_of(section, session)
    return [replace(cfg, seed=s) for s in seeds for cfg in section.cells(session).values()]


def run_section(name: str, session: Session, watch: Watch | None = None) -> list[Config]:
    """Searches the rates of a section and trains its runs; what is left of them, if anything.

    First whatever it rests on: its runs would else be trained at the first guess of another rate.
    """
    section = SECTIONS[name]
    ready = all(settle(other, session, watch) for other in section.rests_on)
    if not ready or not find_rates(name, session, watch):
        return section_runs(name, session)
    if section.measure is not None and time.monotonic() < session.stop_at:
        with one_thread():
            section.measure(session)
    runs = section_runs(name, session)
    if section.keep or session.store.frozen:
        return train_all(runs, session, section.test, watch)

    kept = kept_runs(session)
    done = {}   # {name: run}

    def after(cfg):
        done[run_name(cfg)] = cfg
        # of a choice another one may be the best now
        losers = done.keys() - kept - chosen_runs(name, session)
        drop_weights([done.pop(loser) for loser in losers], session, early=True)
    left = train_all(runs, session, section.test, watch, after)
    if not left:
        stay = kept | chosen_runs(name, session)
        drop_weights([cfg for cfg in runs if run_name(cfg) not in stay], session)
    return left


def find_rates(name: str, session: Session, watch: Watch | None = None) -> bool:
    """Searches the rate of each of a section's cells, if they are searched: are all found?"""
    section = SECTIONS[name]
    if not (section.searched and session.scale.searches):
        return True
    found = search_rates(section.cells(session).values(), session, watch)
    return all(ladder.finished for ladder in found)


def settle(name: str, session: Session, watch: Watch | None = None) -> bool:
    """Makes what others take of a section, its rates or its choice; False where something is left,
    in a frozen store all that is not there.

    A section without a test is a choice, for which all its runs are needed.
    """
    section = SECTIONS[name]
    if not (section.searched and section.test):
        return not run_section(name, session, watch)
    ready = all(settle(other, session, watch) for other in section.rests_on)
    return ready and find_rates(name, session, watch)


def kept_runs(session: Session) -> set[str]:
    """Names of the runs whose weights a section keeps."""
    keeping = [name for name, section in SECTIONS.items() if section.keep]
    return {run_name(cfg) for name in keeping for cfg in section_runs(name, session)}


def chosen_runs(name: str, session: Session) -> set[str]:
    """Names of the runs that are chosen from a section without a test, by what is stored so far:
    they are still to be tested."""
    if SECTIONS[name].test:
        return set()
    resting = [other for other, section in SECTIONS.items() if name in section.rests_on]
    return {run_name(cfg) for other in resting for cfg in section_runs(other, session)}


def drop_weights(cfgs: Iterable[Config], session: Session, early: bool = False):
    """Deletes the weights of finished runs from which nobody goes on: a Drive has 15 GB.

    `early` is before all are done that are trained beside them: those at a constant rate then stay,
    for a longer one may go on from a shorter one. Those of heads, which others begin with, always
    stay; they are small.
    """
    if session.store.frozen:
        return
    for cfg in cfgs:
        may_go_on = early and cfg.schedule == "constant"
        if not may_go_on and cfg.head != "probe":
            drop_checkpoints(cfg, session.store)


def drop_checkpoints(cfg: Config, store: Store):
    for name in store.names(f"checkpoints/{run_name(cfg)}/*.safetensors"):
        store.delete(name)


# ------------------------------------------------------------------ rate search
LADDER_LIMIT = 14   # rungs on either side of the first guess: seven decades


def rate_of(rung: int) -> float:
    """The ladder's rates: ..., 1e-3, 3e-3, 1e-2, 3e-2, ...; rung 0 is 1."""
    digit = 3 if rung % 2 else 1
    return float(f"{digit}e{rung // 2}")


def rung_of(lr: float) -> int:
    """The rung nearest to a rate."""
    return round(2 * math.log10(lr))


def first_guess(cfg: Config) -> float:
    """Where the search for a run's rate starts: a guess costs runs, never the result.

    Relative to the preset's rate: one class a client wants steps about ten times shorter, one long
    walk of all weights too, masks that free little of the Fisher information longer ones.
    """
    rule = cfg.rule if cfg.sparsity else None  # a mask that freezes nothing
    rungs = {None: -1, "least_sensitive": 2, "query_key": 1, "most_sensitive": -1}.get(rule, 0)
    if cfg.centralized and rule is None:
        rungs -= 2
    elif cfg.classes_per_client == 1:
        rungs += {None: -3, "least_sensitive": -1, "most_sensitive": 0}.get(rule, -2)
    elif cfg.classes_per_client and cfg.classes_per_client <= 5:
        rungs -= 1
    return rate_of(rung_of(cfg.lr) + rungs)


WEAK_PULL = 0.01   # mu up to which FedProx takes the rate of a stand-in


def stood_in(cfg: Config, session: Session) -> dict:
    """{field: value} of the run that is searched in the place of `cfg`, where it is another.

    FedProx is FedAvg but for rounding while its pull is weak, and has its own rate where it is not.
    """
    changes = {}
    for name, stand_in in session.scale.stand_ins.items():
        value = getattr(cfg, name)
        if value in stand_in:
            changes[name] = stand_in[value]
    if cfg.algorithm == "fedprox" and cfg.prox_mu > WEAK_PULL:
        changes.pop("algorithm", None)
    return changes


def searched_like(cfg: Config, session: Session) -> Config:
    """The run, at seed 0 and the first guess, that stands for `cfg` in the search of its rate."""
    scale = session.scale
    changes = stood_in(cfg, session)
    like = replace(cfg, seed=0, test_curve=False, lr=session.base.lr, **changes)
    like = replace(like, lr=first_guess(like))
    if scale.search is None:
        return like
    if cfg.centralized:
        return replace(like, num_epochs=scale.search_epochs)
    # the last round decides: others need not be evaluated
    return with_steps(like, scale.search, evaluations=1)


def of_stand_in(cfg: Config, session: Session) -> bool:
    """Whether the search of the run's rate is that of another sharding or number of steps."""
    return bool(stood_in(cfg, session))


def at_own_rate(cfg: Config, session: Session) -> Config:
    """`cfg` at the best rate that is stored of its search, else at the first guess.

    Without searches always at the guess: rates that other sections happen to try would else change
    what a second run of the notebooks trains.
    """
    like = searched_like(cfg, session)
    if not session.scale.searches:
        return replace(cfg, lr=like.lr)
    return replace(cfg, lr=tuned(like, session.store).lr)


def tuned(cfg: Config, store: Store) -> Config:
    """`cfg` at the best rate on validation among stored runs that differ from it, at seed 0, in
    the rate alone; `cfg` as it is where none is stored.

    What counts is the last round; of equal rates the lowest is taken.
    """
    scores = {lr: score for lr, score in stored_rates(cfg, store).items() if score > -math.inf}
    if not scores:
        return cfg
    top = max(scores.values())
    return replace(cfg, lr=min(lr for lr, score in scores.items() if score == top))


def stored_rates(cfg: Config, store: Store) -> dict[float, float]:
    """{rate: last validation accuracy (share of 1)} of the stored runs that differ from `cfg`, at
    seed 0, in the rate alone; minus infinity for those that diverged. Sorted by rate.

    Of the ladder's rates alone: others answer other questions, such as matched speed, and would
    move the own rate of what is already trained.
    """
    wanted = json.loads(json.dumps(run_key(replace(cfg, seed=0))))
    alike = [result for result in store.results().values() if isinstance(result["key"], dict)
             and result["key"] | {"lr": wanted["lr"]} == wanted]
    scores = {result["key"]["lr"]: last_accuracy(result) for result in readable(alike)}
    return {lr: scores[lr] for lr in sorted(scores) if math.isclose(lr, rate_of(rung_of(lr)))}


def last_accuracy(result: dict | None) -> float:
    """Validation accuracy of the last round (share of 1); minus infinity where there is none."""
    if not result or result["status"] != "finished":
        return -math.inf
    return result["history"][-1].get("val_top1", -math.inf)


@dataclass(frozen=True)
class Ladder:
    """A search for a learning rate, as far as it is stored."""
    cfg: Config                  # at the first guess
    scores: dict[float, float]   # {rate: last validation accuracy}, -inf where it diverged
    start: float | None          # validation accuracy of round 0
    todo: tuple[float, ...]      # rates to try next

    @property
    def finished(self) -> bool:
        return not self.todo

    @property
    def lr(self) -> float:
        """The best rate; of equal ones the lowest."""
        top = max(self.scores.values(), default=-math.inf)
        return min((lr for lr, s in self.scores.items() if s == top), default=self.cfg.lr)

    @property
    def bracketed(self) -> bool:
        """Rates on both sides of the best were tried and are no better."""
        rates = list(self.scores)
        return self.finished and min(rates) < self.lr < max(rates)

    def __str__(self) -> str:
        tried = ", ".join(f"{lr:g}: diverged" if s == -math.inf else f"{lr:g}: {100 * s:.1f} %"
                          for lr, s in self.scores.items())
        if not self.finished:
            end = f"not finished, next {self.todo}"
        elif self.bracketed:
            end = f"best {self.lr:g}, both sides worse"
        else:
            end = f"best {self.lr:g}, NOT bracketed: the search gave up or no rate moves the start"
        return f"{run_name(self.cfg)}: {end} ({tried})"


def ladder(cfg: Config, store: Store) -> Ladder:
    """The stored part of the search for the rate of `cfg`, and what it wants next."""
    scores = stored_rates(cfg, store)
    rungs = {rung_of(lr): s for lr, s in scores.items()}
    start = None
    for lr in scores:
        result = store.result(replace(cfg, seed=0, lr=lr))
        if result and result["history"]:
            start = result["history"][0].get("val_top1")
            break
    todo = next_rungs(rungs, rung_of(cfg.lr), start)
    return Ladder(cfg, scores, start, tuple(rate_of(r) for r in todo))


def next_rungs(scores: dict[int, float], first: int, start: float | None) -> list[int]:
    """Rungs to try next, given accuracies by rung; none once both sides of the best are worse.

    The ladder has no end but LADDER_LIMIT rungs from `first`, or two rungs that leave exactly the
    accuracy of the `start`: lower rates move nothing then.
    """
    wanted = [r for r in (first, first - 1, first + 1) if r not in scores]
    if not wanted:
        top = max(scores.values())
        if top == -math.inf:
            wanted = [min(scores) - 1]
        else:
            winners = [r for r, s in scores.items() if s == top]
            idle = top == start and len(winners) > 1
            below = min(winners) - 1
            above = max(winners) + 1
            wanted = [r for r in (below, above) if r not in scores and not (idle and r == below)]
    return [r for r in wanted if abs(r - first) <= LADDER_LIMIT]


def search_rates(cfgs: Iterable[Config], session: Session, watch: Watch | None = None
                 ) -> list[Ladder]:
    """Searches the learning rate of every configuration, for `tuned` to find; says where it ended.

    On validation accuracy of the last round at seed 0, on the ladder of factors of 3, from the
    first guess on until both sides are worse. Ends early where training does: by hand, at the
    session's time, or in a frozen store.
    """
    starts = _unlike([searched_like(cfg, session) for cfg in cfgs])
    store = session.store

    def after(cfg):
        drop_losers(ladder(searched_like(cfg, session), store), session, early=True)
    while True:
        ladders = [ladder(cfg, store) for cfg in starts]
        todo = [replace(found.cfg, lr=lr) for found in ladders for lr in found.todo]
        if not todo or store.frozen:
            break
        # the first guesses of all cells first, then their neighbours
        if train_all(todo, session, test=False, watch=watch, after=after):
            return [ladder(cfg, store) for cfg in starts]
        unread = [run_name(cfg) for cfg in todo if cfg.lr not in stored_rates(cfg, store)]
        if unread:
            raise ValueError(f"{unread} are stored, but not as a run writes its result (see the "
                             f"warnings): move their JSON files out of {store.root} and run again")
    for found in ladders:
        drop_losers(found, session)
        if not found.bracketed and found.finished:
            print(found)
    return ladders


def _unlike(cfgs: Iterable[Config]) -> list[Config]:
    """The configurations without repetition, in order."""
    return list({run_name(cfg): cfg for cfg in cfgs}.values())


def drop_losers(found: Ladder, session: Session, early: bool = False):
    """Deletes the weights of rates that have lost a search, so far: nobody goes on from them.

    Those of the winner too, where it was searched on shorter runs than those that are shown.
    `early` is as in `drop_weights`.
    """
    losers = [lr for lr in found.scores if lr != found.lr or session.scale.search is not None]
    drop_weights([replace(found.cfg, lr=lr) for lr in losers], session, early)


# ------------------------------------------------------------------ training
def train_all(cfgs: Iterable[Config], session: Session, test: bool = True,
              watch: Watch | None = None, after: After | None = None) -> list[Config]:
    """Trains what is not stored, in order; what is left of it, an empty list when all is done.

    Stops by itself at the session's time, and by hand at any moment; what was begun is stored, and
    the next call goes on from there. With several workers that many runs are trained side by side,
    in processes of their own. On a CPU every run computes with one thread, with one worker too:
    sums over threads are rounded otherwise, so that results would depend on `workers`.
    `watch(cfg, history)` is called after every evaluation of a run, `after(cfg)` in this process as
    soon as a run is done and stored.
    Raises what training raises, such as ValueError or FileNotFoundError.
    """
    store = session.store
    wanted = _unlike(cfgs)
    if store.frozen:
        return [cfg for cfg in wanted if not is_done(cfg, store, test)]
    todo = [cfg for cfg in wanted if not is_done(cfg, store, test)]
    bar = Bar(todo, store, session, watch, after)
    try:
        abroad, here = [], todo
        if session.workers > 1 and len(todo) > 1:
            abroad = [cfg for cfg in todo if can_travel(cfg)]
            here = [cfg for cfg in todo if not can_travel(cfg)]
        if abroad:
            utils.load_data(abroad[0])  # or each of them would download it
            here += train_in_workers(abroad, session, test, bar)
        with one_thread():
            train_here(here, session, test, bar)
    except KeyboardInterrupt:
        pass
    finally:
        bar.close()
    left = [cfg for cfg in todo if not is_done(cfg, store, test)]
    if left:
        names = ", ".join(run_name(cfg) for cfg in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        how = "Run this again to go on from here."
        if time.monotonic() >= session.stop_at:
            how = "The session's HOURS are over: run the parameters' cells again, then this one."
        print(f"Stopped: {len(left)} of {len(wanted)} runs are left ({names}{more}). {how}")
    return left


def is_done(cfg: Config, store: Store, test: bool) -> bool:
    """There is nothing more to train (and, with `test`, to test) of this run."""
    result = store.result(cfg)
    if result is None:
        return False
    return result["status"] == "diverged" or "test" in result or not test


class Bar:
    """One progress bar over many runs, in local steps, and what is called at evaluations and ends.
    """

    def __init__(self, cfgs: list[Config], store: Store, session: Session, watch: Watch | None,
                 after: After | None):
        self.watch = watch
        self.after = after
        self.session = session
        self.done = 0
        self.running = {}   # steps of the runs that are being trained, by name
        total = sum(steps_of(cfg) * cfg.length for cfg in cfgs)
        self.bar = tqdm(total=total, desc=f"{len(cfgs)} runs", unit="step", unit_scale=True,
                        disable=store.quiet or not cfgs)

    def evaluated(self, cfg: Config, history: tuple[dict, ...]):
        self.running[run_name(cfg)] = history[-1]["round"] * steps_of(cfg)
        if "val_top1" in history[-1]:
            self.bar.set_postfix_str(f"{run_name(cfg)}: {history[-1]['val_top1']:.1%}")
        self._show()
        if self.watch is not None:
            self.watch(cfg, history)

    def ended(self, cfg: Config):
        self.running.pop(run_name(cfg), None)
        self.done += steps_of(cfg) * cfg.length
        self._show()
        store = self.session.store
        result = store.result(cfg)
        if self.session.tensorboard and result and result["status"] == "finished":
            write_scalars(result, store.root / "tensorboard")
        if self.after is not None:
            self.after(cfg)

    def _show(self):
        self.bar.n = self.done + sum(self.running.values())
        self.bar.refresh()

    def close(self):
        self.bar.close()


@contextmanager
def one_thread():
    """On a CPU, one thread inside the block: the same bits whatever the number of cores."""
    before = torch.get_num_threads()
    if device().type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_here(cfgs: list[Config], session: Session, test: bool, bar: Bar):
    """One after the other in this process, until the session's time is over."""
    for cfg in cfgs:
        result = train(cfg, session.store, test, stop_at=session.stop_at,
                       watch=lambda run, state: bar.evaluated(run.cfg, state.history))
        if result["status"] == "interrupted":
            return
        bar.ended(cfg)


def can_travel(cfg: Config) -> bool:
    """Another process can train it: nothing that it uses was registered in a notebook's cell."""
    return "__main__" not in _modules_of(cfg)


def _modules_of(cfg: Config) -> set[str]:
    """The modules that register what the run uses."""
    modules = set()
    if not cfg.centralized:
        modules.add(ALGORITHMS[cfg.algorithm].__module__)
    if cfg.rule:
        modules.add(RULES[cfg.rule].score.__module__)
    return modules


_kept: list["Pool"] = []   # the pool whose workers wait for the next call, if any


def train_in_workers(cfgs: list[Config], session: Session, test: bool, bar: Bar) -> list[Config]:
    """Side by side in spawned processes; the runs that only this process can train.

    A process takes seconds to start, so they stay for the next call. Workers that die
    are replaced, and their runs left for the next call. An interrupt is passed on, so that all
    runs are stored where they are. Raises RuntimeError with a worker's own error.
    """
    if time.monotonic() >= session.stop_at:
        return []
    if not _kept:
        _kept.append(Pool())
    try:
        return _kept[0].train(cfgs, session, test, bar)
    except BaseException:
        close_workers()
        raise


@atexit.register
def close_workers():
    """Ends the processes that wait for runs; the next call starts new ones."""
    while _kept:
        _kept.pop().close()


class Pool:
    """Worker processes, each with a pipe of its own: a dead one leaves the others unharmed."""

    def __init__(self):
        self.workers = {}     # {pipe: process}
        self.trains = {}      # {pipe: Config}
        self.returned = []    # runs that workers cannot train
        self.started = 0

    def start(self):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.started, CODE_SHA256))
        self.started += 1
        process.start()
        theirs.close()
        self.workers[ours] = process

    def train(self, cfgs: list[Config], session: Session, test: bool, bar: Bar) -> list[Config]:
        """The runs, in the session's number of processes; those that workers cannot train."""
        self.session = session
        self.test = test
        self.bar = bar
        self.returned = []
        size = min(session.workers, len(cfgs))
        self.replace_dead(size)
        waiting = list(cfgs)
        try:
            while True:
                for pipe in list(self.workers)[:size]:
                    if pipe not in self.trains:
                        self.give(pipe, waiting)
                if not self.trains:  # nothing to wait for: that would never end
                    break
                for pipe in wait(list(self.trains)):
                    self.receive(pipe, waiting)
        except KeyboardInterrupt:
            self.interrupt()
            raise
        return self.returned

    def replace_dead(self, size: int):
        """As many living workers as are wanted; one may have died while it waited."""
        for pipe, process in list(self.workers.items()):
            if not process.is_alive():
                pipe.close()
                del self.workers[pipe]
        while len(self.workers) < size:
            self.start()

    def give(self, pipe, waiting: list[Config]):
        """The next run to a free worker, while there is one and time is left."""
        stop_at = self.session.stop_at
        if not waiting or time.monotonic() >= stop_at:
            return
        cfg = waiting.pop(0)
        self.trains[pipe] = cfg
        store = self.session.store
        place = (store.root.absolute(), store.backup, store.minutes)
        modules = sorted(_modules_of(cfg))
        with suppress(OSError):  # of a dead worker, which `receive` will see
            pipe.send((place, cfg, run_name(cfg), modules, self.test, stop_at))

    def receive(self, pipe, waiting: list[Config]):
        """One message of a worker."""
        cfg = self.trains[pipe]
        try:
            kind, content = pipe.recv()
        except (EOFError, OSError):
            self.bury(pipe, bool(waiting))
            return
        if kind == "evaluated":
            self.bar.evaluated(cfg, content)
            return
        del self.trains[pipe]
        if kind == "error":
            self.interrupt()
            raise RuntimeError(f"{run_name(cfg)} failed in its worker:\n{content}")
        if kind == "cannot":
            warnings.warn(f"{run_name(cfg)} is trained in this process: {content}", stacklevel=4)
            self.returned.append(cfg)
        elif content != "interrupted":
            self.bar.ended(cfg)

    def bury(self, pipe, needed: bool):
        """After a worker's death: its run is left for the next call, another takes its place."""
        process = self.workers.pop(pipe)
        process.join()
        pipe.close()
        cfg = self.trains.pop(pipe)
        warnings.warn(f"the worker that trained {run_name(cfg)} died (exit code {process.exitcode}"
                      "; -9 is what a lack of memory looks like). The run goes on from its "
                      "checkpoint when this is run again.", stacklevel=5)
        if needed:
            self.start()

    def interrupt(self):
        """Stops all runs, and waits until they are stored."""
        for pipe in self.trains:
            process = self.workers[pipe]
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for pipe in list(self.trains):
            while self._still_trains(pipe):
                pass
            del self.trains[pipe]

    def _still_trains(self, pipe) -> bool:
        try:
            return pipe.recv()[0] == "evaluated"
        except (EOFError, OSError):
            return False

    def close(self):
        for pipe, process in self.workers.items():
            pipe.close()  # ends an idle worker, and a busy one after its run
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join()


def serve(pipe, number: int, code: str):
    """A worker process: trains the runs that come through the pipe until it is closed.

    `number` chooses its GPU, `code` is the hash of the utils.py that its parent runs.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C in the terminal reaches the parent alone, which passes it on
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            # held back: half a message would garble all that follow, and a task must be answered
            with uninterrupted():
                task = pipe.recv()
        except (EOFError, OSError):
            return
        except KeyboardInterrupt:
            task = None
        try:
            answer = "done", "interrupted"
            if task is not None:
                answer = _serve_one(pipe, code, *task)
        except KeyboardInterrupt:
            answer = "done", "interrupted"
        except Exception:  # the parent raises it
            answer = "error", traceback.format_exc()
        with suppress(BrokenPipeError):  # where the parent was killed the next recv ends this
            pipe.send(answer)


def _serve_one(pipe, code: str, place: tuple, cfg: Config, name: str, modules: list[str],
               test: bool, stop_at: float) -> tuple[str, str]:
    if code != CODE_SHA256:
        return "cannot", ("utils.py was edited since it was imported here. Restart the kernel to "
                          "train with the edited code.")
    for module in modules:
        importlib.import_module(module)
    if run_name(cfg) != name:
        return "cannot", "its algorithm or rule is another one in a new process"

    def watch(run, state):
        with uninterrupted():
            pipe.send(("evaluated", state.history))
    store = _store_at(*place)
    return "done", train(cfg, store, test, stop_at=stop_at, watch=watch)["status"]


@lru_cache(maxsize=1)  # to open one lists the files of its backup, which may be a slow drive
def _store_at(root: Path, backup: Path | None, minutes: float) -> Store:
    return BackedUpStore(root, minutes, quiet=True, backup=backup)


def _follow_parent():
    """Stops, with a checkpoint, when the parent is gone."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGINT)


def write_scalars(result: dict, folder: Path):
    """A run's history for TensorBoard, if it is installed and has not been written yet."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("tensorboard is not installed: no scalars are written", stacklevel=2)
        return
    target = folder / result["run"]
    if target.exists():
        return
    with SummaryWriter(target) as writer:
        for row in result["history"]:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "round":
                    writer.add_scalar(name, value, row["round"])


# ------------------------------------------------------------------ tables
FIELDS = [f.name for f in fields(Config)]


def best(cfgs: Iterable[Config], store: Store) -> Config:
    """The configuration with the highest last validation accuracy; the first if none is stored."""
    return max(cfgs, key=lambda cfg: last_accuracy(store.result(cfg)))


def frames(results: Iterable[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history): a row a run, and a row a round of a run; accuracies in %.

    Both have the fields of `Config`, `run`, `sharding` and `data` ("SYNTHETIC" or the data set).
    runs: status, seconds, best_round, start and val (validation before and after training),
    val_best, test (last weights), test_top5, test_loss, test_best (best weights on validation).
    history: the rows of the results, such as train_loss, val_loss, val_top1, test_top1.
    """
    results = readable(results)
    runs = pd.DataFrame([_run_row(r) for r in results], columns=[
        *FIELDS, "run", "sharding", "data", "status", "seconds", "best_round", "start", "val",
        "val_best", "test", "test_top5", "test_loss", "test_best"])
    rows = [row | _about(r) for r in results for row in r["history"]]
    measures = ["round", "lr_now", "train_loss", "client_norm", "mean_norm", "bytes_up",
                "bytes_down", "val_loss", "val_top1", "val_top5", "test_loss", "test_top1"]
    for row, plain in zip(rows, (row for r in results for row in r["history"]), strict=True):
        row["lr_now"] = plain.get("lr")
    history = pd.DataFrame(rows, columns=[*FIELDS, "run", "sharding", "data", *measures])
    history = history.astype(dict.fromkeys(measures, float))
    for name in ("val_top1", "val_top5", "test_top1"):
        history[name] *= 100
    numbers = ["seconds", "start", "val", "val_best", "test", "test_top5", "test_loss", "test_best"]
    return runs.astype(dict.fromkeys(numbers, float)), history


def readable(results: Iterable[dict]) -> list[dict]:
    """The results that have what a run writes; others, such as foreign files, are named, left out.
    """
    kept = []
    for result in results:
        try:
            _run_row(result)
            for row in result["history"]:
                row["round"] + 0
            for part in result["segments"]:
                part["hardware"], part["code"]
            for name in ("algorithm", "dataset", "seed", "lr"):
                result["config"][name]
            result["key"]["lr"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{result['run']}.json is left out, for it is no result of a run: "
                          f"{type(error).__name__}: {error}", stacklevel=3)
            continue
        kept.append(result)
    return kept


def _about(result: dict) -> dict:
    # no Config: that would refuse what a cell of another notebook has registered, or an old field
    config = dict.fromkeys(FIELDS) | result["config"]
    cfg = SimpleNamespace(**config, centralized=config["algorithm"] == "centralized")
    data = "SYNTHETIC" if cfg.dataset == "synthetic" else cfg.dataset
    return config | dict(run=result["run"], sharding=sharding_label(cfg), data=data)


def _run_row(result: dict) -> dict:
    seen = [100 * row["val_top1"] for row in result["history"] if "val_top1" in row]
    row = _about(result)
    for name in ("status", "seconds", "best_round"):
        row[name] = result[name]
    if seen and result["status"] == "finished":
        row |= dict(start=seen[0], val=seen[-1], val_best=max(seen))
    if "test" in result:
        test = result["test"]
        row |= dict(test=100 * test["top1"], test_top5=100 * test["top5"], test_loss=test["loss"],
                    test_best=100 * result["test_of_best"]["top1"])
    return row


def gather(cfgs: Iterable[Config], store: Store, quiet: bool = False
           ) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history) of the stored results among `cfgs`, as `frames` has them.

    Says how many are missing or diverged, and whether the data is synthetic, unless `quiet`.
    """
    cfgs = _unlike(cfgs)
    results = [r for r in map(store.result, cfgs) if r]
    remarks = remarks_on(results, len(cfgs))
    if remarks and not quiet:
        print(remarks)
    return frames(results)


def remarks_on(results: list[dict], wanted: int) -> str:
    """What must be said of results beside their numbers; "" as a rule."""
    words = []
    if len(results) < wanted:
        words.append(f"{wanted - len(results)} of {wanted} runs are missing.")
    diverged = sum(r["status"] == "diverged" for r in results)
    if diverged:
        words.append(f"{diverged} diverged.")
    if any(r["config"]["dataset"] == "synthetic" for r in results):
        words.append("SYNTHETIC DATA: these accuracies mean nothing.")
    return " ".join(words)


def section_frames(name: str, session: Session, quiet: bool = False
                   ) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history) of a section, with a column for each part of its labels; see `gather`.

    The columns are SECTIONS[name].columns; they replace fields of the same name. A run that stands
    in several cells has a row for each.
    """
    section = SECTIONS[name]
    runs, history = gather(section_runs(name, session), session.store, quiet)
    labels = []
    seeds = seeds_of(section, session)
    for label, cfg in section.cells(session).items():
        for seed in seeds:
            row = dict(zip(section.columns, label, strict=True))
            labels.append(row | {"run": run_name(replace(cfg, seed=seed))})
    labels = pd.DataFrame(labels, columns=[*section.columns, "run"])
    return tuple(labels.merge(frame.drop(columns=[*section.columns], errors="ignore"), on="run")
                 for frame in (runs, history))


def test_of_start(session: Session) -> float:
    """Test accuracy (%) of the fitted head on frozen features; NaN where it is not stored."""
    cfgs = section_runs("centralized", session)
    results = [r for r in map(session.store.result, cfgs) if r]
    _, history = frames(results)
    return history[history["round"] == 0].test_top1.mean()


EQUAL_GAIN = 0.25   # nats of a client's own loss at which damages are compared
OTHER_GAINS = (0.175, 0.35)   # does the order hang on the one above?
ONE_CLASS_GAIN = 0.5   # a client of one class gains more: with half of the weights more than 0.25


def equal_gain(where: str) -> float:
    """The gain (nats) at which damages are compared with clients of this sharding."""
    return ONE_CLASS_GAIN if where == nc_label(1) else EQUAL_GAIN


def trade_off_cells(session: Session) -> Cells:
    """The masks whose trade-offs are measured, at the map's skewed shardings: those of `rules`,
    `half` and `half_once`, and the least sensitive tenth of one calibration round."""
    cells = rules(session) | half(session) | half_once(session)
    for (where, rounds), cfg in calibration(session).items():
        if rounds == 1:
            cells["once_least_sensitive", where] = cfg
    skewed = [nc for nc in session.scale.map_shardings if nc]
    return {label: cfg for label, cfg in cells.items() if cfg.classes_per_client in skewed}


def trade_offs(session: Session) -> pd.DataFrame:
    """What a client's first vector gains on its own classes and costs the others, by rate.

    Of `trade_off_cells`, at rates around each one's own: rule, sharding, seed, lr; gain and damage,
    means in nats over a cohort. Measured where it is not stored, unless the store is frozen; see
    `extension.trade_off`.
    """
    images = 100 if session.preset == "demo" else 1000
    rows = []
    for (rule, sharding), cfg in trade_off_cells(session).items():
        rates = [rate_of(rung_of(cfg.lr) + step) for step in sorted(session.scale.map_rungs)]
        for seed in session.seeds:
            at_seed = replace(cfg, seed=seed)
            found = extension.trade_off(at_seed, session.store, rates, images)
            if not found:
                continue
            for lr, gain, damage in zip(rates, found["gain"], found["damage"], strict=True):
                means = np.array([gain, damage], dtype=float).mean(1)  # None becomes NaN
                rows.append((rule, sharding, seed, lr, *means))
    return pd.DataFrame(rows, columns=["rule", "sharding", "seed", "lr", "gain", "damage"])


def damages(measured: pd.DataFrame, gain: float = EQUAL_GAIN) -> pd.DataFrame:
    """Damage at a gain (nats): a row a rule, sharding and seed of `trade_offs`, where known."""
    rows = []
    for key, part in measured.groupby(["rule", "sharding", "seed"], sort=False):
        rows.append((*key, extension.damage_at(part.gain, part.damage, gain)))
    return pd.DataFrame(rows, columns=["rule", "sharding", "seed", "damage"]).dropna()


def damage_ratio(found: pd.DataFrame, rule: str, other: str, where: str) -> tuple:
    """(ratio, low, high) of two rules' `damages` at a sharding, paired by seed.

    Mean and t interval of logarithms; NaN for the interval of one seed, and where none is known.
    """
    table = found[found.sharding == where].pivot(index="seed", columns="rule", values="damage")
    if not {rule, other} <= set(table):
        return (math.nan,) * 3
    both = table[[rule, other]].dropna()
    ratios = both.iloc[:, 0] / both.iloc[:, 1]
    mean, half = t_interval(np.log(ratios))
    return tuple(np.exp([mean, mean - half, mean + half]))


UNLEARNING_RULES = ("dense", "least_sensitive", "random")


def unlearning(session: Session) -> dict[str, tuple[dict, dict]]:
    """{rule: (found, reference)}: clients forgotten by negation, at the strongest skew of `rules`.

    Both are of `extension.unlearn`, at the first seed: of the finished run, and of a run in which
    these clients never took part, at alpha = 0. The latter is trained where it is not stored; {}
    where it is missing all the same. Rules whose last weights are not stored are left out.
    """
    where = nc_label(session.scale.rule_shardings[-1])
    images = 500 if session.preset == "demo" else 5000
    cells = rules(session)
    found = {}
    for rule in UNLEARNING_RULES:
        cfg = cells[rule, where]
        try:
            forgotten = extension.unlearn(cfg, session.store, images=images)
        except ValueError as error:
            print(f"Not there yet: {error}")
            continue
        if not forgotten:  # a frozen store
            continue
        clients = forgotten["clients"]
        with one_thread():
            result = extension.train_without(cfg, clients, session.store, test=False,
                                             stop_at=session.stop_at)
        if result["status"] == "interrupted":
            print(f"Stopped after {result['round']} rounds without clients {clients}: run this "
                  "again to go on.")
            break
        reference = {}
        if result["status"] == "finished":
            elsewhere = extension.store_without(session.store, clients)
            reference = extension.unlearn(cfg, elsewhere, images=images, alphas=(0.0,))
        found[rule] = forgotten, reference
    return found


def interval_table(runs: pd.DataFrame, index, columns, value: str = "test") -> pd.DataFrame:
    """A pivot table of "mean ± half-width (n)" cells, rows and columns in order of appearance."""
    cells = runs.groupby([*_listed(index), *_listed(columns)], sort=False, dropna=False)[value]
    table = cells.agg(mean_interval).unstack(_listed(columns), sort=False)
    return table.fillna("–")


def _listed(names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def converged(history: pd.DataFrame, points: float = 0.5) -> pd.Series:
    """For every run the first round (or epoch) within `points` of its last validation accuracy,
    and so at all later evaluations."""
    found = {}
    for run, rows in history.dropna(subset="val_top1").groupby("run"):
        rows = rows.sort_values("round")
        near = (rows.val_top1 - rows.val_top1.iloc[-1]).abs() <= points
        far = rows["round"][~near]
        later = rows["round"][rows["round"] > far.max()] if len(far) else rows["round"]
        found[run] = later.iloc[0]
    return pd.Series(found, dtype=float)


@dataclass(frozen=True)
class Range:
    """The rates around a rule's best one at which it gains over the untrained start, one seed."""
    gain: float       # points at the best rate
    lowest: float     # NaN where no rate gains
    highest: float
    open_below: bool  # the lowest rate that was tried still gains
    open_above: bool

    def __str__(self) -> str:
        below = "≤ " if self.open_below else ""
        above = "≥ " if self.open_above else ""
        return f"{below}{self.lowest:g} to {above}{self.highest:g}"


def range_around_best(gains: pd.Series) -> Range:
    """Of gains (points) by rate, rates ascending; NaN for a run that diverged."""
    best = gains.idxmax()
    if not gains[best] > 0:
        return Range(gains[best], math.nan, math.nan, False, False)
    harmful = gains.index[~(gains > 0)]
    floor = harmful[harmful < best].max()      # NaN without any
    ceiling = harmful[harmful > best].min()
    inside = gains.index[~(gains.index <= floor) & ~(gains.index >= ceiling)]
    return Range(gains[best], inside.min(), inside.max(), math.isnan(floor), math.isnan(ceiling))


def of_other_code(cfgs: Iterable[Config], store: Store) -> list[Config]:
    """Those whose stored result was trained, at least in part, by a utils.py that neither is this
    one nor does the same, as `repeat` has found."""
    same = {CODE_SHA256} | set(repeated_codes(store))
    return [cfg for cfg in _unlike(cfgs) if _codes_of(store.result(cfg)) - same]


def _codes_of(result: dict | None) -> set[str]:
    """Hashes of the utils.py that trained it, part by part."""
    return {part["code"] for part in result["segments"]} if result else set()


def code_line(cfgs: Iterable[Config], session: Session) -> str:
    """One line for a notebook: how many stored results are of other code, and what to do."""
    store = session.store
    cfgs = _unlike(cfgs)
    results = [result for result in map(store.result, cfgs) if result is not None]
    stored = f"{len(results)} of {len(cfgs)} results are stored"
    old = of_other_code(cfgs, store)
    if old:
        # a notebook's own folder is not the project's
        command = (f"cd {shlex.quote(str(ROOT))} && python -m notebooks.experiments repeat "
                   f"{run_name(old[0])} --preset {session.preset}")
        return (f"{stored}, {len(old)} of them of another version of utils.py. Does this one give "
                f"the same? `{command}` trains one again and compares, in a folder of its own. "
                "They are deleted by "
                "`experiments.forget_other_code(session)`, and the next run makes them anew.")
    earlier = sum(_codes_of(result) != {CODE_SHA256} for result in results)
    if earlier:
        codes = set().union(*map(_codes_of, results))
        found = repeated_codes(store)
        checked = sum(len(runs) for code, runs in found.items() if code in codes)
        return (f"{stored}, {earlier} of them of an earlier version of utils.py, whose runs this "
                f"one repeats bit for bit (checked on {checked}).")
    return f"{stored}, all of this code."


def repeat(cfgs: Iterable[Config], session: Session) -> dict[str, list[str]]:
    """Trains stored runs anew, in a folder of their own: what came out otherwise, by run.

    After a change of utils.py that should change no result. Where every run of an earlier code
    comes out bit for bit, but for times and places, the store's notes say so, and results of that
    code count as this one's. A run that was trained elsewhere (see `trained_elsewhere`) and comes
    out otherwise tells nothing of the code.
    Raises KeyError for a run that is not stored, KeyboardInterrupt where it is stopped.
    """
    store = session.store
    stored = {}
    for cfg in _unlike(cfgs):
        stored[run_name(cfg)] = store.result(cfg)
        if stored[run_name(cfg)] is None:
            raise KeyError(f"{run_name(cfg)} is not stored: there is nothing to repeat")
    differing = {}
    with tempfile.TemporaryDirectory() as folder:
        anew = replace(session, store=BackedUpStore(folder, quiet=store.quiet))
        for test in (True, False):
            runs = [Config(**result["config"]) for result in stored.values()
                    if ("test" in result) == test]
            if train_all(runs, anew, test):
                raise KeyboardInterrupt
        for name, result in stored.items():
            again = anew.store.result(Config(**result["config"]))
            differing[name] = _unequal(result, again)
            if store.read(f"{name}.npy") != anew.store.read(f"{name}.npy"):
                differing[name].append("predictions")
    _note_repeated(stored, differing, store)
    return differing


def _unequal(result: dict, again: dict) -> list[str]:
    """Names of what differs between two results of a run; times and places may."""
    names = (result.keys() | again.keys()) - {"seconds", "segments"}
    return sorted(name for name in names if result.get(name) != again.get(name))


def trained_elsewhere(result: dict) -> dict[str, tuple]:
    """{what: (there, here)} of the machine and the libraries, on which a run's bits depend."""
    here = utils.segment(Config(**result["config"]), 0)
    found = {}
    for part in result["segments"]:
        for name in ("device", "hardware", "vector_units", "precision", "threads", "versions"):
            there = part.get(name, "not known")
            if there != here[name]:
                found[name] = there, here[name]
    return found


def _note_repeated(stored: dict[str, dict], differing: dict[str, list[str]], store: Store):
    """Notes of each earlier code which runs came out the same and which did not, in addition to
    those of earlier calls: a luckier choice of runs hides no failure."""
    runs_of = {}
    for name, result in stored.items():
        if differing[name] and trained_elsewhere(result):
            continue
        for code in _codes_of(result) - {CODE_SHA256}:
            runs_of.setdefault(code, []).append(name)
    for code, names in runs_of.items():
        note = f"notes/repeated_{CODE_SHA256[:16]}_{code[:16]}.json"
        known = json.loads(store.read(note) or b"{}")
        other = {name for name in names if differing[name]}
        same = set(names) - other
        same |= set(known.get("runs", [])) - other
        other |= set(known.get("differing", [])) - same
        content = dict(code=CODE_SHA256, repeats=code, runs=sorted(same), differing=sorted(other))
        store.write(note, utils.to_json(content))


def repeated_codes(store: Store) -> dict[str, list[str]]:
    """{hash of an earlier utils.py: runs of it that came out bit for bit, where none did not}.

    Of this utils.py, or of one whose runs this one repeats.
    """
    found = {}
    later = [CODE_SHA256]
    while later:
        code = later.pop()
        for name in store.names(f"notes/repeated_{code[:16]}_*.json"):
            note = json.loads(store.read(name) or b"{}")
            sound = note.get("code") == code and not note.get("differing")
            if sound and note["repeats"] not in found:
                found[note["repeats"]] = note["runs"]
                later.append(note["repeats"])
    return found


def forget(cfgs: Iterable[Config], store: Store):
    """Deletes results, predictions and checkpoints, so that the runs are trained anew."""
    for cfg in cfgs:
        for name in (f"{run_name(cfg)}.json", f"{run_name(cfg)}.npy"):
            store.delete(name)
        drop_checkpoints(cfg, store)


def forget_other_code(session: Session):
    """`forget` of all sections' runs that are `of_other_code`, and of all that was measured."""
    store = session.store
    cfgs = [cfg for name in SECTIONS for cfg in section_runs(name, session)]
    old = of_other_code(cfgs, store)
    forget(old, store)
    if not old:
        return
    # A measurement does not tell which code made it.
    for name in store.names("notes/*.json"):
        if not name.startswith("notes/repeated_"):
            store.delete(name)


# ------------------------------------------------------------------ statistics
CONFIDENCE = 0.95
MARGIN = 1.0   # points of accuracy within which two are called equivalent


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % t interval); NaN as half-width for fewer than two values."""
    values = np.asarray(list(values), dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), math.nan
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def mean_interval(values: Iterable[float]) -> str:
    """"mean ± half-width (n)" of the 95 % t interval over seeds; one run has none."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    mean, half = t_interval(values)
    if not values:
        return "–"
    if len(values) == 1:
        return f"{mean:.1f} (1)"
    return f"{mean:.1f} ± {half:.1f} ({len(values)})"


@dataclass(frozen=True)
class Comparison:
    """a - b in points of accuracy, or a - b of logarithms."""
    difference: float
    low: float          # of the 95 % interval
    high: float
    p: float            # two-sided, that there is no difference
    p_equivalent: float  # two one-sided tests, that it is at least MARGIN
    seeds: int
    method: str         # of the interval and the test
    unit: str = "points"

    @property
    def verdict(self) -> str:
        """"higher", "lower", or "no difference found, interval a to b"."""
        if self.seeds == 0:
            return "not stored yet"
        if self.p < 1 - CONFIDENCE:
            return "higher" if self.difference > 0 else "lower"
        words = f"no difference found, interval {self.low:.1f} to {self.high:.1f}"
        if self.equivalent:
            words += f", equivalent within {MARGIN:g}"
        return words

    @property
    def equivalent(self) -> bool:
        return self.p_equivalent < 1 - CONFIDENCE

    def __str__(self) -> str:
        interval = f"{self.low:+.1f} to {self.high:+.1f}"
        return f"{self.difference:+.1f} {self.unit} ({interval}; {self.method}): {self.verdict}"


NOTHING = Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, 0, "")


def paired_t(differences: Iterable[float]) -> Comparison:
    """Interval and tests over seeds, from one difference (points) a seed; at least two seeds."""
    differences = np.asarray(list(differences), dtype=float)
    n = len(differences)
    if n < 2:
        raise ValueError(f"a t interval needs at least 2 seeds, not {n}")
    mean, half = t_interval(differences)
    error = stats.sem(differences)
    return Comparison(mean, mean - half, mean + half, *_p_values(mean, error, stats.t(n - 1)), n,
                      f"paired t over {n} seeds")


def _p_values(mean: float, error: float, law) -> tuple[float, float]:
    """(two-sided p of no difference, p of two one-sided tests against MARGIN)."""
    if error == 0:  # all differences are the same: no doubt is left
        return float(mean == 0), float(abs(mean) >= MARGIN)
    two_sided = 2 * law.sf(abs(mean) / error)
    above_lower = law.sf((mean + MARGIN) / error)
    below_upper = law.sf((MARGIN - mean) / error)
    return float(two_sided), float(max(above_lower, below_upper))


def within_seed(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """McNemar's exact test on the images of one test set (bool, paired), with Wald's interval.

    It knows the chance of the test images alone, not that of the seed.
    """
    both = int((correct_a & correct_b).sum())
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((~correct_a & correct_b).sum())
    n = len(correct_a)
    neither = n - both - only_a - only_b
    p = mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue
    mean = 100 * (only_a - only_b) / n
    error = 100 * math.sqrt(max(0, only_a + only_b - (only_a - only_b) ** 2 / n)) / n
    half = stats.norm.ppf(0.5 + CONFIDENCE / 2) * error
    equivalent = _p_values(mean, error, stats.norm)[1]
    return Comparison(mean, mean - half, mean + half, float(p), equivalent, 1,
                      "McNemar within a seed")


def correct(cfg: Config, store: Store) -> np.ndarray | None:
    """Which test images the run's last weights get right (bool), from the stored predictions.

    Kept as bits, for the report to be made without the data set. None where there are none.
    """
    content = store.read(f"{run_name(cfg)}.npy")
    if content is None:
        return None

    def find():
        predictions = np.load(io.BytesIO(content))
        labels = utils.load_data(cfg).test_labels[:len(predictions)].cpu().numpy()
        bits = np.packbits(predictions == labels)
        return dict(bits=bits.tobytes().hex(), images=len(labels))

    key = dict(run=run_key(cfg), predictions=hashlib.sha256(content).hexdigest())
    found = store.compute_or_load("correct", key, find)
    if not found:  # a frozen store keeps nothing new
        found = find()
    bits = np.frombuffer(bytes.fromhex(found["bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=found["images"]).astype(bool)


def compare(cfgs_a: Iterable[Config], cfgs_b: Iterable[Config], store: Store) -> Comparison:
    """Test accuracy of a minus that of b, paired by the seeds that both have.

    With two seeds or more a t interval over them, with one McNemar's test on its predictions.
    """
    tested_a = _tested_by_seed(cfgs_a, store)
    tested_b = _tested_by_seed(cfgs_b, store)
    seeds = sorted(tested_a.keys() & tested_b.keys())
    if len(seeds) > 1:
        return paired_t(100 * (tested_a[s][1] - tested_b[s][1]) for s in seeds)
    if not seeds:
        return NOTHING
    right_a = correct(tested_a[seeds[0]][0], store)
    right_b = correct(tested_b[seeds[0]][0], store)
    if right_a is None or right_b is None:
        return NOTHING
    return within_seed(right_a, right_b)


def _tested_by_seed(cfgs: Iterable[Config], store: Store) -> dict[int, tuple[Config, float]]:
    found = {}
    for cfg in cfgs:
        result = store.result(cfg)
        if result and "test" in result:
            found[cfg.seed] = cfg, result["test"]["top1"]
    return found


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons of one table, their p values by Holm's method for as many tests."""
    known = [c for c in comparisons if not math.isnan(c.p)]
    if not known:
        return comparisons
    adjusted = iter(multipletests([c.p for c in known], method="holm")[1])
    return [c if math.isnan(c.p) else replace(c, p=float(next(adjusted))) for c in comparisons]


# ------------------------------------------------------------------ budget
RUNGS = 4          # of a search: three bracket a good guess, a fourth where it is one off
T4_FLOPS = 8e12    # sustained in fp16: an eighth of the peak in NVIDIA's data sheet, until measured
CPU_FLOPS = 5e10   # of a core, in float32: about what the small ViT reaches on servers of today
CHECKPOINTS = 3    # of a run in training, at the moment when one is stored
# {algorithm: what its server remembers, in multiples of all weights}, in each of these; a mask is a
# quarter, a byte where a weight takes four
MEMORIES = {"fedavgm": 1, "fedadam": 2, "held_out": 1, "held_out_matched": 1,
            **dict.fromkeys(RECALIBRATION.values(), 0.25)}


def steps_of(cfg: Config) -> int:
    """SGD steps of a round, all clients together, or of an epoch."""
    if cfg.centralized:
        return math.ceil(train_images(cfg) / cfg.batch_size)
    return cfg.local_steps * cohort_size(cfg.num_clients, cfg.participation)


def train_images(cfg: Config) -> int:
    """Images of the training part, without reading them."""
    per_class = utils.images_per_class(cfg.dataset)
    kept = per_class - round(cfg.val_fraction * per_class)
    return kept * utils.NUM_CLASSES[cfg.dataset]


@lru_cache
def image_flop(arch: str, image_size: int) -> tuple[int, int]:
    """FLOP of one image: (forward, forward and backward), counted by torch on the model itself."""
    with torch.device("meta"):
        model = timm.create_model(**utils.ARCHS[arch], img_size=image_size, num_classes=100)
        x = torch.zeros(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as both:
        model(x).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


@lru_cache
def weight_counts(arch: str, image_size: int) -> tuple[int, int]:
    """All weights of an architecture with its head, and the maskable ones; pixels a side."""
    with torch.device("meta"):
        model = timm.create_model(**utils.ARCHS[arch], num_classes=100, img_size=image_size)
    return (sum(p.numel() for p in model.parameters()),
            sum(w.numel() for w in utils.maskable(model).values()))


def images_of(cfg: Config, test: bool) -> tuple[int, int]:
    """(trained, evaluated) images of a run; whatever needs a gradient counts as training."""
    steps = steps_of(cfg)
    trained = steps * cfg.batch_size * cfg.length
    if cfg.centralized:
        trained = train_images(cfg) * cfg.length
    if cfg.rule and RULES[cfg.rule].needs_fisher:
        trained += cfg.calibration_images * cfg.calibration_rounds
    if not cfg.centralized:
        clients = cohort_size(cfg.num_clients, cfg.participation)
        trained += round(scored_images(cfg) * clients * cfg.length)

    per_class = utils.images_per_class(cfg.dataset)
    val = round(cfg.val_fraction * per_class) * utils.NUM_CLASSES[cfg.dataset]
    tested = 10_000
    if cfg.eval_images:
        val = min(val, cfg.eval_images)
        tested = min(tested, cfg.eval_images)
    times = 1 + math.ceil(cfg.length / cfg.eval_every)
    evaluated = times * (val + tested * cfg.test_curve)
    if test:
        evaluated += 2 * tested  # the last weights and the best
    return trained, evaluated


def scored_images(cfg: Config) -> float:
    """Images on which a client computes gradients in a mean round, beside its local steps."""
    if "fisher" in cfg.algorithm:
        return extension.FisherMerge.images
    if "held_out" in cfg.algorithm:
        return 2 * cfg.batch_size
    kind = ALGORITHMS[cfg.algorithm]
    if issubclass(kind, extension.Recalibrated) and RULES[kind.rule].needs_fisher:
        return kind.times * kind.rounds * kind.images / cfg.num_rounds
    return 0


def flop_of(cfg: Config, test: bool) -> float:
    """FLOP of a run. Sparse runs count as dense ones: what they skip depends on the mask."""
    forward, both = image_flop(cfg.arch, cfg.image_size)
    trained, evaluated = images_of(cfg, test)
    return trained * both + evaluated * forward


def stored_bytes(cfg: Config) -> float:
    """What a finished run keeps: last and best weights, of a sparse run the free and the mask."""
    every, free = weight_counts(cfg.arch, cfg.image_size)
    if cfg.rule is None:
        return 2 * 4 * every
    return 2 * 4 * (1 - cfg.sparsity) * free + free / 8


def running_bytes(cfg: Config) -> float:
    """What a run has stored at most while it is trained: its checkpoints."""
    every, _ = weight_counts(cfg.arch, cfg.image_size)
    memory = MEMORIES.get(cfg.algorithm, 0)
    if cfg.algorithm == "scaffold":
        memory = cfg.num_clients + 1
    return CHECKPOINTS * (stored_bytes(cfg) + 4 * every * memory)


def cached_mask(cfg: Config) -> tuple:
    """What tells the run's mask from others in the store's cache, where it stays, a byte a weight.

    Clients that calibrate have shards of their own; one place sees the same images for all.
    """
    what = (cfg.rule, cfg.sparsity, cfg.calibration_rounds, cfg.calibration_images, cfg.head,
            cfg.seed)
    if cfg.calibration != "central" and not cfg.centralized:
        what += (cfg.calibration, cfg.calibration_clients, sharding_label(cfg))
    return what


def lasting_bytes(cfg: Config, keep: bool) -> dict:
    """{file: bytes} of what stays of a run: its mask, and its weights where they are to `keep`."""
    files = {}
    if keep:
        files[run_name(cfg)] = stored_bytes(cfg)
    if cfg.rule:
        _, free = weight_counts(cfg.arch, cfg.image_size)
        files[cached_mask(cfg)] = free
    return files


def planned(name: str, session: Session) -> dict[str, tuple[Config, bool, bool]]:
    """{run: (Config, tested, kept)} of a section; searches count with RUNGS rates a cell.

    What is kept are weights, after the run is done.
    """
    section = SECTIONS[name]
    runs = {}
    if section.searched and session.scale.searches:
        for cfg in section.cells(session).values():
            like = searched_like(cfg, session)
            for step in range(-1, RUNGS - 1):
                rung = replace(like, lr=rate_of(rung_of(like.lr) + step))
                runs[run_name(rung)] = rung, False, False
    for cfg in section_runs(name, session):
        runs[run_name(cfg)] = cfg, section.test, section.keep
    return runs


def throughput(preset_name: str, store: Store) -> tuple[float, str]:
    """(FLOP a second of a worker, where it is from): stored runs of this hardware, else a guess for
    what the preset is made for, a T4 or a CPU."""
    base = preset(preset_name, dataset="cifar100")
    flop = 0.0
    seconds = 0.0
    for result in readable(store.results().values()):
        where = {part["hardware"] for part in result["segments"]}
        try:
            cfg = Config(**result["config"])
        except (TypeError, ValueError):  # of an algorithm that this process does not know
            continue
        same = (cfg.arch, cfg.image_size) == (base.arch, base.image_size)
        if same and where == {hardware()} and result["status"] == "finished":
            flop += flop_of(cfg, False)
            seconds += result["seconds"]
    if seconds > 0:
        return flop / seconds, f"measured on {hardware()}"
    if preset_name in ("small", "demo") and device().type == "cpu":
        return CPU_FLOPS, "estimated for a core of a CPU"
    return T4_FLOPS, "estimated for a T4"


def budget(preset_name: str, seeds: int = 1, store: Store | None = None,
           by_section: bool = False, notebook: str | None = None, workers: int = 1
           ) -> pd.DataFrame:
    """A row a notebook (or section), and their sum: runs, images, FLOP, GB on Drive, hours.

    The GB are the most at a time: what stays, which adds up, and the largest checkpoints of as many
    runs in training as there are `workers`; `left` is what stays alone.

    Nothing is trained or loaded: counted are the configurations, with RUNGS runs a search, as if
    nothing was stored; a run of several notebooks counts in the first, unless one `notebook` alone
    is asked for. `store` tells the speed of this machine, if it has runs of this preset.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = preset(preset_name, dataset="cifar100")
        session = Session(preset_name, base, BackedUpStore(Path(folder), frozen=True),
                          Path(folder), tuple(range(seeds)), 1, SCALES[preset_name])
        plans = {name: planned(name, session) for name, section in SECTIONS.items()
                 if notebook in (None, section.notebook)}
    speed, source = throughput(preset_name, store) if store else (T4_FLOPS, "estimated for a T4")
    running = {}   # row -> GB of the largest of its runs in training
    counted = {}   # run -> images trained, evaluated, and FLOP, so far
    on_drive = set()  # files that stay, so far
    rows = {}
    for name, runs in plans.items():
        group = f"{SECTIONS[name].notebook} {name}" if by_section else SECTIONS[name].notebook
        row = rows.setdefault(group, dict(runs=0, trained=0, evaluated=0, flop=0.0, left=0.0))
        for run, (cfg, test, kept) in runs.items():
            for file, size in lasting_bytes(cfg, kept).items():
                row["left"] += size / 1e9 * (file not in on_drive)
                on_drive.add(file)
            running[group] = max(running.get(group, 0), running_bytes(cfg) / 1e9)
            # a run of an earlier section may be tested only here
            before = counted.get(run, (0, 0, 0))
            costs = (*images_of(cfg, test), flop_of(cfg, test))
            more = tuple(map(max, costs, before))
            row["runs"] += run not in counted
            row["trained"] += more[0] - before[0]
            row["evaluated"] += more[1] - before[1]
            row["flop"] += more[2] - before[2]
            counted[run] = more
    frame = pd.DataFrame(rows).T.sort_index()
    frame.loc["all"] = frame.sum()
    running["all"] = max(running.values())
    frame["gigabytes"] = frame.left + workers * pd.Series(running)
    frame["hours"] = frame.flop / speed / 3600
    frame["throughput"] = f"{speed / 1e12:.3g} TFLOP/s, {source}"
    return frame.astype({"runs": int, "trained": int, "evaluated": int})


def budget_markdown() -> str:
    """The README's table of costs at the estimated speed of a T4, with one seed."""
    columns = ("preset", "notebook", "runs", "images trained", "evaluated", "PFLOP",
               "GB at most", "hours")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in ("lite", "full", "small", "demo"):
        for notebook, row in budget(name).iterrows():
            hours = f"{row.hours:.1f}"
            if name in ("small", "demo"):  # presets for a CPU, in one line each
                hours = "on a CPU"
            if name in ("small", "demo") and notebook != "all":
                continue
            lines.append(
                f"| {name} | {notebook} | {row.runs} | {row.trained / 1e6:.1f} M "
                f"| {row.evaluated / 1e6:.1f} M | {row.flop / 1e15:.1f} | {row.gigabytes:.1f} "
                f"| {hours} |")
    return "\n".join(lines)


def budget_line(notebook: str, session: Session) -> str:
    """The first output of a notebook: what all its runs cost, were nothing stored."""
    table = budget(session.preset, len(session.seeds), session.store, notebook=notebook,
                   workers=session.workers)
    row = table.loc["all"]
    return (f"Preset {session.preset}, {len(session.seeds)} seed(s): {row.runs} runs, about "
            f"{row.hours / session.workers:.1f} hours with {session.workers} worker(s) and at most "
            f"{row.gigabytes:.1f} GB if nothing is stored yet ({row.throughput}).")


def rates_line(session: Session) -> str:
    """How a preset searches learning rates, and which cells take the rate of another."""
    scale = session.scale
    if not scale.searches:
        return "Learning rates are not searched in this preset, but guessed."
    if scale.search is None:
        return "Every cell's learning rate is searched, on runs as long as its own."
    shared = []
    for name, stand_in in scale.stand_ins.items():
        pairs = [f"{value} takes that of {other}" for value, other in stand_in.items()]
        shared.append(f"{name}: {', '.join(pairs)}")
    if "fedprox" in scale.stand_ins.get("algorithm", {}):
        shared[-1] += f" (up to mu = {WEAK_PULL:g})"
    return (f"Learning rates are searched on runs of {scale.search} local steps (centralised: of "
            f"{scale.search_epochs} epoch). Not searched are {'; '.join(shared)}.")


# ------------------------------------------------------------------ command line
def main(arguments: list[str] | None = None) -> int:
    """Trains a section, or prints the budget; see --help."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.experiments")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train sections, one after the other")
    running.add_argument("sections", nargs="+", choices=list(SECTIONS), metavar="SECTION",
                         help=", ".join(SECTIONS))
    running.add_argument("--preset", default="small", choices=list(SCALES))
    running.add_argument("--seeds", type=int)
    running.add_argument("--workers", type=int)
    running.add_argument("--hours", type=float)
    running.add_argument("--on-cpu", action="store_true", help="full and lite without a GPU")
    running.add_argument("--vits16", action="store_true",
                         help="small with a ViT-S/16 at 96 px, for a GPU; section rules is meant")
    again = commands.add_parser(
        "repeat", help="train stored runs anew and compare, after a change that should change none")
    again.add_argument("runs", nargs="+", metavar="RUN", help="the name of a stored run")
    again.add_argument("--preset", default="small", choices=list(SCALES))
    again.add_argument("--workers", type=int)
    again.add_argument("--on-cpu", action="store_true", help="full and lite without a GPU")
    counting = commands.add_parser("budget", help="what the presets cost")
    counting.add_argument("--preset", action="append", choices=list(SCALES))
    counting.add_argument("--seeds", type=int, default=1)
    counting.add_argument("--by-section", action="store_true")
    counting.add_argument("--markdown", action="store_true", help="the README's table")
    asked = parser.parse_args(arguments)

    if asked.command == "budget" and asked.markdown:
        print(budget_markdown())
        return 0
    if asked.command == "budget":
        print_budget(asked.preset or list(SCALES), asked.seeds, asked.by_section)
        return 0
    if asked.command == "repeat":
        session = open_session(asked.preset, on_cpu=asked.on_cpu, workers=asked.workers)
        return print_repeated(asked.runs, session)
    session = open_session(asked.preset, asked.seeds, hours=asked.hours, on_cpu=asked.on_cpu,
                           workers=asked.workers)
    if asked.vits16 and asked.preset != "small":
        parser.error(f"--vits16 is for --preset small, not {asked.preset}")
    if asked.vits16:
        session = on_vits16(session)
    for name in asked.sections:
        left = run_section(name, session)
        print(f"{name}: {len(left)} runs left" if left else f"{name}: done", flush=True)
        if left:
            return 1
    return 0


def print_repeated(names: list[str], session: Session) -> int:
    """Says of each run whether it came out the same; 1 where one did not, else 0."""
    results = session.store.results()
    unknown = [name for name in names if name not in results]
    if unknown:
        print(f"not stored in {session.store.root}: {unknown}")
        return 1
    differing = repeat([Config(**results[name]["config"]) for name in names], session)
    for name, what in differing.items():
        elsewhere = trained_elsewhere(results[name])
        if not what:
            print(f"{name}: the same, bit for bit")
        elif elsewhere:
            print(f"{name}: other {', '.join(what)}, but trained elsewhere (there, here): "
                  f"{elsewhere}")
        else:
            print(f"{name}: other {', '.join(what)}")
    return int(any(differing.values()))


def print_budget(presets: list[str], seeds: int, by_section: bool = False):
    for name in presets:
        store = Store(_folders(None, name)[0], frozen=True)
        print(f"{name}, {seeds} seed(s)")
        table = budget(name, seeds, store, by_section)
        print(table.to_string(float_format="{:.3g}".format), end="\n\n")


if __name__ == "__main__":
    # under its own name, so that workers find what they are sent
    from notebooks import experiments
    sys.exit(experiments.main())
