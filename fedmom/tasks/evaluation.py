"""How a model does on examples: a task's measures in evaluation mode, in pieces that fit into the memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedmom.data.inputs import NARROW, Inputs, called_with, num_examples, pieces, rows_of_inputs
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes, sizes_made
from fedmom.method.state import ClientState
from fedmom.tasks.places import Places
from fedmom.tasks.task import Task
from fedmom.user_code import one_line

_PIECE, _FEW = 500, 2  # examples judged at a time: at most, at least


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
                self.task.judge(outputs, self.targets(rows_of_inputs(y, rows)))
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
