"""The panel: chooses one run, tells what is stored of it, and starts nothing by itself."""
import shutil
from dataclasses import replace

import ipywidgets as widgets
import pytest
from helpers import CFG, make_small

import utils
from notebooks import experiments, figures
from notebooks.backup import BackedUpStore
from notebooks.experiments import open_session, train_all
from notebooks.figures import panel
from utils import run_name

NAMES = ("algorithm", "classes_per_client", "dirichlet_alpha", "local_steps", "rule", "seed")
START = replace(CFG, local_steps=4, head="logistic")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Runs of a fraction of a second, in a store of their own."""
    make_small(monkeypatch)
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.delenv("TRAIN", raising=False)
    made = open_session("small", 1, workers=1)
    made.store.quiet = True
    return made


def shown(chosen) -> str:
    return chosen.status.value


def choose(chosen, name: str, value):
    chosen.controls[name].index = chosen.options[name].index(value)


def test_it_begins_with_the_run_it_is_given(session):
    start = replace(START, classes_per_client=5, lr=0.07, seed=3)
    chosen = panel(session, start, *NAMES, "lr")
    assert chosen.cfg == start  # also where the menu had no such rate


def test_a_field_that_is_not_offered_is_refused(session):
    with pytest.raises(ValueError, match="'nonsense'"):
        panel(session, START, "nonsense")


def test_every_control_makes_its_field(session):
    chosen = panel(session, START, *NAMES)
    choose(chosen, "classes_per_client", 5)
    choose(chosen, "local_steps", 8)
    choose(chosen, "rule", "random")
    choose(chosen, "algorithm", "fedprox")
    chosen.controls["seed"].value = 4
    assert chosen.cfg == replace(START, classes_per_client=5, local_steps=8, rule="random",
                                 algorithm="fedprox", seed=4)


@pytest.mark.parametrize("preset", experiments.SCALES)
def test_every_rate_of_the_sections_is_offered_in_order(tmp_path, monkeypatch, preset):
    """Also those of a preset that the panel changes to; a matched speed is not on the ladder."""
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("TRAIN", "no")
    start = replace(START, lr=0.07, rule="random", sparsity=0.7)
    offered = panel(open_session("small", 1), start, "lr", "sparsity").options
    for name in ("lr", "sparsity"):
        assert offered[name] == sorted(offered[name])
    of_preset = open_session(preset, 1)
    for name in experiments.SECTIONS:
        if name != "speed_matched":
            rates = {cfg.lr for cfg in experiments.section_runs(name, of_preset)}
            assert rates <= set(offered["lr"])


def test_registered_rules_and_algorithms_are_offered(session, monkeypatch):
    def mine(weights, fisher, draw):
        return weights
    monkeypatch.setitem(utils.RULES, "mine", utils.Rule(mine))
    chosen = panel(session, START, *NAMES)
    assert "mine" in chosen.options["rule"]
    assert {"centralized", "fedavg", "scaffold"} <= set(chosen.options["algorithm"])
    assert 0.3 in chosen.options["dirichlet_alpha"]


def test_choosing_starts_no_work(session, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("choosing started work")
    for name in ("load_data", "build_model", "open_run", "train"):
        monkeypatch.setattr(utils, name, refuse)
    monkeypatch.setattr(experiments, "train", refuse)
    monkeypatch.setattr(figures, "load_data", refuse)
    chosen = panel(session, START, *NAMES)
    for i in range(3):
        chosen.controls["classes_per_client"].index = i
    choose(chosen, "preset", "demo")
    assert "rounds stored, will run" in shown(chosen)


def test_the_status_follows_the_choice_and_is_announced(session):
    chosen = panel(session, START, *NAMES)
    assert shown(chosen).startswith('<div role="status">Data: SYNTHETIC IMAGES · Preset: small')
    assert "Classes a client, Nc: IID" in shown(chosen)
    assert "0 of 4 rounds stored, will run 4" in shown(chosen)
    chosen.run()
    result = session.store.result(START)
    chosen.controls["seed"].value = 1
    assert "0 of 4" in shown(chosen)
    chosen.controls["seed"].value = 0
    assert "4 of 4 rounds stored, nothing to run" in shown(chosen)
    assert f"test {100 * result['test']['top1']:.1f} %" in shown(chosen)


def test_a_longer_run_along_a_schedule_that_ends_is_said_to_be_another(session):
    train_all([START], session)
    longer = replace(START, num_rounds=6)
    said = figures.status_of(longer, session)
    assert "0 of 6 rounds stored, will run 6" in said
    assert "The stored run of 4 rounds is another run: its cosine schedule has ended" in said
    assert "another run" not in figures.status_of(replace(longer, seed=1), session)
    train_all([replace(START, schedule="constant")], session)
    assert "another run" not in figures.status_of(replace(longer, schedule="constant"), session)


def test_a_search_without_its_weights_is_no_tested_run(session):
    chosen = panel(session, START, *NAMES)
    train_all([START], session, test=False)
    chosen.update()
    assert "4 of 4 rounds stored, not tested: validation" in shown(chosen)
    for path in (session.store.root / "checkpoints" / run_name(START)).glob("*.safetensors"):
        path.unlink()
    chosen.update()
    assert "Searched, not tested" in shown(chosen)
    assert "it runs 4 rounds again" in shown(chosen)
    chosen.run()
    assert "4 of 4 rounds stored, nothing to run" in shown(chosen)


def test_another_preset_keeps_the_kind_of_run(session):
    start = replace(START, algorithm="centralized", rule="random")
    chosen = panel(session, start, "lr", "seed")
    choose(chosen, "preset", "demo")
    assert (chosen.cfg.algorithm, chosen.cfg.rule) == ("centralized", "random")


@pytest.mark.parametrize(("before", "after"), [("small", "lite"), ("lite", "small"),
                                               ("lite", "full"), ("demo", "small")])
@pytest.mark.parametrize("section", ["centralized_decays", "fedavg_iid", "grid", "rules"])
def test_in_another_preset_the_runs_of_its_section_are_found(
        tmp_path, monkeypatch, section, before, after):
    """Not trained again: how often a run is evaluated and its weight decay are part of its key."""
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("TRAIN", "no")
    opened = open_session(before, 1)
    expected = experiments.section_runs(section, open_session(after, 1))[0]
    names = ["lr", "seed"]
    if section in ("fedavg_iid", "grid"):
        names.append("num_rounds")
    chosen = panel(opened, section, *names)
    assert chosen.cfg == experiments.section_runs(section, opened)[0]
    choose(chosen, "preset", after)
    choose(chosen, "lr", expected.lr)
    if "num_rounds" in names:
        chosen.controls["num_rounds"].value = expected.num_rounds
    assert chosen.cfg == expected
    assert "This cannot be run" not in shown(chosen)


def test_runs_of_another_preset_reach_the_drive_and_mind_the_time(session, tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    backed = replace(session, stop_at=1e12,
                     store=replace(session.store, backup=drive / "results"))
    chosen = panel(backed, START, *NAMES)
    choose(chosen, "preset", "demo")
    assert chosen.chosen_session.stop_at == 1e12
    assert not (drive / "results/demo").exists()  # choosing lists no drive
    trained = []
    monkeypatch.setattr(figures, "train_all", lambda cfgs, session, *_: trained.append(session))
    chosen.run()
    assert trained[0].store.backup == drive / "results/demo"
    assert trained[0].store.root == session.store.root / "demo"
    assert figures.backup_of(trained[0], "small") == drive / "results"
    assert figures.backup_of(trained[0], "demo") == drive / "results/demo"
    assert figures.backup_of(session, "demo") is None


def test_any_length_is_evaluated_as_the_sections_do_it(session):
    """Else no run of a section but the first choice could be reached: it is part of the key."""
    start = replace(experiments.with_steps(START, 64), num_rounds=16, eval_every=4)
    uneven = replace(START, num_rounds=8, eval_every=3)
    assert panel(session, uneven, "num_rounds").cfg == uneven
    chosen = panel(session, start, "local_steps", "num_rounds")
    choose(chosen, "local_steps", 8)
    chosen.controls["num_rounds"].value = 8
    assert chosen.cfg == experiments.with_steps(replace(start, local_steps=8), 64)


def test_a_chosen_method_has_the_servers_rate_of_the_comparison(session):
    chosen = panel(session, START, "algorithm")
    choose(chosen, "algorithm", "fedadam")
    assert chosen.cfg.server_lr == experiments.METHODS["FedAdam"]["server_lr"]
    choose(chosen, "algorithm", START.algorithm)
    assert chosen.cfg == START


def test_another_preset_lies_beside_the_working_copy(session, tmp_path):
    """Not in the project's own folder, which may be on a drive that is slow."""
    moved = replace(session, preset="full", store=BackedUpStore(tmp_path / "elsewhere/full"),
                    figures=tmp_path / "pictures/full", tensorboard=True)
    other = figures.other_session(moved, "lite")  # no GPU is asked for: `full` was opened without
    assert (other.store.root, other.figures) == (tmp_path / "elsewhere/lite",
                                                 tmp_path / "pictures/lite")
    assert other.tensorboard
    demo = figures.other_session(moved, "demo")
    assert (demo.store.root, demo.figures) == (tmp_path / "elsewhere/demo",
                                               tmp_path / "pictures/demo")
    back = figures.other_session(demo, "small")
    assert (back.store.root, back.figures) == (tmp_path / "elsewhere", tmp_path / "pictures")


def test_a_seed_beyond_the_fields_range_widens_it(session):
    chosen = panel(session, replace(START, seed=2024), "seed")
    assert chosen.cfg.seed == 2024
    assert isinstance(chosen.controls["seed"], widgets.BoundedIntText)


def test_running_stops_cleanly_and_goes_on(session, monkeypatch, capsys):
    chosen = panel(session, START, *NAMES)
    honest = utils.federated_round

    def stop_in_round_3(run, state):
        if state.round == 2:
            raise KeyboardInterrupt
        return honest(run, state)
    monkeypatch.setattr(utils, "federated_round", stop_in_round_3)
    with pytest.raises(figures.Stopped):  # or *Run all* would go on with the next cell
        chosen.run()
    assert "Run this again" in capsys.readouterr().out
    assert "2 of 4 rounds stored, will run 2" in shown(chosen)
    assert "at round 2" in chosen.picture.value

    monkeypatch.setattr(utils, "federated_round", honest)
    chosen.run()
    assert "nothing to run" in shown(chosen)
    unbroken = utils.train(START, utils.Store(session.store.root / "other", quiet=True))
    assert unbroken["history"] == session.store.result(START)["history"]


def test_the_stored_runs_are_listed_and_synthetic_images_marked(session):
    chosen = panel(session, START, *NAMES)
    assert "Stored runs: 0" in chosen.table.value
    chosen.run()
    assert "Stored runs: 1" in chosen.table.value
    assert "local steps, J" in chosen.table.value
    assert "SYNTHETIC" in chosen.table.value


def test_a_searched_run_that_is_tested_is_listed_anew(session):
    chosen = panel(session, START, *NAMES)
    train_all([START], session, test=False)
    chosen.update()
    untested = chosen.table.value
    chosen.run()
    accuracy = experiments.frames([session.store.result(START)])[0].test.item()
    assert f"{accuracy:.4g}<" in chosen.table.value
    assert untested.count(">–<") == chosen.table.value.count(">–<") + 1


def test_a_click_opens_no_file_of_the_drive_and_parses_nothing_twice(
        session, tmp_path, monkeypatch):
    slow = BackedUpStore(session.store.root, quiet=True, backup=tmp_path / "drive")
    on_drive = replace(session, store=slow)
    experiments.train_all([START], on_drive)
    parsed = []
    honest = utils.parse_result
    monkeypatch.setattr(utils, "parse_result", lambda path: parsed.append(path) or honest(path))
    chosen = panel(on_drive, START, *NAMES)
    drive_was = (tmp_path / "drive").rename(tmp_path / "gone")
    parsed.clear()
    for seed in (1, 2, 3):
        chosen.controls["seed"].value = seed
    assert parsed == []
    assert "Stored runs: 1" in chosen.table.value
    assert drive_was.is_dir()


def test_on_another_day_the_checkpoints_of_the_backup_count(session, tmp_path, monkeypatch):
    """Training goes on from them; they are listed once and opened once, not at every click."""
    slow = BackedUpStore(tmp_path / "machine", quiet=True, backup=tmp_path / "drive")
    train_all([START], replace(session, store=slow), watch=figures.press_stop)
    searched = replace(START, seed=1)
    train_all([searched], replace(session, store=slow), test=False)
    shutil.rmtree(slow.root)  # the machine of that day

    today = replace(session, store=replace(slow))
    chosen = panel(today, START, *NAMES)
    assert "2 of 4 rounds stored, will run 2" in shown(chosen)
    assert "at round 2" in chosen.picture.value
    half, whole = (figures.flop_left(cfg, store, True) for cfg, store in (
        (START, today.store), (START, session.store.inside("empty"))))
    assert half == whole / 2
    chosen.controls["seed"].value = 1
    assert "4 of 4 rounds stored, not tested" in shown(chosen)

    (tmp_path / "drive").rename(tmp_path / "gone")
    chosen.controls["seed"].value = 0
    assert "at round 2" in chosen.picture.value
    (tmp_path / "gone").rename(tmp_path / "drive")
    for name in today.store.names("checkpoints/*/*.safetensors"):
        today.store.delete(name)
    assert "0 of 4 rounds stored" in figures.status_of(START, today)
    chosen.run()
    assert "4 of 4 rounds stored, nothing to run" in shown(chosen)


def test_a_preset_for_gpus_is_refused_without_one(session):
    chosen = panel(session, START, *NAMES)
    choose(chosen, "preset", "full")
    assert "This cannot be run" in shown(chosen)
    assert "T4 GPU" in shown(chosen)
    with pytest.raises(RuntimeError, match="GPU"):
        chosen.run()


def test_an_impossible_choice_is_told_not_raised(session):
    chosen = panel(session, START, *NAMES)
    choose(chosen, "classes_per_client", 5)
    choose(chosen, "dirichlet_alpha", 0.3)
    assert "This cannot be run" in shown(chosen)
    assert "two kinds of label skew" in shown(chosen)
    choose(chosen, "dirichlet_alpha", None)
    assert "will run" in shown(chosen)


def test_a_diverged_run_says_why(session, monkeypatch):
    stored = {"status": "diverged", "error": "not finite in round 3"}
    monkeypatch.setattr(utils.Store, "result", lambda store, cfg: stored)
    assert figures.status_of(START, session) == "Diverged: not finite in round 3"


def test_a_damaged_checkpoint_is_no_obstacle_to_looking(session):
    chosen = panel(session, START, *NAMES)
    folder = session.store.root / "checkpoints" / run_name(START)
    folder.mkdir(parents=True)
    (folder / "0000002_abc.safetensors").write_bytes(b"not tensors")
    chosen.update()
    assert "2 of 4 rounds stored" in shown(chosen)
    assert chosen.picture.value == ""


def test_only_what_every_ipywidgets_has(session):
    """Colab has ipywidgets 7.7.1: buttons, number fields, HTML and boxes, and plain arguments."""
    chosen = panel(session, START, *NAMES)
    kinds = {type(c) for c in chosen.controls.values()}
    assert kinds <= {widgets.ToggleButtons, widgets.BoundedIntText}
    assert all(c.description for c in chosen.controls.values())
