"""Runs the grid data × split × method × seed, and keeps what is finished."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gpjepa._files import written_whole
from gpjepa.perturbations import TargetFeatures
from gpjepa.splits import Manifest, Split

from ._config import BenchmarkConfig, Data, MethodConfig
from ._methods import ORACLES, imported, is_seeded, make_method
from ._metrics import score
from ._peers import FOLDER, PEERS, Peer
from ._predictions import oracle, predict_rows
from ._published import KIND, published_scores
from ._scoring import Prediction, Scoring
from ._summary import summarise
from ._tasks import SCALE, Task, too_small

logger = logging.getLogger(__name__)
_FORMAT = 5  # of a kept cell of the grid; another number recomputes all
_DECIDING = ("gpjepa", "cell-eval2", "scvi-tools", "torch", "scikit-learn", "numpy")


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes
    ----------
    config
        What was run.
    scores
        One row per data set × split × method × seed × half of the truth × held-out row, with every
        metric.
    runs
        One row per cell of the grid: ``status`` (``"run"`` or ``"not run"``) and ``reason``,
        ``seconds_fit``, ``seconds_predict``, ``peak_memory_gb`` above what was there before, and
        ``parameters``.
    manifests
        The splits of each data set.
    dropped
        Held-out rows with too few cells to be tested: ``data``, ``split``, ``context``,
        ``perturbation``, ``n_cells``.
    """

    config: BenchmarkConfig
    scores: pd.DataFrame
    runs: pd.DataFrame
    manifests: dict[str, Manifest]
    dropped: pd.DataFrame

    def table(self, by: tuple[str, ...] = ()) -> pd.DataFrame:
        """Every metric of every method, raw and scaled, with 95% intervals.

        Parameters
        ----------
        by
            Columns of ``scores`` to stratify by, such as ``("regime",)`` or ``("size",)``.

        Returns
        -------
        pandas.DataFrame
            As :func:`gpjepa.benchmark.summarise` returns.
        """
        return summarise(self.scores, by)


def run(
    config: BenchmarkConfig | str | Path | dict[str, Any], out: str | Path, *,
    envs: str | Path | None = None, progress: bool = True,
) -> BenchmarkResult:  # fmt: skip
    """Run a benchmark, or go on with it, and write its report.

    Finished cells of the grid are kept in ``out/cells`` under a hash of all that decides them:
    cells, split, method and its options, seed, metrics, versions. A run that was stopped goes on
    where it was.

    Parameters
    ----------
    config
        A preset by name, a YAML file, a dict of the same form, or a configuration.
    out
        Directory for the kept cells, the manifests, tables and the report.
    envs
        Folder with the environments of published methods, by name, as ``gpjepa benchmark-env``
        makes them; for those whose ``python`` the configuration does not give.
    progress
        Show a progress bar.

    Returns
    -------
    BenchmarkResult

    Raises
    ------
    ValueError
        If the configuration is wrong (each key is named), or a split is empty.
    ImportError
        If the packages of the extra ``benchmark`` are not installed.
    """
    from ._cell_eval import cell_eval_config
    from ._report import write_report

    config = config if isinstance(config, BenchmarkConfig) else BenchmarkConfig.read(config)
    cell_eval_config()  # before any long work: is cell-eval2 there?
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory.")
    # All data and splits before any training: the last one may be wrong as well.
    manifests = {d.name: d.make_splits(*d.load_joined()) for d in config.data}
    for name, manifest in manifests.items():
        with written_whole(out / "splits" / f"{name}.json") as draft:
            manifest.write(draft)
    grid = _Grid(config, out / "cells", envs)
    with _bar(progress) as bar:
        for data in config.data:
            grid.run(data, manifests[data.name], bar)
    result = BenchmarkResult(
        config, pd.concat([f for f in grid.frames if len(f)], ignore_index=True),
        pd.DataFrame(grid.runs), manifests,
        pd.DataFrame(grid.dropped,
                     columns=["data", "split", "context", "perturbation", "n_cells"]),
    )  # fmt: skip
    write_report(result, out)
    return result


@dataclass
class _Grid:
    """The cells of the grid, and what was found in them so far."""

    config: BenchmarkConfig
    kept: Path
    envs: str | Path | None
    frames: list[pd.DataFrame] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def run(self, data: Data, manifest: Manifest, bar: _Bar) -> None:
        """All splits × methods × seeds of one data set."""
        cells, _ = data.load_joined()
        features, gene_sets = [f.read() for f in data.features], data.read_gene_sets()
        methods = [_placed(m, self.envs) for m in self.config.methods
                   if data.name in (m.data or [data.name])]  # fmt: skip
        pairs = [(m, s) for m in methods for s in _seeds(m, self.config.seeds)]
        bar.add(data.name, len(manifest.splits) * len(pairs))
        for split in manifest.splits:
            # Made when it is needed: a run that goes on may find everything kept.
            task = cache(partial(Task.of, cells, split, data.n_genes, gene_sets))
            self.dropped += [
                {"data": data.name, "split": split.name, "context": c, "perturbation": str(p),
                 "n_cells": n}
                for (c, p), n in too_small(cells, split).items()
            ]  # fmt: skip
            where = {"data": data.name, "split": split.name, "kind": split.kind}
            for method, seed in pairs:
                bar.tell(f"{data.name} · {split.name} · {method.title}")
                if method.not_run is not None:
                    record = {"status": "not run", "reason": method.not_run}
                    self.runs.append({**where, "method": method.title, "seed": seed, **record})
                    bar.step()
                    continue
                path = self.kept / _key(self.config, data, manifest, split, method, seed)
                scores, record = _kept(path) or _compute(
                    path, self.config, task(), method, seed, features
                )
                self.frames.append(scores.assign(**where))
                self.runs.append({**where, "method": method.title, "seed": seed, **record})
                bar.step()


def _placed(method: MethodConfig, envs: str | Path | None) -> MethodConfig:
    """A published method with the interpreter of its environment."""
    if method.name not in PEERS or method.python is not None or envs is None:
        return method
    return method.model_copy(update={"python": Path(envs) / method.name / "bin" / "python"})


def _seeds(method: MethodConfig, seeds: list[int]) -> list[int]:
    """All seeds for a method that has any use for them, else the first."""
    return seeds if is_seeded(method.name) else seeds[:1]


# Cells of the grid


def _key(
    config: BenchmarkConfig, data: Data, manifest: Manifest, split: Split, method: MethodConfig,
    seed: int,
) -> str:  # fmt: skip
    """Hash of everything that decides the scores of a cell of the grid."""
    rows = {part: [[c, str(p)] for c, p in getattr(split, part)] for part in ("train", "test")}
    decides = {
        "format": _FORMAT, "data": manifest.data_hash, "n_genes": data.n_genes, "split": rows,
        "split_seed": split.seed, "seed": seed,
        "method": method.model_dump(mode="json", exclude={"python", "data"}),
        "files": _contents(method.options),
        "metrics": config.metrics, "features": [_file_hashes(f.model_dump()) for f in data.features],
        "gene_sets": _file_hashes({"gene_sets": data.gene_sets}),
        "code": _code(method.name), "versions": {name: _version(name) for name in _DECIDING},
    }  # fmt: skip
    return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _contents(value: Any) -> list[str]:
    """Hashes of the files, and of those in the folders, that options name."""
    if isinstance(value, dict | list):
        return [
            h for v in (value.values() if isinstance(value, dict) else value) for h in _contents(v)
        ]
    path = Path(value) if isinstance(value, str) and value else None
    if path is None or not path.exists():
        return []
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [sha256(p.read_bytes()).hexdigest() for p in files]


def _file_hashes(feature: dict[str, Any]) -> list[str]:
    paths = [p for v in feature.values() for p in (v if isinstance(v, list) else [v])]
    return [sha256(p.read_bytes()).hexdigest() if isinstance(p, Path) else str(p) for p in paths]


def _code(name: str) -> str:
    """Hash of the file that holds a method of others, which may change under the same name."""
    if name in PEERS:
        script = PEERS[name].script
        files = [FOLDER / "_serve.py", FOLDER / f"run_{script}.py", *FOLDER.glob(f"{script}*.txt")]
        return sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()
    if ":" in name:
        return sha256(Path(inspect.getfile(imported(name))).read_bytes()).hexdigest()
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _kept(path: Path) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """What a finished cell holds; None, with a warning, if it is corrupt."""
    if not path.exists():
        return None
    try:
        record = json.loads((path / "run.json").read_text())
        text = (path / "scores.csv").read_bytes()
        if sha256(text).hexdigest() != record.pop("sha256"):
            raise ValueError("its scores are not those that were written")
        return pd.read_csv(path / "scores.csv", float_precision="round_trip",
                           keep_default_na=False, na_values=[""]), record  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is corrupt (%s) and is computed again.", path, error)
        shutil.rmtree(path)
        return None


def _compute(
    path: Path, config: BenchmarkConfig, task: Task, method: MethodConfig, seed: int,
    features: list[TargetFeatures],
) -> tuple[pd.DataFrame, dict[str, Any]]:  # fmt: skip
    try:
        predictions, record = _predictions(task, method, seed, features)
    except Exception as error:  # noqa: BLE001  # one method must not take the others down
        logger.warning("%s is not run on %s: %s", method.title, task.split.name, error)
        reason = f"{type(error).__name__}: {error}"
        return pd.DataFrame(), {"status": "not run", "reason": reason}
    frames = [
        _scored(task, halves[half], half, name, config.metrics).assign(seed=seed)
        for name, halves in predictions.items()
        for half in (0, 1)
    ]
    # As a kept cell is read, or the first run would differ from the second in its last digits.
    scores = pd.concat(frames, ignore_index=True)
    with written_whole(path) as draft:
        draft.mkdir()
        scores.to_csv(draft / "scores.csv", index=False)
        digest = sha256((draft / "scores.csv").read_bytes()).hexdigest()
        (draft / "run.json").write_text(json.dumps({**record, "sha256": digest}))
    kept = _kept(path)
    assert kept is not None
    return kept


def _predictions(
    task: Task, method: MethodConfig, seed: int, features: list[TargetFeatures]
) -> tuple[dict[str, tuple[Prediction, Prediction]], dict[str, Any]]:
    """Per name, a prediction for each half of the truth; and what it cost."""
    if method.name in ORACLES:
        halves = oracle(method.name, task, 0), oracle(method.name, task, 1)
        return {method.title: halves}, {"status": "run", "reason": ""}
    fitted = make_method(method.name, features, seed, method.options, method.python)
    try:
        with _cost() as fit:
            fitted.fit(task.train.copy(), task.split)
        with _cost() as predict:
            found = predict_rows(fitted, task, method.title)
    finally:
        if isinstance(fitted, Peer):
            fitted.close()
    record = {
        "status": "run", "reason": "", "seconds_fit": fit["seconds"],
        "seconds_predict": predict["seconds"],
        "peak_memory_gb": max(fit["peak_memory_gb"], predict["peak_memory_gb"]),
        "parameters": getattr(fitted, "n_parameters_", None),
    }  # fmt: skip
    return {name: (p, p) for name, p in found.items()}, record


def _scored(
    task: Task, predicted: Prediction, half: int, name: str, metrics: list[str]
) -> pd.DataFrame:
    truth = task.truths[half]
    values = score(Scoring(task, truth, predicted), metrics)
    targets = [np.isin(task.genes, p.targets) for _, p in task.rows]

    def on_targets(effect: np.ndarray) -> list[float]:
        return [float(e[t].mean()) if t.any() else np.nan
                for e, t in zip(effect, targets, strict=True)]  # fmt: skip

    sd = predicted.sd
    about = pd.DataFrame(
        {
            "method": name, "half": half, "context": [c for c, _ in task.rows],
            "perturbation": [str(p) for _, p in task.rows], "regime": task.regimes,
            "n_cells": truth.table.n_cells,
            "target_measured": on_targets(truth.table.effect[SCALE]),
            "target_predicted": on_targets(predicted.effect),
            "e_test": np.where(task.e_test < 0.05, "differs", "not significantly different from control"),
            "refused": False if predicted.refused is None else predicted.refused,
            "uncertainty": np.nan if sd is None else np.where(task.scored, sd**2, 0).sum(1),
        }
    )  # fmt: skip
    if task.split.kind == KIND:
        values = pd.concat([values, published_scores(task, predicted.effect)], axis=1)
    return pd.concat([about, values], axis=1)


@contextmanager
def _cost() -> Iterator[dict[str, float]]:
    """Seconds, and the peak of resident memory, children's too, above what was there before."""
    import psutil

    process, found = psutil.Process(os.getpid()), {"seconds": 0.0, "peak_memory_gb": 0.0}
    done = threading.Event()

    def resident() -> int:
        total = process.memory_info().rss
        for child in process.children(recursive=True):
            with suppress(psutil.Error):  # it may just have ended
                # Where it is known, without the pages that a fork shares with its parent.
                full = child.memory_full_info()
                total += getattr(full, "pss", full.rss)
        return total

    before = resident()

    def watch() -> None:
        while not done.wait(0.1):
            above = (resident() - before) / 1e9
            found["peak_memory_gb"] = max(found["peak_memory_gb"], above)

    thread = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    thread.start()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - start
        done.set()
        thread.join()


# Progress


class _Bar:
    """A progress bar over the grid, or nothing."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.task = progress, None

    def add(self, name: str, n: int) -> None:
        if self.progress is not None:
            self.task = self.progress.add_task(name, total=n)

    def tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, description=what)

    def step(self) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)


@contextmanager
def _bar(show: bool) -> Iterator[_Bar]:
    if not show:
        yield _Bar(None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns) as progress:
        yield _Bar(progress)
