"""What notebooks show: plans of what to run, tables and figures of what is stored."""
import base64
import html
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import safetensors
import seaborn as sns
import timm
import torch
from IPython.display import display
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from notebooks.basics import (
    ARCHS,
    NOTES,
    PER_CLASS,
    PRESETS,
    ROOT,
    Config,
    Params,
    cohort_size,
    evaluate,
    hardware,
    identity,
    run_name,
)
from notebooks.store import Store
from utils import apply_vector, client_update, cohort, flat, maskable, open_run, train

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # learning rates to search


def train_all(cfgs: list[Config], store: Store, test: bool = True):
    """`train` one after the other what is not stored; stopping by hand stops them all."""
    for cfg in tqdm([c for c in cfgs if not store.frozen], desc="runs"):
        if train(cfg, store, test)["status"] == "interrupted":
            print(f"Stopped within {run_name(cfg)}: run this cell again to go on from there.")
            break


def drift(vectors: list[Params]) -> dict:
    """How the task vectors of a cohort disagree: norms, pairwise cosines, sign-conflict rate.

    In conflict is an entry that some clients raise and others lower, among those that any moves.
    """
    v = torch.stack([flat({n: d[n] for n in vectors[0]}) for d in vectors])
    norms = v.norm(dim=1)
    up, down = (v > 0).any(0), (v < 0).any(0)
    conflict = (up & down).sum() / (up | down).sum().clamp(min=1)
    cosine = (v @ v.T) / (norms[:, None] * norms).clamp(min=1e-30)
    return dict(norms=norms.tolist(), cosine=cosine.tolist(), sign_conflict=conflict.item())


def diagnose(cfg: Config, store: Store, alphas=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0)) -> dict:
    """`drift` of one cohort at a finished run's best weights, and the validation loss along the
    mean task vector; kept in the store. Holds the whole cohort's vectors at once."""
    def compute():
        run, state = open_run(cfg, store)
        state = replace(state, params=state.best, memory={}, round=cfg.num_rounds)
        clients = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round)
        vectors = []
        for k in clients.tolist():
            run.load(state.params)
            client_update(run, state, k, cfg.lr)
            vectors.append(run.vector(state.params))
        mean = {n: torch.stack([v[n] for v in vectors]).mean(0) for n in vectors[0]}
        index, losses = run.data.val[:run.cfg.eval_images], []
        for alpha in alphas:
            run.load(apply_vector(state.params, mean, alpha))
            found = evaluate(run.model, run.data.images[index], run.data.labels[index])
            losses.append(found["loss"])
        return drift(vectors) | dict(clients=clients.tolist(), alphas=alphas, losses=losses)
    return store.cached("drift", dict(identity(cfg), alphas=alphas), compute)


def overlap(a: Params, b: Params) -> float:
    """Intersection over union of the True entries of two masks; 1 where neither has any."""
    if a.keys() != b.keys():
        raise KeyError(f"only one of the two masks has {sorted(a.keys() ^ b.keys())}")
    union = sum(int((a[n] | b[n]).sum()) for n in a)
    return sum(int((a[n] & b[n]).sum()) for n in a) / union if union else 1.0


def overlaps(cfgs: list[Config], store: Store) -> dict:
    """{"iou": rows} of the overlap of each two runs' masks, kept; {} from a frozen store."""
    def compute():
        masks = [open_run(c, store)[0].mask for c in cfgs]
        return {"iou": [[overlap(a, b) for b in masks] for a in masks]}
    return store.cached("overlap", {"runs": [run_name(c) for c in cfgs]}, compute)


# ------------------------------------------------------------------ figures and tables
COLUMN, PAGE = 3.28, 6.88  # widths in inches of a two-column report
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
         "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.4, "pdf.fonttype": 42,
         "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 120}


def set_style():
    """The one style of all figures."""
    sns.set_theme("paper", "whitegrid", "colorblind", rc=STYLE)


def watermark(fig):
    """What must be said of the data, across the figure; nothing, as a rule."""
    fig.text(0.5, 0.5, "\n".join(NOTES), c="red", alpha=0.4, size=14, ha="center")


def figure(width: float = COLUMN, height: float = 2.3, **grid):
    """plt.subplots of `width` x `height` inches in the one style."""
    set_style()
    return plt.subplots(figsize=(width, height), **grid)


def widen(ax, points: float = 2.0):
    """Widens a y axis of accuracies to `points` at least: what differs by chance must look it."""
    low, high = ax.get_ylim()
    more = max(0, points - (high - low)) / 2
    ax.set_ylim(low - more, high + more)


def heatmap(table, ax, label: str, fmt: str = ".1f", **options):
    """A table's numbers, in colour and in print; missing cells, or all of them, stay blank."""
    table = pd.DataFrame(table).astype(float)
    if table.notna().any(axis=None):
        sns.heatmap(table, annot=True, fmt=fmt, cmap="viridis", ax=ax, cbar_kws={"label": label},
                    **options)
        ax.tick_params(axis="y", rotation=0)


def save_figure(fig, path: Path):
    """<path>.png and <path>.pdf, the same bytes for the same data: no dates inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    watermark(fig)
    fig.savefig(f"{path}.png")
    fig.savefig(f"{path}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def save_table(frame: pd.DataFrame, path: Path):
    """<path>.tex with booktabs rules, index included; cells that are not strings get two digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = "l" * frame.index.nlevels + "r" * frame.shape[1]
    Path(f"{path}.tex").write_text(frame.to_latex(column_format=columns, float_format="%.2f",
                                                  escape=True, na_rep="--"))


def open_store(preset_name: str, drive: Path | None = None) -> Store:
    """results/ (for "demo" results/demo/) of $RESULTS_DIR or the project, mirrored on the drive.

    TRAIN=no in the environment freezes it: figures are drawn from what is stored.
    """
    part = "demo" if preset_name == "demo" else ""
    home = Path("results").absolute() if drive else ROOT / "results"  # the drive is slow: copied to
    root = Path(os.environ.get("RESULTS_DIR") or home) / part
    return Store(root, drive and drive / "results" / part, frozen=os.environ.get("TRAIN") == "no")


def stored(store: Store, **wanted) -> list[Config]:
    """Configurations of the stored results whose fields have the `wanted` values."""
    results = [json.loads(c) for c in map(store.find, store.names("*.json")) if c]
    configs = [r["config"] for r in results if "config" in r]
    return [Config(**c) for c in configs if all(c[k] == v for k, v in wanted.items())]


def tuned(cfg: Config, store: Store) -> Config:
    """`cfg` at the learning rate that was best on validation among stored runs of its setting: the
    same sharding, local steps, data, model, method and mask rule. Where no two rates were tried
    there, at the best for IID clients with J = 4; as it is, where none of these is stored.

    Longer runs reach more at any rate, and of many seeds one is lucky: compared are runs of seed 0
    and of one length, that at which the most rates were tried, of the longest of these.
    """
    names = ("dataset", "weights", "image_size", "val_fraction", "head", "algorithm", "server",
             "rule", "calibration", "num_clients", "participation", "batch_size")
    same = {n: getattr(cfg, n) for n in (*names, *(["sparsity"] if cfg.rule else []))}
    for nc, j, enough in ((cfg.classes_per_client, cfg.local_steps, 2), (None, 4, 1)):
        runs = stored(store, classes_per_client=nc, local_steps=j, seed=0, **same)
        rates = {t: {c.lr for c in runs if c.num_rounds == t} for t in {c.num_rounds for c in runs}}
        length = max(rates, key=lambda t: (len(rates[t]), t), default=None)
        if len(rates.get(length, ())) >= enough:
            return replace(cfg, lr=best([c for c in runs if c.num_rounds == length], store).lr)
    return cfg


def search_rates(cfgs: list[Config], store: Store, rates: tuple = RATES):
    """Searches the learning rate of every configuration on validation, for `tuned` to find: runs
    it at its own rate, then at lower and higher `rates`, until the best has both its neighbours.

    Ends early where a run does: by hand, or in a frozen store.
    """
    todo = list(cfgs)
    while todo:
        train_all(todo, store, test=False)
        if not all(map(store.result, todo)):
            break
        todo = []
        for cfg in cfgs:
            ladder = [replace(cfg, lr=lr) for lr in sorted({*rates, cfg.lr})]
            at = ladder.index(best([c for c in ladder if store.result(c)], store))
            todo += [c for c in ladder[max(0, at - 1):at + 2] if not store.result(c)][:1]


def best(cfgs: list[Config], store: Store) -> Config:
    """The configuration with the highest validation accuracy of those that did not diverge; the
    first, where none is stored."""
    def score(cfg):
        result = store.result(cfg)
        history = result["history"] if result and not result["error"] else []
        return max((row.get("val_top1", 0) for row in history), default=0)
    return max(cfgs, key=score)


def converged(history: pd.DataFrame, points: float = 0.5) -> pd.Series:
    """For every run the first round (or epoch) within `points` of its best validation accuracy."""
    seen = history.dropna(subset="val_top1")
    near = seen[seen.val_top1 >= seen.groupby("run").val_top1.transform("max") - points]
    return near.groupby("run")["round"].min()


def gather(cfgs: list[Config], store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history) of the stored results among `cfgs`, as `frames` has them.

    Says how many runs are missing or diverged: figures show them as gaps.
    """
    results = [r for r in map(store.result, cfgs) if r]
    missing, bad = len(cfgs) - len(results), [r["run"] for r in results if r["error"]]
    if missing or bad:
        print(f"{missing} of {len(cfgs)} runs are missing, {len(bad)} diverged {bad or ''}", *NOTES)
    return frames(results)


def frames(results: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history): a row a run, and a row a round of a run; accuracies in %."""
    names = [f.name for f in fields(Config)]
    measures = ["run", "round", "train_loss", "client_norm", "mean_norm", "fedexp_step",
                "bytes_up", "bytes_down", "bytes_dense", "val_loss", "val_top1", "val_top5"]
    rows = [r["config"] | {"run": r["run"]} | row for r in results for row in r["history"]]
    history = pd.DataFrame(rows, columns=[*names, *measures])
    history = history.astype(dict.fromkeys(measures[1:], float))
    history["val_top1"] *= 100
    scores = history.groupby("run").val_top1.max()
    runs = pd.DataFrame([r["config"] | {k: r[k] for k in ("run", "seconds", "best_round")} | {
        "val": scores.get(r["run"]), "test": 100 * r["test"]["top1"] if "test" in r else None}
        for r in results], columns=[*names, "run", "seconds", "best_round", "val", "test"])
    for frame in (runs, history):
        nc = frame.classes_per_client.map(lambda n: "IID" if pd.isna(n) else f"Nc={int(n)}")
        frame["sharding"] = nc.where(frame.algorithm != "centralized", "centralised")
    return runs.astype({"val": float, "test": float}), history


def mean_sd(values: pd.Series) -> str:
    """"mean ± sd (n)" over seeds; one run has no sd, none is a dash."""
    values = values.dropna()
    sd = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{sd} ({len(values)})" if len(values) else "–"


# ------------------------------------------------------------------ plans
SPEED: dict[tuple, float] = {}  # seconds of a local step, as measured or stored on this hardware


def progress(cfg: Config, store: Store) -> dict:
    """What is stored of a run: its result, else the card of its newest readable checkpoint."""
    if result := store.result(cfg):
        return result | {"round": cfg.length}
    for name in reversed(store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")):
        for path in filter(Path.exists, store.places(name)):
            try:
                with safetensors.safe_open(path, "pt") as file:  # reads the header, no weights
                    return json.loads(file.metadata()["card"])
            except (safetensors.SafetensorError, OSError):
                continue  # cut or damaged: training will say so, and resume from an older one
    return {"round": 0, "history": []}


def steps_of(cfg: Config) -> int:
    """SGD steps of a round, or of an epoch."""
    if cfg.algorithm == "centralized":
        n = PER_CLASS[cfg.dataset]  # no need to read the images
        return math.ceil(100 * (n - round(cfg.val_fraction * n)) / cfg.batch_size)
    return cfg.local_steps * cohort_size(cfg.num_clients, cfg.participation)


def speed_key(cfg: Config) -> tuple:
    return cfg.architecture, cfg.image_size, cfg.batch_size, cfg.precision, hardware()


def measure_speed(cfg: Config) -> float:
    """Seconds of a local step, by three of them on a model of random weights."""
    if speed_key(cfg) not in SPEED:
        plain = Config(weights="none", arch=speed_key(cfg)[0], dataset=cfg.dataset, local_steps=3,
                       image_size=cfg.image_size, batch_size=cfg.batch_size,
                       precision=cfg.precision)
        run, state = open_run(plain, Store(Path(os.devnull)))
        client_update(run, state, 0, cfg.lr).item()
        began = time.monotonic()
        client_update(run, state, 0, cfg.lr).item()
        SPEED[speed_key(cfg)] = (time.monotonic() - began) / 3
    return SPEED[speed_key(cfg)]


@lru_cache
def size_of(arch: str) -> tuple[int, int]:
    """All weights of an architecture, and the maskable ones; no memory is taken."""
    with torch.device("meta"):
        model = timm.create_model(**ARCHS[arch], num_classes=100)
    return (sum(p.numel() for p in model.parameters()),
            sum(model.get_parameter(n).numel() for n in maskable(model)))


def kept_bytes(cfg: Config) -> float:
    """What the checkpoint of a finished run takes: its best weights, of a sparse run the free."""
    every, free = size_of(speed_key(cfg)[0])
    return 4 * ((1 - cfg.sparsity) * free if cfg.rule else every)


def plan(cfgs: list[Config], store: Store) -> pd.DataFrame:
    """What of these runs is stored and what is left, with an estimate of time and of storage."""
    rows = []
    for cfg in cfgs:
        done = progress(cfg, store)["round"]
        left = cfg.length - done
        seconds = left and left * steps_of(cfg) * measure_speed(cfg)
        rows.append(dict(run=run_name(cfg), stored=done, of=cfg.length, minutes_left=seconds / 60))
    frame = pd.DataFrame(rows)
    print(f"{(frame.stored == frame.of).sum()} of {len(frame)} runs are stored; training the rest "
          f"takes about {frame.minutes_left.sum():.0f} min on {hardware()}; finished, all of them "
          f"take {sum(map(kept_bytes, cfgs)) / 1e9:.2f} GB with their checkpoints", *NOTES)
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
        print(f"So far {torch.cuda.max_memory_allocated() / 1e9:.1f} of the GPU's {room / 1e9:.1f} "
              "GB were needed; batches that do not fit are computed in parts")
    return frame


# ------------------------------------------------------------------ the panel
LABELS = {"preset": "Preset", "classes_per_client": "Classes per client, Nc", "seed": "Seed",
          "local_steps": "Local steps, J", "num_rounds": "Rounds, T", "num_epochs": "Epochs",
          "rule": "Mask rule", "sparsity": "Sparsity, s", "lr": "Learning rate, η",
          "calibration_rounds": "Calibration rounds, R", "calibration": "Calibration",
          "schedule": "Schedule", "server": "Server step", "algorithm": "Algorithm"}
NONE = {"classes_per_client": "IID", "rule": "none (dense)"}


@dataclass
class Panel:
    """Controls that choose one run, and what is stored of it. Choosing never starts a run."""
    make: Callable[..., Config]     # (preset, **what else is chosen) -> Config
    drive: Path | None
    options: dict[str, list]        # of the menus; a control that is not here is a number field
    controls: dict[str, widgets.Widget]
    status: widgets.HTML
    picture: widgets.HTML
    table: widgets.HTML
    listed: list[str] | None = None  # the results in the table

    def chosen(self) -> dict:
        return {name: self.options[name][control.index] if name in self.options else control.value
                for name, control in self.controls.items()}

    def told(self) -> str:
        """The choice in words."""
        return " · ".join(f"{c.description}: {c.label if name in self.options else c.value}"
                          for name, c in self.controls.items())

    @property
    def cfg(self) -> Config:
        values = self.chosen()
        return self.make(values.pop("preset"), **values)

    @property
    def store(self) -> Store:
        return open_store(self.chosen()["preset"], self.drive)

    def look(self, change=None):
        """Shows what is stored of the choice; a choice that cannot be is told, not raised."""
        if self.listed != self.store.names("*.json"):
            self.tabulate()
        try:
            cfg = self.cfg
            found = progress(cfg, self.store)
            text = f"{self.told()} — {describe(cfg, found)}"
            self.picture.value = curve(cfg, found)
        except ValueError as error:
            text, self.picture.value = f"This cannot be run: {error}", ""
        self.status.value = f'<div role="status">{html.escape(text)}</div>'

    def tabulate(self):
        """Lists the stored runs, and learns from them how long a step takes here."""
        self.listed = self.store.names("*.json")
        found = map(self.store.find, self.listed)  # a damaged one is no obstacle to the others
        results = [json.loads(content) for content in found if content]
        for result in results:
            cfg, rounds = Config(**result["config"]), len(result["history"])
            if result["hardware"] == hardware() and cfg.local_steps and rounds:
                SPEED.setdefault(speed_key(cfg), result["seconds"] / rounds / steps_of(cfg))
        runs, names = frames(results)[0], [n for n in self.controls if n != "preset"]
        shown = runs[["sharding", *(n for n in names if n != "classes_per_client"), "val", "test"]]
        body = shown.rename(columns=LABELS | {"val": "validation (%)", "test": "test (%)"}).to_html(
            index=False, float_format="{:.4g}".format, na_rep="–", border=0)
        self.table.value = ('<div style="max-height:14em;overflow:auto" tabindex="0" role="region" '
                            f'aria-label="Stored runs">Stored runs: {len(runs)}{body}</div>')

    def run(self, test: bool = True):
        """Trains what is missing of the chosen run. Stop the cell at will; rerun it to go on."""
        train_all([self.cfg], self.store, test)
        self.look()
        print(describe(self.cfg, progress(self.cfg, self.store)))

    def _ipython_display_(self):
        display(widgets.VBox([*self.controls.values(), self.status, self.picture, self.table]))


def panel(make: Callable[..., Config], first: dict, drive: Path | None = None, **options) -> Panel:
    """A `Panel` for the runs that `make(preset, **values)` gives.

    `options` names what else can be chosen: a list of values makes a menu, a range a number field.
    `first` has the initial values, by the same names. ValueError for one that is not offered.
    """
    options = {"preset": list(PRESETS), **options}
    if wrong := {n: v for n, v in first.items() if n not in options or v not in options[n]}:
        raise ValueError(f"{wrong} cannot come first: the panel offers {options}")
    controls, style = {}, {"description_width": "initial"}
    for name, values in options.items():
        label, value = LABELS.get(name, name), first.get(name, values[0])
        controls[name] = widgets.BoundedIntText(
            value, min=values[0], max=values[-1], description=label, style=style) if isinstance(
            values, range) else widgets.ToggleButtons(  # JupyterLab takes a Dropdown's arrow keys
            options=[NONE.get(name, "none") if v is None else str(v) for v in values],
            index=values.index(value), description=label, style=style | {"button_width": "auto"})
    menus = {n: v for n, v in options.items() if not isinstance(v, range)}
    made = Panel(make, drive, menus, controls, *(widgets.HTML() for _ in range(3)))
    for name, control in controls.items():
        control.observe(made.look, "index" if name in menus else "value")
    made.look()
    return made


def describe(cfg: Config, found: dict) -> str:
    """One line: what is stored of a run and what is left to do, with the time it takes."""
    unit = "epochs" if cfg.algorithm == "centralized" else "rounds"
    if found.get("error"):
        return f"Diverged: {found['error']}"
    if found.get("status") == "finished":
        scores = [f"validation {100 * max(r.get('val_top1', 0) for r in found['history']):.1f} %"]
        scores += [f"test {100 * found['test']['top1']:.1f} %"] if "test" in found else []
        return f"{cfg.length} of {cfg.length} {unit} stored, nothing to run: {', '.join(scores)}"
    left, step = cfg.length - found["round"], SPEED.get(speed_key(cfg))
    minutes = left * steps_of(cfg) * step / 60 if step else None
    time_left = "time not measured yet" if minutes is None else (
        f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute")
    return f"{found['round']} of {cfg.length} {unit} stored, will run {left}, {time_left}"


def curve(cfg: Config, found: dict) -> str:
    """The run's accuracy over its rounds as an <img> with alternative text; "" without any."""
    points = [(r["round"], 100 * r["val_top1"]) for r in found["history"] if "val_top1" in r]
    if not points:
        return ""
    unit = "epoch" if cfg.algorithm == "centralized" else "round"
    set_style()
    fig = Figure((COLUMN, 1.8))
    ax = fig.subplots()
    ax.plot(*zip(*points, strict=True), marker="o")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel=unit, ylabel="validation top-1 (%)", xlim=(0, cfg.length * 1.02))
    watermark(fig)
    fig.savefig(content := io.BytesIO(), format="png")
    said = ", ".join(f"{y:.1f} % at {unit} {x}" for x, y in points)
    return (f'<img alt="Validation accuracy of {run_name(cfg)}: {said}" style="width:28em" '
            f'src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">')
