"""The command `fedmom`, also as `python -m fedmom`."""

import contextlib
import signal
import sys

from fedmom.cli import supervise
from fedmom.machine.allocator import keep_freed_memory


def main() -> None:
    keep_freed_memory()
    try:
        from fedmom.cli.main import call  # Ctrl-C may come within

        status = supervise.main(call)
    except KeyboardInterrupt:  # within the imports, or once more while the first was answered
        with contextlib.suppress(OSError, ValueError, KeyboardInterrupt):
            print("fedmom: interrupted", file=sys.stderr)
        status = 130
    with contextlib.suppress(KeyboardInterrupt):
        _end_in_peace()
    sys.exit(status)


def _end_in_peace() -> None:
    """What is registered for the interpreter's end is not broken off by impatience, which would print its traceback."""
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGHUP", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


if __name__ == "__main__":
    main()
