"""What is run and in which order: sections, the search for rates, tables, the budget."""
import math
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CFG, make_small, timeless

import utils
from notebooks import experiments
from notebooks.backup import BackedUpStore
from notebooks.experiments import (
    SCALES,
    SECTIONS,
    Session,
    budget,
    code_line,
    converged,
    frames,
    gather,
    images_of,
    interval_table,
    next_rungs,
    of_other_code,
    open_session,
    rate_of,
    repeat,
    run_section,
    rung_of,
    search_rates,
    searched_like,
    section_frames,
    section_runs,
    steps_of,
    train_all,
    tuned,
    with_steps,
    write_figure,
)
from utils import Config, Store, preset, run_key, run_name

BASE = preset("small", dataset="synthetic")


def session_of(path, base=BASE, name="small", seeds=(0,), **options):
    return Session(name, base, BackedUpStore(path, quiet=True), path / "figures", seeds, 1,
                   experiments.SCALES[name], **options)


def put(cfg, store, accuracies, status="finished", test=None, code=utils.CODE_SHA256):
    """A stored result with these validation accuracies (shares of 1), the first of round 0."""
    history = [dict(round=i, lr=cfg.lr, val_top1=a, val_top5=a, val_loss=1.0)
               for i, a in enumerate(accuracies)]
    result = dict(run=run_name(cfg), status=status, error="" if status == "finished" else "bad",
                  config=asdict(cfg), key=run_key(cfg), history=history, seconds=1.0, best_round=0,
                  segments=[dict(code=code, hardware=utils.hardware())])
    if test is not None:
        result["test"] = dict(top1=test, top5=test, loss=1.0)
        result["test_of_best"] = dict(top1=test, top5=test, loss=1.0)
    store.write(f"{run_name(cfg)}.json", utils.to_json(result))
    return result


def pretend(monkeypatch, accuracy):
    """Training that stores `accuracy(cfg)`, None where it diverges; the list of what it trained."""
    trained = []

    def train(cfg, store, test=True, **options):
        trained.append(cfg)
        value = accuracy(cfg)
        if value is None:
            return put(cfg, store, [0.3], status="diverged")
        return put(cfg, store, [0.3, value], test=value if test else None)
    monkeypatch.setattr(experiments, "train", train)
    return trained


def with_weights(monkeypatch, accuracy):
    """Training that stores weights and `accuracy(cfg)`; [(run, names of those with weights when it
    began)], which grows."""
    begun = []

    def train(cfg, store, test=True, **options):
        begun.append((cfg, weights_in(store)))
        store.write(f"checkpoints/{run_name(cfg)}/1_a.safetensors", b"x")
        return put(cfg, store, [0.3, accuracy(cfg)], test=0.4 if test else None)
    monkeypatch.setattr(experiments, "train", train)
    return begun


def weights_in(store):
    """Names of the runs whose weights are stored."""
    return {Path(name).parent.name for name in store.names("checkpoints/*/*.safetensors")}


# ------------------------------------------------------------------ session
def test_full_and_lite_are_refused_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    for name in ("full", "lite"):
        with pytest.raises(RuntimeError, match="T4 GPU.*ON_CPU"):
            open_session(name)
        assert open_session(name, on_cpu=True).base.image_size == preset(name).image_size
    monkeypatch.setenv("TRAIN", "no")
    assert open_session("full").store.frozen  # figures of stored results need no GPU


def test_results_dir_is_expanded_and_takes_the_figures_along(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RESULTS_DIR", "~/mine")
    session = open_session("small")
    assert session.store.root == tmp_path / "mine"
    assert session.figures == tmp_path / "mine/figures"


def test_presets_but_small_have_folders_of_their_own(monkeypatch, tmp_path):
    """A first session in Colab must not copy the stored runs of another preset from Drive."""
    drive = tmp_path / "drive"
    (drive / "results").mkdir(parents=True)
    (drive / "results/of_small.json").write_text("{}")
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "here"))
    session = open_session("lite", drive=drive, on_cpu=True)
    assert session.store.root == tmp_path / "here/lite"
    assert session.store.backup == drive / "results/lite"
    assert session.figures_backup == drive / "figures/lite"
    assert not list(session.store.root.glob("*.json"))
    assert open_session("small", drive=drive).store.backup == drive / "results"


def test_a_first_session_makes_its_folders_on_a_drive(monkeypatch, tmp_path):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "here"))
    drive = tmp_path / "MyDrive/project"
    drive.parent.mkdir()
    session = open_session("lite", drive=drive, on_cpu=True)
    session.store.write("a.json", b"{}")
    write_figure(session, "a.png", b"picture")
    assert (drive / "results/lite/a.json").read_bytes() == b"{}"
    assert (drive / "figures/lite/a.png").read_bytes() == b"picture"


def test_a_figure_does_not_stand_in_for_a_drive_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "here"))
    drive = tmp_path / "MyDrive/project"
    drive.parent.mkdir()
    session = open_session("lite", drive=drive, on_cpu=True)
    shutil.rmtree(drive.parent)
    with pytest.warns(UserWarning, match="a.png could not be copied.*is gone"):
        assert write_figure(session, "a.png", b"picture").read_bytes() == b"picture"
    with pytest.warns(UserWarning, match="nothing is copied there"):
        open_session("lite", drive=drive, on_cpu=True)
    assert not drive.parent.exists()


def test_demo_has_folders_of_its_own_and_synthetic_images_without_a_network(
        monkeypatch, tmp_path, no_cifar):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        session = open_session("demo")
    assert session.base.dataset == "synthetic"
    assert session.store.root == tmp_path / "demo"
    assert session.seeds == (0,)


def test_figures_are_copied_to_the_drive(monkeypatch, tmp_path):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "here"))
    session = open_session("small", drive=tmp_path / "drive")
    write_figure(session, "a.png", b"picture")
    assert (tmp_path / "here/figures/a.png").read_bytes() == b"picture"
    assert (tmp_path / "drive/figures/a.png").read_bytes() == b"picture"


# ------------------------------------------------------------------ sections
def test_every_section_has_cells_at_every_preset(tmp_path):
    for name in SCALES:
        base = preset(name, dataset="cifar100")
        session = session_of(tmp_path, base, name)
        session.store.frozen = True
        for section in SECTIONS.values():
            cells = section.cells(session)
            assert cells
            assert all(len(label) == len(section.columns) for label in cells)
            assert len({run_name(cfg) for cfg in cells.values()}) == len(cells)


def test_local_steps_change_neither_the_work_nor_the_evaluations(tmp_path):
    for name in ("small", "lite", "full"):
        grid = SECTIONS["grid"].cells(session_of(tmp_path, preset(name, dataset="cifar100"), name))
        assert len({cfg.local_steps * cfg.num_rounds for cfg in grid.values()}) == 1
        assert len({cfg.local_steps * cfg.eval_every for cfg in grid.values()}) == 1


def test_all_of_seed_0_comes_before_any_of_seed_1(tmp_path):
    runs = section_runs("grid", session_of(tmp_path, seeds=(0, 1, 2)))
    assert [cfg.seed for cfg in runs] == [0] * 15 + [1] * 15 + [2] * 15


def test_more_seeds_are_of_the_sections_that_ask_for_them_and_of_no_asked_seeds(tmp_path):
    """Who asks for one seed, or for others, gets these and no more."""
    def seeds(name, session):
        return list(dict.fromkeys(cfg.seed for cfg in section_runs(name, session)))
    scale = replace(SCALES["small"], seeds=(0, 1), more_seeds=(5,))
    session = replace(session_of(tmp_path, seeds=(0, 1)), scale=scale)
    assert seeds("half", session) == [0, 1, 5]
    assert seeds("grid", session) == [0, 1]
    assert seeds("rate_map", session) == [0]
    assert seeds("half", replace(session, seeds=(0,))) == [0]
    assert seeds("half", replace(session, seeds=(1, 0, 2))) == [1, 0, 2]


def test_an_edited_scale_is_followed(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(SCALES["small"], shardings=(None, 7)))
    cells = SECTIONS["grid"].cells(session_of(tmp_path))
    assert {label[0] for label in cells} == {"IID", "Nc=7"}


def test_seeds_raised_later_train_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], shardings=(None,), local_steps=(4,), searches=False))
    trained = pretend(monkeypatch, lambda cfg: 0.4)
    run_section("grid", session_of(tmp_path))
    assert [cfg.seed for cfg in trained] == [0]
    run_section("grid", session_of(tmp_path, seeds=(0, 1, 2)))
    assert [cfg.seed for cfg in trained] == [0, 1, 2]


def test_a_section_runs_every_cell_at_the_rate_that_its_search_found(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], shardings=(None, 1), local_steps=(4,)))
    best_rate = {None: 0.3, 1: 0.001}
    pretend(monkeypatch, lambda cfg: 0.5 - 0.01 * abs(
        rung_of(cfg.lr) - rung_of(best_rate[cfg.classes_per_client])))
    session = session_of(tmp_path, seeds=(0, 1))
    assert run_section("grid", session) == []
    runs, _ = section_frames("grid", session)
    assert runs.groupby("sharding").lr.unique().map(list).to_dict() == {
        "IID": [0.3], "Nc=1": [0.001]}
    assert sorted(runs.seed) == [0, 0, 1, 1]


def test_a_section_run_alone_first_searches_the_rates_that_it_takes(tmp_path, monkeypatch):
    """Else "consensus" would train at the guesses of rules that nobody has searched."""
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], rules=("least_sensitive",), rule_shardings=(10,), skews=(10,)))
    trained = pretend(monkeypatch, lambda cfg: 0.5 - 0.01 * abs(rung_of(cfg.lr) - rung_of(0.03)))
    session = session_of(tmp_path)
    assert run_section("consensus", session) == []
    runs, _ = section_frames("consensus", session)
    assert set(runs.lr) == {0.03}
    assert not any("test" in session.store.result(cfg) for cfg in trained
                   if cfg.calibration == "central" and cfg.lr != 0.03)


def test_choices_are_made_before_what_rests_on_them(tmp_path, monkeypatch):
    pretend(monkeypatch, lambda cfg: 0.5 + 0.1 * (cfg.weight_decay == 0.05)
            - 0.01 * abs(rung_of(cfg.lr) - rung_of(0.01)))
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], decays=(0.0, 0.05), batches=(32,), schedules=("cosine",)))
    session = session_of(tmp_path)
    assert run_section("centralized", session) == []
    runs, _ = section_frames("centralized", session)
    assert set(runs.weight_decay) == {0.05}


def test_what_was_stopped_before_its_rates_were_found_trains_nothing_on_them(tmp_path, monkeypatch):
    trained = pretend(monkeypatch, lambda cfg: 0.4)
    session = session_of(tmp_path)
    monkeypatch.setattr(experiments, "search_rates", lambda cfgs, session, watch: [
        experiments.Ladder(cfg, {}, None, (0.1,)) for cfg in cfgs])
    assert run_section("consensus", session) == section_runs("consensus", session)
    assert trained == []


def test_the_weights_of_a_choice_stay_until_it_is_tested(tmp_path, monkeypatch):
    """The longest runs of all: else the winner would be trained twice."""
    session = session_of(tmp_path)
    begun = with_weights(monkeypatch, lambda cfg: 0.4 - abs(rung_of(cfg.lr)))
    run_section("longer_rates", session)
    winners = {run_name(cfg) for cfg in section_runs("longer", session)}
    assert winners <= weights_in(session.store)
    tried = {run_name(cfg) for cfg in section_runs("longer_rates", session)}
    for cfg, there in begun:
        if run_name(cfg) in tried:  # of each rule the best so far, and no other
            assert len(there & tried) <= len(winners)
    run_section("longer", session)
    assert not winners & weights_in(session.store)


def test_a_search_that_cannot_read_a_stored_rung_says_so(tmp_path, monkeypatch):
    trained = pretend(monkeypatch, lambda cfg: 0.4)
    session = session_of(tmp_path)
    first = searched_like(BASE, session)
    result = put(first, session.store, [0.3, 0.4])
    del result["segments"][0]["hardware"]
    session.store.write(f"{run_name(first)}.json", utils.to_json(result))
    with pytest.warns(UserWarning, match="left out"), \
            pytest.raises(ValueError, match=f"{run_name(first)}.*move their JSON files"):
        search_rates([BASE], session)
    assert run_name(first) not in map(run_name, trained)


def test_what_is_shown_of_one_seed_is_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    session = open_session("small", [3, 1])
    assert session.seeds == (3, 1)
    shown = SECTIONS["longer"].cells(session)["dense",]
    assert {cfg.seed for cfg in section_runs("longer_rates", session)} == {shown.seed} == {3}
    like = experiments.searched_like(shown, session)
    assert like.seed == 0  # a search serves all seeds
    for wrong in ([], [0, 1, 0]):  # two runs of one seed would count as two
        with pytest.raises(ValueError, match=re.escape(f"seeds={wrong} must name one at least")):
            open_session("small", wrong)


def test_all_who_calibrate_see_as_many_images(tmp_path):
    session = session_of(tmp_path)
    session = replace(session, scale=replace(
        session.scale, client_images=30, consensus=(("central", 0.1), ("vote", 0.1), ("max", 1.0))))
    images = {label[:2]: cfg.calibration_images
              for label, cfg in SECTIONS["consensus"].cells(session).items()}
    assert images == {("central", 0.1): 300, ("vote", 0.1): 300, ("max", 1.0): 3000}


def test_methods_too_large_for_a_free_gpu_are_left_out(tmp_path):
    """SCAFFOLD keeps K times the weights: 8.7 GB of ViT-S/16, and twice that while it is stored."""
    def methods(name):
        cfg = preset(name, dataset="cifar100")
        return {label[0] for label in SECTIONS["methods"].cells(session_of(tmp_path, cfg, name))}
    assert methods("small") == set(experiments.METHODS)
    assert methods("lite") == methods("full") == set(experiments.METHODS) - {"SCAFFOLD"}


def test_a_notebook_says_which_rates_are_searched(tmp_path):
    said = {name: experiments.rates_line(session_of(tmp_path, preset(name, dataset="synthetic"),
                                                    name)) for name in SCALES}
    assert "searched, on runs as long as its own" in said["small"]
    assert "not searched in this preset" in said["demo"]
    assert "on runs of 64 local steps" in said["lite"]
    assert "classes_per_client: 50 takes that of None, 5 takes that of 10" in said["lite"]


def test_stand_ins_share_one_search(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], shardings=(None, 50), local_steps=(4, 8), search=64,
        stand_ins={"classes_per_client": {50: None}, "local_steps": {8: 4}}))
    trained = pretend(monkeypatch, lambda cfg: 0.5 - 0.01 * abs(rung_of(cfg.lr) - rung_of(0.1)))
    session = session_of(tmp_path)
    run_section("grid", session)
    searched = [cfg for cfg in trained if cfg.num_rounds == 16]
    assert {(cfg.classes_per_client, cfg.local_steps) for cfg in searched} == {(None, 4)}
    assert {cfg.lr for cfg in section_runs("grid", session)} == {0.1}


@pytest.mark.parametrize("name", ["lite", "full"])
def test_a_strong_pull_is_searched_for_itself_and_a_weak_one_is_fedavg(tmp_path, name):
    session = session_of(tmp_path, preset(name, dataset="cifar100"), name)
    weak, strong = SCALES[name].pulls
    cells = SECTIONS["pulls"].cells(session)
    like = searched_like(cells[weak, "Nc=10"], session)
    assert like.algorithm == "fedavg"
    assert experiments.of_stand_in(cells[weak, "Nc=10"], session)
    put(replace(like, lr=0.3), session.store, [0.3, 0.5])

    like = searched_like(cells[strong, "Nc=10"], session)
    assert (like.algorithm, like.prox_mu) == ("fedprox", strong)
    assert not experiments.of_stand_in(cells[strong, "Nc=10"], session)
    put(replace(like, lr=0.003), session.store, [0.3, 0.5])
    cells = SECTIONS["pulls"].cells(session)
    assert [cells[mu, "Nc=10"].lr for mu in (weak, strong)] == [0.3, 0.003]
    assert "fedprox takes that of fedavg (up to mu = 0.01)" in experiments.rates_line(session)


def test_longer_runs_take_the_best_of_rates_around_the_shorter_runs_own(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], longer_rungs=dict.fromkeys((None, "random"), (0, 1, 2, -1))))
    session = session_of(tmp_path)
    scale = session.scale
    short = experiments.with_steps(
        replace(session.base, rule="random", classes_per_client=1), scale.sweep)
    put(replace(short, lr=0.3), session.store, [0.3, 0.5])
    put(replace(short, lr=0.1), session.store, [0.3, 0.4])
    tried = {label: cfg for label, cfg in SECTIONS["longer_rates"].cells(session).items()
             if label[0] == "random"}
    assert [lr for _, lr in tried] == [0.3, 1.0, 3.0, 0.1]
    assert SECTIONS["longer"].cells(session)["random",] == tried["random", 0.3]
    for (_, lr), cfg in tried.items():
        assert cfg.num_rounds == 4 * short.num_rounds
        assert cfg == replace(short, lr=lr, num_rounds=cfg.num_rounds, eval_every=cfg.eval_every)
        put(cfg, session.store, [0.3, 0.6 if lr == 1.0 else 0.5])
    assert SECTIONS["longer"].cells(session)["random",] == tried["random", 1.0]


def test_speed_matched_rates_are_inverse_to_the_fisher_mass(tmp_path, monkeypatch):
    mass = {"random": 0.1, "least_sensitive": 0.01, "most_sensitive": 0.4}
    monkeypatch.setattr(experiments, "fisher_mass",
                        lambda cfg, store, measure: mass.get(cfg.rule, 0.1))
    cells = SECTIONS["speed_matched"].cells(session_of(tmp_path))
    lr = cells["random", "IID"].lr
    assert cells["least_sensitive", "IID"].lr == pytest.approx(10 * lr)
    assert cells["most_sensitive", "IID"].lr == pytest.approx(lr / 4)


def test_masses_are_measured_before_a_section_is_trained_and_not_to_list_it(tmp_path, monkeypatch):
    session = session_of(tmp_path)
    measured = []

    def open_run(cfg, store):
        measured.append(cfg.rule)
        raise KeyboardInterrupt
    monkeypatch.setattr(experiments, "open_run", open_run)
    monkeypatch.setattr(experiments, "settle", lambda *given: True)
    before = section_runs("speed_matched", session)
    assert measured == []
    with pytest.raises(KeyboardInterrupt):
        experiments.run_section("speed_matched", session)
    assert len(measured) == 1
    assert {cfg.rule for cfg in before} >= {"random", "least_sensitive"}


def test_a_mass_is_of_as_many_images_as_it_was_asked_for(tmp_path, monkeypatch):
    make_small(monkeypatch)
    store = Store(tmp_path, quiet=True)
    cfg = replace(CFG, rule="random")  # whose mask needs no images
    for images in (20, 40):
        experiments.fisher_mass(replace(cfg, calibration_images=images), store)
    assert len(store.names("notes/fisher_mass_*")) == 2


def test_the_fisher_mass_of_all_weights_is_one_and_of_half_of_them_is_less(tmp_path, monkeypatch):
    make_small(monkeypatch)
    cfg = replace(CFG, rule="most_sensitive", sparsity=0.0)
    store = Store(tmp_path, quiet=True)
    assert experiments.fisher_mass(cfg, store) == pytest.approx(1)
    most = experiments.fisher_mass(replace(cfg, sparsity=0.5), store)
    least = experiments.fisher_mass(replace(cfg, rule="least_sensitive", sparsity=0.5), store)
    assert 0 < least < 0.5 < most < 1


# ------------------------------------------------------------------ rate search
def test_the_ladder_climbs_by_factors_of_three():
    assert [rate_of(r) for r in range(-6, 3)] == [
        1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0]
    assert [rung_of(rate_of(r)) for r in range(-20, 20)] == list(range(-20, 20))


@pytest.mark.parametrize("optimum", [1e-4, 3e-3, 0.1, 5.0, 100.0])
def test_a_search_finds_its_optimum_wherever_it_is(tmp_path, monkeypatch, optimum):
    def accuracy(cfg):
        if cfg.lr > 30 * optimum:
            return None
        return 0.5 - 0.01 * abs(math.log(cfg.lr / optimum))
    pretend(monkeypatch, accuracy)
    session = session_of(tmp_path)
    found = search_rates([BASE], session)[0]
    assert found.bracketed
    assert 1 / 1.8 < found.lr / optimum < 1.8
    assert tuned(searched_like(BASE, session), session.store).lr == found.lr


def test_a_search_ends_where_no_rate_moves_the_start(tmp_path, monkeypatch):
    """The start has 0.3: every rate that moves loses, and tiny ones leave it exactly there."""
    trained = pretend(monkeypatch, lambda cfg: 0.3 if cfg.lr < 1e-4 else 0.2)
    found = search_rates([BASE], session_of(tmp_path))[0]
    assert found.finished
    assert not found.bracketed
    assert "NOT bracketed" in str(found)
    assert len(trained) < 15


def test_a_rate_that_loses_at_the_end_is_not_saved_by_a_good_round_before(tmp_path):
    store = Store(tmp_path)
    put(replace(BASE, lr=0.1), store, [0.3, 0.9, 0.2])
    put(replace(BASE, lr=0.01), store, [0.3, 0.4, 0.4])
    assert tuned(BASE, store).lr == 0.01


def test_tuned_reads_only_runs_of_the_same_setting_at_seed_0(tmp_path):
    store = Store(tmp_path)
    put(replace(BASE, lr=0.03), store, [0.3, 0.4])
    for change in (dict(seed=1), dict(num_rounds=7), dict(classes_per_client=1),
                   dict(rule="random"), dict(augmentation="none")):
        put(replace(BASE, lr=1.0, **change), store, [0.3, 0.9])
    put(replace(BASE, lr=3.0), store, [0.3], status="diverged")
    assert tuned(replace(BASE, seed=2, lr=0.5), store).lr == 0.03


def test_a_rate_beside_the_ladder_is_nobodys_own_rate(tmp_path):
    store = Store(tmp_path)
    put(replace(BASE, lr=0.03), store, [0.3, 0.4])
    put(replace(BASE, lr=0.0217), store, [0.3, 0.9])
    assert tuned(BASE, store).lr == 0.03
    assert experiments.stored_rates(BASE, store) == {0.03: 0.4}


def test_next_rungs_brackets_and_then_wants_nothing():
    assert sorted(next_rungs({}, 0, None)) == [-1, 0, 1]
    assert next_rungs({-1: 0.2, 0: 0.3, 1: 0.1}, 0, 0.05) == []
    assert next_rungs({-1: 0.2, 0: 0.3, 1: 0.4}, 0, 0.05) == [2]
    assert next_rungs({-1: 0.4, 0: 0.3, 1: 0.2}, 0, 0.05) == [-2]
    assert next_rungs({-1: -math.inf, 0: -math.inf, 1: -math.inf}, 0, 0.05) == [-2]
    assert next_rungs({-1: 0.2, 0: 0.4, 1: 0.4}, 0, 0.05) == [2]      # a plateau has an end
    assert next_rungs({-1: 0.3, 0: 0.3, 1: 0.2}, 0, 0.3) == []        # nothing moves below


def test_checkpoints_of_rates_that_lost_are_deleted(tmp_path, monkeypatch):
    pretend(monkeypatch, lambda cfg: 0.5 - 0.01 * abs(rung_of(cfg.lr) - rung_of(0.03)))
    session = session_of(tmp_path)
    like = searched_like(BASE, session)
    for lr in (0.01, 0.03, 0.1):
        session.store.write(f"checkpoints/{run_name(replace(like, lr=lr))}/1_a.safetensors", b"x")
    search_rates([BASE], session)
    kept = session.store.names("checkpoints/*/*.safetensors")
    assert kept == [f"checkpoints/{run_name(replace(like, lr=0.03))}/1_a.safetensors"]


def test_weights_of_a_search_go_while_it_goes_on(tmp_path, monkeypatch):
    """Of a Drive's 15 GB, hundreds of rates of a ViT-S/16 would take more."""
    scale = replace(SCALES["small"], shardings=(None, 10, 1), local_steps=(4,))
    for search, stay in ((None, 1), (64, 0)):
        session = session_of(tmp_path / f"{search}")
        session = replace(session, scale=replace(scale, search=search))
        begun = with_weights(monkeypatch, lambda cfg: 0.5 - 0.01 * abs(
            rung_of(cfg.lr) - rung_of(0.03)))
        cells = SECTIONS["grid"].cells(session).values()
        found = search_rates(cells, session)
        assert len(begun) > 9
        # of every ladder the best so far, where its run is one that is shown
        for _, there in begun:
            assert len(there) <= stay * len(found)
        winners = {run_name(replace(ladder.cfg, lr=ladder.lr)) for ladder in found}
        assert weights_in(session.store) == (winners if stay else set())


def test_a_frozen_store_keeps_all_weights(tmp_path):
    session = session_of(tmp_path)
    session.store.write(f"checkpoints/{run_name(BASE)}/1_a.safetensors", b"x")
    session.store.frozen = True
    experiments.drop_weights([BASE], session)
    assert weights_in(session.store) == {run_name(BASE)}


# ------------------------------------------------------------------ training
def test_training_stops_at_the_sessions_time_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    make_small(monkeypatch)
    cfgs = [replace(CFG, seed=s) for s in range(3)]
    session = session_of(tmp_path, CFG, stop_at=time.monotonic() - 1)
    assert train_all(cfgs, session) == cfgs
    said = capsys.readouterr().out
    assert "3 of 3 runs are left" in said
    assert "HOURS are over" in said  # the same cell alone would stop at once again
    assert train_all(cfgs, replace(session, stop_at=math.inf)) == []


def test_an_interrupt_by_hand_is_stored_and_gone_on_from(tmp_path, monkeypatch):
    make_small(monkeypatch)
    cfgs = [replace(CFG, seed=s) for s in range(2)]

    def stop(cfg, history):
        if cfg.seed == 1 and history[-1]["round"] == 2:
            raise KeyboardInterrupt
    cut = session_of(tmp_path / "cut", CFG)
    assert train_all(cfgs, cut, watch=stop) == cfgs[1:]
    assert train_all(cfgs, cut) == []
    whole = session_of(tmp_path / "whole", CFG)
    train_all(cfgs, whole)
    for cfg in cfgs:
        assert cut.store.result(cfg)["history"] == whole.store.result(cfg)["history"]


def test_a_head_that_diverges_does_not_keep_the_rest_of_a_grid_from_being_trained(tmp_path,
                                                                                  monkeypatch):
    make_small(monkeypatch)
    cfgs = [replace(CFG, rule="random", lr=lr) for lr in (1e30, 0.05)]
    session = session_of(tmp_path, CFG)
    assert train_all(cfgs, session) == []  # nothing is left to run this cell again for
    first, second = map(session.store.result, cfgs)
    assert (first["status"], second["status"]) == ("diverged", "finished")
    assert "the head's own run" in first["error"]


def test_runs_compute_with_one_thread_whatever_the_kernel_uses(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(experiments, "train", lambda cfg, store, *a, **o: threads.append(
        torch.get_num_threads()) or put(cfg, store, [0.1, 0.2], test=0.2))
    torch.set_num_threads(2)
    try:
        train_all([CFG], session_of(tmp_path, CFG))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == [1]


def test_a_frozen_store_trains_nothing(tmp_path, monkeypatch):
    trained = pretend(monkeypatch, lambda cfg: 0.5)
    session = session_of(tmp_path)
    session.store.frozen = True
    assert train_all([BASE], session) == [BASE]
    search_rates([BASE], session)
    assert trained == []


# ------------------------------------------------------------------ tables
def test_frames_have_the_start_the_last_and_the_best(tmp_path):
    store = Store(tmp_path)
    put(BASE, store, [0.3, 0.5, 0.4], test=0.35)
    runs, history = frames(store.results().values())
    row = runs.iloc[0]
    assert (row.start, row.val, row.val_best, row.test) == pytest.approx((30, 40, 50, 35))
    assert (row.sharding, row.data) == ("IID", "SYNTHETIC")
    assert history.val_top1.tolist() == pytest.approx([30, 50, 40])
    assert history.lr.unique().tolist() == [BASE.lr]


def test_gather_says_what_is_missing_diverged_and_synthetic(tmp_path, capsys):
    store = Store(tmp_path)
    put(BASE, store, [0.3], status="diverged")
    runs, _ = gather([BASE, replace(BASE, seed=1)], store)
    said = capsys.readouterr().out
    assert "1 of 2 runs are missing" in said
    assert "1 diverged" in said
    assert "SYNTHETIC" in said
    assert np.isnan(runs.val.iloc[0])
    assert frames([])[0].empty


def test_interval_table_keeps_the_order_of_appearance(tmp_path):
    store = Store(tmp_path)
    for seed, tests in enumerate(((0.31, 0.5), (0.33, 0.52))):
        put(replace(BASE, seed=seed, classes_per_client=None), store, [0.3, 0.4], test=tests[0])
        put(replace(BASE, seed=seed, classes_per_client=50), store, [0.3, 0.4], test=tests[1])
    cfgs = [replace(BASE, seed=s, classes_per_client=nc) for nc in (50, None) for s in (0, 1)]
    table = interval_table(gather(cfgs, store)[0], "sharding", "local_steps")
    assert table.index.tolist() == ["Nc=50", "IID"]
    # t(0.975, 1) = 12.706 times the standard error of 31 and 33, which is 1
    assert table.loc["IID", 4] == "32.0 ± 12.7 (2)"


def test_converged_is_the_first_round_that_stays_near_the_end(tmp_path):
    store = Store(tmp_path)
    put(BASE, store, [0.30, 0.401, 0.38, 0.399, 0.40])
    history = gather([BASE], store)[1]
    assert converged(history).tolist() == [3]


def test_results_of_other_code_are_told_and_can_be_forgotten(tmp_path, monkeypatch):
    session = session_of(tmp_path)
    store = session.store
    other = replace(BASE, seed=1)
    put(BASE, store, [0.3, 0.4])
    put(other, store, [0.3, 0.4], code="of yesterday")
    store.write(f"checkpoints/{run_name(other)}/1_a.safetensors", b"x")
    store.write("notes/trade_off_a.json", b"{}")
    store.write("notes/repeated_a_b.json", b"{}")
    assert of_other_code([BASE, other], store) == [other]
    line = code_line([BASE, other], session)
    assert "1 of them" in line
    assert run_name(other) in line
    assert "\n" not in line
    assert "`experiments.forget_other_code(session)`" in line
    monkeypatch.setattr(experiments, "section_runs", lambda name, session: [BASE, other])
    experiments.forget_other_code(session)
    assert store.result(other) is None
    assert store.names("checkpoints/*/*.safetensors") == []
    assert store.names("notes/*") == ["notes/repeated_a_b.json"]  # by what code one measured?
    assert "all of this code" in code_line([BASE, other], session)


def test_the_command_that_is_told_repeats_the_run_from_any_folder(tmp_path, monkeypatch):
    session = replace(session_of(tmp_path), preset="lite")
    put(BASE, session.store, [0.3, 0.4], code="of yesterday")
    (command,) = re.findall("`(cd .*?)`", code_line([BASE], session))
    folder, python = command.split(" && ")
    assert folder == f"cd {utils.ROOT}"
    called = []
    monkeypatch.setattr(experiments, "open_session", lambda name, **options: name)
    monkeypatch.setattr(experiments, "print_repeated", lambda *args: called.append(args))
    experiments.main(python.removeprefix("python -m notebooks.experiments ").split())
    assert called == [([run_name(BASE)], "lite")]


def by_yesterdays_code(store, cfg, **changes):
    """Its stored result as an earlier utils.py would have left it, with these changes."""
    result = store.result(cfg) | changes
    result["segments"] = [part | dict(code="of yesterday") for part in result["segments"]]
    store.write(f"{run_name(cfg)}.json", utils.to_json(result))


def test_results_of_earlier_code_count_once_their_runs_are_repeated(
        tmp_path, monkeypatch, capsys):
    make_small(monkeypatch)
    session = session_of(tmp_path, CFG)
    store = session.store
    cfgs = [replace(CFG, num_rounds=2), replace(CFG, num_rounds=2, rule="random")]
    train_all(cfgs[:1], session)
    train_all(cfgs[1:], session, test=False)
    with pytest.raises(KeyError, match="not stored"):
        repeat([CFG], session)
    for cfg in cfgs:
        by_yesterdays_code(store, cfg)
    assert of_other_code(cfgs, store) == cfgs
    before = {cfg: store.result(cfg) for cfg in cfgs}

    assert repeat(cfgs[:1], session) == {run_name(cfgs[0]): []}
    assert of_other_code(cfgs, store) == []
    assert "2 of them of an earlier version" in code_line(cfgs, session)
    assert "checked on 1" in code_line(cfgs, session)
    assert {cfg: store.result(cfg) for cfg in cfgs} == before  # what is stored stays

    # the next change of the code need only repeat runs of this one
    newest = replace(cfgs[0], seed=1)
    train_all([newest], session)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "CODE_SHA256", "of tomorrow")
        patch.setattr(experiments, "CODE_SHA256", "of tomorrow")
        assert of_other_code([*cfgs, newest], store) == [*cfgs, newest]
        assert repeat([newest], session) == {run_name(newest): []}
        assert of_other_code([*cfgs, newest], store) == []

    # one run that comes out otherwise, and the code is another one again
    history = store.result(cfgs[1])["history"]
    history[-1]["val_loss"] += 1e-12
    by_yesterdays_code(store, cfgs[1], history=history)
    assert repeat(cfgs, session) == {run_name(cfgs[0]): [], run_name(cfgs[1]): ["history"]}
    assert of_other_code(cfgs, store) == cfgs
    assert experiments.print_repeated([run_name(cfg) for cfg in cfgs], session) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{run_name(cfgs[0])}: the same, bit for bit", f"{run_name(cfgs[1])}: other history"]
    repeat(cfgs[:1], session)  # a luckier choice of runs hides nothing
    assert of_other_code(cfgs, store) == cfgs

    # unless it was trained on another machine, where bits may differ by themselves
    for note in store.names("notes/repeated_*.json"):
        store.delete(note)
    here = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of old")
    assert experiments.trained_elsewhere(store.result(cfgs[1])) == {
        "vector_units": (here, "of old")}
    repeat(cfgs, session)
    assert of_other_code(cfgs, store) == []
    experiments.print_repeated([run_name(cfg) for cfg in cfgs], session)
    assert "trained elsewhere" in capsys.readouterr().out


def test_other_predictions_are_not_the_same_run(tmp_path, monkeypatch):
    make_small(monkeypatch)
    session = session_of(tmp_path, CFG)
    cfg = replace(CFG, num_rounds=1)
    train_all([cfg], session)
    by_yesterdays_code(session.store, cfg)
    session.store.write(f"{run_name(cfg)}.npy", b"others")
    assert repeat([cfg], session) == {run_name(cfg): ["predictions"]}
    assert of_other_code([cfg], session.store) == [cfg]


@pytest.mark.parametrize("spoil", [
    dict(config={}), dict(config=dict(rule="least_sensitive")), dict(history=3), dict(history=[{}]),
    dict(key=[]), dict(segments=None)], ids=str)
def test_a_foreign_file_among_the_results_is_named_and_left_out(tmp_path, spoil):
    store = Store(tmp_path)
    good = put(BASE, store, [0.3, 0.4], test=0.4)
    foreign = put(replace(BASE, lr=0.3), store, [0.3, 0.5]) | dict(run="foreign") | spoil
    with pytest.warns(UserWarning, match="foreign.json"):
        runs, history = frames([good, foreign])
    assert list(runs.run) == [run_name(BASE)]
    assert len(history) == 2
    store.delete(f"{run_name(replace(BASE, lr=0.3))}.json")
    store.write("foreign.json", utils.to_json(foreign))
    with pytest.warns(UserWarning, match="foreign.json"):
        assert tuned(BASE, store) == BASE
        assert experiments.throughput("small", store)[0] > 0


def test_a_result_of_an_algorithm_that_is_not_registered_here_is_shown(tmp_path):
    store = Store(tmp_path)
    result = put(BASE, store, [0.3, 0.4])
    result["config"] |= dict(algorithm="of_another_notebook", a_field_of_old=1)
    runs, _ = frames([result])
    assert list(runs.algorithm) == ["of_another_notebook"]
    assert list(runs.sharding) == ["IID"]


# ------------------------------------------------------------------ budget
def test_images_of_a_run_by_hand():
    cfg = Config(num_rounds=10, eval_every=4, local_steps=3, batch_size=8, participation=0.05)
    # 5 clients x 3 steps x 8 images x 10 rounds; round 0, 4, 8 and 10 on 5,000 images
    assert images_of(cfg, test=False) == (1200, 20_000)
    assert images_of(cfg, test=True) == (1200, 40_000)
    sparse = replace(cfg, rule="least_sensitive", calibration_images=100, calibration_rounds=4)
    assert images_of(sparse, test=False)[0] == 1600
    epochs = replace(cfg, algorithm="centralized", num_epochs=2, eval_every=1, eval_images=100)
    assert images_of(epochs, test=True) == (90_000, 3 * 100 + 2 * 100)
    assert steps_of(epochs) == 5625


def test_flop_are_counted_on_the_model():
    """One image through ViT-S/16 at 224 px: 4.6 G multiply-adds (Touvron et al. 2021)."""
    forward, both = experiments.image_flop("vits16", 224)
    assert forward == pytest.approx(2 * 4.6e9, rel=0.01)
    assert both == pytest.approx(3 * forward, rel=0.02)


def test_the_map_has_rates_around_the_best_and_all_that_its_ladder_tried(tmp_path):
    session = session_of(tmp_path)
    like = searched_like(with_steps(BASE, SCALES["small"].sweep), session)
    for lr, accuracy in ((1e-4, 0.1), (0.01, 0.5), (0.03, 0.4)):
        put(replace(like, lr=lr), session.store, [0.3, accuracy])
    rates = [lr for rule, where, lr in experiments.rate_map(session) if (rule, where) ==
             ("dense", "IID")]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3]


def test_the_weights_that_nothing_needs_any_more_are_deleted(tmp_path, monkeypatch):
    """The map's rates go, but for those that another section keeps; the results stay."""
    session = session_of(tmp_path)
    monkeypatch.setattr(experiments, "SECTIONS", {
        "map": experiments.Section("05", lambda s: {(lr,): replace(BASE, lr=lr)
                                                    for lr in (0.1, 0.3)}, ("lr",), searched=False),
        "rules": experiments.Section("05", lambda s: {(): replace(BASE, lr=0.3)}, (),
                                     searched=False, keep=True)})

    with_weights(monkeypatch, lambda cfg: 0.4)
    run_section("map", session)
    assert weights_in(session.store) == {run_name(replace(BASE, lr=0.3))}
    assert len(session.store.names("*.json")) == 2


def one_section(monkeypatch, cfgs):
    """`SECTIONS` has one section, "runs", of these configurations; nothing is searched or kept."""
    section = experiments.Section("05", lambda s: {(i,): cfg for i, cfg in enumerate(cfgs)},
                                  ("i",), searched=False)
    monkeypatch.setattr(experiments, "SECTIONS", {"runs": section})


def test_weights_of_a_section_go_run_by_run(tmp_path, monkeypatch):
    session = session_of(tmp_path, seeds=(0, 1))
    begun = with_weights(monkeypatch, lambda cfg: 0.4)
    one_section(monkeypatch, [replace(BASE, lr=lr) for lr in (0.1, 0.3)])
    assert run_section("runs", session) == []
    assert [there for _, there in begun] == [set()] * 4
    assert weights_in(session.store) == set()


def test_weights_stay_from_which_a_longer_run_or_a_sparse_one_begins(tmp_path, monkeypatch):
    """A longer run at a constant rate, and a sparse one whose head a run of its own has trained."""
    session = session_of(tmp_path)
    begun = with_weights(monkeypatch, lambda cfg: 0.4)
    constant = replace(BASE, schedule="constant", num_rounds=8, eval_every=4)
    probe = replace(BASE, head="probe")
    longer = replace(constant, num_rounds=16)
    one_section(monkeypatch, [constant, probe, longer])
    run_section("runs", session)
    assert begun[2] == (longer, {run_name(constant), run_name(probe)})
    assert utils.shorter_runs(longer, session.store)  # that the other would go on from
    assert weights_in(session.store) == {run_name(probe)}


def test_what_was_stopped_amid_a_section_is_gone_on_with_whatever_weights_are_deleted(
        tmp_path, monkeypatch):
    make_small(monkeypatch)
    one_section(monkeypatch, [replace(CFG, lr=lr) for lr in (0.03, 0.1, 0.3)])

    def stop(cfg, history):
        if cfg.lr == 0.1 and history[-1]["round"] == 2:
            raise KeyboardInterrupt
    session = session_of(tmp_path / "cut", CFG)
    left = run_section("runs", session, stop)
    assert [cfg.lr for cfg in left] == [0.1, 0.3]
    assert weights_in(session.store) == {run_name(left[0])}
    assert run_section("runs", session) == []
    assert weights_in(session.store) == set()
    whole = session_of(tmp_path / "whole", CFG)
    run_section("runs", whole)
    for cfg in section_runs("runs", session):
        assert utils.to_json(timeless(session.store.result(cfg))) == utils.to_json(
            timeless(whole.store.result(cfg)))


def test_the_readme_has_the_table_of_costs():
    for counted in (experiments.weight_counts, experiments.image_flop):
        counted.cache_clear()  # other tests put a tiny ViT in the small one's place
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    assert experiments.budget_markdown() in readme
    for notebook in ("04", "all"):
        assert f"| {budget('lite').loc[notebook, 'hours']:.1f} |" in readme
    for name in ("lite", "full"):
        three = budget(name, seeds=3).loc["all"]
        assert f"{three.hours:.1f} hours and {three.gigabytes:.1f} GB in `{name}`" in readme


@pytest.mark.parametrize("name", ["lite", "full"])
def test_a_free_drive_has_room_for_the_suite_and_all_seeds(name):
    needed = budget(name, seeds=len(SCALES[name].seeds)).loc["all"]
    assert needed.gigabytes < 15
    assert needed.left + 0.8 < needed.gigabytes < needed.left + 1.2  # "about one more": README


def test_the_budget_of_a_drive_is_what_stays_and_what_is_trained():
    one = budget("small", notebook="05").loc["all"]
    two = budget("small", notebook="05", workers=2).loc["all"]
    session = experiments.open_session("small")
    scaffold = next(cfg for label, cfg in SECTIONS["methods"].cells(session).items()
                    if label[:2] == ("SCAFFOLD", "dense"))
    largest = experiments.running_bytes(scaffold) / 1e9
    assert one.gigabytes == pytest.approx(one.left + largest)
    assert two.gigabytes == pytest.approx(one.left + 2 * largest)


def test_the_bytes_of_a_run_are_those_that_it_stores(tmp_path, monkeypatch):
    make_small(monkeypatch)
    experiments.weight_counts.cache_clear()

    def size(path):
        content = path.read_bytes()
        return len(content) - 8 - int.from_bytes(content[:8], "little")  # without the header
    at_a_time = []
    delete = Store.delete

    def watched(store, name):
        at_a_time.append(sum(map(size, store.root.glob("checkpoints/*/*.safetensors"))))
        delete(store, name)
    monkeypatch.setattr(Store, "delete", watched)
    for algorithm in ("fedavg", "fedavgm", "fedadam", "scaffold", "held_out", "calibrated_once"):
        at_a_time.clear()
        cfg = replace(CFG, algorithm=algorithm, num_clients=3, participation=1.0, num_rounds=5,
                      eval_every=1, head="logistic")
        store = Store(tmp_path / algorithm, minutes=0, quiet=True)
        utils.train(cfg, store, test=False)
        at_most = experiments.running_bytes(cfg)
        # less where the best weights are the last ones: then they are stored once
        assert 0.6 * at_most < max(at_a_time) < 1.02 * at_most, algorithm
        [last] = store.root.glob("checkpoints/*/*.safetensors")
        assert size(last) in (pytest.approx(experiments.stored_bytes(cfg), rel=0.02),
                              pytest.approx(experiments.stored_bytes(cfg) / 2, rel=0.02))

    cfg = replace(CFG, rule="random", head="logistic")
    masked = Store(tmp_path / "masked", quiet=True)
    others = [replace(cfg, lr=0.1), replace(cfg, classes_per_client=5), replace(cfg, sparsity=0.5)]
    for each in (cfg, *others):
        utils.train(each, masked, test=False)
    files = {}
    for each in (cfg, *others):
        files |= experiments.lasting_bytes(each, keep=False)
    masks = [size(path) for path in masked.root.glob("cache/mask_*.safetensors")]
    assert sorted(masks) == sorted(files.values())
    experiments.weight_counts.cache_clear()


@pytest.mark.parametrize(("name", "hours"), [("lite", 10), ("full", 40)])
def test_the_suite_fits_its_hours_on_a_t4(name, hours):
    table = budget(name)
    assert table.loc["all", "hours"] <= hours
    assert table.loc["all", "throughput"] == "8 TFLOP/s, estimated for a T4"


def test_the_budget_is_that_of_the_sections(tmp_path):
    """Counted again, from the runs that a search of four rates and one seed train."""
    session = session_of(tmp_path, preset("lite"), "lite")
    session.store.frozen = True
    runs = {}
    for section in SECTIONS.values():
        cells = section.cells(session).values()
        tested = [(cfg, section.test) for cfg in cells]
        if section.searched:
            likes = [searched_like(cfg, session) for cfg in cells]
            rungs = [replace(like, lr=rate_of(rung_of(like.lr) + step))
                     for like in likes for step in (-1, 0, 1, 2)]
            tested += [(cfg, False) for cfg in rungs]
        for cfg, test in tested:
            runs[run_name(cfg)] = cfg, runs.get(run_name(cfg), (cfg, False))[1] or test
    table = budget("lite")
    assert table.loc["all", "runs"] == len(runs)
    trained = sum(images_of(cfg, test)[0] for cfg, test in runs.values())
    evaluated = sum(images_of(cfg, test)[1] for cfg, test in runs.values())
    assert table.loc["all", "trained"] == trained
    assert table.loc["all", "evaluated"] == evaluated


def test_more_seeds_cost_more_and_searches_are_not_repeated():
    one = budget("small")
    three = budget("small", seeds=3)
    extra = three.runs["all"] - one.runs["all"]
    assert 0 < extra < 2 * one.runs["all"]
    assert extra % 2 == 0


def test_the_throughput_is_this_machines_where_runs_are_stored(tmp_path):
    store = Store(tmp_path)
    cfg = with_steps(preset("small"), 16)
    put(cfg, store, [0.3, 0.4])
    forward, both = experiments.image_flop("mini", 32)
    trained, evaluated = images_of(cfg, test=False)
    speed, source = experiments.throughput("small", store)
    assert speed == pytest.approx(trained * both + evaluated * forward)  # in the one second
    assert "measured" in source
    assert "estimated" in budget("lite", store=store).loc["all", "throughput"]


def test_without_stored_runs_the_speed_is_that_of_what_a_preset_is_made_for(tmp_path, monkeypatch):
    store = Store(tmp_path)
    speeds = {name: experiments.throughput(name, store) for name in SCALES}
    assert {speeds[name][1] for name in ("full", "lite")} == {"estimated for a T4"}
    assert {speeds[name][1] for name in ("small", "demo")} == {"estimated for a core of a CPU"}
    assert speeds["small"][0] < speeds["lite"][0] / 50
    monkeypatch.setattr(experiments, "device", lambda: torch.device("cuda"))
    assert experiments.throughput("small", store)[1] == "estimated for a T4"


def test_the_command_line_trains_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.setitem(SCALES, "small", replace(
        SCALES["small"], shardings=(None,), local_steps=(4,), searches=False))
    trained = pretend(monkeypatch, lambda cfg: 0.4)
    arguments = ["run", "grid", "--preset", "small", "--seeds", "2", "--workers", "1"]
    assert experiments.main(arguments) == 0
    assert [cfg.seed for cfg in trained] == [0, 1]
    assert experiments.main(["budget", "--preset", "demo"]) == 0
    assert "all" in capsys.readouterr().out


# ------------------------------------------------------------------ what an experiment runs
def test_a_mask_that_freezes_nothing_is_searched_from_the_rate_of_all_weights(tmp_path):
    session = session_of(tmp_path)
    dense = experiments.rules(session)["dense", "Nc=1"]
    cells = SECTIONS["sparsity"].cells(session)
    assert searched_like(cells["Nc=1", 0.0], session).lr == searched_like(dense, session).lr
    assert searched_like(cells["Nc=1", 0.9], session).lr > searched_like(dense, session).lr


def test_the_larger_backbone_runs_the_same_cells_of_another_model(tmp_path):
    session = session_of(tmp_path)
    small = SECTIONS["rules"].cells(session)
    larger = SECTIONS["rules"].cells(experiments.on_vits16(session))
    assert set(larger) == {label for label in small
                           if label[0] in ("dense", "least_sensitive", "random")}
    for label, cfg in larger.items():
        assert (cfg.arch, cfg.weights, cfg.image_size) == ("vits16", "vits16_tin", 96)
        other = small[label]
        assert replace(cfg, arch=other.arch, weights=other.weights, image_size=other.image_size,
                       lr=other.lr) == other


def test_trade_offs_are_measured_around_each_rules_own_rate_and_compared_at_equal_gain(
        tmp_path, monkeypatch):
    asked = []

    def measured(cfg, store, rates, images):
        asked.append((cfg.rule, cfg.classes_per_client, cfg.sparsity, cfg.calibration_rounds,
                      cfg.seed, tuple(rates)))
        worse = 2 if cfg.rule == "random" else 1
        # two clients; the fourth rate diverges
        gain = [[0.1, 0.3], [0.8, 1.2], [1.9, 2.1], [None, None]]
        damage = [[0.01 * worse] * 2, [0.04 * worse] * 2, [0.09 * worse] * 2, [None, None]]
        return dict(clients=[3, 4], gain=gain, damage=damage)
    monkeypatch.setattr(experiments.extension, "trade_off", measured)
    session = session_of(tmp_path, seeds=(0, 1))
    scale = replace(session.scale, rule_shardings=(None, 5, 1), rules=("random",),
                    half_shardings=(1,), half_rules=("random",), half_once_rules=("shuffled",),
                    map_shardings=(None, 1), map_rungs=(1, -1, 0, 2))
    found = experiments.trade_offs(replace(session, scale=scale))
    own = experiments.rules(session)["random", "Nc=1"].lr
    rates = tuple(rate_of(rung_of(own) + step) for step in (-1, 0, 1, 2))
    assert asked[2:4] == [("random", 1, 0.9, 4, 0, rates), ("random", 1, 0.9, 4, 1, rates)]
    # with IID clients there is nothing to ask, and the map has no five classes
    told_apart = dict.fromkeys(asks[:4] for asks in asked)
    assert list(told_apart) == [
        (None, 1, 0.9, 4), ("random", 1, 0.9, 4), ("random", 1, 0.5, 4), ("shuffled", 1, 0.5, 1),
        ("least_sensitive", 1, 0.9, 1)]
    assert list(found.rule.unique()) == [
        "dense", "random", "half_random", "half_once_shuffled", "once_least_sensitive"]
    random = found[(found.rule == "random") & (found.seed == 1)]
    assert list(random.lr) == list(rates)
    assert list(random.gain)[:3] == pytest.approx([0.2, 1.0, 2.0])
    assert np.isnan(random.gain.iloc[3])

    table = experiments.damages(found).set_index(["rule", "seed"]).damage
    # between 0.2 and 1.0 nats, in logarithms
    part = math.log(experiments.EQUAL_GAIN / 0.2) / math.log(1.0 / 0.2)
    expected = 0.01 * 4 ** part
    assert table["dense", 0] == pytest.approx(expected)
    assert table["random", 1] == pytest.approx(2 * expected)


def test_unlearning_is_held_against_a_run_without_these_clients(tmp_path, monkeypatch, capsys):
    session = session_of(tmp_path)
    cells = experiments.rules(session)

    def forget(cfg, store, images, alphas=None):
        if cfg.rule == "random":
            raise ValueError("stored up to round 0")
        return dict(clients=[3, 17], rule=cfg.rule, inside=store.root.name, alphas=alphas)
    trained = []

    def train_without(cfg, clients, store, test, stop_at):
        trained.append((cfg, clients, stop_at))
        return dict(status="finished" if cfg.rule is None else stopped, round=5)
    monkeypatch.setattr(experiments.extension, "unlearn", forget)
    monkeypatch.setattr(experiments.extension, "train_without", train_without)
    stopped = "missing"  # a frozen store
    found = experiments.unlearning(session)
    where = experiments.nc_label(session.scale.rule_shardings[-1])
    assert trained == [(cells[rule, where], [3, 17], session.stop_at)
                       for rule in ("dense", "least_sensitive")]
    assert "Not there yet: stored up to round 0" in capsys.readouterr().out
    forgotten, reference = found["dense"]
    assert forgotten["inside"] == session.store.root.name
    assert (reference["inside"], reference["alphas"]) == ("without_3_17", (0.0,))
    assert found["least_sensitive"][1] == {}
    assert list(found) == ["dense", "least_sensitive"]

    stopped = "interrupted"
    assert list(experiments.unlearning(session)) == ["dense"]
    assert "Stopped after 5 rounds without clients [3, 17]" in capsys.readouterr().out
