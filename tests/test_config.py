import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from utils import NOTES, Config, digest, identity, load_data, preset, run_name, shard

NAN, INF = float("nan"), float("inf")
OTHER = dict(  # a value that is not the default, for every field but the name
    dataset="synthetic", arch="mini", weights="some/where.pt", image_size=96, val_fraction=0.2,
    eval_images=7, seed=1, algorithm="scaffold", server="adam", num_clients=10, participation=0.5,
    classes_per_client=5, local_steps=8, num_rounds=250, num_epochs=3, eval_every=1, prox_mu=0.1,
    server_lr=0.5, server_momentum=0.5, batch_size=128, lr=0.01, momentum=0.0, weight_decay=0.0,
    schedule="step", precision="bf16", head="ridge", head_rounds=5, ridge_l2=2.0, rule="random",
    sparsity=0.91, calibration_rounds=1, calibration="vote", calibration_images=64,
    calibration_clients=0.5)
OF_MASKS = ("sparsity", "calibration_rounds", "calibration", "calibration_images",
            "calibration_clients")
INVALID = [
    ("num_clients", 0), ("num_clients", -1), ("num_clients", 2.0), ("num_clients", "100"),
    ("num_clients", True), ("num_clients", None), ("participation", 0), ("participation", 1.1),
    ("participation", NAN), ("participation", True), ("participation", "0.1"),
    ("local_steps", -1), ("local_steps", 1.5), ("classes_per_client", 0),
    ("classes_per_client", "1"), ("classes_per_client", True), ("num_rounds", 0),
    ("image_size", 0), ("val_fraction", 0), ("val_fraction", 1.5), ("val_fraction", NAN),
    ("seed", -1), ("seed", True), ("seed", None), ("seed", 0.5), ("dataset", "cifar10"),
    ("arch", "resnet"), ("weights", None), ("weights", 3), ("algorithm", "sgd"),
    ("server", None), ("lr", 0), ("lr", -0.1), ("lr", NAN), ("lr", INF), ("lr", "0.1"),
    ("lr", True), ("momentum", 1.0), ("momentum", NAN), ("weight_decay", -1e-4),
    ("weight_decay", NAN), ("weight_decay", INF), ("schedule", None), ("precision", "half"),
    ("head", "linear"), ("rule", "fisher"), ("rule", ""), ("sparsity", -0.1), ("sparsity", 1.01),
    ("sparsity", NAN), ("sparsity", True), ("calibration_rounds", 0), ("calibration", "median"),
    ("calibration_clients", 0), ("calibration_clients", NAN), ("prox_mu", INF), ("ridge_l2", 0),
    ("eval_images", 0), ("eval_every", 0), ("batch_size", 0), ("name", 5), ("sparsty", 0.5)]


def test_defaults_are_the_assignments():
    c = Config()
    assert (c.num_clients, c.participation, c.local_steps) == (100, 0.1, 4)
    assert (c.dataset, c.weights, c.image_size, c.val_fraction) == ("cifar100", "dino", 224, 0.1)
    assert (c.algorithm, c.classes_per_client, c.rule, c.seed) == ("fedavg", None, None, 0)


@pytest.mark.parametrize(("field", "value"), INVALID, ids=str)
def test_an_invalid_value_is_a_value_error_that_names_its_field(field, value):
    for make in (Config, lambda **changes: replace(Config(), **changes)):
        with pytest.raises(ValueError, match=rf"\b{field}\b"):
            make(**{field: value})


def test_the_ends_of_every_range_are_allowed():
    Config(participation=1, val_fraction=1.0, local_steps=0, momentum=0, weight_decay=0, prox_mu=0,
           sparsity=0, seed=0, num_clients=1, classes_per_client=1, calibration_clients=1)
    assert Config(sparsity=1).sparsity == 1


def test_a_mask_over_a_probe_is_refused():
    with pytest.raises(ValueError, match=r"probe.*rule"):
        Config(rule="random", head="probe")


def test_a_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().lr = 0.1


def test_presets_are_what_they_say(fake_cifar):
    assert preset("full") == Config()
    assert preset("lite") == Config(image_size=96)
    for name in ("small", "demo"):
        c = preset(name)
        assert (c.weights, c.arch, c.image_size, c.dataset) == ("mini", "mini", 32, "cifar100")
    assert preset("demo").num_rounds < preset("small").num_rounds < Config().num_rounds
    assert preset("small", seed=3, lr=0.5) == replace(preset("small"), seed=3, lr=0.5)


def test_an_unknown_preset_is_a_value_error_that_names_all():
    with pytest.raises(ValueError, match=r"'tiny'.*full.*lite.*small.*demo"):
        preset("tiny")


def test_the_demo_without_cifar_warns_and_takes_synthetic_images(no_cifar):
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        c = preset("demo", seed=5)
    assert (c.dataset, c.seed, c.image_size) == ("synthetic", 5, 32)
    assert {"SYNTHETIC DATA"} == NOTES  # for the figures to say
    data = load_data(c)
    labels = data.labels.numpy()[data.train]
    for nc in (None, 50, 10, 5, 1):  # the demo's notebooks share it out in all these ways
        assert len(shard(labels, c.num_clients, nc, c.seed)) == 100


def test_the_demo_with_cifar_takes_it_silently(fake_cifar, recwarn):
    assert preset("demo").dataset == "cifar100"
    assert not recwarn


@pytest.mark.parametrize("name", ["full", "lite", "small"])
def test_other_presets_never_replace_cifar_by_synthetic_images(no_cifar, name):
    with pytest.raises(FileNotFoundError, match="DATA_DIR"):
        load_data(preset(name))


def test_the_identity_is_what_is_not_default_and_never_the_name():
    assert identity(Config()) == {} == identity(Config(name="mine"))
    assert identity(Config(name="mine", seed=3, rule="random")) == dict(seed=3, rule="random")


def test_a_number_written_as_int_or_float_is_the_same_run():
    for field in ("lr", "sparsity", "server_lr", "weight_decay", "participation"):
        a, b = (Config(rule="random", **{field: one}) for one in (1, 1.0))
        assert digest(identity(a)) == digest(identity(b))
        assert run_name(a) == run_name(b)


def test_every_field_tells_runs_apart():
    assert OTHER.keys() == {f.name for f in fields(Config)} - {"name"}
    mask = dict(rule="random")  # the mask's fields count where there is one
    names = [run_name(Config(**(mask if f in OF_MASKS else {}), **{f: v}))
             for f, v in OTHER.items()] + [run_name(Config())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("field", OF_MASKS)
def test_dense_runs_that_differ_in_their_unread_mask_are_one(field):
    assert run_name(Config(**{field: OTHER[field]})) == run_name(Config())


def test_equal_configurations_have_equal_run_names():
    assert run_name(Config(**OTHER)) == run_name(replace(Config(), **OTHER))


def test_a_derived_run_name_is_a_file_name_and_a_given_one_wins():
    assert re.fullmatch(r"[\w.-]+", run_name(Config(**OTHER)))
    assert run_name(Config(name="mine", seed=3)) == "mine"


def test_the_digest_of_weights_depends_on_names_values_and_shapes_alone():
    w = torch.arange(6.0).view(2, 3)
    same = digest({"a": w})
    assert same == digest({"a": w.double().T.contiguous().T}) == digest({"a": nn_parameter(w)})
    others = {"b": w}, {"a": w + 1e-6}, {"a": w.view(3, 2)}
    assert len({same, *map(digest, others)}) == 4


def nn_parameter(w):
    return torch.nn.Parameter(w.clone())
