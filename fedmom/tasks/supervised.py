"""Supervised problems: a task's loss of a model on minibatches of each client's own examples."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.data.batches import Sampler, crop_flip, moves, normalised
from fedmom.data.datasets import Dataset
from fedmom.data.given.held_out import OwnTests
from fedmom.data.inputs import Inputs, called_with, gathered, num_examples, rows_of_inputs
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.method.randomness import DROPOUT, random_bits
from fedmom.method.state import ClientState, Tree, initial_state
from fedmom.tasks.evaluation import Evaluation
from fedmom.tasks.kinds import Named, make_task
from fedmom.tasks.metrics import named
from fedmom.tasks.models.personal import personal_names
from fedmom.tasks.places import BoundedGathers, Places, cast, check_model, copied
from fedmom.tasks.task import Task


class Batch(NamedTuple):
    """One client's minibatch; stacked, every field gains a leading K."""

    x: Inputs  # [B, *shape], normalised
    y: Tensor  # [B, ...]
    dropout_key: Tensor  # [] int64, the address of this step's masks


class Draws(NamedTuple):
    """What the minibatches of K clients' steps are made from: integers, drawn in main memory by their addresses."""

    examples: Tensor  # [K, I, B] numbers of training examples
    moves: Tensor  # [K, I, B, 3] how each image is cropped and flipped; [K, I, B, 0] without augmentation
    dropout_keys: Tensor  # [K, I] int64, the addresses of the steps' masks


class Supervised:
    """A task's loss of a model on each client's own examples."""

    small = False
    personal: frozenset[str] = frozenset()

    def __init__(
        self,
        dataset: Dataset,
        model: nn.Module,
        partition: Partition,
        *,
        batch_size: int,
        task: Task | None = None,
        sampling: str = "shuffle",
        augment: str = "none",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "",
        own: OwnTests | None = None,
        personal: str = "",
    ) -> None:
        """`task`: left out, classification by cross-entropy. `name`: of the model, for messages. `own`: tests.

        `personal`: what stays with each client, as algorithm.personal says it.
        Raises InputError, naming the model, where it cannot be trained with tensors of the clients' own.
        """
        self.called = f"model.name = {name or type(model).__name__!r}"
        check_model(model, self.called)
        self.task = task or make_task("classification")
        if not isinstance(self.task, Named):  # whose code runs with the model's, so that it may be either's fault
            users = type(self.task)
            self.called += f" with data.task = '{users.__module__}:{users.__qualname__}'"
        self.task.check_size(dataset.num_classes)
        self.measures = named(self.task.metrics)
        self.device = torch.device(device)
        self.dataset = dataset._replace(
            **{
                part: tree_map(lambda t: t.to(self.device), getattr(dataset, part))
                for part in ("x_train", "y_train", "x_test", "y_test")
            }
        )
        self.sizes = partition.sizes
        self.own = None if own is None else self._own_here(dataset, own)
        self.own_sizes = None if own is None else own.partition.sizes
        self.sampler = Sampler(partition, batch_size, sampling=sampling, seed=seed)
        self.augment, self.seed, self.dtype = augment, seed, dtype
        self._hold(cast(model, self.device, dtype))
        self.personal = personal_names(self.model, self.places, personal)

    def _own_here(self, dataset: Dataset, own: OwnTests) -> OwnTests:
        """The clients' own test examples on the device; those of the data set are there already."""
        for split in ("train", "test"):
            if own.x is getattr(dataset, f"x_{split}"):
                return own._replace(x=getattr(self.dataset, f"x_{split}"), y=getattr(self.dataset, f"y_{split}"))
        return own._replace(x=tree_map(lambda t: t.to(self.device), own.x), y=own.y.to(self.device))

    def _hold(self, model: nn.Module) -> None:
        self.model, self.places = model, Places(model)
        self.dropout_keys = self.places.dropout_keys
        self.evaluation = Evaluation(self.places, self.task, self.called, self._normalised, self._judged, self.device)

    def in_dtype(self, dtype: torch.dtype) -> "Supervised":
        """The same problem, its model a copy in another dtype."""
        twin = copy.copy(self)
        twin.dtype = dtype
        twin._hold(cast(copied(self.model), self.device, dtype))
        return twin

    def start(self) -> ClientState:
        return initial_state(*self.places.start())

    def round_batches(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Iterator[Batch]:
        drawn = self.draws(clients, first_steps, num_steps)
        drawn = Draws(*(part.to(self.device) for part in drawn))
        for s in range(num_steps):
            yield self.batch(drawn, s)

    def draws(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Draws:
        """For clients [K] and their steps first_steps [K] + 0, 1, …, in main memory."""
        examples = self.sampler.draw(clients, first_steps, num_steps)
        steps = first_steps[:, None] + torch.arange(num_steps)
        who = clients[:, None].expand(steps.shape)
        crops = self.augment == "crop-flip"
        moved = moves(self.seed, who, steps, examples.shape[2]) if crops else examples.new_empty(*examples.shape, 0)
        return Draws(examples, moved, random_bits(DROPOUT, self.seed, who, steps) if self.dropout_keys else who)

    def batch(self, drawn: Draws, step: int) -> Batch:
        """The minibatches [K, ...] of step 0, 1, … of those that were drawn. Nothing in it waits for the device."""
        examples = drawn.examples[:, step]
        x = gathered(self.dataset.x_train, examples)
        if drawn.moves.shape[-1]:
            x = tree_map(lambda t: crop_flip(t, drawn.moves[:, step]), x)
        return Batch(
            self._normalised(x), self._targets(gathered(self.dataset.y_train, examples)), drawn.dropout_keys[:, step]
        )

    def few_examples(self, count: int) -> Inputs:
        """The first training examples [count, ...] as a model takes them; again from the first where too few."""
        x = self.dataset.x_train
        return self._normalised(rows_of_inputs(x, torch.arange(count, device=self.device) % num_examples(x)))

    def _normalised(self, x: Inputs) -> Inputs:
        """As the model takes them."""
        found: Inputs = tree_map(lambda t: normalised(t, self.dataset.mean, self.dataset.std, self.dtype), x)
        return found

    def _targets(self, y: Tensor) -> Tensor:
        """As the loss takes them: numbers, and 0 or 1 of several labels, in the model's dtype."""
        if y.is_floating_point() or self.task.targets == "sets":
            return y.to(self.dtype)
        return y if y.dtype == torch.int64 else y.to(torch.int64)

    def _judged(self, y: Tensor) -> Tensor:
        """As an evaluation takes them."""
        return y if self.task.exact else self._targets(y)

    def loss(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tensor, Tree]:
        """One client's loss on one minibatch, and the buffers after the forward pass."""
        after = self._standing(buffers, batch)
        loss = self.places.run(params, after, lambda model: self._forward(model, batch))
        return loss, {name: after[name] for name in buffers}

    def _standing(self, buffers: Tree, batch: Batch) -> Tree:
        """What stands in the buffers' places during a step."""
        # BatchNorm writes into its buffers; the copies make that an output instead of a side effect.
        after = {name: buffer.clone() for name, buffer in buffers.items()}
        return {**after, **dict.fromkeys(self.dropout_keys, batch.dropout_key)}

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        model.train()
        return self.task.loss(called_with(model, batch.x), batch.y)

    def gradient(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tree, Tree, Tensor]:
        with BoundedGathers():
            grads, (loss, after) = torch.func.grad_and_value(self.loss, has_aux=True)(params, buffers, batch)
        return grads, after, loss

    def gradient_alone(self, params: Tree, buffers: Tree, batch: Batch) -> tuple[Tree, Tree, Tensor]:
        """By autograd itself. torch.func also makes the graph of the gradient, and first imports torch._dynamo.

        A parameter that the model leaves out has the gradient 0. Raises InputError where the model writes into one.
        """

        def step(model: nn.Module) -> Tensor:
            loss = self._forward(model, batch)
            loss.backward()  # not autograd.grad, which checkpoints with re-entry refuse
            return loss

        with torch.enable_grad():
            leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
            after, versions = self._standing(buffers, batch), {name: x._version for name, x in leaves.items()}
            loss = self.places.run(leaves, after, step, hooks=True)
        if written := next((name for name, x in leaves.items() if x._version != versions[name]), ""):
            raise InputError(
                f"{self.called}: a training step writes into the parameter {written} (an Embedding's max_norm does); "
                "only the optimizer may move parameters"
            )
        grads = {name: _dense(x) for name, x in leaves.items()}
        return grads, {name: after[name].detach() for name in buffers}, loss.detach()

    def activation_bytes(self, start: ClientState) -> int:
        """What the backward pass of one client's minibatch keeps in memory, and the minibatch."""
        kept = 0

        def count(saved: Tensor) -> Tensor:
            nonlocal kept
            kept += saved.numel() * saved.element_size()
            return saved

        first = torch.zeros(1, dtype=torch.int64)
        batch = one_of_batch(next(iter(self.round_batches(first, first, 1))), 0)
        params = {name: x.detach().requires_grad_() for name, x in start.params.items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            self.loss(params, start.buffers, batch)
        return kept + sum(t.numel() * t.element_size() for t in tree_leaves(batch.x))

    @torch.no_grad()
    def state_dict(self, state: ClientState) -> Tree:
        """Frozen and tied tensors included, under the names that the model's own state_dict has."""

        def copies(model: nn.Module) -> Tree:
            held = model.state_dict().items()  # of which a module's extra state may be anything
            return {name: value.clone() for name, value in held if isinstance(value, Tensor)}

        return self.places.run(state.params, dict(state.buffers), copies)

    def beside(self, state: ClientState) -> tuple[Tree, dict[str, Any]]:
        """What no step changes of a state_dict, and how the rest is found in a state; empty where it is all there.

        {"names": {its name: the name in a state, or ""}, "complex": [names in a state of what has a last axis of 2]}.
        """
        places, moving = self.places, {**state.params, **state.buffers}
        model = self.model
        first = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        own = {name: first[id(t)] for name, t in every}
        held = {name: value for name, value in self.state_dict(state).items() if name in own}
        names = {name: own[name] if own[name] in moving else "" for name in held}
        if names == {name: name for name in moving} and not places.complex:
            return {}, {}
        return {name: held[name] for name in held if not names[name]}, {"names": names, "complex": [*places.complex]}

    def evaluate(self, state: ClientState) -> dict[str, float]:
        """The loss and the task's measures on the test set: {"test_loss", "test_accuracy", …}."""
        found = self.evaluation.measured(state, self.dataset.x_test, self.dataset.y_test)
        return {f"test_{name}": value for name, value in found.items()}

    def test_totals(self, state: ClientState) -> dict[str, Tensor]:
        """What `evaluate` is made of, {"loss": sums [s], …}: it adds up over clients with test sets of their own."""
        return self.evaluation.totals(state, self.dataset.x_test, self.dataset.y_test)

    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """The same on the training examples of clients [K], unaugmented: {"loss", "accuracy", …}."""
        offsets, indices = self.sampler.offsets, self.sampler.indices
        rows = torch.cat([indices[offsets[c] : offsets[c + 1]] for c in clients.tolist()]).to(self.device)
        return self.evaluation.measured(state, self.dataset.x_train, self.dataset.y_train, rows)

    def evaluate_own(self, state: ClientState) -> dict[str, np.ndarray]:
        """{"loss": [N], …} of one model on every client's own test examples, in one pass; NaN for a client without."""
        assert self.own is not None
        return self.evaluation.by_client(state, self.own)

    def evaluate_own_rows(self, rows: ClientState, clients: Tensor) -> dict[str, np.ndarray]:
        """{"loss": [K], …} of the models of clients [K], rows [K, ...], each on its client's own test examples."""
        assert self.own is not None
        return self.evaluation.by_row(rows, clients.numpy(), self.own)

    def check_evaluation(self, state: ClientState) -> None:
        """Judge a few examples, so that what fails in evaluation fails before the first round.

        Raises InputError naming the model.
        """
        data = self.dataset
        parts = {"test": (data.x_test, data.y_test), "training": (data.x_train, data.y_train)}
        self.evaluation.check(state, parts, data.num_classes)

    def judged(self, state: ClientState, x: Inputs) -> Any:
        """Outputs in evaluation mode of examples [n, …] as they come in minibatches; nothing of `state` is changed.

        Whatever the model gives back; what it raises is raised.
        """
        return self.evaluation.judged(state, x)


def one_of_batch(batch: Batch, place: int) -> Batch:
    """One of K clients' minibatches."""
    found: Batch = tree_map(lambda t: t[place], batch)
    return found


def _dense(leaf: Tensor) -> Tensor:
    """The gradient of a leaf."""
    g = leaf.grad
    if g is None:
        return torch.zeros_like(leaf)
    return g if g.layout == torch.strided else g.to_dense()
