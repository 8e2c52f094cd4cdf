"""What the clients minimise. A task draws minibatches, gives one client's gradient, and judges the mean model."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmom.batches import Sampler, crop_flip, normalised
from fedmom.datasets import Dataset
from fedmom.dropout import KEY
from fedmom.partition import Partition
from fedmom.randomness import DROPOUT, random_bits
from fedmom.state import ClientState, Tree, initial_state


class Task(Protocol):
    """N clients' objectives f_i, as the engine needs them."""

    sizes: np.ndarray  # [N] examples of each client
    device: torch.device
    measures: tuple[str, ...]  # the names that `evaluate` gives
    small: bool  # whether a round's line also carries x, u and x after every step

    def start(self) -> ClientState:
        """The common x⁰, u⁰ = 0 and the buffers."""

    def gradient(self, params: Tree, buffers: Tree, batch: Any, /) -> tuple[Tree, Tree, Tensor]:
        """Of ONE client on one minibatch: gradients, buffers after the forward pass, loss. vmap adds the axis."""

    def gradient_alone(self, params: Tree, buffers: Tree, batch: Any, /) -> tuple[Tree, Tree, Tensor]:
        """The same where no vmap is around it."""

    def round_batches(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Iterator[Any]:
        """The minibatches of clients [K] for steps first_steps [K] + 0, 1, …: tensors [K, ...] per step."""

    def evaluate(self, state: ClientState) -> dict[str, Any]:
        """Measurements at the mean model."""

    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """Measurements of `state` on the own data of clients [K], all examples together."""

    def state_dict(self, state: ClientState) -> Tree:
        """The mean model as its own load_state_dict takes it."""

    def activation_bytes(self, start: ClientState) -> int:
        """Memory of one client's step besides x, u and g; decides how many clients fit at once."""


class Batch(NamedTuple):
    """One client's minibatch; stacked, every field gains a leading K."""

    x: Tensor  # [B, *shape], normalised
    y: Tensor  # [B]
    dropout_key: Tensor  # [] int64, the address of this step's masks


class Classification:
    """Softmax cross-entropy of a model on each client's own examples."""

    small = False
    measures: tuple[str, ...] = ("test_loss", "test_accuracy")

    def __init__(
        self,
        dataset: Dataset,
        model: nn.Module,
        partition: Partition,
        *,
        batch_size: int,
        sampling: str = "shuffle",
        augment: str = "none",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.dataset = dataset._replace(
            **{name: getattr(dataset, name).to(self.device) for name in ("x_train", "y_train", "x_test", "y_test")}
        )
        self.sizes = partition.sizes
        self.sampler = Sampler(partition, batch_size, sampling=sampling, seed=seed, device=self.device)
        self.augment, self.seed, self.dtype = augment, seed, dtype
        self.model = model.to(self.device, dtype)
        buffers = dict(self.model.named_buffers())
        self.dropout_keys = [name for name in buffers if name.rpartition(".")[2] == KEY]

    def in_dtype(self, dtype: torch.dtype) -> "Classification":
        """The same task, its model a copy in another dtype."""
        twin = copy.copy(self)
        twin.dtype, twin.model = dtype, copy.deepcopy(self.model).to(dtype)
        return twin

    def start(self) -> ClientState:
        params = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name: b.clone() for name, b in self.model.named_buffers() if name not in self.dropout_keys}
        return initial_state(params, buffers)

    def round_batches(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Iterator[Batch]:
        indices = self.sampler.draw(clients, first_steps, num_steps)
        source = self.dataset.x_train
        for s in range(num_steps):
            rows, steps = indices[:, s].reshape(-1), first_steps + s
            # index_select copies whole examples; indexing by a matrix goes number by number.
            x = source.index_select(0, rows).reshape(*indices[:, s].shape, *source.shape[1:])
            y = self.dataset.y_train[indices[:, s]]
            if self.augment == "crop-flip":
                x = crop_flip(x, self.seed, clients, steps)
            keys = random_bits(DROPOUT, self.seed, clients, steps) if self.dropout_keys else clients
            yield Batch(self._normalised(x), y, keys)

    def _normalised(self, x: Tensor) -> Tensor:
        return normalised(x, self.dataset.mean, self.dataset.std, self.dtype)

    def loss(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """One client's loss on one minibatch, and the buffers after the forward pass."""
        # BatchNorm writes into its buffers; the copies make that an output instead of a side effect.
        after = {name: buffer.clone() for name, buffer in buffers.items()}
        keys = dict.fromkeys(self.dropout_keys, batch.dropout_key)
        self.model.train()
        logits = torch.func.functional_call(self.model, {**params, **after, **keys}, (batch.x,))
        return cross_entropy(logits, batch.y), after

    def gradient(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tree, Tree, Tensor]:
        grads, (loss, after) = torch.func.grad_and_value(self.loss, has_aux=True)(params, buffers, batch)
        return grads, after, loss

    def gradient_alone(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tree, Tree, Tensor]:
        """By autograd itself. torch.func also makes the graph of the gradient, and first imports torch._dynamo."""
        with torch.enable_grad():
            leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
            loss, after = self.loss(leaves, buffers, batch)
            # A model may leave a parameter out.
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        after = {name: buffer.detach() for name, buffer in after.items()}
        return dict(zip(leaves, grads, strict=True)), after, loss.detach()

    def activation_bytes(self, start: ClientState) -> int:
        """What the backward pass of one client's minibatch keeps in memory, and the minibatch."""
        kept = 0

        def count(saved: Tensor) -> Tensor:
            nonlocal kept
            kept += saved.numel() * saved.element_size()
            return saved

        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        batch = Batch(*(field[0] for field in next(iter(self.round_batches(first, first, 1)))))
        params = {name: x.detach().requires_grad_() for name, x in start.params.items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            self.loss(params, start.buffers, batch)
        return kept + batch.x.numel() * batch.x.element_size()

    @torch.no_grad()
    def state_dict(self, state: ClientState) -> Tree:
        """Frozen and tied tensors included, under the names that the model's own state_dict has."""
        known = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in {**state.params, **state.buffers}.items():
            known[name].copy_(value)
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def evaluate(self, state: ClientState) -> dict[str, float]:
        """Loss and accuracy on the test set: {"test_loss", "test_accuracy"}."""
        loss, accuracy = self._judge(state, self.dataset.x_test, self.dataset.y_test)
        return {"test_loss": loss, "test_accuracy": accuracy}

    @torch.no_grad()
    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """Loss and accuracy on the training examples of clients [K], unaugmented: {"loss", "accuracy"}."""
        offsets, indices = self.sampler.offsets, self.sampler.indices
        rows = torch.cat([indices[offsets[c] : offsets[c + 1]] for c in clients.tolist()])
        loss, accuracy = self._judge(state, self.dataset.x_train[rows], self.dataset.y_train[rows])
        return {"loss": loss, "accuracy": accuracy}

    def _judge(self, state: ClientState, x_all: Tensor, y_all: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy of a model on examples [n, ...]."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(x_all.split(500), y_all.split(500), strict=True):
            x = self._normalised(x)
            logits = torch.func.functional_call(self.model, {**state.params, **state.buffers}, (x,))
            loss += cross_entropy(logits, y, reduction="sum")
            right += (logits.argmax(1) == y).sum()
        count = max(1, len(y_all))
        return loss.item() / count, right.item() / count
