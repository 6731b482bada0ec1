"""Input that makes no sense is refused by name before a run starts; properties of what does."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CFG, half_mask, make_small, rounds, same, small_run
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from utils import (
    Config,
    SparseSGDM,
    Store,
    add,
    calibrate_mask,
    cohort,
    evaluate,
    flat,
    overlap,
    prepare,
    preset,
    ridge_from_sums,
    ridge_head,
    ridge_sums,
    rng,
    sensitivity,
    server_step,
    shard,
    split,
    task_vector,
    train,
    train_centralized,
    train_federated,
)

NAN, INF = float("nan"), float("inf")
TYPES = {  # field: values of a wrong type or out of its range
    **dict.fromkeys(("image_size", "num_clients", "num_rounds", "num_epochs", "eval_every",
                     "batch_size", "head_rounds", "calibration_rounds", "calibration_images"),
                    (0, -3, 2.5, "3", None, NAN)),
    **dict.fromkeys(("eval_images", "classes_per_client"), (0, -1, 2.5, "3", True)),
    **dict.fromkeys(("seed", "local_steps"), (-1, 0.5, "1", None, True)),
    **dict.fromkeys(("val_fraction", "participation", "calibration_clients"),
                    (0, -0.1, 1.01, NAN, INF, "0.5", None)),
    **dict.fromkeys(("lr", "server_lr", "ridge_l2"), (0, -1.0, NAN, INF, "1", None)),
    **dict.fromkeys(("momentum", "server_momentum"), (-0.1, 1, NAN, "0.9", None)),
    **dict.fromkeys(("weight_decay", "prox_mu"), (-1e-9, NAN, INF, "0")),
    **dict.fromkeys(("dataset", "arch", "algorithm", "server", "schedule", "precision", "head",
                     "calibration"), ("other", 3, None, ["x"])),
    "sparsity": (-0.1, 1.1, NAN, "0.9", None), "rule": ("fisher", 1, "", True),
    "weights": ("", 3, None),
    "name": ("a/b", "../x", "a b", ".hidden", "..", "a\n", "x" * 201, "a\0", None, 5)}
CONFIGS = [(field, value) for field, values in TYPES.items() for value in values]

FIVE = np.arange(100) % 5
IMAGES = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 3])
X = torch.eye(4)


def model():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    return net


def mask_of(**changes):
    options = dict(images=torch.rand(6, 3, 2, 2), rule="least_sensitive", sparsity=0.5) | changes
    return calibrate_mask(model(), options.pop("images"), **options)


def optimizer(**mask):
    net = model()
    good = {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    return SparseSGDM(net.named_parameters(), 0.1, mask={
        n: c for n, c in (good | mask).items() if c is not None})


def scores(**options):
    return sensitivity(model(), **dict(images=torch.rand(4, 3, 2, 2), labels=LABELS) | options)


def server(**changes):
    w = {"w": torch.ones(2)}
    options = dict(cfg=CFG, params=w, mean=w, fedexp=torch.tensor(1.0), memory={}) | changes
    return server_step(**options)


CALLS = {  # what is asked: (call, what the error must name)
    "split: share 0": (lambda: split(FIVE, 0, 0), "val_fraction=0"),
    "split: share 1": (lambda: split(FIVE, 1.0, 0), "val_fraction=1.0"),
    "split: share NaN": (lambda: split(FIVE, NAN, 0), "val_fraction=nan"),
    "split: negative share": (lambda: split(FIVE, -0.1, 0), "val_fraction=-0.1"),
    "split: a part is empty": (lambda: split(FIVE, 0.01, 0), "class 0"),
    "split: one image of a class": (lambda: split(np.array([0, 0, 1]), 0.5, 0), "class 1"),
    "split: no labels": (lambda: split(np.array([]), 0.1, 0), r"\(0,\)"),
    "split: a table": (lambda: split(FIVE.reshape(10, 10), 0.1, 0), r"\(10, 10\)"),
    "split: negative seed": (lambda: split(FIVE, 0.1, -1), "-1"),
    "shard: no clients": (lambda: shard(FIVE, 0), "num_clients=0"),
    "shard: negative": (lambda: shard(FIVE, -2), "num_clients=-2"),
    "shard: half a client": (lambda: shard(FIVE, 2.5), "num_clients=2.5"),
    "shard: text": (lambda: shard(FIVE, "5"), "num_clients='5'"),
    "shard: more clients than images": (lambda: shard(FIVE, 101), "num_clients=101"),
    "shard: no classes": (lambda: shard(FIVE, 5, 0), "classes_per_client=0"),
    "shard: half a class": (lambda: shard(FIVE, 5, 1.5), "classes_per_client=1.5"),
    "shard: more classes than there are": (lambda: shard(FIVE, 5, 6), "classes_per_client=6"),
    "shard: unowned classes": (lambda: shard(FIVE, 2, 2), "num_clients=2"),
    "shard: empty shards": (lambda: shard(np.arange(10) % 5, 20, 1), "20"),
    "shard: more owners than images": (lambda: shard(np.arange(10) % 5, 9, 3), "class 0"),
    "shard: no labels": (lambda: shard(np.array([]), 1), "0 images"),
    "shard: a table": (lambda: shard(FIVE.reshape(10, 10), 2), r"\(10, 10\)"),
    "shard: negative seed": (lambda: shard(FIVE, 5, 1, -1), "-1"),
    "rng: unknown stream": (lambda: rng("weather", 0), "weather"),
    "rng: negative key": (lambda: rng("client", 0, -1), "-1"),
    "cohort: no share": (lambda: cohort(10, 0, "cohort", 0), "share=0"),
    "cohort: more than all": (lambda: cohort(10, 1.5, "cohort", 0), "share=1.5"),
    "cohort: NaN": (lambda: cohort(10, NAN, "cohort", 0), "share=nan"),
    "preset: unknown": (lambda: preset("tiny"), "tiny"),
    "preset: empty": (lambda: preset(""), "''"),
    "preset: unknown field": (lambda: preset("lite", sparsty=0.5), "sparsty"),
    "preset: bad value": (lambda: preset("lite", lr=-1.0), "lr"),
    "mask: unknown rule": (lambda: mask_of(rule="fisher"), "fisher"),
    "mask: sparsity above 1": (lambda: mask_of(sparsity=1.1), "sparsity=1.1"),
    "mask: negative sparsity": (lambda: mask_of(sparsity=-0.1), "sparsity=-0.1"),
    "mask: NaN sparsity": (lambda: mask_of(sparsity=NAN), "sparsity=nan"),
    "mask: no rounds": (lambda: mask_of(rounds=0), "rounds=0"),
    "mask: half a round": (lambda: mask_of(rounds=1.5), "rounds=1.5"),
    "mask: unknown combination": (lambda: mask_of(combine="median"), "median"),
    "mask: negative damping": (lambda: mask_of(soft=-0.1), "soft=-0.1"),
    "mask: NaN damping": (lambda: mask_of(soft=NAN), "soft=nan"),
    "mask: nobody takes part": (lambda: mask_of(participation=0), "share=0"),
    "mask: more than all": (lambda: mask_of(participation=2.0), "share=2.0"),
    "mask: no images": (lambda: mask_of(images=torch.zeros(0, 3, 2, 2)), "0 images"),
    "mask: no clients": (lambda: mask_of(images=[]), "0 clients"),
    "mask: a client without images": (
        lambda: mask_of(images=[torch.rand(2, 3, 2, 2), torch.zeros(0, 3, 2, 2)]), "0 images"),
    "mask: labels of another number": (lambda: mask_of(labels=LABELS), "4"),
    "mask: labels for fewer clients": (
        lambda: mask_of(images=[torch.rand(2, 3, 2, 2)] * 3, labels=[LABELS[:2]]), "3 clients"),
    "mask: labels outside the classes": (lambda: mask_of(labels=torch.arange(6)), "5"),
    "mask: foreign names": (lambda: mask_of(names=["2.weight"]), "2.weight"),
    "mask: no chunk": (lambda: mask_of(chunk=0), "chunk=0"),
    "mask: negative seed": (lambda: mask_of(seed=-1), "-1"),
    "mask: NaN images": (lambda: mask_of(images=torch.full((2, 3, 2, 2), NAN)), "NaN"),
    "sensitivity: fewer labels": (lambda: scores(labels=LABELS[:2]), "4 images"),
    "sensitivity: label 5 of 5": (lambda: scores(labels=LABELS + 2), "5"),
    "sensitivity: negative label": (lambda: scores(labels=LABELS - 1), "-1"),
    "sensitivity: foreign name": (lambda: scores(names=["9.weight"]), "9.weight"),
    "sensitivity: no images": (
        lambda: scores(images=torch.zeros(0, 3, 2, 2), labels=LABELS[:0]), "0 images"),
    "optimizer: a missing name": (lambda: optimizer(**{"1.bias": None}), "1.bias"),
    "optimizer: a foreign name": (lambda: optimizer(foreign=torch.ones(1) > 0), "foreign"),
    "optimizer: another shape": (lambda: optimizer(**{"1.bias": torch.ones(4) > 0}), "1.bias"),
    "optimizer: a soft mask": (lambda: optimizer(**{"1.bias": torch.full((5,), 0.5)}), "1.bias"),
    "optimizer: NaN in the mask": (lambda: optimizer(**{"1.bias": torch.full((5,), NAN)}), "1.bi"),
    "vectors: a foreign name": (lambda: add({"a": X}, {"b": X}), "a.*b"),
    "vectors: a missing name": (lambda: task_vector({"a": X, "b": X}, {"a": X}), "b"),
    "vectors: another shape": (lambda: add({"a": X}, {"a": X[:1]}), "a"),
    "overlap: a missing name": (lambda: overlap({"a": X > 0, "b": X > 0}, {"a": X > 0}), "b"),
    "overlap: a foreign name": (lambda: overlap({"a": X > 0}, {"a": X > 0, "b": X > 0}), "b"),
    "evaluate: fewer labels": (lambda: evaluate(torch.nn.Identity(), X, LABELS[:2]), "4 images"),
    "evaluate: label 4 of 4": (lambda: evaluate(torch.nn.Identity(), X, LABELS + 1), "4"),
    "evaluate: negative label": (lambda: evaluate(torch.nn.Identity(), X, LABELS - 1), "-1"),
    "evaluate: nothing": (lambda: evaluate(torch.nn.Identity(), X[:0], LABELS[:0]), "0 images"),
    "ridge: label 3 of 3": (lambda: ridge_head(X, LABELS, 1.0, 3), "3"),
    "ridge: negative label": (lambda: ridge_sums(X, LABELS - 1, 4), "-1"),
    "ridge: fewer labels": (lambda: ridge_sums(X, LABELS[:3], 4), "4 images"),
    "ridge: no penalty": (lambda: ridge_head(X, LABELS, 0.0, 4), "l2=0"),
    "ridge: negative penalty": (lambda: ridge_head(X, LABELS, -1.0, 4), "l2=-1"),
    "ridge: NaN penalty": (lambda: ridge_head(X, LABELS, NAN, 4), "l2=nan"),
    "ridge: NaN features": (lambda: ridge_head(X * NAN, LABELS, 1.0, 4), "features"),
    "ridge: no client": (lambda: ridge_from_sums([], 1.0), "0"),
    "images: grey": (lambda: prepare(IMAGES[:, :1], None), r"\(4, 1, 16, 16\)"),
    "images: channels last": (lambda: prepare(IMAGES.permute(0, 2, 3, 1), None), "16, 16, 3"),
    "images: one without its batch": (lambda: prepare(IMAGES[0], None), r"\(3, 16, 16\)"),
    "images: whole numbers": (lambda: prepare(IMAGES.long(), None), "int64"),
    "server: a missing name": (lambda: server(mean={}), "w"),
    "server: a foreign name": (lambda: server(cfg=replace(CFG, server="adam"), mean={}), "w"),
    "store: minutes below 0": (lambda: Store("x", minutes=-1), "minutes=-1"),
    "store: minutes NaN": (lambda: Store("x", minutes=NAN), "minutes=nan"),
    "store: no root": (lambda: Store(None), "None"),
    "store: a number as root": (lambda: Store(3), "int"),
    "train: no Config": (lambda: train({"lr": 1}), "lr"),
    "train: a name": (lambda: train("demo"), "demo"),
    "train: centralised clients": (
        lambda: train_federated(replace(CFG, algorithm="centralized")), "centralized"),
    "clash: a mask over a probe": (lambda: Config(rule="random", head="probe"), "probe"),
    "clash: none for the probe": (lambda: replace(CFG, head="probe", rule="random"), "rule"),
}
RUNS = {  # fits each field and yet no run: (changes, what the error must name)
    "image size and patch": (dict(image_size=30), "image_size=30"),
    "more clients than images": (dict(num_clients=1000), "num_clients=1000"),
    "classes that nobody owns": (dict(classes_per_client=1), "classes_per_client=1"),
    "more classes than there are": (dict(classes_per_client=21), "classes_per_client=21"),
    "more owners than images": (dict(num_clients=100, classes_per_client=10), "num_clients=100"),
    "no validation": (dict(val_fraction=0.01), "val_fraction=0.01"),
    "no training images": (dict(val_fraction=1.0), "val_fraction=1.0"),
    "nearly no training images": (dict(val_fraction=0.99), "val_fraction=0.99"),
    "weights of another architecture": (dict(weights="mini"), "mini"),
    "weights that are not there": (dict(weights="nowhere.pt"), "nowhere.pt"),
    "weights in a folder": (dict(weights="."), r"\."),
    "weights of no kind": (dict(weights="README.md"), "README.md")}
REFUSED = (ValueError, TypeError, KeyError)


@pytest.mark.parametrize(("field", "value"), CONFIGS, ids=lambda v: repr(v)[:20])
def test_a_configuration_out_of_range_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        Config(**{field: value})


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_makes_no_sense_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, named = CALLS[name]
    with pytest.raises(REFUSED, match=f"(?s){named}"):
        call()
    assert not list(tmp_path.iterdir()), "something was stored"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rule", [None, "random"])
def test_fields_that_clash_with_the_data_start_no_run(tmp_path, monkeypatch, name, rule):
    make_small(monkeypatch)
    for step in ("federated_round", "centralized_epoch"):
        monkeypatch.setattr(utils, step, lambda *a: pytest.fail("training began"))
    changes, named = RUNS[name]
    kind = FileNotFoundError if "not there" in name else REFUSED
    store = Store(tmp_path)
    with pytest.raises(kind, match=named):
        train(replace(CFG, **changes, rule=rule), store)
    assert not store.names("*.json") + store.names("*/*.safetensors")


def test_a_centralised_run_needs_no_clients(tmp_path, monkeypatch):
    """Fields that a run does not read are not held against it."""
    make_small(monkeypatch)
    cfg = replace(CFG, num_clients=1000, classes_per_client=21, num_epochs=1)
    assert train_centralized(cfg, Store(tmp_path))["status"] == "finished"


def test_at_least_150_inputs_are_refused():
    assert len(CONFIGS) + len(CALLS) + len(RUNS) >= 150


# ------------------------------------------------------------------ frozen weights and NaN
def test_a_nan_gradient_never_reaches_a_frozen_weight():
    net = model()
    mask = {n: torch.arange(p.numel()).view_as(p) % 2 == 0 for n, p in net.named_parameters()}
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = SparseSGDM(net.named_parameters(), 0.1, weight_decay=0.1, mask=mask)
    for bad in (NAN, INF, -INF):
        for n, p in net.named_parameters():
            p.grad = torch.where(mask[n], torch.ones_like(p), bad)
        opt.step()
    for n, p in net.named_parameters():
        assert torch.equal(p[~mask[n]], start[n][~mask[n]])
        assert p.isfinite().all()
        assert (p[mask[n]] != start[n][mask[n]]).all()


def test_a_nan_gradient_of_a_free_weight_is_not_hidden():
    net = model()
    opt = SparseSGDM(net.named_parameters(), 0.1, mask={
        n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()})
    for p in net.parameters():
        p.grad = torch.full_like(p, NAN)
    opt.step()
    assert all(p.isnan().all() for p in net.parameters())


@pytest.mark.parametrize(("bad", "algorithm"), [(NAN, "fedavg"), (INF, "centralized")])
def test_a_loss_that_is_not_finite_is_stored_as_diverged(tmp_path, monkeypatch, bad, algorithm):
    """At that round, with client, rate and what to try; grids go on and tables show it."""
    make_small(monkeypatch)
    cfg = replace(CFG, algorithm=algorithm, eval_every=1)
    honest, seen, store = utils.sgd_step, [], Store(tmp_path, minutes=0.0)

    def step(run, *args):
        seen.append(1)
        return honest(run, *args) * (bad if len(seen) == 95 else 1)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "sgd_step", step)
        patch.setattr(utils, "cohort", lambda *a: np.arange(10))
        result = train(replace(cfg, num_rounds=8), store)
    at = len(result["history"]) + 1
    assert at > 1
    assert result["status"] == "diverged"
    who = "training" if algorithm == "centralized" else r"7"  # steps 95 = 4 x 20 + 15: client 7
    assert f"round or epoch {at} at lr=" in result["error"]
    assert f"{who}: {bad}" in result["error"].replace("'", "")
    assert "Try a lower lr than 0.05" in result["error"]
    kept = store.resume(replace(cfg, num_rounds=8))
    assert kept.round == at - 1
    assert all(w.isfinite().all() for w in kept.params.values())
    grid = [replace(cfg, num_rounds=8), replace(cfg, num_rounds=1, num_epochs=1, seed=1)]
    utils.train_all(grid, store)
    runs, _ = utils.gather(grid, store)
    assert runs.test.isna().tolist() == [True, False]


# ------------------------------------------------------------------ properties
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.floats(0.01, 0.99),
       st.integers(0, 5))
def test_a_split_is_stratified_disjoint_and_whole_or_refused(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if any(not 0 < round(share * n) < n for n in counts):
        with pytest.raises(ValueError, match="val_fraction"):
            split(labels, share, seed)
        return
    train, val = split(labels, share, seed)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    assert np.bincount(labels[val]).tolist() == [round(share * n) for n in counts]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 60),
       st.integers(0, 5))
def test_shards_are_exact_disjoint_and_whole_or_refused(clients, nc, classes, each, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each))
    owners = clients * nc / classes
    if nc > classes or owners < 1 or math.ceil(owners) > each or clients > len(labels):
        with pytest.raises(ValueError, match="num_clients"):
            shard(labels, clients, nc, seed)
        return
    shards = shard(labels, clients, nc, seed)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert [len(np.unique(labels[s])) for s in shards] == [nc] * clients
    counts = np.array([np.bincount(labels[s], minlength=classes) for s in shards])
    for c in range(classes):
        held = counts[:, c][counts[:, c] > 0]
        assert held.max() - held.min() <= 1
    if clients * nc % classes == 0:
        sizes = counts.sum(1)
        assert sizes.max() - sizes.min() <= 1, "as many owners of each class: sizes can be even"


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(utils.RULES[:5]), st.floats(0, 1), st.integers(1, 3), st.integers(0, 3),
       st.sampled_from(["mean", "max", "vote"]), st.booleans())
def test_a_mask_frees_exactly_its_budget(rule, sparsity, r, seed, combine, federated):
    images = torch.rand(6, 3, 2, 2)
    mask = mask_of(images=[images[:2], images[2:]] if federated else images, rule=rule,
                   sparsity=sparsity, rounds=r, seed=seed, combine=combine)
    assert flat(mask).dtype == torch.bool
    assert int(flat(mask).sum()) == round((1 - sparsity) * 65)


VECTORS = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(VECTORS, VECTORS, st.floats(0.0625, 2), st.floats(0, 0.9375))
def test_server_steps_are_their_formulas(w, d, lr, beta):
    """Two steps of each server against the update written out."""
    w, d = torch.tensor(w), torch.tensor(d)
    for kind in ("average", "fedexp", "momentum", "adam"):
        cfg = replace(CFG, server=kind, server_lr=lr, server_momentum=beta)
        params, memory, m, v, x = {"w": w}, {}, 0, 0, w
        for t in (1, 2):
            params, memory = server_step(cfg, params, {"w": d.clone()}, torch.tensor(1.5), memory)
            if kind in ("average", "fedexp"):
                x = x + (1.5 if kind == "fedexp" else 1) * d
            elif kind == "momentum":
                m = beta * m + d
                x = x + lr * m
            else:
                m, v = beta * m + (1 - beta) * d, 0.99 * v + 0.01 * d**2
                x = x + lr * m / (1 - beta**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-3)
        torch.testing.assert_close(params["w"], x, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["average", "fedexp", "momentum"]), st.integers(0, 3))
def test_frozen_weights_stay_under_every_server(kind, seed):
    cfg = replace(CFG, server=kind, seed=seed)
    run, start = small_run(cfg)
    run, start = small_run(cfg, mask=half_mask(run))
    end = rounds(run, start, 2)
    for n, c in run.mask.items():
        assert torch.equal(end.params[n][~c], start.params[n][~c])
    assert not same(end.params, start.params)
