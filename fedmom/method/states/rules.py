"""Which state is exchanged at the end of which round, and which goes on with its client.

A period counts rounds of I local steps: a state of period k is exchanged at the end of rounds k, 2k, …, counted from 1.
Between two exchanges every client goes on with its own value, and an exchange ends all of these: everybody, absent
clients too, has the result from then on. x is a state too, and the buffers go with it. Where the model is exchanged by
parts, a round is the turn of one of them, and of the optimizer's states of its parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

from fedmom.method.state import Tree, X, parameter_of, state_of
from fedmom.method.states.fragments import Fragments
from fedmom.method.states.policies import MOMENTUM_POLICIES


class StateRule(NamedTuple):
    """What becomes of one state."""

    policy: str = "average"
    period: int = 1  # rounds between two exchanges


class CodecRule(NamedTuple):
    """How the change of one state is encoded where it travels; `fedmom.travel.table` knows the names."""

    name: str = "float32"
    number: float = 0.0  # B of a block, k/d, or the rank
    plain: bool = False  # whether without feedback of the error
    scaled: bool = False  # whether times d/k, so that it is unbiased


def state_in(part: str, name: str) -> str:
    """The state that a tensor belongs to: "x" of the parameters and buffers, else the optimizer's."""
    return state_of(name) if part == "momentum" else X


class Rules(NamedTuple):
    """What becomes of every state between rounds."""

    policy: str  # of the optimizer's states that `states` says nothing of
    states: Mapping[str, StateRule]
    empty: bool = False  # whether β is 0, so that u, or m, says nothing and need not travel
    fragments: Fragments = Fragments()

    def of(self, state: str) -> StateRule:
        return self.states.get(state) or StateRule("average" if state == X else self.policy)

    def due(self, part: str, name: str, number: int) -> bool:
        """Whether a tensor's policy acts at the end of round 1, 2, …; 0: before the first, all do."""
        parameter = parameter_of(name) if part == "momentum" else name
        return number % self.of(state_in(part, name)).period == 0 and self.fragments.due(parameter, number)

    def exchanged(self, part: str, name: str, number: int) -> bool:
        """Whether clients agree on a tensor at the end of round 1, 2, …"""
        keeps_rows = MOMENTUM_POLICIES[self.of(state_in(part, name)).policy].keeps_rows
        return not keeps_rows and self.due(part, name, number)

    def keeps(self, part: str, name: str, number: int) -> bool:
        """Whether every client goes on with its own tensor after round 1, 2, …"""
        return part in ("params", "momentum", "buffers") and not self.exchanged(part, name, number)

    def sends(self, part: str, name: str, number: int) -> bool:
        """Whether the tensor is sent at the end of round 1, 2, …, and counts in bytes_sent."""
        state = state_in(part, name)
        if state in ("u", "m") and self.empty:
            return False
        return MOMENTUM_POLICIES[self.of(state).policy].sends_momentum and self.due(part, name, number)

    def always(self, state: str) -> bool:
        """Whether clients agree on a state at the end of every round."""
        policy, period = self.of(state)
        return not MOMENTUM_POLICIES[policy].keeps_rows and period == 1 and self.fragments.num_parts == 1

    @property
    def has_rows(self) -> bool:
        """Whether clients ever begin a round from a state of their own."""
        rules = (StateRule(self.policy), *self.states.values())
        return self.fragments.num_parts > 1 or any(MOMENTUM_POLICIES[p].keeps_rows or k > 1 for p, k in rules)

    @property
    def moves_x(self) -> bool:
        """Whether all clients begin every round at one x."""
        return self.always(X)

    def begun(self, momentum: Tree, round_index: int) -> Tree:
        """The optimizer's common states at the start of round 0, 1, …, by the policies of those just exchanged."""
        found, groups = dict(momentum), dict[str, Tree]()
        for name, value in momentum.items():
            if self.due("momentum", name, round_index):
                groups.setdefault(state_of(name), {})[name] = value
        for state, tree in groups.items():
            found |= MOMENTUM_POLICIES[self.of(state).policy].start(tree)
        return found
