"""What notebooks are made of: figures, tables, plans, the growing picture, parts of sentences."""
import io
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import run_notebooks
from helpers import CFG, make_small
from PIL import Image

import utils
from notebooks import experiments, figures
from notebooks.experiments import SECTIONS, Comparison, open_session, section_runs
from utils import run_key, run_name


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The demo's, with two seeds and an empty store; nothing is loaded or trained."""
    monkeypatch.setattr(experiments, "or_synthetic", lambda cfg: cfg)
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.delenv("TRAIN", raising=False)
    made = open_session("demo", 2, workers=1)
    made.store.quiet = True
    return made


def put(store, cfg, start=0.30, end=0.35, seconds=10.0, client_norm=2.0, mean_norm=1.0):
    """A stored result whose validation accuracy goes from `start` to `end`, and a point above on
    test."""
    rows = [dict(round=0, val_top1=start, val_loss=3.0, test_top1=start, test_loss=3.0)]
    rows.append(dict(round=cfg.length, lr=cfg.lr, train_loss=2.0, val_loss=2.5, val_top1=end,
                     test_top1=end, test_loss=2.5, client_norm=client_norm,
                     mean_norm=mean_norm, bytes_up=1e6, bytes_down=1e6))
    scores = dict(loss=2.0, top1=end + 0.01, top5=0.6)
    mask = dict(per_layer={"attn.query.weight": [30, 100], "mlp.fc1.weight": [0, 100]}, bytes_up=1)
    result = dict(
        run=run_name(cfg), status="finished", error="", config=vars(cfg), key=run_key(cfg),
        history=rows, best_round=cfg.length, seconds=seconds, test=scores, test_of_best=scores,
        segments=[dict(hardware=utils.hardware(), code=utils.CODE_SHA256)], mask=mask)
    store.write(f"{run_name(cfg)}.json", utils.to_json(result))


def fill(session, section: str):
    """Of a frozen session the cells are known without any measurement."""
    frozen = replace(session, store=replace(session.store, frozen=True))
    for i, cfg in enumerate(section_runs(section, frozen)):
        put(session.store, cfg, end=0.35 + 0.001 * i)


# ------------------------------------------------------------------ figures
DRAWN = [
    (figures.draw_centralized_curves, "centralized", "01_curves"),
    (figures.draw_epochs, "centralized_epochs", "01_epochs"),
    (figures.draw_protocol, "protocol", "02_protocol"),
    (figures.draw_fedavg_curves, "fedavg_iid", "02_curves"),
    (figures.draw_norms, "fedavg_iid", "02_norms"),
    (figures.draw_grid, "grid", "03_grid"),
    (figures.draw_grid_curves, "grid", "03_curves"),
    (figures.draw_rates_of_grid, "grid", "03_rates"),
    (figures.draw_drift, "grid", "03_drift"),
    (figures.draw_six_models, "six_models", "04_six_models"),
    (figures.draw_traffic, "six_models", "04_traffic"),
    (figures.draw_composition, "calibration", "04_composition"),
    (figures.draw_rules, "rules", "05_rules"),
    (figures.draw_map, "rate_map", "05_map"),
    (figures.draw_map_by_length, "rate_map", "05_map_by_length"),
    (figures.draw_speed_matched, "speed_matched", "05_speed"),
    (figures.draw_methods, "methods", "05_methods"),
    (figures.draw_merges, "merges", "05_merges"),
]


@pytest.mark.parametrize(("draw", "section", "name"), DRAWN, ids=[d[2] for d in DRAWN])
def test_a_figure_of_what_is_stored_has_the_same_bytes_again_and_print_size(
        session, draw, section, name):
    frozen = replace(session, store=replace(session.store, frozen=True))
    fill(session, section)
    contents = []
    for _ in range(2):
        draw(frozen)
        contents.append([(session.figures / f"{name}.{kind}").read_bytes()
                         for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
    assert b"CreationDate" not in contents[0][1]
    width = Image.open(io.BytesIO(contents[0][0])).width / 200  # dots an inch
    assert width == pytest.approx(figures.PAGE, abs=0.01) or width == pytest.approx(
        figures.COLUMN, abs=0.01)


@pytest.mark.parametrize(("draw", "section", "name"), DRAWN, ids=[d[2] for d in DRAWN])
def test_a_figure_of_which_nothing_is_stored_says_so_and_leaves_no_file(
        session, draw, section, name, monkeypatch):
    said = []
    monkeypatch.setattr(figures, "display", lambda shown: said.append(shown.data))
    draw(replace(session, store=replace(session.store, frozen=True)))
    assert "stored yet" in said[0]
    assert not (session.figures / f"{name}.png").exists()


def test_a_figure_with_gaps_counts_them(session):
    cfgs = section_runs("grid", session)
    for cfg in cfgs[10:20]:  # of both seeds
        put(session.store, cfg)
    fig, _ = figures.figure()
    figures.note_missing(session, fig, "grid")
    assert f"{len(cfgs) - 10} of {len(cfgs)} runs are not there yet" in fig.get_supxlabel()
    assert "95 % t interval over seeds" in fig.get_supxlabel()


def test_means_and_their_intervals_are_the_textbooks():
    frame = pd.DataFrame(dict(x=[1, 1, 1, 2], y=[1.0, 2.0, 3.0, 5.0]))
    x, mean, half = figures.means_of(frame, "x", "y")
    assert x.tolist() == [1, 2]
    assert mean.tolist() == [2.0, 5.0]
    assert half[0] == pytest.approx(4.302653 / 3**0.5)  # t of 2 degrees of freedom, sd 1
    assert np.isnan(half[1])


def test_eight_series_differ_by_colour_marker_and_dash():
    looks = [figures.look(i) for i in range(8)]
    for name in ("color", "marker", "linestyle"):
        assert len({str(look[name]) for look in looks}) == 8


def test_ticks_are_large_enough_for_print():
    fig, ax = figures.figure()
    ax.plot([1, 2])
    assert min(label.get_fontsize() for label in ax.get_xticklabels()) >= 6.5


@pytest.mark.parametrize(("before", "after"), [((30.0, 30.5), (29.25, 31.25)),
                                               ((10.0, 50.0), (10.0, 50.0))])
def test_an_axis_of_accuracies_spans_two_points_at_least(before, after):
    _, ax = figures.figure()
    ax.set_ylim(before)
    figures.widen(ax)
    assert ax.get_ylim() == after


def test_figures_and_tables_of_synthetic_images_say_so(session):
    on_synthetic = replace(session, base=replace(session.base, dataset="synthetic"))
    fig, _ = figures.figure()
    figures.save_figure(on_synthetic, fig, "a", "nothing")
    assert [text.get_text() for text in fig.texts] == ["SYNTHETIC DATA"]
    table = figures.save_table(on_synthetic, pd.DataFrame({"test": [1]}), "b")
    assert "SYNTHETIC DATA" in table.to_string()


def test_tables_have_words_and_are_utf8_whatever_the_locale(session, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *a: "ascii")
    frame = pd.DataFrame({"test": ["1 ± 2"]}, index=["query_key"])
    table = figures.save_table(session, frame, "t")
    assert table.index.tolist() == ["query and key"]
    text = (session.figures / "t.csv").read_bytes().decode("utf-8")
    assert text == ",test (%)\nquery and key,1 ± 2\n"


def cell_with(number: int, text: str) -> str:
    """The source of the one cell of a notebook, counted from 1, that has this text."""
    notebook = run_notebooks.nbformat.read(run_notebooks.NOTEBOOKS[number - 1], as_version=4)
    (source,) = [cell.source for cell in notebook.cells if text in cell.source]
    return source


def test_a_rate_is_not_rounded_away(session, monkeypatch):
    """Those of *lite* and *full* are a hundred-thousandth."""
    row = dict(schedule="cosine", weight_decay=5e-4, batch_size=64, lr=3e-5, start=30.123456,
               val=40.123456)
    monkeypatch.setattr(experiments, "section_frames", lambda *args: (pd.DataFrame([row]), None))
    exec(cell_with(1, "01_schedules"), dict(experiments=experiments, figures=figures,
                                            session=session))
    lines = (session.figures / "01_schedules.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "cosine,0.0005,64,3e-05,30.1235,40.1235"


# ------------------------------------------------------------------ plans
def test_a_plan_counts_what_is_stored_and_goes_by_the_seconds_of_stored_runs(session):
    cfgs = experiments._unlike(section_runs("grid", session))
    steps = {cfg: experiments.steps_of(cfg) * cfg.length for cfg in cfgs}
    for cfg in cfgs[:-3]:
        put(session.store, cfg, seconds=2.0 * steps[cfg])
    frame = figures.plan(session, "grid")
    assert frame.loc["grid", "runs"] == len(cfgs)
    assert frame.loc["grid", "stored"] == len(cfgs) - 3
    (minutes,) = [c for c in frame.columns if c.startswith("minutes left, measured")]
    left = sum(steps[cfg] for cfg in cfgs[-3:])
    assert frame.loc["grid", minutes] == pytest.approx(2 * left / 60, rel=0.1)


def test_a_plan_says_that_it_estimates_where_nothing_is_stored(session):
    frame = figures.plan(session, "grid", "six_models")
    assert any("estimated" in c for c in frame.columns)
    assert frame.loc["all", "runs"] == frame.runs.iloc[:2].sum()


# ------------------------------------------------------------------ the growing picture
HISTORY = [dict(round=0, val_top1=0.3, val_loss=3.0),
           dict(round=2, val_top1=0.4, val_loss=2.5, train_loss=2.0)]


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, content):
        self.shown.append(content.data)


def test_the_picture_grows_in_one_place(monkeypatch):
    handle = Handle()
    calls = []

    def display(content, display_id):
        calls.append(content.data)
        return handle
    monkeypatch.setattr(figures, "display", display)
    monkeypatch.setattr(figures, "has_display", lambda: True)
    live = figures.Live()
    live(CFG, HISTORY[:1])
    live(CFG, HISTORY)  # too soon to be drawn
    live.finish()
    assert len(calls) == 1
    assert len(handle.shown) == 1
    assert "30.0 % at round 0" in calls[0]
    assert "40.0 % at round 2" in handle.shown[0]
    assert "2 of 4" in handle.shown[0]


def test_without_a_display_it_is_a_line_of_text(capsys):
    figures.Live()(CFG, HISTORY)
    assert capsys.readouterr().out == f"{run_name(CFG)}: 2 of 4, validation 40.0 %\n"


def test_training_a_section_calls_the_picture(session, monkeypatch, capsys):
    make_small(monkeypatch)
    section = replace(SECTIONS["grid"], cells=lambda s: {("IID", 2): CFG}, searched=False)
    monkeypatch.setitem(SECTIONS, "grid", section)
    figures.train_sections(replace(session, seeds=(0,)), "grid")
    said = capsys.readouterr().out
    assert f"{run_name(CFG)}: 2 of 4, validation" in said
    assert f"{run_name(CFG)}: 4 of 4, validation" in said


@pytest.mark.parametrize(("stop_at", "frozen", "raises"), [
    (math.inf, False, True),
    (-math.inf, False, False),  # at the end of HOURS no cell trains, and all show what is stored
    (math.inf, True, False),
])
def test_a_stopped_section_stops_the_cells_below(session, monkeypatch, stop_at, frozen, raises):
    trained = []

    def run_section(name, session, live):
        trained.append(name)
        return [CFG]  # something is left
    monkeypatch.setattr(experiments, "run_section", run_section)
    store = replace(session.store, frozen=frozen)
    stopped = replace(session, stop_at=stop_at, store=store)
    if raises:
        with pytest.raises(figures.Stopped) as told:
            figures.train_sections(stopped, "rules", "half")
        shown = told.value._render_traceback_()  # what IPython shows
        assert "go on from here" in shown[0]
    else:
        figures.train_sections(stopped, "rules", "half")
    assert trained == ["rules"]


def test_ones_own_ideas_are_not_trained_at_rates_half_searched(session, monkeypatch):
    session = replace(session, preset="small", scale=experiments.SCALES["small"])
    ideas = {"mine": dict(rule="random")}
    monkeypatch.setattr(experiments, "search_rates", lambda cfgs, session, live: [
        experiments.Ladder(cfg, {}, None, (0.1,)) for cfg in cfgs])
    monkeypatch.setattr(figures, "train_all", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(figures.Stopped):
        figures.train_own(session, ideas)


@pytest.mark.parametrize("preset", experiments.SCALES)
def test_ones_own_run_that_is_stopped_is_one_of_those_shown(session, monkeypatch, preset):
    """A run of a search that is evaluated at its end alone would show nothing of stopping."""
    base = utils.preset(preset, dataset="cifar100")
    session = replace(session, preset=preset, base=base, scale=experiments.SCALES[preset])
    ideas = {"mine": dict(rule="random")}
    searched = []
    trained = []

    def search_rates(cfgs, session, live):
        starts = [experiments.searched_like(cfg, session) for cfg in cfgs]
        searched.extend(starts)
        for cfg in starts:
            put(session.store, replace(cfg, lr=3 * cfg.lr))
        return [experiments.Ladder(cfg, {}, None, ()) for cfg in starts]

    def train_all(cfgs, *args, **options):
        trained.extend(cfgs)
        return []
    monkeypatch.setattr(experiments, "search_rates", search_rates)
    monkeypatch.setattr(figures, "train_all", train_all)
    first = figures.first_own_run(session, ideas)
    figures.train_own(session, ideas)
    assert run_name(first) in {run_name(cfg) for cfg in searched + trained}
    steps = session.scale.sweep
    assert first == experiments.with_steps(first, steps)
    assert first.eval_every < first.num_rounds == steps // 4


def test_a_searched_run_of_ones_own_is_not_trained_again_to_be_stopped(session, monkeypatch):
    """When the cell is run again, its weights may be gone: it lost the search."""
    monkeypatch.setattr(figures, "first_own_run", lambda session, ideas: CFG)
    put(session.store, CFG)
    path = session.store.root / f"{run_name(CFG)}.json"
    result = utils.parse_result(path)
    result.pop("test")
    session.store.write(path.name, utils.to_json(result))
    monkeypatch.setattr(experiments, "train", lambda *args, **options: pytest.fail("trained"))
    exec(cell_with(5, "press_stop"), dict(experiments=experiments, figures=figures,
                                          session=session))


def test_ones_own_run_is_not_stopped_at_a_rate_half_searched(session, monkeypatch):
    session = replace(session, preset="lite", scale=experiments.SCALES["lite"])
    monkeypatch.setattr(experiments, "search_rates", lambda cfgs, session, live: [
        experiments.Ladder(cfg, {}, None, (0.1,)) for cfg in cfgs])
    with pytest.raises(figures.Stopped):
        figures.first_own_run(session, {"mine": dict(rule="random")})


# ------------------------------------------------------------------ plans and notes
def test_a_run_of_several_sections_counts_once_in_the_sum(session, monkeypatch):
    first, second, third = (replace(CFG, seed=s) for s in range(3))
    for name, cfgs in (("rules", (first, second)), ("half", (second, third))):
        section = replace(SECTIONS[name], searched=False, every_seed=False,
                          cells=lambda s, cfgs=cfgs: {(cfg.seed, ""): cfg for cfg in cfgs})
        monkeypatch.setitem(SECTIONS, name, section)
    monkeypatch.setattr(experiments, "section_runs", lambda name, session: list(
        SECTIONS[name].cells(session).values()))
    monkeypatch.setattr(figures, "section_runs", experiments.section_runs)
    put(session.store, second)
    table = figures.plan(session, "rules", "half")
    assert table.runs.to_dict() == {"rules": 2, "half": 2, "all": 3}
    assert table.stored.to_dict() == {"rules": 1, "half": 1, "all": 1}


def test_bars_are_named_where_there_are_bars(session):
    cfgs = section_runs("grid", session)
    for cfg in cfgs:
        if cfg.seed == 0:
            put(session.store, cfg)
    fig, _ = figures.figure()
    figures.note_missing(session, fig, "grid", also="And more.")
    said = fig.get_supxlabel()
    assert said.startswith("One seed. ")
    assert said.endswith(" And more.")


def test_what_a_picture_leaves_out_is_said():
    _, ax = figures.figure()
    assert figures.leave_out_collapse(ax, [40.0, 39.0, 10.0, math.nan]) == (
        "1 of 4 runs end below the axis, 1 diverged.")
    assert figures.leave_out_collapse(ax, [40.0, 39.0]) == ""


# ------------------------------------------------------------------ drift
def test_clients_are_compared_at_one_rate(session):
    """Norms of orthogonal vectors, and of equal ones; of rates in both the one in the middle."""
    cells = SECTIONS["grid"].cells(session)
    clients = utils.cohort_size(session.base.num_clients, session.base.participation)
    steps = session.scale.local_steps[0]
    means = {"IID": 1.0, "Nc=1": 1 / math.sqrt(clients)}   # all agree; none agrees with another
    shardings = [where for where in means if (where, steps) in cells]
    for where in shardings:
        like = experiments.searched_like(cells[where, steps], session)
        for lr in (0.001, 0.01):
            put(session.store, replace(like, lr=lr), client_norm=2 * lr, mean_norm=2 * lr
                * means[where])
    drift = figures.drift_of(session)
    assert set(drift.lr) == {0.001, 0.01}
    for where in shardings:
        part = drift[drift.sharding == where]
        assert part.speed.tolist() == pytest.approx([2.0, 2.0])
        agreement = 1.0 if where == "IID" else 0.0
        assert part.cosine.tolist() == pytest.approx([agreement, agreement], abs=1e-9)
    assert len(shardings) == 2
    lr, iid, one = figures.drift_at_one_rate(session, *shardings)
    assert lr in (0.001, 0.01)
    assert (iid.cosine, one.cosine) == pytest.approx((1.0, 0.0), abs=1e-9)


# ------------------------------------------------------------------ answers
def comparison(low, high, p, seeds=3):
    return Comparison((low + high) / 2, low, high, p, 1.0, seeds, "")


def test_comparisons_as_parts_of_sentences():
    assert figures.against(comparison(0.5, 1.5, 0.01), "X") == (
        "1.0 points above X (95 % interval +0.5 to +1.5)")
    assert figures.against(comparison(-1.5, -0.5, 0.01), "X") == (
        "1.0 points below X (95 % interval −1.5 to −0.5)")
    assert figures.against(comparison(-0.5, 1.5, 0.3, 1), "X") == (
        "without a difference to X that these runs could show (95 % interval −0.5 to +1.5, one "
        "seed)")
    assert "not known yet" in figures.against(experiments.NOTHING, "X")
    near = replace(comparison(0.1, 0.3, 0.01), p_equivalent=0.01)
    assert figures.against(near, "X") == (
        "0.2 points above X (95 % interval +0.1 to +0.3, equal within ±1)")


@pytest.mark.parametrize(("epochs", "val", "said"), [
    ((1, 2, 4, 8), (40, 44, 44.4, 46), "2 are enough"),
    ((1, 2, 4), (40, 44, 45), "None of these is enough"),
    ((1, 2, 8), (40, 44, 44.4), "None of these is enough"),   # 8 is not twice 2
    ((1, 4), (40, 44), ""),
    ((1,), (40,), "")])
def test_how_many_epochs_are_enough(epochs, val, said):
    found = figures.enough_epochs(pd.DataFrame(dict(epochs=epochs, val=val)))
    assert found.startswith(said)
    assert said or not found


def test_the_best_server_is_known_once_all_are_stored(session):
    cells = SECTIONS["methods"].cells(session)
    where = experiments.nc_label(session.scale.skews[0])
    masked = [label for label in cells if label[1:] == ("masked", where)]
    for i, label in enumerate(masked):
        assert figures.best_server(session, "methods", "masked", where) == ()
        put(session.store, cells[label], end=0.9 if label[0] == "FedAvg" else 0.5 + i / 100)
    assert figures.best_server(session, "methods", "masked", where) == masked[-1]


def trade_offs(ratios: dict, gains=(0.1, 1.0)) -> pd.DataFrame:
    """At one class a client: of "random" a damage of a tenth of the gain, of "least_sensitive" so
    many times that, by seed."""
    rows = []
    for seed, ratio in ratios.items():
        for gain in gains:
            rows.append(("random", "Nc=1", seed, gain, gain, gain / 10))
            rows.append(("least_sensitive", "Nc=1", seed, gain, gain, gain / 10 * ratio))
    return pd.DataFrame(rows, columns=["rule", "sharding", "seed", "lr", "gain", "damage"])


@pytest.mark.parametrize(("measured", "said"), [
    (trade_offs({0: 2.0}), "2.00 times (one seed, no interval) the damage"),
    # sqrt(4.4); in logarithms two seeds' half-width is 12.706 * log(1.1) / 2: a factor of 1.832
    (trade_offs({0: 2.0, 1: 2.2}), "2.10 times (95 % interval 1.14 to 3.84) the damage"),
    (trade_offs({0: 2.0}, gains=(0.6, 1.0)), "a damage that is not known yet"),
    (trade_offs({}), "a damage that is not known yet"),
])
def test_damage_at_equal_gain_as_part_of_a_sentence(session, monkeypatch, measured, said):
    monkeypatch.setattr(experiments, "trade_offs", lambda session: measured)
    found = figures.damage_against(session, "least_sensitive", "random", "Nc=1")
    assert found.startswith(said)
    assert "not known" in figures.damage_against(session, "least_sensitive", "random", "IID")


def test_the_order_of_damages_is_shown_at_several_gains(session, monkeypatch):
    measured = trade_offs({0: 2.0, 1: 2.2}).replace("random", "dense")
    monkeypatch.setattr(experiments, "trade_offs", lambda session: measured)
    table = figures.damage_table(session)
    assert list(table.columns) == [("Nc=1", f"{gain} nats") for gain in
                                   ("0.175", "0.25", "0.35", "0.5")]
    assert set(table.loc["least_sensitive"]) == {"2.10 (1.14 to 3.84)"}
    assert set(table.loc["dense"]) == {"1.00"}
    assert set(table.loc["random"]) == {"–"}


@pytest.mark.parametrize("reference", [{}, dict(own=[[0.1], [0.3]], others=[[0.4], [0.4]])])
def test_unlearning_is_drawn_with_or_without_its_reference(session, monkeypatch, reference):
    forgotten = dict(alphas=[0, 1], own=[[0.5, 0.2], [0.7, None]], others=[[0.4, 0.4], [0.4, 0.3]])
    found = {"dense": (forgotten, reference)}
    monkeypatch.setattr(experiments, "unlearning", lambda session: found)
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda s, fig, name, alt: drawn.append(fig))
    figures.draw_unlearning(session)
    own, others = drawn[0].axes
    lines = [list(line.get_ydata()) for line in own.get_lines()]
    assert lines[0] == pytest.approx([60, 20])
    assert len(lines) == len(others.get_lines()) == (2 if reference else 1)
    if reference:
        assert lines[1] == pytest.approx([20, 20])

    monkeypatch.setattr(experiments, "unlearning", lambda session: {})
    figures.draw_unlearning(session)  # a note in its place
    assert len(drawn) == 1


def test_interference_is_drawn_of_what_is_known(session, monkeypatch):
    measured = trade_offs({0: 2.0, 1: 3.0})
    monkeypatch.setattr(experiments, "trade_offs", lambda session: measured)
    cells = SECTIONS["rules"].cells(session)
    put(session.store, cells["random", "Nc=1"])
    figures.draw_interference(session)
    assert (session.figures / "05_interference.pdf").is_file()
    monkeypatch.setattr(experiments, "trade_offs", lambda session: measured[:0])
    (session.figures / "05_interference.pdf").unlink()
    figures.draw_interference(session)   # a note in its place
    assert not (session.figures / "05_interference.pdf").exists()


def test_an_answer_says_what_is_missing_and_that_the_demo_says_nothing(session):
    text = figures.answer(session, "03", "One.", "", "Two.").data
    assert text.startswith("One.\n\nTwo.\n\n")
    wanted = len(section_runs("grid", session))
    assert f"{wanted} of {wanted} runs are not there yet" in text
    assert "its accuracies say nothing" in text


def test_intervals_of_one_seed_are_said_to_be_of_the_images(session):
    one = figures.answer(replace(session, seeds=(0,)), "03", "One.").data
    assert "of the test images alone" in one
    three = figures.answer(replace(session, seeds=(0, 1, 2)), "03", "One.").data
    assert "over seeds" in three
    assert "test images alone" not in three


@pytest.mark.parametrize(("gains", "said"), [
    # a gap: rates beyond one that does harm do not count
    ({0.01: 0.5, 0.1: -1.0, 1.0: 0.2, 3.0: 2.0, 10.0: math.nan, 30.0: 1.0}, "1 to 3"),
    ({0.1: 1.0, 1.0: 2.0, 3.0: 0.0}, "≤ 0.1 to 1"),
    ({0.1: 0.0, 1.0: 2.0, 3.0: 1.0}, "1 to ≥ 3"),
    ({0.1: 1.0, 1.0: 2.0}, "≤ 0.1 to ≥ 1")])
def test_a_range_ends_where_harm_begins_or_says_that_it_may_go_on(gains, said):
    assert str(experiments.range_around_best(pd.Series(gains))) == said


def test_a_rule_that_never_gains_has_no_range():
    found = experiments.range_around_best(pd.Series({0.1: -0.5, 1.0: math.nan}))
    assert found.gain == -0.5
    assert math.isnan(found.lowest)


def test_a_section_that_is_added_in_a_live_kernel_can_be_planned(session, monkeypatch):
    """Reloading gives the module a new table: nobody may keep the old one."""
    mine = dict(SECTIONS) | {"mine": SECTIONS["grid"]}
    monkeypatch.setattr(experiments, "SECTIONS", mine)
    assert list(figures.plan(session, "mine").index) == ["mine"]


def test_an_edited_utils_is_said_before_the_next_cell(monkeypatch, capsys):
    figures.say_edited()
    assert capsys.readouterr().out == ""
    for module in (utils, experiments.extension):
        with monkeypatch.context() as patch:
            patch.setattr(module, "SOURCE", module.SOURCE + "# edited")
            figures.say_edited()
        said = capsys.readouterr().out
        name = module.__name__.rpartition(".")[2]
        assert said.startswith(f"RESTART THE KERNEL: {name}.py has been edited")


def test_a_drive_that_is_not_mounted_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    opened = figures.open_notebook("03", tmp_path / "no/MyDrive/project", preset_name="small",
                                   seeds=1)
    assert opened.store.backup is None
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------ running notebooks
def test_formulas_of_a_page_need_no_network(tmp_path):
    cells = [run_notebooks.nbformat.v4.new_markdown_cell("$$a^2$$ and $b_i$, at 5 %")]
    notebook = run_notebooks.nbformat.v4.new_notebook(cells=cells)
    run_notebooks.write_page(notebook, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'<math[^>]*display="(\w+)"', page) == ["block", "inline"]
    assert re.search(r"<msup>\s*<mi>a</mi>\s*<mn>2</mn>\s*</msup>", page)
    assert ", at 5 %" in page
    assert "libs/mathjax" not in page


def test_parameters_are_injected_below_the_tagged_cell():
    notebook = run_notebooks.nbformat.read(run_notebooks.NOTEBOOKS[2], as_version=4)
    run_notebooks.inject(notebook, {"PRESET": "demo", "HOURS": 0.5})
    sources = [cell.source for cell in notebook.cells]
    at = sources.index("PRESET = 'demo'\nHOURS = 0.5")
    assert sources[at - 1].startswith("PRESET = os.environ")
    assert "open_notebook" in sources[at + 1]
