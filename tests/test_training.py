"""Training: what a run reads, trains, selects, survives and returns."""
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import CFG, make_small, resumed, same, small_data

import utils
from utils import HEAD, Config, Store, build_model, open_run, run_name, train_centralized
from utils import train_federated as federated

CENTRAL = replace(CFG, algorithm="centralized", num_epochs=3, eval_every=1, batch_size=30)
KINDS = {"centralised": CENTRAL, "dense": CFG, "scaffold": replace(CFG, algorithm="scaffold"),
         "adam": replace(CFG, server="adam", server_lr=0.01),
         "momentum": replace(CFG, server="momentum"),
         "sparse": replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5)}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def final(cfg, store, test=True):
    """(result, stored weights, best weights) of a run."""
    result = utils.train(cfg, store, test)
    state = resumed(cfg, store)
    return result, state.params, state.best


def cut(patch, name, at, error=KeyboardInterrupt):
    """`utils.<name>` raises at its `at`-th call."""
    honest, calls = getattr(utils, name), []

    def guarded(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return honest(*args, **kwargs)
    patch.setattr(utils, name, guarded)


def forbid(patch, *names):
    for name in names:
        def refuse(*args, name=name, **kwargs):
            raise AssertionError(f"{name} was called")
        patch.setattr(utils, name, refuse)


# ------------------------------------------------------------------ once is enough
@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_a_finished_run_returns_at_once(store, monkeypatch, cfg):
    result = utils.train(cfg, store)
    forbid(monkeypatch, "open_run", "load_data", "build_model")
    assert utils.train(cfg, Store(store.root)) == result


def test_a_frozen_store_trains_nothing(store, monkeypatch):
    result = federated(CFG, store)
    forbid(monkeypatch, "open_run")
    frozen = Store(store.root, frozen=True)
    assert federated(CFG, frozen) == result
    assert federated(replace(CFG, seed=1), frozen)["status"] == "missing"


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_the_same_configuration_gives_the_same_bits(tmp_path, cfg):
    a, b = (final(cfg, Store(tmp_path / name)) for name in "ab")
    assert a[0]["history"] == b[0]["history"]
    assert a[0]["test"] == b[0]["test"]
    assert same(a[1], b[1])
    assert same(a[2], b[2])


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_seed_0_is_a_seed_like_any_other(store, cfg):
    runs = [final(replace(cfg, seed=seed), store) for seed in (0, 1)]
    assert runs[0][0]["history"] != runs[1][0]["history"]
    assert not same(runs[0][1], runs[1][1])


def test_global_generators_have_no_say(tmp_path):
    torch.manual_seed(1)
    a = final(CFG, Store(tmp_path / "a"))
    torch.manual_seed(2)
    b = final(CFG, Store(tmp_path / "b"))
    assert same(a[1], b[1])


def test_train_federated_refuses_a_centralised_configuration(store):
    with pytest.raises(ValueError, match="train_centralized"):
        federated(CENTRAL, store)


def test_train_centralized_is_centralised_whatever_the_algorithm(store):
    result = train_centralized(replace(CENTRAL, algorithm="fedavg"), store)
    assert result["config"]["algorithm"] == "centralized"
    assert len(result["history"]) == 3


def test_a_run_learns(store):
    cfg = replace(CENTRAL, num_epochs=16, batch_size=10)
    history = train_centralized(cfg, store)["history"]
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    assert history[-1]["val_top1"] > 0.2  # chance is 0.05


# ------------------------------------------------------------------ validation and test
def record_evaluations(patch):
    seen, honest = [], utils.evaluate
    patch.setattr(utils, "evaluate", lambda model, images, labels, *args, **kwargs: (
        seen.append(images.clone()), honest(model, images, labels, *args, **kwargs))[1])
    return seen


def test_only_validation_images_are_evaluated_before_the_test(store, monkeypatch):
    seen, data = record_evaluations(monkeypatch), small_data(CFG)
    federated(CFG, store)
    assert [torch.equal(x, data.images[data.val]) for x in seen] == [True, True, False]
    assert torch.equal(seen[-1], data.test_images)


def test_without_test_the_test_set_is_untouched_and_added_later(store, monkeypatch):
    seen, data = record_evaluations(monkeypatch), small_data(CFG)
    result = federated(CFG, store, test=False)
    assert "test" not in result
    assert not any(torch.equal(x, data.test_images) for x in seen)
    forbid(monkeypatch, "federated_round")
    assert federated(CFG, store, test=False) == result
    tested = federated(CFG, store)
    assert tested["test"]["images"] == 80
    assert {k: v for k, v in tested.items() if k != "test"} == result
    assert len(seen) == 3


def test_training_reads_no_validation_and_no_test_image(store, monkeypatch):
    """Neither in the rounds nor for the ridge head nor for the mask."""
    cfg, data, read = KINDS["sparse"], small_data(CFG), []
    for name, images in (("augment", 0), ("features", 1), ("sensitivity", 1)):
        honest = getattr(utils, name)
        monkeypatch.setattr(utils, name, lambda *args, honest=honest, at=images, **kwargs: (
            read.extend(args[at]), honest(*args, **kwargs))[1])
    federated(cfg, store, test=False)
    keys = {x.numpy().tobytes() for x in read}
    train = {x.numpy().tobytes() for x in data.images[data.train]}
    assert keys <= train
    assert len(keys) == len(train)


def scripted(patch, scores):
    """Validation accuracies as given; honest on the test set."""
    honest, left = utils.evaluate, iter(scores)
    patch.setattr(utils, "evaluate", lambda model, images, *args, **options: honest(
        model, images, *args, **options) | (dict(top1=next(left)) if len(images) == 60 else {}))


def test_the_best_round_on_validation_is_tested(store, monkeypatch):
    cfg = replace(CFG, num_rounds=5, eval_every=1)
    scripted(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.1])  # the first of equals
    result, _, best = final(cfg, store)
    assert result["best_round"] == 2
    second, = (s for s in [resumed(cfg, store)])
    assert second.best_round == 2
    run, state = open_run(replace(cfg, name="afresh"), store)
    for _ in range(2):
        state = utils.federated_round(run, state)
    assert same(state.params, best)
    assert not same(utils.federated_round(run, state).params, best)
    run.load(best)
    data = run.data
    assert utils.evaluate(run.model, data.test_images, data.test_labels) == result["test"]


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_test_labels_change_nothing_but_the_test(tmp_path, monkeypatch, cfg):
    a = final(cfg, Store(tmp_path / "a"))
    monkeypatch.setattr(utils, "load_data", lambda cfg: replace(
        small_data(cfg), test_labels=small_data(cfg).test_labels.flip(0)))
    b = final(cfg, Store(tmp_path / "b"))
    assert a[0]["history"] == b[0]["history"]
    assert a[0]["best_round"] == b[0]["best_round"]
    assert same(a[2], b[2])
    assert a[0]["test"] != b[0]["test"]


def test_evaluations_come_every_eval_every_rounds_and_at_the_end(store):
    history = federated(replace(CFG, num_rounds=5, eval_every=3), store)["history"]
    assert [r["round"] for r in history if "val_loss" in r] == [3, 5]


def test_eval_images_bounds_both_evaluations(store, monkeypatch):
    seen = record_evaluations(monkeypatch)
    federated(replace(CFG, eval_images=7), store)
    assert [len(x) for x in seen] == [7, 7, 7]


# ------------------------------------------------------------------ stops
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("at", [2, 11])
def test_an_interrupted_run_goes_on_to_the_unbroken_bits(tmp_path, monkeypatch, cfg, at):
    whole, store = final(cfg, Store(tmp_path / "whole")), Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut(patch, "sgd_step", at)  # in the midst of a round
        stopped = utils.train(cfg, store)
    assert stopped["status"] == "interrupted"
    assert 0 <= stopped["round"] < cfg.length
    assert resumed(cfg, store).round == stopped["round"]
    assert not store.names("*.json")
    again = final(cfg, Store(tmp_path / "cut"))
    assert again[0]["history"] == whole[0]["history"]
    assert again[0]["best_round"] == whole[0]["best_round"]
    assert again[0]["test"] == whole[0]["test"]
    assert same(again[1], whole[1])
    assert same(again[2], whole[2])


def test_interrupting_at_every_round_changes_nothing(tmp_path, monkeypatch):
    cfg = replace(KINDS["scaffold"], num_rounds=6, eval_every=1)
    whole, seen = final(cfg, Store(tmp_path / "whole")), []
    for _ in range(6):
        with monkeypatch.context() as patch:
            cut(patch, "assess", 2)
            result = utils.train(cfg, Store(tmp_path / "cut"))
        seen.append(result.get("round", result["status"]))
    again = final(cfg, Store(tmp_path / "cut"))
    assert seen == [1, 2, 3, 4, 5, "finished"]
    assert again[0]["history"] == whole[0]["history"]
    assert same(again[1], whole[1])


def test_stopping_while_the_head_is_trained_is_an_interruption(tmp_path, monkeypatch):
    cfg, store = replace(CFG, rule="random"), Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut(patch, "sgd_step", 8)
        assert federated(cfg, store)["status"] == "interrupted"
    whole, again = final(cfg, Store(tmp_path / "whole")), final(cfg, store)
    assert again[0]["history"] == whole[0]["history"]
    assert same(again[1], whole[1])


def test_a_run_stores_checkpoints_on_its_way(store, monkeypatch):
    rounds, save = [], Store.save
    monkeypatch.setattr(Store, "save", lambda self, cfg, state, **kwargs: (
        rounds.append(state.round), save(self, cfg, state, **kwargs))[1])
    federated(replace(CFG, num_rounds=6), replace(store, minutes=0.0))
    assert rounds == [2, 4, 6]
    rounds.clear()
    federated(replace(CFG, num_rounds=6, seed=1), replace(store, minutes=60.0))
    assert rounds == [6]


def test_a_diverged_run_keeps_its_last_good_weights_and_stays_diverged(store, monkeypatch):
    cfg, honest = replace(CFG, eval_every=1, num_clients=2, participation=1.0), utils.client_update
    whole = final(replace(cfg, name="whole"), store)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "client_update", lambda run, state, k, lr: (
            honest(run, state, k, lr), torch.tensor(float("nan" if state.round == 2 else 1)))[1])
        result = federated(cfg, store)
    assert result["status"] == "diverged"
    assert re.search(r"round or epoch 3 at lr=0\.025.*0: nan.*1: nan", result["error"])
    assert "test" not in result
    kept = resumed(cfg, store)
    assert kept.round == len(result["history"]) == 2
    run, state = open_run(replace(cfg, name="afresh"), store)
    for _ in range(2):
        state = utils.federated_round(run, state)
    assert same(kept.params, state.params)
    assert whole[0]["status"] == "finished"
    forbid(monkeypatch, "open_run")
    assert federated(cfg, store) == result


@pytest.mark.parametrize("cfg", [replace(CFG, local_steps=1, participation=0.1), CENTRAL,
                                 replace(CFG, server="adam", server_lr=1e30)],
                         ids=["one step", "centralised", "server"])
@pytest.mark.parametrize("lr", [1e12, 1e30])
@pytest.mark.parametrize("eval_every", [1, 4])
def test_an_overflow_is_a_divergence_not_a_crash(store, cfg, lr, eval_every):
    """The loss before an exploding step is finite; what follows from it must not break the JSON."""
    cfg = replace(cfg, lr=lr, eval_every=eval_every)
    result = utils.train(cfg, store)
    assert result["status"] == "diverged"
    assert utils.train(cfg, store) == result


# ------------------------------------------------------------------ what is trained
@pytest.mark.parametrize("cfg", [replace(CFG, rule="random"), replace(CENTRAL, rule="random"),
                                 replace(CFG, rule="lowest_magnitude", head="ridge")],
                         ids=["probe", "centralised", "ridge"])
def test_sparse_runs_keep_head_and_embeddings_frozen(store, cfg):
    before = open_run(cfg, store)[0].model.state_dict()
    before = {n: w.clone() for n, w in before.items()}
    run, state = open_run(cfg, store)
    step = utils.centralized_epoch if cfg.algorithm == "centralized" else utils.federated_round
    run.load(step(run, step(run, state)).params)
    after = run.model.state_dict()
    for n, w in before.items():
        frozen = n in (*HEAD, "cls_token", "pos_embed")
        free = torch.zeros_like(w, dtype=torch.bool) if frozen else run.mask[n]
        assert torch.equal(after[n][~free], w[~free])
    assert not same(after, before)
    assert state.params.keys() == run.mask.keys()


def test_the_ridge_head_of_a_run_is_the_closed_form_on_the_training_part(store):
    cfg = replace(CFG, head="ridge", rule="random", ridge_l2=2.0)
    run, _ = open_run(cfg, store)
    data, model = small_data(cfg), build_model(cfg)
    x, y = utils.features(model, data.images[data.train]), data.labels[data.train]
    head = utils.sharpen(utils.ridge_head(x, y, 2.0, 100), x, y)
    for n in HEAD:
        torch.testing.assert_close(run.model.get_parameter(n), head[n].float())
    x = utils.features(run.model, data.images[data.train])
    assert (run.model.head(x).argmax(1) == y).double().mean() > 0.5  # it fits, chance is 0.05


def test_a_dense_run_starts_from_the_ridge_head(store):
    dense, sparse = (open_run(replace(CFG, head="ridge", rule=rule), store)[0]
                     for rule in (None, "random"))
    assert same({n: dense.model.get_parameter(n) for n in HEAD},
                {n: sparse.model.get_parameter(n) for n in HEAD})


def test_a_probe_trains_the_head_alone(store):
    cfg = replace(CFG, head="probe")
    _, params, _ = final(cfg, store)
    assert params.keys() == set(HEAD)
    run, state = open_run(replace(cfg, name="afresh"), store)
    before = {n: w.clone() for n, w in utils.backbone(run.model).items()}
    after = utils.federated_round(run, state)
    assert same(utils.backbone(run.model), before)
    assert not same(after.params, state.params)


@pytest.mark.parametrize("head", ["train", "ridge"])
def test_a_dense_run_trains_everything(store, head):
    names = {n for n, _ in build_model(CFG).named_parameters()}
    assert open_run(replace(CFG, head=head), store)[1].params.keys() == names


@pytest.mark.parametrize("cfg", [CFG, CENTRAL], ids=["federated", "centralised"])
def test_sparse_runs_train_the_head_once_and_share_it(store, monkeypatch, cfg):
    trained, names = [], ("federated_round", "centralized_epoch")
    for honest in [getattr(utils, name) for name in names]:
        monkeypatch.setattr(utils, honest.__name__, lambda run, state, honest=honest: (
            trained.append(run.cfg.head), honest(run, state))[1])
    first = replace(cfg, rule="random", sparsity=0.5)
    utils.train(first, store)
    assert trained == ["probe"] * 2 + ["train"] * cfg.length
    utils.train(replace(first, sparsity=0.9), store)
    assert trained == ["probe"] * 2 + ["train"] * cfg.length * 2
    probe, = (c for c in utils.stored(store) if c.head == "probe")
    best, run = store.resume(probe).best, open_run(replace(first, name="afresh"), store)[0]
    assert same({n: run.model.get_parameter(n).data for n in HEAD}, best)
    assert probe.length == first.head_rounds
    assert probe.algorithm == cfg.algorithm


def test_the_probe_of_a_sparse_run_never_sees_the_test_set(store, monkeypatch):
    seen, data = record_evaluations(monkeypatch), small_data(CFG)
    federated(replace(CFG, rule="random"), store, test=False)
    assert not any(torch.equal(x, data.test_images) for x in seen)


def test_a_mask_that_frees_nothing_trains_nothing(store):
    cfg = replace(CFG, rule="random", sparsity=1.0, head="ridge")
    start = open_run(cfg, store)[1].params
    result, params, _ = final(cfg, store)
    assert same(params, start)
    assert {row["bytes_up"] for row in result["history"]} == {0}


@pytest.mark.parametrize("calibration", ["mean", "max", "vote"])
def test_masks_are_calibrated_on_the_clients_own_images(store, monkeypatch, calibration):
    cfg = replace(CFG, rule="least_sensitive", head="ridge", calibration=calibration,
                  calibration_images=30)
    asked, honest = [], utils.calibrate_mask
    monkeypatch.setattr(utils, "calibrate_mask", lambda model, images, **kwargs: (
        asked.append((images, kwargs)), honest(model, images, **kwargs))[1])
    run, _ = open_run(cfg, store)
    (images, options), = asked
    assert options["combine"] == calibration
    assert [len(x) for x in images] == [3] * 10
    for x, shard in zip(images, run.shards, strict=True):
        own = {i.numpy().tobytes() for i in run.data.images[shard]}
        assert {i.numpy().tobytes() for i in x} <= own


# ------------------------------------------------------------------ several runs
def test_train_all_trains_what_is_missing_and_stops_by_hand(store, monkeypatch, capsys):
    cfgs = [replace(CFG, seed=s) for s in range(3)]
    federated(cfgs[0], store)
    with monkeypatch.context() as patch:
        cut(patch, "sgd_step", 30)
        utils.train_all(cfgs, store)
    done = [store.result(c) is not None for c in cfgs]
    assert done == [True, True, False]
    assert run_name(cfgs[2]) in capsys.readouterr().out
    utils.train_all(cfgs, store, test=False)
    assert all(store.result(c) for c in cfgs)
    assert "test" not in store.result(cfgs[2])


def test_default_lengths_follow_the_algorithm():
    assert Config(num_rounds=7, num_epochs=3).length == 7
    assert Config(num_rounds=7, num_epochs=3, algorithm="centralized").length == 3


# ------------------------------------------------------------------ what a finished run keeps
def test_a_finished_sparse_run_keeps_only_its_free_weights(store):
    cfg = replace(CFG, rule="random", sparsity=0.9, head="ridge", eval_every=1)
    utils.train(cfg, store)
    (name,) = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
    run, state = utils.open_run(cfg, store)
    stored = safetensors.torch.load(store.read(name))
    assert sum(w.numel() for w in stored.values()) == run.free
    start = utils.open_run(cfg, utils.Store(store.root / "new"))[1]
    moved = [n for n, c in run.mask.items() if not torch.equal(state.params[n], start.params[n])]
    assert moved
    for n, c in run.mask.items():  # what is frozen is what it was at the start
        assert torch.equal(state.params[n][~c], start.params[n][~c])
    run.load(state.best)
    again = utils.evaluate(run.model, run.data.test_images, run.data.test_labels)
    assert again["loss"] == store.result(cfg)["test"]["loss"]


def test_a_finished_run_keeps_no_momentum_and_no_control_variates(store):
    cfg = replace(CFG, algorithm="scaffold", server="adam", server_lr=0.01)
    utils.train(cfg, store)
    (name,) = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
    assert {n.partition(":")[0] for n in safetensors.torch.load(store.read(name))} == {"params"}
