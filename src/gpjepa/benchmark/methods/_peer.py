"""A method of others behind a script, in an environment of its own, reached through files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._files import written_whole
from gpjepa.perturbations import TargetFeatures
from gpjepa.splits import Split

from ._isolated import TAIL, MethodError
from ._sources import method_source

_WRITTEN = ("perturbation", "context", "batch", "library_size")


class Peer:
    """A method behind a script; it is started when an answer is not kept, and ends with :meth:`close`.

    Parameters
    ----------
    script
        Script to run; ``peers/_serve.py`` says what it reads and writes. Its dependencies are
        declared in it (PEP 723), and ``uv`` makes their environment when it first runs.
    features
        Features of the targets, for a method that takes them.
    seed, options
        What the script gets.
    python
        Interpreter of an environment that is there already, instead of ``uv``.
    keep
        Folder where answers and their cost are kept, under a hash of all that the script reads and
        of its code: they take hours, and metrics change more often.

    Attributes
    ----------
    cost
        ``seconds_fit``, ``seconds_predict``, and what the script says of itself:
        ``peak_memory_gb``, ``parameters``, ``given`` (what of the data it was given).

    Raises
    ------
    ValueError
        If the script or the interpreter is not there, or ``uv`` is not installed.
    """

    def __init__(
        self,
        script: Path,
        features: Sequence[TargetFeatures] = (),
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        python: Path | None = None,
        keep: Path | None = None,
    ) -> None:
        check_peer(script, python)
        self.script, self.features = script.absolute(), features
        self.seed, self.options = seed, dict(options or {})
        runner = ["uv", "run", "--quiet", "--script"] if python is None else [python.absolute()]
        self.command = [str(x) for x in (*runner, self.script)]
        self.folder = tempfile.TemporaryDirectory(prefix="gpjepa-peer-")
        self.root = Path(self.folder.name) / "answers" if keep is None else keep
        self.cost: dict[str, Any] = {}

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Say what to learn from; the script is started when an answer is not kept."""
        rows = {*split.train, *split.test}
        task = {
            "test": [[c, str(p)] for c, p in split.test],
            "targets": {str(p): list(p.targets) for p in sorted({p for _, p in rows})},
            "seed": self.seed,
            "options": self.options,
        }
        self._task, self._train, self._of_targets = json.dumps(task), train, None
        if self.features:
            names = sorted({t for _, p in rows for t in p.targets})
            wide = sp.csr_matrix(sp.hstack([f.take(names) for f in self.features]))
            self._of_targets = ad.AnnData(wide, pd.DataFrame(index=names))
        read = [_digest(x) for x in (train, self._of_targets) if x is not None]
        # What the script needs stands in its comments, and decides its answers as well.
        needs = re.findall(r"^# /// script$.*?^# ///$", self.script.read_text(), re.M | re.S)
        code = [method_source(self.script.name, self.script), *needs, *self.command]
        self.keep = self.root / _hash(*code, self._task, *read)

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> ad.AnnData:
        """The kept answer, or let it predict."""
        wanted = json.dumps(list(perturbations))
        kept = self.keep / f"{_hash(wanted, _digest(control))}.h5ad"
        cost = self.keep / "cost.json"
        if kept.exists():
            self.cost = json.loads(cost.read_text())
            return _read(kept)
        if not hasattr(self, "process"):
            self._start()
        here = Path(self.folder.name)
        _write(control, here / "control.h5ad")
        (here / "wanted.json").write_text(wanted)
        self._ask("predict")
        with written_whole(cost) as draft:
            draft.write_text(json.dumps(self.cost))
        with written_whole(kept) as draft:
            shutil.copyfile(here / "prediction.h5ad", draft)
        return _read(kept)

    def _start(self) -> None:
        """Start the script and let it train."""
        self.cost = {}
        here = Path(self.folder.name)
        _write(self._train, here / "train.h5ad")
        (here / "task.json").write_text(self._task)
        if self._of_targets is not None:
            self._of_targets.write_h5ad(here / "features.h5ad")
        with (here / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [*self.command, str(here)],
                cwd=here,
                text=True,
                stderr=log,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_clean_environment(),
                start_new_session=True,
            )
        self._ask("start")  # the environment is made first, which is no part of the fit
        self._ask("fit")

    def _ask(self, command: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            log = (Path(self.folder.name) / "log.txt").read_text().splitlines()[-TAIL:]
            raise MethodError(
                f"{self.script.name} ended with exit code {self.process.wait()} at {command!r}: "
                + "\n".join(log)
            )
        answer = json.loads(line)
        seconds = f"seconds_{command}"
        if command != "start":
            self.cost[seconds] = self.cost.get(seconds, 0.0) + answer["seconds"]
            self.cost |= answer.get("about", {})
        if not answer["ok"]:
            raise MethodError(answer["error"])

    def close(self) -> None:
        """End the script and remove its files."""
        if hasattr(self, "process"):
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and all that it started
            self.process.wait()
        self.folder.cleanup()


def check_peer(script: Path, python: Path | None) -> None:
    """Refuse a script that cannot be run, before any long work."""
    if not script.is_file():
        raise ValueError(f"there is no script {script}")
    if python is not None and not python.exists():
        raise ValueError(f"there is no interpreter {python}; leave `python` out to let uv make one")
    if python is None and shutil.which("uv") is None:
        raise ValueError(
            f"{script.name} runs in an environment of its own, which uv makes: pip install uv"
        )


def _digest(cells: ad.AnnData) -> str:
    """A hash of counts, names and labels."""
    x = sp.csr_matrix(cells.X)
    names = [list(map(str, cells.obs_names)), list(map(str, cells.var_names))]
    labels = cells.obs[[c for c in cells.obs if c in _WRITTEN]].to_csv(index=False)
    parts = [x.data.astype(float), x.indices.astype(np.int64), x.indptr.astype(np.int64)]
    return _hash(json.dumps(names), labels, *(p.tobytes() for p in parts))


def _hash(*parts: str | bytes) -> str:
    found = sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:32]


def _read(path: Path) -> ad.AnnData:
    found = ad.read_h5ad(path)
    for key in ("effect", "effect_sd"):
        if key in found.uns:
            # As arrays: the columns of a frame do not fit into a file's header.
            parts = {k: np.asarray(v) for k, v in found.uns[key].items()}
            found.uns[key] = pd.DataFrame(
                parts["values"], parts["perturbations"].astype(str), parts["genes"].astype(str)
            )
    return found


def _write(cells: ad.AnnData, path: Path) -> None:
    """Cells as every anndata since 0.8 reads them: labels as categories, no extension arrays."""
    obs = pd.DataFrame(index=np.asarray(cells.obs_names, dtype=object))
    for column in (c for c in _WRITTEN[:3] if c in cells.obs):
        labels = pd.Categorical(np.asarray(cells.obs[column].astype(str), dtype=object))
        categories = np.asarray(labels.categories, dtype=object)
        obs[column] = pd.Categorical.from_codes(labels.codes, categories)
    obs["library_size"] = cells.obs["library_size"].to_numpy(float)
    var = pd.DataFrame(index=np.asarray(cells.var_names, dtype=object))
    ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs, var).write_h5ad(path)


def _clean_environment() -> dict[str, str]:
    """Without what would show the peer our packages instead of its own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
