"""Checkpoints and results: atomic, verified, mirrored, and never another run's."""
import json
import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import CFG, make_small, same, small_run

import utils
from notebooks.store import parse
from utils import State, Store, backbone, build_model, digest, dump, run_name

CKPT = "checkpoints/*/*.safetensors"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def mirrored(tmp_path):
    return Store(tmp_path / "root", tmp_path / "drive")


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


def state(round):
    """Of a round, with odd shapes and values that a text format would bend."""
    w = {"z.weight": torch.randn(3, 5), "a.bias": torch.tensor([1 / 3, float("inf"), -0.0]),
         "scalar": torch.tensor(0.1)}
    best = {n: v + 1 for n, v in w.items()}
    memory = {"server/exp_avg": {n: 0.3 * v for n, v in w.items()},
              "server/step": {n: torch.tensor(float(round)) for n in w},
              "control/11": {n: -v for n, v in w.items()}}
    history = tuple(dict(round=r, lr=1 / (3 + r), val_top1=0.1 * r) for r in range(1, round + 1))
    return State(w, round, history, memory, best, best_round=round - 1, seconds=0.1 + round)


def equal(a, b):
    parts = lambda s: {"params": s.params, "best": s.best or {}, **s.memory}  # noqa: E731
    x, y = parts(a), parts(b)
    return x.keys() == y.keys() and all(same(x[g], y[g]) for g in x) and all(
        getattr(a, k) == getattr(b, k) for k in ("round", "history", "best_round", "seconds"))


def files(root):
    """Contents by name, the locks aside: they stay where their processes run."""
    return {f.relative_to(root): f.read_bytes() for f in root.rglob("*")
            if f.is_file() and f.name != "lock"}


def mangle(store, name, change):
    path = store.root / name
    path.write_bytes(change(path.read_bytes()))


def flip(bit):
    def change(content):
        at = bit % (8 * len(content))
        return (content[:at // 8] + bytes([content[at // 8] ^ 1 << at % 8])
                + content[at // 8 + 1:])
    return change


def break_drive(patch, drive):
    """What changes the drive fails, as on a full or an unmounted one."""
    for module, name in ((os, "replace"), (os, "truncate")):
        honest = getattr(module, name)

        def guarded(*args, honest=honest, **kwargs):
            if any(str(drive) in str(a) for a in args):
                raise OSError("drive is full")
            return honest(*args, **kwargs)
        patch.setattr(module, name, guarded)


# ------------------------------------------------------------------ files
def test_what_is_written_is_read_listed_and_deleted(store):
    for name, content in (("a/1.bin", b"one"), ("a/2.bin", b"\x00two"), ("b.json", b"{}")):
        store.write(name, content)
        assert store.read(name) == content
    assert store.names("a/*.bin") == ["a/1.bin", "a/2.bin"]
    store.write("a/1.bin", b"again")
    assert store.read("a/1.bin") == b"again"
    store.delete("a/1.bin")
    assert store.names("a/*") == ["a/2.bin"]
    with pytest.raises(FileNotFoundError, match="a/1.bin"):
        store.read("a/1.bin")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_cut_write_leaves_the_old_content(store, monkeypatch, call):
    store.write("run.bin", b"old")

    def cut(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, call, cut)
        with pytest.raises(KeyboardInterrupt):
            store.write("run.bin", b"new")
    assert store.read("run.bin") == b"old"
    store.write("run.bin", b"new")
    assert store.read("run.bin") == b"new"


def test_a_file_is_synced_before_it_is_renamed(store, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("sync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), rename(a, b)))
    store.write("run.json", b"x" * 10_000)
    assert calls == ["sync", "run.json"]


# ------------------------------------------------------------------ checkpoints
def test_a_checkpoint_comes_back_bit_by_bit(store):
    saved = state(3)
    store.save(CFG, saved)
    assert equal(store.resume(CFG), saved)


@pytest.mark.parametrize(("algorithm", "server"), [
    ("fedavg", "average"), ("fedprox", "average"), ("fedavg", "momentum"), ("fedavg", "adam"),
    ("scaffold", "fedexp"), ("centralized", "average")])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(store, algorithm, server):
    """In particular the order of the weights, by which lists are paired, must not matter."""
    cfg = replace(CFG, algorithm=algorithm, server=server, num_clients=3, prox_mu=1.0)
    layers = [torch.nn.Linear(12, 12) for _ in range(6)]  # of one shape: a mix-up would be silent
    run, state = small_run(cfg, model=torch.nn.Sequential(torch.nn.Flatten(), *layers))
    step = utils.centralized_epoch if algorithm == "centralized" else utils.federated_round
    whole = broken = step(run, state)
    for _ in range(3):
        store.save(cfg, broken)
        whole, broken = step(run, whole), step(run, store.resume(cfg))
        assert whole.history == broken.history
        assert same(whole.params, broken.params)
        assert all(same(whole.memory[g], broken.memory[g]) for g in whole.memory)


@pytest.mark.parametrize("best_round", [0, 3])
def test_a_best_that_is_missing_or_the_newest_comes_back(store, best_round):
    saved = state(3)
    saved = replace(saved, best_round=best_round, best=saved.params if best_round else None)
    store.save(CFG, saved)
    assert equal(store.resume(CFG), saved)


def test_nothing_stored_is_none(store):
    assert store.resume(CFG) is None
    assert store.result(CFG) is None


def test_the_newest_two_checkpoints_are_kept(store):
    for r in (1, 2, 9, 10, 11):
        store.save(CFG, state(r))
    assert [Path(n).name[:7] for n in store.names(CKPT)] == ["0000010", "0000011"]
    assert store.resume(CFG).round == 11


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -100, -1])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(store, cut):
    old, new = state(1), state(2)
    store.save(CFG, old)
    store.save(CFG, new)
    mangle(store, store.names(CKPT)[1], lambda content: content[:cut])
    with pytest.warns(UserWarning, match="0000002_.* is damaged"):
        assert equal(store.resume(CFG), old)


@pytest.mark.parametrize("bit", [0, 70, 1000, 4001, 9999, -1])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(store, bit):
    old = state(1)
    store.save(CFG, old)
    store.save(CFG, state(2))
    mangle(store, store.names(CKPT)[1], flip(bit))
    with pytest.warns(UserWarning, match="0000002_.* is damaged"):
        assert equal(store.resume(CFG), old)


def test_with_both_checkpoints_damaged_a_run_starts_anew(store):
    for r in (1, 2):
        store.save(CFG, state(r))
    for name in store.names(CKPT):
        mangle(store, name, flip(999))
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.resume(CFG) is None


def test_unfinished_files_are_ignored(store):
    saved = state(2)
    store.save(CFG, saved)
    folder = store.root / "checkpoints" / run_name(CFG)
    (folder / f"0000003_{'0' * 64}.safetensors.77.part").write_bytes(b"half")
    (store.root / f"{run_name(CFG)}.json.77.part").write_bytes(b"{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(store.resume(CFG), saved)
    assert store.result(CFG) is None


def test_unfinished_files_of_the_cache_are_ignored(store):
    made = store.cached("head", dict(a=1), lambda: {"w": torch.ones(2)})
    path = store.root / store.names("cache/*")[0]
    path.rename(path.with_name(f"{path.name}.77.part"))  # a cut just before the rename
    mangle(store, store.names("cache/*")[0], lambda content: content[:20])
    assert same(store.cached("head", dict(a=1), lambda: {"w": torch.ones(2)}), made)


def test_another_runs_checkpoint_is_refused_with_both_values(store):
    mine = replace(CFG, name="mine", lr=0.25)
    store.save(mine, state(2))
    with pytest.raises(ValueError, match=r"mine .*'lr': \(0\.5, 0\.25\)") as error:
        store.resume(replace(mine, lr=0.5))
    assert "batch_size" not in str(error.value), "names a field that does not differ"
    assert store.resume(mine).round == 2


@pytest.mark.parametrize("change", [dict(rule="random"), dict(seed=3), dict(classes_per_client=5),
                                    dict(num_rounds=9)])
def test_another_runs_result_is_refused_with_both_values(store, small, change):
    mine = replace(CFG, name="mine", num_rounds=1)
    utils.train_federated(mine, store)
    (key, asked), = change.items()
    for call in (store.result, lambda cfg: utils.train_federated(cfg, store)):
        with pytest.raises(ValueError, match=key) as error:
            call(replace(mine, **change))
        assert f"'{key}': ({asked!r}, {getattr(mine, key)!r})" in str(error.value)\
            or getattr(mine, key) == getattr(utils.Config(), key)


def test_a_derived_name_tells_runs_apart(store):
    store.save(CFG, state(2))
    assert store.resume(replace(CFG, lr=0.7)) is None


# ------------------------------------------------------------------ results
def test_json_refuses_numbers_that_are_none():
    assert parse(dump(dict(a=[1.5, None, "x"]))) == dict(a=[1.5, None, "x"])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            dump(dict(history=[dict(loss=bad)]))


def test_a_result_says_what_ran_where_and_with_what(store, small):
    cfg = replace(CFG, rule="random", head="ridge")
    result = utils.train_federated(cfg, store)
    text = (store.root / f"{run_name(cfg)}.json").read_text()
    stored = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in the JSON"))
    assert stored.pop("sha256") == digest(result)
    assert stored == result
    assert stored["config"] == json.loads(json.dumps(asdict(cfg)))
    assert stored["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert stored["versions"].keys() >= {"torch", "timm", "numpy", "torchvision"}
    assert stored["backbone"] == digest(backbone(build_model(cfg)))
    assert stored["device"] == "cpu"
    assert stored["seconds"] > 0
    assert [row["round"] for row in stored["history"]] == [1, 2, 3, 4]
    assert [row["round"] for row in stored["history"] if "val_top1" in row] == [2, 4]
    assert stored["status"] == "finished"
    assert stored["error"] == ""


def test_a_run_stores_the_hash_of_its_cached_mask(store, small, monkeypatch):
    cfg = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.75)
    found = utils.train_federated(cfg, store)["mask"]
    name, = store.names("cache/mask_*")
    mask = safetensors.torch.load(store.read(name))
    assert found["sha256"] == digest(mask)
    assert found["composition"] == utils.composition(mask)
    free, every = (sum(c.sum().item() for c in mask.values()), utils.flat(mask).numel())
    assert free == round(0.25 * every)
    monkeypatch.setattr(utils, "calibrate_mask", lambda *a, **k: pytest.fail("calibrated again"))
    assert utils.train_federated(replace(cfg, lr=0.01), store)["mask"] == found


def test_cached_computes_once_for_a_key(store):
    calls = []
    compute = lambda: (calls.append(1), {"w": torch.tensor([1 / 3, len(calls)])})[1]  # noqa: E731
    first = store.cached("head", dict(l2=1.0, train=[1, 2]), compute)
    assert same(store.cached("head", dict(train=[1, 2], l2=1.0), compute), first)
    assert len(calls) == 1
    for key in (dict(l2=2.0, train=[1, 2]), dict(l2=1.0, train=[1, 3])):
        assert not same(store.cached("head", key, compute), first)
    assert not same(store.cached("mask", dict(l2=1.0, train=[1, 2]), compute), first)
    assert len(calls) == 4


def test_cached_keeps_json_as_well_as_weights(store):
    assert store.cached("fact", dict(a=1), lambda: dict(x=[1, 2])) == dict(x=[1, 2])
    assert store.cached("fact", dict(a=1), lambda: 1 / 0) == dict(x=[1, 2])


# ------------------------------------------------------------------ the drive
def test_every_file_is_copied_to_the_drive(mirrored, small):
    utils.train_federated(replace(CFG, rule="random", head="ridge"), mirrored)
    assert files(mirrored.root) == files(mirrored.drive)
    assert len(files(mirrored.root)) == 4  # result, checkpoint, head, mask


def test_an_emptied_root_is_found_on_the_drive(mirrored, small, monkeypatch):
    saved = state(2)
    mirrored.save(replace(CFG, name="cut"), saved)
    result = utils.train_federated(CFG, mirrored)
    shutil.rmtree(mirrored.root)
    again = Store(mirrored.root, mirrored.drive)
    assert equal(again.resume(replace(CFG, name="cut")), saved)
    monkeypatch.setattr(utils, "open_run", lambda *a: pytest.fail("trained again"))
    assert utils.train_federated(CFG, again) == result


def test_old_checkpoints_leave_the_drive_too(mirrored):
    for r in (1, 2, 3):
        mirrored.save(CFG, state(r))
    for place in (mirrored.root, mirrored.drive):
        assert sorted(p.name[:7] for p in place.glob(CKPT)) == ["0000002", "0000003"]


def test_training_goes_on_without_the_drive(tmp_path, small, monkeypatch):
    store = Store(tmp_path / "root", tmp_path / "drive", minutes=0)
    cfg = replace(CFG, num_rounds=6, eval_every=1)
    with monkeypatch.context() as patch:
        break_drive(patch, store.drive)
        with pytest.warns(UserWarning, match="only in .*drive is full"):
            result = utils.train_federated(cfg, store)
    assert result["status"] == "finished"
    alone = utils.train_federated(cfg, Store(tmp_path / "alone"))
    assert result["history"] == alone["history"]
    assert not list(store.drive.rglob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write("next.json", b"{}")
    assert files(store.drive) == files(store.root)


def test_old_checkpoints_that_stay_on_a_broken_drive_do_not_stop_a_run(mirrored, monkeypatch):
    for r in (1, 2):
        mirrored.save(CFG, state(r))
    newest = state(3)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        break_drive(patch, mirrored.drive)
        mirrored.save(CFG, newest)
    assert equal(mirrored.resume(CFG), newest)


def test_results_reach_the_drive_after_the_checkpoint(tmp_path, small, monkeypatch):
    """A result on the drive without its weights would be a run that cannot go on."""
    store, order, copy = Store(tmp_path / "root", tmp_path / "drive"), [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b)), copy(a, b)))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        break_drive(patch, store.drive)
        utils.train_federated(CFG, store)
    order.clear()
    store.write("later.json", b"{}")
    copied = [p.suffix for p in order if store.drive in p.parents]
    assert copied == sorted(copied, reverse=True)  # .safetensors, then .json
    assert len(set(copied)) == 2
