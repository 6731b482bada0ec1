"""The Flower app: `federated_round` whose clients train on other machines' or GPUs' nodes.

The server draws the cohort from (seed, round) as ever and deals it out to the nodes that are there,
one message a node and round: a node is a worker that trains any client by its number k, so that
Flower's own node ids and sampling play no part. Dense runs send all weights, sparse runs only the
free entries; what stays frozen (head and mask) goes to each node once. A node needs this project on
its PYTHONPATH, the data set and the backbone. Checkpoints and results are those of `train`.
"""
import json
import logging
import shlex
import time
from dataclasses import asdict
from functools import lru_cache, partial

import numpy as np
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from train import configure

from utils import (
    HEAD,
    Config,
    Params,
    Run,
    State,
    client_update,
    device,
    federated_round,
    flat,
    maskable,
    open_run,
    open_store,
    train,
    unflat,
)

log = logging.getLogger("flwr")
server = ServerApp()  # Flower finds the two in the source, each by its own assignment
client = ClientApp()


# ------------------------------------------------------------------ what travels
def free_entries(run: Run) -> torch.Tensor | slice:
    """Where the trained entries lie in the flat weights."""
    return flat({n: run.mask[n] for n in run.trained}) if run.mask else slice(None)


def pack(run: Run, params: Params) -> Array:
    """The free entries of weights, float32."""
    vector = flat({n: params[n].detach() for n in run.trained})
    return Array(vector[free_entries(run)].cpu().numpy())


def unpack(run: Run, array: Array, frozen: Params) -> Params:
    """What was packed, with the other entries from `frozen`."""
    vector = flat({n: frozen[n] for n in run.trained})
    vector[free_entries(run)] = torch.from_numpy(array.numpy().copy()).to(vector.device)
    return unflat(vector, run.trained)


def setup_of(run: Run) -> ConfigRecord:
    """All that a node must know of a run and cannot find at its own place."""
    tensors = {n: w.detach().cpu().contiguous() for n, w in run.model.state_dict().items()
               if n in HEAD}
    if run.mask:
        bits = flat({n: run.mask[n] for n in maskable(run.model)}).cpu().numpy()
        tensors["mask"] = torch.from_numpy(np.packbits(bits))
    return ConfigRecord({"config": json.dumps(asdict(run.cfg)), "facts": facts(run),
                         "tensors": safetensors.torch.save(tensors)})


def facts(run: Run) -> str:
    return json.dumps(run.facts, sort_keys=True)


# ------------------------------------------------------------------ a node
@lru_cache(maxsize=1)
def worker(config: str, expected: str, tensors: bytes) -> tuple[Run, State]:
    """The run as this node has it, once a process; ValueError where it is not the server's."""
    sent = {n: w.to(device()) for n, w in safetensors.torch.load(tensors).items()}

    def mask_of(cfg, store, data, model, shards):
        like = {n: model.get_parameter(n) for n in maskable(model)}
        bits = np.unpackbits(sent["mask"].cpu().numpy(), count=sum(map(torch.numel, like.values())))
        return unflat(torch.from_numpy(bits).bool().to(device()), like)

    run, start = open_run(Config(**json.loads(config)), None, mask_of=mask_of,
                          head_of=lambda *_: {n: sent[n] for n in HEAD})
    if facts(run) != expected:
        raise ValueError("this node's backbone is not the server's: it needs the same weights= "
                         f"file and code. (server, node): {expected[:200]}, {facts(run)[:200]}")
    return run, start


@client.train()
def train_clients(message: Message, context: Context) -> Message:
    """The weights and losses of the clients that the server names."""
    task = message.content["task"]
    if "setup" in message.content:
        context.state["setup"] = message.content["setup"]
    setup = context.state["setup"]
    run, start = worker(setup["config"], setup["facts"], setup["tensors"])
    params = unpack(run, message.content["weights"]["free"], start.params)
    state, weights, losses = State(params, round=task["round"]), ArrayRecord(), MetricRecord()
    for k in task["clients"]:
        run.load(params)
        losses[str(k)] = client_update(run, state, k, task["lr"]).item()
        weights[str(k)] = pack(run, run.trained)
    return Message(RecordDict({"weights": weights, "losses": losses}), reply_to=message)


# ------------------------------------------------------------------ the server
def order(run: Run, state: State, share: dict[int, list[int]], lr: float, known: set[int],
          ttl: float) -> list[Message]:
    """One message to each node of `share`, with what is frozen for those that do not know it."""
    weights = ArrayRecord({"free": pack(run, state.params)})
    setup = {} if known.issuperset(share) else {"setup": setup_of(run)}
    return [Message(RecordDict({
        "weights": weights, "task": ConfigRecord(dict(round=state.round, lr=lr, clients=clients)),
        **({} if node in known else setup)}), node, "train", ttl=ttl, group_id=str(state.round + 1))
        for node, clients in share.items()]


def ask_nodes(grid: Grid, known: set[int], timeout: float, run: Run, state: State,
              clients: list[int], lr: float) -> dict:
    """`ask_clients` by the nodes: a failed one's clients are dealt out again to the others.

    RuntimeError where none answers; clients whom no node could train are left out, with a warning.
    """
    answers, failed = {}, {}
    while waiting := [k for k in clients if k not in answers]:
        nodes = [node for node in sorted(grid.get_node_ids()) if node not in failed]
        share = {node: part for i, node in enumerate(nodes) if (part := waiting[i::len(nodes)])}
        if not share:
            break
        failed |= dict.fromkeys(share, f"no answer within {timeout:g} s")
        messages = order(run, state, share, lr, known, timeout)
        replies = grid.send_and_receive(messages, timeout=timeout)
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        for reply in replies:  # of a node that is gone the SuperLink sends one, as an error
            node = asked.get(reply.metadata.reply_to_message_id)
            if reply.has_error():
                failed[node] = reply.error.reason
                continue
            known.add(node)
            del failed[node]
            answers |= {int(k): (weights, reply.content["losses"][k])
                        for k, weights in reply.content["weights"].items()}
        known.difference_update(failed)
    if failed:
        log.warning("round %d: nodes failed: %s", state.round + 1, failed)
    if not answers:
        raise RuntimeError(f"round {state.round + 1}: no node answered. Nodes failed: {failed}")
    if waiting:
        log.warning("round %d: clients %s are left out, the average is over the %d that answered",
                    state.round + 1, waiting, len(answers))

    def answer(k):
        weights, loss = answers.pop(k)
        run.load(unpack(run, weights, state.params))
        return loss
    return {k: partial(answer, k) for k in clients if k in answers}


def wait_for_nodes(grid: Grid, number: int, timeout: float):
    """RuntimeError unless so many nodes have connected in time."""
    end = time.monotonic() + timeout
    while (found := len(list(grid.get_node_ids()))) < number:
        if time.monotonic() > end:
            raise RuntimeError(f"{found} of {number} nodes after {timeout:g} s: start more "
                               "SuperNodes, or lower `nodes`")
        time.sleep(1)


@server.main()
def main(grid: Grid, context: Context):
    given = context.run_config
    cfg = configure(given["preset"], *shlex.split(given["config"]))
    if cfg.algorithm not in ("fedavg", "fedprox"):
        raise ValueError(f"algorithm={cfg.algorithm!r} does not run on Flower: choose 'fedavg' or "
                         "'fedprox', or start distributed/train.py by torchrun")
    wait_for_nodes(grid, given["nodes"], given["timeout"])
    ask = partial(ask_nodes, grid, set(), given["timeout"])
    result = train(cfg, open_store(given["preset"]), step=partial(federated_round, ask=ask))
    if result["status"] not in ("finished", "diverged"):
        raise RuntimeError(f"{result['run']} is {result['status']}: start it again to go on")
    log.info("%s: %s", result["run"], result["status"])
