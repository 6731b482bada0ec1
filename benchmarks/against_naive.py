"""Our round against the loop that student code publishes, on the same workload.

The plain loop copies the model for every client, reads a DataLoader over a Subset whose images
pass through PIL one by one, keeps all clients' state dicts and averages them key by key. Ratios
are ours / plain: of a round, of its overhead (J = 0), and of peak memory, each side alone in a
process.
"""
import copy
import json
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    MINI,
    VITS,
    as_text,
    child,
    compare,
    describe,
    forget_peak,
    in_turns,
    options,
    peak,
    report,
    sized,
    start,
)
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from utils import Config, Data, Run, cohort, device, federated_round, learning_rate


# ------------------------------------------------------------------ the plain loop
@dataclass
class Images:
    """What torchvision's CIFAR100 gives, from memory."""
    data: np.ndarray  # uint8 (n, 32, 32, 3)
    targets: list[int]
    transform: object

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.data[i])), self.targets[i]


def plain_images(data: Data, size: int, augmented: bool = True) -> Images:
    steps = [
        transforms.Resize(size),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    if augmented:
        steps.insert(0, transforms.RandomHorizontalFlip())
    arrays = data.images.permute(0, 2, 3, 1).cpu().numpy()
    return Images(arrays, data.labels.tolist(), transforms.Compose(steps))


def local_training(model, loader, cfg, lr: float) -> tuple[dict, float]:
    opt = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
    )
    model.train()
    losses = []
    step = 0
    while step < cfg.local_steps:
        for images, labels in loader:
            if step == cfg.local_steps:
                break
            images, labels = images.to(device()), labels.to(device())
            opt.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            opt.step()
            losses.append(loss.item())
            step += 1
    return model.state_dict(), sum(losses) / max(1, len(losses))


def average(states: list[dict], sizes: list[int]) -> dict:
    total = sum(sizes)
    mean = copy.deepcopy(states[0])
    for key in mean:
        mean[key] = states[0][key] * (sizes[0] / total)
        for state, n in zip(states[1:], sizes[1:], strict=True):
            mean[key] += state[key] * (n / total)
    return mean


def plain_round(model, images: Images, shards: list, cfg: Config, t: int):
    """Trains the round's cohort client by client and leaves the average in `model`."""
    lr = learning_rate(cfg, t / cfg.num_rounds)
    states, sizes = [], []
    for k in cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, t):
        loader = DataLoader(Subset(images, shards[k]), cfg.batch_size, shuffle=True)
        weights, _ = local_training(copy.deepcopy(model), loader, cfg, lr)
        states.append(copy.deepcopy(weights))
        sizes.append(len(shards[k]))
    model.load_state_dict(average(states, sizes))


# ------------------------------------------------------------------ measurements
def plain_side(run: Run):
    """The plain loop's round, ready to be timed."""
    model = copy.deepcopy(run.model)
    images = plain_images(run.data, run.cfg.image_size)
    # not of the run itself, whose tensors would be held beside the loop's own
    return partial(plain_round, model, images, run.shards, run.cfg, 0)


def time_of(cfg: Config, what: str, pairs: int) -> dict:
    run, state = start(cfg)
    times = in_turns(pairs, ours=lambda: federated_round(run, state), plain=plain_side(run))
    return dict(what=what, **describe(cfg), **compare(times, "ours", "plain"))


def peak_of(cfg: Config) -> dict:
    found = {}
    for side in ("ours", "plain"):
        found[side] = child(__file__, "--side", side, "--config", as_text(cfg))["peak"]
    ratio = found["ours"] / found["plain"]
    return dict(what="peak memory", **describe(cfg), unit="MB", **found, ratio=ratio)


def one_side(side: str, cfg: Config):
    """Prints the peak memory of one round of one side."""
    run, state = start(cfg)
    work = partial(federated_round, run, state)
    if side == "plain":
        work = plain_side(run)
        del run, state
    forget_peak()
    work()
    print(json.dumps(dict(peak=peak())))


def main(args):
    full = dict(local_steps=4, batch_size=64)
    small = replace(VITS, image_size=64, precision="float32")
    mini = sized(args.quick, replace(MINI, precision="float32"), 10, dict(local_steps=4), full)
    vits = sized(args.quick, small, 2, full | dict(batch_size=8), full | dict(image_size=224))
    cohort_of_ten = sized(args.quick, small, 10, dict(batch_size=4, local_steps=1), {})
    if args.quick:
        mini = vits = cohort_of_ten = replace(mini, participation=0.02)
    rows = [time_of(mini, "round", args.pairs),
            time_of(vits, "round", args.pairs),
            time_of(replace(cohort_of_ten, local_steps=0), "overhead", 3 * args.pairs),  # short
            peak_of(cohort_of_ten)]
    report(__file__, args, rows)


if __name__ == "__main__":
    args = options(__doc__, side="", config="")
    if args.side:
        one_side(args.side, Config(**json.loads(args.config)))
    else:
        main(args)
