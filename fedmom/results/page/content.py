"""Groups of runs -> what the page shows, as plain values."""

import shlex
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from fedmom.config.examples import load_data, shown_classes
from fedmom.config.keys import KEYS, Scalar
from fedmom.config.load import load, toml_scalar
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.records.files import CONFIG
from fedmom.records.history import LOOKED
from fedmom.results.comparison import AXES, Target, all_sheets
from fedmom.results.groups import SYMBOLS, Group, counted_of, differing, rivals, said, shared
from fedmom.results.pictures.curves import POLICY, styles
from fedmom.results.pictures.partition import class_shares
from fedmom.results.pictures.style import COLOURS, DASHES, MARKERS
from fedmom.results.reading import environment_of, is_run
from fedmom.results.sheets import Sheet, Stat, Value, stat, written
from fedmom.results.tables import SPREADS, TRAIN, finite, is_evaluated, measure_of, measures_in
from fedmom.tasks.problem import data_kind

POINTS = 20_000  # on the page, over all groups: more would make it slow to open
MAX_POINTS = 1_000  # of one group
MAX_CLIENTS = 400  # columns of a partition's picture
MAX_PARTITIONS = 6
_CHOSEN = ("engine.path", "engine.chunk-size", "engine.threads")  # by `auto`; they differ by timing alone


def summary(groups: Sequence[Group]) -> list[str]:
    """What was run, in a few sentences; of what is compared, not of a pooled model."""
    everyone, groups = groups, rivals(groups)
    runs = counted_of(groups)
    same = shared(runs)
    varied = [key for key in differing(runs) if key in KEYS]
    seeds = sorted({int(run.settings["run.seed"]) for run in runs})
    count = (
        f"{len(runs)} runs in {len(groups)} groups"
        if len(groups) > 1
        else f"{len(runs)} runs"
        if len(runs) > 1
        else "One run"
    )
    pooled = sum(len(group.runs) for group in everyone if group.pooled)
    count += f", beside {pooled} of a pooled model (one client with all data)" if pooled else ""
    left = sum(len(group.left) for group in groups)
    count += f" ({left} more are left out)" if left else ""
    text = f"{count}; seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"{count}, seed {seeds[0]}."
    if varied:
        text += f" Between the groups differs: {', '.join(varied)}."
    lines = [text]
    about = _method(same, sorted({str(run.settings[POLICY]) for run in runs}))
    images = ("model.name", "data.partition", "data.alpha", "data.batch-size")  # a quadratic has none of them
    keys = ["data.dataset", "data.num-clients", "algorithm.num-local-steps", "algorithm.momentum-policy"]
    keys += ["algorithm.lr", "algorithm.beta", *(images if data_kind(same.get("data.dataset")).has_examples else ())]
    if "dirichlet" not in str(same.get("data.partition", "")):
        keys = [key for key in keys if key != "data.alpha"]
    about += [said(key, same[key]) for key in keys if key in same]
    if about:
        lines.append(("In common: " if len(groups) > 1 else "") + ", ".join(about) + ".")
    return lines


def _method(same: Mapping[str, Scalar], policies: Sequence[str]) -> list[str]:
    """What all runs do, in words that are true of every one: what becomes of the momentum may differ between them."""
    name = same.get("algorithm.name")
    if not name:
        return []
    if len(policies) == 1 and MOMENTUM_POLICIES[policies[0]].sends_momentum:
        return [f"{name}: {ALGORITHMS[str(name)].summary}"]
    between = "; ".join(f"{policy}: {MOMENTUM_POLICIES[policy].summary}" for policy in policies)
    differs = "what becomes of the momentum between rounds differs" if len(policies) > 1 else "momentum"
    return [f"{name}, {differs} ({between})"]


def _short(value: float | None) -> float | None:
    """Six digits are more than a screen shows."""
    return None if value is None or not isfinite(value) else float(f"{value:.6g}")


def curves(groups: Sequence[Group]) -> dict[str, Any]:
    """Everything the charts draw: means and deviations over seeds at rounds that all seeds have, and each seed."""
    baselines = [group for group in groups if group.pooled and group.runs]
    groups = rivals(groups)
    runs = counted_of(groups)
    measures = [
        m
        for m in (*measures_in(run.rounds for run in runs), TRAIN, *SPREADS)
        if any(finite(run.rounds, m.key) for run in runs)
    ]
    axes = [axis for axis in AXES if any(value > 0 for run in runs for value in finite(run.rounds, axis))]
    most = max(50, min(MAX_POINTS, POINTS // max(1, len(runs))))
    looks = styles(groups)
    return {
        "axes": [{"key": axis, "title": AXES[axis].capitalize()} for axis in axes],
        "measures": [
            {
                "key": m.key,
                "title": m.title[0].upper() + m.title[1:],
                "factor": m.factor,
                "log": m.log,
                "unit": m.unit,
                "judges": measure_of(m.key) is not None,
            }
            for m in measures
        ],
        "swept": _swept(groups),
        "pooled": [{"label": group.title, "end": _ends(group)} for group in baselines],
        "groups": [
            {
                "label": group.title,
                "colour": COLOURS.index(look["color"]),
                "dash": DASHES.index(look["linestyle"]),
                "marker": MARKERS.index(look["marker"]),
                "end": _ends(group),
                "at": {key: group.differs[key] for key in _swept(groups)},
                "family": {key: _family(group, key) for key in _swept(groups)},
                **_lines(group, [m.key for m in measures], axes, most),
            }
            for group, look in zip(groups, looks, strict=True)
            if group.runs
        ],
    }


def _swept(groups: Sequence[Group]) -> dict[str, str]:
    """{key whose values are numbers and differ between groups: what it is called on an axis}."""
    keys = groups[0].differs if len(groups) > 1 else {}
    numeric = [key for key in keys if all(type(group.differs[key]) in (int, float) for group in groups)]
    return {key: f"{SYMBOLS[key]} ({key})" if key in SYMBOLS else key for key in numeric}


def _family(group: Group, key: str) -> str:
    """What a group shares with those that differ from it in one key alone; "all runs" where there is no other."""
    return ", ".join(said(*item) for item in group.differs.items() if item[0] != key) or "all runs"


def _ends(group: Group) -> dict[str, list[float | None]]:
    """{measure: [mean, deviation or None]} of the last values."""
    found = {}
    for measure in measures_in(run.rounds for run in group.runs):
        cell = stat([ends[-1] for run in group.runs if (ends := finite(run.rounds, measure.key))])
        if cell is not None:
            found[measure.key] = [_short(cell.mean), _short(cell.sd)]
    return found


def _lines(group: Group, measures: Sequence[str], axes: Sequence[str], most: int) -> dict[str, Any]:
    kept = set(_thinned(group, most))
    values = {key: group.numbers(key, kept) for key in measures}
    lines: dict[str, Any] = {"x": {axis: [_short(v) for v in group.numbers(axis, kept).mean(axis=0)] for axis in axes}}
    lines["mean"] = {key: [_short(v) for v in y.mean(axis=0)] for key, y in values.items()}
    if len(group.runs) > 1:
        lines["sd"] = {key: [_short(v) for v in y.std(axis=0, ddof=1)] for key, y in values.items()}
        lines["seeds"] = {key: [[_short(v) for v in row] for row in y] for key, y in values.items()}
    return lines


def _thinned(group: Group, most: int) -> list[int]:
    """About `most` of the common rounds, evaluated ones first, evenly spaced, first and last included; and as many of
    those that looked at the clients.
    """
    common = group.rounds
    if len(common) <= most:
        return common
    rounds = group.runs[0].rounds
    judged = {r["round"] for r in rounds if is_evaluated(r)}
    looked = {r["round"] for r in rounds if LOOKED in r}
    kept = {common[0], common[-1]}
    for pool in ([r for r in common if r in judged] or common, [r for r in common if r in looked]):
        places = np.unique(np.linspace(0, len(pool) - 1, min(most, len(pool))).round().astype(int))
        kept |= {pool[place] for place in places}
    return sorted(kept)


def tables(groups: Sequence[Group], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Sheets whose cells say what is shown and what they are sorted by."""
    return [_table(sheet) for sheet in all_sheets(groups, targets)]


def _sorted_by(cell: Value) -> str:
    """What is "" comes last."""
    if isinstance(cell, Stat):
        return f"{cell.mean:.10g}" if isfinite(cell.mean) else ""
    return cell or ""


def _table(sheet: Sheet) -> dict[str, Any]:
    rows = []
    for row in sheet.rows:
        cells = []
        for cell, column in zip(row, sheet.columns, strict=True):
            cells.append({"text": written(cell, column.digits, column.unit), "value": _sorted_by(cell)})
        rows.append(cells)
    return {
        "name": sheet.name,
        "title": sheet.title,
        "header": [c.title for c in sheet.columns],
        "rows": rows,
        "note": sheet.note,
        "foot": sheet.foot,
    }


def partitions(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Who holds which classes: once per way the data were split, of the first seed."""
    groups = rivals(groups)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        settings = group.settings
        if not data_kind(settings["data.dataset"]).has_examples:
            continue
        key = tuple(value for name, value in settings.items() if name.startswith("data.") and name != "data.batch-size")
        if key in found or len(found) >= MAX_PARTITIONS:
            continue
        title = f"{settings['data.dataset']}, {settings['data.partition']}, N = {settings['data.num-clients']}"
        if "dirichlet" in str(settings["data.partition"]):
            title += f", α = {settings['data.alpha']:g}"
        title += f", clients by {settings['data.clients']}" if settings["data.clients"] else ""
        title += f", seed {settings['run.seed']}"
        try:
            folder = next(run.folder for run in group.members if is_run(run.folder))
            config = load(folder / CONFIG).config
            held = load_data(config)
        except InputError as error:
            found[key] = {"title": title, "trouble": str(error)}
            continue
        found[key] = {"title": title, **_picture(held.partition, *shown_classes(config, held.dataset))}
    return list(found.values())


def _picture(split: Partition, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Counts [classes][clients]; for many clients shares of clients sorted by their largest class, columns together."""
    counts = np.asarray(split.class_counts(labels, num_classes))
    sizes = counts.sum(axis=1)
    facts = f"{len(sizes):,} clients with {sizes.min():,} to {sizes.max():,} examples, median {np.median(sizes):,.0f}"
    if len(counts) <= MAX_CLIENTS:
        return {"z": counts.T.tolist(), "unit": "examples", "facts": facts}
    z = [[_short(float(value)) for value in row] for row in class_shares(counts, MAX_CLIENTS).T]
    facts += f"; sorted by largest class, a column is the mean of about {len(counts) / MAX_CLIENTS:,.3g} clients"
    return {"z": z, "unit": "share", "facts": facts}


def settings(groups: Sequence[Group]) -> dict[str, Any]:
    """What differs between groups, and every key that all runs share."""
    runs = counted_of(groups)
    keys = differing([run for group in groups for run in group.members])
    differ = [
        {"label": group.label, "values": [str(toml_scalar(group.settings[key])) for key in keys]} for group in groups
    ]
    same = {key: value for key, value in shared(runs).items() if key not in _CHOSEN}
    sections: dict[str, list[list[str]]] = {}
    for key, value in same.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(
            [name, toml_scalar(value), "" if value != KEYS[key].default else "default"]
        )
    return {"keys": keys, "differ": differ, "same": sections}


def provenance(groups: Sequence[Group]) -> dict[str, Any]:
    """Versions and machine (every value that occurs), and for each run how to repeat it, left out or not."""
    runs = [run for group in groups for run in group.members if is_run(run.folder)]
    seen: dict[str, list[str]] = {}
    commands = []
    for run in runs:
        about = environment_of(run.folder)
        facts = {key: about.get(key) for key in ("device", "processor", "cpu_count", "platform", "python", "commit")}
        versions = about.get("versions")
        facts |= versions if isinstance(versions, dict) else {}
        for key, value in facts.items():
            if value is not None and str(value) not in seen.setdefault(key.replace("_", " "), []):
                seen[key.replace("_", " ")].append(str(value))
        words = about.get("command")
        commands.append(
            {
                "run": run.name,
                "started": str(about.get("started", "")),
                "ended": run.status.text,
                "command": shlex.join(map(str, words)) if isinstance(words, list) else "",
                "again": f"fedmom run {shlex.quote(f'{run.name}.toml')}",
                "config": (run.folder / CONFIG).read_text(encoding="utf-8"),
            }
        )
    return {"environment": {key: values for key, values in seen.items() if values}, "runs": commands}
