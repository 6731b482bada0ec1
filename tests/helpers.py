"""Runs small enough for hand-computed cases, shared by the tests of training."""
import threading

import numpy as np
import torch
import tqdm
from torch import nn

import utils
from utils import Config, Data, Run, State

# Tests fork and kill: tqdm's lock between processes would stay with a child killed while holding
# it, and its monitor thread could hold it at a fork. Then whoever draws a bar waits for ever.
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())

TINY = dict(model_name="vit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=2, num_heads=2)
CFG = Config(weights="none", arch="mini", dataset="synthetic", image_size=32, batch_size=4,
             num_clients=10, participation=0.3, local_steps=2, num_rounds=4, num_epochs=4,
             eval_every=2, lr=0.05, val_fraction=0.25, head_rounds=2, calibration_images=20,
             calibration_rounds=2)


def same(a, b) -> bool:
    """Two dicts of tensors hold the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def small_data(cfg: Config) -> Data:
    """20 classes of 12 images to train on and 4 to test on, learnable."""
    draw, parts = torch.Generator().manual_seed(0), []
    patterns = torch.randint(0, 200, (20, 1, 3, 2, 2), generator=draw)
    patterns = patterns.repeat_interleave(16, 3).repeat_interleave(16, 4)
    for n in (12, 4):
        noise = torch.randint(0, 56, (20, n, 3, 32, 32), generator=draw)
        labels = torch.arange(20).repeat_interleave(n)
        parts += [(patterns + noise).flatten(0, 1).to(torch.uint8), labels]
    return Data(*parts, *utils.split(parts[1].numpy(), cfg.val_fraction, cfg.seed))


def make_small(patch):
    """A tiny ViT on `small_data`: a run takes a fraction of a second."""
    patch.setitem(utils.ARCHS, "mini", TINY)
    patch.setattr(utils, "load_data", small_data)


def small_run(cfg: Config, shards=None, mask=None, model=None) -> tuple[Run, State]:
    """A run of a two-layer net on 40 float images of 5 classes, without augmentation's help."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = torch.randn(60, 3, 2, 2), torch.arange(60) % 5
        model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    data = Data(x[:40], y[:40], x[40:], y[40:], np.arange(30), np.arange(30, 40))
    shards = np.array_split(np.arange(30), cfg.num_clients) if shards is None else shards
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = State({n: p.detach().clone() for n, p in trained.items()})
    return Run(cfg, data, model, trained, mask, [np.asarray(s) for s in shards], {}), start


def half_mask(run: Run) -> dict:
    """Every other entry of each weight is frozen."""
    return {n: (torch.arange(p.numel()) % 2 == 0).view_as(p) for n, p in run.trained.items()}


def one_client(run: Run, state: State, k: int, lr: float) -> tuple[dict, torch.Tensor]:
    """The task vector of client k from the server's weights, and its mean loss."""
    run.load(state.params)
    loss = utils.client_update(run, state, k, lr)
    return run.vector(state.params), loss


def rounds(run: Run, state: State, n: int) -> State:
    for _ in range(n):
        state = utils.federated_round(run, state)
    return state


def resumed(cfg: Config, store) -> State | None:
    """The state that a run would go on from; None without a checkpoint."""
    found = store.newest(f"checkpoints/{utils.run_name(cfg)}")
    return utils.open_run(cfg, store)[1] if found else None
