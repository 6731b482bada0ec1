"""What notebooks show: the plan, the picture while runs train, figures, tables, the panel.

Everything is drawn from stored results, so that it is the same again later; nothing here trains,
but `train_sections` and the panel's `run`, which call `notebooks.experiments`. In reading order:

    opening        the session of a notebook, and what its first output says
    style          sizes, colours, names as words
    saving         figures as PNG and PDF without dates, tables as CSV, also to the drive
    while training the plan, and a picture that grows
    drawing        means with intervals as lines and points; what is missing is said
    figures        one function a figure
    answers        comparisons as parts of sentences
    panel          chooses one run, tells what is stored of it
"""
import base64
import html
import io
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import safetensors
import seaborn as sns
import torch
import torchvision
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

import utils
from notebooks import experiments, extension
from notebooks.backup import BackedUpStore
from notebooks.experiments import (
    Comparison,
    Session,
    budget_line,
    code_line,
    flop_of,
    gather,
    interval_table,
    is_done,
    last_accuracy,
    open_session,
    or_synthetic,
    section_frames,
    section_runs,
    t_interval,
    train_all,
    write_figure,
)
from utils import (
    ALGORITHMS,
    PRESETS,
    RULES,
    Config,
    augment,
    load_data,
    preset,
    rng,
    run_name,
    shard,
)


# ------------------------------------------------------------------ opening
def open_notebook(notebook: str, drive: Path | None = None, **parameters) -> Session:
    """The session of a notebook ("03"), after its first output: the budget and what is stored.

    `parameters` are those of `open_session`: preset_name, seeds, hours, on_cpu, workers,
    tensorboard. A `drive` that is not mounted counts as none.
    """
    if drive is not None and not drive.parent.is_dir():
        drive = None
    session = open_session(drive=drive, **parameters)
    print(budget_line(notebook, session))
    print(experiments.rates_line(session))

    names = [name for name, section in experiments.SECTIONS.items() if section.notebook == notebook]
    runs = [cfg for name in names for cfg in section_runs(name, session)]
    print(code_line(runs, session))
    place = f"Results are in {session.store.root}, figures in {session.figures}"
    if drive is not None:
        place += f"; both are copied to {drive}"
    print(place)
    warn_of_edits()
    return session


def say_edited(info=None):
    """Says, before a cell runs, that a module which is not read again was edited since."""
    for module in (utils, extension):
        path = Path(module.__file__)
        if path.read_text(encoding="utf-8") != module.SOURCE:
            print(f"RESTART THE KERNEL: {path.name} has been edited, and this kernel runs what it "
                  "was before. What is stored, or half trained, is found again.")


def warn_of_edits():
    shell = get_ipython()
    if shell is None:
        return
    names = [call.__name__ for call in shell.events.callbacks["pre_run_cell"]]
    if "say_edited" not in names:
        shell.events.register("pre_run_cell", say_edited)


# ------------------------------------------------------------------ style
COLUMN, PAGE = 3.28, 6.88  # widths in inches of a two-column report, where figures are as wide
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2, "lines.markersize": 4,
    "axes.edgecolor": "0.3", "grid.color": "0.9", "pdf.fonttype": 42, "legend.title_fontsize": 7,
    "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 120}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = (
    "-", "--", "-.", ":",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (3, 2, 1, 2)),
    (0, (2, 1)))

# What an identifier is called in figures and tables; others lose their underscores.
WORDS = {
    "classes_per_client": "classes a client, Nc", "dirichlet_alpha": "Dirichlet α",
    "local_steps": "local steps, J", "num_rounds": "rounds, T", "num_epochs": "epochs",
    "rule": "mask rule", "sparsity": "sparsity, s", "lr": "learning rate, η", "seed": "seed",
    "calibration_rounds": "calibration rounds, R", "calibration": "calibration",
    "weight_decay": "weight decay", "batch_size": "batch size, B", "val": "validation (%)",
    "test": "test (%)", "start": "untrained start (%)", "lr_now": "learning rate, η",
    "dense": "all weights", "central": "one place", "fedavg": "FedAvg", "fedprox": "FedProx",
    "scaffold": "SCAFFOLD", "fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedexp": "FedExP",
    "half_least_sensitive": "half, least sensitive", "half_random": "half, random",
    "half_once_least_sensitive": "half, one round", "half_once_shuffled": "half, random by layer",
    "once_least_sensitive": "tenth, one round",
    "lda": "LDA", "masked": "a tenth", "sparse": "a tenth",
    "crop_flip": "crop and flip", "query_key": "query and key",
    "warmup_cosine": "warm-up, cosine", "centralized": "centralised"}


def words(name) -> str:
    """An identifier as a reader knows it."""
    if isinstance(name, float):
        return f"{name:g}"
    if name in WORDS:
        return WORDS[name]
    plain = str(name).replace("centralized", "centralised").replace("_", " ")
    return plain.replace("Nc=", "Nc = ").replace("Dir(", "Dirichlet (")


def look(i: int) -> dict:
    """Colour, marker and dash of the i-th of several series, told apart in grey print as well."""
    colours = sns.color_palette("colorblind")
    return dict(
        color=colours[i % len(colours)],
        marker=MARKERS[i % len(MARKERS)],
        linestyle=DASHES[i % len(DASHES)])


def figure(width: float = COLUMN, height: float = 2.5, **grid):
    """(figure, axes) of `width` x `height` inches in the one style; `save_figure` shows it."""
    sns.set_theme("paper", "whitegrid", "colorblind", rc=STYLE)
    fig = Figure((width, height))
    return fig, fig.subplots(**grid)


def panels(number: int, height: float):
    """(figure, list of axes): a row of panels as wide as the page, with one y axis for all."""
    fig, axes = figure(PAGE, height, ncols=number, sharey=True, squeeze=False)
    return fig, list(axes[0])


def nc_labels(shardings: Iterable[int | None]) -> list[str]:
    return [experiments.nc_label(nc) for nc in shardings]


def j_labels(steps: Iterable[int]) -> list[str]:
    return [f"J = {j}" for j in steps]


# ------------------------------------------------------------------ saving
def save_figure(session: Session, fig: Figure, name: str, alt: str):
    """Writes <name>.png and .pdf, the same bytes for the same data, and shows the figure.

    `alt` says in a sentence what is to be seen.
    """
    if session.base.dataset == "synthetic":
        mark_synthetic(fig)
    pdf = io.BytesIO()
    nothing = dict(CreationDate=None, Creator=None, Producer=None)
    fig.savefig(pdf, format="pdf", metadata=nothing)
    write_figure(session, f"{name}.pdf", pdf.getvalue())
    png = png_of(fig)
    write_figure(session, f"{name}.png", png)
    width = 100 * fig.get_size_inches()[0]
    display(HTML(as_image(png, alt, f"{width:.0f}px")))


def png_of(fig: Figure) -> bytes:
    content = io.BytesIO()
    fig.savefig(content, format="png")
    return content.getvalue()


def as_image(png: bytes, alt: str, width: str) -> str:
    """An <img> with alternative text, the picture inside it."""
    data = base64.b64encode(png).decode()
    return (f'<img alt="{html.escape(alt)}" style="width:{width};max-width:100%;height:auto;'
            f'background:white" src="data:image/png;base64,{data}">')


def mark_synthetic(fig: Figure):
    fig.text(0.5, 0.5, "SYNTHETIC DATA", color="red", alpha=0.4, size=14, ha="center", va="center")


def save_table(session: Session, frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Writes <name>.csv (UTF-8) and gives the table with its names as words."""
    table = frame.rename(index=words, columns=words)
    table.index.names = [n and words(n) for n in table.index.names]
    table.columns.names = [n and words(n) for n in table.columns.names]
    if session.base.dataset == "synthetic":
        table = pd.concat({"SYNTHETIC DATA": table}, axis=1)
    write_figure(session, f"{name}.csv", table.to_csv().encode("utf-8"))
    return table.astype(object).where(table.notna(), "–")


# ------------------------------------------------------------------ while training
def plan(session: Session, *names: str) -> pd.DataFrame:
    """What of these sections is stored and what is left: a row a section, and their sum.

    Time is from the seconds of stored runs on this hardware, else estimated; a search that is not
    finished counts with the rates that it usually takes. In the sum a run that several sections
    show counts once.
    """
    speed, source = experiments.throughput(session.preset, session.store)
    groups = {name.replace("_", " ").replace("centralized", "centralised"): [name]
              for name in names}
    if len(names) > 1:
        groups["all"] = list(names)
    rows = {}
    for group, sections in groups.items():
        runs = runs_of(sections, session)
        flop = sum(flop_left(cfg, session.store, test) for cfg, test in runs.values())
        searches, search_flop = searches_left(sections, session)
        minutes = (flop + search_flop) / speed / session.workers / 60
        rows[group] = dict(
            runs=len(runs),
            stored=sum(is_done(cfg, session.store, test) for cfg, test in runs.values()),
            searches_left=searches,
            minutes_left=round(minutes, 1))
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("section")
    columns = dict(searches_left="runs of searches left", minutes_left=f"minutes left, {source}")
    return frame.astype({"runs": int, "stored": int, "searches_left": int}).rename(columns=columns)


def runs_of(sections: Iterable[str], session: Session) -> dict[str, tuple[Config, bool]]:
    """{run: (Config, is it tested)} of these sections; what several of them show stands once."""
    found = {}
    for name in sections:
        test = experiments.SECTIONS[name].test
        for cfg in section_runs(name, session):
            tested_before = found.get(run_name(cfg), (cfg, False))[1]
            found[run_name(cfg)] = cfg, test or tested_before
    return found


def flop_left(cfg: Config, store: BackedUpStore, test: bool) -> float:
    """FLOP that a run still needs."""
    if is_done(cfg, store, test):
        return 0.0
    left = 1 - rounds_stored(cfg, store) / cfg.length
    return left * flop_of(cfg, test)


def searches_left(names: Iterable[str], session: Session) -> tuple[int, float]:
    """(runs, FLOP) that the unfinished searches of these sections usually still take."""
    like = []
    for name in names:
        section = experiments.SECTIONS[name]
        if section.searched and session.scale.searches:
            cells = section.cells(session).values()
            like += [experiments.searched_like(cfg, session) for cfg in cells]
    runs, flop = 0, 0.0
    for cfg in experiments._unlike(like):
        found = experiments.ladder(cfg, session.store)
        if found.finished:
            continue
        left = max(len(found.todo), experiments.RUNGS - len(found.scores))
        runs += left
        flop += left * flop_of(cfg, False)
    return runs, flop


def rounds_stored(cfg: Config, store: BackedUpStore) -> int:
    """Rounds (or epochs) in the newest checkpoint, by its name."""
    paths = store.known_checkpoints(cfg)
    if not paths:
        return 0
    return int(paths[-1].name.split("_")[0])


def history_stored(cfg: Config, store: BackedUpStore) -> list[dict]:
    """The history so far: the result's, else that of the newest sound checkpoint."""
    result = store.result(cfg)
    if result:
        return result["history"]
    for path in reversed(store.known_checkpoints(cfg)):
        history = history_in(path)
        if history is not None:
            return history
    return []


@cache  # the name has the SHA-256 of the content; it may be on a slow drive
def history_in(checkpoint: Path) -> list[dict] | None:
    """The history in a checkpoint; None where it is cut or damaged.

    Training will say so, and resume from an older one.
    """
    try:
        with safetensors.safe_open(checkpoint, "pt") as file:  # reads the header, no weights
            return json.loads(file.metadata()["card"])["history"]
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


class Stopped(KeyboardInterrupt):
    """Ends a cell whose training was stopped before its time, and with it *Run all*."""

    def _render_traceback_(self) -> list[str]:
        # what IPython shows in place of a traceback
        return ["Stopped. Nothing is lost: run this cell again, or all, to go on from here."]


def stop_unless(done: bool, session: Session):
    """Raises Stopped where training was stopped, by hand or by an error of a worker.

    Not at the end of HOURS, after which no cell trains any more and all can show what is stored,
    nor in a frozen store.
    """
    if not done and not session.store.frozen and time.monotonic() < session.stop_at:
        raise Stopped


def train_sections(session: Session, *names: str):
    """Trains what is missing of these sections, under a picture that grows.

    Stop the cell at will: what was begun is stored, and running it again goes on. Raises Stopped
    then, so that the cells below do not begin with what is half done.
    """
    live = Live()
    done = True
    for name in names:
        done = done and not experiments.run_section(name, session, live)
    live.finish()
    stop_unless(done, session)


class Live:
    """The picture that grows while runs train; called with a run and its history.

    Updated in place at every evaluation, unless these come so fast that drawing would take more
    than a tenth of the time; where there is no display, a line of text.
    """

    def __init__(self):
        self.handle = None
        self.next_at = -math.inf  # time of the next picture
        self.latest = None  # (run, history) that has not been drawn yet

    def __call__(self, cfg: Config, history: Iterable[dict]):
        self.latest = cfg, list(history)
        if not has_display():
            row = self.latest[1][-1]
            accuracy = 100 * row.get("val_top1", math.nan)
            print(f"{run_name(cfg)}: {row['round']} of {cfg.length}, validation {accuracy:.1f} %",
                  flush=True)
        elif time.monotonic() >= self.next_at:
            self.draw()

    def finish(self):
        """Shows the last evaluation, if it came too soon after the one before."""
        if self.latest is not None and has_display():
            self.draw()

    def draw(self):
        began = time.monotonic()
        content = HTML(picture_of(*self.latest))
        if self.handle is None:
            self.handle = display(content, display_id=True)
        else:
            self.handle.update(content)
        self.latest = None
        ended = time.monotonic()
        self.next_at = ended + 10 * (ended - began)


def has_display() -> bool:
    """Whether an output can be updated in place: in a notebook, not in a terminal."""
    return getattr(get_ipython(), "kernel", None) is not None


def picture_of(cfg: Config, history: list[dict]) -> str:
    """Loss and validation accuracy so far, as an <img> with a title; "" without an evaluation."""
    evaluated = [row for row in history if "val_top1" in row]
    if not evaluated:
        return ""
    unit = "epoch" if cfg.centralized else "round"
    fig, (left, right) = figure(PAGE, 1.9, ncols=2)
    kinds = [("train_loss", "training"), ("val_loss", "validation")]
    for i, (name, label) in enumerate(kinds):
        rows = [row for row in history if name in row]
        at = [row["round"] for row in rows]
        losses = [row[name] for row in rows]
        style = look(i)
        if name == "train_loss":
            # there is one every round, which a line shows; a single one it does not
            style["marker"] = "" if len(rows) > 1 else "."
        left.plot(at, losses, label=label, **style)
    rounds = [row["round"] for row in evaluated]
    accuracies = [100 * row["val_top1"] for row in evaluated]
    right.plot(rounds, accuracies, **look(1))
    left.set(ylabel="loss (nats)")
    right.set(ylabel="validation top-1 (%)")
    for ax in (left, right):
        ax.set(xlabel=unit, xlim=(0, 1.02 * cfg.length))
        whole_numbers(ax)
    left.legend()
    if cfg.dataset == "synthetic":
        mark_synthetic(fig)
    name = run_name(cfg)
    said = [f"{y:.1f} % at {unit} {x}" for x, y in zip(rounds, accuracies, strict=True)]
    alt = f"Validation accuracy of {name}: {', '.join(said)}"
    image = as_image(png_of(fig), alt, "44em")
    now = history[-1]["round"]
    return f"<div><b>{name}</b>, {unit} {now} of {cfg.length}</div>{image}"


# ------------------------------------------------------------------ drawing
def means_of(frame: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, half-width of the 95 % t interval over seeds) of y, at every x that has one."""
    groups = frame.dropna(subset=[y]).groupby(x, sort=True)[y]
    found = [(at, *t_interval(values)) for at, values in groups]
    if not found:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    at, mean, half = zip(*found, strict=True)
    return np.array(at), np.array(mean), np.array(half)


def draw_line(ax, frame: pd.DataFrame, x: str, y: str, i: int, label: str, every: bool = False):
    """The i-th series: means with 95 % intervals; with `every` a band and no markers."""
    at, mean, half = means_of(frame, x, y)
    if len(at) == 0:
        return
    style = look(i)
    if not every:
        draw_bars(ax, at, mean, half, label, style)
        return
    ax.plot(at, mean, label=label, **style | {"marker": ""})
    ax.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)


def draw_bars(ax, at, mean, half, label: str, style: dict):
    """Means with bars; single runs have none, in the key neither."""
    if np.isnan(half).all():
        half = None
    ax.errorbar(at, mean, half, label=label, capsize=2, elinewidth=0.8, **style)


def draw_lines(ax, frame: pd.DataFrame, x: str, y: str, by: str, order: Iterable = (), **options):
    """A line for each value of `by`, in the given order or that of appearance."""
    for i, value in enumerate(list(order) or frame[by].unique()):
        part = frame[frame[by] == value]
        draw_line(ax, part, x, y, i, words(value), **options)


def draw_points(ax, frame: pd.DataFrame, x: str, y: str, by: str, x_order: list, order: list):
    """Categories on x, side by side for each value of `by`: means with 95 % intervals."""
    width = 0.7 / max(1, len(order))
    for i, value in enumerate(order):
        part = frame[(frame[by] == value) & frame[x].isin(x_order)]
        shift = (i - (len(order) - 1) / 2) * width
        part = part.assign(at=part[x].map(x_order.index))
        at, mean, half = means_of(part, "at", y)
        if len(at):
            style = look(i) | {"linestyle": "none"}
            draw_bars(ax, at + shift, mean, half, words(value), style)
    ax.set_xticks(range(len(x_order)), [words(name) for name in x_order])
    ax.set_xlim(-0.5, len(x_order) - 0.5)
    ax.grid(visible=False, axis="x")


def widen(ax, points: float = 2.0):
    """Widens a y axis of accuracies to `points` at least: what differs by chance must look it."""
    low, high = ax.get_ylim()
    more = max(0, points - (high - low)) / 2
    ax.set_ylim(low - more, high + more)


def draw_start(ax, session: Session):
    """A line at the test accuracy before any training, the fitted head on frozen features.

    Only the centralised baseline is tested there; all runs begin with the same head.
    """
    start = experiments.test_of_start(session)
    if not math.isnan(start):
        ax.axhline(start, color="0.4", linestyle=":", linewidth=1, label="untrained start (test)")


def legend_above(fig: Figure, columns: int, title: str | None = None):
    """One key for all axes, above them: inside it would hide bars."""
    found = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        fig.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns,
                   title=title, frameon=False)


def tilt(ax):
    """Long names on x, each ending at its tick."""
    for label in ax.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")


def leave_out_collapse(ax, accuracies: Iterable[float], points: float = 12.0) -> str:
    """Ends a y axis so far below the best, for what collapses would leave no room for the others.

    A sentence on what is not to be seen, diverged runs (NaN) among it; "" where all is.
    """
    accuracies = list(accuracies)
    known = [a for a in accuracies if not math.isnan(a)]
    diverged = len(accuracies) - len(known)
    if not known:
        return ""
    low = max(min(known) - 1, max(known) - points)
    ax.set_ylim(low, max(known) + 1)
    below = sum(a < low for a in known)
    said = []
    if below:
        said.append(f"{below} of {len(accuracies)} runs end below the axis")
    if diverged:
        said.append(f"{diverged} diverged")
    return ", ".join(said) + "." if said else ""


def whole_numbers(ax):
    """Ticks at whole rounds or epochs."""
    ax.xaxis.get_major_locator().set_params(integer=True)


def log_rates(ax):
    log_axis(ax, "learning rate, η (log scale)")


def log_axis(ax, label: str):
    """A logarithmic x axis with plain numbers."""
    ax.set_xscale("log")
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")


def stored_labels(runs: pd.DataFrame, shardings: Iterable, value: str) -> list[str]:
    """The labels of those shardings of which a run with this value is stored."""
    known = set(runs.dropna(subset=value).sharding)
    return [where for where in nc_labels(shardings) if where in known]


def frames_or_note(session: Session, name: str, section: str, value: str = "val"):
    """`section_frames`; None, and a note in the figure's place, where nothing is stored yet.

    What it draws is `value`: a run of a search has no accuracy on test before its turn comes. What
    is missing stands under the figure, see `note_missing`.
    """
    runs, history = section_frames(section, session, quiet=True)
    if runs[value].notna().any():
        return runs, history
    note(f"{name}: none of its {len(section_runs(section, session))} runs is stored yet")
    return None


def note(text: str):
    """A sentence in the place of a figure that would be empty."""
    display(HTML(f"<p><i>{html.escape(text)}</i></p>"))


def note_missing(session: Session, fig: Figure, *sections: str, also: str = ""):
    """Says under the figure what it lacks, what its bars are, and what `also` says."""
    wanted = [cfg for cfg, _ in runs_of(sections, session).values()]
    results = {cfg: session.store.result(cfg) for cfg in wanted}
    stored = [cfg for cfg, result in results.items() if result is not None]
    diverged = sum(results[cfg]["status"] == "diverged" for cfg in stored)
    seeds = {cfg.seed for cfg in stored}
    said = "Bars: 95 % t interval over seeds." if len(seeds) > 1 else "One seed."
    if diverged:
        said += f" {diverged} of {len(wanted)} runs diverged."
    if len(stored) < len(wanted):
        said += f" {len(wanted) - len(stored)} of {len(wanted)} runs are not there yet."
    say_below(fig, f"{said} {also}")


def say_below(fig: Figure, said: str):
    """A small line under a figure."""
    fig.supxlabel(said.strip(), fontsize=6.5, color="0.3")


# ------------------------------------------------------------------ figures: the data
def draw_images(session: Session):
    """Eight training images, and each as a training step may see it."""
    data = load_data(session.base)
    shown = data.images[data.train[:8]]
    seen = augment(shown, rng("epoch", 0), session.base.augmentation)
    both = torch.cat([shown, seen]).cpu()
    grid = torchvision.utils.make_grid(both, nrow=8, padding=1, pad_value=255)
    fig, ax = figure(PAGE, 1.8)
    ax.imshow(grid.permute(1, 2, 0))
    ax.set_axis_off()
    save_figure(session, fig, "01_images", "Eight training images above their augmented copies")
    print(f"{len(data.train)} training, {len(data.val)} validation, {len(data.test_labels)} test "
          "images")


def draw_shards(session: Session, name: str, shardings: Iterable[dict]):
    """Which classes each client holds: images by client and class, a panel a sharding.

    A sharding is what it changes in the configuration, such as {"classes_per_client": 5}.
    """
    data = load_data(session.base)
    labels = data.labels[data.train].cpu().numpy()
    cfgs = [replace(session.base, **sharding) for sharding in shardings]
    fig, axes = panels(len(cfgs), 2.0)
    for ax, cfg in zip(axes, cfgs, strict=True):
        shards = shard(labels, cfg.num_clients, cfg.classes_per_client, cfg.seed,
                       cfg.dirichlet_alpha)
        counts = [np.bincount(labels[members], minlength=100) for members in shards]
        ax.imshow(np.array(counts), cmap="Greys", norm="symlog", aspect="auto",
                  interpolation="nearest")
        ax.set(title=words(experiments.sharding_label(cfg)), xlabel="class", xticks=[0, 50, 99])
        ax.grid(visible=False)
    axes[0].set_ylabel("client")
    save_figure(session, fig, name, "Images of each class (columns) that each client (rows) holds; "
                "darker is more, white is none")


# ------------------------------------------------------------------ figures: searches
def rates_of(section: str, session: Session) -> pd.DataFrame:
    """A row a rate that was tried: the section's label columns, `tried` and val (%, last round; NaN
    of a run that diverged)."""
    columns = experiments.SECTIONS[section].columns
    rows = []
    for label, cfg in experiments.SECTIONS[section].cells(session).items():
        if experiments.of_stand_in(cfg, session):
            continue  # what is stored is of another cell
        like = experiments.searched_like(cfg, session)
        scores = experiments.stored_rates(like, session.store)
        about = dict(zip(columns, label, strict=True))
        for lr, score in scores.items():
            val = math.nan if score == -math.inf else 100 * score
            rows.append(about | {"tried": lr, "val": val})
    return pd.DataFrame(rows, columns=[*columns, "tried", "val"])


def draw_searches(session: Session, name: str, sections: dict[str, str]):
    """Validation accuracy against the rate, a panel a section: {section: its label's column}."""
    tables = {section: rates_of(section, session) for section in sections}
    shown = {section: tried for section, tried in tables.items() if tried.val.notna().any()}
    if not shown:
        note(f"{name}: no rate is stored yet")
        return
    fig, axes = panels(len(shown), 2.3)
    for ax, (section, tried) in zip(axes, shown.items(), strict=True):
        column = sections[section]
        draw_lines(ax, tried, "tried", "val", column)
        ax.set_title(words(column))
        log_rates(ax)
        ax.legend()
    axes[0].set_ylabel("validation top-1 (%)")
    left_out = leave_out_collapse(axes[0], pd.concat(shown.values()).val)
    say_below(fig, f"One seed. {left_out}")
    save_figure(session, fig, name, "Validation accuracy against the learning rate, one line for "
                "each value of " + ", ".join(map(words, sections.values())))


def draw_rates_of_grid(session: Session):
    """How wide the range of good rates is: accuracy against rate by sharding, a panel a J."""
    tried = rates_of("grid", session)
    if tried.val.isna().all():
        note("03_rates: no rate is stored yet")
        return
    steps = [j for j in session.scale.local_steps if j in set(tried.local_steps)]
    order = nc_labels(session.scale.shardings)
    fig, axes = panels(len(steps), 2.5)
    for ax, j in zip(axes, steps, strict=True):
        draw_lines(ax, tried[tried.local_steps == j], "tried", "val", "sharding", order)
        ax.set_title(f"J = {j}")
        log_rates(ax)
    left_out = leave_out_collapse(axes[0], tried.val)
    say_below(fig, f"One seed. {left_out}")
    axes[0].set_ylabel("validation top-1 (%)")
    legend_above(fig, len(order))
    save_figure(session, fig, "03_rates", "Validation accuracy against the learning rate, a line a "
                "sharding, a panel a number of local steps")


# ------------------------------------------------------------------ figures: notebooks 1 and 2
def draw_centralized_curves(session: Session):
    """Loss and accuracy of the baseline on training, validation and test images, by epoch."""
    found = frames_or_note(session, "01_curves", "centralized")
    if found is None:
        return
    history = found[1]
    names = dict(train="training", val="validation", test="test, which chooses nothing")
    fig, (left, right) = figure(PAGE, 1.8, ncols=2)
    for i, part in enumerate(names):
        label = names[part]
        draw_line(left, history, "round", f"{part}_loss", i, label)
        if part != "train":
            draw_line(right, history, "round", f"{part}_top1", i, label)
    left.set(xlabel="epoch", ylabel="loss (nats)")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for ax in (left, right):
        whole_numbers(ax)
    legend_above(fig, 3)
    note_missing(session, fig, "centralized")
    save_figure(session, fig, "01_curves", "Training, validation and test loss, and validation and "
                "test accuracy, against the epoch")


def draw_epochs(session: Session):
    """Test accuracy of whole runs of 1, 2, 4 ... epochs: does a longer run still gain?"""
    found = frames_or_note(session, "01_epochs", "centralized_epochs", "test")
    if found is None:
        return
    runs = found[0]
    fig, ax = figure()
    draw_line(ax, runs, "epochs", "test", 0, "test")
    draw_line(ax, runs, "epochs", "val", 1, "validation")
    ax.set(xscale="log", xlabel="epochs of the whole run (log scale)", ylabel="top-1 (%)")
    ax.set_xticks(session.scale.epochs, [str(n) for n in session.scale.epochs])
    ax.minorticks_off()
    draw_start(ax, session)
    legend_above(fig, 3)
    note_missing(session, fig, "centralized_epochs")
    save_figure(session, fig, "01_epochs", "Test and validation accuracy against the number of "
                "epochs of the run")


def draw_protocol(session: Session):
    """Validation accuracy by augmentation and head, all weights and a tenth, over the start."""
    found = frames_or_note(session, "02_protocol", "protocol")
    if found is None:
        return
    runs = found[0].assign(gain=lambda r: r.val - r.start)
    augmentations = ["none", "flip", "crop_flip"]
    known = set(runs.dropna(subset="gain")["weights trained"])
    kinds = [kind for kind in ("dense", "least_sensitive") if kind in known]
    fig, axes = panels(len(kinds), 2.6)
    for ax, kind in zip(axes, kinds, strict=True):
        part = runs[runs["weights trained"] == kind]
        draw_points(ax, part, "augmentation", "gain", "head", augmentations,
                    ["logistic", "lda", "ridge"])
        ax.axhline(0, color="0.4", linestyle=":", linewidth=1)
        ax.set_title(f"{words(kind)}" if kind == "dense" else "the least sensitive tenth")
        ax.set_xlabel("augmentation")
    axes[0].set_ylabel("gain on validation (points)")
    legend_above(fig, 3, "head")
    note_missing(session, fig, "protocol")
    save_figure(session, fig, "02_protocol", "Gain in validation accuracy over the untrained "
                "start, by augmentation and head, for all weights and for a tenth")


def draw_fedavg_curves(session: Session):
    """Loss and accuracy by round for runs of several lengths; centralised training as a line."""
    found = frames_or_note(session, "02_curves", "fedavg_iid")
    if found is None:
        return
    history = found[1]
    fig, (left, right) = figure(PAGE, 1.85, ncols=2)
    for i, length in enumerate(history.rounds.unique()):
        part = history[history.rounds == length]
        draw_line(left, part, "round", "val_loss", i, f"T = {length}")
        draw_line(right, part, "round", "val_top1", i, f"T = {length}")
    draw_line(left, history[history.rounds == history.rounds.max()], "round", "train_loss", 4,
              "clients' own batches (loss)", every=True)
    ceiling = centralized_accuracy(session)
    if not math.isnan(ceiling):
        right.axhline(ceiling, color="0.2", linestyle="--", linewidth=1, label="centralised")
    left.set(xlabel="round", ylabel="validation loss (nats)")
    right.set(xlabel="round", ylabel="validation top-1 (%)")
    widen(right)
    for ax in (left, right):
        whole_numbers(ax)
    legend_above(fig, 5)
    note_missing(session, fig, "fedavg_iid")
    save_figure(session, fig, "02_curves", "Loss and validation accuracy of FedAvg with IID "
                "clients against the round")


def centralized_accuracy(session: Session, column: str = "val") -> float:
    """Mean accuracy (%) of the stored centralised baseline; NaN without any."""
    cfgs = section_runs("centralized", session)
    results = [r for r in map(session.store.result, cfgs) if r]
    return experiments.frames(results)[0][column].mean()


def draw_norms(session: Session):
    """Norm of the clients' task vectors and of their mean, by round."""
    found = frames_or_note(session, "02_norms", "fedavg_iid")
    if found is None:
        return
    history = found[1]
    history = history[history.rounds == history.rounds.max()]
    fig, ax = figure()
    draw_line(ax, history, "round", "client_norm", 0, "clients (root mean square)", every=True)
    draw_line(ax, history, "round", "mean_norm", 1, "their mean", every=True)
    ax.set(xlabel="round", ylabel="norm of the task vector")
    ax.set_ylim(0)
    whole_numbers(ax)
    ax.legend()
    several = history.seed.nunique() > 1
    say_below(fig, "Bands: 95 % t interval over seeds." if several else "One seed.")
    save_figure(session, fig, "02_norms", "Norms of the clients' task vectors and of their mean")


# ------------------------------------------------------------------ figures: notebook 3
def draw_grid(session: Session):
    """Test accuracy by sharding and number of local steps."""
    found = frames_or_note(session, "03_grid", "grid", "test")
    if found is None:
        return
    runs = found[0]
    shardings = nc_labels(session.scale.shardings)
    fig, ax = figure(PAGE, 2.4)
    draw_points(ax, runs.assign(steps=j_labels(runs.local_steps)), "sharding", "test",
                "steps", shardings, j_labels(session.scale.local_steps))
    draw_start(ax, session)
    ax.set_ylabel("test top-1 (%)")
    widen(ax)
    legend_above(fig, 4)
    note_missing(session, fig, "grid")
    save_figure(session, fig, "03_grid", "Test accuracy for IID clients and for 50, 10, 5 and 1 "
                "classes a client, with 4, 8 and 16 local steps")


def draw_grid_curves(session: Session):
    """Validation accuracy against local steps taken, so that cells of different J share an axis."""
    found = frames_or_note(session, "03_curves", "grid")
    if found is None:
        return
    history = found[1].assign(steps=lambda h: h["round"] * h.local_steps)
    steps = [j for j in session.scale.local_steps if j in set(history.local_steps)]
    order = nc_labels(session.scale.shardings)
    fig, axes = panels(len(steps), 2.5)
    for ax, j in zip(axes, steps, strict=True):
        draw_lines(ax, history[history.local_steps == j], "steps", "val_top1", "sharding", order)
        ax.set(title=f"J = {j}", xlabel="local steps, J × round")
    axes[0].set_ylabel("validation top-1 (%)")
    legend_above(fig, len(order))
    note_missing(session, fig, "grid")
    save_figure(session, fig, "03_curves", "Validation accuracy against local steps, a line a "
                "sharding, a panel a number of local steps")


def drift_of(session: Session) -> pd.DataFrame:
    """How far clients go and how far they agree: a row a rate that was tried in a cell of the grid.

    Columns: sharding, local_steps, lr; cosine, the mean over pairs of a round's clients, and speed,
    the norm of a task vector over the round's rate, both means over the rounds of seed 0. By rate,
    for both depend on it: cells at rates of their own would compare rates rather than shardings.
    """
    clients = utils.cohort_size(session.base.num_clients, session.base.participation)
    rows = []
    for (sharding, steps), cfg in experiments.SECTIONS["grid"].cells(session).items():
        if experiments.of_stand_in(cfg, session):
            continue
        like = experiments.searched_like(cfg, session)
        for lr in experiments.stored_rates(like, session.store):
            result = session.store.result(replace(like, lr=lr))
            rounds = [row for row in result["history"] if row.get("client_norm") and row["lr"] > 0]
            if result["status"] == "finished" and rounds:
                rows.append(dict(sharding=sharding, local_steps=steps, lr=lr,
                                 cosine=np.mean([mean_cosine(row, clients) for row in rounds]),
                                 speed=np.mean([row["client_norm"] / row["lr"] for row in rounds])))
    return pd.DataFrame(rows, columns=["sharding", "local_steps", "lr", "cosine", "speed"])


def mean_cosine(row: dict, clients: int) -> float:
    """Of a round's stored norms: with M clients, norms |t| and mean m, (M |m|^2 / mean |t|^2 - 1) /
    (M - 1) is the mean cosine over pairs, weighted by their norms."""
    ratio = (row["mean_norm"] / row["client_norm"]) ** 2
    return (clients * ratio - 1) / (clients - 1)


def draw_drift(session: Session):
    """How far clients go, and how far they agree, by rate and sharding, for the fewest local
    steps."""
    steps = session.scale.local_steps[0]
    drift = drift_of(session)
    drift = drift[drift.local_steps == steps]
    if drift.empty:
        note("03_drift: no rate is stored yet")
        return
    order = nc_labels(session.scale.shardings)
    fig, (left, right) = figure(PAGE, 1.8, ncols=2)
    draw_lines(left, drift, "lr", "cosine", "sharding", order)
    draw_lines(right, drift, "lr", "speed", "sharding", order)
    left.set_ylabel("mean cosine of two clients")
    right.set(ylabel="vector norm / η", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for ax in (left, right):
        log_rates(ax)
    legend_above(fig, len(order))
    say_below(fig, f"J = {steps}, one seed.")
    save_figure(session, fig, "03_drift", "Mean cosine between the task vectors of two clients, "
                "and the norm of a task vector over the rate, against the rate, a line a sharding")


def drift_at_one_rate(session: Session, one: str, other: str) -> tuple | None:
    """(rate, row, row) of `drift_of` for two shardings, at the rate nearest to the middle of their
    own that was tried in both; None without any."""
    steps = session.scale.local_steps[0]
    drift = drift_of(session)
    rows = [drift[(drift.sharding == where) & (drift.local_steps == steps)].set_index("lr")
            for where in (one, other)]
    both = rows[0].index.intersection(rows[1].index)
    if both.empty:
        return None
    cells = experiments.SECTIONS["grid"].cells(session)
    middle = math.sqrt(cells[one, steps].lr * cells[other, steps].lr)
    lr = min(both, key=lambda rate: abs(math.log(rate / middle)))
    return lr, rows[0].loc[lr], rows[1].loc[lr]


# ------------------------------------------------------------------ figures: notebook 4
def mask_overlaps(session: Session) -> pd.DataFrame:
    """Intersection over union of the masks of R calibration rounds, IID, seed 0; kept as a note."""
    cells = experiments.SECTIONS["calibration"].cells(session)
    first = experiments.nc_label(session.scale.sweep_shardings[0])
    cfgs = {r: cells[first, r] for r in session.scale.calibration_rounds}
    found = extension.overlaps(list(cfgs.values()), session.store)
    names = [f"R = {r}" for r in cfgs]
    return pd.DataFrame(found.get("iou"), names, names).round(2)


def draw_composition(session: Session):
    """The share of each kind of layer that the masks free, for those where it is at least 1 %."""
    cells = experiments.SECTIONS["calibration"].cells(session)
    rows = []
    for (_, rounds), cfg in cells.items():
        result = session.store.result(cfg)
        if not result or "mask" not in result:
            continue
        for layer, (free, size) in result["mask"]["per_layer"].items():
            rows.append(dict(layer=layer_words(layer), R=rounds, free=100 * free / size))
    if not rows:
        frames_or_note(session, "04_composition", "calibration")
        return
    frame = pd.DataFrame(rows).groupby(["layer", "R"], sort=False).free.mean().reset_index()
    most = frame.groupby("layer").free.max().sort_values(ascending=False)
    shown = list(most[most >= 1].index)

    fig, ax = figure(PAGE, 0.9 + 0.2 * len(shown))
    for i, rounds in enumerate(sorted(frame.R.unique())):
        part = frame[(rounds == frame.R) & frame.layer.isin(shown)]
        ax.plot(part.free, part.layer.map(shown.index), label=f"R = {rounds}",
                **look(i) | {"linestyle": "none"})
    ax.set_yticks(range(len(shown)), shown)
    ax.invert_yaxis()
    ax.set_xlabel("trainable share of the layer's weights (%)")
    ax.legend(loc="lower right")
    save_figure(session, fig, "04_composition", "Share of each kind of layer that may be trained: "
                + ", ".join(f"{layer} {most[layer]:.0f} %" for layer in shown))
    print(f"In the other {len(most) - len(shown)} kinds of layers less than 1 % is trainable.")


def layer_words(layer: str) -> str:
    """"attn.query.weight" as "attention query weight"."""
    for short, long in (("attn", "attention"), ("fc1", "in"), ("fc2", "out"), ("mlp", "MLP"),
                        ("proj", "projection"), ("patch_embed", "patch embedding")):
        layer = layer.replace(short, long)
    return layer.replace(".", " ").replace("_", " ")


def draw_six_models(session: Session):
    """Test accuracy of {centralised, IID, non-IID} x {dense, sparse}."""
    found = frames_or_note(session, "04_six_models", "six_models", "test")
    if found is None:
        return
    runs = found[0]
    fig, ax = figure()
    draw_points(ax, runs, "data", "test", "weights trained", list(runs.data.unique()),
                ["dense", "sparse"])
    draw_start(ax, session)
    ax.set_ylabel("test top-1 (%)")
    widen(ax)
    legend_above(fig, 2)
    note_missing(session, fig, "six_models")
    save_figure(session, fig, "04_six_models", "Test accuracy of centralised, IID and non-IID "
                "training, of all weights and of the least sensitive tenth")


def draw_sweep(session: Session, section: str, column: str, label: str, name: str):
    """Test accuracy against sparsity or calibration rounds, a line a sharding."""
    found = frames_or_note(session, name, section, "test")
    if found is None:
        return
    runs = found[0]
    if column == "sparsity":
        runs = runs.assign(sparsity=100 * (1 - runs.sparsity))
    fig, ax = figure()
    order = nc_labels(session.scale.sweep_shardings)
    draw_lines(ax, runs, column, "test", "sharding", order)
    draw_start(ax, session)
    values = sorted(runs[column].unique())
    ax.set(xscale="log", xlabel=label, ylabel="test top-1 (%)")
    ax.set_xticks(values, [f"{v:g}" for v in values])
    ax.minorticks_off()
    widen(ax)
    legend_above(fig, 2)
    note_missing(session, fig, section)
    save_figure(session, fig, name, f"Test accuracy against {label}, a line a sharding")


def draw_traffic(session: Session):
    """Validation accuracy against what was sent so far, dense and sparse."""
    found = frames_or_note(session, "04_traffic", "six_models")
    if found is None:
        return
    history = found[1]
    history = history[history.algorithm != "centralized"].sort_values("round")
    sent = (history.bytes_up + history.bytes_down).fillna(0)
    history = history.assign(GB=sent.groupby(history.run).cumsum() / 1e9)
    trained = history["weights trained"].map(words)
    history["model"] = history.data.map(words) + ", " + trained
    fig, ax = figure(height=2.6)
    draw_lines(ax, history[history.GB > 0], "GB", "val_top1", "model", sorted(set(history.model)))
    ax.set(xscale="log", xlabel="sent up and down (GB, log scale)", ylabel="validation top-1 (%)")
    ax.xaxis.set_major_formatter("{x:g}")
    widen(ax)
    legend_above(fig, 2)
    note_missing(session, fig, "six_models")
    save_figure(session, fig, "04_traffic", "Validation accuracy against gigabytes sent, all "
                "weights and a tenth")


# ------------------------------------------------------------------ figures: notebook 5
def draw_rules(session: Session):
    """Test accuracy of every mask rule at its own rate, by sharding."""
    found = frames_or_note(session, "05_rules", "rules", "test")
    if found is None:
        return
    runs = found[0]
    shardings = stored_labels(runs, session.scale.rule_shardings, "test")
    fig, ax = figure(PAGE, 2.6)
    draw_points(ax, runs, "sharding", "test", "rule", shardings, ["dense", *session.scale.rules])
    draw_start(ax, session)
    ax.set_ylabel("test top-1 (%)")
    widen(ax)
    legend_above(fig, 4)
    note_missing(session, fig, "rules")
    save_figure(session, fig, "05_rules", "Test accuracy of all weights and of six rules that free "
                "a tenth of them, each at its own rate, by sharding")


def draw_map(session: Session):
    """Gain over the untrained start against the rate: for which rates does training help?"""
    found = frames_or_note(session, "05_map", "rate_map")
    if found is None:
        return
    fig, axes, left_out = draw_gains(session, found[0], "lr")
    for ax in axes:
        log_rates(ax)
    say_below(fig, f"One seed. {left_out}")
    save_figure(session, fig, "05_map", "Gain in validation accuracy over the untrained start "
                "against the learning rate, a line a rule, a panel a sharding")


def draw_map_by_length(session: Session):
    """The same runs against the length of a client's first task vector: what a rule gains when all
    move equally far."""
    found = frames_or_note(session, "05_map_by_length", "rate_map")
    if found is None:
        return
    runs, history = found
    first = history[history["round"] == 1].drop_duplicates("run").set_index("run").client_norm
    fig, axes, left_out = draw_gains(session, runs.assign(length=runs.run.map(first)), "length")
    for ax in axes:
        log_axis(ax, "length of τ, round 1 (log scale)")
    say_below(fig, f"One seed. {left_out}")
    save_figure(session, fig, "05_map_by_length", "Gain in validation accuracy over the untrained "
                "start against the length of a client's first task vector, a line a rule, a panel "
                "a sharding")


def draw_gains(session: Session, runs: pd.DataFrame, x: str):
    """(figure, axes, what they leave out): gain over the untrained start against `x`, a panel a
    sharding."""
    runs = runs.assign(gain=runs.val - runs.start)
    shardings = stored_labels(runs, session.scale.map_shardings, "val")
    order = ["dense", *session.scale.rules]   # of all, so that a rule looks the same everywhere
    fig, axes = panels(len(shardings), 2.6)
    for ax, where in zip(axes, shardings, strict=True):
        draw_lines(ax, runs[runs.sharding == where], x, "gain", "rule", order)
        ax.axhline(0, color="0.4", linestyle=":", linewidth=1)
        ax.set_title(words(where))
    left_out = leave_out_collapse(axes[0], runs.gain)
    axes[0].set_ylabel("gain on validation (points)")
    legend_above(fig, len(session.scale.map_rules))
    return fig, axes, left_out


def ranges_of(session: Session) -> dict[tuple, experiments.Range]:
    """{(rule, sharding): range} of the map, as far as it is stored."""
    runs, _ = section_frames("rate_map", session, quiet=True)
    runs = runs.assign(gain=runs.val - runs.start)
    found = {}
    for key, part in runs.groupby(["rule", "sharding"], sort=False):
        gains = part.sort_values("lr").set_index("lr").gain
        if gains.notna().any():
            found[key] = experiments.range_around_best(gains)
    return found


def range_table(session: Session) -> pd.DataFrame:
    """Of each rule and sharding: the best gain on validation, and the rates that gain."""
    rows = {}
    for key, found in ranges_of(session).items():
        rates = "none"
        if found.gain > 0:
            rates = str(found)
        rows[key] = {"best gain on validation (points)": round(found.gain, 2),
                     "rates around the best that gain": rates}
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_speed_matched(session: Session):
    """Rules at rates of equal speed beside rules at rates of their own."""
    found = frames_or_note(session, "05_speed", "speed_matched", "test")
    if found is None:
        return
    matched = found[0].assign(at="rates of equal speed")
    own = section_frames("rules", session, quiet=True)[0].assign(at="rates of their own")
    runs = pd.concat([own, matched])
    shardings = stored_labels(runs, session.scale.map_shardings, "test")
    fig, axes = panels(len(shardings), 2.6)
    for ax, where in zip(axes, shardings, strict=True):
        draw_points(ax, runs[runs.sharding == where], "rule", "test", "at",
                    list(session.scale.rules), list(runs["at"].unique()))
        ax.set_title(words(where))
        tilt(ax)
    axes[0].set_ylabel("test top-1 (%)")
    legend_above(fig, 2)
    note_missing(session, fig, "speed_matched")
    save_figure(session, fig, "05_speed", "Test accuracy of rules at rates proportional to one "
                "over the Fisher mass they free, beside rates of their own")


def draw_methods(session: Session):
    """Test accuracy of server algorithms, all weights and a tenth, by sharding."""
    found = frames_or_note(session, "05_methods", "methods", "test")
    if found is None:
        return
    fig = draw_servers(session, found[0], ["dense", "masked"])
    note_missing(session, fig, "methods")
    save_figure(session, fig, "05_methods", "Test accuracy of FedAvg and other server algorithms, "
                "on all weights and on a tenth")


def draw_merges(session: Session):
    """Test accuracy of servers that merge: at rates of their own, and at FedAvg's length."""
    found = frames_or_note(session, "05_merges", "merges", "test")
    if found is None:
        return
    own = found[0]
    matched = section_frames("matched_merges", session, quiet=True)[0]
    matched = matched.assign(method=matched.method.str.removesuffix(", matched"))
    series = []
    for kind in ("dense", "masked"):
        shorter = f"{words(kind)}, FedAvg's length"
        matched = matched.replace({"weights trained": {kind: shorter}})
        series += [kind, shorter]
    fig = draw_servers(session, pd.concat([own, matched]), series)
    note_missing(session, fig, "merges", "matched_merges")
    save_figure(session, fig, "05_merges", "Test accuracy of FedAvg and of servers that merge task "
                "vectors, on all weights and on a tenth, at their own length and at FedAvg's")


def draw_servers(session: Session, runs: pd.DataFrame, series: list[str]) -> Figure:
    """Methods on x, a panel a sharding; `series` are kinds of weights that are trained."""
    shardings = list(runs.dropna(subset="test").sharding.unique())
    methods = list(runs.method.unique())
    fig, axes = panels(len(shardings), 2.7)
    for ax, where in zip(axes, shardings, strict=True):
        part = runs[runs.sharding == where]
        draw_points(ax, part, "method", "test", "weights trained", methods, series)
        draw_start(ax, session)
        ax.set_title(words(where))
        tilt(ax)
    axes[0].set_ylabel("test top-1 (%)")
    widen(axes[0])
    legend_above(fig, 3)
    return fig


def diagnoses(session: Session) -> pd.DataFrame:
    """How one cohort's task vectors get on at the start, by rule and sharding; kept as notes.

    norm: of a client's vector; cosine: mean over pairs; agreement: share of the movement that
    survives the sum, beside that of random signs; damage over gain: by how much the mean raises the
    loss of other clients, over what it takes from that of its own.
    """
    rows = {}
    images = 100 if session.preset == "demo" else 500
    for label, cfg in experiments.SECTIONS["rules"].cells(session).items():
        found = extension.diagnose(cfg, session.store, at="start", images=images)
        if not found:
            continue
        cosine = np.array(found["cosine"], dtype=float)   # None is no number
        pairs = cosine[np.triu_indices(len(cosine), 1)]
        rows[label] = {
            "norm": np.mean(found["norms"]), "cosine": pairs.mean(),
            "agreement": found["weighted_agreement"], "random signs": found["weighted_floor"],
            "damage over gain, one client": found["single"]["ratio"],
            "damage over gain, mean": found["mean"]["ratio"]}
    return pd.DataFrame.from_dict(rows, orient="index").round(3)


def draw_interference(session: Session):
    """What a client's first vector costs the others against what it gains for itself, by rate; and
    whether the cost at equal gain tells where the rules end."""
    measured = experiments.trade_offs(session)
    if measured.empty:
        note("05_interference: nothing is measured yet")
        return
    shardings = [where for where in nc_labels(session.scale.map_shardings)
                 if where in set(measured.sharding)]
    fig, axes = figure(PAGE, 2.0, ncols=len(shardings) + 1, squeeze=False)
    *curves, last = axes[0]
    for ax, where in zip(curves, shardings, strict=True):
        ax.sharey(curves[0])
        draw_trade_offs(ax, measured[measured.sharding == where], session)
        ax.set_title(words(where))
    curves[0].set_ylabel("damage (nats)")
    draw_cost(last, measured[measured.sharding == shardings[0]], session)
    last.set_title(words(shardings[0]))
    legend_above(fig, 5)
    bars = "One seed."
    if measured.seed.nunique() > 1:
        bars = "Bars: 95 % t interval over seeds."
    say_below(fig, f"Lines: means over clients and seeds, where both are positive. {bars}")
    save_figure(session, fig, "05_interference", "Damage that a client's first task vector does on "
                "other classes against its gain on its own classes, a line a rule along learning "
                "rates, a panel a sharding; and test accuracy against the damage at equal gain")


def of_trade_offs(session: Session) -> list[str]:
    """The masks in `experiments.trade_offs`, in the order of their colours."""
    return list(dict.fromkeys(rule for rule, _ in experiments.trade_off_cells(session)))


def in_curves(rule: str) -> bool:
    """Masks of one calibration round would crowd the curves: they stand among the costs alone."""
    return "once_" not in rule


def draw_trade_offs(ax, measured: pd.DataFrame, session: Session):
    """Damage against gain along the rates, means over seeds, a line a rule; both on log axes."""
    gains = []
    for i, rule in enumerate(of_trade_offs(session)):
        means = measured[measured.rule == rule].groupby("lr")[["gain", "damage"]].mean()
        means = means[(means.gain > 0) & (means.damage > 0)]  # a log axis has no others
        if len(means) and in_curves(rule):
            ax.plot(means.gain, means.damage, label=words(rule), **look(i))
            gains += list(means.gain)
    ends = [min(gains), max(gains)] if gains else []
    ax.plot(ends, ends, color="0.4", linestyle=":", linewidth=1, label="as much as is gained")
    ax.set_yscale("log")
    log_axis(ax, "own gain (nats)")


def draw_cost(ax, measured: pd.DataFrame, session: Session):
    """Test accuracy of each mask at its own rate against its damage at equal gain, one sharding."""
    where, = set(measured.sharding)
    gain = experiments.equal_gain(where)
    costs = experiments.damages(measured, gain).groupby("rule").damage.apply(list)
    cells = {label: cfg for label, cfg in experiments.trade_off_cells(session).items()
             if label[1] == where}
    for i, rule in enumerate(of_trade_offs(session)):
        cfgs = [replace(cfg, seed=seed) for label, cfg in cells.items() if label[0] == rule
                for seed in session.seeds]
        tests = gather(cfgs, session.store, quiet=True)[0].test.dropna()
        if rule in costs.index and len(tests):
            (x, dx), (y, dy) = t_interval(costs[rule]), t_interval(tests)
            label = None if in_curves(rule) else words(rule)
            ax.errorbar(x, y, dy, dx, capsize=2, elinewidth=0.8, label=label,
                        **look(i) | {"linestyle": "none"})
    ax.set_xlabel(f"damage at {gain:g} nats of gain")
    ax.set_ylabel("test top-1 (%)")


def damage_table(session: Session) -> pd.DataFrame:
    """The damage of each rule over that of all weights, at equal gain: does its order hang on the
    gain at which it is taken? Ratios with 95 % t intervals over seeds."""
    measured = experiments.trade_offs(session)
    table = {}
    gains = experiments.EQUAL_GAIN, experiments.ONE_CLASS_GAIN, *experiments.OTHER_GAINS
    for gain in sorted(gains):
        found = experiments.damages(measured, gain)
        for where in measured.sharding.unique():
            column = {}
            for rule in of_trade_offs(session):
                ratio, low, high = experiments.damage_ratio(found, rule, "dense", where)
                text = "–" if math.isnan(ratio) else f"{ratio:.2f}"
                if not math.isnan(low) and rule != "dense":
                    text += f" ({low:.2f} to {high:.2f})"
                column[rule] = text
            table[where, f"{gain:g} nats"] = column
    return pd.DataFrame(table).sort_index(axis=1, level=0, sort_remaining=False)


def consensus_table(session: Session) -> pd.DataFrame:
    """Test accuracy by who calibrates, the overlap with the central mask, and what is sent.

    An overlap is to be compared with that of two central masks, see `noise_floor`.
    """
    runs, _ = section_frames("consensus", session)
    table = interval_table(runs, ["combined by", "share of clients"], "sharding")
    cells = experiments.SECTIONS["consensus"].cells(session)
    for nc in session.scale.skews:
        where = experiments.nc_label(nc)
        here = {label[:2]: cfg for label, cfg in cells.items() if label[2] == where}
        found = extension.overlaps(list(here.values()), session.store)
        if found:
            overlaps = dict(zip(here, found["iou"][0], strict=True))
            table[f"overlap with the central mask, {words(where)}"] = pd.Series(overlaps).round(2)
    megabytes = {}
    for label, cfg in cells.items():
        result = session.store.result(cfg)
        if result and "mask" in result:
            megabytes[label[:2]] = result["mask"]["bytes_up"] / 1e6
    table["sent to calibrate (MB)"] = pd.Series(megabytes, dtype=float)
    return table.round(2)


def noise_floor(session: Session) -> str:
    """A sentence on the overlap of two central masks from disjoint images."""
    cfg = next(iter(experiments.SECTIONS["consensus"].cells(session).values()))
    found = extension.mask_noise_floor(cfg, session.store)
    if not found:
        return "The overlap of two central masks from disjoint images is not there yet."
    return (f"Two central masks from disjoint sets of {cfg.calibration_images} images overlap by "
            f"{found['iou']:.2f}: a distance of {1 - found['iou']:.2f} from 1 is chance.")


def draw_unlearning(session: Session):
    """Accuracy on a client's own classes and on all others as its task vector is subtracted, and
    as thin lines what a run without these clients knows of them."""
    found = experiments.unlearning(session)
    if not found:
        note("05_unlearning: nothing is measured yet")
        return
    fig, axes = panels(2, 2.4)
    for i, (rule, (forgotten, reference)) in enumerate(found.items()):
        for ax, part in zip(axes, ("own", "others"), strict=True):
            means = 100 * np.nanmean(np.array(forgotten[part], dtype=float), axis=0)
            ax.plot(forgotten["alphas"], means, label=words(rule), **look(i))
            if reference:
                without = 100 * np.nanmean(np.array(reference[part], dtype=float))
                ax.axhline(without, linewidth=0.8, color=look(i)["color"],
                           linestyle=look(i)["linestyle"])
    axes[0].set(title="the client's own classes", ylabel="validation top-1 (%)")
    axes[1].set(title="all other classes")
    for ax in axes:
        ax.set_xlabel("α of w − α τ")
    axes[0].legend()
    said = "One seed, mean over clients."
    if any(reference for _, reference in found.values()):
        said += " Thin: a run in which they never took part."
    say_below(fig, said)
    save_figure(session, fig, "05_unlearning", "Accuracy on a client's own classes and on all "
                "others against how often its task vector is subtracted, by rule, beside a run "
                "without these clients")


# ------------------------------------------------------------------ one's own idea
def own_cells(session: Session, ideas: dict[str, dict]) -> dict[tuple, Config]:
    """{(idea, sharding): Config} for what each idea changes, such as {"rule": "mine"}, where the
    methods are compared."""
    cells = {}
    for nc in session.scale.skews:
        for name, changes in ideas.items():
            cfg = replace(session.base, classes_per_client=nc, **changes)
            cfg = experiments.with_steps(cfg, session.scale.sweep)
            cells[name, experiments.nc_label(nc)] = experiments.at_own_rate(cfg, session)
    return cells


def search_own(session: Session, ideas: dict[str, dict], live: Live) -> bool:
    """Searches the rates of one's own ideas, where the preset searches at all: are all found?"""
    if not session.scale.searches:
        return True
    found = experiments.search_rates(own_cells(session, ideas).values(), session, live)
    return all(ladder.finished for ladder in found)


def train_own(session: Session, ideas: dict[str, dict]):
    """Searches the rates of one's own ideas, where the preset searches at all, and trains them.

    Raises Stopped as `train_sections` does.
    """
    live = Live()
    done = search_own(session, ideas, live)
    if done:
        cells = own_cells(session, ideas)
        runs = [replace(cfg, seed=s) for s in session.seeds for cfg in cells.values()]
        done = not train_all(runs, session, watch=live)
    live.finish()
    stop_unless(done, session)


def own_table(session: Session, ideas: dict[str, dict]) -> pd.DataFrame:
    """Test accuracy of one's own ideas below the methods of the comparison."""
    runs, _ = section_frames("methods", session)
    method = runs.method + ", " + runs["weights trained"].map(words)
    named = {}
    for (name, _), cfg in own_cells(session, ideas).items():
        named |= {run_name(replace(cfg, seed=s)): name for s in session.seeds}
    cfgs = [replace(cfg, seed=s) for cfg in own_cells(session, ideas).values()
            for s in session.seeds]
    own, _ = gather(cfgs, session.store)
    own = own.assign(method="yours: " + own.run.map(named))
    return interval_table(pd.concat([runs.assign(method=method), own]), "method", "sharding")


def first_own_run(session: Session, ideas: dict[str, dict]) -> Config:
    """The first run of `train_own` that is as long as those of the comparison.

    Where rates are searched on shorter runs, that comes first: at a guess it would be another run.
    Raises Stopped as `train_sections` does.
    """
    scale = session.scale
    if scale.searches and scale.search is None:
        # the search itself begins with such a run
        cfg = next(iter(own_cells(session, ideas).values()))
        return experiments.searched_like(cfg, session)
    live = Live()
    done = search_own(session, ideas, live)
    live.finish()
    stop_unless(done, session)
    return next(iter(own_cells(session, ideas).values()))


def press_stop(cfg: Config, history: Iterable[dict]):
    """A `watch` that does what the stop button does, at the first evaluation after round 0."""
    raise KeyboardInterrupt


# ------------------------------------------------------------------ answers
def versus(session: Session, section: str, a: tuple, b: tuple) -> Comparison:
    """Test accuracy of one cell of a section less that of another, paired by seed."""
    runs = [cell_runs(session, section, label) for label in (a, b)]
    if not all(runs):
        return experiments.NOTHING
    return experiments.compare(*runs, session.store)


def cell_runs(session: Session, section: str, label: tuple) -> list[Config]:
    """The runs of a cell, one a seed; none where the preset has no such cell."""
    about = experiments.SECTIONS[section]
    cfg = about.cells(session).get(label)
    if cfg is None:
        return []
    return [replace(cfg, seed=s) for s in experiments.seeds_of(about, session)]


def against(found: Comparison, other: str) -> str:
    """"1.2 points above <other> (95 % interval +0.4 to +2.0)", as far as the runs tell."""
    if found.seeds == 0:
        return f"at an accuracy not known yet (to be held against {other})"
    interval = f"95 % interval {signed(found.low)} to {signed(found.high)}"
    if found.seeds == 1:
        interval += ", one seed"
    if found.equivalent:
        interval += f", equal within ±{experiments.MARGIN:g}"
    if found.verdict == "higher":
        return f"{found.difference:.1f} points above {other} ({interval})"
    if found.verdict == "lower":
        return f"{-found.difference:.1f} points below {other} ({interval})"
    return f"without a difference to {other} that these runs could show ({interval})"


def signed(points: float) -> str:
    """"+1.2" or "−1.2", with a minus sign as long as the plus."""
    return f"{points:+.1f}".replace("-", "−")


def accuracy(session: Session, section: str, label: tuple, value: str = "test") -> str:
    """"33.1 ± 0.4 %" of a cell, or that it is not there yet."""
    cfgs = cell_runs(session, section, label)
    results = [r for r in map(session.store.result, cfgs) if r]
    mean, half = t_interval(experiments.frames(results)[0][value])
    if math.isnan(mean):
        return "a value that is not there yet"
    if math.isnan(half):
        return f"{mean:.1f} %"
    return f"{mean:.1f} ± {half:.1f} %"


def clients(where: str) -> str:
    """"IID" and "Nc=10" as "IID clients" and "10 classes a client"."""
    number = where.removeprefix("Nc=")
    if number == where:
        return f"{where} clients"
    return "one class a client" if number == "1" else f"{number} classes a client"


def range_in_words(session: Session, rule: str, where: str) -> str:
    """At which of the rates that were tried a rule gains over the untrained start."""
    found = ranges_of(session).get((rule, where))
    if found is None:
        return "at rates not known yet"
    if not found.gain > 0:
        return "at none of the rates that were tried"
    return f"at rates from {str(found)}, by {found.gain:.1f} points at most"


def damage_against(session: Session, rule: str, other: str, where: str) -> str:
    """"1.3 times (95 % interval 1.0 to 1.9) the damage": of a rule over another, at equal gain."""
    found = experiments.damages(experiments.trade_offs(session), experiments.equal_gain(where))
    ratio, low, high = experiments.damage_ratio(found, rule, other, where)
    if math.isnan(ratio):
        return "a damage that is not known yet, to be held against that"
    text = f"{ratio:.2f} times"
    if math.isnan(low):
        text += " (one seed, no interval)"
    else:
        text += f" (95 % interval {low:.2f} to {high:.2f})"
    return f"{text} the damage"


def best_server(session: Session, section: str, kind: str, where: str) -> tuple:
    """The label of the server of "merges" or "methods" that is best on validation, FedAvg aside;
    () until all are stored."""
    scores = {}
    for label, cfg in experiments.SECTIONS[section].cells(session).items():
        if label[0] != "FedAvg" and label[1:] == (kind, where):
            result = session.store.result(cfg)
            if result is None:
                return ()
            scores[label] = last_accuracy(result)
    return max(scores, key=scores.get)


def enough_epochs(tried: pd.DataFrame) -> str:
    """Which length is enough, of whole runs (columns epochs and val, ascending): the first whose
    doubling gains less than half a point. "" where no length and its double were run."""
    gains = tried.val.diff().shift(-1)
    doubled = tried.epochs.shift(-1) == 2 * tried.epochs
    if not doubled.any():
        return ""
    enough = tried.epochs[doubled & (gains < 0.5)]
    if len(enough):
        return f"{enough.iloc[0]} are enough: twice as many gain less than half a point."
    return "None of these is enough: each doubling gains half a point or more."


def answer(session: Session, notebook: str, *sentences: str) -> Markdown:
    """The sentences, then what they rest on and what is not there yet."""
    names = [name for name, section in experiments.SECTIONS.items() if section.notebook == notebook]
    wanted = [cfg for cfg, _ in runs_of(names, session).values()]
    results = [session.store.result(cfg) for cfg in wanted]
    missing = sum(result is None for result in results)
    diverged = sum(result is not None and result["status"] == "diverged" for result in results)
    base = session.base
    sections = [experiments.SECTIONS[name] for name in names]
    counts = {len(experiments.seeds_of(section, session)) for section in sections
              if section.every_seed}
    seeds = " or ".join(map(str, sorted(counts)))
    rests = (f"Backbone {base.weights} at {base.image_size} px, data {base.dataset}, "
             f"{seeds} seed(s). ")
    if len(session.seeds) > 1:
        rests += ("± and intervals are 95 % t intervals over seeds, not corrected for how many "
                  "comparisons there are; where one seed is said, they are of the test images.")
    else:
        rests += ("Intervals (95 %) are of the test images alone: with another seed a difference "
                  "may turn round.")
    if missing:
        rests += f" {missing} of {len(wanted)} runs are not there yet."
    if diverged:
        rests += f" {diverged} of {len(wanted)} runs diverged."
    if session.preset == "demo":
        rests += " Preset *demo* shows that everything runs; its accuracies say nothing."
    if base.dataset == "synthetic":
        rests += " **The images are synthetic.**"
    said = [sentence for sentence in sentences if sentence]
    return Markdown("\n\n".join([*said, rests]))


# ------------------------------------------------------------------ panel
def panel_options() -> dict[str, list]:
    """What the panel's menus offer; algorithms and rules are those registered by now."""
    return {
        "preset": list(PRESETS),
        "algorithm": ["centralized", *ALGORITHMS],
        "classes_per_client": [None, 50, 10, 5, 1],
        "dirichlet_alpha": [None, 0.1, 0.3, 1.0],
        "local_steps": [4, 8, 16],
        "rule": [None, *RULES],
        "sparsity": [0.5, 0.8, 0.9, 0.95, 0.99],
        "calibration_rounds": [1, 2, 4, 8],
        "calibration": ["central", "mean", "max", "vote"],
        "schedule": ["cosine", "constant", "step", "warmup_cosine"],
        "lr": rates_offered(),
        "num_rounds": range(1, 5001),
        "num_epochs": range(1, 101),
        "seed": range(1000),
    }


def rates_offered() -> list[float]:
    """Rates of the ladder around those of all presets, for the panel changes between them.

    First guesses lie up to four rungs below a preset's rate and two above it, and the map and the
    searches go three further.
    """
    rungs = [experiments.rung_of(preset(name, dataset="cifar100").lr) for name in PRESETS]
    return [experiments.rate_of(rung) for rung in range(min(rungs) - 7, max(rungs) + 6)]


NONE = {"classes_per_client": "IID", "dirichlet_alpha": "none", "rule": "none (all weights)"}


@dataclass
class Panel:
    """Controls that choose one run, and what is stored of it. Choosing never starts a run.

    It reads the working copy, and parses a result once. Of the drive it reads the checkpoints that
    the working copy lacks, once; it never lists it.
    """
    session: Session
    start: Config                       # of the first choice; fields without a control stay its own
    options: dict[str, list]
    section: str = ""                   # whose first run it is; "" where it is of none
    starts: dict[str, Config] = field(default_factory=dict)  # the same of other presets
    controls: dict[str, widgets.Widget] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    status: widgets.HTML = field(default_factory=widgets.HTML)
    picture: widgets.HTML = field(default_factory=widgets.HTML)
    table: widgets.HTML = field(default_factory=widgets.HTML)
    listed: tuple = ()                  # the runs in the table, and how far they are

    def chosen(self) -> dict:
        """The values of all controls, by field."""
        found = {}
        for name, control in self.controls.items():
            values = self.options[name]
            is_number = isinstance(values, range)
            found[name] = control.value if is_number else values[control.index]
        return found

    @property
    def beginning(self) -> Config:
        """The run that the panel would begin with in the chosen preset."""
        name = self.chosen()["preset"]
        if name == self.session.preset:
            return self.start
        if name not in self.starts:
            if self.section:
                # as long, and as often evaluated, as that section's runs: others are not stored
                first = experiments.section_runs(self.section, self.chosen_session)[0]
            else:
                # what kind of run it is stays, whatever the preset
                first = preset(name, algorithm=self.start.algorithm, rule=self.start.rule)
            self.starts[name] = first
        return self.starts[name]

    @property
    def cfg(self) -> Config:
        """The chosen run.

        ValueError where the choice cannot be, RuntimeError where its preset needs a GPU.
        """
        values = self.chosen()
        values.pop("preset")
        start = self.beginning
        cfg = replace(start, **values)
        if cfg.algorithm != start.algorithm:
            # with what the comparison of methods gives it, such as the server's rate
            for changes in experiments.METHODS.values():
                if changes.get("algorithm") == cfg.algorithm:
                    cfg = replace(cfg, **changes)
        if not cfg.centralized and cfg.num_rounds != start.num_rounds:
            # as often on the way as the run that the panel begins with: so the sections do it
            evaluations = max(1, start.num_rounds // start.eval_every)
            cfg = replace(cfg, eval_every=max(1, cfg.num_rounds // evaluations))
        return cfg

    @property
    def chosen_session(self) -> Session:
        """Of the chosen preset. RuntimeError where it needs a GPU and there is none."""
        name = self.chosen()["preset"]
        if name == self.session.preset:
            return self.session
        if name not in self.sessions:
            self.sessions[name] = other_session(self.session, name)
        return self.sessions[name]

    def update(self, change=None):
        """Shows what is stored of the choice; a choice that cannot be is told, not raised."""
        try:
            cfg = self.cfg
            session = self.chosen_session
            self.tabulate(session)
            text = f"{self.in_words(cfg)} — {status_of(cfg, session)}"
            self.picture.value = picture_of(cfg, history_stored(cfg, session.store))
        except (ValueError, RuntimeError) as error:
            text = f"This cannot be run: {error}"
            self.picture.value = ""
        self.status.value = f'<div role="status">{html.escape(text)}</div>'

    def in_words(self, cfg: Config) -> str:
        said = [f"Data: {data_name(cfg)}"]
        for name, control in self.controls.items():
            value = control.value if isinstance(self.options[name], range) else control.label
            said.append(f"{control.description}: {value}")
        return " · ".join(said)

    def tabulate(self, session: Session):
        """Lists the stored runs, if they are others than those listed, or have come further."""
        results = session.store.results()
        states = [(name, result["status"], "test" in result) for name, result in results.items()]
        listed = (session.preset, *states)
        if listed == self.listed:
            return
        self.listed = listed
        runs, _ = experiments.frames(results.values())
        names = [name for name in self.controls if name != "preset"]
        columns = ["data", "sharding", *names, "start", "val", "test", "status"]
        shown = runs[[n for n in columns if n not in ("classes_per_client", "dirichlet_alpha")]]
        body = shown.rename(columns=words).to_html(
            index=False, float_format="{:.4g}".format, na_rep="–", border=0, justify="left")
        for tag in ("th", "td"):
            style = "padding-right:1.2em;text-align:left"
            body = body.replace(f"<{tag}>", f'<{tag} style="{style}">')
        # as wide as the panel, however wide the table: it scrolls
        box = "max-height:14em;overflow:auto;width:0;min-width:100%"
        self.table.value = (
            f'<div style="{box}" tabindex="0" role="region" '
            f'aria-label="Stored runs">Stored runs: {len(runs)}{body}</div>')

    def run(self, test: bool = True):
        """Trains what is missing of the chosen run. Stop the cell at will; rerun it to go on."""
        session = self.chosen_session
        backup = backup_of(self.session, session.preset)
        if session.store.backup != backup:
            # opened for training only: it lists the drive
            session = replace(session, store=replace(session.store, backup=backup))
            self.sessions[session.preset] = session
        cfg = self.cfg
        if cfg.dataset == "cifar100" and session.preset == "demo":
            cfg = or_synthetic(cfg)
        live = Live()
        left = train_all([cfg], session, test, live)
        live.finish()
        self.update()
        print(status_of(cfg, session))
        stop_unless(not left, session)

    def _ipython_display_(self):
        display(widgets.VBox([*self.controls.values(), self.status, self.picture, self.table]))


def panel(session: Session, start: Config | str, *names: str) -> Panel:
    """A `Panel` that begins with the run `start` and offers the fields `names`, and the preset.

    A section's name stands for its first run, in every preset that is chosen.
    """
    section = ""
    if isinstance(start, str):
        section = start
        start = experiments.section_runs(section, session)[0]
    every = panel_options()
    options = {}
    for name in ("preset", *names):
        if name not in every:
            raise ValueError(f"the panel cannot offer {name!r}, only {list(every)}")
        options[name] = every[name]
    first = {name: getattr(start, name, session.preset) for name in options}
    for name, value in first.items():
        values = options[name]
        if value in values:
            continue
        if isinstance(values, range):
            options[name] = range(min(values[0], value), max(values[-1], value) + 1)
        else:
            options[name] = [*values, value]  # the run's own, such as its learning rate
            if None not in values:
                options[name].sort()

    made = Panel(session, start, options, section)
    for name, values in options.items():
        made.controls[name] = control_of(name, values, first[name])
        watched = "value" if isinstance(values, range) else "index"
        made.controls[name].observe(made.update, watched)
    made.update()
    return made


def control_of(name: str, values: list | range, first) -> widgets.Widget:
    """A number field for a range, else a row of buttons, which the keyboard reaches everywhere."""
    label = words(name)
    label = label[0].upper() + label[1:]
    style = {"description_width": "initial"}
    if isinstance(values, range):
        return widgets.BoundedIntText(value=first, min=values[0], max=values[-1],
                                      description=label, style=style)
    labels = [NONE[name] if value is None else words(value) for value in values]
    return widgets.ToggleButtons(options=labels, index=values.index(first), description=label,
                                 style=style | {"button_width": "auto"})


def other_session(session: Session, name: str) -> Session:
    """A session of another preset, beside the working copy; opening it loads no data and lists no
    drive."""
    part = experiments.part_of(name)
    root = outside(session.store.root, session) / part
    figures = outside(session.figures, session) / part
    if name == "demo":
        store = BackedUpStore(root, frozen=session.store.frozen)
        return replace(session, preset=name, base=preset(name), store=store, figures=figures,
                       scale=experiments.SCALES[name], figures_backup=None)
    needs_no_gpu = session.preset in ("full", "lite")  # or this session would not be open
    opened = open_session(name, session.seeds, workers=session.workers, on_cpu=needs_no_gpu)
    return replace(opened, store=BackedUpStore(root, frozen=session.store.frozen),
                   figures=figures, stop_at=session.stop_at, tensorboard=session.tensorboard)


def outside(folder: Path, session: Session) -> Path:
    """The folder of all presets' results, or figures, by that of the session's preset."""
    return folder.parent if experiments.part_of(session.preset) else folder


def backup_of(session: Session, name: str) -> Path | None:
    """Where a preset's results are copied to, by where those of the session's preset are."""
    backup = session.store.backup
    if backup is None:
        return None
    return outside(backup, session) / experiments.part_of(name)


def data_name(cfg: Config) -> str:
    return "SYNTHETIC IMAGES" if cfg.dataset == "synthetic" else cfg.dataset


def status_of(cfg: Config, session: Session) -> str:
    """One line: what is stored of a run, and what is left to do with the time it takes."""
    unit = "epochs" if cfg.centralized else "rounds"
    result = session.store.result(cfg)
    if result and result["status"] == "diverged":
        return f"Diverged: {result['error']}"
    if result:
        validated = f"validation {100 * last_accuracy(result):.1f} %"
        if "test" in result:
            scores = f"{validated}, test {100 * result['test']['top1']:.1f} %"
            return f"{cfg.length} of {cfg.length} {unit} stored, nothing to run: {scores}"
        if rounds_stored(cfg, session.store) == cfg.length:
            return f"{cfg.length} of {cfg.length} {unit} stored, not tested: {validated}"
        return (f"Searched, not tested: {validated}. The weights of a search are not kept: to be "
                f"tested it runs {cfg.length} {unit} again")
    done = rounds_stored(cfg, session.store)
    speed, source = experiments.throughput(session.preset, session.store)
    minutes = flop_left(cfg, session.store, True) / speed / 60
    time_left = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
    left = cfg.length - done
    text = f"{done} of {cfg.length} {unit} stored, will run {left}, {time_left} ({source})"
    shorter = utils.shorter_runs(cfg, session.store)
    if shorter and cfg.schedule != "constant":
        text += (f". The stored run of {shorter[0].length} {unit} is another run: its "
                 f"{cfg.schedule} schedule has ended. Only a constant one goes on")
    return text
