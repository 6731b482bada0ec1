"""What only a GPU can tell: throughput, waits, attention kernel, compiled steps, memory.

Images a second of a round, and the share of the bf16 peak that its matrix products reach; how
often a round waits for the device, and where (it should once, at its end); which attention kernel
runs (it should be flash); a round, and the error of a gradient, by precision; a round with a
compiled model, and with CUDA graphs, next to the eager one; peak memory by cohort. Without a GPU
this says so and ends.
"""
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    VITS,
    compare,
    describe,
    forget_peak,
    in_turns,
    options,
    peak,
    report,
    seconds,
    start,
    wait,
)
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from utils import Run, State, autocast, federated_round, model_input


def one_gradient(run: Run, batch: int):
    x = model_input(run.data.images[:batch], run.model)
    with autocast(run.cfg, x.device):
        loss = F.cross_entropy(run.model(x), run.data.labels[:batch])
    loss.backward()
    run.model.zero_grad()


def flops_per_image(run: Run, batch: int = 4) -> float:
    """Of the matrix products and attention of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        one_gradient(run, batch)
    return counter.get_total_flops() / batch


def throughput(run: Run, state: State, repeats: int, peak_tflops: float) -> dict:
    federated_round(run, state)
    tries = [seconds(lambda: federated_round(run, state)) for _ in range(repeats)]
    took = sorted(clock for clock, _ in tries)[repeats // 2]
    words = describe(run.cfg)
    images = words["clients"] * words["J"] * words["B"] / took
    reached = images * flops_per_image(run) / 1e12
    return dict(what="round", **words, seconds=took, images_per_s=images, tflops=reached,
                share_of_peak=reached / peak_tflops)


def waits(run: Run, state: State) -> Counter:
    """How often each line (file:number) waits for the device in the second of two rounds."""
    federated_round(run, state)
    wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            federated_round(run, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter()
    for found in caught:
        if "synchronizing" in str(found.message):
            lines[f"{Path(found.filename).name}:{found.lineno}"] += 1
    return lines


def attention_kernels(run: Run, batch: int = 4) -> set[str]:
    """Names of the attention operators that a gradient runs."""
    with profile() as profiler:
        one_gradient(run, batch)
    return {e.key for e in profiler.key_averages() if "_scaled_dot_product_" in e.key}


def compiled_row(run: Run, state: State, pairs: int, mode: str) -> dict:
    """A round whose model is compiled, over the eager one; "reduce-overhead" is CUDA graphs."""
    compiled = replace(run, model=torch.compile(run.model, mode=mode))
    times = in_turns(pairs, ours=lambda: federated_round(compiled, state),
                     eager=lambda: federated_round(run, state))
    return dict(what=f"compiled: {mode}", **describe(run.cfg), **compare(times, "ours", "eager"))


def at_precision(run: Run, name: str) -> Run:
    return replace(run, cfg=replace(run.cfg, precision=name))


def precision_rows(run: Run, state: State, pairs: int) -> list[dict]:
    """A round in fp16 and in float32 (matrix products without TF32) over one in bf16."""
    work = {}
    for name in ("bf16", "fp16", "float32"):
        work[name] = partial(federated_round, at_precision(run, name), state)
    times = in_turns(pairs, **work)
    rows = []
    for name in ("fp16", "float32"):
        ratio = compare(times, name, "bf16")
        rows.append(dict(what=f"round: {name} over bf16", **describe(run.cfg), **ratio))
    return rows


def batch_gradient(run: Run, name: str) -> torch.Tensor:
    """The gradient of one batch at a precision, in a vector of float32."""
    run.model.zero_grad()
    cfg = at_precision(run, name).cfg
    x = model_input(run.data.images[:cfg.batch_size], run.model)
    labels = run.data.labels[:cfg.batch_size]
    with autocast(cfg, x.device):
        loss = F.cross_entropy(run.model(x), labels)
    # scaled as a local step scales it: fp16 loses small gradients else
    scale = 1024 if name == "fp16" else 1
    (scale * loss).backward()
    parts = [p.grad.flatten() for p in run.model.parameters()]
    return torch.cat(parts) / scale


def gradient_errors(run: Run) -> dict[str, float]:
    """|g - g32| / |g32| of a batch's gradient in fp16 and bf16, g32 the one of float32."""
    exact = batch_gradient(run, "float32")
    errors = {}
    for name in ("fp16", "bf16"):
        difference = batch_gradient(run, name) - exact
        errors[name] = (difference.norm() / exact.norm()).item()
    return errors


def memory_rows(run: Run, state: State, cohorts=(2, 10, 50)) -> list[dict]:
    rows = []
    for n in cohorts:
        cfg = replace(run.cfg, participation=n / run.cfg.num_clients)
        part = replace(run, cfg=cfg)
        forget_peak()
        federated_round(part, state)
        rows.append(dict(what="peak memory", **describe(part.cfg), peak_mb=peak()))
    return rows


def main(args):
    rows, facts = [], {}
    sizes = [96]
    if not args.quick:
        sizes.append(224)
    for size in sizes:
        run, state = start(replace(VITS, image_size=size, local_steps=4, batch_size=64))
        rows.append(throughput(run, state, args.pairs, args.peak_tflops))
        found = waits(run, state)
        count = sum(found.values())
        rows.append(dict(what="waits in a round", **describe(run.cfg), count=count))
        facts[f"waits_{size}"] = dict(found)
        facts[f"attention_{size}"] = sorted(attention_kernels(run))
        rows += precision_rows(run, state, args.pairs)
        facts[f"gradient_error_{size}"] = gradient_errors(run)
        rows += memory_rows(run, state)
        if not args.quick:
            for mode in ("default", "reduce-overhead"):
                rows.append(compiled_row(run, state, args.pairs, mode))
    for name, value in facts.items():
        print(f"{name}: {value}")
    report(__file__, args, rows, peak_tflops=args.peak_tflops, **facts)


if __name__ == "__main__":
    args = options(__doc__, peak_tflops=790.0)
    if torch.cuda.is_available():
        main(args)
    else:
        print("There is no GPU here: nothing to measure.")
