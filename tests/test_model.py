"""Backbones: exactly the weights that were asked for, or an error that says what was found."""
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from helpers import same
from torch import nn

import utils
from utils import ROOT, Config, build_model, evaluate

HEAD = ("head.weight", "head.bias")
MINI = Config(weights="mini", arch="mini", image_size=32)


def stored():
    """This project's small ViT, patch 8."""
    return safetensors.torch.load_file(utils.weights_path("mini"))


def from_file(path, **changes):
    return build_model(Config(**dict(weights=str(path), arch="mini", image_size=32) | changes))


def of_backbone(weights):
    return {n: w.float() for n, w in weights.items() if n not in HEAD}


# ------------------------------------------------------------------ what is loaded
def test_the_stored_backbone_is_loaded_bit_by_bit():
    assert same(utils.backbone(build_model(MINI)), of_backbone(stored()))


def test_the_seed_draws_the_head_and_never_the_backbone():
    a, again, b = (build_model(Config(weights="mini", arch="mini", image_size=32, seed=s))
                   for s in (0, 0, 1))
    assert same(a.state_dict(), again.state_dict())
    assert same(utils.backbone(a), utils.backbone(b))
    assert not torch.equal(a.head.weight, b.head.weight)


def test_without_weights_the_seed_draws_all():
    a, again, b = (build_model(Config(weights="none", arch="mini", image_size=32, seed=s))
                   for s in (0, 0, 1))
    assert same(a.state_dict(), again.state_dict())
    assert not torch.equal(a.blocks[0].attn.qkv.weight, b.blocks[0].attn.qkv.weight)
    assert not torch.equal(a.blocks[0].attn.qkv.weight, build_model(MINI).blocks[0].attn.qkv.weight)


def test_building_neither_reads_nor_moves_the_global_generator():
    before = torch.get_rng_state()
    a = build_model(MINI)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(a.state_dict(), build_model(MINI).state_dict())


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_torch_and_safetensors_files_load_the_same(tmp_path, suffix):
    torch.save(stored(), tmp_path / f"w.{suffix}")
    assert same(from_file(tmp_path / f"w.{suffix}").state_dict(), build_model(MINI).state_dict())


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(stored(), tmp_path / "w.pt")
    assert same(utils.backbone(from_file("~/w.pt")), of_backbone(stored()))


def test_weights_of_another_precision_come_as_float32(tmp_path):
    torch.save({n: w.half() for n, w in stored().items()}, tmp_path / "w.pt")
    model = from_file(tmp_path / "w.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, stored()["norm.weight"].half().float())


def test_the_position_embedding_is_resampled_to_the_image_size(tmp_path):
    rows = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, 128)  # as the 4 x 4 grid's y
    weights = stored()
    token = weights["pos_embed"][0, :1]
    weights["pos_embed"] = torch.cat([token, rows])[None].contiguous()
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    model = from_file(tmp_path / "w.safetensors", image_size=64)
    assert torch.equal(model.pos_embed[0, :1], token)  # it has no place in the image
    grid = model.pos_embed[0, 1:, 0].view(8, 8)
    assert grid.std(1).max() < 1e-5
    assert (grid[:, 0].diff() > 0).all()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 100)


def test_the_default_model_is_a_vit_s16():
    with torch.device("meta"):
        model = timm.create_model(**utils.ARCHS["vits16"], num_classes=100)
    assert sum(w.numel() for w in utils.backbone(model).values()) == 21_589_632 + 76_032
    assert model.patch_embed.patch_size == (16, 16)


# ------------------------------------------------------------------ DINO's own files
def projection_head():
    return {"head.mlp.0.weight": torch.ones(8, 128), "head.last_layer.weight_g": torch.ones(4, 1)}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone."])
def test_the_teachers_backbone_is_taken_from_dinos_full_checkpoint(tmp_path, prefix):
    head = "module.head." if prefix.startswith("module") else "head."
    student = {prefix + n: w + 1 for n, w in of_backbone(stored()).items()}
    teacher = {prefix + n: w for n, w in of_backbone(stored()).items()}
    teacher |= {n.replace("head.", head, 1): w for n, w in projection_head().items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 300}, tmp_path / "full.pth")
    assert same(utils.backbone(from_file(tmp_path / "full.pth")), of_backbone(stored()))


def test_a_head_in_the_file_is_left_behind(tmp_path):
    strange = {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}
    safetensors.torch.save_file(stored() | strange, tmp_path / "w.safetensors")
    assert same(from_file(tmp_path / "w.safetensors").state_dict(), build_model(MINI).state_dict())


def test_weights_of_another_patch_are_refused_by_saying_what_they_are(tmp_path):
    torch.save({"teacher": stored()}, tmp_path / "patch8.pth")
    with pytest.raises(ValueError, match=r"patch8\.pth holds a ViT of patch 8, width 128, depth 6; "
                                         "needed is a ViT of patch 16, width 384, depth 12"):
        from_file(tmp_path / "patch8.pth", arch="vits16", image_size=224)


@pytest.mark.parametrize(("lost", "extra"), [
    ("norm.bias", {}), ("pos_embed", {}), ("cls_token", {}), ("", {"norm.scale": torch.ones(1)}),
    ("", {"norm.bias": torch.zeros(64)}), ("", {"blocks.6.norm1.bias": torch.zeros(128)}),
    ("", {"patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)})],
    ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_weights_that_do_not_fit_are_refused(tmp_path, lost, extra):
    weights = {n: w for n, w in stored().items() if n != lost} | extra
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)w\.safetensors.*{lost or next(iter(extra))}"):
        from_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("arch", "size"), [("mini", 36), ("vits16", 72)])
def test_an_image_size_that_patches_do_not_tile_is_refused(arch, size):
    with pytest.raises(ValueError, match=f"image_size={size}"):
        build_model(Config(weights="none", arch=arch, image_size=size))


# ------------------------------------------------------------------ DINO from the Hub
OFFLINE = """
import torch, timm, safetensors.torch, utils
cfg = utils.Config(image_size=32)
try:
    found = utils.backbone(utils.build_model(cfg))
except FileNotFoundError as error:
    print("REFUSED", error)
else:
    whole = safetensors.torch.load_file(FILE)
    same = [torch.equal(found[n], w) for n, w in whole.items() if n != "pos_embed"]
    print("LOADED", all(same), len(same))
"""


def offline(cache, code, **settings):
    """In a new process, since the Hub's client reads its settings when it is imported."""
    environment = os.environ | {"HF_HOME": str(cache), "PYTHONPATH": str(ROOT)} | settings
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, text=True,
                          capture_output=True, check=True, cwd=cache).stdout


def test_dino_in_the_hubs_cache_needs_no_network(tmp_path):
    repository = tmp_path / "hub/models--timm--vit_small_patch16_224.dino"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40, encoding="utf-8")
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
    safetensors.torch.save_file(model.state_dict(), snapshot / "model.safetensors")
    code = OFFLINE.replace("FILE", repr(str(snapshot / "model.safetensors")))
    said = offline(tmp_path, code, HF_ENDPOINT="http://127.0.0.1:9")  # where nobody answers
    assert said.strip() == "LOADED True 149"


def test_without_cache_and_network_dinos_error_names_the_remedies(tmp_path):
    said = offline(tmp_path, OFFLINE, HF_HUB_OFFLINE="1")  # it would try again for a minute
    assert said.startswith("REFUSED")
    for part in ("network", "dino_deitsmall16_pretrain.pth", "weights='<its path>'",
                 "preset('demo')"):
        assert part in said


# ------------------------------------------------------------------ evaluation
def test_evaluation_by_hand():
    logits = torch.tensor([[4.0, 3, 2, 1, 0, -1], [0, 5, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6],
                           [9, 8, 7, 6, 5, 4]])
    labels = torch.tensor([0, 2, 0, 0])  # ranked 1st, 5th, 6th and 1st
    found = evaluate(nn.Identity(), logits, labels)
    assert found["top1"] == 0.5
    assert found["top5"] == 0.75
    assert found["images"] == 4
    assert found["per_class"] == [pytest.approx(2 / 3), None, 0, None, None, None]
    assert found["predictions"].tolist() == [0, 1, 5, 0]
    assert found["predictions"].dtype == "uint8"
    likelihoods = logits.double().softmax(1)[torch.arange(4), labels]
    assert found["loss"] == pytest.approx(-likelihoods.log().mean().item())


def test_top5_of_fewer_classes_is_always_right():
    assert evaluate(nn.Identity(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))["top5"] == 1


def test_evaluation_does_not_depend_on_the_batch():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5)).train()
    x, y = torch.randn(50, 6), torch.randint(0, 9, (50,))
    whole = evaluate(model, x, y)
    for batch in (1, 7, 50):
        part = evaluate(model, x, y, batch)
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert (part.pop("predictions") == whole["predictions"]).all()
        assert all(part[k] == whole[k] for k in part if k != "loss")
