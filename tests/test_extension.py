"""Algorithms beyond FedAvg, merges, and the hooks they are written through."""
import functools
import importlib
import linecache
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CFG, close, cut, half_mask, make_small, rounds, same, small_run, timeless

import utils
from notebooks import extension
from utils import ALGORITHMS, Config, FedAvg, State, Store, register_algorithm

BEYOND = ["fedprox", "scaffold", "fedavgm", "fedadam", "fedexp", "sign_election",
          "sign_election_matched", "ties", "ties_matched", "fisher", "fisher_matched", "held_out",
          "held_out_matched"]
RECALIBRATED = ["recalibrated", "calibrated_once", "redrawn", "drawn_once"]
ONE = {"w": torch.tensor([1.0])}


def scalar(*values: float) -> list[dict]:
    """Task vectors of one weight each."""
    return [{"w": torch.tensor([value])} for value in values]


def server(name: str, vectors: list, state=None, shares=None, messages=None, **fields):
    """(weights, algorithm's state) that the server makes of the clients' task vectors."""
    cfg = replace(CFG, algorithm=name, num_clients=4, **fields)
    run, _ = small_run(cfg)
    state = state or State({n: torch.zeros_like(v) for n, v in vectors[0].items()})
    shares = shares or [1 / len(vectors)] * len(vectors)
    messages = messages or [{}] * len(vectors)
    told = [utils.ClientUpdate(k, torch.tensor(0.0), vector, message)
            for k, (vector, message) in enumerate(zip(vectors, messages, strict=True))]
    update = utils.accumulate_update(run, state, told, shares)
    return run.algorithm.server_step(state, update)


def follow(name: str, means: list[float], **fields) -> list[float]:
    """The one weight after each round whose mean task vector is given, from 0."""
    state = State(scalar(0.0)[0])
    seen = []
    for mean in means:
        params, memory = server(name, scalar(mean, mean), state, **fields)
        state = State(params, state.round + 1, algorithm_state=memory)
        seen.append(params["w"].item())
    return seen


def cell(source: str, number: int = 0) -> dict:
    """The names that a notebook cell defines, its source where IPython puts it."""
    filename = f"<ipython-input-{number}-0123456789ab>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names = {"__name__": "__main__", "utils": utils}
    exec(compile(source, filename, "exec"), names)
    return names


# ------------------------------------------------------------------ each by hand
def test_fedprox_pulls_a_gradient_by_mu_times_the_distance():
    gradients = {"w": torch.tensor([1.0])}
    algorithm = extension.FedProx(replace(CFG, prox_mu=0.5))
    algorithm.local_gradient(gradients, {"w": torch.tensor([4.0])}, State(ONE), 0)
    assert gradients["w"].item() == 1 + 0.5 * (4 - 1)


def test_fedprox_with_mu_0_is_fedavg():
    ends = []
    for change in (dict(algorithm="fedavg"), dict(algorithm="fedprox", prox_mu=0.0)):
        run, state = small_run(replace(CFG, **change))
        ends.append(rounds(run, state, 2).params)
    assert same(*ends)


def test_scaffold_adds_c_and_subtracts_the_clients_own():
    memory = {"control": {"w": torch.tensor([2.0])}, "control/3": {"w": torch.tensor([0.5])}}
    gradients = {"w": torch.tensor([1.0])}
    algorithm = extension.Scaffold(CFG)
    algorithm.local_gradient(gradients, ONE, State(ONE, algorithm_state=memory), 3)
    assert gradients["w"].item() == 1 + 2 - 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 3])
def test_scaffolds_control_is_the_gradient_where_all_steps_have_the_same(momentum, steps):
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], 0.1, momentum)
    c, own, gradient = 0.25, 0.75, 3.0
    for _ in range(steps):
        w.grad = torch.tensor([gradient + c - own])
        optimizer.step()
    memory = {"control": {"w": torch.tensor([c])}, "control/0": {"w": torch.tensor([own])}}
    algorithm = extension.Scaffold(replace(CFG, momentum=momentum, local_steps=steps))
    state = State({"w": torch.zeros(1)}, algorithm_state=memory)
    message = algorithm.client_message(None, {"w": w.detach()}, state, 0, 0.1)
    assert message["w"].item() == pytest.approx(gradient, rel=1e-5)


def test_scaffolds_server_moves_by_a_kth_of_the_changes_and_keeps_the_absent():
    absent = {"w": torch.tensor([9.0])}
    memory = {"control": {"w": torch.tensor([1.0])}, "control/0": {"w": torch.tensor([2.0])},
              "control/3": absent}
    state = State({"w": torch.zeros(1)}, algorithm_state=memory)
    params, memory = server("scaffold", scalar(1.0, 3.0), state, messages=scalar(4.0, 6.0))
    assert params["w"].item() == 2  # FedAvg's
    assert memory["control"]["w"].item() == 1 + ((4 - 2) + (6 - 0)) / 4
    assert memory["control/0"]["w"].item() == 4
    assert memory["control/1"]["w"].item() == 6
    assert memory["control/3"] is absent


def test_scaffolds_first_round_is_fedavg_and_its_third_is_not():
    ends = {}
    for name in ("fedavg", "scaffold"):
        run, state = small_run(replace(CFG, algorithm=name))
        first = rounds(run, state, 1)
        ends[name] = first.params, rounds(run, first, 2).params
    assert close(ends["fedavg"][0], ends["scaffold"][0], 1e-7)
    assert not close(ends["fedavg"][1], ends["scaffold"][1], 1e-5)


def test_fedavgm_two_rounds_by_hand():
    # v = 1, then 1 + 0.5 = 1.5; w = 2, then 2 + 3
    assert follow("fedavgm", [1.0, 1.0], server_lr=2.0, server_momentum=0.5) == [2, 5]


def test_without_momentum_fedavgm_is_a_constant_extrapolation():
    assert follow("fedavgm", [1.0, -3.0], server_lr=2.0, server_momentum=0.0) == [2, -4]


def test_fedadam_is_torch_adam_on_the_negative_mean():
    means = [0.1, -0.3, 0.02, 0.0]
    w = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([w], 0.03, (0.8, 0.99), 1e-3)
    wanted = []
    for mean in means:
        w.grad = torch.tensor([-mean])
        adam.step()
        wanted.append(w.item())
    found = follow("fedadam", means, server_lr=0.03, server_momentum=0.8)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_fedexp_extrapolates_orthogonal_vectors_by_half_their_number():
    vectors = [{"w": row} for row in 3 * torch.eye(4)]
    params, _ = server("fedexp", vectors)
    # sum of squares 4 * 9, over 2 * 4 * |mean|^2 = 2 * 4 * 9 / 4: twice the mean of 3/4
    assert torch.allclose(params["w"], torch.full((4,), 1.5))


def test_fedexp_never_steps_shorter_than_fedavg():
    params, _ = server("fedexp", scalar(2.0, 2.0))  # the formula gives 1/2
    assert params["w"].item() == 2


def test_sign_election_averages_those_alone_that_moved_the_elected_way():
    # the weighted sum is positive; the mean of 4 and 1 by shares 0.25 and 0.25
    params, _ = server("sign_election", scalar(4.0, -1.0, 1.0), shares=[0.25, 0.5, 0.25])
    assert params["w"].item() == 2.5
    # who did not move has no say, and shortens nothing
    params, _ = server("sign_election", scalar(0.0, -3.0, 0.0))
    assert params["w"].item() == -3


def test_sign_election_stays_where_nobody_moved_or_nobody_wins():
    params, _ = server("sign_election", scalar(0.0, 0.0))
    assert params["w"].item() == 0
    params, _ = server("sign_election", scalar(1.0, -1.0))
    assert params["w"].item() == 0


def test_ties_trims_each_vector_to_the_largest_fifth_of_what_it_moved():
    big = {"a": torch.tensor([5.0, 1, 1, 1]), "b": torch.tensor([1.0, 0, 0])}
    small = {"a": torch.tensor([0.0, 0, 0, 0]), "b": torch.tensor([0.1, 0.2, -0.3])}
    trim = extension.Ties(CFG).trim
    half = {"a": torch.tensor([1.0, -2, 3, -4, 5, 0, 0, 0, 0, 0])}
    assert (trim(half)["a"] != 0).sum() == 1  # a fifth of five, not of ten
    assert same(trim(big), {"a": torch.tensor([5.0, 0, 0, 0]), "b": torch.zeros(3)})
    assert same(trim(small), {"a": torch.zeros(4), "b": torch.tensor([0, 0, -0.3])})
    params, _ = server("ties", [big, small])
    assert same(params, {"a": torch.tensor([5.0, 0, 0, 0]), "b": torch.tensor([0, 0, -0.3])})


def test_fisher_merging_weights_entries_by_share_times_fisher_and_floor():
    # the floor is a hundredth of the mean Fisher information, (3 + 1) / 2
    params, _ = server("fisher", scalar(1.0, -2.0), shares=[0.25, 0.75], messages=scalar(3.0, 1.0))
    first, second = 0.25 * 3.02, 0.75 * 1.02
    assert params["w"].item() == pytest.approx((first - 2 * second) / (first + second))


def test_without_fisher_information_merging_is_the_mean():
    vectors = [{"w": torch.tensor([1.0, 2.0]), "token": torch.tensor([4.0])},
               {"w": torch.tensor([5.0, 0.0]), "token": torch.tensor([0.0])}]
    messages = [{"w": torch.zeros(2)}, {"w": torch.zeros(2)}]
    params, _ = server("fisher", vectors, messages=messages)
    assert same(params, {"w": torch.tensor([3.0, 1.0]), "token": torch.tensor([2.0])})


def test_a_clients_fisher_is_of_its_own_images_at_its_own_weights():
    run, state = small_run(replace(CFG, algorithm="fisher"))
    update = utils.client_update(run, state, 2, 0.5)
    draw = utils.rng("labels", CFG.seed, 0, 2)
    index = draw.permutation(run.shards[2])
    run.load(utils.add(state.params, update.vector))
    names = list(state.params)
    wanted = utils.sensitivity(run.model, run.data.images[index], draw, names=names)
    assert update.message.keys() == wanted.keys()
    for n, fisher in wanted.items():
        assert torch.allclose(update.message[n], (fisher / len(index)).float())


@pytest.mark.parametrize("name", ["sign_election", "ties", "fisher"])
def test_a_matched_merge_has_the_merges_direction_and_the_means_norm(name):
    draw = torch.Generator().manual_seed(1)
    vectors, messages = ([{n: torch.randn(5, generator=draw) for n in "ab"} for _ in range(3)]
                         for _ in range(2))
    messages = [{n: w.abs() for n, w in message.items()} for message in messages]
    shares = [0.5, 0.3, 0.2]
    ends = [server(f, vectors, shares=shares, messages=messages)[0]
            for f in (name, f"{name}_matched", "fedavg")]
    free, matched, mean = (utils.flatten(end) for end in ends)
    assert matched.norm().item() == pytest.approx(mean.norm().item(), rel=1e-5)
    assert torch.cosine_similarity(free, matched, 0).item() == pytest.approx(1)
    assert torch.cosine_similarity(free, mean, 0).item() < 0.99


# ------------------------------------------------------------------ lengths on held-out sums
def held_out_state(length: float = 1.0) -> State:
    memory = {"step": scalar(1.0)[0], "lengths": {"length": torch.tensor([length])}}
    return State({"w": torch.zeros(1)}, 1, algorithm_state=memory)


@pytest.mark.parametrize(("before", "after", "exponent"), [
    ([-2.0, -4.0], [-1.0, -2.0], 0.2 / 3),   # still falling at the end: longer
    ([-2.0, -4.0], [1.0, 1.0], -0.2 / 4),    # rising again: shorter
    ([-1.0, -1.0], [2.0, -2.0], 0.0),        # on the whole level
    ([0.0, 0.0], [0.0, 0.0], 0.0)])
def test_a_length_follows_the_sum_of_the_held_out_slopes(before, after, exponent):
    messages = [{"before": torch.tensor([b]), "after": torch.tensor([a])}
                for b, a in zip(before, after, strict=True)]
    params, memory = server("held_out", scalar(1.0, 3.0), held_out_state(2.0), messages=messages)
    length = memory["lengths"]["length"].item()
    assert length == pytest.approx(2 * 2**exponent)
    assert params["w"].item() == pytest.approx(2 * length)
    assert same(memory["step"], params)  # from w = 0


def test_lengths_stay_within_their_bounds_and_wait_for_reports():
    falling = [{"before": torch.tensor([-1.0]), "after": torch.tensor([-1.0])}] * 2
    _, memory = server("held_out", scalar(1.0, 1.0), held_out_state(8.0), messages=falling)
    assert memory["lengths"]["length"].item() == 8
    _, memory = server("held_out", scalar(1.0, 1.0), held_out_state(3.0))
    assert memory["lengths"]["length"].item() == 3


def test_reported_slopes_are_the_losss_derivatives_along_the_step():
    run, state = small_run(replace(CFG, algorithm="held_out", num_clients=3, participation=0.34))
    state = rounds(run, state, 1)
    step = state.algorithm_state["step"]
    last = run.algorithm.last_cohort(state)
    assert last == utils.cohort(3, 0.34, "cohort", CFG.seed, 0).tolist()
    judge = next(k for k in range(3) if k not in last)
    message = utils.client_update(run, state, judge, 0.1).message
    draw = utils.rng("scorers", CFG.seed, 1, judge)
    index = draw.permutation(run.shards[judge])[:CFG.batch_size]

    def loss(t):
        run.load(utils.apply_vector(state.params, step, t))
        run.model.double()
        logits = run.model(run.data.images[index].double())
        run.model.float()
        return torch.nn.functional.cross_entropy(logits, run.data.labels[index]).item()
    size = len(run.shards[judge])
    for key, t in (("before", -1), ("after", 0)):
        assert message[key].shape == (len(step),)
        slope = (loss(t + 1e-2) - loss(t - 1e-2)) / 2e-2
        assert message[key].sum().item() == pytest.approx(size * slope, rel=1e-2)


def test_the_slopes_do_not_depend_on_micro_batches():
    found = []
    for micro in (None, 1, 3):
        cfg = replace(CFG, algorithm="held_out", micro_batch=micro, num_clients=2)
        run, state = small_run(cfg)
        step = utils.scale(state.params, 0.1)
        found.append(run.algorithm.slopes(run, state.params, step, np.arange(4)))
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])


def test_who_took_part_in_the_step_does_not_judge_it():
    cfg = replace(CFG, algorithm="held_out")
    run, state = small_run(cfg)
    state = rounds(run, state, 1)
    took_part = utils.cohort(10, 0.3, "cohort", CFG.seed, 0).tolist()
    told = {k for k in range(10) if utils.client_update(run, state, k, 0.1).message}
    assert told == set(range(10)) - set(took_part)


def test_with_full_participation_held_out_lengths_are_fedavg():
    ends = []
    for name in ("fedavg", "held_out", "held_out_matched"):
        run, state = small_run(replace(CFG, algorithm=name, num_clients=3, participation=1.0))
        ends.append(rounds(run, state, 2).params)
    assert close(ends[0], ends[1], 1e-7)
    assert close(ends[0], ends[2], 1e-7)


@pytest.mark.parametrize(("lr", "low", "high"), [(1e-3, 1.5, 4), (3.0, 0.12, 0.7)])
def test_steps_too_short_grow_and_steps_too_long_shrink(lr, low, high):
    cfg = replace(CFG, algorithm="held_out", lr=lr, schedule="constant", momentum=0.0)
    run, state = small_run(cfg)
    # classes that images show, so that clients learn what others need
    labels = run.data.images.flatten(1)[:, :5].argmax(1)
    run = replace(run, data=replace(run.data, labels=labels))
    state = rounds(run, state, 15)
    lengths = state.algorithm_state["lengths"]["length"]
    assert low < lengths.median() < high


def test_matched_lengths_keep_the_norm_of_the_mean():
    memory = {"step": {"a": torch.ones(1), "b": torch.ones(1)},
              "lengths": {"length": torch.tensor([1.0, 4.0])}}
    zero = {"a": torch.zeros(1), "b": torch.zeros(1)}
    mean = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    params, memory = server("held_out_matched", [mean], State(zero, 1, algorithm_state=memory))
    norm = math.hypot(3, 16)
    assert params["a"].item() == pytest.approx(3 * 5 / norm)
    assert params["b"].item() == pytest.approx(16 * 5 / norm)


# ------------------------------------------------------------------ masks that change
def test_the_server_frees_what_most_clients_free_from_the_next_round_on():
    masks = [{"w": torch.tensor([True, True, False, False])},
             {"w": torch.tensor([True, False, True, False])},
             {"w": torch.tensor([False, False, True, True])}]
    vectors = [{"w": torch.ones(4)}] * 3
    params, memory = server("recalibrated", vectors, messages=masks, head="lda")
    assert params["w"].tolist() == [0, 0, 0, 0]  # nothing was free in the first round
    assert memory["mask"]["w"].tolist() == [True, False, True, False]

    state = State(params, round=1, algorithm_state=memory)
    params, memory = server("recalibrated", vectors, state, head="lda")
    assert params["w"].tolist() == [1, 0, 1, 0]
    assert memory["mask"]["w"].tolist() == [True, False, True, False]


def test_a_frozen_weights_gradient_cancels_its_decay():
    algorithm = extension.Recalibrated(replace(CFG, weight_decay=0.5, head="lda"))
    state = State({}, algorithm_state={"mask": {"w": torch.tensor([True, False])}})
    gradients = {"w": torch.tensor([3.0, 3.0]), "head": torch.tensor([3.0])}
    weights = {"w": torch.tensor([4.0, 4.0]), "head": torch.tensor([8.0])}
    algorithm.local_gradient(gradients, weights, state, 0)
    assert gradients["w"].tolist() == [3, -2]
    assert gradients["head"].tolist() == [-4]  # in no mask


def masks_of(name: str, number: int) -> list[dict]:
    """The masks after each of the rounds, and a check that only they let weights move."""
    cfg = replace(CFG, algorithm=name, num_rounds=8, weight_decay=0.1, momentum=0.9, head="lda")
    run, state = small_run(cfg)
    masks = []
    for _ in range(number):
        after = rounds(run, state, 1)
        mask = state.algorithm_state.get("mask", {})
        for n, w in state.params.items():
            frozen = ~mask.get(n, torch.zeros_like(w, dtype=torch.bool))
            assert torch.equal(after.params[n][frozen], w[frozen])
        masks.append(after.algorithm_state["mask"])
        state = after
    return masks


@pytest.mark.parametrize("name", RECALIBRATED)
def test_a_tenth_is_free_and_changes_every_quarter_or_never(name):
    masks = masks_of(name, 6)  # of 8 rounds: calibrations in rounds 0, 2 and 4
    entries = sum(m.numel() for m in masks[0].values())
    free = {sum(int(m.sum()) for m in mask.values()) for mask in masks}
    assert free == {round(0.1 * entries)}
    assert same(masks[0], masks[1])
    assert same(masks[2], masks[3])
    changed = not same(masks[1], masks[2])
    assert changed == (name in ("recalibrated", "redrawn"))


@pytest.mark.parametrize(("rounds", "due"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3]),
                                             (8, [0, 2, 4, 6]), (13, [0, 3, 6, 9])])
def test_calibrations_are_a_quarter_of_the_run_apart(rounds, due):
    algorithm = extension.Recalibrated(replace(CFG, num_rounds=rounds, head="lda"))
    assert [r for r in range(rounds) if algorithm.is_due(State({}, round=r))] == due


@pytest.mark.parametrize("change", [dict(rule="random"), dict(head="train"), dict(head="probe")])
def test_a_mask_that_changes_wants_no_rule_and_a_fitted_head(change):
    cfg = replace(CFG, algorithm="recalibrated", **dict(head="lda") | change)
    with pytest.raises(ValueError, match=f"chooses the weights itself.*{[*change.values()][0]}"):
        extension.Recalibrated(cfg)


def test_clients_of_a_random_mask_agree_on_it():
    cfg = replace(CFG, algorithm="redrawn", head="lda")
    run, state = small_run(cfg)
    asked = [run.algorithm.client_message(run, state.params, state, k, 0.1) for k in (0, 7)]
    assert same(*asked)


def test_shuffled_frees_as_many_of_each_layer_but_other_weights():
    fisher = {"a.weight": torch.arange(40.0).view(4, 10),
              "b.qkv.weight": torch.cat([torch.full((2, 10), 5.0), torch.arange(40.0).view(4, 10)])}
    draw = utils.rng("mask", 0)
    scores = extension.shuffled({}, fisher, draw)
    for n, part in fisher.items():
        pieces = 3 if ".qkv." in n else 1
        for old, new in zip(part.chunk(pieces), scores[n].chunk(pieces), strict=True):
            assert new.shape == old.shape
            assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
    # a constant part stays as it is, others are in another order
    assert torch.equal(scores["b.qkv.weight"][:2], fisher["b.qkv.weight"][:2])
    assert not torch.equal(scores["a.weight"], fisher["a.weight"])


def test_a_shuffled_mask_has_the_layers_of_the_least_sensitive(monkeypatch):
    make_small(monkeypatch)
    counts = {}
    for rule in ("least_sensitive", "shuffled"):
        cfg = replace(CFG, rule=rule, sparsity=0.5, calibration_rounds=1, head="ridge")
        mask = utils.open_run(cfg)[0].mask
        counts[rule] = utils.trainable_per_layer(mask), utils.flatten(mask)
    assert counts["least_sensitive"][0] == counts["shuffled"][0]
    assert not torch.equal(counts["least_sensitive"][1], counts["shuffled"][1])


# ------------------------------------------------------------------ all of them
@pytest.mark.parametrize("name", BEYOND)
def test_frozen_entries_keep_their_bits_and_free_ones_move(name):
    cfg = replace(CFG, algorithm=name, weight_decay=0.1, momentum=0.9)
    mask = half_mask(small_run(cfg)[0])
    run, state = small_run(cfg, mask=mask)
    end = rounds(run, state, 3)
    moved = 0
    for n, w in state.params.items():
        assert torch.equal(end.params[n][~mask[n]], w[~mask[n]])
        moved += int((end.params[n] != w).sum())
    assert moved > 0.5 * run.num_trainable()


@pytest.mark.parametrize("name", BEYOND + RECALIBRATED)
def test_a_round_leaves_its_input_alone(name):
    run, state = small_run(replace(CFG, algorithm=name, head="lda"))
    state = rounds(run, state, 1)
    before = {"": state.params, **state.algorithm_state}
    copies = {g: {n: w.clone() for n, w in group.items()} for g, group in before.items()}
    rounds(run, state, 1)
    assert all(same(copies[g], before[g]) for g in copies)


# one of each that keep something, that hold the cohort, or whose clients send something
@pytest.mark.parametrize("name", ["scaffold", "fedavgm", "fedadam", "ties", "fisher", "held_out",
                                  "recalibrated"])
def test_an_interrupted_run_resumes_bitwise(name, tmp_path, monkeypatch):
    make_small(monkeypatch)
    cfg = replace(CFG, algorithm=name, server_lr=0.5)
    if name == "recalibrated":  # which leaves the head as it is
        cfg = replace(cfg, head="lda")
    whole = utils.train(cfg, Store(tmp_path / "whole", quiet=True))
    assert whole["status"] == "finished"

    store = Store(tmp_path / "cut", quiet=True)
    with monkeypatch.context() as patch:
        cut(patch, "client_update", 8)  # within the third round
        assert utils.train(cfg, store)["round"] == 2
    assert timeless(utils.train(cfg, store)) == timeless(whole)


def test_these_are_all_that_are_registered():
    ours = [name for name, kind in ALGORITHMS.items() if kind.__module__ == extension.__name__]
    assert ours == BEYOND + RECALIBRATED


# ------------------------------------------------------------------ hooks
def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'fedporx' is not one of .*'fedprox', 'scaffold'"):
        Config(algorithm="fedporx")


MINE = """
class Mine(utils.FedAvg):
    factor = 2.0

    def combine(self, vectors, shares, messages):
        mean = super().combine(vectors, shares, messages)
        return utils.scale(mean, self.factor)

utils.register_algorithm("mine", Mine)
"""


@pytest.fixture
def unregister():
    """What a test registers goes with it, and what stood under the name comes back."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def test_a_cell_registers_an_algorithm_that_trains_and_resumes(unregister, tmp_path, monkeypatch):
    make_small(monkeypatch)
    cell(MINE)
    cfg = replace(CFG, algorithm="mine")
    store = Store(tmp_path, quiet=True)
    with monkeypatch.context() as patch:
        cut(patch, "client_update", 5)
        assert utils.train(cfg, store)["status"] == "interrupted"
    cell(MINE, 1)  # the cell is run again, as in a kernel that was restarted
    found = utils.train(cfg, store)
    assert found["status"] == "finished"
    assert timeless(found) == timeless(utils.train(cfg, Store(tmp_path / "whole", quiet=True)))


@pytest.mark.parametrize(("old", "new", "differs"), [
    ("self.factor)", "self.factor / 2)", True),
    ("factor = 2.0", "factor = 3.0", True),
    ("factor = 2.0", "factor = 2.0  # double", False)])
def test_an_edited_source_is_another_run(unregister, old, new, differs):
    keys = []
    for i, source in enumerate([MINE, MINE.replace(old, new)]):
        cell(source, i)
        keys.append(utils.run_key(replace(CFG, algorithm="mine")))
    assert (keys[0] != keys[1]) == differs


def test_an_edit_of_what_an_algorithm_inherits_is_another_run(monkeypatch):
    cfg = replace(CFG, algorithm="ties_matched")
    before = utils.run_key(cfg)
    monkeypatch.setattr(extension.Ties, "keep", 0.3)
    assert utils.run_key(cfg) != before


def test_what_an_idea_uses_of_other_cells_is_part_of_it():
    names = cell("""
ALPHA = 1.0
def double(x):
    return 2 * x
def mine(weights, fisher, draw):
    return {n: (lambda v: ALPHA * double(v))(w) for n, w in weights.items()}
""")
    hashes = [utils.source_sha256(names["mine"])]
    names["ALPHA"] = 2.0  # the other cell is run again, this one is not
    hashes.append(utils.source_sha256(names["mine"]))
    names["double"] = cell("def double(x):\n    return 3 * x\n", 1)["double"]
    hashes.append(utils.source_sha256(names["mine"]))
    assert len(set(hashes)) == 3
    names["unused"] = [1]
    assert utils.source_sha256(names["mine"]) == hashes[-1]
    names["ALPHA"] = [2.0]
    with pytest.raises(ValueError, match="ALPHA is a list, which may change"):
        utils.source_sha256(names["mine"])


def test_a_default_that_was_computed_is_part_of_an_idea():
    source = """
def made(p):
    def mine(weights, fisher, draw, p=p, q=1.0):
        return {n: p * q * w for n, w in weights.items()}
    return mine
one, other = made(1.0), made(-1.0)
"""
    names = cell(source)
    assert utils.source_sha256(names["one"]) != utils.source_sha256(names["other"])


def test_a_class_of_another_cell_is_part_of_an_idea_that_uses_it():
    hashes = []
    for factor in (1, 5):
        names = cell("def mine(weights, fisher, draw):\n    return Helper().scores(weights)\n")
        helper = f"""
class Helper:
    factor = {factor}
    def scores(self, weights):
        return {{n: Helper.factor * w for n, w in weights.items()}}
"""
        names["Helper"] = cell(helper, 1)["Helper"]
        hashes.append(utils.source_sha256(names["mine"]))
    assert len(set(hashes)) == 2
    names["Helper"] = functools.partial(pow, 2)
    with pytest.raises(ValueError, match="Helper is a partial"):
        utils.source_sha256(names["mine"])


def test_functions_of_cells_may_call_each_other():
    names = cell("""
def even(n):
    return n == 0 or odd(n - 1)
def odd(n):
    return n != 0 and even(n - 1)
""")
    assert utils.source_sha256(names["even"]) != utils.source_sha256(names["odd"])


def test_an_edit_of_a_file_counts_when_it_is_imported_again(tmp_path, monkeypatch, unregister):
    """What runs is what was imported: old code must not train under the key of the new."""
    path = tmp_path / "of_mine.py"
    text = """import utils
class Mine(utils.FedAvg):
    def combine(self, vectors, shares, messages):
        return utils.scale(vectors[0], 2.0)
utils.register_algorithm("mine", Mine)
"""
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("of_mine")
    before = utils.run_key(replace(CFG, algorithm="mine"))
    path.write_text(text.replace("2.0", "3.0"))
    linecache.checkcache()
    assert utils.run_key(replace(CFG, algorithm="mine")) == before
    later = path.stat().st_mtime + 10  # or the compiled module passes for the new one's
    os.utime(path, (later, later))
    importlib.reload(module)
    assert utils.run_key(replace(CFG, algorithm="mine")) != before


def test_a_merge_that_is_not_finite_ends_the_run_as_diverged(tmp_path, monkeypatch, unregister):
    make_small(monkeypatch)

    class Mine(FedAvg):
        def combine(self, vectors, shares, messages):
            return {n: v / 0 for n, v in vectors[0].items()}  # 0 / 0 where it is frozen
    register_algorithm("mine", Mine)
    cfg = replace(CFG, algorithm="mine", rule="random", head="lda")
    result = utils.train(cfg, Store(tmp_path, quiet=True))
    assert result["status"] == "diverged"
    assert "norm of what combine() returns" in result["error"]


def test_static_methods_count_by_their_source(unregister):
    source = """
class Mine(utils.FedAvg):
    @staticmethod
    def double(x):
        return 2 * x

    @property
    def half(self):
        return 0.5

utils.register_algorithm("mine", Mine)
"""
    hashes = []
    for i, text in enumerate([source, source, source.replace("2 *", "3 *"),
                              source.replace("0.5", "0.6")]):
        hashes.append(utils.source_sha256(cell(text, i)["Mine"]))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
