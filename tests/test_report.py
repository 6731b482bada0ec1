"""The report: its numbers follow from the stored runs, and its text from its numbers."""
import functools
import io
import math
import re
import shutil
import subprocess
import tomllib
import zipfile
import zlib
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from notebooks import experiments
from notebooks.backup import BackedUpStore
from notebooks.experiments import SECTIONS, Session, rate_of, rung_of
from report import cells as cells_of
from report import claims as claims_of
from report import make_numbers, overleaf, tables
from report.cells import Gains
from report.claims import REPORT
from utils import CODE_SHA256, ROOT, Config, Store, preset, run_key, run_name
from utils import to_json as json_of

COMMENT = re.compile(r"(?<!\\)%.*")
TEXT = "".join(COMMENT.sub("", (REPORT / name).read_text(encoding="utf-8"))
               for name in ("abstract.tex", "text.tex"))
FRAME = "".join((REPORT / name).read_text(encoding="utf-8")
                for name in ("report.tex", "macros.tex"))
CLAIMS = claims_of.read_claims()


# ------------------------------------------------------------------ stored runs, made up
def session_in(folder, name: str = "small") -> Session:
    """Three seeds in every section, so that means and intervals can be computed by hand."""
    store = BackedUpStore(folder, frozen=True)
    scale = replace(experiments.SCALES[name], more_seeds=())
    return Session(name, preset(name), store, folder / "figures", (0, 1, 2), 1, scale)


def put(folder, cfg: Config, val: float, test: float | None = None, start: float = 0.35,
        status: str = "finished"):
    """A stored run as `utils.train` leaves it, with these accuracies (shares of 1)."""
    half = max(1, cfg.length // 2)
    course = dict(lr=cfg.lr, train_loss=3.5, client_norm=1.0, mean_norm=0.5, bytes_up=10,
                  bytes_down=10)
    curve = dict(test_loss=2.5, test_top1=start) if cfg.test_curve else {}
    rows = [dict(round=0, val_loss=2.4, val_top1=start, val_top5=0.6) | curve]
    for number in sorted({1, half, cfg.length}):
        rows.append(dict(round=number, val_loss=2.3, val_top1=val, val_top5=0.6) | course | curve)
    result = dict(
        run=run_name(cfg), status=status, error=None, config=asdict(cfg), key=run_key(cfg),
        history=rows if status == "finished" else [], best_round=cfg.length, seconds=60.0,
        segments=[dict(code=CODE_SHA256, hardware="none", after_round=0)])
    if cfg.rule:
        layers = {"attn.query.weight": [500, 1000], "attn.key.weight": [400, 1000]}
        result["mask"] = dict(per_layer=layers, trainable=900, maskable=2000)
    if test is not None:
        scores = dict(loss=2.5, top1=test, top5=0.6)
        result |= dict(test=scores, test_of_best=scores)
    folder.mkdir(exist_ok=True)
    (folder / f"{run_name(cfg)}.json").write_bytes(json_of(result))


def accuracy_of(cfg: Config) -> float:
    """About 0.4, a little different for every run."""
    return 0.4 + zlib.crc32(run_name(cfg).encode()) % 70 / 1e4


def put_search(folder, session: Session, cfg: Config):
    """The ladder of a search that has finished, its best the first guess."""
    like = experiments.searched_like(cfg, session)
    middle = experiments.rung_of(like.lr)
    put(folder, like, accuracy_of(like))
    for rung in (middle - 1, middle + 1):
        put(folder, replace(like, lr=experiments.rate_of(rung)), 0.38)


def put_section(folder, session: Session, name: str):
    section = SECTIONS[name]
    if section.searched:
        for cfg in section.cells(session).values():
            if not experiments.ladder(experiments.searched_like(cfg, session),
                                      session.store).finished:
                put_search(folder, session, cfg)
    for cfg in experiments.section_runs(name, session):
        if not experiments.is_done(cfg, session.store, section.test):
            val = 0.33 if name == "rate_map" else accuracy_of(cfg)
            put(folder, cfg, val, val - 0.01 if section.test else None)


def put_trade_offs(folder, session: Session):
    """What `extension.trade_off` keeps of one client, with damages made up."""
    keep = Store.compute_or_load

    def made_up(store, kind, key, compute):
        rates = len(key["options"]["rates"])
        worse = 1 + zlib.crc32(json_of(key)) % 100 / 100
        curve = dict(gain=[[0.05 * 2**i] for i in range(rates)],
                     damage=[[0.01 * 4**i * worse] for i in range(rates)])
        return keep(store, kind, key, lambda: dict(clients=[0], **curve))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "compute_or_load", made_up)
        experiments.trade_offs(replace(session, store=BackedUpStore(folder, quiet=True)))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A session of which every run of every section is stored."""
    folder = tmp_path_factory.mktemp("complete")
    session = session_in(folder)
    for name in SECTIONS:
        put_section(folder, session, name)
    put_section(folder, experiments.on_vits16(session), "rules")
    put_trade_offs(folder, session)
    return session


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return session_in(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A session with DINO's weights, of which a section is stored."""
    folder = tmp_path_factory.mktemp("dino")
    session = session_in(folder, "lite")
    put_section(folder, session, "half")
    return session


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """write(session) -> (folder with numbers.tex and tables/, judged claims), once a session."""
    @functools.cache
    def write(store_root, name):
        folder = tmp_path_factory.mktemp("report")
        return folder, make_numbers.write(session_in(store_root, name), folder)
    return lambda session: write(session.store.root, session.preset)


def numbers_in(folder) -> str:
    return (folder / "numbers.tex").read_text(encoding="utf-8")


# ------------------------------------------------------------------ numbers and tables
def test_without_results_nothing_is_claimed_and_no_table_is_made(empty, written):
    folder, judged = written(empty)
    assert not list((folder / "tables").iterdir())
    assert {verdict for _, verdict in judged.values()} == {"missing"}
    numbers = numbers_in(folder)
    assert "setcell" not in numbers
    assert "setgap" not in numbers
    assert "setclaim" not in numbers
    assert "\\setstate{grid}{0}{45}" in numbers
    assert "\\setsetting{num_clients}{100}" in numbers


def test_with_all_results_every_table_is_whole(complete, written):
    folder, judged = written(complete)
    made = {f.stem for f in (folder / "tables").iterdir()}
    assert made == set(re.findall(r"\\runtable\{(\w+)\}", TEXT)) | {"mapplot"}
    for table in (folder / "tables").iterdir():
        if table.stem == "map":   # ten times the best rate need not have been tried
            continue
        for line in table.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"&\s*(&|\\\\)", line.removeprefix(" &")), (table.name, line)
    for state in re.findall(r"\\setstate\{(\w+)\}\{(\d+)\}\{(\d+)\}", numbers_in(folder)):
        assert state[1] == state[2], state
    assert "missing" not in {verdict for _, verdict in judged.values()}


def test_a_cell_shows_its_mean_and_interval_and_how_many_seeds_are_missing(tmp_path):
    session = session_in(tmp_path)
    label = ("random", "Nc=1")
    cfg = SECTIONS["rules"].cells(session)[label]
    put_search(tmp_path, session, cfg)
    for seed, test in enumerate((0.30, 0.32, 0.34)):
        put(tmp_path, replace(cfg, seed=seed), 0.4, test)
        cell = cells_of.read_section(SECTIONS["rules"], session)[label]
        if seed == 0:
            assert tables.test(cell) == "\\mean{30.0}{}{1}"
    # half-width: t of 2 degrees of freedom, 4.303, times 2 / sqrt(3)
    assert tables.test(cell) == "\\mean{32.0}{5.0}{}"
    assert tables.start(cell) == "35.0"


@pytest.mark.parametrize(("number", "expected"), [
    (0.001, "0.001"), (100, "100"), (1e-5, "10^{-5}"), (3e-5, "3\\cdot 10^{-5}")])
def test_rates_are_written_as_mathematics(number, expected):
    assert tables.power(number) == expected


def test_a_cell_waits_for_the_search_of_its_rate(tmp_path):
    session = session_in(tmp_path)
    label = ("random", "Nc=1")
    cfg = SECTIONS["rules"].cells(session)[label]
    put(tmp_path, cfg, 0.4, 0.39)   # stored and tested, but no neighbouring rate was tried
    assert tables.test(cells_of.read_section(SECTIONS["rules"], session)[label]) == ""
    put_search(tmp_path, session, cfg)
    put(tmp_path, cfg, 0.4, 0.39)
    cell = cells_of.read_section(SECTIONS["rules"], session)[label]
    assert tables.test(cell) == "\\mean{39.0}{}{1}"
    edge = replace(cell, bracketed=False)
    assert tables.test(edge) == "\\mean{39.0}{}{1}\\edge"


def test_rows_and_columns_without_a_number_are_left_out():
    table = tables.tabular(["", "a", "b"], [["x", "1", ""], ["y", "", ""], ["\\midrule"],
                                                  ["z", "2", ""]])
    assert table.splitlines() == ["\\begin{tabular}{@{}lc@{}}", "\\toprule", " & a \\\\",
                                  "\\midrule", "x & 1 \\\\", "\\midrule", "z & 2 \\\\",
                                  "\\bottomrule", "\\end{tabular}"]
    assert tables.tabular(["", "a"], [["x", ""]]) == ""


def gains_of(points: dict[float, float]) -> Gains:
    """Runs that went from the start to these points at once; minus infinity: diverged."""
    return Gains({lr: [0.0, end] if end > -math.inf else [] for lr, end in points.items()})


@pytest.mark.parametrize(("points", "expected"), [
    ([-1, 2, 3, -4], "\\range{0.03}{0.1}"),
    ([1, 2, 3, -4], "\\range{\\le 0.01}{0.1}"),
    ([1, -2, 3, 4], "\\range{0.1}{\\ge 0.3}"),        # a lower rate that gains is another range
    ([-1, -2, -3, -4], "\\norange"),
    ([-1, 2, -math.inf, 1], "\\range{0.03}{0.03}"),   # the third run diverged
])
def test_the_range_of_rates_that_gain(points, expected):
    gains = gains_of(dict(zip([0.01, 0.03, 0.1, 0.3], points, strict=True)))
    assert tables.range_of(gains) == expected


def test_what_is_left_of_a_gain_at_higher_rates():
    gains = gains_of({0.01: 1.0, 0.03: 3.0, 0.1: 2.0, 0.3: -math.inf})
    assert (gains.best, gains.above_best(3), gains.above_best(10)) == (0.03, 2.0, -math.inf)
    assert gains_of({0.01: 1.0, 0.03: 1.0}).best == 0.01
    assert gains_of({0.01: 1.0}).above_best(3) is None
    assert Gains({0.01: [0.0, -3.0, 1.0]}).dip == -3
    assert gains.dip == 0
    assert [tables.signed(points) for points in (2.04, -math.inf, None)] == [
        "$+2.0$", "\\diverged", ""]


def test_the_map_has_all_rates_that_were_tried(tmp_path):
    session = session_in(tmp_path)
    cfg = SECTIONS["rules"].cells(session)["random", "Nc=1"]
    put_search(tmp_path, session, cfg)
    like = experiments.searched_like(cfg, session)
    put(tmp_path, replace(like, lr=10.0), 0.05)   # a run of the map, no part of the search
    gains = cells_of.read_gains(session)
    assert gains.keys() == {("random", "Nc=1")}
    points = gains["random", "Nc=1"].points
    below, own, above = (rate_of(rung_of(like.lr) + step) for step in (-1, 0, 1))
    best = 100 * (accuracy_of(like) - 0.35)
    assert points == pytest.approx({below: 3, own: best, above: 3, 10.0: -30})
    drawn = tables.map_plot(tables.on_map(gains, session))
    assert f"({below:g},3.00)" in drawn
    assert "(10,-30.00)" in drawn


def test_the_reach_is_the_first_vectors_length_at_the_highest_rate_that_gains():
    gains = Gains({0.1: [0.0, 2.0], 0.3: [0.0, 1.0], 1.0: [0.0, -1.0]}, {0.1: 4.0, 0.3: 9.0})
    assert gains.reach == 9.0
    assert Gains({0.1: [0.0, -2.0]}, {0.1: 4.0}).reach is None


# ------------------------------------------------------------------ claims
def judged_with(tmp_path, a, b, expected, start=None):
    """The verdict on rules at one class a client: test accuracies (%) by seed of two rules."""
    session = session_in(tmp_path)
    of_rules = SECTIONS["rules"].cells(session)
    for rule, accuracies in (("random", a), ("query_key", b)):
        cfg = of_rules[rule, "Nc=1"]
        put_search(tmp_path, session, cfg)
        for seed, accuracy in enumerate(accuracies):
            put(tmp_path, replace(cfg, seed=seed), 0.4, accuracy / 100)
    claim = dict(a=["rules", "random", "Nc=1"], b=["rules", "query_key", "Nc=1"], value_a="test",
                 value_b="test", expected=expected, family="rules")
    found = {"rules": cells_of.read_section(SECTIONS["rules"], session)}
    return claims_of.judge({"x": claim}, found)["x"]


@pytest.mark.parametrize(("a", "b", "holds"), [
    ((35, 36, 37), (30.0, 31.1, 31.9), "above"),     # differences 5, 4.9, 5.1
    ((30.0, 31.1, 31.9), (35, 36, 37), "below"),
    ((30, 36, 33), (33, 33, 33), "none"),            # differences -3, 3, 0
])
def test_a_claim_stands_only_if_the_interval_agrees(tmp_path, a, b, holds):
    for expected in ("above", "below", "none"):
        found, verdict = judged_with(tmp_path, a, b, expected)
        assert verdict == ("stands" if expected == holds else "wrong"), found
    assert judged_with(tmp_path, a, b, "open")[1] == "open"


def test_a_cell_waits_for_the_seeds_that_its_section_asks_for(tmp_path):
    session = session_in(tmp_path)
    label = ("random", "Nc=1")
    cfg = SECTIONS["rules"].cells(session)[label]
    put_search(tmp_path, session, cfg)
    for seed in range(4):
        put(tmp_path, replace(cfg, seed=seed), 0.4, 0.4)
    more = replace(session, scale=replace(session.scale, more_seeds=(3, 4)))
    for asking, stored, wanted in ((session, 3, 3), (more, 4, 5)):
        cell = cells_of.read_section(SECTIONS["rules"], asking)[label]
        assert (len(cell.runs), len(cell.cfgs)) == (stored, wanted)


def test_a_claim_is_missing_until_all_seeds_are_there(tmp_path):
    found, verdict = judged_with(tmp_path, (35, 36), (30, 31.2), "above")
    assert (found.seeds, verdict) == (2, "missing")


def test_equality_needs_an_interval_within_the_margin(tmp_path):
    near, verdict = judged_with(tmp_path, (33.0, 34.1, 35.1), (33.1, 34.0, 35.0), "equal")
    assert (near.seeds, verdict) == (3, "stands")
    far, verdict = judged_with(tmp_path, (33.0, 34.1, 35.1), (33.1, 36.0, 32.0), "equal")
    assert verdict == "wrong", far


def test_holms_method_counts_the_claims_of_a_family(monkeypatch):
    """p = 0.03 is small enough alone, and twice that is not."""
    found = experiments.Comparison(1.0, 0.1, 1.9, 0.03, 1.0, 3, "paired t")
    monkeypatch.setattr(claims_of, "comparison", lambda *given: found)
    cell = cells_of.Cell(("x",), [None] * 3, None, None, True)
    cells = {name: {cell.label: cell} for name in ("one", "two")}

    def judged(*families):
        claims = {str(i): dict(a=["one", "x"], b=["two", "x"], expected="above", family=family)
                  for i, family in enumerate(families)}
        return [verdict for _, verdict in claims_of.judge(claims, cells).values()]
    assert judged("one", "two") == ["stands", "stands"]
    assert judged("one", "one") == ["wrong", "wrong"]


def test_a_claim_is_of_the_family_of_its_section_unless_it_names_one():
    assert CLAIMS["skew-nc1"]["family"] == "grid"
    assert CLAIMS["half-one-iid"]["family"] == CLAIMS["half-random-iid"]["family"] == "half"


def test_unsure_is_a_direction_that_holms_method_leaves_open():
    found = experiments.paired_t([0.8, 1.0, 1.3])
    assert found.low > 0
    assert claims_of.stands(found, 0.06, "unsure")
    assert not claims_of.stands(found, found.p, "unsure")
    around_zero = experiments.paired_t([-0.8, 1.0, 1.3])
    assert not claims_of.stands(around_zero, 0.06, "unsure")


def test_a_cell_waits_for_the_search_whose_rate_it_takes(tmp_path):
    session = session_in(tmp_path)
    for cfg in experiments.section_runs("consensus", session):
        put(tmp_path, cfg, 0.4, 0.4)
    shown = cells_of.read_section(SECTIONS["consensus"], session)
    assert all(len(cell.runs) == 0 for cell in shown.values())
    for cfg in SECTIONS["rules"].cells(session).values():
        put_search(tmp_path, session, cfg)
    shown = cells_of.read_section(SECTIONS["consensus"], session)
    assert all(len(cell.runs) == len(cell.cfgs) for cell in shown.values())


def test_gains_of_a_stand_in_are_not_shown_as_another_shardings(tmp_path):
    small = session_in(tmp_path)
    stand_ins = {"classes_per_client": {10: None}}
    session = replace(small, scale=replace(small.scale, stand_ins=stand_ins))
    put_search(tmp_path, session, SECTIONS["rules"].cells(session)["random", "IID"])
    assert list(cells_of.read_gains(session)) == [("random", "IID")]


def test_two_tested_runs_of_one_seed_are_compared_on_the_same_images(tmp_path, monkeypatch):
    """The first gets 60 more right of the same 1000, and none less: no chance of two samples."""
    session = session_in(tmp_path)
    labels = torch.zeros(1000, dtype=torch.long)
    monkeypatch.setattr(experiments.utils, "load_data",
                        lambda cfg: SimpleNamespace(test_labels=labels))
    cells = {}
    for rule, right in (("random", 460), ("query_key", 400)):
        cfg = SECTIONS["rules"].cells(session)[rule, "Nc=1"]
        put_search(tmp_path, session, cfg)
        put(tmp_path, cfg, 0.4, right / 1000)
        predictions = io.BytesIO()
        np.save(predictions, (np.arange(1000) >= right).astype(np.uint8))
        session.store.write(f"{run_name(cfg)}.npy", predictions.getvalue())
        cells |= cells_of.read_section(SECTIONS["rules"], session)
    claim = dict(a=["rules", "random", "Nc=1"], b=["rules", "query_key", "Nc=1"], value_a="test",
                 value_b="test")
    kept = replace(session.store, frozen=False)
    found = claims_of.comparison(claim, {"rules": cells}, kept)
    assert (found.method, found.difference) == ("McNemar within a seed", pytest.approx(6))
    assert found.low == pytest.approx(6 - 1.96 * 100 * math.sqrt(60 - 3.6) / 1000, abs=0.01)

    # which were right is kept: the report is made without the data set
    def none_here(cfg):
        raise FileNotFoundError("no data set")
    monkeypatch.setattr(experiments.utils, "load_data", none_here)
    assert claims_of.comparison(claim, {"rules": cells}, session.store) == found
    for note in kept.names("notes/correct_*"):
        kept.delete(note)
    assert claims_of.comparison(claim, {"rules": cells}, session.store).method == "two samples"


def test_two_runs_of_one_seed_are_compared_as_independent_samples():
    found = claims_of.of_one_seed(40.0, 35.0, 5000)
    half = 1.959964 * math.sqrt((0.4 * 0.6 + 0.35 * 0.65) / 5000)
    assert found.difference == pytest.approx(5)
    assert (found.low, found.high) == pytest.approx((5 - 100 * half, 5 + 100 * half))
    assert claims_of.stands(found, found.p, "above")
    near = claims_of.of_one_seed(40.0, 39.0, 5000)
    assert claims_of.stands(near, near.p, "none")
    assert not claims_of.stands(near, near.p, "above")
    # one standard error is 0.98 points: both one-sided tests are far from sure
    assert not claims_of.stands(near, near.p, "equal")
    assert near.p_equivalent == pytest.approx(0.5, abs=0.01)


def test_the_claims_that_stand_are_the_ones_that_are_stated(complete, written):
    folder, judged = written(complete)
    stated = set(re.findall(r"\\setclaim\{([\w-]+)\}", numbers_in(folder)))
    assert stated == {name for name, (_, verdict) in judged.items() if verdict == "stands"}
    with_gap = set(re.findall(r"\\set(?:gap|ratio)\{([\w-]+)\}", numbers_in(folder)))
    assert with_gap == {name for name, (found, _) in judged.items() if found.seeds}


# ------------------------------------------------------------------ this report and its results
def test_the_report_follows_from_the_results_here(tmp_path):
    session = replace(session_in(ROOT / "results"), scale=experiments.SCALES["small"])
    if not numbers_in(REPORT).startswith(make_numbers.stamp(session)):
        pytest.skip("results/ has other runs than the report is made of: make report")
    judged = make_numbers.write(session, tmp_path)
    wrong = {name: str(found) for name, (found, verdict) in judged.items() if verdict == "wrong"}
    assert not wrong, "the text says what the runs do not: change claims.toml and text.tex"
    new = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*.tex")}
    old = {f.relative_to(REPORT): f.read_bytes()
           for f in [REPORT / "numbers.tex", *(REPORT / "tables").glob("*.tex")]}
    assert new == old, "results/ and report/ differ: make report"


def test_the_differences_in_the_readme_are_the_reports():
    number = r"([+−]\d+\.\d)"
    gap = re.compile(rf"{number} \({number} to {number}\)(¹?)")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    numbers = (REPORT / "numbers.tex").read_text(encoding="utf-8").replace("-", "−")
    setgap = re.compile(rf"\\setgap\{{.*?\}}\{{{number}\}}\{{{number}\}}\{{{number}\}}\{{(\d)\}}")
    reported = {(*found[:3], "¹" if found[3] == "1" else "") for found in setgap.findall(numbers)}
    stated = gap.findall(readme)
    assert stated
    assert [found for found in stated if found not in reported] == []
    times = re.findall(r"([\d.]+) times \(([\d.]+) to ([\d.]+)\)", readme)
    ratios = re.findall(r"\\setratio\{.*?\}\{(.*?)\}\{(.*?)\}\{(.*?)\}", numbers)
    assert times
    assert [found for found in times if found not in ratios] == []


def test_numbers_say_of_which_runs_they_are(tmp_path):
    session = session_in(tmp_path)
    before = make_numbers.stamp(session)
    assert before.startswith("% 0 runs, ")
    put(tmp_path, session.base, 0.4)
    after = make_numbers.stamp(session)
    assert after.startswith("% 1 runs, ")
    put(tmp_path, replace(session.base, seed=1), 0.4)
    assert len({before, after, make_numbers.stamp(session)}) == 3


# ------------------------------------------------------------------ the text
def used(command: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"\\{command}\{{([^{{}}]*)\}}", text)


def names_in(command: str) -> set[str]:
    """Of a command whose argument is a list of names: all of them."""
    return {name for names in used(command) for name in names.split(",")}


def test_what_the_text_asks_for_exists(empty, complete, written):
    known = cells_of.read_cells(empty)
    keys = {f"{name}/{cell.key}" for name, of in known.items() for cell in of.values()}
    for command in ("test", "val", "start", "rateof"):
        assert set(used(command)) <= keys, command
    rules = {cell.key for cell in known["rules"].values()}
    for command in ("gain", "gainthree", "gainten", "dip", "bestrate", "rangeof", "reach"):
        assert set(used(command)) <= rules, command
    numbers = numbers_in(written(complete)[0])
    assert set(used("setting")) <= set(re.findall(r"\\setsetting\{(.*?)\}", numbers))
    of_tables = {name for names in re.findall(r"\\runtable\{\w+\}\{([\w,]+)\}", TEXT)
                 for name in names.split(",")}
    assert names_in("pending") | names_in("ifsome") | of_tables <= known.keys()
    made = tables.make_tables(known, empty).keys()
    assert set(re.findall(r"\\runtable\{(\w+)\}", TEXT)) == made - {"mapplot"}
    assert set(used("seetable")) | set(used("iftable")) <= made


def test_every_experiment_says_when_it_is_not_there():
    said = names_in("pending")
    # the map is drawn from searches as well, and the best of the longer rates stands in "longer"
    assert said == SECTIONS.keys() - {"rate_map", "longer_rates"} | {"rules_larger"}
    assert "map" in used("iftable")


def test_every_claim_is_of_cells_that_exist_and_is_used(empty):
    known = cells_of.read_cells(empty)
    some_cell = next(iter(known["rules"].values()))
    known["interference"] = dict.fromkeys(experiments.trade_off_cells(empty), some_cell)
    gains = (*experiments.OTHER_GAINS, experiments.ONE_CLASS_GAIN)
    damages = {"log_damage", *(f"log_damage_{gain}" for gain in gains)}
    for name, claim in CLAIMS.items():
        assert claim["expected"] in claims_of.EXPECTED, name
        assert len(claims_of.sides(claim, known)) == 2, name
        values = {claim["value_a"], claim["value_b"]}
        if claim["a"][0] == "interference":
            assert len(values) == 1, name
            assert values <= damages, name
        else:
            assert values <= {"test", "val", "start", "test_start"}, name
    shown = {*used("gap"), *used("interval"), *used("claim"), *used("claimor")}
    assert shown == CLAIMS.keys()


GUARDED = re.compile(r"\\(?:claim|claimor|ifgaps)\{([\w,-]+)\}"
                     r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")


def test_a_difference_is_printed_only_where_it_is_there():
    rest = GUARDED.sub("", TEXT)
    assert used("gap", rest) + used("interval", rest) == []
    for guards, sentence in GUARDED.findall(TEXT):
        inner = GUARDED.sub("", sentence)
        assert set(used("gap", inner) + used("interval", inner)) <= set(guards.split(",")), inner


SENTENCE = re.compile(r"\\claim(?:or)?\{([\w-]+)\}\{((?:[^{}]|\{[^{}]*\})*)\}")


def test_a_claims_sentence_says_what_is_checked():
    sentences = SENTENCE.findall(TEXT)
    assert len(sentences) == len(re.findall(r"\\claim(?:or)?\{", TEXT))
    words = dict(above="above", below="below", none="no difference", equal="equal",
                 unsure="Holm's method leaves open")
    for name, sentence in sentences:
        expected = CLAIMS[name]["expected"]
        assert expected != "open", name
        said = {kind for kind, word in words.items() if word in sentence}
        assert said == {expected}, (name, sentence)


def typed_digits(text: str) -> list[str]:
    """Digits of the prose, less names, commands' arguments, and one-digit numbers of formulas."""
    names = r"CIFAR-100|ViT-S/16"
    commands = (r"\\(?:cite|ref|eqref|label|test|val|start|rateof|rangeof|gain|gainthree|gainten"
                r"|dip|bestrate|reach|gap|interval|ifgaps|ifnogaps|claim|claimor|setting|pending|seetable|seefig"
                r"|iftable|runtable|ifsome|plot(?:\[figure\*\])?|setlength\{\\\w+\}|vspace)"
                r"\{[^{}]*\}")
    text = re.sub(f"{names}|{commands}", "", text)
    text = re.sub(r"\$[^$]*\$|\\begin\{equation\}.*?\\end\{equation\}",
                  lambda formula: " ".join(re.findall(r"\d+\.\d+|\d{2,}", formula[0])), text,
                  flags=re.DOTALL)
    return re.findall(r"\d[\d.,]*", text)


def test_no_number_that_was_measured_is_typed():
    assert typed_digits(TEXT) == []
    assert typed_digits("gains 1.2 points ($-2.0$ to $x^2$) on CIFAR-100") == ["1.2", "2.0"]


def test_every_citation_has_its_entry_and_every_entry_is_cited():
    bib = (REPORT / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"@\w+\{([\w-]+),", bib)
    cited = {key.strip() for keys in used("cite") for key in keys.split(",")}
    assert cited == set(entries)
    assert len(entries) == len(set(entries))


def test_references_within_the_text_have_their_labels():
    assert {*used("ref"), *used("eqref")} <= set(used("label"))
    plots = re.findall(r"\\plot(?:\[figure\*\])?\{(\w+)\}", TEXT)
    assert set(used("seefig")) <= set(plots)
    assert len(plots) == len(set(plots))


def test_every_figure_is_drawn_by_the_project():
    drawn = (ROOT / "notebooks/figures.py").read_text(encoding="utf-8")
    drawn += "".join(f.read_text(encoding="utf-8") for f in (ROOT / "notebooks").glob("*.ipynb"))
    for name in re.findall(r"\\plot(?:\[figure\*\])?\{(\w+)\}", TEXT):
        assert re.search(rf'\\?"{name}\\?"', drawn), name


def test_the_authors_are_left_to_fill_in():
    assert "First Author (student ID)" in FRAME


# ------------------------------------------------------------------ the PDF
@pytest.fixture(scope="module", params=["empty", "here", "complete", "dino"])
def built(request, written, tmp_path_factory):
    """A folder in which LaTeX has built the report; "here": as it is committed."""
    if not (shutil.which("latexmk") and shutil.which("pdflatex") and shutil.which("bibtex")):
        pytest.skip("no LaTeX")
    folder = tmp_path_factory.mktemp(f"built_{request.param}")
    if request.param == "here":
        source = REPORT
    else:
        source, _ = written(request.getfixturevalue(request.param))
    for name in ("report.tex", "macros.tex", "abstract.tex", "text.tex", "references.bib"):
        shutil.copy(REPORT / name, folder)
    shutil.copy(source / "numbers.tex", folder)
    shutil.copytree(source / "tables", folder / "tables")
    if request.param == "here" and (ROOT / "figures").is_dir():
        shutil.copytree(ROOT / "figures", folder / "figures")
    done = subprocess.run(["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error",
                           "report.tex"], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    return folder


def test_nothing_is_overfull_or_undefined_and_the_text_ends_by_page_8(built):
    log = (built / "report.log").read_text(encoding="utf-8", errors="replace")
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert all(points <= 2 for points in wide), wide
    assert not re.search(r"undefined|multiply defined", log)
    aux = (built / "report.aux").read_text(encoding="utf-8", errors="replace")
    page = int(re.search(r"\\newlabel\{end\}\{\{[^}]*\}\{(\d+)\}", aux)[1])
    assert page <= 8


def test_the_pdf_says_what_is_missing_and_prints_no_hole(built):
    if not shutil.which("pdftotext"):
        pytest.skip("no pdftotext")
    done = subprocess.run(["pdftotext", built / "report.pdf", "-"], capture_output=True,
                          check=True)
    text = " ".join(done.stdout.decode().split())
    assert "[missing]" not in text
    # the text on stand-ins, and what it says of their runs alone, is not printed of DINO's
    assert ("stand-in" in text, "Tiny-ImageNet" in text) == (("dino" not in built.name,) * 2)
    if "empty" in built.name:
        assert "runs are not there yet" in text
    if "complete" in built.name:
        assert "runs are not there yet" not in text


def test_all_fonts_are_embedded(built):
    if not shutil.which("pdffonts"):
        pytest.skip("no pdffonts")
    done = subprocess.run(["pdffonts", built / "report.pdf"], capture_output=True, check=True)
    fonts = done.stdout.decode().splitlines()[2:]
    assert fonts
    for font in fonts:
        embedded = font.split()[-5]
        assert embedded == "yes", font


def test_figures_are_those_of_the_preset(written, dino, monkeypatch, tmp_path):
    folder, _ = written(dino)
    assert "\\setsetting{figures}{lite/}" in (folder / "numbers.tex").read_text(encoding="utf-8")
    for name in ("text.tex", "macros.tex"):
        shutil.copy(REPORT / name, folder)
    for place in ("figures/02_curves.pdf", "figures/lite/02_curves.pdf"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(overleaf, "REPORT", folder)
    monkeypatch.setattr(overleaf, "ROOT", tmp_path)
    assert overleaf.files()["figures/02_curves.pdf"] == tmp_path / "figures/lite/02_curves.pdf"


def test_the_zip_for_overleaf_has_what_the_report_inputs(tmp_path):
    overleaf.make_zip(tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        names = set(archive.namelist())
    inputs = {f"{name}.tex" for name in re.findall(r"\\input\{(\w+)\}", FRAME)}
    assert {"report.tex", "references.bib", *inputs} <= names
    assert {f"tables/{f.name}" for f in (REPORT / "tables").glob("*.tex")} <= names
    overleaf.make_zip(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_claims_file_is_plain_toml():
    with open(REPORT / "claims.toml", "rb") as file:
        assert tomllib.load(file).keys() == CLAIMS.keys()
