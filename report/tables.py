"""The tables of the report and its map of rates, in LaTeX: {file: text, "" without any run}.

They hold names and numbers alone; captions stand in text.tex, commands in macros.tex.
"""
import math
from collections.abc import Callable

from notebooks import experiments
from notebooks.experiments import Session, t_interval
from report.cells import Cell, Cells, Gains, read_gains, text_of

WORDS = {
    "dense": "all weights",
    "half_least_sensitive": "half, least sensitive",
    "half_random": "half, random",
    "crop_flip": "crops, flips",
    "flip": "flips",
    "lda": "LDA",
    "query_key": "query and key",
    "central": "one place",
    "warmup_cosine": "warm-up, cosine",
}
DEEPEST = -6   # points below the start that the map still shows

GainMap = dict[tuple, Gains]   # (rule, sharding) -> gains by rate


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

    The first column has the names; a row of one entry is a rule or a heading.
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
    """Validation accuracy before training: the same for all seeds, whose split is one."""
    values = cell.runs.start.dropna()
    if len(values) == 0:
        return ""
    return f"{values.mean():.1f}"


def rate(cell: Cell) -> str:
    if len(cell.runs) == 0:
        return ""
    return command("rate", power(cell.cfgs[0].lr))


def power(number: float) -> str:
    """A number as TeX's mathematics have it: 0.001, but 10^{-5} and 3\\cdot 10^{-5}."""
    mantissa, _, exponent = f"{number:g}".partition("e")
    if not exponent:
        return mantissa
    power_of_ten = f"10^{{{int(exponent)}}}"
    return power_of_ten if mantissa == "1" else rf"{mantissa}\cdot {power_of_ten}"


def test_and_rate(cell: Cell) -> str:
    return f"{test(cell)} {rate(cell)}".strip()


def first_losses(cell: Cell) -> list[str]:
    """Validation loss of round 0, and the clients' own loss in round 1."""
    if len(cell.history) == 0:
        return ["", ""]
    rounds = cell.history.set_index("round")
    losses = [rounds.val_loss.get(0), rounds.train_loss.get(1)]
    return ["" if loss is None else f"{loss:.2f}" for loss in losses]


def half_point(cell: Cell) -> str:
    """The round from which on validation stays within half a point of its last value."""
    found = experiments.converged(cell.history)
    if len(found) == 0:
        return ""
    return f"{found.mean():.0f}"


# ------------------------------------------------------------------ tables of cells
def pivot(cells: dict[tuple, Cell], split: int, rates: bool = False,
          untrained: bool = True) -> str:
    """Test accuracies: the first `split` parts of a label name the row, the others the column.

    `rates` adds the learning rates, `untrained` a line with the validation accuracy of the start.
    """
    rows = list(dict.fromkeys(label[:split] for label in cells))
    columns = list(dict.fromkeys(label[split:] for label in cells))
    lines = []
    for row in rows:
        found = [cells.get(row + column) for column in columns]
        names = [words(part) for part in row]
        entry = test_and_rate if rates else test
        lines.append([", ".join(names), *entries(found, entry)])
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


def reordered(cells: dict[tuple, Cell], *order: int) -> dict[tuple, Cell]:
    """The cells with the parts of their labels in another order."""
    found = {}
    for label, cell in cells.items():
        found[tuple(label[i] for i in order)] = cell
    return found


def by_value(symbol: str, cells: dict[tuple, Cell]) -> dict[tuple, Cell]:
    """The cells of a sweep, {(sharding, value): cell}, with rows such as "s=0.9" before columns."""
    return {(f"${symbol}={text_of(value)}$", sharding): cell
            for (sharding, value), cell in cells.items()}


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


def longer_table(cells: dict[tuple, Cell]) -> str:
    """Rules, each at the best rate that was tried, with its accuracies."""
    lines = []
    for (rule,), cell in cells.items():
        if len(cell.runs):
            lines.append([words(rule), rate(cell), val(cell), test(cell)])
    return tabular(["", "\\ratename", "\\valname", "\\testname"], lines)


# ------------------------------------------------------------------ the map of rates
def on_map(gains: GainMap, session: Session) -> dict[str, dict[str, Gains]]:
    """{sharding: {rule: gains}} of the rules and shardings that the map is of, where tried."""
    found = {}
    for nc in session.scale.map_shardings:
        sharding = experiments.nc_label(nc)
        of_rules = {}
        for rule in map(experiments.rule_label, session.scale.map_rules):
            if (rule, sharding) in gains:
                of_rules[rule] = gains[rule, sharding]
        if of_rules:
            found[sharding] = of_rules
    return found


def signed(points: float | None) -> str:
    if points is None:
        return ""
    if points == -math.inf:
        return "\\diverged"
    return f"${points:+.1f}$"


def range_of(gains: Gains) -> str:
    """The rates around the best that gain; one at an end of those tried may not be the last."""
    if gains.lowest is None:
        return "\\norange"
    rates = list(gains.points)
    low = power(gains.lowest)
    high = power(gains.highest)
    if gains.lowest == rates[0]:
        low = "\\le " + low
    if gains.highest == rates[-1]:
        high = "\\ge " + high
    return command("range", low, high)


def map_table(shown: dict[str, dict[str, Gains]]) -> str:
    """Best rate, its gain and dip, gains at 3 and 10 times that rate, range of rates that gain."""
    heads = [command("maphead", i) for i in range(1, 7)]
    lines = []
    for sharding, of_rules in shown.items():
        if lines:
            lines.append(["\\midrule"])
        lines.append([command("group", words(sharding))])
        for rule, gains in of_rules.items():
            rate_of_best = command("rate", power(gains.best))
            shown_points = [gains.points[gains.best], gains.above_best(3), gains.above_best(10),
                            gains.dip]
            points = [signed(each) for each in shown_points]
            lines.append([words(rule), rate_of_best, *points, range_of(gains)])
    return tabular(["", *heads], lines)


def map_plot(shown: dict[str, dict[str, Gains]]) -> str:
    """Gain against the rate: a column a sharding, a line a rule; the key is in the first panel."""
    if not shown:
        return ""
    rules = dict.fromkeys(rule for of_rules in shown.values() for rule in of_rules)
    lines = [command("begin", "mapplot") + "".join(f"{{{end}}}" for end in map_ends(shown))]
    for sharding, of_rules in shown.items():
        lines.append(command("ratepanel", words(sharding)))
        if sharding == next(iter(shown)):
            lines += [command("mapkey", style_of(rule), words(rule)) for rule in rules]
        lines += [map_line(rule, gains) for rule, gains in of_rules.items()]
    lines.append(command("end", "mapplot"))
    return "\n".join(lines)


def map_line(rule: str, gains: Gains) -> str:
    """Points gained by rate; a run that diverged has none."""
    known = {lr: gain for lr, gain in gains.points.items() if gain > -math.inf}
    points = [f"({lr:g},{gain:.2f})" for lr, gain in known.items()]
    return command("mapline", style_of(rule), " ".join(points))


def style_of(rule: str) -> str:
    """The name of a line's style in macros.tex."""
    return rule.replace("_", "-")


def map_ends(shown: dict[str, dict[str, Gains]]) -> tuple:
    """Number of columns; then what all panels have in common, the ends of their axes: rates and
    gains."""
    rates = []
    points = []
    for of_rules in shown.values():
        for gains in of_rules.values():
            rates += gains.points.keys()
            points += gains.points.values()
    lowest = max(DEEPEST, min(points)) - 0.5
    highest = max(points) + 0.5
    return (len(shown), f"{min(rates) / 1.5:.2g}", f"{max(rates) * 1.5:.2g}", f"{lowest:.1f}",
            f"{highest:.1f}")


# ------------------------------------------------------------------ all of them
def make_tables(cells: Cells, session: Session) -> dict[str, str]:
    shown = on_map(read_gains(session), session)
    servers = cells["methods"] | cells["merges"]
    return {
        "protocol": protocol_table(cells["protocol"]),
        "central": central_table(cells),
        "epochs": lengths_table(cells["centralized_epochs"]),
        "rounds": lengths_table(cells["fedavg_iid"]),
        "grid": pivot(cells["grid"], 1, rates=True),
        "six": pivot(cells["six_models"], 1, rates=True, untrained=False),
        "masks": pivot(by_value("s", cells["sparsity"]) | by_value("R", cells["calibration"]), 1),
        "rules": pivot(cells["rules"] | cells["half"], 1, rates=True),
        "larger": pivot(cells["rules_larger"], 1, rates=True),
        "map": map_table(shown),
        "mapplot": map_plot(shown),
        "longer": longer_table(cells["longer"]),
        "servers": pivot(reordered(servers, 0, 2, 1), 1),
        "consensus": pivot(cells["consensus"], 2),
    }
