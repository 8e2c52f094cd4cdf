"""Your own topology: two offices with a line between them, as a file of links.

    python examples/own_topology.py

On the command line: fedmom topology CONFIG --set algorithm.topology=offices.edges draws it, where CONFIG is of
Algorithm 2; a matrix W may also come from a .npy or .csv file.
"""

import tempfile
from itertools import combinations
from pathlib import Path

import fedmom

OFFICES = (range(4), range(4, 8))


def write(path: Path) -> None:
    """A line `i j` per link: everybody within an office, and one link between the two."""
    links = [pair for office in OFFICES for pair in combinations(office, 2)]
    path.write_text("".join(f"{i} {j}\n" for i, j in [*links, (3, 4)]))


def main() -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "offices.edges"
        write(path)
        apart = {}
        for topology in ("complete", str(path)):
            result = fedmom.run(
                {
                    "data": {"num-clients": 8, "alpha": 0.3},
                    "model": {"name": "logistic"},
                    "algorithm": {"name": "d-sgd-m", "topology": topology, "lr": 0.05},
                    "run": {"num-rounds": 60, "eval-every": 20},
                }
            )
            last = result.rounds[-1]
            apart[topology] = last["consensus_distance_after"]
            accuracy = 100 * last["test_accuracy"]
            print(f"{Path(topology).name:14} accuracy {accuracy:.1f} %, clients apart {apart[topology]:.3g}")
    return apart[str(path)] - apart["complete"]


if __name__ == "__main__":
    main()
