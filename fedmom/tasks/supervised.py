"""Supervised: softmax cross-entropy of a model on minibatches of each client's own examples."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmom.data.batches import Sampler, crop_flip, moves, normalised
from fedmom.data.datasets import Dataset
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes, sizes_made
from fedmom.method.randomness import DROPOUT, random_bits
from fedmom.method.state import ClientState, Tree, initial_state
from fedmom.tasks.places import BoundedGathers, Places, cast, check_model, copied
from fedmom.user_code import one_line

_PIECE, _FEW = 500, 2  # examples judged at a time: at most, at least


class Batch(NamedTuple):
    """One client's minibatch; stacked, every field gains a leading K."""

    x: Tensor  # [B, *shape], normalised
    y: Tensor  # [B]
    dropout_key: Tensor  # [] int64, the address of this step's masks


class Draws(NamedTuple):
    """What the minibatches of K clients' steps are made from: integers, drawn in main memory by their addresses."""

    examples: Tensor  # [K, I, B] numbers of training examples
    moves: Tensor  # [K, I, B, 3] how each image is cropped and flipped; [K, I, B, 0] without augmentation
    dropout_keys: Tensor  # [K, I] int64, the addresses of the steps' masks


class Supervised:
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
        name: str = "",
    ) -> None:
        """`name`: of the model, for messages.

        Raises InputError, naming the model, where it cannot be trained with tensors of the clients' own.
        """
        self.called = f"model.name = {name or type(model).__name__!r}"
        check_model(model, self.called)
        self.device = torch.device(device)
        self.dataset = dataset._replace(
            **{name: getattr(dataset, name).to(self.device) for name in ("x_train", "y_train", "x_test", "y_test")}
        )
        self.sizes = partition.sizes
        self.sampler = Sampler(partition, batch_size, sampling=sampling, seed=seed)
        self.augment, self.seed, self.dtype = augment, seed, dtype
        self._hold(cast(model, self.device, dtype))
        self._each: int | None = None  # bytes that the evaluation of one example takes, where measured

    def _hold(self, model: nn.Module) -> None:
        self.model, self.places = model, Places(model)
        self.dropout_keys = self.places.dropout_keys

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
        source, examples = self.dataset.x_train, drawn.examples[:, step]
        # index_select copies whole examples; indexing by a matrix goes number by number.
        x = source.index_select(0, examples.reshape(-1)).reshape(*examples.shape, *source.shape[1:])
        if drawn.moves.shape[-1]:
            x = crop_flip(x, drawn.moves[:, step])
        return Batch(self._normalised(x), self.dataset.y_train[examples], drawn.dropout_keys[:, step])

    def _normalised(self, x: Tensor) -> Tensor:
        return normalised(x, self.dataset.mean, self.dataset.std, self.dtype)

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

    @staticmethod
    def _forward(model: nn.Module, batch: Batch) -> Tensor:
        model.train()
        return cross_entropy(model(batch.x), batch.y)

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
        batch = Batch(*(field[0] for field in next(iter(self.round_batches(first, first, 1)))))
        params = {name: x.detach().requires_grad_() for name, x in start.params.items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            self.loss(params, start.buffers, batch)
        return kept + batch.x.numel() * batch.x.element_size()

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

    @torch.no_grad()
    def evaluate(self, state: ClientState) -> dict[str, float]:
        """Loss and accuracy on the test set: {"test_loss", "test_accuracy"}."""
        loss, accuracy = self._judge(state, self.dataset.x_test, self.dataset.y_test)
        return {"test_loss": loss, "test_accuracy": accuracy}

    @torch.no_grad()
    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """Loss and accuracy on the training examples of clients [K], unaugmented: {"loss", "accuracy"}."""
        offsets, indices = self.sampler.offsets, self.sampler.indices
        rows = torch.cat([indices[offsets[c] : offsets[c + 1]] for c in clients.tolist()]).to(self.device)
        loss, accuracy = self._judge(state, self.dataset.x_train[rows], self.dataset.y_train[rows])
        return {"loss": loss, "accuracy": accuracy}

    def check_evaluation(self, state: ClientState) -> None:
        """Judge a few examples, so that what fails in evaluation fails before the first round.

        The examples with the smallest and the largest numbers are among them: they hold the token ids at the ends.
        Raises InputError naming the model.
        """
        state = _copy(state)
        for name, x in (("test", self.dataset.x_test), ("training", self.dataset.x_train)):
            if not len(x):
                continue
            flat = x.reshape(len(x), -1)
            ends = [flat.amax(1).argmax(), flat.amin(1).argmin()] if flat.shape[1] and not x.is_complex() else []
            rows = torch.tensor(sorted({0, *map(int, ends)}), device=x.device)
            try:
                logits = self._logits(state, self._normalised(x[rows]))
            except Exception as error:  # a user's model may raise anything
                where = f"on {name} examples {rows.tolist()}"
                raise InputError(f"{self.called}: in evaluation the model fails {where}: {one_line(error)}") from error
            want = [len(rows), self.dataset.num_classes]
            if not isinstance(logits, Tensor) or list(logits.shape) != want:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(f"{self.called}: in evaluation the model must return logits {want}, it returned {got}")

    def _judge(self, state: ClientState, x_all: Tensor, y_all: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy of a model on examples [n, ...]."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        state = _copy(state)  # a model may write into its buffers in evaluation too: into those of nobody else
        each = self._piece(state, x_all)
        for x, y in zip(x_all.split(each), y_all.split(each), strict=True):
            logits = self._logits(state, self._normalised(x))
            loss += cross_entropy(logits, y, reduction="sum")
            right += (logits.argmax(1) == y).sum()
        count = max(1, len(y_all))
        loss, right = torch.stack([loss, right.double()]).tolist()  # in one wait for the device
        return loss / count, right / count

    def _piece(self, state: ClientState, x_all: Tensor) -> int:
        """How many examples are judged at a time: so many that what a layer makes of them fits into the memory."""
        if len(x_all) <= _FEW:
            return _PIECE
        if self._each is None:
            self._each = self._evaluation_bytes(state, x_all[:_FEW])
        return max(_FEW, min(_PIECE, int(0.3 * free_bytes(self.device) / max(1, self._each))))

    def _evaluation_bytes(self, state: ClientState, x: Tensor) -> int:
        """Of one example: the most that three successive modules give back together; 0 where that cannot be seen."""
        made = [self._normalised(x).nbytes]
        try:
            with sizes_made(made):
                self._logits(_copy(state), self._normalised(x))
        except Exception:  # a compiled model may not be looked into; it is judged in whole pieces
            return 0
        return max(sum(made[i : i + 3]) for i in range(len(made))) // len(x)

    def judged(self, state: ClientState, x: Tensor) -> Tensor:
        """Logits in evaluation mode of examples [n, …] as they come in minibatches; nothing of `state` is changed.

        Whatever the model gives back; what it raises is raised.
        """
        with torch.no_grad():
            return self._logits(_copy(state), x.clone())

    def _logits(self, state: ClientState, x: Tensor) -> Tensor:
        """[n, classes] in evaluation mode, of one example too: models squeeze axes of length one."""
        alone = len(x) == 1
        x = torch.cat([x, x]) if alone else x

        def judge(model: nn.Module) -> Tensor:
            model.eval()
            logits: Tensor = model(x)
            return logits

        logits = self.places.run(state.params, dict(state.buffers), judge)
        return logits[:1] if alone and isinstance(logits, Tensor) else logits


def _dense(leaf: Tensor) -> Tensor:
    """The gradient of a leaf."""
    g = leaf.grad
    if g is None:
        return torch.zeros_like(leaf)
    return g if g.layout == torch.strided else g.to_dense()


def _copy(state: ClientState) -> ClientState:
    """Of x and the buffers: nobody is judged by the momentum."""
    params, buffers = ({name: value.clone() for name, value in tree.items()} for tree in (state.params, state.buffers))
    return ClientState(params, {}, buffers)
