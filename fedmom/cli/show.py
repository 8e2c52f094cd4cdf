"""The commands that look at a configuration before anything runs, and those that list what one can name."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmom.cli.options import DONE, NeededConfig, Sets, Verbose
from fedmom.errors import InputError
from fedmom.machine.output import terminal_width

if TYPE_CHECKING:
    import numpy as np

    from fedmom.config.keys import AlgorithmConfig


def partition(
    config: NeededConfig,
    sets: Sets = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="File of the picture.")] = Path(
        "partition.png"
    ),
) -> int:
    """Show which client would hold which data: a summary, and a picture of classes by client.

    fedmom partition quickstart --set data.alpha=0.05 --out skewed.png
    """
    from fedmom.config.examples import load_data, shown_classes
    from fedmom.config.load import load
    from fedmom.config.resolve import resolve
    from fedmom.results import tables
    from fedmom.results.pictures.partition import draw_partition
    from fedmom.results.pictures.style import check_picture
    from fedmom.results.report import draw_or_say_why
    from fedmom.tasks.problem import data_kind

    check_picture(out)
    settled = resolve(load(config, sets or ())).config
    data = settled.data
    if not data_kind(data.dataset).has_examples:
        raise InputError(f"data.dataset = {data.dataset!r}: has no examples to partition")
    held = load_data(settled)
    counts = held.partition.class_counts(*shown_classes(settled, held.dataset))
    title = f"{data.dataset}, {data.partition}, N = {data.num_clients:,}"
    title += f", α = {data.alpha:g}" if "dirichlet" in data.partition else ""
    title += f", clients by {data.clients}" if data.clients else ""
    tests = None if held.own is None else held.own.partition.sizes
    print(tables.fitted([title, ""], _summary(counts, held.partition.sizes, tests), terminal_width()))
    if held.ids is not None and len(held.ids) <= _FEW:
        print("\n" + tables.fitted(*_each_client(held.ids, counts, tests), terminal_width()))
    if draw_or_say_why(lambda: draw_partition(counts, out, title=title)):
        print(out)
    return DONE


_FEW = 40  # natural clients with a row each
_MANY = 100  # clients whose sizes are told by seven quantiles instead of three


def _summary(counts: "np.ndarray", sizes: "np.ndarray", tests: "np.ndarray | None") -> list[list[str]]:
    """What all clients hold: counts [N, classes], sizes and numbers of test examples [N]."""
    import numpy as np

    points, said = [0, 0.5, 1], "min, median, max"
    if len(sizes) > _MANY:
        points, said = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], "min, 5, 25, 50, 75, 95 %, max"

    def spread(values: np.ndarray) -> str:
        return ", ".join(f"{value:,.0f}" for value in np.quantile(values, points))

    rows = [
        ["clients", f"{len(sizes):,}"],
        ["examples", f"{sizes.sum():,}"],
        [f"examples per client: {said}", spread(sizes)],
        [f"classes per client: {said}", spread((counts > 0).sum(1))],
        ["share of a client's largest class, mean", f"{(counts.max(1) / sizes).mean():.3f}"],
    ]
    if tests is not None:
        rows.append([f"test examples per client: {said}", spread(tests)])
        rows.append(["clients without test examples", f"{(tests == 0).sum():,}"])
    return rows


def _each_client(
    ids: "np.ndarray", counts: "np.ndarray", tests: "np.ndarray | None"
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of natural clients: number, id, and what each holds."""
    head = ["client", "id", "examples", "classes", *([] if tests is None else ["test examples"])]
    rows = [
        [
            str(c),
            str(one),
            f"{counts[c].sum():,}",
            f"{(counts[c] > 0).sum()}",
            *([] if tests is None else [f"{tests[c]:,}"]),
        ]
        for c, one in enumerate(ids)
    ]
    return head, rows


def bench(
    config: NeededConfig,
    sets: Sets = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to measure.", min=0.1)] = 10.0,
    verbose: Verbose = False,
) -> int:
    """Measure the speed of a configuration on this machine, how near it is to the limits, and where the time goes.

    fedmom bench quickstart --set algorithm.num-local-steps=16
    """
    from fedmom.config.load import flat, load
    from fedmom.config.resolve import resolve
    from fedmom.experiments.bench import as_rows
    from fedmom.experiments.bench import bench as measure
    from fedmom.results import tables
    from fedmom.user_code import blamed

    loaded = load(config, sets or ())
    console = Console(stderr=True)
    with console.status("…") as status:
        settled = resolve(loaded).config
        with blamed(flat(settled)):
            found = measure(
                settled,
                seconds=seconds,
                progress=lambda text: status.update(f"{text} …"),
                remember="engine.remember" in loaded.given,
            )
    for note in (*found.notes, *(found.details if verbose else ())):
        print(note)
    print(tables.fitted([str(config), ""], as_rows(found), terminal_width()))
    return DONE


def topology(
    config: NeededConfig,
    sets: Sets = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="File of the picture.")] = Path("topology.png"),
) -> int:
    """Show the communication graph: checks, spectral gap, mixing time, and a picture of graph and spectrum.

    fedmom topology decentralized/ring --set algorithm.topology=exponential --out exponential.png
    """
    import numpy as np

    from fedmom.config.build import topology_of
    from fedmom.config.load import load
    from fedmom.config.resolve import resolve
    from fedmom.method.decentralized.topology import LARGEST_SPECTRUM
    from fedmom.results import tables
    from fedmom.results.pictures.style import check_picture
    from fedmom.results.pictures.topology import draw_topology
    from fedmom.results.report import draw_or_say_why

    check_picture(out)
    settled = resolve(load(config, sets or ())).config
    graph = topology_of(settled)
    if graph is None:
        right = "--set algorithm.name=d-sgd-m shows the graph of Algorithm 2"
        raise InputError(f"algorithm.name = {settled.algorithm.name!r}: has a server, and no W; {right}")
    degrees = np.mean([matrix.out_degrees() for matrix in graph.matrices], axis=0)
    links = sum(matrix.num_links() for matrix in graph.matrices) / graph.period
    small = graph.num_clients <= LARGEST_SPECTRUM
    far = graph.rounds_to(0.01) if small else float("inf")
    rows = [
        ["clients", f"{graph.num_clients:,}"],
        ["W", "symmetric" if graph.is_symmetric else "directed"],
        ["rounds in a period", f"{graph.period}"],
        ["sends to, per round: min, mean, max", f"{degrees.min():g}, {degrees.mean():.3g}, {degrees.max():g}"],
        ["rows sent per round, all clients", f"{links:,.5g} × {_sent(settled.algorithm)}"],
        ["doubly stochastic", "yes"],
        ["connected", "yes" if len(graph.components) == 1 else f"no, {len(graph.components)} parts"],
        ["|λ₂| per round", f"{graph.second_eigenvalue:.6g}" if small else tables.MISSING],
        ["spectral gap 1 − |λ₂|", f"{graph.spectral_gap:.6g}" if small else tables.MISSING],
        ["rounds until 1 % of disagreement", f"{far:,.0f}" if small and np.isfinite(far) else tables.MISSING],
    ]
    print(tables.fitted([graph.name, ""], rows, terminal_width()))
    for warning in graph.warnings:
        print(f"fedmom: {warning}", file=sys.stderr)
    if small and draw_or_say_why(lambda: draw_topology(graph, out)):
        print(out)
    return DONE


def _sent(algorithm: "AlgorithmConfig") -> str:
    """ "(x and u)": what a link of a resolved configuration carries, and how often where that is not in every round."""
    from fedmom.config.method.states import rules_of
    from fedmom.method.optimizers.table import OPTIMIZERS
    from fedmom.method.state import X, full_name

    rules, found = rules_of(algorithm)._replace(empty=algorithm.beta == 0), list[str]()
    for state in (X, *OPTIMIZERS[algorithm.optimizer].states):
        period, is_x = rules.of(state).period, state == X
        if rules.sends("params" if is_x else "momentum", X if is_x else full_name(state, X), period):
            found.append(state if period == 1 else f"{state} every {period} rounds")
    said = " and ".join(found) if len(found) < 3 else ", ".join(found)
    return f"({said})" if algorithm.fragments == 1 else f"(one of {algorithm.fragments} parts of {said})"


def datasets(
    fetch: Annotated[
        str | None, typer.Option("--download", metavar="NAME", help="Download this data set, through torchvision.")
    ] = None,
    data_dir: Annotated[str, typer.Option("--data-dir", metavar="DIR", help="Folder for the download.")] = "data",
) -> int:
    """List the data sets that a config can name, or download one.

    fedmom datasets --download cifar10 --data-dir data
    """
    from fedmom.data.shipped import DATASETS, download

    if fetch is not None:
        download(fetch, data_dir)
        print(f"{fetch} is in {data_dir}")
        return DONE
    rows = [[name, entry.summary] for name, entry in DATASETS.items()]
    rows.append(["quadratic", "f_i(x) = Σ h/2 (x − c)², exact gradients: data.curvatures, centers, start, noise-sigma"])
    rows.append(["FILE.npz", "arrays x_train, y_train, x_test, y_test (uint8 images, float features, integer ids)"])
    rows.append(
        ["FOLDER/", "LEAF's train/*.json and test/*.json, or images in train/CLIENT/LABEL/ and test/CLIENT/LABEL/"]
    )
    rows.append(["FILE.bin, FOLDER/", "a stream of tokens: train.bin and val.bin, raw uint16; see data.context"])
    rows.append(["hf:NAME", "a data set of Hugging Face's, or hf:FOLDER of its save_to_disk; see data.columns"])
    rows.append(["module:function", "your own: returns those four arrays, or two data sets of torch's kind"])
    _print_list(rows)
    return DONE


def models() -> int:
    """List the models that a config can name.

    fedmom run quickstart --set model.name=resnet20
    """
    from fedmom.tasks.models import MODELS

    rows = [[name, entry.summary] for name, entry in MODELS.items()]
    rows.append(["module:function", "your own: function(input_shape, num_classes) returns a torch.nn.Module"])
    _print_list(rows)
    return DONE


def algorithms() -> int:
    """List the algorithms that a config can name: what each is, its equation, and the keys that it sets.

    fedmom run quickstart --set algorithm.name=scaffold
    """
    from fedmom.method.algorithms import ALGORITHMS

    rows = []
    for name, entry in ALGORITHMS.items():
        fixed = {"num-local-steps": entry.interval, "beta": entry.beta}
        sets = {key: value for key, value in fixed.items() if value is not None} | dict(entry.sets)
        said = ", ".join(f"{key} = {value!r}" for key, value in sets.items())
        rows.append([name, entry.summary])
        rows += [["", line] for line in (entry.equation, f"sets {said}" if said else "") if line]
    _print_list(rows)
    return DONE


def _print_list(rows: Sequence[Sequence[str]]) -> None:
    """Names, so to the left; beside each a sentence, which a narrow terminal breaks between words."""
    from fedmom.cli.first.text import filled, line_width

    label = max(len(name) for name, _ in rows) + 2
    for name, sentence in rows:
        print(filled(name, sentence, line_width(), label))
