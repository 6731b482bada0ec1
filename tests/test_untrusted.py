"""Files that others wrote: nothing in them runs, and what does not fit is refused by name."""
import hashlib
import io
import json
import struct
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import CFG, make_small, resumed

import utils
from utils import Config, Store, build_model, open_run, run_name, train_federated


class Code:
    """A pickle that makes a file when it is opened."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def stored():
    return safetensors.torch.load_file(utils.weights_path("mini"))


def load(path):
    return build_model(Config(weights=str(path), arch="mini", image_size=32))


def header(shape, end, dtype="F32", data=b"\0" * 8):
    """A safetensors file that claims a tensor of this shape."""
    card = json.dumps({"norm.bias": dict(dtype=dtype, shape=shape, data_offsets=[0, end])}).encode()
    return struct.pack("<Q", len(card)) + card + data


def torch_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


BOMBS = {
    "huge length.safetensors": struct.pack("<Q", 2**63) + b"{}",
    "huge header.safetensors": struct.pack("<Q", 2**40) + b"{}",
    "huge tensor.safetensors": header([2**20, 2**20], 2**42),
    "overflow.safetensors": header([2**33, 2**33], 8),
    "lying offsets.safetensors": header([2], 2**50),
    "unknown type.safetensors": header([2], 8, "F77"),
    "no json.safetensors": struct.pack("<Q", 4) + b"!!!!" + bytes(8),
    "empty.safetensors": b"",
    "expanded.pt": torch_file({"norm.bias": torch.zeros(1).expand(2**40)}),
    "expanded half.pt": torch_file({"norm.bias": torch.zeros(1).half().expand(2**40)}),
    "cut.pt": torch_file({"norm.bias": torch.zeros(100)})[:-50],
    "text.pt": b"not a file of weights",
    "empty.pt": b""}
STRANGE = {
    "list.pt": [torch.zeros(2)], "tensor.pt": torch.zeros(2), "nothing.pt": {},
    "teacher.pt": {"teacher": torch.zeros(2)}, "nested.pt": {"a": {"b": torch.zeros(2)}},
    "numbers.pt": {"norm.bias": 1.0}, "keys.pt": {1: torch.zeros(2)}} | {
    f"{dtype}.pt": stored() | {"norm.bias": torch.zeros(128, dtype=dtype)}
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8)} | {
    f"{bad}.pt": stored() | {"norm.bias": torch.full((128,), bad)}
    for bad in (float("nan"), float("inf"))}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_name_before_it_takes_memory(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize("name", STRANGE)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, name):
    torch.save(STRANGE[name], tmp_path / name)
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_weights_never_runs(tmp_path, legacy):
    for name, value in (("alone", Code(tmp_path / "owned")),
                        ("among", stored() | {"norm.bias": Code(tmp_path / "owned")})):
        torch.save(value, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=rf"{name}\.pt.*weights"):
            load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_that_is_called_safetensors_never_runs(tmp_path):
    torch.save(Code(tmp_path / "owned"), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors"):
        load(tmp_path / "w.safetensors")
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------ checkpoints and the cache
@pytest.fixture
def store(tmp_path, monkeypatch):
    make_small(monkeypatch)
    return Store(tmp_path)


def put(store, cfg, content, round=1):
    """A checkpoint with a name that verifies, as a stranger could make one."""
    name = f"{round:07d}_{hashlib.sha256(content).hexdigest()}.safetensors"
    store.write(f"checkpoints/{run_name(cfg)}/{name}", content)


def genuine(store, cfg):
    """The tensors and the card of a true checkpoint."""
    run, state = open_run(cfg, store)
    store.save(run, replace(utils.validate(run, state), round=1))
    name, = store.names("checkpoints/*/*.safetensors")
    content = store.read(name)
    store.delete(name)
    size = int.from_bytes(content[:8], "little")
    card = json.loads(content[8:8 + size])["__metadata__"]["card"]
    return safetensors.torch.load(content), json.loads(card)


@pytest.mark.parametrize("rule", [None, "random"])
@pytest.mark.parametrize("change", [
    lambda w, card: w.pop("params:norm.bias"),
    lambda w, card: w.update({"params:norm.bias": torch.zeros(3)}),
    lambda w, card: w.update({"params:x": torch.zeros(3)}),
    lambda w, card: card.pop("backbone"), lambda w, card: card.pop("round"),
    lambda w, card: card.pop("key")],
    ids=["lost", "shape", "foreign", "backbone", "round", "key"])
def test_a_checkpoint_that_verifies_but_does_not_fit_is_refused(store, change, rule):
    cfg = replace(CFG, rule=rule, head="ridge", sparsity=0.5)
    weights, card = genuine(store, cfg)
    change(weights, card)
    put(store, cfg, safetensors.torch.save(weights, {"card": json.dumps(card)}))
    with pytest.raises(ValueError, match=r"checkpoint"):
        train_federated(cfg, store)
    assert store.result(cfg) is None


@pytest.mark.parametrize("content", [
    *BOMBS.values(), safetensors.torch.save({"params:w": torch.zeros(2)}),
    safetensors.torch.save({"params:w": torch.zeros(2)}, {"card": "{"}),
    safetensors.torch.save({"params:w": torch.zeros(2)}, {"card": "[]"})])
def test_a_checkpoint_that_is_none_is_refused_by_name(store, content):
    put(store, CFG, content)
    with pytest.raises(ValueError, match=r"0000001_\w{64}\.safetensors is no checkpoint"):
        train_federated(CFG, store)


def test_a_genuine_checkpoint_made_the_same_way_is_taken(store):
    weights, card = genuine(store, CFG)
    put(store, CFG, safetensors.torch.save(weights, {"card": json.dumps(card)}))
    assert resumed(CFG, store).round == 1
    assert train_federated(CFG, store)["status"] == "finished"


def test_a_pickle_in_place_of_a_checkpoint_never_runs(store, tmp_path):
    put(store, CFG, torch_file(Code(tmp_path / "owned")))
    with pytest.raises(ValueError, match="is no checkpoint"):
        train_federated(CFG, store)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_the_cache_is_computed_again(store, content):
    made = store.compute_or_load("head", dict(a=1), lambda: {"w": torch.ones(2)})
    name, = store.names("cache/*")
    (store.root / name).write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = store.compute_or_load("head", dict(a=1), lambda: {"w": torch.ones(2)})
    assert torch.equal(again["w"], made["w"])
