"""Federated averaging: rounds, clients, servers and the centralised epoch, by hand."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import half_mask, one_client, rounds, same, small_run
from torch import nn

import utils
from utils import Config, SparseSGDM, add, cohort, federated_round, scale, task_vector

CFG = Config(num_clients=4, participation=1.0, local_steps=3, batch_size=4, lr=0.1, num_rounds=10,
             schedule="constant")
LINEAR = dict(schedule="constant", momentum=0.0, weight_decay=0.0, local_steps=1, batch_size=10)
SERVERS = ("average", "fedexp", "momentum", "adam")


@pytest.fixture
def plain(monkeypatch):
    """Images as they are, so that a hand can follow the gradients."""
    monkeypatch.setattr(utils, "augment", lambda images, draw: images)


def linear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    return model


def gradient(model, params, x, y):
    """Of the mean cross-entropy at `params`, by name."""
    leaves = {n: w.clone().requires_grad_() for n, w in params.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def close(a, b, tol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=tol) for n in a)


def fake_clients(monkeypatch, *vectors):
    """Client k moves by vectors[k], a number for every entry, or weights; its loss is 1 + k."""
    def update(run, state, k, lr):
        v = vectors[k]
        run.load({n: w + (v[n] if isinstance(v, dict) else v) for n, w in state.params.items()})
        return torch.tensor(1.0 + k)
    monkeypatch.setattr(utils, "client_update", update)


def moved(run, start, n=1):
    """What `n` rounds add to every weight, when all entries move alike."""
    after = rounds(run, start, n)
    values = torch.cat([(after.params[k] - w).flatten() for k, w in start.params.items()])
    torch.testing.assert_close(values, values[:1].expand_as(values), atol=1e-5, rtol=0)
    return values[0].item()


# ------------------------------------------------------------------ cohort and aggregation
def test_the_aggregate_is_the_mean_weighted_by_shard_sizes(monkeypatch):
    run, start = small_run(replace(CFG, num_clients=3), [range(1), range(1, 4), range(4, 10)])
    fake_clients(monkeypatch, 1.0, 2.0, -3.0)
    assert moved(run, start) == pytest.approx((1 * 1 + 3 * 2 + 6 * -3) / 10, abs=1e-6)


def test_weights_of_the_aggregate_count_only_the_cohort(monkeypatch):
    run, start = small_run(replace(CFG, participation=0.5), [range(2), range(2, 8), range(8, 9),
                                                             range(9, 20)])
    fake_clients(monkeypatch, 1.0, 2.0, 4.0, 8.0)
    chosen = cohort(4, 0.5, "cohort", 0, 0)
    sizes = np.array([2, 6, 1, 11])[chosen]
    expected = (sizes * 2.0 ** chosen).sum() / sizes.sum()
    assert moved(run, start) == pytest.approx(expected, abs=1e-5)


def test_the_round_trains_the_cohort_of_its_seed_and_round(monkeypatch):
    cfg, asked = replace(CFG, num_clients=10, participation=0.3, seed=5), []
    fake = lambda run, state, k, lr: (asked.append((state.round, k)),  # noqa: E731
                                      torch.tensor(0.0))[1]
    monkeypatch.setattr(utils, "client_update", fake)
    rounds(*small_run(cfg), 3)
    assert asked == [(t, k) for t in range(3) for k in cohort(10, 0.3, "cohort", 5, t).tolist()]


@pytest.mark.parametrize(("clients", "share", "size"),
                         [(100, 0.1, 10), (10, 0.26, 3), (10, 0.24, 2), (5, 0.01, 1), (4, 1.0, 4)])
def test_a_cohort_has_max_1_round_CK_different_clients(clients, share, size):
    for t in range(20):
        chosen = cohort(clients, share, "cohort", 0, t).tolist()
        assert len(chosen) == len(set(chosen)) == size
        assert set(chosen) <= set(range(clients))


def test_cohorts_differ_by_round_and_seed_and_repeat_for_the_same():
    draw = lambda seed, t: tuple(cohort(100, 0.1, "cohort", seed, t))  # noqa: E731
    drawn = [draw(s, t) for s in range(4) for t in range(20)]
    np.random.seed(1)  # noqa: NPY002  no global generator has a say
    assert drawn == [draw(s, t) for s in range(4) for t in range(20)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("change", [dict(lr=0.2), dict(local_steps=7), dict(batch_size=2),
                                    dict(algorithm="scaffold"), dict(server="adam")])
def test_the_cohort_depends_on_nothing_but_seed_and_round(monkeypatch, change):
    seen = {}
    for label, cfg in (("base", CFG), ("changed", replace(CFG, **change))):
        run, state = small_run(replace(cfg, num_clients=10, participation=0.3))
        honest = utils.client_update
        with monkeypatch.context() as patch:
            patch.setattr(utils, "client_update", lambda run, s, k, lr:
                          (seen.setdefault(label, []).append((s.round, k)),
                           honest(run, s, k, lr))[1])
            rounds(run, state, 3)
    assert seen["base"] == seen["changed"]
    assert len(seen["base"]) == 9


# ------------------------------------------------------------------ clients
@pytest.mark.parametrize("steps", [0, 1, 5, 20])
def test_J_counts_steps_not_epochs(monkeypatch, steps):
    run, start = small_run(replace(CFG, local_steps=steps))
    honest, sizes = utils.sgd_step, []
    monkeypatch.setattr(utils, "sgd_step", lambda run, opt, x, y, adjust=None:
                        (sizes.append(len(x)), honest(run, opt, x, y, adjust))[1])
    vector, loss = one_client(run, start, 0, 0.1)
    assert sizes == [4] * steps
    assert (loss == 0) == (steps == 0) == all((v == 0).all() for v in vector.values())


def seen_images(monkeypatch, cfg, shard_size):
    """Indices in the order client 0 trains on them, batch by batch."""
    run, start = small_run(cfg, [range(shard_size)] * cfg.num_clients)
    seen, where = [], {row.sum().item(): i for i, row in enumerate(run.data.images)}
    monkeypatch.setattr(utils, "augment", lambda images, draw:
                        (seen.append([where[row.sum().item()] for row in images]), images)[1])
    utils.client_update(run, start, 0, 0.1)
    return seen


@pytest.mark.parametrize("size", [3, 4, 10])
def test_a_client_sees_each_image_once_before_any_repeats(monkeypatch, size):
    seen = seen_images(monkeypatch, replace(CFG, local_steps=9), size)
    order = np.concatenate(seen)
    passes = [order[i:i + size].tolist() for i in range(0, len(order) - size + 1, size)]
    assert all(sorted(p) == list(range(size)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1, "never reshuffled"
    assert [len(b) for b in seen] == [4] * 9


def test_a_shard_smaller_than_a_batch_fills_it(monkeypatch):
    assert [len(b) for b in seen_images(monkeypatch, replace(CFG, batch_size=8), 3)] == [8] * 3


def test_a_client_trains_on_its_own_shard(monkeypatch):
    run, start = small_run(CFG, [[0, 1], [7, 9, 11], [2], [3]])
    seen, honest = [], utils.batches
    monkeypatch.setattr(utils, "batches", lambda run, order, draw:
                        (seen.append(set(order.tolist())), honest(run, order, draw))[1])
    federated_round(run, start)
    assert sorted(map(sorted, seen)) == [[0, 1], [2], [3], [7, 9, 11]]


def test_batches_differ_between_rounds_and_clients(monkeypatch):
    run, start = small_run(CFG, [range(30)] * 4)
    seen, honest = [], utils.batches
    monkeypatch.setattr(utils, "batches", lambda run, order, draw:
                        (seen.append(tuple(order)), honest(run, order, draw))[1])
    rounds(run, start, 3)
    assert len(set(seen)) == len(seen) == 12


def test_every_client_starts_from_the_servers_weights(monkeypatch):
    run, start = small_run(CFG)
    seen = []
    monkeypatch.setattr(utils, "sgd_step", lambda run, opt, x, y, adjust=None:
                        (seen.append({n: p.detach().clone() for n, p in run.trained.items()}),
                         [p.data.add_(1.0) for p in run.trained.values()], torch.tensor(0.0))[2])
    rounds(run, start, 1)
    firsts, seconds = seen[::CFG.local_steps], seen[1::CFG.local_steps]
    assert len(firsts) == len(cohort(CFG.num_clients, CFG.participation, "cohort", 0, 0)) > 1
    assert all(same(first, start.params) for first in firsts)
    assert not any(same(second, start.params) for second in seconds)


def test_the_model_holds_the_servers_weights_again_after_a_client():
    run, start = small_run(CFG)
    one_client(run, start, 0, 0.1)
    mean = {n: torch.ones_like(w) for n, w in start.params.items()}
    vector = run.vector(start.params)
    square = utils.collect(run, start.params, mean, 0.25)
    assert same({n: p.detach() for n, p in run.trained.items()}, start.params)
    assert close(mean, {n: 1 + 0.25 * v for n, v in vector.items()})
    assert square == pytest.approx(sum(v.square().sum().item() for v in vector.values()), rel=1e-5)
    assert square > 0


def test_every_client_starts_with_a_fresh_momentum_buffer(monkeypatch):
    run, start = small_run(CFG)
    buffers, honest = [], utils.sgd_step
    monkeypatch.setattr(utils, "sgd_step", lambda run, opt, x, y, adjust=None:
                        (buffers.append(len(opt.state)), honest(run, opt, x, y, adjust))[1])
    rounds(run, start, 2)
    assert buffers == [0, 4, 4] * 4 * 2


def test_a_clients_vector_does_not_depend_on_who_came_before():
    run, start = small_run(CFG)
    alone = one_client(run, start, 1, 0.1)[0]
    one_client(run, start, 3, 0.1)
    assert same(alone, one_client(run, start, 1, 0.1)[0])


def test_local_steps_are_torch_sgd_with_momentum_and_decay(plain):
    run, start = small_run(replace(CFG, weight_decay=0.01, local_steps=6), [range(7)] * 4)
    vector, loss = one_client(run, start, 2, 0.1)
    draw = utils.rng("client", 0, 0, 2)
    order = np.concatenate([draw.permutation(np.arange(7)) for _ in range(4)])[:24]
    run.load(start.params)
    opt, losses = torch.optim.SGD(run.model.parameters(), 0.1, 0.9, weight_decay=0.01), []
    for i in torch.from_numpy(order).split(4):
        opt.zero_grad()
        losses.append(F.cross_entropy(run.model(run.data.images[i]), run.data.labels[i]))
        losses[-1].backward()
        opt.step()
    assert close(vector, task_vector({n: p.detach() for n, p in run.trained.items()},
                                     start.params))
    assert loss.item() == pytest.approx(sum(losses).item() / 6, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "warmup_cosine"])
def test_the_rate_is_a_function_of_the_round_only(monkeypatch, schedule):
    rates = []
    for steps, share in ((1, 1.0), (8, 0.5)):
        run, state = small_run(replace(CFG, schedule=schedule, local_steps=steps,
                                       participation=share))
        used, honest = {}, utils.sgd_step
        with monkeypatch.context() as patch:
            patch.setattr(utils, "sgd_step", lambda run, opt, x, y, adjust=None: (
                used.setdefault(state.round, set()).add(opt.param_groups[0]["lr"]),
                honest(run, opt, x, y, adjust))[1])
            for _ in range(4):
                state = federated_round(run, state)
        assert all(len(u) == 1 for u in used.values())
        rates.append([u.pop() for u in used.values()])
        assert rates[-1] == [row["lr"] for row in state.history]
    assert rates[0] == rates[1] == [utils.learning_rate(run.cfg, t / 10) for t in range(4)]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_round_leaves_its_input_alone(algorithm, server):
    run, start = small_run(replace(CFG, algorithm=algorithm, server=server, server_lr=0.1))
    state = rounds(run, start, 2)
    groups = {"params": state.params, **state.memory}
    before = {g: {n: w.clone() for n, w in p.items()} for g, p in groups.items()}
    history = [dict(row) for row in state.history]
    first = federated_round(run, state)
    assert all(same(groups[g], before[g]) for g in groups)
    assert {"params", *state.memory} == before.keys()
    assert list(state.history) == history
    assert state.round == 2
    again = federated_round(run, state)
    assert same(first.params, again.params)
    assert first.history == again.history


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("server", SERVERS)
def test_frozen_entries_keep_their_bits_and_free_ones_move(algorithm, server):
    cfg = replace(CFG, algorithm=algorithm, server=server, server_lr=0.1, weight_decay=0.1,
                  prox_mu=0.5)
    dense, start = small_run(cfg)
    mask = half_mask(dense)
    after = rounds(small_run(cfg, mask=mask)[0], start, 3).params
    full = rounds(dense, start, 3).params
    for n, w in start.params.items():
        assert torch.equal(after[n][~mask[n]], w[~mask[n]])
        assert (after[n][mask[n]] != w[mask[n]]).all()
        assert not torch.equal(after[n][mask[n]], full[n][mask[n]])


def test_frozen_entries_keep_their_bits_in_an_epoch():
    cfg = replace(CFG, algorithm="centralized", weight_decay=0.1)
    run, start = small_run(cfg)
    mask = half_mask(run)
    state = utils.centralized_epoch(small_run(cfg, mask=mask)[0], start)
    state = utils.centralized_epoch(small_run(cfg, mask=mask)[0], state)
    for n, w in start.params.items():
        assert torch.equal(state.params[n][~mask[n]], w[~mask[n]])
        assert (state.params[n][mask[n]] != w[mask[n]]).all()


# ------------------------------------------------------------------ FedProx, FedExP
def test_fedprox_with_mu_0_is_fedavg():
    avg, prox = (rounds(*small_run(replace(CFG, algorithm=a, prox_mu=0.0)), 3)
                 for a in ("fedavg", "fedprox"))
    assert same(avg.params, prox.params)


def test_fedprox_pulls_each_local_step_towards_the_server(plain):
    cfg = Config(algorithm="fedprox", prox_mu=0.7, num_clients=1, **LINEAR | dict(local_steps=2))
    run, start = small_run(cfg, [range(10)], model=linear())
    vector = one_client(run, start, 0, 0.5)[0]
    x, y, w = run.data.images[:10], run.data.labels[:10], start.params
    w1 = add(w, scale(gradient(run.model, w, x, y), -0.5))
    pulled = add(gradient(run.model, w1, x, y), scale(task_vector(w1, w), 0.7))
    assert close(vector, task_vector(add(w1, scale(pulled, -0.5)), w))


def test_fedexp_extrapolates_by_the_mean_square_over_twice_the_squared_mean(monkeypatch):
    run, start = small_run(replace(CFG, server="fedexp"), [range(5)] * 4)
    fake_clients(monkeypatch, 4.0, -3.0, 2.0, -2.0)  # mean 0.25, mean square 8.25
    eta = 8.25 / (2 * 0.25**2)
    assert moved(run, start) == pytest.approx(eta * 0.25, rel=1e-4)
    assert federated_round(run, start).history[0]["fedexp_step"] == pytest.approx(eta, rel=1e-4)


def test_fedexp_never_steps_shorter_than_fedavg(monkeypatch):
    fake_clients(monkeypatch, 1.0, 1.1, 0.9, 1.0)  # they agree: the formula gives about 0.5
    avg, exp = (federated_round(*small_run(replace(CFG, server=s))) for s in SERVERS[:2])
    assert same(avg.params, exp.params)


# ------------------------------------------------------------------ server optimizers
def test_server_momentum_0_at_rate_1_is_fedavg():
    plain = rounds(*small_run(CFG), 3).params
    same_ = rounds(*small_run(replace(CFG, server="momentum", server_momentum=0.0)), 3).params
    assert close(plain, same_, 1e-7)


def test_server_momentum_two_rounds_by_hand(monkeypatch):
    cfg = replace(CFG, server="momentum", server_lr=0.5, server_momentum=0.8)
    run, start = small_run(cfg)
    fake_clients(monkeypatch, *[0.2] * 4)
    first, second = 0.2, 0.8 * 0.2 + 0.2  # b <- beta b + D
    assert moved(run, start) == pytest.approx(0.5 * first, abs=1e-6)
    assert moved(run, start, 2) == pytest.approx(0.5 * (first + second), abs=1e-6)


def test_server_adam_two_rounds_by_hand(monkeypatch):
    cfg = replace(CFG, server="adam", server_lr=0.05, server_momentum=0.9)
    run, start = small_run(cfg)
    vectors, m, v, expected = (0.02, -0.01), 0.0, 0.0, []
    for t, d in enumerate(vectors, 1):
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d**2
        expected.append(0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-3))
    state, total = start, 0.0
    for d, step in zip(vectors, expected, strict=True):
        fake_clients(monkeypatch, *[d] * 4)
        state, total = federated_round(run, state), total + step
        for n, w in start.params.items():
            torch.testing.assert_close(state.params[n] - w, torch.full_like(w, total), atol=1e-6,
                                       rtol=0)


# ------------------------------------------------------------------ SCAFFOLD
def test_scaffolds_first_round_is_fedavg():
    first = [federated_round(*small_run(replace(CFG, algorithm=a))) for a in ("fedavg", "scaffold")]
    assert same(first[0].params, first[1].params)


def test_scaffolds_controls_by_hand():
    cfg = replace(CFG, algorithm="scaffold", momentum=0.0, weight_decay=0.0, num_clients=2)
    run, start = small_run(cfg, [range(4), range(4, 16)])
    state, controls, c = start, [scale(start.params, 0.0)] * 2, scale(start.params, 0.0)
    for _ in range(3):
        vectors = [one_client(run, state, k, 0.1)[0] for k in range(2)]
        fresh = [add(add(controls[k], scale(c, -1)), scale(vectors[k], -1 / (0.1 * 3)))
                 for k in range(2)]
        for k in range(2):
            c = add(c, scale(task_vector(fresh[k], controls[k]), 1 / 2))
        state, controls = federated_round(run, state), fresh
        assert close(state.memory["control"], c, 1e-5)
        assert all(close(state.memory[f"control/{k}"], fresh[k], 1e-5) for k in range(2))


def test_scaffolds_first_control_is_the_clients_mean_gradient(plain):
    """Also with momentum, whose J steps of one gradient move by more than J times the rate."""
    run, start = small_run(Config(algorithm="scaffold", num_clients=1, **LINEAR | dict(
        local_steps=3, momentum=0.9)), [range(10)], model=linear())
    tiny_rate = 1e-4  # the gradient stays the same
    vector = one_client(run, start, 0, tiny_rate)[0]
    own = utils.new_control(run.cfg, start, 0, vector, tiny_rate)
    exact = gradient(run.model, start.params, run.data.images[:10], run.data.labels[:10])
    assert close(own, exact, 2e-3)
    assert max(g.abs().max() for g in exact.values()) > 0.05


def test_scaffold_corrects_each_local_gradient_by_c_minus_ck(plain):
    cfg = Config(algorithm="scaffold", num_clients=3, **LINEAR)
    run, start = small_run(cfg, [range(10)] * 3, model=linear())
    fill = lambda v: {n: torch.full_like(w, v) for n, w in start.params.items()}  # noqa: E731
    state = replace(start, memory={"control": fill(0.5), "control/1": fill(0.2)})
    g = gradient(run.model, start.params, run.data.images[:10], run.data.labels[:10])
    for k, correction in ((1, 0.5 - 0.2), (2, 0.5)):  # client 2 was never drawn: c_k = 0
        vector = one_client(run, state, k, 0.1)[0]
        assert close(vector, scale(add(g, fill(correction)), -0.1))


def test_scaffolds_server_control_is_the_mean_of_the_clients():
    state = rounds(*small_run(replace(CFG, algorithm="scaffold")), 3)
    total = {n: sum(state.memory[f"control/{k}"][n] for k in range(4)) / 4 for n in state.params}
    assert close(state.memory["control"], total, 1e-5)
    assert max(w.abs().max() for w in total.values()) > 1e-3


def test_scaffold_keeps_controls_of_absent_clients():
    run, start = small_run(replace(CFG, algorithm="scaffold", participation=0.25))
    state, drawn = start, []
    for t in range(6):
        before = state.memory
        state = federated_round(run, state)
        drawn += cohort(4, 0.25, "cohort", 0, t).tolist()
        assert {k for k in state.memory if "/" in k} == {f"control/{k}" for k in drawn}
        assert all(same(before[k], state.memory[k]) for k in before
                   if "/" in k and k != f"control/{drawn[-1]}")
    total = {n: sum(state.memory[f"control/{k}"][n] for k in set(drawn)) / 4 for n in state.params}
    assert close(state.memory["control"], total, 1e-5)


# ------------------------------------------------------------------ accounting and divergence
@pytest.mark.parametrize(("algorithm", "factor"), [("fedavg", 1), ("fedprox", 1), ("scaffold", 2)])
def test_bytes_count_the_free_entries_of_the_cohort_in_float32(algorithm, factor):
    cfg, every = replace(CFG, algorithm=algorithm, participation=0.5), 12 * 8 + 8 + 8 * 5 + 5
    run, start = small_run(cfg)
    row = federated_round(run, start).history[0]
    assert row["bytes_up"] == row["bytes_down"] == row["bytes_dense"] == 4 * 2 * every * factor
    mask = half_mask(run)
    free = 48 + 4 + 20 + 3
    row = federated_round(small_run(cfg, mask=mask)[0], start).history[0]
    assert row["bytes_up"] == row["bytes_down"] == 4 * 2 * free * factor
    assert row["bytes_dense"] == 4 * 2 * every * factor


def test_the_rows_loss_and_norms_by_hand(monkeypatch):
    run, start = small_run(CFG, [range(5)] * 4)
    fake_clients(monkeypatch, 1.0, 2.0, 3.0, -2.0)
    row, size = federated_round(run, start).history[0], (12 * 8 + 8 + 8 * 5 + 5) ** 0.5
    assert row["train_loss"] == pytest.approx(2.5)
    assert row["mean_norm"] == pytest.approx(size * 1.0, rel=1e-5)
    assert row["client_norm"] == pytest.approx(size * (18 / 4) ** 0.5, rel=1e-5)


def test_a_loss_that_is_not_finite_names_round_rate_and_clients(monkeypatch):
    run, start = small_run(replace(CFG, lr=0.25))
    losses = [1.0, float("nan"), 2.0, float("inf")]
    monkeypatch.setattr(utils, "client_update", lambda run, s, k, lr: torch.tensor(losses[k]))
    with pytest.raises(FloatingPointError, match=r"round or epoch 3 .*lr=0\.25") as error:
        federated_round(run, replace(start, round=2))
    named = str(error.value)
    assert "1: nan" in named
    assert "3: inf" in named
    assert "0: " not in named
    assert "2: " not in named


# ------------------------------------------------------------------ centralised
def test_an_epoch_visits_every_training_image_once(monkeypatch):
    run, start = small_run(replace(CFG, algorithm="centralized", batch_size=7))
    seen, honest, sizes = [], utils.batches, []
    step = utils.sgd_step
    monkeypatch.setattr(utils, "batches", lambda run, order, draw:
                        (seen.append(order.tolist()), honest(run, order, draw))[1])
    monkeypatch.setattr(utils, "sgd_step", lambda run, opt, x, y, adjust=None:
                        (sizes.append(len(x)), step(run, opt, x, y, adjust))[1])
    state = utils.centralized_epoch(run, start)
    utils.centralized_epoch(run, state)
    assert all(sorted(order) == list(range(30)) for order in seen)
    assert seen[0] != seen[1], "never reshuffled"
    assert sizes == [7, 7, 7, 7, 2] * 2


def test_epochs_are_one_run_of_torch_sgd(plain):
    cfg = replace(CFG, algorithm="centralized", num_epochs=3, schedule="cosine", batch_size=8,
                  weight_decay=0.01)
    run, start = small_run(cfg)
    state = start
    for _ in range(3):
        state = utils.centralized_epoch(small_run(cfg)[0], state)
    run.load(start.params)
    opt = torch.optim.SGD(run.model.parameters(), 0.1, 0.9, weight_decay=0.01)
    for t in range(3):
        order = utils.rng("epoch", 0, t).permutation(np.arange(30))
        for i, index in enumerate(torch.from_numpy(order).split(8)):
            opt.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * (t + i / 4) / 3))
            opt.zero_grad()
            F.cross_entropy(run.model(run.data.images[index]), run.data.labels[index]).backward()
            opt.step()
    assert close(state.params, {n: p.detach() for n, p in run.trained.items()})


def test_an_epoch_leaves_its_input_alone():
    run, start = small_run(replace(CFG, algorithm="centralized"))
    state = utils.centralized_epoch(run, start)
    kept = {n: w.clone() for n, w in state.params.items()}
    buffers = {n: w.clone() for n, w in state.memory["momentum"].items()}
    first = utils.centralized_epoch(run, state)
    assert same(kept, state.params)
    assert same(buffers, state.memory["momentum"])
    assert same(first.params, utils.centralized_epoch(run, state).params)


def test_an_epoch_that_diverges_says_so():
    run, start = small_run(replace(CFG, algorithm="centralized", lr=1e20))
    with pytest.raises(FloatingPointError, match="round or epoch 1 .*nan"):
        utils.centralized_epoch(run, start)


# ------------------------------------------------------------------ lower precision
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_lower_precision_follows_float32(kind, dtype):
    """The fp16 gradients are scaled up for the backward pass and down again for the step."""
    used, results = [], []
    for precision in ("float32", kind):
        run, start = small_run(replace(CFG, precision=precision, num_clients=1, local_steps=5))
        run.model[-1].register_forward_hook(lambda m, i, out: used.append(out.dtype))
        vector, loss = one_client(run, start, 0, 0.1)
        results.append((loss.item(), vector))
    assert used == [torch.float32] * 5 + [dtype] * 5
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    for n, v in results[0][1].items():
        assert (results[1][1][n] - v).norm() < 0.1 * v.norm()
        assert results[1][1][n].dtype == torch.float32


def test_the_step_sees_unscaled_gradients(monkeypatch):
    """A scale that leaked into the step would multiply it; momentum SGD would not hide that."""
    run, start = small_run(replace(CFG, precision="fp16", num_clients=1, local_steps=1))
    opt = SparseSGDM(run.trained.items(), 0.0, momentum=0.0)
    seen = []
    utils.sgd_step(run, opt, run.data.images[:8], run.data.labels[:8],
                   lambda grads: seen.extend(g.clone() for g in grads))
    exact = gradient(run.model, start.params, run.data.images[:8], run.data.labels[:8])
    for g, e in zip(seen, exact.values(), strict=True):
        assert (g - e).norm() < 0.05 * e.norm()


# ------------------------------------------------------------------ memory
class Narrow(nn.Module):
    """A model on a device that has room for `room` images at a time."""

    def __init__(self, model, room):
        super().__init__()
        self.model, self.room = model, room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x)


@pytest.mark.parametrize("room", [1, 3, 5])
def test_a_batch_that_does_not_fit_is_computed_in_parts_with_the_same_sums(plain, room):
    cfg = Config(num_clients=1, **LINEAR | dict(batch_size=10, local_steps=2, momentum=0.9))
    run, start = small_run(cfg, [range(10)], model=linear())
    want = one_client(run, start, 0, 0.1)[0]
    tight, _ = small_run(cfg, [range(10)], model=linear())
    tight = replace(tight, model=Narrow(tight.model, room))
    with pytest.warns(UserWarning, match="Batches of 10 do not fit"):
        got, loss = one_client(tight, start, 0, 0.1)
    assert close(got, want, 1e-5)
    assert tight.facts["batch_parts"] == {1: 16, 3: 4, 5: 2}[room]
    assert "batch_parts" not in run.facts


def test_a_device_without_room_for_one_image_says_so(plain):
    cfg = Config(num_clients=1, **LINEAR)
    run, start = small_run(cfg, [range(10)], model=linear())
    run = replace(run, model=Narrow(run.model, 0))
    with pytest.warns(UserWarning, match="in 16 parts"), pytest.raises(torch.OutOfMemoryError):
        utils.client_update(run, start, 0, 0.1)
