"""What every run starts from: configuration, randomness, data and shards, model and evaluation.

Every random draw is a function of (stream, seed, round, client), so no generator state is ever
stored and a resumed run repeats the unbroken one bit by bit.
"""
import hashlib
import json
import math
import os
import platform
import re
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

Params = dict[str, Tensor]  # keyed by parameter name: weights, scores, masks, task vectors
ROOT = Path(__file__).resolve().parent.parent
NOTES: set[str] = set()  # what every figure and summary must say of its data

# ------------------------------------------------------------------ configuration
RULES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random",
         "query_key")
Name = Annotated[str, Field(pattern=r"^([\w+=-][\w.+=-]*)?$", max_length=200)]  # of a file
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
    name: Name = ""  # results/<name>.json; "" derives it
    # data and model
    dataset: Literal["cifar100", "synthetic"] = "cifar100"
    arch: Literal["", "vits16", "mini"] = ""  # "" follows the weights
    weights: Annotated[str, Field(min_length=1)] = "dino"  # "dino", "mini", "none" or a path
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

    @property
    def architecture(self) -> str:
        """A name in ARCHS: `arch`, or that of the weights."""
        return self.arch or ("mini" if self.weights == "mini" else "vits16")


_SMALL = dict(weights="mini", arch="mini", image_size=32, batch_size=32, lr=0.1, num_rounds=32,
              num_epochs=4, eval_every=8, head_rounds=16)
PRESETS = {"full": {}, "lite": {"image_size": 96}, "small": _SMALL,
           "demo": _SMALL | dict(val_fraction=0.9, eval_images=500, participation=0.04,
                                 batch_size=16, lr=0.05, num_rounds=4, num_epochs=2,
                                 eval_every=2, head_rounds=4, calibration_images=128)}


def preset(name: str, **changes) -> Config:
    """The configuration "full", "lite", "small" or "demo", with `changes`.

    full: DINO ViT-S/16 at 224 px. lite: the same at 96 px. small: a ViT of 1.2 M parameters at 32
    px, for a CPU. demo: the same on a tenth of the images for minutes; it warns and takes synthetic
    images where CIFAR-100 cannot be had.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} must be one of {tuple(PRESETS)}")
    cfg = replace(Config(), **PRESETS[name] | changes)
    try:
        if name == "demo":
            load_data(cfg)
    except FileNotFoundError as error:
        warnings.warn(f"SYNTHETIC DATA, its accuracies mean nothing: {error}", stacklevel=2)
        # it has 120 images a class: with half of them all shardings of 100 clients can be had
        cfg = replace(cfg, **{"val_fraction": 0.5} | changes | {"dataset": "synthetic"})
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


def code_version() -> str:
    """SHA-256 (hex) of the modules that a result depends on."""
    files = [ROOT / "utils.py", *sorted((ROOT / "notebooks").glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


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
    if stream not in STREAMS or any(k < 0 for k in key):
        raise ValueError(f"{stream=} is not in tuple {STREAMS}, or its {key=} is negative")
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


def world_size() -> int:
    """How many processes torchrun started, 1 without it; asks the environment, joins no group."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def ranks() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless torchrun started several."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave_ranks():
    """Ends what `ranks` began: the last act of a process that is done, never of one that failed.

    A process that exits with its group alive is now and then aborted by its own threads; one that
    leaves while others wait for it would wait for them, and torchrun must stop it instead.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(*tensors: Tensor):
    """Replaces float32 tensors by their sums over all processes, in one all-reduce."""
    if ranks()[1] > 1:
        total = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(total)
        for t, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def from_rank_0(compute):
    """What `compute()` gives on rank 0, on every rank."""
    if ranks()[1] == 1:
        return compute()
    box = [compute() if ranks()[0] == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def device() -> torch.device:
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else (
        torch.device("cpu"))


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def load_data(cfg: Config) -> Data:
    """CIFAR-100 from $DATA_DIR, else ./data, else downloaded; or the synthetic set.

    Raises FileNotFoundError where CIFAR-100 is neither stored nor to be had.
    """
    NOTES.update({"SYNTHETIC DATA"} if cfg.dataset == "synthetic" else ())
    arrays = _read(cfg.dataset, os.environ.get("DATA_DIR") or "data", device())
    return Data(*arrays, *split(arrays[1].cpu().numpy(), cfg.val_fraction, cfg.seed))


PER_CLASS = {"cifar100": 500, "synthetic": 120}  # training images, before validation is split off


@lru_cache(maxsize=2)  # a grid of runs reads the files once
def _read(dataset: str, folder: str, where: torch.device) -> list[Tensor]:
    if dataset == "synthetic":
        sizes = PER_CLASS[dataset], 20
        return [t.to(where) for per_class in sizes for t in _synthetic(per_class)]
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
    patterns, draw = F.interpolate(patterns, size=32, mode="bicubic"), rng("synthetic", per_class)
    noise = (torch.from_numpy(draw.normal(size=(per_class, 3, 32, 32))) for _ in patterns)
    images = torch.cat([(128 + 40 * p + 40 * n).clamp(0, 255).to(torch.uint8)
                        for p, n in zip(patterns, noise, strict=True)])
    return images, torch.arange(100).repeat_interleave(per_class)


def split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) of `labels` (n,): val holds round(val_fraction * n_c) of every class c.

    Raises ValueError where a class would be left without a training or a validation image.
    """
    if np.ndim(labels) != 1 or len(labels) == 0 or not 0 < val_fraction < 1:
        raise ValueError(f"{val_fraction=} must lie between 0 and 1, and labels of shape "
                         f"{np.shape(labels)} be a list of some")
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
    if labels.ndim != 1 or not all(isinstance(k, int | np.integer | None)
                                   for k in (num_clients, classes_per_client)):
        raise TypeError(f"{num_clients=} and {classes_per_client=} must be whole numbers, and "
                        f"labels of shape {labels.shape} have one dimension")
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
    sizes, owed, parts = np.zeros((num_clients, n), int), np.zeros(num_clients), []
    for c, count, held in zip(range(n), counts, owned.T, strict=True):
        owners = draw.permutation(np.flatnonzero(held))
        if len(owners) > count:
            raise ValueError(f"{num_clients=} with {classes_per_client=} makes {len(owners)} "
                             f"clients share the {count} images of class {classes[c]}: lower one "
                             "of them")
        owed[owners] += count / len(owners)
        owners = owners[np.argsort(-owed[owners], kind="stable")]  # array_split's first are longer
        parts.append((owners, draw.permutation(np.flatnonzero(labels == classes[c]))))
        sizes[owners, c] = count // len(owners) + (np.arange(len(owners)) < count % len(owners))
        owed -= sizes[:, c]
    even_out(sizes, owned)
    shards = [[] for _ in range(num_clients)]
    for c, (owners, members) in enumerate(parts):
        cuts = np.split(members, np.cumsum(sizes[owners, c])[:-1])
        for k, part in zip(owners, cuts, strict=True):
            shards[k].append(part)
    return [np.concatenate(s) for s in shards]


def even_out(sizes: np.ndarray, owned: np.ndarray):
    """Rounds the sizes (clients, classes) so that clients' totals are as even as they can be.

    Owners of a class differ by at most one image there, and may swap who has the longer part. Along
    a chain of such swaps a client gives one image to one that has at least two fewer in total.
    """
    low = np.where(owned, sizes, sizes.max(initial=0)).min(0)
    while chain := _chain(sizes.sum(1), owned & (sizes > low), owned & (sizes == low)):
        for giver, taker, c in chain:
            sizes[giver, c] -= 1
            sizes[taker, c] += 1


def _chain(total: np.ndarray, longer: np.ndarray, shorter: np.ndarray) -> list[tuple]:
    """The shortest swaps (giver, taker, class) from a client to one with two fewer, or none."""
    for first in np.argsort(-total, kind="stable"):
        if total[first] - total.min() < 2:
            break
        queue, came = [first], {first: None}
        for k in queue:  # breadth first
            swaps = longer[k] & shorter
            for taker in np.flatnonzero(swaps.any(1)):
                if taker not in came:
                    came[taker] = (k, taker, swaps[taker].argmax())
                    queue.append(taker)
        if ends := [k for k in queue if total[k] <= total[first] - 2]:
            chain = [came[ends[0]]]
            while came[chain[-1][0]]:
                chain.append(came[chain[-1][0]])
            return chain
    return []


def cohort_size(num_clients: int, share: float) -> int:
    """The nearest whole number to share * K, at least one client."""
    if not 0 < share <= 1:
        raise ValueError(f"{share=} of the clients must lie between 0 and 1")
    return max(1, round(share * num_clients))


def cohort(num_clients: int, share: float, *key) -> np.ndarray:
    """`cohort_size` clients without replacement, drawn from (stream, seed, round)."""
    return rng(*key).choice(num_clients, cohort_size(num_clients, share), replace=False)


def augment(images: Tensor, draw: np.random.Generator, pad: int = 4) -> Tensor:
    """Random crop after zero-padding and random flip of uint8 (n, 3, h, w), in one gather."""
    n, _, height, width = images.shape
    top, left = draw.integers(0, 2 * pad + 1, (2, n, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    columns = np.where(draw.random((n, 1)) < 0.5, columns[:, ::-1], columns)
    index = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    index = torch.from_numpy(index).to(images.device, non_blocking=True).view(n, 1, -1)
    padded = F.pad(images, (pad,) * 4).flatten(2)
    return padded.gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


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
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} and type {images.dtype} must be "
                         "uint8 (n, 3, height, width)")
    mean, std = _imagenet(images.device)
    x, size = images.float().div_(255), model.patch_embed.img_size
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.sub_(mean).div_(std)


# ------------------------------------------------------------------ model and evaluation
ARCHS = {"vits16": dict(model_name="vit_small_patch16_224"),
         "mini": dict(model_name="vit_tiny_patch16_224", patch_size=8, embed_dim=128, depth=6,
                      num_heads=4)}
DINO_HUB = ("timm/vit_small_patch16_224.dino", "model.safetensors")
DINO = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
HEAD = ("head.weight", "head.bias")


def build_model(cfg: Config, num_classes: int = 100) -> nn.Module:
    """A ViT with its pre-trained backbone, position embedding resampled, and a new head.

    Raises ValueError unless exactly the backbone's weights are found, all in shape.
    """
    arch = ARCHS[cfg.architecture]
    if cfg.image_size % (patch := arch.get("patch_size", 16)):
        raise ValueError(f"image_size={cfg.image_size} must be a multiple of the patch, {patch}")
    with torch.random.fork_rng():  # timm draws from torch's global generator
        torch.manual_seed(int(rng("init", cfg.seed).integers(2**31)))
        model = timm.create_model(**arch, img_size=cfg.image_size, num_classes=num_classes)
    if cfg.weights != "none":
        state = {n: w for n, w in _read_weights(cfg.weights).items() if not n.startswith("head.")}
        try:
            state["pos_embed"] = timm.layers.resample_abs_pos_embed(
                state["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=1)
            model.load_state_dict(state | {n: model.get_parameter(n) for n in HEAD})  # strict
        except (KeyError, RuntimeError, IndexError, AssertionError) as error:
            raise ValueError(f"the weights {cfg.weights!r} do not fit {arch}: {error}") from error
    return model.to(device())


def _read_weights(source: str) -> Params:
    """Backbone weights in float32: "dino", "mini", or a .safetensors, .pth or .pt file."""
    if source != "dino":
        return _read_file(str(ROOT / "weights/mini.safetensors") if source == "mini" else source)
    errors = []
    for fetch in (_from_hub, _from_release):
        try:
            path, sha = fetch()
        except Exception as error:  # the hub clients raise many kinds: all are reported below
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            continue
        if sha != (found := _sha256(path)):
            raise ValueError(f"{path} has SHA-256 {found} and not {sha}: it is damaged, or another "
                             "file. Delete it and run again.")
        return _read_file(path)
    raise FileNotFoundError(
        "DINO's weights cannot be downloaded. Connect to the network and run again; or put "
        f"{DINO.rpartition('/')[2]} on disk and set weights='<its path>'; or use the small ViT of "
        f"this repository, preset('demo'). Tried: {'; '.join(errors)}")


def _from_hub() -> tuple[str, str]:
    """Path of timm's copy on the Hugging Face Hub, and the SHA-256 that the Hub publishes of it."""
    path = hf_hub_download(*DINO_HUB)
    blob = os.path.basename(os.path.realpath(path))  # the cache calls a blob by its SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob):
        return path, blob
    return path, get_hf_file_metadata(hf_hub_url(*DINO_HUB)).etag  # a cache without links


def _from_release() -> tuple[str, str]:
    """Path of the authors' file and its SHA-256 when it was downloaded: they publish none."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(DINO))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(DINO, path)
    known = Path(f"{path}.sha256")
    if not known.exists():
        known.write_text(sha := _sha256(path))
        warnings.warn(f"The authors of DINO publish no checksum: {path} has SHA-256 {sha} and must "
                      "keep it from now on.", stacklevel=2)
    return path, known.read_text()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_file(path: str) -> Params:
    """Weights of a file that may come from anyone, in float32: nothing in it is executed.

    Raises ValueError naming the file where it holds anything but finite floating-point weights, or
    would take more memory than it has bytes (a bomb: neither format compresses).
    """
    size = os.path.getsize(path)
    load = safetensors.torch.load_file if path.endswith(".safetensors") else partial(
        torch.load, map_location="cpu", weights_only=True)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (unpacked := sum(part.file_size for part in archive.infolist())) > size:
                    raise ValueError(f"it would unpack to {unpacked} bytes from {size}")
        weights = load(path)
    except Exception as error:  # the readers raise many kinds
        raise ValueError(f"{path} is not a file of weights: {error}") from error
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds a {type(weights).__name__}, not weights by name")
    for n, w in weights.items():
        if not isinstance(n, str) or not isinstance(w, Tensor) or not w.is_floating_point() or (
                w.device.type != "cpu" or w.layout != torch.strided):
            raise ValueError(f"{path} holds {n!r}, which is no floating-point weight")
        if w.numel() * w.element_size() > size or not w.isfinite().all():
            raise ValueError(f"{path} holds {n!r} {tuple(w.shape)}, which is larger than the file "
                             "or not finite")
    return {n: w.float() for n, w in weights.items()}


def backbone(model: nn.Module) -> Params:
    """All weights but the head's."""
    return {n: w for n, w in model.state_dict().items() if n not in HEAD}


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {n: part.view_as(p) for (n, p), part in zip(like.items(), parts, strict=True)}


def squared_norm(params: Params) -> Tensor:
    return torch.stack(torch._foreach_norm(list(params.values()))).square().sum()


def features(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Backbone features (n, d), float32, of uint8 `images` (n, 3, h, w)."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model.forward_head(model.forward_features(prepare(x, model)),
                                             pre_logits=True) for x in images.split(batch)])


def refuse_labels(labels: Tensor, n: int, classes: int):
    """ValueError unless there are n labels, n at least 1, all of them 0 to classes - 1."""
    if len(labels) != n or not n:
        raise ValueError(f"{n} images have {len(labels)} labels: they must be as many, and some")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} must be 0 to {classes - 1}")


def ridge_sums(x: Tensor, labels: Tensor, num_classes: int = 100) -> tuple[Tensor, Tensor]:
    """X'X (d+1, d+1) and X'Y (d+1, classes) in float64: all that a client tells of its data."""
    refuse_labels(labels, len(x), num_classes)
    x = torch.cat([x.double(), x.new_ones(len(x), 1).double()], 1)
    return x.T @ x, x.T @ F.one_hot(labels, num_classes).double()


def ridge_from_sums(sums: list[tuple[Tensor, Tensor]], l2: float) -> Params:
    """The ridge head of all clients' data together, from their `ridge_sums`; the bias is free."""
    if not 0 < l2 < math.inf:
        raise ValueError(f"{l2=} must be positive")
    gram, target = (sum(part) for part in zip(*sums, strict=True))
    penalty = torch.full_like(gram[0], l2)
    penalty[-1] = 0
    w = torch.linalg.solve(gram + penalty.diag(), target)
    if not w.isfinite().all():
        raise ValueError("the ridge head is not finite: are the features?")
    return dict(zip(HEAD, (w[:-1].T.contiguous(), w[-1]), strict=True))


def ridge_head(x: Tensor, labels: Tensor, l2: float, num_classes: int = 100) -> Params:
    """Closed-form linear head on features x (n, d) and labels (n,), in float64."""
    return ridge_from_sums([ridge_sums(x, labels, num_classes)], l2)


def sharpen(head: Params, x: Tensor, labels: Tensor) -> Params:
    """The head times the power of two with the lowest cross-entropy on features x (n, d).

    Regression fits 0 and 1, not logits: the softmax of such numbers is close to uniform. Where the
    features fit perfectly no factor is too large, and the first step in training explodes:
    factors that leave other classes less than a tenth of the probability are out.
    """
    logits = x.double() @ head[HEAD[0]].T + head[HEAD[1]]
    factors = 2.0 ** torch.arange(10)
    nll = torch.stack([F.cross_entropy(s * logits, labels, reduction="none")
                       for s in factors.tolist()])
    losses = nll.mean(1).where((-nll).exp().mean(1) <= 0.9, math.inf)
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
    refuse_labels(labels, len(images), torch.iinfo(torch.int64).max)
    model.eval()
    rank, world = ranks()
    with torch.inference_mode(), context:
        parts = [model(prepare(x, model)).float() if i % world == rank else
                 torch.zeros(len(x), model.num_classes, device=x.device)
                 for i, x in enumerate(images.split(batch))]
        sum_over_ranks(logits := torch.cat(parts))
        refuse_labels(labels, len(images), logits.shape[1])
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
