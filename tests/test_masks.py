import numpy as np
import pytest
import timm
import torch
from torch import nn

import utils
from utils import (
    RULES,
    calibrate_mask,
    composition,
    flat,
    lowest,
    maskable,
    overlap,
    prepare,
    rng,
    sample_labels,
    sensitivity,
    unflat,
)

SENSITIVE = ("least_sensitive", "most_sensitive")
LABELS = torch.arange(32) * 7 % 100


def per_sample(model, x, labels, names):
    """The definition: one sample at a time, the gradient of log p squared, summed."""
    params, total = [model.get_parameter(n) for n in names], None
    for i in range(len(x)):
        logp = model(x[i:i + 1]).log_softmax(1)[0, labels[i]]
        squares = [g.square() for g in torch.autograd.grad(logp, params)]
        total = squares if total is None else [t + s for t, s in zip(total, squares, strict=True)]
    return dict(zip(names, total, strict=True))


def assert_close(a, b, rtol=1e-9, atol=1e-25):
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def free(mask):
    assert {c.dtype for c in mask.values()} == {torch.bool}
    return sum(int(c.sum()) for c in mask.values())


# ---------------------------------------------------------------- sensitivity
def test_sensitivity_is_the_per_sample_loop_on_an_mlp(mlp):
    mlp, x, y = mlp.double(), torch.randn(20, 12).double(), torch.arange(20) % 10
    assert maskable(mlp) == [n for n, _ in mlp.named_parameters()]
    assert_close(sensitivity(mlp, x, y), per_sample(mlp, x, y, maskable(mlp)))


def test_sensitivity_is_the_per_sample_loop_on_a_vit(tiny_vit):
    vit, x = tiny_vit.double(), torch.randn(5, 3, 16, 16).double()
    names = maskable(vit)
    ours, loop = (f(vit, x, LABELS[:5], names=names) for f in (sensitivity, per_sample))
    bias = [n for n in names if n.endswith("qkv.bias")]
    for n in bias:  # the key's is zero up to rounding
        assert ours[n][16:32].max() < 1e-20 * ours[n].max()
        ours[n][16:32] = loop[n][16:32] = 0
    assert_close(ours, loop)


def test_convolutions_with_stride_and_padding_are_scored_too():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(),
                          nn.Conv2d(3, 4, 2, bias=False), nn.Flatten(), nn.Linear(16, 5)).double()
    x, y = torch.randn(6, 2, 6, 6).double(), torch.arange(6) % 5
    assert_close(sensitivity(model, x, y), per_sample(model, x, y, maskable(model)))


def test_samples_are_squared_one_by_one_not_as_a_batch(mlp):
    mlp, x, y = mlp.double(), torch.randn(20, 12).double(), torch.arange(20) % 10
    logp = mlp(x).log_softmax(1).gather(1, y[:, None]).sum()
    batch = [g.square() for g in torch.autograd.grad(logp, list(mlp.parameters()))]
    for ours, squared in zip(sensitivity(mlp, x, y, chunk=20).values(), batch, strict=True):
        assert not torch.allclose(ours, squared, rtol=0.5)


@pytest.mark.parametrize("chunk", [1, 3, 32, 100])
def test_the_chunk_changes_nothing(tiny_vit, images, chunk):
    vit, x = tiny_vit.double(), prepare(images, tiny_vit).double()
    for labels in (lambda: LABELS, lambda: rng("labels", 0)):  # given, or drawn
        a, b = (sensitivity(vit, x, labels(), c) for c in (chunk, 16))
        assert_close(a, b, atol=1e-20)


def test_scores_are_float64_sums_that_do_not_underflow(mlp):
    with torch.no_grad():
        mlp[3].weight.mul_(1e-15)
    x, y = torch.randn(4, 12), torch.arange(4)
    found = sensitivity(mlp, x, y)
    assert {s.dtype for s in found.values()} == {torch.float64}
    assert_close(sensitivity(mlp, torch.cat([x, x]), torch.cat([y, y])),
                 {n: 2 * s for n, s in found.items()}, rtol=1e-5)


def test_the_model_is_scored_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    x, y = torch.randn(10, 6), torch.arange(10) % 4
    evaluated = sensitivity(model.eval(), x, y)
    assert same(sensitivity(model.train(), x, y), evaluated)


def test_scoring_leaves_no_trace(tiny_vit, images):
    before = {n: p.detach().clone() for n, p in tiny_vit.named_parameters()}
    tiny_vit.norm.weight.grad = grad = torch.ones(16)
    sensitivity(tiny_vit, images[:4], LABELS[:4])
    with pytest.raises(ValueError, match="1000"):
        sensitivity(tiny_vit, images[:4], torch.full((4,), 1000))  # no such class
    assert not any(m._forward_hooks for m in tiny_vit.modules())
    for n, p in tiny_vit.named_parameters():
        assert torch.equal(p, before[n])
        assert p.requires_grad
        assert p.grad is (grad if n == "norm.weight" else None)
    assert (grad == 1).all()


def test_frozen_parameters_and_no_grad_do_not_matter(mlp):
    x, y = torch.randn(6, 12), torch.arange(6)
    expected = sensitivity(mlp, x, y)
    assert same(sensitivity(mlp.requires_grad_(False), x, y), expected)


def test_weights_stand_in_for_the_stored_ones(mlp):
    x, y = torch.randn(6, 12), torch.arange(6)
    other = {"0.weight": 0.1 * mlp[0].weight.detach()}
    found = sensitivity(mlp, x, y, weights=other)
    assert not torch.allclose(found["0.weight"], sensitivity(mlp, x, y)["0.weight"])
    mlp[0].weight.data.mul_(0.1)
    assert same(found, sensitivity(mlp, x, y))


def test_names_choose_what_is_scored_and_foreign_ones_are_refused(tiny_vit, images):
    names = ["blocks.1.norm1.weight", "blocks.0.mlp.fc1.bias"]
    found, whole = (sensitivity(tiny_vit, images[:4], LABELS[:4], names=n) for n in (names, None))
    assert list(found) == names
    assert list(whole) == maskable(tiny_vit)
    assert same(found, {n: whole[n] for n in names})
    for foreign in ("cls_token", "pos_embed", "norm.scale"):
        with pytest.raises((KeyError, AttributeError), match=foreign):
            sensitivity(tiny_vit, images[:4], LABELS[:4], names=[*names, foreign])


@pytest.mark.parametrize("n", [3, 5, 20])
def test_there_must_be_as_many_labels_as_images(mlp, n):
    with pytest.raises((ValueError, RuntimeError)):
        sensitivity(mlp, torch.randn(4, 12), torch.zeros(n, dtype=torch.int64), chunk=4)


def test_maskable_is_every_layer_of_the_backbone_and_nothing_else(tiny_vit):
    outright = {"cls_token", "pos_embed", "head.weight", "head.bias"}
    assert set(maskable(tiny_vit)) == {n for n, _ in tiny_vit.named_parameters()} - outright
    with torch.device("meta"):
        vit = timm.create_model(**utils.ARCHS["vits16"])
    assert sum(vit.get_parameter(n).numel() for n in maskable(vit)) == 21_589_632


# ---------------------------------------------------------------- sampled labels
P = torch.tensor([0.5, 0.3, 0.15, 0.0, 0.05])


def fixed():
    """A model that predicts P whatever it sees."""
    model = nn.Linear(1, 5)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(P.log())
    return model


def chi_square(labels):
    assert labels[labels == 3].numel() == 0  # what has no chance is never drawn
    seen, expected = torch.bincount(labels, minlength=5), P * len(labels)
    return ((seen - expected).square() / expected)[P > 0].sum()


def test_sampled_labels_follow_the_models_own_distribution():
    labels = sample_labels(fixed(), torch.zeros(20000, 1), seed=0)
    assert (labels.shape, labels.dtype) == ((20000,), torch.int64)
    assert chi_square(labels) < 16.3  # three degrees of freedom, p = 0.001


def test_the_seed_alone_draws_the_labels(tiny_vit, images):
    a, again, other = (sample_labels(tiny_vit.train(), images, s) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert torch.equal(sample_labels(tiny_vit, images, 0, batch=5), a)


def test_labels_are_sampled_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 50))
    x = 5 * torch.randn(200, 4)
    assert torch.equal(sample_labels(model.train(), x, 0), sample_labels(model.eval(), x, 0))


def test_a_generator_as_labels_scores_the_models_own_labels():
    model = nn.Linear(1, 5)
    model.load_state_dict(fixed().state_dict())
    wrapped = nn.Sequential(model)
    found = sensitivity(wrapped, torch.zeros(20000, 1), rng("labels", 0), chunk=500)
    expected = 20000 * (P * (1 - P))  # E (1[y=c] - p_c)^2, the Fisher information of a logit
    torch.testing.assert_close(found["0.bias"].float(), expected, rtol=0.05, atol=1e-6)


# ---------------------------------------------------------------- the cut
@pytest.mark.parametrize("k", [0, 1, 10, 899, 900, 901, 950, 999, 1000])
def test_exactly_k_are_chosen_however_many_tie(k):
    scores = torch.zeros(1000)
    scores[::10] = torch.rand(100) + 1
    for s in (scores, scores.double().neg(), torch.ones(1000)):
        keep = lowest(s, k, rng("mask", 0))
        assert keep.dtype == torch.bool
        assert int(keep.sum()) == k
        if 0 < k < 1000:
            assert s[keep].max() <= s[~keep].min()


def test_ties_are_drawn_by_the_generator_alone():
    a, again, other = (lowest(torch.zeros(1000), 500, rng("mask", s)) for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert 200 < int(a[:500].sum()) < 300  # from all over, not from the front


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        lowest(torch.tensor([1.0, float("nan"), 2.0]), 1, rng("mask", 0))


def test_infinite_scores_come_last():
    inf = float("inf")
    assert lowest(torch.tensor([inf, 3.0, -inf, inf]), 2, rng("mask")).tolist() == [
        False, True, True, False]


def test_flat_and_unflat_are_inverse(tiny_vit):
    params = {n: p.detach() for n, p in tiny_vit.named_parameters()}
    assert same(unflat(flat(params), params), params)


# ---------------------------------------------------------------- masks of every rule
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.99, 1])
def test_every_rule_spends_exactly_the_same_budget(tiny_vit, images, rule, sparsity):
    mask = calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=sparsity)
    assert list(mask) == maskable(tiny_vit)
    assert all(c.shape == tiny_vit.get_parameter(n).shape for n, c in mask.items())
    assert free(mask) == round((1 - sparsity) * 9680)


@pytest.mark.parametrize("rule", RULES)
def test_the_budget_is_exact_where_scores_are_mostly_zero(rule, images, monkeypatch, tiny_vit):
    monkeypatch.setattr(utils, "sensitivity", lambda model, *rest: {
        n: torch.zeros_like(model.get_parameter(n)).double() for n in maskable(model)})
    with torch.no_grad():
        for p in tiny_vit.parameters():
            p.mul_(torch.rand_like(p) < 0.05)
    assert free(calibrate_mask(tiny_vit, images, rule=rule, sparsity=0.7)) == round(0.3 * 9680)


@pytest.mark.parametrize("rule", RULES)
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
    assert free(a) + free(b) == 9680


def test_the_cut_is_global_and_the_least_sensitive_stay_free(tiny_vit, images):
    scores = flat(sensitivity(tiny_vit, images, LABELS))
    c = flat(calibrate_mask(tiny_vit, images, rule="least_sensitive", sparsity=0.9, rounds=1,
                            labels=LABELS))
    assert scores[c].max() <= scores[~c].min()


def test_magnitude_masks_free_the_extremes_over_all_tensors(tiny_vit):
    size = flat({n: tiny_vit.get_parameter(n).detach() for n in maskable(tiny_vit)}).abs()
    low, high = (flat(calibrate_mask(tiny_vit, [], rule=f"{r}_magnitude", sparsity=0.8))
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
        return composition(calibrate_mask(tiny_vit, [], rule="query_key", sparsity=sparsity))
    inside = {f"attn.{p}.{w}" for p in ("query", "key") for w in ("weight", "bias")}
    found = counts(0.9)  # 968 of 1088
    assert sum(free for name, (free, _) in found.items() if name in inside) == 968
    assert all(0 < found[f"attn.{p}.weight"][0] < 512 for p in ("query", "key"))
    found = counts(0.5)  # all 1088 and 3752 elsewhere
    assert all(found[name][0] == found[name][1] for name in inside)
    assert sum(free for free, _ in found.values()) == 4840


def test_key_biases_are_always_among_the_least_sensitive(tiny_vit, images):
    found = sensitivity(tiny_vit, images, rng("labels", 0))["blocks.0.attn.qkv.bias"]
    assert found[16:32].max() < 1e-9 * found[:16].min()
    mask = calibrate_mask(tiny_vit, images, rule="least_sensitive", sparsity=0.99)
    assert composition(mask)["attn.key.bias"] == [32, 32]


def test_names_restrict_the_mask(tiny_vit, images):
    names = ["blocks.0.norm1.weight", "blocks.1.attn.proj.weight"]
    for rule in RULES:
        mask = calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=0.5, names=names)
        assert list(mask) == names
        assert free(mask) == 136


@pytest.mark.parametrize("wrong", [dict(rule="fisher"), dict(sparsity=-0.1), dict(sparsity=1.1),
                                   dict(sparsity=float("nan")), dict(combine="median"),
                                   dict(rounds=0)], ids=str)
def test_an_invalid_option_is_a_value_error(mlp, wrong):
    options = dict(rule="least_sensitive", sparsity=0.5) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        calibrate_mask(mlp, torch.randn(4, 12), **options)


# ---------------------------------------------------------------- calibration rounds
@pytest.mark.parametrize("rule", SENSITIVE)
def test_more_rounds_give_another_mask_of_the_same_density(tiny_vit, images, rule):
    a, b = (calibrate_mask(tiny_vit, images[:8], rule=rule, sparsity=0.9, rounds=r)
            for r in (1, 4))
    assert free(a) == free(b) == 968
    assert overlap(a, b) < 0.999


@pytest.mark.parametrize("rule", SENSITIVE)
def test_rounds_act_through_the_soft_mask_and_the_labels_alone(tiny_vit, images, rule):
    def mask(rounds, **options):
        return calibrate_mask(tiny_vit, images[:8], rule=rule, sparsity=0.9, rounds=rounds,
                              **options)
    given = dict(labels=LABELS[:8])
    assert same(mask(4, soft=1, **given), mask(1, soft=1, **given))
    assert not same(mask(4, soft=0.1, **given), mask(1, soft=0.1, **given))
    assert not same(mask(4, soft=1), mask(1, soft=1))


@pytest.mark.parametrize("rule", SENSITIVE)
def test_what_a_round_freezes_never_returns(tiny_vit, images, monkeypatch, rule):
    honest, cuts = utils.lowest, []
    monkeypatch.setattr(utils, "lowest", lambda *a: (cuts.append(honest(*a)), cuts[-1])[1])
    calibrate_mask(tiny_vit, images[:4], rule=rule, sparsity=0.9, rounds=4)
    assert [int(c.sum()) for c in cuts] == [round(0.1 ** (r / 4) * 9680) for r in (1, 2, 3, 4)]
    assert not any((later & ~earlier).any() for earlier, later in zip(cuts, cuts[1:], strict=False))


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call of `sensitivity` inside `calibrate_mask`."""
    honest, seen = utils.sensitivity, []

    def record(model, images, labels, chunk, weights, names):
        drawn = labels if isinstance(labels, torch.Tensor) else labels.random()
        seen.append((images, drawn, {n: w.clone() for n, w in weights.items()}))
        return honest(model, images, labels, chunk, weights, names)
    monkeypatch.setattr(utils, "sensitivity", record)
    return seen


def test_frozen_weights_are_damped_while_scoring(tiny_vit, images, calls):
    theta = {n: tiny_vit.get_parameter(n).detach() for n in maskable(tiny_vit)}
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
    assert free(mask) == 968


def test_a_share_of_the_clients_scores_drawn_anew_every_round(tiny_vit, images, calls):
    clients = list(images.split(4))
    for seed in (0, 0):
        calibrate_mask(tiny_vit, clients, rule="least_sensitive", sparsity=0.9, seed=seed,
                       participation=0.4)
    scored = [next(k for k, c in enumerate(clients) if c is x) for x, _, _ in calls]
    rounds = [scored[i:i + 3] for i in range(0, 24, 3)]  # round(0.4 * 8) = 3 clients each
    assert all(len(set(r)) == 3 for r in rounds)
    assert len({frozenset(r) for r in rounds[:4]}) > 1
    assert rounds[:4] == rounds[4:]


def test_at_least_one_client_scores(tiny_vit, images, calls):
    calibrate_mask(tiny_vit, list(images.split(4)), rule="least_sensitive", sparsity=0.9, rounds=2,
                   participation=0.01)
    assert len(calls) == 2


# ---------------------------------------------------------------- what masks are made of
def test_the_composition_counts_queries_keys_and_values_apart():
    qkv = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    mask = {"blocks.0.attn.qkv.bias": qkv, "blocks.11.attn.qkv.bias": ~qkv,
            "norm.bias": torch.tensor([True, False, True])}
    assert composition(mask) == {"attn.query.bias": [2, 4], "attn.key.bias": [2, 4],
                                 "attn.value.bias": [2, 4], "norm.bias": [2, 3]}
    del mask["blocks.11.attn.qkv.bias"]
    assert composition(mask) == {"attn.query.bias": [1, 2], "attn.key.bias": [2, 2],
                                 "attn.value.bias": [0, 2], "norm.bias": [2, 3]}


def test_the_composition_adds_up_to_the_mask(tiny_vit):
    mask = calibrate_mask(tiny_vit, [], rule="random", sparsity=0.9)
    counts = composition(mask).values()
    assert [sum(c) for c in zip(*counts, strict=True)] == [968, 9680]


def test_overlap_by_hand():
    a = {"w": torch.tensor([True, True, False, False]), "b": torch.tensor([True])}
    b = {"w": torch.tensor([True, False, True, False]), "b": torch.tensor([True])}
    assert overlap(a, b) == overlap(b, a) == 0.5
    assert overlap(a, a) == 1
    none = {n: torch.zeros_like(c) for n, c in a.items()}
    assert (overlap(a, none), overlap(none, none)) == (0, 1)


# ------------------------------------------------------------------ small enough for paper
def test_a_toy_by_hand():
    """p = 1/2 for both classes: every image adds (x_i / 2)^2, whatever label is drawn."""
    toy = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(toy[0].weight)
    x = torch.tensor([[3.0, 0.1], [-3.0, 0.1], [3.0, -0.1], [-3.0, -0.1]])
    scores = sensitivity(toy, x, sample_labels(toy, x, seed=0))["0.weight"]
    assert torch.allclose(scores, torch.tensor([[9.0, 0.01]] * 2, dtype=torch.float64))
    free = calibrate_mask(toy, x, rule="least_sensitive", sparsity=0.5, rounds=1)["0.weight"]
    assert free.tolist() == [[False, True]] * 2
