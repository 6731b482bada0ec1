"""What a round, an evaluation, a calibration and a checkpoint cost, next to a floor.

The floor of a round is its compute alone: as many forward passes, backward passes and optimizer
steps, by torch.optim.SGD, on one resident batch that is ready for the model; same model, precision
and batch size, nothing compiled. It is blind to clients, augmentation and averaging.
The floor of an evaluation is as many forward passes of one resident batch.
The floor of a calibration is a forward and a plain backward pass to all maskable weights, of the
same images in the same chunks: what a gradient costs that is summed over samples, not squared
sample by sample. No way to per-sample gradients is known to be as cheap. Beside it stands the
usual way, torch.func: vmap of grad, squared and summed.
A checkpoint's share is that of the time between two: a minute, or `eval_every` rounds if longer.
"""
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MINI, VITS, compare, describe, in_turns, options, report, seconds, sized, start
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils import (
    Config,
    Run,
    State,
    Store,
    evaluate,
    federated_round,
    maskable,
    precision,
    prepare,
    sensitivity,
)


# ------------------------------------------------------------------ floors
def resident_batch(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised floats at the model's image size, and labels."""
    return prepare(run.data.images[:size], run.model).clone(), run.data.labels[:size]


def compute_floor(run: Run, images, labels, steps: int) -> float:
    cfg = run.cfg
    opt = torch.optim.SGD(run.trained.values(), cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay,
                          foreach=True)
    context, loss_scale = precision(cfg)
    for _ in range(steps):
        with context:
            loss = F.cross_entropy(run.model(images), labels)
        opt.zero_grad()
        (loss * loss_scale).backward()
        opt.step()
    return loss.item()


def forward_floor(run: Run, images, passes: int) -> float:
    context, _ = precision(run.cfg)
    with torch.inference_mode(), context:
        for _ in range(passes):
            logits = run.model(images)
    return logits[0, 0].item()


def batch_gradients(run: Run, images, labels, chunk: int) -> list[torch.Tensor]:
    """Of the summed log-likelihood, by all maskable weights; the last chunk's."""
    weights = [run.trained[n] for n in maskable(run.model)]
    for i in range(0, len(images), chunk):
        x = prepare(images[i:i + chunk], run.model)
        loss = F.cross_entropy(run.model(x), labels[i:i + chunk], reduction="sum")
        grads = torch.autograd.grad(loss, weights)
    return grads


def vmap_scores(run: Run, images, labels, chunk: int) -> dict:
    """`sensitivity` by torch.func: per-sample gradients by vmap, squared, summed in float64."""
    fixed = {n: p.detach() for n, p in run.model.named_parameters()}
    free = {n: fixed.pop(n) for n in maskable(run.model)}

    def loss(weights, x, y):
        logits = torch.func.functional_call(run.model, fixed | weights, (x[None],))
        return F.cross_entropy(logits, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    total = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in free.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap batches; another would cost it a loop
        for i in range(0, len(images), chunk):
            x = prepare(images[i:i + chunk], run.model)
            for n, g in gradients(free, x, labels[i:i + chunk]).items():
                total[n] += g.square().sum(0)
    return total


# ------------------------------------------------------------------ measurements
def round_row(run: Run, state: State, pairs: int) -> dict:
    words, batch = describe(run.cfg), resident_batch(run, run.cfg.batch_size)
    steps = words["clients"] * words["J"]
    run.load(state.params)
    run.model.train()
    times = in_turns(pairs, ours=lambda: federated_round(run, state),
                     floor=lambda: compute_floor(run, *batch, steps))
    return dict(what="round", **words, **compare(times, "ours", "floor"))


def overhead_row(cfg: Config, pairs: int) -> dict:
    """A round without local steps, next to one copy of the weights per client."""
    run, state = start(replace(cfg, local_steps=0))
    words = describe(run.cfg)
    times = in_turns(pairs, ours=lambda: federated_round(run, state),
                     floor=lambda: [run.load(state.params) for _ in range(words["clients"])])
    return dict(what="overhead", **words, **compare(times, "ours", "floor"))


def evaluation_row(run: Run, state: State, pairs: int, passes: int, batch: int) -> dict:
    images, labels = run.data.images[:passes * batch], run.data.labels[:passes * batch]
    x, _ = resident_batch(run, batch)
    run.load(state.params)
    run.model.eval()
    context, _ = precision(run.cfg)
    times = in_turns(pairs, floor=lambda: forward_floor(run, x, passes),
                     ours=lambda: evaluate(run.model, images, labels, batch, context))
    words = describe(run.cfg) | dict(B=batch, J=None, clients=None)
    return dict(what="evaluation", **words, **compare(times, "ours", "floor"))


def calibration_rows(run: Run, state: State, pairs: int, images: int, chunk: int) -> list[dict]:
    x, y = run.data.images[:images], run.data.labels[:images]
    run.load(state.params)
    run.model.eval()
    names = maskable(run.model)
    times = in_turns(pairs, ours=lambda: sensitivity(run.model, x, y, chunk, names=names),
                     floor=lambda: batch_gradients(run, x, y, chunk),
                     vmap=lambda: vmap_scores(run, x, y, chunk))
    words = describe(run.cfg) | dict(B=chunk, J=None, clients=None)
    return [dict(what="calibration", **words, **compare(times, "ours", "floor")),
            dict(what="calibration, vmap", **words, **compare(times, "ours", "vmap"))]


def checkpoint_row(run: Run, state: State, round_seconds: float) -> dict:
    """With the best weights apart from the present ones, as large as FedAvg's ever is."""
    state = replace(state, round=2, best_round=1, best={
        n: w.clone() for n, w in state.params.items()})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        took = min(seconds(lambda: store.save(run.cfg, state))[0] for _ in range(3))
    between = max(60 * store.minutes, run.cfg.eval_every * round_seconds)
    return dict(what="checkpoint", **describe(run.cfg), unit="s", ours=took, floor=between,
                ratio=took / between, pairs=3)


def rows_of(cfg: Config, args, passes: int, batch: int, images: int, chunk: int) -> list[dict]:
    run, state = start(cfg)
    rows = [round_row(run, state, args.pairs),
            evaluation_row(run, state, args.pairs, passes, batch)]
    if images:
        rows += calibration_rows(run, state, args.pairs, images, chunk)
    return [*rows, checkpoint_row(run, state, rows[0]["ours"])]


def main(args):
    size, full = partial(sized, args.quick), dict(local_steps=4, batch_size=64)
    on_gpu = torch.cuda.is_available()
    passes = 8 if on_gpu else 2
    plan = [(size(MINI, 10, dict(local_steps=4), full), (500, 64, 8)),
            (size(replace(VITS, image_size=64), 1, full | dict(batch_size=16), full), (64, 16, 8)),
            (size(replace(VITS, image_size=96), 1, full | dict(batch_size=8), full), (32, 0, 8)),
            (size(replace(VITS, image_size=224), 1, full | dict(batch_size=4), full), (8, 0, 8))]
    if args.quick:
        plan = [(replace(plan[0][0], participation=0.02), (4, 4, 2))]
    rows = []
    for cfg, (batch, images, chunk) in plan:
        cfg = replace(cfg, participation=0.1) if on_gpu else cfg
        batch, images, chunk = (500, 256, 32) if on_gpu and not args.quick else (
            batch, images, chunk)
        found = rows_of(cfg, args, passes, batch, images, chunk)
        print(*found, sep="\n", flush=True)  # it takes minutes: something to read on the way
        rows += found
    rows.append(overhead_row(plan[0][0] if args.quick else replace(
        VITS, image_size=64, participation=0.1), args.pairs))
    report(__file__, args, rows)


if __name__ == "__main__":
    main(options(__doc__))
