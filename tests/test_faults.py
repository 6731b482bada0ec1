"""Storage that fails: a resume from the newest sound checkpoint, or an error that says what to do.

The disks are real where mounting is permitted (a tmpfs of some kilobytes), else injected.
"""
import ctypes
import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import crash_campaign
import pytest
from helpers import CFG, make_small, quietly, resumed, timeless

import utils
from notebooks.backup import BackedUpStore
from utils import Store, run_name, train

SHORT = replace(CFG, num_clients=4, participation=0.5, num_rounds=4, eval_every=1)
CKPT = "checkpoints/*/*.safetensors"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return train(SHORT, Store(tmp_path_factory.mktemp("whole")))


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(content, bit):
    return (content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8])
            + content[bit // 8 + 1:])


def files(folder):
    return crash_campaign.files(folder)


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
    store.write("a.bin", b"a" * 200_000)
    (disk / "others").write_bytes(b"x" * 200_000)
    for name in ("a.bin", "b.bin"):
        with pytest.raises(OSError, match=r"(?i)no space.*cannot be written.*run again") as error:
            store.write(name, b"b" * 200_000)
        assert error.value.errno == errno.ENOSPC
    assert not list(disk.rglob("*.part")), "half a file keeps the disk full"
    assert store.read("a.bin") == b"a" * 200_000
    (disk / "others").unlink()
    store.write("a.bin", b"b" * 200_000)
    assert store.read("a.bin") == b"b" * 200_000


def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(disk, whole):
    store = Store(disk, minutes=0.0)
    (disk / "others").write_bytes(b"x" * 330_000)
    with pytest.raises(OSError, match=f"(?i)no space.*{run_name(SHORT)}"):
        train(SHORT, store)
    assert resumed(SHORT, store).round < 4
    (disk / "others").unlink()
    assert timeless(train(SHORT, store)) == timeless(whole)


def test_a_full_backup_never_stops_a_run(disk, tmp_path):
    (disk / "others").write_bytes(b"x" * 500_000)
    store = BackedUpStore(tmp_path / "root", 0.0, backup=disk / "drive")
    with pytest.warns(UserWarning, match=r"(?i)could not be copied.*no space"):
        result = train(SHORT, store)
    assert result["status"] == "finished"
    (disk / "others").unlink()
    BackedUpStore(tmp_path / "root", backup=disk / "drive")  # the next process catches up
    assert files(store.root) == files(store.backup)


def refuse_writes(patch, folder, kind):
    """The folder takes no change, even from the superuser."""
    for owner, name in ((os, "replace"), (os, "truncate"), (Path, "mkdir"), (Path, "unlink")):
        honest = getattr(owner, name)

        def guarded(*args, honest=honest, **options):
            if str(folder) in str(args[-1] if honest is not Path.mkdir else args[0]):
                raise OSError(kind, os.strerror(kind), str(folder))
            return honest(*args, **options)
        patch.setattr(owner, name, guarded)


@pytest.mark.parametrize("kind", [errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_read_only_root_serves_what_it_has_and_refuses_to_train(tmp_path, monkeypatch, kind):
    result = train(SHORT, Store(tmp_path))
    refuse_writes(monkeypatch, tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(SHORT, Store(tmp_path)) == result
    with pytest.raises(OSError, match=os.strerror(kind)):
        quietly(train, replace(SHORT, num_rounds=1), Store(tmp_path))


@pytest.mark.parametrize("what", ["root", "run"])
def test_a_folder_removed_in_the_midst_of_a_run_is_made_again(tmp_path, what):
    root = tmp_path / "root"
    folder = {"root": root, "run": root / "checkpoints" / run_name(SHORT)}[what]

    def watch(run, state):
        if state.round == 3:
            shutil.rmtree(folder)
    store = Store(root, minutes=0.0)
    result = train(SHORT, store, watch=watch)
    assert result["status"] == "finished"
    assert resumed(SHORT, store).round == 4


def test_a_root_that_is_a_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="taken"):
        quietly(train, SHORT, Store(tmp_path / "taken"))


# ------------------------------------------------------------------ damage
@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A store with checkpoints of rounds 2 and 3."""
    def stop(run, state):
        if state.round == 3:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        store = Store(tmp_path_factory.mktemp("two"), minutes=0.0)
        train(SHORT, store, watch=stop)
    assert [Path(n).name[:7] for n in store.names(CKPT)] == ["0000002", "0000003"]
    return store


def newest_round(store):
    return store.newest_checkpoint(SHORT)[0]["round"]


@pytest.mark.parametrize(("kind", "places"), [("cut", 50), ("flip", 200)])
def test_every_damage_of_the_newest_checkpoint_leads_to_the_one_before(two_checkpoints, kind,
                                                                       places):
    store, draw = two_checkpoints, random.Random(0)
    path = store.root / store.names(CKPT)[-1]
    content = path.read_bytes()
    for i in range(places):
        share = (i + draw.random()) / places
        at = int(share * len(content) * (8 if kind == "flip" else 1))
        path.write_bytes(content[:at] if kind == "cut" else flip(content, at))
        with pytest.warns(UserWarning, match="0000003_.*damaged"):
            assert newest_round(store) == 2, f"{kind} at {at}"
    path.write_bytes(content)
    assert newest_round(store) == 3


def test_with_all_checkpoints_damaged_a_run_starts_anew(two_checkpoints, tmp_path, whole):
    shutil.copytree(two_checkpoints.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    for name in store.names(CKPT):
        damage(store.root / name, lambda content: flip(content, 999))
    with pytest.warns(UserWarning, match="damaged"):
        result = train(SHORT, store)
    assert timeless(result) == timeless(whole)
    assert [part["after_round"] for part in result["segments"]] == [0]


def test_a_damaged_result_is_made_again_from_the_checkpoint(tmp_path, monkeypatch, whole):
    train(SHORT, Store(tmp_path))
    damage(tmp_path / f"{run_name(SHORT)}.json", lambda content: content[:-9])
    monkeypatch.setattr(utils, "federated_round", lambda *args: pytest.fail("trained again"))
    with pytest.warns(UserWarning, match=rf"{run_name(SHORT)}\.json is no result"):
        assert timeless(train(SHORT, Store(tmp_path))) == timeless(whole)


@pytest.mark.parametrize("sound", ["root", "backup"])
def test_of_two_copies_of_a_checkpoint_the_sound_one_is_taken(two_checkpoints, tmp_path, sound):
    for place in ("root", "backup"):
        shutil.copytree(two_checkpoints.root, tmp_path / place)
    store = BackedUpStore(tmp_path / "root", backup=tmp_path / "backup")
    bad = tmp_path / ("backup" if sound == "root" else "root")
    damage(bad / store.names(CKPT)[1], lambda content: content[:100])
    assert quietly(newest_round, store) == 3


@pytest.mark.parametrize("kind", ["truncated", "missing", "empty"])
def test_a_checkpoint_that_has_not_arrived_in_the_backup_is_passed_over(two_checkpoints, tmp_path,
                                                                        kind):
    shutil.copytree(two_checkpoints.root, tmp_path / "backup")
    store = BackedUpStore(tmp_path / "new machine", backup=tmp_path / "backup")
    late = store.backup / store.names(CKPT)[1]
    content = late.read_bytes()
    late.unlink()
    if kind != "missing":
        late.write_bytes(content[:len(content) // 2] if kind == "truncated" else b"")
    assert quietly(newest_round, store) == 2
    late.write_bytes(content)  # now it has arrived
    assert newest_round(store) == 3


def test_a_damaged_cache_is_computed_again(tmp_path, whole):
    cfg = replace(SHORT, rule="least_sensitive", head="lda", num_rounds=1, lr=0.001)
    first = train(cfg, Store(tmp_path))
    for name in Store(tmp_path).names("cache/*"):
        damage(tmp_path / name, lambda content: content[:20])
    with pytest.warns(UserWarning, match="damaged"):
        second = train(replace(cfg, num_rounds=2), Store(tmp_path))
    assert second["mask"] == first["mask"]


# ------------------------------------------------------------------ the backup
def break_reads(patch, folder):
    refuse_writes(patch, folder, errno.ENOTCONN)
    for name in ("read_bytes", "glob", "exists", "is_file", "is_dir", "stat"):
        honest = getattr(Path, name)

        def guarded(self, *args, honest=honest, **options):
            if str(folder) in str(self):
                raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
            return honest(self, *args, **options)
        patch.setattr(Path, name, guarded)


def test_a_backup_that_vanishes_and_returns_is_tried_again(tmp_path, monkeypatch, whole):
    store = BackedUpStore(tmp_path / "root", 0.0, backup=tmp_path / "backup")
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def watch(run, state):
            if state.round == 2:
                break_reads(patch, store.backup)
            if state.round == 3:
                patch.undo()
        result = train(SHORT, store, watch=watch)
    assert timeless(result) == timeless(whole)
    assert files(store.root).items() <= files(store.backup).items()


def test_a_backup_that_stays_away_is_caught_up_by_the_next_process(tmp_path, monkeypatch):
    root, backup = tmp_path / "root", tmp_path / "backup"
    with monkeypatch.context() as patch:
        break_reads(patch, backup)
        result = quietly(train, SHORT, quietly(BackedUpStore, root, backup=backup))
    assert result["status"] == "finished"
    assert not backup.exists()
    assert train(SHORT, BackedUpStore(root, backup=backup)) == result
    assert files(root) == files(backup)


def test_a_lost_mount_is_never_replaced_by_a_folder(tmp_path):
    """A folder in its place would hide that the drive is gone, and it could not be mounted."""
    store = BackedUpStore(tmp_path / "root", backup=tmp_path / "drive" / "results")
    shutil.rmtree(tmp_path / "drive")
    with pytest.warns(UserWarning, match="is gone"):
        store.write("a.json", b"{}")
    assert not (tmp_path / "drive").exists()
    (tmp_path / "drive" / "results").mkdir(parents=True)
    store.write("b.json", b"{}")
    assert sorted(p.name for p in store.backup.iterdir()) == ["a.json", "b.json"]


def test_a_store_inside_another_does_not_replace_a_lost_mount_either(tmp_path):
    (tmp_path / "drive" / "project").mkdir(parents=True)
    store = BackedUpStore(tmp_path / "root", backup=tmp_path / "drive" / "project" / "results")
    shutil.rmtree(tmp_path / "drive")
    with pytest.warns(UserWarning, match="cannot be made|is gone"):
        store.inside("part")
    assert not (tmp_path / "drive").exists()


# ------------------------------------------------------------------ two processes, two clocks
def work(root, queue):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_small(patch)
        calls, honest = [], utils.federated_round

        def slow_round(run, state):
            calls.append(1)
            time.sleep(0.2)
            return honest(run, state)
        patch.setattr(utils, "federated_round", slow_round)
        result = train(SHORT, Store(root, minutes=0.0))
    queue.put((result, len(calls), [str(w.message) for w in said]))


def test_of_two_processes_one_trains_and_the_other_waits_for_it(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    (a, rounds_a, said_a), (b, rounds_b, said_b) = (queue.get(timeout=120) for _ in workers)
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
    assert ready.wait(60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it does not wait
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


def test_a_failed_run_frees_its_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils, "open_run", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(SHORT, Store(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


def test_without_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked.*one process"):
        assert train(SHORT, Store(tmp_path))["status"] == "finished"


def test_clocks_and_dates_have_no_say(tmp_path, monkeypatch, whole):
    """The wall clock runs backwards and the files' dates are in the wrong order."""
    now, store = [2e9], Store(tmp_path / "root", minutes=0.0)

    def backwards():
        now[0] -= 1e6
        return now[0]
    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * backwards()))

    def stop(run, state):
        if state.round == 3:
            raise KeyboardInterrupt
    assert train(SHORT, store, watch=stop)["round"] == 3
    for i, name in enumerate(store.names(CKPT)):
        os.utime(store.root / name, (1e9 - 1e6 * i, 1e9 - 1e6 * i))
    assert resumed(SHORT, store).round == 3
    assert timeless(train(SHORT, store)) == timeless(whole)


# ------------------------------------------------------------------ kills
def test_a_short_crash_campaign(tmp_path):
    rows = crash_campaign.campaign(tmp_path, kills=4, seed=1, kinds=["with memory"],
                                   moments=["write", "copied", "json", "delete"])
    assert sum(row[2] for row in rows) == 4


def test_the_campaign_notices_a_run_that_ends_otherwise(tmp_path, monkeypatch):
    reference = crash_campaign.unbroken(SHORT, tmp_path / "whole")
    monkeypatch.setattr(utils, "learning_rate", lambda cfg, progress: 0.04)
    with pytest.raises(AssertionError, match="differs from the unbroken"):
        crash_campaign.cell(SHORT, "write", 1, random.Random(0), tmp_path, reference)
