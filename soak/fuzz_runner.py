"""Runs readers on inputs made from seeds, each under guard, in processes that may die.

Found is: any exception but the allowed one, its message without the file's name or very long, a
crash, a hang, too much memory, a file changed outside the output folder, a program or a pickle run.
Linux only: memory is read from /proc.
"""

import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

LONGEST_MESSAGE = 2000  # characters
NEVER = (  # audit events that no reader has a reason for
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn"),
    *("subprocess.Popen", "pty.spawn", "webbrowser.open", "socket.connect", "socket.bind"),
    *("pickle.find_class", "ctypes.dlopen", "os.symlink", "os.link", "os.truncate", "os.kill"),
)
CHANGES = (
    *("os.chmod", "os.mkdir", "os.rename", "os.remove", "os.rmdir"),
    *("shutil.rmtree", "shutil.move"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ASLEEP = 2.0  # seconds in which a process neither computes nor wants to, until its input is lost
HARD_LIMIT = 6 << 30  # bytes more than at the start, where allocations begin to fail


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        write: makes a file from a seed in an empty folder and returns its path.
        read: what users do with it; the second folder is for output.
        weight: share of the inputs, relative to others.
    """

    write: Callable[[Random, Path], Path]
    read: Callable[[Path, Path], object]
    weight: int


@dataclass
class Outcome:
    """Of all inputs together."""

    findings: list[str] = field(default_factory=list)
    inputs: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds
    memory: int = 0  # bytes, of the input that took most


def run(
    targets: Mapping[str, Target],
    allowed: type[Exception],
    *,
    inputs: int,
    seed: int,
    workers: int,
    seconds: float,
    memory: int,
) -> Outcome:
    """Runs `inputs` inputs, shared among processes.

    Args:
        targets: by name.
        allowed: what a reader may raise.
        seed: with an input's number it decides the input.
        seconds: that an input may take.
        memory: bytes that an input may take.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        crew = [
            _Worker(
                targets, allowed, seed, memory, Path(scratch, str(n)), range(n, inputs, workers)
            )
            for n in range(workers)
        ]
        while crew:
            ready = wait([worker.pipe for worker in crew], timeout=0.2)
            for worker in list(crew):
                if worker.pipe in ready:
                    worker.receive(outcome)
                elif worker.late(seconds):
                    worker.kill()
                    worker.lost(outcome, f"hangs, computes for more than {seconds:g} s or sleeps")
                if worker.done:
                    crew.remove(worker)
    return outcome


def describe(targets: Mapping[str, Target], seed: int, number: int) -> tuple[str, Random]:
    """The name of the target that an input is for, and what decides the rest of it."""
    random = Random(f"{seed}/{number}")
    weights = [target.weight for target in targets.values()]
    return random.choices(list(targets), weights)[0], random


class _Worker:
    """A process and the numbers of the inputs that are left to it."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        allowed: type[Exception],
        seed: int,
        memory: int,
        folder: Path,
        numbers: range,
    ) -> None:
        self.settings = (targets, allowed, seed, memory, folder)
        self.numbers = numbers
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # what is imported need not be again
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (*self.settings, self.numbers, theirs)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._begin(self.numbers.start)
        self.done = False

    def _begin(self, number: int) -> None:
        self.at = number
        _, self.used = self.last = self._state()
        self.woke = time.monotonic()

    def receive(self, outcome: Outcome) -> None:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode == 0:
                self.done = True
            else:
                self.lost(outcome, f"ends the process, status {self.process.exitcode}")
            return
        if isinstance(message, int):
            self._begin(message)
            return
        name, finding, seconds, memory = message
        outcome.inputs[name] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.memory = max(outcome.memory, memory)
        if finding:
            outcome.findings.append(f"{self.at} {name}: {finding}")

    def late(self, seconds: float) -> bool:
        """By the processor's time, which other programs do not take, or asleep for long.

        A process that waits for a processor or a disk of a busy machine is not asleep.
        """
        before, self.last = self.last, self._state()
        if self.last != before or self.last[0] != "S":
            self.woke = time.monotonic()
        return self.last[1] - self.used > seconds or time.monotonic() - self.woke > ASLEEP

    def _state(self) -> tuple[str, float]:
        """As /proc has it, S for asleep, and seconds computed; of one that is gone X and 0."""
        try:
            line = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "X", 0.0
        state, *fields = line.rpartition(")")[2].split()
        return state, (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def lost(self, outcome: Outcome, finding: str) -> None:
        """Writes down that this input ended the process, and goes on behind it with another."""
        targets, _, seed, *_ = self.settings
        outcome.findings.append(f"{self.at} {describe(targets, seed, self.at)[0]}: {finding}")
        self.pipe.close()
        self.numbers = range(self.at + self.numbers.step, self.numbers.stop, self.numbers.step)
        self._start()


def _work(
    targets: Mapping[str, Target],
    allowed: type[Exception],
    seed: int,
    memory: int,
    folder: Path,
    numbers: range,
    pipe: Connection,
) -> None:
    warnings.simplefilter("ignore")
    logging.disable()  # nibabel tells of every field that it mends
    held = _memory("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (held + HARD_LIMIT, held + HARD_LIMIT))
    guard = _Guard(folder / "output")
    for number in numbers:
        pipe.send(number)
        name, random = describe(targets, seed, number)
        shutil.rmtree(folder, ignore_errors=True)
        places = [folder / part for part in ("input", "output", "elsewhere")]
        for place in places:
            place.mkdir(parents=True)
        os.chdir(places[2])
        path = targets[name].write(random, places[0])
        pipe.send(number)  # only from here its time counts
        pipe.send((name, *_tried(targets[name], path, places, allowed, guard, memory)))


def _tried(
    target: Target,
    path: Path,
    places: Sequence[Path],
    allowed: type[Exception],
    guard: "_Guard",
    limit: int,
) -> tuple[str | None, float, int]:
    """What was found, seconds of the processor, bytes of memory."""
    before = [sorted(os.listdir(place)) for place in (places[0], places[2])]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, started = _memory("VmRSS"), time.process_time()
    finding = None
    try:
        with guard:
            target.read(path, places[1])
    except allowed as error:
        message = str(error)
        if path.name not in message:
            finding = f"message without {path.name}: {message[:200]}"
        elif len(message) > LONGEST_MESSAGE:
            finding = f"message of {len(message)} characters: {message[:200]}"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        finding = f"{type(error).__name__}: {str(error)[:200]} ({at.filename}:{at.lineno})"
    seconds, used = time.process_time() - started, max(0, _memory("VmHWM") - held)
    if guard.seen:
        finding = f"does what no reader should: {guard.seen[0]}"
    elif [sorted(os.listdir(place)) for place in (places[0], places[2])] != before:
        finding = "leaves a file outside the output folder"
    elif used > limit and finding is None:
        finding = f"takes {used >> 20:,} MiB of memory"
    return finding, seconds, used


class _Guard:
    """While it is entered, notes what Python is asked to do that no reader should do."""

    def __init__(self, output: Path) -> None:
        self.output = os.path.realpath(output)
        self.seen: list[str] = []
        self._active = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self.seen.clear()
        self._active = True

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        changed = arguments[: 2 if event == "os.rename" else 1] if event in CHANGES else ()
        paths = arguments[:1] if writes else changed
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # within an open folder
            paths = (Path(f"/proc/self/fd/{arguments[1]}", os.fsdecode(arguments[0])).parent,)
        if event in NEVER or not all(map(self._within, paths)):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    def _within(self, path: Any) -> bool:
        if isinstance(path, int) or path == os.devnull:
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(self.output)


def _memory(entry: str) -> int:
    """Bytes that /proc tells of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{entry}:"))
    return int(line.split()[1]) << 10
