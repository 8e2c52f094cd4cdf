"""`python tests/mutants`: which fast tests fail under every mutant; exit status 1 where none does.

    python tests/mutants [WORD …] [--named | -x] [-j N] [--json FILE]

WORD: mutants whose part or name has one of the words; left out, all.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers")]

from forks import ALL, FIRST, TYPOS, Found, Job, run  # noqa: E402
from mutants import MUTANTS, PARTS  # noqa: E402

RIGHT = "(the right program)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of parts or names; left out, all mutants")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--named", action="store_true", help="only the test that a row names")
    much.add_argument("-x", action="store_true", help="only up to the first test that fails, and under mutants alone")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="processes at once (2)")
    parser.add_argument("--json", metavar="FILE", help="also write every failure there")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in f"{m.part}: {m.name}" for w in options.words)]
    screen = sys.stdout  # pytest, within which `tell` is called, has another one

    def tell(name: str, found: Found) -> None:
        print(line(name, found), file=screen, flush=True)

    jobs = [Job(f"{m.part}: {m.name}", m.change, [m.test] if options.named else PARTS[m.part]) for m in chosen]
    right = Job(RIGHT, None, sorted({test for job in jobs for test in job.tests}), seconds=1800.0)
    found = run(
        [*jobs, *([] if options.x else [right])], workers=options.j, until=FIRST if options.x else ALL, tell=tell
    )
    if options.json:
        said = {name: [tuple(failure) for failure in one.failures] for name, one in found.items()}
        Path(options.json).write_text(json.dumps(said, ensure_ascii=False, indent=1))
    wrong = [f"{name}: {why}" for name, one in found.items() if (why := trouble(name, one))]
    print(f"{len(jobs)} mutants, {len(wrong)} of them not caught as they should be.")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def line(name: str, found: Found) -> str:
    first = [failure.test.removeprefix("tests/") for failure in found.failures]
    what = (
        ", ".join(first[:2]) + (", …" if len(first) > 2 else "")
        if first
        else found.stale or ("" if name == RIGHT else "UNCAUGHT")
    )
    return f"{len(first):4d} of {found.run:3d}  {found.seconds:4.0f} s  {name}: {what}"


def trouble(name: str, found: Found) -> str:
    """Why what came of a job is not what must; ""."""
    fails = ", ".join(f"{failure.test} ({failure.error}: {failure.message})" for failure in found.failures)
    if found.stale or not found.run:
        return found.stale or fails or "no such test"
    if name == RIGHT:
        return f"fails too: {fails}" if fails else ""
    if not fails:
        return "uncaught"
    typos = [failure for failure in found.failures if failure.error in TYPOS]
    return f"a slip of the row's own pen: {fails}" if len(typos) == len(found.failures) else ""


if __name__ == "__main__":
    sys.exit(main())
