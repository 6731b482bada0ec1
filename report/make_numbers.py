"""Every number of the report, from results/: numbers.tex, a macro each, and tables/*.tex.

    python -m report.make_numbers

Sentences that compare are macros as well, so that the words follow the data. Two means are "level"
where they differ by no more than one standard deviation: the largest of those over seeds and of the
sampling error of an accuracy on the test (or validation) images.
"""
import json
import math
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd

from notebooks.basics import PER_CLASS, ROOT, RULES, Config, cohort_size, preset
from notebooks.store import Store
from utils import RATES, best, converged, diagnose, frames, mean_sd, stored, tuned

HERE = Path(__file__).resolve().parent
SEEDS = range(10)                      # a seed that is not stored is not counted
SHARDINGS = {"IID": None, "Nc=50": 50, "Nc=10": 10, "Nc=5": 5, "Nc=1": 1}
SKEWED = {k: v for k, v in SHARDINGS.items() if v in (10, 1)}
RULED = {k: v for k, v in SHARDINGS.items() if v != 50}
STEPS, SPARSITIES, ROUNDS = (4, 8, 16), (0.0, 0.5, 0.8, 0.9, 0.95, 0.99), (1, 2, 4, 8)
LONGER = 8                             # times the rounds, where a run is to converge
WAYS = {"one place": ("central", 1.0), "mean": ("mean", 1.0), "max": ("max", 1.0),
        "vote": ("vote", 1.0), "mean of a tenth": ("mean", 0.1), "vote of a tenth": ("vote", 0.1)}
METHODS = {
    "FedAvg": {}, "FedAvg + FedExP": dict(server="fedexp"),
    "FedAvgM": dict(server="momentum", server_lr=0.3),
    "FedAdam": dict(server="adam", server_lr=1e-3),
    "FedProx": dict(algorithm="fedprox"), "SCAFFOLD": dict(algorithm="scaffold"),
    "sparse": {}, "sparse + FedExP": dict(server="fedexp"),
    r"sparse $\times$ 2": dict(server="momentum", server_momentum=0.0, server_lr=2.0)}
KINDS = {"query": ["query.weight"], "key": ["key.weight"], "key bias": ["key.bias"],
         "value": ["value.weight"], "projection": ["attn.proj.weight"],
         "MLP": ["fc1.weight", "fc2.weight"]}  # all else is "other": biases, norms, patches
SPEEDS = {  # by script and row of its table
    ("round_cost", "round"): "its own bare steps: a round",
    ("round_cost", "evaluation"): "its bare forward passes: an evaluation",
    ("against_naive", "round"): "a plain FedAvg loop: a round",
    ("against_naive", "overhead"): "a plain FedAvg loop: overhead of a round (J = 0)",
    ("against_naive", "peak memory"): "a plain FedAvg loop: peak memory",
    ("against_flower", "round"): "Flower's simulation: a round",
    ("against_flower", "overhead"): "Flower's simulation: overhead of a round (J = 0)",
    ("against_flower", "peak memory"): "Flower's simulation: peak memory",
    ("scaling", "2 processes by torchrun, over one"): "one process: a round in two (torchrun)"}
CLASSES = 100  # of CIFAR-100
MISSING = "No such run is stored yet."


# ------------------------------------------------------------------ words and cells
def tex(text: str) -> str:
    """Plain text, as names of rules and `mean_sd` give it, for LaTeX."""
    text = text.replace("_", " ").replace("±", r"$\pm$").replace("–", "--")
    return re.sub(r"Nc=(\d+)", r"$N_c{=}\1$", text.replace("%", r"\%"))


def told(values: pd.Series) -> str:
    return tex(mean_sd(values))


def cell(values: pd.Series) -> str:
    """`told`, the deviation and the number of seeds in small print."""
    mean, _, rest = told(values).partition(" ")
    return rf"{mean}{{\sd\,{rest.replace(' ', '')}}}" if rest else mean


def noise(*samples: pd.Series, images: int) -> float:
    """One standard deviation, in points: the largest over seeds, no less than by sampling."""
    share = max(min(x.mean() / 100, 1 - x.mean() / 100) for x in samples)
    sampling = 100 * math.sqrt(max(share, 0) * (1 - share) / images)
    return max(sampling, *(x.std() for x in samples if len(x) > 1), 0)


def relation(a: pd.Series, b: pd.Series, images: int, name: str = "") -> str:
    """"2.1 points above <name>", or "level with <name>" within one standard deviation."""
    gap = a.mean() - b.mean()
    if abs(gap) <= noise(a, b, images=images):
        gap = round(gap, 1) + 0.0  # turns -0.0 into 0.0
        return f"level{name and f' with {name}'}, ${gap:+.1f}$"
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}{name and f' {name}'}"


def listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def ranked(groups: dict[str, pd.Series], images: int) -> str:
    """The groups from best to worst, and which of them are level with the best."""
    found = {k: v for k, v in groups.items() if len(v)}
    order = sorted(found, key=lambda k: -found[k].mean())
    level = [tex(k) for k in order[1:]
             if relation(found[k], found[order[0]], images).startswith("level")]
    words = "all level" if len(level) == len(order) - 1 else (
        f"level with the first: {listed(level) or 'none'}")
    return ", ".join(f"{tex(k)} ({found[k].mean():.1f})" for k in order) + f", {words}"


def against(groups: dict[str, pd.Series], other: pd.Series, name: str, images: int) -> str:
    """How each group compares with `other`, which only the first clause names."""
    found = {k: v for k, v in groups.items() if len(v) and len(other)}
    return listed([f"{tex(k)} ({relation(v, other, images, '' if i else name)})"
                   for i, (k, v) in enumerate(found.items())])


def paired(first: dict[str, pd.Series], second: dict[str, pd.Series], name: str,
           images: int) -> str:
    """How each group compares with its namesake in `second`; the first clause has its `name`."""
    found = [k for k, v in first.items() if len(v) and len(second[k])]
    return listed([against({k: first[k]}, second[k], "" if i else name, images)
                   for i, k in enumerate(found)])


def sentence(text: str) -> str:
    return f"{text}." if text else MISSING


def per_sharding(texts: dict[str, str]) -> str:
    """One clause for every sharding that has something to say."""
    return sentence("; ".join(f"{tex(k)}: {v}" for k, v in texts.items() if v))


# ------------------------------------------------------------------ what is stored
@dataclass(frozen=True)
class Book:
    """The store, and the two configurations from which runs derive."""
    store: Store
    base: Config    # dense
    sparse: Config  # least sensitive

    def results(self, cfg: Config) -> list[dict]:
        """The finished results of a configuration, all seeds."""
        every = (self.store.result(replace(cfg, seed=s)) for s in SEEDS)
        return [r for r in every if r and r["status"] == "finished"]

    def tests(self, cfg: Config) -> pd.Series:
        """Test accuracies in %, one a seed."""
        return frames(self.results(cfg))[0].test.dropna()

    def history(self, cfg: Config) -> pd.DataFrame:
        return frames(self.results(cfg))[1]

    @cached_property
    def start(self) -> pd.Series:
        """The untrained start: the ridge head on frozen features."""
        return self.tests(replace(self.base, local_steps=0, num_rounds=1))

    @cached_property
    def images(self) -> int:
        """Test images, by which the sampling error goes."""
        found = [r["test"]["images"] for r in map(self.store.result, stored(self.store))
                 if "test" in r]
        return max(found, default=1)

    @cached_property
    def central(self) -> list[Config]:
        """Stored centralised dense runs from a new head."""
        same = {k: getattr(self.base, k) for k in ("dataset", "weights", "image_size",
                                                   "val_fraction")}
        return stored(self.store, algorithm="centralized", rule=None, head="train", **same)

    @cached_property
    def final(self) -> list[Config]:
        """Of those the chosen ones: of full length, tested."""
        return [c for c in self.central if c.num_epochs == self.base.num_epochs
                and "test" in self.store.result(c)]

    @cached_property
    def cells(self) -> dict[tuple, Config]:
        """The grid by (sharding, J), each cell at the learning rate of its own search."""
        return {(nc, j): tuned(grid_cell(self.base, nc, j), self.store)
                for nc in SHARDINGS.values() for j in STEPS}

    @cached_property
    def longer_central(self) -> dict[int, list[Config]]:
        """Tested centralised runs of more epochs than usual, by their number."""
        tested = [c for c in self.central if "test" in self.store.result(c)]
        return {n: [c for c in tested if c.num_epochs == n]
                for n in {c.num_epochs for c in tested} if n > self.base.num_epochs}

    def vs_start(self, groups: dict[str, pd.Series]) -> str:
        return against(groups, self.start, "the start", self.images)


def open_book(store: Store, preset_name: str) -> Book:
    base = tuned(preset(preset_name, head="ridge"), store)
    return Book(store, base, tuned(replace(base, rule="least_sensitive"), store))


def grid_cell(cfg: Config, nc: int | None, j: int) -> Config:
    """A cell at the rate of `cfg`. T shrinks as J grows, as does the distance of evaluations."""
    return replace(cfg, classes_per_client=nc, local_steps=j,
                   num_rounds=max(1, cfg.num_rounds * 4 // j),
                   eval_every=max(1, cfg.eval_every * 4 // j))


def longer(cfg: Config) -> Config:
    return replace(cfg, num_rounds=LONGER * cfg.num_rounds)


def way(cfg: Config, name: str, nc: int) -> Config:
    how, share = WAYS[name]
    return replace(cfg, calibration=how, calibration_clients=share, classes_per_client=nc)


def method(book: Book, name: str, nc: int) -> Config:
    sparse = replace(book.sparse, classes_per_client=nc)
    return replace(sparse if name.startswith("sparse") else book.cells[nc, STEPS[0]],
                   **METHODS[name])


def pooled(cfg: Config) -> Config:
    """The centralised twin of a federated configuration."""
    return replace(cfg, algorithm="centralized", batch_size=64, eval_every=1)


def motion(book: Book, cfg: Config) -> pd.Series:
    """Means over rounds and seeds: a task vector's norm, two clients' cosine, FedExP's step."""
    h, m = book.history(cfg), cohort_size(cfg.num_clients, cfg.participation)
    h["cosine"] = (m * (h.mean_norm / h.client_norm) ** 2 - 1) / max(1, m - 1)
    return h[["client_norm", "cosine", "fedexp_step"]].astype(float).mean()


def gigabytes(book: Book, cfg: Config) -> float:
    h = book.history(cfg)
    return (h.bytes_up + h.bytes_down).groupby([h.run, h.seed]).sum().mean() / 1e9


def sharing(book: Book, cfg: Config) -> dict[str, float]:
    """Share (%) of the weights that the mask frees per kind of layer."""
    found = book.results(cfg)
    if not found or "mask" not in found[0]:
        return {}
    total = {}
    for layer, (free, size) in found[0]["mask"]["composition"].items():
        kind = next((k for k, names in KINDS.items() if any(n in layer for n in names)), "other")
        old = total.get(kind, (0, 0))
        total[kind] = old[0] + free, old[1] + size
    return {k: 100 * free / size for k, (free, size) in total.items()}


SIX = {"centralised": pooled, "FedAvg IID": lambda c: c,
       "FedAvg Nc=10": partial(replace, classes_per_client=10)}


def six(book: Book) -> dict[str, dict[str, pd.Series]]:
    """Test accuracies of the six models, dense and sparse, by where they are trained."""
    both = {"dense": book.base, "sparse": book.sparse}
    return {where: {name: book.tests(tuned(change(cfg), book.store)) for name, cfg in both.items()}
            for where, change in SIX.items()}


# ------------------------------------------------------------------ tables
def tabular(columns: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = [" & ".join(r) + r" \\" for r in [columns, *rows]]
    spec = "l" * left + "r" * (len(columns) - left)
    return "\n".join([rf"\begin{{tabular}}{{{spec}}}", r"\toprule", lines[0], r"\midrule",
                      *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def table_grid(book: Book) -> str:
    def pair(cfg):
        tests = book.tests(cfg)
        return [cell(tests), f"{cfg.lr:g}" if len(tests) else "--"]
    rows = [[tex(k), *(x for j in STEPS for x in pair(book.cells[nc, j]))]
            for k, nc in SHARDINGS.items()]
    heads = [h for j in STEPS for h in (f"$J={j}$", r"$\eta$")]
    return tabular(["", *heads], [*rows, start_row(book, len(heads))])


def start_row(book: Book, columns: int) -> list[str]:
    return ["start", cell(book.start), *[""] * (columns - 1)]


def table_central(book: Book) -> str:
    runs = frames([book.store.result(c) for c in book.central])[0]
    keys = ["lr", "weight_decay", "batch_size", "schedule", "num_epochs"]
    rows = [[f"{lr:g}", f"{wd:g}", str(b), tex(kind), str(n), cell(part.val), cell(part.test)]
            for (lr, wd, b, kind, n), part in runs.groupby(keys)]
    return tabular([r"$\eta$", "decay", "$B$", "schedule", "epochs", "val.", "test"],
                   rows or [["--"] * 7])


def table_six(book: Book) -> str:
    rows = [[tex(where), *map(cell, groups.values())] for where, groups in six(book).items()]
    return tabular(["", "dense", "sparse"], [*rows, start_row(book, 2)])


def table_sparsity(book: Book) -> str:
    rows = [[f"{s:g}", *(cell(book.tests(replace(book.sparse, sparsity=s, classes_per_client=nc)))
                         for nc in (None, 10))] for s in SPARSITIES]
    return tabular(["$s$", "IID", "$N_c{=}10$"], [*rows, start_row(book, 2)])


def table_rounds(book: Book) -> str:
    rows = [[str(r), *(cell(book.tests(replace(book.sparse, calibration_rounds=r,
                                               classes_per_client=nc)))
                       for nc in (None, 10))] for r in ROUNDS]
    return tabular(["$R$", "IID", "$N_c{=}10$"], [*rows, start_row(book, 2)])


def table_composition(book: Book) -> str:
    found = {s: sharing(book, replace(book.sparse, sparsity=s)) for s in SPARSITIES[1:]}
    rows = [[kind, *(f"{found[s][kind]:.1f}" if found[s] else "--" for s in SPARSITIES[1:])]
            for kind in [*KINDS, "other"]]
    return tabular(["free (\\%) at $s=$", *(f"{s:g}" for s in SPARSITIES[1:])], rows)


def table_rules(book: Book) -> str:
    rows = [[tex(rule), *(cell(book.tests(replace(book.sparse, rule=rule, classes_per_client=nc)))
                          for nc in RULED.values())] for rule in RULES]
    return tabular(["", *map(tex, RULED)], [*rows, start_row(book, len(RULED))])


def table_consensus(book: Book) -> str:
    rows = []
    for name in WAYS:
        found = [r for nc in SKEWED.values() for r in book.results(way(book.sparse, name, nc))]
        sent = f"{found[0]['mask'].get('bytes_up', 0) / 1e6:.1f}" if found else "--"
        rows.append([name, *(cell(book.tests(way(book.sparse, name, nc)))
                             for nc in SKEWED.values()), sent])
    return tabular(["", *map(tex, SKEWED), "MB"], [*rows, start_row(book, len(SKEWED) + 1)])


def table_methods(book: Book) -> str:
    rows = [[name, *(cell(book.tests(method(book, name, nc))) for nc in SKEWED.values())]
            for name in METHODS]
    return tabular(["", *map(tex, SKEWED)], [*rows, start_row(book, len(SKEWED))])


def table_motion(book: Book) -> str:
    cases = {("dense", tex(k)): replace(book.base, classes_per_client=nc)
             for k, nc in SHARDINGS.items()}
    cases |= {(f"sparse {s:g}", tex(k)): replace(book.sparse, sparsity=s, classes_per_client=nc)
              for k, nc in (("IID", None), ("Nc=10", 10)) for s in (0.5, 0.9, 0.99)}
    found = {k: motion(book, cfg) for k, cfg in cases.items()}
    rows = [[*k, *("--" if math.isnan(x) else f"${x:.2f}$" for x in v)] for k, v in found.items()]
    return tabular(["", "", r"$\|\tau\|$", "cosine", r"$\eta_{\mathrm{exp}}$"], rows, left=2)


def table_ends(book: Book) -> str:
    rows = []
    for name, nc in (("IID", None), ("Nc=10", 10), ("Nc=1", 1)):
        end = diagnose(replace(book.base, classes_per_client=nc), book.store)
        rows.append([tex(name), *ends_of(end)] if end else [tex(name), *["--"] * 5])
    return tabular(["", "cosine", "conflict (\\%)", *(rf"$\alpha={a}$" for a in (0, 1, 2))], rows)


def ends_of(end: dict) -> list[str]:
    c, n = end["cosine"], len(end["cosine"])
    pairs = sum(c[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    losses = dict(zip(end["alphas"], end["losses"], strict=True))
    return [f"${pairs:.3f}$", f"{100 * end['sign_conflict']:.1f}",
            *(f"{losses[a]:.2f}" for a in (0.0, 1.0, 2.0))]


def table_published(book: Book) -> str:
    rows = json.loads((HERE / "published.json").read_text())["rows"]
    return tabular(["DINO ViT-S/16", "test"], [[name, f"{x:.2f}"] for name, x in rows])


# ------------------------------------------------------------------ answers
def answer_epochs(book: Book) -> str:
    if not book.final:
        tried = sorted({str(c.num_epochs) for c in book.central})
        return f"The final runs are not stored yet; the search ran {listed(tried)} epochs." if (
            tried) else MISSING
    near = converged(frames([book.store.result(c) for c in book.final])[1])
    text = (f"Validation accuracy comes within half a point of its best after {near.median():.0f} "
            f"of {book.base.num_epochs} epochs (median, $n={len(near)}$).")
    for length, runs in sorted(book.longer_central.items()):
        tests, history = frames([book.store.result(c) for c in runs])
        short = frames([book.store.result(c) for c in book.final])[0].test
        text += (f" With {length} epochs {told(tests.test)} on test, "
                 f"{relation(tests.test, short, book.images, f'{book.base.num_epochs} epochs')}, "
                 f"and that near after {converged(history).median():.0f}.")
    return text


def answer_central(book: Book) -> str:
    found = frames([book.store.result(c) for c in book.final])[0].test
    if not len(found):
        return ""
    gap = relation(found, book.start, book.images, "the untrained ridge head")
    return f"The chosen configuration reaches {told(found)} on test, {gap}."


def answer_schedule(book: Book) -> str:
    search = [c for c in book.central if "test" not in book.store.result(c)]
    if not search:
        return MISSING
    top = best(search, book.store)
    kinds = {c.schedule: frames([book.store.result(c)])[0].val for c in search
             if replace(c, schedule=top.schedule) == top}
    images = CLASSES * round(top.val_fraction * PER_CLASS[top.dataset])
    return f"On validation, after {top.num_epochs} epochs: {ranked(kinds, images)}."


def answer_rounds_needed(book: Book) -> str:
    near = converged(book.history(book.base))
    return MISSING if near.empty else (
        f"Within half a point of the best validation accuracy after {near.median():.0f} of "
        f"{book.base.num_rounds} rounds (median, $n={len(near)}$; evaluated every "
        f"{book.base.eval_every}).")


def answer_longer(book: Book, cfg: Config) -> str:
    """What more rounds give an IID run, against the usual number of them and the start."""
    short, long = book.tests(cfg), book.tests(longer(cfg))
    if short.empty or long.empty:
        return MISSING
    near = converged(book.history(longer(cfg)))
    words = listed([relation(long, short, book.images, f"{cfg.num_rounds} rounds"),
                    *([relation(long, book.start, book.images, "the start")]
                      if len(book.start) else [])])
    return (f"With {longer(cfg).num_rounds} rounds {told(long)}, {words}; within half a point of "
            f"the best validation accuracy after {near.median():.0f}.")


def answer_learnt(book: Book) -> str:
    """What the longest sparse run does to the loss of augmented and of plain images."""
    h = next((h for cfg in (longer(book.sparse), book.sparse)
              if len(h := book.history(cfg))), None)
    if h is None:
        return MISSING
    losses = [(col.groupby(h.run).first().mean(), col.groupby(h.run).last().mean())
              for col in (h.train_loss, h.val_loss)]  # `first` and `last` of what is not NaN
    return ("Over {:.0f} rounds the loss of the clients' augmented batches goes from {:.2f} (first "
            "round) to {:.2f} nats, that of the validation images, which are not augmented, from "
            "{:.2f} (first evaluation) to {:.2f}.".format(h["round"].max(), *losses[0], *losses[1]))


def answer_shards(book: Book, j: int) -> str:
    groups = {k: book.tests(book.cells[nc, j]) for k, nc in SHARDINGS.items()}
    iid = groups.pop("IID")
    return sentence(against(groups, iid, "IID", book.images))


def answer_steps(book: Book) -> str:
    short, long = ({k: book.tests(book.cells[nc, j]) for k, nc in SHARDINGS.items()}
                   for j in (STEPS[0], STEPS[-1]))
    return sentence(paired(long, short, f"$J={STEPS[0]}$", book.images))


def named(nc: int | None, j: int) -> str:
    return f"{tex('IID' if nc is None else f'Nc={nc}')} $J{{=}}{j}$"


def answer_tuning(book: Book) -> str:
    """What its own learning rate is worth to a cell, on validation, against that of IID clients."""
    def val(cfg):
        return frames([r for r in [book.store.result(cfg)] if r])[0].val.max()
    own = {named(*k): cfg for k, cfg in book.cells.items()}
    gain = pd.Series({named(nc, j): val(cfg) - val(grid_cell(book.base, nc, j))
                      for (nc, j), cfg in book.cells.items()}).dropna()
    if gain.empty:
        return MISSING
    rates = [own[k].lr for k in gain.index]
    below, above = sum(r < book.base.lr for r in rates), sum(r > book.base.lr for r in rates)
    words = f"; {gain.idxmax()} gains most, {gain.max():.1f} points" if gain.max() > 0 else ""
    return (f"Of {len(gain)} cells {below} do best on validation below the "
            f"$\\eta={book.base.lr:g}$ of IID clients at $J={STEPS[0]}$, {above} above it and "
            f"{len(gain) - below - above} at it{words}.")


def answer_below(book: Book) -> str:
    """How many cells of the grid end above, level with and below the untrained start."""
    cells = {named(nc, j): book.tests(cfg) for (nc, j), cfg in book.cells.items()}
    words = {k: relation(v, book.start, book.images) for k, v in cells.items()
             if len(v) and len(book.start)}
    below = [k for k, w in words.items() if "below" in w]
    above, level = (sum(part in w for w in words.values()) for part in ("above", "level"))
    rest = f" ({', '.join(below)})" if below else ""
    return sentence(f"Of {len(words)} stored cells {above} end above the untrained start, {level} "
                    f"level with it and {len(below)} below{rest}" if words else "")


def answer_collapse(book: Book) -> str:
    """Cells no better than guessing, at the learning rate of IID clients."""
    cells = {named(nc, j): book.tests(grid_cell(book.base, nc, j)) for nc, j in book.cells}
    lost = [k for k, v in cells.items() if len(v) and abs(v.mean() - 100 / CLASSES) < 1]
    return (f"With the $\\eta={book.base.lr:g}$ of IID clients, within a point of chance: "
            f"{listed(lost) or 'no cell'}.")


def answer_drift(book: Book) -> str:
    texts = []
    for j in (STEPS[0], STEPS[-1]):
        iid, one = (motion(book, grid_cell(book.base, nc, j)) for nc in (None, 1))
        if not (iid.isna().any() or one.isna().any()):
            texts.append(f"at $J={j}$ a client's task vector at $N_c=1$ is "
                         f"{one.client_norm / iid.client_norm:.1f} times as long as an IID "
                         f"client's, and the mean cosine of two clients is {one.cosine:.2f} "
                         f"against {iid.cosine:.2f}")
    return sentence("; ".join(texts)[:1].upper() + "; ".join(texts)[1:])


def answer_six(book: Book) -> str:
    return per_sharding({where: book.vs_start({k: v for k, v in groups.items() if len(v)})
                         for where, groups in six(book).items()})


def answer_sweep(book: Book, symbol: str, field: str, values) -> str:
    texts = {}
    for k, nc in (("IID", None), ("Nc=10", 10)):
        groups = {f"${symbol}{{=}}{v:g}$": book.tests(
            replace(book.sparse, classes_per_client=nc, **{field: v})) for v in values}
        if sum(len(v) > 0 for v in groups.values()) > 1:
            texts[k] = ranked(groups, book.images)
    return per_sharding(texts)


def short_search(book: Book, rule: str) -> dict[float, pd.Series]:
    """Validation accuracy by learning rate, in runs of a quarter of the rounds."""
    same = replace(book.sparse, rule=rule, num_rounds=max(1, book.base.num_rounds // 4), seed=0)
    found = [c for c in stored(book.store, rule=rule, num_rounds=same.num_rounds)
             if replace(c, lr=same.lr) == same]
    return {c.lr: frames([book.store.result(c)])[0].val for c in sorted(found, key=lambda c: c.lr)}


def answer_rates(book: Book) -> str:
    """The sparse search for a learning rate, on validation, in short runs."""
    found = short_search(book, book.sparse.rule)
    return sentence(listed([f"{v.mean():.1f} at $\\eta{{=}}{lr:g}$" for lr, v in found.items()]))


def answer_rule_rates(book: Book) -> str:
    """The same for the other rules: what the lowest and the highest rate that all tried give."""
    found = {rule: short_search(book, rule) for rule in RULES if rule != book.sparse.rule}
    if not all(found.values()) or not (both := set.intersection(*map(set, found.values()))):
        return MISSING
    low, high = min(both), max(both)
    return sentence(f"from $\\eta={low:g}$ to $\\eta={high:g}$ validation top-1 goes " + listed(
        [f"from {of[low].mean():.1f} to {of[high].mean():.1f} ({tex(rule)})"
         for rule, of in found.items()]))


def answer_moved(book: Book) -> str:
    dense, sparse = motion(book, book.base), motion(book, book.sparse)
    if dense.isna().any() or sparse.isna().any():
        return MISSING
    return (f"With IID clients a dense task vector has mean norm {dense.client_norm:.2f}, a sparse "
            f"one {sparse.client_norm:.2f}, a factor of "
            f"{dense.client_norm / sparse.client_norm:.1f}.")


def rule_tests(book: Book, nc: int | None) -> dict[str, pd.Series]:
    return {rule: book.tests(replace(book.sparse, rule=rule, classes_per_client=nc))
            for rule in RULES}


def answer_layers(book: Book) -> str:
    """How much of the calibrated mask the query/key control could cover."""
    found = book.results(book.sparse)
    if not found:
        return MISSING
    free = {k: n for k, (n, _) in found[0]["mask"]["composition"].items()}
    held = sum(n for k, n in free.items() if k.endswith(("query.weight", "key.weight")))
    return (f"At $s={book.sparse.sparsity:g}$, {100 * held / sum(free.values()):.1f}\\,\\% of the "
            "calibrated mask's free weights lie in the query and key projections.")


def answer_rules(book: Book) -> str:
    found = {k: rule_tests(book, nc) for k, nc in RULED.items()}
    return per_sharding({k: ranked(v, book.images) for k, v in found.items()
                         if sum(len(x) > 0 for x in v.values()) > 1})


def answer_rules_start(book: Book) -> str:
    """Which rules end above, level with and below the untrained start."""
    texts = {}
    for k, nc in RULED.items():
        words = {tex(rule): relation(v, book.start, book.images)
                 for rule, v in rule_tests(book, nc).items() if len(v) and len(book.start)}
        sides = {side: [r for r, w in words.items() if side in w]
                 for side in ("above", "level", "below")}
        texts[k] = ", ".join(f"{listed(names)} {side}" for side, names in sides.items() if names)
    return per_sharding(texts)


def answer_control(book: Book) -> str:
    control, calibrated = ({k: rule_tests(book, nc)[rule] for k, nc in RULED.items()}
                           for rule in ("query_key", "least_sensitive"))
    return sentence(paired(control, calibrated, "the calibrated mask", book.images))


def answer_consensus(book: Book) -> str:
    texts = {}
    for k, nc in SKEWED.items():
        groups = {name: book.tests(way(book.sparse, name, nc)) for name in WAYS}
        texts[k] = against(groups, groups.pop("one place"), "one place", book.images)
    return per_sharding(texts)


def answer_server(book: Book) -> str:
    """What FedExP and a constant step change, dense and masked."""
    texts = {}
    for k, nc in SKEWED.items():
        of = {name: book.tests(method(book, name, nc)) for name in METHODS}
        pairs = [("FedAvg + FedExP", "FedAvg"), ("sparse + FedExP", "sparse"),
                 (r"sparse $\times$ 2", "sparse")]
        parts = (against({a: of[a]}, of[b], b, book.images) for a, b in pairs)
        texts[k] = listed([p for p in parts if p])
    return per_sharding(texts)


def answer_methods(book: Book) -> str:
    found = {k: {n: book.tests(method(book, n, nc)) for n in METHODS} for k, nc in SKEWED.items()}
    return per_sharding({k: ranked(v, book.images) for k, v in found.items()
                         if sum(len(x) > 0 for x in v.values()) > 1})


def answer_premise(book: Book) -> str:
    """Are masked task vectors more orthogonal than dense ones, as the mask-aware step supposes?"""
    texts = {}
    for k, nc in (("IID", None), ("Nc=10", 10)):
        cases = [("dense", book.base)] + [
            (f"$s={s:g}$", replace(book.sparse, sparsity=s)) for s in SPARSITIES]
        found = [(name, motion(book, replace(c, classes_per_client=nc)).cosine)
                 for name, c in cases]
        texts[k] = ", ".join(f"{name} ({x:.2f})" for name, x in found if not math.isnan(x))
    return per_sharding(texts)


def answer_pretraining(book: Book) -> str:
    long = replace(book.base, num_rounds=40, eval_every=20)
    random, tuned_ = book.tests(replace(long, weights="none")), book.tests(long)
    return MISSING if random.empty or tuned_.empty else (
        f"The same {long.num_rounds} rounds from random weights end at {told(random)}, from the "
        f"pre-trained ones at {told(tuned_)}.")


def answer_traffic(book: Book) -> str:
    dense, sparse = gigabytes(book, book.base), gigabytes(book, book.sparse)
    return MISSING if math.isnan(dense + sparse) else (
        f"Over a run all clients together exchange {dense:.2f} GB dense and {sparse:.2f} GB at "
        f"$s={book.sparse.sparsity:g}$, a factor of {dense / sparse:.1f}.")


# ------------------------------------------------------------------ all of it
def settings(book: Book) -> dict[str, str]:
    cfg, sizes = book.base, book.results(book.base)
    card = ROOT / "weights" / f"{cfg.weights}.json"
    entries = sizes[0]["history"][0]["bytes_dense"] if sizes else math.nan
    entries /= 4 * cohort_size(cfg.num_clients, cfg.participation)
    masked = book.results(book.sparse)
    maskable = sum(n for _, n in masked[0]["mask"]["composition"].values()) if masked else math.nan
    facts = dict(clients=cfg.num_clients, share=cfg.participation, batch=cfg.batch_size, lr=cfg.lr,
                 momentum=cfg.momentum, decay=cfg.weight_decay, rounds=cfg.num_rounds,
                 epochs=cfg.num_epochs, pixels=cfg.image_size, ridge=cfg.ridge_l2,
                 sparsity=book.sparse.sparsity, calibrationRounds=book.sparse.calibration_rounds,
                 calibrationImages=book.sparse.calibration_images, sparseLr=book.sparse.lr,
                 proxMu=cfg.prox_mu, lowestRate=RATES[0])
    facts = {k: f"{v:g}" for k, v in facts.items()}
    per_class = PER_CLASS[cfg.dataset]
    held = round(cfg.val_fraction * per_class)
    facts |= dict(steps=", ".join(map(str, STEPS)), start=told(book.start),
                  cohort=str(cohort_size(cfg.num_clients, cfg.participation)),
                  trainImages=f"{CLASSES * (per_class - held):,}", valImages=f"{CLASSES * held:,}",
                  testImages=f"{book.images:,}", parameters=f"{entries / 1e6:.2f}",
                  maskable=f"{maskable:,.0f}", scoreMb=f"{4 * maskable / 1e6:.1f}",
                  voteMb=f"{maskable / 8e6:.2f}", frozenPercent=f"{100 * book.sparse.sparsity:g}",
                  sampling=f"{noise(book.start, images=book.images):.2f}",
                  seeds=listed([str(s) for s in sorted({c.seed for c in stored(book.store)})]),
                  stored=str(len(stored(book.store))))
    return {k: "--" if v == "nan" else v for k, v in facts.items()} | backbone_card(card)


def backbone_card(path: Path) -> dict[str, str]:
    """What is known of the weights: their card, or for DINO's that it is the published ViT-S/16."""
    if not path.exists():
        return dict(backbone="a ViT-S/16 pre-trained by DINO", probe="--")
    card = json.loads(path.read_text())
    text = (f"a ViT of {card['depth']} blocks, width {card['embed_dim']}, {card['num_heads']} "
            f"heads and patches of {card['patch_size']} pixels, pre-trained for "
            f"{card['epochs']:.0f} epochs with labels on {card['data'].split(',')[0]}")
    return dict(backbone=text, probe=f"{100 * card['val_accuracy']:.1f}")


TABLES = dict(grid=table_grid, central=table_central, six=table_six, sparsity=table_sparsity,
              rounds=table_rounds, composition=table_composition, rules=table_rules,
              consensus=table_consensus, methods=table_methods, motion=table_motion,
              ends=table_ends, published=table_published)
ANSWERS = dict(
    epochs=answer_epochs, central=answer_central, schedule=answer_schedule,
    roundsNeeded=answer_rounds_needed, longer=lambda b: answer_longer(b, b.base),
    longerSparse=lambda b: answer_longer(b, b.sparse), learnt=answer_learnt,
    shardsFour=lambda b: answer_shards(b, STEPS[0]),
    shardsEight=lambda b: answer_shards(b, STEPS[1]),
    shardsSixteen=lambda b: answer_shards(b, STEPS[2]), steps=answer_steps,
    tuning=answer_tuning, below=answer_below, collapse=answer_collapse, drift=answer_drift,
    six=answer_six,
    sparsity=lambda b: answer_sweep(b, "s", "sparsity", SPARSITIES),
    calibration=lambda b: answer_sweep(b, "R", "calibration_rounds", ROUNDS), rates=answer_rates,
    ruleRates=answer_rule_rates,
    moved=answer_moved, layers=answer_layers, rules=answer_rules, rulesStart=answer_rules_start,
    control=answer_control, consensus=answer_consensus, server=answer_server,
    methods=answer_methods, premise=answer_premise, pretraining=answer_pretraining,
    traffic=answer_traffic)


def macros(book: Book) -> str:
    values = settings(book) | {
        f"answer{k[0].upper()}{k[1:]}": f(book) for k, f in ANSWERS.items()}
    return "".join(f"\\newcommand{{\\n{k[0].upper()}{k[1:]}}}{{{v}}}\n"
                   for k, v in sorted(values.items()))


def readme_tables(book: Book) -> str:
    """The README's table: rows for each J of the grid, the masks, longer runs and the start."""
    def row(name, cells):
        return f"| {' | '.join([name, *cells])} |"

    def over_shardings(of):
        return [mean_sd(book.tests(of(nc))) for nc in SHARDINGS.values()]
    dense = {f"FedAvg, J = {j}": lambda nc, j=j: book.cells[nc, j] for j in STEPS}
    masked = {f"{rule.replace('_', ' ')} tenth": lambda nc, rule=rule: replace(
        book.sparse, rule=rule, classes_per_client=nc) for rule in RULES}
    more = {f"{name}, {LONGER} × T": lambda nc, cfg=cfg: longer(replace(
        cfg, classes_per_client=nc)) for name, cfg in (("FedAvg, J = 4", book.base),
                                                       ("least sensitive tenth", book.sparse))}
    return "\n".join([
        row("test top-1 (%)", SHARDINGS), "|---" * (1 + len(SHARDINGS)) + "|",
        *(row(name, over_shardings(of)) for name, of in (dense | masked | more).items()),
        row("untrained start", [mean_sd(book.start), *[""] * (len(SHARDINGS) - 1)])])


def speed_tables(folder: Path) -> str:
    """The ratios that `make bench` stored, medians by model and input: a table a machine."""
    tables = []
    for device in ("cpu", "gpu"):
        read = {p.stem.rpartition("_")[0]: json.loads(p.read_text())
                for p in sorted(folder.glob(f"*_{device}.json"))}
        if not read:
            continue
        rows = pd.concat([pd.DataFrame(r["rows"]).assign(by=name) for name, r in read.items()])
        machine = next(iter(read.values()))["machine"]
        rows["case"] = [f"{'small ViT' if model == 'mini' else model}, {px} px"
                        for model, px in zip(rows.model, rows.px, strict=True)]
        rows = rows.sort_values("px", kind="stable")
        cells = {name: rows[(rows.by == by) & (rows.what == what)].groupby("case").ratio.first()
                 for (by, what), name in SPEEDS.items()}
        columns = [c for c in rows.case.unique() if any(c in found for found in cells.values())]
        where = machine["gpu"] or f"{machine['threads']} CPU threads"
        tables.append("\n".join([
            f"| ours over, on {where} | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
            *(f"| {name} | {' | '.join(f'{x:.2f}' for x in found.reindex(columns))} |".replace(
                "nan", "") for name, found in cells.items() if len(found))]))
    return "\n\n".join(tables)


def with_tables(readme: str, book: Book) -> str:
    """The README's text with the tables between its marks made anew."""
    for name, table in (("results", readme_tables(book)),
                        ("speed", speed_tables(ROOT / "benchmarks" / "results"))):
        before, mark, rest = readme.partition(f"<!-- {name}, made by make report -->\n")
        _, end, after = rest.partition("\n<!-- until here -->")
        readme = before + mark + table + end + after
    return readme


def write(store: Store, out: Path, preset_name: str = "small"):
    """out/numbers.tex and out/tables/: the same bytes for the same results."""
    book = open_book(store, preset_name)
    (out / "tables").mkdir(parents=True, exist_ok=True)
    (out / "numbers.tex").write_text(macros(book))
    for name, make in TABLES.items():
        (out / "tables" / f"{name}.tex").write_text(make(book))


if __name__ == "__main__":
    STORE, PRESET = Store(ROOT / "results", frozen=True), os.environ.get("PRESET", "small")
    write(STORE, HERE, PRESET)
    README = ROOT / "README.md"
    README.write_text(with_tables(README.read_text(), open_book(STORE, PRESET)))
