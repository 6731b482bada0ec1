"""Where runs live: the state of a run, its checkpoints, its result, and what is worth keeping."""
import hashlib
import json
import math
import os
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor

from notebooks.basics import (
    Config,
    Params,
    device,
    digest,
    from_rank_0,
    identity,
    ranks,
    run_name,
)


@dataclass(frozen=True)
class State:
    """All that a run needs to go on. `memory` is what its algorithm carries between rounds:
    momentum buffers, moments, control variates. Clients keep nothing else."""
    params: Params               # the server's trained weights
    round: int = 0               # rounds, or epochs, done
    history: tuple[dict, ...] = ()
    memory: dict[str, Params] = field(default_factory=dict)
    best: Params | None = None   # of the evaluation with the best validation accuracy
    best_round: int = 0
    seconds: float = 0.0
    error: str = ""              # why the run cannot go on


@dataclass
class Store:
    """Where runs live: root/<run>.json, root/checkpoints/<run>/ and root/cache/ (masks, heads).

    A file is written beside its place, synced and renamed: a cut leaves the old one or the new one.
    With a `drive` every file is copied there too, and of two copies the sound one is read; what
    could not be copied is tried again with the next. No date is read: clocks may go backwards.
    """
    root: Path = field(default_factory=lambda: Path(os.environ.get("RESULTS_DIR") or "results"))
    drive: Path | None = None
    minutes: float = 1.0  # least time between two checkpoints of a run
    frozen: bool = False  # only what is stored: nothing is trained or computed
    late: set[str] = field(default_factory=set)  # not on the drive yet

    def __post_init__(self):
        self.root = Path(self.root)
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes={self.minutes} between two checkpoints must be at least 0")
        if not self.drive or self.frozen or ranks()[0]:
            return
        try:  # never made again later: a folder in place of a lost mount would block it
            Path(self.drive).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            warnings.warn(f"no drive for now: {error}", stacklevel=3)
        for kind in ("cache/*.safetensors", "checkpoints/*/*.safetensors", "notes/*.json",
                     "*.json"):  # an earlier process may have died before it could copy them
            for name in self.names(kind):
                here, there = (_size(path) for path in self.places(name))
                self.late |= {name} if here is not None and here != there else set()
        self.sync()

    def places(self, name: str) -> list[Path]:
        return [Path(folder) / name for folder in (self.root, self.drive) if folder]

    def names(self, pattern: str) -> list[str]:
        """What any place has; one that fails counts as empty."""
        found = set()
        for place in self.places(""):
            try:
                found |= {str(f.relative_to(place)) for f in place.glob(pattern)}
            except OSError as error:
                warnings.warn(f"{place} cannot be listed: {error}", stacklevel=2)
        return sorted(found)

    def find(self, name: str) -> bytes | None:
        """The first sound copy of a file, `root` before the drive; None without one."""
        for path in self.places(name):
            try:
                content = path.read_bytes()
                refuse_damaged(name, content)
                return content
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is damaged or unreadable, trying another copy or an older "
                              f"file: {error}", stacklevel=2)
        return None

    def read(self, name: str) -> bytes:
        """As `find`; FileNotFoundError where no place has a sound copy."""
        if (content := self.find(name)) is None:
            raise FileNotFoundError(f"no sound copy of {name} in {self.places('')}")
        return content

    def write(self, name: str, content: bytes):
        """To `root`, then to the drive what it lacks; OSError where `root` takes nothing."""
        if ranks()[0]:  # under torchrun one process does all the writing
            return
        _replace(self.places(name)[0], content)
        self.late |= {name} if self.drive else set()
        self.sync()

    def sync(self):
        """Copies to the drive what it lacks; what fails is tried again with the next file."""
        for waiting in sorted(self.late, key=lambda n: n.endswith(".json")):  # results last
            try:
                self._copy(waiting)
                self.late.discard(waiting)
            except (OSError, ValueError) as error:
                warnings.warn(f"{waiting} is only in {self.root} for now: {error}", stacklevel=2)

    def _copy(self, name: str):
        """A file of `root` to the drive, unless it is gone or damaged since."""
        here, there = self.places(name)
        if here.exists():
            refuse_damaged(name, content := here.read_bytes())
            if not Path(self.drive).is_dir():
                raise FileNotFoundError(f"{self.drive} is gone")
            _replace(there, content)

    def delete(self, name: str):
        if ranks()[0]:
            return
        self.late.discard(name)
        for path in self.places(name):
            try:
                if path.exists():
                    os.truncate(path, 0)  # Drive's bin keeps a deleted file's size
                    path.unlink()
            except OSError as error:  # no reason to stop a run
                warnings.warn(f"{path} cannot be deleted: {error}", stacklevel=2)

    @contextmanager
    def lock(self, cfg: Config):
        """Waits until no other process on this machine trains the run; frees its stale files.

        The lock dies with its process. A file system without locks warns: two processes then do
        the same work, and write the same bytes.
        """
        folder = self.places(f"checkpoints/{run_name(cfg)}")[0]
        with ExitStack() as stack:
            try:
                if ranks()[0] == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    _lock(stack.enter_context(open(folder / "lock", "a")), run_name(cfg))
            except OSError as error:
                warnings.warn(f"{folder} cannot be locked ({error}): start this run in one process "
                              "only", stacklevel=3)
            for pattern in (f"checkpoints/{run_name(cfg)}/*.part", f"{run_name(cfg)}.json.*.part"):
                for part in self.names(pattern):  # of writers that were killed
                    self.delete(part)
            yield

    def result(self, cfg: Config) -> dict | None:
        """The stored result of this run, if any; ValueError where the name holds another run."""
        content = from_rank_0(lambda: self.find(f"{run_name(cfg)}.json"))
        if content is None:
            return None
        result = parse(content)
        if missing := {"identity", "status", "config", "history"} - result.keys():
            raise ValueError(f"{run_name(cfg)}.json is no result of a run, it has no {missing}")
        _refuse_other(cfg, result["identity"])
        return result

    def save(self, cfg: Config, state: State, keep: int = 2, mask: Params | None = None):
        """One file a checkpoint, its SHA-256 in its name; all but the newest `keep` are deleted.

        With a `mask` only the free weights are stored: a finished run needs no more.
        """
        groups = {"params": state.params, **state.memory}
        groups |= {"best": state.best} if state.best is not state.params else {}
        card = {k: getattr(state, k) for k in ("round", "history", "best_round", "seconds")}
        content = pack({f"{group}:{n}": w[mask[n]] if mask else w
                        for group, params in groups.items() for n, w in (params or {}).items()},
                       card=json.dumps(card | {"identity": identity(cfg), "masked": bool(mask),
                                               "names": list(state.params)}))
        folder, sha = f"checkpoints/{run_name(cfg)}", hashlib.sha256(content).hexdigest()
        self.write(f"{folder}/{state.round:07d}_{sha}.safetensors", content)
        for old in self.names(f"{folder}/*.safetensors")[:-keep]:
            self.delete(old)

    def newest(self, folder: str) -> tuple[str, bytes] | None:
        """Name and content of the newest checkpoint that has the SHA-256 of its name."""
        for name in reversed(self.names(f"{folder}/*.safetensors")):
            if (content := self.find(name)) is not None:
                return name, content
        return None

    def resume(self, cfg: Config, like: Params | None = None,
               mask: Params | None = None) -> State | None:
        """The newest checkpoint that verifies; ValueError where the name holds another run, or
        weights of other names, shapes or types than those of `like`, the run's first weights (which
        with the run's mask complete a finished sparse run's)."""
        found = from_rank_0(lambda: self.newest(f"checkpoints/{run_name(cfg)}"))
        if found is None:
            return None
        name, content = found
        try:
            header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
            card = json.loads(header["__metadata__"]["card"])
            other, names, groups = card.pop("identity"), card.pop("names"), {}
            loaded, masked = unpack(content), card.pop("masked", False)
            for n in names:  # in this order: safetensors has another
                for key in [k for k in loaded if k.endswith(f":{n}")]:
                    group, w = key.partition(":")[0], loaded[key].to(device())
                    w = like[n].masked_scatter(mask[n], w) if masked else w
                    groups.setdefault(group, {})[n] = w
            params, best = groups.pop("params"), groups.pop("best", None)
            best = params if best is None and card["best_round"] else best
            state = State(params, card.pop("round"), tuple(card.pop("history")), groups, best,
                          **card)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{name} is no checkpoint of a run: {error!r}") from error
        _refuse_other(cfg, other)
        for kept in filter(None, (state.params, state.best) if like else ()):
            refuse_misfits(name, kept, like)
        return state

    def cached(self, kind: str, key: dict, compute):
        """`compute()` kept under all that it depends on: weights in cache/, JSON in notes/.

        A frozen store that has none gives {}.
        """
        name = f"{kind}_{digest(key)}"
        weights, note = f"cache/{name}.safetensors", f"notes/{name}.json"
        kept = from_rank_0(lambda: (self.find(weights), self.find(note)))
        if kept == (None, None) and not self.frozen:
            value = compute()
            tensors = all(isinstance(v, Tensor) for v in value.values())
            kept = (pack(value, sha256=digest(value)), None) if tensors else (None, dump(value))
            kept = from_rank_0(lambda: kept)  # ranks may differ in a bit: the first one's counts
            self.write(weights if tensors else note, kept[0] or kept[1])
        if kept[0]:
            return {n: w.to(device()) for n, w in unpack(kept[0]).items()}
        return parse(kept[1] or b"{}")


def refuse_damaged(name: str, content: bytes):
    """ValueError unless the content is what was written under this name, as far as it tells.

    A checkpoint's name has its SHA-256; JSON and the cache hold theirs inside (older ones do not).
    """
    if name.startswith("checkpoints/"):
        if not name.endswith(f"_{hashlib.sha256(content).hexdigest()}.safetensors"):
            raise ValueError(f"{len(content)} bytes do not have the SHA-256 of the name")
    elif name.endswith(".safetensors"):
        weights = unpack(content)
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        if header.get("__metadata__", {}).get("sha256", sha := digest(weights)) != sha:
            raise ValueError("the tensors do not have the SHA-256 stored with them")
    elif name.endswith(".json"):
        parse(content)


def refuse_misfits(name: str, params: Params, like: Params):
    """ValueError unless the weights have the names, shapes and types of `like`."""
    kinds = [{n: (tuple(w.shape), str(w.dtype)) for n, w in p.items()} for p in (params, like)]
    if wrong := [n for n in kinds[0].keys() | kinds[1].keys()
                 if kinds[0].get(n) != kinds[1].get(n)]:
        raise ValueError(f"{name} does not fit the model, (stored, model) are "
                         f"{ {n: tuple(k.get(n) for k in kinds) for n in sorted(wrong)[:5]} }")


def pack(params: Params, **metadata: str) -> bytes:
    return safetensors.torch.save({n: w.contiguous() for n, w in params.items()}, metadata)


def unpack(content: bytes) -> Params:
    """The tensors in a safetensors file, which holds no code; ValueError where it is none."""
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # its own kind, or whatever a foreign header leads to
        raise ValueError(f"not a file of tensors: {error!r}") from error


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _lock(file, run: str):
    """Locks the open file, waiting for the process that holds it."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError("this system has no file locks") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        warnings.warn(f"another process trains {run}: waiting until it is done", stacklevel=4)
        fcntl.flock(file, fcntl.LOCK_EX)


def _replace(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # half a file would keep a full disk full
        raise OSError(error.errno, f"{error.strerror or error}: {len(content)} bytes cannot be "
                      "written; what is stored is whole. Make room or access and run again",
                      str(path)) from error


def _refuse_other(cfg: Config, stored: dict):
    asked = identity(cfg)
    if differ := {k: (asked.get(k), stored.get(k)) for k in asked.keys() | stored.keys()
                  if asked.get(k) != stored.get(k)}:
        raise ValueError(
            f"{run_name(cfg)} is stored as another run. They differ in (asked, stored): {differ}. "
            "Choose another name, or leave name='' to have one derived.")


def dump(value: dict) -> bytes:
    """JSON with its own SHA-256; a NaN is a ValueError here rather than a broken file later."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain | {"sha256": digest(plain)}, indent=1).encode()


def parse(content: bytes) -> dict:
    """What was dumped; ValueError where it is not whole (older files have no SHA-256)."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a dict is wanted, not {str(value)[:50]}")
    sha = value.pop("sha256", None)
    if sha and sha != digest(value):
        raise ValueError("it does not have the SHA-256 stored in it")
    return value
