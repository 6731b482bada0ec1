"""Runs small enough for hand-computed cases, shared by the tests of training."""
import threading
import warnings

import numpy as np
import torch
import tqdm
from torch import nn

import utils
from utils import Config, Data, FedAvg, Run, State, Store

# Tests fork and kill: tqdm's lock between processes would stay with a child killed while holding
# it, and its monitor thread could hold it at a fork. Then whoever draws a bar waits for ever.
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())

TINY = dict(model_name="vit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=2, num_heads=2)
CFG = Config(weights="none", arch="mini", dataset="synthetic", image_size=32, batch_size=4,
             num_clients=10, participation=0.3, local_steps=2, num_rounds=4, num_epochs=4,
             eval_every=2, lr=0.05, val_fraction=0.25, head="train", head_rounds=2,
             calibration_images=20, calibration_rounds=2)


def same(a, b) -> bool:
    """Two dicts of tensors hold the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b, tol=1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=tol) for n in a)


def quietly(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


# ------------------------------------------------------------------ whole runs on a tiny ViT
def small_data(cfg: Config) -> Data:
    """20 classes of 12 images to train on and 4 to test on, learnable."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (20, 1, 3, 2, 2), generator=draw)
    patterns = patterns.repeat_interleave(16, 3).repeat_interleave(16, 4)
    parts = []
    for n in (12, 4):
        noise = torch.randint(0, 56, (20, n, 3, 32, 32), generator=draw)
        labels = torch.arange(20).repeat_interleave(n)
        parts += [(patterns + noise).flatten(0, 1).to(torch.uint8), labels]
    return Data(*parts, *utils.split(parts[1].numpy(), cfg.val_fraction, cfg.split_seed))


def make_small(patch):
    """A tiny ViT on `small_data`: a run takes a fraction of a second."""
    patch.setitem(utils.ARCHS, "mini", TINY)
    patch.setattr(utils, "load_data", small_data)


def resumed(cfg: Config, store: Store) -> State | None:
    """The state that a run would go on from; None without a checkpoint."""
    if store.newest_checkpoint(cfg) is None:
        return None
    return utils.open_run(cfg, store)[1]


def same_state(a: State, b: State) -> bool:
    """Two states go on to the same bits; only times and places may differ."""
    groups = a.algorithm_state.keys()
    return (a.round == b.round and a.best_round == b.best_round and a.history == b.history
            and same(a.params, b.params) and same(a.best, b.best)
            and groups == b.algorithm_state.keys()
            and all(same(a.algorithm_state[g], b.algorithm_state[g]) for g in groups))


def timeless(result: dict) -> dict:
    """A result without what depends on when and in how many pieces it was trained."""
    return {k: v for k, v in result.items() if k not in ("seconds", "segments")}


def cut(patch, name: str, at: int, error=KeyboardInterrupt):
    """`utils.<name>` raises at its `at`-th call."""
    honest = getattr(utils, name)
    calls = []

    def guarded(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return honest(*args, **kwargs)
    patch.setattr(utils, name, guarded)


def forbid(patch, *names: str):
    """`utils.<name>` must not be called."""
    for name in names:
        def refuse(*args, name=name, **kwargs):
            raise AssertionError(f"{name} was called")
        patch.setattr(utils, name, refuse)


# ------------------------------------------------------------------ rounds of a two-layer net
def small_run(cfg: Config, shards=None, mask=None, model=None) -> tuple[Run, State]:
    """A run of a two-layer net on 40 float images of 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(60, 3, 2, 2)
        y = torch.arange(60) % 5
        model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    data = Data(x[:40], y[:40], x[40:], y[40:], np.arange(30), np.arange(30, 40))
    if shards is None:
        shards = np.array_split(np.arange(30), cfg.num_clients)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    run = utils.run_of(cfg, data, model, names, mask, [np.asarray(s) for s in shards], {})
    return run, State({n: w.clone() for n, w in run.weights().items()})


def half_mask(run: Run) -> dict:
    """Every other entry of each weight is frozen."""
    return {n: (torch.arange(p.numel()) % 2 == 0).view_as(p) for n, p in run.trainable.items()}


def one_client(run: Run, state: State, k: int, lr: float):
    """The task vector of client k from the server's weights, and its mean loss."""
    update = utils.client_update(run, state, k, lr)
    return update.vector, update.loss


def rounds(run: Run, state: State, n: int) -> State:
    for _ in range(n):
        state = utils.federated_round(run, state)
    return state


class Mine(FedAvg):
    """An algorithm that uses all hooks: pulled clients that report, a server with two memories."""
    reads = ("prox_mu", "server_momentum")

    def local_gradient(self, gradients, weights, state, client):
        for n, g in gradients.items():
            g.add_(weights[n] - state.params[n], alpha=self.cfg.prox_mu)

    def client_message(self, run, vector, state, client, lr):
        return utils.scale(vector, -1 / lr)

    def combine(self, vectors, shares, messages):
        total = utils.scale(vectors[0], shares[0])
        for vector, share in zip(vectors[1:], shares[1:], strict=True):
            total = utils.apply_vector(total, vector, share)
        return total

    def server_step(self, state, update):
        memory = dict(state.algorithm_state)
        if "momentum" in memory:
            step = utils.apply_vector(update.vector, memory["momentum"], self.cfg.server_momentum)
        else:
            step = update.vector
        memory["momentum"] = step
        for client, message in update.messages.items():
            memory[f"client/{client}"] = message
        return utils.add(state.params, step), memory


utils.register_algorithm("mine", Mine)
