"""algorithm.codecs = "x: int8; u: topk 0.1": how the change of a state is encoded where it travels."""

import math

from fedmom.config.keys import Config
from fedmom.config.method.numbers import clients_beta
from fedmom.config.method.states import parse_states
from fedmom.errors import InputError, unknown
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.state import X
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.method.states.rules import CodecRule, Rules
from fedmom.travel.feedback import POSITIVE
from fedmom.travel.table import CODECS, codec_of

UP, DOWN = "algorithm.codecs", "algorithm.codecs-down"
_FORM = (
    'must be "STATE: CODEC NUMBER" by semicolons, and perhaps plain, as in "x: int8; u: topk 0.1; m: int8 256 plain"'
)
_PLAIN, _SCALED = "plain", "scaled"


def parse_codecs(key: str, text: str) -> dict[str, CodecRule]:
    """{state: its rule} of a key such as algorithm.codecs, without states that travel as they are.

    InputError names the entry that is wrong.
    """
    said, found, seen = f"{key} = {text!r}", dict[str, CodecRule](), set[str]()
    for entry in filter(str.strip, text.split(";")):
        state, colon, rest = (part.strip() for part in entry.partition(":"))
        words = rest.split()
        if not (state and colon and words):
            raise InputError(f"{said}: {entry.strip()!r} {_FORM}")
        if words[0] not in CODECS:
            raise unknown(f"{key}: the codec of {state}", words[0], CODECS)
        if state in seen:
            raise InputError(f"{said}: names {state} twice; name it once")
        seen.add(state)
        rule = _rule(f"{said}: {entry.strip()!r}", words[0], words[1:])
        if rule != CodecRule():
            found[state] = rule
    return found


def _rule(said: str, name: str, words: list[str]) -> CodecRule:
    """One entry's rule, with the numbers that it leaves out."""
    kind, options = CODECS[name], [word for word in words if word in (_PLAIN, _SCALED)]
    numbers = [word for word in words if word not in options]
    if len(numbers) > 1 or len(set(options)) < len(options):
        raise InputError(f"{said} {_FORM}")
    number = kind.default
    if numbers:
        if not kind.number:
            raise InputError(f"{said}: {name} has no number; leave {numbers[0]} out")
        number = _number(said, name, numbers[0])
    rule = CodecRule(name, number, _PLAIN in options, _SCALED in options)
    if rule.scaled and not kind.may_scale:
        raise InputError(f"{said}: {name} has nothing to scale; leave scaled out")
    if rule.scaled and not rule.plain:
        raise InputError(
            f"{said}: {name} times d/k with feedback of the error explodes; add plain, or leave scaled out"
        )
    if name == CodecRule().name:
        return CodecRule()
    if rule.plain and not codec_of(rule).alone:
        more = ", or scaled beside it" if kind.may_scale else ""
        raise InputError(f"{said}: {name} without feedback of the error goes the wrong way; leave plain out{more}")
    if kind.most and not rule.plain and number >= kind.most:
        raise InputError(f"{said}: {name} with feedback of the error needs blocks of less than {kind.most:g} numbers")
    return rule


def _number(said: str, name: str, word: str) -> float:
    kind = CODECS[name]
    try:
        number = float(word)
    except ValueError:
        raise InputError(f"{said}: {word!r} must be a number, {kind.number} of {name}, plain or scaled") from None
    if kind.is_share and not 0 < number <= 1:
        raise InputError(f"{said}: {word} must be {kind.number} in (0, 1], as in '{name} {kind.default:g}'")
    if not kind.is_share and not (math.isfinite(number) and number >= 1 and number == int(number) < 2**31):
        raise InputError(f"{said}: {word} must be a whole number {kind.number} >= 1, as in '{name} {kind.default:g}'")
    return number


def check_codecs(config: Config) -> None:
    """Raises InputError for a state that cannot be encoded, and for methods that have no place for it."""
    for key, text in _texts(config).items():
        said = f"{key} = {text!r}"
        if codecs := parse_codecs(key, text):
            _check_place(config, said)
            _check_states(config, said, codecs)
            if key == DOWN:
                _check_down(config, said, codecs)


def codecs_said(config: Config) -> str:
    """The first of the two keys that encodes anything, and its value; ""."""
    said = [f"{key.partition('.')[2]} = {text!r}" for key, text in _texts(config).items() if parse_codecs(key, text)]
    return said[0] if said else ""


def _texts(config: Config) -> dict[str, str]:
    return {UP: config.algorithm.codecs, DOWN: config.algorithm.codecs_down}


def _check_down(config: Config, said: str, codecs: dict[str, CodecRule]) -> None:
    """The reference is the memory of what is left behind, and both ends know when it moves."""
    for state, rule in codecs.items():
        if rule.plain:
            raise InputError(f"{said}: {state}: what goes down has a reference and no feedback; leave plain out")
        if state in POSITIVE:
            raise InputError(f"{said}: {state} would not stay positive under changes in few bits; leave it out")
    rare = [state for state, (_, period) in parse_states(config.algorithm.states).items() if period > 1]
    if rare:
        raise InputError(f"{said}: needs every state in every round, and {rare[0]} is not; leave 'every' out of states")


def _check_place(config: Config, said: str) -> None:
    """Raises InputError for a method under which nobody encodes."""
    if ALGORITHMS[config.algorithm.name].decentralized:
        raise InputError(f"{said}: needs Algorithm 1, and {config.algorithm.name} is Algorithm 2; leave it ''")
    if (parts := config.algorithm.fragments) > 1:
        raise InputError(f"{said}: needs the whole model in every round, and fragments = {parts}; take 1")
    if ALGORITHMS[config.algorithm.name].normalised:
        raise InputError(f"{said}: {config.algorithm.name} scales what is sent once more; take another name")


def _check_states(config: Config, said: str, codecs: dict[str, CodecRule]) -> None:
    """A state that is encoded is exchanged in every round, and v keeps its small numbers."""
    algorithm = config.algorithm
    optimizer = OPTIMIZERS[algorithm.optimizer]
    has = (X, *optimizer.states)
    rules = Rules(algorithm.momentum_policy, parse_states(algorithm.states), empty=clients_beta(config) == 0)
    for state, rule in codecs.items():
        if state not in has:
            raise InputError(
                f"{said}: optimizer {algorithm.optimizer!r} has no state {state!r}; it has {', '.join(has)}"
            )
        policy, period = rules.of(state)
        if not MOMENTUM_POLICIES[policy].sends_momentum:
            raise InputError(f"{said}: {state} is {policy} and does not travel; leave it out")
        if period != 1:
            raise InputError(f"{said}: {state} is exchanged every {period} rounds; codecs need every round")
        if state != X and not rules.sends("momentum", "" if state == "u" else f"{state}/", 1):
            raise InputError(f"{said}: with beta = 0 {state} is the gradient and does not travel; leave it out")
        if state != X and codec_of(rule).fills and any(one in POSITIVE for one in optimizer.states):
            raise InputError(
                f"{said}: {rule.name} gives {state} numbers where it is 0, and {algorithm.optimizer} divides them by "
                "ε; take another codec"
            )
        if state in POSITIVE and not codec_of(rule).fine:
            right = " or ".join(name for name, kind in CODECS.items() if codec_of(CodecRule(name, kind.default)).fine)
            raise InputError(f"{said}: {state} must keep its smallest numbers, which x divides by; take {right}")
