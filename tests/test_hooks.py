"""An idea of one's own: what a student's hook or rule may do, and what it is told otherwise."""
import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CFG, cut, make_small, one_client, same, small_run, timeless

import utils
from utils import FedAvg, State, Store, register_algorithm, register_rule, train

LDA = replace(CFG, head="lda", num_rounds=5, eval_every=1, lr=0.001)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)
    tables = (utils.ALGORITHMS, utils.RULES)
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def registered(**hooks) -> type:
    """A subclass of FedAvg with these methods and constants, as "idea"."""
    idea = type("Idea", (FedAvg,), hooks)
    utils.ALGORITHMS["idea"] = idea
    return idea


def whole_and_resumed(cfg, tmp_path, monkeypatch, at: int = 8) -> list[dict]:
    """The results of a run at once, and of one that is interrupted within its third round."""
    whole = train(cfg, Store(tmp_path / "whole", quiet=True))
    assert whole["status"] == "finished"
    store = Store(tmp_path / "cut", quiet=True)
    with monkeypatch.context() as patch:
        cut(patch, "client_update", at)
        assert train(cfg, store)["status"] == "interrupted"
    return [timeless(whole), timeless(train(cfg, store))]


# ------------------------------------------------------------------ what is kept between rounds
SEEN = []


def keeps_much(self, state, update):
    SEEN.append([(group, list(tensors)) for group, tensors in state.algorithm_state.items()])
    one = torch.ones(1)
    memory = {"b:1": {"z": one, "a:b": 2 * one}, "empty": {}, 7: {"n": one}, "a": {"x": one}}
    return utils.add(state.params, update.vector), memory


def test_a_state_comes_back_as_it_was(tmp_path, monkeypatch):
    SEEN.clear()
    registered(server_step=keeps_much)
    whole, resumed = whole_and_resumed(replace(LDA, algorithm="idea"), tmp_path, monkeypatch)
    assert whole == resumed
    layout = [("b:1", ["z", "a:b"]), ("empty", []), (7, ["n"]), ("a", ["x"])]
    expected = 2 * [[], *4 * [layout]]
    assert expected == SEEN


def adds_in_place(self, state, update):
    for n, w in state.params.items():
        w.add_(update.vector[n])
    return state.params, {}


def fills_the_states_dict(self, state, update):
    state.algorithm_state["seen"] = {"rounds": torch.ones(1)}
    return utils.add(state.params, update.vector), state.algorithm_state


def keeps_on_itself(self, state, update):
    self.velocity = update.vector
    return utils.add(state.params, update.vector), {}


@pytest.mark.parametrize("step", [adds_in_place, fills_the_states_dict, keeps_on_itself])
@pytest.mark.parametrize("masked", [False, True])
def test_what_an_interrupted_round_could_not_repeat_is_refused(step, masked):
    registered(server_step=step)
    cfg = replace(CFG, algorithm="idea")
    mask = None
    if masked:
        mask = {n: torch.ones_like(p, dtype=torch.bool)
                for n, p in small_run(cfg)[0].trainable.items()}
    run, state = small_run(cfg, mask=mask)
    with pytest.raises(ValueError, match="'idea' changes weights, its state or itself in place"):
        utils.federated_round(run, state)


def test_noise_of_torchs_own_generator_is_the_same_after_an_interrupt(tmp_path, monkeypatch):
    def noisy(self, gradients, weights, state, client):
        for g in gradients.values():
            g.add_(torch.randn_like(g), alpha=0.1)

    def noisy_step(self, state, update):
        moved = utils.add(state.params, update.vector)
        return {n: w + 0.01 * torch.randn_like(w) for n, w in moved.items()}, {}
    registered(local_gradient=noisy, server_step=noisy_step)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    whole, resumed = whole_and_resumed(replace(LDA, algorithm="idea"), tmp_path, monkeypatch)
    assert whole == resumed
    assert torch.rand(1) == expected  # the user's own draws go on as if nothing had been


# ------------------------------------------------------------------ what goes to the server
def test_messages_of_a_clients_own_weights_stay_its_own():
    got = {}

    def message(self, run, vector, state, client, lr):
        return run.weights()

    def combine(self, vectors, shares, messages):
        got.update(messages)
        return vectors[0]
    registered(client_message=message, combine=combine)
    run, state = small_run(replace(CFG, algorithm="idea"))
    utils.federated_round(run, state)
    first, second, *_ = got
    for client in (first, second):
        vector = one_client(run, state, client, utils.learning_rate(run.cfg, 0))[0]
        assert same(got[client], utils.add(state.params, vector)) or all(
            torch.allclose(got[client][n], state.params[n] + vector[n]) for n in vector)
    assert not same(got[first], got[second])


def test_weights_in_double_precision_come_back_as_they_are_stored(tmp_path, monkeypatch):
    def precise(self, state, update):
        return {n: w.double() + update.vector[n] for n, w in state.params.items()}, {}
    registered(server_step=precise)
    cfg = replace(LDA, algorithm="idea", rule="random", sparsity=0.5)
    whole, resumed = whole_and_resumed(cfg, tmp_path, monkeypatch)
    assert whole == resumed


def test_a_round_without_any_answer_is_no_divergence():
    run, state = small_run(CFG)

    def nobody(run, state, clients, lr):
        return utils.accumulate_update(run, state, [], [])
    with pytest.raises(RuntimeError, match="none of the clients of round 1 answered"):
        utils.federated_round(run, state, nobody)


# ------------------------------------------------------------------ what tells two ideas apart
def reads_the_servers_rate(self, state, update):
    return utils.apply_vector(state.params, update.vector, self.cfg.server_lr), {}


def reads_the_sparsity(self, state, update):
    return utils.apply_vector(state.params, update.vector, self.cfg.sparsity), {}


def reads_the_length(self, state, update):
    return utils.apply_vector(state.params, update.vector, 1 / self.cfg.num_rounds), {}


@pytest.mark.parametrize(("step", "field"), [
    (reads_the_servers_rate, "server_lr"), (reads_the_sparsity, "sparsity"),
    (reads_the_length, "num_rounds")])
def test_a_field_must_be_declared_and_is_then_part_of_the_key(step, field):
    registered(server_step=step)
    run, state = small_run(replace(CFG, algorithm="idea"))
    with pytest.raises(ValueError, match=rf"'idea' asks for {field}.*reads = \('{field}',\)"):
        utils.federated_round(run, state)

    register_algorithm("mine", type("Mine", (FedAvg,), dict(server_step=step, reads=(field,))))
    assert field in utils.run_key(replace(CFG, algorithm="mine"))
    run, state = small_run(replace(CFG, algorithm="mine"))
    assert utils.federated_round(run, state).round == 1


def early(self, cfg):
    FedAvg.__init__(self, cfg)
    self.step = cfg.server_lr


def in_a_message(self, run, vector, state, client, lr):
    return {"lr": torch.tensor(run.cfg.server_lr)}


@pytest.mark.parametrize("hooks", [dict(__init__=early), dict(client_message=in_a_message)])
def test_a_field_must_be_declared_wherever_it_is_read(hooks):
    registered(**hooks)

    def one_round():
        run, state = small_run(replace(CFG, algorithm="idea"))
        utils.federated_round(run, state)
    with pytest.raises(ValueError, match="'idea' asks for server_lr"):
        one_round()


def test_an_algorithm_can_be_copied():
    algorithm = copy.deepcopy(FedAvg(CFG))
    assert algorithm.cfg.lr == CFG.lr


def test_at_a_constant_rate_one_that_knows_its_end_begins_anew(tmp_path):
    register_algorithm("mine", type("Mine", (FedAvg,), dict(server_step=reads_the_length,
                                                            reads=("num_rounds",))))
    store = Store(tmp_path, quiet=True)
    cfg = replace(LDA, algorithm="mine", schedule="constant", num_rounds=2)
    train(cfg, store)
    longer = train(replace(cfg, num_rounds=4), store)
    assert [part["after_round"] for part in longer["segments"]] == [0]


def test_a_longer_run_has_no_evaluation_that_a_straight_one_lacks(tmp_path):
    cfg = replace(LDA, schedule="constant", eval_every=2)
    store = Store(tmp_path / "a", quiet=True)
    for rounds in (3, 6):
        result = train(replace(cfg, num_rounds=rounds), store)
    straight = train(replace(cfg, num_rounds=6), Store(tmp_path / "b", quiet=True))
    assert timeless(result) == timeless(straight)


def scaled_by(alpha):
    class Mine(FedAvg):
        def combine(self, vectors, shares, messages):
            return utils.scale(vectors[0], alpha)
    return Mine


def test_what_a_function_around_it_defines_tells_ideas_apart():
    hashes = {utils.source_sha256(scaled_by(alpha)) for alpha in (0.5, 4.0, 0.5)}
    assert len(hashes) == 2
    with pytest.raises(ValueError, match="alpha is a list"):
        utils.source_sha256(scaled_by([0.5]))


@pytest.mark.parametrize("constant", [
    [], {}, torch.ones(2000), np.ones(3), functools.partial(max, 1),
    functools.cached_property(len)])
def test_a_constant_that_may_change_or_has_no_words_is_refused(constant):
    with pytest.raises(ValueError, match=f"history is a {type(constant).__name__}"):
        register_algorithm("mine", type("Mine", (FedAvg,), dict(history=constant)))


@pytest.mark.parametrize("name", ["a/b", "../x", "a[1]", "a b", "a:b", ""])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ValueError, match="part of file names"):
        register_algorithm(name, type("Mine", (FedAvg,), {}))
    with pytest.raises(ValueError, match="part of file names"):
        register_rule(name, lambda weights, fisher, draw: weights)


# ------------------------------------------------------------------ mask rules
def in_place(weights, fisher, draw):
    return {n: w.abs_() for n, w in weights.items()}


def infinite(weights, fisher, draw):
    return {n: torch.full_like(w, torch.inf) for n, w in weights.items()}


def of_numpy(weights, fisher, draw):
    return {n: draw.random(w.shape) for n, w in weights.items()}


def test_a_rule_that_works_in_place_leaves_the_model_alone():
    utils.RULES["mine"] = utils.Rule(in_place)
    model = small_run(CFG)[0].model
    before = {n: w.clone() for n, w in model.state_dict().items()}
    utils.calibrate_mask(model, torch.zeros(1, 3, 2, 2), rule="mine", sparsity=0.5)
    assert same(before, model.state_dict())


def test_what_is_frozen_stays_frozen_even_under_infinite_scores():
    utils.RULES["mine"] = utils.Rule(infinite, needs_fisher=True)
    run = small_run(CFG)[0]
    masks = [utils.calibrate_mask(run.model, run.data.images[:4], rule="mine", rounds=r,
                                  sparsity=1 - 0.5 ** r) for r in (1, 2)]
    once, twice = map(utils.flatten, masks)
    assert not (twice & ~once).any()


def test_scores_that_are_no_tensors_are_named():
    utils.RULES["mine"] = utils.Rule(of_numpy)
    with pytest.raises(ValueError, match="'mine': its scores must be tensors"):
        utils.calibrate_mask(small_run(CFG)[0].model, torch.zeros(1), rule="mine", sparsity=0.5)


# ------------------------------------------------------------------ others
def test_an_interrupt_within_a_step_leaves_the_weight_decay_on(monkeypatch):
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = utils.SparseSGDM([("w", w)], 0.1, weight_decay=0.5,
                                 mask={"w": torch.tensor([True, False])})

    def stop(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.optim.SGD, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_head_whose_weights_are_lost_is_named(tmp_path):
    store = Store(tmp_path, quiet=True)
    cfg = replace(CFG, rule="random", head="train")
    train(cfg, store)
    for name in store.names("checkpoints/*/*.safetensors"):
        store.delete(name)
    with pytest.raises(FileNotFoundError, match="stored without its weights"):
        utils.open_run(cfg, store)


def test_a_state_that_is_new_is_no_change():
    """The check of what hooks leave alone must not fire where tensors are merely passed on."""
    def passes_on(self, state, update):
        return state.params, state.algorithm_state
    registered(server_step=passes_on)
    run, state = small_run(replace(CFG, algorithm="idea"))
    state = State(state.params, algorithm_state={"kept": {"x": torch.ones(1)}})
    after = utils.federated_round(run, state)
    assert same(after.params, state.params)
    assert after.algorithm_state["kept"]["x"] is state.algorithm_state["kept"]["x"]
