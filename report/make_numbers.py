"""Numbers and tables of the report, from results/ alone: python -m report.make_numbers

    numbers.tex   the arguments of the commands in macros.tex: settings, cells, gains, claims
    tables/       what tables.py makes, a file each; none where no run is stored yet

Prose stands in text.tex alone. What is missing is left out, and macros.tex says so.
"""
import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np

from notebooks import experiments
from notebooks.experiments import Session
from report.cells import Cell, damage_cells, frozen_session, read_cells, read_gains
from report.claims import REPORT, Claim, Judged, judge, read_claims
from report.tables import command, make_tables, mean, power, range_of, start, words
from utils import ROOT, cohort_size, images_per_class, json_sha256


def settings(session: Session) -> dict[str, str]:
    """What the text calls by name: fields of the preset and of its scale, sizes, the backbone."""
    base = session.base
    values = {}
    for f in fields(base):
        values[f.name] = shown(getattr(base, f.name))
    for f in fields(session.scale):
        values[f"scale/{f.name}"] = shown(getattr(session.scale, f.name))

    every, free = experiments.weight_counts(base.arch, base.image_size)
    train = experiments.train_images(base)
    whole = images_per_class(base.dataset) * 100
    figures = ""
    if experiments.part_of(session.preset):
        figures = f"{experiments.part_of(session.preset)}/"
    of_rules = experiments.seeds_of(experiments.SECTIONS["rules"], session)
    values |= dict(
        figures=figures,
        seeds=len(session.seeds),
        rule_seeds=len(of_rules),
        cohort=cohort_size(base.num_clients, base.participation),
        test_start=f"{experiments.test_of_start(session):.1f}",
        strongest_pull=f"{max(session.scale.pulls):g}",
        sweep_rounds=session.scale.sweep // base.local_steps,
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
        equal_gain=f"{experiments.EQUAL_GAIN:g}",
        lower_gain=f"{min(experiments.OTHER_GAINS):g}",
        higher_gain=f"{max(experiments.OTHER_GAINS):g}",
        one_class_gain=f"{experiments.ONE_CLASS_GAIN:g}",
        map_rates=len(session.scale.map_rungs),
        map_skew=next(nc for nc in session.scale.map_shardings if nc),
    )
    chosen = experiments.best_centralized(session)
    values["chosen/schedule"] = shown(chosen.schedule)
    values["chosen/weight_decay"] = shown(chosen.weight_decay)
    values["chosen/batch_size"] = shown(chosen.batch_size)
    larger = experiments.on_vits16(session).base
    every, _ = experiments.weight_counts(larger.arch, larger.image_size)
    values["larger_millions"] = f"{every / 1e6:.1f}"
    values["larger_size"] = larger.image_size
    for name, weights in (("backbone", base.weights), ("larger", larger.weights)):
        card = ROOT / f"weights/{weights}.json"
        if card.is_file():
            found = json.loads(card.read_text(encoding="utf-8"))
            accuracy = 100 * found["val_accuracy"]
            values[f"{name}_epochs"] = round(found["epochs"])
            values[f"{name}_accuracy"] = f"{accuracy:.1f}"
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
    values = dict(
        test=mean(cell, "test"),
        val=mean(cell, "val"),
        start=start(cell))
    if len(cell.runs):
        values["rate"] = f"${power(cell.cfgs[0].lr)}$"
    return [command("setcell", name, key, text) for name, text in values.items() if text]


def gain_lines(session: Session) -> list[str]:
    """Of every rule and sharding: best gain, what is left of it at higher rates, the dip."""
    lines = []
    for (rule, sharding), gains in read_gains(session).items():
        key = f"{rule}/{sharding}"
        values = {
            "range": range_of(gains),
            "gain": f"{gains.points[gains.best]:+.1f}",
            "dip": f"{gains.dip:+.1f}",
            "bestrate": f"${power(gains.best)}$",
        }
        if gains.reach is not None:
            values["reach"] = f"{gains.reach:.2g}"
        for factor in (3, 10):
            points = gains.above_best(factor)
            if points is not None:
                values[f"gainx{factor}"] = f"{points:+.1f}"
        lines += [command("setcell", name, key, text) for name, text in values.items()]
    return lines


def claim_lines(claims: dict[str, Claim], judged: Judged) -> list[str]:
    """Differences in points, or ratios where logarithms are compared, and what stands."""
    lines = []
    for name, (found, verdict) in judged.items():
        ends = np.array([found.difference, found.low, found.high])
        is_log = claims[name]["value_a"].startswith("log_")
        if found.seeds and is_log:
            ratios = [f"{ratio:.2f}" for ratio in np.exp(ends)]
            lines.append(command("setratio", name, *ratios, found.seeds))
        elif found.seeds:
            points = [f"{end:+.1f}" for end in ends]
            lines.append(command("setgap", name, *points, found.seeds))
        if verdict == "stands":
            lines.append(command("setclaim", name))
    return lines


def stamp(session: Session) -> str:
    """A comment by which one sees of which runs a numbers.tex was made."""
    results = session.store.results()
    runs = {name: [result["history"], result.get("test")] for name, result in results.items()}
    return f"% {len(runs)} runs, {json_sha256(runs)[:12]}"


def write(session: Session, folder: Path) -> Judged:
    """numbers.tex and tables/ in `folder`, in place of those there; the judged claims."""
    cells = read_cells(session)
    claims = read_claims()
    measured = {"interference": damage_cells(session)}
    judged = judge(claims, cells | measured, session.store)
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    for old in tables.glob("*.tex"):
        old.unlink()
    for name, text in make_tables(cells, session).items():
        if text:
            (tables / f"{name}.tex").write_text(f"{text}\n", encoding="utf-8")

    lines = [stamp(session)]
    for name, value in settings(session).items():
        lines.append(command("setsetting", name, value))
    for name, of_section in cells.items():
        stored = sum(len(cell.runs) for cell in of_section.values())
        wanted = sum(len(cell.cfgs) for cell in of_section.values())
        lines.append(command("setstate", name, stored, wanted))
        for cell in of_section.values():
            lines += cell_lines(f"{name}/{cell.key}", cell)
    lines += gain_lines(session)
    lines += claim_lines(claims, judged)
    (folder / "numbers.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return judged


def main(arguments: Iterable[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m report.make_numbers")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seeds", type=int, help="how many; default: those of the preset")
    asked = parser.parse_args(arguments)
    judged = write(frozen_session(asked.preset, asked.seeds), REPORT)
    for name, (found, verdict) in judged.items():
        if verdict != "missing":
            print(f"{verdict:7} {name}: {found}")


if __name__ == "__main__":
    sys.exit(main())
