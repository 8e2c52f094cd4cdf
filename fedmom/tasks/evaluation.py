"""How a model does on examples: a task's measures in evaluation mode, in pieces that fit into the memory."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.data.given.held_out import OwnTests
from fedmom.data.inputs import NARROW, Inputs, called_with, gathered, num_examples, pieces, rows_of_inputs
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes, sizes_made
from fedmom.method.state import ClientState, Tree, row_of, rows_of
from fedmom.tasks.places import Places
from fedmom.tasks.task import Task
from fedmom.user_code import one_line

_PIECE, _FEW = 500, 2  # examples judged at a time: at most, at least
_SMALL = 32e6  # bytes of a piece of examples that are small
_WIDE = 8  # clients in a piece, of a measure that makes very many sums of each
_BLOCK = 32  # examples of each client that go forward together with those of others


class _Piece(NamedTuple):
    """Some neighbouring examples, ordered by client."""

    examples: np.ndarray  # [n] their numbers
    clients: np.ndarray  # [k] whose they are, ascending
    lengths: np.ndarray  # [k] how many each has here
    goes_on: bool  # whether the last client has more in the next piece


class Evaluation:
    """A model in evaluation mode, and what a task measures of its outputs."""

    def __init__(
        self,
        places: Places,
        task: Task,
        called: str,
        normalised: Callable[[Inputs], Inputs],
        targets: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """normalised, targets: examples as the model takes them, and as the loss does. called: the model, in errors."""
        self.places, self.task, self.called, self.device = places, task, called, device
        self.normalised, self.targets = normalised, targets
        self.stacks = True  # whether clients' own models may go forward together
        self._each: int | None = None  # bytes that the evaluation of one example takes, where measured

    def measured(
        self, state: ClientState, x_all: Inputs, y_all: Tensor, rows: Tensor | None = None
    ) -> dict[str, float]:
        """{"loss", …} of a model on examples [n, ...], or on those that `rows` numbers."""
        totals = self.totals(state, x_all, y_all, rows)
        return self.task.values(totals) if totals else dict.fromkeys(("loss", *self.task.metrics), 0.0)

    @torch.no_grad()
    def totals(self, state: ClientState, x_all: Inputs, y_all: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss": sums [s], …} in main memory, which add up over examples; nothing of no example."""
        totals = dict[str, Tensor]()
        state = _copy(state)  # a model may write into its buffers in evaluation too: into those of nobody else
        each = self._piece(state, x_all)
        for first in range(0, len(y_all if rows is None else rows), each):
            piece = slice(first, first + each) if rows is None else rows[first : first + each]
            x, y = rows_of_inputs(x_all, piece), rows_of_inputs(y_all, piece)
            found = self.task.judge(self._outputs(state, self.normalised(x)), self.targets(y))
            totals = {name: totals[name] + sums if name in totals else sums for name, sums in found.items()}
        if not totals:
            return {}
        together = torch.cat([*totals.values()]).cpu()  # in one wait for the device
        return dict(zip(totals, together.split([len(sums) for sums in totals.values()]), strict=True))

    @torch.no_grad()
    def by_client(self, state: ClientState, tests: OwnTests) -> dict[str, np.ndarray]:
        """{"loss": [N], …} of one model on each client's own examples, in one pass; NaN for a client without."""
        state, found = _copy(state), self._nothing(tests.partition.num_clients)
        if not self.task.judges_together:
            return self._one_by_one(state, tests, found)
        totals = dict[str, Tensor]()
        for piece in _pieces(tests.partition, self._large_piece(state, tests.x), len(tests.partition.sizes)):
            clients = torch.from_numpy(piece.clients).to(self.device)
            for name, sums in self._judged(state, tests, piece).items():
                total = totals.setdefault(name, sums.new_zeros(tests.partition.num_clients, sums.shape[1]))
                total.index_add_(0, clients, sums)
        some = np.flatnonzero(tests.partition.sizes)
        if len(some):
            self._fill(found, some, {name: total[some] for name, total in _to_memory(totals).items()})
        return found

    def _one_by_one(self, state: ClientState, tests: OwnTests, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same where a client's sums are too many numbers to keep those of all."""
        carried = dict[str, Tensor]()  # the sums of the client that the piece before broke off
        for piece in _pieces(tests.partition, self._piece(state, tests.x), _WIDE):
            sums = _to_memory(self._judged(state, tests, piece))
            for name, one in carried.items():
                sums[name][0] += one
            whole = len(piece.clients) - piece.goes_on
            carried = {name: one[-1].clone() for name, one in sums.items()} if piece.goes_on else {}
            self._fill(found, piece.clients[:whole], {name: one[:whole] for name, one in sums.items()})
        return found

    def _judged(self, state: ClientState, tests: OwnTests, piece: "_Piece") -> dict[str, Tensor]:
        """{measure: sums [k, s]} of the clients of a piece."""
        rows = torch.from_numpy(piece.examples).to(self.device)
        x, y = rows_of_inputs(tests.x, rows), rows_of_inputs(tests.y, rows)
        outputs = self._outputs(state, self.normalised(x))
        return self.task.judge_each(outputs, self.targets(y), torch.from_numpy(piece.lengths))

    @torch.no_grad()
    def by_row(self, rows: ClientState, clients: np.ndarray, tests: OwnTests) -> dict[str, np.ndarray]:
        """{"loss": [K], …} of K clients' own models, rows [K, ...], each on its client's own examples.

        The models go forward together where torch.vmap takes them, by blocks of every client's examples.
        """
        places = np.flatnonzero(tests.partition.sizes[clients])
        found, stacks = self._nothing(len(clients)), self.stacks and self.task.judges_together and len(places) > 1
        if stacks:
            examples = self._large_piece(row_of(rows, 0), tests.x)
            block = min(_BLOCK, examples, int(tests.partition.sizes[clients].max()))
            try:
                for first in range(0, len(places), max(1, examples // block)):
                    some = places[first : first + max(1, examples // block)]
                    self._fill(found, some, self._together(rows, clients, some, tests, block))
                return found
            except Exception as error:  # of a model that cannot be mapped: it is right for one client, too
                self.stacks = isinstance(error, torch.OutOfMemoryError)  # which may be over the next time
        for place in places.tolist():
            of_one = torch.from_numpy(tests.partition.of(int(clients[place]))).to(self.device)
            sums = self.totals(row_of(rows, place), tests.x, tests.y, of_one)
            self._fill(found, np.array([place]), {name: one[None] for name, one in sums.items()})
        return found

    def _together(
        self, rows: ClientState, clients: np.ndarray, places: np.ndarray, tests: OwnTests, block_size: int
    ) -> dict[str, Tensor]:
        """{measure: sums [n, s]} of the clients at `places` [n], each with examples; a block of each at a time."""
        sizes = tests.partition.sizes[clients[places]]
        totals = dict[str, Tensor]()
        for first in range(0, int(sizes.max()), block_size):
            still = np.flatnonzero(sizes > first)  # who has examples left
            held = [tests.partition.of(int(clients[places[k]]))[first : first + block_size] for k in still]
            lengths = np.array([len(one) for one in held])
            block = np.stack([np.resize(one, lengths.max()) for one in held])  # filled up by the client's own
            examples = torch.from_numpy(block).to(self.device)
            x = self.normalised(gathered(tests.x, examples))
            at = torch.from_numpy(places[still])
            own = rows if len(at) == len(clients) else rows_of(rows, at)
            outputs = torch.vmap(self._one_client)(own.params, own.buffers, x)
            kept = torch.from_numpy(np.arange(block.shape[1]) < lengths[:, None]).to(self.device)
            y = self.targets(gathered(tests.y, examples[kept]))
            flat = tree_map(lambda t, kept=kept: t[kept] if isinstance(t, Tensor) else t, outputs)
            for name, sums in self.task.judge_each(flat, y, torch.from_numpy(lengths)).items():
                before = totals.get(name, sums.new_zeros(len(places), sums.shape[1]))
                totals[name] = before.index_add(0, torch.from_numpy(still).to(sums.device), sums)
        return _to_memory(totals)

    def _one_client(self, params: Tree, buffers: Tree, x: Inputs) -> Any:
        """[B, ...] of one client's model; what it writes into its buffers is seen by nobody."""
        return self._outputs(ClientState(params, {}, {name: buffer.clone() for name, buffer in buffers.items()}), x)

    def _nothing(self, num_clients: int) -> dict[str, np.ndarray]:
        return {name: np.full(num_clients, np.nan) for name in ("loss", *self.task.metrics)}

    def _fill(self, found: dict[str, np.ndarray], places: np.ndarray, totals: dict[str, Tensor]) -> None:
        """Write the values of clients whose sums are whole."""
        for name, values in self.task.values_each(totals).items() if len(places) else ():
            found[name][places] = values.numpy()

    @torch.no_grad()
    def check(self, state: ClientState, parts: Mapping[str, tuple[Inputs, Tensor]], num_outputs: int) -> None:
        """Judge a few examples of each part. Raises InputError naming the model.

        The examples with the smallest and the largest numbers are among them: they hold the token ids at the ends.
        """
        state = _copy(state)
        for name, (x, y) in parts.items():
            if not num_examples(x):
                continue
            rows = torch.tensor(sorted({0, *_ends(x)}), device=self.device)
            where = f"on {name} examples {rows.tolist()}"
            try:
                outputs = self._outputs(state, self.normalised(rows_of_inputs(x, rows)))
            except Exception as error:  # a user's model may raise anything
                raise InputError(f"{self.called}: in evaluation the model fails {where}: {one_line(error)}") from error
            shape = [len(rows), *(y.shape[1:] if self.task.targets == "tokens" else ())]
            assert self.task.targets not in ("numbers", "sets") or y[0].numel() == num_outputs
            if want := self.task.check_outputs(outputs, shape, num_outputs):
                got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise InputError(f"{self.called}: in evaluation the model must return {want}, it returned {got}")
            try:
                self.task.judge_each(outputs, self.targets(rows_of_inputs(y, rows)), torch.tensor([len(rows)]))
            except InputError:
                raise
            except Exception as error:  # of a task of the user's own
                said = f"data.task: {type(self.task).__name__}"
                raise InputError(f"{said} fails {where}: {one_line(error)}") from error

    def judged(self, state: ClientState, x: Inputs) -> Any:
        with torch.no_grad():
            return self._outputs(_copy(state), tree_map(torch.clone, x))

    def _piece(self, state: ClientState, x_all: Inputs) -> int:
        """How many examples are judged at a time: so many that what a layer makes of them fits into the memory."""
        if num_examples(x_all) <= _FEW:
            return _PIECE
        if self._each is None:
            self._each = self._evaluation_bytes(state, rows_of_inputs(x_all, slice(_FEW)))
        return max(_FEW, min(_PIECE, int(0.3 * free_bytes(self.device) / max(1, self._each))))

    def _large_piece(self, state: ClientState, x_all: Inputs) -> int:
        """The same, more of small ones: what is done once for a piece then costs less than the model itself."""
        size = self._piece(state, x_all)
        return max(size, min(4 * size, int(_SMALL / max(1, self._each)))) if self._each else size

    def _evaluation_bytes(self, state: ClientState, x: Inputs) -> int:
        """Of one example: the most that three successive modules give back together; 0 where that cannot be seen."""
        made = [sum(t.nbytes for t in tree_leaves(self.normalised(x)))]
        try:
            with sizes_made(made):
                self._outputs(_copy(state), self.normalised(x))
        except Exception:  # a compiled model may not be looked into; it is judged in whole pieces
            return 0
        return max(sum(made[i : i + 3]) for i in range(len(made))) // num_examples(x)

    def _outputs(self, state: ClientState, x: Inputs) -> Any:
        """[n, ...] in evaluation mode, of one example too: models squeeze axes of length one."""
        alone = num_examples(x) == 1
        x = tree_map(lambda t: torch.cat([t, t]), x) if alone else x

        def judge(model: nn.Module) -> Any:
            model.eval()
            return called_with(model, x)

        outputs = self.places.run(state.params, dict(state.buffers), judge)
        return tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, outputs) if alone else outputs


def _pieces(partition: Partition, size: int, most_clients: int) -> Iterator[_Piece]:
    """All examples in pieces of at most `size`, of at most so many clients."""
    ends, first = partition.offsets[1:], 0
    while first < ends[-1]:
        start = int(np.searchsorted(ends, first, side="right"))  # the client of the first one
        last = int(min(first + size, ends[min(start + most_clients, len(ends)) - 1]))
        stop = int(np.searchsorted(ends, last - 1, side="right"))  # and of the last one
        clients = np.arange(start, stop + 1)
        inside = np.minimum(ends[clients], last) - np.maximum(partition.offsets[clients], first)
        some = inside > 0
        yield _Piece(partition.indices[first:last], clients[some], inside[some], bool(last < ends[stop]))
        first = last


def _to_memory(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """[k, s] each, in one wait for the device; they may be written into."""
    widths = [one.shape[1] for one in sums.values()]
    return dict(zip(sums, torch.cat([*sums.values()], 1).cpu().split(widths, 1), strict=True))


def _ends(x: Inputs) -> list[int]:
    """Where the largest and the smallest numbers are."""
    found = list[int]()
    for one in tree_leaves(x):
        if not one.shape[1:].numel() or one.is_complex():
            continue
        high, low = (one.new_empty(len(one), dtype=torch.int64 if one.dtype in NARROW else one.dtype) for _ in "ab")
        first = 0  # results are written in place: small ones between large pieces would hold the memory of all
        for piece in pieces(one):
            rows = piece.reshape(len(piece), -1)
            high[first : first + len(rows)], low[first : first + len(rows)] = rows.amax(1), rows.amin(1)
            first += len(rows)
        found += [int(high.argmax()), int(low.argmin())]
    return found


def _copy(state: ClientState) -> ClientState:
    """Of x and the buffers: nobody is judged by the momentum."""
    params, buffers = ({name: value.clone() for name, value in tree.items()} for tree in (state.params, state.buffers))
    return ClientState(params, {}, buffers)
