"""What the setup cell of every notebook does, and the one place that holds the project's address.

The cell finds the project's folder and runs this file there, every time it is run:

    1. the folder of the notebook (which VS Code and Jupyter name), the kernel's folder, and all
       that these lie in;
    2. MyDrive/fl-task-arithmetic on Google Drive;
    3. a clone of REPOSITORY, made only where none of these is the project.

A folder is the project where it has notebooks/experiments.py and our own utils.py. A Drive folder
that has our utils.py alone, with edits perhaps, lends that file to the clone.

After a change of REPOSITORY or SETUP_CELL here, `python notebooks/start.py` writes them into the
notebooks.
"""
import json
import os
import shutil
import sys
from pathlib import Path

# The address of your own copy, such as https://github.com/<you>/<name>. It stays empty until there
# is one: an address that nobody has registered yet could be registered by anyone.
REPOSITORY = ""

SETUP_CELL = '''\
import contextlib, os, runpy, subprocess
from pathlib import Path
REPOSITORY = os.environ.get("REPOSITORY", "{address}")  # its one home is notebooks/start.py
DRIVE, CLONE = Path("/content/drive/MyDrive/fl-task-arithmetic"), Path("clone").absolute()
with contextlib.suppress(Exception):  # only Colab has a Drive, and it may be refused
    from google.colab import drive
    drive.mount("/content/drive")
files = [globals().get("__vsc_ipynb_file__"), os.environ.get("JPY_SESSION_NAME"), "notebook"]
places = [p for file in files if file for p in Path(file).absolute().parents] + [DRIVE, CLONE]
found = [p for p in places if (p / "notebooks/experiments.py").is_file()
         and any("def register_rule" in f.read_text("utf-8", "ignore") for f in p.glob("utils.py"))]
assert found or REPOSITORY, "No project here or on Drive: put its folder there, or set REPOSITORY"
if not found:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, CLONE], check=True)
runpy.run_path(str([*found, CLONE][0] / "notebooks/start.py"), dict(DRIVE=DRIVE), "setup");'''

BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook})")


# ------------------------------------------------------------------ in a notebook
def begin(home: Path, drive: Path):
    """Makes the project in `home` importable, and says which folder and which utils.py is used."""
    print(f"The project is {home}")
    sys.path[:] = [str(home), *(p for p in sys.path if p != str(home))]
    lend_utils(home, drive)

    imported = sys.modules.get("utils")
    if imported is not None and Path(imported.__file__).parent != home:
        print(f"RESTART THE KERNEL: this one has imported {imported.__file__}, which is another.")
    on_drive = drive.parent.is_dir()
    if "google.colab" in sys.modules and not on_drive:
        print("NO DRIVE: what this session trains ends with it. Run this cell again to allow it.")
    if on_drive and not (home / "data").exists():
        # reading 50,000 images from Drive takes longer than downloading them
        os.environ.setdefault("DATA_DIR", str(Path("data").absolute()))
    reload_edits()


def lend_utils(home: Path, drive: Path):
    """Copies our utils.py of a Drive folder that holds no whole project over that of the clone."""
    lent = drive / "utils.py"
    whole = (drive / "notebooks/experiments.py").is_file()
    is_clone = home == Path("clone").absolute()
    if whole or not is_clone or not is_ours(lent):
        return
    print(f"with {lent}")
    if lent.read_bytes() != (home / "utils.py").read_bytes():
        shutil.copyfile(lent, home / "utils.py")


def is_ours(path: Path) -> bool:
    """Whether a file is this project's utils.py, edited or not, rather than one of that name."""
    return path.is_file() and "def register_rule" in path.read_text("utf-8", "ignore")


def reload_edits():
    """Edits of the modules beside the notebooks count from the next cell on; utils.py's do not.

    Its tables of algorithms and rules would lose what other modules and cells have registered:
    `figures.say_edited` tells to restart instead.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    shell.run_line_magic("load_ext", "autoreload")
    shell.run_line_magic("autoreload", "1")
    for name in ("experiments", "figures"):
        shell.run_line_magic("aimport", f"notebooks.{name}")


# ------------------------------------------------------------------ into the notebooks
def write_setup(folder: Path, address: str):
    """Writes the setup cell, and with an address the badge that opens Colab, into all notebooks."""
    for path in sorted(folder.glob("0*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = notebook["cells"]
        setup = next(cell for cell in cells if cell["cell_type"] == "code")
        setup["source"] = SETUP_CELL.format(address=address).splitlines(keepends=True)

        title = [line for line in cells[0]["source"] if not line.startswith("[![Open in Colab]")]
        title = "".join(title).replace("\n\n\n", "\n\n").splitlines(keepends=True)
        if address:
            badge = BADGE.format(path=address.removeprefix("https://github.com/"),
                                 notebook=path.name)
            title[1:1] = ["\n", f"{badge}\n"]
        cells[0]["source"] = title
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "setup":
    begin(Path(__file__).resolve().parent.parent, DRIVE)  # noqa: F821, the cell's own
if __name__ == "__main__":
    write_setup(Path(__file__).resolve().parent, REPOSITORY)
