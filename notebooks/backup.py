"""Results that outlive the machine: a working copy on its disk, and a backup such as Google Drive.

A session in Colab loses its disk when it ends, and reading from Drive is slow. Runs therefore read
and write on the disk; what the backup has is restored at the start, and what it lacks is copied
after every write. A backup that is full or gone never stops a run.
"""
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from utils import Config, Store, names_in, parse_result, run_name, write_whole

RESULTS = ("*.json", "*.npy", "notes/*.json")
CHECKPOINTS = "checkpoints/*/*.safetensors"
WEIGHTS = (CHECKPOINTS, "cache/*.safetensors")


@dataclass
class BackedUpStore(Store):
    """A `Store` with a second copy of all its files in the folder `backup`; None keeps none."""
    backup: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        self._pending = set()  # not in the backup yet
        self._in_backup = set()  # names of its checkpoints, so that looking lists no drive
        if self.backup is not None:
            self.backup = Path(self.backup).expanduser()
            self._restore()

    def folders(self) -> list[Path]:
        if self.backup is None:
            return [self.root]
        return [self.root, self.backup]

    def inside(self, folder: str) -> "BackedUpStore":
        """The store of a folder inside this one, and inside its backup."""
        backup = None if self.backup is None else self.backup / folder
        return replace(self, root=self.root / folder, backup=backup)

    def write(self, name: str, content: bytes):
        """To `root`, then to the backup what it lacks; OSError where `root` takes nothing."""
        super().write(name, content)
        if self.backup is not None:
            self._pending.add(name)
            self.copy_pending()

    def delete(self, name: str):
        super().delete(name)
        self._in_backup.discard(name)

    def known_checkpoints(self, cfg: Config) -> list[Path]:
        """The run's checkpoints, the oldest first, each in the working copy where that has it.

        Those of the backup as they were listed at the start, and written and deleted since.
        """
        folder = f"checkpoints/{run_name(cfg)}"
        here = names_in(self.root, f"{folder}/*.safetensors")
        there = {name for name in self._in_backup if name.startswith(f"{folder}/")}
        found = []
        for name in sorted(there.union(here)):
            place = self.root if name in here else self.backup
            found.append(place / name)
        return found

    def result(self, cfg: Config) -> dict | None:
        """The stored result of this run, if any: from the backup where the working copy is damaged.

        Raises ValueError where the name holds another run.
        """
        name = f"{run_name(cfg)}.json"
        was_here = (self.root / name).is_file()
        found = super().result(cfg)
        if found is not None or not was_here or self.frozen or self.backup is None:
            return found
        # The damaged file has just been put aside.
        if (self.backup / name).is_file() and parse_result(self.backup / name) is not None:
            self._copy(name, self.backup, self.root)
        return super().result(cfg)

    def copy_pending(self):
        """Copies to the backup what it lacks; results last, so that what they name is there."""
        if not os.path.isdir(self.backup):
            # A folder in its place would hide that the drive is gone, and it could not come back.
            warnings.warn(f"{self.backup} is gone: files stay in {self.root} until it is back",
                          stacklevel=3)
            return
        for name in sorted(self._pending, key=lambda n: n.endswith(".json")):
            if not (self.root / name).exists():
                self._pending.discard(name)  # deleted meanwhile
            elif self._copy(name, self.root, self.backup):
                self._pending.discard(name)
                if name.startswith("checkpoints/"):
                    self._in_backup.add(name)

    def _restore(self):
        """Copies results from the backup, and notes what the backup lacks of an earlier process."""
        try:
            # Not the folders above these: in the place of a drive that is gone they would hide it.
            for folder in (self.backup.parent, self.backup):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            warnings.warn(f"{self.backup} cannot be made: {error}", stacklevel=5)
        for pattern in RESULTS:
            for name in names_in(self.backup, pattern):
                if not self._is_copied(name) and not self._is_newer(name):
                    self._copy(name, self.backup, self.root)
        self._in_backup = set(names_in(self.backup, CHECKPOINTS))
        if self.frozen:
            return
        for pattern in RESULTS + WEIGHTS:
            names = names_in(self.root, pattern)
            self._pending |= {name for name in names if not self._is_copied(name)}
        self.copy_pending()

    def _is_copied(self, name: str) -> bool:
        """By size and time as well as by name: the backup may hold another version."""
        try:
            there = (self.backup / name).stat()
            here = (self.root / name).stat()
        except OSError:
            return False
        # a copy has the time of what it is a copy of; a drive may keep whole seconds alone
        same_time = abs(there.st_mtime - here.st_mtime) < 1
        return there.st_size == here.st_size and same_time

    def _is_newer(self, name: str) -> bool:
        """In `root`: else another machine has made it anew meanwhile, and its version is taken."""
        try:
            return (self.root / name).stat().st_mtime > (self.backup / name).stat().st_mtime
        except OSError:
            return False

    def _copy(self, name: str, source: Path, target: Path) -> bool:
        try:
            write_whole(target / name, (source / name).read_bytes())
        except OSError as error:
            warnings.warn(f"{name} could not be copied to {target}: {error}. It is tried again "
                          "with the next file.", stacklevel=2)
            return False
        with suppress(OSError):  # a drive may not let times be set: the copy is there all the same
            times = (source / name).stat()
            os.utime(target / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        return True
