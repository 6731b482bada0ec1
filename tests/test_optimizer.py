import copy

import pytest
import torch

from utils import SparseSGDM

SETTINGS = [dict(momentum=0.0), dict(), dict(weight_decay=1e-2), dict(nesterov=True),
            dict(weight_decay=1e-2, nesterov=True), dict(weight_decay=1e-2, dampening=0.5),
            dict(momentum=0.0, weight_decay=1e-2)]


def gradients(model, steps=20):
    return [[torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]


def stepped(model, optimizer, grads):
    for step in grads:
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(model, grads, kind, **settings):
    """The weights after these gradients, from the same start."""
    model = copy.deepcopy(model)
    params = model.parameters() if kind is torch.optim.SGD else model.named_parameters()
    return stepped(model, kind(params, **(dict(lr=0.1, momentum=0.9) | settings)), grads)


def bits(tensor):
    return tensor.view(torch.int32)


def half(model):
    return {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ones", [None, torch.bool, torch.float32])
def test_without_a_mask_or_with_ones_it_is_bitwise_torch_sgd(mlp, settings, ones):
    mask = None if ones is None else {
        n: torch.ones_like(p, dtype=ones) for n, p in mlp.named_parameters()}
    grads = gradients(mlp)
    ours = trained(mlp, grads, SparseSGDM, mask=mask, **settings)
    torchs = trained(mlp, grads, torch.optim.SGD, **settings)
    assert all(torch.equal(bits(ours[n]), bits(torchs[n])) for n in torchs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frozen_entries_never_move(mlp, settings):
    mask, start = half(mlp), {n: p.detach().clone() for n, p in mlp.named_parameters()}
    ours = trained(mlp, gradients(mlp), SparseSGDM, mask=mask, **settings)
    for n, c in mask.items():
        assert torch.equal(bits(ours[n])[~c], bits(start[n])[~c])
        assert (ours[n][c] != start[n][c]).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_free_entries_move_as_under_plain_sgd(mlp, settings):
    mask, grads = half(mlp), gradients(mlp)
    ours = trained(mlp, grads, SparseSGDM, mask=mask, **settings)
    plain = trained(mlp, grads, torch.optim.SGD, **settings)
    assert all(torch.equal(bits(ours[n])[c], bits(plain[n])[c]) for n, c in mask.items())


def test_two_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = SparseSGDM([("p", p)], lr=0.1, momentum=0.5, weight_decay=0.1,
                     mask={"p": torch.tensor([True, False])})
    for expected in (0.89, 0.7261):  # g = 1.1, b = 1.1; g = 1.089, b = 0.5 * 1.1 + 1.089 = 1.639
        p.grad = torch.ones(2)
        opt.step()
        assert p[0].item() == pytest.approx(expected, abs=1e-6)
        assert p[1].item() == 2


def test_a_fresh_optimizer_has_no_momentum(mlp):
    mask, (first, second) = half(mlp), gradients(mlp, 2)

    def optimizer(model):
        return SparseSGDM(model.named_parameters(), lr=0.1, mask=mask)

    once = copy.deepcopy(mlp)
    stepped(once, optimizer(once), [first])
    fresh, plain = copy.deepcopy(once), copy.deepcopy(once)
    stepped(fresh, optimizer(fresh), [second])
    stepped(plain, SparseSGDM(plain.named_parameters(), 0.1, momentum=0.0, mask=mask), [second])
    carried = trained(mlp, [first, second], SparseSGDM, mask=mask)
    for n, p in fresh.named_parameters():
        assert torch.equal(p, plain.get_parameter(n))
        assert not torch.equal(p, carried[n])


def test_a_parameter_without_a_gradient_stays(mlp):
    start = mlp[0].weight.detach().clone()
    opt = SparseSGDM(mlp.named_parameters(), 0.1, weight_decay=0.1, mask=half(mlp))
    mlp[3](torch.randn(4, 16)).square().sum().backward()
    opt.step()
    assert torch.equal(mlp[0].weight, start)


def test_a_parameter_that_the_mask_does_not_name_is_a_key_error(mlp):
    mask = half(mlp)
    del mask["1.bias"]
    with pytest.raises(KeyError, match="1.bias"):
        SparseSGDM(mlp.named_parameters(), 0.1, mask=mask)
    with pytest.raises(KeyError):
        SparseSGDM(mlp.named_parameters(), 0.1, mask={})
    mlp[1].bias.requires_grad_(False)  # nothing to mask then
    SparseSGDM(mlp.named_parameters(), 0.1, mask=mask)


def test_a_mask_of_a_foreign_parameter_is_a_key_error(mlp):
    with pytest.raises(KeyError, match="only one of mask and weights has .'foreign'"):
        SparseSGDM(mlp.named_parameters(), 0.1, mask=half(mlp) | {"foreign": torch.ones(1)})


def test_a_mask_of_another_shape_is_a_value_error_that_names_both(mlp):
    for wrong in (torch.ones(16, 1), torch.ones(12), torch.tensor(1.0)):  # all would broadcast
        with pytest.raises(ValueError, match=r"0\.weight.*\(16, 12\)"):
            SparseSGDM(mlp.named_parameters(), 0.1, mask=half(mlp) | {"0.weight": wrong})


# ------------------------------------------------------------------ frozen means frozen
@pytest.mark.parametrize("nesterov", [False, True])
def test_frozen_entries_stay_after_the_state_of_a_dense_optimizer_is_loaded(mlp, nesterov):
    mask = half(mlp)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    dense = torch.optim.SGD(mlp.parameters(), **settings)
    stepped(mlp, dense, gradients(mlp, 3))
    start = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    sparse = SparseSGDM(mlp.named_parameters(), **settings, mask=mask)
    sparse.load_state_dict(dense.state_dict())
    after = stepped(mlp, sparse, gradients(mlp, 3))
    for n, c in mask.items():
        assert torch.equal(bits(after[n])[~c], bits(start[n])[~c])
        assert (after[n][c] != start[n][c]).all()


def test_trainable_entries_keep_the_momentum_that_is_loaded(mlp):
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in mlp.named_parameters()}
    grads = gradients(mlp, 6)
    whole = trained(mlp, grads, SparseSGDM, mask=mask)
    first = SparseSGDM(mlp.named_parameters(), 0.1, mask=mask)
    stepped(mlp, first, grads[:3])
    second = SparseSGDM(mlp.named_parameters(), 0.1, mask=mask)
    second.load_state_dict(first.state_dict())
    after = stepped(mlp, second, grads[3:])
    assert all(torch.equal(after[n], whole[n]) for n in whole)


def test_frozen_entries_stay_under_a_decay_set_in_the_parameter_groups(mlp):
    mask = half(mlp)
    start = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    optimizer = SparseSGDM(mlp.named_parameters(), 0.1, mask=mask)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    grads = gradients(mlp, 3)
    after = stepped(mlp, optimizer, grads)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    mlp.load_state_dict(start)
    decayed = stepped(mlp, torch.optim.SGD(mlp.parameters(), 0.1, 0.9, weight_decay=0.1), grads)
    for n, c in mask.items():
        assert torch.equal(bits(after[n])[~c], bits(start[n])[~c])
        assert torch.equal(bits(after[n])[c], bits(decayed[n])[c])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_moves_no_frozen_weight(mlp, bad):
    mask = half(mlp)
    start = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    optimizer = SparseSGDM(mlp.named_parameters(), 0.1, weight_decay=0.1, mask=mask)
    for n, p in mlp.named_parameters():
        p.grad = torch.where(mask[n], torch.ones_like(p), bad)
    optimizer.step()
    for n, p in mlp.named_parameters():
        assert torch.equal(p[~mask[n]], start[n][~mask[n]])
        assert p.isfinite().all()


def test_a_gradient_that_is_not_finite_is_not_hidden_in_trainable_weights(mlp):
    ones = {n: torch.ones_like(p, dtype=torch.bool) for n, p in mlp.named_parameters()}
    optimizer = SparseSGDM(mlp.named_parameters(), 0.1, mask=ones)
    for p in mlp.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(p.isnan().all() for p in mlp.parameters())


def test_a_closure_is_called_and_its_loss_returned(mlp):
    optimizer = SparseSGDM(mlp.named_parameters(), 0.1, mask=half(mlp))
    x = torch.randn(4, 12)
    start = mlp[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = mlp(x).square().mean()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(mlp[0].weight, start)
