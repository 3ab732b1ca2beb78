"""Published methods, each in an environment of its own, reached through files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._files import written_whole
from gpjepa.splits import Split

FOLDER = Path(__file__).parent / "peers"
TAIL = 15  # lines of a peer's log that an error shows


@dataclass(frozen=True)
class PeerInfo:
    """A published method.

    Attributes
    ----------
    script
        What runs in its environment, without ``run_`` and suffix; also its requirements.
    python
        Versions of Python that it runs on.
    reference
        Its paper.
    """

    script: str
    python: str
    reference: str


PEERS: dict[str, PeerInfo] = {
    "scGen": PeerInfo("scgen", "3.12 or newer", "Lotfollahi, Wolf, Theis 2019, through pertpy"),
    "CPA": PeerInfo("cpa", "3.11", "Lotfollahi et al. 2023"),
    "GEARS": PeerInfo("gears", "3.11", "Roohani, Huang, Leskovec 2023"),
    "scGPT": PeerInfo("scgpt", "3.11", "Cui et al. 2024"),
    "CellFlow": PeerInfo("cellflow", "3.11 or newer", "Klein et al. 2025"),
    "State": PeerInfo("state", "3.11 or 3.12", "Adduri et al. 2025"),
}


@dataclass
class Peer:
    """A method behind a script: it is started by ``fit`` and ends with this object.

    Parameters
    ----------
    script
        Script to run; see ``peers/_serve.py`` for what it reads and writes.
    python
        Interpreter of its environment.
    seed, options
        What the script gets.
    """

    script: Path
    python: Path
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Start the script and let it train."""
        self.folder = tempfile.TemporaryDirectory(prefix="gpjepa-peer-")
        here = Path(self.folder.name)
        _write(train, here / "train.h5ad")
        task = {"test": [[c, str(p)] for c, p in split.test], "seed": self.seed,
                "options": dict(self.options)}  # fmt: skip
        (here / "task.json").write_text(json.dumps(task))
        with (here / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [self.python, self.script, here], cwd=here, text=True, stderr=log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_clean_environment(),
                start_new_session=True,
            )  # fmt: skip
        self._ask("fit")

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> ad.AnnData:
        """Let it predict, and read the answer."""
        here = Path(self.folder.name)
        _write(control, here / "control.h5ad")
        (here / "wanted.json").write_text(json.dumps(list(perturbations)))
        self._ask("predict")
        return ad.read_h5ad(here / "prediction.h5ad")

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
            raise RuntimeError(
                f"{self.script.stem} ended with exit code {self.process.wait()} at {command!r}: "
                + "\n".join(log)
            )
        answer = json.loads(line)
        if not answer["ok"]:
            raise RuntimeError(answer["error"])

    def close(self) -> None:
        """End the script and remove its files."""
        if hasattr(self, "process"):
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and all that it started
            self.process.wait()
        if hasattr(self, "folder"):
            self.folder.cleanup()


def peer(name: str, python: Path | None, seed: int, options: Mapping[str, Any]) -> Peer:
    """A published method by name.

    Raises
    ------
    ValueError
        If no interpreter was given, or it does not exist; with the command that makes one.
    """
    script = PEERS[name].script
    how = f"gpjepa benchmark-env {name} --envs ENVS, then gpjepa benchmark ... --envs ENVS"
    if python is None:
        raise ValueError(f"{name} runs in an environment of its own: {how}")
    if not python.exists():
        raise ValueError(f"{name}: there is no {python}. Make it: {how}")
    return Peer(FOLDER / f"run_{script}.py", python.absolute(), seed, options)


def _write(cells: ad.AnnData, path: Path) -> None:
    """Cells as every anndata since 0.8 reads them: labels as categories, no extension arrays."""
    obs = pd.DataFrame(index=np.asarray(cells.obs_names, dtype=object))
    for column in ("perturbation", "context"):
        labels = pd.Categorical(np.asarray(cells.obs[column].astype(str), dtype=object))
        categories = np.asarray(labels.categories, dtype=object)
        obs[column] = pd.Categorical.from_codes(labels.codes, categories)
    obs["library_size"] = cells.obs["library_size"].to_numpy(float)
    var = pd.DataFrame(index=np.asarray(cells.var_names, dtype=object))
    ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs, var).write_h5ad(path)


def _clean_environment() -> dict[str, str]:
    """Without what would show the peer our packages instead of its own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}


def make_environment(
    name: str, out: Path, python: str = sys.executable, torch: str | None = None, limit: int = 1_800
) -> Path:
    """Make the environment of a published method.

    Parameters
    ----------
    name
        One of ``PEERS``.
    out
        Directory of the environment; must not exist.
    python
        Interpreter to make it with.
    torch
        Version of torch to install first, such as that of a CPU build.
    limit
        Seconds after which the installation is given up: some never resolve.

    Returns
    -------
    pathlib.Path
        Its interpreter.

    Raises
    ------
    ValueError
        If the method is not known, or the directory exists.
    RuntimeError
        If the installation fails or takes too long; nothing is left behind.
    """
    if name not in PEERS:
        raise ValueError(f"{name!r} has no environment; those with one are {', '.join(PEERS)}.")
    if out.exists():
        raise ValueError(f"{out} already exists. Choose another folder, or remove it.")
    base = FOLDER / f"{PEERS[name].script}.txt"
    bare = base.with_suffix(".no-deps.txt")
    # Under another name until all is there, so that no benchmark finds a half of it.
    with written_whole(out) as draft:
        steps: list[list[str | Path]] = [[python, "-m", "venv", draft]]
        pip: list[str | Path] = [draft / "bin" / "python", "-m", "pip", "install", "--quiet"]
        if torch is not None:
            steps.append([*pip, f"torch=={torch}"])
        steps.append([*pip, "-r", base])
        if bare.exists():
            steps.append([*pip, "--no-deps", "--ignore-requires-python", "-r", bare])
        try:
            for step in steps:
                subprocess.run(step, check=True, timeout=limit, capture_output=True, text=True,
                               env=_clean_environment())  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = error.stderr or ""
            text = said if isinstance(said, str) else said.decode()
            why = (
                f"took more than {limit} s"
                if isinstance(error, subprocess.TimeoutExpired)
                else "failed"
            )
            last = "\n".join(text.splitlines()[-TAIL:])
            raise RuntimeError(
                f"Installing {name} {why} (it runs on Python {PEERS[name].python}).\n{last}"
            ) from error
    return out / "bin" / "python"
