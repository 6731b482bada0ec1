"""FedAvg with a mask, without any trick: read this before `federated_round` in utils.py.

A test holds the two together. The draws (who takes part, in which order a client sees its images)
and the learning rate are those of utils.py; everything else is written out.
"""
import torch.nn.functional as F

from utils import cohort, learning_rate, rng


def plain_fedavg(model, images, labels, shards, mask, cfg, num_rounds):
    """The server's weights after `num_rounds` rounds; `mask` is 1 where a weight is trained."""
    server = {n: p.detach().clone() for n, p in model.named_parameters()}
    for t in range(num_rounds):
        lr = learning_rate(cfg, t / cfg.num_rounds)
        clients = cohort(cfg.num_clients, cfg.participation, "cohort", cfg.seed, t)
        num_images = sum(len(shards[k]) for k in clients)
        new_server = {n: w.clone() for n, w in server.items()}

        for k in clients:
            # The client starts from the server's weights, without momentum.
            for n, p in model.named_parameters():
                p.data = server[n].clone()
            momentum = dict.fromkeys(server, 0)

            # It goes through its own images in a random order, again and again.
            draw = rng("client", cfg.seed, t, k)
            order = []
            while len(order) < cfg.local_steps * cfg.batch_size:
                order += draw.permutation(shards[k]).tolist()

            for step in range(cfg.local_steps):
                batch = order[step * cfg.batch_size:(step + 1) * cfg.batch_size]
                model.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                for n, p in model.named_parameters():
                    gradient = mask[n] * (p.grad + cfg.weight_decay * p.data)
                    momentum[n] = cfg.momentum * momentum[n] + gradient
                    p.data = p.data - lr * momentum[n]

            # The server averages what the clients moved by, weighted by their numbers of images.
            for n, p in model.named_parameters():
                new_server[n] += len(shards[k]) / num_images * (p.data - server[n])
        server = new_server
    return server
