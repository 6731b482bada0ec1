import hashlib
import math
import warnings
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import utils
from notebooks import basics
from utils import (
    HEAD,
    ROOT,
    Config,
    backbone,
    build_model,
    evaluate,
    features,
    learning_rate,
    precision,
    ridge_from_sums,
    ridge_head,
    ridge_sums,
    sharpen,
)

MINI = Config(weights="mini", image_size=32)
FILE = ROOT / "weights" / "mini.safetensors"


def stored():
    return safetensors.torch.load_file(FILE)


def from_file(path, **changes):
    return build_model(Config(weights=str(path), arch="mini", image_size=32, **changes))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n].float()) for n in a)


# ---------------------------------------------------------------- weights
def test_the_stored_backbone_is_loaded_bit_by_bit():
    assert same(backbone(build_model(MINI)), {n: w for n, w in stored().items() if n not in HEAD})


def test_the_seed_draws_the_head_and_never_the_backbone():
    a, again, b = (build_model(Config(weights="mini", image_size=32, seed=s)) for s in (0, 0, 1))
    assert same(a.state_dict(), again.state_dict())
    assert same(backbone(a), backbone(b))
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


def test_the_head_has_as_many_classes_as_asked():
    assert build_model(MINI, num_classes=7).head.weight.shape == (7, 128)
    assert build_model(MINI).head.weight.shape == (100, 128)


def test_a_head_in_the_file_is_left_behind(tmp_path):
    strange = {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}
    safetensors.torch.save_file(stored() | strange, tmp_path / "w.safetensors")
    assert same(from_file(tmp_path / "w.safetensors").state_dict(), build_model(MINI).state_dict())


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


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_torch_and_safetensors_files_load_the_same(tmp_path, suffix):
    torch.save(stored(), tmp_path / f"w.{suffix}")
    assert same(from_file(tmp_path / f"w.{suffix}").state_dict(), build_model(MINI).state_dict())


def test_weights_of_another_precision_come_as_float32(tmp_path):
    torch.save({n: w.half() for n, w in stored().items()}, tmp_path / "w.pt")
    model = from_file(tmp_path / "w.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, stored()["norm.weight"].half().float())


class Code:
    """A pickle that writes a file when it is opened."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_weights_file_is_refused_and_never_runs(tmp_path):
    torch.save({"norm.bias": Code(tmp_path / "owned")}, tmp_path / "w.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        from_file(tmp_path / "w.pt")
    assert not (tmp_path / "owned").exists()


def test_the_position_embedding_is_resampled_to_the_image_size(tmp_path):
    rows = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, 128)  # as the 4 x 4 grid's y
    weights = stored()
    token = weights["pos_embed"][0, :1]
    weights["pos_embed"] = torch.cat([token, rows])[None].contiguous()
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    model = build_model(Config(weights=str(tmp_path / "w.safetensors"), arch="mini",
                               image_size=64))
    assert torch.equal(model.pos_embed[0, :1], token)  # it has no place in the image
    grid = model.pos_embed[0, 1:, 0].view(8, 8)
    assert grid.std(1).max() < 1e-5
    assert (grid[:, 0].diff() > 0).all()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 100)


@pytest.mark.parametrize(("arch", "size"), [("mini", 36), ("vits16", 72)])
def test_an_image_size_that_patches_do_not_tile_is_refused(arch, size):
    with pytest.raises(ValueError, match=f"image_size={size}"):
        build_model(Config(weights="none", arch=arch, image_size=size))


def offline(*args, **kwargs):
    raise ConnectionError("no route to host")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The two places of DINO's weights: their download gives this repository's small ViT.

    `cache(name)` has the Hugging Face Hub answer with a link to a blob of that name.
    """
    content, home = (ROOT / "weights" / "mini.safetensors").read_bytes(), tmp_path / "hub"
    release = home / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(home))

    def download(url, path):
        assert url == utils.DINO
        torch.save(safetensors.torch.load(content), path)

    def cache(name, damage=b"", linked=True):
        (tmp_path / name).write_bytes(content + damage)
        link = tmp_path / "model.safetensors"
        link.symlink_to(tmp_path / name) if linked else link.write_bytes(content + damage)
        monkeypatch.setattr(basics, "hf_hub_download", lambda repo, file: str(link))

    monkeypatch.setattr(basics, "hf_hub_download", offline)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    return SimpleNamespace(release=release, cache=cache, sha=hashlib.sha256(content).hexdigest(),
                           weights=safetensors.torch.load(content))


def test_without_network_dinos_error_names_the_three_remedies(hub, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as error:
        basics._read_weights("dino")
    for part in ("network", "dino_deitsmall16_pretrain.pth", "weights='<its path>'",
                 "preset('demo')", "no route to host"):
        assert part in str(error.value)


def test_both_of_dinos_addresses_are_encrypted():
    assert utils.DINO.startswith("https://")
    assert basics.hf_hub_url(*basics.DINO_HUB).startswith("https://huggingface.co/timm/vit_small")


def test_the_hubs_copy_of_dino_must_have_the_checksum_that_the_hub_publishes(hub):
    hub.cache(hub.sha)
    assert same(basics._read_weights("dino"), hub.weights)
    assert not hub.release.exists()  # the second source is not asked


def test_a_damaged_copy_from_the_hub_is_refused(hub, tmp_path):
    hub.cache(hub.sha, damage=b" ")
    with pytest.raises(ValueError, match=f"not {hub.sha}.*Delete it"):
        basics._read_weights("dino")


@pytest.mark.parametrize("damage", [b"", b" "])
def test_where_the_cache_has_no_links_the_hub_is_asked_for_the_checksum(hub, monkeypatch, damage):
    hub.cache("blob", damage, linked=False)
    monkeypatch.setattr(basics, "get_hf_file_metadata",
                        lambda url: SimpleNamespace(etag=hub.sha if "vit_small" in url else ""))
    if damage:
        with pytest.raises(ValueError, match=hub.sha):
            basics._read_weights("dino")
    else:
        assert same(basics._read_weights("dino"), hub.weights)


def test_dinos_own_server_is_asked_when_the_hub_fails_and_its_file_must_stay_as_it_is(hub):
    with pytest.warns(UserWarning, match="publish no checksum.*SHA-256 [0-9a-f]{64}"):
        assert same(basics._read_weights("dino"), hub.weights)
    with warnings.catch_warnings(action="error"):
        assert same(basics._read_weights("dino"), hub.weights)
    content = bytearray(hub.release.read_bytes())
    content[len(content) // 2] ^= 1
    hub.release.write_bytes(content)
    with pytest.raises(ValueError, match="dino_deitsmall16_pretrain.pth has SHA-256"):
        basics._read_weights("dino")


def test_the_default_model_is_a_vit_s16():
    with torch.device("meta"):
        model = timm.create_model(**utils.ARCHS["vits16"], num_classes=100)
    assert sum(w.numel() for w in backbone(model).values()) == 21_589_632 + 76_032
    assert model.patch_embed.patch_size == (16, 16)


# ---------------------------------------------------------------- head
def test_the_head_on_the_features_is_the_model(tiny_vit, images):
    x = features(tiny_vit.train(), images, batch=5)
    assert x.shape == (32, 16)
    with torch.inference_mode():
        whole = tiny_vit.eval()(utils.prepare(images, tiny_vit))
        torch.testing.assert_close(tiny_vit.head(x), whole)


def test_ridge_by_hand():
    # X'X = diag(2, 2) with the free bias, X'Y = [[1, -1], [1, 1]], so w = 1 / (2 + 2), b = 1 / 2
    head = ridge_head(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), l2=2.0, num_classes=2)
    assert head["head.weight"].tolist() == [[0.25], [-0.25]]
    assert head["head.bias"].tolist() == [0.5, 0.5]


def test_ridge_over_unequal_clients_is_the_centralised_one():
    x, y = torch.randn(200, 6) + 3, torch.randint(0, 10, (200,))
    sums = [ridge_sums(*client, 10) for client in zip(x.split([5, 120, 1, 74]),
                                                      y.split([5, 120, 1, 74]), strict=True)]
    apart, together = ridge_from_sums(sums, 0.1), ridge_head(x, y, 0.1, 10)
    for n in HEAD:
        assert together[n].dtype == torch.float64
        torch.testing.assert_close(apart[n], together[n], rtol=1e-6, atol=1e-6)


def test_ridge_minimises_its_loss_with_a_free_bias():
    x, y = torch.randn(50, 4).double() + 2, torch.randint(0, 3, (50,))
    head = {n: w.requires_grad_() for n, w in ridge_head(x, y, 0.7, 3).items()}
    error = x @ head["head.weight"].T + head["head.bias"] - nn.functional.one_hot(y, 3)
    loss = error.square().sum() + 0.7 * head["head.weight"].square().sum()
    for slope in torch.autograd.grad(loss, list(head.values())):
        assert slope.abs().max() < 1e-10


def test_sharpening_lowers_the_loss_and_changes_no_prediction():
    y = torch.arange(10).repeat(20)
    x = torch.eye(10)[y] + 0.3 * torch.randn(200, 10)
    head = ridge_head(x, y, 1.0, 10)
    sharp = sharpen(head, x, y)

    def logits(h):
        return x.double() @ h["head.weight"].T + h["head.bias"]

    factors = torch.cat([(sharp[n] / head[n]).flatten() for n in HEAD])
    assert factors.unique().numel() == 1
    assert factors[0] > 1
    assert torch.equal(logits(sharp).argmax(1), logits(head).argmax(1))
    loss = nn.functional.cross_entropy
    assert loss(logits(sharp), y) < 0.8 * loss(logits(head), y)
    for worse in (0.5, 2):
        assert loss(logits(sharp), y) <= loss(worse * logits(sharp), y)


def test_sharpening_stops_where_nothing_would_be_left_to_learn():
    """Features that fit perfectly like ever larger factors, under which the first step explodes."""
    y = torch.arange(10).repeat(20)
    x = torch.eye(10)[y]
    head = ridge_head(x, y, 1.0, 10)
    sharp = sharpen(head, x, y)
    factor = (sharp["head.bias"] / head["head.bias"]).mean().item()

    def left(h):  # to the other classes, on average
        p = (x.double() @ h["head.weight"].T + h["head.bias"]).softmax(1)
        return 1 - p[torch.arange(200), y].mean().item()

    assert factor > 1
    assert left(sharp) >= 0.1
    assert left({n: 2 * w for n, w in sharp.items()}) < 0.1


# ---------------------------------------------------------------- evaluation
def test_evaluation_by_hand():
    logits = torch.tensor([[4.0, 3, 2, 1, 0, -1], [0, 5, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6],
                           [9, 8, 7, 6, 5, 4]])
    labels = torch.tensor([0, 2, 0, 0])  # ranked 1st, 5th, 6th and 1st
    found = evaluate(nn.Identity(), logits, labels)
    assert found["top1"] == 0.5
    assert found["top5"] == 0.75
    assert found["images"] == 4
    assert found["per_class"] == [pytest.approx(2 / 3), None, 0, None, None, None]
    likelihoods = [math.exp(row[y]) / sum(map(math.exp, row))
                   for row, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert found["loss"] == pytest.approx(-sum(map(math.log, likelihoods)) / 4)


def test_top5_of_fewer_classes_is_always_right():
    assert evaluate(nn.Identity(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))["top5"] == 1


def test_evaluation_does_not_depend_on_the_batch():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5)).train()
    x, y = torch.randn(50, 6), torch.randint(0, 9, (50,))
    whole = evaluate(model, x, y)
    for batch in (1, 7, 50):
        part = evaluate(model, x, y, batch)
        assert part.pop("loss") == pytest.approx(whole["loss"], rel=1e-5)
        assert part == {k: v for k, v in whole.items() if k != "loss"}


# ---------------------------------------------------------------- schedule and precision
@pytest.mark.parametrize(("schedule", "points"), [
    ("constant", {0: 1, 0.5: 1, 0.99: 1}),
    ("cosine", {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
    ("step", {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 0.99: 0.01}),
    ("warmup_cosine", {0: 0.05, 0.05: 0.525, 0.1: 1, 0.55: 0.5, 1: 0})])
def test_the_learning_rate_is_a_pure_function_of_progress(schedule, points):
    cfg = Config(lr=0.2, schedule=schedule)
    for progress, share in [*points.items(), *reversed(points.items())]:
        assert learning_rate(cfg, progress) == pytest.approx(0.2 * share, abs=1e-12)


def test_the_default_schedule_is_cosine_and_does_not_depend_on_the_seed():
    assert learning_rate(Config(), 0.3) == learning_rate(Config(schedule="cosine", seed=4), 0.3)


def test_auto_on_a_cpu_is_float32():
    for kind in ("auto", "float32"):
        context, loss_scale = precision(Config(precision=kind))
        with context:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert loss_scale == 1


@pytest.mark.parametrize(("kind", "dtype", "scale"), [("bf16", torch.bfloat16, 1),
                                                      ("fp16", torch.float16, 1024)])
def test_a_precision_that_is_asked_for_is_used_with_its_loss_scale(kind, dtype, scale):
    context, loss_scale = precision(Config(precision=kind))
    with context:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert loss_scale == scale
