"""What a user should know before a run begins."""

from collections.abc import Iterator

from torch import Tensor

from fedmom.config.keys import Config
from fedmom.method.corrections import Correction
from fedmom.method.state import ClientState, X, num_bytes, parted
from fedmom.method.states.rules import CodecRule, Rules, state_in
from fedmom.rounds.correction import start_of
from fedmom.rounds.own import shared_of
from fedmom.rounds.plan import Plan
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import kept_before
from fedmom.travel.table import codec_of


def _travels_more(rules: Rules, one: str, other: str) -> bool:
    """Whether a state is averaged, and in more rounds than another."""
    (policy, period), (_, longer) = rules.of(one), rules.of(other)
    return policy == "average" and (not rules.exchanged(other, longer) or period < longer)


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
        kept = [s for s in (X, *plan.method.by.states) if rules.of(s).period > 1 or not rules.exchanged(s, 1)]
        tensors = {f"{p}/{n}": t for p, n, t in _tensors(shared) if state_in(p, n) in kept}
        size = len(problem.sizes) * num_bytes(tensors) / 1e6
        notes.append(
            f"{', '.join(kept)} of all {len(problem.sizes)} clients is kept between rounds: {size:,.1f} MB, "
            "and several times that while a round is under way"
        )
    if {"m", "v"} <= {*plan.method.by.states} and _travels_more(rules, "m", "v"):
        notes.append(
            "m travels more often than v: a client that never sees a coordinate (a rare word) has v = 0 there and "
            "divides the others' m by ε; let v travel as often, or compare"
        )
    notes += _of_codecs(problem, plan)
    if isinstance(plan.method.correction, Correction):
        _, client = start_of(problem, plan.method)
        if (size := len(problem.sizes) * num_bytes(client) / 1e6) > 1:
            notes.append(f"the correction keeps a state of all {len(problem.sizes)} clients: {size:,.1f} MB")
    if problem.personal:
        _, own = parted(start_of(problem, plan.method)[0], problem.personal)
        size = len(problem.sizes) * sum(map(num_bytes, own)) / 1e6
        if config.run.backend == "flower":
            notes.append(
                "Flower's clients keep nothing between two messages, so this server holds and relays what algorithm."
                f"personal names, of all {len(problem.sizes)} clients: {size:,.1f} MB; bytes_sent leaves it out"
            )
        elif size > 1:
            notes.append(f"algorithm.personal keeps tensors of all {len(problem.sizes)} clients: {size:,.1f} MB")
    if plan.local_epochs and len(set(plan.steps_of(problem.sizes).tolist())) > 1:
        notes.append("local-epochs gives clients unequal steps: the mean is not the paper's (num-local-steps is)")
    return notes
