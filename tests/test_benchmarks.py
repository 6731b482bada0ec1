"""The benchmarks run, write numbers that are numbers, and measure the workload they name."""
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CFG, make_small

import utils
from notebooks.experiments import close_workers

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import against_naive  # noqa: E402
import common  # noqa: E402
import gpu  # noqa: E402
import round_cost  # noqa: E402
import scaling  # noqa: E402
import sparse  # noqa: E402
import summary  # noqa: E402
import workers  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Runs of a tiny ViT on a few images, on their plain pixels."""
    make_small(monkeypatch)
    monkeypatch.setattr(utils, "augment", lambda images, draw, kind: images)


def written(capsys, folder, script: str) -> dict:
    assert "cores:" in capsys.readouterr().out
    return json.loads((folder / f"{script}_cpu.json").read_bytes())


def check_rows(found: dict):
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    numbers = [v for row in found["rows"] for v in row.values() if isinstance(v, float)]
    assert numbers
    assert all(math.isfinite(v) and v > 0 for v in numbers)
    for row in found["rows"]:
        assert row["what"]
        assert "q1" not in row or row["q1"] <= row["ratio"] <= row["q3"]


def quick(monkeypatch, script, folder):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--quick", "--out", str(folder)])
    script.main(common.options(script.__doc__))


def here(monkeypatch, capsys, script):
    """What the script has a child do is done in this process, whose imports have been made."""
    def child(path, *command):
        given = dict(zip(command[::2], command[1::2], strict=True))
        side = given.pop("--side")
        cfg = utils.Config(**json.loads(given.pop("--config")))
        script.one_side(side, cfg, *given.values())
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        return dict(peak=max(1.0, found["peak"]))  # what was freed before may serve again
    monkeypatch.setattr(script, "child", child)


# ------------------------------------------------------------------ the scripts
@pytest.mark.parametrize(("script", "whats"), [
    (round_cost, {"round", "evaluation", "calibration", "calibration, vmap", "checkpoint",
                  "overhead"}),
    (scaling, {"round, over K = 100", "per client, over 1", "per step, over J = 1",
               "bf16, over float32"})])
def test_a_script_writes_finite_ratios(monkeypatch, capsys, tmp_path, script, whats):
    monkeypatch.setitem(utils.ARCHS, "mini", utils.ARCHS["mini"] | dict(depth=1))
    monkeypatch.setattr(script, "MINI", replace(script.MINI, weights="none"))
    quick(monkeypatch, script, tmp_path)
    found = written(capsys, tmp_path, Path(script.__file__).stem)
    check_rows(found)
    assert {row["what"] for row in found["rows"]} == whats


def test_the_plain_loop_is_measured_and_its_peak(monkeypatch, capsys, tmp_path):
    here(monkeypatch, capsys, against_naive)
    quick(monkeypatch, against_naive, tmp_path)
    found = written(capsys, tmp_path, "against_naive")
    check_rows(found)
    assert [row["what"] for row in found["rows"]] == ["round", "round", "overhead", "peak memory"]


def test_sparse_rounds_are_measured_next_to_the_dense_one(monkeypatch, capsys, tmp_path):
    here(monkeypatch, capsys, sparse)
    monkeypatch.setattr(utils, "load_data", utils.load_data)  # a child replaces its own
    quick(monkeypatch, sparse, tmp_path)
    rows = written(capsys, tmp_path, "sparse")["rows"]
    assert [row["what"] for row in rows] == [
        f"{what}, {name}" for what in ("round", "peak memory") for name in sparse.RULES]
    skipped = {row["what"]: row["skipped"] for row in rows[:3]}
    assert skipped["round, least_sensitive"] > 0.1
    assert skipped["round, random"] == skipped["round, gradients of all"] == 0
    assert all(row["ratio"] > 0 for row in rows)


def test_a_grid_in_processes_is_measured_next_to_one(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(workers, "train_all", lambda cfgs, session: asked.append(
        (len({cfg.seed for cfg in cfgs}), session.workers, session.store.names("*"))) or [])
    quick(monkeypatch, workers, tmp_path)
    found = written(capsys, tmp_path, "workers")
    check_rows(found)
    assert asked == [(2, 2, []), (2, 1, [])] * 2  # from an empty folder every time
    monkeypatch.setattr(workers, "train_all", lambda cfgs, session: cfgs)
    with pytest.raises(RuntimeError, match="2 of 2 runs are left"):
        quick(monkeypatch, workers, tmp_path)


def test_a_grid_is_trained_in_processes_for_the_measurement():
    cfg = replace(CFG, num_rounds=1, eval_images=20)
    try:
        workers.train_grid([replace(cfg, seed=seed) for seed in (0, 1)], 2)
    finally:
        close_workers()


def test_make_bench_runs_every_script():
    scripts = {f.stem for f in FOLDER.glob("*.py") if "__main__" in f.read_text(encoding="utf-8")}
    recipe = (FOLDER.parent / "Makefile").read_text(encoding="utf-8").partition("\nbench:")[2]
    words = recipe.partition("in ")[2].partition(";")[0].split()
    assert set(words) == scripts - {"common", "summary"}


def test_the_readme_has_the_stored_ratios():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert summary.table() in readme
    stored = json.loads((FOLDER / "results/sparse_cpu.json").read_bytes())
    (row,) = [row for row in stored["rows"]
              if row["what"] == "round, least_sensitive" and row["model"] == "mini"]
    assert f"small ViT, 32 px | {row['ratio']:.2f} | {row['q1']:.2f} to" in summary.table()


@pytest.mark.parametrize(("script", "says"), [("gpu", "no GPU"), ("against_flower", "pip install")])
def test_what_is_missing_is_said_and_is_no_failure(monkeypatch, capsys, tmp_path, script, says):
    monkeypatch.setitem(sys.modules, "flwr", None)  # as if it were not installed
    path = FOLDER / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    assert says in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the workloads
def whole_shards(cfg):
    """Every step takes a client's whole shard, so that the order of its images has no say."""
    run, state = common.start(cfg)
    run = replace(run, shards=[s[:6] for s in run.shards], cfg=replace(cfg, batch_size=6))
    assert {len(s) for s in run.shards} == {6}
    return run, state


def test_the_plain_loop_ends_in_the_weights_of_our_round(small):
    run, state = whole_shards(replace(CFG, local_steps=3))
    model = against_naive.copy.deepcopy(run.model)
    images = against_naive.plain_images(run.data, 32, augmented=False)
    against_naive.plain_round(model, images, run.shards, run.cfg, 0)
    after = utils.federated_round(run, state)
    plain = dict(model.named_parameters())
    for n, w in after.params.items():
        torch.testing.assert_close(plain[n].detach(), w, atol=1e-6, rtol=1e-5)
    moved = max((after.params[n] - w).abs().max().item() for n, w in state.params.items())
    assert moved > 1e-3  # a thousand times the tolerance


def test_the_floor_takes_the_steps_of_a_client(small):
    """One client whose shard is the resident batch ends where the floor's steps end."""
    run, state = whole_shards(replace(CFG, local_steps=3, num_clients=1, participation=1.0))
    run = replace(run, shards=[np.arange(6)])
    after = utils.federated_round(run, state)
    run.load(state.params)
    run.model.train()
    images, labels = round_cost.resident_batch(run, 6)
    round_cost.compute_floor(run, images, labels, 3)
    for n, w in after.params.items():
        torch.testing.assert_close(run.trainable[n].detach(), w, atol=1e-6, rtol=1e-5)


def test_scores_by_vmap_are_the_sensitivity(small):
    run, _ = common.start(CFG)
    run.model.eval()
    images, labels = run.data.images[:5], run.data.labels[:5]
    ours = utils.sensitivity(run.model, images, labels, chunk=2)
    vmap = round_cost.vmap_scores(run, images, labels, chunk=3)
    assert ours.keys() == vmap.keys()
    for n in ours:
        torch.testing.assert_close(ours[n], vmap[n], rtol=1e-3, atol=1e-9)


def test_the_flower_client_trains_what_the_plain_loop_trains(monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    import flower_app
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict
    cfg = replace(common.MINI, weights="none", num_clients=2, local_steps=0)
    text, images = common.as_text(cfg), common.write_images(cfg, str(tmp_path))
    weights = {n: w + 1 for n, w in utils.build_model(cfg).state_dict().items()}
    content = {"arrays": ArrayRecord(weights), "config": ConfigRecord({"lr": 0.1})}
    reply = flower_app.answer(RecordDict(content), 1, text, images)
    _, _, dataset, shards = flower_app.kept(text, images)
    flower_app.kept.cache_clear()
    run, _ = common.start(cfg)
    assert all((a == b).all() for a, b in zip(shards, run.shards, strict=True))
    assert (dataset.data == run.data.images.permute(0, 2, 3, 1).numpy()).all()
    assert reply["metrics"]["num-examples"] == len(run.shards[1])
    back = reply["arrays"].to_torch_state_dict()
    assert all(torch.equal(back[n], weights[n]) for n in weights)


# ------------------------------------------------------------------ timing and the GPU's functions
def test_ratios_are_taken_within_pairs():
    times = dict(ours=[1.0, 10.0, 4.0], base=[2.0, 10.0, 2.0])  # a machine that slows fivefold
    found = common.compare(times, "ours", "base")
    assert (found["ratio"], found["q1"], found["q3"]) == (1.0, 0.75, 1.5)
    assert (found["ours"], found["base"], found["pairs"]) == (4.0, 2.0, 3)


def test_work_is_timed_in_turns_after_a_warm_up():
    seen = []
    times = common.in_turns(2, a=lambda: seen.append("a"), b=lambda: seen.append("b"))
    assert seen == ["a", "b"] * 3
    assert {k: v.shape for k, v in times.items()} == dict(a=(2, 2), b=(2, 2))


def test_rounds_are_made_in_processes_of_their_own(tmp_path):
    cfg = replace(common.MINI, weights="none", participation=0.02, local_steps=1, batch_size=2)
    images = common.write_images(cfg, str(tmp_path))
    with common.resident(cfg, images, 2) as one_round:
        assert 0 < one_round() < 60
    with (pytest.raises(RuntimeError, match=r"the processes ended:[\s\S]*nowhere\.pt"),
          common.resident(cfg, "nowhere.pt", 1)):
        pass


def test_the_peak_forgets_what_came_before():
    """In a process of its own: here other tests' memory comes and goes beside it."""
    found = common.child("-c", """
import json, sys
sys.path[:0] = ["benchmarks", "."]
import common, torch
block = torch.ones(300 * 2**18)  # 300 MB
held = common.peak()
del block
common.forget_peak()
after = common.peak()
block = torch.ones(600 * 2**18)
print(json.dumps(dict(held=held, after=after, again=common.peak())))
""")
    assert found["after"] < found["held"] - 200
    assert found["again"] > found["after"] + 500


def test_flops_are_those_of_the_matrix_products(small):
    run, _ = common.start(CFG)
    x = torch.zeros(1, 3, 32, 32)
    with gpu.FlopCounterMode(display=False) as forward, torch.no_grad():
        run.model(x)
    ratio = gpu.flops_per_image(run) / forward.get_total_flops()
    assert 2.5 < ratio <= 3.2  # a backward pass costs two forward ones, and no gradient of images


def test_the_attention_operator_is_found(small):
    run, _ = common.start(CFG)
    assert any("flash_attention" in name for name in gpu.attention_kernels(run))


def test_throughput_counts_the_images_of_a_round(small):
    run, state = common.start(CFG)
    row = gpu.throughput(run, state, 1, peak_tflops=0.5)
    images = row["clients"] * row["J"] * row["B"]
    assert (row["clients"], images) == (3, 24)
    assert row["images_per_s"] == pytest.approx(images / row["seconds"])
    assert row["share_of_peak"] == pytest.approx(row["tflops"] / 0.5)
