import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU, wherever they run

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import utils

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture
def tiny_vit():
    """A ViT of two blocks on 16 px; no weight is zero or equal to another, so nothing ties."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16,
                              depth=2, num_heads=2, num_classes=100)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def images():
    """32 images for `tiny_vit`."""
    return torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture(scope="session")
def synthetic():
    return utils.load_data(utils.Config(dataset="synthetic"))


def _fresh_data_sets():
    utils._read_dataset.cache_clear()


@pytest.fixture
def no_cifar(monkeypatch):
    """CIFAR-100 is neither stored nor to be had."""
    def refuse(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.CIFAR100", refuse)
    _fresh_data_sets()
    yield
    _fresh_data_sets()


@pytest.fixture
def fake_cifar(monkeypatch):
    """CIFAR with ten training images and one test image a class; yields what was asked for."""
    asked = []

    def data_set(num_classes):
        def read(folder, train, download=False):
            asked.append((num_classes, folder))
            n = 10 * num_classes if train else num_classes
            draw = np.random.default_rng(train)
            return SimpleNamespace(data=draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
                                   targets=(np.arange(n) % num_classes).tolist())
        return read
    monkeypatch.setattr("torchvision.datasets.CIFAR100", data_set(100))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", data_set(10))
    _fresh_data_sets()
    yield asked
    _fresh_data_sets()
