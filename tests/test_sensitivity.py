"""The diagonal Fisher information, sample by sample, and labels drawn from the model."""
import numpy as np
import pytest
import timm
import torch
from helpers import same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from notebooks import extension
from utils import maskable, normalize, rng, sensitivity

LABELS = torch.arange(32) * 7 % 100


def per_sample(model, x, labels, names):
    """The definition: one sample at a time, the gradient of log p squared, summed."""
    params = [model.get_parameter(n) for n in names]
    total = [torch.zeros_like(p) for p in params]
    for i in range(len(x)):
        log_p = model(x[i:i + 1]).log_softmax(1)[0, labels[i]]
        for t, g in zip(total, torch.autograd.grad(log_p, params), strict=True):
            t += g.square()
    return dict(zip(names, total, strict=True))


def assert_close(a, b, rtol=1e-9, atol=1e-25):
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------ the definition
def test_sensitivity_is_the_per_sample_loop_on_an_mlp(mlp):
    mlp, x, y = mlp.double(), torch.randn(20, 12).double(), torch.arange(20) % 10
    assert list(maskable(mlp)) == [n for n, _ in mlp.named_parameters()]
    assert_close(sensitivity(mlp, x, y), per_sample(mlp, x, y, maskable(mlp)))


def test_sensitivity_is_the_per_sample_loop_on_a_vit(tiny_vit):
    vit, x = tiny_vit.double(), torch.randn(5, 3, 16, 16).double()
    names = list(maskable(vit))
    ours, loop = (f(vit, x, LABELS[:5], names=names) for f in (sensitivity, per_sample))
    for n in (n for n in names if n.endswith("qkv.bias")):  # the key's is zero up to rounding
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
    log_p = mlp(x).log_softmax(1).gather(1, y[:, None]).sum()
    batch = [g.square() for g in torch.autograd.grad(log_p, list(mlp.parameters()))]
    for ours, squared in zip(sensitivity(mlp, x, y, chunk=20).values(), batch, strict=True):
        assert not torch.allclose(ours, squared, rtol=0.5)


def test_nothing_to_score_is_refused(mlp):
    labels = torch.zeros(2, dtype=torch.int64)
    for images, chunk in ((torch.zeros(2, 12), 0), (torch.zeros(0, 12), 4)):
        with pytest.raises(ValueError, match=f"chunk={chunk} and the number of images"):
            sensitivity(mlp, images, labels[:len(images)], chunk)


@pytest.mark.parametrize("chunk", [1, 3, 32, 100])
def test_the_chunk_changes_nothing(tiny_vit, images, chunk):
    vit, x = tiny_vit.double(), normalize(images, (16, 16)).double()
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


def test_weights_that_require_no_gradient_are_scored_alike(mlp):
    x, y = torch.randn(6, 12), torch.arange(6)
    expected = sensitivity(mlp, x, y)
    assert same(sensitivity(mlp.requires_grad_(False), x, y), expected)


def test_weights_stand_in_for_the_stored_ones(mlp):
    x, y = torch.randn(6, 12), torch.arange(6)
    found = sensitivity(mlp, x, y, weights={"0.weight": 0.1 * mlp[0].weight.detach()})
    assert not torch.allclose(found["0.weight"], sensitivity(mlp, x, y)["0.weight"])
    mlp[0].weight.data.mul_(0.1)
    assert same(found, sensitivity(mlp, x, y))


def test_names_choose_what_is_scored_and_foreign_ones_are_refused(tiny_vit, images):
    names = ["blocks.1.norm1.weight", "blocks.0.mlp.fc1.bias"]
    found, whole = (sensitivity(tiny_vit, images[:4], LABELS[:4], names=n) for n in (names, None))
    assert list(found) == names
    assert list(whole) == list(maskable(tiny_vit))
    assert same(found, {n: whole[n] for n in names})
    for foreign in ("cls_token", "pos_embed", "norm.scale"):
        with pytest.raises((KeyError, AttributeError), match=foreign):
            sensitivity(tiny_vit, images[:4], LABELS[:4], names=[*names, foreign])


def test_maskable_is_every_layer_of_the_backbone_and_nothing_else(tiny_vit):
    outright = {"cls_token", "pos_embed", "head.weight", "head.bias"}
    assert set(maskable(tiny_vit)) == {n for n, _ in tiny_vit.named_parameters()} - outright
    with torch.device("meta"):
        vit = timm.create_model(**utils.ARCHS["vits16"])
    assert sum(w.numel() for w in maskable(vit).values()) == 21_589_632


def test_key_biases_have_no_gradient(tiny_vit, images):
    """The softmax over keys is shift invariant, so that they are always least sensitive."""
    found = sensitivity(tiny_vit, images, rng("labels", 0))["blocks.0.attn.qkv.bias"]
    assert found[16:32].max() < 1e-9 * found[:16].min()


# ------------------------------------------------------------------ labels drawn from the model
P = torch.tensor([0.4, 0.3, 0.15, 0.0, 0.15])


def fixed(p=P):
    """A model that predicts p whatever it sees."""
    model = nn.Sequential(nn.Linear(1, 5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(p.log())
    return model


def label_counts(n, chunk=500, seed=0):
    """How often each label was drawn: F_c = n_c (1 - p_c)^2 + (n - n_c) p_c^2, solved for n_c."""
    found = sensitivity(fixed(), torch.zeros(n, 1), rng("labels", seed), chunk)["0.bias"]
    return (found - n * P.double()**2) / (1 - 2 * P.double())


def test_labels_are_drawn_from_the_models_own_distribution():
    n = 20_000
    seen, expected = label_counts(n), n * P.double()
    assert seen.sum().item() == pytest.approx(n, rel=1e-4)
    assert seen[3].abs() < 0.1  # what has no chance is never drawn
    chi_square = ((seen - expected).square() / expected)[P > 0].sum()
    assert chi_square < 16.3  # three degrees of freedom, p = 0.001


def test_a_label_is_a_class_where_probabilities_add_up_to_less_than_one():
    class AlmostOne:
        def random(self, shape):
            return np.full(shape, 1 - 1e-12)
    log_p = torch.tensor([[0.5, 0.4999]]).log()
    assert utils._draw_labels(log_p, AlmostOne()).tolist() == [1]


def test_the_generator_alone_draws_the_labels():
    a, again, in_parts, other = (label_counts(1000, chunk, seed)
                                 for chunk, seed in ((500, 0), (500, 0), (7, 0), (500, 1)))
    assert torch.equal(a, again)
    torch.testing.assert_close(a, in_parts, rtol=0, atol=0.1)
    assert not torch.allclose(a, other, rtol=0, atol=0.5)


def test_a_toy_by_hand():
    """p = 1/2 for both classes: every image adds (x_i / 2)^2, whatever label is drawn."""
    toy = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(toy[0].weight)
    x = torch.tensor([[3.0, 0.1], [-3.0, 0.1], [3.0, -0.1], [-3.0, -0.1]])
    scores = sensitivity(toy, x, rng("labels", 0))["0.weight"]
    assert torch.allclose(scores, torch.tensor([[9.0, 0.01]] * 2, dtype=torch.float64))
    mask = utils.calibrate_mask(toy, x, rule="least_sensitive", sparsity=0.5, rounds=1)["0.weight"]
    assert mask.tolist() == [[False, True]] * 2


# ------------------------------------------------------------------ a device without float64
class NoDoubles(TorchDispatchMode):
    """The CPU as a device without float64, such as Apple's GPUs; "meta" stands for the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert tensor.device.type == "meta", f"{function} needs float64"
        return result


@pytest.mark.parametrize("number", [4, 13])
def test_labels_must_be_as_many_as_images(mlp, number):
    with pytest.raises(ValueError, match=f"8 images have {number} labels"):
        sensitivity(mlp, torch.randn(8, 12), torch.zeros(number, dtype=torch.long), chunk=4)


def test_float64_is_only_used_where_it_can_be(monkeypatch, mlp):
    monkeypatch.setattr(utils, "precise_device", lambda tensor: torch.device("meta"))
    x, y = torch.randn(6, 12), torch.arange(6)
    with NoDoubles():
        found = sensitivity(mlp, x, y)
        sums = utils.feature_sums(x, y, 10)
    assert {s.device.type for s in [*found.values(), *sums.values()]} == {"meta"}


def test_diagnostics_use_float64_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(extension, "precise_device", lambda tensor: torch.device("meta"))
    with NoDoubles():
        sums = extension.in_float64(torch.tensor([1, 2]))
        means = extension.weighted_mean(extension.in_float64(torch.ones(2, 3)),
                                        extension.in_float64(torch.ones(2, 3)))
    assert {sums.device.type, means.device.type} == {"meta"}
    # what calls it sums in float64 by it alone
    monkeypatch.setattr(extension, "in_float64", lambda values: values.float())
    owned = torch.eye(2, dtype=torch.bool)
    with NoDoubles():
        extension.damage_over_gain(torch.ones(2, 2), owned.int(), torch.ones(2))
        extension.foreign_damage(torch.ones(2, 2), owned.int(), torch.ones(2))
        extension.disentanglement_error(owned, owned[0], owned)
        extension.localization_error(owned, owned[0], owned)


def test_on_apples_gpus_float64_is_kept_on_the_cpu():
    class Tensor:
        device = torch.device("mps")
    assert utils.precise_device(Tensor()) == torch.device("cpu")
    assert utils.precise_device(torch.ones(1, device="meta")) == torch.device("meta")
