"""Numbers and tables of the report, from results/ alone: python -m report.make_numbers

    numbers.tex   the arguments of the commands in macros.tex: settings, cells, ranges, claims
    tables/       a LaTeX table a file, without captions; none where no run is stored yet

Prose stands in text.tex alone, numbers here alone. What is missing is left out, and macros.tex
says so.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from notebooks import experiments
from notebooks.experiments import Session, t_interval
from report.cells import Cell, Cells, frozen_session, interference, ranges, read_cells, text_of
from report.claims import REPORT, Judged, judge, read_claims
from utils import ROOT, Store, cohort_size, images_per_class

WORDS = {
    "dense": "all weights",
    "crop_flip": "crops, flips",
    "flip": "flips",
    "lda": "LDA",
    "query_key": "query and key",
    "central": "one place",
    "warmup_cosine": "warm-up, cosine",
}


# ------------------------------------------------------------------ TeX
def command(name: str, *arguments) -> str:
    """\\name{argument}{argument}..."""
    braced = [f"{{{argument}}}" for argument in arguments]
    return f"\\{name}" + "".join(braced)


def words(part) -> str:
    """A part of a label, as the report prints it."""
    text = WORDS.get(part, text_of(part))
    if text.startswith("Nc="):
        number = text.removeprefix("Nc=")
        return f"$N_c={number}$"
    return text.replace("_", " ")


def tabular(head: list[str], rows: list[list[str]]) -> str:
    """A table without the rows and columns in which only names stand; "" if none is left.

    The first column has the names; a row of one entry is a rule.
    """
    shown = [row for row in rows if len(row) == 1 or any(row[1:])]
    full = [row for row in shown if len(row) > 1]
    if not full:
        return ""
    kept = [0]
    for i in range(1, len(head)):
        if any(row[i] for row in full):
            kept.append(i)

    layout = "@{}l" + "c" * (len(kept) - 1) + "@{}"
    lines = ["\\begin{tabular}" + f"{{{layout}}}", "\\toprule", line_of(head, kept), "\\midrule"]
    for row in shown:
        if len(row) == 1:
            lines.append(row[0])
        else:
            lines.append(line_of(row, kept))
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines)


def line_of(row: list[str], kept: list[int]) -> str:
    chosen = [row[i] for i in kept]
    return " & ".join(chosen) + " \\\\"


# ------------------------------------------------------------------ entries
Entry = Callable[[Cell], str]   # what a table says of a cell, "" where nothing is stored


def mean(cell: Cell, value: str) -> str:
    """The command for a mean over seeds, its half-width, and the seeds where some are missing."""
    values = cell.runs[value].dropna()
    if len(values) == 0:
        return ""
    middle, half = t_interval(values)
    half = "" if math.isnan(half) else f"{half:.1f}"
    seeds = "" if len(values) == len(cell.cfgs) else len(values)
    return command("mean", f"{middle:.1f}", half, seeds)


def marked(cell: Cell, value: str) -> str:
    """`mean`, with a mark where the cell's rate is at an end of those tried."""
    text = mean(cell, value)
    if text and not cell.bracketed:
        text += "\\edge"
    return text


def test(cell: Cell) -> str:
    return marked(cell, "test")


def val(cell: Cell) -> str:
    return marked(cell, "val")


def start(cell: Cell) -> str:
    return mean(cell, "start")


def rate(cell: Cell) -> str:
    if len(cell.runs) == 0:
        return ""
    return command("rate", f"{cell.cfgs[0].lr:g}")


def first_losses(cell: Cell) -> list[str]:
    """Validation loss of round 0, and the clients' own loss in round 1."""
    if len(cell.history) == 0:
        return ["", ""]
    rounds = cell.history.set_index("round")
    return [f"{rounds.val_loss[0]:.2f}", f"{rounds.train_loss[1]:.2f}"]


def half_point(cell: Cell) -> str:
    """The round from which on validation stays within half a point of its last value."""
    found = experiments.converged(cell.history)
    if len(found) == 0:
        return ""
    return f"{found.mean():.0f}"


# ------------------------------------------------------------------ tables
def pivot(cells: dict[tuple, Cell], split: int, rates: bool = False,
          untrained: bool = True) -> str:
    """Test accuracies: the first `split` parts of a label name the row, the others the column.

    `rates` adds a line with the learning rates, `untrained` the validation accuracy of the start.
    """
    rows = list(dict.fromkeys(label[:split] for label in cells))
    columns = list(dict.fromkeys(label[split:] for label in cells))
    lines = []
    for row in rows:
        found = [cells.get(row + column) for column in columns]
        names = [words(part) for part in row]
        lines.append([", ".join(names), *entries(found, test)])
        if rates:
            lines.append(["", *entries(found, rate)])
    if untrained:
        found = [any_of(cells, column) for column in columns]
        lines.append(["\\midrule"])
        lines.append(["\\startname", *entries(found, start)])
    heads = [column_head(column) for column in columns]
    return tabular(["", *heads], lines)


def entries(cells: list[Cell | None], entry: Entry) -> list[str]:
    return ["" if cell is None else entry(cell) for cell in cells]


def any_of(cells: dict[tuple, Cell], column: tuple) -> Cell | None:
    """A cell of a column that has runs: all start from the same weights."""
    for label, cell in cells.items():
        if label[-len(column):] == column and len(cell.runs):
            return cell
    return None


def column_head(column: tuple) -> str:
    names = [words(part) for part in column]
    if len(names) == 1:
        return names[0]
    return command("head", *names)


def protocol_table(cells: dict[tuple, Cell]) -> str:
    """Losses before training, on validation and as clients see it; validation accuracies."""
    heads = [command("protocolhead", i) for i in range(1, 6)]
    lines = []
    for augmentation, head in dict.fromkeys(label[:2] for label in cells):
        dense = cells[augmentation, head, "dense"]
        sparse = cells[augmentation, head, "least_sensitive"]
        known = dense if len(dense.runs) else sparse
        name = f"{words(augmentation)}; {words(head)}"
        lines.append([name, *first_losses(known), start(known), val(dense), val(sparse)])
    return tabular(["", *heads], lines)


def central_table(cells: Cells) -> str:
    """The centralised search in its order."""
    lines = []
    for setting in ("decays", "batches", "schedules"):
        if lines:
            lines.append(["\\midrule"])
        for (value,), cell in cells[f"centralized_{setting}"].items():
            name = command(f"setting{setting}", words(value))
            lines.append([name, rate(cell), val(cell)])
    return tabular(["", "$\\eta$", "\\valname"], lines)


def lengths_table(cells: dict[tuple, Cell]) -> str:
    """Runs of several lengths."""
    lines = []
    for (length,), cell in cells.items():
        lines.append([words(length), val(cell), test(cell), half_point(cell)])
    return tabular(["\\lengthname", "\\valname", "\\testname", "\\nearname"], lines)


def by_rule(values: dict[tuple, tuple | None], name: str) -> str:
    """{(rule, sharding): arguments of the command `name`, None where nothing is stored}."""
    rules = list(dict.fromkeys(rule for rule, _ in values))
    shardings = list(dict.fromkeys(sharding for _, sharding in values))
    lines = []
    for rule in rules:
        line = [words(rule)]
        for sharding in shardings:
            arguments = values[rule, sharding]
            line.append(command(name, *arguments) if arguments else "")
        lines.append(line)
    heads = [words(sharding) for sharding in shardings]
    return tabular(["", *heads], lines)


def reordered(cells: dict[tuple, Cell], *order: int) -> dict[tuple, Cell]:
    """The cells with the parts of their labels in another order."""
    found = {}
    for label, cell in cells.items():
        found[tuple(label[i] for i in order)] = cell
    return found


def make_tables(cells: Cells, store: Store) -> dict[str, str]:
    """{file name without .tex: table, "" where no run is stored}."""
    diagnosed = {}
    for label, cell in cells["rules"].items():
        diagnosed[label] = interference(cell.cfgs[0], store)
    return {
        "protocol": protocol_table(cells["protocol"]),
        "central": central_table(cells),
        "epochs": lengths_table(cells["centralized_epochs"]),
        "rounds": lengths_table(cells["fedavg_iid"]),
        "grid": pivot(cells["grid"], 1, rates=True),
        "six": pivot(cells["six_models"], 1, rates=True, untrained=False),
        "sparsity": pivot(reordered(cells["sparsity"], 1, 0), 1),
        "calibration": pivot(reordered(cells["calibration"], 1, 0), 1),
        "rules": pivot(cells["rules"], 1, rates=True),
        "map": by_rule(ranges(cells["rate_map"]), "range"),
        "speed": pivot(cells["speed_matched"], 1, rates=True, untrained=False),
        "interference": by_rule(diagnosed, "pair"),
        "methods": pivot(reordered(cells["methods"], 0, 2, 1), 1),
        "consensus": pivot(cells["consensus"], 2),
    }


# ------------------------------------------------------------------ numbers
def settings(session: Session) -> dict[str, str]:
    """What the text calls by name: fields of the preset and of its scale, sizes, the backbone."""
    base = session.base
    values = {}
    for f in fields(base):
        values[f.name] = shown(getattr(base, f.name))
    for f in fields(session.scale):
        values[f"scale/{f.name}"] = shown(getattr(session.scale, f.name))

    every, free = experiments.weight_counts(base.arch)
    train = experiments.train_images(base)
    whole = images_per_class(base.dataset) * 100
    values |= dict(
        seeds=len(session.seeds),
        cohort=cohort_size(base.num_clients, base.participation),
        train_images=f"{train:,}",
        val_images=f"{whole - train:,}",
        test_images="10,000",
        weights_millions=f"{every / 1e6:.1f}",
        maskable=f"{free:,}",
        score_mb=f"{4 * free / 1e6:.1f}",
        vote_mb=f"{free / 8e6:.2f}",
        trained_share=f"{100 * (1 - base.sparsity):.0f}",
        confidence=f"{100 * experiments.CONFIDENCE:.0f}",
        margin=f"{experiments.MARGIN:g}",
    )
    card = ROOT / f"weights/{base.weights}.json"
    if card.is_file():
        found = json.loads(card.read_text(encoding="utf-8"))
        values["backbone_epochs"] = round(found["epochs"])
        values["backbone_accuracy"] = f"{100 * found['val_accuracy']:.1f}"
    return values


def shown(value) -> str:
    """A setting in TeX; of a list what is a number or a name, not the None that stands for IID."""
    if isinstance(value, tuple):
        names = [shown(part) for part in value if part is not None]
        return ", ".join(names)
    if isinstance(value, dict):
        return ""
    return words(value)


def cell_lines(key: str, cell: Cell) -> list[str]:
    lines = []
    for value in ("test", "val", "start"):
        text = mean(cell, value)
        if text:
            lines.append(command("setcell", value, key, text))
    if len(cell.runs):
        lines.append(command("setcell", "rate", key, f"{cell.cfgs[0].lr:g}"))
    return lines


def make_numbers(session: Session, cells: Cells, judged: Judged) -> str:
    """numbers.tex: one command a line."""
    lines = []
    for name, value in settings(session).items():
        lines.append(command("setsetting", name, value))

    for name, of_section in cells.items():
        stored = sum(len(cell.runs) for cell in of_section.values())
        wanted = sum(len(cell.cfgs) for cell in of_section.values())
        lines.append(command("setstate", name, stored, wanted))
        for cell in of_section.values():
            lines += cell_lines(f"{name}/{cell.key}", cell)
    for (rule, sharding), found in ranges(cells["rate_map"]).items():
        if found:
            text = command("range", *found)
            lines.append(command("setcell", "range", f"{rule}/{sharding}", text))

    for name, (found, verdict) in judged.items():
        if found.seeds:
            ends = [f"{end:+.1f}" for end in (found.difference, found.low, found.high)]
            lines.append(command("setgap", name, *ends, found.seeds))
        if verdict == "stands":
            lines.append(command("setclaim", name))
    return "\n".join(lines) + "\n"


def write(session: Session, folder: Path) -> Judged:
    """numbers.tex and tables/ in `folder`, in place of those there; the judged claims."""
    cells = read_cells(session)
    judged = judge(read_claims(), cells, session.store)
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    for old in tables.glob("*.tex"):
        old.unlink()
    for name, text in make_tables(cells, session.store).items():
        if text:
            (tables / f"{name}.tex").write_text(f"{text}\n", encoding="utf-8")
    numbers = make_numbers(session, cells, judged)
    (folder / "numbers.tex").write_text(numbers, encoding="utf-8")
    return judged


def main(arguments: Iterable[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m report.make_numbers")
    parser.add_argument("--preset", default="small")
    asked = parser.parse_args(arguments)
    judged = write(frozen_session(asked.preset), REPORT)
    for name, (found, verdict) in judged.items():
        if verdict != "missing":
            print(f"{verdict:7} {name}: {found}")


if __name__ == "__main__":
    sys.exit(main())
