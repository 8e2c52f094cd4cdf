"""The commands of the first minutes: `fedmom new`, `fedmom check`, `fedmom ls`."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmom.cli.first.text import age_of, duration, filled, line_width, listed_out, size_of, spread_of
from fedmom.cli.options import DIVERGED, DONE, NeededConfig, Sets
from fedmom.config.numbers import counted
from fedmom.errors import DivergedError, InputError

if TYPE_CHECKING:
    from fedmom.experiments.check import Checked, Layer
    from fedmom.records.listing import Row
    from fedmom.results.tables import Measure

_MOST_LAYERS = 30
_GO_ON = ("interrupted", "killed", "failed")  # the runs that --resume takes up


def new(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The project's folder.")] = Path("fedmom-project"),
) -> int:
    """Write a small project that runs: a config, a data set and a model of your own, and the commands that come next.

    fedmom new my-federation

    Nothing is written over: where one of the files exists already, none is written.
    """
    from fedmom.cli.first.project import write_project

    about = write_project(folder)
    print(f"{folder} is a project that runs:")
    for name, what in about.items():
        print(f"  {name.ljust(max(map(len, about)))}  {what}")
    print("next:")
    here = folder.resolve() == Path.cwd()
    go_there = [] if here else [f"cd {shlex.quote(str(folder))}"]
    print("\n".join(f"  {line}" for line in (*go_there, "fedmom check config.toml", "fedmom run config.toml")))
    return DONE


def check(
    config: NeededConfig,
    sets: Sets = None,
) -> int:
    """Look at a configuration before it runs: data, layers, one step really taken, time, memory. Nothing is written.

    fedmom check config.toml --set algorithm.num-local-steps=16
    """
    from fedmom.experiments.check import check_config

    console = Console(stderr=True)
    try:
        with console.status("…") as status:
            found = check_config(config, sets or (), progress=lambda text: status.update(f"{text} …"))
    except DivergedError as error:
        print(f"fedmom: {error}", file=sys.stderr)
        return DIVERGED
    width = line_width()
    for label, text in _about_run(found, config):
        print(filled(label, text, width))
    if found.layers:
        print("\n" + listed_out(_layer_rows(found), width) + "\n")
    for label, text in _about_steps(found):
        print(filled(label, text, width))
    again = " ".join(f"--set {shlex.quote(one)}" for one in sets or ())
    print(filled("next", " ".join(filter(None, ("fedmom run", shlex.quote(str(config)), again))), width))
    return DONE


def _about_run(found: "Checked", path: Path) -> list[tuple[str, str]]:
    """(label, text) of what there is before a step: method, data, clients, model."""
    from fedmom.config.method.said import method_of
    from fedmom.method.algorithms import ALGORITHMS
    from fedmom.tasks.problem import data_kind

    keys = found.config
    data, algorithm, run = keys.data, keys.algorithm, keys.run
    some = (
        "all of them in every round"
        if algorithm.cohort_size == data.num_clients
        else (f"{algorithm.cohort_size:,} of them in every round")
    )
    some += f", exchange over {algorithm.topology}" if ALGORITHMS[algorithm.name].decentralized else ""
    steps = f"{algorithm.local_epochs} local epochs" if algorithm.local_epochs else f"I = {algorithm.num_local_steps}"
    lines = [
        ("method", f"{method_of(keys)}, lr {algorithm.lr:g}, β {algorithm.beta:g}"),
        ("clients", f"N = {data.num_clients:,}, {some}"),
    ]
    if held := found.data:
        split = "every client's own" if data_kind(data.dataset).own_data else data.partition
        split += f", α {data.alpha:g}" if "dirichlet" in split else f", by {data.clients}" if data.clients else ""
        outputs = held.outputs
        classes = "" if held.classes is None else f"; classes per client {spread_of(held.classes)}"
        tests = "" if held.own_tests is None else f"; test examples of its own {spread_of(held.own_tests)}"
        lines += [
            (
                "data",
                f"{data.dataset}: {held.num_train:,} examples to train on, {held.num_test:,} to test; "
                f"{held.example}, {outputs}",
            ),
            ("", f"{split}; examples per client {spread_of(held.sizes)}{tests}{classes}"),
        ]
    else:
        lines.append(("data", f"{data.dataset}: no examples, every client holds a formula"))
    batch = f", B = {data.batch_size}" if found.data else ""
    lines.append(("rounds", f"R = {run.num_rounds:,}, {steps}{batch}: {found.client_steps:,} client-steps"))
    frozen = sum(layer.frozen for layer in found.layers)
    held_still = f" and {frozen:,} frozen ones" if frozen else ""
    name = f"{keys.model.name}: " if found.data else ""
    lines.append(("model", f"{name}{counted(found.num_parameters, 'parameter')}{held_still} in {run.dtype}"))
    return lines


def _about_steps(found: "Checked") -> list[tuple[str, str]]:
    """(label, text) of what was measured, and of what follows for the whole run."""
    from fedmom.results.tables import measures_in

    keys, step, engine = found.config, found.step, found.config.engine
    shown = [_result(m, step[m.key]) for m in measures_in([[step]])]
    size = int(engine.chunk_size)
    rate = f"{engine.path} × {size} on {engine.device}: {found.rate:,.0f} client-steps/s"
    took = (
        f"{found.clients} clients, {duration(found.step_seconds)}"
        if found.clients > 1
        else duration(found.step_seconds)
    )
    lines = [("one step", f"{took}: train loss {step['train_loss']:.4f}; then {', '.join(shown)}"), ("speed", rate)]
    rounds, evals = keys.run.num_rounds * found.round_seconds, found.num_evals * found.eval_seconds
    parts = f"{duration(rounds)} of rounds, {duration(evals)} of {counted(found.num_evals, 'evaluation')}, "
    if found.num_looks:
        looks = duration(found.num_looks * found.look_seconds)
        parts += f"{looks} of {counted(found.num_looks, 'look')} at every client, "
    lines.append(("time", f"about {duration(found.seconds)}: {parts}{duration(found.setup_seconds)} to begin"))
    if keys.run.backend == "simulation" or engine.workers:
        who = f"engine.workers = {engine.workers}" if engine.workers else f"run.backend = {keys.run.backend!r}"
        lines.append(("", f"measured in this process alone: what {who} adds or shares out is not in it"))
    stacked = f", {size} at once {size_of(size * found.client_bytes)}" if size > 1 else ""
    memory = f"about {size_of(found.memory)} at most; a client takes {size_of(found.client_bytes)}{stacked}"
    lines.append(("memory", f"{memory}; {size_of(found.free)} are free"))
    number = keys.run.checkpoint_every
    every = f"{size_of(found.checkpoint_bytes)} every {f'{number:,} rounds' if number > 1 else 'round'} and at the end"
    rows = f", clients.safetensors {size_of(found.rows_bytes)}" if found.rows_bytes else ""
    rows += f", clients.jsonl about {size_of(found.results_bytes)}" if found.num_looks else ""
    where = keys.run.out or "runs/NAME-TIME"
    lines.append(
        (
            "writes",
            f"{where}: checkpoint {every}{rows}, rounds.jsonl about {size_of(found.rounds_bytes)}, "
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
        kind = inside[0].kind if len(inside) == 1 else found.kinds[name]
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
    first is the folder's path, the last why a run is not done, and there is no header.
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
    width = line_width()
    if width is None:
        for row in shown:
            print("\t".join([str(row.folder), *_cells(row), "" if row.status == "done" else row.reason]))
        return DONE
    names = {id(run): f"  {run.name}" for row in rows for run in row.runs}
    table = [["run", "status", "rounds", "result", "when"]]
    table += [[names.get(id(row)) or row.name or str(row.folder), *_cells(row)] for row in shown]
    print(listed_out(table, width))
    for row in shown:
        if row.status == "broken":
            print(f"{row.folder}: broken: {row.reason}")
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
    return [
        row.status,
        "" if row.status == "broken" else of,
        result,
        age_of(time.time() - row.seen) if row.seen else "",
    ]


def _result(measure: "Measure", value: float) -> str:
    """ "test loss 0.1142", "test accuracy 96.9 %"."""
    return f"{measure.title} {measure.factor * value:{measure.digits}}{measure.unit}"
