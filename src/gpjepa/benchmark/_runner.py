"""Runs the grid data × split × method × seed, and keeps what is finished."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa._files import written_whole
from gpjepa.perturbations import TargetFeatures
from gpjepa.splits import Manifest, Split

from ._config import BenchmarkConfig, Data, MethodConfig, is_path, mapped
from ._published import KIND, published_scores
from ._result import BenchmarkResult, read_frame
from .methods import (
    MethodError,
    Prediction,
    mean_prediction,
    method_source,
    oracle,
    package_source,
    predict_rows,
)
from .metrics import METRICS, Scoring, cell_eval_config, score
from .tasks import VERSION, Task, too_small

logger = logging.getLogger(__name__)
_LIBRARIES = (
    *("cell-eval2", "scanpy", "decoupler", "scvi-tools", "torch"),
    *("scikit-learn", "scipy", "numpy", "pandas", "anndata"),
)
# What makes predictions of answers, and scores of predictions.
_SCORING = tuple(
    f"{__package__}.{m}" for m in ("methods._predict", "methods._oracles", "metrics", "_published")
)
_DROPPED = ["data", "split", "context", "perturbation", "n_cells"]
Scored = tuple[pd.DataFrame, dict[str, Any]]


def run(
    config: BenchmarkConfig | str | Path | dict[str, Any],
    out: str | Path,
    *,
    progress: bool = True,
) -> BenchmarkResult:
    """Run a benchmark, or go on with it, and write its report.

    Finished cells of the grid are kept in ``out/cells`` under a hash of all that decides them:
    cells, split, method, its options and its code, seed, metrics, versions. A run that was stopped
    goes on where it was. What scripts of published methods answer is kept in ``out/answers``, so
    that a new metric does not train them again. Every method runs in a process of its own.

    Parameters
    ----------
    config
        A preset by name, a YAML file, a dict of the same form, or a configuration.
    out
        Directory for the kept cells, the manifests, tables and the report.
    progress
        Show a progress bar.

    Returns
    -------
    BenchmarkResult

    Raises
    ------
    ValueError
        If the configuration is wrong (each key is named), a file that it names is missing, or
        nothing can be tested.
    ImportError
        If the packages of the extra ``benchmark`` are not installed.
    """
    from .report import write_report

    config = config if isinstance(config, BenchmarkConfig) else BenchmarkConfig.read(config)
    cell_eval_config()  # before any long work: is cell-eval2 there?
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory.")
    config.check()
    # All data and splits before any training: the last one may be wrong as well.
    loaded = {data.name: data.load_joined() for data in config.data}
    manifests = {d.name: d.make_splits(*loaded[d.name]) for d in config.data}
    known = {
        d.name: ([x for f in d.features for x in f.read()], d.read_gene_sets()) for d in config.data
    }
    grid = _Grid(config, out / "cells")
    with _bar(progress) as step:
        for data in config.data:
            cells, _ = loaded.pop(data.name)
            grid.run(data, cells, manifests[data.name], *known[data.name], step)
    if not grid.frames:
        reasons = sorted({r["reason"] for r in grid.runs})
        raise ValueError(f"Nothing was run: {'; '.join(reasons)}")
    result = BenchmarkResult(
        config,
        pd.concat(grid.frames, ignore_index=True),
        pd.DataFrame(grid.runs),
        manifests,
        pd.DataFrame(grid.dropped, columns=_DROPPED),
    )
    result.save(out)
    write_report(result, out)
    return result


@dataclass
class _Grid:
    """The cells of the grid, and what was found in them so far."""

    config: BenchmarkConfig
    kept: Path
    frames: list[pd.DataFrame] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        data: Data,
        cells: ad.AnnData,
        manifest: Manifest,
        features: list[TargetFeatures],
        gene_sets: dict[str, set[str]] | None,
        step: Callable[[str, float], None],
    ) -> None:
        """All splits × methods × seeds of one data set."""
        entries = self.config.on(data)
        total, done, frames = len(entries) * len(manifest.splits), 0, []
        for split in manifest.splits:
            # Made when it is needed: a run that goes on may find everything kept.
            task = cache(partial(Task.of, cells, split, data.n_genes, gene_sets))
            for (c, p), n in too_small(cells, split).items():
                self.dropped.append(
                    dict(zip(_DROPPED, [data.name, split.name, c, str(p), n], strict=True))
                )
            where = {"data": data.name, "split": split.name, "kind": split.kind}
            for method, seed in entries:
                step(f"{data.name} · {split.name} · {method.title}", done / total)
                path = self.kept / _key(self.config, data, manifest, split, method, seed)
                scores, record = self._cell(path, task, method, seed, features)
                about = {"method": method.title, "family": method.name, "seed": seed}
                self.runs.append({**where, **about, **record})
                frames.append(scores.assign(**where, failed=record["status"] == "failed"))
                done += 1
        step(data.name, 1.0)
        self.frames += _with_variants(pd.concat(frames, ignore_index=True))

    def _cell(
        self,
        path: Path,
        task: Callable[[], Task],
        method: MethodConfig,
        seed: int,
        features: list[TargetFeatures],
    ) -> Scored:
        """What one method is worth on one split; a method that fails is the mean response."""
        if method.not_run is not None:
            return pd.DataFrame(), {"status": "not run", "reason": method.not_run}
        if (found := _kept(path)) is not None:
            return found
        try:
            made = task()
        except ValueError as error:  # too few cells: no method can do anything
            return pd.DataFrame(), {"status": "not tested", "reason": str(error)}
        if not (made.has_cells or method.of_effects):
            return pd.DataFrame(), {"status": "not run", "reason": "it learns from cells"}
        if method.name in ("replicate", "interpolated duplicate") and not made.replicated:
            return pd.DataFrame(), {"status": "not run", "reason": "some were measured once only"}
        if method.is_oracle:
            halves = tuple(oracle(method.name, made, h) for h in (0, 1))
            return self._keep(path, made, method, {method.title: halves}, seed, {"given": "truth"})
        try:
            running = method.start(features, seed, self.kept.with_name("answers"))
        except ValueError as error:
            return pd.DataFrame(), {"status": "not run", "reason": str(error)}
        with running:
            try:
                running.fit(made.train.copy(), made.split)
                rows = predict_rows(running, made, method.title)
            except Exception as error:  # noqa: BLE001  # one method must not take the others down
                return self._failed(made, method, seed, error, running.cost)
            predictions = {name: (p, p) for name, p in rows.items()}
            record = {"given": method.given(features), **running.cost}
            try:
                return self._keep(path, made, method, predictions, seed, record)
            except MethodError as error:  # it is asked for its states; errors of ours are raised
                return self._failed(made, method, seed, error, running.cost)

    def _failed(
        self, task: Task, method: MethodConfig, seed: int, error: Exception, cost: dict[str, Any]
    ) -> Scored:
        logger.warning("%s failed on %s: %s", method.title, task.split.name, error)
        mean = mean_prediction(task)
        scores = self._scores(task, method, {method.title: (mean, mean)}, seed)
        return scores, {"status": "failed", "reason": str(error), **cost}

    def _scores(
        self,
        task: Task,
        method: MethodConfig,
        predictions: Mapping[str, tuple[Prediction, ...]],
        seed: int,
    ) -> pd.DataFrame:
        frames = [
            _scored(task, halves[half], half, name, self.config.metrics)
            for name, halves in predictions.items()
            for half in (0, 1)
        ]
        about = {"entry": method.title, "role": self.config.roles()[method.title], "seed": seed}
        return pd.concat(frames, ignore_index=True).assign(**about)

    def _keep(
        self,
        path: Path,
        task: Task,
        method: MethodConfig,
        predictions: Mapping[str, tuple[Prediction, ...]],
        seed: int,
        record: dict[str, Any],
    ) -> Scored:
        scores = self._scores(task, method, predictions, seed)
        record = {"status": "run", "reason": "", **record}
        with written_whole(path) as draft:
            draft.mkdir()
            scores.to_csv(draft / "scores.csv", index=False)
            digest = sha256((draft / "scores.csv").read_bytes()).hexdigest()
            (draft / "run.json").write_text(json.dumps({**record, "sha256": digest}))
        # As a kept cell is read, or the first run would differ from the second in its last digits.
        kept = _kept(path)
        assert kept is not None
        return kept


def _with_variants(scores: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows of failed splits under all names that a method's predictions have elsewhere."""
    if scores.empty:
        return []
    failed = scores["failed"].astype(bool)
    found = [scores[~failed]]
    for (kind, entry), lost in scores[failed].groupby(["kind", "entry"]):
        here = found[0][(found[0]["kind"] == kind) & (found[0]["entry"] == entry)]
        found += [lost.assign(method=name) for name in list(here["method"].unique()) or [entry]]
    return [f.drop(columns="failed") for f in found if len(f)]


# Cells of the grid


def _key(
    config: BenchmarkConfig,
    data: Data,
    manifest: Manifest,
    split: Split,
    method: MethodConfig,
    seed: int,
) -> str:
    """Hash of everything that decides the scores of a cell of the grid."""
    rows = {part: [[c, str(p)] for c, p in getattr(split, part)] for part in ("train", "test")}
    decides = {
        "task": [VERSION, manifest.data_hash, data.n_genes, rows, split.seed],
        "seed": seed,
        "method": [method.name, method.label, contents(method.options)],
        "role": config.roles()[method.title],
        "features": contents(data.features),
        "gene_sets": contents({"gene_sets": data.gene_sets}),
        "metrics": {name: METRICS[name].version for name in config.metrics},
        "code": [method_source(method.name, method.script), *map(package_source, _SCORING)],
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    return sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def contents(value: Any) -> Any:
    """A part of a configuration with the contents of files and folders in place of their names."""

    def change(leaf: Any, key: str) -> Any:
        path = Path(leaf) if is_path(leaf, key) else None
        if path is None or not path.exists():
            return leaf
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [sha256(p.read_bytes()).hexdigest() for p in files]

    return mapped(value, change)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _kept(path: Path) -> Scored | None:
    """What a finished cell holds; None, with a warning, if it is corrupt."""
    if not path.exists():
        return None
    try:
        record = json.loads((path / "run.json").read_text())
        text = (path / "scores.csv").read_bytes()
        if sha256(text).hexdigest() != record.pop("sha256"):
            raise ValueError("its scores are not those that were written")
        scores = read_frame(path / "scores.csv")
        return scores, record
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is corrupt (%s) and is computed again.", path, error)
        shutil.rmtree(path)
        return None


def _scored(
    task: Task, predicted: Prediction, half: int, name: str, metrics: list[str]
) -> pd.DataFrame:
    """Scores of a prediction on one half of the truth, one row per row of the task."""
    truth, sd = task.truths[half], predicted.sd
    values = score(Scoring(task, truth, predicted), metrics)

    def on_targets(effect: np.ndarray) -> list[float]:
        pairs = zip(effect, ~task.scored, strict=True)
        return [float(e[t].mean()) if t.any() else np.nan for e, t in pairs]

    about = pd.DataFrame(
        {
            "method": name,
            "half": half,
            "context": [c for c, _ in task.rows],
            "perturbation": [str(p) for _, p in task.rows],
            "regime": task.regimes,
            "n_cells": truth.table.n_cells,
            "target_measured": on_targets(truth.effect),
            "target_predicted": on_targets(predicted.effect),
            "e_test": _e_test(task),
            "refused": False if predicted.refused is None else predicted.refused,
            "uncertainty": np.nan if sd is None else np.where(task.scored, sd**2, 0).sum(1),
        }
    )
    if task.split.kind == KIND:
        values = pd.concat([values, published_scores(task, predicted.effect)], axis=1)
    return pd.concat([about, values], axis=1)


def _e_test(task: Task) -> np.ndarray:
    if not task.has_cells:
        return np.full(len(task.rows), "not tested: no cells")
    same = "not significantly different from control"
    return np.where(task.e_test < 0.05, "differs", same)


@contextmanager
def _bar(show: bool) -> Iterator[Callable[[str, float], None]]:
    """A progress bar per data set: what is being done, and which share is done."""
    if not show:
        yield lambda what, share: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:

        def step(what: str, share: float) -> None:
            if share == 0 or not progress.tasks:
                progress.add_task(what, total=1.0)
            last = progress.tasks[-1].id
            progress.update(last, description=what, completed=share)

        yield step
