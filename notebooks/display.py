"""What notebooks show: plans of what to run, tables and figures of what is stored."""
import json
import os
import time
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from tqdm.auto import tqdm

from notebooks.basics import NOTES, ROOT, Config, evaluate, hardware, identity, run_name
from notebooks.store import Store
from utils import apply_vector, client_update, cohort, drift, open_run, train


def train_all(cfgs: list[Config], store: Store, test: bool = True):
    """`train` one after the other what is not stored; stopping by hand stops them all."""
    for cfg in tqdm([c for c in cfgs if not store.frozen], desc="runs"):
        if train(cfg, store, test)["status"] == "interrupted":
            print(f"Stopped within {run_name(cfg)}: run this cell again to go on from there.")
            break


def diagnose(cfg: Config, store: Store, alphas=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0)) -> dict:
    """`drift` of one cohort at a finished run's best weights, and the validation loss along the
    mean task vector; kept in the store. Holds the whole cohort's vectors at once."""
    def compute():
        run, state = open_run(cfg, store)
        state = replace(state, params=state.best, memory={}, round=cfg.num_rounds)
        clients = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round)
        vectors = [{n: v.clone() for n, v in client_update(run, state, k, cfg.lr)[0].items()}
                   for k in clients.tolist()]
        mean = {n: torch.stack([v[n] for v in vectors]).mean(0) for n in vectors[0]}
        index, losses = run.data.val[:run.cfg.eval_images], []
        for alpha in alphas:
            run.load(apply_vector(state.params, mean, alpha))
            found = evaluate(run.model, run.data.images[index], run.data.labels[index])
            losses.append(found["loss"])
        return drift(vectors) | dict(clients=clients.tolist(), alphas=alphas, losses=losses)
    return store.cached("drift", dict(identity(cfg), alphas=alphas), compute)


COLUMN, PAGE = 3.28, 6.88  # widths in inches of a two-column report
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
         "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.4, "pdf.fonttype": 42,
         "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 120}


def figure(width: float = COLUMN, height: float = 2.3, **grid):
    """plt.subplots of `width` x `height` inches in the one style of all figures."""
    sns.set_theme("paper", "whitegrid", "colorblind", rc=STYLE)
    return plt.subplots(figsize=(width, height), **grid)


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
    fig.text(0.5, 0.5, "\n".join(NOTES), c="red", alpha=0.4, size=14, ha="center")
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


def best(cfgs: list[Config], store: Store) -> Config:
    """The configuration with the highest validation accuracy; the first, where none is stored."""
    def score(cfg):
        history = (store.result(cfg) or {"history": []})["history"]
        return max((row.get("val_top1", 0) for row in history), default=0)
    return max(cfgs, key=score)


def converged(history: pd.DataFrame, points: float = 0.5) -> pd.Series:
    """For every run the first round (or epoch) within `points` of its best validation accuracy."""
    seen = history.dropna(subset="val_top1")
    near = seen[seen.val_top1 >= seen.groupby("run").val_top1.transform("max") - points]
    return near.groupby("run")["round"].min()


def gather(cfgs: list[Config], store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history) of the stored results among `cfgs`: a row a run, a row a round of a run.

    Accuracies in %. Says how many runs are missing or diverged: figures show them as gaps.
    """
    results = [r for r in map(store.result, cfgs) if r]
    missing, bad = len(cfgs) - len(results), [r["run"] for r in results if r["error"]]
    if missing or bad:
        print(f"{missing} of {len(cfgs)} runs are missing, {len(bad)} diverged {bad or ''}", *NOTES)
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


@lru_cache
def _seconds_per_step(cfg: Config) -> float:
    """Measured on three local steps of a fresh model."""
    run, state = open_run(replace(cfg, local_steps=3), Store(Path(os.devnull)))
    client_update(run, state, 0, cfg.lr)
    began = time.monotonic()
    client_update(run, state, 0, cfg.lr)[1].item()
    return (time.monotonic() - began) / 3


def plan(cfgs: list[Config], store: Store) -> pd.DataFrame:
    """What of these runs is stored and what is left, with an estimate of the time it takes."""
    rows = []
    for cfg in cfgs:
        names = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
        done = cfg.length if store.result(cfg) else int(Path(names[-1]).name[:7]) if names else 0
        cohort_size = max(1, round(cfg.participation * cfg.num_clients))
        steps = (cfg.local_steps * cohort_size if cfg.algorithm != "centralized" else
                 50_000 * (1 - cfg.val_fraction) / cfg.batch_size)
        plain = Config(weights="none", arch=cfg.arch or "vits16", dataset=cfg.dataset,
                       image_size=cfg.image_size, batch_size=cfg.batch_size)
        left = cfg.length - done
        seconds = left and left * steps * _seconds_per_step(plain)
        rows.append(dict(run=run_name(cfg), stored=done, of=cfg.length, minutes_left=seconds / 60))
    frame = pd.DataFrame(rows)
    print(f"{(frame.stored == frame.of).sum()} of {len(frame)} runs are stored; training the rest "
          f"takes about {frame.minutes_left.sum():.0f} min on {hardware()}", *NOTES)
    return frame
