"""fedmom's ClientApp with a fault: what the file FEDMOM_TEST_FAULTS says happens to client 3 in round 2.

{"fault": "kill", "raise", "hang" or "nan", "most": how often, "tries": a file with a letter for each time}
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord

from clients.client_app import app

_plan = json.loads(Path(os.environ["FEDMOM_TEST_FAULTS"]).read_text())
_tries, _most, _fault = Path(_plan["tries"]), _plan["most"], _plan["fault"]


def _faulty(message, context, call_next):
    if message.metadata.message_type == "train":
        asked = message.content["config"]
        if asked["server-round"] == 2 and 3 in asked["clients"] and len(_tries.read_text()) < _most:
            with open(_tries, "a") as file:
                file.write("x")
            if _fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if _fault == "raise":
                raise ValueError("no more disk")
            if _fault == "hang":
                time.sleep(600)
            reply = call_next(message, context)
            arrays = dict(reply.content["arrays"])
            name = next(iter(arrays))
            arrays[name] = Array(arrays[name].numpy() * np.nan)
            reply.content["arrays"] = ArrayRecord(arrays)
            return reply
    return call_next(message, context)


app._mods = [_faulty]
for _name in list(app._registered_funcs):
    _inner = app._registered_funcs[_name]
    app._registered_funcs[_name] = lambda message, context, inner=_inner: _faulty(message, context, inner)
