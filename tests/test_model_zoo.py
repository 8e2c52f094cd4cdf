"""A zoo of models: each trains on every path as plain torch does, or is refused before anything is trained."""

from functools import lru_cache

import torch

import fedmom
import plain
import zoo
from fedmom.setup import make_task
from fedmom.errors import InputError

ROUNDS, STEPS, LR, BETA, DECAY, SEED = 3, 3, 0.03, 0.8, 0.01, 4


def config(name: str, path: str, chunk_size: int = 2) -> dict:
    """Three clients with 4, 9 and 17 examples, some of few classes; the last chunk is shorter."""
    return {
        "data.dataset": f"zoo:{zoo.ZOO[name].data}",
        "data.num-clients": 3,
        "data.partition": "quantity",
        "data.min-size": 3,
        "data.batch-size": 4,
        "model.name": f"zoo:{name}",
        "algorithm.num-local-steps": STEPS,
        "algorithm.lr": LR,
        "algorithm.beta": BETA,
        "algorithm.nesterov": True,
        "algorithm.weight-decay": DECAY,
        "algorithm.client-weights": "samples",
        "run.num-rounds": ROUNDS,
        "run.eval-every": ROUNDS,
        "run.seed": SEED,
        "run.dtype": "float64",
        "engine.path": path,
        **({} if path == "auto" else {"engine.chunk-size": 1 if path == "loop" else chunk_size}),
    }
