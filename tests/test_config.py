"""A run's configuration, its key and its name: no stored result is of what was not asked for."""
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import safetensors.torch
import torch
from helpers import Mine

import utils
from utils import (
    RULES,
    Config,
    FedAvg,
    load_data,
    preset,
    register_algorithm,
    register_rule,
    run_key,
    run_name,
    shard,
)

OTHER = dict(  # a value that is not the default, for every field but the name
    dataset="synthetic", arch="mini", weights="none", image_size=96, val_fraction=0.2,
    split_seed=1, eval_images=7, test_curve=True, augmentation="none", seed=1, algorithm="mine",
    num_clients=10, participation=0.5, classes_per_client=5, dirichlet_alpha=0.3, local_steps=8,
    num_rounds=250, num_epochs=3, eval_every=1, prox_mu=0.1, server_lr=0.5, server_momentum=0.5,
    batch_size=128, micro_batch=3, lr=0.01, momentum=0.0, weight_decay=0.0, schedule="step",
    precision="bf16", head="lda", head_rounds=5, head_l2=2.0, rule="random", sparsity=0.91,
    calibration_rounds=1, calibration="vote", calibration_images=64, calibration_clients=0.5)
FISHER = dict(rule="least_sensitive", calibration="mean")
READ_BY = {  # what a run must be, for a field to change it
    **dict.fromkeys(("sparsity", "calibration_rounds", "calibration", "calibration_images",
                     "calibration_clients"), FISHER),
    **dict.fromkeys(("prox_mu", "server_momentum"), dict(algorithm="mine")),
    "head_rounds": dict(head="train", rule="random"),
    "num_epochs": dict(algorithm="centralized"),
}


class Reads(FedAvg):
    reads = ("server_lr",)


def module_of(source: str, folder, name: str):
    """A module of this source, as from an edited file or notebook cell."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _registered():
    register_algorithm("reads", Reads)
    yield
    del utils.ALGORITHMS["reads"]


# ------------------------------------------------------------------ the configuration
def test_defaults_are_the_assignments():
    c = Config()
    assert (c.num_clients, c.participation, c.local_steps) == (100, 0.1, 4)
    assert (c.dataset, c.weights, c.image_size, c.val_fraction) == ("cifar100", "dino", 224, 0.1)
    assert (c.algorithm, c.classes_per_client, c.rule, c.seed) == ("fedavg", None, None, 0)
    assert (c.head, c.augmentation) == ("logistic", "flip")


def test_the_ends_of_every_range_are_allowed():
    Config(participation=1, val_fraction=1.0, local_steps=0, momentum=0, weight_decay=0, prox_mu=0,
           sparsity=0, seed=0, num_clients=1, classes_per_client=1, calibration_clients=1)
    assert Config(sparsity=1).sparsity == 1


@pytest.mark.parametrize("clash", [dict(rule="random", head="probe"),
                                   dict(classes_per_client=5, dirichlet_alpha=0.3)])
def test_fields_that_clash_are_refused_with_both_values(clash):
    a, b = clash
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{a}={clash[a]!r})(?=.*{b}={clash[b]!r})"):
        Config(**clash)


@pytest.mark.parametrize(("field", "known"), [("algorithm", "fedavg.*mine"),
                                              ("rule", "least_sensitive.*random")])
def test_an_unknown_name_lists_the_known_ones(field, known):
    with pytest.raises(ValueError, match=rf"(?s){field}='other'.*{known}.*register_{field}"):
        Config(**{field: "other"})


def test_a_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().lr = 0.1


def test_the_length_follows_the_algorithm():
    assert Config(num_rounds=7, num_epochs=3).length == 7
    assert Config(num_rounds=7, num_epochs=3, algorithm="centralized").length == 3


# ------------------------------------------------------------------ presets
@pytest.fixture
def stored_cifar(tmp_path, monkeypatch):
    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))


def test_presets_are_what_they_say(stored_cifar, recwarn):
    assert preset("full") == Config()
    assert preset("lite") == Config(image_size=96)
    for name in ("small", "demo"):
        c = preset(name)
        assert (c.weights, c.arch, c.image_size, c.dataset) == ("mini", "mini", 32, "cifar100")
    assert preset("demo").num_rounds < preset("small").num_rounds < Config().num_rounds
    assert preset("small", seed=3, lr=0.5) == replace(preset("small"), seed=3, lr=0.5)
    assert not recwarn


def test_an_unknown_preset_is_a_value_error_that_names_all():
    with pytest.raises(ValueError, match=r"'tiny'.*full.*lite.*small.*demo"):
        preset("tiny")


def test_without_cifar_the_demo_warns_and_takes_synthetic_images(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        c = preset("demo", seed=5)
    assert (c.dataset, c.seed, c.image_size) == ("synthetic", 5, 32)
    data = load_data(c)
    labels = data.labels.numpy()[data.train]
    for nc in (None, 50, 10, 5, 1):  # the notebooks share it out in all these ways
        assert len(shard(labels, c.num_clients, nc, c.seed)) == 100


def test_whoever_asks_for_a_data_set_gets_no_other(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert preset("demo", dataset="cifar100").dataset == "cifar100"
    assert not recwarn


def test_nothing_else_replaces_cifar_by_synthetic_images(no_cifar):
    with pytest.raises(FileNotFoundError, match="DATA_DIR"):
        load_data(preset("small"))


# ------------------------------------------------------------------ the key
def test_every_field_that_a_run_reads_tells_runs_apart():
    assert OTHER.keys() == {f.name for f in fields(Config)} - {"name"}
    for field, value in OTHER.items():
        algorithm = dict(algorithm="reads") if field == "server_lr" else {}
        base = Config(weights="none", arch="mini", **READ_BY.get(field, algorithm))
        if field in ("weights", "arch"):
            base = Config(weights="none")
            value = "vits16" if field == "arch" else "dino"
            base = replace(base, arch="mini")
        changed = replace(base, **{field: value})
        assert run_key(changed) != run_key(base), field
        assert run_name(changed) != run_name(base), field


@pytest.mark.parametrize(("base", "unread"), [
    (dict(), ("sparsity", "calibration_rounds", "calibration", "calibration_images", "prox_mu",
              "server_lr", "num_epochs", "head_rounds")),
    (dict(rule="random"), ("calibration_rounds", "calibration", "calibration_images")),
    (dict(rule="least_sensitive"), ("calibration_clients",)),
    (dict(algorithm="centralized"), ("num_clients", "participation", "classes_per_client",
                                     "local_steps", "num_rounds")),
    (dict(head="lda"), ("head_l2",))], ids=str)
def test_runs_that_differ_in_what_neither_reads_are_one(base, unread):
    base = Config(weights="none", name="", **base)
    for field in (*unread, "name"):
        changed = replace(base, **{field: "mine" if field == "name" else OTHER[field]})
        assert run_key(changed) == run_key(base), field


def test_an_edited_default_gives_another_key(tmp_path):
    """The key holds what is read, not what differs from the defaults of the day."""
    text = (utils.ROOT / "utils.py").read_text(encoding="utf-8")
    edited = text.replace("    momentum: Decay = 0.9", "    momentum: Decay = 0.5")
    before, after = (module_of(source, tmp_path, f"utils_{i}")
                     for i, source in enumerate((text, edited)))
    key = before.run_key(before.Config(weights="none"))
    assert key["momentum"] == 0.9
    assert after.run_key(after.Config(weights="none")) == key | {"momentum": 0.5}
    assert before.run_name(before.Config(weights="none")) != after.run_name(
        after.Config(weights="none"))


def test_a_number_written_as_int_or_float_is_the_same_run():
    for field in ("lr", "sparsity", "weight_decay", "participation"):
        a, b = (Config(weights="none", rule="random", **{field: one}) for one in (1, 1.0))
        assert run_name(a) == run_name(b)


def test_a_key_is_json_and_comes_back_from_it():
    key = run_key(Config(**OTHER | dict(classes_per_client=None)))
    assert json.loads(json.dumps(key, allow_nan=False)) == key


def test_a_derived_run_name_is_a_file_name_and_a_given_one_wins():
    assert re.fullmatch(r"[\w.-]+", run_name(Config(**OTHER | dict(dirichlet_alpha=None))))
    assert run_name(Config(name="mine", seed=3)) == "mine"


# ------------------------------------------------------------------ what the key hashes
def test_weights_are_told_apart_by_their_content(tmp_path):
    path = tmp_path / "w.safetensors"
    cfg = Config(weights=str(path))
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    first = run_key(cfg)
    times = path.stat()
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    second = run_key(cfg)
    assert first["weights_sha256"] != second["weights_sha256"]
    assert run_name(cfg).endswith(utils.json_sha256(second)[:8])
    shutil.copy(path, tmp_path / "copy.safetensors")
    moved = run_key(replace(cfg, weights=str(tmp_path / "copy.safetensors")))
    assert moved["weights_sha256"] == second["weights_sha256"]


def test_the_hash_of_the_code_is_of_what_was_imported(tmp_path):
    """A file that is edited while its old code runs must not lend it its hash."""
    text = (utils.ROOT / "utils.py").read_text(encoding="utf-8")
    old = module_of(text, tmp_path, "utils_old")
    assert old.CODE_SHA256 == utils.CODE_SHA256
    (tmp_path / "utils_old.py").write_text(text + "\nEDITED = True\n", encoding="utf-8")
    assert old.segment(old.Config(), 3)["code"] == utils.CODE_SHA256
    edited = module_of(text + "\nEDITED = True\n", tmp_path, "utils_new")
    assert edited.segment(edited.Config(), 3)["code"] != utils.CODE_SHA256
    comment = module_of(text + "\n# a comment\n", tmp_path, "utils_comment")
    assert comment.CODE_SHA256 == utils.CODE_SHA256


F_STRINGS = """
def error(cfg, width):
    'Two lines, to be told apart.'
    return f'lr={cfg.lr:{width}.2f} of "{cfg.name!r}"' f" is {'too' if width else 'much'} high"
"""


def test_the_hash_of_a_source_is_that_of_other_versions_of_python():
    """As computed by Python 3.11, 3.12 and 3.14; 3.12 writes the quotes of f-strings otherwise."""
    assert hashlib.sha256(utils._plain(F_STRINGS).encode()).hexdigest() == (
        "4eb42b099d79202fea1b5279933faa1f94398112efc3ecdd5d08613e1a5955e3")


IDEA = """
from utils import FedAvg, add, scale

class Base(FedAvg):
    strength = 0.5

class Idea(Base):
    def server_step(self, state, update):
        return add(state.params, scale(update.vector, self.strength)), {}

def score(weights, fisher, draw):
    return {n: w.abs() for n, w in weights.items()}
"""
LAYOUT = IDEA.replace("    strength", '    """What it is."""\n    # why\n    strength')
EDITS = {"method": ("{}", "{'m': update.vector}"), "constant of its base": ("0.5", "0.25")}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_algorithm_is_another_run(tmp_path, edit):
    keys = []
    for i, source in enumerate((IDEA, LAYOUT, IDEA.replace(*EDITS[edit]))):
        register_algorithm("idea", module_of(source, tmp_path, f"idea_{edit[:4]}{i}").Idea)
        keys.append(run_key(Config(weights="none", algorithm="idea")))
    del utils.ALGORITHMS["idea"]
    assert keys[0] == keys[1]  # comments and docstrings decide nothing
    assert keys[0]["algorithm_sha256"] != keys[2]["algorithm_sha256"]


def test_an_edited_rule_is_another_run(tmp_path):
    keys = []
    for i, source in enumerate((IDEA, IDEA.replace("w.abs()", "-w.abs()"))):
        register_rule("idea", module_of(source, tmp_path, f"rule_{i}").score)
        keys.append(run_key(Config(weights="none", rule="idea")))
    del RULES["idea"]
    assert keys[0]["rule_sha256"] != keys[1]["rule_sha256"]


def test_built_in_names_are_taken():
    for name in ("fedavg", "centralized"):
        with pytest.raises(ValueError, match=f"{name}.*built in"):
            register_algorithm(name, Mine)
    with pytest.raises(ValueError, match=r"random.*built in"):
        register_rule("random", lambda weights, fisher, draw: weights)


def test_what_is_no_algorithm_is_refused():
    with pytest.raises(TypeError, match="subclass of FedAvg"):
        register_algorithm("idea", dict)
    with pytest.raises(ValueError, match=r"reads.*\['lr'\]"):
        register_algorithm("idea", type("Idea", (FedAvg,), dict(reads=("lr",))))


def test_an_idea_without_a_source_is_refused():
    scope = {}
    exec("def score(weights, fisher, draw):\n    return weights", scope)
    with pytest.raises(ValueError, match="source of .*score.* cannot be found"):
        register_rule("idea", scope["score"])


def test_the_hash_of_tensors_depends_on_names_values_and_shapes_alone():
    w = torch.arange(6.0).view(2, 3)
    sha = utils.tensors_sha256
    same = sha({"a": w})
    assert same == sha({"a": w.double().T.contiguous().T}) == sha({"a": torch.nn.Parameter(w)})
    others = {"b": w}, {"a": w + 1e-6}, {"a": w.view(3, 2)}
    assert len({same, *map(sha, others)}) == 4
