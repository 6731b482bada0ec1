"""Federated learning under the lens of task arithmetic: masks, federated averaging, training.

Below lie notebooks/basics.py (configuration, randomness, data, model) and notebooks/store.py
(checkpoints and results), above it notebooks/display.py (panel, tables, figures); this module has
all their names, so that it is the one to import. Weights, scores, masks and task vectors have one
currency: `dict[str, Tensor]` keyed by parameter name.
"""
import math
import re
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from platform import python_version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

# isort: off
from notebooks.basics import (  # noqa: F401  handed on
    ARCHS, DINO, HEAD, NOTES, NO_CONTEXT, PRESETS, ROOT, RULES, STREAMS, Config, Data, Params,
    augment, backbone, build_model, code_version, cohort, cohort_size, device, digest, evaluate,
    features, flat, hardware, identity, learning_rate, leave_ranks, load_data, precision, prepare,
    preset, ranks, refuse_labels, ridge_from_sums, ridge_head, ridge_sums, rng, run_name, shard,
    sharpen, split, squared_norm, sum_over_ranks, unflat, world_size)
from notebooks.store import State, Store, dump
# isort: on


# ------------------------------------------------------------------ SparseSGDM
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


class SparseSGDM(torch.optim.SGD):
    """SGD with momentum that moves only entries whose mask is True; without one, torch.optim.SGD.

    The mask comes after weight decay, so a frozen entry neither decays nor drifts. It is keyed by
    parameter name and must have every parameter that requires a gradient: else KeyError, or
    ValueError for another shape. `step` leaves the decayed, masked gradient in `.grad`.
    """

    def __init__(self, named_params, lr, momentum=0.9, weight_decay=0.0, dampening=0.0,
                 nesterov=False, mask: Params | None = None):
        every = dict(named_params)
        named = {n: p for n, p in every.items() if p.requires_grad}
        if mask is not None and (wrong := (mask.keys() - every) | (named.keys() - mask)):
            raise KeyError(f"only one of mask and weights has {sorted(wrong)}")
        for n in named if mask is not None else ():
            if mask[n].shape != named[n].shape:
                raise ValueError(f"the mask of {n} has shape {tuple(mask[n].shape)}, its weight "
                                 f"{tuple(named[n].shape)}")
            if mask[n].dtype != torch.bool and not ((mask[n] == 0) | (mask[n] == 1)).all():
                raise ValueError(f"the mask of {n} has other values than 0 and 1")
        super().__init__(named.values(), lr, momentum, dampening,
                         weight_decay if mask is None else 0.0, nesterov, foreach=True)
        self.decay = weight_decay
        self.bits = None if mask is None else {p: mask[n].to(_BITS[p.element_size()])
                                               for n, p in named.items()}

    def step(self, closure=None):
        loss = closure() if closure else None
        if self.bits is not None:
            params = [p for p in self.bits if p.grad is not None]
            grads = [p.grad for p in params]
            with torch.no_grad():
                torch._foreach_add_(grads, params, alpha=self.decay)
                # by 1 or 0 as whole numbers: a float's zero times NaN would move a frozen weight
                torch._foreach_mul_([g.view(_BITS[g.element_size()]) for g in grads],
                                    [self.bits[p] for p in params])
        super().step()
        return loss


# ------------------------------------------------------------------ sensitivity and masks
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)


def maskable(model: nn.Module) -> list[str]:
    """Names of the weights and biases of Linear, Conv2d and LayerNorm layers outside the head."""
    return [f"{m}.{p}" for m, layer in model.named_modules() if isinstance(layer, LAYERS)
            and m != "head" for p, _ in layer.named_parameters(recurse=False)]


def squared_gradients(layer: nn.Module, x: Tensor, d: Tensor) -> Params:
    """Squared per-sample gradients of a layer's weight and bias, summed over the batch.

    x is the layer's input and d the objective's gradient with respect to its output, sample first.
    A sample's weight gradient is the sum of d_t x_t' over positions t, so no loop is needed.
    """
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        x, d = x.transpose(1, 2), d.flatten(2).transpose(1, 2)
    x, d = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, d))
    if isinstance(layer, nn.LayerNorm):
        weight = (d * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)).sum(1)
    else:
        weight = torch.einsum("nto,nti->noi", d, x)
    return {"weight": weight.square().sum(0).view_as(layer.weight),
            "bias": d.sum(1).square().sum(0)}


def sensitivity(model: nn.Module, images: Tensor, labels: Tensor | np.random.Generator,
                chunk: int = 16, weights: Params | None = None, names=None) -> Params:
    """Diagonal Fisher information, float64: the sum over samples of (d log p(y|x) / d theta)^2.

    Iurada et al. 2025, eq. 7. Samples are squared one by one, for a batch's gradient would mix
    them; `chunk` of them at a time bounds the memory and changes nothing. A generator as `labels`
    draws them from the model's own distribution. `weights` stand in for the stored ones, which
    never change. KeyError for `names` that are not of a Linear, Conv2d or LayerNorm, ValueError
    where images and labels differ in number.
    """
    if chunk < 1 or not len(images) or isinstance(labels, Tensor) and len(labels) != len(images):
        raise ValueError(f"{chunk=} must be at least 1, and the {len(images)} images, some, have "
                         f"as many labels, not {len(labels) if isinstance(labels, Tensor) else 0}")
    weights = {n: p.detach() for n, p in model.named_parameters()} | (weights or {})
    total = {n: torch.zeros_like(weights[n], dtype=torch.float64)
             for n in (maskable(model) if names is None else names)}
    layers = {m: layer for m, layer in model.named_modules() if isinstance(layer, LAYERS)}
    if foreign := [n for n in total if n.rpartition(".")[0] not in layers]:
        raise KeyError(f"{foreign} are not parameters of a Linear, Conv2d or LayerNorm")

    def watch(m, layer, inputs, output):
        def score(d):
            for p, squares in squared_gradients(layer, inputs[0].detach(), d).items():
                if f"{m}.{p}" in total:
                    total[f"{m}.{p}"] += squares
        output.register_hook(score)

    hooks = [layers[m].register_forward_hook(partial(watch, m)) for m in
             {n.rpartition(".")[0] for n in total}]
    model.eval()
    try:
        for i in range(0, len(images), chunk):
            x = prepare(images[i:i + chunk], model).detach().requires_grad_()
            logp = torch.func.functional_call(model, weights, (x,)).log_softmax(1)
            y = labels[i:i + chunk] if isinstance(labels, Tensor) else _sample(logp, labels)
            refuse_labels(y, len(x), logp.shape[1])
            torch.autograd.grad(logp.gather(1, y[:, None]).sum(), x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _sample(logp: Tensor, draw: np.random.Generator) -> Tensor:
    """One label for every row of log-probabilities (n, classes)."""
    uniform = torch.from_numpy(draw.random((len(logp), 1))).to(logp.device)
    labels = torch.searchsorted(logp.detach().double().exp().cumsum(1), uniform)[:, 0]
    return labels.clamp(max=logp.shape[1] - 1)  # the sum may end below 1 by rounding


def sample_labels(model: nn.Module, images: Tensor, seed: int, batch: int = 500) -> Tensor:
    """Labels (n,) drawn from the model's own predictive distribution, in eval mode."""
    draw = rng("labels", seed)
    model.eval()
    with torch.no_grad():  # not inference_mode: the labels go into `sensitivity`
        return torch.cat([_sample(model(prepare(x, model)).log_softmax(1), draw)
                          for x in images.split(batch)])


def lowest(scores: Tensor, k: int, draw: np.random.Generator) -> Tensor:
    """True at exactly `k` of the lowest of the flat `scores`; ties at the cut are drawn.

    Raises ValueError for scores that are not numbers. (torch.quantile refuses 2^24 entries.)
    """
    if scores.isnan().any():
        raise ValueError("the scores hold NaN: is the model finite on these images?")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(k).values
    keep, ties = scores < cut, (scores == cut).nonzero()[:, 0]
    chosen = draw.permutation(len(ties))[:k - int(keep.sum())]
    keep[ties[torch.from_numpy(chosen).to(ties.device)]] = True
    return keep


def calibrate_mask(model: nn.Module, images: Tensor | list[Tensor], *, rule: str, sparsity: float,
                   rounds: int = 4, labels=None, soft: float = 0.1, seed: int = 0, names=None,
                   combine: str = "mean", participation: float = 1.0, chunk: int = 8) -> Params:
    """A mask (bool, True = trained) with exactly round((1 - sparsity) * m) of m entries True.

    Sensitivity rules follow Iurada et al. 2025, Algorithm 1: each of `rounds` scores afresh with
    frozen weights damped by `soft` and labels redrawn (unless given), then cuts further; what is
    frozen never returns. Lists of images (and labels), a tensor a client, calibrate in federation:
    a share `participation` of the clients scores, and the server combines by "mean", "max" (of the
    scores per image) or "vote" (each client's own cut as a bitmap). `names` defaults to `maskable`.
    """
    if rule not in RULES or not 0 <= sparsity <= 1 or rounds not in range(1, 10_000) or (
            combine not in ("mean", "max", "vote")) or not 0 <= soft <= 1:
        raise ValueError(f"{rule=} must be one of {RULES}, {sparsity=} and {soft=} from 0 to 1, "
                         f"{rounds=} a number from 1, and {combine=} 'mean', 'max' or 'vote'")
    every = {n: p.detach() for n, p in model.named_parameters()}
    weights = {n: every[n] for n in (maskable(model) if names is None else names)}
    m, draw = sum(w.numel() for w in weights.values()), rng("mask", seed)
    if rule not in ("least_sensitive", "most_sensitive"):
        scores = _static_scores(rule, weights, draw)
        return unflat(lowest(scores, round((1 - sparsity) * m), draw), weights)
    clients = [images] if isinstance(images, Tensor) else images
    labels = [labels] if isinstance(images, Tensor) else labels or [None] * len(clients)
    if len(labels) != len(clients) or not len(images):
        raise ValueError(f"{len(clients)} clients with {len(images)} images or parts of them have "
                         f"{len(labels)} lists of labels: as many, and some images, are needed")
    sign = 1 if rule == "least_sensitive" else -1
    active = torch.ones_like(flat(weights), dtype=torch.bool)
    for r in range(1, rounds + 1):
        keep, fresh, total = round((1 - sparsity) ** (r / rounds) * m), rng("labels", seed, r), None
        damped = {n: torch.where(c, weights[n], soft * weights[n])
                  for n, c in unflat(active, weights).items()}
        for k in np.sort(cohort(len(clients), participation, "scorers", seed, r)):
            y = fresh if labels[k] is None else labels[k]
            score = flat(sensitivity(model, clients[k], y, chunk, damped, names)).mul_(sign)
            if combine == "vote":
                score = -lowest(score.masked_fill_(~active, math.inf), keep, draw).double()
            if combine == "max":
                score = score.div_(len(clients[k]))
                total = score if total is None else sign * torch.maximum(sign * total, sign * score)
            else:
                total = score if total is None else total.add_(score)
        active = lowest(total.masked_fill_(~active, math.inf), keep, draw)
    return unflat(active, weights)


def _static_scores(rule: str, weights: Params, draw: np.random.Generator) -> Tensor:
    """Scores of the rules that look at no data; the lowest are left free."""
    if "magnitude" in rule:
        return flat(weights).abs() * (1 if rule == "lowest_magnitude" else -1)
    scores = torch.from_numpy(draw.random(sum(w.numel() for w in weights.values())))
    scores = scores.to(flat(weights).device)
    if rule == "query_key":  # all other entries come after, should the budget reach them
        for n, part in unflat(scores, weights).items():
            part += 1
            if ".qkv." in n:
                part[:len(part) // 3 * 2] -= 1
    return scores


def composition(mask: Params) -> dict[str, list[int]]:
    """[free, all] entries of a ViT's mask per kind of layer; query, key and value apart."""
    counts = {}
    for n, c in mask.items():
        kind = re.sub(r"^blocks\.\d+\.", "", n)
        qkv = zip(("query", "key", "value"), c.chunk(3), strict=True)
        parts = qkv if ".qkv." in n else [("qkv", c)]
        for part, entries in parts:
            old = counts.get(name := kind.replace("qkv", part), (0, 0))
            counts[name] = [old[0] + int(entries.sum()), old[1] + entries.numel()]
    return counts


# ------------------------------------------------------------------ task vectors
def add(a: Params, b: Params) -> Params:
    """Sum of two task vectors; KeyError unless both name the same weights, in the same shapes."""
    if wrong := [n for n in a.keys() | b.keys()
                 if n not in a or n not in b or a[n].shape != b[n].shape]:
        raise KeyError(f"only one of the two has {sorted(wrong)} in its shape")
    return {n: a[n] + b[n] for n in a}


def scale(vector: Params, alpha: float) -> Params:
    return {n: alpha * v for n, v in vector.items()}


def negate(vector: Params) -> Params:
    return scale(vector, -1)


def task_vector(tuned: Params, start: Params) -> Params:
    """tuned - start (Ilharco et al. 2023)."""
    return add(tuned, negate(start))


def apply_vector(start: Params, vector: Params, alpha: float = 1.0) -> Params:
    """start + alpha * vector."""
    return add(start, scale(vector, alpha))


# ------------------------------------------------------------------ federated averaging
@dataclass(frozen=True)
class Run:
    """All that a run reads and never changes, and the model whose tensors it trains in place."""
    cfg: Config
    data: Data
    model: nn.Module
    trained: Params              # the model's own tensors that require gradients
    mask: Params | None
    shards: list[np.ndarray]     # indices of data.images
    facts: dict                  # provenance, for the stored result

    @cached_property
    def free(self) -> int:
        """Entries that are trained, and so travel."""
        return sum(int(c.sum()) for c in self.mask.values()) if self.mask else sum(
            p.numel() for p in self.trained.values())

    @cached_property
    def _optimizer(self) -> SparseSGDM:
        return SparseSGDM(self.trained.items(), self.cfg.lr, self.cfg.momentum,
                          self.cfg.weight_decay, mask=self.mask)

    def optimizer(self, lr: float) -> SparseSGDM:
        """Fresh momentum; the mask is checked and laid out once for all clients and rounds."""
        self._optimizer.state.clear()
        self._optimizer.param_groups[0]["lr"] = lr
        return self._optimizer

    def vector(self, server: Params) -> Params:
        """The task vector of the weights that the model holds."""
        return task_vector({n: p.detach() for n, p in self.trained.items()}, server)

    def load(self, params: Params):
        torch._foreach_copy_([p.data for p in self.trained.values()],
                             [params[n] for n in self.trained])


def batches(run: Run, order: np.ndarray, draw: np.random.Generator):
    """The images of `order` (indices) in augmented batches of B, with their labels."""
    index = torch.from_numpy(order).to(run.data.images.device, non_blocking=True)
    for i in range(0, len(order), run.cfg.batch_size):
        batch = index[i:i + run.cfg.batch_size]
        yield augment(run.data.images[batch], draw), run.data.labels[batch]


def sgd_step(run: Run, opt: SparseSGDM, images: Tensor, labels: Tensor, adjust=None) -> Tensor:
    """One SGDM step; the loss stays on the device. `adjust` may change the gradients first.

    Where the GPU's memory is too small for the batch, its gradient is summed over smaller parts.
    """
    context, loss_scale = precision(run.cfg)
    parts, loss = run.facts.get("batch_parts", 1), 0.0
    size = -(-len(images) // parts)
    opt.zero_grad()
    try:
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            with context:
                part = F.cross_entropy(run.model(prepare(x, run.model)), y) * (len(x) / len(images))
            (part * loss_scale).backward()
            loss += part.detach()
    except torch.OutOfMemoryError:
        if size == 1:
            raise
        run.facts["batch_parts"] = 2 * parts
        size = 0
    if not size:  # out of the handler, which kept the failed pass's memory alive
        warnings.warn(f"Batches of {len(images)} do not fit into the memory of this GPU: computed "
                      f"in {run.facts['batch_parts']} parts, with the same sums.", stacklevel=2)
        torch.cuda.empty_cache()
        return sgd_step(run, opt, images, labels, adjust)
    grads = [p.grad for p in run.trained.values()]
    if loss_scale != 1:
        torch._foreach_mul_(grads, 1 / loss_scale)
    if adjust:
        adjust(grads)
    opt.step()
    return loss


def client_update(run: Run, state: State, k: int, lr: float) -> Tensor:
    """J local steps of client k on the model, which holds the server's weights w; the mean loss.

    FedProx pulls towards w (Li et al. 2018, eq. 2); SCAFFOLD adds c - c_k (Karimireddy et al. 2020,
    Algorithm 1).
    """
    cfg, server = run.cfg, list(state.params.values())
    theta, loss = [p.data for p in run.trained.values()], server[0].new_zeros(())
    control, own = (list(state.memory.get(key, {}).values()) for key in ("control", f"control/{k}"))

    def adjust(grads):
        if cfg.algorithm == "fedprox":
            torch._foreach_add_(grads, torch._foreach_sub(theta, server), alpha=cfg.prox_mu)
        if control:
            torch._foreach_add_(grads, control)
        if own:
            torch._foreach_sub_(grads, own)

    opt = run.optimizer(lr)
    draw, need = rng("client", cfg.seed, state.round, k), cfg.local_steps * cfg.batch_size
    passes = [draw.permutation(run.shards[k]) for _ in range(-(-need // len(run.shards[k])))]
    for images, labels in batches(run, np.concatenate([*passes, run.shards[k]])[:need], draw):
        loss += sgd_step(run, opt, images, labels, adjust)
    return loss / max(1, cfg.local_steps)


def collect(run: Run, server: Params, mean: Params, share: float) -> Tensor:
    """Adds `share` of the model's task vector w_k - w to the mean; its squared norm.

    The model then holds w again, for the next client: memory does not grow with the cohort. One
    pass does it all, for a GPU in few launches, on a CPU a weight at a time while it is in cache.
    """
    weights, norms = [[p.data for p in run.trained.values()], *(
        [params[n] for n in run.trained] for params in (server, mean))], []
    step = 1 if weights[0][0].device.type == "cpu" else len(run.trained)
    for i in range(0, len(run.trained), step):
        theta, w, total = (part[i:i + step] for part in weights)
        torch._foreach_sub_(theta, w)
        torch._foreach_add_(total, theta, alpha=share)
        norms += torch._foreach_norm(theta)
        torch._foreach_copy_(theta, w)
    return torch.stack(norms).square().sum()


def ask_clients(run: Run, state: State, clients: list[int], lr: float) -> dict:
    """Of each client that answers, in order, a call that trains the model's weights: its loss."""
    return {k: partial(client_update, run, state, k, lr) for k in clients}


def federated_round(run: Run, state: State, ask=ask_clients) -> State:
    """One round of FedAvg (McMahan et al. 2017, Algorithm 1): w <- w + sum_k n_k/n (w_k - w).

    `ask` may have the clients train elsewhere; those that do not answer are left out, by name.
    Raises FloatingPointError, naming the clients, where a loss is not finite.
    """
    cfg, lr = run.cfg, learning_rate(run.cfg, state.round / run.cfg.num_rounds)
    drawn = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round).tolist()
    clients = list(answers := ask(run, state, drawn, lr))
    total, (rank, world) = sum(len(run.shards[k]) for k in clients), ranks()
    mean, controls = {n: torch.zeros_like(w) for n, w in state.params.items()}, {}
    squares, losses = next(iter(mean.values())).new_zeros(2, len(clients))
    run.load(state.params)
    for i, k in list(enumerate(clients))[rank::world]:  # under torchrun each process has its share
        losses[i] = answers[k]()
        if cfg.algorithm == "scaffold":
            controls[k] = new_control(cfg, state, k, run.vector(state.params), lr)
        squares[i] = collect(run, state.params, mean, len(run.shards[k]) / total)
    sum_over_ranks(*mean.values(), squares, losses)
    memory = state.memory | (move_control(cfg, state, clients, controls)
                             if cfg.algorithm == "scaffold" else {})
    square = squared_norm(mean)
    fedexp = squares.mean() / (2 * (square + 1e-12))  # Jhunjhunwala et al. 2023, eq. 8
    params, memory = server_step(cfg, state.params, mean, fedexp.clamp(min=1), memory)
    norms = torch.stack([squares.mean().sqrt(), square.sqrt(), fedexp])
    # the round's only wait for the device:
    *losses, client_norm, mean_norm, step = torch.cat([losses, norms]).tolist()
    watched = dict(zip(clients, losses, strict=True)) | {"norm of the task vectors": client_norm}
    refuse_divergence(cfg, watched, state.round + 1, lr)
    sent = 4 * len(clients) * (1 + (cfg.algorithm == "scaffold"))  # bytes of an entry, in float32
    row = dict(round=state.round + 1, lr=lr, train_loss=sum(losses) / len(losses),
               client_norm=client_norm, mean_norm=mean_norm, fedexp_step=step,
               bytes_up=sent * run.free, bytes_down=sent * run.free,
               bytes_dense=sent * sum(p.numel() for p in run.model.parameters()))
    row |= dict(lost=[k for k in drawn if k not in answers]) if len(clients) < len(drawn) else {}
    return replace(state, params=params, memory=memory, round=row["round"],
                   history=(*state.history, row))


def refuse_divergence(cfg: Config, watched: dict, unit: int, lr: float):
    if bad := {k: v for k, v in watched.items() if not math.isfinite(v)}:
        raise FloatingPointError(f"not finite in round or epoch {unit} at {lr=:g} (client: loss): "
                                 f"{bad}. Try a lower lr than {cfg.lr:g}.")


def new_control(cfg: Config, state: State, k: int, vector: Params, lr: float) -> Params:
    """SCAFFOLD's control variate of client k after its task vector (Karimireddy et al., option II).

    c_k <- c_k - c + (w - w_k) / (lr a). With momentum J steps of one gradient move by lr a times
    it, a = sum_{i<=J} (1 - mu^i) / (1 - mu): J where mu is 0.
    """
    a = sum((1 - cfg.momentum**i) / (1 - cfg.momentum) for i in range(1, cfg.local_steps + 1))
    zero = {n: torch.zeros_like(v) for n, v in vector.items()}
    c, own = (state.memory.get(key, zero) for key in ("control", f"control/{k}"))
    return {n: own[n] - c[n] - v / (lr * max(a, 1)) for n, v in vector.items()}


def move_control(cfg: Config, state: State, clients: list[int], fresh: dict) -> dict[str, Params]:
    """The cohort's `fresh` control variates, and the server's, which moves by a K-th of theirs."""
    zero = {n: torch.zeros_like(w) for n, w in state.params.items()}
    control = state.memory.get("control", zero)
    for k in clients:
        fresh.setdefault(k, {n: torch.zeros_like(w) for n, w in zero.items()})
        sum_over_ranks(*fresh[k].values())  # of which all but one are zero
        change = task_vector(fresh[k], state.memory.get(f"control/{k}", zero))
        control = apply_vector(control, change, 1 / cfg.num_clients)
    return {"control": control} | {f"control/{k}": own for k, own in fresh.items()}


def server_step(cfg: Config, params: Params, mean: Params, fedexp: Tensor, memory: dict):
    """(weights, memory) from the mean task vector: FedAvg, FedExP, or a torch optimizer for which
    it is the negative gradient (FedAvgM, Hsu et al. 2019; FedAdam, Reddi et al. 2021). They may lie
    in the mean's memory: new memory would cost more than the sum."""
    if cfg.server in ("average", "fedexp"):
        mean = scale(mean, fedexp) if cfg.server == "fedexp" else mean
        return {n: mean[n].add_(w) for n, w in params.items()}, memory
    weights = {n: nn.Parameter(w.clone()) for n, w in params.items()}
    if cfg.server == "momentum":
        opt = torch.optim.SGD(weights.values(), cfg.server_lr, cfg.server_momentum)
    else:
        opt = torch.optim.Adam(weights.values(), cfg.server_lr, (cfg.server_momentum, 0.99), 1e-3)
    for n, w in weights.items():
        w.grad = -mean[n]
        opt.state[w] = {key.removeprefix("server/"): kept[n].clone() if kept[n].dim() else
                        kept[n].cpu().clone()  # Adam counts its steps on the CPU
                        for key, kept in memory.items() if key.startswith("server/")}
    opt.step()
    kept = {f"server/{key}": {n: opt.state[w][key] for n, w in weights.items()}
            for key, value in opt.state[w].items() if isinstance(value, Tensor)}
    return {n: w.detach() for n, w in weights.items()}, memory | kept


def centralized_epoch(run: Run, state: State) -> State:
    """One epoch over the training part, momentum carried on; the rate is set at every step."""
    cfg, draw = run.cfg, rng("epoch", run.cfg.seed, state.round)
    run.load(state.params)
    opt = run.optimizer(cfg.lr)
    for n, buffer in state.memory.get("momentum", {}).items():
        opt.state[run.trained[n]]["momentum_buffer"] = buffer.clone()
    steps, loss = math.ceil(len(run.data.train) / cfg.batch_size), 0.0
    for i, (images, labels) in enumerate(batches(run, draw.permutation(run.data.train), draw)):
        lr = learning_rate(cfg, (state.round + i / steps) / cfg.num_epochs)
        opt.param_groups[0]["lr"] = lr
        loss += sgd_step(run, opt, images, labels) / steps
    params = {n: p.detach().clone() for n, p in run.trained.items()}
    watched = {"training": float(loss), "squared norm of the weights": squared_norm(params).item()}
    refuse_divergence(cfg, watched, state.round + 1, lr)
    row = dict(round=state.round + 1, lr=lr, train_loss=float(loss))
    momentum = {n: opt.state[p]["momentum_buffer"] for n, p in run.trained.items() if cfg.momentum}
    return replace(state, params=params, memory={"momentum": momentum}, round=row["round"],
                   history=(*state.history, row))


# ------------------------------------------------------------------ training
def head_of(cfg: Config, store: Store, data: Data, model: nn.Module) -> Params:
    """The head that a run starts from: solved on the training part, or a probe's."""
    def solve():  # in one place: the sums over the clients' shards are the same sums
        x, y = features(model, data.images[data.train]), data.labels[data.train]
        head = sharpen(ridge_head(x, y, cfg.ridge_l2, model.num_classes), x, y)
        return {n: w.float() for n, w in head.items()}
    if cfg.head == "ridge":
        return store.cached("head", dict(backbone=digest(backbone(model)), l2=cfg.ridge_l2,
                                         dataset=cfg.dataset, train=data.train.tolist()), solve)
    plain = {k: getattr(Config(), k)
             for k in ("prox_mu", "ridge_l2", "server_lr", "server_momentum")}
    probe = replace(cfg, name="", rule=None, head="probe", server="average", **plain,
                    num_rounds=cfg.head_rounds, num_epochs=cfg.head_rounds,
                    algorithm="centralized" if cfg.algorithm == "centralized" else "fedavg")
    if train(probe, store, test=False)["status"] != "finished":
        raise KeyboardInterrupt
    return store.resume(probe).best


def mask_of(cfg: Config, store: Store, data: Data, model: nn.Module, shards: list) -> Params:
    """The run's mask, calibrated at one place or by the clients, each on images of its shard."""
    central = cfg.calibration == "central" or not shards
    groups, share = ([data.train], 1.0) if central else (shards, cfg.calibration_clients)
    size = max(1, cfg.calibration_images // cohort_size(len(groups), share))
    draw = rng("mask", cfg.seed, 1)
    index = [draw.permutation(g)[:size].tolist() for g in groups]
    options = dict(rule=cfg.rule, sparsity=cfg.sparsity, rounds=cfg.calibration_rounds,
                   seed=cfg.seed, participation=share,
                   combine="mean" if central else cfg.calibration)
    key = dict(options, dataset=cfg.dataset, index=index, model=digest(model.state_dict()))
    chunk = 8 if device().type == "cpu" else 32
    return store.cached("mask", key, lambda: calibrate_mask(
        model, [data.images[i] for i in index], chunk=chunk, **options))


def open_run(cfg: Config, store: Store | None, head_of=head_of, mask_of=mask_of):
    """A Run (data, model, head, mask and shards) and the State to go on from.

    Without a store it is the first; a worker elsewhere has its head and mask from the server.
    """
    data, model = load_data(cfg), build_model(cfg)
    names, mask = [n for n, _ in model.named_parameters()], None
    facts = dict(backbone=digest(backbone(model)), batch_parts=1)
    labels = data.labels.cpu().numpy()[data.train]
    shards = [] if cfg.algorithm == "centralized" else [
        data.train[s] for s in shard(labels, cfg.num_clients, cfg.classes_per_client, cfg.seed)]
    if cfg.head == "probe":
        names = HEAD
    elif cfg.rule or cfg.head == "ridge":
        model.load_state_dict(backbone(model) | head_of(cfg, store, data, model))
        names = backbone(model) if cfg.rule else names
    if cfg.rule:
        names = mask = mask_of(cfg, store, data, model, shards)
        scored = cfg.calibration != "central" and shards and cfg.rule in RULES[:2]
        scorers = scored and cfg.calibration_rounds * cohort_size(cfg.num_clients,
                                                                  cfg.calibration_clients)
        bits = 1 if cfg.calibration == "vote" else 32  # a bitmap, or a float32 a weight
        facts["mask"] = dict(sha256=digest(mask), composition=composition(mask),
                             bytes_up=bits * flat(mask).numel() // 8 * int(scorers))
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = State({n: p.detach().clone() for n, p in trained.items()})
    state = store.resume(cfg, start.params, mask) if store else None
    return Run(cfg, data, model, trained, mask, shards, facts), state or start


def assess(run: Run, state: State) -> State:
    """Adds validation loss and accuracy to the last row, and keeps the best weights so far."""
    index = run.data.val[:run.cfg.eval_images]
    run.load(state.params)
    found = evaluate(run.model, run.data.images[index], run.data.labels[index],
                     context=precision(run.cfg)[0])
    *rows, row = state.history
    refuse_divergence(run.cfg, {"validation": found["loss"]}, state.round, row["lr"])
    row |= {f"val_{k}": found[k] for k in ("loss", "top1", "top5")}
    state = replace(state, history=(*rows, row))
    if row["val_top1"] > max((r.get("val_top1", -1) for r in rows), default=-1):
        state = replace(state, best=state.params, best_round=state.round)
    return state


def fold(run: Run, store: Store, state: State, step=None) -> State:
    """Rounds (or epochs) until the run's length, stored on the way, at a stop and at the end."""
    cfg, saved = run.cfg, (state.round, time.monotonic())
    step = step or (centralized_epoch if cfg.algorithm == "centralized" else federated_round)
    with tqdm(total=cfg.length, initial=state.round, desc=run_name(cfg), leave=False,
              disable=ranks()[0] > 0) as bar:
        try:
            while state.round < cfg.length:
                began, after = time.monotonic(), step(run, state)
                if after.round % cfg.eval_every == 0 or after.round == cfg.length:
                    after = assess(run, after)
                    bar.set_postfix(val=f"{after.history[-1]['val_top1']:.1%}")
                state = replace(after, seconds=after.seconds + time.monotonic() - began)
                bar.update()
                if (state.round - saved[0] >= cfg.eval_every and state.round < cfg.length
                        and time.monotonic() - saved[1] >= 60 * store.minutes):
                    store.save(cfg, state)
                    saved = (state.round, time.monotonic())
        except KeyboardInterrupt:
            pass
        except FloatingPointError as error:
            state = replace(state, error=str(error))
    done = state.round == cfg.length and not state.error
    last = replace(state, params=state.best, memory={}) if done else state  # all it still needs
    store.save(cfg, last, keep=1 if done else 2, mask=run.mask if done else None)
    return state


def train(cfg: Config, store: Store | None = None, test: bool = True, step=None) -> dict:
    """The run's result: found in the store, or trained from where it stopped, then stored.

    `status` is "finished", "diverged" (the loss was not finite; `error` says where), "interrupted"
    (stopped by hand; call again to go on) or "missing" (in a frozen store). The test set is read
    once, by the weights that were best on validation, and not at all with `test=False`. `step` may
    be a `federated_round` whose clients train elsewhere.
    """
    if not isinstance(cfg, Config):
        raise TypeError(f"{cfg!r} is no Config")
    if cfg.algorithm == "centralized" and (n := world_size()) > 1:
        # before they meet: where one fails while others connect, these see a broken connection
        raise ValueError(f"algorithm='centralized' has no clients for {n} processes to "
                         "share: start it in one, without torchrun")
    store = store or Store()
    if result := stored_result(cfg, store, test):
        return result
    try:
        with store.lock(cfg):  # another process may have trained it meanwhile
            return stored_result(cfg, store, test) or train_now(cfg, store, test, step)
    except KeyboardInterrupt:  # in the rounds `fold` stops by itself
        return dict(run=run_name(cfg), status="interrupted", round=0)


def stored_result(cfg: Config, store: Store, test: bool) -> dict | None:
    """The result, where there is no more to be done for it."""
    result = store.result(cfg)
    if store.frozen or result and (result["status"] == "diverged" or "test" in result or not test):
        return result or dict(run=run_name(cfg), status="missing", round=0)
    return None


def train_now(cfg: Config, store: Store, test: bool, step=None) -> dict:
    """`train` of what is not stored, from the newest checkpoint on."""
    run, state = open_run(cfg, store)
    state = fold(run, store, state, step)
    if state.round < cfg.length and not state.error:
        return dict(run=run_name(cfg), status="interrupted", round=state.round)
    result = dict(run=run_name(cfg), status="diverged" if state.error else "finished",
                  error=state.error, config=asdict(cfg), identity=identity(cfg), **run.facts,
                  history=state.history, best_round=state.best_round, seconds=state.seconds,
                  device=str(device()), hardware=hardware(),
                  versions={p: version(p) for p in ("torch", "torchvision", "timm", "numpy")},
                  python=python_version(), threads=torch.get_num_threads(), code=code_version())
    if test and not state.error:
        run.load(state.best)
        result["test"] = evaluate(run.model, run.data.test_images[:cfg.eval_images],
                                  run.data.test_labels[:cfg.eval_images],
                                  context=precision(cfg)[0])
    store.write(f"{run_name(cfg)}.json", dump(result))
    return store.result(cfg)


def train_centralized(cfg: Config, store: Store | None = None, test: bool = True) -> dict:
    """`train` on the pooled training part, for `num_epochs`."""
    return train(replace(cfg, algorithm="centralized"), store, test)


def train_federated(cfg: Config, store: Store | None = None, test: bool = True) -> dict:
    """`train` over `num_clients` simulated clients, for `num_rounds`."""
    if cfg.algorithm == "centralized":
        raise ValueError("algorithm='centralized' is for train_centralized: choose 'fedavg', "
                         "'fedprox' or 'scaffold'")
    return train(cfg, store, test)


from notebooks.display import *  # noqa: E402, F403  last: it stands on all of the above
