"""Where runs live: the state of a run, its checkpoints, its result, and what is worth keeping."""
import hashlib
import json
import os
import warnings
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
    With a `drive` every file is copied there too, and looked for there; what could not be copied is
    tried again with the next.
    """
    root: Path = field(default_factory=lambda: Path(os.environ.get("RESULTS_DIR") or "results"))
    drive: Path | None = None
    minutes: float = 1.0  # least time between two checkpoints of a run
    frozen: bool = False  # only what is stored: nothing is trained or computed
    late: set[str] = field(default_factory=set)  # not on the drive yet

    def places(self, name: str) -> list[Path]:
        return [Path(folder) / name for folder in (self.root, self.drive) if folder]

    def names(self, pattern: str) -> list[str]:
        return sorted({str(f.relative_to(p)) for p in self.places("") for f in p.glob(pattern)})

    def read(self, name: str) -> bytes:
        """The file's content, from the drive where `root` has none; FileNotFoundError without."""
        return next((p for p in self.places(name) if p.exists()), Path(name)).read_bytes()

    def find(self, name: str) -> bytes | None:
        return self.read(name) if self.names(name) else None

    def write(self, name: str, content: bytes):
        if ranks()[0]:  # under torchrun one process does all the writing
            return
        _replace(self.places(name)[0], content)
        self.late |= {name} if self.drive else set()
        for waiting in sorted(self.late, key=lambda n: n.endswith(".json")):  # results last
            try:
                _replace(self.places(waiting)[1], self.places(waiting)[0].read_bytes())
                self.late.discard(waiting)
            except OSError as error:
                warnings.warn(f"{waiting} is only in {self.root} for now: {error}", stacklevel=2)

    def delete(self, name: str):
        if ranks()[0]:
            return
        self.late.discard(name)
        for path in filter(Path.exists, self.places(name)):
            try:
                os.truncate(path, 0)  # Drive's bin keeps a deleted file's size
                path.unlink()
            except OSError as error:  # no reason to stop a run
                warnings.warn(f"{path} cannot be deleted: {error}", stacklevel=2)

    def result(self, cfg: Config) -> dict | None:
        """The stored result of this run, if any; ValueError where the name holds another run."""
        content = from_rank_0(lambda: self.find(f"{run_name(cfg)}.json"))
        if content is None:
            return None
        result = json.loads(content)
        _refuse_other(cfg, result["identity"])
        return result

    def save(self, cfg: Config, state: State, keep: int = 2):
        """One file a checkpoint, its SHA-256 in its name; all but the newest `keep` are deleted."""
        groups = {"params": state.params, **state.memory}
        groups |= {"best": state.best} if state.best_round != state.round else {}
        card = {k: getattr(state, k) for k in ("round", "history", "best_round", "seconds")}
        content = safetensors.torch.save(
            {f"{group}:{n}": w.contiguous() for group, params in groups.items()
             for n, w in (params or {}).items()},
            {"card": json.dumps(card | {"identity": identity(cfg), "names": list(state.params)})})
        folder, sha = f"checkpoints/{run_name(cfg)}", hashlib.sha256(content).hexdigest()
        self.write(f"{folder}/{state.round:07d}_{sha}.safetensors", content)
        for old in self.names(f"{folder}/*.safetensors")[:-keep]:
            self.delete(old)

    def newest(self, folder: str) -> bytes | None:
        """The newest checkpoint in the folder that has the SHA-256 of its name."""
        for name in reversed(self.names(f"{folder}/*.safetensors")):
            content = self.read(name)
            if name.endswith(f"_{hashlib.sha256(content).hexdigest()}.safetensors"):
                return content
            warnings.warn(f"{name} is damaged: trying an older checkpoint", stacklevel=3)
        return None

    def resume(self, cfg: Config) -> State | None:
        """The newest checkpoint that verifies; ValueError where the name holds another run."""
        content = from_rank_0(lambda: self.newest(f"checkpoints/{run_name(cfg)}"))
        if content is None:
            return None
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        card = json.loads(header["__metadata__"]["card"])
        _refuse_other(cfg, card.pop("identity"))
        loaded, groups = safetensors.torch.load(content), {}
        for n in card.pop("names"):  # in this order: safetensors has another
            for key in [k for k in loaded if k.endswith(f":{n}")]:
                groups.setdefault(key.partition(":")[0], {})[n] = loaded[key].to(device())
        params, best = groups.pop("params"), groups.pop("best", None)
        best = params if card["best_round"] == card["round"] else best
        card["history"] = tuple(card["history"])
        return State(params, memory=groups, best=best, **card)

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
            kept = (safetensors.torch.save(value), None) if tensors else (None, dump(value))
            kept = from_rank_0(lambda: kept)  # ranks may differ in a bit: the first one's counts
            self.write(weights if tensors else note, kept[0] or kept[1])
        if kept[0]:
            return {n: w.to(device()) for n, w in safetensors.torch.load(kept[0]).items()}
        return json.loads(kept[1] or "{}")


def _replace(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _refuse_other(cfg: Config, stored: dict):
    asked = identity(cfg)
    if differ := {k: (asked.get(k), stored.get(k)) for k in asked.keys() | stored.keys()
                  if asked.get(k) != stored.get(k)}:
        raise ValueError(
            f"{run_name(cfg)} is stored as another run. They differ in (asked, stored): {differ}. "
            "Choose another name, or leave name='' to have one derived.")


def dump(value) -> bytes:
    """JSON; a NaN is a ValueError here rather than a broken file later."""
    return json.dumps(value, indent=1, allow_nan=False).encode()
