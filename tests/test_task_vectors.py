import pytest
import torch
from helpers import same

from utils import (
    add,
    apply_vector,
    flatten,
    negate,
    scale,
    squared_norm,
    task_vector,
    unflatten,
)

A = {"w": torch.tensor([[1.0, -2.0], [3.0, 0.5]]), "b": torch.tensor([4.0])}
B = {"w": torch.tensor([[0.5, 2.0], [-1.0, 8.0]]), "b": torch.tensor([-2.0])}


def test_addition_is_entrywise_and_commutes():
    assert same(add(A, B), {"w": torch.tensor([[1.5, 0.0], [2.0, 8.5]]), "b": torch.tensor([2.0])})
    assert same(add(A, B), add(B, A))


def test_scaling_multiplies_every_entry():
    assert same(scale(A, 0.5), {"w": torch.tensor([[0.5, -1.0], [1.5, 0.25]]),
                                "b": torch.tensor([2.0])})


def test_a_vector_and_its_negation_cancel():
    assert same(add(A, negate(A)), scale(A, 0))
    assert same(negate(negate(A)), A)


def test_a_task_vector_leads_from_the_start_to_the_tuned_weights():
    assert same(task_vector(B, A), {"w": torch.tensor([[-0.5, 4.0], [-4.0, 7.5]]),
                                    "b": torch.tensor([-6.0])})
    assert same(apply_vector(A, task_vector(B, A)), B)


def test_alpha_says_how_far_to_go():
    assert same(apply_vector(A, B, alpha=0), A)
    assert same(apply_vector(A, B, alpha=-1), task_vector(A, B))
    assert same(apply_vector(A, B, 0.5), {"w": torch.tensor([[1.25, -1.0], [2.5, 4.5]]),
                                          "b": torch.tensor([3.0])})


def test_the_operands_stay_as_they_are():
    before = {n: t.clone() for n, t in A.items()}
    add(A, B), scale(A, 2), negate(A), task_vector(A, B), apply_vector(A, B)
    assert same(A, before)


@pytest.mark.parametrize("operation", [add, task_vector, apply_vector])
def test_vectors_of_different_weights_do_not_mix(operation):
    for a, b in ((A, {"w": B["w"]}), ({"w": A["w"]}, B), (A, B | {"c": B["b"]})):
        with pytest.raises(KeyError, match="['bc']"):
            operation(a, b)


def test_names_may_come_in_any_order():
    assert same(add(A, dict(reversed(B.items()))), add(A, B))


def test_the_squared_norm_by_hand():
    assert squared_norm(A).item() == 1 + 4 + 9 + 0.25 + 16


def test_flat_vectors_come_back_in_their_shapes_and_order():
    assert flatten(A).tolist() == [1, -2, 3, 0.5, 4]
    assert same(unflatten(flatten(A), B), A)
    with pytest.raises((ValueError, RuntimeError)):
        unflatten(torch.zeros(4), A)


def test_weights_of_other_shapes_are_not_added_by_broadcasting():
    with pytest.raises(KeyError, match="'w'"):
        add({"w": torch.ones(2)}, {"w": torch.ones(1)})
