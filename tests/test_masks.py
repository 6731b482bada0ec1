"""Masks: exact budgets, rules, calibration in rounds and by clients."""
import numpy as np
import pytest
import torch
from helpers import same
from torch import nn

import utils
from utils import (
    RULES,
    calibrate_mask,
    flatten,
    maskable,
    register_rule,
    rng,
    select_lowest,
    sensitivity,
    trainable_per_layer,
    unflatten,
)

BUILT_IN = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude",
            "random", "query_key")
SENSITIVE = ("least_sensitive", "most_sensitive")
LABELS = torch.arange(32) * 7 % 100
MASKABLE = 9680  # entries of `tiny_vit`


def trainable(mask) -> int:
    assert {c.dtype for c in mask.values()} == {torch.bool}
    return sum(int(c.sum()) for c in mask.values())


def overlap(a, b) -> float:
    """Intersection over union."""
    a, b = flatten(a), flatten(b)
    return ((a & b).sum() / (a | b).sum()).item()


# ---------------------------------------------------------------- the cut
@pytest.mark.parametrize("k", [0, 1, 10, 899, 900, 901, 950, 999, 1000])
def test_exactly_k_are_chosen_however_many_tie(k):
    scores = torch.zeros(1000)
    scores[::10] = torch.rand(100) + 1
    for s in (scores, scores.double().neg(), torch.ones(1000)):
        keep = select_lowest(s, k, rng("mask", 0))
        assert keep.dtype == torch.bool
        assert int(keep.sum()) == k
        if 0 < k < 1000:
            assert s[keep].max() <= s[~keep].min()


def test_ties_are_drawn_by_the_generator_alone():
    a, again, other = (select_lowest(torch.zeros(1000), 500, rng("mask", s)) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert 200 < int(a[:500].sum()) < 300  # from all over, not from the front


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        select_lowest(torch.tensor([1.0, float("nan"), 2.0]), 1, rng("mask", 0))


def test_infinite_scores_come_last():
    inf = float("inf")
    assert select_lowest(torch.tensor([inf, 3.0, -inf, inf]), 2, rng("mask")).tolist() == [
        False, True, True, False]


# ---------------------------------------------------------------- masks of every rule
@pytest.mark.parametrize("rule", BUILT_IN)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.99, 1])
def test_every_rule_spends_exactly_the_same_budget(tiny_vit, images, rule, sparsity):
    mask = calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=sparsity)
    assert list(mask) == list(maskable(tiny_vit))
    assert all(c.shape == tiny_vit.get_parameter(n).shape for n, c in mask.items())
    assert trainable(mask) == round((1 - sparsity) * MASKABLE)


@pytest.mark.parametrize("rule", BUILT_IN)
def test_the_budget_is_exact_where_scores_are_mostly_zero(rule, images, monkeypatch, tiny_vit):
    monkeypatch.setattr(utils, "sensitivity", lambda model, *rest: {
        n: torch.zeros_like(w).double() for n, w in maskable(model).items()})
    with torch.no_grad():
        for p in tiny_vit.parameters():
            p.mul_(torch.rand_like(p) < 0.05)
    mask = calibrate_mask(tiny_vit, images, rule=rule, sparsity=0.7)
    assert trainable(mask) == round(0.3 * MASKABLE)


@pytest.mark.parametrize("rule", BUILT_IN)
def test_masking_changes_no_weight(tiny_vit, images, rule):
    before = {n: w.clone() for n, w in tiny_vit.state_dict().items()}
    calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=0.9)
    assert same(tiny_vit.state_dict(), before)
    assert all(p.grad is None for p in tiny_vit.parameters())


@pytest.mark.parametrize(("rule", "opposite"), [SENSITIVE, ("lowest_magnitude",
                                                            "highest_magnitude")])
def test_opposite_rules_choose_opposite_halves(tiny_vit, images, rule, opposite):
    a, b = (calibrate_mask(tiny_vit, images[:8], rule=r, sparsity=0.5, rounds=1)
            for r in (rule, opposite))
    assert overlap(a, b) == 0
    assert trainable(a) + trainable(b) == MASKABLE


def test_the_cut_is_global_and_the_least_sensitive_stay_trainable(tiny_vit, images):
    scores = flatten(sensitivity(tiny_vit, images, LABELS))
    c = flatten(calibrate_mask(tiny_vit, images, rule="least_sensitive", sparsity=0.9, rounds=1,
                            labels=LABELS))
    assert scores[c].max() <= scores[~c].min()


def test_magnitude_masks_free_the_extremes_over_all_tensors(tiny_vit):
    size = flatten(maskable(tiny_vit)).abs()
    low, high = (flatten(calibrate_mask(tiny_vit, [], rule=f"{r}_magnitude", sparsity=0.8))
                 for r in ("lowest", "highest"))
    assert size[low].max() < size[~low].min()
    assert size[high].min() > size[~high].max()


def test_a_random_mask_depends_on_the_seed_alone(tiny_vit, images):
    a, other = (calibrate_mask(tiny_vit, images, rule="random", sparsity=0.9, seed=s)
                for s in (0, 1))
    with torch.no_grad():
        tiny_vit.norm.weight.zero_()
    assert same(calibrate_mask(tiny_vit, images[:3], rule="random", sparsity=0.9, rounds=1), a)
    assert overlap(a, other) < 0.1


def test_query_key_stays_inside_queries_and_keys_while_they_last(tiny_vit):
    def counts(sparsity):
        mask = calibrate_mask(tiny_vit, [], rule="query_key", sparsity=sparsity)
        return trainable_per_layer(mask)
    inside = {f"attn.{p}.{w}" for p in ("query", "key") for w in ("weight", "bias")}
    found = counts(0.9)  # 968 of 1088
    assert sum(free for name, (free, _) in found.items() if name in inside) == 968
    assert all(0 < found[f"attn.{p}.weight"][0] < 512 for p in ("query", "key"))
    found = counts(0.5)  # all 1088 and 3752 elsewhere
    assert all(found[name][0] == found[name][1] for name in inside)
    assert sum(free for free, _ in found.values()) == 4840


@pytest.mark.parametrize("wrong", [dict(rule="fisher"), dict(sparsity=-0.1), dict(sparsity=1.1),
                                   dict(sparsity=float("nan")), dict(combine="median"),
                                   dict(rounds=0), dict(rounds=10_000), dict(damping=1.1),
                                   dict(damping=-0.1)], ids=str)
def test_an_invalid_option_is_a_value_error(mlp, wrong):
    options = dict(rule="least_sensitive", sparsity=0.5) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        calibrate_mask(mlp, torch.randn(4, 12), **options)


def test_frozen_weights_may_be_left_out_of_the_scoring(mlp):
    mask = calibrate_mask(mlp, torch.randn(4, 12), rule="most_sensitive", sparsity=0.5, damping=0)
    assert trainable(mask) == round(0.5 * sum(p.numel() for p in mlp.parameters()))


def test_every_client_needs_a_list_of_labels(mlp):
    options = dict(rule="least_sensitive", sparsity=0.5)
    with pytest.raises(ValueError, match="2 clients with images have 1 lists of labels"):
        calibrate_mask(mlp, [torch.randn(4, 12)] * 2, labels=[torch.zeros(4, dtype=int)], **options)
    with pytest.raises(ValueError, match="some images, are needed"):
        calibrate_mask(mlp, torch.zeros(0, 12), **options)


# ---------------------------------------------------------------- calibration rounds
@pytest.mark.parametrize("rule", SENSITIVE)
def test_more_rounds_give_another_mask_of_the_same_density(tiny_vit, images, rule):
    a, b = (calibrate_mask(tiny_vit, images[:8], rule=rule, sparsity=0.9, rounds=r)
            for r in (1, 4))
    assert trainable(a) == trainable(b) == 968
    assert overlap(a, b) < 0.999


@pytest.mark.parametrize("rule", SENSITIVE)
def test_rounds_act_through_the_soft_mask_and_the_labels_alone(tiny_vit, images, rule):
    def mask(rounds, **options):
        return calibrate_mask(tiny_vit, images[:8], rule=rule, sparsity=0.9, rounds=rounds,
                              **options)
    given = dict(labels=LABELS[:8])
    assert same(mask(4, damping=1, **given), mask(1, damping=1, **given))
    assert not same(mask(4, damping=0.1, **given), mask(1, damping=0.1, **given))
    assert not same(mask(4, damping=1), mask(1, damping=1))


@pytest.mark.parametrize("rule", SENSITIVE)
def test_what_a_round_freezes_never_returns(tiny_vit, images, monkeypatch, rule):
    honest, cuts = utils.select_lowest, []
    monkeypatch.setattr(utils, "select_lowest", lambda *a: (cuts.append(honest(*a)), cuts[-1])[1])
    calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=0.9, rounds=4)
    assert [int(c.sum()) for c in cuts] == [round(0.1 ** (r / 4) * MASKABLE) for r in (1, 2, 3, 4)]
    assert not any((later & ~earlier).any() for earlier, later in zip(cuts, cuts[1:], strict=False))


@pytest.fixture
def calls(monkeypatch):
    """(images, labels or a draw of their generator, weights) of every call of `sensitivity`."""
    honest = utils.sensitivity
    seen = []

    def record(model, images, labels, chunk, weights):
        drawn = labels if isinstance(labels, torch.Tensor) else labels.random()
        seen.append((images, drawn, {n: w.clone() for n, w in weights.items()}))
        return honest(model, images, labels, chunk, weights)
    monkeypatch.setattr(utils, "sensitivity", record)
    return seen


def test_frozen_weights_are_damped_while_scoring(tiny_vit, images, calls):
    theta = maskable(tiny_vit)
    first = calibrate_mask(tiny_vit, images[:4], rule="least_sensitive", sparsity=0.75, rounds=1)
    calibrate_mask(tiny_vit, images[:4], rule="least_sensitive", sparsity=1 - 0.25 ** 2, rounds=2)
    assert same(calls[0][2], theta)
    assert same(calls[1][2], theta)
    assert same(calls[2][2], {n: torch.where(first[n], w, 0.1 * w) for n, w in theta.items()})


def test_labels_are_redrawn_every_round_from_the_seed(tiny_vit, images, calls):
    for seed in (0, 0, 1):
        calibrate_mask(tiny_vit, images[:4], rule="least_sensitive", sparsity=0.9, seed=seed)
    drawn = [labels for _, labels, _ in calls]
    assert drawn[:4] == drawn[4:8]
    assert len(set(drawn[4:])) == 8


def test_given_labels_are_used_in_every_round(tiny_vit, images, calls):
    calibrate_mask(tiny_vit, images, rule="least_sensitive", sparsity=0.9, labels=LABELS)
    assert [labels is LABELS for _, labels, _ in calls] == [True] * 4


def test_the_seed_alone_fixes_a_calibrated_mask(tiny_vit, images):
    a, again, other = (calibrate_mask(tiny_vit, images[:4], rule="least_sensitive", sparsity=0.9,
                                      seed=s) for s in (0, 0, 1))
    assert same(a, again)
    assert not same(a, other)


# ---------------------------------------------------------------- calibration by clients
@pytest.mark.parametrize("rule", SENSITIVE)
@pytest.mark.parametrize("labels", [LABELS, None], ids=["given", "sampled"])
def test_the_mean_of_equal_clients_is_the_central_mask(tiny_vit, images, rule, labels):
    options = dict(rule=rule, sparsity=0.9, chunk=8)
    central = calibrate_mask(tiny_vit, images, labels=labels, **options)
    clients = calibrate_mask(tiny_vit, list(images.split(8)), **options, combine="mean",
                             labels=None if labels is None else list(labels.split(8)))
    assert same(clients, central)


def combined(monkeypatch, scores, images, **options):
    """The mask of clients that report these scores of four weights, one list a client."""
    clients = [torch.full((n, 4), float(k)) for k, n in enumerate(images)]
    monkeypatch.setattr(utils, "sensitivity", lambda model, x, *rest: {
        "0.weight": torch.tensor([scores[int(x[0, 0])]], dtype=torch.float64)})
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    mask = calibrate_mask(model, clients, rounds=1, **options)
    return np.flatnonzero(mask["0.weight"].numpy()).tolist()


@pytest.mark.parametrize(("combine", "least", "most"), [
    ("mean", [3], [0]),  # sums 13, 10, 7, 4
    ("max", [1], [3])])  # of the scores per image: 3, 2, 2.5, 4
def test_scores_combine_by_hand(monkeypatch, combine, least, most):
    scores, images = [[1, 2, 2.5, 4], [12, 8, 4.5, 0]], [1, 4]
    for rule, expected in zip(SENSITIVE, (least, most), strict=True):
        assert combined(monkeypatch, scores, images, rule=rule, sparsity=0.75,
                        combine=combine) == expected


def test_votes_combine_by_hand(monkeypatch):
    least = [[1, 2, 30, 90], [2, 999, 1, 999], [1, 2, 30, 90]]  # for 0 1, 0 2, 0 1; mean: 0 2
    most = [[9, 8, 1, 1], [9, 1, 99, 1], [9, 8, 1, 1]]
    for rule, scores in zip(SENSITIVE, (least, most), strict=True):
        options = dict(rule=rule, sparsity=0.5)
        assert combined(monkeypatch, scores, [1, 1, 1], combine="vote", **options) == [0, 1]
        assert combined(monkeypatch, scores, [1, 1, 1], combine="mean", **options) == [0, 2]


@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_a_rule_on_scores_may_draw(monkeypatch, combine):
    def shuffled(weights, fisher, draw):
        return {n: torch.from_numpy(draw.permutation(f.numel())).view_as(f).double()
                for n, f in fisher.items()}
    monkeypatch.setitem(RULES, "mine", utils.Rule(shuffled, needs_fisher=True))
    found = {tuple(combined(monkeypatch, [[1, 1, 1, 1]], [2], rule="mine", sparsity=0.5,
                            combine=combine, seed=seed)) for seed in range(8)}
    assert len(found) > 1


@pytest.mark.parametrize("rule", SENSITIVE)
@pytest.mark.parametrize("combine", ["vote", "max"])
def test_a_single_client_decides_alone(tiny_vit, images, rule, combine):
    options = dict(rule=rule, sparsity=0.9)
    alone = calibrate_mask(tiny_vit, [images[:8]], combine=combine, **options)
    assert same(alone, calibrate_mask(tiny_vit, images[:8], **options))


@pytest.mark.parametrize("rule", SENSITIVE)
@pytest.mark.parametrize("combine", ["mean", "max", "vote"])
def test_every_way_to_combine_spends_exactly_the_budget(tiny_vit, images, rule, combine):
    mask = calibrate_mask(tiny_vit, list(images[:16].split([3, 9, 4])), rule=rule, sparsity=0.9,
                          combine=combine)
    assert trainable(mask) == 968


def test_a_share_of_the_clients_scores_drawn_anew_every_round(tiny_vit, images, calls):
    clients = list(images.split(4))
    for seed in (0, 0, 1):
        calibrate_mask(tiny_vit, clients, rule="least_sensitive", sparsity=0.9, seed=seed,
                       participation=0.4)
    scored = [next(k for k, c in enumerate(clients) if c is x) for x, _, _ in calls]
    rounds = [scored[i:i + 3] for i in range(0, 36, 3)]  # round(0.4 * 8) = 3 clients each
    assert all(len(set(r)) == 3 for r in rounds)
    assert len({frozenset(r) for r in rounds[:4]}) > 1
    assert rounds[:4] == rounds[4:8] != rounds[8:]


def test_at_least_one_client_scores(tiny_vit, images, calls):
    calibrate_mask(tiny_vit, list(images.split(4)), rule="least_sensitive", sparsity=0.9, rounds=2,
                   participation=0.01)
    assert len(calls) == 2


# ---------------------------------------------------------------- what masks are made of
def test_the_composition_counts_queries_keys_and_values_apart():
    qkv = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    mask = {"blocks.0.attn.qkv.bias": qkv, "blocks.11.attn.qkv.bias": ~qkv,
            "norm.bias": torch.tensor([True, False, True])}
    assert trainable_per_layer(mask) == {"attn.query.bias": [2, 4], "attn.key.bias": [2, 4],
                                 "attn.value.bias": [2, 4], "norm.bias": [2, 3]}
    del mask["blocks.11.attn.qkv.bias"]
    assert trainable_per_layer(mask) == {"attn.query.bias": [1, 2], "attn.key.bias": [2, 2],
                                 "attn.value.bias": [0, 2], "norm.bias": [2, 3]}


def test_the_composition_adds_up_to_the_mask(tiny_vit):
    mask = calibrate_mask(tiny_vit, [], rule="random", sparsity=0.9)
    counts = trainable_per_layer(mask).values()
    assert [sum(c) for c in zip(*counts, strict=True)] == [968, MASKABLE]


# ---------------------------------------------------------------- rules of one's own
@pytest.fixture
def rule_named_mine():
    yield lambda score, **options: register_rule("mine", score, **options)
    RULES.pop("mine", None)


def test_a_rule_of_ones_own_frees_what_it_scores_lowest(tiny_vit, rule_named_mine):
    def smallest_norm_layers(weights, fisher, draw):
        return {n: torch.full_like(w, w.norm().item()) for n, w in weights.items()}
    rule_named_mine(smallest_norm_layers)
    mask = calibrate_mask(tiny_vit, [], rule="mine", sparsity=0.9)
    assert trainable(mask) == 968
    norms = {n: w.norm().item() for n, w in maskable(tiny_vit).items()}
    highest_freed = max(norms[n] for n, c in mask.items() if c.any())
    assert all(mask[n].all() for n, norm in norms.items() if norm < highest_freed)


def test_a_rule_may_ask_for_the_fisher_information(tiny_vit, images, rule_named_mine):
    def fisher_times_weight(weights, fisher, draw):
        return {n: fisher[n] * weights[n].square() for n in weights}
    rule_named_mine(fisher_times_weight, needs_fisher=True)
    mask = calibrate_mask(tiny_vit, images, rule="mine", sparsity=0.9, rounds=1, labels=LABELS)
    fisher = sensitivity(tiny_vit, images, LABELS)
    scores = flatten({n: fisher[n] * w.square() for n, w in maskable(tiny_vit).items()})
    chosen = flatten(mask)
    assert scores[chosen].max() <= scores[~chosen].min()


@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_a_rule_may_rank_in_whole_numbers(tiny_vit, images, rule_named_mine, combine):
    def rank_of_sensitivity(weights, fisher, draw):
        ranks = flatten(fisher).argsort().argsort()
        return unflatten(ranks, weights)
    options = dict(sparsity=0.9, rounds=3, labels=[LABELS], combine=combine)
    rule_named_mine(rank_of_sensitivity, needs_fisher=True)
    ranked = calibrate_mask(tiny_vit, [images], rule="mine", **options)
    scored = calibrate_mask(tiny_vit, [images], rule="least_sensitive", **options)
    assert torch.equal(flatten(ranked), flatten(scored))


@pytest.mark.parametrize(("wrong", "named"), [
    (lambda weights, fisher, draw: {"norm.bias": weights["norm.bias"]}, "27 of"),
    (lambda weights, fisher, draw: weights | {"other": torch.ones(2)}, "other"),
    (lambda weights, fisher, draw: weights | {"norm.bias": torch.ones(3)}, r"norm\.bias.*3"),
    (lambda weights, fisher, draw: flatten(weights), "Tensor"),
    (lambda weights, fisher, draw: None, "NoneType")])
def test_a_rule_that_scores_other_weights_fails_by_name(tiny_vit, monkeypatch, wrong, named):
    monkeypatch.setitem(RULES, "mine", utils.Rule(wrong))
    with pytest.raises(ValueError, match=rf"(?s)rule 'mine'.*{named}"):
        calibrate_mask(tiny_vit, [], rule="mine", sparsity=0.9)


def test_a_rule_that_scores_nan_is_refused(tiny_vit, monkeypatch):
    monkeypatch.setitem(RULES, "mine", utils.Rule(
        lambda weights, fisher, draw: {n: w / 0 * 0 for n, w in weights.items()}))
    with pytest.raises(ValueError, match="NaN"):
        calibrate_mask(tiny_vit, [], rule="mine", sparsity=0.9)
