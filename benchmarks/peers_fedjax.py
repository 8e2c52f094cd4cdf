"""FedJAX's federated averaging on a workload of benchmarks/peers.py; runs in FedJAX's own environment.

    python benchmarks/peers_fedjax.py WORKLOAD.json ROUNDS OUT.json

XLA compiles a client's step and uses all cores for it. BatchNorm has no running statistics here: FedJAX's clients
return parameters alone.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg


def conv(x, w, stride=1, padding="SAME"):
    return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def padded(stride):
    return "SAME" if stride == 1 else ((1, 1), (1, 1))


def norm(x, p):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[0] + p[1]


def drop(x, rate, rng):
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0)


class Shapes:
    """Parameters of a model, drawn as its layers ask for them."""

    def __init__(self) -> None:
        self.rng, self.params = np.random.default_rng(0), []

    def dense(self, size_in: int, size_out: int) -> None:
        w = self.rng.uniform(-1, 1, (size_in, size_out)) / np.sqrt(size_in)
        self.params.append((jnp.array(w, jnp.float32), jnp.zeros(size_out)))

    def kernel(self, size_in: int, size_out: int):
        w = self.rng.normal(0, np.sqrt(2 / (9 * size_in)), (3, 3, size_in, size_out))
        return jnp.array(w, jnp.float32)


def dense_net(load, sizes):
    shapes = Shapes()
    for a, b in pairwise(sizes):
        shapes.dense(a, b)

    def logits(params, x, rng):
        x = x.reshape(len(x), -1)
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    return shapes.params, logits


def cnn(load):
    channels, side, _ = load["shape"]
    shapes = Shapes()
    shapes.params += [(shapes.kernel(channels, 32), jnp.zeros(32)), (shapes.kernel(32, 64), jnp.zeros(64))]
    shapes.dense(64 * ((side - 4) // 2) ** 2, 128)
    shapes.dense(128, 10)

    def logits(params, x, rng):
        first, second, third, last = params
        rngs = jax.random.split(rng)
        x = jax.nn.relu(conv(x, first[0], padding="VALID") + first[1])
        x = jax.nn.relu(conv(x, second[0], padding="VALID") + second[1])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = drop(x, 0.25, rngs[0]).reshape(len(x), -1)
        x = drop(jax.nn.relu(x @ third[0] + third[1]), 0.5, rngs[1])
        return x @ last[0] + last[1]

    return shapes.params, logits


def resnet20(load):
    shapes, ones = Shapes(), lambda width: (jnp.ones(width), jnp.zeros(width))
    stem = (shapes.kernel(load["shape"][0], 16), ones(16))
    widths = [16, *[w for w in (16, 32, 64) for _ in range(3)]]
    blocks = [(shapes.kernel(a, b), ones(b), shapes.kernel(b, b), ones(b)) for a, b in pairwise(widths)]
    shapes.dense(64, 10)

    def logits(params, x, rng):
        (w, n), blocks, (last, bias) = params
        x = jax.nn.relu(norm(conv(x, w), n))
        for w1, n1, w2, n2 in blocks:
            stride = w1.shape[3] // w1.shape[2]
            y = norm(conv(jax.nn.relu(norm(conv(x, w1, stride, padded(stride)), n1)), w2), n2)
            if stride > 1:
                x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, y.shape[3] - x.shape[3])))
            x = jax.nn.relu(x + y)
        return x.mean((1, 2)) @ last + bias

    return (stem, blocks, shapes.params[0]), logits


def model_of(load):
    size = int(np.prod(load["shape"]))
    if load["model"] == "logistic":
        return dense_net(load, [size, 10])
    if load["model"] == "mlp":
        return dense_net(load, [size, load["hidden"], load["hidden"], 10])
    return {"cnn": cnn, "resnet20": resnet20}[load["model"]](load)


def main() -> None:
    load, rounds = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    with np.load(load["data"]) as file:
        x, y = file["x"].astype(np.float32) / 255, file["y"].astype(np.int32)
    mean, std = (np.array(load[part], np.float32).reshape(-1, 1, 1) for part in ("mean", "std"))
    x = (x - mean) / std
    x = np.ascontiguousarray(np.moveaxis(x, 2, -1)) if x.ndim == 5 else x
    clients = {i: fedjax.ClientDataset({"x": x[i], "y": y[i]}) for i in range(load["clients"])}
    params, logits = model_of(load)

    def loss(params, batch, rng):
        rows = jax.nn.log_softmax(logits(params, batch["x"], rng))
        return -jnp.take_along_axis(rows, batch["y"][:, None], 1).mean()

    algorithm = fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(load["lr"], load["momentum"] or None),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(load["batch"], num_epochs=None, num_steps=load["steps"], drop_remainder=True),
    )
    state, rng, draw = algorithm.init(params), jax.random.PRNGKey(0), np.random.default_rng(0)
    probe, judge = {"x": x[:10].reshape(-1, *x.shape[2:]), "y": y[:10].reshape(-1)}, jax.jit(loss)
    seconds, losses = [], [float(judge(state.params, probe, rng))]
    for _ in range(rounds):
        begin = time.perf_counter()
        cohort = draw.choice(load["clients"], load["cohort"], replace=False)
        keys = jax.random.split(rng, len(cohort) + 1)
        rng = keys[0]
        state, _ = algorithm.apply(state, [(int(c), clients[int(c)], k) for c, k in zip(cohort, keys[1:], strict=True)])
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - begin)
    losses.append(float(judge(state.params, probe, rng)))
    count = sum(int(p.size) for p in jax.tree_util.tree_leaves(state.params))
    Path(sys.argv[3]).write_text(json.dumps({"seconds": seconds, "losses": losses, "parameters": count}))


if __name__ == "__main__":
    main()
