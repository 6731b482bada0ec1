"""Storage that fails: a resume from the newest sound checkpoint, or an error that says what to do.

The disks are real where mounting is permitted (a tmpfs of some kilobytes), else injected.
"""
import ctypes
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import crash_campaign
import pytest
import torch
from helpers import CFG, make_small, same

import utils
from notebooks import store as module
from notebooks.store import dump, parse
from utils import Config, State, Store, digest, run_name, train

SHORT = replace(CFG, num_clients=4, participation=0.5, num_rounds=4, eval_every=1)
CKPT = "checkpoints/*/*.safetensors"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


def state(round, size=50):
    draw = torch.Generator().manual_seed(round)
    w = {"a": torch.randn(size, generator=draw), "b": torch.randn(3, 2, generator=draw)}
    return State(w, round, tuple(dict(round=r, lr=0.1) for r in range(1, round + 1)), best=w,
                 best_round=round)


def is_state(found, expected):
    return found.round == expected.round and same(found.params, expected.params)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(content, bit):
    return (content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8])
            + content[bit // 8 + 1:])


def somewhere(share, n, content, kind, draw):
    """A byte (or for "flip" a bit) in the n-th of the content that begins at this share."""
    return int((share + draw.random() / n) * len(content) * (8 if kind == "flip" else 1))


def quietly(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


# ------------------------------------------------------------------ small and locked disks
@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder of 512 kB; beyond it the system's own error, or without mounts a like one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=512k") == 0:
        yield folder
        libc.umount2(str(folder).encode(), 2)
        return
    honest = os.fsync

    def fsync(file):
        used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        if used > 512 * 1024 and str(folder) in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(file)
    monkeypatch.setattr(os, "fsync", fsync)
    yield folder


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(disk):
    store = Store(disk)
    store.write("kept.json", dump(dict(a=1)))
    store.save(CFG, state(1, size=20_000))  # 80 kB each
    store.save(CFG, state(2, size=20_000))
    (disk / "others").write_bytes(b"x" * 300_000)
    with pytest.raises(OSError, match=r"(?i)no space.*cannot be written.*run again") as error:
        store.save(CFG, state(3, size=20_000))
    assert error.value.errno == errno.ENOSPC
    assert not list(disk.rglob("*.part")), "half a file keeps the disk full"
    assert is_state(store.resume(CFG), state(2, size=20_000))
    assert parse(store.read("kept.json")) == dict(a=1)
    (disk / "others").unlink()
    store.save(CFG, state(3, size=20_000))
    assert is_state(store.resume(CFG), state(3, size=20_000))


def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(disk, tmp_path):
    whole, store = train(SHORT, Store(tmp_path / "whole", minutes=0.0)), Store(disk, minutes=0.0)
    (disk / "others").write_bytes(b"x" * 300_000)
    with pytest.raises(OSError, match=f"(?i)no space.*{run_name(SHORT)}"):
        train(SHORT, store)
    assert 1 <= store.resume(SHORT).round < 4
    (disk / "others").unlink()
    assert train(SHORT, store)["history"] == whole["history"]


def test_a_full_drive_never_stops_a_run(disk, tmp_path):
    (disk / "others").write_bytes(b"x" * 500_000)
    store = Store(tmp_path / "root", disk / "drive", minutes=0.0)
    with pytest.warns(UserWarning, match=r"(?i)only in .* for now.*no space"):
        result = train(SHORT, store)
    assert result["status"] == "finished"
    (disk / "others").unlink()
    Store(tmp_path / "root", disk / "drive")
    assert crash_campaign.files(store.root) == crash_campaign.files(store.drive)


def refuse_writes(patch, folder, kind=errno.EROFS):
    """The folder is read-only, even to the superuser."""
    for owner, name in ((os, "replace"), (os, "truncate"), (Path, "mkdir"), (Path, "unlink")):
        honest = getattr(owner, name)

        def guarded(*args, honest=honest, **options):
            if str(folder) in str(args[-1] if honest is not Path.mkdir else args[0]):
                raise OSError(kind, os.strerror(kind), str(folder))
            return honest(*args, **options)
        patch.setattr(owner, name, guarded)


@pytest.mark.parametrize("kind", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT,
                                  errno.ENOTCONN],
                         ids=errno.errorcode.get)
def test_a_read_only_root_serves_what_it_has_and_refuses_to_train(tmp_path, monkeypatch, kind):
    result = train(SHORT, Store(tmp_path))
    refuse_writes(monkeypatch, tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(SHORT, Store(tmp_path)) == result
    with pytest.raises(OSError, match=os.strerror(kind)):
        quietly(train, replace(SHORT, num_rounds=1), Store(tmp_path))
    assert train(SHORT, Store(tmp_path)) == result


def test_a_really_read_only_mount_is_refused(tmp_path):
    folder, libc = tmp_path / "disk", ctypes.CDLL(None)
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 1, b"size=64k"):
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(OSError, match="(?i)read-only"):
            quietly(train, replace(SHORT, num_rounds=1), Store(folder))
    finally:
        libc.umount2(str(folder).encode(), 2)


@pytest.mark.parametrize("what", ["root", "checkpoints", "run"])
def test_a_folder_removed_in_the_midst_of_a_run_is_made_again(tmp_path, monkeypatch, what):
    root, honest = tmp_path / "root", utils.assess
    folder = {"root": root, "checkpoints": root / "checkpoints",
              "run": root / "checkpoints" / run_name(SHORT)}[what]
    monkeypatch.setattr(utils, "assess", lambda run, state: (
        shutil.rmtree(folder) if state.round == 3 else None, honest(run, state))[1])
    store = Store(root, minutes=0.0)
    result = train(SHORT, store)
    assert result["status"] == "finished"
    assert store.resume(SHORT).round == 4
    assert train(SHORT, Store(root)) == result


def test_a_root_that_is_a_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        quietly(train, replace(SHORT, num_rounds=1), Store(tmp_path / "taken"))


# ------------------------------------------------------------------ damage
@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for r in (1, 2):
        Store(root).save(CFG, state(r))
    return root


CUTS = [i / 50 for i in range(50)]
FLIPS = [i / 200 for i in range(200)]


@pytest.mark.parametrize(("kind", "places"), [("cut", CUTS), ("flip", FLIPS)])
def test_every_damage_of_the_newest_checkpoint_leads_to_the_one_before(two_checkpoints, kind,
                                                                       places):
    store, draw = Store(two_checkpoints), random.Random(0)
    path = store.root / store.names(CKPT)[-1]
    content = path.read_bytes()
    for share in places:
        at = somewhere(share, len(places), content, kind, draw)
        path.write_bytes(content[:at] if kind == "cut" else flip(content, at))
        with pytest.warns(UserWarning, match="0000002_.*damaged"):
            assert is_state(store.resume(CFG), state(1)), f"{kind} at {at}"
    path.write_bytes(content)
    assert is_state(store.resume(CFG), state(2))


@pytest.mark.parametrize(("kind", "places"), [("cut", CUTS), ("flip", FLIPS)])
def test_every_damage_of_a_result_is_noticed_and_mended_from_the_drive(tmp_path, kind, places):
    store, draw = Store(tmp_path / "root", tmp_path / "drive"), random.Random(0)
    result = train(replace(SHORT, num_rounds=1), store)
    name, = store.names("*.json")
    content = store.read(name)
    for share in places:
        at = somewhere(share, len(places), content, kind, draw)
        damaged = content[:at] if kind == "cut" else flip(content, at)
        (store.root / name).write_bytes(damaged)
        found = quietly(store.result, replace(SHORT, num_rounds=1))
        assert {k: found[k] for k in result} == result, f"{kind} at {at}"


def test_a_damaged_result_without_a_copy_is_made_again_from_the_checkpoint(tmp_path, monkeypatch):
    result = train(SHORT, Store(tmp_path))
    damage(tmp_path / f"{run_name(SHORT)}.json", lambda content: content[:-9])
    monkeypatch.setattr(utils, "federated_round", lambda *a: pytest.fail("trained again"))
    with pytest.warns(UserWarning, match=rf"{run_name(SHORT)}\.json is damaged"):
        again = train(SHORT, Store(tmp_path))
    assert {k: again[k] for k in result if k != "seconds"} == {
        k: result[k] for k in result if k != "seconds"}


@pytest.mark.parametrize("sound", ["root", "drive"])
def test_of_two_copies_of_a_checkpoint_the_sound_one_is_taken(tmp_path, sound):
    store = Store(tmp_path / "root", tmp_path / "drive")
    for r in (1, 2):
        store.save(CFG, state(r))
    bad = store.drive if sound == "root" else store.root
    damage(bad / store.names(CKPT)[1], lambda content: content[:100])
    assert is_state(quietly(store.resume, CFG), state(2))


@pytest.mark.parametrize("kind", ["truncated", "missing", "empty"])
def test_a_checkpoint_that_is_not_whole_on_the_drive_yet_is_passed_over(tmp_path, kind):
    store = Store(tmp_path / "root", tmp_path / "drive")
    for r in (1, 2):
        store.save(CFG, state(r))
    shutil.rmtree(store.root)  # a new machine: only the drive has anything
    late = store.drive / store.names(CKPT)[1]
    content = late.read_bytes()
    late.unlink()
    if kind != "missing":
        late.write_bytes(content[:len(content) // 2] if kind == "truncated" else b"")
    fresh = Store(store.root, store.drive)
    assert is_state(quietly(fresh.resume, CFG), state(1))
    late.write_bytes(content)  # now it has arrived
    assert is_state(fresh.resume(CFG), state(2))


def test_stale_files_of_killed_writers_are_removed_and_never_read(tmp_path):
    store = Store(tmp_path / "root", tmp_path / "drive", minutes=0.0)
    whole = train(replace(SHORT, name="whole"), store)
    for place in (store.root, store.drive):
        folder = place / "checkpoints" / run_name(SHORT)
        folder.mkdir(parents=True)
        for file in (folder / f"0000009_{'0' * 64}.safetensors.1.part",
                     place / f"{run_name(SHORT)}.json.1.part"):
            file.write_bytes(b"half")
    assert train(SHORT, store)["history"] == whole["history"]
    assert not list(tmp_path.rglob("*.part"))


# ------------------------------------------------------------------ the drive
def break_drive(patch, drive, *, reads=False):
    refuse_writes(patch, drive, errno.ENOTCONN)
    if reads:
        for name in ("read_bytes", "glob", "exists", "is_dir", "stat"):
            honest = getattr(Path, name)

            def guarded(self, *args, honest=honest, **options):
                if str(drive) in str(self):
                    raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
                return honest(self, *args, **options)
            patch.setattr(Path, name, guarded)


@pytest.mark.parametrize("reads", [False, True])
def test_a_drive_that_vanishes_and_returns_is_tried_again(tmp_path, monkeypatch, reads):
    store, honest = Store(tmp_path / "root", tmp_path / "drive", minutes=0.0), utils.assess
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def assess(run, state):
            if state.round == 2:
                break_drive(patch, store.drive, reads=reads)
            if state.round == 4:
                patch.undo()
                make_small(patch)
            return honest(run, state)
        patch.setattr(utils, "assess", assess)
        make_small(patch)
        result = train(replace(SHORT, num_rounds=5), store)
    assert result["status"] == "finished"
    assert not store.late
    on_drive = crash_campaign.files(store.drive)
    assert crash_campaign.files(store.root).items() <= on_drive.items()


def test_a_drive_that_stays_away_is_caught_up_by_the_next_process(tmp_path, monkeypatch):
    root, drive = tmp_path / "root", tmp_path / "drive"
    with monkeypatch.context() as patch:
        break_drive(patch, drive, reads=True)
        result = quietly(train, SHORT, quietly(Store, root, drive))
    assert result["status"] == "finished"
    assert not drive.exists()
    assert train(SHORT, Store(root, drive)) == result
    assert crash_campaign.files(root) == crash_campaign.files(drive)


def test_a_lost_mount_is_never_replaced_by_a_folder(tmp_path):
    """A folder in its place would hide that the drive is gone, and Colab could not mount again."""
    store = Store(tmp_path / "root", tmp_path / "drive" / "results")
    shutil.rmtree(tmp_path / "drive")
    with pytest.warns(UserWarning, match="is gone"):
        store.write("a.json", b"{}")
    assert not (tmp_path / "drive").exists()
    (tmp_path / "drive" / "results").mkdir(parents=True)
    store.write("b.json", b"{}")
    assert sorted(p.name for p in store.drive.iterdir()) == ["a.json", "b.json"]


def test_a_damaged_file_is_never_copied_over_a_sound_one(tmp_path):
    store = Store(tmp_path / "root", tmp_path / "drive")
    train(replace(SHORT, num_rounds=1), store)
    sound = crash_campaign.files(store.drive)
    for name in sound:
        damage(store.root / name, lambda content: content[:-5])
    quietly(Store, store.root, store.drive)
    assert crash_campaign.files(store.drive) == sound


# ------------------------------------------------------------------ two processes, two clocks
def work(root, queue):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_small(patch)
        calls, honest = [], utils.federated_round
        patch.setattr(utils, "federated_round",
                      lambda run, state: (calls.append(1), time.sleep(0.2), honest(run, state))[2])
        result = train(SHORT, Store(root, minutes=0.0))
    queue.put((result, len(calls), [str(w.message) for w in said]))


def test_of_two_processes_one_trains_and_the_other_waits_for_it(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    (a, rounds_a, said_a), (b, rounds_b, said_b) = (queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert a == b
    assert sorted((rounds_a, rounds_b)) == [0, 4]
    assert any("another process trains" in text for text in said_a + said_b)


def test_the_lock_dies_with_its_process(tmp_path):
    def hold(store, ready):
        with store.lock(SHORT):
            ready.set()
            time.sleep(600)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(Store(tmp_path), ready))
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it does not wait
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


def test_a_failed_run_frees_its_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils, "open_run", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(SHORT, Store(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


@pytest.mark.parametrize("fault", ["no flock", "no fcntl"])
def test_without_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch, fault):
    if fault == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(
            OSError(errno.ENOTSUP, "Operation not supported")))
    with pytest.warns(UserWarning, match="cannot be locked.*one process"):
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


def test_without_a_lock_two_processes_still_store_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_lock", lambda *a: None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60)[0] for _ in workers]
    for worker in workers:
        worker.join()
    whole = train(SHORT, Store(tmp_path / "alone"))
    assert [r["history"] for r in results] == [whole["history"]] * 2
    a, b = (Store(root).resume(SHORT) for root in (tmp_path, tmp_path / "alone"))
    assert same(a.params, b.params)


def test_clocks_and_dates_have_no_say(tmp_path, monkeypatch):
    """The wall clock runs backwards and the files' dates are in the wrong order."""
    now, store = [2e9], Store(tmp_path / "root", minutes=0.0)
    whole = train(replace(SHORT, name="whole"), store)

    def backwards():
        now[0] -= 1e6
        return now[0]
    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * backwards()))
    honest = utils.federated_round

    def cut(run, state):
        if state.round == 3:
            raise KeyboardInterrupt
        return honest(run, state)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "federated_round", cut)
        assert train(SHORT, store)["round"] == 3
    for i, name in enumerate(store.names(CKPT)):
        os.utime(store.root / name, (1e9 - 1e6 * i, 1e9 - 1e6 * i))
    assert store.resume(SHORT).round == 3
    assert train(SHORT, store)["history"] == whole["history"]


# ------------------------------------------------------------------ what is stored stays
def test_every_result_that_is_stored_is_still_found():
    """No change of a default, a field's name, a run's name or the format may orphan a run."""
    store = Store(utils.ROOT / "results", frozen=True)
    names = store.names("*.json")
    assert len(names) >= 27
    for name in names:
        raw = json.loads((store.root / name).read_text())
        cfg = Config(**raw["config"])
        assert name == f"{run_name(cfg)}.json"
        assert store.result(cfg) == {k: v for k, v in raw.items() if k != "sha256"}
        assert name.split("_")[-1] == f"{digest(raw['identity'])[:8]}.json"


def test_a_store_of_the_first_format_is_read(tmp_path):
    """Results and a cache without SHA-256 inside, as older versions wrote them."""
    import safetensors.torch
    result = train(replace(SHORT, num_rounds=1), Store(tmp_path))
    name, = Store(tmp_path).names("*.json")
    (tmp_path / name).write_text(json.dumps(result, indent=1))
    assert train(replace(SHORT, num_rounds=1), Store(tmp_path)) == result
    key = dict(a=1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"head_{digest(key)}.safetensors").write_bytes(
        safetensors.torch.save({"w": torch.ones(2)}))
    found = Store(tmp_path).cached("head", key, lambda: pytest.fail("computed again"))
    assert torch.equal(found["w"], torch.ones(2))


# ------------------------------------------------------------------ kills
def test_a_short_crash_campaign(tmp_path):
    rows = crash_campaign.campaign(tmp_path, kills=4, seed=1, kinds=["server adam"],
                                   moments=["write", "copied", "json", "delete"])
    assert sum(row[2] for row in rows) == 4


def test_the_campaign_notices_a_run_that_ends_otherwise(tmp_path, monkeypatch):
    whole = crash_campaign.unbroken(SHORT, tmp_path / "whole")
    monkeypatch.setattr(utils, "learning_rate", lambda cfg, progress: 0.04)
    with pytest.raises(AssertionError, match="differs from the unbroken"):
        crash_campaign.cell(SHORT, "write", 1, random.Random(0), tmp_path, whole)
