"""What is stored comes back whole, is of the run that was asked for, and outlives the machine."""
import json
import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import (
    CFG,
    make_small,
    quietly,
    resumed,
    same,
    same_state,
    timeless,
)

import utils
from notebooks.backup import BackedUpStore
from utils import Store, run_name
from utils import train_federated as federated

CKPT = "checkpoints/*/*.safetensors"
SHORT = replace(CFG, num_rounds=4, eval_every=1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def backed(tmp_path):
    return BackedUpStore(tmp_path / "root", backup=tmp_path / "drive")


def stop_after(number):
    def watch(run, state):
        if state.round == number:
            raise KeyboardInterrupt
    return watch


def files(folder):
    """Contents by name, the locks aside: they stay where their processes run."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*")
            if f.is_file() and f.name != "lock"}


def checkpoints(store):
    return [Path(name).name[:7] for name in store.names(CKPT)]


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
    assert store.read("a/1.bin") is None


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


def test_a_folder_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RESULTS_DIR", "~/x")
    monkeypatch.chdir(tmp_path)
    assert Store().root == tmp_path / "x"
    assert BackedUpStore("~/y", backup="~/z").backup == tmp_path / "z"
    assert not (tmp_path / "~").exists()


# ------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("algorithm", ["fedavg", "mine", "centralized"])
@pytest.mark.parametrize("rule", [None, "random"])
def test_a_checkpoint_comes_back_bit_by_bit(store, algorithm, rule):
    """Odd values and the order of the weights, by which lists are paired, included."""
    cfg = replace(CFG, algorithm=algorithm, rule=rule, head="ridge")
    run, state = utils.open_run(cfg, store)
    step = utils.centralized_epoch if cfg.centralized else utils.federated_round
    state = utils.validate(run, state)
    for _ in range(2):
        state = step(run, state)
        store.save(run, state)
        run, state = utils.open_run(cfg, store)
        assert list(state.params) == list(run.trainable)
    whole_run, whole = utils.open_run(cfg, Store(store.root.parent / "other"))
    whole = utils.validate(whole_run, whole)
    for _ in range(2):
        whole = step(whole_run, whole)
    assert same_state(state, whole)


def test_the_best_weights_are_stored_beside_the_last(store):
    run, state = utils.open_run(CFG, store)
    state = utils.validate(run, state)
    state = utils.federated_round(run, state)
    store.save(run, state)
    found = resumed(CFG, store)
    assert same(found.best, state.best)
    assert not same(found.best, found.params)


def test_nothing_stored_is_none(store):
    assert store.newest_checkpoint(CFG) is None
    assert store.result(CFG) is None
    assert store.results() == {}


def test_the_newest_two_checkpoints_are_kept_and_of_a_finished_run_the_last(store):
    cfg = replace(CFG, num_rounds=12)
    run, state = utils.open_run(cfg, store)
    for number in (1, 2, 9, 10, 11):
        store.save(run, replace(state, round=number))
    assert checkpoints(store) == ["0000010", "0000011"]
    store.save(run, replace(state, round=12))
    assert checkpoints(store) == ["0000012"]


def test_unfinished_files_are_ignored(store):
    federated(SHORT, store, watch=stop_after(2))
    folder = store.root / "checkpoints" / run_name(SHORT)
    (folder / f"0000003_{'0' * 64}.safetensors.77.part").write_bytes(b"half")
    (store.root / f"{run_name(SHORT)}.json.77.part").write_bytes(b"{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(SHORT, store).round == 2
        assert federated(SHORT, store)["status"] == "finished"
    assert not list(store.root.rglob("*.part"))


def test_another_runs_checkpoint_is_refused_with_both_values(store):
    mine = replace(SHORT, name="mine", lr=0.25)
    federated(mine, store, watch=stop_after(2))
    with pytest.raises(ValueError, match=r"mine .*'lr': \(0\.5, 0\.25\)") as error:
        federated(replace(mine, lr=0.5), store)
    assert "batch_size" not in str(error.value), "names a field that does not differ"
    assert resumed(mine, store).round == 2


@pytest.mark.parametrize("change", [dict(rule="random"), dict(seed=3), dict(momentum=0.5),
                                    dict(num_rounds=9)])
def test_another_runs_result_is_refused_with_both_values(store, change):
    mine = replace(CFG, name="mine", num_rounds=1)
    federated(mine, store)
    (field, asked), = change.items()
    expected = rf"'{field}': \({asked!r}, {getattr(mine, field)!r}\)"
    for call in (store.result, lambda cfg: federated(cfg, store)):
        with pytest.raises(ValueError, match=expected):
            call(replace(mine, **change))


# ------------------------------------------------------------------ results
def test_json_refuses_numbers_that_it_lacks():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            utils.to_json(dict(history=[dict(loss=bad)]))


def test_a_result_says_what_ran_where_and_with_what(store):
    cfg = replace(CFG, rule="random", head="ridge")
    result = federated(cfg, store)
    text = (store.root / f"{run_name(cfg)}.json").read_text(encoding="utf-8")
    stored = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in the JSON"))
    assert stored == result
    assert (stored["run"], stored["status"], stored["error"]) == (run_name(cfg), "finished", "")
    assert stored["config"] == json.loads(json.dumps(asdict(cfg)))
    assert utils.Config(**stored["config"]) == cfg
    assert stored["key"] == json.loads(json.dumps(utils.run_key(cfg)))
    assert stored["backbone_sha256"] == utils.tensors_sha256(
        utils.backbone(utils.build_model(cfg)))
    assert [row["round"] for row in stored["history"]] == [0, 1, 2, 3, 4]
    assert stored["seconds"] > 0
    part, = stored["segments"]
    assert (part["after_round"], part["device"], part["threads"]) == (0, "cpu", 1)
    assert part["code"] == utils.CODE_SHA256
    assert part["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_run_stores_the_hash_and_the_kinds_of_its_mask(store, monkeypatch):
    cfg = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.75)
    found = federated(cfg, store)["mask"]
    name, = store.names("cache/mask_*")
    mask = safetensors.torch.load(store.read(name))
    assert found["sha256"] == utils.tensors_sha256(mask)
    assert found["per_layer"] == utils.trainable_per_layer(mask)
    assert found["trainable"] == round(0.25 * found["maskable"])
    monkeypatch.setattr(utils, "calibrate_mask", lambda *a, **k: pytest.fail("calibrated again"))
    assert federated(replace(cfg, lr=0.01), store)["mask"] == found


def test_other_code_makes_its_own_head_and_mask(store, monkeypatch):
    cfg = replace(CFG, rule="least_sensitive", head="ridge")
    federated(cfg, store)
    monkeypatch.setattr(utils, "CODE_SHA256", "edited")
    federated(replace(cfg, lr=0.01), store)
    kinds = [name.split("_")[0] for name in store.names("cache/*")]
    assert kinds == ["cache/head", "cache/head", "cache/mask", "cache/mask"]


@pytest.mark.parametrize(("changes", "bits"), [
    (dict(calibration="central"), 0), (dict(calibration="mean"), 32), (dict(calibration="vote"), 1),
    (dict(calibration="mean", calibration_clients=0.5), 16)])
def test_calibrating_by_clients_is_counted(store, changes, bits):
    cfg = replace(CFG, rule="least_sensitive", head="ridge", num_rounds=1, **changes)
    mask = federated(cfg, store)["mask"]
    assert mask["bytes_up"] == bits * mask["maskable"] // 8 * 10 * cfg.calibration_rounds


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe", b"{}" * 2,
                                     b'{"history": []}', b"[" * 100_000,
                                     b'{"run": "a", "key": [], "status": "finished", '
                                     b'"config": {}, "history": []}'])
def test_a_foreign_json_is_named_and_left_out(store, content):
    result = federated(SHORT, store)
    (store.root / "foreign.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"foreign\.json is no result of a run"):
        assert store.results() == {result["run"]: result}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.results().keys() == {result["run"]}  # once is enough


def test_a_foreign_json_under_a_runs_name_is_kept_aside(store):
    (store.root).mkdir()
    (store.root / f"{run_name(SHORT)}.json").write_bytes(b'{"mine": 1}')
    with pytest.warns(UserWarning, match="no result of a run"):
        assert federated(SHORT, store)["status"] == "finished"
    assert (store.root / f"{run_name(SHORT)}.json.damaged").read_bytes() == b'{"mine": 1}'


def test_a_result_is_read_again_where_its_file_has_changed(store):
    result = federated(SHORT, store)
    store.results()
    other = Store(store.root)
    other.write(f"{run_name(SHORT)}.json", utils.to_json(result | {"seconds": 7.0}))
    assert store.results()[result["run"]]["seconds"] == 7.0


def test_text_is_utf8_whatever_the_locale(store, monkeypatch):
    import locale
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *args: "ascii")
    store.write("notes/a.json", utils.to_json(dict(x="±")))
    assert "±".encode() in (store.root / "notes/a.json").read_bytes()
    key = dict(what="±")
    assert store.compute_or_load("fact", key, lambda: dict(x="±")) == dict(x="±")
    assert store.compute_or_load("fact", key, lambda: 1 / 0) == dict(x="±")


# ------------------------------------------------------------------ what is computed once
def test_a_value_is_computed_once_for_a_key(store):
    calls = []

    def compute():
        calls.append(1)
        return {"w": torch.tensor([1 / 3, len(calls)])}
    first = store.compute_or_load("head", dict(l2=1.0, train=[1, 2]), compute)
    assert same(store.compute_or_load("head", dict(train=[1, 2], l2=1.0), compute), first)
    assert len(calls) == 1
    for kind, key in (("head", dict(l2=2.0, train=[1, 2])), ("head", dict(l2=1.0, train=[1, 3])),
                      ("mask", dict(l2=1.0, train=[1, 2]))):
        assert not same(store.compute_or_load(kind, key, compute), first)
    assert len(calls) == 4


def test_json_is_kept_as_well_as_tensors_and_a_frozen_store_computes_nothing(store):
    assert store.compute_or_load("fact", dict(a=1), lambda: dict(x=[1, 2])) == dict(x=[1, 2])
    frozen = Store(store.root, frozen=True)
    assert frozen.compute_or_load("fact", dict(a=1), lambda: 1 / 0) == dict(x=[1, 2])
    assert frozen.compute_or_load("fact", dict(a=2), lambda: 1 / 0) == {}


# ------------------------------------------------------------------ the backup
def test_every_file_is_copied_to_the_backup(backed):
    federated(replace(CFG, rule="random", head="ridge"), backed)
    assert files(backed.root) == files(backed.backup)
    assert len(files(backed.root)) == 5  # result, predictions, checkpoint, head, mask


def test_what_a_wiped_machine_had_is_found_in_the_backup(backed, monkeypatch):
    federated(replace(SHORT, name="cut"), backed, watch=stop_after(2))
    result = federated(SHORT, backed)
    shutil.rmtree(backed.root)
    again = replace(backed)
    assert (again.root / f"{run_name(SHORT)}.npy").is_file()
    assert again.results() == {result["run"]: result}
    assert resumed(replace(SHORT, name="cut"), again).round == 2
    monkeypatch.setattr(utils, "open_run", lambda *args, **options: pytest.fail("trained again"))
    assert federated(SHORT, again) == result


def test_an_older_version_in_the_backup_is_replaced_by_the_next_process(backed, monkeypatch):
    backed.write("a.json", b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(BackedUpStore, "_copy", lambda *args: False)  # the drive takes nothing
        backed.write("a.json", b'{"new": 1}')
    assert (backed.backup / "a.json").read_bytes() == b"{}"
    again = replace(backed)
    assert (again.backup / "a.json").read_bytes() == b'{"new": 1}'


def test_a_newer_version_in_the_backup_is_another_machines_and_is_taken(backed):
    backed.write("a.json", b"{}")
    newer = backed.backup / "a.json"
    newer.write_bytes(b'{"made": "anew"}')
    later = (backed.root / "a.json").stat().st_mtime + 60
    os.utime(newer, (later, later))
    again = replace(backed)
    assert newer.read_bytes() == (again.root / "a.json").read_bytes() == b'{"made": "anew"}'


def test_a_newer_version_of_the_same_size_is_taken_too(backed):
    """Predictions of all runs are of one size: old ones beside a new result would be a mixture."""
    backed.write("a.npy", b"old")
    newer = backed.backup / "a.npy"
    newer.write_bytes(b"new")
    later = (backed.root / "a.npy").stat().st_mtime + 60
    os.utime(newer, (later, later))
    again = replace(backed)
    assert newer.read_bytes() == (again.root / "a.npy").read_bytes() == b"new"
    newer.write_bytes(b"xxx")
    os.utime(newer, (later, later))
    replace(backed)
    assert (again.root / "a.npy").read_bytes() == b"new"  # of the same time: not read again


def test_a_drive_that_keeps_no_times_has_its_copies_all_the_same(backed, monkeypatch):
    """Else every file would stay pending, and be copied again with each that is written."""
    def refuse(*args, **options):
        raise PermissionError("times cannot be set here")
    monkeypatch.setattr(os, "utime", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backed.write("a.json", b"{}")
        (backed.backup / "a.json").unlink()
        backed.write("b.json", b"{}")
    assert [p.name for p in backed.backup.iterdir()] == ["b.json"]  # the first was not pending


def test_a_damaged_result_is_taken_from_the_backup(backed, monkeypatch):
    result = federated(SHORT, backed)
    path = backed.root / f"{run_name(SHORT)}.json"
    damaged = path.read_bytes()[:-9]
    path.write_bytes(damaged)
    for checkpoint in backed.names(CKPT):
        backed.delete(checkpoint)
    monkeypatch.setattr(utils, "open_run", lambda *args, **options: pytest.fail("trained again"))
    with pytest.warns(UserWarning, match="is no result of a run"):
        assert federated(SHORT, backed) == result
    assert json.loads(path.read_text()) == result
    assert path.with_suffix(".json.damaged").read_bytes() == damaged


def test_a_frozen_store_finds_results_in_the_backup_and_copies_nothing_there(backed):
    result = federated(SHORT, backed)
    shutil.rmtree(backed.root)
    backed.root.mkdir()
    (backed.root / "here.json").write_text("{}")
    frozen = replace(backed, frozen=True)
    assert frozen.result(SHORT) == result
    assert not (backed.backup / "here.json").exists()


def test_old_checkpoints_leave_the_backup_too(backed):
    run, state = utils.open_run(replace(CFG, num_rounds=9), backed)
    for number in (1, 2, 3):
        backed.save(run, replace(state, round=number))
    for place in (backed.root, backed.backup):
        assert sorted(p.name[:7] for p in place.glob(CKPT)) == ["0000002", "0000003"]
    shutil.rmtree(backed.root)
    for store in (backed, replace(backed)):  # that wrote them, and that listed them
        assert [p.name[:7] for p in store.known_checkpoints(run.cfg)] == ["0000002", "0000003"]


def test_a_checkpoint_is_never_dropped_for_damaged_ones_of_later_rounds(backed):
    run, state = utils.open_run(replace(CFG, num_rounds=9), backed)
    backed.save(run, replace(state, round=1))
    sound = backed.names(CKPT)
    for round_ in ("0000007", "0000008"):
        name = f"{Path(sound[0]).parent}/{round_}_{64 * 'f'}.safetensors"
        utils.write_whole(backed.root / name, b"damaged")
    backed.save(run, replace(state, round=2))
    assert [Path(n).name[:7] for n in backed.names(CKPT)] == ["0000001", "0000002"]
    name = f"{Path(sound[0]).parent}/0000009_{64 * 'f'}.safetensors"
    utils.write_whole(backed.root / name, b"damaged")
    backed.save(run, replace(state, round=9))  # the last, of which no other is kept
    assert backed.newest_checkpoint(run.cfg)[0]["round"] == 9


def test_results_reach_the_backup_after_what_they_name(backed, monkeypatch):
    """A result there without its weights would be a run that cannot go on."""
    order, rename = [], os.replace

    def full(part, path):
        if str(backed.backup) in str(path):
            raise OSError("drive is full")
        rename(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        quietly(federated, CFG, backed)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b)), rename(a, b)))
    backed.write("later.json", b"{}")
    copied = [p.suffix for p in order if backed.backup in p.parents]
    assert sorted(copied[:2]) == [".npy", ".safetensors"]
    assert copied[2:] == [".json", ".json"]


def test_training_goes_on_while_the_backup_fails_and_catches_up(tmp_path, monkeypatch):
    store = BackedUpStore(tmp_path / "root", minutes=0, backup=tmp_path / "drive")
    rename = os.replace

    def full(part, path):
        if str(store.backup) in str(path):
            raise OSError("drive is full")
        rename(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="could not be copied.*drive is full"):
            result = federated(SHORT, store)
    assert timeless(result) == timeless(federated(SHORT, Store(tmp_path / "alone")))
    assert not list(store.backup.rglob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write("next.json", b"{}")
    assert files(store.backup) == files(store.root)
