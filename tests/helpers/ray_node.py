"""Starts Ray's daemons on a machine, as `ray start` does, without its command line; the argument is a JSON object.

Its values are Ray's own parameters, and "head": whether this is the head of a new cluster.
"""

import json
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    head = given.pop("head")
    # Without what serves people and autoscalers.
    params = RayParams(**given, include_dashboard=False, no_monitor=True, include_log_monitor=False)
    Node(params, head=head, shutdown_at_exit=False, spawn_reaper=False)
