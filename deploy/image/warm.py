"""A process that has imported torch and Flower, and forks for every app that flower-superexec starts.

Flower starts a new process for each message of a round: some ten CPU-seconds of imports before the first useful one. A
fork of a process that has done them takes milliseconds. What a run brings (fedmom itself, the strategies, the
clients) is never imported here, so that every app still starts from nothing of an earlier run's. Where this process
is not there (it ended, or cannot fork safely) apps start cold, as Flower has it: bin/flwr-clientapp.
"""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import traceback

import ask
import links

_PR_SET_PDEATHSIG = 1
COMMANDS = {
    "flwr-clientapp": ("flwr.supernode.cli.flwr_clientapp", "flwr_clientapp"),
    "flwr-serverapp": ("flwr.superlink.cli.flwr_serverapp", "flwr_serverapp"),
}
IMPORTS = (
    *("flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "torch", "torch.func", "numpy"),
    "torch._dynamo",  # the first gradient of torch.func imports it: most of a short message's time
    *("safetensors.torch", "networkx", "rich.console", "rich.progress"),
)


def start() -> None:
    """Begin beside this process, which goes on at once; the other ends with it."""
    parent = os.getpid()
    if os.fork():
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            serve()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def serve() -> None:
    """Import, then fork for everybody who asks, for ever."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's BLAS would start threads as it is imported; torch has its own
    load()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:  # a lock that another thread holds would stay locked in the child
        print(f"warm: {threads} threads after the imports, apps start cold", file=sys.stderr, flush=True)
        return
    gc.collect()
    gc.freeze()  # children leave these objects' pages alone
    server = ask.serve()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        connection, _ = server.accept()
        with contextlib.suppress(OSError):
            answer(server, connection)
        connection.close()


def answer(server: socket.socket, connection: socket.socket) -> None:
    """One command: taken if it is one of ours."""
    connection.settimeout(10)
    words, streams = ask.take(connection)
    try:
        if words[0] not in COMMANDS or len(streams) != 3:
            return
        if os.fork() == 0:
            server.close()
            connection.sendall(b"y")
            connection.close()
            become(words, streams)
    finally:
        for stream in streams:
            os.close(stream)


def become(words: list[str], streams: list[int]) -> None:
    """In the child: the command, with the streams of whoever asked, to its end."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            if stream > 2:
                os.close(stream)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.unfreeze()
        sys.path[0] = ""  # as an installed command has it; the bundle puts itself first
        run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As an interpreter ends: threads that are no daemons are waited for, what is buffered goes out.
        with contextlib.suppress(BaseException):
            threading._shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def run(words: list[str]) -> None:
    """One of COMMANDS, as its own console script would run it."""
    import importlib

    sys.argv = words
    module, name = COMMANDS[words[0]]
    getattr(importlib.import_module(module), name)()


def load() -> None:
    """What every app imports anyway; each is left out where it fails, so that the app itself says so."""
    import importlib

    links.mend(links.RETRIES, links.ENDS)
    for name in (*(module for module, _ in COMMANDS.values()), *IMPORTS):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
