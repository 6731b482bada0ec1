"""The Flower app gives what `train_federated` gives, and survives its nodes."""
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CFG, cut, make_small, one_client, resumed, same

import notebooks.extension  # noqa: F401  (registers algorithms)
import utils
from utils import ROOT, Store, federated_round, flatten, open_run, run_name, train_federated

pytest.importorskip("flwr", reason="the Flower app needs flwr[simulation], which is not installed")
sys.path.insert(0, str(ROOT / "distributed"))

import app  # noqa: E402
import launch  # noqa: E402
from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

BASE = replace(CFG, num_clients=8, participation=0.75, num_rounds=3)
SPARSE = replace(BASE, rule="least_sensitive", sparsity=0.9, head="ridge")
KINDS = {"dense": BASE, "skewed": replace(BASE, classes_per_client=5),
         "local gradients": replace(BASE, algorithm="fedprox"),
         "a server's memory": replace(SPARSE, algorithm="fedadam", server_lr=0.01, head="train"),
         "norms": replace(SPARSE, rule="random", algorithm="fedexp"),
         "messages and all vectors": replace(BASE, algorithm="fisher"),
         "memory that clients read": replace(SPARSE, algorithm="held_out", participation=0.5),
         "sparse": SPARSE, "probe": replace(BASE, head="probe")}


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    app.open_worker.cache_clear()
    yield
    app.open_worker.cache_clear()


class Nodes:
    """Nodes in this process behind the part of Flower's Grid that the app uses.

    `rule(node, task)` makes a node answer ("ok"), raise ("error") or say nothing ("silence").
    """
    def __init__(self, number=3, rule=lambda node, task: "ok"):
        self.contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in range(11, 11 + number)}
        self.rule, self.sent, self.received = rule, [], []

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout):
        assert len(self.sent) < 100, "the app asks again and again"
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{len(self.sent)}/{number}"
            node, task = message.metadata.dst_node_id, message.content["task"]
            self.sent.append(message)
            how = self.rule(node, task)
            if how == "error":  # the SuperLink's word on a node that is gone names itself as sender
                reply = Message(Error(5, "Node Unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
                replies.append(reply)
            elif how == "ok":
                replies.append(app.train_clients(message, self.contexts[node]))
        self.received += replies
        return replies[::-1]  # in any order


def by(nodes):
    """`train_cohort` by these nodes."""
    return partial(app.train_cohort, nodes, set(), 5)


def flower(cfg, store, nodes):
    return utils.train(cfg, store, step=partial(federated_round, train_cohort=by(nodes)))


def assert_same_run(cfg, first, second):
    """Two stores hold one run: its history, result and checkpoint to the last bit."""
    results = [store.result(cfg) for store in (first, second)]
    for key in ("status", "run", "key", "config", "history", "best_round", "test"):
        assert results[0][key] == results[1][key]
    assert np.array_equal(*(np.load(s.root / f"{run_name(cfg)}.npy") for s in (first, second)))
    states = [resumed(cfg, store) for store in (first, second)]
    assert states[0].round == states[1].round == cfg.num_rounds
    assert same(states[0].params, states[1].params)
    assert same(states[0].best, states[1].best)


@pytest.fixture
def stores(tmp_path):
    return Store(tmp_path / "here", minutes=0.0), Store(tmp_path / "flower", minutes=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_give_the_bits_of_one_process(small, stores, kind):
    cfg, nodes = KINDS[kind], Nodes()
    train_federated(cfg, stores[0])
    flower(cfg, stores[1], nodes)
    assert_same_run(cfg, *stores)
    assert len(nodes.sent) == 9  # one message a node and round
    trained = [k for m in nodes.sent[:3] for k in m.content["task"]["clients"]]
    drawn = utils.cohort(8, cfg.participation, "cohort", 0, 0)
    assert sorted(trained) == sorted(drawn.tolist())


def test_a_sparse_message_carries_the_trainable_entries_and_little_else(small, stores):
    nodes = Nodes()
    flower(SPARSE, stores[1], nodes)
    run, _ = open_run(SPARSE, stores[1])
    trainable = run.num_trainable()
    assert trainable < 0.1 * sum(p.numel() for p in run.model.parameters())

    def size(message):
        return sum(len(o.deflate()) for o in get_all_nested_objects(message).values())
    later = nodes.sent[3:]
    assert ["setup" in m.content for m in nodes.sent] == [True] * 3 + [False] * 6
    for message in later:
        array = message.content["weights"]["trainable"].numpy()
        assert (array.shape, array.dtype) == ((trainable,), "float32")
        assert 4 * trainable < size(message) < 4 * trainable + 4096
    for reply in nodes.received:
        vectors = reply.content["vectors"]
        assert {v.numpy().shape for v in vectors.values()} == {(trainable,)}
        assert 4 * trainable * len(vectors) < size(reply) < 4 * trainable * len(vectors) + 4096


def test_the_memory_of_a_server_stays_at_home_unless_clients_read_it(small, stores):
    for algorithm, travels in (("fedavgm", False), ("held_out", True)):
        nodes = Nodes()
        flower(replace(BASE, algorithm=algorithm), stores[1], nodes)
        assert bool(nodes.sent[-1].content["algorithm_state"]) is travels


@pytest.mark.parametrize("how", ["error", "silence"])
def test_a_failing_nodes_clients_are_trained_by_the_others(small, stores, how, caplog):
    def rule(node, task):
        return how if node == 12 and task["round"] == 1 else "ok"
    train_federated(SPARSE, stores[0])
    with caplog.at_level(logging.WARNING, "flwr"):
        flower(SPARSE, stores[1], nodes := Nodes(3, rule))
    assert_same_run(SPARSE, *stores)
    assert "round 2: nodes failed: {12:" in caplog.text
    assert "setup" in nodes.sent[-2].content  # it may have been started anew: it is told again


def test_clients_whom_no_node_trains_are_left_out_of_the_average(small, stores, caplog):
    run, state = open_run(BASE, stores[0])
    drawn = utils.cohort(8, 0.75, "cohort", 0, 0).tolist()
    bad = drawn[1]
    nodes = Nodes(2, lambda node, task: "error" if bad in task["clients"] else "ok")
    with caplog.at_level(logging.WARNING, "flwr"):
        after = federated_round(run, state, train_cohort=by(nodes))
    *_, row = after.history
    assert bad in row["lost"]
    assert f"clients {row['lost']} are left out" in caplog.text

    def others(run, state, clients, lr):
        return utils.train_cohort(run, state, [k for k in clients if k not in row["lost"]], lr)
    expected = federated_round(run, state, train_cohort=others)
    assert same(after.params, expected.params)
    left = [k for k in drawn if k not in row["lost"]]
    total = sum(len(run.shards[k]) for k in left)
    mean = {n: torch.zeros_like(w) for n, w in state.params.items()}
    for k in left:
        vector, _ = one_client(run, state, k, row["lr"])
        mean = utils.apply_vector(mean, vector, len(run.shards[k]) / total)
    torch.testing.assert_close(flatten(after.params), flatten(utils.add(state.params, mean)))


def test_a_round_that_nobody_answers_is_an_error_that_says_why(small, stores):
    with pytest.raises(RuntimeError, match="round 1: no node answered.*Node Unavailable"):
        flower(BASE, stores[1], Nodes(2, lambda node, task: "error"))
    with pytest.raises(RuntimeError, match="0 of 1 nodes"):
        app.wait_for_nodes(Nodes(0), 1, 0)


def test_a_diverging_run_ends_as_in_one_process(small, stores):
    cfg = replace(BASE, lr=1e20)
    first, second = train_federated(cfg, stores[0]), flower(cfg, stores[1], Nodes())
    assert first["status"] == second["status"] == "diverged"
    assert first["error"] == second["error"]


def test_a_run_begun_by_either_is_finished_by_the_other(small, stores, monkeypatch):
    cfg, half = replace(SPARSE, num_rounds=4, eval_every=1), stores[1]
    whole = stores[0]
    train_federated(cfg, whole)
    with pytest.raises(RuntimeError, match="round 3"):
        flower(cfg, half, Nodes(2, lambda node, task: "ok" if task["round"] < 2 else "error"))
    assert resumed(cfg, half).round in (1, 2)  # what was stored before the crash
    train_federated(cfg, half)
    assert_same_run(cfg, whole, half)
    other = Store(half.root / "other", minutes=0.0)
    cut(monkeypatch, "federated_round", at=3)
    assert train_federated(cfg, other)["status"] == "interrupted"
    flower(cfg, other, nodes := Nodes(2))
    assert min(m.content["task"]["round"] for m in nodes.sent) == 2
    assert_same_run(cfg, whole, other)


def test_a_node_with_another_backbone_refuses(small, stores, monkeypatch):
    run, state = open_run(BASE, stores[0])
    nodes, honest = Nodes(1), app.open_run

    def other(*args, **kwargs):
        run, start = honest(*args, **kwargs)
        return replace(run, provenance={"backbone_sha256": "another"}), start
    monkeypatch.setattr(app, "open_run", other)
    with pytest.raises(ValueError, match="not the server's, they differ in .'backbone_sha256'"):
        federated_round(run, state, train_cohort=by(nodes))


def test_a_node_with_other_code_refuses(small, stores, monkeypatch):
    run, state = open_run(BASE, stores[0])
    honest = app.open_run

    def edited(*args, **kwargs):  # on the node, after the server has said what it is
        monkeypatch.setattr(app.utils, "CODE_SHA256", "another")
        return honest(*args, **kwargs)
    monkeypatch.setattr(app, "open_run", edited)
    with pytest.raises(ValueError, match="not the server's, they differ in .'code_sha256'"):
        federated_round(run, state, train_cohort=by(Nodes(1)))


@pytest.mark.parametrize("algorithm", ["scaffold", "centralized"])
def test_what_does_not_run_on_flower_is_refused(algorithm):
    context = SimpleNamespace(run_config=dict(
        preset="demo", config=f"algorithm={algorithm} dataset=synthetic", nodes=1, timeout=1))
    with pytest.raises(ValueError, match=f"algorithm='{algorithm}' does not run on Flower"):
        app.main(Nodes(1), context)


# ------------------------------------------------------------------ Flower's own processes
QUICK = dict(dataset="synthetic", weights="none", val_fraction=0.9, eval_images=100, num_clients=8,
             participation=0.75, num_rounds=3, local_steps=2, batch_size=4, eval_every=1,
             calibration_images=20, calibration_rounds=1, head="train")
THIN = QUICK | dict(rule="least_sensitive", sparsity=0.9, head="ridge")


def words(fields: dict) -> list[str]:
    return [f"{k}={v}" for k, v in fields.items()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the processes started from here keep their results: their store."""
    for name, value in {"RESULTS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "TRAIN": "",
                        "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
                        "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_memory_monitor_refresh_ms": "0",
                        # of a busy machine more patience is needed than the usual minute
                        "RAY_worker_register_timeout_seconds": "600",
                        "RAY_gcs_server_request_timeout_seconds": "300",
                        "PATH": os.environ["PATH"], "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
                        "PYTHONPATH": os.environ.get("PYTHONPATH", "")}.items():
        monkeypatch.setenv(name, value)  # also undoes what the launcher sets
    return Store(tmp_path / "demo")


def simulate(fields: dict, tries=4) -> subprocess.CompletedProcess:
    """Ray gives its own processes 30 s to start, a constant of its code: too few on a busy machine.

    Where it says so the run is started again, as a person would.
    """
    command = [sys.executable, str(ROOT / "distributed/launch.py"), "demo", *words(fields),
               "--federation-config",
               "num-supernodes=2 init-args-num-cpus=2 client-resources-num-cpus=1"]
    for _ in range(tries):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=900)
        if "node timed out during startup" not in done.stdout:
            break
    return done


def assert_like_train_federated(fields, place, tmp_path):
    cfg = utils.preset("demo", **fields)
    train_federated(cfg, here := Store(tmp_path / "here"))
    assert_same_run(cfg, here, place)


@pytest.mark.slow
def test_the_simulation_engine_gives_the_bits_of_one_process(place, tmp_path):
    """Dense; below a sparse run goes over a SuperLink."""
    pytest.importorskip("ray", reason="Flower's simulation engine needs ray: flwr[simulation]")
    done = simulate(QUICK)
    assert done.returncode == 0, done.stdout
    assert_like_train_federated(QUICK, place, tmp_path)


@pytest.mark.slow
def test_a_crashed_run_exits_with_nonzero_status(place):
    pytest.importorskip("ray", reason="Flower's simulation engine needs ray: flwr[simulation]")
    done = simulate(QUICK | dict(algorithm="scaffold"))
    assert "does not run on Flower" in done.stdout
    assert "The run ended as finished:failed" in done.stdout
    assert done.returncode == 1


@pytest.fixture
def supernode(tmp_path):
    """Starts SuperNodes: (process, path of its log)."""
    started = []

    def start(port: int, name: str):
        with launch.socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            own = probe.getsockname()[1]
        log = tmp_path / f"{name}.log"
        with open(log, "w") as file:
            started.append(subprocess.Popen(
                ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port",
                 str(own)], stdout=file, stderr=file, start_new_session=True,
                env=os.environ | {"FLWR_HOME": str(tmp_path / name)}))
        return started[-1], log
    yield start
    for process in started:
        kill(process)


def kill(process: subprocess.Popen):
    """A SuperNode and what it has started go at once, as when their machine does."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_supernodes_of_which_one_is_killed_give_the_bits_of_one_process(
        place, tmp_path, supernode):
    launch.search_paths()
    with launch.superlink() as port:
        (first, _), (_, log) = supernode(port, "first"), supernode(port, "second")
        nodes = {"first": tmp_path / "first.log", "second": log}
        run = subprocess.Popen([sys.executable, str(ROOT / "distributed/launch.py"), "demo",
                                *words(THIN), "--superlink", "own", "--run-config", "nodes=2"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: nodes["first"].read_text().count("Receiving: train") == 2)
        kill(first)
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    assert log.read_text().count("Receiving: train") >= 4  # three rounds, and the dead one's share
    assert "nodes failed" in output
    assert_like_train_federated(THIN, place, tmp_path)
    assert (place.root / f"{run_name(utils.preset('demo', **THIN))}.json").exists()
