"""Measures of task vectors, predictions and masks: by hand, and of finished runs."""
import ast
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CFG, forbid, make_small, same

import utils
from notebooks import extension
from notebooks.extension import (
    class_means,
    damage_at,
    damage_over_gain,
    diagnose,
    disentanglement_error,
    foreign_damage,
    localization_error,
    mask_noise_floor,
    overlap,
    overlaps,
    pairwise_cosines,
    pairwise_sign_agreement,
    random_signs,
    store_without,
    trade_off,
    train_without,
    unlearn,
    weighted_sign_agreement,
    zero_classes,
)
from utils import Store

SKEWED = replace(CFG, classes_per_client=2)  # of 20 classes, at 10 clients


def vectors(*rows):
    """Task vectors of two tensors: the first entry, and the others."""
    return [{"a": torch.tensor(row[:1]), "b": torch.tensor(row[1:])} for row in rows]


# ------------------------------------------------------------------ by hand
def test_cosines_run_over_all_tensors():
    found = pairwise_cosines(vectors([3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 0.0, 0.0]))
    assert torch.allclose(found[0], torch.tensor([1, 0.96, 0], dtype=torch.float64))
    assert torch.equal(found, found.T)


def test_signs_agree_on_the_entries_that_both_move():
    found = pairwise_sign_agreement(vectors([1.0, -2.0, 3.0, 0.0], [5.0, 2.0, 0.1, 7.0],
                                            [0.0, 0.0, 0.0, 1.0]))
    assert found[0, 1] == found[1, 0] == pytest.approx(2 / 3)
    assert found[0, 0] == 1
    assert found[0, 2].isnan()  # they share no entry
    assert found[1, 2] == 1


def test_weighted_agreement_is_what_survives_the_sum():
    # |3 - 1| + |1 + 1| of 4 + 2
    assert weighted_sign_agreement(vectors([3.0, 1.0], [-1.0, 1.0])) == pytest.approx(4 / 6)
    assert weighted_sign_agreement(vectors([3.0, 1.0], [3.0, 0.0])) == 1
    assert weighted_sign_agreement(vectors([3.0, 1.0], [-3.0, -1.0])) == 0
    assert weighted_sign_agreement(vectors([0.0, 0.0])) == 1


def test_random_signs_keep_sizes_and_agree_as_chance_has_it():
    same_way = [{"w": torch.full((20_000,), 2.0)} for _ in range(10)]
    mixed = random_signs(same_way, np.random.default_rng(0))
    assert all((v["w"].abs() == 2).all() for v in mixed)
    # the mean |sum| of ten signs is 10 * C(9, 4) / 2^9 = 2.46
    assert weighted_sign_agreement(mixed) == pytest.approx(0.246, abs=0.005)
    agreement = pairwise_sign_agreement(mixed)[0, 1:]
    assert agreement.numpy() == pytest.approx(np.full(9, 0.5), abs=0.02)


def test_damage_and_gain_by_hand():
    change = torch.tensor([[-1.0, 0.5, 0.25, np.nan], [0.2, -0.4, 0.1, np.nan]])
    own = torch.tensor([[10, 0, 0, 5], [0, 20, 20, 5]])
    everyone = torch.tensor([10, 20, 60, 10])
    found = damage_over_gain(change, own, everyone)
    # the class that nobody can measure counts for nobody
    assert found["gain"] == pytest.approx([1.0, (0.4 - 0.1) / 2])
    assert found["damage"] == pytest.approx([(20 * 0.5 + 60 * 0.25) / 80,
                                             (10 * 0.2 + 40 * 0.1) / 50])
    assert found["ratio"] == pytest.approx(sum(found["damage"]) / sum(found["gain"]))


def test_foreign_damage_by_hand():
    change = torch.tensor([[-1.0, 0.5, 0.25, np.nan], [0.2, -0.4, 0.1, np.nan]])
    own = torch.tensor([[10, 5, 0, 0], [0, 5, 5, 5]])
    everyone = torch.tensor([10, 20, 60, 10])
    # others' images of a class that one holds oneself count for nothing
    assert foreign_damage(change, own, everyone) == pytest.approx([0.25, 0.2])
    change[0, 3] = 0.5
    change[1, 3] = np.nan
    own[0, 3] = 0
    found = foreign_damage(change[:1], own[:1], everyone)
    assert found == pytest.approx([(60 * 0.25 + 10 * 0.5) / 70])
    # who holds all classes has nobody to harm
    assert np.isnan(foreign_damage(change[:1], own[:1] + 1, everyone)).all()


def test_an_infinite_loss_of_a_class_that_one_does_not_have_is_not_ones_own():
    found = damage_over_gain(torch.tensor([[-0.1, np.inf]]), torch.tensor([[5, 0]]),
                             torch.tensor([5, 5]))
    assert found["gain"] == pytest.approx([0.1])
    assert found["damage"] == [math.inf]


def test_no_ratio_where_nothing_is_gained():
    found = damage_over_gain(torch.tensor([[0.5, 0.1]]), torch.tensor([[1, 0]]),
                             torch.tensor([1, 1]))
    assert found["gain"] == [-0.5]
    assert found["ratio"] is None


def test_class_means():
    found = class_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 2, 0]), 3)
    assert found[[0, 2]].tolist() == [5, 2]
    assert found[1].isnan()


def test_errors_of_predictions_by_hand():
    single = torch.tensor([[0, 0, 1, 1], [2, 2, 1, 1]])
    joint = torch.tensor([0, 1, 1, 2])
    start = torch.tensor([0, 0, 0, 1])
    owned = torch.tensor([[True, True, False, False], [False, False, False, True]])
    # client 0 differs on one of its two images, client 1 on its one
    assert disentanglement_error(single, joint, owned) == pytest.approx((1 / 2 + 1) / 2)
    # of foreign images client 0 changes one of two, client 1 all three
    assert localization_error(single, start, owned) == pytest.approx((1 / 2 + 1) / 2)


def test_nothing_is_foreign_where_all_have_all_classes():
    owned = torch.ones(2, 3, dtype=torch.bool)
    assert localization_error(torch.zeros(2, 3), torch.ones(3), owned) is None


def test_zero_classes_are_counted_among_those_with_images():
    assert zero_classes([0.0, 0.5, None, 0.0, 1.0]) == 0.5


def test_overlap_is_intersection_over_union():
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([False])}
    b = {"x": torch.tensor([False, True, True]), "y": torch.tensor([True])}
    nothing = {n: torch.zeros_like(m) for n, m in a.items()}
    assert overlap(a, b) == 1 / 4
    assert overlap(a, a) == overlap(nothing, nothing) == 1
    with pytest.raises(KeyError, match="y"):
        overlap(a, {"x": b["x"]})


def test_damage_at_a_gain_lies_on_the_line_between_two_rates_in_logarithms():
    gains, damages = [0.1, 0.4, 1.6], [0.01, 0.04, 0.64]
    assert damage_at(gains, damages, 0.2) == pytest.approx(0.02)
    assert damage_at(gains, damages, 0.4) == pytest.approx(0.04)
    assert damage_at(gains, damages, 0.8) == pytest.approx(0.16)  # sqrt(0.04 * 0.64)


@pytest.mark.parametrize(("gains", "damages", "at"), [
    ([0.1, 0.4], [0.01, 0.04], 0.5),          # not reached
    ([0.1, 0.4], [0.01, 0.04], 0.05),         # reached before the lowest rate
    ([0.1, 0.4], [-0.01, 0.04], 0.2),         # helps the others
    ([-0.1, 0.4], [0.01, 0.04], 0.2),
    ([0.1, float("nan")], [0.01, float("nan")], 0.2),
    ([], [], 0.2),
])
def test_damage_at_a_gain_that_no_two_rates_enclose_is_not_known(gains, damages, at):
    assert np.isnan(damage_at(gains, damages, at))


# ------------------------------------------------------------------ of a run
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The store of finished runs of a tiny ViT, on skewed clients."""
    store = Store(tmp_path_factory.mktemp("runs"), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert utils.train(SKEWED, store)["status"] == "finished"
        yield store


def test_the_diagnosis_of_a_finished_run(finished):
    found = diagnose(SKEWED, finished, images=1000)
    clients = utils.cohort(10, 0.3, "cohort", CFG.seed, CFG.num_rounds).tolist()
    assert found["clients"] == clients
    assert found["shares"] == pytest.approx([1 / 3] * 3)
    history = finished.result(SKEWED)["history"]
    # all of validation was asked for: alpha = 0 is the run's own last row
    assert found["losses"][0] == pytest.approx(history[-1]["val_loss"], rel=1e-5)
    assert found["top1"][0] == pytest.approx(history[-1]["val_top1"])
    assert len(found["losses"]) == len(found["alphas"]) == 7
    assert len(found["single"]["gain"]) == 3
    assert found["single"]["gain"] == pytest.approx(gains_by_hand(finished), rel=1e-4)
    assert len(found["mean"]["damage"]) == 1
    assert found["mean_norm"] <= max(found["norms"])
    assert 0 <= found["disentanglement_error"] <= 1
    assert 0 <= found["localization_error"] <= 1
    assert 0 < found["weighted_floor"] < 1


def gains_by_hand(store: Store) -> list[float]:
    """By how much each client's vector lowers the loss of its own two classes."""
    run, state = utils.open_run(SKEWED, store)
    clients = utils.cohort(10, 0.3, "cohort", CFG.seed, CFG.num_rounds).tolist()
    state = replace(state, algorithm_state={})
    gains = []
    for k in clients:
        vector = utils.client_update(run, state, k, CFG.lr).vector
        own = run.data.labels[run.shards[k]].unique()
        index = [i for i in run.data.val if run.data.labels[i] in own]
        losses = []
        for params in (state.params, utils.add(state.params, vector)):
            run.load(params)
            losses.append(utils.evaluate(run.model, run.data.images[index],
                                         run.data.labels[index])["loss"])
        gains.append(losses[0] - losses[1])
    return gains


def test_a_diagnosis_is_made_once_and_a_frozen_store_makes_none(finished, monkeypatch):
    first = diagnose(SKEWED, finished, images=1000)
    forbid(monkeypatch, "open_run")
    monkeypatch.setattr(extension, "open_run", utils.open_run)
    assert diagnose(SKEWED, finished, images=1000) == first
    frozen = Store(finished.root, frozen=True)
    assert diagnose(SKEWED, frozen, images=1000) == first
    assert diagnose(SKEWED, frozen, images=10) == {}


def test_an_edited_measure_measures_again(finished, monkeypatch):
    first = diagnose(SKEWED, finished, images=1000)

    def weighted_sign_agreement(vectors):
        return 0.25
    monkeypatch.setattr(extension, "weighted_sign_agreement", weighted_sign_agreement)
    again = diagnose(SKEWED, finished, images=1000)
    assert again["weighted_agreement"] == 0.25
    assert again["cosine"] == first["cosine"]


def test_whatever_a_measure_calls_is_among_the_measures():
    """Else an edit of what it calls would return what was measured before."""
    functions = {name: value for name, value in vars(extension).items()
                 if inspect.isfunction(value) and value.__module__ == extension.__name__}

    def called(name):
        tree = ast.parse(inspect.getsource(functions[name]))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        return names & functions.keys() - {name}
    measures = called("measures_sha256")
    assert len(measures) > 20
    for name in measures:
        assert called(name) <= measures | {"kept", "measures_sha256"}, name
    assert called("kept") <= measures | {"measures_sha256"}


def test_weights_without_a_mask_overlap_with_nothing(tmp_path):
    with pytest.raises(ValueError, match=f"{utils.run_name(CFG)} trains all weights"):
        overlaps([CFG], Store(tmp_path))


def test_the_start_can_be_diagnosed_without_a_run_but_not_the_end(tmp_path, monkeypatch):
    make_small(monkeypatch)
    store = Store(tmp_path, quiet=True)
    found = diagnose(CFG, store, at="start", images=100, alphas=())
    assert found["alphas"] == [0]
    assert found["clients"] == utils.cohort(10, 0.3, "cohort", CFG.seed, 0).tolist()
    with pytest.raises(ValueError, match="train it first"):
        diagnose(CFG, store)
    with pytest.raises(ValueError, match="'start' or 'last'"):
        diagnose(CFG, store, at="best")


def test_the_trade_off_has_each_rate_as_a_diagnosis_at_that_rate(tmp_path, monkeypatch):
    make_small(monkeypatch)
    store = Store(tmp_path, quiet=True)
    found = trade_off(SKEWED, store, [0.1, 0.01], images=1000)
    assert found["clients"] == utils.cohort(10, 0.3, "cohort", CFG.seed, 0).tolist()
    for i, lr in enumerate((0.01, 0.1)):   # in their order, whatever order was asked for
        at_rate = replace(SKEWED, lr=lr)
        single = diagnose(at_rate, store, at="start", images=1000, alphas=())["single"]
        assert found["gain"][i] == pytest.approx(single["gain"])
        # nobody else holds a class of one's own
        assert found["damage"][i] == pytest.approx(single["damage"])
    assert found["gain"][0] != found["gain"][1]
    frozen = Store(tmp_path, frozen=True)
    # the rate of the run plays no part; other rates are another measurement
    assert trade_off(replace(SKEWED, lr=0.5), frozen, [0.01, 0.1], images=1000) == found
    named = replace(SKEWED, name="mine")  # the run of that name has a rate of its own
    utils.train(replace(named, num_rounds=1), store)
    assert trade_off(replace(named, num_rounds=1), store, [0.01], images=1000)
    assert trade_off(SKEWED, frozen, [0.01], images=1000) == {}


def test_a_gain_is_not_taken_off_the_damage_where_clients_share_classes(tmp_path, monkeypatch):
    make_small(monkeypatch)
    cfg = replace(CFG, num_clients=12, classes_per_client=5)
    store = Store(tmp_path, quiet=True)
    found = trade_off(cfg, store, [0.1], images=1000)
    single = diagnose(replace(cfg, lr=0.1), store, at="start", images=1000, alphas=())["single"]
    # Each of twenty classes has nine images and three owners. Of the others' images 5 * 6 are of
    # one's own classes, and their loss falls by the gain; 15 * 9 are of other classes.
    for gain, netted, damage in zip(found["gain"][0], single["damage"], found["damage"][0],
                                    strict=True):
        assert netted == pytest.approx((135 * damage - 30 * gain) / 165)
        assert damage > netted


def test_what_is_not_finite_is_kept_as_none(tmp_path, monkeypatch):
    make_small(monkeypatch)
    store = Store(tmp_path, quiet=True)
    found = trade_off(SKEWED, store, [0.01, 1e30], images=100)
    assert None not in found["gain"][0]
    assert set(found["gain"][1]) == {None}
    single = diagnose(replace(SKEWED, lr=1e30), store, at="start", images=100, alphas=())["single"]
    assert set(single["damage"]) == {None}


@pytest.mark.parametrize("changes", [
    dict(),
    dict(head="lda", lr=1e-3),
    dict(head="lda", rule="random"),
    dict(head="lda", lr=1e-3, schedule="constant"),
])
def test_the_end_is_not_the_start(finished, changes):
    """The start has the head that was fitted, though no checkpoint of all weights holds it."""
    cfg = replace(SKEWED, **changes)
    assert utils.train(cfg, finished)["status"] == "finished"
    start = diagnose(cfg, finished, at="start", images=1000, alphas=())
    last = diagnose(cfg, finished, images=1000)
    assert start["losses"][0] == pytest.approx(
        finished.result(cfg)["history"][0]["val_loss"], rel=1e-5)
    assert start["losses"][0] != last["losses"][0]


def test_clients_are_measured_by_plain_fedavg(finished):
    cfg = replace(SKEWED, algorithm="scaffold", num_rounds=2)
    utils.train(cfg, finished)
    assert diagnose(cfg, finished, images=50)["clients"]


def test_unlearning_by_hand(finished):
    found = unlearn(SKEWED, finished, number=2, alphas=(0.0, 20.0))
    clients = utils.cohort(10, 0.3, "cohort", CFG.seed, CFG.num_rounds).tolist()
    assert found["clients"] == clients[:2]
    run, state = utils.open_run(SKEWED, finished)
    images, labels = run.data.images[run.data.val], run.data.labels[run.data.val]
    theirs = {c for k in clients[:2] for c in run.data.labels[run.shards[k]].tolist()}
    for i, k in enumerate(clients[:2]):
        vector = utils.client_update(run, state, k, CFG.lr).vector
        classes = run.data.labels[run.shards[k]].unique().tolist()
        assert found["classes"][i] == classes
        for j, alpha in enumerate((0, 20)):
            run.load(utils.apply_vector(state.params, vector, -alpha))
            per_class = utils.evaluate(run.model, images, labels)["per_class"]
            own = [per_class[c] for c in classes]
            others = [per_class[c] for c in range(20) if c not in theirs]
            assert found["own"][i][j] == pytest.approx(np.mean(own))
            assert found["others"][i][j] == pytest.approx(np.mean(others))


def test_a_run_without_clients_loses_them_in_each_cohort(finished):
    excluded = utils.cohort(10, 0.3, "cohort", CFG.seed, 0).tolist()[:2]
    before = finished.result(SKEWED)
    found = train_without(SKEWED, excluded, finished)
    for row in found["history"][1:]:
        drawn = utils.cohort(10, 0.3, "cohort", CFG.seed, row["round"] - 1).tolist()
        assert row.get("lost", []) == sorted(k for k in drawn if k in excluded)
    assert finished.result(SKEWED) == before != found  # it is another run of one configuration
    assert store_without(finished, excluded).result(SKEWED) == found


# ------------------------------------------------------------------ masks
def test_overlaps_of_runs_and_the_noise_floor(tmp_path, monkeypatch):
    make_small(monkeypatch)
    store = Store(tmp_path, quiet=True)
    masked = replace(CFG, head="lda", rule="least_sensitive")
    cfgs = [masked, replace(masked, seed=1), replace(masked, rule="most_sensitive")]
    iou = overlaps(cfgs, store)["iou"]
    masks = [utils.open_run(cfg, store)[0].mask for cfg in cfgs]
    assert not same(masks[0], masks[1])
    assert iou[0][1] == iou[1][0] == overlap(masks[0], masks[1])
    assert iou[0][0] == 1

    assert iou[0][2] < mask_noise_floor(masked, store)["iou"] < 1
    with pytest.raises(ValueError, match="100 images are more than the 180"):
        mask_noise_floor(masked, store, images=100)
    with pytest.raises(ValueError, match="reads no images"):
        mask_noise_floor(replace(masked, rule="random"), store)


def test_the_two_masks_of_the_noise_floor_see_disjoint_images(tmp_path, monkeypatch):
    make_small(monkeypatch)
    seen = []

    def spy(model, images, **options):
        seen.append({image.numpy().tobytes() for image in images})
        return {"w": torch.tensor([True])}
    monkeypatch.setattr(extension, "calibrate_mask", spy)
    masked = replace(CFG, head="lda", rule="least_sensitive")
    mask_noise_floor(masked, Store(tmp_path, quiet=True), images=30)
    assert len(seen[0]) == len(seen[1]) == 30
    assert not seen[0] & seen[1]
