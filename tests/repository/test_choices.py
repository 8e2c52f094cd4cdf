"""A choice is a table: whoever needs to know what a row means asks the row, and compares no name."""

import ast
from pathlib import Path

import pytest

from fedmom.config.strategies import STRATEGIES
from fedmom.data.partition import PARTITIONS
from fedmom.data.shipped import DATASETS
from fedmom.engine.paths import PATHS
from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.method.algorithms import ALGORITHMS
from fedmom.method.decentralized.graphs import TOPOLOGIES
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.outer import OUTERS
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.tasks.models import MODELS
from fedmom.tasks.problem import DATA_KINDS
from fedmom.travel.table import CODECS
from sources import tree_of

pytestmark = pytest.mark.xdist_group("sources")  # one process parses them
ROOT = Path(__file__).parents[2]
TABLES = {
    "fedmom/config/strategies.py": STRATEGIES,
    "fedmom/data/datasets.py": DATASETS,
    "fedmom/data/partition.py": PARTITIONS,
    "fedmom/engine/paths.py": PATHS,
    "fedmom/engine/stacked/convolutions.py": CONVOLUTIONS,
    "fedmom/method/algorithms.py": ALGORITHMS,
    "fedmom/method/states/policies.py": MOMENTUM_POLICIES,
    "fedmom/method/optimizers/table.py": OPTIMIZERS,
    "fedmom/method/outer.py": OUTERS.keys() - {"none", "nesterov"},  # which are also a choice and a key of others
    "fedmom/tasks/models/table.py": MODELS,
    "fedmom/method/decentralized/graphs.py": TOPOLOGIES.keys()
    - {"path"},  # which is also a key of what updates are about
    "fedmom/tasks/problem.py": DATA_KINDS,
    "fedmom/travel/table.py": CODECS.keys() - {"float32", "float16", "bfloat16"},  # which are dtypes as well
}


def compared(tree: ast.Module) -> list[str]:
    """The texts that a file compares something with, alone or in a list of them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
                found += [
                    part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
    return found


def test_the_look_sees_every_kind_of_comparison():
    source = 'if a == "loop" or b in ("stack", c) or "local" != d:\n    e = "reset"\n'
    assert compared(ast.parse(source)) == ["loop", "stack", "local"]


@pytest.mark.slow
def test_nobody_compares_the_names_of_a_table():
    names = {name: file for file, table in TABLES.items() for name in table}
    assert len(names) > 20
    for folder in ("fedmom", "strategies", "clients"):
        for path in (ROOT / folder).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            for name in compared(tree_of(path)):
                assert names.get(name, file) == file, f"{file} compares with {name!r}, a row of {names[name]}"
