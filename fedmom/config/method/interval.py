"""algorithm.interval: I from the number, from a theorem, or by a rule that changes it in a run."""

from fedmom.config.keys import KEYS, AlgorithmConfig, Config
from fedmom.config.load import replace
from fedmom.config.method.states import rules_of
from fedmom.config.numbers import parse_numbers
from fedmom.config.strategies import OURS
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS, INTERVALS, theory_interval
from fedmom.method.schedules import SCHEDULES


def interval_milestones(algorithm: AlgorithmConfig) -> tuple[float, ...]:
    """The fractions of the run at which I is halved; none where the rule asks for none."""
    rule = INTERVALS[algorithm.interval]
    if rule.follow is None or not rule.sums:
        return ()
    return tuple(parse_numbers("algorithm.interval-milestones", algorithm.interval_milestones))


def settle_interval(config: Config, given: frozenset[str], notes: list[str]) -> Config:
    """I from the number, from local epochs (then it stays 0), from a theorem, or the algorithm's own."""
    algorithm, num_steps = config.algorithm, config.run.num_steps
    interval, steps, epochs = algorithm.interval, algorithm.num_local_steps, algorithm.local_epochs
    key, rule = "algorithm.interval-milestones", INTERVALS[algorithm.interval]
    milestones = algorithm.interval_milestones
    if key in given and milestones != KEYS[key].default and (rule.follow is None or not rule.sums):
        notes.append(f"algorithm.interval = {interval!r} does not read {key}: it changes nothing")
    if epochs:
        if steps:
            raise InputError(f"algorithm.local-epochs = {epochs}: give it or num-local-steps = {steps}, not both")
        if interval != "fixed":
            raise InputError(f"algorithm.interval = {interval!r}: needs num-local-steps, not local-epochs = {epochs}")
        if num_steps:
            raise InputError(f"run.num-steps = {num_steps}: give run.num-rounds with local-epochs = {epochs}")
        return config
    if rule.follow is not None or interval == "fixed":
        return replace(config, "algorithm", num_local_steps=steps or ALGORITHMS[algorithm.name].default_interval)
    if not num_steps:
        raise InputError(f"algorithm.interval = {interval!r}: needs run.num-steps = T, the steps in all")
    wanted = theory_interval(interval, num_steps, algorithm.cohort_size)
    if steps not in (0, wanted):
        raise InputError(
            f"algorithm.num-local-steps = {steps}: interval = {interval!r} gives I = {wanted} for T = {num_steps}, "
            f"N = {algorithm.cohort_size}; leave it 0"
        )
    return replace(config, "algorithm", num_local_steps=wanted)


def check_interval(config: Config) -> None:
    """Raises InputError for what an I that changes in the run does not go with."""
    algorithm = config.algorithm
    rule, said = INTERVALS[algorithm.interval], f"algorithm.interval = {algorithm.interval!r}"
    if rule.follow is None:
        return
    if config.run.num_steps:
        raise InputError(f"run.num-steps = {config.run.num_steps}: with {said} give run.num-rounds; leave it 0")
    if config.server.strategy != OURS:
        raise InputError(f"{said}: needs server.strategy = {OURS!r}, not {config.server.strategy!r}")
    if rule.sums:
        milestones = interval_milestones(algorithm)
        if list(milestones) != sorted(milestones) or not 0 < milestones[0] <= milestones[-1] < 1:
            right = "must be fractions of the run that rise, above 0 and below 1"
            raise InputError(f"algorithm.interval-milestones = {algorithm.interval_milestones!r}: {right}")
        return
    if not rules_of(algorithm).moves_x:
        why = f"fragments = {algorithm.fragments}" if algorithm.fragments > 1 else f"states = {algorithm.states!r}"
        raise InputError(f"{said}: measures how far x moves in a round, and by {why} not all of it does; take 'fixed'")
    by_length = SCHEDULES[algorithm.lr_schedule].needs_length
    uses_unit = SCHEDULES[algorithm.lr_schedule].uses_unit or algorithm.lr_warmup > 0
    if by_length or (algorithm.lr_unit == "fraction" and uses_unit):
        key = f"lr-schedule = {algorithm.lr_schedule!r}" if by_length else f"lr-unit = {algorithm.lr_unit!r}"
        right = "take 'constant', or 'step' with lr-unit = 'joint-epochs'" if by_length else "take 'joint-epochs'"
        raise InputError(f"algorithm.{key}: depends on the steps in all, which {said} leaves open; {right}")
