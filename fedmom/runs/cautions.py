"""What a user should know before a run begins."""

from fedmom.config.keys import Config
from fedmom.method.algorithms import MOMENTUM_POLICIES, Correction
from fedmom.method.state import num_bytes, parted
from fedmom.rounds.correction import start_of
from fedmom.rounds.personal import shared_of
from fedmom.rounds.plan import Plan
from fedmom.tasks.problem import Problem


def cautions(config: Config, problem: Problem, plan: Plan) -> list[str]:
    """What a user should know before a run: memory that grows with N, a mean that is not the paper's."""
    notes = list(plan.topology.warnings) if plan.topology else []
    policy = config.algorithm.momentum_policy
    if plan.topology is not None:
        size = len(problem.sizes) * sum(map(num_bytes, problem.start())) / 1e6
        if size > 1000:
            notes.append(
                f"d-sgd-m keeps x and u of all {len(problem.sizes)} clients: {size:,.0f} MB, three times in a round"
            )
    elif MOMENTUM_POLICIES[policy].keeps_rows:
        size = len(problem.sizes) * num_bytes(shared_of(problem, problem.start()).momentum) / 1e6
        notes.append(
            f"momentum-policy {policy!r} keeps u of all {len(problem.sizes)} clients: {size:,.1f} MB, "
            "and several times that while a round is under way"
        )
    if isinstance(plan.method.correction, Correction):
        _, client = start_of(problem, plan.method)
        if (size := len(problem.sizes) * num_bytes(client) / 1e6) > 1:
            notes.append(f"the correction keeps a state of all {len(problem.sizes)} clients: {size:,.1f} MB")
    if problem.personal:
        _, own = parted(problem.start(), problem.personal)
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
