"""The panel: chooses one run, tells what is stored of it, and starts nothing by itself."""
import json
from dataclasses import replace
from types import SimpleNamespace

import ipywidgets as widgets
import pytest
from helpers import CFG, make_small

import utils
from notebooks import display
from utils import Store, describe, panel, plan, progress, run_name, train


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A panel's `make`, whose runs take a fraction of a second, in a store of its own."""
    make_small(monkeypatch)
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.delenv("TRAIN", raising=False)
    monkeypatch.setattr(display, "SPEED", {})

    def make(name, **values):
        return replace(CFG, lr=0.02 if name == "lite" else CFG.lr, **values)
    return make


OPTIONS = dict(classes_per_client=[None, 5, 2], local_steps=[1, 2], seed=range(0, 10))


def shown(chosen) -> str:
    return chosen.status.value


def test_it_begins_with_the_values_it_is_given(small):
    chosen = panel(small, dict(preset="lite", classes_per_client=5, seed=3), **OPTIONS)
    assert chosen.cfg == replace(CFG, lr=0.02, classes_per_client=5, local_steps=1, seed=3)


def test_a_first_value_that_is_not_offered_is_refused(small):
    with pytest.raises(ValueError, match="'local_steps': 7"):
        panel(small, dict(local_steps=7), **OPTIONS)
    with pytest.raises(ValueError, match="nonsense"):
        panel(small, dict(nonsense=7), **OPTIONS)


def test_every_control_makes_its_field(small):
    chosen = panel(small, {}, **OPTIONS)
    assert chosen.cfg.classes_per_client is None
    chosen.controls["classes_per_client"].index = 2
    chosen.controls["local_steps"].index = 1
    chosen.controls["seed"].value = 4
    assert chosen.cfg == replace(CFG, classes_per_client=2, local_steps=2, seed=4)


def test_choosing_starts_no_work(small, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("choosing started work")
    for name in ("train", "open_run", "client_update"):
        monkeypatch.setattr(display, name, refuse)
    for name in ("load_data", "build_model", "train"):
        monkeypatch.setattr(utils, name, refuse)
    chosen = panel(small, {}, **OPTIONS)
    for i in range(3):
        chosen.controls["classes_per_client"].index = i
    chosen.controls["preset"].index = 1
    assert "0 of 4 rounds stored, will run 4, time not measured yet" in shown(chosen)


def test_the_status_follows_the_choice_and_is_announced(small):
    chosen = panel(small, dict(local_steps=2), **OPTIONS)
    assert shown(chosen).startswith('<div role="status">Preset: full · Classes per client, Nc: '
                                    'IID · Local steps, J: 2 · Seed: 0 — 0 of 4 rounds stored')
    result = train(chosen.cfg, chosen.store)
    chosen.controls["seed"].value = 1
    assert "0 of 4" in shown(chosen)
    chosen.controls["seed"].value = 0
    assert "4 of 4 rounds stored, nothing to run" in shown(chosen)
    assert f"test {100 * result['test']['top1']:.1f} %" in shown(chosen)


def test_half_a_run_is_told_with_the_time_that_is_left(small, monkeypatch):
    chosen = panel(small, {}, **OPTIONS)
    cfg, honest = chosen.cfg, utils.federated_round

    def stop_in_round_3(run, state):
        if state.round == 2:
            raise KeyboardInterrupt
        return honest(run, state)
    monkeypatch.setattr(utils, "federated_round", stop_in_round_3)
    chosen.run()
    assert progress(cfg, chosen.store)["round"] == 2
    # 2 rounds of 3 clients of 1 step, at 60 s a step
    display.SPEED[display.speed_key(cfg)] = 60.0
    chosen.look()
    assert "2 of 4 rounds stored, will run 2, about 6 min" in shown(chosen)
    assert "at round 2" in chosen.picture.value


def test_running_stops_cleanly_and_goes_on(small, monkeypatch, capsys):
    chosen = panel(small, {}, **OPTIONS)
    honest = utils.federated_round
    monkeypatch.setattr(utils, "federated_round", lambda run, state: (
        honest(run, state) if state.round < 2 else (_ for _ in ()).throw(KeyboardInterrupt)))
    chosen.run()
    assert "run this cell again" in capsys.readouterr().out
    assert "2 of 4 rounds stored" in shown(chosen)
    monkeypatch.setattr(utils, "federated_round", honest)
    chosen.run()
    assert "nothing to run" in shown(chosen)
    unbroken = train(chosen.cfg, Store(chosen.store.root / "other"))
    assert unbroken["history"] == chosen.store.result(chosen.cfg)["history"]


def test_the_stored_runs_are_listed(small):
    chosen = panel(small, {}, **OPTIONS)
    assert "Stored runs: 0" in chosen.table.value
    chosen.run()
    assert "Stored runs: 1" in chosen.table.value
    assert "Local steps, J" in chosen.table.value
    assert "IID" in chosen.table.value


def test_stored_runs_of_this_hardware_tell_the_time(small):
    chosen = panel(small, {}, **OPTIONS)
    chosen.run()
    result = chosen.store.result(chosen.cfg)
    display.SPEED.clear()
    panel(small, {}, **OPTIONS)
    steps = 4 * 3 * 1  # rounds, clients, local steps
    assert {
        display.speed_key(chosen.cfg): pytest.approx(result["seconds"] / steps)} == display.SPEED
    (path,) = chosen.store.root.glob("*.json")
    path.write_text(json.dumps(result | {"hardware": "another machine"}))
    display.SPEED.clear()
    panel(small, {}, **OPTIONS)
    assert display.SPEED == {}


def test_an_impossible_choice_is_told_not_raised(small):
    def make(name, **values):
        raise ValueError("Nc=7 & <K>")
    chosen = panel(make, {}, seed=range(3))
    assert "This cannot be run: Nc=7 &amp; &lt;K&gt;" in shown(chosen)


def test_a_diverged_run_says_why(small):
    found = {"error": "not finite in round 3", "history": [], "status": "diverged"}
    assert describe(CFG, found) == "Diverged: not finite in round 3"


def test_a_damaged_checkpoint_is_no_obstacle_to_looking(small):
    chosen = panel(small, {}, **OPTIONS)
    train(chosen.cfg, chosen.store)
    (path,) = (chosen.store.root / f"{run_name(chosen.cfg)}.json",)
    path.unlink()
    for file in (chosen.store.root / "checkpoints" / run_name(chosen.cfg)).glob("*"):
        file.write_bytes(file.read_bytes()[:50])
    chosen.look()
    assert "0 of 4 rounds stored" in shown(chosen)


def test_controls_have_labels_and_the_picture_alternative_text(small):
    chosen = panel(small, dict(local_steps=2), **OPTIONS)
    assert all(c.description for c in chosen.controls.values())
    assert chosen.picture.value == ""
    chosen.run()
    assert 'alt="Validation accuracy of fedavg_iid' in chosen.picture.value


def test_only_what_every_ipywidgets_has(small):
    """Colab has ipywidgets 7.7.1: menus, number fields, HTML and boxes, and plain arguments."""
    chosen = panel(small, {}, **OPTIONS)
    kinds = {type(c) for c in chosen.controls.values()}
    assert kinds <= {widgets.ToggleButtons, widgets.BoundedIntText}


# ------------------------------------------------------------------ plans
def test_a_plan_counts_epochs_steps(small, monkeypatch, capsys):
    cfg = replace(CFG, algorithm="centralized", val_fraction=0.25, batch_size=8)
    display.SPEED[display.speed_key(cfg)] = 2.0
    frame = plan([cfg], Store())
    steps = 100 * 90 / 8  # 100 classes of 120 images, a quarter held out: 9000 images, B = 8
    assert frame.minutes_left[0] == pytest.approx(4 * steps * 2.0 / 60)


def test_a_plan_says_what_the_finished_runs_will_take(small, capsys, monkeypatch):
    monkeypatch.setattr(display, "size_of", lambda arch: (1_000_000, 800_000))
    display.SPEED[display.speed_key(CFG)] = 1.0
    sparse = replace(CFG, rule="random", sparsity=0.75)
    plan([CFG, sparse, replace(sparse, seed=1)], Store())
    # 4 bytes of 1,000,000 weights, and twice of a quarter of 800,000
    assert "take 0.01 GB" in capsys.readouterr().out
    assert [display.kept_bytes(c) for c in (CFG, sparse)] == [4_000_000, 800_000]


def test_the_size_of_dinos_vit_is_the_papers():
    assert display.size_of("vits16")[1] == 21_589_632


def test_a_plan_says_how_much_of_the_gpus_memory_is_needed(small, capsys, monkeypatch):
    display.SPEED[display.speed_key(CFG)] = 1.0
    plan([CFG], Store())
    assert "GPU" not in capsys.readouterr().out
    for name, value in dict(is_available=True, max_memory_allocated=2.5e9,
                            get_device_name="T4").items():
        monkeypatch.setattr(display.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(display.torch.cuda, "get_device_properties",
                        lambda i: SimpleNamespace(total_memory=16e9))
    display.SPEED[display.speed_key(CFG)] = 1.0
    plan([CFG], Store())
    assert "So far 2.5 of the GPU's 16.0 GB were needed" in capsys.readouterr().out
