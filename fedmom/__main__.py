"""The command `fedmom`, also as `python -m fedmom`."""

import sys

from fedmom import supervise
from fedmom.allocator import keep_freed_memory


def main() -> None:
    keep_freed_memory()
    try:
        from fedmom.cli import call  # seconds, most of them torch: Ctrl-C may come within
    except KeyboardInterrupt:
        print("fedmom: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(supervise.main(call))


if __name__ == "__main__":
    main()
