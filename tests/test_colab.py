"""The setup cell, in a fresh process: which folder it finds, in Colab and elsewhere.

`google.colab` is a stub; the cell is the notebooks' own, run in a folder of its own, with the
project's files as they are but a utils.py that imports nothing. Then figures and results on the
(stubbed) Drive after the local disk was wiped.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import CFG, make_small

import utils
from notebooks import experiments, figures, start
from notebooks.experiments import open_session, run_name, train_all

ROOT = Path(utils.__file__).parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/0*.ipynb"))
OURS = 'def register_rule():\n    """Ours."""\nWHO = {who!r}\n'
FOREIGN = "WHO = 'somebody else'\n"
# Runs the cell as a kernel would, then says what a notebook would import.
KERNEL = """
import json, os, sys, types
content, variables, mounts = json.loads(sys.argv[1])
if mounts is not None:
    def mount(at):
        if not mounts:
            raise ValueError("mount failed")
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mount)
    sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}
names = dict(variables)
cell = open(sys.argv[2], encoding="utf-8").read().replace("/content", content)
for _ in range(2):  # it may be run again
    exec(cell, names)
import utils
from notebooks import experiments
print(json.dumps(dict(utils=utils.__file__, who=utils.WHO, experiments=experiments.__file__)))
"""


def setup_cell(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if c.cell_type == "code")


def put_project(folder: Path, who: str):
    """What the setup cell looks for, with a utils.py that says whose it is."""
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks/start.py", folder / "notebooks")
    (folder / "notebooks/experiments.py").write_text("")
    (folder / "notebooks/figures.py").write_text("")
    (folder / "utils.py").write_text(OURS.format(who=who))


@pytest.fixture
def place(tmp_path):
    """Runs the setup cell in a folder; `.remote` is a repository to clone from."""
    content = tmp_path / "content"
    content.mkdir()
    cell = tmp_path / "cell.py"
    cell.write_text(setup_cell(NOTEBOOKS[0]), encoding="utf-8")

    def run(folder=content, variables=None, drive=None, environment=None):
        kept = {k: v for k, v in os.environ.items()
                if k not in ("PYTHONPATH", "JPY_SESSION_NAME", "REPOSITORY", "DATA_DIR")}
        given = json.dumps([str(content), variables or {}, drive])
        return subprocess.run([sys.executable, "-c", KERNEL, given, str(cell)], cwd=folder,
                              env=kept | (environment or {}), capture_output=True, text=True)
    run.content = content
    run.drive = content / "drive/MyDrive/fl-task-arithmetic"
    run.remote = tmp_path / "remote"
    return run


def put_remote(folder: Path):
    put_project(folder, "clone")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def found(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------ the cell
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_the_setup_cell_and_the_address_of_start_py(path):
    assert setup_cell(path) == start.SETUP_CELL.format(address=start.REPOSITORY)
    assert len(setup_cell(path).splitlines()) <= 15
    assert "github.com" not in path.read_text(encoding="utf-8") or start.REPOSITORY


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_parameters_cell_derives_nothing(path):
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    names = {}
    exec(cell.source, {"os": os}, names)
    assert list(names) == ["PRESET", "SEEDS", "HOURS", "WORKERS", "ON_CPU", "TENSORBOARD"]
    assert all(value is None or isinstance(value, str | bool) for value in names.values())


def test_notebooks_are_committed_without_outputs_and_in_short_cells():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs
                assert len(cell.source.splitlines()) <= 15


# ------------------------------------------------------------------ which folder
def test_the_projects_own_folder(place):
    home = place.content / "project"
    put_project(home, "mine")
    done = place(home / "notebooks")
    assert found(done)["who"] == "mine"
    assert f"The project is {home}" in done.stdout


@pytest.mark.parametrize("told_by", ["vscode", "jupyter"])
def test_a_kernel_that_starts_in_the_home_folder_finds_the_notebooks_own(place, told_by):
    home = place.content / "project"
    put_project(home, "mine")
    notebook = str(home / "notebooks/03_noniid_grid.ipynb")
    if told_by == "vscode":
        done = place(variables={"__vsc_ipynb_file__": notebook})
    else:
        done = place(environment={"JPY_SESSION_NAME": notebook})
    assert found(done)["who"] == "mine"


def test_a_checkout_at_hand_is_used_even_where_a_drive_has_another(place):
    put_project(place.content / "project", "mine")
    put_project(place.drive, "drive")
    assert found(place(place.content / "project/notebooks", drive=True))["who"] == "mine"


def test_a_whole_drive_folder(place):
    put_project(place.drive, "drive")
    done = place(drive=True)
    assert found(done)["who"] == "drive"
    assert str(place.drive) in found(done)["experiments"]


def test_a_drive_folder_with_an_edited_utils_alone_lends_it_to_the_clone(place):
    put_remote(place.remote)
    place.drive.mkdir(parents=True)
    (place.drive / "utils.py").write_text(OURS.format(who="edited on Drive"))
    done = place(drive=True, environment={"REPOSITORY": str(place.remote)})
    assert found(done)["who"] == "edited on Drive"
    assert str(place.content / "clone") in found(done)["experiments"]
    assert f"with {place.drive / 'utils.py'}" in done.stdout


def test_a_foreign_utils_is_ignored_on_drive_and_in_the_working_folder(place):
    put_remote(place.remote)
    place.drive.mkdir(parents=True)
    for folder in (place.drive, place.content):
        (folder / "utils.py").write_text(FOREIGN)
    done = place(drive=True, environment={"REPOSITORY": str(place.remote)})
    assert found(done)["who"] == "clone"
    assert (place.content / "utils.py").read_text() == FOREIGN


def test_an_empty_place_without_an_address_says_what_to_do(place):
    done = place(drive=True)
    assert done.returncode != 0
    assert "put its folder there, or set REPOSITORY" in done.stderr
    assert not (place.content / "clone").exists()


def test_an_empty_place_with_an_address_is_filled_by_a_clone_once(place):
    put_remote(place.remote)
    done = place(environment={"REPOSITORY": str(place.remote)})
    assert found(done)["who"] == "clone"
    (place.content / "clone/utils.py").write_text(OURS.format(who="edited in the clone"))
    again = place(environment={"REPOSITORY": str(place.remote)})
    assert found(again)["who"] == "edited in the clone"


def test_a_refused_drive_is_said_loudly(place):
    put_project(place.content / "project", "mine")
    done = place(place.content / "project", drive=False)
    assert found(done)["who"] == "mine"
    assert "NO DRIVE" in done.stdout


def test_the_address_and_the_badge_are_written_into_the_notebooks_and_taken_out(tmp_path):
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path)
    start.write_setup(tmp_path, "https://github.com/us/ours")
    text = (tmp_path / NOTEBOOKS[0].name).read_text(encoding="utf-8")
    assert '\\"https://github.com/us/ours\\"' in text
    assert f"github/us/ours/blob/main/notebooks/{NOTEBOOKS[0].name}" in text
    start.write_setup(tmp_path, "")
    for path in NOTEBOOKS:
        assert (tmp_path / path.name).read_text() == path.read_text()


# ------------------------------------------------------------------ what a Drive keeps
def test_after_the_local_disk_was_wiped_runs_and_figures_are_on_the_drive(tmp_path, monkeypatch):
    make_small(monkeypatch)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "no data"))
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "local"))
    monkeypatch.delenv("TRAIN", raising=False)
    drive = tmp_path / "drive"
    first = open_session("small", 1, drive, workers=1)
    assert not train_all([CFG], first)
    fig, _ = figures.figure()
    figures.save_figure(first, fig, "a", "nothing")
    shutil.rmtree(tmp_path / "local")

    again = open_session("small", 1, drive, workers=1)
    assert again.store.result(CFG)["test"]["top1"] >= 0
    assert (drive / "results" / f"{run_name(CFG)}.npy").is_file()
    assert (drive / "figures/a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(experiments, "train", lambda *a, **k: pytest.fail("trained again"))
    assert train_all([CFG], again) == []
