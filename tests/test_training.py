"""Training: what a run reads, trains, selects, survives and returns."""
import hashlib
import json
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    CFG,
    cut,
    forbid,
    make_small,
    resumed,
    same,
    same_state,
    small_data,
    timeless,
)

import utils
from utils import RULES, Store, build_model, open_run, run_name, train, train_centralized
from utils import train_federated as federated

CENTRAL = replace(CFG, algorithm="centralized", num_epochs=3, eval_every=1, batch_size=30)
SPARSE = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5)
KINDS = {"centralised": CENTRAL, "dense": CFG, "sparse": SPARSE,
         "centralised sparse": replace(CENTRAL, rule="random", head="ridge")}
BUILT_IN = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude",
            "random", "query_key")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def final(cfg, store, test=True):
    """(result, the state it ended in)."""
    result = train(cfg, store, test)
    return result, resumed(cfg, store)


# ------------------------------------------------------------------ once is enough
@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_a_finished_run_returns_at_once(store, monkeypatch, cfg):
    result = train(cfg, store)
    forbid(monkeypatch, "open_run", "load_data", "build_model")
    assert train(cfg, Store(store.root)) == result


def test_weights_that_an_algorithm_leaves_as_they_are_can_be_stored(store, monkeypatch):
    class Lazy(utils.FedAvg):
        """Moves the head alone: of all else the last weights and the best are the same tensors."""
        def server_step(self, state, update):
            moved = utils.add(state.params, update.vector)
            kept = {n: moved[n] if n in utils.HEAD else w for n, w in state.params.items()}
            return kept, {"kept": kept}
    monkeypatch.setitem(utils.ALGORITHMS, "lazy", Lazy)
    cfg = replace(CFG, algorithm="lazy", head="lda", eval_every=1, schedule="constant")
    assert federated(cfg, store)["status"] == "finished"
    state = resumed(cfg, store)
    start = open_run(cfg, Store(store.root / "other"))[1]
    moved = {n for n, w in start.params.items() if not torch.equal(w, state.params[n])}
    assert moved == set(utils.HEAD)


def test_a_frozen_store_trains_nothing(store, monkeypatch):
    result = federated(CFG, store)
    forbid(monkeypatch, "open_run")
    frozen = Store(store.root, frozen=True)
    assert federated(CFG, frozen) == result
    assert federated(replace(CFG, seed=1), frozen)["status"] == "missing"


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_the_same_configuration_gives_the_same_bits(tmp_path, cfg):
    torch.manual_seed(1)
    a = final(cfg, Store(tmp_path / "a"))
    torch.manual_seed(2)  # global generators have no say
    b = final(cfg, Store(tmp_path / "b"))
    assert timeless(a[0]) == timeless(b[0])
    assert same_state(a[1], b[1])


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_seed_0_is_a_seed_like_any_other(store, cfg):
    runs = [final(replace(cfg, seed=seed), store) for seed in (0, 1)]
    assert runs[0][0]["history"] != runs[1][0]["history"]
    assert not same(runs[0][1].params, runs[1][1].params)


def test_each_kind_has_its_own_entrance(store):
    with pytest.raises(ValueError, match="train_centralized"):
        federated(CENTRAL, store)
    result = train_centralized(replace(CENTRAL, algorithm="fedavg"), store)
    assert result["config"]["algorithm"] == "centralized"
    assert [row["round"] for row in result["history"]] == [0, 1, 2, 3]


def test_a_run_learns(store):
    history = train_centralized(replace(CENTRAL, num_epochs=12, batch_size=10), store)["history"]
    assert history[-1]["train_loss"] < 0.6 * history[1]["train_loss"]
    assert history[-1]["val_top1"] > 0.2  # chance is 0.05


# ------------------------------------------------------------------ validation and test
def recorded_evaluations(patch):
    """The images of every call of `evaluate`."""
    seen = []
    honest = utils.evaluate

    def evaluate(model, images, *args, **options):
        seen.append(images.clone())
        return honest(model, images, *args, **options)
    patch.setattr(utils, "evaluate", evaluate)
    return seen


def test_only_validation_images_are_evaluated_before_the_end(store, monkeypatch):
    seen, data = recorded_evaluations(monkeypatch), small_data(CFG)
    federated(CFG, store)
    val, test = data.images[data.val], data.test_images
    assert all(torch.equal(x, val) for x in seen[:3])  # rounds 0, 2 and 4
    assert seen[3:]
    assert all(torch.equal(x, test) for x in seen[3:])


def test_without_test_the_test_set_is_untouched_and_added_later(store, monkeypatch):
    seen, data = recorded_evaluations(monkeypatch), small_data(CFG)
    result = federated(CFG, store, test=False)
    assert "test" not in result
    assert not store.names("*.npy")
    assert not any(torch.equal(x, data.test_images) for x in seen)
    forbid(monkeypatch, "federated_round")
    assert federated(CFG, store, test=False) == result
    tested = federated(CFG, store)
    assert tested["test"]["images"] == 80
    assert {k: v for k, v in tested.items() if k not in ("test", "test_of_best")} == result


def test_training_reads_no_validation_and_no_test_image(store, monkeypatch):
    """Neither in the rounds nor for the head nor for the mask."""
    data, read = small_data(SPARSE), []
    for name, position in (("augment", 0), ("extract_features", 1), ("sensitivity", 1)):
        honest = getattr(utils, name)

        def guarded(*args, honest=honest, position=position, **options):
            read.extend(args[position])
            return honest(*args, **options)
        monkeypatch.setattr(utils, name, guarded)
    federated(SPARSE, store, test=False)
    keys = {x.numpy().tobytes() for x in read}
    assert keys == {x.numpy().tobytes() for x in data.images[data.train]}


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_test_labels_change_nothing_but_the_test(tmp_path, monkeypatch, cfg):
    cfg = replace(cfg, test_curve=True)
    a, state = final(cfg, Store(tmp_path / "a"))
    monkeypatch.setattr(utils, "load_data", lambda cfg: replace(
        small_data(cfg), test_labels=small_data(cfg).test_labels.flip(0)))
    b, other = final(cfg, Store(tmp_path / "b"))
    assert a["best_round"] == b["best_round"]
    assert same(state.params, other.params)
    assert same(state.best, other.best)
    assert a["test"] != b["test"]
    for x, y in zip(a["history"], b["history"], strict=True):
        assert {k: v for k, v in x.items() if "test" not in k} == {
            k: v for k, v in y.items() if "test" not in k}


def scripted(patch, scores):
    """Validation accuracies as given; honest on the test set."""
    honest = utils.evaluate
    left = iter(scores)

    def evaluate(model, images, *args, **options):
        found = honest(model, images, *args, **options)
        if len(images) == 60:
            found["top1"] = next(left)
        return found
    patch.setattr(utils, "evaluate", evaluate)


def test_the_last_weights_are_the_result_and_the_best_stand_beside(store, monkeypatch):
    cfg = replace(CFG, num_rounds=5, eval_every=1)
    scripted(monkeypatch, [0.05, 0.1, 0.3, 0.2, 0.3, 0.1])  # round 2 is the first of equals
    result, state = final(cfg, store)
    assert result["best_round"] == state.best_round == 2
    run, stepped = open_run(replace(cfg, name="afresh"), store)
    weights = []
    for _ in range(5):
        stepped = utils.federated_round(run, stepped)
        weights.append(stepped.params)
    assert same(state.params, weights[4])
    assert same(state.best, weights[1])
    data = run.data
    for name, params in (("test", weights[4]), ("test_of_best", weights[1])):
        run.load(params)
        expected = utils.evaluate(run.model, data.test_images, data.test_labels)
        assert result[name]["loss"] == expected["loss"]
        assert result[name]["top1"] == expected["top1"]
        if name == "test":
            assert (np.load(store.root / f"{run_name(cfg)}.npy") == expected["predictions"]).all()


def test_round_0_is_evaluated_and_can_be_the_best(store, monkeypatch):
    cfg = replace(CFG, eval_every=1)
    start = open_run(cfg, store)[1].params
    scripted(monkeypatch, [0.9, 0.1, 0.3, 0.2, 0.3])
    result, state = final(cfg, store)
    assert result["history"][0].keys() == {"round", "val_loss", "val_top1", "val_top5"}
    assert (result["history"][0]["round"], result["history"][0]["val_top1"]) == (0, 0.9)
    assert state.best_round == 0
    assert same(state.best, start)


def test_the_loss_at_the_start_is_alike_on_what_clients_see_and_on_validation(store):
    """The default augmentation does not set the head back that was fitted to plain images.

    On these few, easy images: where classes are hard, a head has a lower loss on the images that it
    was fitted to than on validation, with flips and without.
    """
    cfg = replace(CFG, augmentation="flip", head="logistic", lr=1e-9, num_rounds=1,
                  eval_every=1, participation=1.0, local_steps=8)
    start, first = federated(cfg, store)["history"]
    assert abs(first["train_loss"] - start["val_loss"]) < 0.1


def test_evaluations_come_every_eval_every_rounds_and_at_the_end(store):
    history = federated(replace(CFG, num_rounds=5, eval_every=3), store)["history"]
    assert [r["round"] for r in history] == [0, 1, 2, 3, 4, 5]
    assert [r["round"] for r in history if "val_loss" in r] == [0, 3, 5]


def test_a_test_curve_is_drawn_only_if_asked_for(store):
    for wanted in (False, True):
        history = federated(replace(CFG, test_curve=wanted), store)["history"]
        assert [r["round"] for r in history if "test_loss" in r] == ([0, 2, 4] if wanted else [])


def test_eval_images_bounds_both_evaluations(store, monkeypatch):
    seen = recorded_evaluations(monkeypatch)
    federated(replace(CFG, eval_images=7), store)
    assert {len(x) for x in seen} == {7}


# ------------------------------------------------------------------ stops
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("at", [2, 11])
def test_an_interrupted_run_goes_on_to_the_unbroken_bits(tmp_path, monkeypatch, cfg, at):
    whole, store = final(cfg, Store(tmp_path / "whole")), Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut(patch, "local_step", at)  # in the midst of a round
        stopped = train(cfg, store)
    assert stopped["status"] == "interrupted"
    assert 0 <= stopped["round"] < cfg.length
    assert resumed(cfg, store).round == stopped["round"]
    assert not store.names("*.json")
    again = final(cfg, Store(store.root))
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])
    assert [part["after_round"] for part in again[0]["segments"]] == [0, stopped["round"]]


def test_interrupting_at_every_round_changes_nothing(tmp_path, monkeypatch):
    cfg = replace(CFG, algorithm="mine", num_rounds=6, eval_every=1)
    whole, seen = final(cfg, Store(tmp_path / "whole")), []
    for _ in range(6):
        with monkeypatch.context() as patch:
            cut(patch, "federated_round", 2)
            result = train(cfg, Store(tmp_path / "cut"))
        seen.append(result.get("round", result["status"]))
    again = final(cfg, Store(tmp_path / "cut"))
    assert seen == [1, 2, 3, 4, 5, "finished"]
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])


def test_a_run_stops_by_itself_when_its_time_is_up(store, monkeypatch):
    now = 100.0
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: now))
    assert federated(CFG, store, stop_at=now)["status"] == "interrupted"
    seen = []

    def watch(run, state):
        nonlocal now
        seen.append((state.round, state.history[-1]["val_top1"]))
        now = 105.0
    stopped = federated(CFG, store, stop_at=105.0, watch=watch)
    assert (stopped["status"], stopped["round"]) == ("interrupted", 2)
    assert [at for at, _ in seen] == [2]
    assert federated(CFG, store)["status"] == "finished"


def test_stopping_while_the_head_is_trained_is_an_interruption(tmp_path, monkeypatch):
    cfg, store = replace(CFG, rule="random"), Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut(patch, "local_step", 8)
        assert federated(cfg, store)["status"] == "interrupted"
    whole, again = final(cfg, Store(tmp_path / "whole")), final(cfg, store)
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])


def test_checkpoints_come_by_time_however_rarely_a_run_is_evaluated(store, monkeypatch):
    saved, save = [], Store.save
    monkeypatch.setattr(Store, "save", lambda self, run, state: (
        saved.append(state.round), save(self, run, state))[1])
    cfg = replace(CFG, num_rounds=5, eval_every=40)
    federated(cfg, replace(store, minutes=0.0))
    assert saved == [1, 2, 3, 4, 5]
    saved.clear()
    federated(replace(cfg, seed=1), replace(store, minutes=60.0))
    assert saved == [5]


def test_a_second_ctrl_c_while_the_checkpoint_is_written_loses_no_round(store, monkeypatch):
    """Both interrupts are real signals: the first in round 3, the second in the midst of saving."""
    cfg = replace(CFG, num_rounds=6)
    honest_round, honest_sync = utils.federated_round, os.fsync

    def interrupted_round(run, state):
        if state.round == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return honest_round(run, state)

    def interrupted_sync(file):
        os.kill(os.getpid(), signal.SIGINT)
        honest_sync(file)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "federated_round", interrupted_round)
        patch.setattr(os, "fsync", interrupted_sync)
        stopped = train(cfg, store)
    assert (stopped["status"], stopped["round"]) == ("interrupted", 3)
    assert resumed(cfg, store).round == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("moment", ["in the last save", "in the last picture"])
def test_a_ctrl_c_at_the_very_end_of_a_run_is_not_lost(store, monkeypatch, moment):
    """A real signal; what would come after the run must not begin, and no round is trained twice.
    """
    cfg = replace(CFG, num_rounds=2)
    honest_sync = os.fsync
    moments = [moment]

    def interrupted_sync(file):
        if moments:  # once: what is written after the checkpoint is the result
            moments.pop()
            os.kill(os.getpid(), signal.SIGINT)
        honest_sync(file)

    def watch(run, state):
        if state.round == cfg.num_rounds and moment == "in the last picture":
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        if moment == "in the last save":
            patch.setattr(os, "fsync", interrupted_sync)
        assert train(cfg, store, watch=watch)["status"] == "interrupted"
    monkeypatch.setattr(utils, "federated_round", lambda *args: pytest.fail("trained again"))
    assert train(cfg, store)["status"] == "finished"


def test_the_heads_own_run_stops_with_the_time_too(store, monkeypatch):
    now = 100.0
    monkeypatch.setattr(utils.time, "monotonic", lambda: now)
    honest_round = utils.federated_round

    def long_round(run, state):
        nonlocal now
        now += 10.0
        return honest_round(run, state)
    monkeypatch.setattr(utils, "federated_round", long_round)
    cfg = replace(CFG, head="train", rule="random", head_rounds=6)
    assert federated(cfg, store, stop_at=125.0)["status"] == "interrupted"
    assert now == 130.0  # three rounds of the head's own run, where six are wanted


def test_each_part_of_a_run_says_where_it_was_trained(store, monkeypatch):
    def stop(run, state):
        raise KeyboardInterrupt
    federated(CFG, store, watch=stop)
    monkeypatch.setattr(utils, "hardware", lambda: "another machine")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other units")
    monkeypatch.setattr(utils, "CODE_SHA256", "other code")
    first, second = federated(CFG, store)["segments"]
    assert (first["after_round"], second["after_round"]) == (0, 2)
    assert first["hardware"] != second["hardware"] == "another machine"
    assert first["vector_units"] != second["vector_units"] == "other units"
    assert first["code"] != second["code"] == "other code"
    assert first["versions"].keys() == {"torch", "torchvision", "timm", "numpy"}
    assert {"device", "precision", "threads", "python"} <= first.keys()


# ------------------------------------------------------------------ more rounds
@pytest.mark.parametrize("kind", ["mine", "sparse", "centralised"])
def test_at_a_constant_rate_a_finished_run_goes_on_to_the_longer_runs_bits(tmp_path, monkeypatch,
                                                                           kind):
    cfg = {"mine": replace(CFG, algorithm="mine"), "sparse": SPARSE, "centralised": CENTRAL}[kind]
    cfg = replace(cfg, schedule="constant", num_epochs=4, eval_every=2)
    longer = replace(cfg, num_rounds=8, num_epochs=8)
    whole = final(longer, Store(tmp_path / "whole"))
    store = Store(tmp_path / "short")
    short = train(cfg, store)
    rounds = []
    for name in ("federated_round", "centralized_epoch"):
        honest = getattr(utils, name)
        monkeypatch.setattr(utils, name, lambda run, state, honest=honest: (
            rounds.append(state.round), honest(run, state))[1])
    again = final(longer, store)
    assert rounds == [4, 5, 6, 7]
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])
    assert train(cfg, store) == short  # the shorter one is kept


def test_a_foreign_result_beside_a_run_at_a_constant_rate_is_passed_over(tmp_path):
    """All the names of a result, and nothing of a run in them."""
    cfg = replace(CFG, schedule="constant")
    alone = final(cfg, Store(tmp_path / "alone"))
    store = Store(tmp_path / "beside")
    foreign = dict(run="foreign", key={}, status="finished", config={}, history=[])
    store.write("foreign.json", utils.to_json(foreign))
    store.write("short.json", utils.to_json(foreign | dict(key=utils.run_key(cfg), run="short")))
    beside = final(cfg, store)
    assert timeless(beside[0]) == timeless(alone[0])
    assert same_state(beside[1], alone[1])


def test_along_a_cosine_the_longer_run_is_another_one(store, monkeypatch):
    federated(CFG, store)
    result = federated(replace(CFG, num_rounds=6), store)
    assert [part["after_round"] for part in result["segments"]] == [0]
    assert result["history"][1]["lr"] == 0.05


# ------------------------------------------------------------------ divergence
def test_a_diverged_run_keeps_its_last_good_weights_and_stays_diverged(store, monkeypatch):
    cfg = replace(CFG, eval_every=1, num_clients=2, participation=1.0)
    honest = utils.client_update

    def client_update(run, state, k, lr):
        update = honest(run, state, k, lr)
        if state.round == 2:
            update = replace(update, loss=torch.tensor(float("nan")))
        return update
    with monkeypatch.context() as patch:
        patch.setattr(utils, "client_update", client_update)
        result = federated(cfg, store)
    assert result["status"] == "diverged"
    assert re.search(r"round or epoch 3 at lr=0\.025.*client 0.*nan.*client 1.*nan",
                     result["error"])
    assert "test" not in result
    kept = resumed(cfg, store)
    assert kept.round == 2
    assert [row["round"] for row in result["history"]] == [0, 1, 2]
    run, state = open_run(replace(cfg, name="afresh"), store)
    for _ in range(2):
        state = utils.federated_round(run, state)
    assert same(kept.params, state.params)
    forbid(monkeypatch, "open_run")
    assert federated(cfg, store) == result


@pytest.mark.parametrize("cfg", [replace(CFG, local_steps=1, participation=0.1), CENTRAL],
                         ids=["one step", "centralised"])
@pytest.mark.parametrize(("lr", "eval_every"), [(1e12, 1), (1e30, 4)])
def test_an_overflow_is_a_divergence_not_a_crash(store, cfg, lr, eval_every):
    """The loss before an exploding step is finite; what follows from it must not break the JSON."""
    cfg = replace(cfg, lr=lr, eval_every=eval_every)
    result = train(cfg, store)
    assert result["status"] == "diverged"
    assert train(cfg, store) == result


def test_a_head_whose_own_run_diverges_makes_the_run_diverged_by_name(store):
    """Not "interrupted, run again" for ever; and the rest of a grid is trained."""
    cfg = replace(CFG, rule="random", lr=1e30)
    result = federated(cfg, store)
    assert result["status"] == "diverged"
    probe = next(name for name, r in store.results().items() if r["config"]["head"] == "probe")
    assert f"the head's own run, {probe}, diverged" in result["error"]
    assert federated(cfg, store) == result
    assert federated(replace(CFG, rule="random"), store)["status"] == "finished"


# ------------------------------------------------------------------ what is trained
@pytest.mark.parametrize("cfg", [replace(CFG, rule="random"), KINDS["centralised sparse"],
                                 replace(CFG, rule="lowest_magnitude", head="ridge")],
                         ids=["trained head", "centralised", "ridge"])
def test_sparse_runs_keep_head_and_embeddings_frozen(store, cfg):
    run, start = open_run(cfg, store)
    before = {n: w.clone() for n, w in run.model.state_dict().items()}
    step = utils.centralized_epoch if cfg.centralized else utils.federated_round
    run.load(step(run, step(run, start)).params)
    after = run.model.state_dict()
    for n, w in before.items():
        trainable = run.mask.get(n, torch.zeros_like(w, dtype=torch.bool))
        assert torch.equal(after[n][~trainable], w[~trainable])
    assert not same(after, before)
    assert not {"head.weight", "head.bias", "cls_token", "pos_embed"} & run.mask.keys()


@pytest.mark.parametrize("rule", BUILT_IN)
@pytest.mark.parametrize("centralized", [False, True], ids=["federated", "centralised"])
def test_skipping_gradients_of_frozen_weights_changes_no_bit(store, rule, centralized):
    cfg = replace(CENTRAL if centralized else CFG, rule=rule, head="ridge", sparsity=0.98,
                  weight_decay=0.01)
    ends, trained = [], []
    for skip in (True, False):
        run, state = open_run(cfg, store, skip_frozen=skip)
        trained.append(sum(p.requires_grad for p in run.model.parameters()))
        state = utils.validate(run, state)
        for _ in range(2):
            state = (utils.centralized_epoch if centralized else utils.federated_round)(run, state)
        run.load(state.params)
        ends.append((run.model.state_dict(), utils.validate(run, state).history))
    (skipped, history), (whole, same_history) = ends
    assert same(skipped, whole)
    assert history == same_history
    assert trained[0] <= trained[1]
    if rule == "query_key":
        assert trained[0] < trained[1]


def test_a_probe_trains_the_head_alone(store):
    for augmentation in ("flip", "none"):  # without, on features computed once
        cfg = replace(CFG, head="probe", augmentation=augmentation)
        run, state = open_run(cfg, store)
        before = {n: w.clone() for n, w in run.model.state_dict().items()}
        after = utils.federated_round(run, state)
        assert after.params.keys() == {"head.weight", "head.bias"}
        assert not same(after.params, state.params)
        run.load(state.params)
        assert same(run.model.state_dict(), before)


def test_a_probe_on_features_is_the_probe_on_images(store):
    cfg = replace(CFG, head="probe", augmentation="none")
    on_features = federated(cfg, store)
    data, model = small_data(cfg), build_model(cfg)
    run, _ = open_run(cfg, None)
    run.load(resumed(cfg, store).params)
    head = run.model.head.state_dict()
    model.head.load_state_dict(head)
    expected = utils.evaluate(model, data.test_images, data.test_labels)
    assert on_features["test"]["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("head", ["train", "ridge"])
def test_a_dense_run_trains_everything(store, head):
    names = {n for n, _ in build_model(CFG).named_parameters()}
    assert open_run(replace(CFG, head=head), store)[1].params.keys() == names


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_sparse_runs_train_the_head_once_and_share_it(store, cfg):
    first = replace(cfg, rule="random", sparsity=0.5)
    train(first, store)
    train(replace(first, sparsity=0.9), store)
    probe, = (r for r in store.results().values() if r["config"]["head"] == "probe")
    assert "test" not in probe  # it never sees the test set
    probe = utils.Config(**probe["config"])
    assert (probe.length, probe.algorithm) == (first.head_rounds, cfg.algorithm)
    last = resumed(probe, store).params
    run, _ = open_run(replace(first, name="afresh"), store)
    assert same({n: run.model.get_parameter(n).data for n in last}, last)


def test_a_mask_that_frees_nothing_trains_nothing(store):
    cfg = replace(CFG, rule="random", sparsity=1.0, head="ridge")
    before = {n: w.clone() for n, w in open_run(cfg, store)[0].model.state_dict().items()}
    result = federated(cfg, store)
    assert result["status"] == "finished"
    assert same(open_run(cfg, store)[0].model.state_dict(), before)
    assert {row["bytes_up"] for row in result["history"][1:]} == {0}


@pytest.mark.parametrize("calibration", ["mean", "max", "vote"])
def test_masks_are_calibrated_on_the_clients_own_images(store, monkeypatch, calibration):
    cfg = replace(SPARSE, calibration=calibration, calibration_images=30)
    asked, honest = [], utils.calibrate_mask
    monkeypatch.setattr(utils, "calibrate_mask", lambda model, images, **options: (
        asked.append((images, options)), honest(model, images, **options))[1])
    run, _ = open_run(cfg, store)
    (images, options), = asked
    assert options["combine"] == calibration
    assert [len(x) for x in images] == [3] * 10
    for x, shard in zip(images, run.shards, strict=True):
        own = {i.numpy().tobytes() for i in run.data.images[shard]}
        assert {i.numpy().tobytes() for i in x} <= own


# ------------------------------------------------------------------ ideas of one's own
def test_a_registered_algorithm_and_rule_train_and_resume_bitwise(tmp_path, monkeypatch):
    def by_size(weights, fisher, draw):
        return {n: w.abs() + w.abs().mean() for n, w in weights.items()}
    monkeypatch.setitem(RULES, "mine", utils.Rule(by_size))
    cfg = replace(CFG, algorithm="mine", rule="mine", head="lda", eval_every=1)
    whole = final(cfg, Store(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        cut(patch, "local_step", 13)
        stopped = train(cfg, Store(tmp_path / "cut"))
    assert stopped["status"] == "interrupted"
    again = final(cfg, Store(tmp_path / "cut"))
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])
    groups = whole[0]["history"][-1]
    assert groups["bytes_up"] > 4 * 3 * whole[0]["mask"]["trainable"]  # messages are counted


# ------------------------------------------------------------------ weights and masks that change
def backbone_file(path, seed):
    model = build_model(replace(CFG, seed=seed))
    safetensors.torch.save_file(utils.backbone(model), path)


def test_weights_that_are_replaced_in_the_midst_of_a_run_are_never_mixed(tmp_path, store):
    path = tmp_path / "w.safetensors"
    backbone_file(path, 1)

    def stop(run, state):
        raise KeyboardInterrupt
    derived, named = (replace(CFG, weights=str(path), name=name) for name in ("", "mine"))
    for cfg in (derived, named):
        assert federated(cfg, store, watch=stop)["round"] == 2
    backbone_file(path, 2)
    with pytest.raises(ValueError, match="mine is stored as another run.*weights_sha256"):
        federated(named, store)
    result = federated(derived, store)  # has another name, and begins anew
    assert [part["after_round"] for part in result["segments"]] == [0]
    backbone_file(path, 1)
    assert [part["after_round"] for part in federated(named, store)["segments"]] == [0, 2]
    assert federated(derived, store)["run"] != result["run"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_sparse_run_carries_its_own_mask(tmp_path, monkeypatch, finished):
    """Calibrated elsewhere a mask may come out otherwise: what was begun goes on as it was."""
    whole = final(SPARSE, Store(tmp_path / "whole"))
    store = Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        if not finished:
            cut(patch, "federated_round", 3)
        train(SPARSE, store, test=not finished)
    for file in (store.root / "cache").iterdir():
        file.unlink()
    honest = utils.calibrate_mask
    monkeypatch.setattr(utils, "calibrate_mask", lambda *args, **options: honest(
        *args, **options | dict(seed=99)))
    again = final(SPARSE, Store(store.root))
    assert timeless(again[0]) == timeless(whole[0])
    assert same_state(again[1], whole[1])


def test_a_finished_sparse_run_keeps_only_its_trainable_weights_and_its_mask(store):
    cfg = replace(CFG, rule="random", sparsity=0.9, head="ridge", eval_every=1)
    result = federated(cfg, store)
    name, = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
    stored = safetensors.torch.load(store.read(name))
    of_weights = [w.numel() for n, w in stored.items() if n.startswith("params:")]
    assert sum(of_weights) == result["mask"]["trainable"]
    assert stored["mask:"].numel() == -(-result["mask"]["maskable"] // 8)
    run, state = open_run(cfg, store)
    run.load(state.params)
    again = utils.evaluate(run.model, run.data.test_images, run.data.test_labels)
    assert again["loss"] == result["test"]["loss"]


@pytest.mark.parametrize(("algorithm", "refused"), [("fedavg", False), ("mine", True)])
def test_a_checkpoint_from_before_states_had_a_layout_goes_on_or_is_refused(store, algorithm,
                                                                            refused):
    cfg = replace(CFG, algorithm=algorithm)
    run, state = open_run(cfg, store)
    store.save(run, utils.federated_round(run, utils.validate(run, state)))
    name, = store.names("checkpoints/*/*.safetensors")
    card = utils.read_card(name, store.read(name))
    del card["layout"]
    tensors = safetensors.torch.load(store.read(name))
    content = safetensors.torch.save(tensors, {"card": json.dumps(card)})
    store.delete(name)
    digest = hashlib.sha256(content).hexdigest()
    store.write(f"checkpoints/{run_name(cfg)}/0000001_{digest}.safetensors", content)
    if refused:  # its memory cannot be told, and is not left out in silence
        with pytest.raises(ValueError, match="foreign tensors"):
            train(cfg, store)
    else:
        assert train(cfg, store)["status"] == "finished"


def test_a_finished_run_keeps_no_memory_unless_it_may_go_on(store):
    for schedule, kept in (("cosine", {"params"}), ("constant", {"params", "state"})):
        cfg = replace(CFG, algorithm="mine", schedule=schedule)
        train(cfg, store)
        name, = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
        groups = {re.split("[/:]", n)[0] for n in safetensors.torch.load(store.read(name))}
        assert groups - {"best"} == kept
