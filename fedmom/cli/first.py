"""The commands of the first minutes: `fedmom new`, `fedmom check`, `fedmom ls`."""

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmom.cli.options import DIVERGED, DONE, Sets
from fedmom.errors import DivergedError, InputError

if TYPE_CHECKING:
    from fedmom.experiments.check import Checked, Layer
    from fedmom.records.listing import Row
    from fedmom.results.tables import Measure

_LABEL = 10  # characters of the column that says what a line is about
_NARROWEST, _MOST_LAYERS = 40, 30
_GO_ON = ("interrupted", "killed", "failed")  # the runs that --resume takes up


def new(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The project's folder.")] = Path("fedmom-project"),
) -> int:
    """Write a small project that runs: a config, a data set and a model of your own, and the commands that come next.

    fedmom new my-federation

    Nothing is written over: where one of the files exists already, none is written.
    """
    from fedmom.cli.project.write import write_project

    about = write_project(folder)
    print(f"{folder} is a project that runs:")
    for name, what in about.items():
        print(f"  {name.ljust(max(map(len, about)))}  {what}")
    print("next:")
    here = folder.resolve() == Path.cwd()
    for line in ([] if here else [f"cd {shlex.quote(str(folder))}"]) + [
        "fedmom check config.toml",
        "fedmom run config.toml",
    ]:
        print(f"  {line}")
    return DONE


def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    sets: Sets = None,
) -> int:
    """Look at a configuration before it runs: data, layers, one step really taken, time, memory. Nothing is written.

    fedmom check config.toml --set algorithm.num-local-steps=16
    """
    from fedmom.experiments.check import check as measure

    console = Console(stderr=True)
    try:
        with console.status("…") as status:
            found = measure(config, sets or (), progress=lambda text: status.update(f"{text} …"))
    except DivergedError as error:
        print(f"fedmom: {error}", file=sys.stderr)
        return DIVERGED
    width = _width()
    for label, text in _about_run(found, config):
        print(_filled(label, text, width))
    if found.layers:
        print("\n" + _table(_layer_rows(found), width) + "\n")
    for label, text in _about_steps(found):
        print(_filled(label, text, width))
    again = " ".join(f"--set {shlex.quote(one)}" for one in sets or ())
    print(_filled("next", " ".join(filter(None, ("fedmom run", shlex.quote(str(config)), again))), width))
    return DONE


def _about_run(found: "Checked", path: Path) -> list[tuple[str, str]]:
    """(label, text) of what there is before a step: method, data, clients, model."""
    from fedmom.method.algorithms import ALGORITHMS
    from fedmom.tasks.task import task_kind

    keys = found.config
    data, algorithm, run = keys.data, keys.algorithm, keys.run
    some = (
        "all of them in every round"
        if algorithm.cohort_size == data.num_clients
        else (f"{algorithm.cohort_size:,} of them in every round")
    )
    some += f", exchange over {algorithm.topology}" if ALGORITHMS[algorithm.name].decentralized else ""
    steps = f"{algorithm.local_epochs} local epochs" if algorithm.local_epochs else f"I = {algorithm.num_local_steps}"
    option = "II" if algorithm.nesterov else "I"
    lines = [
        (
            "method",
            f"{algorithm.name}, option {option}, lr {algorithm.lr:g}, β {algorithm.beta:g}, momentum "
            f"{algorithm.momentum_policy}",
        ),
        ("clients", f"N = {data.num_clients:,}, {some}"),
    ]
    if held := found.data:
        split = "every client's own" if task_kind(data.dataset).own_data else data.partition
        split += f", α {data.alpha:g}" if "dirichlet" in split else ""
        lines += [
            (
                "data",
                f"{data.dataset}: {held.num_train:,} examples to train on, {held.num_test:,} to test; "
                f"{held.example}, {held.num_classes:,} classes",
            ),
            ("", f"{split}; examples per client {_spread(held.sizes)}; classes per client {_spread(held.classes)}"),
        ]
    else:
        lines.append(("data", f"{data.dataset}: no examples, every client holds a formula"))
    batch = f", B = {data.batch_size}" if found.data else ""
    lines.append(("rounds", f"R = {run.num_rounds:,}, {steps}{batch}: {found.client_steps:,} client-steps"))
    frozen = sum(layer.frozen for layer in found.layers)
    held_still = f" and {frozen:,} frozen ones" if frozen else ""
    name = f"{keys.model.name}: " if found.data else ""
    lines.append(("model", f"{name}{_counted(found.num_parameters, 'parameter')}{held_still} in {run.dtype}"))
    return lines


def _about_steps(found: "Checked") -> list[tuple[str, str]]:
    """(label, text) of what was measured, and of what follows for the whole run."""
    from fedmom.results.tables import MEASURES

    keys, step, engine = found.config, found.step, found.config.engine
    shown = [_result(m, step[m.key]) for m in MEASURES if isinstance(step.get(m.key), float)]
    size = int(engine.chunk_size)
    rate = f"{engine.path} × {size} on {engine.device}: {found.rate:,.0f} client-steps/s"
    took = f"{found.clients} clients, {_time(found.step_seconds)}" if found.clients > 1 else _time(found.step_seconds)
    lines = [("one step", f"{took}: train loss {step['train_loss']:.4f}; then {', '.join(shown)}"), ("speed", rate)]
    rounds, evals = keys.run.num_rounds * found.round_seconds, found.num_evals * found.eval_seconds
    parts = f"{_time(rounds)} of rounds, {_time(evals)} of {_counted(found.num_evals, 'evaluation')}, "
    lines.append(("time", f"about {_time(found.seconds)}: {parts}{_time(found.setup_seconds)} to begin"))
    if keys.run.backend == "simulation" or engine.workers:
        who = f"engine.workers = {engine.workers}" if engine.workers else f"run.backend = {keys.run.backend!r}"
        lines.append(("", f"measured in this process alone: what {who} adds or shares out is not in it"))
    stacked = f", {size} at once {_size(size * found.client_bytes)}" if size > 1 else ""
    memory = f"about {_size(found.memory)} at most; a client takes {_size(found.client_bytes)}{stacked}"
    lines.append(("memory", f"{memory}; {_size(found.free)} are free"))
    every = f"{_size(found.checkpoint_bytes)} every {_counted(keys.run.checkpoint_every, 'round')} and at the end"
    rows = f", clients.safetensors {_size(found.rows_bytes)}" if found.rows_bytes else ""
    where = keys.run.out or "runs/NAME-TIME"
    lines.append(
        (
            "writes",
            f"{where}: checkpoint {every}{rows}, rounds.jsonl about {_size(found.rounds_bytes)}, "
            "config, environment, status and curves.png",
        )
    )
    lines += [("note", note) for note in found.notes]
    return lines


def _layer_rows(found: "Checked") -> list[list[str]]:
    """The table of layers; a deep model's by the modules that hold them, so that it stays in view."""
    layers: Sequence[Layer] = found.layers
    depth = max(layer.name.count(".") for layer in layers) + 1
    while len(groups := _grouped(layers, depth)) > _MOST_LAYERS and depth > 1:
        depth -= 1
    rows = [["layer", "kind", "output", "parameters"]]
    for name, inside in groups.items():
        kind = inside[0].kind if len(inside) == 1 else _counted(len(inside), "module")
        rows.append([name or "(model)", kind, inside[-1].output, f"{sum(layer.parameters for layer in inside):,}"])
    return rows


def _grouped(layers: "Sequence[Layer]", depth: int) -> "dict[str, list[Layer]]":
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
    return groups


def ls(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A folder of runs (default: runs).")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every run of a sweep too.")] = False,
) -> int:
    """List runs, the newest first: how they ended, how far they came, what they reached, when.

    fedmom ls

    A sweep is one row, with its best run's result; --all shows its runs. Piped, the columns are separated by tabs, the
    first is the folder's path, and there is no header.
    """
    from fedmom.records.listing import list_runs

    where = folder or Path("runs")
    try:
        rows = list_runs(where)
    except InputError:
        if folder is not None or where.exists():
            raise
        rows = []
    if not rows:
        print(f"fedmom: {where}: no runs yet; `fedmom run CONFIG` makes one, `fedmom new` a project", file=sys.stderr)
        return DONE
    shown = [one for row in rows for one in [row, *(row.runs if every else ())]]
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        for row in shown:
            print("\t".join([str(row.folder), *_cells(row)]))
        return DONE
    names = {id(run): f"  {run.name}" for row in rows for run in row.runs}
    table = [["run", "status", "rounds", "result", "when"]]
    table += [[names.get(id(row)) or row.name or str(row.folder), *_cells(row)] for row in shown]
    print(_table(table, _width()))
    if trouble := next((row for row in shown if row.status in _GO_ON and row.folder.is_dir()), None):
        print(f"\na run goes on with: fedmom run --resume {shlex.quote(str(trouble.folder))}")
    return DONE


def _cells(row: "Row") -> list[str]:
    """Status, rounds, result and age."""
    from fedmom.results.tables import MEASURES, TRAIN

    of = f"{row.round:,}/{row.num_rounds:,}" if row.num_rounds else f"{row.round:,}"
    measure = next((m for m in (*MEASURES, TRAIN) if m.key == row.measure), None)
    result = _result(measure, row.value).removeprefix("test accuracy ") if measure else ""
    result = f"best {result}" if row.runs and result else result
    return [row.status, "" if row.status == "broken" else of, result, _age(time.time() - row.seen) if row.seen else ""]


def _result(measure: "Measure", value: float) -> str:
    """ "test loss 0.1142", "test accuracy 96.90 %"."""
    title, percent, _ = measure.title.partition(" (%)")
    return f"{title} {measure.factor * value:{measure.digits}}{percent and ' %'}"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


# --- text that fits ------------------------------------------------------------------------------------------


def _width() -> int | None:
    """Of the terminal, in characters, or as COLUMNS says; None where neither is there: then nothing is cut."""
    console = Console()
    return max(_NARROWEST, console.width) if console.is_terminal or "COLUMNS" in os.environ else None


def _filled(label: str, text: str, width: int | None) -> str:
    """A label, and a text beside it in as many lines as it takes."""
    start = label.ljust(_LABEL)
    if width is None:
        return start + text
    lines = textwrap.wrap(text, width - _LABEL, break_on_hyphens=False)
    return "\n".join(f"{start if not number else ' ' * _LABEL}{line}" for number, line in enumerate(lines))


def _table(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Columns to the left, the last one to the right; the widest words of the first two give way, in their middle."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        place = max(range(2), key=lambda place: widths[place])
        if widths[place] <= 8:
            break
        widths[place] -= 1
    lines = []
    for row in rows:
        cells = [_shortened(cell, room) for cell, room in zip(row, widths, strict=True)]
        padded = [cell.ljust(room) for cell, room in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded[:-1], cells[-1].rjust(widths[-1])]).rstrip())
    return "\n".join(lines)


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[len(text) - room // 2 :]}"


def _spread(values: "Sequence[int]") -> str:
    """ "12 to 340, median 80"; one number where all are equal."""
    import numpy as np

    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"{low:,} to {high:,}, median {middle:,.0f}" if low < high else f"{low:,}"


def _counted(number: int, one: str) -> str:
    from fedmom.config.numbers import counted

    return counted(number, one)


def _time(seconds: float) -> str:
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms" if seconds >= 0.001 else "under 1 ms"
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def _size(number: float) -> str:
    from fedmom.results.tables import byte_unit

    by, unit = byte_unit(number)
    return f"{number / by:.3g} {unit}"
