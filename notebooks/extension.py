"""What notebook 5 adds to FedAvg: other algorithms, merges of task vectors, and diagnostics.

    algorithms   FedProx, SCAFFOLD, FedAvgM, FedAdam, FedExP: the usual remedies for client drift
    merges       the server combines task vectors as task arithmetic does: sign election (TIES),
                 Fisher weighting, lengths per tensor set on held-out sums
    masks        a control of the layers that sensitivity chooses, and masks that the clients
                 calibrate anew while they train
    diagnostics  pure functions of task vectors, losses, predictions and masks, and functions that
                 measure them at the weights of a run and keep them in the store

Each algorithm is a subclass of `utils.FedAvg` that overrides one or more of its hooks, and is
registered at the end: importing this module makes `Config(algorithm="scaffold")` and the others
possible. Constants stand inside the classes, for their source is part of a run's key.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import (
    LAYERS,
    RULES,
    CohortUpdate,
    Config,
    FedAvg,
    Params,
    Run,
    State,
    Store,
    add,
    apply_vector,
    autocast,
    calibrate_mask,
    client_update,
    cohort,
    federated_round,
    flatten,
    json_sha256,
    model_input,
    open_run,
    precise_device,
    register_algorithm,
    register_rule,
    rng,
    run_key,
    run_name,
    scale,
    select_lowest,
    sensitivity,
    shares_of,
    source_sha256,
    squared_norm,
    task_vector,
    train,
    train_cohort,
    unflatten,
)

SOURCE = Path(__file__).read_text(encoding="utf-8")  # what is imported, whatever it becomes


# ------------------------------------------------------------------ algorithms
def zeros(params: Params) -> Params:
    """Zeros with the names and shapes of `params`."""
    return {n: torch.zeros_like(w) for n, w in params.items()}


class FedProx(FedAvg):
    """Local steps on loss + mu / 2 |w_k - w|^2 (Li et al. 2020, eq. 2), w the server's weights."""
    reads = ("prox_mu",)

    def local_gradient(self, gradients, weights, state, client):
        mu = self.cfg.prox_mu
        for n, gradient in gradients.items():
            away = weights[n] - state.params[n]
            gradient.add_(away, alpha=mu)


class Scaffold(FedAvg):
    """Local steps corrected by control variates (Karimireddy et al. 2020, Alg. 1, option II).

    c_k estimates client k's own gradient and c everybody's; each local gradient gets + c - c_k.
    All are kept in the algorithm's state, as groups "control" and "control/<k>"; a client that has
    not taken part yet has c_k = 0.
    """

    def local_gradient(self, gradients, weights, state, client):
        control = state.algorithm_state.get("control")
        own = state.algorithm_state.get(f"control/{client}")
        for n, gradient in gradients.items():
            if control is not None:
                gradient.add_(control[n])
            if own is not None:
                gradient.sub_(own[n])

    def client_message(self, run, vector, state, client, lr):
        """The new c_k = c_k - c + (w - w_k) / (lr a): the mean of the uncorrected gradients.

        Without momentum J steps of one gradient move by lr J times it. With momentum mu, step i
        moves by (1 - mu^i) / (1 - mu) times it, and a is the sum of these over the J steps.
        """
        mu = self.cfg.momentum
        a = 0.0
        for i in range(1, self.cfg.local_steps + 1):
            a += (1 - mu**i) / (1 - mu)
        if a == 0:
            return {}

        nothing = zeros(vector)
        control = state.algorithm_state.get("control", nothing)
        own = state.algorithm_state.get(f"control/{client}", nothing)
        correction = task_vector(own, control)
        return apply_vector(correction, vector, -1 / (lr * a))

    def server_step(self, state, update):
        memory = dict(state.algorithm_state)
        nothing = zeros(state.params)
        control = memory.get("control", nothing)
        for client, fresh in update.messages.items():
            group = f"control/{client}"
            change = task_vector(fresh, memory.get(group, nothing))
            control = apply_vector(control, change, 1 / self.cfg.num_clients)
            memory[group] = fresh
        memory["control"] = control
        return add(state.params, update.vector), memory


class FedAvgM(FedAvg):
    """Momentum at the server (Hsu et al. 2019): v <- beta v + D, w <- w + server_lr v.

    With server_momentum=0 it is an extrapolation by the constant factor server_lr.
    """
    reads = ("server_lr", "server_momentum")

    def server_step(self, state, update):
        velocity = update.vector
        before = state.algorithm_state.get("velocity")
        if before is not None:
            velocity = apply_vector(velocity, before, self.cfg.server_momentum)
        params = apply_vector(state.params, velocity, self.cfg.server_lr)
        return params, {"velocity": velocity}


class FedAdam(FedAvg):
    """Adam at the server, whose gradient is -D (Reddi et al. 2021, with Adam's bias correction).

    beta1 is server_momentum. Equal to torch.optim.Adam with these constants.
    """
    reads = ("server_lr", "server_momentum")
    beta2 = 0.99
    eps = 1e-3  # their "adaptivity": large, since task vectors are small

    def server_step(self, state, update):
        beta1 = self.cfg.server_momentum
        beta2 = self.beta2
        memory = state.algorithm_state or {"first": zeros(state.params),
                                           "second": zeros(state.params)}
        # Both moments began at zero, and are corrected for the rounds that they lack.
        steps = state.round + 1
        first, second, step = {}, {}, {}
        for n, v in update.vector.items():
            first[n] = memory["first"][n].lerp(v, 1 - beta1)
            second[n] = memory["second"][n].lerp(v.square(), 1 - beta2)
            mean = first[n] / (1 - beta1**steps)
            square = second[n] / (1 - beta2**steps)
            step[n] = mean / (square.sqrt() + self.eps)
        params = apply_vector(state.params, step, self.cfg.server_lr)
        return params, {"first": first, "second": second}


class FedExP(FedAvg):
    """Extrapolates the mean by max(1, sum_k |D_k|^2 / (2 M (|D|^2 + eps))), M clients.

    Jhunjhunwala et al. 2023, eq. 8. Nearly orthogonal task vectors have a mean that is short.
    """
    eps = 1e-12

    def server_step(self, state, update):
        of_mean = squared_norm(update.vector) + self.eps
        factor = update.squared_norms.mean() / (2 * of_mean)
        step = scale(update.vector, factor.clamp(min=1))
        return add(state.params, step), state.algorithm_state


# ------------------------------------------------------------------ merges
class NormMatched:
    """Put before a merge, as in `class M(NormMatched, Merge)`: its direction at FedAvg's length.

    What a merge gains by its direction alone shows at the norm of the cohort's weighted mean; what
    it gains by moving further, a rate or a server rate would do as well.
    """

    def combine(self, vectors, shares, messages):
        merged = super().combine(vectors, shares, messages)
        mean = FedAvg.combine(self, vectors, shares, messages)
        # a merge that is zero stays so
        ratio = squared_norm(mean) / squared_norm(merged).clamp(min=1e-30)
        return scale(merged, ratio.sqrt())


class SignElection(FedAvg):
    """TIES without its trim (Yadav et al. 2023): elect a sign for each entry, then a disjoint mean.

    The sign of the weighted sum is elected; the mean is over those clients alone that moved the
    entry that way. An entry that one client moves is thus not shortened by the others' zeros.
    """
    keep = 1.0  # share of its moved entries, the largest, that a client's vector keeps

    def trim(self, vector: Params) -> Params:
        """The vector with all but the largest of its moved entries set to zero."""
        if self.keep == 1:
            return vector
        sizes = flatten(vector).abs()
        moved = int((sizes > 0).sum())
        number = max(1, round(self.keep * moved))
        cut = sizes.kthvalue(len(sizes) - number + 1).values
        kept = {}
        for n, v in vector.items():
            kept[n] = v.where(v.abs() >= cut, 0)
        return kept

    def combine(self, vectors, shares, messages):
        trimmed = [self.trim(v) for v in vectors]
        merged = {}
        for n in vectors[0]:
            tensors = [v[n] for v in trimmed]
            merged[n] = self.disjoint_mean(tensors, shares)
        return merged

    def disjoint_mean(self, tensors: list[Tensor], shares: list[float]) -> Tensor:
        weighted = [s * t for s, t in zip(shares, tensors, strict=True)]
        elected = sum(weighted).sign()
        total = torch.zeros_like(elected)
        weight = torch.zeros_like(elected)
        for part, share in zip(weighted, shares, strict=True):
            agrees = part.sign() == elected
            total += part * agrees
            weight += share * agrees
        # Where the sum is exactly zero and all moved, nobody agrees: 0 / 1.
        return total / weight.where(weight > 0, 1)


class Ties(SignElection):
    """TIES: trim each vector to the largest fifth of what it moved, then elect signs."""
    keep = 0.2  # as in the paper, which trims dense vectors


class FisherMerge(FedAvg):
    """Clients weighted entry by entry by their diagonal Fisher information (Matena & Raffel 2022).

    D = sum_k s_k (F_k + f) D_k / sum_k s_k (F_k + f), s_k the shares. A client sends F_k, per image
    of its own shard, at its own weights; the labels are drawn from its model. The floor f makes it
    the plain mean where nobody's loss depends on an entry. So are weights outside Linear, Conv2d
    and LayerNorm, of which no Fisher information is computed.
    """
    images = 64   # of a client's shard that are scored, drawn anew each round
    floor = 0.01  # f, as a share of the mean of F over all entries and clients

    def client_message(self, run, vector, state, client, lr):
        draw = rng("labels", self.cfg.seed, state.round, client)
        index = draw.permutation(run.shards[client])[:self.images]
        images = run.data.images[index]
        names = [n for n in vector if self.is_scored(run, n)]
        chunk = 8 if images.device.type == "cpu" else 32
        total = sensitivity(run.model, images, draw, chunk, names=names)
        fisher = {}
        for n, squares in total.items():
            mean = squares / len(index)
            fisher[n] = mean.float().to(images.device)
        return fisher

    def is_scored(self, run: Run, name: str) -> bool:
        module = run.model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, LAYERS)

    def combine(self, vectors, shares, messages):
        fishers = list(messages.values())  # in the order of the vectors
        entries = flatten(fishers[0]).numel()
        total = sum(f.sum() for fisher in fishers for f in fisher.values())
        floor = self.floor * total / (entries * len(fishers))

        merged = FedAvg.combine(self, vectors, shares, messages)
        for n in fishers[0]:
            above = torch.zeros_like(merged[n])
            below = torch.zeros_like(merged[n])
            for vector, share, fisher in zip(vectors, shares, fishers, strict=True):
                weight = share * (fisher[n] + floor)
                above += weight * vector[n]
                below += weight
            merged[n] = torch.where(below > 0, above / below, merged[n])
        return merged


class HeldOutLengths(FedAvg):
    """Each tensor's step is as long as clients without a part in it say, by the slope of the loss.

    The server moves tensor l by the step d_l = eta_l D_l, D the mean task vector, and sends w and
    d. In the next round each client that was not in the last cohort, so that its images are held
    out from the step, reports for every tensor the slope <gradient, d_l> of its loss before the
    step, b_l at w - d, and after it, a_l at w, on the same images and without augmentation. The
    server needs only their sums over clients, weighted by shard size. Then

        eta_l <- eta_l * 2^(-gain r_l),   r_l = a_l / (|a_l| + |b_l|)   in [-1, 1].

    A loss that still falls at the end of the step (a_l < 0) asks for a longer one, one that rises
    for a shorter one; eta_l rests where a_l is zero on average, which is an exact line search along
    d_l. A small gain averages the noise of single rounds. With full participation nobody is held
    out, and it stays FedAvg. The images are held out from the step, not from the run.
    """
    gain = 0.2
    shortest = 0.125
    longest = 8.0
    matched = False  # the whole step at the norm of the mean: relative lengths alone

    def client_message(self, run, vector, state, client, lr):
        step = state.algorithm_state.get("step")
        if step is None or client in self.last_cohort(state):
            return {}
        draw = rng("scorers", self.cfg.seed, state.round, client)
        shard = run.shards[client]
        index = draw.permutation(shard)[:self.cfg.batch_size]
        start = apply_vector(state.params, step, -1)
        before = self.slopes(run, start, step, index)
        after = self.slopes(run, state.params, step, index)
        return {"before": len(shard) * before, "after": len(shard) * after}

    def last_cohort(self, state: State) -> list[int]:
        cfg = self.cfg
        key = ("cohort", cfg.seed, state.round - 1)
        return cohort(cfg.num_clients, cfg.participation, *key).tolist()

    def slopes(self, run: Run, params: Params, step: Params, index: np.ndarray) -> Tensor:
        """<gradient of the mean loss at `params`, step>, tensor by tensor (tensors,)."""
        run.load(params)
        size = self.cfg.micro_batch or len(index)
        total = 0
        for i in range(0, len(index), size):
            part = index[i:i + size]
            logits = run.model(model_input(run.data.images[part], run.model))
            loss = F.cross_entropy(logits, run.data.labels[part], reduction="sum")
            weights = [run.trainable[n] for n in step]
            gradients = torch.autograd.grad(loss / len(index), weights)
            products = torch._foreach_mul(gradients, list(step.values()))
            total = total + torch.stack([p.sum() for p in products])
        return total

    def server_step(self, state, update):
        length = self.next_length(state, update)
        step = {}
        for i, (n, v) in enumerate(update.vector.items()):
            step[n] = length[i] * v
        if self.matched:
            ratio = squared_norm(update.vector) / squared_norm(step).clamp(min=1e-30)
            step = scale(step, ratio.sqrt())
        memory = {"step": step, "lengths": {"length": length}}
        return add(state.params, step), memory

    def next_length(self, state: State, update: CohortUpdate) -> Tensor:
        """eta (tensors,), in the order of the weights."""
        if not state.algorithm_state:
            where = update.losses.device
            return torch.ones(len(state.params), device=where)
        length = state.algorithm_state["lengths"]["length"]
        if not update.messages:
            return length
        before = sum(report["before"] for report in update.messages.values())
        after = sum(report["after"] for report in update.messages.values())
        both = after.abs() + before.abs()
        balance = after / both.clamp(min=1e-30)
        longer = length * 2 ** (-self.gain * balance)
        return longer.clamp(self.shortest, self.longest)


class SignElectionMatched(NormMatched, SignElection):
    """Sign election at the norm of FedAvg's update."""


class TiesMatched(NormMatched, Ties):
    """TIES at the norm of FedAvg's update."""


class FisherMergeMatched(NormMatched, FisherMerge):
    """Fisher-weighted merging at the norm of FedAvg's update."""


class HeldOutLengthsMatched(HeldOutLengths):
    """The relative lengths of `HeldOutLengths`, at the norm of FedAvg's update."""
    matched = True


# ------------------------------------------------------------------ masks
def shuffled(weights: Params, fisher: Params, draw: np.random.Generator) -> Params:
    """A mask rule: to each weight the sensitivity of another of its tensor, drawn.

    The control of what a mask owes to its layers: with one calibration round it frees as many of a
    tensor's weights as the least sensitive ones would be, but random ones. Queries, keys and
    values, which share a tensor, count as three.
    """
    scores = {}
    for n, part in fisher.items():
        pieces = part.chunk(3) if ".qkv." in n else [part]
        mixed = []
        for piece in pieces:
            order = torch.from_numpy(draw.permutation(piece.numel()))
            mixed.append(piece.flatten()[order.to(piece.device)].view_as(piece))
        scores[n] = torch.cat(mixed)
    return scores


class Recalibrated(FedAvg):
    """Trains a tenth of the weights, which the clients choose anew every quarter of the run.

    A mask rule is calibrated once, at the start. Here every client of rounds 0, T/4, T/2 and 3T/4
    cuts a mask at the server's weights, on images of its own, and sends it as a bitmap. The weights
    with the most votes, ties drawn, are trained from the next round on; round 0 calibrates alone.
    The head stays as it was fitted, as under a mask rule. Traffic is counted as if all weights
    went, and a float for each entry of a bitmap. Raises ValueError with a rule or without a fitted
    head.
    """
    reads = ("num_rounds",)
    rule = "least_sensitive"
    sparsity = 0.9
    rounds = 4    # of one calibration
    images = 128  # of a client's shard that each of them scores
    times = 4     # calibrations in a run

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.rule or cfg.head in ("train", "probe"):
            raise ValueError(f"algorithm={cfg.algorithm!r} chooses the weights itself and leaves "
                             f"the head as it is: set rule=None, not {cfg.rule!r}, and a fitted "
                             f"head, not {cfg.head!r}")

    def is_due(self, state: State) -> bool:
        due = [i * self.cfg.num_rounds // self.times for i in range(self.times)]
        return state.round in due

    def local_gradient(self, gradients, weights, state, client):
        mask = state.algorithm_state.get("mask", {})
        for n, gradient in gradients.items():
            # The optimizer adds its decay to this, which leaves zero up to rounding.
            frozen = -self.cfg.weight_decay * weights[n]
            if n in mask:
                frozen = gradient.where(mask[n], frozen)
            gradient.copy_(frozen)

    def client_message(self, run, vector, state, client, lr):
        if not self.is_due(state):
            return {}
        run.load(state.params)
        draw = rng("scorers", self.cfg.seed, state.round, client)
        index = draw.permutation(run.shards[client])[:self.images]
        # one seed for all clients, so that they draw the same mask where a rule is chance alone
        seed = rng("mask", self.cfg.seed, state.round).integers(2**31)
        return calibrate_mask(run.model, run.data.images[index], rule=self.rule,
                              sparsity=self.sparsity, rounds=self.rounds, seed=int(seed))

    def server_step(self, state, update):
        mask = state.algorithm_state.get("mask", {})
        params = dict(state.params)
        for n, trainable in mask.items():
            moved = params[n] + update.vector[n]
            params[n] = moved.where(trainable, params[n])
        if update.messages:
            mask = self.elect(list(update.messages.values()), state)
        return params, {"mask": mask}

    def elect(self, masks: list[Params], state: State) -> Params:
        """The entries that most of the masks free, as many as each of them does."""
        votes = sum(flatten(mask).float() for mask in masks)
        number = int(flatten(masks[0]).sum())
        ties = rng("mask", self.cfg.seed, state.round)
        return unflatten(select_lowest(-votes, number, ties), masks[0])


class CalibratedOnce(Recalibrated):
    """The control of `Recalibrated`: the same calibration, at the start alone."""
    times = 1


class Redrawn(Recalibrated):
    """The control of what new weights do: a random tenth, drawn anew every quarter of the run."""
    rule = "random"


class DrawnOnce(Redrawn):
    """A random tenth, drawn at the start alone."""
    times = 1


register_algorithm("fedprox", FedProx)
register_algorithm("scaffold", Scaffold)
register_algorithm("fedavgm", FedAvgM)
register_algorithm("fedadam", FedAdam)
register_algorithm("fedexp", FedExP)
register_algorithm("sign_election", SignElection)
register_algorithm("sign_election_matched", SignElectionMatched)
register_algorithm("ties", Ties)
register_algorithm("ties_matched", TiesMatched)
register_algorithm("fisher", FisherMerge)
register_algorithm("fisher_matched", FisherMergeMatched)
register_algorithm("held_out", HeldOutLengths)
register_algorithm("held_out_matched", HeldOutLengthsMatched)
register_algorithm("recalibrated", Recalibrated)
register_algorithm("calibrated_once", CalibratedOnce)
register_algorithm("redrawn", Redrawn)
register_algorithm("drawn_once", DrawnOnce)
register_rule("shuffled", shuffled, needs_fisher=True)


# ------------------------------------------------------------------ diagnostics: task vectors
def rows_by_tensor(vectors: list[Params]) -> Iterator[Tensor]:
    """Tensor by tensor, so that they need not all be laid out anew: rows (clients, entries)."""
    for n in vectors[0]:
        yield torch.stack([vector[n].flatten() for vector in vectors])


def square_of(vectors: list[Params]) -> Tensor:
    """Zeros, a number for each two clients."""
    return torch.zeros(len(vectors), len(vectors), dtype=torch.float64)


def pairwise_cosines(vectors: list[Params]) -> Tensor:
    """Cosines (clients, clients), float64; 0 with a vector that is zero."""
    products = square_of(vectors)
    for rows in rows_by_tensor(vectors):
        products += (rows @ rows.T).cpu()
    norms = products.diagonal().sqrt()
    lengths = norms[:, None] * norms
    return products / lengths.clamp(min=1e-30)


def pairwise_sign_agreement(vectors: list[Params]) -> Tensor:
    """Share of the entries that both clients move, which both move the same way.

    (clients, clients), float64; NaN where two clients share no entry. Random signs give 0.5 however
    many clients there are.
    """
    same_less_opposite = square_of(vectors)
    both_move = square_of(vectors)
    for rows in rows_by_tensor(vectors):
        signs = rows.sign()
        moved = signs.abs()
        same_less_opposite += (signs @ signs.T).cpu()
        both_move += (moved @ moved.T).cpu()
    same = (same_less_opposite + both_move) / 2
    return same / both_move


def weighted_sign_agreement(vectors: list[Params]) -> float:
    """sum_j |sum_k v_kj| / sum_j sum_k |v_kj|: the share of all movement that survives the sum.

    1 where no two clients disagree, 0 where they cancel; large entries count more. See
    `random_signs` for what chance gives.
    """
    survives = 0.0
    moved = 0.0
    for rows in rows_by_tensor(vectors):
        survives += rows.sum(0).abs().sum().item()
        moved += rows.abs().sum().item()
    return survives / moved if moved else 1.0


def random_signs(vectors: list[Params], draw: np.random.Generator) -> list[Params]:
    """The vectors with their entries' sizes and signs of chance: the floor of an agreement."""
    flipped = []
    for vector in vectors:
        signs = {}
        for n, v in vector.items():
            coins = 2 * draw.integers(0, 2, v.shape) - 1
            signs[n] = v * torch.from_numpy(coins).to(v)
        flipped.append(signs)
    return flipped


# ------------------------------------------------------------------ diagnostics: functions
def damage_over_gain(change: Tensor, own: Tensor, everyone: Tensor) -> dict:
    """What task vectors do to the loss of those they come from, and of all others.

    `change` (vectors, classes) is the loss of each class with the vector less without it, NaN for
    a class without images; `own` (vectors, classes) counts the training images of the vector's
    clients, `everyone` (classes,) those of all clients. `gain` is by how much the loss of the own
    images falls, `damage` by how much that of all other clients' rises, both weighted by class, one
    a vector. `ratio` is damage over gain of all vectors together, None where they gain nothing.
    """
    known = ~change.isnan().any(0)
    change = in_float64(change[:, known])
    own = in_float64(own[:, known])
    others = in_float64(everyone[known]) - own
    gain = -weighted_mean(change, own)
    damage = weighted_mean(change, others)
    total = gain.sum()
    ratio = None
    if total > 0:
        ratio = (damage.sum() / total).item()
    return dict(gain=gain.tolist(), damage=damage.tolist(), ratio=ratio)


def foreign_damage(change: Tensor, own: Tensor, everyone: Tensor) -> list[float]:
    """By how much each vector raises the loss on the classes that its client does not hold.

    In nats, weighted by the images that others hold of them; NaN where a client holds all classes.
    Shapes as for `damage_over_gain`, whose `damage` also counts others' images of the client's own
    classes: with ten classes a client a part of the gain is thereby taken off the damage.
    """
    known = ~change.isnan().any(0)
    foreign = in_float64(everyone * (own == 0))[:, known]
    damage = weighted_mean(in_float64(change[:, known]), foreign)
    return damage.masked_fill(foreign.sum(1) == 0, math.nan).tolist()


def weighted_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Means (rows,) of values (rows, n) by counts (rows, n); 0 where there is none."""
    # an infinite loss of a class that nobody has must not make a NaN of the mean
    total = torch.where(counts > 0, values * counts, 0).sum(1)
    return total / counts.sum(1).clamp(min=1)


def in_float64(values: Tensor) -> Tensor:
    """The same in float64, on the CPU where the device has none."""
    return values.to(precise_device(values)).double()


def class_means(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Means (classes,) of values (n,) by class; NaN for a class without images."""
    sums = values.new_zeros(num_classes)
    sums.index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=num_classes)


def disentanglement_error(single: Tensor, joint: Tensor, owned: Tensor) -> float:
    """How often a client's own images are predicted otherwise by all vectors than by its own alone.

    Ortiz-Jimenez et al. 2023, with prediction disagreement as distance, a mean over clients
    of the share of images. `single` (clients, n) are predictions at w + tau_k, `joint` (n,) those
    at w + sum of tau, and `owned` (clients, n) is True for images of the client's classes.
    """
    differs = in_float64(single != joint)
    return weighted_mean(differs, in_float64(owned)).mean().item()


def localization_error(single: Tensor, start: Tensor, owned: Tensor) -> float | None:
    """How often a client's vector changes predictions of images that are not of its classes.

    Function localisation (Iurada et al. 2025) wants f(x, w + tau_k) = f(x, w) there. Shapes
    as for `disentanglement_error`, with `start` (n,) the predictions at w. None where every client
    has all classes.
    """
    foreign = ~owned
    has_some = foreign.any(1)
    if not has_some.any():
        return None
    changed = in_float64(single != start)
    return weighted_mean(changed, in_float64(foreign))[has_some].mean().item()


def zero_classes(per_class: list[float | None]) -> float:
    """Share of the classes with images whose accuracy is exactly zero."""
    known = [accuracy for accuracy in per_class if accuracy is not None]
    return sum(accuracy == 0 for accuracy in known) / len(known)


def overlap(a: Params, b: Params) -> float:
    """Intersection over union of the True entries of two masks; 1 where neither has any."""
    foreign = sorted(a.keys() ^ b.keys())
    if foreign:
        raise KeyError(f"only one of the two masks has {foreign}")
    both = 0
    either = 0
    for n in a:
        both += int((a[n] & b[n]).sum())
        either += int((a[n] | b[n]).sum())
    return both / either if either else 1.0


# ------------------------------------------------------------------ diagnostics: of a run
def measures_sha256() -> str:
    """Of all that measures: an edited measure never returns what an older one found."""
    measures = (
        rows_by_tensor,
        square_of,
        pairwise_cosines,
        pairwise_sign_agreement,
        weighted_sign_agreement,
        random_signs,
        damage_over_gain,
        foreign_damage,
        weighted_mean,
        class_means,
        in_float64,
        disentanglement_error,
        localization_error,
        overlap,
        without_nan,
        sample,
        answers,
        number_of_classes,
        class_counts,
        cohort_vectors,
        diagnose,
        disagreement,
        interference,
        effects,
        trade_off,
        along,
        unlearn,
        right_answers,
        mean_where,
        overlaps,
        mask_noise_floor,
    )
    return json_sha256([source_sha256(function) for function in measures])


def kept(kind: str, cfg: Config, store: Store, options: dict,
         measure: Callable[[Run, State], dict], unread: tuple[str, ...] = ()) -> dict:
    """`measure(run, state)` at the run's weights, once: kept in notes/, {} in a frozen store.

    Runs that differ in fields that are `unread` alone have one note. `options["at"]` is "last" for
    the weights of the finished run, "start" for those before the first round. Clients train by
    plain FedAvg for the measurement, whatever the run's algorithm.
    Raises ValueError where the last weights are asked for and are not stored.
    """
    at = options["at"]
    if at not in ("start", "last"):
        raise ValueError(f"{at=} must be 'start' or 'last'")
    result = store.result(cfg) if at == "last" else None
    # The history tells one training of a run from another, by other code for instance.
    trained = json_sha256(result["history"]) if result else None
    key = dict(run_key(cfg), options=options, trained=trained, code=measures_sha256())
    for name in unread:
        del key[name]

    def compute():
        run, state = open_run(cfg, store, resume=at == "last")
        run = replace(run, algorithm=FedAvg(cfg))
        if at == "start":
            return without_nan(measure(run, state))
        if state.round != cfg.length:
            raise ValueError(f"{run_name(cfg)} is stored up to round {state.round} of "
                             f"{cfg.length}: train it first, then measure it")
        return without_nan(measure(run, replace(state, algorithm_state={})))
    return store.compute_or_load(kind, key, compute)


def without_nan(value):
    """None, which JSON has, for every NaN and infinity, which it lacks, in lists and dicts."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sample(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """About `number` validation images, as many of each class, and their labels."""
    val = run.data.val
    labels = run.data.labels[val].cpu().numpy()
    by_class = val[np.argsort(labels, kind="stable")]
    index = by_class[::max(1, len(val) // number)]
    return run.data.images[index], run.data.labels[index]


def answers(run: Run, params: Params, images: Tensor, labels: Tensor,
            batch: int = 500) -> tuple[Tensor, Tensor]:
    """(loss, prediction) of each image (n,) at these weights."""
    run.load(params)
    run.model.eval()
    losses, predictions = [], []
    with torch.no_grad(), autocast(run.cfg, images.device):
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            logits = run.model(model_input(x, run.model)).float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            predictions.append(logits.argmax(1))
    return torch.cat(losses), torch.cat(predictions)


def number_of_classes(run: Run) -> int:
    return int(run.data.labels.max()) + 1


def class_counts(run: Run, clients: list[int], num_classes: int) -> Tensor:
    """Training images of each class at each client (clients, classes)."""
    counts = []
    for k in clients:
        labels = run.data.labels[run.shards[k]]
        counts.append(torch.bincount(labels, minlength=num_classes))
    return torch.stack(counts)


def cohort_vectors(run: Run, state: State) -> tuple[list[int], list[Params]]:
    """The clients of the round after `state` and their task vectors at the run's full rate.

    At the run's own rate a cosine would have them stand still at the end. Holds all vectors.
    """
    cfg = run.cfg
    key = ("cohort", cfg.seed, state.round)
    clients = cohort(cfg.num_clients, cfg.participation, *key).tolist()
    vectors = [client_update(run, state, k, cfg.lr).vector for k in clients]
    return clients, vectors


def diagnose(cfg: Config, store: Store, at: str = "last", images: int = 2000,
             alphas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)) -> dict:
    """How the task vectors of one cohort get on with each other, at the weights of a run.

    `clients`, `shares`, `norms`, `mean_norm`; `cosine` and `sign_agreement` (clients, clients);
    `weighted_agreement` and its `weighted_floor` of random signs; `single` and `mean`, the
    `damage_over_gain` of the vectors and of their mean; `localization_error`;
    `disentanglement_error` with the sum of the vectors, and `mean_error` with their mean in its
    place; `alphas`, `losses` and `top1` along the mean, where alpha = 0 is the run's weights. All
    on about `images` validation images. See `kept` for `at` and errors.
    """
    options = dict(at=at, images=images, alphas=[0.0, *alphas])

    def measure(run, state):
        clients, vectors = cohort_vectors(run, state)
        shares = shares_of(run, clients)
        mean = FedAvg.combine(run.algorithm, vectors, shares, {})
        x, y = sample(run, images)
        found = dict(clients=clients, shares=shares)
        found |= disagreement(run, vectors, mean)
        found |= interference(run, state.params, clients, vectors, mean, x, y)
        found |= along(run, state.params, mean, options["alphas"], x, y)
        return found
    return kept("diagnosis", cfg, store, options, measure)


def disagreement(run: Run, vectors: list[Params], mean: Params) -> dict:
    """Norms, cosines and agreement in sign."""
    norms = [squared_norm(v).sqrt().item() for v in vectors]
    by_chance = random_signs(vectors, rng("scorers", run.cfg.seed))
    return dict(
        norms=norms,
        mean_norm=squared_norm(mean).sqrt().item(),
        cosine=pairwise_cosines(vectors).tolist(),
        sign_agreement=pairwise_sign_agreement(vectors).tolist(),
        weighted_agreement=weighted_sign_agreement(vectors),
        weighted_floor=weighted_sign_agreement(by_chance))


def interference(run: Run, start: Params, clients: list[int], vectors: list[Params], mean: Params,
                 images: Tensor, labels: Tensor) -> dict:
    """What single vectors, their mean and their sum do to own and to others' classes."""
    num_classes = number_of_classes(run)
    own = class_counts(run, clients, num_classes)
    everyone = class_counts(run, range(run.cfg.num_clients), num_classes).sum(0)
    owned = own[:, labels] > 0

    loss, prediction = answers(run, start, images, labels)
    total = vectors[0]
    for vector in vectors[1:]:
        total = add(total, vector)
    changes, predictions = effects(run, start, [*vectors, mean, total], loss, images, labels)
    singles = predictions[:-2]
    return dict(
        single=damage_over_gain(changes[:-2], own, everyone),
        mean=damage_over_gain(changes[-2:-1], own.sum(0, keepdim=True), everyone),
        localization_error=localization_error(singles, prediction, owned),
        disentanglement_error=disentanglement_error(singles, predictions[-1], owned),
        mean_error=disentanglement_error(singles, predictions[-2], owned))


def effects(run: Run, start: Params, vectors: list[Params], loss: Tensor, images: Tensor,
            labels: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of loss (vectors, classes) and predictions (vectors, n) with each vector added.

    `loss` (n,) is that at the start.
    """
    num_classes = number_of_classes(run)
    changes, predictions = [], []
    for vector in vectors:
        new_loss, prediction = answers(run, add(start, vector), images, labels)
        # a vector that diverged is infinitely bad, and no class without images
        change = new_loss.nan_to_num(nan=math.inf, posinf=math.inf) - loss
        changes.append(class_means(change, labels, num_classes))
        predictions.append(prediction)
    return torch.stack(changes), torch.stack(predictions)


def along(run: Run, start: Params, vector: Params, alphas: list[float], images: Tensor,
          labels: Tensor) -> dict:
    """Mean loss and accuracy at start + alpha * vector."""
    losses, top1 = [], []
    for alpha in alphas:
        loss, prediction = answers(run, apply_vector(start, vector, alpha), images, labels)
        losses.append(loss.mean().item())
        hits = (prediction == labels).float()
        top1.append(hits.mean().item())
    return dict(alphas=alphas, losses=losses, top1=top1)


def trade_off(cfg: Config, store: Store, rates: Iterable[float], images: int = 1000) -> dict:
    """What a client's first task vector gains on its own classes and costs on others, by rate.

    Vectors of two rules at one rate differ in how far they go; compare damages at equal gain, with
    `damage_at`. Of the cohort of the first round, at the untrained start: `clients`, and (rates,
    clients) in nats the `gain` of `damage_over_gain` and the `damage` of `foreign_damage`, None
    where a vector is not finite. The rate of `cfg` plays no part but for a sparse run's head that
    is trained. With IID clients own classes are everyone's, and there is no damage to measure.
    """
    rates = sorted(rates)
    options = dict(at="start", images=images, rates=rates)

    def measure(run, state):
        x, y = sample(run, images)
        loss, _ = answers(run, state.params, x, y)
        num_classes = number_of_classes(run)
        everyone = class_counts(run, range(cfg.num_clients), num_classes).sum(0)
        found = dict(gain=[], damage=[])
        for lr in rates:
            at_rate = replace(run, cfg=replace(cfg, lr=lr))
            clients, vectors = cohort_vectors(at_rate, state)
            changes, _ = effects(run, state.params, vectors, loss, x, y)
            own = class_counts(run, clients, num_classes)
            found["gain"].append(damage_over_gain(changes, own, everyone)["gain"])
            found["damage"].append(foreign_damage(changes, own, everyone))
        return dict(found, clients=clients)
    # a sparse run's head that is trained first is so at the run's rate
    unread = () if cfg.head == "train" and cfg.rule else ("lr",)
    return kept("trade_off", cfg, store, options, measure, unread)


def damage_at(gains: Iterable[float], damages: Iterable[float], gain: float) -> float:
    """The damage at a gain (both in nats), between the first two rates whose gains enclose it.

    `gains` and `damages` in the order of rates; log damage is linear in log gain between two rates.
    NaN where the gain is not reached, or a damage beside it is not positive.
    """
    points = list(zip(gains, damages, strict=True))
    for (low, before), (high, after) in zip(points, points[1:], strict=False):
        if 0 < low <= gain <= high and before > 0 and after > 0:
            part = math.log(gain / low) / math.log(high / low) if high > low else 0.0
            return before * (after / before) ** part
    return math.nan


# ------------------------------------------------------------------ unlearning a client
def unlearn(cfg: Config, store: Store, number: int = 5, images: int = 5000,
            alphas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)) -> dict:
    """Forgetting a client by negation (Ilharco et al. 2023): accuracies at w - alpha * tau_k.

    w are the last weights of the run and tau_k what client k learns from there in a round. For each
    of the first `number` clients of the next cohort: `classes`, and `own` and `others`, accuracies
    on validation images of its classes and of those that none of these clients has (clients,
    alphas), None where there is no such image. `train_without` gives the reference that never had
    any of them.
    """
    options = dict(at="last", number=number, images=images, alphas=list(alphas))

    def measure(run, state):
        clients, vectors = cohort_vectors(run, state)
        clients = clients[:number]
        x, y = sample(run, images)
        counts = class_counts(run, clients, number_of_classes(run))
        foreign = ~(counts > 0).any(0)
        found = dict(clients=clients, alphas=list(alphas), classes=[], own=[], others=[])
        for k in range(len(clients)):
            mine = counts[k] > 0
            own = []
            others = []
            for alpha in alphas:
                params = apply_vector(state.params, vectors[k], -alpha)
                hits = right_answers(run, params, x, y)
                own.append(mean_where(hits, mine[y]))
                others.append(mean_where(hits, foreign[y]))
            found["classes"].append(mine.nonzero()[:, 0].tolist())
            found["own"].append(own)
            found["others"].append(others)
        return found
    return kept("unlearning", cfg, store, options, measure)


def right_answers(run: Run, params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """1 for each image (n,) that is classified rightly at these weights, else 0."""
    _, prediction = answers(run, params, images, labels)
    return (prediction == labels).float()


def mean_where(values: Tensor, chosen: Tensor) -> float | None:
    """Mean of the chosen values; None where none is."""
    if not chosen.any():
        return None
    return values[chosen].mean().item()


def train_without(cfg: Config, clients: Iterable[int], store: Store, **options) -> dict:
    """The run in which `clients` never answer, trained or found: the reference of `unlearn`.

    It lives in `store_without`, for its configuration is that of the run with them. The head is
    fitted before the first round, on all clients' sums, and so still knows them.
    """
    clients = list(clients)

    def others(run, state, cohort, lr):
        return train_cohort(run, state, [k for k in cohort if k not in clients], lr)
    step = partial(federated_round, train_cohort=others)
    return train(cfg, store_without(store, clients), step=step, **options)


def store_without(store: Store, clients: Iterable[int]) -> Store:
    """The folder, inside `store`, of runs in which these clients never answer."""
    return store.inside("without_" + "_".join(map(str, clients)))


# ------------------------------------------------------------------ overlap of masks
def overlaps(cfgs: list[Config], store: Store) -> dict:
    """{"iou": rows} of the `overlap` of each two runs' masks, kept; {} from a frozen store."""
    def compute():
        masks = []
        for cfg in cfgs:
            if cfg.rule is None:
                raise ValueError(f"{run_name(cfg)} trains all weights: it has no mask to overlap")
            run, _ = open_run(cfg, store)
            masks.append(run.mask)
        return {"iou": [[overlap(a, b) for b in masks] for a in masks]}
    key = dict(runs=[run_key(cfg) for cfg in cfgs], code=measures_sha256())
    return store.compute_or_load("overlap", key, compute)


def mask_noise_floor(cfg: Config, store: Store, images: int | None = None) -> dict:
    """{"iou": overlap} of two central masks from disjoint sets of `images` training images.

    Both are of the run's rule, from its starting weights; `images` defaults to calibration_images.
    What separates clients' masks must be compared with this, for two draws of images from one
    source differ as well. Raises ValueError for rules that read no images, or too many images.
    """
    if cfg.rule is None or not RULES[cfg.rule].needs_fisher:
        raise ValueError(f"rule={cfg.rule!r} reads no images: its mask has no such noise")
    images = images or cfg.calibration_images

    def compute():
        run, _ = open_run(cfg, store)
        if 2 * images > len(run.data.train):
            raise ValueError(f"two disjoint sets of {images} images are more than the "
                             f"{len(run.data.train)} for training")
        order = rng("scorers", cfg.seed, 0).permutation(run.data.train)
        masks = []
        for index in np.split(order[:2 * images], 2):
            mask = calibrate_mask(
                run.model, run.data.images[index], rule=cfg.rule, sparsity=cfg.sparsity,
                rounds=cfg.calibration_rounds, seed=cfg.seed)
            masks.append(mask)
        return {"iou": overlap(*masks)}
    key = dict(run_key(cfg), images=images, code=measures_sha256())
    return store.compute_or_load("noise_floor", key, compute)


measures_sha256()  # reads their sources while the file is still what was imported
