"""The house: utils.py stands alone, reads from top to bottom and is plain; imports only go down."""
import ast
import graphlib
import io
import os
import re
import shutil
import subprocess
import symtable
import sys
import tokenize
import tomllib

import pytest

import utils
from utils import ROOT

FOLDERS = ("notebooks", "distributed", "report", "benchmarks")
MODULES = ["utils.py", *sorted(str(f.relative_to(ROOT)) for folder in FOLDERS
                               for f in (ROOT / folder).rglob("*.py"))]
UTILS_LINES = 2760  # a ceiling, so that what is added is noticed
BELOW = {  # what a module or folder may import, beside its own folder's modules outside notebooks/
    "utils": set(),
    "notebooks.backup": {"utils"},
    "notebooks.extension": {"utils"},
    "notebooks.experiments": {"utils", "notebooks.backup", "notebooks.extension"},
    "notebooks.figures": {"utils", "notebooks.backup", "notebooks.extension",
                          "notebooks.experiments"},
    "notebooks.start": set(),  # it finds and loads the others by their paths
    "distributed": {"utils", "notebooks.extension", "distributed"},
    "report": {"utils", "notebooks.experiments", "notebooks.extension", "report"},
    "benchmarks": {"utils", "notebooks.backup", "notebooks.experiments", "notebooks.extension",
                   "distributed", "benchmarks"},
}
ALONE = """
import pathlib, sys
import utils
assert pathlib.Path(utils.__file__).parent == pathlib.Path.cwd()
assert not {"ipywidgets", "matplotlib", "pandas", "seaborn", "IPython"} & set(sys.modules)

cfg = utils.preset("demo", weights="none", head="train", num_rounds=2, eval_every=1,
                   num_clients=50, eval_images=50, local_steps=1, batch_size=4)
assert cfg.dataset == "synthetic"

def stop(run, state):
    if state.round == 1:
        raise KeyboardInterrupt
stopped = utils.train_federated(cfg, utils.Store("results", minutes=0), watch=stop)
assert (stopped["status"], stopped["round"]) == ("interrupted", 1), stopped

result = utils.train_federated(cfg, utils.Store("results"))
assert [row["round"] for row in result["history"]] == [0, 1, 2]
assert [part["after_round"] for part in result["segments"]] == [0, 1]

utils.open_run = None  # nothing is trained again
assert utils.train_federated(cfg, utils.Store("results")) == result
"""


def source(module: str) -> str:
    return (ROOT / module).read_text(encoding="utf-8")


# ------------------------------------------------------------------ alone
def fresh_process(code: str, folder):
    """Runs code in a new Python that sees no project but what lies in `folder`, and no network."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RESULTS_DIR")}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    kept |= nowhere | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(folder / "data")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=kept, capture_output=True,
                          text=True, check=False)


def test_utils_alone_in_a_folder_trains_stores_and_resumes(tmp_path):
    shutil.copy(ROOT / "utils.py", tmp_path)
    done = fresh_process(ALONE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stderr


def test_a_worker_imports_no_widgets_and_draws_nothing():
    code = """
import importlib, sys
sys.path.append("distributed")
for module in ("utils", "notebooks.extension", "distributed.train", "torchrun"):
    importlib.import_module(module)
    bad = {"ipywidgets", "matplotlib", "seaborn", "IPython"} & set(sys.modules)
    assert not bad, (module, bad)
"""
    done = fresh_process(code, ROOT)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ imports only go down
def full_name(module: str) -> str:
    return module.removesuffix(".py").replace("/", ".")


# Beside a script its folder is on the path: there "train" is distributed.train.
BY_STEM = {full_name(m).rpartition(".")[2]: full_name(m) for m in MODULES}


def imported(text: str, own: str = "") -> set[str]:
    """Full names of the project's other modules that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        first, _, rest = name.partition(".")
        if first in FOLDERS:
            found.add(f"{first}.{rest.partition('.')[0]}")
        elif first in BY_STEM:
            found.add(BY_STEM[first])
        elif first in ("tests", "helpers", "conftest"):
            found.add(first)
    return found - {own}  # a script may import itself by its own name


def test_all_ways_of_importing_are_seen():
    text = ("import os, utils\nfrom distributed import app\nfrom notebooks.figures import panel\n"
            "def f():\n    import train\n    from helpers import CFG\n")
    assert imported(text) == {"utils", "distributed.app", "notebooks.figures",
                              "distributed.train", "helpers"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    name = full_name(module)
    allowed = BELOW.get(name, BELOW.get(name.partition(".")[0]))
    assert allowed is not None, f"{module} has no place in the house"
    wrong = {found for found in imported(source(module), name)
             if found not in allowed and found.partition(".")[0] not in allowed}
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imported(source(module), name)
             for module, name in zip(MODULES, map(full_name, MODULES), strict=True)}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError where there is one


def test_the_public_names_are_a_contract():
    assert 40 <= len(utils.__all__) <= 50
    assert len(set(utils.__all__)) == len(utils.__all__)
    assert not [name for name in utils.__all__ if not hasattr(utils, name)]


# ------------------------------------------------------------------ each section uses earlier ones
def globals_used(table: symtable.SymbolTable) -> set[str]:
    used = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return used.union(*[globals_used(child) for child in table.get_children()])


def test_no_section_of_utils_uses_a_later_one():
    text = source("utils.py")
    banners = [i for i, line in enumerate(text.splitlines(), 1) if re.match(r"# -{10}", line)]
    assert len(banners) > 8

    def section(line):
        return sum(banner <= line for banner in banners)

    home = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            home[node.name] = section(node.lineno)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                home[target.id] = section(node.lineno)
    wrong = [f"{table.get_name()} uses {name}"
             for table in symtable.symtable(text, "utils.py", "exec").get_children()
             for name in globals_used(table)
             if home.get(name, 0) > section(table.get_lineno())]
    assert not wrong


# ------------------------------------------------------------------ plain code
def measures(text: str) -> tuple[float, float, int]:
    """Syntax nodes a code line, comments per 100 code lines, walrus operators.

    Code lines are those without imports, docstrings, comments and blanks.
    """
    tree = ast.parse(text)
    left_out = set()
    for node in ast.walk(tree):
        a_string = (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str))
        if a_string or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    code = {i for i, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and i not in left_out}
    nodes = sum(getattr(node, "lineno", 0) in code for node in ast.walk(tree))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    walrus = sum(isinstance(node, ast.NamedExpr) for node in ast.walk(tree))
    return nodes / len(code), 100 * comments / len(code), walrus


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__.py")])
def test_code_is_plain(module):
    density, comments, walrus = measures(source(module))
    assert density <= 7.5
    assert walrus == 0
    if module == "utils.py":
        assert comments >= 10
        assert len(source(module).splitlines()) <= UTILS_LINES


def test_the_measures_by_hand():
    text = '"""Doc."""\nimport os\n\n# why\nx = "#"  # one\nif (y := x):\n    pass\n'
    # code lines: x = "#"; if; pass. Nodes: Assign, Name, Constant; If, NamedExpr, 2 Names; Pass
    assert measures(text) == (8 / 3, 200 / 3, 1)


def test_mutants_are_made_beside_all_that_their_tests_import():
    settings = tomllib.loads(source("pyproject.toml"))["tool"]["mutmut"]
    there = {*settings["source_paths"], *settings["also_copy"]}
    for test in settings["pytest_add_cli_args_test_selection"]:
        used = {name.partition(".")[0] for name in imported(source(test))} & {"utils", *FOLDERS}
        assert used <= {name.removesuffix(".py") for name in there}, test


def without_encoding(text: str) -> list[int]:
    """Lines that open, read or write a text file in whatever encoding the platform prefers."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = [ast.unparse(value) for value in [*node.args, *(k.value for k in node.keywords)]]
        binary = called == "open" and any(re.fullmatch(r"'[rwax+]*b[rwax+]*'", g) for g in given)
        text_file = called in ("open", "read_text", "write_text") and not binary
        if text_file and "'utf-8'" not in given:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_text_files_are_utf8_whatever_the_platform_prefers(module):
    assert without_encoding(source(module)) == []


def test_a_missing_encoding_is_seen():
    assert without_encoding("open(f)\nopen(f, 'rb')\np.read_text('utf-8')\np.write_text(t)\n"
                            "open(f, 'w', encoding='utf-8')\np.open()\n") == [1, 4, 6]
