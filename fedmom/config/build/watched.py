"""The user's class of `algorithm.correction = "module:Class"`, watched over.

What it is given must stay as it is, and what it gives must keep its form.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedmom.errors import InputError
from fedmom.method.corrections import Correction, takes_key
from fedmom.method.randomness import CORRECTION, random_bits
from fedmom.method.state import Tree
from fedmom.user_code import one_line, place_of

_METHODS = ("start", "gradient", "finish", "gather")


def watched_class(said: str, kind: type, seed: int) -> Correction:
    """An object of the user's class, watched over. InputError, beginning with `said`, for one without a method."""
    if lacking := [name for name in _METHODS if not callable(getattr(kind, name, None))]:
        raise InputError(f"{said}: the class has no method {lacking[0]}; derive it from fedmom.Correction")
    try:
        of = kind()
    except Exception as error:
        raise InputError(f"{said}: making one without arguments raised {one_line(error)}{place_of(error)}") from error
    given: Any = of
    keyed = takes_key(given) if isinstance(of, Correction) else takes_key(given.gradient)
    return (_Keyed if keyed else _Watched)(said, given, kind, seed)


class _Watched(Correction):
    """Every call of one of the four methods, and what it gives back."""

    def __init__(self, said: str, of: Correction, kind: type, seed: int) -> None:
        self.of, self.__wrapped__ = of, kind  # for who looks at its file
        self._said, self._seed = said, seed
        # The form of a message, when the first was seen.
        self._message: dict[str, torch.Size] | None = None

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        client, server = self._pair("start", self._call("start", params), "(client, server)")
        some = next(iter(params.values()))
        for whose, tree in (("client's", client), ("server's", server)):
            for name, value in self._tree("start", whose, tree).items():
                if value.device != some.device:
                    self._fail(f"start puts the {whose} {name} on {value.device}, must be {some.device}, as x")
        # In memory of their own: a state that is x itself must not be written over with x's successor.
        return _copied(client), _copied(server)

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        return self._gradient(g, x, x_start, client, server)

    def _gradient(
        self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree, **key: Tensor
    ) -> tuple[Tree, Tree]:
        found = self._call("gradient", g, x, x_start, client, server, **key)
        grads, own = self._pair("gradient", found, "(g, client)") if isinstance(found, tuple) else (found, client)
        self._keeps("gradient", "gradient of", grads, g)
        self._keeps("gradient", "client's", own, client)
        return grads, own

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        found = self._call("finish", x, x_start, client, server, num_steps, total_lr)
        own, message = self._pair("finish", found, "(client, message)")
        self._keeps("finish", "client's", own, client)
        for name, value in self._tree("finish", "message's", message).items():
            if not value.is_floating_point():
                self._fail(f"finish gives the message's {name} as {value.dtype}; a mean needs real numbers")
        form = {name: value.shape for name, value in message.items()}
        self._message = self._message if self._message is not None else form
        if form != self._message:
            other = next(n for n in {**form, **self._message} if form.get(n) != self._message.get(n))
            self._fail(f"finish gives another message than before (of {other}); keep its names and shapes")
        return own, message

    def gather(self, server: Tree, mean_message: Tree, share: float, **more: Any) -> Tree:
        found: Tree = self._call("gather", server, mean_message, share, **more)
        self._keeps("gather", "server's", found, server)
        return found

    def forgets(self, name: str) -> bool:
        return bool(getattr(self.of, "forgets", super().forgets)(name))

    def _call(self, method: str, *given: Any, **more: Any) -> Any:
        """What the user's method gives for copies of these dicts, whose tensors must not have been written into."""
        trees = [tree for tree in (*given, *more.values()) if isinstance(tree, dict)]
        versions = [t._version for tree in trees for t in tree.values()]
        function: Callable[..., Any] = getattr(self.of, method)
        try:
            found = function(*(dict(one) if isinstance(one, dict) else one for one in given), **more)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self._said}: {method} raised {one_line(error)}{place_of(error)}") from error
        if versions != [t._version for tree in trees for t in tree.values()]:
            self._fail(f"{method} writes into the tensors it was given; return other ones")
        return found

    def _pair(self, method: str, found: Any, of: str) -> tuple[Any, Any]:
        if not isinstance(found, tuple) or len(found) != 2:
            self._fail(f"{method} must return {of}")
        return found

    def _tree(self, method: str, whose: str, found: Any) -> Tree:
        """A dict of tensors by name, which may be a file's."""
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            self._fail(f"{method}: the {whose} tensors must be in a dict, by their names")
        for name, value in found.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()
            if not plain or value.dtype in (torch.bfloat16, torch.bool):  # NumPy has no bfloat16, and no mean is a bool
                what = f"{method} gives the {whose} {name} as {type(value).__name__}"
                self._fail(f"{what}, must be a dense real tensor, not bool or bfloat16")
        return found

    def _keeps(self, method: str, whose: str, found: Any, before: Tree) -> None:
        """What follows a state or a gradient has its names, shapes and dtypes."""
        if not isinstance(found, dict) or set(found) != set(before):
            names = ", ".join(sorted(before)[:3]) or "none"
            self._fail(f"{method} must give back a dict of the {whose} tensors that it was given ({names})")
        for name, old in before.items():
            new, form = found[name], f"its shape {list(old.shape)}, dtype {old.dtype} and device {old.device}"
            if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                self._fail(f"{method}: the {whose} {name} must keep {form}")

    def _fail(self, why: str) -> NoReturn:
        raise InputError(f"{self._said}: {why}")


def _copied(tree: Tree) -> Tree:
    return {name: value.detach().clone().contiguous() for name, value in tree.items()}


class _Keyed(_Watched):
    """One that takes the address of the step."""

    def gradient(  # type: ignore[override]
        self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree, key: Tensor
    ) -> tuple[Tree, Tree]:
        return self._gradient(g, x, x_start, client, server, key=random_bits(CORRECTION, self._seed, key))
