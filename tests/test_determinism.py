"""The same configuration gives the same result, anywhere, and it says how to repeat it."""
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace

import nbclient
import nbformat
import pytest
import torch
from helpers import CFG, make_small

import utils
from utils import ROOT, Config, Store, backbone, build_model, code_version, digest, run_name, train

RUN = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5, num_rounds=3)
ELSEWHERE = """
import json, sys
sys.path[:0] = ["{root}/tests", "{root}"]
from dataclasses import replace
import pytest, torch, utils
from helpers import CFG, make_small
torch.set_num_threads(1)
make_small(pytest.MonkeyPatch())
cfg = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5, num_rounds=3)
utils.train(cfg, utils.Store("{folder}"))
"""


def timeless(result):
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return train(RUN, Store(tmp_path_factory.mktemp("here")))


def found(folder):
    return Store(folder, frozen=True).result(RUN)


def test_a_process_of_the_shell_gives_the_same_json(here, tmp_path):
    code = ELSEWHERE.format(root=ROOT, folder=tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"})
    result = found(tmp_path)
    assert timeless(result) == timeless(here)
    assert result["seconds"] > 0


def test_two_threads_give_the_same_within_rounding(here, tmp_path):
    """Sums in another order: the last bits may differ, what is measured may not."""
    def work():
        torch.set_num_threads(2)
        with pytest.MonkeyPatch.context() as patch:
            make_small(patch)
            train(RUN, Store(tmp_path))
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    result = found(tmp_path)
    assert (here["threads"], result["threads"]) == (1, 2)
    for a, b in zip(here["history"], result["history"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
    assert result["test"]["loss"] == pytest.approx(here["test"]["loss"], rel=1e-3)
    assert result["backbone"] == here["backbone"]


def test_a_notebook_gives_the_same_json(here, tmp_path):
    code = ELSEWHERE.format(root=ROOT, folder=tmp_path)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert timeless(found(tmp_path)) == timeless(here)


def test_a_result_stores_what_is_needed_to_repeat_it(here, tmp_path, monkeypatch):
    make_small(monkeypatch)
    again = Config(**here["config"])
    assert again == RUN
    assert run_name(again) == here["run"]
    assert timeless(train(again, Store(tmp_path))) == timeless(here)
    assert here["code"] == code_version()
    assert here["versions"].keys() == {"torch", "torchvision", "timm", "numpy"}
    assert here["python"] == sys.version.split()[0]
    assert here["threads"] == torch.get_num_threads()
    assert here["device"] == "cpu"
    assert here["hardware"]
    assert here["backbone"] == digest(backbone(build_model(RUN)))
    assert len(here["mask"]["sha256"]) == 64


def test_the_code_version_is_that_of_every_module(tmp_path, monkeypatch):
    for name in ("utils.py", *(f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.py"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    assert code_version() == code_version()
    before = code_version()
    monkeypatch.setattr("notebooks.basics.ROOT", tmp_path)
    assert code_version() == before
    for path in [tmp_path / "utils.py", *(tmp_path / "notebooks").glob("*.py")]:
        path.write_text(path.read_text() + "\n")
        changed = code_version()
        assert changed != before
        before = changed


def test_a_stored_json_has_no_number_that_json_lacks(here):
    json.dumps(here, allow_nan=False)
    assert utils.dump(here)
