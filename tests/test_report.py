"""The report says what results/ says: regenerated, its numbers and tables are the same bytes."""
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import pandas as pd
import pytest

from notebooks.basics import ROOT, identity, run_name
from notebooks.store import Store, dump
from report import make_numbers as made

REPORT = ROOT / "report"
SOURCE = re.sub(r"(?<!\\)%.*", "", (REPORT / "report.tex").read_text())
PLOT = re.compile(r"\\plot(?:\[figure\*\])?\{(\w+)\}")


@pytest.fixture(scope="module")
def book():
    return made.open_book(Store(ROOT / "results", frozen=True), "small")


@pytest.fixture
def one_run(book, tmp_path):
    """Writes copies of a stored run under other seeds and test accuracies into a store."""
    kept = book.results(book.base)[0]

    def write(cfg, *accuracies, val=0.3):
        for seed, top1 in enumerate(accuracies):
            run = replace(cfg, seed=seed)
            rows = [row | ({"val_top1": val} if "val_top1" in row else {})
                    for row in kept["history"]]
            result = kept | dict(run=run_name(run), config=asdict(run), identity=identity(run),
                                 test=kept["test"] | {"top1": top1}, history=rows)
            (tmp_path / f"{run_name(run)}.json").write_bytes(dump(result))
        return made.Book(Store(tmp_path, frozen=True), book.base, book.sparse)
    return write


def test_numbers_and_tables_follow_from_the_results(tmp_path):
    made.write(Store(ROOT / "results", frozen=True), tmp_path)
    new = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*.tex")}
    old = {f.relative_to(REPORT): f.read_bytes() for f in REPORT.rglob("*.tex")}
    del old[(REPORT / "report.tex").relative_to(REPORT)]
    assert new == old, "results/ and report/ differ: run make report"


def test_the_readmes_table_follows_from_the_results(book):
    readme = (ROOT / "README.md").read_text()
    assert readme == made.with_tables(readme, book), "run make report"
    assert made.mean_sd(book.tests(book.base)) in readme
    stale = readme.replace(made.mean_sd(book.start), "0.00")
    assert made.with_tables(stale, book).count(made.mean_sd(book.start)) == 1


def test_the_readmes_speeds_are_those_that_were_measured(tmp_path):
    row = dict(model="ViT-S/16", px=64)
    files = {"round_cost_cpu": [row | dict(what="round", ratio=1.05),
                                row | dict(what="round", model="mini", px=32, ratio=1.2),
                                row | dict(what="checkpoint", px=224, ratio=0.01)],
             "against_naive_cpu": [row | dict(what="overhead", ratio=0.25)],
             "round_cost_gpu": [row | dict(what="round", ratio=1.02)]}
    for name, rows in files.items():
        machine = dict(gpu=name.endswith("gpu") and "NVIDIA T4" or None, threads=2)
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(machine=machine, rows=rows)))
    assert made.speed_tables(tmp_path).splitlines() == [
        "| ours over, on 2 CPU threads | small ViT, 32 px | ViT-S/16, 64 px |", "|---|---|---|",
        "| its own bare steps: a round | 1.20 | 1.05 |",
        "| a plain FedAvg loop: overhead of a round (J = 0) |  | 0.25 |", "",
        "| ours over, on NVIDIA T4 | ViT-S/16, 64 px |", "|---|---|",
        "| its own bare steps: a round | 1.02 |"]


def test_every_macro_and_table_that_the_text_uses_is_made():
    defined = re.findall(r"\\newcommand\{\\(n\w+)\}", (REPORT / "numbers.tex").read_text())
    used = set(re.findall(r"\\(n[A-Z]\w*)", SOURCE))
    assert used
    assert used <= set(defined)
    assert len(defined) == len(set(defined))
    assert "N c" not in (REPORT / "numbers.tex").read_text()  # names made TeX of twice
    tables = set(re.findall(r"\\input\{tables/(\w+)\}", SOURCE))
    assert tables == set(made.TABLES)


def test_every_figure_is_guarded_and_drawn_by_a_notebook():
    graphics = [line for line in SOURCE.splitlines() if r"\includegraphics" in line]
    assert len(graphics) == 1
    assert r"\IfFileExists{../figures/#2.pdf}" in graphics[0]
    names = PLOT.findall(SOURCE)
    cells = [c for f in (ROOT / "notebooks").glob("*.ipynb")
             for c in json.loads(f.read_text())["cells"]]
    drawn = re.findall(r'save_figure\(\w+, FIGURES / "(\w+)"',
                       "".join(line for c in cells for line in c["source"]))
    assert names
    assert set(names) <= set(drawn)
    assert set(re.findall(r"\\seefig\{(\w+)\}", SOURCE)) <= set(names)


def test_no_measured_number_is_typed():
    body = re.sub(r"\\bibliography.*", "", SOURCE.split(r"\begin{document}")[1])
    body = re.sub(r"\[t\]\{[\d.]+\\linewidth\}|\{-?[\d.]+(in|pt|em|ex)\}", "", body)
    assert re.findall(r"\d\.\d|\d,\d{3}|\d+\s*(?:\\,)?\s*(?:\\%|percent|points?\b)", body) == []


def test_every_citation_has_its_entry_and_every_entry_is_cited():
    entries = re.findall(r"@\w+\{([^,]+),", (REPORT / "references.bib").read_text())
    cited = {key.strip() for group in re.findall(r"\\cite\{([^}]+)\}", SOURCE)
             for key in group.split(",")}
    assert len(entries) == len(set(entries))
    assert set(entries) == cited


def test_references_within_the_text_have_their_labels():
    labels = re.findall(r"\\label\{([^}]+)\}", SOURCE)
    assert set(re.findall(r"\\(?:eq)?ref\{((?!fig:)[^}]+)\}", SOURCE)) <= set(labels)


def test_a_difference_within_one_standard_deviation_is_level():
    low, near, high = pd.Series([30.0, 32.0]), pd.Series([31.5, 31.5]), pd.Series([35.0, 35.2])
    assert made.relation(near, low, 10_000, "b") == "level with b, $+0.5$"
    assert made.relation(high, low, 10_000, "b") == "4.1 points above b"
    assert made.relation(low, high, 10_000) == "4.1 points below"


def test_a_single_run_has_the_sampling_error_for_a_standard_deviation():
    a, b = pd.Series([50.4]), pd.Series([50.0])  # of 10,000 images: half a point
    assert made.relation(a, b, 10_000).startswith("level")
    assert made.relation(a, b, 1_000_000) == "0.4 points above"


def test_ranking_names_what_is_level_with_the_first():
    groups = {"a": pd.Series([30.0, 30.2]), "b": pd.Series([40.0, 42.0]),
              "c": pd.Series([40.5, 40.5]), "missing": pd.Series(dtype=float)}
    assert made.ranked(groups, 10_000) == "b (41.0), c (40.5), a (30.1), level with the first: c"


def test_words_follow_the_data(book, one_run):
    start = replace(book.base, local_steps=0, num_rounds=1)
    one_run(start, 0.30, 0.30)
    other = one_run(made.grid_cell(book.base, 10, 8), 0.40, 0.40)
    assert made.answer_below(other).startswith("Of 1 stored cells 1 end above")
    other = one_run(made.grid_cell(book.base, 10, 8), 0.20, 0.20)
    assert "0 level with it and 1 below ($N_c{=}10$ $J{=}8$)" in made.answer_below(other)


def test_every_cell_is_told_at_the_rate_of_its_own_search(book, one_run):
    iid, cell = book.base, made.grid_cell(book.base, 1, 4)
    one_run(iid, 0.34, val=0.3)
    one_run(cell, 0.10, 0.10, val=0.1)
    one_run(replace(cell, lr=iid.lr / 3), 0.20, val=0.2)
    two = one_run(replace(cell, lr=iid.lr / 10), 0.28, 0.30, val=0.25)
    assert f"29.00{{\\sd\\,$\\pm$1.41(2)}} & {iid.lr / 10:g} &" in made.table_grid(two)
    assert "| FedAvg, J = 4 | 34.00 (1) | – | – | – | 29.00 ± 1.41 (2) |" in made.readme_tables(two)
    assert made.answer_tuning(two) == (
        f"Of 2 cells 1 do best on validation below the $\\eta={iid.lr:g}$ of IID clients at $J=4$, "
        "0 above it and 1 at it; $N_c{=}1$ $J{=}4$ gains most, 15.0 points.")
    assert made.answer_collapse(two).endswith("within a point of chance: no cell.")
    assert made.method(two, "FedProx", 1).lr == iid.lr / 10
    assert made.method(two, "sparse", 1).lr == two.sparse.lr


def test_task_vectors_are_compared_at_one_learning_rate(book, one_run):
    cell = made.grid_cell(book.base, 1, 4)
    one_run(book.base, 0.34)
    one_run(replace(cell, lr=0.01), 0.3)
    slow = one_run(replace(cell, lr=0.003), 0.3)
    assert slow.cells[1, 4].lr != book.base.lr
    assert made.answer_drift(slow) == made.MISSING
    assert "1.0 times as long" in made.answer_drift(one_run(cell, 0.1))  # copies of one history


def test_longer_runs_are_set_against_short_ones_and_the_start(book, one_run):
    cfg = book.base
    assert made.answer_longer(one_run(cfg, 0.3), cfg) == made.MISSING
    one_run(replace(cfg, local_steps=0, num_rounds=1), 0.25, 0.25)
    two = one_run(made.longer(cfg), 0.4, 0.42)
    text = made.answer_longer(two, cfg)
    assert text.startswith(f"With {8 * cfg.num_rounds} rounds 41.00 $\\pm$ 1.41 (2), 11.0 points "
                           f"above {cfg.num_rounds} rounds and 16.0 points above the start; ")
    rows = book.results(cfg)[0]["history"]
    assert (f"from {rows[0]['train_loss']:.2f} (first round) to {rows[-1]['train_loss']:.2f} nats"
            in made.answer_learnt(one_run(book.sparse, 0.3)))  # copies of `rows`
    assert "FedAvg, J = 4, 8 × T | 41.00 ± 1.41 (2) | – |" in made.readme_tables(two)


def test_longer_centralised_runs_answer_how_many_epochs(book, one_run):
    cfg = replace(made.pooled(book.base), head="train")
    one = one_run(cfg, 0.40)
    assert "With" not in made.answer_epochs(one)
    two = one_run(replace(cfg, num_epochs=2 * cfg.num_epochs), 0.42, 0.44)
    assert (f"With {2 * cfg.num_epochs} epochs 43.00 $\\pm$ 1.41 (2) on test, 3.0 points above "
            f"{cfg.num_epochs} epochs, and that near after ") in made.answer_epochs(two)
    assert made.answer_central(two).startswith("The chosen configuration reaches 40.00 (1)")


def test_what_is_not_stored_is_a_dash_and_said(tmp_path, book):
    empty = made.Book(Store(tmp_path, frozen=True), book.base, book.sparse)
    for name, make in made.TABLES.items():
        assert name == "published" or "--" in make(empty)
    assert not re.search(r"\bnan\b", made.macros(empty))
    assert made.answer_rules(empty) == made.MISSING


@pytest.fixture
def pages(tmp_path):
    """The text of the committed PDF, page by page."""
    if not shutil.which("pdftotext"):
        pytest.skip("poppler-utils is not installed")
    subprocess.run(["pdftotext", REPORT / "report.pdf", tmp_path / "text"], check=True)
    return (tmp_path / "text").read_text().split("\f")


def test_the_text_ends_by_the_eighth_page(pages):
    assert next(i for i, page in enumerate(pages)
                if re.search(r"^References$", page, re.M)) < 8


def test_the_pdf_has_the_numbers_of_the_tables_and_no_open_reference(pages):
    text = "".join(pages)
    for table in ("grid", "central", "rules", "methods"):
        numbers = re.findall(r"\d+\.\d{2}", (REPORT / f"tables/{table}.tex").read_text())
        assert set(numbers) <= set(re.findall(r"\d+\.\d{2}", text)), "run make report"
    assert "??" not in text
