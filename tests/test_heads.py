"""Heads on frozen features: closed forms and logistic regression, pooled and from clients' sums."""
from dataclasses import replace

import pytest
import torch
from torch import nn

import utils
from utils import Config, build_model, extract_features, feature_sums, preset

HEAD = ("head.weight", "head.bias")
SIZES = [5, 120, 1, 74]  # of four clients



def as_parts(x, y, sizes=SIZES):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.fixture
def features():
    """200 features of ten classes, far from standardised."""
    y = torch.arange(200) % 10
    x = torch.randn(10, 6)[y] + torch.randn(200, 6)
    return 3 + x * torch.tensor([1.0, 10, 0.3, 1, 1, 5]), y


def logits(head, x):
    return x.to(head["head.weight"].dtype) @ head["head.weight"].T + head["head.bias"]


def accuracy(head, x, y):
    return (logits(head, x).argmax(1) == y).double().mean().item()


# ------------------------------------------------------------------ features
def test_the_head_on_the_features_is_the_model(tiny_vit, images):
    x = extract_features(tiny_vit.train(), images, batch=5)
    assert x.shape == (32, 16)
    with torch.no_grad():
        whole = tiny_vit.eval()(utils.normalize(images, (16, 16)))
        torch.testing.assert_close(tiny_vit.head(x), whole)


# ------------------------------------------------------------------ ridge regression
def test_ridge_by_hand():
    # X'X = diag(2, 2) with the free bias, X'Y = [[1, -1], [1, 1]], so w = 1 / (2 + 2), b = 1 / 2
    sums = feature_sums(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 2)
    head = utils.ridge_head(sums, l2=2.0)
    assert head["head.weight"].tolist() == [[0.25], [-0.25]]
    assert head["head.bias"].tolist() == [0.5, 0.5]


def test_ridge_minimises_its_loss_with_a_free_bias(features):
    x, y = features
    head = utils.ridge_head(feature_sums(x, y, 10), 0.7)
    head = {n: w.requires_grad_() for n, w in head.items()}
    error = logits(head, x) - nn.functional.one_hot(y, 10)
    loss = error.square().sum() + 0.7 * head["head.weight"].square().sum()
    for slope in torch.autograd.grad(loss, list(head.values())):
        assert slope.abs().max() < 1e-8


# ------------------------------------------------------------------ discriminant analysis
def test_lda_by_hand():
    """Classes at -1 and 3 with a spread of 1 each: S = 1, W = mu, b = log(1/2) - mu^2 / 2."""
    x = torch.tensor([[-2.0], [0.0], [2.0], [4.0]])
    head = utils.lda_head(feature_sums(x, torch.tensor([0, 0, 1, 1]), 2))
    torch.testing.assert_close(head["head.weight"].flatten(), torch.tensor([-1.0, 3]).double(),
                               rtol=1e-5, atol=0)
    expected = torch.tensor(0.5).log() - torch.tensor([0.5, 4.5])
    torch.testing.assert_close(head["head.bias"], expected.double(), rtol=1e-5, atol=0)


def test_lda_is_its_formula_written_out(features):
    x = (features[0] - 3).double()[:177]  # classes of unequal size
    y = features[1][:177]
    within = torch.zeros(6, 6).double()
    means = []
    for c in range(10):
        own = x[y == c]
        means.append(own.mean(0))
        within += (own - means[c]).T @ (own - means[c]) / len(x)
    inverse = torch.linalg.inv(within)
    head = utils.lda_head(feature_sums(x, y, 10))
    for c in range(10):
        share = (y == c).double().mean()
        bias = share.log() - means[c] @ inverse @ means[c] / 2
        torch.testing.assert_close(head["head.weight"][c], inverse @ means[c], rtol=0.01, atol=0.01)
        torch.testing.assert_close(head["head.bias"][c], bias, rtol=0.01, atol=0.01)


def test_lda_never_predicts_a_class_without_images_and_stands_dependent_features(features):
    x, y = features
    x = torch.cat([x, x[:, :1]], 1)  # the covariance is singular
    head = utils.lda_head(feature_sums(x, y, 12))
    assert set(logits(head, x).argmax(1).tolist()) <= set(range(10))
    assert accuracy(head, x, y) > 0.5


# ------------------------------------------------------------------ logistic regression
def objective(head, x, y, l2):
    """Of the weights for standardised features."""
    std = x.double().std(0, correction=0)
    loss = nn.functional.cross_entropy(logits(head, x), y, reduction="sum")
    return loss + l2 / 2 * (head["head.weight"] * std).square().sum()


@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
def test_the_logistic_head_minimises_its_objective(features, l2):
    x, y = features
    head = utils.logistic_head([(x, y)], 10, l2)
    best = objective(head, x, y, l2).item()
    for _ in range(20):
        nudged = {n: w + 1e-2 * torch.randn_like(w) for n, w in head.items()}
        assert objective(nudged, x, y, l2).item() > best
    leaves = {n: w.requires_grad_() for n, w in head.items()}
    slope = torch.autograd.grad(objective(leaves, x, y, l2), leaves["head.bias"])[0]
    assert slope.abs().max() / len(x) < 2e-3  # the tolerance of the mean loss's gradient


def test_a_larger_penalty_gives_smaller_weights(features):
    sizes = [utils.logistic_head([features], 10, l2)["head.weight"].norm() for l2 in (0.1, 1, 10)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_features_that_are_not_finite_are_refused(features):
    x, y = features
    for kind in ("ridge", "lda", "logistic"):
        with pytest.raises(ValueError, match="features"):
            utils.fit_head(kind, [(x * float("nan"), y)], 10, 1.0)


# ------------------------------------------------------------------ in federation
@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_closed_forms_from_clients_sums_are_the_pooled_ones(features, kind):
    x, y = features
    apart = utils.fit_head(kind, as_parts(x, y), 10, 1.0)
    together = utils.fit_head(kind, [(x, y)], 10, 1.0)
    for n in HEAD:
        assert together[n].dtype == torch.float32
        torch.testing.assert_close(apart[n], together[n], rtol=1e-6, atol=1e-6)


def test_a_logistic_head_from_clients_gradients_is_as_good_as_the_pooled_one(features):
    x, y = features
    order = y.argsort()  # most clients lack most classes
    apart = utils.fit_head("logistic", as_parts(x[order], y[order]), 10, 1.0)
    together = utils.fit_head("logistic", [(x, y)], 10, 1.0)
    assert accuracy(apart, x, y) == pytest.approx(accuracy(together, x, y), abs=0.001)
    for n in HEAD:
        torch.testing.assert_close(apart[n], together[n], rtol=1e-2, atol=1e-2)


def test_sums_of_clients_add_up(features):
    x, y = features
    total = utils.pooled_sums(as_parts(x, y), 10)
    pooled = feature_sums(x, y, 10)
    torch.testing.assert_close(total["gram"], pooled["gram"], rtol=1e-12, atol=0)
    torch.testing.assert_close(total["target"], pooled["target"], rtol=1e-12, atol=1e-9)
    assert total["target"][-1].tolist() == [20.0] * 10  # the classes are counted


# ------------------------------------------------------------------ the scale of the logits
def test_scaling_lowers_the_loss_and_changes_no_prediction():
    y = torch.arange(10).repeat(20)
    x = torch.eye(10)[y] + 0.3 * torch.randn(200, 10)
    head = utils.ridge_head(feature_sums(x, y, 10), 1.0)
    scaled = utils.fit_logit_scale(head, x, y)
    factors = torch.cat([(scaled[n] / head[n]).flatten() for n in HEAD])
    assert factors.unique().numel() == 1
    assert factors[0] > 1
    loss = nn.functional.cross_entropy
    assert loss(logits(scaled, x), y) < 0.8 * loss(logits(head, x), y)
    for worse in (0.5, 2):
        assert loss(logits(scaled, x), y) <= loss(worse * logits(scaled, x), y)


def test_scaling_stops_where_nothing_would_be_left_to_learn():
    """Features that fit perfectly like ever larger factors, under which the first step explodes."""
    y = torch.arange(10).repeat(20)
    x = torch.eye(10)[y]
    scaled = utils.fit_logit_scale(utils.ridge_head(feature_sums(x, y, 10), 1.0), x, y)

    def left(h):  # to the other classes, on average
        p = logits(h, x).softmax(1)
        return 1 - p[torch.arange(200), y].mean().item()
    assert left(scaled) >= 0.1
    assert left({n: 2 * w for n, w in scaled.items()}) < 0.1


# ------------------------------------------------------------------ the real backbone
def test_the_stored_backbone_is_a_good_one():
    """Wrong or absent weights would pass every other test; on real images chance is 1 %."""
    if not (utils.data_folder() / "cifar-100-python").is_dir():
        pytest.skip("CIFAR-100 is not stored here")
    cfg = preset("small")
    data = utils.load_data(cfg)
    train, val = data.train[::30], data.val[::10]

    def score(model):
        x = extract_features(model, data.images[train])
        head = utils.fit_head("lda", [(x, data.labels[train])], 100, cfg.head_l2)
        return accuracy(head, extract_features(model, data.images[val]), data.labels[val])
    assert score(build_model(cfg)) > 0.15
    assert score(build_model(replace(cfg, weights="none"))) < 0.1


def test_a_head_starts_every_kind_of_run(tmp_path, monkeypatch):
    from helpers import CFG, make_small
    make_small(monkeypatch)
    for kind in ("logistic", "lda", "ridge"):
        cfg = replace(CFG, head=kind)
        store = utils.Store(tmp_path)
        dense, sparse, central = (utils.open_run(c, store)[0].model for c in (
            cfg, replace(cfg, rule="random"), replace(cfg, algorithm="centralized")))
        data = utils.load_data(cfg)
        model = build_model(cfg)
        x, y = extract_features(model, data.images[data.train]), data.labels[data.train]
        expected = utils.fit_head(kind, [(x, y)], 100, cfg.head_l2)
        for n in HEAD:
            torch.testing.assert_close(dense.get_parameter(n), expected[n], rtol=1e-4, atol=1e-5)
            assert torch.equal(dense.get_parameter(n), sparse.get_parameter(n))
            assert torch.equal(dense.get_parameter(n), central.get_parameter(n))
        assert accuracy(expected, x, y) > 0.3  # chance is 0.05
    assert Config().head == "logistic"
