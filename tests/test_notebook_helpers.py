"""What the notebooks draw from: gathered results, means, plans, figures and tables."""
import json
import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
from helpers import CFG, make_small
from matplotlib import pyplot as plt

import utils
from notebooks import display
from utils import Store, dump, gather, identity, mean_sd, plan, run_name, save_figure, save_table

GRID = [CFG, replace(CFG, classes_per_client=5),
        replace(CFG, algorithm="centralized", num_epochs=3)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def put(store, cfg, *accuracies, test=0.5, error=""):
    """A stored result with these validation accuracies (None: not evaluated), one a round."""
    rows = [dict(round=r, lr=0.1) | ({} if a is None else dict(val_top1=a))
            for r, a in enumerate(accuracies, 1)]
    result = dict(run=run_name(cfg), status="diverged" if error else "finished", error=error,
                  config=asdict(cfg), identity=identity(cfg), history=rows, best_round=1,
                  seconds=2.5) | ({} if test is None else dict(test=dict(top1=test)))
    store.write(f"{run_name(cfg)}.json", dump(result))


# ------------------------------------------------------------------ gather
def test_gather_gives_a_row_a_run_in_percent(store):
    put(store, CFG, None, 0.25, 0.125, test=0.5)
    put(store, replace(CFG, seed=1), None, 0.75, test=0.625)
    runs, history = gather([CFG, replace(CFG, seed=1)], store)
    assert runs.test.tolist() == [50.0, 62.5]
    assert runs.val.tolist() == [25.0, 75.0]  # the best, not the last
    assert runs.seed.tolist() == [0, 1]
    assert history.val_top1.dropna().tolist() == [25.0, 12.5, 75.0]
    assert history["round"].tolist() == [1, 2, 3, 1, 2]
    assert set(history.run) == {run_name(CFG), run_name(replace(CFG, seed=1))}


def test_gather_names_how_the_data_were_shared_out(store):
    for cfg in GRID:
        put(store, cfg, 0.5)
    runs, history = gather(GRID, store)
    assert runs.sharding.tolist() == ["IID", "Nc=5", "centralised"]
    assert history.sharding.tolist() == ["IID", "Nc=5", "centralised"]


def test_gather_counts_the_missing_and_names_the_diverged(store, capsys):
    put(store, CFG, 0.5)
    put(store, GRID[1], 0.5, test=None, error="the loss is not finite")
    runs, _ = gather([*GRID, replace(CFG, seed=7)], store)
    said = capsys.readouterr().out
    assert "2 of 4 runs are missing, 1 diverged" in said
    assert run_name(GRID[1]) in said
    assert pd.isna(runs.test[1])
    assert len(runs) == 2


def test_gather_is_silent_about_a_complete_grid(store, capsys):
    put(store, CFG, 0.5)
    gather([CFG], store)
    assert capsys.readouterr().out == ""


def test_gather_of_nothing_is_empty(store, capsys):
    runs, history = gather(GRID, store)
    assert len(runs) == len(history) == 0
    assert "3 of 3 runs are missing" in capsys.readouterr().out


def test_gather_takes_a_search_that_has_no_test_yet(store):
    for seed in range(2):
        put(store, replace(CFG, seed=seed), 0.25, test=None)
    runs, _ = gather([CFG, replace(CFG, seed=1)], store)
    assert runs.val.tolist() == [25.0, 25.0]
    assert runs.test.isna().all()


@pytest.mark.parametrize("rows", [(), (None,)], ids=["no round", "no evaluation"])
def test_gather_takes_runs_that_diverged_before_any_evaluation(store, rows):
    put(store, CFG, *rows, test=None, error="the loss is not finite")
    runs, _ = gather([CFG], store)
    assert len(runs) == 1
    assert runs.test.isna().all()


def test_gather_refuses_a_name_that_holds_another_run(store):
    put(store, replace(CFG, name="mine"), 0.5)
    with pytest.raises(ValueError, match="'lr'"):
        gather([replace(CFG, name="mine", lr=0.7)], store)


# ------------------------------------------------------------------ choosing and counting
def test_mean_sd_over_seeds():
    assert mean_sd(pd.Series([1.0, 2.0, 4.5])) == "2.50 ± 1.80 (3)"  # the sample's sd
    assert mean_sd(pd.Series([1.0, None, 2.0])) == "1.50 ± 0.71 (2)"
    assert mean_sd(pd.Series([3.14159])) == "3.14 (1)"
    assert mean_sd(pd.Series([None, None], dtype=float)) == "–"


def test_best_is_the_highest_validation_accuracy_of_any_round(store):
    cfgs = [replace(CFG, lr=lr) for lr in (0.1, 0.2, 0.3)]
    assert utils.best(cfgs, store) == cfgs[0]
    put(store, cfgs[1], 0.2, 0.9, 0.1, test=0.1)
    put(store, cfgs[2], 0.2, 0.3, 0.8, test=0.9)
    assert utils.best(cfgs, store) == cfgs[1]
    put(store, cfgs[0], 0.95, test=None, error="the loss is not finite")  # no run to choose
    assert utils.best(cfgs, store) == cfgs[1]


def test_tuned_takes_the_rate_that_was_best_at_one_length(store):
    cfg = replace(CFG, local_steps=4, lr=0.5)
    assert utils.tuned(cfg, store) == cfg
    put(store, replace(cfg, num_rounds=9, lr=0.1), 0.9)  # longer, but nothing to compare with
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.1)
    put(store, replace(cfg, num_rounds=2, lr=0.2), 0.4)
    put(store, replace(cfg, num_rounds=2, lr=0.3), 0.5)
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.3)
    put(store, replace(cfg, num_rounds=3, lr=0.2), 0.7)  # as many at a greater length
    put(store, replace(cfg, num_rounds=3, lr=0.3), 0.6)
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.2)


@pytest.mark.parametrize(("field", "value"), [("classes_per_client", 5), ("local_steps", 2),
                                          ("rule", "random"), ("server", "momentum"),
                                          ("algorithm", "fedprox"), ("head", "ridge"),
                                          ("batch_size", 99), ("seed", 1)])
def test_tuned_leaves_runs_of_other_settings_aside(store, field, value):
    cfg = replace(CFG, local_steps=4, lr=0.5, head="train")
    put(store, replace(cfg, lr=0.1), 0.4)
    put(store, replace(cfg, lr=0.2, **{field: value}), 0.9)
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.1)


def test_tuned_prefers_the_search_of_a_setting_to_that_of_iid_clients(store):
    iid = replace(CFG, local_steps=4, lr=0.5)
    cfg = replace(iid, classes_per_client=5, local_steps=8, seed=2)
    put(store, replace(iid, lr=0.3), 0.5)
    put(store, replace(cfg, lr=0.1, seed=0), 0.4)  # one rate is no search
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.3)
    put(store, replace(cfg, lr=0.2, seed=0), 0.3)
    assert utils.tuned(cfg, store) == replace(cfg, lr=0.1)
    assert utils.tuned(iid, store) == replace(iid, lr=0.3)


def test_a_search_of_rates_ends_with_both_neighbours_of_the_best(store, monkeypatch):
    peaks, waves = {None: 0.03, 5: 0.001}, []

    def train_all(cfgs, store, test):
        assert not test
        waves.append([(c.classes_per_client, c.lr) for c in cfgs])
        for c in cfgs:
            score = 0.9 - abs(math.log10(c.lr / peaks[c.classes_per_client])) / 10
            put(store, c, score, test=None)

    monkeypatch.setattr(display, "train_all", train_all)
    cells = [replace(CFG, lr=0.1), replace(CFG, lr=0.1, classes_per_client=5)]
    utils.search_rates(cells, store)
    assert waves == [[(None, 0.1), (5, 0.1)], [(None, 0.03), (5, 0.03)], [(None, 0.01), (5, 0.01)],
                     [(5, 0.003)], [(5, 0.001)]]  # the lowest rate has one neighbour only
    waves.clear()
    utils.search_rates(cells, store)  # again: nothing is left to try
    assert waves == [[(None, 0.1), (5, 0.1)]]
    utils.search_rates([replace(CFG, lr=0.02, seed=1)], store, rates=(0.1,))  # its own: between
    assert waves[1:] == [[(None, 0.02)], [(None, 0.1)]]


def test_a_search_of_rates_stops_where_training_does(store, monkeypatch):
    calls = []
    monkeypatch.setattr(display, "train_all", lambda *args, **kwargs: calls.append(args))
    utils.search_rates([replace(CFG, lr=0.1)], store)
    assert len(calls) == 1


def test_stored_finds_configurations_by_their_fields(store):
    for cfg in GRID:
        put(store, cfg, 0.5)
    store.write("notes/drift.json", b"{}")
    assert utils.stored(store, classes_per_client=5) == [GRID[1]]
    assert sorted(map(run_name, utils.stored(store))) == sorted(map(run_name, GRID))
    assert utils.stored(store, seed=3) == []


def test_converged_is_the_first_round_near_the_best():
    history = pd.DataFrame(dict(run=["a"] * 4 + ["b"] * 2, round=[1, 2, 3, 4, 1, 2],
                                val_top1=[10.0, None, 49.6, 50.0, 20.0, 10.0]))
    assert utils.converged(history).to_dict() == {"a": 3, "b": 1}
    assert utils.converged(history, points=0.1).to_dict() == {"a": 4, "b": 1}


def test_plan_counts_what_is_stored_and_what_is_left(store, monkeypatch, capsys):
    make_small(monkeypatch)
    cfgs = [replace(CFG, num_rounds=8), replace(CFG, num_rounds=8, seed=1),
            replace(CFG, num_rounds=8, seed=2), replace(GRID[2], num_rounds=8)]
    utils.train_federated(cfgs[0], store)
    honest, calls = utils.federated_round, []

    def cut(run, state):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(run, state)
    monkeypatch.setattr(utils, "federated_round", cut)
    utils.train_federated(cfgs[1], store)
    capsys.readouterr()
    frame = plan(cfgs, store)
    assert frame.run.tolist() == [run_name(c) for c in cfgs]
    assert frame.stored.tolist() == [8, 3, 0, 0]
    assert frame["of"].tolist() == [8, 8, 8, 3]
    left = frame.minutes_left.tolist()
    assert left[0] == 0
    assert left[1] == pytest.approx(5 / 8 * left[2])
    assert left[2] > 0
    assert "1 of 4 runs are stored" in capsys.readouterr().out


# ------------------------------------------------------------------ stores
def test_the_demo_has_a_store_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    assert utils.open_store("full").root == tmp_path
    demo = utils.open_store("demo", tmp_path / "drive")
    assert demo.root == tmp_path / "demo"
    assert demo.drive == tmp_path / "drive" / "results" / "demo"


def test_TRAIN_no_freezes_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    assert not utils.open_store("full").frozen
    monkeypatch.setenv("TRAIN", "no")
    assert utils.open_store("full").frozen


# ------------------------------------------------------------------ figures and tables
def draw_figure():
    fig, ax = utils.figure()
    ax.plot([1, 2, 3], [1.0, 4.0, 2.0], label="η")
    ax.set(xlabel="round", ylabel="accuracy (%)", title="$w_k - w$")
    ax.legend()
    return fig


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_the_same_figure_has_the_same_bytes(tmp_path, monkeypatch, kind):
    for year, name in enumerate("ab"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(1_000_000_000 + 31_536_000 * year))
        fig = draw_figure()
        save_figure(fig, tmp_path / "sub" / name)
        plt.close(fig)
    a, b = ((tmp_path / "sub" / f"{name}.{kind}").read_bytes() for name in "ab")
    assert a == b
    assert a.startswith(b"\x89PNG" if kind == "png" else b"%PDF")


def test_a_figure_is_as_wide_as_a_column():
    fig = draw_figure()
    assert fig.get_size_inches().tolist() == [utils.COLUMN, 2.3]
    plt.close(fig)


@pytest.mark.parametrize(("before", "after"), [((30.0, 30.5), (29.25, 31.25)),
                                               ((10.0, 50.0), (10.0, 50.0))])
def test_an_axis_of_accuracies_spans_two_points_at_least(before, after):
    _, ax = plt.subplots()
    ax.set_ylim(before)
    utils.widen(ax)
    assert ax.get_ylim() == after
    plt.close()


def test_a_table_has_rules_two_digits_and_escaped_text(tmp_path):
    frame = pd.DataFrame({"top-1 %": [1.005, None], "n_k": ["2 ± 1", "x"]}, index=["a_b", "c"])
    save_table(frame, tmp_path / "sub" / "table")
    text = (tmp_path / "sub" / "table.tex").read_text()
    assert r"\toprule" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"a_b & 1.00 & 2 ± 1 \\".replace("_", r"\_") in text
    assert r"c & -- & x \\" in text
    assert r"top-1 \%" in text


def test_a_results_json_is_what_gather_reads(store, monkeypatch):
    make_small(monkeypatch)
    result = utils.train_federated(CFG, store)
    runs, history = gather([CFG], store)
    assert runs.test[0] == pytest.approx(100 * result["test"]["top1"])
    assert len(history) == 4
    assert json.loads(store.read(f"{run_name(CFG)}.json")).items() > result.items()
