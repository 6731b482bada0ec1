import math
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from utils import Config, augment, load_data, normalize, rng, shard, split


def labels_of(per_class, classes=100):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))


def assert_partition(parts, n):
    assert all(p.dtype == np.int64 for p in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def classes_held(labels, shards):
    return [len(np.unique(labels[s])) for s in shards]


# ---------------------------------------------------------------- split
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_validation_is_a_stratified_share_disjoint_from_training(seed):
    labels = labels_of([10, 20, 30], classes=3)
    train, val = split(labels, 0.1, seed)
    assert_partition([train, val], 60)
    assert np.bincount(labels[val]).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("labels", "share"), [
    (np.zeros(10, int), 0.0), (np.zeros(10, int), 1.0), (np.zeros(10, int), 1.5),
    (np.zeros((10, 1), int), 0.5), (np.zeros(0, int), 0.5)])
def test_a_split_of_nothing_or_by_no_share_is_refused(labels, share):
    with pytest.raises(ValueError, match=f"val_fraction={share} must lie between 0 and 1"):
        split(labels, share, 0)


def test_the_split_of_cifar_is_450_and_50_of_every_class():
    labels = labels_of(500)
    train, val = split(labels, 0.1, 0)
    assert (np.bincount(labels[train]) == 450).all()
    assert (np.bincount(labels[val]) == 50).all()


def test_the_seed_alone_fixes_the_split():
    labels = labels_of(20)
    (a, b), (again, same), (other, _) = (split(labels, 0.1, s) for s in (0, 0, 1))
    assert np.array_equal(a, again)
    assert np.array_equal(b, same)
    assert not np.array_equal(a, other)


@pytest.mark.parametrize("share", [0.01, 0.96])
def test_a_class_without_training_or_validation_images_is_refused(share):
    with pytest.raises(ValueError, match=rf"{share}.*10 images of class 1"):
        split(np.repeat([0, 1], [1000, 10]), share, 0)


# ---------------------------------------------------------------- shards
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_class", [450, 477])
@pytest.mark.parametrize("nc", [1, 5, 10, 50])
def test_label_skewed_shards_are_exact_and_of_nearly_equal_size(nc, per_class, seed):
    labels = labels_of(per_class)
    shards = shard(labels, 100, nc, seed)
    assert_partition(shards, len(labels))
    assert classes_held(labels, shards) == [nc] * 100
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= (nc if per_class % nc else 0)  # each class rounds by itself


@pytest.mark.parametrize(("clients", "n"), [(100, 45000), (7, 45000), (33, 1000), (5, 5), (1, 9)])
def test_iid_shards_cover_all_and_differ_by_at_most_one_image(clients, n):
    shards = shard(np.arange(n) % 5, clients)
    assert_partition(shards, n)
    sizes = [len(s) for s in shards]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


def test_iid_shards_are_mixed():
    labels = np.repeat(np.arange(100), 450)  # sorted by class, as files may be
    assert min(classes_held(labels, shard(labels, 100))) > 90


@pytest.mark.parametrize(("clients", "nc"), [(7, 30), (33, 7), (20, 5), (100, 3), (3, 100),
                                             (1, 100), (101, 1)])
def test_numbers_that_do_not_divide_still_give_exactly_nc_classes(clients, nc):
    labels = labels_of(450)
    shards = shard(labels, clients, nc)
    assert_partition(shards, len(labels))
    assert classes_held(labels, shards) == [nc] * clients


def test_the_owners_of_a_class_share_it_evenly():
    labels = labels_of(100, classes=10)
    shards = shard(labels, 7, 3)  # 21 ownerships over 10 classes
    for c in range(10):
        parts = [n for n in (int((labels[s] == c).sum()) for s in shards) if n]
        assert len(parts) in (2, 3)
        assert max(parts) - min(parts) <= 1


def test_labels_need_not_be_numbered_from_zero():
    labels = np.repeat([3, 7, 50], 20)
    shards = shard(labels, 6, 1)
    assert_partition(shards, 60)
    assert classes_held(labels, shards) == [1] * 6


def test_the_seed_alone_fixes_the_shards():
    labels = labels_of(20)
    for options in (dict(), dict(classes_per_client=5), dict(dirichlet_alpha=0.3)):
        a, again, other = (shard(labels, 20, seed=s, **options) for s in (0, 0, 1))
        assert all(map(np.array_equal, a, again))
        assert all(map(np.array_equal, a, shard(labels, 20, **options)))
        assert not all(map(np.array_equal, a, other))


def test_a_class_may_have_an_owner_for_every_image_and_no_more():
    labels = np.repeat([0, 1], 3)
    assert [len(s) for s in shard(labels, 6, 1)] == [1] * 6
    with pytest.raises(ValueError, match=r"num_clients=8 with classes_per_client=1.*the 3 images"):
        shard(np.append(labels, [1, 1]), 8, 1)


@pytest.mark.parametrize(("clients", "nc"), [(10, 3), (10, 0), (2, 1)])
def test_numbers_of_classes_that_cannot_be_are_refused_with_both(clients, nc):
    labels = np.repeat([0, 1, 2] if clients == 2 else [0, 1], 10)
    with pytest.raises(ValueError, match=f"num_clients={clients} with classes_per_client={nc}"):
        shard(labels, clients, nc)


def test_labels_are_a_list():
    with pytest.raises(ValueError, match=r"labels of shape \(10, 1\)"):
        shard(np.zeros((10, 1), int), 2)
    for clients in (0, 11):
        with pytest.raises(ValueError, match=f"num_clients={clients} must be 1 to"):
            shard(np.zeros(10, int), clients)


# ---------------------------------------------------------------- Dirichlet label skew
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize(("clients", "per_class", "classes"), [(100, 45, 100), (7, 10, 3),
                                                               (60, 20, 3)])
def test_dirichlet_shards_cover_all_and_none_is_empty(clients, per_class, classes, alpha, seed):
    labels = labels_of(per_class, classes)
    shards = shard(labels, clients, seed=seed, dirichlet_alpha=alpha)
    assert_partition(shards, len(labels))
    sizes = [len(s) for s in shards]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_the_smaller_alpha_the_fewer_classes_a_client_holds():
    labels = labels_of(450)
    held = [np.mean(classes_held(labels, shard(labels, 100, dirichlet_alpha=alpha)))
            for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert held == sorted(held)
    assert held[0] < 15
    # a share of about one half is expected at alpha 1: Dirichlet(1/100) of 100 classes is narrow,
    # and at alpha 1000 a client's 450 images are all but IID
    iid = np.mean(classes_held(labels, shard(labels, 100)))
    assert held[-1] > 0.9 * iid


def test_clients_draw_their_own_class_distribution():
    """Two classes: the share of the first is Beta(alpha / 2, alpha / 2) over the clients."""
    labels = np.repeat([0, 1], 50_000)
    shares = [np.mean(labels[s] == 0) for s in shard(labels, 500, dirichlet_alpha=2.0)]
    first_half = shares[:250]  # later clients take what is left
    assert np.mean(first_half) == pytest.approx(0.5, abs=0.06)
    assert np.var(first_half) == pytest.approx(1 / 12, abs=0.015)  # of a uniform distribution


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=f"dirichlet_alpha={alpha}"):
        shard(labels_of(5), 10, dirichlet_alpha=alpha)


def test_two_kinds_of_skew_at_once_are_refused():
    with pytest.raises(ValueError, match=r"classes_per_client=1.*dirichlet_alpha=0\.5"):
        shard(labels_of(5), 100, 1, dirichlet_alpha=0.5)


# ---------------------------------------------------------------- augmentation
PIXELS = torch.arange(1, 49, dtype=torch.uint8).view(1, 1, 6, 8)  # each its own number, none zero
COLOURS = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)


def shifts(image, pad):
    """All (top, left, flipped) whose crop of PIXELS is this image (h, w)."""
    frame = np.pad(PIXELS[0, 0].numpy(), pad)
    crops = {(t, x): frame[t:t + 6, x:x + 8] for t in range(2 * pad + 1)
             for x in range(2 * pad + 1)}
    return {(*at, flipped) for at, crop in crops.items() for flipped in (False, True)
            if np.array_equal(crop[:, ::-1] if flipped else crop, image)}


def test_every_cropped_image_is_a_shifted_crop_or_its_mirror():
    out = augment(PIXELS.expand(300, 3, 6, 8), rng("client"), "crop_flip", pad=2)
    found = [shifts(image[0].numpy(), 2) for image in out]
    assert all(len(at) == 1 for at in found)
    assert len(set.union(*found)) == 5 * 5 * 2  # and every one of them is drawn


def test_a_flip_leaves_an_image_or_mirrors_it():
    images = PIXELS.expand(40, 3, 6, 8)
    out = augment(images, rng("client"))
    same = [torch.equal(a, b) for a, b in zip(out, images, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(out, images, strict=True)]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 8 < sum(same) < 32


def test_none_leaves_the_images_alone():
    assert augment(PIXELS, rng("client"), "none") is PIXELS


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_all_channels_move_together_and_the_input_stays(kind):
    images = (PIXELS * COLOURS).expand(20, 3, 6, 8).contiguous()
    before = images.clone()
    out = augment(images, rng("client"), kind)
    assert torch.equal(images, before)
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert torch.equal(out, out[:, :1] * COLOURS)


def test_augmentation_keeps_the_order_of_the_images():
    images = torch.randint(0, 256, (20, 3, 6, 8), dtype=torch.uint8)
    out = augment(images, rng("client"))
    assert torch.equal(out.sort(3).values, images.sort(3).values)


def test_the_draw_alone_fixes_the_augmentation():
    images = PIXELS.expand(20, 3, 6, 8)
    a, again, other = (augment(images, rng("client", 0, 0, k)) for k in (1, 1, 2))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="'mirror'.*none.*flip.*crop_flip"):
        augment(PIXELS, rng("client"), "mirror")


# ---------------------------------------------------------------- preparation
def test_pixels_are_normalised_by_the_means_and_deviations_of_imagenet():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    x = normalize(images, (2, 2))
    assert x.dtype == torch.float32
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert x[1, :, 1, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_images_are_resized_to_the_models_size():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 2, 2)
    x = normalize(images, (3, 4))
    assert x.shape == (1, 3, 3, 4)
    assert (x[0, 0, 1] * 0.229 + 0.485).tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=1e-6)


def test_floats_count_as_ready_and_bytes_are_left_alone():
    floats = torch.rand(2, 3, 5, 5)
    assert normalize(floats, (2, 2)) is floats
    images = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    normalize(images, (2, 2))
    assert (images == 7).all()


# ---------------------------------------------------------------- data sets
def test_cifar_is_read_from_data_dir_with_its_split(fake_cifar, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    data = load_data(Config(val_fraction=0.2))
    assert fake_cifar == [(100, str(tmp_path))] * 2
    assert data.images.shape == (1000, 3, 32, 32)
    assert data.test_images.shape == (100, 3, 32, 32)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert_partition([data.train, data.val], 1000)
    assert len(data.val) == 200
    load_data(Config(seed=1, val_fraction=0.2))
    assert len(fake_cifar) == 2  # a grid of runs reads the files once


def test_the_split_is_the_same_for_all_seeds(fake_cifar):
    a, b, other = (load_data(Config(val_fraction=0.2, seed=seed, split_seed=split))
                   for seed, split in ((0, 0), (1, 0), (0, 1)))
    assert np.array_equal(a.train, b.train)
    assert not np.array_equal(a.train, other.train)


@pytest.mark.parametrize(("asked", "found"), [
    ("", utils.ROOT / "data"), ("~/cifar", Path("~/cifar").expanduser())])
def test_the_folder_is_never_relative_to_where_a_notebook_runs(fake_cifar, monkeypatch, tmp_path,
                                                               asked, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", asked)
    load_data(Config(val_fraction=0.2))
    assert {folder for _, folder in fake_cifar} == {str(found)}


def test_cifar10_is_had_by_its_name(fake_cifar, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    data = load_data(Config(dataset="cifar10", val_fraction=0.2))
    assert fake_cifar == [(10, str(tmp_path))] * 2
    assert sorted(set(data.labels.tolist())) == list(range(10))
    model = utils.build_model(Config(dataset="cifar10", weights="none", arch="mini",
                                     image_size=32))
    assert model.head.weight.shape[0] == 10


def test_no_channel_or_position_is_mixed_up(fake_cifar):
    data = load_data(Config(val_fraction=0.2))
    raw = np.random.default_rng(False).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    assert data.test_images[7, 2, 5, 30] == raw[7, 5, 30, 2]
    assert data.test_labels.tolist() == list(range(100))


def test_missing_cifar_names_the_three_ways_out(no_cifar):
    with pytest.raises(FileNotFoundError, match=r"no route to host.*DATA_DIR.*network.*synthetic"):
        load_data(Config())


def test_the_synthetic_set_has_100_classes_and_looks_like_cifar(synthetic):
    s = synthetic
    assert (s.images.shape, s.test_images.shape) == ((12000, 3, 32, 32), (2000, 3, 32, 32))
    assert (s.images.dtype, s.labels.dtype) == (torch.uint8, torch.int64)
    assert (torch.bincount(s.labels) == 120).all()
    assert (torch.bincount(s.test_labels) == 20).all()
    assert (np.bincount(s.labels[s.train]) == 108).all()


def test_the_first_synthetic_images_are_of_many_classes(synthetic):
    # `eval_images` evaluates on the first of them alone
    assert len(set(synthetic.labels[synthetic.val][:200].tolist())) > 80
    assert len(set(synthetic.test_labels[:200].tolist())) == 100


def test_the_synthetic_set_is_learnable_and_not_by_heart(synthetic):
    s = synthetic

    def seen(images):
        return torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1)

    x = seen(s.images[s.train])
    means = torch.stack([x[s.labels[s.train] == c].mean(0) for c in range(100)])
    nearest = torch.cdist(seen(s.test_images), means).argmin(1)
    assert (nearest == s.test_labels).float().mean() > 0.9
    noise = (s.test_images[:20].float() - s.images[:20].float()).std()
    assert noise > 20  # the test images are not the training images
