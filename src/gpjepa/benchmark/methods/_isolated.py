"""A method in a process of its own: its memory is its own, and its end ends nothing else."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np

from gpjepa.perturbations import TargetFeatures
from gpjepa.splits import Split

from ._registry import make_method

TAIL = 15  # lines of a log that an error shows
SECONDS_TO_END = 5


class MethodError(RuntimeError):
    """What went wrong in a method, in its own words."""


class Isolated:
    """A method that runs in a process of its own, which sees nothing of the held-out cells.

    Parameters
    ----------
    name, features, seed, options
        As :func:`gpjepa.benchmark.methods.make_method` takes them.

    Attributes
    ----------
    cost
        ``seconds_fit``, ``seconds_predict``, ``peak_memory_gb`` of the whole process (the
        operating system's number, Python and the cells included) and ``parameters``.

    Raises
    ------
    ValueError
        If the method cannot be made of its options.
    """

    def __init__(
        self, name: str, features: Sequence[TargetFeatures], seed: int, options: dict[str, Any]
    ) -> None:
        self.name = name
        self.cost: dict[str, Any] = {"seconds_fit": 0.0, "seconds_predict": 0.0}
        self.folder = tempfile.TemporaryDirectory(prefix="gpjepa-method-")
        context = mp.get_context("forkserver")
        # What all methods need is imported once; torch is not, or all would seem to need it.
        context.set_forkserver_preload(["gpjepa.benchmark.methods"])
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self._log, name, features, seed, options)
        self.process = context.Process(target=_serve, args=arguments)
        with _no_main():
            self.process.start()
        theirs.close()
        try:
            embeds = self._ask("make")
        except MethodError as error:
            self.close()
            raise ValueError(str(error)) from error
        if embeds:
            self.embed = lambda cells: np.asarray(self._ask("embed", cells), float)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Let the method learn from the training cells."""
        self._ask("fit", train, split)

    def predict(
        self, perturbations: Sequence[str], control: ad.AnnData
    ) -> ad.AnnData | dict[str, ad.AnnData]:
        """Let the method predict."""
        return self._ask("predict", list(perturbations), control)

    def close(self) -> None:
        """End the process, and all that it started."""
        self.pipe.close()
        self.process.join(SECONDS_TO_END)  # it ends when nobody is at the other end
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own
        self.process.join()
        self.folder.cleanup()

    @property
    def _log(self) -> str:
        return str(Path(self.folder.name) / "log.txt")

    def _ask(self, command: str, *arguments: Any) -> Any:
        try:
            self.pipe.send((command, arguments))
            answer, seconds, about = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            log = "\n".join(Path(self._log).read_text().splitlines()[-TAIL:])
            raise MethodError(
                f"its process ended with {_ending(self.process.exitcode)} at {command!r}. {log}"
            ) from error
        if command in ("fit", "predict"):
            self.cost[f"seconds_{command}"] += seconds
            self.cost |= about
        if isinstance(answer, MethodError):
            raise answer
        return answer


def _ending(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "signal 9, as when memory runs out,"
    return f"exit code {code}"


@contextmanager
def _no_main() -> Iterator[None]:
    """Keep a new process from running the user's script again, as multiprocessing would."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# What runs in the other process


def _serve(pipe: Connection, log: str, *arguments: Any) -> None:
    """Make the method, and answer commands until the other end is closed."""
    os.setsid()  # with all that it starts; whoever started it ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    method: Any = None
    while True:
        try:
            command, given = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        answer: Any
        try:
            if command == "make":
                method = make_method(*arguments)
                answer = hasattr(method, "embed")
            else:
                answer = getattr(method, command)(*given)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is said
            answer = MethodError(f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - start
        about = {
            "peak_memory_gb": _peak_memory(),
            "parameters": getattr(method, "n_parameters_", None),
        }
        pipe.send((answer, seconds, about))


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _peak_memory() -> float:
    """Peak of resident memory in GB, of this process or the largest that it started."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1_024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * unit / 1e9
