"""The Flower app that against_flower.py measures: the PyTorch quickstart on our workload.

It stands in a module of its own because Ray's workers import it.
"""
import json
from functools import lru_cache

from against_naive import local_training, plain_images
from common import read_images
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch.utils.data import DataLoader, Subset

from utils import Config, build_model, cohort_size, shard


@lru_cache(maxsize=1)
def kept(text: str, images: str) -> tuple:
    """Configuration, model, images and shards: what an actor keeps from call to call."""
    cfg = Config(**json.loads(text))
    data = read_images(images)
    labels = data.labels.cpu().numpy()[data.train]
    shards = [data.train[s] for s in shard(labels, cfg.num_clients, None, cfg.seed)]
    return cfg, build_model(cfg), plain_images(data, cfg.image_size), shards


def answer(asked: RecordDict, partition: int, text: str, images: str) -> RecordDict:
    """A client's weights and mean loss after local training from the weights it is sent."""
    cfg, model, dataset, shards = kept(text, images)
    model.load_state_dict(asked["arrays"].to_torch_state_dict())
    own = Subset(dataset, shards[partition])
    loader = DataLoader(own, cfg.batch_size, shuffle=True)
    weights, loss = local_training(model, loader, cfg, asked["config"]["lr"])
    found = MetricRecord({"train_loss": loss, "num-examples": len(own)})
    return RecordDict({"arrays": ArrayRecord(weights), "metrics": found})


def client(text: str, images: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        return Message(answer(message.content, partition, text, images), reply_to=message)
    return app


def server(cfg: Config, rounds: int, between) -> ServerApp:
    """FedAvg from our start; `between` is called at the start and after every round."""
    app, expected = ServerApp(), cohort_size(cfg.num_clients, cfg.participation)

    def all_of(replies, key):  # the strategy would go on with fewer
        if len(replies) != expected:
            raise RuntimeError(f"{len(replies)} of {expected} clients answered")
        return aggregate_metricrecords(replies, key)

    @app.main()
    def main(grid, context):
        strategy = FedAvg(fraction_train=cfg.participation, fraction_evaluate=0.0,
                          min_train_nodes=1, min_available_nodes=cfg.num_clients,
                          train_metrics_aggr_fn=all_of)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(build_model(cfg).state_dict()),
            train_config=ConfigRecord({"lr": cfg.lr}), num_rounds=rounds,
            evaluate_fn=lambda t, arrays: between(t))
        if len(result.train_metrics_clientapp) != rounds:
            raise RuntimeError(f"of {rounds} rounds {result.train_metrics_clientapp} came back")
    return app
