"""Federated averaging: rounds, clients, the hooks of an algorithm, and the centralised epoch."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close, half_mask, one_client, rounds, same, small_run
from plain_fedavg import plain_fedavg
from torch import nn

import utils
from utils import Config, FedAvg, SparseSGDM, add, cohort, federated_round, scale, task_vector

CFG = Config(num_clients=4, participation=1.0, local_steps=3, batch_size=4, lr=0.1, num_rounds=10,
             schedule="constant", augmentation="none")
LINEAR = dict(schedule="constant", augmentation="none", momentum=0.0, weight_decay=0.0,
              local_steps=1, batch_size=10)
ENTRIES = 12 * 8 + 8 + 8 * 5 + 5  # of the two-layer net


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


def fake_clients(monkeypatch, *vectors):
    """Client k moves every entry by vectors[k]; its loss is 1 + k."""
    def update(run, state, k, lr):
        vector = {n: torch.full_like(w, vectors[k]) for n, w in state.params.items()}
        return utils.ClientUpdate(k, torch.tensor(1.0 + k), vector, {})
    monkeypatch.setattr(utils, "client_update", update)


def moved(run, start, n=1):
    """What `n` rounds add to every weight, when all entries move alike."""
    after = rounds(run, start, n)
    values = torch.cat([(after.params[k] - w).flatten() for k, w in start.params.items()])
    torch.testing.assert_close(values, values[:1].expand_as(values), atol=1e-5, rtol=0)
    return values[0].item()


def recorded(patch, name, record):
    """A list of `record(arguments)` of all calls of `utils.<name>`, which goes on as before."""
    honest = getattr(utils, name)
    seen = []

    def call(*args, **options):
        seen.append(record(*args))
        return honest(*args, **options)
    patch.setattr(utils, name, call)
    return seen


# ------------------------------------------------------------------ the plain twin
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_rounds_are_those_of_the_plain_twin(masked):
    cfg = replace(CFG, num_clients=6, participation=0.5, schedule="cosine", weight_decay=0.01)
    shards = [range(3), range(3, 9), range(9, 14), range(14, 15), range(15, 23), range(23, 30)]
    shards = [np.array(s) for s in shards]
    run, start = small_run(cfg, shards)
    mask = {n: torch.ones_like(w, dtype=torch.bool) for n, w in start.params.items()}
    if masked:
        mask = half_mask(run)
        run, start = small_run(cfg, shards, mask)
    model = small_run(cfg, shards)[0].model
    plain = plain_fedavg(model, run.data.images, run.data.labels, shards, mask, cfg, 3)
    after = rounds(run, start, 3).params
    assert close(after, plain, 1e-6)
    assert not close(after, start.params, 1e-2)


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


@pytest.mark.parametrize("change", [dict(), dict(lr=0.2), dict(local_steps=7), dict(batch_size=2)])
def test_the_round_trains_the_cohort_of_its_seed_and_round(monkeypatch, change):
    cfg = replace(CFG, num_clients=10, participation=0.3, seed=5, **change)
    asked = recorded(monkeypatch, "client_update", lambda run, state, k, lr: (state.round, k))
    rounds(*small_run(cfg), 3)
    assert asked == [(t, k) for t in range(3) for k in cohort(10, 0.3, "cohort", 5, t).tolist()]


@pytest.mark.parametrize(("clients", "share", "size"),
                         [(100, 0.1, 10), (10, 0.26, 3), (10, 0.24, 2), (5, 0.01, 1), (4, 1.0, 4)])
def test_a_cohort_has_max_1_round_CK_different_clients(clients, share, size):
    for t in range(20):
        chosen = cohort(clients, share, "cohort", 0, t).tolist()
        assert len(chosen) == len(set(chosen)) == size
        assert set(chosen) <= set(range(clients))


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="of the clients must lie between 0 and 1"):
        utils.cohort_size(10, share)


def test_cohorts_differ_by_round_and_seed():
    drawn = [tuple(cohort(100, 0.1, "cohort", s, t)) for s in range(4) for t in range(20)]
    assert len(set(drawn)) == len(drawn)


def test_clients_may_train_elsewhere_and_some_may_not_answer():
    cfg = replace(CFG, num_clients=4)
    run, start = small_run(cfg, [range(5), range(5, 7), range(7, 20), range(20, 30)])

    def without_client_2(run, state, clients, lr):
        answered = [k for k in clients if k != 2]
        return utils.train_cohort(run, state, answered, lr)
    after = federated_round(run, start, without_client_2)
    assert after.history[-1]["lost"] == [2]
    total = {n: torch.zeros_like(w) for n, w in start.params.items()}
    for k, size in ((0, 5), (1, 2), (3, 10)):
        total = add(total, scale(one_client(run, start, k, 0.1)[0], size / 17))
    assert close(after.params, add(start.params, total), 1e-6)


# ------------------------------------------------------------------ clients
@pytest.mark.parametrize("steps", [0, 1, 5, 20])
def test_J_counts_steps_not_epochs(monkeypatch, steps):
    run, start = small_run(replace(CFG, local_steps=steps))
    sizes = recorded(monkeypatch, "local_step", lambda run, optimizer, x, *rest: len(x))
    vector, loss = one_client(run, start, 0, 0.1)
    assert sizes == [4] * steps
    assert (loss == 0) == (steps == 0) == all((v == 0).all() for v in vector.values())


def seen_images(monkeypatch, cfg, shard_size):
    """Indices in the order client 0 trains on them, batch by batch."""
    run, start = small_run(cfg, [range(shard_size)] * cfg.num_clients)
    where = {row.sum().item(): i for i, row in enumerate(run.data.images)}
    seen = recorded(monkeypatch, "local_step",
                    lambda run, optimizer, x, *rest: [where[row.sum().item()] for row in x])
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


def test_a_client_trains_on_its_own_shard_in_another_order_each_time(monkeypatch):
    run, start = small_run(CFG, [[0, 1, 4, 5, 6, 8], [7, 9, 11], [2], [3]])
    seen = recorded(monkeypatch, "batches", lambda run, order, draw: tuple(order))
    rounds(run, start, 2)
    assert sorted(sorted(set(order)) for order in seen[:4]) == [[0, 1, 4, 5, 6, 8], [2], [3],
                                                                [7, 9, 11]]
    assert len({order for order in seen if len(set(order)) == 6}) == 2


def test_every_client_starts_from_the_servers_weights_without_momentum(monkeypatch):
    run, start = small_run(CFG)
    seen = recorded(monkeypatch, "local_step", lambda run, optimizer, *rest: (
        len(optimizer.state), {n: p.detach().clone() for n, p in run.trainable.items()}))
    rounds(run, start, 2)
    assert [buffers for buffers, _ in seen] == [0, 4, 4] * 4 * 2
    firsts = [weights for _, weights in seen[:12:3]]
    assert all(same(weights, start.params) for weights in firsts)
    assert not any(same(weights, start.params) for _, weights in seen[1:12:3])


def test_a_clients_vector_does_not_depend_on_who_came_before():
    run, start = small_run(CFG)
    alone = one_client(run, start, 1, 0.1)[0]
    one_client(run, start, 3, 0.1)
    assert same(alone, one_client(run, start, 1, 0.1)[0])


def test_local_steps_are_torch_sgd_with_momentum_and_decay():
    run, start = small_run(replace(CFG, weight_decay=0.01, local_steps=6), [range(7)] * 4)
    vector, loss = one_client(run, start, 2, 0.1)
    draw = utils.rng("client", 0, 0, 2)
    order = np.concatenate([draw.permutation(np.arange(7)) for _ in range(4)])[:24]
    run.load(start.params)
    optimizer = torch.optim.SGD(run.model.parameters(), 0.1, 0.9, weight_decay=0.01)
    losses = []
    for i in torch.from_numpy(order).split(4):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(run.model(run.data.images[i]), run.data.labels[i]))
        losses[-1].backward()
        optimizer.step()
    assert close(vector, task_vector(run.weights(), start.params))
    assert loss.item() == pytest.approx(sum(losses).item() / 6, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "warmup_cosine"])
def test_the_rate_is_a_function_of_the_round_only(monkeypatch, schedule):
    run, state = small_run(replace(CFG, schedule=schedule, local_steps=2))
    used = recorded(monkeypatch, "local_step",
                    lambda run, optimizer, *rest: optimizer.param_groups[0]["lr"])
    state = rounds(run, state, 4)
    expected = [utils.learning_rate(run.cfg, t / 10) for t in range(4)]
    assert used == [lr for lr in expected for _ in range(4 * 2)]  # clients, steps
    assert [row["lr"] for row in state.history] == expected


@pytest.mark.parametrize(("schedule", "points"), [
    ("constant", {0: 1, 0.5: 1, 0.99: 1}),
    ("cosine", {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
    ("step", {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 0.99: 0.01}),
    ("warmup_cosine", {0: 0.05, 0.05: 0.525, 0.1: 1, 0.55: 0.5, 1: 0})])
def test_the_learning_rate_by_hand(schedule, points):
    cfg = Config(lr=0.2, schedule=schedule)
    for progress, share in [*points.items(), *reversed(points.items())]:
        assert utils.learning_rate(cfg, progress) == pytest.approx(0.2 * share, abs=1e-12)


def test_a_round_leaves_its_input_alone():
    run, start = small_run(replace(CFG, algorithm="mine"))
    state = rounds(run, start, 2)
    groups = {"params": state.params, **state.algorithm_state}
    before = {g: {n: w.clone() for n, w in p.items()} for g, p in groups.items()}
    first = federated_round(run, state)
    assert all(same(groups[g], before[g]) for g in groups)
    assert state.round == len(state.history) == 2
    again = federated_round(run, state)
    assert same(first.params, again.params)
    assert first.history == again.history


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("algorithm", ["fedavg", "mine", "centralized"])
def test_frozen_entries_keep_their_bits_and_others_move(algorithm):
    cfg = replace(CFG, algorithm=algorithm, weight_decay=0.1, prox_mu=0.5)
    step = utils.centralized_epoch if cfg.centralized else federated_round
    dense, start = small_run(cfg)
    mask = half_mask(dense)
    sparse, _ = small_run(cfg, mask=mask)
    full, after = start, start
    for _ in range(3):
        full, after = step(dense, full), step(sparse, after)
    for n, w in start.params.items():
        assert torch.equal(after.params[n][~mask[n]], w[~mask[n]])
        assert (after.params[n][mask[n]] != w[mask[n]]).all()
        assert not torch.equal(after.params[n][mask[n]], full.params[n][mask[n]])


# ------------------------------------------------------------------ hooks
def with_hooks(patch, **hooks):
    """A run, and its start, of FedAvg with some methods replaced."""
    patch.setitem(utils.ALGORITHMS, "idea", type("Idea", (FedAvg,), hooks))
    return small_run(replace(CFG, algorithm="idea"))


def test_a_local_gradient_is_changed_before_the_step(monkeypatch):
    def pull(self, gradients, weights, state, client):
        for n, g in gradients.items():
            g.add_(weights[n] - state.params[n], alpha=0.7)
            g.add_(client)
    monkeypatch.setitem(utils.ALGORITHMS, "idea", type("Idea", (FedAvg,), {"local_gradient": pull}))
    cfg = Config(algorithm="idea", num_clients=2, **LINEAR | dict(local_steps=2))
    run, start = small_run(cfg, [range(10)] * 2, model=linear())
    x, y, w = run.data.images[:10], run.data.labels[:10], start.params
    for client in (0, 1):
        vector = one_client(run, start, client, 0.5)[0]
        extra = {n: torch.full_like(v, client) for n, v in w.items()}
        w1 = add(w, scale(add(gradient(run.model, w, x, y), extra), -0.5))
        pulled = add(gradient(run.model, w1, x, y), scale(task_vector(w1, w), 0.7))
        assert close(vector, task_vector(add(w1, scale(add(pulled, extra), -0.5)), w))


def test_a_local_gradient_may_be_replaced(monkeypatch):
    def doubled(self, gradients, weights, state, client):
        for n, g in gradients.items():
            gradients[n] = 2 * g
    cfg = replace(CFG, momentum=0.0, weight_decay=0.0)
    expected = one_client(*small_run(cfg), 0, 0.2)[0]
    run, start = with_hooks(monkeypatch, local_gradient=doubled)
    run.optimizer.param_groups[0] |= dict(momentum=0.0, weight_decay=0.0)
    assert close(one_client(run, start, 0, 0.1)[0], expected)


def test_messages_reach_combine_and_the_server_and_are_counted(monkeypatch):
    seen = {}

    def message(self, run, vector, state, client, lr):
        return {"size": torch.full((3,), float(len(run.shards[client]) + state.round))}

    def combine(self, vectors, shares, messages):
        seen["combine"] = {k: m["size"][0].item() for k, m in messages.items()}
        return vectors[1]

    def server_step(self, state, update):
        seen["server"] = update.messages.keys()
        seen["shares"] = update.shares
        return add(state.params, scale(update.vector, 2)), {"kept": {"a": torch.ones(1)}}
    run, start = with_hooks(monkeypatch, client_message=message, combine=combine,
                            server_step=server_step)
    drawn = cohort(4, 1.0, "cohort", 0, 0).tolist()
    after = federated_round(run, start)
    assert seen["combine"] == {k: float(len(run.shards[k])) for k in drawn}
    assert list(seen["server"]) == drawn
    assert seen["shares"] == utils.shares_of(run, drawn)
    assert after.algorithm_state.keys() == {"kept"}
    second = one_client(run, start, drawn[1], 0.1)[0]
    assert close(after.params, add(start.params, scale(second, 2)))
    assert after.history[0]["bytes_up"] == 4 * (4 * ENTRIES + 4 * 3)


def test_the_combination_written_out_is_the_one_that_is_summed_on_the_way(monkeypatch):
    def combine(self, vectors, shares, messages):
        return FedAvg.combine(self, vectors, shares, messages)
    by_hand = rounds(*with_hooks(monkeypatch, combine=combine), 3)
    assert close(by_hand.params, rounds(*small_run(CFG), 3).params)


WRONG = {  # hook: what it returns, and what the error must name
    "combine: a missing name": (dict(combine=lambda self, v, s, m: {"1.bias": v[0]["1.bias"]}),
                                r"combine\(\).*3 of them"),
    "combine: another shape": (
        dict(combine=lambda self, v, s, m: v[0] | {"1.bias": torch.zeros(2)}), "1.bias"),
    "combine: a list": (dict(combine=lambda self, v, s, m: v), r"combine\(\).*list"),
    "server: a foreign name": (
        dict(server_step=lambda self, s, u: (s.params | {"x": torch.ones(1)}, {})), "x"),
    "server: another shape": (
        dict(server_step=lambda self, s, u: ({n: w[:1] for n, w in s.params.items()}, {})),
        r"server_step\(\).*1\.bias"),
    "server: weights alone": (dict(server_step=lambda self, s, u: s.params), r"server_step\(\)"),
    "server: a list": (dict(server_step=lambda self, s, u: [s.params, {}]), r"server_step\(\)"),
    "server: three things": (dict(server_step=lambda self, s, u: (s.params, {}, 1)), "a pair"),
    "server: a list as its state": (dict(server_step=lambda self, s, u: (s.params, [])), "a pair"),
    "server: no tensors as its state": (
        dict(server_step=lambda self, s, u: (s.params, {"count": 3})), "count.*int"),
    "server: numbers in its state": (
        dict(server_step=lambda self, s, u: (s.params, {"m": {"n": 3}})), "'m'.*'n'.*int"),
    "gradient: a name removed": (
        dict(local_gradient=lambda self, g, w, s, k: g.__delitem__("1.bias")),
        r"local_gradient\(\).*1\.bias"),
    "gradient: returned": (
        dict(local_gradient=lambda self, g, w, s, k: dict(g)), r"local_gradient\(\).*nothing"),
    "gradient: another shape": (
        dict(local_gradient=lambda self, g, w, s, k: g.update({"1.bias": torch.zeros(3)})),
        r"local_gradient\(\).*1\.bias"),
    "message: a number": (dict(client_message=lambda self, r, v, s, c, lr: {"n": 1.0}),
                          r"client_message\(\).*'n'.*float"),
    "message: a tensor": (dict(client_message=lambda self, r, v, s, c, lr: torch.ones(1)),
                          r"client_message\(\).*Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_hook_that_returns_something_else_fails_at_once_by_name(monkeypatch, name):
    hooks, named = WRONG[name]
    run, start = with_hooks(monkeypatch, **hooks)
    with pytest.raises(ValueError, match=rf"(?s)algorithm 'idea'.*{named}"):
        federated_round(run, start)


# ------------------------------------------------------------------ accounting and divergence
@pytest.mark.parametrize("steps", [1, 2])
def test_a_clients_loss_is_the_mean_over_its_steps(steps):
    run, start = small_run(replace(CFG, **LINEAR | dict(local_steps=steps)), [range(10)] * 4,
                           model=linear())
    x, y = run.data.images[:10], run.data.labels[:10]
    losses, weights = [], start.params
    for _ in range(steps):
        losses.append(F.cross_entropy(torch.func.functional_call(run.model, weights, (x,)), y))
        weights = add(weights, scale(gradient(run.model, weights, x, y), -0.5))
    found = utils.client_update(run, start, 0, 0.5)
    assert found.loss.item() == pytest.approx(sum(losses).item() / steps, rel=1e-5)
    assert close(found.vector, task_vector(weights, start.params))


def test_without_steps_nothing_moves_and_the_loss_is_zero():
    run, start = small_run(replace(CFG, local_steps=0))
    vector, loss = one_client(run, start, 0, 0.1)
    assert loss == 0
    assert all((w == 0).all() for w in vector.values())


def test_where_nobody_answers_the_vector_is_zero():
    """As on a rank that has none of the cohort's clients."""
    run, start = small_run(CFG)
    update = utils.accumulate_update(run, start, [], [])
    assert update.vector.keys() == start.params.keys()
    assert all((w == 0).all() for w in update.vector.values())
    assert update.losses.shape == update.squared_norms.shape == (0,)


def test_as_many_shares_as_answers_are_needed():
    run, start = small_run(CFG)
    answers = [utils.client_update(run, start, k, 0.1) for k in (0, 1)]
    with pytest.raises(ValueError, match="shorter"):
        utils.accumulate_update(run, start, answers, [1.0])


def test_images_are_augmented_by_the_clients_own_draws():
    cfg = replace(CFG, augmentation="flip")
    run, start = small_run(cfg)
    flipped = [one_client(run, start, k, 0.1)[0] for k in (0, 0)]
    assert same(*flipped)
    assert not same(flipped[0], one_client(*small_run(CFG), 0, 0.1)[0])


def test_bytes_count_the_trainable_entries_of_the_cohort_in_float32():
    cfg = replace(CFG, participation=0.5)
    run, start = small_run(cfg)
    row = federated_round(run, start).history[0]
    assert row["bytes_up"] == row["bytes_down"] == 4 * 2 * ENTRIES
    row = federated_round(small_run(cfg, mask=half_mask(run))[0], start).history[0]
    assert row["bytes_up"] == row["bytes_down"] == 4 * 2 * (48 + 4 + 20 + 3)


def test_the_rows_loss_and_norms_by_hand(monkeypatch):
    run, start = small_run(CFG, [range(5)] * 4)
    fake_clients(monkeypatch, 1.0, 2.0, 3.0, -2.0)
    row = federated_round(run, start).history[0]
    assert row["train_loss"] == pytest.approx(2.5)
    assert "lost" not in row
    assert row["mean_norm"] == pytest.approx(ENTRIES**0.5 * 1.0, rel=1e-5)
    assert row["client_norm"] == pytest.approx(ENTRIES**0.5 * (18 / 4) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("precision", "advice"), [
    ("float32", r"Try a lower lr than 0\.25"),
    ("fp16", r"fp16.*overflow.*precision='bf16' or 'float32'.*lr than 0\.25")])
def test_a_loss_that_is_not_finite_names_round_rate_clients_and_precision(monkeypatch, precision,
                                                                          advice):
    run, start = small_run(replace(CFG, lr=0.25, precision=precision))
    losses = [1.0, float("nan"), 2.0, float("inf")]
    vector = {n: torch.zeros_like(w) for n, w in start.params.items()}
    monkeypatch.setattr(utils, "client_update", lambda run, state, k, lr: utils.ClientUpdate(
        k, torch.tensor(losses[k]), vector, {}))
    expected = rf"round or epoch 3 .*lr=0\.25.*{advice}"
    with pytest.raises(FloatingPointError, match=expected) as error:
        federated_round(run, replace(start, round=2))
    named = str(error.value)
    assert "client 1': nan" in named
    assert "client 3': inf" in named
    assert "client 0" not in named
    assert "client 2" not in named


# ------------------------------------------------------------------ centralised
def test_an_epoch_visits_every_training_image_once(monkeypatch):
    run, start = small_run(replace(CFG, algorithm="centralized", batch_size=7))
    orders = recorded(monkeypatch, "batches", lambda run, order, draw: order.tolist())
    sizes = recorded(monkeypatch, "local_step", lambda run, optimizer, x, *rest: len(x))
    utils.centralized_epoch(run, utils.centralized_epoch(run, start))
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1], "never reshuffled"
    assert sizes == [7, 7, 7, 7, 2] * 2


def test_epochs_are_one_run_of_torch_sgd():
    cfg = replace(CFG, algorithm="centralized", num_epochs=3, schedule="cosine", batch_size=8,
                  weight_decay=0.01)
    run, start = small_run(cfg)
    state = start
    for _ in range(3):
        state = utils.centralized_epoch(small_run(cfg)[0], state)
    run.load(start.params)
    optimizer = torch.optim.SGD(run.model.parameters(), 0.1, 0.9, weight_decay=0.01)
    for t in range(3):
        order = utils.rng("epoch", 0, t).permutation(np.arange(30))
        for i, index in enumerate(torch.from_numpy(order).split(8)):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * (t + i / 4) / 3))
            optimizer.zero_grad()
            F.cross_entropy(run.model(run.data.images[index]), run.data.labels[index]).backward()
            optimizer.step()
    assert close(state.params, run.weights())


def test_an_epoch_leaves_its_input_alone():
    run, start = small_run(replace(CFG, algorithm="centralized"))
    state = utils.centralized_epoch(run, start)
    kept = {n: w.clone() for n, w in state.params.items()}
    buffers = {n: w.clone() for n, w in state.algorithm_state["momentum"].items()}
    first = utils.centralized_epoch(run, state)
    assert same(kept, state.params)
    assert same(buffers, state.algorithm_state["momentum"])
    assert same(first.params, utils.centralized_epoch(run, state).params)


def test_an_epoch_that_diverges_says_so():
    run, start = small_run(replace(CFG, algorithm="centralized", lr=1e20))
    with pytest.raises(FloatingPointError, match="round or epoch 1 .*nan"):
        utils.centralized_epoch(run, start)


# ------------------------------------------------------------------ precision and memory
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_lower_precision_follows_float32(kind, dtype):
    """The fp16 gradients are scaled up for the backward pass and down again for the step."""
    used, results = [], []
    for precision in ("float32", "auto", kind):
        run, start = small_run(replace(CFG, precision=precision, num_clients=1, local_steps=5))
        run.model[-1].register_forward_hook(lambda m, i, out: used.append(out.dtype))
        results.append(one_client(run, start, 0, 0.1))
    assert used == [torch.float32] * 10 + [dtype] * 5
    (vector, loss), _, (low_vector, low_loss) = results
    assert low_loss.item() == pytest.approx(loss.item(), rel=0.02)
    for n, v in vector.items():
        assert (low_vector[n] - v).norm() < 0.1 * v.norm()
        assert low_vector[n].dtype == torch.float32


@pytest.mark.parametrize(("arch", "capability", "precision"), [
    ("vits16", (7, 5), "fp16"), ("vits16", (8, 0), "bf16"), ("mini", (8, 0), "float32")])
def test_what_auto_means_on_a_gpu(monkeypatch, arch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    cfg = replace(CFG, arch=arch, weights="none", precision="auto")
    assert utils.precision_name(cfg, torch.device("cuda")) == precision
    assert utils.precision_name(cfg, torch.device("cpu")) == "float32"


def test_the_step_sees_unscaled_gradients():
    """A scale that leaked into the step would multiply it."""
    run, start = small_run(replace(CFG, precision="fp16", num_clients=1))
    optimizer = SparseSGDM(run.trainable.items(), 0.0, momentum=0.0)
    seen = {}
    utils.local_step(run, optimizer, run.data.images[:8], run.data.labels[:8],
                     lambda grads: seen.update({n: g.clone() for n, g in grads.items()}))
    exact = gradient(run.model, start.params, run.data.images[:8], run.data.labels[:8])
    for n, e in exact.items():
        assert (seen[n] - e).norm() < 0.05 * e.norm()


def test_in_fp16_gradients_that_it_has_no_numbers_for_are_kept(monkeypatch):
    """Of a sure model: 1.5e-8 for a wrong class, where the smallest number of fp16 is 6e-8."""
    run, start = small_run(replace(CFG, precision="fp16"), model=linear())
    params = start.params | {"1.bias": torch.tensor([18.0, 0, 0, 0, 0])}
    run.load(params)
    optimizer = SparseSGDM(run.trainable.items(), 0.0)
    utils.local_step(run, optimizer, torch.ones(1, 3, 2, 2), torch.tensor([0]))
    exact = gradient(run.model, params, torch.ones(1, 3, 2, 2), torch.tensor([0]))
    for n, e in exact.items():
        torch.testing.assert_close(run.trainable[n].grad[1:], e[1:], rtol=0.1, atol=0)


@pytest.mark.parametrize("part", [1, 3, 10, 20])
def test_a_batch_in_parts_gives_the_same_sums(monkeypatch, part):
    cfg = Config(num_clients=1, **LINEAR | dict(local_steps=2, momentum=0.9))
    run, start = small_run(cfg, [range(10)], model=linear())
    whole, loss = one_client(run, start, 0, 0.1)
    run, start = small_run(replace(cfg, micro_batch=part), [range(10)], model=linear())
    sizes = []
    run.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    in_parts, same_loss = one_client(run, start, 0, 0.1)
    assert max(sizes) == min(part, 10)
    assert close(in_parts, whole, 1e-6)
    assert same_loss.item() == pytest.approx(loss.item(), abs=1e-6)


def test_a_device_that_is_full_names_the_field_that_helps(monkeypatch):
    run, start = small_run(CFG)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(run.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="4 images.*micro_batch=2"):
        federated_round(run, start)
