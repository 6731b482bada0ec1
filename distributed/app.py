"""The Flower app: rounds of `federated_round` whose clients train on nodes, on other machines.

The server draws the cohort from (seed, round) as ever and deals it out to the nodes that are there,
one message a node and round: a node is a worker that trains any client by its number k, so that
Flower's own node ids and sampling play no part. Dense runs send all weights, sparse runs only the
trainable entries; what stays frozen (head and mask) goes to each node once. A node needs this
project on its PYTHONPATH, the data set and the backbone. Checkpoints and results are `train`'s.
"""
import json
import logging
import shlex
import time
from dataclasses import asdict
from functools import lru_cache, partial

import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from train import configure, open_store

import utils
from utils import (
    ALGORITHMS,
    HEAD,
    ClientUpdate,
    CohortUpdate,
    Config,
    FedAvg,
    Params,
    Run,
    State,
    accumulate_update,
    build_model,
    client_update,
    device,
    federated_round,
    flatten,
    maskable,
    open_run,
    pack_mask,
    run_key,
    shares_of,
    train,
    unflatten,
    unpack_mask,
)

log = logging.getLogger("flwr")
server = ServerApp()  # Flower finds the two in the source, each by its own assignment
client = ClientApp()


# ------------------------------------------------------------------ which algorithms
def overrides(cfg: Config, hook: str) -> bool:
    """Whether the run's algorithm changes a method of FedAvg."""
    return getattr(ALGORITHMS[cfg.algorithm], hook) is not getattr(FedAvg, hook)


def check_algorithm(cfg: Config):
    """ValueError for runs without clients, and where the server's state steers the clients' steps.
    """
    advice = "choose another, or start distributed/train.py, by torchrun for several devices"
    if cfg.centralized:
        raise ValueError(f"algorithm='centralized' does not run on Flower: {advice}")
    # What clients say and what their steps then follow may be kept for each of them, as in
    # SCAFFOLD: as large as the model, times the number of clients, in every message to a node.
    if overrides(cfg, "local_gradient") and overrides(cfg, "client_message"):
        raise ValueError(f"algorithm={cfg.algorithm!r} does not run on Flower: its clients' steps "
                         f"follow a state that their messages make ({advice})")


# ------------------------------------------------------------------ what travels
def to_array(tensor: torch.Tensor) -> Array:
    return Array(tensor.detach().cpu().numpy())


def to_tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.numpy().copy()).to(device())


def trainable_entries(run: Run) -> torch.Tensor | slice:
    """Where the entries that travel lie in the flat weights."""
    if run.mask is None:
        return slice(None)
    return flatten({n: run.mask[n] for n in run.trainable})


def pack(run: Run, params: Params) -> Array:
    """The trainable entries of weights or of a task vector, float32."""
    vector = flatten({n: params[n] for n in run.trainable})
    return to_array(vector[trainable_entries(run)])


def unpack(run: Run, array: Array, frozen: Params) -> Params:
    """What was packed, with the other entries from `frozen`."""
    vector = flatten({n: frozen[n] for n in run.trainable})
    vector[trainable_entries(run)] = to_tensor(array)
    return unflatten(vector, run.trainable)


def pack_groups(groups: dict[str, Params]) -> ArrayRecord:
    """Named tensors by group: messages by client, or the server's memory."""
    arrays = {}
    for group, params in groups.items():
        for n, w in params.items():
            arrays[f"{group}:{n}"] = to_array(w)
    return ArrayRecord(arrays)


def unpack_groups(record: ArrayRecord) -> dict[str, Params]:
    groups = {}
    for name, array in record.items():
        group, _, n = name.partition(":")
        groups.setdefault(group, {})[n] = to_tensor(array)
    return groups


def setup_of(run: Run) -> ConfigRecord:
    """All that a node must know of a run and cannot find at its own place."""
    weights = run.model.state_dict()
    tensors = {n: weights[n].detach().cpu().contiguous() for n in HEAD}
    if run.mask is not None:
        tensors["mask"] = pack_mask(run.mask)
    return ConfigRecord({
        "config": json.dumps(asdict(run.cfg)),
        "identity": json.dumps(identity(run)),
        "tensors": safetensors.torch.save(tensors),
    })


def identity(run: Run) -> dict:
    """What server and node must agree on, as JSON has it."""
    agreed = run_key(run.cfg) | run.provenance | dict(code_sha256=utils.CODE_SHA256)
    return json.loads(json.dumps(agreed))


# ------------------------------------------------------------------ a node
@lru_cache(maxsize=1)
def open_worker(config: str, expected: str, tensors: bytes) -> tuple[Run, State]:
    """The run as this node has it, once a process; ValueError where it is not the server's."""
    cfg = Config(**json.loads(config))
    sent = safetensors.torch.load(tensors)
    head = {n: sent[n].to(device()) for n in HEAD}
    mask = None
    if "mask" in sent:
        mask = unpack_mask(sent["mask"], maskable(build_model(cfg)))

    run, start = open_run(cfg, None, head=head, mask=mask)
    own = identity(run)
    wanted = json.loads(expected)
    differ = [n for n in wanted if own.get(n) != wanted[n]]
    if differ:
        raise ValueError(f"this node's run is not the server's, they differ in {differ}: it needs "
                         "the same code and the same weights")
    return run, start


@client.train()
def train_clients(message: Message, context: Context) -> Message:
    """The updates of the clients that the server names."""
    content = message.content
    if "setup" in content:
        context.state["setup"] = content["setup"]
    setup = context.state["setup"]
    run, start = open_worker(setup["config"], setup["identity"], setup["tensors"])

    task = content["task"]
    params = unpack(run, content["weights"]["trainable"], start.params)
    memory = unpack_groups(content["algorithm_state"])
    state = State(params, task["round"], algorithm_state=memory)
    vectors, losses, messages = {}, {}, {}
    for k in task["clients"]:
        update = client_update(run, state, k, task["lr"])
        vectors[str(k)] = pack(run, update.vector)
        losses[str(k)] = update.loss.item()
        messages[str(k)] = update.message
    answer = RecordDict({
        "vectors": ArrayRecord(vectors),
        "losses": MetricRecord(losses),
        "messages": pack_groups(messages),
    })
    return Message(answer, reply_to=message)


# ------------------------------------------------------------------ the server
def tasks_of(run: Run, state: State, parts: dict, lr: float, known: set, timeout: float
             ) -> list[Message]:
    """A message to each node of `parts`, with what is frozen for those that are not `known`."""
    common = {"weights": ArrayRecord({"trainable": pack(run, state.params)})}
    # Only what runs on clients may read the server's memory; otherwise it stays at home.
    reads_memory = overrides(run.cfg, "local_gradient") or overrides(run.cfg, "client_message")
    common["algorithm_state"] = pack_groups(state.algorithm_state if reads_memory else {})
    setup = None
    messages = []
    for node, clients in parts.items():
        content = dict(common)
        content["task"] = ConfigRecord(dict(round=state.round, lr=lr, clients=clients))
        if node not in known:
            setup = setup or setup_of(run)
            content["setup"] = setup
        group = str(state.round + 1)
        messages.append(
            Message(RecordDict(content), node, "train", ttl=timeout, group_id=group))
    return messages


def update_from(run: Run, state: State, content: RecordDict, k: int) -> ClientUpdate:
    """Client k's part of what a node answered."""
    zeros = {n: torch.zeros_like(w) for n, w in state.params.items()}
    vector = unpack(run, content["vectors"][str(k)], zeros)
    loss = content["losses"][str(k)]
    messages = unpack_groups(content["messages"])
    message = messages.get(str(k), {})
    return ClientUpdate(k, torch.tensor(loss, device=device()), vector, message)


def ask_once(grid: Grid, messages: list[Message], timeout: float
             ) -> tuple[dict[int, RecordDict], dict[int, str]]:
    """Answers by node, and the reasons of those that failed."""
    silence = f"no answer within {timeout:g} s"
    failed = {m.metadata.dst_node_id: silence for m in messages}
    answers = {}
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    # Messages get their numbers when they are sent. A reply is known by the number it answers: of a
    # node that is gone the SuperLink replies itself, with an error.
    asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    for reply in replies:
        node = asked[reply.metadata.reply_to_message_id]
        if reply.has_error():
            failed[node] = reply.error.reason
        else:
            answers[node] = reply.content
            del failed[node]
    return answers, failed


def train_cohort(grid: Grid, known: set[int], timeout: float, run: Run, state: State,
                 clients: list[int], lr: float) -> CohortUpdate:
    """`utils.train_cohort` by the nodes: a failed one's clients are dealt out again to the others.

    RuntimeError where none answers; clients whom no node could train are left out, with a warning.
    """
    contents = {}  # by client, unpacked when it is its turn
    failed = {}
    waiting = clients
    while waiting:
        nodes = [node for node in sorted(grid.get_node_ids()) if node not in failed]
        nodes = nodes[:len(waiting)]
        parts = {}
        for i, node in enumerate(nodes):
            parts[node] = waiting[i::len(nodes)]
        if not parts:
            break
        messages = tasks_of(run, state, parts, lr, known, timeout)
        answers, silent = ask_once(grid, messages, timeout)
        failed |= silent
        # A node that failed may have been started anew: it is told all again.
        known.difference_update(silent)
        known.update(answers)
        for content in answers.values():
            contents |= {int(k): content for k in content["vectors"]}
        waiting = [k for k in clients if k not in contents]

    number = state.round + 1
    if failed:
        log.warning("round %d: nodes failed: %s", number, failed)
    if not contents:
        raise RuntimeError(f"round {number}: no node answered. Nodes failed: {failed}")
    if waiting:
        log.warning("round %d: clients %s are left out, the average is over the %d that answered",
                    number, sorted(waiting), len(contents))
    answered = [k for k in clients if k in contents]
    updates = (update_from(run, state, contents[k], k) for k in answered)
    return accumulate_update(run, state, updates, shares_of(run, answered))


def wait_for_nodes(grid: Grid, number: int, timeout: float):
    """RuntimeError unless so many nodes have connected in time."""
    end = time.monotonic() + timeout
    found = len(list(grid.get_node_ids()))
    while found < number:
        if time.monotonic() > end:
            raise RuntimeError(f"{found} of {number} nodes after {timeout:g} s: start more "
                               "SuperNodes, or lower `nodes`")
        time.sleep(1)
        found = len(list(grid.get_node_ids()))


@server.main()
def main(grid: Grid, context: Context):
    given = context.run_config
    cfg = configure(given["preset"], *shlex.split(given["config"]))
    check_algorithm(cfg)
    wait_for_nodes(grid, given["nodes"], given["timeout"])
    ask_nodes = partial(train_cohort, grid, set(), given["timeout"])
    step = partial(federated_round, train_cohort=ask_nodes)
    result = train(cfg, open_store(given["preset"]), step=step)
    if result["status"] not in ("finished", "diverged"):
        raise RuntimeError(f"{result['run']} is {result['status']}: start it again to go on")
    log.info("%s: %s", result["run"], result["status"])
