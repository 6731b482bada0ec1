"""Federated learning under the lens of task arithmetic: the method, in one file.

Everything between a configuration and its stored result stands here, in reading order; each
section uses only the ones above it, and only third-party libraries are imported. Weights, scores,
masks and task vectors have one currency: `dict[str, Tensor]`, keyed by parameter name.

    configuration        Config, its key and its name; the tables of algorithms and mask rules
    randomness           every draw is a function of (stream, seed, round, client)
    data and shards      split, shards, cohorts, augmentation
    task vectors         sums and multiples of named tensors
    SparseSGDM           SGD with momentum that moves only the trainable entries
    sensitivity          the diagonal Fisher information, sample by sample
    masks                rules that score weights; calibration in rounds, central or federated
    one local step       device, learning rate, precision, gradient
    federated averaging  a client's update, the cohort's, the round; the hooks of an algorithm
    the resumable loop   evaluation, epochs, rounds with checkpoints
    plumbing             data sets, backbones, heads, storage, training by name

To change a default, see `Config` and `PRESETS`; how images are shared out, `shard`; what a client
or the server does, subclass `FedAvg` and call `register_algorithm`; which weights are trained,
write a function and call `register_rule`.
"""
import ast
import dis
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import signal
import textwrap
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import filelock
import numpy as np
import safetensors.torch
import scipy.optimize
import timm
import torch
import torch.nn.functional as F
import torchvision
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = [
    # configuration and randomness
    "ALGORITHMS", "Config", "PRESETS", "Params", "ROOT", "RULES", "preset", "register_algorithm",
    "register_rule", "rng", "run_key", "run_name",
    # data and shards
    "Data", "augment", "cohort", "cohort_size", "load_data", "shard", "split",
    # task vectors
    "add", "apply_vector", "flatten", "negate", "scale", "squared_norm", "task_vector",
    "unflatten",
    # sparse training
    "SparseSGDM", "calibrate_mask", "maskable", "select_lowest", "sensitivity",
    "trainable_per_layer",
    # federated averaging
    "FedAvg", "Run", "State", "client_update", "federated_round",
    # models, runs and where they are stored
    "Store", "build_model", "device", "evaluate", "extract_features", "hardware", "open_run",
    "train", "train_centralized", "train_federated",
]

Params = dict[str, Tensor]  # keyed by parameter name: weights, scores, masks, task vectors
ROOT = Path(__file__).resolve().parent


# ------------------------------------------------------------------ configuration
ALGORITHMS: dict[str, type] = {}   # name -> subclass of FedAvg
RULES: dict[str, "Rule"] = {}      # name -> how a mask rule scores weights
NUM_CLASSES = {"cifar100": 100, "cifar10": 10, "synthetic": 100}
WEIGHT_FILES = {"mini": ROOT / "weights/mini.safetensors",
                "vits16_tin": ROOT / "weights/vits16_tin.safetensors"}

FILE_NAME = r"[\w+=-][\w.+=-]*"   # what may be part of a file's name
Name = Annotated[str, Field(pattern=f"^({FILE_NAME})?$", max_length=200)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Config:
    """One run, completely; the assignment's symbol stands beside its field.

    `dataclasses.replace` makes grids. Raises ValueError (pydantic's ValidationError) that names
    the field, its value and what is allowed.
    """
    name: Name = ""                        # results/<name>.json; "" derives it
    # data and model
    dataset: Literal["cifar100", "cifar10", "synthetic"] = "cifar100"
    weights: Annotated[str, Field(min_length=1)] = "dino"  # or in WEIGHT_FILES, "none", a path
    arch: Literal["vits16", "mini"] = "vits16"
    image_size: Count = 224                # pixels
    val_fraction: Share = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0  # of training and validation, for all seeds alike
    eval_images: Count | None = None       # None evaluates on all of validation and test
    test_curve: bool = False               # test loss in every evaluation; never used for a choice
    augmentation: Literal["none", "flip", "crop_flip"] = "flip"
    seed: Annotated[int, Field(ge=0)] = 0  # of shards, cohorts, order, augmentation, masks
    # federation
    algorithm: str = "fedavg"              # "centralized", or a name in ALGORITHMS
    num_clients: Count = 100               # K
    participation: Share = 0.1             # C, share of the clients in a round
    classes_per_client: Count | None = None  # Nc; None shards IID
    dirichlet_alpha: Positive | None = None  # label skew by Dirichlet(alpha) instead of Nc
    local_steps: Annotated[int, Field(ge=0)] = 4  # J, SGD steps of a client in a round
    num_rounds: Count = 500                # T
    num_epochs: Count = 15                 # length of a centralised run
    eval_every: Count = 10                 # rounds (centralised: epochs) between evaluations
    prox_mu: NotNegative = 0.01            # mu, of FedProx
    server_lr: Positive = 1.0              # of algorithms whose server has a rate
    server_momentum: Decay = 0.9           # of algorithms whose server has a momentum
    # optimisation
    batch_size: Count = 64                 # B
    micro_batch: Count | None = None       # images on the device at once; None: the whole batch
    lr: Positive = 1e-3                    # eta
    momentum: Decay = 0.9
    weight_decay: NotNegative = 5e-4
    schedule: Literal["constant", "cosine", "step", "warmup_cosine"] = "cosine"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    # head: fitted to frozen features ("logistic", "lda", "ridge"), or random ("train"; a sparse run
    # first trains it alone, for head_rounds). Sparse runs freeze it, "probe" trains nothing else.
    head: Literal["logistic", "lda", "ridge", "train", "probe"] = "logistic"
    head_rounds: Count = 30                # of the probe that head="train" begins with
    head_l2: Positive = 30.0               # penalty on squared weights, beside a sum over images
    # mask
    rule: str | None = None                # a name in RULES; None trains all weights
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.9  # s, share of the maskable weights frozen
    calibration_rounds: Annotated[int, Field(ge=1, lt=10_000)] = 4  # R
    calibration: Literal["central", "mean", "max", "vote"] = "central"  # or how clients combine
    calibration_images: Count = 512        # scored in a round of it, all clients together
    calibration_clients: Share = 1.0       # share of the clients that score in a round of it

    def __post_init__(self):
        known = ["centralized", *ALGORITHMS]
        if self.algorithm not in known:
            raise ValueError(f"algorithm={self.algorithm!r} is not one of {known}: import the "
                             "module that registers it, or call register_algorithm")
        if self.rule is not None and self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} is not one of {list(RULES)}: import the module "
                             "that registers it, or call register_rule")
        if self.rule and self.head == "probe":
            raise ValueError(f"head='probe' trains nothing that rule={self.rule!r} could mask: "
                             "set rule=None, or another head")
        if self.classes_per_client and self.dirichlet_alpha:
            raise ValueError(
                f"classes_per_client={self.classes_per_client} and dirichlet_alpha="
                f"{self.dirichlet_alpha:g} are two kinds of label skew: choose one")

    @property
    def centralized(self) -> bool:
        return self.algorithm == "centralized"

    @property
    def length(self) -> int:
        """Rounds of a federated run, epochs of a centralised one."""
        return self.num_epochs if self.centralized else self.num_rounds


# J * T = 512 steps, 11 epochs of a tenth of the clients: as many as a CPU does in minutes.
_SMALL = dict(
    weights="mini",
    arch="mini",
    image_size=32,
    batch_size=32,
    lr=0.1,
    num_rounds=128,
    num_epochs=8,
    eval_every=16,
    head_rounds=32,
)
# Every code path of the suite, as fast as can be: its accuracies are not meant to be good.
_DEMO = _SMALL | dict(
    val_fraction=0.9,
    eval_images=200,
    participation=0.04,
    batch_size=16,
    lr=0.05,
    num_rounds=4,
    num_epochs=2,
    eval_every=2,
    head_rounds=4,
    calibration_images=128,
)
PRESETS = {"full": dict(), "lite": dict(image_size=96), "small": _SMALL, "demo": _DEMO}


def preset(name: str, **changes) -> Config:
    """The configuration "full", "lite", "small" or "demo", with `changes`.

    full: DINO ViT-S/16 at 224 px. lite: the same at 96 px. small: a ViT of 1.2 M parameters at 32
    px, for a CPU. demo: the same on a tenth of the images, for minutes; on synthetic images, with
    a warning, where CIFAR-100 is not in `data_folder` and no `dataset` is asked for.
    Raises ValueError for another name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} must be one of {tuple(PRESETS)}")
    cfg = replace(Config(), **PRESETS[name] | changes)
    stored = (data_folder() / "cifar-100-python").is_dir()
    if name == "demo" and not stored and "dataset" not in changes:
        return on_synthetic(cfg, f"cifar100 is not in {data_folder()}; load_data downloads it")
    return cfg


def part_of(preset_name: str) -> str:
    """Folder of a preset inside those of results and of figures; "" for these themselves.

    Apart, since figures of one name would replace one another, and a session in Colab copies all
    results of its folder from Drive.
    """
    return "" if preset_name == "small" else preset_name


def on_synthetic(cfg: Config, reason: str) -> Config:
    """`cfg` on synthetic images, with a warning: its accuracies mean nothing."""
    warnings.warn(f"SYNTHETIC DATA, its accuracies mean nothing: {reason}", stacklevel=3)
    # it has 120 images a class: with half of them all shardings of 100 clients can be had
    return replace(cfg, dataset="synthetic", val_fraction=0.5)


def data_folder() -> Path:
    """$DATA_DIR, else data/ beside this file, wherever a notebook happens to run."""
    return Path(os.environ.get("DATA_DIR") or ROOT / "data").expanduser()


_MASK_FIELDS = {"sparsity", "calibration", "calibration_rounds", "calibration_images",
                "calibration_clients"}
_FEDERATED_FIELDS = {"num_clients", "participation", "classes_per_client", "dirichlet_alpha",
                     "local_steps", "num_rounds"}
_ALGORITHM_FIELDS = {"prox_mu", "server_lr", "server_momentum"}


def _unread_fields(cfg: Config) -> set[str]:
    """Fields that change nothing in this run: two runs that differ in them alone are one."""
    unread = {"name", "head_rounds", "head_l2"} | _ALGORITHM_FIELDS
    if cfg.head in ("logistic", "ridge"):
        unread -= {"head_l2"}
    if cfg.head == "train" and cfg.rule:
        unread -= {"head_rounds"}

    if cfg.centralized:
        unread |= _FEDERATED_FIELDS
    else:
        unread |= {"num_epochs"}

    if cfg.rule is None:
        unread |= _MASK_FIELDS
    elif not RULES[cfg.rule].needs_fisher:
        unread |= _MASK_FIELDS - {"sparsity"}
    elif cfg.calibration == "central":
        unread |= {"calibration_clients"}
    if not cfg.centralized:
        unread -= set(ALGORITHMS[cfg.algorithm].reads)
    return unread


def run_key(cfg: Config) -> dict:
    """All that decides a run's result: the fields that it reads, and hashes of what they name.

    Weights in a file are told apart by their content, algorithms and rules that are not built in
    by their source.
    """
    unread = _unread_fields(cfg)
    key = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in unread}

    path = weights_path(cfg.weights)
    if path is not None:
        key["weights_sha256"] = file_sha256(path)
    if not cfg.centralized and ALGORITHMS[cfg.algorithm].__module__ != __name__:
        key["algorithm_sha256"] = source_sha256(ALGORITHMS[cfg.algorithm])
    if cfg.rule and RULES[cfg.rule].score.__module__ != __name__:
        key["rule_sha256"] = source_sha256(RULES[cfg.rule].score)
    return key


def run_name(cfg: Config) -> str:
    """`cfg.name`, or a legible one that ends in a hash of the key: no two runs share it."""
    if cfg.name:
        return cfg.name
    words = [cfg.algorithm]
    if not cfg.centralized:
        words += [sharding_name(cfg), f"J{cfg.local_steps}"]
    words += [f"{cfg.rule}_{cfg.sparsity:g}" if cfg.rule else "dense"]
    words += [f"s{cfg.seed}", json_sha256(run_key(cfg))[:8]]
    return "_".join(words)


def sharding_name(cfg: Config) -> str:
    """How a federated run shares its images out, as part of a file's name."""
    if cfg.classes_per_client:
        return f"nc{cfg.classes_per_client}"
    if cfg.dirichlet_alpha:
        return f"dir{cfg.dirichlet_alpha:g}"
    return "iid"


def json_sha256(value) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_sha256(params: Params) -> str:
    """SHA-256 (hex) of named tensors, as float32 on the CPU."""
    plain = {n: w.detach().float().cpu().contiguous() for n, w in params.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


def weights_path(weights: str) -> Path | None:
    """The file that holds the backbone; None for "dino", which timm keeps, and for "none"."""
    if weights in ("dino", "none"):
        return None
    return Path(WEIGHT_FILES.get(weights, weights)).expanduser()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content; FileNotFoundError where it is not."""
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}: set weights= to 'dino', 'none', "
                                f"one of {list(WEIGHT_FILES)} or the path of a file")
    status = path.stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _file_sha256(path: Path, size: int, mtime: int) -> str:
    # size and time of change are in the cache's key, so that a file replaced in place is read anew
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_sha256(thing: Callable, users: tuple = ()) -> str:
    """SHA-256 (hex) of the source of a function, or of a class's own methods and constants.

    Comments, docstrings and layout do not count, nor what modules hold that the source calls; what
    it uses of a notebook's other cells does. `users` are the functions and classes that led here.
    Raises ValueError where no source can be found and for constants that may change.
    """
    if not inspect.isclass(thing):
        return hashlib.sha256(_source(thing, users).encode()).hexdigest()
    parts = []
    for base in thing.__mro__:
        if base is object or base.__module__ == __name__:
            continue
        for name, member in sorted(vars(base).items()):
            # What wraps a function shows an address, which differs in every process.
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            if isinstance(member, property):
                member = member.fget
            if inspect.isfunction(member):
                parts.append(_source(member, (*users, thing)))
            elif not name.startswith("__"):
                parts.append(_constant(name, member))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source(function: Callable, users: tuple = ()) -> str:
    """The source of a function; of one from a notebook's cell also what it uses of other cells,
    which can be run again without it."""
    parts = [_own_source(function)]
    if function.__module__ != "__main__":
        return parts[0]
    for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
        value = function.__globals__[name]
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and value.__module__ == "__main__":
            if value not in (*users, function):
                parts.append(source_sha256(value, (*users, function)))
        elif not (inspect.ismodule(value) or hasattr(value, "__name__")):  # what is imported
            parts.append(_constant(name, value))
    return "\n".join(parts)


def _global_names(code: types.CodeType) -> set[str]:
    """The global names that a function's code reads, functions inside it included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


@cache  # by function: what runs is what was read first, before any edit
def _own_source(function: Callable) -> str:
    """The source of a function and the constants that it was made with."""
    try:
        source = _plain(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(f"the source of {function!r} cannot be found ({error}): define it by "
                         "`def` in a cell or a file, on lines of its own") from error
    parts = [source]
    around = inspect.getclosurevars(function).nonlocals
    parts += [_constant(n, v) for n, v in sorted(around.items()) if n != "__class__"]
    for name, p in inspect.signature(function).parameters.items():
        # a default that was computed does not show in the source
        shown = re.search(rf"\b{name}\b[^=]*={re.escape(repr(p.default))}", source)
        if p.default is not p.empty and not shown:
            parts.append(_constant(name, p.default))
    return "\n".join(parts)


def _constant(name: str, value) -> str:
    """A constant as source; ValueError for what may change or has no words of its own."""
    def is_constant(part):
        if isinstance(part, tuple):
            return all(map(is_constant, part))
        return part is None or isinstance(part, int | float | str | type)
    if not is_constant(value):
        raise ValueError(f"{name} is a {type(value).__name__}, which may change or cannot be told "
                         "from another: constants are numbers, strings, classes or tuples of "
                         "these; what changes between rounds belongs into the algorithm's state")
    return f"{name} = {value!r}"


class _StringsAsCalls(ast.NodeTransformer):
    """f-strings become calls: versions of Python differ in how they write them back."""
    def visit_JoinedStr(self, node):
        self.generic_visit(node)
        return ast.Call(ast.Name("f"), node.values, [])

    def visit_FormattedValue(self, node):
        self.generic_visit(node)
        parts = [*ast.iter_child_nodes(node), ast.Constant(node.conversion)]
        return ast.Call(ast.Name("value"), parts, [])


def _plain(source: str) -> str:
    """The code alone: comments, docstrings, layout and the version of Python decide nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(_StringsAsCalls().visit(tree))


# The code that runs is the code at import: a later edit of the file must not change its hash.
SOURCE = Path(__file__).read_text(encoding="utf-8")
CODE_SHA256 = hashlib.sha256(_plain(SOURCE).encode()).hexdigest()


def check_name(name: str):
    """ValueError for a name that cannot be part of a file's name."""
    if not re.fullmatch(FILE_NAME, name):
        raise ValueError(f"the name {name!r} becomes part of file names: it must be of letters, "
                         "digits and _ . + = - alone")


@dataclass(frozen=True)
class Rule:
    """A mask rule: `score(weights, fisher, draw)` gives a score for every weight, by name.

    The lowest scores stay trainable. `fisher` is None unless `needs_fisher`, in which case the rule
    is applied in several rounds of calibration; `draw` is a numpy generator for rules with chance.
    """
    score: Callable[[Params, Params | None, np.random.Generator], Params]
    needs_fisher: bool = False


def register_rule(name: str, score: Callable, needs_fisher: bool = False):
    """Makes `Config(rule=name)` train the weights that `score` gives the lowest scores; see `Rule`.

    Raises ValueError for a name that is built in or unfit for files, and without a source.
    """
    check_name(name)
    if name in RULES and RULES[name].score.__module__ == __name__:
        raise ValueError(f"rule {name!r} is built in: choose another name")
    if score.__module__ != __name__:
        source_sha256(score)
    RULES[name] = Rule(score, needs_fisher)


# ------------------------------------------------------------------ randomness
STREAMS = ("split", "shards", "cohort", "client", "epoch", "mask", "labels", "init", "synthetic",
           "scorers", "hooks")


def rng(stream: str, *key: int) -> np.random.Generator:
    """Draws that depend on the arguments alone, so that no generator's state is ever stored."""
    if stream not in STREAMS or any(k < 0 for k in key):
        raise ValueError(f"{stream=} is not in {STREAMS}, or its {key=} is negative")
    # The stream's number leads because numpy drops trailing zeros: (7, 3) and (7, 3, 0) draw alike.
    return np.random.default_rng((STREAMS.index(stream), *key))


@contextmanager
def torch_seeded(stream: str, *key: int):
    """Torch's own generators, which a hook may draw noise from, begin here with (stream, key)."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(int(rng(stream, *key).integers(2**63)))
        yield


# ------------------------------------------------------------------ data and shards
@dataclass(frozen=True)
class Data:
    """A data set on the device.

    Images are uint8 (n, 3, 32, 32) and labels int64 (n,). `train` and `val` are int64 indices of
    the official training set. Floating-point images count as ready for the model.
    """
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train: np.ndarray
    val: np.ndarray


def split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) of `labels` (n,): val holds round(val_fraction * n_c) of every class c.

    Raises ValueError where a class would be left without a training or a validation image.
    """
    if np.ndim(labels) != 1 or len(labels) == 0 or not 0 < val_fraction < 1:
        raise ValueError(f"{val_fraction=} must lie between 0 and 1, and labels of shape "
                         f"{np.shape(labels)} be a list of some")
    draw = rng("split", seed)
    train, val = [], []
    # Class by class, so that validation is balanced as the test set is.
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        members = draw.permutation(members)
        cut = round(val_fraction * len(members))
        if not 0 < cut < len(members):
            raise ValueError(f"{val_fraction=} puts {cut} of the {len(members)} images of class "
                             f"{c} in validation: both parts need at least one")
        train.append(members[cut:])
        val.append(members[:cut])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def shard(labels: np.ndarray, num_clients: int, classes_per_client: int | None = None,
          seed: int = 0, dirichlet_alpha: float | None = None) -> list[np.ndarray]:
    """Split the indices of `labels` (n,) into `num_clients` disjoint int64 arrays that cover all n.

    With `classes_per_client` = Nc each client holds exactly Nc classes, and a class is dealt out
    evenly among its owners (label skew, McMahan et al. 2017, sec. 3). With `dirichlet_alpha` each
    client draws its class distribution (Hsu et al. 2019, sec. 3.1). With neither, IID.
    Raises ValueError where the numbers leave a class without a client or a client without images.
    """
    labels = np.asarray(labels)
    for number in (num_clients, classes_per_client):
        if not isinstance(number, int | np.integer | None):
            raise TypeError(f"{num_clients=} and {classes_per_client=} must be whole numbers")
    if labels.ndim != 1 or not 1 <= num_clients <= len(labels):
        raise ValueError(f"{num_clients=} must be 1 to the number of images, and labels of shape "
                         f"{labels.shape} have one dimension")

    draw = rng("shards", seed)
    if classes_per_client is not None and dirichlet_alpha is not None:
        raise ValueError(f"{classes_per_client=} and {dirichlet_alpha=}: choose one")
    if classes_per_client is not None:
        return _shard_by_classes(labels, num_clients, classes_per_client, draw)
    if dirichlet_alpha is not None:
        return _shard_by_dirichlet(labels, num_clients, dirichlet_alpha, draw)
    return np.array_split(draw.permutation(len(labels)), num_clients)


def _shard_by_classes(labels: np.ndarray, num_clients: int, classes_per_client: int,
                      draw: np.random.Generator) -> list[np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    n = len(classes)
    if not 1 <= classes_per_client <= n or num_clients * classes_per_client < n:
        raise ValueError(f"{num_clients=} with {classes_per_client=} cannot hold {n} classes: Nc "
                         f"must be 1 to {n}, and K*Nc at least {n}")

    # Each client takes the classes that have the fewest owners so far, ties drawn.
    owned = np.zeros((num_clients, n), bool)
    for k in range(num_clients):
        fewest_first = np.lexsort((draw.random(n), owned.sum(0)))
        owned[k, fewest_first[:classes_per_client]] = True

    shards = [[] for _ in range(num_clients)]
    for c, count in enumerate(counts):
        # Permuted, for the first owners get one image more where the class does not divide evenly.
        owners = draw.permutation(np.flatnonzero(owned[:, c]))
        if len(owners) > count:
            raise ValueError(f"{num_clients=} with {classes_per_client=} makes {len(owners)} "
                             f"clients share the {count} images of class {classes[c]}: lower one "
                             "of them")
        members = draw.permutation(np.flatnonzero(labels == classes[c]))
        for k, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            shards[k].append(part)
    return [np.concatenate(parts) for parts in shards]


def _shard_by_dirichlet(labels: np.ndarray, num_clients: int, alpha: float,
                        draw: np.random.Generator) -> list[np.ndarray]:
    if not 0 < alpha < math.inf:
        raise ValueError(f"dirichlet_alpha={alpha} must be positive and finite")
    classes, counts = np.unique(labels, return_counts=True)
    members = [draw.permutation(np.flatnonzero(labels == c)).tolist() for c in classes]
    left = counts.copy()
    # Equal sizes, as in the paper: no client can come out empty.
    sizes = [len(part) for part in np.array_split(labels, num_clients)]

    shards = []
    for size in sizes:
        wanted = draw.dirichlet(alpha * counts / len(labels))
        shard_ = []
        while len(shard_) < size:
            # A class that is used up leaves its share to the others; if all that the client wanted
            # are, it takes what is there.
            share = np.where(left > 0, wanted, 0)
            if share.sum() <= 0:
                share = left.astype(float)
            asked = draw.multinomial(size - len(shard_), share / share.sum())
            for c, number in enumerate(np.minimum(asked, left)):
                shard_ += [members[c].pop() for _ in range(number)]
                left[c] -= number
        shards.append(np.array(shard_, dtype=np.int64))
    return shards


def cohort_size(num_clients: int, share: float) -> int:
    """The nearest whole number to share * K, at least one client."""
    if not 0 < share <= 1:
        raise ValueError(f"{share=} of the clients must lie between 0 and 1")
    return max(1, round(share * num_clients))


def cohort(num_clients: int, share: float, *key) -> np.ndarray:
    """`cohort_size` clients without replacement, drawn from (stream, seed, round)."""
    return rng(*key).choice(num_clients, cohort_size(num_clients, share), replace=False)


def augment(images: Tensor, draw: np.random.Generator, kind: str = "flip", pad: int = 4) -> Tensor:
    """Images (n, 3, h, w) as a training step sees them, all at once.

    "none" leaves them; "flip" mirrors each with probability one half; "crop_flip" first moves each
    by up to `pad` pixels, which brings black borders in. Raises ValueError for another kind.
    """
    if kind not in ("none", "flip", "crop_flip"):
        raise ValueError(f"augmentation {kind!r} must be 'none', 'flip' or 'crop_flip'")
    if kind == "none":
        return images
    n, channels, height, width = images.shape
    moves = pad if kind == "crop_flip" else 0
    top, left = draw.integers(0, 2 * moves + 1, (2, n, 1))
    flipped = draw.random((n, 1)) < 0.5

    # One gather crops and flips: which pixel of the padded image goes to each place. An image at a
    # time would cost more than the training step it feeds.
    rows = top + np.arange(height)
    columns = left + np.arange(width)
    columns = np.where(flipped, columns[:, ::-1], columns)
    padded_width = width + 2 * moves
    index = rows[:, :, None] * padded_width + columns[:, None, :]
    index = torch.from_numpy(index).to(images.device, non_blocking=True)
    index = index.view(n, 1, -1).expand(-1, channels, -1)

    padded = F.pad(images, (moves,) * 4).flatten(2)
    return padded.gather(2, index).view_as(images)


def normalize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images (n, 3, h, w) as a backbone's input: normalised floats of `size` pixels.

    Floating-point images count as ready and come back as they are.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} and type {images.dtype} must be "
                         "uint8 (n, 3, height, width)")
    mean, std = _imagenet_statistics(images.device)
    x = images.float().div_(255)
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.sub_(mean).div_(std)


@lru_cache
def _imagenet_statistics(where: torch.device) -> list[Tensor]:
    # ImageNet's, not CIFAR-100's: the backbones were trained with them
    values = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return [torch.tensor(v, device=where).view(1, 3, 1, 1) for v in values]


def model_input(images: Tensor, model: nn.Module) -> Tensor:
    """`normalize` at the model's own image size; features for a bare head come back as they are."""
    if images.is_floating_point():
        return images
    return normalize(images, model.patch_embed.img_size)


# ------------------------------------------------------------------ task vectors
def flatten(params: Params) -> Tensor:
    """All entries in one vector, in the order of the dict."""
    return torch.cat([p.flatten() for p in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`, with the names and shapes of `like`."""
    parts = vector.split([p.numel() for p in like.values()])
    return {n: part.view_as(p) for (n, p), part in zip(like.items(), parts, strict=True)}


def add(a: Params, b: Params) -> Params:
    """Sum of two task vectors; KeyError unless both name the same weights, in the same shapes."""
    wrong = [n for n in a.keys() | b.keys()
             if n not in a or n not in b or a[n].shape != b[n].shape]
    if wrong:
        raise KeyError(f"only one of the two has {sorted(wrong)} in its shape")
    return {n: a[n] + b[n] for n in a}


def scale(vector: Params, alpha: float) -> Params:
    """alpha * vector."""
    return {n: alpha * v for n, v in vector.items()}


def negate(vector: Params) -> Params:
    """-vector: applied, it unlearns (Ilharco et al. 2023)."""
    return scale(vector, -1)


def task_vector(tuned: Params, start: Params) -> Params:
    """tuned - start (Ilharco et al. 2023)."""
    return add(tuned, negate(start))


def apply_vector(start: Params, vector: Params, alpha: float = 1.0) -> Params:
    """start + alpha * vector."""
    return add(start, scale(vector, alpha))


def squared_norm(params: Params) -> Tensor:
    """Sum of squares of all entries, a scalar on their device."""
    # Summed tensor by tensor: one that is all zeros then changes no bit of the sum.
    return sum(p.float().square().sum() for p in params.values())


# ------------------------------------------------------------------ SparseSGDM
def decay_and_mask_(gradient: Tensor, weight: Tensor, mask: Tensor, weight_decay: float):
    """gradient <- mask * (gradient + weight_decay * weight), in place.

    The mask comes after the decay: masking the raw gradient alone would let frozen weights decay.
    """
    gradient.add_(weight, alpha=weight_decay)
    # Filled rather than multiplied: zero times NaN would move a frozen weight.
    gradient.masked_fill_(~mask, 0)


class SparseSGDM(torch.optim.SGD):
    """SGD with momentum that moves only entries whose mask is True; without one, torch.optim.SGD.

    The mask is keyed by parameter name and must have every parameter that requires a gradient: else
    KeyError, or ValueError for another shape or for values that are not 0 and 1. `step` leaves the
    decayed, masked gradient in `.grad`. Frozen entries stay frozen whatever state is loaded, for
    their momentum is cleared. Clip gradients, if at all, after masking them.
    """

    def __init__(self, named_params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 dampening: float = 0.0, nesterov: bool = False, mask: Params | None = None):
        every = dict(named_params)
        named = {n: p for n, p in every.items() if p.requires_grad}
        if mask is not None:
            # a missing name must raise here, not train unmasked
            _check_mask(mask, every, named)
        super().__init__(named.values(), lr, momentum, dampening, weight_decay, nesterov,
                         foreach=True)
        self.mask = None
        if mask is not None:
            self.mask = {p: mask[n].bool() for n, p in named.items()}

    @torch.no_grad()
    def step(self, closure=None):
        if self.mask is None:
            return super().step(closure)
        with torch.enable_grad():
            loss = closure() if closure else None

        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    decay_and_mask_(p.grad, p, self.mask[p], decay)
            group["weight_decay"] = 0.0  # or torch would decay again, frozen weights too
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for p, mask in (self.mask or {}).items():
            buffer = self.state[p].get("momentum_buffer")
            if buffer is not None:
                buffer.masked_fill_(~mask, 0)


def _check_mask(mask: Params, every: Params, named: Params):
    wrong = (mask.keys() - every) | (named.keys() - mask)
    if wrong:
        raise KeyError(f"only one of mask and weights has {sorted(wrong)}")
    for n, p in named.items():
        entries = mask[n]
        if entries.shape != p.shape:
            raise ValueError(f"the mask of {n} has shape {tuple(entries.shape)}, its weight "
                             f"{tuple(p.shape)}")
        zero_or_one = (entries == 0) | (entries == 1)
        if not zero_or_one.all():
            raise ValueError(f"the mask of {n} has other values than 0 and 1")


# ------------------------------------------------------------------ sensitivity
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)


def maskable(model: nn.Module) -> Params:
    """Weights and biases of Linear, Conv2d and LayerNorm layers outside the head, detached."""
    found = {}
    for module, layer in model.named_modules():
        if isinstance(layer, LAYERS) and module != "head":
            for name, p in layer.named_parameters(recurse=False):
                found[f"{module}.{name}"] = p.detach()
    return found


def squared_gradients(layer: nn.Module, x: Tensor, d: Tensor) -> Params:
    """Squared per-sample gradients of a layer's weight and bias, summed over the batch.

    x is the layer's input and d the objective's gradient with respect to its output, both with the
    sample first. A sample's weight gradient is the sum of d_t x_t' over its positions t.
    """
    # To (sample, position, channel) for all kinds of layers; a convolution sees its patches.
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        x = x.transpose(1, 2)
        d = d.flatten(2).transpose(1, 2)
    x = x.reshape(len(x), -1, x.shape[-1])
    d = d.reshape(len(d), -1, d.shape[-1])

    if isinstance(layer, nn.LayerNorm):
        normalized = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        weight = (d * normalized).sum(1)
    else:
        weight = torch.einsum("nto,nti->noi", d, x)
    bias = d.sum(1)

    # Squared before the sum over samples: the other order would give a batch's gradient.
    return {
        "weight": weight.square().sum(0).view_as(layer.weight),
        "bias": bias.square().sum(0),
    }


def sensitivity(model: nn.Module, images: Tensor, labels: Tensor | np.random.Generator,
                chunk: int = 16, weights: Params | None = None, names=None) -> Params:
    """Diagonal Fisher information, float64: the sum over samples of (d log p(y|x) / d theta)^2.

    Iurada et al. 2025, eq. 7. Samples are squared one by one, for a batch's gradient would mix
    them; `chunk` of them at a time bounds the memory and changes nothing else. A generator as
    `labels` draws them from the model's own distribution. `weights` stand in for the stored ones,
    which never change. `names` defaults to the maskable weights.
    Raises KeyError for `names` that are not of a Linear, Conv2d or LayerNorm, ValueError where
    images and labels differ in number.
    """
    if chunk < 1 or not len(images):
        raise ValueError(f"{chunk=} and the number of images, {len(images)}, must be at least 1")
    stored = {n: p.detach() for n, p in model.named_parameters()}
    names = list(maskable(model) if names is None else names)
    layers = layers_of(model, names)
    is_given = isinstance(labels, Tensor)
    if is_given and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels: they must be as many")
    total = {n: torch.zeros_like(stored[n], dtype=torch.float64, device=precise_device(images))
             for n in names}

    def accumulate(module, layer, x, d):
        for p, values in squared_gradients(layer, x, d).items():
            name = f"{module}.{p}"
            if name in total:
                total[name] += values.to(total[name].device)

    model.eval()
    with called_in_backward(layers, accumulate):
        for i in range(0, len(images), chunk):
            x = model_input(images[i:i + chunk], model)
            # The gradient is asked for the input, so that it passes through every layer on its way
            # even where the weights themselves are frozen.
            x = x.detach().requires_grad_()
            logits = torch.func.functional_call(model, stored | (weights or {}), (x,))
            log_p = logits.log_softmax(1)
            y = labels[i:i + chunk] if is_given else _draw_labels(log_p, labels)
            check_labels(y, len(x), log_p.shape[1])
            log_likelihood = log_p.gather(1, y[:, None]).sum()
            torch.autograd.grad(log_likelihood, x)
    return total


def layers_of(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The layers of these weights, by name; KeyError for weights of other kinds of layers."""
    layers = {m: layer for m, layer in model.named_modules() if isinstance(layer, LAYERS)}
    owners = {n: n.rpartition(".")[0] for n in names}
    foreign = [n for n, m in owners.items() if m not in layers]
    if foreign:
        raise KeyError(f"{foreign} are not parameters of a Linear, Conv2d or LayerNorm")
    return {m: layers[m] for m in owners.values()}


@contextmanager
def called_in_backward(layers: dict[str, nn.Module], function: Callable):
    """`function(name, layer, x, d)` is called for every layer in a backward pass: x is its input,
    d the gradient with respect to its output."""
    def remember(name, layer, inputs, output):
        # the input is known in the forward pass, d only in the backward pass
        x = inputs[0].detach()
        output.register_hook(lambda d: function(name, layer, x, d))

    hooks = [layer.register_forward_hook(partial(remember, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def precise_device(tensor: Tensor) -> torch.device:
    """Where float64 sums over a tensor are kept: its own device, or the CPU for Apple's GPUs."""
    # float32 would do for the sums of a few images, but not for those of a data set
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _draw_labels(log_p: Tensor, draw: np.random.Generator) -> Tensor:
    """One label for every row of log-probabilities (n, classes)."""
    p = log_p.detach().to(precise_device(log_p))
    cumulated = p.double().exp().cumsum(1)
    uniform = torch.from_numpy(draw.random((len(p), 1)))
    labels = torch.searchsorted(cumulated, uniform.to(p.device))[:, 0]
    # the sum may end below 1 by rounding
    return labels.clamp(max=p.shape[1] - 1).to(log_p.device)


def check_labels(labels: Tensor, n: int, num_classes: int):
    """ValueError unless there are n labels, n at least 1, all of them 0 to num_classes - 1."""
    if len(labels) != n or not n:
        raise ValueError(f"{n} images have {len(labels)} labels: they must be as many, and some")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} must be 0 to "
                         f"{num_classes - 1}")


# ------------------------------------------------------------------ masks
def select_lowest(scores: Tensor, k: int, draw: np.random.Generator) -> Tensor:
    """True at exactly `k` of the lowest of the flat `scores`; ties at the cut are drawn.

    Raises ValueError for scores that are not numbers.
    """
    if scores.isnan().any():
        raise ValueError("the scores hold NaN: is the model finite on these images?")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(k).values  # torch.quantile refuses more than 2^24 entries
    lowest = scores < cut
    # Scores are often tied, at zero for instance: taking all that are <= cut would free too many.
    ties = (scores == cut).nonzero()[:, 0]
    missing = k - int(lowest.sum())
    chosen = torch.from_numpy(draw.permutation(len(ties))[:missing])
    lowest[ties[chosen.to(ties.device)]] = True
    return lowest


def _magnitude(weights, fisher, draw):
    return {n: w.abs() for n, w in weights.items()}


def _random(weights, fisher, draw):
    count = sum(w.numel() for w in weights.values())
    scores = torch.from_numpy(draw.random(count))
    return unflatten(scores, weights)


def _query_key(weights, fisher, draw):
    """Random entries of the query and key projections; others only where these do not suffice."""
    scores = _random(weights, fisher, draw)
    for n, part in scores.items():
        # timm keeps the three projections in one matrix, queries first, values last
        queries_and_keys = 0
        if ".qkv." in n:
            queries_and_keys = len(part) // 3 * 2
        part[queries_and_keys:] += 1
    return scores


register_rule("least_sensitive", lambda weights, fisher, draw: fisher, needs_fisher=True)
register_rule("most_sensitive", lambda weights, fisher, draw: negate(fisher), needs_fisher=True)
register_rule("lowest_magnitude", _magnitude)
register_rule("highest_magnitude", lambda *given: negate(_magnitude(*given)))
register_rule("random", _random)
register_rule("query_key", _query_key)


def calibrate_mask(model: nn.Module, images: Tensor | list[Tensor], *, rule: str, sparsity: float,
                   rounds: int = 4, labels=None, damping: float = 0.1, seed: int = 0,
                   combine: str = "mean", participation: float = 1.0, chunk: int = 8) -> Params:
    """A mask (bool, True = trainable) with exactly round((1 - sparsity) * m) of m entries True.

    Rules on the Fisher information follow Iurada et al. 2025, Algorithm 1: each of `rounds` scores
    afresh, with frozen weights multiplied by `damping` and labels redrawn unless given, then cuts
    further; what is frozen never returns. Other rules cut once. Lists of images (and labels), a
    tensor a client, calibrate in federation: a share `participation` of the clients scores, and the
    server combines by "mean", "max" (both of the scores per image) or "vote" (each client's own cut
    as a bitmap). Raises ValueError for numbers out of range.
    """
    _check_calibration(rule, sparsity, rounds, damping, combine)
    # Scores are compared in float64, which some devices lack.
    weights = {n: w.to(precise_device(w)) for n, w in maskable(model).items()}
    draw = rng("mask", seed)
    if not RULES[rule].needs_fisher:
        keep = round((1 - sparsity) * flatten(weights).numel())
        scores = _checked_scores(rule, weights, None, draw)
        return _on_device_of(model, select_lowest(scores, keep, draw))

    clients = _by_client(images, labels)
    active = torch.ones_like(flatten(weights), dtype=torch.bool)
    for r in range(1, rounds + 1):
        keep = round((1 - sparsity) ** (r / rounds) * len(active))
        # Without damping, deterministic scores would make every round after the first idle.
        trainable = _on_device_of(model, active)
        damped = {n: w.where(trainable[n], damping * w) for n, w in maskable(model).items()}
        scorers = np.sort(cohort(len(clients), participation, "scorers", seed, r))
        parts = [clients[k] for k in scorers]
        fishers = _fishers(model, parts, rng("labels", seed, r), chunk, damped)
        scores = _combined_scores(rule, weights, fishers, combine, active, keep, draw)
        # What is frozen never returns.
        active = select_lowest(scores.masked_fill(~active, math.inf), keep, draw)
    return _on_device_of(model, active)


def _check_calibration(rule: str, sparsity: float, rounds: int, damping: float, combine: str):
    if rule not in RULES:
        raise ValueError(f"{rule=} must be one of {list(RULES)}")
    if not 0 <= sparsity <= 1 or not 0 <= damping <= 1 or rounds not in range(1, 10_000):
        raise ValueError(f"{sparsity=} and {damping=} must lie between 0 and 1, {rounds=} be a "
                         "number from 1")
    if combine not in ("mean", "max", "vote"):
        raise ValueError(f"{combine=} must be 'mean', 'max' or 'vote'")


def _by_client(images: Tensor | list[Tensor], labels) -> list[tuple[Tensor, Tensor | None]]:
    """A pair of images and labels, or None, a client; a tensor of images is of one client."""
    clients = [images] if isinstance(images, Tensor) else images
    labels = [labels] if isinstance(images, Tensor) else labels or [None] * len(clients)
    if len(labels) != len(clients) or not len(images):
        raise ValueError(f"{len(clients)} clients with images have {len(labels)} lists of labels: "
                         "as many, and some images, are needed")
    return list(zip(clients, labels, strict=True))


def _fishers(model: nn.Module, parts: list, draw: np.random.Generator, chunk: int,
             weights: Params) -> Iterator[tuple[int, Params]]:
    """Number of images and Fisher information by client, of its images and its labels or None."""
    for images, labels in parts:
        y = draw if labels is None else labels
        yield len(images), sensitivity(model, images, y, chunk, weights)


def _on_device_of(model: nn.Module, selected: Tensor) -> Params:
    """A flat selection of the maskable weights as a mask beside them."""
    like = maskable(model)
    return {n: entries.to(like[n].device) for n, entries in unflatten(selected, like).items()}


def _combined_scores(rule: str, weights: Params, fishers: Iterable[tuple[int, Params]],
                     combine: str, active: Tensor, keep: int, draw) -> Tensor:
    """One flat score a weight, from each client's number of images and Fisher information."""
    def sent(number, fisher):
        if combine == "vote":
            scores = _checked_scores(rule, weights, fisher, draw)
            scores = scores.masked_fill(~active, math.inf)
            return -select_lowest(scores, keep, draw).double()
        if combine == "max":
            return flatten(fisher) / number
        return flatten(fisher)

    join = torch.maximum if combine == "max" else torch.add
    total = reduce(join, (sent(*client) for client in fishers))
    if combine == "vote":
        return total
    return _checked_scores(rule, weights, unflatten(total, weights), draw)


def _checked_scores(rule: str, weights: Params, fisher: Params | None, draw) -> Tensor:
    # Copies, for a rule may work in place, and these are the model's own.
    scores = RULES[rule].score({n: w.clone() for n, w in weights.items()}, fisher, draw)
    check_layout(f"rule {rule!r}: its scores", scores, weights)
    # A rule may count or rank: whole numbers have no infinity, which is for what is frozen alone.
    scores = {n: scores[n].to(w.device).double() for n, w in weights.items()}
    flat = flatten(scores)
    return flat.clamp(max=torch.finfo(flat.dtype).max)


def check_layout(what: str, found: Params, like: Params):
    """ValueError unless `found` is a dict with the names and shapes of `like`."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a dict by weight, not {type(found).__name__}")
    shapes = {n: w.shape for n, w in found.items() if isinstance(w, Tensor)}
    wanted = {n: w.shape for n, w in like.items()}
    names = sorted(found.keys() | wanted.keys())
    wrong = [n for n in names if shapes.get(n) != wanted.get(n)]
    if wrong:
        examples = {n: (shapes.get(n), wanted.get(n)) for n in wrong[:3]}
        raise ValueError(f"{what} must be tensors with the names and shapes of the weights. "
                         f"(found, wanted) differ for {len(wrong)} of them: {examples}")


def check_tensors(what: str, found: Params):
    """ValueError unless `found` is a dict of tensors by name."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a dict of tensors by name, not {type(found).__name__}")
    wrong = {n: type(w).__name__ for n, w in found.items()
             if not isinstance(n, str) or not isinstance(w, Tensor)}
    if wrong:
        raise ValueError(f"{what} must be tensors by name; it has {wrong}")


def pack_mask(mask: Params) -> Tensor:
    """A mask's entries as bits, eight a byte: uint8."""
    return torch.from_numpy(np.packbits(flatten(mask).cpu().numpy()))


def unpack_mask(packed: Tensor, like: Params) -> Params:
    """The inverse of `pack_mask`, with the names, shapes and device of `like`."""
    count = sum(w.numel() for w in like.values())
    bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count)).bool()
    return unflatten(bits.to(next(iter(like.values())).device), like)


def trainable_per_layer(mask: Params) -> dict[str, list[int]]:
    """[trainable, all] entries of a ViT's mask per kind of layer; query, key and value apart."""
    counts = {}
    for n, entries in mask.items():
        kind = re.sub(r"^blocks\.\d+\.", "", n)
        parts = {kind: entries}
        if ".qkv." in n:
            names = [kind.replace("qkv", part) for part in ("query", "key", "value")]
            parts = dict(zip(names, entries.chunk(3), strict=True))
        for name, part in parts.items():
            trainable, total = counts.get(name, (0, 0))
            counts[name] = [trainable + int(part.sum()), total + part.numel()]
    return counts


# ------------------------------------------------------------------ one local step
def device() -> torch.device:
    """The GPU if there is one: CUDA's, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


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


def precision_name(cfg: Config, where: torch.device) -> str:
    """"float32", "bf16" or "fp16": what "auto" means for this model on this device."""
    if cfg.precision != "auto":
        return cfg.precision
    # Products of the small backbone take less time than the casts that would make them shorter.
    if where.type != "cuda" or cfg.arch == "mini":
        return "float32"
    return "bf16" if torch.cuda.get_device_capability(where) >= (8, 0) else "fp16"


def autocast(cfg: Config, where: torch.device):
    """The context in which a model runs at the run's precision."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(precision_name(cfg, where))
    return torch.autocast(where.type, dtype) if dtype else nullcontext()


@dataclass(frozen=True)
class Run:
    """All that a run reads and never changes, and the model whose tensors it trains in place."""
    cfg: Config
    data: Data
    model: nn.Module
    trainable: Params            # the model's own parameters that require gradients
    mask: Params | None          # of every maskable weight, True = trainable
    shards: list[np.ndarray]     # indices of data.images, an array a client
    algorithm: "FedAvg"
    optimizer: SparseSGDM
    provenance: dict             # of the backbone and the mask, for the stored result

    def load(self, params: Params):
        """Copies weights into the model."""
        own = list(self.weights().values())
        torch._foreach_copy_(own, [params[n] for n in self.trainable])

    def weights(self) -> Params:
        """The model's trained weights, sharing its memory."""
        return {n: p.detach() for n, p in self.trainable.items()}

    def fresh_optimizer(self, lr: float) -> SparseSGDM:
        """The optimizer without momentum; one for all clients, so that masks are laid out once."""
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["lr"] = lr
        return self.optimizer

    def num_trainable(self) -> int:
        """Entries that are trained, and so travel."""
        if self.mask is None:
            return sum(p.numel() for p in self.trainable.values())
        return sum(int(entries.sum()) for entries in self.mask.values())


def backward(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Adds the gradients of a batch's mean loss to the weights'; the loss, left on the device.

    The batch is computed in parts of `micro_batch` images, whose gradients are summed. Raises
    OutOfMemoryError that says what to lower.
    """
    cfg = run.cfg
    where = images.device
    # Small gradients vanish in fp16. The scale is constant, so that there is none to store.
    loss_scale = 1024 if precision_name(cfg, where) == "fp16" else 1
    part_size = cfg.micro_batch or len(images)
    loss = torch.zeros((), device=where)
    try:
        for x, y in zip(images.split(part_size), labels.split(part_size), strict=True):
            with autocast(cfg, where):
                logits = run.model(model_input(x, run.model))
                mean = F.cross_entropy(logits, y)
            part = mean * (len(x) / len(images))
            (part * loss_scale).backward()
            # added on the device: asking for its value would make the CPU wait in every step
            loss += part.detach()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{part_size} images at once do not fit into this device's memory: set micro_batch="
            f"{max(1, part_size // 2)}, which gives the same sums in smaller parts") from error
    if loss_scale != 1:
        torch._foreach_mul_([p.grad for p in run.trainable.values()], 1 / loss_scale)
    return loss


def local_step(run: Run, optimizer: SparseSGDM, images: Tensor, labels: Tensor,
               adjust: Callable[[Params], None] | None = None) -> Tensor:
    """One SGDM step on a batch; its mean loss, left on the device.

    `adjust` may change the gradients in their dict, by name, before the mask is applied.
    """
    cfg = run.cfg
    optimizer.zero_grad()
    loss = backward(run, images, labels)
    gradients = {n: p.grad for n, p in run.trainable.items()}
    if adjust is not None:
        adjust(gradients)
        check_layout(f"algorithm {cfg.algorithm!r}: what local_gradient() leaves", gradients,
                     run.trainable)
        for n, p in run.trainable.items():
            # Others may stand in their place: without this they would be ignored in silence.
            if gradients[n] is not p.grad:
                p.grad.copy_(gradients[n])
    optimizer.step()
    return loss


def batches(run: Run, order: np.ndarray, draw: np.random.Generator) -> Iterator:
    """The images of `order` (indices) in augmented batches of B, with their labels."""
    where = run.data.images.device
    index = torch.from_numpy(order).to(where, non_blocking=True)
    size = run.cfg.batch_size
    for i in range(0, len(order), size):
        batch = index[i:i + size]
        images = augment(run.data.images[batch], draw, run.cfg.augmentation)
        yield images, run.data.labels[batch]


def check_finite(cfg: Config, where: torch.device, unit: int, lr: float, watched: dict):
    """FloatingPointError that names what is not finite, the rate and the precision."""
    bad = {name: value for name, value in watched.items() if not math.isfinite(value)}
    if not bad:
        return
    advice = f"Try a lower lr than {cfg.lr:g}."
    if precision_name(cfg, where) == "fp16":
        advice = ("In fp16 large values overflow: try precision='bf16' or 'float32' before a lower "
                  f"lr than {cfg.lr:g}.")
    raise FloatingPointError(f"not finite in round or epoch {unit} at {lr=:g}: {bad}. {advice}")


# ------------------------------------------------------------------ federated averaging
@dataclass(frozen=True)
class State:
    """All that a run needs to go on. Clients keep nothing else between rounds."""
    params: Params                       # the server's trained weights
    round: int = 0                       # rounds, or epochs, done
    history: tuple[dict, ...] = ()       # a row a round; row 0 is the untrained start
    algorithm_state: dict[str, Params] = field(default_factory=dict)  # momenta, control variates
    best: Params | None = None           # of the evaluation with the best validation accuracy
    best_round: int = 0
    seconds: float = 0.0
    segments: tuple[dict, ...] = ()      # which rounds were trained where, by what code
    error: str = ""                      # why the run cannot go on

    def after(self, row: dict, params: Params, algorithm_state: dict[str, Params]) -> "State":
        """The state one round (or epoch) on, `row` being what its history has of it."""
        return replace(
            self,
            params=params,
            algorithm_state=algorithm_state,
            round=row["round"],
            history=(*self.history, row),
        )


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends to the server."""
    client: int
    loss: Tensor      # mean over its local steps
    vector: Params    # its task vector, w_k - w
    message: Params   # what the algorithm sends beside it


@dataclass(frozen=True)
class CohortUpdate:
    """What the server makes of a round's answers."""
    clients: list[int]
    shares: list[float]            # n_k / n
    vector: Params                 # the combined task vector
    messages: dict[int, Params]    # by client
    losses: Tensor                 # (clients,)
    squared_norms: Tensor          # (clients,), of the task vectors


class ConfigOfAlgorithm:
    """A configuration as an algorithm sees it: ValueError for fields that it must declare.

    Runs that differ in an undeclared field alone count as one: it would be given another's result.
    """
    def __init__(self, cfg: Config, reads: tuple[str, ...]):
        self._cfg = cfg
        self._undeclared = (_unread_fields(cfg) | {"num_rounds", "length"}) - set(reads)

    def __getattr__(self, name: str):
        if name.startswith("_"):  # of an object that is being copied, which has no fields yet
            raise AttributeError(name)
        if name in self._undeclared:
            raise ValueError(f"algorithm {self._cfg.algorithm!r} asks for {name} and does not say "
                             f"so: declare it in the class by reads = ({name!r},)")
        return getattr(self._cfg, name)


class FedAvg:
    """Federated averaging (McMahan et al. 2017), and the hooks that another algorithm overrides.

    A subclass changes one or more of the four methods; `register_algorithm` gives it a name. Each
    is checked: a result of other names or shapes than the weights' is a ValueError that names it,
    and so is a state that is changed in place. Torch's generators are seeded for every call.
    """
    reads: tuple[str, ...] = ()  # fields of Config that it declares; see `register_algorithm`

    def __init__(self, cfg: Config):
        # one that is its own view already comes back as it is: a subclass may read it at once
        self.cfg = cfg
        if isinstance(cfg, Config):
            self.cfg = ConfigOfAlgorithm(cfg, self.reads)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether the algorithm has a hook of its own in the place of FedAvg's."""
        return getattr(cls, hook) is not getattr(FedAvg, hook)

    def local_gradient(self, gradients: Params, weights: Params, state: State, client: int):
        """Changes the gradients of one local step, in their dict, and returns nothing."""

    def client_message(self, run: Run, vector: Params, state: State, client: int,
                       lr: float) -> Params:
        """What the client sends beside its task vector: any tensors by name, nothing here.

        `run.model` holds the client's weights, and those that are trained may be changed; the
        indices of its own images (of `run.data`) are `run.shards[client]`.
        """
        return {}

    def combine(self, vectors: list[Params], shares: list[float],
                messages: dict[int, Params]) -> Params:
        """One task vector from the cohort's; here their mean, weighted by shares n_k / n.

        Where this is not overridden the mean is summed as clients answer, in the memory of one.
        """
        total = scale(vectors[0], shares[0])
        for vector, share in zip(vectors[1:], shares[1:], strict=True):
            total = apply_vector(total, vector, share)
        return total

    def server_step(self, state: State, update: CohortUpdate) -> tuple[Params, dict[str, Params]]:
        """The server's next weights and its next `algorithm_state`; here w + combined vector."""
        return add(state.params, update.vector), state.algorithm_state


ALGORITHMS["fedavg"] = FedAvg


def register_algorithm(name: str, algorithm: type):
    """Makes `Config(algorithm=name)` train by a subclass of `FedAvg`.

    Registering a name again replaces it: its source is part of a run's key, so that nothing stored
    is mistaken. Raises ValueError for a built-in name, TypeError for anything but a subclass.
    """
    check_name(name)
    if name in ("centralized", "fedavg"):
        raise ValueError(f"algorithm {name!r} is built in: choose another name")
    if not (inspect.isclass(algorithm) and issubclass(algorithm, FedAvg)):
        raise TypeError(f"algorithm {name!r} must be a subclass of FedAvg, not {algorithm!r}")
    offered = _ALGORITHM_FIELDS | _MASK_FIELDS | {"num_rounds"}
    wrong = set(algorithm.reads) - offered
    if wrong:
        raise ValueError(f"algorithm {name!r} reads {sorted(wrong)}, which are not among "
                         f"{sorted(offered)}: make them constants of the class")
    source_sha256(algorithm)  # fails here rather than in the middle of a grid
    ALGORITHMS[name] = algorithm


def client_update(run: Run, state: State, client: int, lr: float) -> ClientUpdate:
    """J local steps from the server's weights, with fresh momentum, on the client's own images."""
    cfg = run.cfg
    run.load(state.params)
    weights = run.weights()
    optimizer = run.fresh_optimizer(lr)

    adjust = None
    if run.algorithm.overrides("local_gradient"):
        def adjust(gradients):
            answer = run.algorithm.local_gradient(gradients, weights, state, client)
            if answer is not None:
                raise ValueError(f"algorithm {cfg.algorithm!r}: local_gradient() changes what it "
                                 "is given and returns nothing")

    # The shard is reshuffled whenever it is used up.
    draw = rng("client", cfg.seed, state.round, client)
    need = cfg.local_steps * cfg.batch_size
    order = np.zeros(0, dtype=np.int64)
    while len(order) < need:
        order = np.concatenate([order, draw.permutation(run.shards[client])])

    loss = torch.zeros((), device=run.data.images.device)
    with torch_seeded("hooks", cfg.seed, state.round, client):
        for images, labels in batches(run, order[:need], draw):
            loss += local_step(run, optimizer, images, labels, adjust)
        loss /= max(1, cfg.local_steps)
        vector = task_vector(weights, state.params)
        seen = replace(run, cfg=run.algorithm.cfg)  # with the fields that the algorithm declares
        message = run.algorithm.client_message(seen, vector, state, client, lr)
    check_tensors(f"algorithm {cfg.algorithm!r}: what client_message() returns", message)
    # Copies, for the next client trains in the same memory.
    message = {n: w.detach().clone() for n, w in message.items()}
    return ClientUpdate(client, loss, vector, message)


def accumulate_update(run: Run, state: State, answers: Iterable[ClientUpdate],
                      shares: list[float]) -> CohortUpdate:
    """Combines the clients' answers as they come.

    Memory does not grow with the cohort, unless the algorithm's `combine` wants all vectors.
    """
    algorithm = run.algorithm
    holds_cohort = algorithm.overrides("combine")
    total = {n: torch.zeros_like(w) for n, w in state.params.items()}
    clients, vectors, messages = [], [], {}
    losses, squared_norms = [], []
    for answer, share in zip(answers, shares, strict=True):
        clients.append(answer.client)
        losses.append(answer.loss)
        squared_norms.append(squared_norm(answer.vector))
        if answer.message:
            messages[answer.client] = answer.message
        if holds_cohort:
            vectors.append(answer.vector)
        else:
            parts = [answer.vector[n] for n in total]
            torch._foreach_add_(list(total.values()), parts, alpha=share)

    if not clients:  # of a process whose share of the cohort is none
        return CohortUpdate([], shares, total, {}, torch.zeros(0), torch.zeros(0))
    if holds_cohort:
        with torch_seeded("hooks", run.cfg.seed, state.round, run.cfg.num_clients):
            total = algorithm.combine(vectors, shares, messages)
        check_layout(f"algorithm {run.cfg.algorithm!r}: what combine() returns", total,
                     state.params)
    return CohortUpdate(clients, shares, total, messages, torch.stack(losses),
                        torch.stack(squared_norms))


def shares_of(run: Run, clients: list[int]) -> list[float]:
    """n_k / n of the clients: the weights of their mean."""
    total = sum(len(run.shards[k]) for k in clients)
    return [len(run.shards[k]) / total for k in clients]


def train_cohort(run: Run, state: State, clients: list[int], lr: float) -> CohortUpdate:
    """Trains the clients one after the other on this device."""
    answers = (client_update(run, state, k, lr) for k in clients)
    return accumulate_update(run, state, answers, shares_of(run, clients))


def federated_round(run: Run, state: State, train_cohort=train_cohort) -> State:
    """One round of FedAvg (McMahan et al. 2017, Algorithm 1): w <- w + sum_k n_k/n (w_k - w).

    `train_cohort` may have the clients train elsewhere, and may leave out some that do not answer.
    Raises FloatingPointError, naming the clients, where a loss is not finite, and ValueError where
    a hook of the algorithm returns something else than weights.
    """
    cfg = run.cfg
    lr = learning_rate(cfg, state.round / cfg.num_rounds)
    drawn = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, state.round).tolist()
    before = fingerprint(run, state)
    update = train_cohort(run, state, drawn, lr)
    if not update.clients:
        raise RuntimeError(f"none of the clients of round {state.round + 1} answered: {drawn}")

    row = round_row(run, state, update, drawn, lr)

    params, algorithm_state = next_state(run, state, update)
    if fingerprint(run, state) != before:
        raise ValueError(f"algorithm {cfg.algorithm!r} changes weights, its state or itself in "
                         "place: an interrupted round could not be repeated. Return new tensors, "
                         "and what is kept between rounds as the state of server_step()")
    return state.after(row, params, algorithm_state)


def round_row(run: Run, state: State, update: CohortUpdate, drawn: list[int], lr: float) -> dict:
    """A round's row of the history; FloatingPointError where a loss or a norm is not finite."""
    # The round's only wait for the device.
    norms = torch.stack([update.squared_norms.mean(), squared_norm(update.vector)]).sqrt()
    *losses, client_norm, mean_norm = torch.cat([update.losses, norms]).tolist()
    watched = {f"loss of client {k}": loss for k, loss in zip(update.clients, losses, strict=True)}
    watched["norm of the task vectors"] = client_norm
    watched["norm of what combine() returns"] = mean_norm
    check_finite(run.cfg, update.losses.device, state.round + 1, lr, watched)

    traffic = bytes_sent(run, update)
    row = dict(
        round=state.round + 1,
        lr=lr,
        train_loss=sum(losses) / len(losses),
        client_norm=client_norm,
        mean_norm=mean_norm,
        bytes_up=traffic,
        bytes_down=traffic,
    )
    if len(update.clients) < len(drawn):
        row["lost"] = sorted(set(drawn) - set(update.clients))
    return row


def bytes_sent(run: Run, update: CohortUpdate) -> int:
    """What a round's clients send, in float32: what is trained of the weights, and their messages.

    Frozen entries need not travel: clients have them. Control variates go both ways; of a message
    that only goes up as much down is too much.
    """
    entries = len(update.clients) * run.num_trainable()
    for message in update.messages.values():
        entries += sum(w.numel() for w in message.values())
    return 4 * entries


def next_state(run: Run, state: State, update: CohortUpdate) -> tuple[Params, dict[str, Params]]:
    """The server's next weights and algorithm's state; ValueError where a hook returns others."""
    cfg = run.cfg
    with torch_seeded("hooks", cfg.seed, state.round, cfg.num_clients + 1):
        answer = run.algorithm.server_step(state, update)
    what = f"algorithm {cfg.algorithm!r}: what server_step() returns"
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
        raise ValueError(f"{what} must be a pair: weights, and a dict of groups of named tensors")
    params, algorithm_state = answer
    check_layout(what, params, state.params)
    for group, tensors in algorithm_state.items():
        check_tensors(f"{what} as the algorithm's state {group!r}", tensors)
    # in the order and precision that a checkpoint gives back
    params = {n: params[n].to(w) for n, w in state.params.items()}
    if run.mask is not None:
        # Frozen means frozen whatever a hook does.
        for n, before in state.params.items():
            params[n] = torch.where(run.mask[n], params[n], before)
    return params, algorithm_state


def fingerprint(run: Run, state: State) -> list:
    """What hooks must leave alone: the names and versions of the tensors of a state, and what the
    algorithm keeps on itself. Torch counts the changes of each tensor."""
    groups = {"": state.params} | {str(g): t for g, t in state.algorithm_state.items()}
    tensors = []
    for group, named in groups.items():
        tensors += [(group, n, id(w), w._version) for n, w in named.items()]
    kept = [(name, id(value)) for name, value in vars(run.algorithm).items()]
    return [tensors, kept]


# ------------------------------------------------------------------ the resumable loop
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500,
             context=None) -> dict:
    """Loss, accuracies and predictions on uint8 images (n, 3, h, w), in eval mode.

    `loss` is the mean cross-entropy in nats; `top1`, `top5` and `per_class` are shares of 1, None
    for a class without images; `predictions` is uint8 (n,).
    """
    check_labels(labels, len(images), torch.iinfo(torch.int64).max)
    model.eval()
    with torch.no_grad(), context or nullcontext():
        logits = torch.cat([model(model_input(x, model)).float() for x in images.split(batch)])
    num_classes = logits.shape[1]
    check_labels(labels, len(images), num_classes)
    top = logits.topk(min(5, num_classes)).indices.cpu()
    hits = top == labels.cpu()[:, None]
    first = hits[:, 0].double()

    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    hits_per_class = torch.bincount(labels.cpu(), first, minlength=num_classes)
    per_class = hits_per_class / counts  # NaN for a class without images, which JSON has not
    return dict(
        loss=F.cross_entropy(logits, labels).item(),
        images=len(labels),
        top1=first.mean().item(),
        top5=hits.any(1).double().mean().item(),
        per_class=[None if math.isnan(share) else share for share in per_class.tolist()],
        predictions=top[:, 0].to(torch.uint8).numpy(),
    )


def evaluate_run(run: Run, params: Params, part: str) -> dict:
    """`evaluate` of weights on "val" or "test", on the first `eval_images` of it."""
    cfg = run.cfg
    run.load(params)
    if part == "val":
        index = run.data.val[:cfg.eval_images]
        images, labels = run.data.images[index], run.data.labels[index]
    else:
        images = run.data.test_images[:cfg.eval_images]
        labels = run.data.test_labels[:cfg.eval_images]
    return evaluate(run.model, images, labels, context=autocast(cfg, images.device))


def validate(run: Run, state: State) -> State:
    """Adds validation loss and accuracy to the last row, and keeps the best weights so far."""
    found = evaluate_run(run, state.params, "val")
    rows = list(state.history) or [dict(round=0)]
    row = rows.pop()
    check_finite(run.cfg, run.data.images.device, state.round, row.get("lr", run.cfg.lr),
                 {"validation loss": found["loss"]})
    row = row | {f"val_{k}": found[k] for k in ("loss", "top1", "top5")}
    if run.cfg.test_curve:
        # to be drawn, never to be chosen by: nothing below reads it
        seen = evaluate_run(run, state.params, "test")
        row |= {f"test_{k}": seen[k] for k in ("loss", "top1")}
    best_so_far = max((r["val_top1"] for r in rows if "val_top1" in r), default=-1)
    state = replace(state, history=(*rows, row))
    if row["val_top1"] > best_so_far:
        state = replace(state, best=state.params, best_round=state.round)
    return state


def centralized_epoch(run: Run, state: State) -> State:
    """One epoch over the training part, momentum carried on; the rate is set at every step."""
    cfg = run.cfg
    draw = rng("epoch", cfg.seed, state.round)
    run.load(state.params)
    optimizer = run.fresh_optimizer(cfg.lr)
    for n, buffer in state.algorithm_state.get("momentum", {}).items():
        optimizer.state[run.trainable[n]]["momentum_buffer"] = buffer.clone()

    steps = math.ceil(len(run.data.train) / cfg.batch_size)
    loss = torch.zeros((), device=run.data.images.device)
    order = draw.permutation(run.data.train)
    for i, (images, labels) in enumerate(batches(run, order, draw)):
        lr = learning_rate(cfg, (state.round + i / steps) / cfg.num_epochs)
        optimizer.param_groups[0]["lr"] = lr
        loss += local_step(run, optimizer, images, labels) / steps

    params = {n: w.clone() for n, w in run.weights().items()}
    watched = {"training loss": loss.item(),
               "squared norm of the weights": squared_norm(params).item()}
    check_finite(cfg, loss.device, state.round + 1, lr, watched)
    momentum = {}
    if cfg.momentum:
        momentum = {n: optimizer.state[p]["momentum_buffer"].clone()
                    for n, p in run.trainable.items()}
    row = dict(round=state.round + 1, lr=lr, train_loss=loss.item())
    return state.after(row, params, {"momentum": momentum})


@contextmanager
def uninterrupted():
    """Holds a Ctrl-C back until the block is done, so that no write is cut in half by hand."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def rounds(run: Run, state: State, step: Callable[[Run, State], State],
           stop_at: float = math.inf) -> Iterator[State]:
    """The state after each round (or epoch) up to the run's length, evaluated where that is due.

    Ends early at `stop_at`, in seconds of `time.monotonic`.
    """
    cfg = run.cfg
    while state.round < cfg.length and time.monotonic() < stop_at:
        began = time.monotonic()
        after = step(run, state)
        if after.round % cfg.eval_every == 0 or after.round == cfg.length:
            after = validate(run, after)
        # From here on the round counts: an interrupt above repeats it, with the same draws.
        state = replace(after, seconds=after.seconds + time.monotonic() - began)
        yield state


def run_rounds(run: Run, store: "Store", state: State, step: Callable[[Run, State], State],
               stop_at: float = math.inf, watch: Callable[[Run, State], None] | None = None
               ) -> State:
    """Rounds (or epochs) until the run's length, stored on the way, at a stop and at the end.

    Stops by itself at `stop_at` (seconds of `time.monotonic`), by hand at any moment, and where
    the run is not finite; `watch(run, state)` is called after every round that is evaluated.
    Raises KeyboardInterrupt where it is stopped by hand after the last round.
    """
    cfg = run.cfg
    saved_at = time.monotonic()
    interrupted = False
    if state.round < cfg.length:
        state = replace(state, segments=(*state.segments, segment(cfg, state.round)))
    bar = tqdm(total=cfg.length, initial=state.round, desc=run_name(cfg), leave=False,
               disable=store.quiet)
    try:
        if not state.history:
            state = validate(run, state)  # round 0: what the untrained start is worth
        for after in rounds(run, state, step, stop_at):
            state = after
            bar.update()
            row = state.history[-1]
            if "val_top1" in row:
                bar.set_postfix(val=f"{row['val_top1']:.1%}")
                if watch is not None:
                    watch(run, state)
            if state.round < cfg.length and time.monotonic() - saved_at >= 60 * store.minutes:
                with uninterrupted():
                    store.save(run, state)
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        interrupted = True
    except FloatingPointError as error:
        state = replace(state, error=str(error))
    # A second Ctrl-C may come at any moment: the rounds done so far are stored all the same.
    try:
        with uninterrupted():
            bar.close()
            store.save(run, state)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and state.round == cfg.length:
        raise KeyboardInterrupt  # the run is whole, but what comes after it is to stop too
    return state


def segment(cfg: Config, done: int) -> dict:
    """Where and by what the rounds after `done` are trained."""
    return dict(
        after_round=done,
        device=str(device()),
        hardware=hardware(),
        # CPUs with other vector units sum in another order
        vector_units=torch.backends.cpu.get_cpu_capability(),
        precision=precision_name(cfg, device()),
        threads=torch.get_num_threads(),  # another number sums in another order
        python=platform.python_version(),
        versions={p: version(p) for p in ("torch", "torchvision", "timm", "numpy")},
        code=CODE_SHA256,
    )


# ------------------------------------------------------------------ plumbing: data
def load_data(cfg: Config) -> Data:
    """The data set on the device, downloaded if need be, split into training and validation.

    Raises FileNotFoundError where it is neither stored nor to be had.
    """
    tensors = _read_dataset(cfg.dataset, str(data_folder()), device())
    labels = tensors[1].cpu().numpy()
    return Data(*tensors, *split(labels, cfg.val_fraction, cfg.split_seed))


@lru_cache(maxsize=2)  # a grid of runs reads the files once
def _read_dataset(name: str, folder: str, where: torch.device) -> list[Tensor]:
    if name == "synthetic":
        parts = [_synthetic(images_per_class(name)), _synthetic(20)]
        return [t.to(where) for part in parts for t in part]
    kind = {"cifar100": torchvision.datasets.CIFAR100, "cifar10": torchvision.datasets.CIFAR10}
    try:
        parts = [kind[name](folder, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} is not in {folder!r} and cannot be downloaded ({error}). Set DATA_DIR to the "
            "folder that holds it, or connect to the network, or choose dataset='synthetic'."
        ) from error
    tensors = []
    for part in parts:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        tensors += [images.to(where), torch.tensor(part.targets, device=where)]
    return tensors


def images_per_class(dataset: str) -> int:
    """Training images of a class, before validation is split off."""
    return {"cifar100": 500, "cifar10": 5000, "synthetic": 120}[dataset]


def _synthetic(per_class: int) -> tuple[Tensor, Tensor]:
    """100 classes, each a smooth random pattern under noise: learnable, nothing to download."""
    patterns = rng("synthetic", 0).normal(size=(100, 3, 4, 4))
    patterns = F.interpolate(torch.from_numpy(patterns), size=32, mode="bicubic")
    draw = rng("synthetic", per_class)
    images = []
    for pattern in patterns:
        noise = torch.from_numpy(draw.normal(size=(per_class, 3, 32, 32)))
        values = 128 + 40 * pattern + 40 * noise
        images.append(values.clamp(0, 255).to(torch.uint8))
    # class after class, over and over, so that the first few images are of all of them
    return torch.stack(images, 1).flatten(0, 1), torch.arange(100).repeat(per_class)


# ------------------------------------------------------------------ plumbing: backbone
ARCHS = {
    "vits16": dict(model_name="vit_small_patch16_224.dino"),
    "mini": dict(model_name="vit_tiny_patch16_224", patch_size=8, embed_dim=128, depth=6,
                 num_heads=4),
}
HEAD = ("head.weight", "head.bias")


def build_model(cfg: Config) -> nn.Module:
    """A ViT with its pre-trained backbone, position embedding resampled, and a random head.

    Raises ValueError unless exactly the backbone's weights are found, all in shape and finite, and
    FileNotFoundError where they are neither stored nor to be had.
    """
    arch = ARCHS[cfg.arch]
    patch = arch.get("patch_size", 16)
    if cfg.image_size % patch:
        raise ValueError(f"image_size={cfg.image_size} must be a multiple of the patch, {patch}")
    make = partial(timm.create_model, **arch, img_size=cfg.image_size, num_classes=0)
    with torch.random.fork_rng(devices=[]):  # timm draws from torch's global generator
        torch.manual_seed(int(rng("init", cfg.seed).integers(2**31)))
        model = _pretrained(make) if cfg.weights == "dino" else make(pretrained=False)
        if weights_path(cfg.weights) is not None:
            _load_backbone(model, weights_path(cfg.weights))
        model.reset_classifier(NUM_CLASSES[cfg.dataset])
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"the weights {cfg.weights!r} are not finite")
    return model.to(device())


def _pretrained(make: Callable[..., nn.Module]) -> nn.Module:
    try:
        return make(pretrained=True)  # timm loads strictly where there is no head
    except Exception as error:  # the hub's clients raise many kinds
        raise FileNotFoundError(
            "DINO's weights cannot be downloaded, and are not in the Hugging Face cache. Connect "
            "to the network and run again; or put the authors' dino_deitsmall16_pretrain.pth on "
            "disk and set weights='<its path>'; or use this project's small ViT, preset('demo'). "
            f"{type(error).__name__}: {str(error)[:300]}") from error


def _load_backbone(model: nn.Module, path: Path):
    """Weights of a file that may come from anyone: nothing in it is executed."""
    state = _read_tensors(path)
    # DINO's full checkpoint: its own evaluation takes the teacher and drops the projection head.
    if "teacher" in state:
        state = state["teacher"]
    check_tensors(str(path), state)
    state = {re.sub(r"^(module\.)?(backbone\.)?", "", n): w for n, w in state.items()}
    state = {n: w for n, w in state.items() if not n.startswith("head.")}
    foreign = [n for n, w in state.items() if not w.is_floating_point()]
    if foreign or not state:
        raise ValueError(f"{path} holds no floating-point weights by name, but {foreign[:5]}")
    _check_backbone(path, state, model.state_dict())
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"].float(), model.patch_embed.grid_size, num_prefix_tokens=1)
    model.load_state_dict(state)


def _read_tensors(path: Path) -> dict:
    file_sha256(path)  # says what to do where there is no such file
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds
        raise ValueError(f"{path} is not a file of weights: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not weights by name")
    return state


def _check_backbone(path: Path, state: Params, wanted: Params):
    """ValueError that says what the weights are, and what is needed."""
    def describe(weights):
        embedding = weights.get("patch_embed.proj.weight")
        if embedding is None or embedding.ndim != 4:
            return f"no ViT ({len(weights)} tensors, such as {list(weights)[:3]})"
        depth = len({n.split(".")[1] for n in weights if n.startswith("blocks.")})
        return f"a ViT of patch {embedding.shape[2]}, width {embedding.shape[0]}, depth {depth}"
    free_size = {"pos_embed"}  # resampled to the image size
    wrong = sorted(state.keys() ^ wanted.keys())
    for n in sorted(state.keys() & wanted.keys()):
        if n not in free_size and state[n].shape != wanted[n].shape:
            wrong.append(n)
    if wrong or state["pos_embed"].ndim != 3:
        raise ValueError(f"{path} holds {describe(state)}; needed is {describe(wanted)}. They "
                         f"differ in {wrong[:5] or ['pos_embed']}")


def backbone(model: nn.Module) -> Params:
    """All weights but the head's."""
    return {n: w for n, w in model.state_dict().items() if n not in HEAD}


# ------------------------------------------------------------------ plumbing: heads
def extract_features(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Backbone features (n, d), float32, of uint8 `images` (n, 3, h, w)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([
            model.forward_head(model.forward_features(model_input(x, model)), pre_logits=True)
            for x in images.split(batch)])


def feature_sums(x: Tensor, labels: Tensor, num_classes: int) -> Params:
    """All that a client tells of its features x (n, d) for a closed-form head, in float64.

    "gram" is X'X (d + 1, d + 1), with a last column of ones; "target" X'Y (d + 1, classes), whose
    last row counts the classes. The sums of all clients add up to the pooled ones.
    """
    check_labels(labels, len(x), num_classes)
    where = precise_device(x)
    x = x.to(where).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    targets = F.one_hot(labels.to(where), num_classes).double()
    return dict(gram=x.T @ x, target=x.T @ targets)


def pooled_sums(parts: list[tuple[Tensor, Tensor]], num_classes: int) -> Params:
    """The sums over all clients, from a pair of features and labels each."""
    return reduce(add, [feature_sums(x, y, num_classes) for x, y in parts])


def ridge_head(sums: Params, l2: float) -> Params:
    """Ridge regression on one-hot targets, W = (X'X + l2)^-1 X'Y, in float64; the bias is free."""
    penalty = torch.full_like(sums["gram"][0], l2)
    penalty[-1] = 0
    w = torch.linalg.solve(sums["gram"] + penalty.diag(), sums["target"])
    return _checked_head(w[:-1].T, w[-1])


def lda_head(sums: Params) -> Params:
    """Linear discriminant analysis: one Gaussian a class with a shared covariance S, in float64.

    W = S^-1 mu_c, b_c = log(n_c / n) - mu_c' S^-1 mu_c / 2 (Hastie et al. 2009, sec. 4.3). Classes
    without images get a bias of minus infinity's stand-in, the lowest of the others less 100.
    """
    counts = sums["target"][-1]
    n = counts.sum()
    present = counts > 0
    means = sums["target"][:-1] / counts.clamp(min=1)
    scatter = sums["gram"][:-1, :-1] - (means * counts) @ means.T
    within = scatter / n
    # Features of a narrow data set may be dependent: a millionth of the variance keeps S regular.
    within.diagonal().add_(1e-6 * within.diagonal().mean())
    weight = torch.linalg.solve(within, means)
    log_prior = (counts / n).clamp(min=1e-300).log()
    bias = log_prior - (means * weight).sum(0) / 2
    bias = bias.where(present, bias[present].min() - 100)
    return _checked_head(weight.T, bias)


def logistic_head(parts: list[tuple[Tensor, Tensor]], num_classes: int, l2: float = 1.0,
                  tolerance: float = 1e-4) -> Params:
    """Softmax regression, in float64: minimises sum of cross-entropies + l2/2 |W|^2 by L-BFGS.

    `parts` are features (n_k, d) and labels (n_k,), a pair a client. Loss and gradient are sums
    over them, so that each evaluation is a round of communication, and the result is the pooled
    one. Features are standardised by their sums first. Stops where no entry of the gradient of the
    mean loss is above `tolerance`; ValueError where one stays above ten times that.
    """
    gram = pooled_sums(parts, num_classes)["gram"]
    n = gram[-1, -1]
    mean = gram[-1, :-1] / n
    variance = gram.diagonal()[:-1] / n - mean.square()
    std = variance.clamp(min=1e-12).sqrt()
    where = mean.device
    # Standardised features make the objective round, and L-BFGS fast.
    ready = []
    for x, y in parts:
        standardized = (x.to(where).double() - mean) / std
        ready.append((standardized, y.to(where)))

    def objective(flat):
        w = torch.from_numpy(flat).to(where).view(num_classes, -1)
        loss, gradient = _logistic_loss(w, ready, l2)
        return (loss / n).item(), (gradient / n).cpu().numpy().ravel()

    # Stopped by the gradient alone: the loss is flat long before the weights have settled.
    options = dict(maxiter=2000, maxfun=4000, maxcor=20, gtol=tolerance, ftol=0)
    start = np.zeros(num_classes * (len(mean) + 1))
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    steepest = abs(found.jac).max()
    if not steepest <= 10 * tolerance:
        raise ValueError(f"the logistic head did not converge: its gradient is {steepest:.2g} "
                         f"after {found.nit} steps ({found.message}); are the features finite?")
    w = torch.from_numpy(found.x).to(where).view(num_classes, -1)
    weight = w[:, :-1] / std
    return _checked_head(weight, w[:, -1] - weight @ mean)


def _logistic_loss(w: Tensor, parts: list[tuple[Tensor, Tensor]], l2: float
                   ) -> tuple[Tensor, Tensor]:
    """The sum over all images that `logistic_head` minimises, and its gradient, of w's shape.

    w (classes, d + 1) holds the weights and, in the last column, the biases.
    """
    weight = w[:, :-1]
    bias = w[:, -1]
    loss = l2 / 2 * weight.square().sum()
    gradient = torch.zeros_like(w)
    gradient[:, :-1] = l2 * weight
    for x, y in parts:
        # what a client computes: with p the predicted and y the true class, X'(p - y)
        logits = x @ weight.T + bias
        log_p = logits.log_softmax(1)
        loss -= log_p.gather(1, y[:, None]).sum()
        residual = log_p.exp()
        residual -= F.one_hot(y, len(w))
        gradient[:, :-1] += residual.T @ x
        gradient[:, -1] += residual.sum(0)
    return loss, gradient


def _checked_head(weight: Tensor, bias: Tensor) -> Params:
    head = {"head.weight": weight.contiguous(), "head.bias": bias.contiguous()}
    if not all(w.isfinite().all() for w in head.values()):
        raise ValueError("the head is not finite: are the features?")
    return head


def fit_logit_scale(head: Params, x: Tensor, labels: Tensor) -> Params:
    """The head times the power of two with the lowest cross-entropy on features x (n, d).

    Regression fits 0 and 1, not logits: the softmax of such numbers is close to uniform.
    """
    weight, bias = (w.to(precise_device(x)) for w in head.values())
    labels = labels.to(weight.device)
    logits = x.to(weight.device).double() @ weight.T + bias
    best_factor = 1.0
    lowest = math.inf
    for exponent in range(10):
        factor = 2.0**exponent
        losses = F.cross_entropy(factor * logits, labels, reduction="none")
        # Where features fit perfectly no factor is too large, and the first step would explode:
        # factors that leave other classes less than a tenth of the probability are out.
        if losses.mean() < lowest and (-losses).exp().mean() <= 0.9:
            best_factor = factor
            lowest = losses.mean()
    return {n: best_factor * w for n, w in head.items()}


def fit_head(kind: str, parts: list[tuple[Tensor, Tensor]], num_classes: int, l2: float) -> Params:
    """A "logistic", "lda" or "ridge" head on frozen features; float32. `parts`: a pair a client."""
    if kind == "logistic":
        head = logistic_head(parts, num_classes, l2)
    elif kind == "lda":
        head = lda_head(pooled_sums(parts, num_classes))
    else:
        head = ridge_head(pooled_sums(parts, num_classes), l2)
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        head = fit_logit_scale(head, x, y)
    return {n: w.float().to(parts[0][0].device) for n, w in head.items()}


# ------------------------------------------------------------------ plumbing: storage
# What a checkpoint holds of a State beside its tensors.
STATE_FIELDS = ("round", "history", "best_round", "seconds", "segments")


@dataclass
class Store:
    """Where runs live: root/<run>.json, <run>.npy, checkpoints/<run>/, cache/ and notes/.

    A file is written beside its place, synced and renamed: a cut leaves the old one or the new.
    `BackedUpStore` of notebooks/backup.py keeps a second copy, such as on Google Drive.
    """
    root: Path = field(default_factory=lambda: Path(os.environ.get("RESULTS_DIR") or "results"))
    minutes: float = 1.0   # least time between two checkpoints of a run
    frozen: bool = False   # only what is stored: nothing is trained or computed
    quiet: bool = False    # no progress bars

    def __post_init__(self):
        self.root = Path(self.root).expanduser()
        self._parsed = {}  # results by name, with the size and time of the file they are of
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes={self.minutes} between two checkpoints must be at least 0")

    def folders(self) -> list[Path]:
        """Where a file may lie, the first choice first."""
        return [self.root]

    def inside(self, folder: str) -> "Store":
        """The store of a folder inside this one."""
        return replace(self, root=self.root / folder)

    def write(self, name: str, content: bytes):
        """To `root`; OSError where it takes nothing."""
        write_whole(self.root / name, content)

    def read(self, name: str) -> bytes | None:
        """A file's content, from the first folder with a sound copy; None without any."""
        for folder in self.folders():
            try:
                content = (folder / name).read_bytes()
                check_content(name, content)
                return content
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                warnings.warn(f"{folder / name} is damaged or unreadable and left out: {error}",
                              stacklevel=2)
        return None

    def delete(self, name: str):
        for folder in self.folders():
            try:
                os.truncate(folder / name, 0)  # Drive's bin keeps a deleted file's size
                (folder / name).unlink()
            except FileNotFoundError:
                continue
            except OSError as error:  # a drive that is gone must not stop a run
                warnings.warn(f"{folder / name} cannot be deleted: {error}", stacklevel=2)

    def names(self, pattern: str) -> list[str]:
        """Files in any of the folders."""
        return sorted({name for folder in self.folders() for name in names_in(folder, pattern)})

    @contextmanager
    def lock(self, cfg: Config):
        """Waits until no other process on this machine trains the run; frees its stale files."""
        folder = self.root / "checkpoints" / run_name(cfg)
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "lock")  # dies with its process
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            warnings.warn(f"another process trains {run_name(cfg)}: waiting until it is done",
                          stacklevel=3)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            warnings.warn(f"{folder} cannot be locked ({error}): start this run in one process "
                          "only", stacklevel=3)
        try:
            for part in [*folder.glob("*.part"), *self.root.glob(f"{run_name(cfg)}.*.part")]:
                part.unlink()  # of writers that were killed
            yield
        finally:
            lock.release()

    def results(self) -> dict[str, dict]:
        """All stored results by run name; files that are none are named in a warning, once."""
        found = {}
        for path in sorted(self.root.glob("*.json")):
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if path.name not in self._parsed or self._parsed[path.name][0] != stamp:
                self._parsed[path.name] = (stamp, parse_result(path))
            result = self._parsed[path.name][1]
            if result is not None:
                found[path.stem] = result
        return found

    def result(self, cfg: Config) -> dict | None:
        """The stored result of this run, if any; ValueError where the name holds another run."""
        path = self.root / f"{run_name(cfg)}.json"
        if not path.is_file():
            return None
        # read anew, not from a cache: another process may have written it meanwhile
        result = parse_result(path)
        if result is None:
            if not self.frozen:
                # Whatever it is, it is kept; a run in its place goes on from its checkpoint.
                path.rename(path.with_suffix(".json.damaged"))
            return None
        check_same_run(cfg, result["key"])
        return result

    def save(self, run: Run, state: State):
        """One checkpoint, its SHA-256 in its name; older ones but one are deleted after it.

        Of a run that cannot go on after its end, the last leaves out the algorithm's state.
        """
        cfg = run.cfg
        done = state.round == cfg.length and not state.error
        if done and cfg.schedule != "constant":
            state = replace(state, algorithm_state={})
        card, tensors = checkpoint_of(run, state)
        # Cloned: a weight that no round has moved may be one tensor in two groups.
        content = safetensors.torch.save({n: w.contiguous().clone() for n, w in tensors.items()},
                                         {"card": json.dumps(card, allow_nan=False)})
        folder = f"checkpoints/{run_name(cfg)}"
        digest = hashlib.sha256(content).hexdigest()
        newest = f"{folder}/{state.round:07d}_{digest}.safetensors"
        self.write(newest, content)
        others = [name for name in self.names(f"{folder}/*.safetensors") if name != newest]
        # Damaged ones may be of later rounds: only what is older can stand in for this one.
        spare = [name for name in others if name < newest][-1:]
        for old in others:
            if done or old not in spare:
                self.delete(old)

    def newest_checkpoint(self, cfg: Config) -> "Checkpoint | None":
        """The newest sound one; ValueError where it is another run's."""
        for name in reversed(self.names(f"checkpoints/{run_name(cfg)}/*.safetensors")):
            content = self.read(name)
            if content is None:
                continue
            card = read_card(name, content)
            check_same_run(cfg, card["key"])
            tensors = safetensors.torch.load(content)
            return Checkpoint(card, {n: w.to(device()) for n, w in tensors.items()})
        return None

    def compute_or_load(self, kind: str, key: dict, compute: Callable[[], dict] | None) -> dict:
        """`compute()`, kept under all that it depends on: tensors in cache/, JSON in notes/.

        A frozen store that has none gives {}, and so does any without `compute`.
        """
        name = f"{kind}_{json_sha256(key)}"
        weights = self.read(f"cache/{name}.safetensors")
        if weights is not None:
            return {n: w.to(device()) for n, w in safetensors.torch.load(weights).items()}
        note = self.read(f"notes/{name}.json")
        if note is not None or self.frozen or compute is None:
            return json.loads(note or b"{}")
        value = compute()
        if all(isinstance(v, Tensor) for v in value.values()):
            content = safetensors.torch.save({n: w.contiguous() for n, w in value.items()})
            self.write(f"cache/{name}.safetensors", content)
            return value
        self.write(f"notes/{name}.json", to_json(value))
        return json.loads(to_json(value))


class Checkpoint(NamedTuple):
    card: dict        # what JSON can hold: key, backbone's hash, history
    tensors: Params


def checkpoint_of(run: Run, state: State) -> Checkpoint:
    """A state with all that its run needs but the backbone.

    Of a sparse run these are the trainable entries, the mask's bits and the frozen head.
    """
    # Frozen entries are those of the backbone: of a sparse run only the others are stored.
    groups = {"params": state.params}
    if state.best is not None and state.best is not state.params:
        groups["best"] = state.best
    tensors = {}
    for group, params in groups.items():
        for n, w in params.items():
            if run.mask:
                w = w[run.mask[n]]
            tensors[f"{group}:{n}"] = w
    # The groups of the algorithm's state and their names, whose order has a meaning.
    layout = [[group, list(params)] for group, params in state.algorithm_state.items()]
    for i, params in enumerate(state.algorithm_state.values()):
        tensors |= {f"state/{i}:{n}": w for n, w in params.items()}
    if run.mask:
        # With the mask's bits inside, a lost cache or a calibration that comes out otherwise on
        # another machine cannot put weights into wrong places.
        tensors["mask:"] = pack_mask(run.mask)
        tensors |= {f"head:{n}": run.model.get_parameter(n).detach() for n in HEAD}

    card = dict(key=run_key(run.cfg), backbone=run.provenance["backbone_sha256"], layout=layout)
    card |= {name: getattr(state, name) for name in STATE_FIELDS}
    return Checkpoint(card, tensors)


def state_of(run: Run, start: State, card: dict, tensors: Params) -> State:
    """The inverse of `checkpoint_of`; ValueError where the tensors are not those of the run."""
    weights = {}
    for group in ("params", "best"):
        # safetensors has an order of its own; the model's is the one that sums and bits depend on
        params = {n: tensors.pop(f"{group}:{n}") for n in start.params
                  if f"{group}:{n}" in tensors}
        if not params and group == "best":
            continue
        like = start.params
        if run.mask is not None:
            like = {n: torch.empty(int(run.mask[n].sum())) for n in start.params}
        check_layout(f"the checkpoint of {run_name(run.cfg)}", params, like)
        if run.mask is not None:
            params = {n: w.masked_scatter(run.mask[n], params[n])
                      for n, w in start.params.items()}
        weights[group] = params
    algorithm_state = {}
    for i, (group, names) in enumerate(card["layout"]):
        algorithm_state[group] = {n: tensors.pop(f"state/{i}:{n}") for n in names}
    foreign = [n for n in tensors if not n.startswith(("mask:", "head:"))]
    if foreign:
        raise ValueError(
            f"the checkpoint of {run_name(run.cfg)} has foreign tensors, such as {foreign[:5]}")
    return State(
        params=weights["params"],
        round=card["round"],
        history=tuple(card["history"]),
        algorithm_state=algorithm_state,
        best=weights.get("best", weights["params"]),
        best_round=card["best_round"],
        seconds=card["seconds"],
        segments=tuple(card["segments"]),
    )


def names_in(folder: Path, pattern: str) -> list[str]:
    """Files of a folder, by their paths inside it; none, and a warning, where it cannot be read."""
    try:
        return sorted(str(f.relative_to(folder)) for f in folder.glob(pattern))
    except OSError as error:
        warnings.warn(f"{folder} cannot be listed: {error}", stacklevel=2)
        return []


def write_whole(path: Path, content: bytes):
    """Writes beside the file and renames: a reader sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # with the process in its name, so that two that write the same file do not mix
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # half a file would keep a full disk full
        raise OSError(error.errno, f"{error.strerror or error}: {len(content)} bytes cannot be "
                      "written; what is stored is whole. Make room or access and run again",
                      str(path)) from error


def check_content(name: str, content: bytes):
    """ValueError unless a checkpoint has the SHA-256 of its name, and other tensors can be read."""
    if name.startswith("checkpoints/"):
        if not name.endswith(f"_{hashlib.sha256(content).hexdigest()}.safetensors"):
            raise ValueError(f"{len(content)} bytes do not have the SHA-256 of the name")
    elif name.endswith(".safetensors"):
        try:
            safetensors.torch.load(content)
        except Exception as error:
            raise ValueError(f"not a file of tensors: {error!r}") from error
    elif name.endswith(".json"):
        json.loads(content)


def read_card(name: str, content: bytes) -> dict:
    """What a checkpoint says of itself; ValueError where it is none."""
    try:
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        # checkpoints from before states had a layout have none
        card = {"layout": []} | json.loads(header["__metadata__"]["card"])
        return {name: card[name] for name in ("key", "backbone", "layout", *STATE_FIELDS)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no checkpoint of a run: {error!r}") from error


def to_json(value: dict) -> bytes:
    """UTF-8; a NaN is a ValueError here rather than a broken file later."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False).encode()


# What every result has, of which type; a JSON file without them was not written by a run.
RESULT_FIELDS = {"run": str, "key": dict, "status": str, "config": dict, "history": list}


def parse_result(path: Path) -> dict | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in RESULT_FIELDS.items():
            if not isinstance(result.get(name), kind):
                raise ValueError(f"its {name!r} is no {kind.__name__}: {result.get(name)!r:.80}")
        return result
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is no result of a run and left out: {error}", stacklevel=3)
        return None


def check_same_run(cfg: Config, stored: dict):
    """ValueError, naming the fields, unless the stored key is that of the configuration."""
    asked = json.loads(json.dumps(run_key(cfg)))
    names = sorted(asked.keys() | stored.keys())
    differ = {k: (asked.get(k), stored.get(k)) for k in names if asked.get(k) != stored.get(k)}
    if differ:
        raise ValueError(
            f"{run_name(cfg)} is stored as another run. They differ in (asked, stored): {differ}. "
            "Choose another name, or leave name='' to have one derived.")


# ------------------------------------------------------------------ plumbing: training by name
def open_run(cfg: Config, store: Store | None = None, head: Params | None = None,
             mask: Params | None = None, skip_frozen: bool = True, resume: bool = True,
             stop_at: float = math.inf) -> tuple[Run, State]:
    """A Run (data, model, head, mask and shards), and the State to go on from.

    A worker elsewhere has no store, but `head` and `mask` from the server. Without `skip_frozen`,
    weights of which the mask frees no entry get gradients all the same, with the same result.
    Without `resume` the State is the run's start, whatever is stored of it.
    """
    data = load_data(cfg)
    model = build_model(cfg)
    provenance = dict(backbone_sha256=tensors_sha256(backbone(model)))
    shards = [] if cfg.centralized else deal_out(cfg, data)
    saved = checkpoint_to_go_on_from(cfg, store, provenance["backbone_sha256"]) if store else None
    if saved is not None and "mask:" in saved.tensors:  # of a sparse run, whose head is frozen
        head = {n: saved.tensors[f"head:{n}"] for n in HEAD}
        mask = unpack_mask(saved.tensors["mask:"], maskable(model))

    # The head first: the mask is calibrated with it.
    is_fitted = cfg.head in ("logistic", "lda", "ridge")
    is_probed = cfg.head == "train" and cfg.rule is not None
    # a checkpoint of all weights has the head among them, one of a start has none
    if head is None and (is_fitted or is_probed) and not (saved and resume):
        head = make_head(cfg, store, data, model, provenance["backbone_sha256"], stop_at)
    if head is not None:
        model.load_state_dict(backbone(model) | head)
    if cfg.rule and mask is None:
        mask = make_mask(cfg, store, data, model, shards)
    if cfg.rule:
        provenance["mask"] = mask_provenance(cfg, mask)

    names = trainable_names(cfg, model, mask, skip_frozen)
    if cfg.head == "probe" and cfg.augmentation == "none":
        data, model = on_features(data, model)
    run = run_of(cfg, data, model, names, mask, shards, provenance)
    start = State({n: w.clone() for n, w in run.weights().items()})
    if saved is None or not resume:
        return run, start
    return run, state_of(run, start, *saved)


def run_of(cfg: Config, data: Data, model: nn.Module, names: set[str], mask: Params | None,
           shards: list[np.ndarray], provenance: dict) -> Run:
    """A Run in which the weights with these names are trained."""
    trainable = {}
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
        if n in names:
            trainable[n] = p
    algorithm = None
    if not cfg.centralized:
        kind = ALGORITHMS[cfg.algorithm]
        algorithm = kind(ConfigOfAlgorithm(cfg, kind.reads))
    own_mask = {n: mask[n] for n in trainable} if mask else None
    optimizer = SparseSGDM(trainable.items(), cfg.lr, cfg.momentum, cfg.weight_decay, mask=own_mask)
    return Run(cfg, data, model, trainable, mask, shards, algorithm, optimizer, provenance)


def deal_out(cfg: Config, data: Data) -> list[np.ndarray]:
    """The clients' shards of the training part, as indices of `data.images`."""
    labels = data.labels.cpu().numpy()[data.train]
    parts = shard(labels, cfg.num_clients, cfg.classes_per_client, cfg.seed, cfg.dirichlet_alpha)
    return [data.train[part] for part in parts]


def checkpoint_to_go_on_from(cfg: Config, store: Store, backbone_key: str
                             ) -> Checkpoint | None:
    """The run's newest checkpoint, or a shorter run's last; ValueError for another backbone's."""
    saved = store.newest_checkpoint(cfg)
    knows_its_end = not cfg.centralized and "num_rounds" in ALGORITHMS[cfg.algorithm].reads
    if saved is None and cfg.schedule == "constant" and not knows_its_end:
        # at a constant rate a longer run only goes on from where a shorter one ended
        ended = (store.newest_checkpoint(other) for other in shorter_runs(cfg, store))
        saved = next(filter(None, ended), None)
    if saved is not None and saved.card["backbone"] != backbone_key:
        raise ValueError(f"{run_name(cfg)} was begun from another backbone: weights="
                         f"{cfg.weights!r} has SHA-256 {backbone_key}, then "
                         f"{saved.card['backbone']}. Put the old file back, or choose another "
                         "name.")
    return saved


def trainable_names(cfg: Config, model: nn.Module, mask: Params | None,
                    skip_frozen: bool = True) -> set[str]:
    """Names of the weights that a run trains."""
    if cfg.head == "probe":
        return set(HEAD)
    if mask is None:
        return {n for n, _ in model.named_parameters()}
    # A weight of which the mask frees no entry needs no gradient: about a quarter of a round's
    # arithmetic for masks that free queries and keys only.
    names = {n for n, entries in mask.items() if not skip_frozen or entries.any()}
    # Where nothing at all is free there must be some weight for a gradient to reach.
    return names or set(mask)


def on_features(data: Data, model: nn.Module) -> tuple[Data, nn.Module]:
    """The data set as features of the frozen backbone, and the head alone: a probe is quick."""
    features = replace(data, images=extract_features(model, data.images),
                       test_images=extract_features(model, data.test_images))
    head = nn.Sequential()
    head.add_module("head", model.head)
    return features, head


def make_head(cfg: Config, store: Store | None, data: Data, model: nn.Module, backbone_key: str,
              stop_at: float) -> Params:
    """The head that a run starts from: fitted on frozen features, or by a probe's own run.

    Clients' sums add up to the pooled ones, so one head serves centralised and federated runs.
    """
    if cfg.head == "train":
        return probed_head(cfg, store or Store(), stop_at)

    def fit():
        x = extract_features(model, data.images[data.train])
        y = data.labels[data.train]
        return fit_head(cfg.head, [(x, y)], NUM_CLASSES[cfg.dataset], cfg.head_l2)
    key = dict(kind=cfg.head, backbone=backbone_key, l2=cfg.head_l2, dataset=cfg.dataset,
               size=cfg.image_size, train=json_sha256(data.train.tolist()), code=CODE_SHA256)
    return store.compute_or_load("head", key, fit) if store else fit()


def probed_head(cfg: Config, store: Store, stop_at: float) -> Params:
    """The head of a run that trains it alone, found or trained.

    Raises FloatingPointError where that run diverges, KeyboardInterrupt where it is stopped.
    """
    probe = replace(cfg, name="", rule=None, head="probe", num_rounds=cfg.head_rounds,
                    num_epochs=cfg.head_rounds,
                    algorithm="centralized" if cfg.centralized else "fedavg")
    result = train(probe, store, test=False, stop_at=stop_at)
    if result["status"] == "diverged":
        raise FloatingPointError(f"the head's own run, {result['run']}, diverged: "
                                 f"{result['error']}")
    if result["status"] != "finished":
        raise KeyboardInterrupt
    saved = store.newest_checkpoint(probe)
    if saved is None:
        raise FileNotFoundError(f"the head's own run, {result['run']}, is stored without its "
                                "weights: delete its JSON file, and it is trained again")
    return {n: saved.tensors[f"params:{n}"] for n in HEAD}


def make_mask(cfg: Config, store: Store | None, data: Data, model: nn.Module,
              shards: list[np.ndarray]) -> Params:
    """The run's mask, calibrated at one place or by the clients, each on images of its shard."""
    central = cfg.calibration == "central" or not shards
    groups = [data.train] if central else shards
    share = 1.0 if central else cfg.calibration_clients
    size = max(1, cfg.calibration_images // cohort_size(len(groups), share))
    draw = rng("mask", cfg.seed, 1)
    index = [draw.permutation(group)[:size].tolist() for group in groups]
    options = dict(
        rule=cfg.rule,
        sparsity=cfg.sparsity,
        rounds=cfg.calibration_rounds,
        seed=cfg.seed,
        participation=share,
        combine="mean" if central else cfg.calibration,
    )

    def calibrate():
        chunk = 8 if device().type == "cpu" else 32
        return calibrate_mask(model, [data.images[i] for i in index], chunk=chunk, **options)
    if store is None:
        return calibrate()
    key = dict(options, dataset=cfg.dataset, index=index, model=tensors_sha256(model.state_dict()),
               source=run_key(cfg).get("rule_sha256"), code=CODE_SHA256)
    found = store.compute_or_load("mask", key, calibrate)
    return {n: found[n] for n in maskable(model)}  # safetensors has an order of its own


def mask_provenance(cfg: Config, mask: Params) -> dict:
    """What a result tells of its mask, and what its calibration would have cost to send."""
    scorers = 0
    if cfg.calibration != "central" and not cfg.centralized and RULES[cfg.rule].needs_fisher:
        scorers = cfg.calibration_rounds * cohort_size(cfg.num_clients, cfg.calibration_clients)
    bits = 1 if cfg.calibration == "vote" else 32  # a bitmap, or a float32 a weight
    entries = sum(m.numel() for m in mask.values())
    return dict(
        sha256=tensors_sha256(mask),
        trainable=sum(int(m.sum()) for m in mask.values()),
        maskable=entries,
        per_layer=trainable_per_layer(mask),
        bytes_up=bits * entries // 8 * scorers,
    )


def shorter_runs(cfg: Config, store: Store) -> list[Config]:
    """The finished runs that differ from this one in being shorter only, the longest first."""
    length = "num_epochs" if cfg.centralized else "num_rounds"
    asked = run_key(cfg)
    shorter = []
    for name, result in store.results().items():
        # a key that is equal in all else is one of a run, whatever lies in the folder
        alike = result["key"] | {length: cfg.length} == asked
        done = result["key"].get(length, cfg.length)
        # its end was evaluated, which the longer run is to be there as well
        shared = done < cfg.length and done % cfg.eval_every == 0
        if alike and result["status"] == "finished" and shared:
            shorter.append(replace(cfg, name=name, **{length: done}))
    return sorted(shorter, key=lambda other: -other.length)


def train(cfg: Config, store: Store | None = None, test: bool = True,
          step: Callable[[Run, State], State] | None = None, stop_at: float = math.inf,
          watch: Callable[[Run, State], None] | None = None) -> dict:
    """The run's result: found in the store, or trained from where it stopped, then stored.

    `status` is "finished", "diverged" (the loss was not finite; `error` says where), "interrupted"
    (stopped by hand or at `stop_at`; call again to go on) or "missing" (in a frozen store). The
    last weights are the result; those that were best on validation are kept beside them. The test
    set is read once at the end, not at all with `test=False`. `step` may be a `federated_round`
    whose clients train elsewhere.
    """
    if not isinstance(cfg, Config):
        raise TypeError(f"{cfg!r} is no Config")
    store = store or Store()
    found = stored_result(cfg, store, test)
    if found is not None:
        return found
    if time.monotonic() >= stop_at:
        return dict(run=run_name(cfg), status="interrupted", round=0)
    try:
        with store.lock(cfg):
            # another process may have trained it meanwhile
            return stored_result(cfg, store, test) or _train_now(cfg, store, test, step, stop_at,
                                                                watch)
    except KeyboardInterrupt:  # in the rounds `run_rounds` stops by itself
        return dict(run=run_name(cfg), status="interrupted", round=0)


def stored_result(cfg: Config, store: Store, test: bool) -> dict | None:
    """The result, where there is no more to be done for it."""
    result = store.result(cfg)
    complete = result and (result["status"] == "diverged" or "test" in result or not test)
    if complete:
        return result
    if store.frozen:
        return result or dict(run=run_name(cfg), status="missing", round=0)
    return None


def _train_now(cfg: Config, store: Store, test: bool, step, stop_at: float, watch) -> dict:
    try:
        run, state = open_run(cfg, store, stop_at=stop_at)
    except FloatingPointError as error:
        return _store_result(cfg, store, State({}, error=str(error)), {}, {})

    step = step or (centralized_epoch if cfg.centralized else federated_round)
    state = run_rounds(run, store, state, step, stop_at, watch)
    if state.round < cfg.length and not state.error:
        return dict(run=run_name(cfg), status="interrupted", round=state.round)

    scores = {}
    if test and not state.error:
        last = evaluate_run(run, state.params, "test")
        predictions = io.BytesIO()
        np.save(predictions, last.pop("predictions"))
        store.write(f"{run_name(cfg)}.npy", predictions.getvalue())
        scores["test"] = last
        best = last if state.best_round == state.round else evaluate_run(run, state.best, "test")
        scores["test_of_best"] = {k: best[k] for k in ("loss", "top1", "top5")}
    return _store_result(cfg, store, state, run.provenance, scores)


def _store_result(cfg: Config, store: Store, state: State, provenance: dict, scores: dict) -> dict:
    result = dict(
        run=run_name(cfg),
        status="diverged" if state.error else "finished",
        error=state.error,
        config=asdict(cfg),
        key=run_key(cfg),
        **provenance,
        history=state.history,
        best_round=state.best_round,
        seconds=state.seconds,
        segments=state.segments,
        **scores,
    )
    store.write(f"{run_name(cfg)}.json", to_json(result))
    return store.result(cfg)


def train_centralized(cfg: Config, store: Store | None = None, **options) -> dict:
    """`train` on the pooled training part, for `num_epochs`."""
    return train(replace(cfg, algorithm="centralized"), store, **options)


def train_federated(cfg: Config, store: Store | None = None, **options) -> dict:
    """`train` over `num_clients` simulated clients, for `num_rounds`."""
    if cfg.centralized:
        raise ValueError("algorithm='centralized' is for train_centralized: choose one of "
                         f"{list(ALGORITHMS)}")
    return train(cfg, store, **options)
