"""What runs in the process of a Ray actor, and how its messages are pickled. Needs no Ray."""

import contextlib
import ctypes
import os
import pickle
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedmom.actors.nodes import as_the_driver
from fedmom.actors.worker_output import WorkerOutput
from fedmom.errors import InputError
from fedmom.user_code import one_line, place_of

BATCH_SECONDS = 0.03  # a batch ends after the message that takes it past this
BATCH_BYTES = 16 << 20  # and after this many bytes of answers; the same holds for what is sent


class Failure(NamedTuple):
    """The answer of a message that has none."""

    # "raised": the handler did; "died": its worker did, again and again; "late": past straggler_seconds; "lost": what
    # other answers left on a node, for it to use, is gone with that node
    kind: str
    reason: str  # one line


class Started(NamedTuple):
    """What a worker says once it is there."""

    pid: int
    told: bool  # whether it writes its progress
    trouble: str  # "" or why there is no handler
    files: list[str]  # into which it prints
    held: Mapping[str, str]  # what its node holds of what all must


class Packed(NamedTuple):
    """A pickled value. Its large binary parts stay outside, so that Ray's store can show them without a copy."""

    head: bytes
    buffers: list[Any]  # pickle.PickleBuffer before Ray's store, read-only views of the store after it

    @classmethod
    def of(cls, value: Any) -> "Packed":
        buffers: list[Any] = []
        return cls(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers)

    def value(self) -> Any:
        return pickle.loads(self.head, buffers=self.buffers)

    def nbytes(self) -> int:
        return len(self.head) + sum(memoryview(buffer).nbytes for buffer in self.buffers)


class Split(NamedTuple):
    """What a handler gives for a message that was submitted with `keep`."""

    value: Any
    large: Any  # stays in the store of the worker's node


class ProgressFile:
    """A file of three numbers by which a worker and the driver on one machine agree on what has begun.

    The worker writes which message of which batch it is about to begin, then reads up to which batch it was stopped;
    the driver writes that, then reads what has begun. So what looks not begun to the driver never will be. This is how
    messages behind a long one go elsewhere, and how a worker that died names the message it died of. Ray's own calls
    cannot tell: they wait for the one under way.
    """

    BEGUN = struct.Struct("<qq")  # (batch, place in it)
    STOP = struct.Struct("<q")

    def __init__(self, path: str, *, create: bool = False) -> None:
        """OSError where there is no such file, as on another machine."""
        self._file = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        if create:
            os.pwrite(self._file, self.BEGUN.pack(-1, -1) + self.STOP.pack(-1), 0)

    def may_begin(self, batch: int, place: int) -> bool:
        os.pwrite(self._file, self.BEGUN.pack(batch, place), 0)
        return bool(self.STOP.unpack(os.pread(self._file, self.STOP.size, self.BEGUN.size))[0] < batch)

    def begun(self, batch: int) -> int:
        """How many messages of the batch have begun."""
        current, place = self.BEGUN.unpack(os.pread(self._file, self.BEGUN.size, 0))
        return int(place) + 1 if current == batch else 0

    def stop(self, batch: int) -> None:
        """No further message of this batch and of those before it begins."""
        os.pwrite(self._file, self.STOP.pack(batch), self.BEGUN.size)

    def close(self) -> None:
        os.close(self._file)


def _keep_freed_memory() -> None:
    """Let malloc reuse large blocks rather than return them to the system, up to 256 MB.

    A client allocates and frees its model's size for every message. Of 2.8 ms for an answer of 4 MB, 1.5 ms were the
    page faults of fresh memory (on a virtual machine, where they are dear: 3 µs for 4 KB).
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that it takes


class Actor:
    """What runs in a Ray actor's process: batches of messages, one message after the other."""

    def start(
        self, paths: list[str], folder: str, make_worker: bytes, progress: str, show: bool = False, held: bytes = b""
    ) -> "Started":
        """paths, folder: the driver's sys.path and working directory, where the user's own modules and files are.

        show: whether answers bring along what was printed meanwhile. held: see Agreement.
        """
        self.output, self.show = WorkerOutput(), show
        as_the_driver(paths, folder)
        try:
            self.progress: ProgressFile | None = ProgressFile(progress)
        except OSError:
            self.progress = None
        told = Started(os.getpid(), self.progress is not None, "", self.output.paths, {})
        _keep_freed_memory()
        try:
            if held:
                told = told._replace(held=dict(pickle.loads(held)()))
            self.handler = pickle.loads(make_worker)()
        except InputError as error:
            return told._replace(trouble=str(error))
        except (Exception, SystemExit) as error:
            return told._replace(trouble=f"a worker could not start: {one_line(error)}")
        return told

    def run(
        self, batch: int, calls: list[tuple[bytes, list[Any], list[int]]], *shared: Any
    ) -> tuple[float, list[Packed | Failure], list[str]]:
        """Seconds taken, answers to the first of `calls`, what each printed; those without one were not begun."""
        return self._run(batch, calls, shared)[0]

    def run_keeping(
        self, batch: int, calls: list[tuple[bytes, list[Any], list[int]]], *shared: Any
    ) -> tuple[tuple[float, list[Packed | Failure], list[str]], list[Packed | None]]:
        """The same of a handler that gives `Split`: their large parts come second, for the store."""
        return self._run(batch, calls, shared)

    def _run(
        self, batch: int, calls: list[tuple[bytes, list[Any], list[int]]], shared: Sequence[Any]
    ) -> tuple[tuple[float, list[Packed | Failure], list[str]], list[Packed | None]]:
        answers: list[Packed | Failure] = []
        kept: list[Packed | None] = []
        texts: list[str] = []
        num_bytes = 0
        begun = time.perf_counter()
        for place, (head, buffers, numbers) in enumerate(calls):
            if self.progress and not self.progress.may_begin(batch, place):
                break
            sizes = self.output.sizes()
            large = None
            try:
                given = self.handler(Packed(head, buffers).value(), *(shared[number] for number in numbers))
                if isinstance(given, Split):
                    given, large = given.value, Packed.of(given.large)
                    num_bytes += large.nbytes()
                answer = Packed.of(given)
                num_bytes += answer.nbytes()
                answers.append(answer)
            except (Exception, SystemExit) as error:
                into = self.output.grown(sizes)
                printed = f"; it printed into {into}" if into else ""
                answers.append(Failure("raised", f"{one_line(error)}{place_of(error, anywhere=True)}{printed}"))
            kept.append(large)
            if self.show:
                texts.append(self.output.since(sizes))
            if time.perf_counter() - begun > BATCH_SECONDS or num_bytes > BATCH_BYTES:
                break
        return (time.perf_counter() - begun, answers, texts), kept
