"""Federated learning under the lens of task arithmetic: the concepts that all notebooks share.

In reading order: configuration, randomness, data and shards, model and evaluation, SparseSGDM,
sensitivity and masks, task vectors, federated averaging, checkpoints and results, training.
Weights, scores, masks and task vectors have one currency: `dict[str, Tensor]` keyed by parameter
name. Every random draw is a function of (stream, seed, round, client), so no generator state is
ever stored and a resumed run repeats the unbroken one bit by bit.
"""
import hashlib
import json
import math
import os
import platform
import re
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import safetensors.torch
import seaborn as sns
import timm
import torch
import torch.nn.functional as F
import torchvision
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn
from tqdm.auto import tqdm

Params = dict[str, Tensor]  # keyed by parameter name: weights, scores, masks, task vectors
ROOT = Path(__file__).resolve().parent
NOTES: set[str] = set()  # what every figure and summary must say of its data

# ------------------------------------------------------------------ configuration
RULES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random",
         "query_key")
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Config:
    """One run, completely; the assignment's symbol stands beside its field.

    `dataclasses.replace` makes grids. Raises ValueError (pydantic's ValidationError) naming the
    field, its value and what is allowed.
    """
    name: Annotated[str, Field(pattern=r"^[\w.+=-]*$")] = ""  # results/<name>.json; "" derives it
    # data and model
    dataset: Literal["cifar100", "synthetic"] = "cifar100"
    arch: Literal["", "vits16", "mini"] = ""  # "" follows the weights
    weights: str = "dino"                  # "dino", "mini", "none" or a path
    image_size: Count = 224
    val_fraction: Share = 0.1
    eval_images: Count | None = None       # None evaluates on all of validation or test
    seed: Annotated[int, Field(ge=0)] = 0
    # federation
    algorithm: Literal["fedavg", "fedprox", "scaffold", "centralized"] = "fedavg"
    server: Literal["average", "fedexp", "momentum", "adam"] = "average"
    num_clients: Count = 100               # K
    participation: Share = 0.1             # C, share of the clients in a round
    classes_per_client: Count | None = None  # Nc; None shards IID
    local_steps: Annotated[int, Field(ge=0)] = 4  # J, SGD steps of a client in a round
    num_rounds: Count = 500                # T
    num_epochs: Count = 15                 # length of a centralised run
    eval_every: Count = 10                 # rounds (centralised: epochs) between evaluations
    prox_mu: NotNegative = 0.01            # mu of FedProx
    server_lr: Positive = 1.0              # of server "momentum" and "adam", as is:
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # beta_1
    # optimisation
    batch_size: Count = 64                 # B
    lr: Positive = 1e-3                    # eta
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 5e-4
    schedule: Literal["constant", "cosine", "step", "warmup_cosine"] = "cosine"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    # head: "train" starts at random (sparse runs first train it alone, for head_rounds), "ridge" in
    # closed form, "probe" trains nothing else. Sparse runs freeze it, dense runs train it along.
    head: Literal["train", "ridge", "probe"] = "train"
    head_rounds: Count = 30
    ridge_l2: Positive = 1.0
    # mask
    rule: Literal[None, *RULES] = None     # None trains all weights
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.9  # share of the maskable weights frozen
    calibration_rounds: Count = 4          # R
    calibration: Literal["central", "mean", "max", "vote"] = "central"  # or how clients combine
    calibration_images: Count = 512        # scored in a calibration round, all clients together
    calibration_clients: Share = 1.0       # share of the clients that score in a calibration round

    def __post_init__(self):
        if self.rule and self.head == "probe":
            raise ValueError(f"head='probe' trains nothing that rule={self.rule!r} could mask: set "
                             "rule=None, or head='train' or 'ridge'")

    @property
    def length(self) -> int:
        """Rounds of a federated run, epochs of a centralised one."""
        return self.num_epochs if self.algorithm == "centralized" else self.num_rounds


def preset(name: str, **changes) -> Config:
    """The configuration "full", "lite", "small" or "demo", with `changes`.

    full: DINO ViT-S/16 at 224 px. lite: the same at 96 px. small: a ViT of 1.2 M parameters at 32
    px, for a CPU. demo: the same on a tenth of the images for minutes; it warns and takes synthetic
    images where CIFAR-100 cannot be had.
    """
    small = dict(weights="mini", arch="mini", image_size=32, batch_size=32, lr=0.1, num_rounds=32,
                 num_epochs=4, eval_every=8, head_rounds=16)
    presets = {"full": {}, "lite": {"image_size": 96}, "small": small,
               "demo": small | dict(val_fraction=0.9, eval_images=500, participation=0.04,
                                    batch_size=16, lr=0.05, num_rounds=4, num_epochs=2,
                                    eval_every=2, head_rounds=4, calibration_images=128)}
    if name not in presets:
        raise ValueError(f"preset {name!r} must be one of {tuple(presets)}")
    cfg = replace(Config(), **presets[name] | changes)
    try:
        if name == "demo":
            load_data(cfg)
    except FileNotFoundError as error:
        warnings.warn(f"SYNTHETIC DATA, its accuracies mean nothing: {error}", stacklevel=2)
        cfg = replace(cfg, dataset="synthetic")
        load_data(cfg)
    return cfg


def identity(cfg: Config) -> dict:
    """What tells runs apart: the fields that are not at their default, the name aside.

    A field that a later version adds so leaves the identity of stored runs as it is. Dense runs
    read nothing of the mask: those that differ in `sparsity` alone are one.
    """
    unread = ("name", "sparsity", "calibration") if cfg.rule is None else "name"
    return {f.name: getattr(cfg, f.name) for f in fields(cfg)
            if not f.name.startswith(unread) and getattr(cfg, f.name) != f.default}


def digest(value) -> str:
    """SHA-256 (hex) of weights, as float32 on the CPU, or of any JSON value."""
    if isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
        content = safetensors.torch.save({n: v.detach().float().cpu().contiguous()
                                          for n, v in value.items()})
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def run_name(cfg: Config) -> str:
    """`cfg.name`, or a legible one that ends in a hash of the identity: no two runs share it."""
    where = f"_nc{cfg.classes_per_client}" if cfg.classes_per_client else "_iid"
    where = "" if cfg.algorithm == "centralized" else f"{where}_J{cfg.local_steps}"
    mask = f"{cfg.rule}_{cfg.sparsity:g}" if cfg.rule else "dense"
    return cfg.name or f"{cfg.algorithm}{where}_{mask}_s{cfg.seed}_{digest(identity(cfg))[:8]}"


# ------------------------------------------------------------------ randomness
STREAMS = ("split", "shards", "cohort", "client", "epoch", "mask", "labels", "init", "synthetic",
           "scorers")


def rng(stream: str, *key: int) -> np.random.Generator:
    """Draws that depend on the arguments alone.

    The stream's number leads because numpy drops trailing zeros: (7, 3) and (7, 3, 0) draw alike.
    """
    return np.random.default_rng((STREAMS.index(stream), *key))


# ------------------------------------------------------------------ data and shards
@dataclass(frozen=True)
class Data:
    """A data set on the device: images uint8 (n, 3, 32, 32), labels int64 (n,)."""
    images: Tensor       # the official training set, indexed by `train` and `val`
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train: np.ndarray    # int64
    val: np.ndarray


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def load_data(cfg: Config) -> Data:
    """CIFAR-100 from $DATA_DIR, else ./data, else downloaded; or the synthetic set.

    Raises FileNotFoundError where CIFAR-100 is neither stored nor to be had.
    """
    NOTES.update({"SYNTHETIC DATA"} if cfg.dataset == "synthetic" else ())
    arrays = _read(cfg.dataset, os.environ.get("DATA_DIR") or "data", device())
    return Data(*arrays, *split(arrays[1].cpu().numpy(), cfg.val_fraction, cfg.seed))


@lru_cache(maxsize=2)  # a grid of runs reads the files once
def _read(dataset: str, folder: str, where: torch.device) -> list[Tensor]:
    if dataset == "synthetic":
        return [t.to(where) for per_class in (120, 20) for t in _synthetic(per_class)]
    try:
        parts = [torchvision.datasets.CIFAR100(folder, t, download=True) for t in (True, False)]
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CIFAR-100 is not in {folder!r} and cannot be downloaded ({error}). Set DATA_DIR to "
            "the folder that holds cifar-100-python/, or connect to the network, or choose "
            "dataset='synthetic'.") from error
    return [t.to(where) for part in parts for t in (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))]


def _synthetic(per_class: int) -> tuple[Tensor, Tensor]:
    """100 classes, each a smooth random pattern under noise: learnable, nothing to download."""
    patterns = torch.from_numpy(rng("synthetic", 0).normal(size=(100, 3, 4, 4)))
    patterns = F.interpolate(patterns, size=32, mode="bicubic")
    noise = torch.from_numpy(rng("synthetic", per_class).normal(size=(100, per_class, 3, 32, 32)))
    images = (128 + 40 * patterns[:, None] + 40 * noise).clamp(0, 255).to(torch.uint8)
    return images.flatten(0, 1), torch.arange(100).repeat_interleave(per_class)


def split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) of `labels` (n,): val holds round(val_fraction * n_c) of every class c.

    Raises ValueError where a class would be left without a training or a validation image.
    """
    draw, parts = rng("split", seed), ([], [])
    for c in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == c))
        cut = round(val_fraction * len(members))
        if not 0 < cut < len(members):
            raise ValueError(f"{val_fraction=} puts {cut} of the {len(members)} images of class "
                             f"{c} in validation: both parts need at least one")
        parts[0].append(members[cut:])
        parts[1].append(members[:cut])
    return tuple(np.sort(np.concatenate(p)) for p in parts)


def shard(labels: np.ndarray, num_clients: int, classes_per_client: int | None = None,
          seed: int = 0) -> list[np.ndarray]:
    """Split the indices of `labels` (n,) into `num_clients` disjoint int64 arrays that cover all n.

    With `classes_per_client` = Nc each client holds exactly Nc classes, and a class's owners share
    it evenly (label skew, McMahan et al. 2017, sec. 3); None splits IID.
    Raises ValueError where the numbers leave a class unowned or a client without its classes.
    """
    draw, labels = rng("shards", seed), np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    per_client, n = 1 if classes_per_client is None else classes_per_client, len(classes)
    if not 1 <= num_clients <= len(labels) or not 1 <= per_client <= n or (
            classes_per_client is not None and num_clients * per_client < n):
        raise ValueError(
            f"{num_clients=} with {classes_per_client=} cannot hold {len(labels)} images of {n} "
            f"classes: K must be 1 to {len(labels)}, Nc 1 to {n}, and K*Nc at least {n}")
    if classes_per_client is None:
        return np.array_split(draw.permutation(len(labels)), num_clients)
    owned = np.zeros((num_clients, n), bool)
    for k in range(num_clients):  # each takes the classes with the fewest owners, ties drawn
        owned[k, np.lexsort((draw.random(n), owned.sum(0)))[:per_client]] = True
    shards, owed = [[] for _ in range(num_clients)], np.zeros(num_clients)
    for c, count, held in zip(classes, counts, owned.T, strict=True):
        owners = draw.permutation(np.flatnonzero(held))
        if len(owners) > count:
            raise ValueError(f"{num_clients=} with {classes_per_client=} makes {len(owners)} "
                             f"clients share the {count} images of class {c}: lower one of them")
        owed[owners] += count / len(owners)
        owners = owners[np.argsort(-owed[owners], kind="stable")]  # array_split's first are longer
        members = draw.permutation(np.flatnonzero(labels == c))
        for k, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            shards[k].append(part)
            owed[k] -= len(part)
    return [np.concatenate(s) for s in shards]


def augment(images: Tensor, draw: np.random.Generator, pad: int = 4) -> Tensor:
    """Random crop after zero-padding and random flip of uint8 (n, 3, h, w), in one gather."""
    n, _, height, width = images.shape
    top, left = draw.integers(0, 2 * pad + 1, (2, n, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    columns = np.where(draw.random((n, 1)) < 0.5, columns[:, ::-1], columns)
    rows, columns = (torch.from_numpy(i).to(images.device, non_blocking=True)
                     for i in (rows[:, :, None], columns[:, None, :]))
    sample = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (pad,) * 4)[sample, :, rows, columns].permute(0, 3, 1, 2)


@lru_cache
def _imagenet(where: torch.device) -> list[Tensor]:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the backbones were trained with
    return [torch.tensor(v, device=where).view(1, 3, 1, 1) for v in (mean, std)]


def prepare(images: Tensor, model: nn.Module) -> Tensor:
    """uint8 images (b, 3, h, w) as the model's input: normalised floats at its image size.

    Floating-point images count as prepared and come back as they are.
    """
    if images.is_floating_point():
        return images
    mean, std = _imagenet(images.device)
    x, size = images.float().div_(255), model.patch_embed.img_size
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.sub_(mean).div_(std)


# ------------------------------------------------------------------ model and evaluation
ARCHS = {"vits16": dict(model_name="vit_small_patch16_224"),
         "mini": dict(model_name="vit_tiny_patch16_224", patch_size=8, embed_dim=128, depth=6,
                      num_heads=4)}
DINO = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
HEAD = ("head.weight", "head.bias")


def build_model(cfg: Config, num_classes: int = 100) -> nn.Module:
    """A ViT with its pre-trained backbone, position embedding resampled, and a new head.

    Raises KeyError or RuntimeError unless exactly the backbone's weights are found, all in shape.
    """
    arch = ARCHS[cfg.arch or ("mini" if cfg.weights == "mini" else "vits16")]
    if cfg.image_size % (patch := arch.get("patch_size", 16)):
        raise ValueError(f"image_size={cfg.image_size} must be a multiple of the patch, {patch}")
    with torch.random.fork_rng():  # timm draws from torch's global generator
        torch.manual_seed(int(rng("init", cfg.seed).integers(2**31)))
        model = timm.create_model(**arch, img_size=cfg.image_size, num_classes=num_classes)
    if cfg.weights != "none":
        state = {n: w for n, w in _read_weights(cfg.weights).items() if not n.startswith("head.")}
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=1)
        model.load_state_dict(state | {n: model.get_parameter(n) for n in HEAD})  # strict
    return model.to(device())


def _read_weights(source: str) -> Params:
    """Backbone weights in float32: "dino", "mini", or a .safetensors, .pth or .pt file."""
    path = str(ROOT / "weights" / "mini.safetensors") if source == "mini" else source
    if path != "dino":
        load = safetensors.torch.load_file if path.endswith(".safetensors") else partial(
            torch.load, map_location="cpu", weights_only=True)
        return {n: w.float() for n, w in load(path).items()}
    errors = []
    for download in (lambda: timm.create_model("vit_small_patch16_224.dino", pretrained=True,
                                               num_classes=0).state_dict(),
                     lambda: torch.hub.load_state_dict_from_url(DINO, map_location="cpu",
                                                                weights_only=True)):
        try:
            return download()
        except Exception as error:  # the hub clients raise many kinds: all are reported below
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
    raise FileNotFoundError(
        "DINO's weights cannot be downloaded. Connect to the network and run again; or put "
        f"{DINO.rpartition('/')[2]} on disk and set weights='<its path>'; or use the small ViT of "
        f"this repository, preset('demo'). Tried: {'; '.join(errors)}")


def backbone(model: nn.Module) -> Params:
    """All weights but the head's."""
    return {n: w for n, w in model.state_dict().items() if n not in HEAD}


def features(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Backbone features (n, d), float32, of uint8 `images` (n, 3, h, w)."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model.forward_head(model.forward_features(prepare(x, model)),
                                             pre_logits=True) for x in images.split(batch)])


def ridge_sums(x: Tensor, labels: Tensor, num_classes: int = 100) -> tuple[Tensor, Tensor]:
    """X'X (d+1, d+1) and X'Y (d+1, classes) in float64: all that a client tells of its data."""
    x = torch.cat([x.double(), x.new_ones(len(x), 1).double()], 1)
    return x.T @ x, x.T @ F.one_hot(labels, num_classes).double()


def ridge_from_sums(sums: list[tuple[Tensor, Tensor]], l2: float) -> Params:
    """The ridge head of all clients' data together, from their `ridge_sums`; the bias is free."""
    gram, target = (sum(part) for part in zip(*sums, strict=True))
    penalty = torch.full_like(gram[0], l2)
    penalty[-1] = 0
    w = torch.linalg.solve(gram + penalty.diag(), target)
    return dict(zip(HEAD, (w[:-1].T.contiguous(), w[-1]), strict=True))


def ridge_head(x: Tensor, labels: Tensor, l2: float, num_classes: int = 100) -> Params:
    """Closed-form linear head on features x (n, d) and labels (n,), in float64."""
    return ridge_from_sums([ridge_sums(x, labels, num_classes)], l2)


def sharpen(head: Params, x: Tensor, labels: Tensor) -> Params:
    """The head times the power of two with the lowest cross-entropy on features x (n, d).

    Regression fits 0 and 1, not logits: the softmax of such numbers is close to uniform.
    """
    logits = x.double() @ head[HEAD[0]].T + head[HEAD[1]]
    factors = 2.0 ** torch.arange(10)
    losses = torch.stack([F.cross_entropy(s * logits, labels) for s in factors.tolist()])
    return {n: w * factors[losses.argmin()] for n, w in head.items()}


def precision(cfg: Config):
    """(autocast context, loss scale): bf16 or fp16 on a GPU, float32 on a CPU unless asked.

    The scale is constant, so that there is none to store and a resumed run stays exact.
    """
    kind, where = cfg.precision, device().type
    if kind == "auto" and where == "cuda":
        kind = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    return torch.autocast(where, dtype) if dtype else nullcontext(), 1024 if kind == "fp16" else 1


NO_CONTEXT = nullcontext()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500,
             context=NO_CONTEXT) -> dict:
    """Mean loss, top-1, top-5 and per-class accuracy (shares of 1) on uint8 images (n, 3, h, w)."""
    model.eval()
    with torch.inference_mode(), context:
        logits = torch.cat([model(prepare(x, model)).float() for x in images.split(batch)])
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        count = partial(torch.bincount, labels, minlength=logits.shape[1])
        per_class = zip(count(hits[:, 0].double()).tolist(), count().tolist(), strict=True)
        return dict(loss=F.cross_entropy(logits, labels).item(), images=len(labels),
                    top1=hits[:, 0].double().mean().item(), top5=hits.any(1).double().mean().item(),
                    per_class=[h / n if n else None for h, n in per_class])


def learning_rate(cfg: Config, progress: float) -> float:
    """The rate at `progress` in [0, 1) of the run: a pure function, so resuming cannot bend it."""
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "step":  # a tenth after half, a hundredth after three quarters
        return cfg.lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if cfg.schedule == "warmup_cosine" and progress < 0.1:
        return cfg.lr * (0.05 + 9.5 * progress)  # a rate of zero would waste the first round
    if cfg.schedule == "warmup_cosine":
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
    return cfg.lr


# ------------------------------------------------------------------ SparseSGDM
class SparseSGDM(torch.optim.SGD):
    """SGD with momentum that moves only entries whose mask is True; without one, torch.optim.SGD.

    The mask comes after weight decay, so a frozen entry neither decays nor drifts. It is keyed by
    parameter name and must have every parameter that requires a gradient: else KeyError, or
    ValueError for another shape. `step` leaves the decayed, masked gradient in `.grad`.
    """

    def __init__(self, named_params, lr, momentum=0.9, weight_decay=0.0, dampening=0.0,
                 nesterov=False, mask: Params | None = None):
        named = {n: p for n, p in named_params if p.requires_grad}
        for n in named if mask is not None else ():
            if mask[n].shape != named[n].shape:
                raise ValueError(f"the mask of {n} has shape {tuple(mask[n].shape)}, its weight "
                                 f"{tuple(named[n].shape)}")
        super().__init__(named.values(), lr, momentum, dampening,
                         weight_decay if mask is None else 0.0, nesterov, foreach=True)
        self.decay = weight_decay
        self.mask = None if mask is None else {p: mask[n].to(p) for n, p in named.items()}

    def step(self, closure=None):
        loss = closure() if closure else None
        if self.mask is not None:
            params = [p for p in self.mask if p.grad is not None]
            grads = [p.grad for p in params]
            with torch.no_grad():
                torch._foreach_add_(grads, params, alpha=self.decay)
                torch._foreach_mul_(grads, [self.mask[p] for p in params])
        super().step()
        return loss


# ------------------------------------------------------------------ sensitivity and masks
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)


def maskable(model: nn.Module) -> list[str]:
    """Names of the weights and biases of Linear, Conv2d and LayerNorm layers outside the head."""
    return [f"{m}.{p}" for m, layer in model.named_modules() if isinstance(layer, LAYERS)
            and m != "head" for p, _ in layer.named_parameters(recurse=False)]


def squared_gradients(layer: nn.Module, x: Tensor, d: Tensor) -> Params:
    """Squared per-sample gradients of a layer's weight and bias, summed over the batch.

    x is the layer's input and d the objective's gradient with respect to its output, sample first.
    A sample's weight gradient is the sum of d_t x_t' over positions t, so no loop is needed.
    """
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        x, d = x.transpose(1, 2), d.flatten(2).transpose(1, 2)
    x, d = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, d))
    if isinstance(layer, nn.LayerNorm):
        weight = (d * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)).sum(1)
    else:
        weight = torch.einsum("nto,nti->noi", d, x)
    return {"weight": weight.square().sum(0).view_as(layer.weight),
            "bias": d.sum(1).square().sum(0)}


def sensitivity(model: nn.Module, images: Tensor, labels: Tensor | np.random.Generator,
                chunk: int = 16, weights: Params | None = None, names=None) -> Params:
    """Diagonal Fisher information, float64: the sum over samples of (d log p(y|x) / d theta)^2.

    Iurada et al. 2025, eq. 7. Samples are squared one by one, for a batch's gradient would mix
    them; `chunk` of them at a time bounds the memory and changes nothing. A generator as `labels`
    draws them from the model's own distribution. `weights` stand in for the stored ones, which
    never change. KeyError for `names` that are not of a Linear, Conv2d or LayerNorm, ValueError
    where images and labels differ in number.
    """
    if isinstance(labels, Tensor) and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels: they must be as many")
    weights = {n: p.detach() for n, p in model.named_parameters()} | (weights or {})
    total = {n: torch.zeros_like(weights[n], dtype=torch.float64)
             for n in (maskable(model) if names is None else names)}
    layers = {m: layer for m, layer in model.named_modules() if isinstance(layer, LAYERS)}
    if foreign := [n for n in total if n.rpartition(".")[0] not in layers]:
        raise KeyError(f"{foreign} are not parameters of a Linear, Conv2d or LayerNorm")

    def watch(m, layer, inputs, output):
        def score(d):
            for p, squares in squared_gradients(layer, inputs[0].detach(), d).items():
                if f"{m}.{p}" in total:
                    total[f"{m}.{p}"] += squares
        output.register_hook(score)

    hooks = [layers[m].register_forward_hook(partial(watch, m)) for m in
             {n.rpartition(".")[0] for n in total}]
    model.eval()
    try:
        for i in range(0, len(images), chunk):
            x = prepare(images[i:i + chunk], model).detach().requires_grad_()
            logp = torch.func.functional_call(model, weights, (x,)).log_softmax(1)
            y = labels[i:i + chunk] if isinstance(labels, Tensor) else _sample(logp, labels)
            torch.autograd.grad(logp.gather(1, y[:, None]).sum(), x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _sample(logp: Tensor, draw: np.random.Generator) -> Tensor:
    """One label for every row of log-probabilities (n, classes)."""
    uniform = torch.from_numpy(draw.random((len(logp), 1))).to(logp.device)
    labels = torch.searchsorted(logp.detach().double().exp().cumsum(1), uniform)[:, 0]
    return labels.clamp(max=logp.shape[1] - 1)  # the sum may end below 1 by rounding


def sample_labels(model: nn.Module, images: Tensor, seed: int, batch: int = 500) -> Tensor:
    """Labels (n,) drawn from the model's own predictive distribution, in eval mode."""
    draw = rng("labels", seed)
    model.eval()
    with torch.inference_mode():
        return torch.cat([_sample(model(prepare(x, model)).log_softmax(1), draw)
                          for x in images.split(batch)])


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {n: part.view_as(p) for (n, p), part in zip(like.items(), parts, strict=True)}


def lowest(scores: Tensor, k: int, draw: np.random.Generator) -> Tensor:
    """True at exactly `k` of the lowest of the flat `scores`; ties at the cut are drawn.

    Raises ValueError for scores that are not numbers. (torch.quantile refuses 2^24 entries.)
    """
    if scores.isnan().any():
        raise ValueError("the scores hold NaN: is the model finite on these images?")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(k).values
    keep, ties = scores < cut, (scores == cut).nonzero()[:, 0]
    chosen = draw.permutation(len(ties))[:k - int(keep.sum())]
    keep[ties[torch.from_numpy(chosen).to(ties.device)]] = True
    return keep


def calibrate_mask(model: nn.Module, images: Tensor | list[Tensor], *, rule: str, sparsity: float,
                   rounds: int = 4, labels=None, soft: float = 0.1, seed: int = 0, names=None,
                   combine: str = "mean", participation: float = 1.0, chunk: int = 8) -> Params:
    """A mask (bool, True = trained) with exactly round((1 - sparsity) * m) of m entries True.

    Sensitivity rules follow Iurada et al. 2025, Algorithm 1: each of `rounds` scores afresh with
    frozen weights damped by `soft` and labels redrawn (unless given), then cuts further; what is
    frozen never returns. Lists of images (and labels), a tensor a client, calibrate in federation:
    a share `participation` of the clients scores, and the server combines by "mean", "max" (of the
    scores per image) or "vote" (each client's own cut as a bitmap). `names` defaults to `maskable`.
    """
    if rule not in RULES or not 0 <= sparsity <= 1 or rounds < 1 or (
            combine not in ("mean", "max", "vote")):
        raise ValueError(f"{rule=} must be one of {RULES}, {sparsity=} from 0 to 1, {rounds=} at "
                         f"least 1, and {combine=} 'mean', 'max' or 'vote'")
    weights = {n: model.get_parameter(n).detach()
               for n in (maskable(model) if names is None else names)}
    m, draw = sum(w.numel() for w in weights.values()), rng("mask", seed)
    if rule not in ("least_sensitive", "most_sensitive"):
        scores = _static_scores(rule, weights, draw)
        return unflat(lowest(scores, round((1 - sparsity) * m), draw), weights)
    clients = [images] if isinstance(images, Tensor) else images
    labels = [labels] if isinstance(images, Tensor) else labels or [None] * len(clients)
    sign = 1 if rule == "least_sensitive" else -1
    active = torch.ones_like(flat(weights), dtype=torch.bool)
    for r in range(1, rounds + 1):
        keep, fresh, total = round((1 - sparsity) ** (r / rounds) * m), rng("labels", seed, r), None
        damped = {n: torch.where(c, weights[n], soft * weights[n])
                  for n, c in unflat(active, weights).items()}
        for k in np.sort(cohort(len(clients), participation, "scorers", seed, r)):
            y = fresh if labels[k] is None else labels[k]
            score = flat(sensitivity(model, clients[k], y, chunk, damped, names)).mul_(sign)
            if combine == "vote":
                score = -lowest(score.masked_fill_(~active, math.inf), keep, draw).double()
            if combine == "max":
                score = score.div_(len(clients[k]))
                total = score if total is None else sign * torch.maximum(sign * total, sign * score)
            else:
                total = score if total is None else total.add_(score)
        active = lowest(total.masked_fill_(~active, math.inf), keep, draw)
    return unflat(active, weights)


def _static_scores(rule: str, weights: Params, draw: np.random.Generator) -> Tensor:
    """Scores of the rules that look at no data; the lowest are left free."""
    if "magnitude" in rule:
        return flat(weights).abs() * (1 if rule == "lowest_magnitude" else -1)
    scores = torch.from_numpy(draw.random(sum(w.numel() for w in weights.values())))
    scores = scores.to(flat(weights).device)
    if rule == "query_key":  # all other entries come after, should the budget reach them
        for n, part in unflat(scores, weights).items():
            part += 1
            if ".qkv." in n:
                part[:len(part) // 3 * 2] -= 1
    return scores


def composition(mask: Params) -> dict[str, list[int]]:
    """[free, all] entries of a ViT's mask per kind of layer; query, key and value apart."""
    counts = {}
    for n, c in mask.items():
        kind = re.sub(r"^blocks\.\d+\.", "", n)
        qkv = zip(("query", "key", "value"), c.chunk(3), strict=True)
        parts = qkv if ".qkv." in n else [("qkv", c)]
        for part, entries in parts:
            old = counts.get(name := kind.replace("qkv", part), (0, 0))
            counts[name] = [old[0] + int(entries.sum()), old[1] + entries.numel()]
    return counts


def overlap(a: Params, b: Params) -> float:
    """Intersection over union of the True entries of two masks; 1 where neither has any."""
    union = sum(int((a[n] | b[n]).sum()) for n in a)
    return sum(int((a[n] & b[n]).sum()) for n in a) / union if union else 1.0


# ------------------------------------------------------------------ task vectors
def add(a: Params, b: Params) -> Params:
    """Sum of two task vectors; KeyError unless both name the same weights."""
    if a.keys() != b.keys():
        raise KeyError(f"only one of the two has {sorted(a.keys() ^ b.keys())}")
    return {n: a[n] + b[n] for n in a}


def scale(vector: Params, alpha: float) -> Params:
    return {n: alpha * v for n, v in vector.items()}


def negate(vector: Params) -> Params:
    return scale(vector, -1)


def task_vector(tuned: Params, start: Params) -> Params:
    """tuned - start (Ilharco et al. 2023)."""
    return add(tuned, negate(start))


def apply_vector(start: Params, vector: Params, alpha: float = 1.0) -> Params:
    """start + alpha * vector."""
    return add(start, scale(vector, alpha))


def drift(vectors: list[Params]) -> dict:
    """How the task vectors of a cohort disagree: norms, pairwise cosines, sign-conflict rate.

    In conflict is an entry that some clients raise and others lower, among those that any moves.
    """
    v = torch.stack([flat({n: d[n] for n in vectors[0]}) for d in vectors])
    norms = v.norm(dim=1)
    up, down = (v > 0).any(0), (v < 0).any(0)
    conflict = (up & down).sum() / (up | down).sum().clamp(min=1)
    cosine = (v @ v.T) / (norms[:, None] * norms).clamp(min=1e-30)
    return dict(norms=norms.tolist(), cosine=cosine.tolist(), sign_conflict=conflict.item())


# ------------------------------------------------------------------ federated averaging
@dataclass(frozen=True)
class State:
    """All that a run needs to go on. `memory` is what its algorithm carries between rounds:
    momentum buffers, moments, control variates. Clients keep nothing else."""
    params: Params               # the server's trained weights
    round: int = 0               # rounds, or epochs, done
    history: tuple[dict, ...] = ()
    memory: dict[str, Params] = field(default_factory=dict)
    best: Params | None = None   # of the evaluation with the best validation accuracy
    best_round: int = 0
    seconds: float = 0.0
    error: str = ""              # why the run cannot go on


@dataclass(frozen=True)
class Run:
    """All that a run reads and never changes, and the model whose tensors it trains in place."""
    cfg: Config
    data: Data
    model: nn.Module
    trained: Params              # the model's own tensors that require gradients
    mask: Params | None
    shards: list[np.ndarray]     # indices of data.images
    facts: dict                  # provenance, for the stored result

    @cached_property
    def free(self) -> int:
        """Entries that are trained, and so travel."""
        return sum(int(c.sum()) for c in self.mask.values()) if self.mask else sum(
            p.numel() for p in self.trained.values())

    def load(self, params: Params):
        torch._foreach_copy_([p.data for p in self.trained.values()],
                             [params[n] for n in self.trained])


def cohort(num_clients: int, share: float, *key) -> np.ndarray:
    """max(1, round(share * K)) clients without replacement, drawn from (stream, seed, round)."""
    return rng(*key).choice(num_clients, max(1, round(share * num_clients)), replace=False)


def batches(run: Run, order: np.ndarray, draw: np.random.Generator):
    """The images of `order` (indices) in augmented batches of B, with their labels."""
    index = torch.from_numpy(order).to(run.data.images.device)
    for i in range(0, len(order), run.cfg.batch_size):
        batch = index[i:i + run.cfg.batch_size]
        yield augment(run.data.images[batch], draw), run.data.labels[batch]


def sgd_step(run: Run, opt: SparseSGDM, images: Tensor, labels: Tensor, adjust=None) -> Tensor:
    """One SGDM step; the loss stays on the device. `adjust` may change the gradients first."""
    context, loss_scale = precision(run.cfg)
    with context:
        loss = F.cross_entropy(run.model(prepare(images, run.model)), labels)
    opt.zero_grad()
    (loss * loss_scale).backward()
    grads = [p.grad for p in run.trained.values()]
    if loss_scale != 1:
        torch._foreach_mul_(grads, 1 / loss_scale)
    if adjust:
        adjust(grads)
    opt.step()
    return loss.detach()


def client_update(run: Run, state: State, k: int, lr: float) -> tuple[Params, Tensor]:
    """J local steps of client k from the server's weights w: its task vector w_k - w, mean loss.

    The vector is the model's own memory, good until the next client starts: memory does not grow
    with the cohort. FedProx pulls towards w (Li et al. 2018, eq. 2); SCAFFOLD adds c - c_k
    (Karimireddy et al. 2020, Algorithm 1).
    """
    cfg, server = run.cfg, list(state.params.values())
    theta, loss = [p.data for p in run.trained.values()], server[0].new_zeros(())
    control, own = (list(state.memory.get(key, {}).values()) for key in ("control", f"control/{k}"))

    def adjust(grads):
        if cfg.algorithm == "fedprox":
            torch._foreach_add_(grads, torch._foreach_sub(theta, server), alpha=cfg.prox_mu)
        if control:
            torch._foreach_add_(grads, control)
        if own:
            torch._foreach_sub_(grads, own)

    run.load(state.params)
    opt = SparseSGDM(run.trained.items(), lr, cfg.momentum, cfg.weight_decay, mask=run.mask)
    draw, need = rng("client", cfg.seed, state.round, k), cfg.local_steps * cfg.batch_size
    passes = [draw.permutation(run.shards[k]) for _ in range(-(-need // len(run.shards[k])))]
    for images, labels in batches(run, np.concatenate([*passes, run.shards[k]])[:need], draw):
        loss += sgd_step(run, opt, images, labels, adjust)
    torch._foreach_sub_(theta, server)
    return dict(zip(run.trained, theta, strict=True)), loss / max(1, cfg.local_steps)


def federated_round(run: Run, state: State) -> State:
    """One round of FedAvg (McMahan et al. 2017, Algorithm 1): w <- w + sum_k n_k/n (w_k - w).

    Raises FloatingPointError, naming the clients, where a loss is not finite.
    """
    cfg, lr = run.cfg, learning_rate(run.cfg, state.round / run.cfg.num_rounds)
    clients = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round).tolist()
    total = sum(len(run.shards[k]) for k in clients)
    mean, memory = {n: torch.zeros_like(w) for n, w in state.params.items()}, state.memory
    squares, losses = [], []
    for k in clients:
        vector, loss = client_update(run, state, k, lr)
        torch._foreach_add_(list(mean.values()), list(vector.values()),
                            alpha=len(run.shards[k]) / total)
        squares.append(squared_norm(vector))
        losses.append(loss)
        if cfg.algorithm == "scaffold":
            memory = new_control(cfg, state, memory, k, vector, lr)
    squares, losses = torch.stack(squares), torch.stack(losses)
    fedexp = squares.mean() / (2 * (squared_norm(mean) + 1e-12))  # Jhunjhunwala et al. 2023, eq. 8
    params, memory = server_step(cfg, state.params, mean, fedexp.clamp(min=1), memory)
    norms = torch.stack([squares.mean().sqrt(), squared_norm(mean).sqrt(), fedexp])
    losses, norms = losses.tolist(), norms.tolist()  # the round's only wait for the device
    watched = dict(zip(clients, losses, strict=True)) | {"norm of the task vectors": norms[0]}
    refuse_divergence(cfg, watched, state.round + 1, lr)
    sent = 4 * len(clients) * (1 + (cfg.algorithm == "scaffold"))  # bytes of an entry, in float32
    row = dict(round=state.round + 1, lr=lr, train_loss=sum(losses) / len(losses),
               client_norm=norms[0], mean_norm=norms[1], fedexp_step=norms[2],
               bytes_up=sent * run.free, bytes_down=sent * run.free,
               bytes_dense=sent * sum(p.numel() for p in run.model.parameters()))
    return replace(state, params=params, memory=memory, round=row["round"],
                   history=(*state.history, row))


def squared_norm(params: Params) -> Tensor:
    return torch.stack(torch._foreach_norm(list(params.values()))).square().sum()


def refuse_divergence(cfg: Config, watched: dict, unit: int, lr: float):
    if bad := {k: v for k, v in watched.items() if not math.isfinite(v)}:
        raise FloatingPointError(f"not finite in round or epoch {unit} at {lr=:g} (client: loss): "
                                 f"{bad}. Try a lower lr than {cfg.lr:g}.")


def new_control(cfg: Config, state: State, memory: dict, k: int, vector: Params, lr: float) -> dict:
    """SCAFFOLD's control variates after client k (Karimireddy et al. 2020, option II).

    c_k <- c_k - c + (w - w_k) / (lr a), and c moves by a K-th of the change. With momentum J steps
    of one gradient move by lr a times it, a = sum_{i<=J} (1 - mu^i) / (1 - mu): J where mu is 0.
    """
    a = sum((1 - cfg.momentum**i) / (1 - cfg.momentum) for i in range(1, cfg.local_steps + 1))
    zero = {n: torch.zeros_like(v) for n, v in vector.items()}
    c, own = state.memory.get("control", zero), memory.get(f"control/{k}", zero)
    fresh = {n: own[n] - c[n] - v / (lr * max(a, 1)) for n, v in vector.items()}
    moved = add(memory.get("control", zero), scale(task_vector(fresh, own), 1 / cfg.num_clients))
    return memory | {"control": moved, f"control/{k}": fresh}


def server_step(cfg: Config, params: Params, mean: Params, fedexp: Tensor, memory: dict):
    """(weights, memory) from the mean task vector: FedAvg, FedExP, or a torch optimizer for which
    it is the negative gradient (FedAvgM, Hsu et al. 2019; FedAdam, Reddi et al. 2021)."""
    if cfg.server in ("average", "fedexp"):
        eta = fedexp if cfg.server == "fedexp" else 1.0
        return {n: w + eta * mean[n] for n, w in params.items()}, memory
    weights = {n: nn.Parameter(w.clone()) for n, w in params.items()}
    if cfg.server == "momentum":
        opt = torch.optim.SGD(weights.values(), cfg.server_lr, cfg.server_momentum)
    else:
        opt = torch.optim.Adam(weights.values(), cfg.server_lr, (cfg.server_momentum, 0.99), 1e-3)
    for n, w in weights.items():
        w.grad = -mean[n]
        opt.state[w] = {key.removeprefix("server/"): kept[n].clone() if kept[n].dim() else
                        kept[n].cpu().clone()  # Adam counts its steps on the CPU
                        for key, kept in memory.items() if key.startswith("server/")}
    opt.step()
    kept = {f"server/{key}": {n: opt.state[w][key] for n, w in weights.items()}
            for key, value in opt.state[w].items() if isinstance(value, Tensor)}
    return {n: w.detach() for n, w in weights.items()}, memory | kept


def centralized_epoch(run: Run, state: State) -> State:
    """One epoch over the training part, momentum carried on; the rate is set at every step."""
    cfg, draw = run.cfg, rng("epoch", run.cfg.seed, state.round)
    run.load(state.params)
    opt = SparseSGDM(run.trained.items(), cfg.lr, cfg.momentum, cfg.weight_decay, mask=run.mask)
    for n, buffer in state.memory.get("momentum", {}).items():
        opt.state[run.trained[n]]["momentum_buffer"] = buffer.clone()
    steps, loss = math.ceil(len(run.data.train) / cfg.batch_size), 0.0
    for i, (images, labels) in enumerate(batches(run, draw.permutation(run.data.train), draw)):
        lr = learning_rate(cfg, (state.round + i / steps) / cfg.num_epochs)
        opt.param_groups[0]["lr"] = lr
        loss += sgd_step(run, opt, images, labels) / steps
    params = {n: p.detach().clone() for n, p in run.trained.items()}
    watched = {"training": float(loss), "squared norm of the weights": squared_norm(params).item()}
    refuse_divergence(cfg, watched, state.round + 1, lr)
    row = dict(round=state.round + 1, lr=lr, train_loss=float(loss))
    momentum = {n: opt.state[p]["momentum_buffer"] for n, p in run.trained.items() if cfg.momentum}
    return replace(state, params=params, memory={"momentum": momentum}, round=row["round"],
                   history=(*state.history, row))


# ------------------------------------------------------------------ checkpoints and results
@dataclass
class Store:
    """Where runs live: root/<run>.json, root/checkpoints/<run>/ and root/cache/ (masks, heads).

    A file is written beside its place, synced and renamed: a cut leaves the old one or the new one.
    With a `drive` every file is copied there too, and looked for there; what could not be copied is
    tried again with the next.
    """
    root: Path = field(default_factory=lambda: Path(os.environ.get("RESULTS_DIR") or "results"))
    drive: Path | None = None
    minutes: float = 1.0  # least time between two checkpoints of a run
    frozen: bool = False  # only what is stored: nothing is trained or computed
    late: set[str] = field(default_factory=set)  # not on the drive yet

    def places(self, name: str) -> list[Path]:
        return [Path(folder) / name for folder in (self.root, self.drive) if folder]

    def names(self, pattern: str) -> list[str]:
        return sorted({str(f.relative_to(p)) for p in self.places("") for f in p.glob(pattern)})

    def read(self, name: str) -> bytes:
        """The file's content, from the drive where `root` has none; FileNotFoundError without."""
        return next((p for p in self.places(name) if p.exists()), Path(name)).read_bytes()

    def write(self, name: str, content: bytes):
        _replace(self.places(name)[0], content)
        self.late |= {name} if self.drive else set()
        for waiting in sorted(self.late, key=lambda n: n.endswith(".json")):  # results last
            try:
                _replace(self.places(waiting)[1], self.places(waiting)[0].read_bytes())
                self.late.discard(waiting)
            except OSError as error:
                warnings.warn(f"{waiting} is only in {self.root} for now: {error}", stacklevel=2)

    def delete(self, name: str):
        self.late.discard(name)
        for path in filter(Path.exists, self.places(name)):
            try:
                os.truncate(path, 0)  # Drive's bin keeps a deleted file's size
                path.unlink()
            except OSError as error:  # no reason to stop a run
                warnings.warn(f"{path} cannot be deleted: {error}", stacklevel=2)

    def result(self, cfg: Config) -> dict | None:
        """The stored result of this run, if any; ValueError where the name holds another run."""
        if not self.names(f"{run_name(cfg)}.json"):
            return None
        result = json.loads(self.read(f"{run_name(cfg)}.json"))
        _refuse_other(cfg, result["identity"])
        return result

    def save(self, cfg: Config, state: State, keep: int = 2):
        """One file a checkpoint, its SHA-256 in its name; all but the newest `keep` are deleted."""
        groups = {"params": state.params, **state.memory}
        groups |= {"best": state.best} if state.best_round != state.round else {}
        card = {k: getattr(state, k) for k in ("round", "history", "best_round", "seconds")}
        content = safetensors.torch.save(
            {f"{group}:{n}": w.contiguous() for group, params in groups.items()
             for n, w in (params or {}).items()},
            {"card": json.dumps(card | {"identity": identity(cfg), "names": list(state.params)})})
        folder, sha = f"checkpoints/{run_name(cfg)}", hashlib.sha256(content).hexdigest()
        self.write(f"{folder}/{state.round:07d}_{sha}.safetensors", content)
        for old in self.names(f"{folder}/*.safetensors")[:-keep]:
            self.delete(old)

    def resume(self, cfg: Config) -> State | None:
        """The newest checkpoint that verifies; ValueError where the name holds another run."""
        for name in reversed(self.names(f"checkpoints/{run_name(cfg)}/*.safetensors")):
            content = self.read(name)
            if not name.endswith(f"{hashlib.sha256(content).hexdigest()}.safetensors"):
                warnings.warn(f"{name} is damaged: trying an older checkpoint", stacklevel=2)
                continue
            header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
            card = json.loads(header["__metadata__"]["card"])
            _refuse_other(cfg, card.pop("identity"))
            loaded, groups = safetensors.torch.load(content), {}
            for n in card.pop("names"):  # in this order: safetensors has another
                for key in [k for k in loaded if k.endswith(f":{n}")]:
                    groups.setdefault(key.partition(":")[0], {})[n] = loaded[key].to(device())
            params, best = groups.pop("params"), groups.pop("best", None)
            best = params if card["best_round"] == card["round"] else best
            card["history"] = tuple(card["history"])
            return State(params, memory=groups, best=best, **card)
        return None

    def cached(self, kind: str, key: dict, compute):
        """`compute()` kept under all that it depends on: weights in cache/, JSON in notes/."""
        name = f"{kind}_{digest(key)}"
        weights, note = f"cache/{name}.safetensors", f"notes/{name}.json"
        if self.names(weights):
            found = safetensors.torch.load(self.read(weights))
            return {n: w.to(device()) for n, w in found.items()}
        if self.names(note) or self.frozen:
            return json.loads(self.read(note)) if self.names(note) else {}
        value = compute()
        if all(isinstance(v, Tensor) for v in value.values()):
            self.write(weights, safetensors.torch.save(value))
        else:
            self.write(note, dump(value))
        return value


def _replace(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _refuse_other(cfg: Config, stored: dict):
    asked = identity(cfg)
    if differ := {k: (asked.get(k), stored.get(k)) for k in asked.keys() | stored.keys()
                  if asked.get(k) != stored.get(k)}:
        raise ValueError(
            f"{run_name(cfg)} is stored as another run. They differ in (asked, stored): {differ}. "
            "Choose another name, or leave name='' to have one derived.")


def dump(value) -> bytes:
    """JSON; a NaN is a ValueError here rather than a broken file later."""
    return json.dumps(value, indent=1, allow_nan=False).encode()


# ------------------------------------------------------------------ training
def head_of(cfg: Config, store: Store, data: Data, model: nn.Module) -> Params:
    """The head that a run starts from: solved on the training part, or a probe's."""
    def solve():  # in one place: the sums over the clients' shards are the same sums
        x, y = features(model, data.images[data.train]), data.labels[data.train]
        head = sharpen(ridge_head(x, y, cfg.ridge_l2, model.num_classes), x, y)
        return {n: w.float() for n, w in head.items()}
    if cfg.head == "ridge":
        return store.cached("head", dict(backbone=digest(backbone(model)), l2=cfg.ridge_l2,
                                         dataset=cfg.dataset, train=data.train.tolist()), solve)
    plain = {k: getattr(Config(), k)
             for k in ("prox_mu", "ridge_l2", "server_lr", "server_momentum")}
    probe = replace(cfg, name="", rule=None, head="probe", server="average", **plain,
                    num_rounds=cfg.head_rounds, num_epochs=cfg.head_rounds,
                    algorithm="centralized" if cfg.algorithm == "centralized" else "fedavg")
    if train(probe, store, test=False)["status"] != "finished":
        raise KeyboardInterrupt
    return store.resume(probe).best


def mask_of(cfg: Config, store: Store, data: Data, model: nn.Module, shards: list) -> Params:
    """The run's mask, calibrated at one place or by the clients, each on images of its shard."""
    central = cfg.calibration == "central" or not shards
    groups, share = ([data.train], 1.0) if central else (shards, cfg.calibration_clients)
    size = max(1, cfg.calibration_images // max(1, round(share * len(groups))))
    draw = rng("mask", cfg.seed, 1)
    index = [draw.permutation(g)[:size].tolist() for g in groups]
    options = dict(rule=cfg.rule, sparsity=cfg.sparsity, rounds=cfg.calibration_rounds,
                   seed=cfg.seed, participation=share,
                   combine="mean" if central else cfg.calibration)
    key = dict(options, dataset=cfg.dataset, index=index, model=digest(model.state_dict()))
    chunk = 8 if device().type == "cpu" else 32
    return store.cached("mask", key, lambda: calibrate_mask(
        model, [data.images[i] for i in index], chunk=chunk, **options))


def open_run(cfg: Config, store: Store) -> tuple[Run, State]:
    """Data, model, head, mask and shards of a run, and the state to go on from."""
    data, model = load_data(cfg), build_model(cfg)
    names, mask = [n for n, _ in model.named_parameters()], None
    facts, labels = dict(backbone=digest(backbone(model))), data.labels.cpu().numpy()[data.train]
    shards = [] if cfg.algorithm == "centralized" else [
        data.train[s] for s in shard(labels, cfg.num_clients, cfg.classes_per_client, cfg.seed)]
    if cfg.head == "probe":
        names = HEAD
    elif cfg.rule or cfg.head == "ridge":
        model.load_state_dict(backbone(model) | head_of(cfg, store, data, model))
        names = backbone(model) if cfg.rule else names
    if cfg.rule:
        names = mask = mask_of(cfg, store, data, model, shards)
        scored = cfg.calibration != "central" and shards and cfg.rule in RULES[:2]
        scorers = scored and cfg.calibration_rounds * len(cohort(
            cfg.num_clients, cfg.calibration_clients, "scorers", cfg.seed, 1))
        bits = 1 if cfg.calibration == "vote" else 32  # a bitmap, or a float32 a weight
        facts["mask"] = dict(sha256=digest(mask), composition=composition(mask),
                             bytes_up=bits * flat(mask).numel() // 8 * int(scorers))
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = State({n: p.detach().clone() for n, p in trained.items()})
    return Run(cfg, data, model, trained, mask, shards, facts), store.resume(cfg) or start


def assess(run: Run, state: State) -> State:
    """Adds validation loss and accuracy to the last row, and keeps the best weights so far."""
    index = run.data.val[:run.cfg.eval_images]
    run.load(state.params)
    found = evaluate(run.model, run.data.images[index], run.data.labels[index],
                     context=precision(run.cfg)[0])
    *rows, row = state.history
    refuse_divergence(run.cfg, {"validation": found["loss"]}, state.round, row["lr"])
    row |= {f"val_{k}": found[k] for k in ("loss", "top1", "top5")}
    state = replace(state, history=(*rows, row))
    if row["val_top1"] > max((r.get("val_top1", -1) for r in rows), default=-1):
        state = replace(state, best=state.params, best_round=state.round)
    return state


def fold(run: Run, store: Store, state: State) -> State:
    """Rounds (or epochs) until the run's length, stored on the way, at a stop and at the end."""
    cfg, saved = run.cfg, (state.round, time.monotonic())
    step = centralized_epoch if cfg.algorithm == "centralized" else federated_round
    with tqdm(total=cfg.length, initial=state.round, desc=run_name(cfg), leave=False) as bar:
        try:
            while state.round < cfg.length:
                began, after = time.monotonic(), step(run, state)
                if after.round % cfg.eval_every == 0 or after.round == cfg.length:
                    after = assess(run, after)
                    bar.set_postfix(val=f"{after.history[-1]['val_top1']:.1%}")
                state = replace(after, seconds=after.seconds + time.monotonic() - began)
                bar.update()
                if (state.round - saved[0] >= cfg.eval_every and state.round < cfg.length
                        and time.monotonic() - saved[1] >= 60 * store.minutes):
                    store.save(cfg, state)
                    saved = (state.round, time.monotonic())
        except KeyboardInterrupt:
            pass
        except FloatingPointError as error:
            state = replace(state, error=str(error))
    store.save(cfg, state, keep=1 if state.round == cfg.length else 2)
    return state


def train(cfg: Config, store: Store | None = None, test: bool = True) -> dict:
    """The run's result: found in the store, or trained from where it stopped, then stored.

    `status` is "finished", "diverged" (the loss was not finite; `error` says where), "interrupted"
    (stopped by hand; call again to go on) or "missing" (in a frozen store). The test set is read
    once, by the weights that were best on validation, and not at all with `test=False`.
    """
    store = store or Store()
    result = store.result(cfg)
    if store.frozen or result and (result["status"] == "diverged" or "test" in result or not test):
        return result or dict(run=run_name(cfg), status="missing", round=0)
    try:
        run, state = open_run(cfg, store)
    except KeyboardInterrupt:
        return dict(run=run_name(cfg), status="interrupted", round=0)
    state = fold(run, store, state)
    if state.round < cfg.length and not state.error:
        return dict(run=run_name(cfg), status="interrupted", round=state.round)
    result = dict(run=run_name(cfg), status="diverged" if state.error else "finished",
                  error=state.error, config=asdict(cfg), identity=identity(cfg), **run.facts,
                  history=state.history, best_round=state.best_round, seconds=state.seconds,
                  device=str(device()), hardware=hardware(),
                  versions={p: version(p) for p in ("torch", "torchvision", "timm", "numpy")},
                  code=hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    if test and not state.error:
        run.load(state.best)
        result["test"] = evaluate(run.model, run.data.test_images[:cfg.eval_images],
                                  run.data.test_labels[:cfg.eval_images],
                                  context=precision(cfg)[0])
    store.write(f"{run_name(cfg)}.json", dump(result))
    return store.result(cfg)


def train_centralized(cfg: Config, store: Store | None = None, test: bool = True) -> dict:
    """`train` on the pooled training part, for `num_epochs`."""
    return train(replace(cfg, algorithm="centralized"), store, test)


def train_federated(cfg: Config, store: Store | None = None, test: bool = True) -> dict:
    """`train` over `num_clients` simulated clients, for `num_rounds`."""
    if cfg.algorithm == "centralized":
        raise ValueError("algorithm='centralized' is for train_centralized: choose 'fedavg', "
                         "'fedprox' or 'scaffold'")
    return train(cfg, store, test)


def train_all(cfgs: list[Config], store: Store, test: bool = True):
    """`train` one after the other what is not stored; stopping by hand stops them all."""
    for cfg in tqdm([c for c in cfgs if not store.frozen], desc="runs"):
        if train(cfg, store, test)["status"] == "interrupted":
            print(f"Stopped within {run_name(cfg)}: run this cell again to go on from there.")
            break


def diagnose(cfg: Config, store: Store, alphas=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0)) -> dict:
    """`drift` of one cohort at a finished run's best weights, and the validation loss along the
    mean task vector; kept in the store. Holds the whole cohort's vectors at once."""
    def compute():
        run, state = open_run(cfg, store)
        state = replace(state, params=state.best, memory={}, round=cfg.num_rounds)
        clients = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round)
        vectors = [{n: v.clone() for n, v in client_update(run, state, k, cfg.lr)[0].items()}
                   for k in clients.tolist()]
        mean = {n: torch.stack([v[n] for v in vectors]).mean(0) for n in vectors[0]}
        index, losses = run.data.val[:run.cfg.eval_images], []
        for alpha in alphas:
            run.load(apply_vector(state.params, mean, alpha))
            found = evaluate(run.model, run.data.images[index], run.data.labels[index])
            losses.append(found["loss"])
        return drift(vectors) | dict(clients=clients.tolist(), alphas=alphas, losses=losses)
    return store.cached("drift", dict(identity(cfg), alphas=alphas), compute)


# ------------------------------------------------------------------ notebook helpers
COLUMN, PAGE = 3.28, 6.88  # widths in inches of a two-column report
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
         "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.4, "pdf.fonttype": 42,
         "figure.constrained_layout.use": True, "savefig.dpi": 200, "figure.dpi": 120}


def figure(width: float = COLUMN, height: float = 2.3, **grid):
    """plt.subplots of `width` x `height` inches in the one style of all figures."""
    sns.set_theme("paper", "whitegrid", "colorblind", rc=STYLE)
    return plt.subplots(figsize=(width, height), **grid)


def heatmap(table, ax, label: str, fmt: str = ".1f", **options):
    """A table's numbers, in colour and in print; missing cells, or all of them, stay blank."""
    table = pd.DataFrame(table).astype(float)
    if table.notna().any(axis=None):
        sns.heatmap(table, annot=True, fmt=fmt, cmap="viridis", ax=ax, cbar_kws={"label": label},
                    **options)
        ax.tick_params(axis="y", rotation=0)


def save_figure(fig, path: Path):
    """<path>.png and <path>.pdf, the same bytes for the same data: no dates inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.text(0.5, 0.5, "\n".join(NOTES), c="red", alpha=0.4, size=14, ha="center")
    fig.savefig(f"{path}.png")
    fig.savefig(f"{path}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def save_table(frame: pd.DataFrame, path: Path):
    """<path>.tex with booktabs rules, index included; cells that are not strings get two digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = "l" * frame.index.nlevels + "r" * frame.shape[1]
    Path(f"{path}.tex").write_text(frame.to_latex(column_format=columns, float_format="%.2f",
                                                  escape=True, na_rep="--"))


def open_store(preset_name: str, drive: Path | None = None) -> Store:
    """results/ (for "demo" results/demo/) of $RESULTS_DIR or the project, mirrored on the drive.

    TRAIN=no in the environment freezes it: figures are drawn from what is stored.
    """
    part = "demo" if preset_name == "demo" else ""
    home = Path("results").absolute() if drive else ROOT / "results"  # the drive is slow: copied to
    root = Path(os.environ.get("RESULTS_DIR") or home) / part
    return Store(root, drive and drive / "results" / part, frozen=os.environ.get("TRAIN") == "no")


def stored(store: Store, **wanted) -> list[Config]:
    """Configurations of the stored results whose fields have the `wanted` values."""
    configs = [json.loads(store.read(n))["config"] for n in store.names("*.json")]
    return [Config(**c) for c in configs if all(c[k] == v for k, v in wanted.items())]


def best(cfgs: list[Config], store: Store) -> Config:
    """The configuration with the highest validation accuracy; the first, where none is stored."""
    def score(cfg):
        history = (store.result(cfg) or {"history": []})["history"]
        return max((row.get("val_top1", 0) for row in history), default=0)
    return max(cfgs, key=score)


def converged(history: pd.DataFrame, points: float = 0.5) -> pd.Series:
    """For every run the first round (or epoch) within `points` of its best validation accuracy."""
    seen = history.dropna(subset="val_top1")
    near = seen[seen.val_top1 >= seen.groupby("run").val_top1.transform("max") - points]
    return near.groupby("run")["round"].min()


def gather(cfgs: list[Config], store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, history) of the stored results among `cfgs`: a row a run, a row a round of a run.

    Accuracies in %. Says how many runs are missing or diverged: figures show them as gaps.
    """
    results = [r for r in map(store.result, cfgs) if r]
    missing, bad = len(cfgs) - len(results), [r["run"] for r in results if r["error"]]
    if missing or bad:
        print(f"{missing} of {len(cfgs)} runs are missing, {len(bad)} diverged {bad or ''}", *NOTES)
    names = [f.name for f in fields(Config)]
    measures = ["run", "round", "train_loss", "client_norm", "mean_norm", "fedexp_step",
                "bytes_up", "bytes_down", "bytes_dense", "val_loss", "val_top1", "val_top5"]
    rows = [r["config"] | {"run": r["run"]} | row for r in results for row in r["history"]]
    history = pd.DataFrame(rows, columns=[*names, *measures])
    history = history.astype(dict.fromkeys(measures[1:], float))
    history["val_top1"] *= 100
    scores = history.groupby("run").val_top1.max()
    runs = pd.DataFrame([r["config"] | {k: r[k] for k in ("run", "seconds", "best_round")} | {
        "val": scores.get(r["run"]), "test": 100 * r["test"]["top1"] if "test" in r else None}
        for r in results], columns=[*names, "run", "seconds", "best_round", "val", "test"])
    for frame in (runs, history):
        nc = frame.classes_per_client.map(lambda n: "IID" if pd.isna(n) else f"Nc={int(n)}")
        frame["sharding"] = nc.where(frame.algorithm != "centralized", "centralised")
    return runs.astype({"val": float, "test": float}), history


def mean_sd(values: pd.Series) -> str:
    """"mean ± sd (n)" over seeds; one run has no sd, none is a dash."""
    values = values.dropna()
    sd = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{sd} ({len(values)})" if len(values) else "–"


@lru_cache
def _seconds_per_step(cfg: Config) -> float:
    """Measured on three local steps of a fresh model."""
    run, state = open_run(replace(cfg, local_steps=3), Store(Path(os.devnull)))
    client_update(run, state, 0, cfg.lr)
    began = time.monotonic()
    client_update(run, state, 0, cfg.lr)[1].item()
    return (time.monotonic() - began) / 3


def plan(cfgs: list[Config], store: Store) -> pd.DataFrame:
    """What of these runs is stored and what is left, with an estimate of the time it takes."""
    rows = []
    for cfg in cfgs:
        names = store.names(f"checkpoints/{run_name(cfg)}/*.safetensors")
        done = cfg.length if store.result(cfg) else int(Path(names[-1]).name[:7]) if names else 0
        cohort_size = max(1, round(cfg.participation * cfg.num_clients))
        steps = (cfg.local_steps * cohort_size if cfg.algorithm != "centralized" else
                 50_000 * (1 - cfg.val_fraction) / cfg.batch_size)
        plain = Config(weights="none", arch=cfg.arch or "vits16", dataset=cfg.dataset,
                       image_size=cfg.image_size, batch_size=cfg.batch_size)
        left = cfg.length - done
        seconds = left and left * steps * _seconds_per_step(plain)
        rows.append(dict(run=run_name(cfg), stored=done, of=cfg.length, minutes_left=seconds / 60))
    frame = pd.DataFrame(rows)
    print(f"{(frame.stored == frame.of).sum()} of {len(frame)} runs are stored; training the rest "
          f"takes about {frame.minutes_left.sum():.0f} min on {hardware()}", *NOTES)
    return frame
