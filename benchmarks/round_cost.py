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
    autocast,
    evaluate,
    federated_round,
    maskable,
    model_input,
    precision_name,
    sensitivity,
)


# ------------------------------------------------------------------ floors
def resident_batch(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised floats at the model's image size, and labels."""
    images = model_input(run.data.images[:size], run.model)
    return images.clone(), run.data.labels[:size]


def compute_floor(run: Run, images, labels, steps: int) -> float:
    cfg = run.cfg
    opt = torch.optim.SGD(
        run.trainable.values(),
        cfg.lr,
        cfg.momentum,
        weight_decay=cfg.weight_decay,
        foreach=True,
    )
    loss_scale = 1024 if precision_name(cfg, images.device) == "fp16" else 1
    for _ in range(steps):
        with autocast(cfg, images.device):
            loss = F.cross_entropy(run.model(images), labels)
        opt.zero_grad()
        (loss * loss_scale).backward()
        opt.step()
    return loss.item()


def forward_floor(run: Run, images, passes: int) -> float:
    with torch.inference_mode(), autocast(run.cfg, images.device):
        for _ in range(passes):
            logits = run.model(images)
    return logits[0, 0].item()


def batch_gradients(run: Run, images, labels, chunk: int) -> list[torch.Tensor]:
    """Of the summed log-likelihood, by all maskable weights; the last chunk's."""
    weights = [run.trainable[n] for n in maskable(run.model)]
    for i in range(0, len(images), chunk):
        x = model_input(images[i:i + chunk], run.model)
        y = labels[i:i + chunk]
        loss = F.cross_entropy(run.model(x), y, reduction="sum")
        grads = torch.autograd.grad(loss, weights)
    return grads


def vmap_scores(run: Run, images, labels, chunk: int) -> dict:
    """`sensitivity` by torch.func: per-sample gradients by vmap, squared, summed in float64."""
    fixed = {n: p.detach() for n, p in run.model.named_parameters()}
    free = {n: fixed.pop(n) for n in maskable(run.model)}

    def loss(weights, x, y):
        every = fixed | weights
        logits = torch.func.functional_call(run.model, every, (x[None],))
        return F.cross_entropy(logits, y[None])

    gradient = torch.func.grad(loss)
    gradients = torch.func.vmap(gradient, (None, 0, 0))
    total = {}
    for n, w in free.items():
        total[n] = torch.zeros_like(w, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap batches; another would cost it a loop
        for i in range(0, len(images), chunk):
            x = model_input(images[i:i + chunk], run.model)
            y = labels[i:i + chunk]
            found = gradients(free, x, y)
            for n, g in found.items():
                total[n] += g.square().sum(0)
    return total


# ------------------------------------------------------------------ measurements
def row_of(what: str, words: dict, times: dict, other: str) -> dict:
    """A row of the table: ours over the other."""
    return dict(what=what, **words, **compare(times, "ours", other))


def round_row(run: Run, state: State, pairs: int) -> dict:
    words = describe(run.cfg)
    batch = resident_batch(run, run.cfg.batch_size)
    steps = words["clients"] * words["J"]
    run.load(state.params)
    run.model.train()
    times = in_turns(
        pairs,
        ours=lambda: federated_round(run, state),
        floor=lambda: compute_floor(run, *batch, steps),
    )
    return row_of("round", words, times, "floor")


def overhead_row(cfg: Config, pairs: int) -> dict:
    """A round without local steps, next to one copy of the weights per client."""
    run, state = start(replace(cfg, local_steps=0))
    words = describe(run.cfg)

    def copies():
        for _ in range(words["clients"]):
            run.load(state.params)

    times = in_turns(pairs, ours=lambda: federated_round(run, state), floor=copies)
    return row_of("overhead", words, times, "floor")


def evaluation_row(run: Run, state: State, pairs: int, passes: int, batch: int) -> dict:
    number = passes * batch
    images = run.data.images[:number]
    labels = run.data.labels[:number]
    x, _ = resident_batch(run, batch)
    run.load(state.params)
    run.model.eval()
    context = autocast(run.cfg, images.device)
    times = in_turns(
        pairs,
        floor=lambda: forward_floor(run, x, passes),
        ours=lambda: evaluate(run.model, images, labels, batch, context),
    )
    words = describe(run.cfg) | dict(B=batch, J=None, clients=None)
    return row_of("evaluation", words, times, "floor")


def calibration_rows(run: Run, state: State, pairs: int, images: int, chunk: int) -> list[dict]:
    x = run.data.images[:images]
    y = run.data.labels[:images]
    run.load(state.params)
    run.model.eval()
    names = maskable(run.model)
    times = in_turns(
        pairs,
        ours=lambda: sensitivity(run.model, x, y, chunk, names=names),
        floor=lambda: batch_gradients(run, x, y, chunk),
        vmap=lambda: vmap_scores(run, x, y, chunk),
    )
    words = describe(run.cfg) | dict(B=chunk, J=None, clients=None)
    return [row_of("calibration", words, times, "floor"),
            row_of("calibration, vmap", words, times, "vmap")]


def checkpoint_row(run: Run, state: State, round_seconds: float) -> dict:
    """With the best weights apart from the present ones, as large as FedAvg's ever is."""
    best = {n: w.clone() for n, w in state.params.items()}
    state = replace(state, round=2, best_round=1, best=best)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        tries = [seconds(lambda: store.save(run, state)) for _ in range(3)]
    took = min(clock for clock, _ in tries)
    between = max(60 * store.minutes, run.cfg.eval_every * round_seconds)
    return dict(
        what="checkpoint",
        **describe(run.cfg),
        unit="s",
        ours=took,
        floor=between,
        ratio=took / between,
        pairs=3,
    )


def rows_of(cfg: Config, pairs: int, passes: int, sizes: dict) -> list[dict]:
    """`sizes`: images in a batch of the evaluation, images to calibrate with, and their chunk."""
    run, state = start(cfg)
    rows = [
        round_row(run, state, pairs),
        evaluation_row(run, state, pairs, passes, sizes["batch"]),
    ]
    images = sizes["images"]
    if images:
        rows += calibration_rows(run, state, pairs, images, sizes["chunk"])
    rows.append(checkpoint_row(run, state, rows[0]["ours"]))
    print(*rows, sep="\n", flush=True)  # it takes minutes: something to read on the way
    return rows


def plan_of(quick: bool) -> list[tuple[Config, dict]]:
    """Runs, each with the sizes of `rows_of`; larger images take smaller batches on a CPU."""
    full = dict(local_steps=4, batch_size=64)
    if quick:
        mini = sized(True, MINI, 2, full, full)
        return [(mini, dict(batch=4, images=4, chunk=2))]
    if torch.cuda.is_available():
        sizes = dict(batch=500, images=256, chunk=32)
        px = (64, 96, 224)
        cfgs = [MINI, *(replace(VITS, image_size=size) for size in px)]
        return [(sized(False, cfg, 10, full, full), sizes) for cfg in cfgs]

    # (pixels, batch size, images in an evaluation's batch, images to calibrate with)
    table = [(64, 16, 64, 16), (96, 8, 32, 0), (224, 4, 8, 0)]
    mini = sized(False, MINI, 10, dict(local_steps=4), full)
    plan = [(mini, dict(batch=500, images=64, chunk=8))]
    for px, batch_size, batch, images in table:
        cfg = replace(VITS, image_size=px)
        cpu = dict(local_steps=4, batch_size=batch_size)
        cfg = sized(False, cfg, 1, cpu, full)
        sizes = dict(batch=batch, images=images, chunk=8)
        plan.append((cfg, sizes))
    return plan


def main(args):
    passes = 8 if torch.cuda.is_available() else 2
    plan = plan_of(args.quick)
    rows = []
    for cfg, sizes in plan:
        rows += rows_of(cfg, args.pairs, passes, sizes)
    if args.quick:
        last = plan[0][0]
    else:
        last = replace(VITS, image_size=64, participation=0.1)
    rows.append(overhead_row(last, args.pairs))
    report(__file__, args, rows)


if __name__ == "__main__":
    main(options(__doc__))
