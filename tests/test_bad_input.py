"""Input that makes no sense is refused by name before a run starts; properties of what does."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CFG, make_small
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
    feature_sums,
    flatten,
    logistic_head,
    normalize,
    preset,
    rng,
    sensitivity,
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
    **dict.fromkeys(("eval_images", "classes_per_client", "micro_batch"), (0, -1, 2.5, "3", True)),
    **dict.fromkeys(("seed", "split_seed", "local_steps"), (-1, 0.5, "1", None, True)),
    **dict.fromkeys(("val_fraction", "participation", "calibration_clients"),
                    (0, -0.1, 1.01, NAN, INF, "0.5", None)),
    **dict.fromkeys(("lr", "server_lr", "head_l2"), (0, -1.0, NAN, INF, "1", None)),
    **dict.fromkeys(("momentum", "server_momentum"), (-0.1, 1, NAN, "0.9", None)),
    **dict.fromkeys(("weight_decay", "prox_mu"), (-1e-9, NAN, INF, "0")),
    **dict.fromkeys(("dataset", "arch", "algorithm", "schedule", "precision", "head",
                     "calibration", "augmentation"), ("other", 3, None, ["x"])),
    "sparsity": (-0.1, 1.1, NAN, "0.9", None), "rule": ("fisher", 1, "", True),
    "weights": ("", 3, None), "test_curve": (1, "yes", None),
    "dirichlet_alpha": (0, -1.0, NAN, INF),
    "sparsty": (0.5,),
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
    "shard: no labels": (lambda: shard(np.array([]), 1), "num_clients=1"),
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
    "mask: negative damping": (lambda: mask_of(damping=-0.1), "damping=-0.1"),
    "mask: NaN damping": (lambda: mask_of(damping=NAN), "damping=nan"),
    "mask: nobody takes part": (lambda: mask_of(participation=0), "share=0"),
    "mask: more than all": (lambda: mask_of(participation=2.0), "share=2.0"),
    "mask: no images": (lambda: mask_of(images=torch.zeros(0, 3, 2, 2)), "some images"),
    "mask: no clients": (lambda: mask_of(images=[]), "0 clients"),
    "mask: a client without images": (
        lambda: mask_of(images=[torch.rand(2, 3, 2, 2), torch.zeros(0, 3, 2, 2)]), "images, 0"),
    "mask: labels of another number": (lambda: mask_of(labels=LABELS), "4"),
    "mask: labels for fewer clients": (
        lambda: mask_of(images=[torch.rand(2, 3, 2, 2)] * 3, labels=[LABELS[:2]]), "3 clients"),
    "mask: labels outside the classes": (lambda: mask_of(labels=torch.arange(6)), "5"),
    "mask: no chunk": (lambda: mask_of(chunk=0), "chunk=0"),
    "mask: negative seed": (lambda: mask_of(seed=-1), "-1"),
    "mask: NaN images": (lambda: mask_of(images=torch.full((2, 3, 2, 2), NAN)), "NaN"),
    "sensitivity: fewer labels": (lambda: scores(labels=LABELS[:2]), "4 images"),
    "sensitivity: label 5 of 5": (lambda: scores(labels=LABELS + 2), "5"),
    "sensitivity: negative label": (lambda: scores(labels=LABELS - 1), "-1"),
    "sensitivity: foreign name": (lambda: scores(names=["9.weight"]), "9.weight"),
    "sensitivity: no images": (
        lambda: scores(images=torch.zeros(0, 3, 2, 2), labels=LABELS[:0]), "images, 0"),
    "optimizer: a missing name": (lambda: optimizer(**{"1.bias": None}), "1.bias"),
    "optimizer: a foreign name": (lambda: optimizer(foreign=torch.ones(1) > 0), "foreign"),
    "optimizer: another shape": (lambda: optimizer(**{"1.bias": torch.ones(4) > 0}), "1.bias"),
    "optimizer: a soft mask": (lambda: optimizer(**{"1.bias": torch.full((5,), 0.5)}), "1.bias"),
    "optimizer: NaN in the mask": (lambda: optimizer(**{"1.bias": torch.full((5,), NAN)}), "1.bi"),
    "vectors: a foreign name": (lambda: add({"a": X}, {"b": X}), "a.*b"),
    "vectors: a missing name": (lambda: task_vector({"a": X, "b": X}, {"a": X}), "b"),
    "vectors: another shape": (lambda: add({"a": X}, {"a": X[:1]}), "a"),
    "evaluate: fewer labels": (lambda: evaluate(torch.nn.Identity(), X, LABELS[:2]), "4 images"),
    "evaluate: label 4 of 4": (lambda: evaluate(torch.nn.Identity(), X, LABELS + 1), "4"),
    "evaluate: negative label": (lambda: evaluate(torch.nn.Identity(), X, LABELS - 1), "-1"),
    "evaluate: nothing": (lambda: evaluate(torch.nn.Identity(), X[:0], LABELS[:0]), "0 images"),
    "heads: label 3 of 3": (lambda: feature_sums(X, LABELS, 3), "3"),
    "heads: negative label": (lambda: feature_sums(X, LABELS - 1, 4), "-1"),
    "heads: fewer labels": (lambda: feature_sums(X, LABELS[:3], 4), "4 images"),
    "heads: NaN features": (lambda: logistic_head([(X * NAN, LABELS)], 4), "features"),
    "images: grey": (lambda: normalize(IMAGES[:, :1], (16, 16)), r"\(4, 1, 16, 16\)"),
    "images: channels last": (lambda: normalize(IMAGES.permute(0, 2, 3, 1), (16, 16)), "16, 16, 3"),
    "images: one without its batch": (lambda: normalize(IMAGES[0], (16, 16)), r"\(3, 16, 16\)"),
    "images: whole numbers": (lambda: normalize(IMAGES.long(), (16, 16)), "int64"),
    "store: minutes below 0": (lambda: Store("x", minutes=-1), "minutes=-1"),
    "store: minutes NaN": (lambda: Store("x", minutes=NAN), "minutes=nan"),
    "store: no root": (lambda: Store(None), "None"),
    "store: a number as root": (lambda: Store(3), "int"),
    "train: no Config": (lambda: train({"lr": 1}), "lr"),
    "train: a name": (lambda: train("demo"), "demo"),
    "train: centralised clients": (
        lambda: train_federated(replace(CFG, algorithm="centralized")), "centralized"),
    "clash: a mask over a probe": (lambda: Config(rule="random", head="probe"), "probe"),
    "clash: two kinds of skew": (
        lambda: Config(classes_per_client=5, dirichlet_alpha=1.0), "dirichlet_alpha=1"),
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
RULES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random")
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
    no_file = name in ("weights that are not there", "weights in a folder")
    kind = FileNotFoundError if no_file else REFUSED
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


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RULES), st.floats(0, 1), st.integers(1, 3), st.integers(0, 3),
       st.sampled_from(["mean", "max", "vote"]), st.booleans())
def test_a_mask_frees_exactly_its_budget(rule, sparsity, r, seed, combine, federated):
    images = torch.rand(6, 3, 2, 2)
    mask = mask_of(images=[images[:2], images[2:]] if federated else images, rule=rule,
                   sparsity=sparsity, rounds=r, seed=seed, combine=combine)
    assert flatten(mask).dtype == torch.bool
    assert int(flatten(mask).sum()) == round((1 - sparsity) * 65)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 60), st.floats(1e-4, 1e4),
       st.integers(0, 5))
def test_dirichlet_shards_are_disjoint_whole_and_never_empty_or_refused(clients, classes, each,
                                                                        alpha, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each))
    if clients > len(labels):
        with pytest.raises(ValueError, match="num_clients"):
            shard(labels, clients, seed=seed, dirichlet_alpha=alpha)
        return
    shards = shard(labels, clients, seed=seed, dirichlet_alpha=alpha)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert min(map(len, shards)) >= 1
