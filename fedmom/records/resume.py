"""The configuration with which a run goes on: the recorded one, which may become longer or move elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmom.config.keys import Config, Scalar
from fedmom.config.load import Loaded, flat, load
from fedmom.config.resolve import Resolved, resolve
from fedmom.errors import InputError
from fedmom.method.algorithms import INTERVALS
from fedmom.method.schedules import SCHEDULES
from fedmom.records.files import CONFIG
from fedmom.records.identity import LENGTH, PLACE

# Values with which a key leaves the choice to the engine; a resumed run keeps what was chosen.
_OPEN: dict[str, Scalar] = {"engine.device": "auto", "engine.path": "auto", "engine.chunk-size": 0, "engine.threads": 0}


def length_keys(config: Config) -> list[str]:
    """The keys because of which lr or I depend on how long the run is; such a run cannot be made longer."""
    algorithm = config.algorithm
    uses_unit = SCHEDULES[algorithm.lr_schedule].uses_unit or algorithm.lr_warmup > 0
    reasons = {
        "algorithm.lr-schedule": SCHEDULES[algorithm.lr_schedule].needs_length,
        "algorithm.lr-unit": algorithm.lr_unit == "fraction" and uses_unit,
        "algorithm.interval": INTERVALS[algorithm.interval].needs_length,
    }
    return [name for name, holds in reasons.items() if holds]


def resume_config(folder: Path, source: Any, changes: Mapping[str, Any]) -> Resolved:
    """The configuration to resume with: the recorded one, possibly longer. InputError names what changed.

    `source` is the configuration given once more, or None for the recorded one; what `auto` chose is kept.
    """
    recorded = resolve(load(folder / CONFIG)).config
    old = flat(recorded)
    loaded = load(recorded if source is None else source, changes)
    given = frozenset(changes) if source is None else loaded.given
    asked = flat(loaded.config)
    # A length that I or γ depends on must not even be resolved: it would look like another I.
    length = "run.num-steps" if loaded.config.run.num_steps else "run.num-rounds"
    if asked[length] != old[length] and (reasons := length_keys(recorded)):
        raise InputError(
            f"{length} = {asked[length]}: {reasons[0]} = {old[reasons[0]]!r} depends on the length, {old[length]} in "
            f"{folder}; start a new run"
        )
    kept = {name: old[name] for name, free in _OPEN.items() if asked[name] == free}
    config, notes = resolve(Loaded(load(loaded.config, kept).config, given))
    new = flat(config)
    for name in new:
        if name not in LENGTH + PLACE and new[name] != old[name]:
            raise InputError(
                f"{name} = {new[name]!r}: the run in {folder} has {old[name]!r}; a resume may change nothing but "
                "the length and when it stops; start a new run for the rest"
            )
    if config.run.num_rounds < recorded.run.num_rounds:
        raise InputError(f"{length} = {new[length]}: the run in {folder} has {old[length]}; it can only become longer")
    return Resolved(config, notes)
