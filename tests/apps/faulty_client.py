"""fedmom's ClientApp with a fault: what FEDMOM_TEST_FAULT says ("kill", "raise", "hang" or "nan") happens to client 3
in round 2, once for each line that may still be written into the file FEDMOM_TEST_TRIES.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord

from clients.client_app import app

_tries = Path(os.environ["FEDMOM_TEST_TRIES"])
_most = int(os.environ["FEDMOM_TEST_MOST"])
_fault = os.environ["FEDMOM_TEST_FAULT"]


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
