import numpy as np
import pytest
import torch

from utils import rng

STREAMS = ("split", "shards", "cohort", "client", "epoch", "mask", "labels", "init", "synthetic",
           "scorers")


def draws(*key):
    return tuple(rng(*key).integers(0, 2**60, 4))


def test_all_keys_of_the_engine_draw_differently():
    numbers = range(3)  # seeds, rounds and clients; zeros at the end are the trap
    keys = [(s, seed) for s in STREAMS for seed in numbers]
    keys += [("mask", seed, 1) for seed in numbers]
    keys += [(s, seed, r) for s in ("labels", "scorers") for seed in numbers for r in (1, 2)]
    keys += [(s, seed, t) for s in ("cohort", "epoch") for seed in numbers for t in (1, 2)]
    keys += [("client", seed, t, k) for seed in numbers for t in numbers for k in numbers if t or k]
    assert len({draws(*key) for key in keys}) == len(keys)


def test_a_trailing_zero_does_not_make_two_streams_alike():
    assert draws("cohort", 7, 3) != draws("client", 7, 3, 0)
    assert len({draws(s, *[0] * (1 + i % 3)) for i, s in enumerate(STREAMS)}) == len(STREAMS)


def test_the_same_key_draws_the_same_whatever_the_global_generators_did():
    first = draws("client", 0, 4, 2)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert draws("client", 0, 4, 2) == first


@pytest.mark.parametrize("key", [("shard", 0), ("client", 0, -1)])
def test_an_unknown_stream_and_a_negative_number_are_refused(key):
    with pytest.raises(ValueError, match=f"{key[0]}.*{key[-1]}"):
        rng(*key)
