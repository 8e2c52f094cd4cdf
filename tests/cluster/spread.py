"""A pool of three workers on a cluster, which tells on which machines they are; the argument is a folder that all see.

Then it goes on with messages until a machine answers that was not there at first, and tells its name.
"""

import json
import os
import sys
import time
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

from fedmom.actors.cluster import PoolOptions
from fedmom.actors.pool import Pool

NUM_WORKERS = 3


def make_worker(folder):
    """Up when all are; answers with its machine's name."""
    name = os.uname().nodename
    (folder / f"{name} {uuid.uuid4().hex}").touch()
    while len(list(folder.iterdir())) < NUM_WORKERS:
        time.sleep(0.05)
    return lambda payload: name


def noted(folder):
    return Counter(path.name.split()[0] for path in folder.iterdir())


if __name__ == "__main__":
    notes, address = Path(sys.argv[1]), sys.argv[2]
    with Pool(partial(make_worker, notes), PoolOptions(num_workers=NUM_WORKERS, ray_address=address)) as pool:
        first = noted(notes)
        print(json.dumps(first), flush=True)
        late: set[str] = set()
        while not late:
            for number in range(4 * NUM_WORKERS):  # so many that all get some
                pool.submit(number, None)
            late = {pool.take()[1] for _ in range(4 * NUM_WORKERS)} - set(first)
        print(json.dumps(sorted(late)), flush=True)
