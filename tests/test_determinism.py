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
from helpers import CFG, make_small, timeless

from utils import ROOT, Config, Store, run_name, train

RUN = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5, num_rounds=3)
ELSEWHERE = """
import sys
sys.path[:0] = ["{root}/tests", "{root}"]
from dataclasses import replace
import pytest, torch, utils
from helpers import CFG, make_small
torch.set_num_threads(1)
make_small(pytest.MonkeyPatch())
cfg = replace(CFG, rule="least_sensitive", head="ridge", sparsity=0.5, num_rounds=3)
utils.train(cfg, utils.Store("{folder}", quiet=True))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return train(RUN, Store(tmp_path_factory.mktemp("here")))


def found(folder):
    return Store(folder, frozen=True).result(RUN)


def test_a_process_of_the_shell_gives_the_same_result(here, tmp_path):
    code = ELSEWHERE.format(root=ROOT, folder=tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"})
    result = found(tmp_path)
    assert timeless(result) == timeless(here)
    assert result["segments"] == here["segments"]


def test_a_notebook_gives_the_same_result(here, tmp_path):
    code = ELSEWHERE.format(root=ROOT, folder=tmp_path)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert timeless(found(tmp_path)) == timeless(here)


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
    assert [part["threads"] for part in here["segments"] + result["segments"]] == [1, 2]
    for a, b in zip(here["history"], result["history"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
    assert result["test"]["loss"] == pytest.approx(here["test"]["loss"], rel=1e-3)
    assert result["backbone_sha256"] == here["backbone_sha256"]


def test_a_result_stores_what_is_needed_to_repeat_it(here, tmp_path, monkeypatch):
    make_small(monkeypatch)
    again = Config(**here["config"])
    assert again == RUN
    assert run_name(again) == here["run"]
    assert timeless(train(again, Store(tmp_path))) == timeless(here)


def test_a_result_has_no_number_that_json_lacks(here):
    json.dumps(here, allow_nan=False)
