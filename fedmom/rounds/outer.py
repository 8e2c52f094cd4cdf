"""The outer step between two rounds: what everybody goes on from, and what the server remembers of it."""

from fedmom.method.algorithms import Method
from fedmom.method.outer import OuterRule
from fedmom.method.state import CLOCK, ClientState, Tree, flatten, unflatten
from fedmom.method.states.rules import state_in
from fedmom.rounds.own import shared_of
from fedmom.tasks.problem import Problem

_BEFORE = "before"  # the slot of what was exchanged last, of states that are not exchanged in every round


def outer_start(problem: Problem, method: Method, rule: OuterRule, start: ClientState) -> dict[str, Tree]:
    """The memory before the first round, {slot: {part/name: tensor}}."""
    tensors = stepped_of(rule, shared_of(problem, start))
    rare = {n: t.clone() for n, t in tensors.items() if not method.rules.always(_state(n))}
    return rule.start(tensors) | ({_BEFORE: rare} if rare else {})


def outer_step(
    method: Method,
    rule: OuterRule,
    begun: ClientState,
    mean: ClientState,
    memory: dict[str, Tree],
    number: int,
    lr: float,
) -> tuple[ClientState, dict[str, Tree]]:
    """(what everybody goes on from after round 1, 2, …, the memory), of the states that are exchanged in it.

    begun: where the round began; mean: what it came to; lr: γ of its first step.
    """
    due = {n: t for n, t in stepped_of(rule, mean).items() if _due(method, n, number)}
    if not due:
        return mean, memory
    rare, common = memory.get(_BEFORE, {}), flatten(begun)
    before = {n: rare[n] if n in rare else common[n] for n in due}
    slots = {slot: {n: tree[n] for n in due} for slot, tree in memory.items() if slot != _BEFORE}
    moved, after = rule.step(before, due, slots, lr)
    memory = {slot: tree | after.get(slot, {}) for slot, tree in memory.items()}
    if rare:
        # Copies: a file's tensors may not share memory, and the state holds these.
        memory[_BEFORE] = rare | {n: t.clone() for n, t in moved.items() if n in rare}
    return unflatten(flatten(mean) | moved), memory


def stepped_of(rule: OuterRule, state: ClientState) -> Tree:
    """The tensors that the rule is for, by their flat names; a clock counts, and is not moved."""
    found = {f"params/{n}": t for n, t in state.params.items() if "x" in rule.states}
    for name, tensor in state.momentum.items():
        if state_in("momentum", name) in rule.states and CLOCK not in name.partition("/")[0]:
            found[f"momentum/{name}"] = tensor
    return found


def _state(flat_name: str) -> str:
    part, _, name = flat_name.partition("/")
    return state_in(part, name)


def _due(method: Method, flat_name: str, number: int) -> bool:
    part, _, name = flat_name.partition("/")
    return method.rules.exchanged(part, name, number)
