# ruff: noqa: E501  a row of the table is a mutant
"""Breaks the code on purpose, one small change at a time, and asks the tests: `make mutants`.

    OMP_NUM_THREADS=1 python tests/mutants.py [part of a mutant's name ...]

A mutant is (what is wrong, file, old text, new text, test file, tests by pytest's -k). The old text
must stand in the file exactly once, the tests must pass before and fail after. Each runs in a fork,
on a copy in a temporary folder; the libraries are imported once.
"""
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  what the tests import: once, before the forks
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import pydantic  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import seaborn  # noqa: F401
import timm  # noqa: F401
import torch
import torchvision  # noqa: F401
import tqdm.auto  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
U, B, S, D = "utils.py", *(f"notebooks/{name}.py" for name in ("basics", "store", "display"))
MUTANTS = [
    # SparseSGDM
    ("the mask before the decay", U, "[self.bits[p] for p in params])\n", "[self.bits[p] * 0 + 1 for p in params])\n", "test_optimizer", "frozen"),
    ("the decay twice", U, "weight_decay if mask is None else 0.0, nesterov", "weight_decay, nesterov", "test_optimizer", "free or hand"),
    ("the mask upside down", U, "{p: mask[n].to(_BITS", "{p: (mask[n] == 0).to(_BITS", "test_optimizer", "frozen or hand"),
    ("zero times NaN", U, "torch._foreach_mul_([g.view(_BITS[g.element_size()]) for g in grads],", "torch._foreach_mul_(grads,", "test_bad_input", "nan_gradient"),
    ("a foreign mask passes", U, "(mask.keys() - every) | (named.keys() - mask)", "named.keys() - mask", "test_bad_input", "optimizer"),
    # sensitivity and masks
    ("a batch squared, not its samples", U, "weight.square().sum(0).view_as", "weight.sum(0).square().view_as", "test_masks", "per_sample or squared"),
    ("an unnormalised LayerNorm input", U, "(d * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)).sum(1)", "(d * x).sum(1)", "test_masks", "per_sample"),
    ("float32 scores", U, "torch.zeros_like(weights[n], dtype=torch.float64)", "torch.zeros_like(weights[n])", "test_masks", "float64"),
    ("scored in training mode", U, "    model.eval()\n    try:", "    model.train()\n    try:", "test_masks", "eval_mode"),
    ("k off by one", U, "[:k - int(keep.sum())]", "[:k - int(keep.sum()) + 1]", "test_masks", "exactly or budget"),
    ("ties broken by <=", U, "keep, ties = scores < cut,", "keep, ties = scores <= cut,", "test_masks", "tie"),
    ("the most sensitive kept", U, 'sign = 1 if rule == "least_sensitive" else -1', 'sign = 1', "test_masks", "opposite"),
    ("no soft mask", U, "soft * weights[n])", "weights[n])", "test_masks", "damped or soft"),
    ("frozen entries return", U, "lowest(total.masked_fill_(~active, math.inf), keep, draw)", "lowest(total, keep, draw)", "test_masks", "never_returns"),
    ("labels of every round alike", U, 'rng("labels", seed, r), None', 'rng("labels", seed, 1), None', "test_masks", "redrawn"),
    ("a linear schedule of rounds", U, "(1 - sparsity) ** (r / rounds) * m", "(1 - sparsity * r / rounds) * m", "test_masks", "rounds or redrawn or returns or damped"),
    ("the largest magnitude for the lowest", U, '(1 if rule == "lowest_magnitude" else -1)', '(-1 if rule == "lowest_magnitude" else 1)', "test_masks", "magnitude"),
    # task vectors
    ("start minus tuned", U, "return add(tuned, negate(start))", "return add(start, negate(tuned))", "test_task_vectors", ""),
    ("alpha dropped", U, "return add(start, scale(vector, alpha))", "return add(start, vector)", "test_task_vectors", ""),
    # federated averaging
    ("weights unweighted", U, "mean, len(run.shards[k]) / total)", "mean, 1 / len(clients))", "test_federated", "weighted or aggregate"),
    ("a sum for the mean", U, "mean, len(run.shards[k]) / total)", "mean, 1)", "test_federated", "weighted or aggregate"),
    ("all clients in the total", U, "total, (rank, world) = sum(len(run.shards[k]) for k in clients), ranks()", "total, (rank, world) = sum(map(len, run.shards)), ranks()", "test_federated", "aggregate"),
    ("one step too few", U, "[:need], draw)", "[:need - cfg.batch_size], draw)", "test_federated", "steps"),
    ("every round the same batches", U, 'rng("client", cfg.seed, state.round, k)', 'rng("client", cfg.seed, 0, k)', "test_federated", "batches"),
    ("every client the same batches", U, 'rng("client", cfg.seed, state.round, k)', 'rng("client", cfg.seed, state.round, 0)', "test_federated", "batches"),
    ("the seed of the cohort dropped", U, '"cohort", cfg.seed, state.round).tolist()', '"cohort", 0, state.round).tolist()', "test_federated", "cohort"),
    ("the cohort of the first round for ever", U, '"cohort", cfg.seed, state.round).tolist()', '"cohort", cfg.seed, 0).tolist()', "test_federated", "cohort"),
    ("a client starts where the last one ended", U, "        torch._foreach_copy_(theta, w)\n", "", "test_federated", "every_client_starts_from or again"),
    ("a client's momentum goes to the next", U, "        self._optimizer.state.clear()\n", "", "test_federated", "fresh_momentum"),
    ("the sum of norms for the norm", U, "return torch.stack(norms).square().sum()\n\n\ndef ask_clients", "return torch.stack(norms).sum()\n\n\ndef ask_clients", "test_federated", "norms_by_hand or again"),
    ("the rate of the round before", U, "learning_rate(run.cfg, state.round / run.cfg.num_rounds)", "learning_rate(run.cfg, max(0, state.round - 1) / run.cfg.num_rounds)", "test_federated", "rate"),
    ("FedProx pushes away", U, "alpha=cfg.prox_mu)", "alpha=-cfg.prox_mu)", "test_federated", "fedprox"),
    ("SCAFFOLD's sign", U, "torch._foreach_sub_(grads, own)", "torch._foreach_add_(grads, own)", "test_federated", "scaffold"),
    ("SCAFFOLD's server moves by a C-th", U, "change, 1 / cfg.num_clients)", "change, 1 / len(clients))", "test_federated", "scaffold"),
    ("FedExP without its two", U, "squares.mean() / (2 * (square +", "squares.mean() / (1 * (square +", "test_federated", "fedexp"),
    ("FedExP steps shorter", U, "fedexp.clamp(min=1)", "fedexp", "test_federated", "fedexp"),
    ("server momentum forgotten", U, "return {n: w.detach() for n, w in weights.items()}, memory | kept", "return {n: w.detach() for n, w in weights.items()}, memory", "test_federated", "server"),
    ("the server climbs", U, "w.grad = -mean[n]", "w.grad = mean[n]", "test_bad_input", "server_steps"),
    ("momentum of epochs forgotten", U, 'opt.state[run.trained[n]]["momentum_buffer"] = buffer.clone()', "pass", "test_federated", "epochs"),
    ("a NaN loss passes", U, "if not math.isfinite(v)}", "if math.isinf(v)}", "test_bad_input", "not_finite"),
    # training
    ("test for validation", U, "index = run.data.val[:run.cfg.eval_images]", "index = run.data.train[:run.cfg.eval_images]", "test_training", "only_validation"),
    ("the last weights are tested", U, "run.load(state.best)", "run.load(state.params)", "test_training", "best_round"),
    ("the last of equals is best", U, 'if row["val_top1"] > max(', 'if row["val_top1"] >= max(', "test_training", "best_round"),
    ("the ridge head sees validation", U, "features(model, data.images[data.train]), data.labels[data.train]", "features(model, data.images), data.labels", "test_training", "no_validation or closed_form"),
    ("the mask sees validation", U, '([data.train], 1.0) if central', '([data.val], 1.0) if central', "test_training", "no_validation"),
    ("the head trains in sparse runs", U, "names = mask = mask_of(cfg, store, data, model, shards)", "mask = mask_of(cfg, store, data, model, shards)\n        names = {**mask, **dict.fromkeys(HEAD)}", "test_training", "sparse_runs_keep"),
    ("no lock", U, "with store.lock(cfg):", "if True:", "test_faults", "waits_for_it"),
    # basics
    ("the seed of the split dropped", B, 'draw, parts = rng("split", seed)', 'draw, parts = rng("split", 0)', "test_data", "split"),
    ("validation images trained on", B, "parts[0].append(members[cut:])", "parts[0].append(members)", "test_data", "validation"),
    ("uneven shards", B, "    even_out(sizes, owned)\n", "", "test_data", "equal_size"),
    ("a shard's class lost", B, "per_client, n = 1 if classes_per_client is None else classes_per_client", "per_client, n = 1 if classes_per_client is None else max(1, classes_per_client - 1)", "test_data", "exact"),
    ("the seed of the shards dropped", B, 'draw, labels = rng("shards", seed)', 'draw, labels = rng("shards", 0)', "test_data", "seed"),
    ("half the flips", B, "draw.random((n, 1)) < 0.5", "draw.random((n, 1)) < 0.0", "test_data", "augment or mirror"),
    ("crops of one corner", B, "draw.integers(0, 2 * pad + 1,", "draw.integers(0, pad + 1,", "test_data", "augment"),
    ("no normalisation", B, "return x.sub_(mean).div_(std)", "return x.sub_(mean)", "test_data", "normalised"),
    ("the bias is penalised", B, "    penalty[-1] = 0\n", "", "test_model", "ridge"),
    ("no end to sharpening", B, ".where((-nll).exp().mean(1) <= 0.9, math.inf)", "", "test_model", "sharpening"),
    ("pickles may run", B, "torch.load, map_location=\"cpu\", weights_only=True)", "torch.load, map_location=\"cpu\", weights_only=False)", "test_untrusted", "code_in"),
    ("archives may unpack to anything", B, "for part in archive.infolist())) > size:", "for part in archive.infolist())) > 10**12:", "test_untrusted", "compressed"),
    ("a download is not verified", B, "if sha != (found := _sha256(path)):", "if False and sha != (found := _sha256(path)):", "test_model", "dino"),
    ("the authors' file may change", B, "    if not known.exists():\n", "    if True:\n", "test_model", "dino"),
    ("NaN weights are taken", B, " > size or not w.isfinite().all():", " > size:", "test_untrusted", "something_else"),
    ("top-5 is top-4", B, "logits.topk(min(5,", "logits.topk(min(4,", "test_model", "evaluation"),
    ("a cosine that does not end at 0", B, "return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))", "return cfg.lr * 0.5 * (1 + math.cos(2 * progress))", "test_model", "rate"),
    ("defaults count in the identity", B, "and getattr(cfg, f.name) != f.default}", "}", "test_faults", "still_found"),
    ("rates of any length compared", D, "[c for c in runs if c.num_rounds == length]", "[c for c in runs if length]", "test_notebook_helpers", "tuned"),
    ("one rate is a search", D, "cfg.local_steps, 2), (None", "cfg.local_steps, 1), (None", "test_notebook_helpers", "tuned"),
    ("the luckiest of all seeds is chosen", D, "local_steps=j, seed=0, **same)", "local_steps=j, **same)", "test_notebook_helpers", "tuned"),
    ("a search without its upper neighbour", D, "ladder[max(0, at - 1):at + 2]", "ladder[max(0, at - 1):at + 1]", "test_notebook_helpers", "rates"),
    ("a search goes on where training stopped", D, "        if not all(map(store.result, todo)):\n            break\n", "", "test_notebook_helpers", "rates"),
    ("a diverged run is chosen", D, 'if result and not result["error"] else []', "if result else []", "test_notebook_helpers", "best"),
    ("drift at every cell's own rate", "report/make_numbers.py", "motion(book, grid_cell(book.base, nc, j)) for nc in (None, 1)", "motion(book, book.cells[nc, j]) for nc in (None, 1)", "test_report", "rate"),
    ("the grid at one rate", "report/make_numbers.py", "return {(nc, j): tuned(grid_cell(self.base, nc, j), self.store)", "return {(nc, j): grid_cell(self.base, nc, j)", "test_report", "rate"),
    ("processes meet before one is refused", U, "(n := world_size()) > 1", "(n := ranks()[1]) > 1", "test_torchrun", "before_processes"),
    ("a group of processes left alive", "distributed/train.py", "    leave_ranks()\n", "", "test_torchrun", "leaves"),
    ("streams that are one", B, "default_rng((STREAMS.index(stream), *key))", "default_rng((1, *key))", "test_randomness", ""),
    # store
    ("no sync before the rename", S, "            os.fsync(file.fileno())\n", "", "test_store", "synced"),
    ("written in place", S, '    part = path.with_name(f"{path.name}.{os.getpid()}.part")\n', "    part = path\n", "test_store", "cut_write"),
    ("checkpoints are not verified", S, '    if name.startswith("checkpoints/"):\n', '    if name.startswith("checkpoint/"):\n', "test_store", "flipped or truncated"),
    ("JSON is not verified", S, "if sha and sha != digest(value):", "if False:", "test_faults", "damage_of_a_result"),
    ("the drive's copy is never read", S, "for path in self.places(name):\n            try:\n                content", "for path in self.places(name)[:1]:\n            try:\n                content", "test_faults", "two_copies"),
    ("damage is copied", S, "            refuse_damaged(name, content := here.read_bytes())\n", "            content = here.read_bytes()\n", "test_faults", "sound_one"),
    ("what was late stays late", S, "        self.sync()\n\n    def places", "\n    def places", "test_faults", "caught_up or full_drive"),
    ("a lost mount is made anew", S, "if not Path(self.drive).is_dir():", "if False:", "test_faults", "lost_mount"),
    ("results before checkpoints", S, 'key=lambda n: n.endswith(".json")):', 'key=lambda n: not n.endswith(".json")):', "test_store", "results_reach"),
    ("the oldest checkpoints are kept", S, '*.safetensors")[:-keep]:', '*.safetensors")[keep:]:', "test_store", "newest_two"),
    ("half files keep a full disk full", S, "            part.unlink()  # half", "            pass  # half", "test_faults", "full_disk"),
    ("another run's checkpoint is taken", S, "        _refuse_other(cfg, other)\n", "", "test_store", "another_runs"),
    ("the order of the weights is lost", S, "for n in names:  # in this order", "for n in sorted(names):  # in this order", "test_store", "same_bits"),
    ("misfits are taken", S, "            refuse_misfits(name, kept, like)\n", "            pass\n", "test_untrusted", "does_not_fit"),
    ("the clock decides", S, 'for name in reversed(self.names(f"{folder}/*.safetensors")):', 'for name in sorted(self.names(f"{folder}/*.safetensors"), key=lambda n: -os.path.getmtime(self.root / n)):', "test_faults", "dates")]


def copied(folder: Path) -> Path:
    """The project without its history in a folder of its own."""
    for part in ("utils.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, folder / part)
    for part in ("notebooks", "tests", "distributed", "report"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("weights", "results"):
        (folder / part).symlink_to(ROOT / part)
    return folder


def tests_pass(folder: Path, tests: str, some: str) -> bool:
    """Runs these tests on the copy in a fork, silently; an empty selection is an error."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1, 2):  # 2: the mutant broke the import
            raise SystemExit(f"pytest ended with {code} on {tests} -k {some!r}")
        return code == 0
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.path[:] = [p for p in sys.path if p and not p.startswith(str(ROOT))]
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", *(["-k", some] if some else [])]
    os._exit(pytest.main([f"tests/{tests}.py", *options]))


def survey(wanted: list[str]) -> list[str]:
    """Prints a row for each mutant; the names of those that no test caught."""
    survivors, sound = [], {}
    for what, file, old, new, tests, some in MUTANTS:
        if wanted and not any(w in what for w in wanted):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            folder = copied(Path(name))
            if (tests, some) not in sound:
                sound[tests, some] = tests_pass(folder, tests, some)
            text = (folder / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{what!r}: its old text stands {text.count(old)} times in {file}:"
                                 f"\n{old}")
            (folder / file).write_text(text.replace(old, new))
            caught = not tests_pass(folder, tests, some)
        verdict = "TESTS FAIL" if not sound[tests, some] else "caught" if caught else "SURVIVED"
        survivors += [what] if verdict != "caught" else []
        print(f"{verdict:10} {what:46} {file:20} {tests:16} {time.monotonic() - began:5.1f} s",
              flush=True)
    return survivors


def main():
    torch.set_num_threads(1)
    began, survivors = time.monotonic(), survey(sys.argv[1:])
    print(f"of {len(MUTANTS)} mutants {'some asked for' if sys.argv[1:] else 'all'}, {len(survivors)} not caught {survivors or ''}; "
          f"{time.monotonic() - began:.0f} s")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
