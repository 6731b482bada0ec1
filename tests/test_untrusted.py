"""Files that others wrote: nothing in them runs, and what does not fit is refused by name."""
import hashlib
import io
import json
import struct
import zipfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import CFG, make_small

import utils
from notebooks import basics
from notebooks.store import pack, parse, refuse_damaged
from utils import ROOT, Config, Store, build_model, open_run, run_name, train_federated

FILE = ROOT / "weights" / "mini.safetensors"


class Code:
    """A pickle that makes a file when it is opened."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def stored():
    return safetensors.torch.load_file(FILE)


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


def deflated(content):
    """The same archive, compressed: a few bytes that unpack to many."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
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
    "deflated.pt": deflated(torch_file({"norm.bias": torch.zeros(2**24)})),
    "cut.pt": torch_file({"norm.bias": torch.zeros(100)})[:-50],
    "text.pt": b"not a file of weights",
    "empty.pt": b""}
STRANGE = {
    "list.pt": [torch.zeros(2)], "tensor.pt": torch.zeros(2), "nested.pt": {"teacher": stored()},
    "nothing.pt": {}, "numbers.pt": {"norm.bias": 1.0}, "keys.pt": {1: torch.zeros(2)},
    "sparse.pt": stored() | {"norm.bias": torch.zeros(128).to_sparse()},
    "meta.pt": stored() | {"norm.bias": torch.zeros(128, device="meta")}} | {
    f"{dtype}.pt": stored() | {"norm.bias": torch.zeros(128, dtype=dtype)}
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8)} | {
    f"{bad}.pt": stored() | {"norm.bias": torch.full((128,), bad)}
    for bad in (float("nan"), float("inf"))}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_name_before_it_takes_memory(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)


def test_a_compressed_archive_is_not_even_unpacked(tmp_path, monkeypatch):
    (tmp_path / "deflated.pt").write_bytes(BOMBS["deflated.pt"])
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=r"deflated\.pt.* unpack to \d+ bytes"):
        load(tmp_path / "deflated.pt")


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


def test_the_download_of_dino_runs_no_code_either(tmp_path, monkeypatch):
    monkeypatch.setattr(basics, "hf_hub_download", lambda *a: 1 / 0)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file",
                        lambda url, path: torch.save(Code(tmp_path / "owned"), path))
    with (pytest.raises(ValueError, match="is not a file of weights"),
          pytest.warns(UserWarning, match="checksum")):
        basics._read_weights("dino")
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
    _, state = open_run(cfg, store)
    store.save(cfg, replace(state, round=1, best=state.params, best_round=1))
    name, = store.names("checkpoints/*/*.safetensors")
    content = store.read(name)
    store.delete(name)
    size = int.from_bytes(content[:8], "little")
    return safetensors.torch.load(content), json.loads(content[8:8 + size])["__metadata__"]["card"]


@pytest.mark.parametrize("change", [
    lambda w, card: w.pop("params:norm.bias"),
    lambda w, card: w.update({"params:norm.bias": torch.zeros(3)}),
    lambda w, card: w.update({"params:norm.bias": torch.zeros(16, dtype=torch.int64)}),
    lambda w, card: w.update({"params:norm.bias": torch.zeros(16, dtype=torch.float64)}),
    lambda w, card: (card["names"].append("x"), w.update({"params:x": torch.zeros(3)})),
    lambda w, card: card.pop("names"), lambda w, card: card.pop("round"),
    lambda w, card: card.pop("identity"), lambda w, card: card.update(history=None),
    lambda w, card: card.update(names=5), lambda w, card: card.update(extra=1),
    lambda w, card: card.update(names=[])],
    ids=["lost", "shape", "integers", "doubles", "foreign", "names", "round", "identity",
         "history", "names of", "extra", "no names"])
def test_a_checkpoint_that_verifies_but_does_not_fit_is_refused_by_name(store, change):
    weights, card = genuine(store, CFG)
    card = json.loads(card)
    change(weights, card)
    put(store, CFG, pack(weights, card=json.dumps(card)))
    with pytest.raises(ValueError, match=r"0000001_\w{64}\.safetensors"):
        train_federated(CFG, store)
    assert store.result(CFG) is None


@pytest.mark.parametrize("content", [*BOMBS.values(), pack({"params:w": torch.zeros(2)}),
                                     pack({"params:w": torch.zeros(2)}, card="{"),
                                     pack({"params:w": torch.zeros(2)}, card="[]")])
def test_a_checkpoint_that_is_none_is_refused_by_name(store, content):
    put(store, CFG, content)
    with pytest.raises(ValueError, match=r"0000001_\w{64}\.safetensors is no checkpoint"):
        train_federated(CFG, store)


def test_a_genuine_checkpoint_made_the_same_way_is_taken(store):
    weights, card = genuine(store, CFG)
    put(store, CFG, pack(weights, card=card))
    assert store.resume(CFG).round == 1
    assert len(train_federated(CFG, store)["history"]) == CFG.num_rounds - 1


def test_a_pickle_in_place_of_a_checkpoint_never_runs(store, tmp_path):
    put(store, CFG, torch_file(Code(tmp_path / "owned")))
    with pytest.raises(ValueError, match="is no checkpoint"):
        train_federated(CFG, store)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_the_cache_is_computed_again(store, content):
    made = store.cached("head", dict(a=1), lambda: {"w": torch.ones(2)})
    name, = store.names("cache/*")
    (store.root / name).write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = store.cached("head", dict(a=1), lambda: {"w": torch.ones(2)})
    assert torch.equal(again["w"], made["w"])
    refuse_damaged(name, store.read(name))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe", b"{}" * 2,
                                     b'{"a": 1, "sha256": "0"}', b"[" * 100_000])
def test_json_that_is_no_result_is_refused(content):
    with pytest.raises(ValueError):  # noqa: PT011  of many kinds
        parse(content)


def test_a_result_that_lacks_its_parts_is_refused_by_name(store):
    store.write(f"{run_name(CFG)}.json", b'{"history": []}')
    with pytest.raises(ValueError, match=rf"{run_name(CFG)}\.json is no result.*identity"):
        utils.train_federated(CFG, store)
