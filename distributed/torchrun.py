"""Federated rounds in several processes started by torchrun, on GPUs by NCCL and else by gloo.

Each rank trains its slice of the cohort, weighted by the shares of the whole cohort, and one
all-reduce a round sums the task vectors; every rank then takes the same server step. Rank 0 alone
touches the disk, and what it reads or computes there is broadcast, so that a run may be resumed
with another number of processes.
"""
import os
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import utils
from utils import (
    Checkpoint,
    ClientUpdate,
    CohortUpdate,
    Config,
    Params,
    Run,
    State,
    Store,
    accumulate_update,
    client_update,
    device,
    federated_round,
    flatten,
    run_key,
    shares_of,
    unflatten,
)

# ------------------------------------------------------------------ the process group
# Ranks wait for rank 0, which may wait for another process that trains the same run.
TIMEOUT = timedelta(days=1)


def init_process_group(cfg: Config):
    """Joins the processes that torchrun started; ValueError for a run that cannot be shared out."""
    world_size = int(os.environ["WORLD_SIZE"])
    if cfg.centralized and world_size > 1:
        raise ValueError(f"algorithm='centralized' has no clients for {world_size} processes: "
                         "start distributed/train.py without torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # tensors go by NCCL, Python objects by gloo
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def destroy_process_group():
    """The last act of a process that is done, never of one that failed.

    A process that exits with its group alive is now and then aborted by its own threads. One that
    leaves while others wait for it would wait for them: torchrun must stop it instead.
    """
    dist.destroy_process_group()


def broadcast_object(compute):
    """What `compute()` gives on rank 0, on every rank; an error there is raised on every rank."""
    value, error = None, None
    if dist.get_rank() == 0:
        try:
            value = compute()
        except Exception as raised:
            error = raised
    objects = [value, error]
    dist.broadcast_object_list(objects)
    value, error = objects
    if error is not None:
        raise error
    return value


def all_gather_object(value) -> list:
    """The values of all ranks, in their order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_run(cfg: Config):
    """ValueError on every rank unless all were asked for the same run and have the same code."""
    own = dict(run_key(cfg), code_sha256=utils.CODE_SHA256)
    for rank, other in enumerate(all_gather_object(own)):
        differ = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
        if differ:
            raise ValueError(f"rank {rank} and rank {dist.get_rank()} differ in {differ}: every "
                             "machine needs the same code, weights and configuration")


def to_device(tensors: dict, where) -> dict:
    """A dict whose tensors are on the device; other values as they are."""
    return {n: w.to(where) if isinstance(w, Tensor) else w for n, w in tensors.items()}


# ------------------------------------------------------------------ a round
def train_cohort(run: Run, state: State, clients: list[int], lr: float) -> CohortUpdate:
    """`utils.train_cohort` by all ranks: each trains every n-th client, n the number of ranks.

    Memory does not grow with the cohort, unless the algorithm's `combine` wants all vectors.
    """
    own = range(dist.get_rank(), len(clients), dist.get_world_size())
    answers = (client_update(run, state, clients[i], lr) for i in own)
    shares = shares_of(run, clients)
    if run.algorithm.overrides("combine"):
        return accumulate_update(run, state, gather_updates(answers, clients), shares)
    part = accumulate_update(run, state, answers, [shares[i] for i in own])

    # Other ranks' places stay zero, so that the sum puts all in the cohort's order.
    scalars = torch.zeros(2, len(clients), device=device())
    if own:
        scalars[:, own] = torch.stack([part.losses, part.squared_norms])
    total = torch.cat([flatten(part.vector), scalars.flatten()])
    dist.all_reduce(total)
    vector, scalars = total.split([len(total) - scalars.numel(), scalars.numel()])
    losses, squared_norms = scalars.view(2, -1)

    messages = {}
    if run.algorithm.overrides("client_message"):
        messages = gather_messages(part.messages, clients)
    return CohortUpdate(clients, shares, unflatten(vector, state.params), messages, losses,
                        squared_norms)


def gather_messages(own: dict[int, Params], clients: list[int]) -> dict[int, Params]:
    """The messages of all ranks, by client in the cohort's order."""
    gathered = {}
    for messages in all_gather_object({k: to_device(m, "cpu") for k, m in own.items()}):
        gathered |= messages
    return {k: to_device(gathered[k], device()) for k in clients if k in gathered}


def gather_updates(own: Iterable[ClientUpdate], clients: list[int]) -> list[ClientUpdate]:
    """The updates of all ranks, in the cohort's order."""
    def moved(update, where):
        return ClientUpdate(update.client, update.loss.to(where), to_device(update.vector, where),
                            to_device(update.message, where))

    gathered = {}
    for updates in all_gather_object([moved(update, "cpu") for update in own]):
        gathered |= {update.client: update for update in updates}
    return [moved(gathered[k], device()) for k in clients]


# ------------------------------------------------------------------ the store
class SharedStore(Store):
    """A store that only rank 0 touches, and of which every rank reads the same.

    What is computed for it (heads, masks) is computed on rank 0 alone: ranks may differ in a bit.
    """

    def __init__(self, disk: Store):
        self.disk = disk
        self.is_writer = dist.get_rank() == 0
        quiet = disk.quiet or not self.is_writer
        super().__init__(disk.root, minutes=disk.minutes, frozen=disk.frozen, quiet=quiet)

    def write(self, name, content):
        if self.is_writer:
            self.disk.write(name, content)

    def delete(self, name):
        if self.is_writer:
            self.disk.delete(name)

    def save(self, run, state):
        # No collective here: ranks need not agree on the minute in which a checkpoint is due.
        if self.is_writer:
            self.disk.save(run, state)

    def read(self, name):
        return broadcast_object(lambda: self.disk.read(name))

    def names(self, pattern):
        return broadcast_object(lambda: self.disk.names(pattern))

    def results(self):
        return broadcast_object(self.disk.results)

    def result(self, cfg):
        return broadcast_object(lambda: self.disk.result(cfg))

    @contextmanager
    def lock(self, cfg):
        # The other ranks wait at the next broadcast.
        with self.disk.lock(cfg) if self.is_writer else nullcontext():
            yield

    def newest_checkpoint(self, cfg):
        def find():
            card, tensors = self.disk.newest_checkpoint(cfg) or (None, {})
            return card, to_device(tensors, "cpu")

        card, tensors = broadcast_object(find)
        if card is None:
            return None
        return Checkpoint(card, to_device(tensors, device()))

    def compute_or_load(self, kind, key, compute):
        def find():
            return to_device(self.disk.compute_or_load(kind, key, compute), "cpu")

        return to_device(broadcast_object(find), device())


# ------------------------------------------------------------------ a run
def download(cfg: Config):
    """One process of each machine gets the data set, for the others to find on disk; an error there
    is raised on every rank."""
    error = None
    if os.environ["LOCAL_RANK"] == "0":
        try:
            utils.load_data(cfg)
        except Exception as raised:
            error = raised
    for other in all_gather_object(error):
        if other is not None:
            raise other


def train(cfg: Config, store: Store) -> dict:
    """`utils.train` by all processes of the group; the result is the same on each."""
    check_same_run(cfg)
    download(cfg)
    step = None
    if not cfg.centralized:
        step = partial(federated_round, train_cohort=train_cohort)
    return utils.train(cfg, SharedStore(store), step=step)
