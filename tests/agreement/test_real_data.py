"""Real images: Fashion-MNIST against a plain large-batch loop, ResNet-56 on CIFAR-10 in both paths. All slow."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fedmom
from fedmom.data.batches import normalised
from fedmom.data.datasets import load_dataset
from fedmom.data.shipped import DEBIAN_FASHION_MNIST
from fedmom.tasks.models import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
CIFAR10 = os.environ.get("FEDMOM_TEST_CIFAR10", "")

pytestmark = pytest.mark.slow
needs_fashion = pytest.mark.skipif(
    not Path(DEBIAN_FASHION_MNIST).is_dir(), reason="needs Fashion-MNIST: apt install dataset-fashion-mnist"
)
needs_cifar10 = pytest.mark.skipif(
    not Path(CIFAR10).is_file(), reason="needs CIFAR-10: FEDMOM_TEST_CIFAR10 names no .npz file"
)


@needs_fashion
def test_interval_one_is_within_half_a_point_of_a_plain_large_batch_loop():
    """configs/fashion-mnist.toml with I = 1 against torch.optim.SGD on batches of N × B from all data at once."""
    steps, lr, decay_at = 400, 0.1, 300
    sets = {
        "algorithm.num-local-steps": 1,
        "algorithm.lr": lr,
        "algorithm.lr-schedule": "step",
        "algorithm.lr-milestones": str(decay_at / steps),
        "run.num-rounds": steps,
        "run.eval-every": steps,
        "engine.path": "vmap",
        "engine.chunk-size": 10,
    }
    ours = fedmom.run(CONFIGS / "fashion-mnist.toml", sets=sets, callbacks=[fedmom.Callback()])
    data, model = ours.config.data, ours.config.model
    images = load_dataset("fashion-mnist")
    net = build_model(model.name, (1, 28, 28), 10, seed=0, hidden=model.hidden)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=ours.config.algorithm.beta)
    generator = torch.Generator().manual_seed(0)
    batch = data.num_clients * data.batch_size
    order = torch.cat([torch.randperm(60_000, generator=generator) for _ in range(5)])
    for t in range(steps):
        if t == decay_at:
            optimizer.param_groups[0]["lr"] = lr / 10
        rows = order[t * batch : (t + 1) * batch]
        x = normalised(images.x_train[rows], images.mean, images.std, torch.float32)
        optimizer.zero_grad()
        cross_entropy(net(x), images.y_train[rows]).backward()
        optimizer.step()
    net.eval()
    x = normalised(images.x_test, images.mean, images.std, torch.float32)
    plain = (net(x).argmax(1) == images.y_test).double().mean().item()
    print(f"I = 1: {ours.rounds[-1]['test_accuracy']:.4f}, plain loop: {plain:.4f}")
    assert plain > 0.8
    assert ours.rounds[-1]["test_accuracy"] == pytest.approx(plain, abs=0.005)


@needs_fashion
def test_fashion_mnist_config_trains_on_the_cpu():
    result = fedmom.run(
        CONFIGS / "fashion-mnist.toml", sets={"run.num-rounds": 20}, device="cpu", callbacks=[fedmom.Callback()]
    )
    assert result.rounds[-1]["test_accuracy"] > 0.7


@needs_cifar10
def test_resnet56_takes_steps_on_cifar10_in_both_paths(tmp_path):
    """The paper's model on real images, with augmentation and BatchNorm, through the config for 8 clients."""
    # 100 test images: evaluating all 10,000 in float64 takes minutes on a CPU.
    whole = np.load(CIFAR10)
    some = {name: whole[name][: 100 if "test" in name else 5000] for name in whole.files}
    np.savez(tmp_path / "cifar10.npz", **some)
    states = {}
    for path in ("vmap", "loop"):
        sets = {
            "data.data-dir": str(tmp_path),
            "data.batch-size": 4,
            "algorithm.cohort-size": 2,
            "algorithm.num-local-steps": 2,
            "run.num-steps": 2,
            "run.dtype": "float64",
            "engine.path": path,
            "engine.chunk-size": 2 if path == "vmap" else 0,
        }
        result = fedmom.run(CONFIGS / "cifar10-resnet56.toml", sets=sets, callbacks=[fedmom.Callback()])
        states[path] = result.state_dict
        assert result.config.engine.path == path
        assert sum(u.numel() for u in result.momentum.values()) == 853_018
        assert 0 < result.rounds[0]["train_loss"] < 20  # ResNet-56 at lr 0.1 without warm-up rises before it falls
        start = dict(build_model("resnet56", (3, 32, 32), 10, seed=0).named_parameters())
        assert all(not torch.equal(result.state_dict[name], x.double()) for name, x in start.items())
        counts = [v for name, v in result.state_dict.items() if name.endswith("num_batches_tracked")]
        assert counts
        assert all(int(count) == 2 for count in counts)
    for name, value in states["vmap"].items():
        torch.testing.assert_close(value, states["loop"][name], rtol=1e-7, atol=1e-9, msg=name)
