"""Which tensors a round's messages carry where nodes keep what is their clients' own. Both ends ask here.

Tensors go by the names that `flatten` gives them: params/NAME, momentum/NAME, buffers/NAME. A client that trained in
round q has rows of that round: what it had of a tensor counts until everybody agrees on it again.
"""

from collections.abc import Iterable

from torch import Tensor

from fedmom.method.state import Tree, flatten, is_among, to_device
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.method.states.rules import state_in
from fedmom.rounds.correction import start_of
from fedmom.rounds.own import rows_after
from fedmom.rounds.plan import Plan, own_after
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import CodecRules, is_kept, rule_of


class Turns:
    """By rounds: what clients send, what they must be told, and what they have of their own."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan, self.rules = problem, plan, plan.method.rules
        begin, client = start_of(problem, plan.method)
        self.begin = flatten(to_device(begin._replace(correction={}), "cpu"))  # as a run begins; what is personal too
        self.states: Tree = {name: value.cpu() for name, value in client.items()}  # one client's, of a correction
        first = rows_after(problem, plan.method, begin, 0)
        self.first = flatten(to_device(first, "cpu")) if first is not None else {}  # [N, ...], one copy in memory
        self.shared = [flat for flat in self.begin if not self._is_personal(flat)]
        self._forms = dict[int, Tree]()  # the last of `own`, which is asked for every client
        self._agreed = dict[tuple[str, int], int]()  # the last ones of `agreed`, which is asked for every node

    def agreed(self, flat: str, number: int) -> int:
        """The last of the rounds 1 … `number` at whose end clients agreed on a tensor; 0: none since the beginning."""
        if (flat, number) not in self._agreed:
            if len(self._agreed) > 4 * (len(self.begin) + len(self.first)):
                self._agreed.clear()
            self._agreed[flat, number] = self._last_exchange(flat, number)
        return self._agreed[flat, number]

    def _last_exchange(self, flat: str, number: int) -> int:
        part, _, name = flat.partition("/")
        if is_kept(name) or self._is_personal(flat):
            return 0
        if MOMENTUM_POLICIES[self.rules.of(state_in(part, name)).policy].keeps_rows:
            return 0
        while number and not self.rules.due(part, name, number):
            number -= 1
        return number

    def is_told(self, flat: str) -> bool:
        """Whether clients cannot know by themselves what they agreed on: what is reset they can."""
        part, _, name = flat.partition("/")
        return not self._is_personal(flat) and self.rules.sends(part, name, 0)

    def up(self, number: int) -> list[str]:
        """What clients send at the end of round 1, 2, …, beside a correction's message."""
        found = [flat.partition("/") for flat in self.shared]
        return [f"{part}/{name}" for part, _, name in found if self.rules.sends(part, name, number)]

    def down(self, round_index: int, since: Iterable[int]) -> list[str]:
        """What clients must be told as round 0, 1, … begins, beside a correction's state.

        since: the last round that each of them trained in, 0 for none.
        """
        oldest = min(since)
        return [flat for flat in self.shared if self.is_told(flat) and oldest <= self.agreed(flat, round_index)]

    def is_encoded(self, rules: CodecRules, flat: str) -> bool:
        """Whether a tensor is encoded where it travels."""
        part, _, name = flat.partition("/")
        return flat in self.begin and rule_of(rules, part, name, self.begin[flat]) is not None

    def own(self, number: int) -> Tree:
        """[N, ...] the form of what clients have of their own after round 1, 2, …, 0: before them."""
        if number not in self._forms:
            found = own_after(self.problem, self.plan, number)
            self._forms = {number: {} if found is None else flatten(found)}
        return self._forms[number]

    def first_value(self, flat: str, client: int) -> Tensor:
        """What a client begins with of a tensor that nobody tells it."""
        return self.first[flat][client] if flat in self.first else self.begin[flat]

    def _is_personal(self, flat: str) -> bool:
        return is_among(flat.partition("/")[2], self.problem.personal)
