"""What a user should know before a run begins."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmom.config.keys import Config
from fedmom.config.resolve import keeps_at_nodes
from fedmom.method.algorithms import Method
from fedmom.method.corrections import Correction
from fedmom.method.state import ClientState, X, num_bytes, parted
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.method.states.rules import CodecRule, Rules, state_in
from fedmom.rounds.correction import start_of
from fedmom.rounds.own import shared_of
from fedmom.rounds.plan import Plan, bytes_per_exchange
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import kept_before
from fedmom.travel.table import codec_of


def _travels_more(rules: Rules, one: str, other: str) -> bool:
    """Whether a state is averaged, and in more rounds than another."""
    (policy, period), (_, longer) = rules.of(one), rules.of(other)
    keeps = MOMENTUM_POLICIES[rules.of(other).policy].keeps_rows
    return MOMENTUM_POLICIES[policy].sends_momentum and (keeps or period < longer)


def _steps_by_block(rule: CodecRule) -> bool:
    """Whether a number's error is of its block's size: integers, and nothing else that is unbiased, are so."""
    return codec_of(rule).unbiased and not rule.scaled


def _of_codecs(problem: Problem, plan: Plan) -> list[str]:
    """What a user should know of algorithm.codecs."""
    notes = []
    if "v" in plan.method.by.states and (rule := plan.method.codecs.get("m")) and _steps_by_block(rule):
        notes.append(
            f"algorithm.codecs: m by {rule.name} errs by its block's largest number, and is divided by the root of v: "
            "where gradients are far smaller than their block's, steps are too long; compare with bfloat16"
        )
    if plan.method.codecs:
        shared = shared_of(problem, start_of(problem, plan.method)[0])
        size = num_bytes(kept_before(plan.method.codecs, shared, len(problem.sizes))) / 1e6
        if size > 1:
            notes.append(f"the codecs keep what they left behind of all {len(problem.sizes)} clients: {size:,.1f} MB")
    return notes


def _tensors(state: ClientState) -> Iterator[tuple[str, str, Tensor]]:
    for part, tree in state._asdict().items():
        yield from ((part, name, tensor) for name, tensor in tree.items())


def _largest_part(problem: Problem, plan: Plan) -> str:
    """What of the model a round exchanges at most."""
    state, count = shared_of(problem, start_of(problem, plan.method)[0]), plan.method.fragments.num_parts
    each = [bytes_per_exchange(state, plan.method, number + 1) for number in range(count)]
    largest = f"part {each.index(max(each)) + 1} of {count}, {max(each) / 1e6:,.3g} MB per client"
    mean = f"the mean of all is {sum(each) / count / 1e6:,.3g} MB"
    return f"algorithm.fragments: the largest part of the model is {largest}; {mean}"


def _few_digits(problem: Problem, method: Method) -> Iterator[str]:
    """Where v, and the clock beside it, cannot follow the gradients in the run's own number format."""
    for x in start_of(problem, method)[0].params.values():
        digit = torch.finfo(x.dtype).eps
        if "v" in method.by.states and method.by.clocks and 1 - method.beta2 < digit:
            yield (
                f"run.dtype = {str(x.dtype).removeprefix('torch.')!r}: β₂ = {method.beta2:g} moves v by "
                f"{1 - method.beta2:.2g} of itself in a step, less than its last digit ({digit:.2g}), so that v stands "
                "still; take float32, or a smaller beta2"
            )
            return


def _of_steps(config: Config, problem: Problem, plan: Plan) -> list[str]:
    """Whether clients take equally many steps, where the mean depends on it."""
    uneven = plan.local_epochs and len(set(plan.steps_of(problem.sizes).tolist())) > 1
    if plan.normalised and not uneven:
        return [
            f"{config.algorithm.name}: all clients take equally many steps, so this is the plain mean "
            "(algorithm.local-epochs gives them their own)"
        ]
    if uneven and not plan.normalised:
        return ["local-epochs gives clients unequal steps: the mean is not the paper's (num-local-steps is)"]
    return []


def cautions(config: Config, problem: Problem, plan: Plan) -> list[str]:
    """What a user should know before a run: memory that grows with N, a mean that is not the paper's."""
    notes = list(plan.topology.warnings) if plan.topology else []
    rules = plan.method.rules
    if plan.topology is not None:
        size = len(problem.sizes) * sum(map(num_bytes, start_of(problem, plan.method)[0])) / 1e6
        if size > 1000:
            notes.append(
                f"d-sgd-m keeps x and u of all {len(problem.sizes)} clients: {size:,.0f} MB, three times in a round"
            )
    elif rules.has_rows:
        shared = shared_of(problem, start_of(problem, plan.method)[0])
        kept = [s for s in (X, *plan.method.by.states) if not rules.always(s)]
        tensors = {f"{p}/{n}": t for p, n, t in _tensors(shared) if state_in(p, n) in kept}
        size = len(problem.sizes) * num_bytes(tensors) / 1e6
        notes.append(
            f"{', '.join(kept)} of all {len(problem.sizes)} clients stay with them between rounds: {size:,.1f} MB, "
            "and several times that while a round is under way"
        )
    if plan.method.fragments.num_parts > 1:
        notes.append(_largest_part(problem, plan))
    if {"m", "v"} <= {*plan.method.by.states} and _travels_more(rules, "m", "v"):
        notes.append(
            "m travels more often than v: a client that never sees a coordinate (a rare word) has v = 0 there and "
            "divides the others' m by ε; let v travel as often, or compare"
        )
    notes += _few_digits(problem, plan.method)
    notes += _of_codecs(problem, plan)
    if isinstance(plan.method.correction, Correction):
        _, client = start_of(problem, plan.method)
        if (size := len(problem.sizes) * num_bytes(client) / 1e6) > 1:
            notes.append(f"the correction keeps a state of all {len(problem.sizes)} clients: {size:,.1f} MB")
    if problem.personal:
        _, own = parted(start_of(problem, plan.method)[0], problem.personal)
        size = len(problem.sizes) * sum(map(num_bytes, own)) / 1e6
        if config.run.backend == "flower" and not keeps_at_nodes(config, leaves=True):
            notes.append(
                f"server.own-rows = {config.server.own_rows!r}: this server holds and relays what algorithm.personal "
                f"names, of all {len(problem.sizes)} clients: {size:,.1f} MB; bytes_sent leaves it out"
            )
        elif size > 1:
            notes.append(f"algorithm.personal keeps tensors of all {len(problem.sizes)} clients: {size:,.1f} MB")
    return notes + _of_steps(config, problem, plan)
