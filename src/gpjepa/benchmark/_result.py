"""What a benchmark found: its tables, kept in a directory and read from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import pandas as pd

from gpjepa._files import written_whole
from gpjepa.splits import Manifest

from ._config import BenchmarkConfig
from ._statistics import calibration, summarise, verdicts
from .metrics import METRICS

FRAMES = ("scores", "runs", "dropped")
_TEXT = (
    "data",
    "split",
    "kind",
    "method",
    "family",
    "entry",
    "role",
    "context",
    "perturbation",
    "regime",
    "status",
    "reason",
    "given",
)


def read_frame(path: Path) -> pd.DataFrame:
    """A table as it was written: names that look like numbers stay names."""
    found = pd.read_csv(
        path,
        float_precision="round_trip",
        keep_default_na=False,
        na_values=[""],
        dtype=dict.fromkeys(_TEXT, str),
    )
    return found.fillna(dict.fromkeys([c for c in _TEXT if c in found], ""))


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes
    ----------
    config
        What was run.
    scores
        One row per data set × split × method × seed × half of the truth × held-out row, with every
        metric; ``entry`` is the method's title in the configuration, ``method`` the same with what
        it calls the prediction (``"GP-JEPA (gate 0)"``), ``role`` what part it plays, ``refused``
        whether the row was not predicted and is scored as the mean response.
    runs
        One row per cell of the grid: ``method``, its ``family`` (the method's own name, whatever
        its label), ``status`` (``"run"``, ``"failed"``, ``"not run"``, or ``"not tested"`` for a
        split with too few cells) and ``reason``, ``seconds_fit``, ``seconds_predict``,
        ``peak_memory_gb`` of the method's own process, ``parameters``, and what the method was
        ``given``.
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

    def table(self, by: Sequence[str] = (), metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """Every metric of every method, raw and scaled, with 95% intervals.

        Parameters
        ----------
        by
            Columns of ``scores`` to stratify by, such as ``("regime",)`` or ``("size",)``.
        metrics
            Metrics to take; all by default.

        Returns
        -------
        pandas.DataFrame
            As :func:`gpjepa.benchmark.summarise` returns.
        """
        if not by and metrics is None:
            return self._whole.copy()
        return summarise(self.scores, by, metrics)

    @cached_property
    def _whole(self) -> pd.DataFrame:
        """It takes long, and a report asks for it more than once."""
        return summarise(self.scores)

    def verdicts(self) -> pd.DataFrame:
        """The focus beside the best other method, metric by metric; empty without a focus.

        Returns
        -------
        pandas.DataFrame
            As :func:`gpjepa.benchmark.verdicts` returns.
        """
        focus = self.config.focus
        if focus is None or focus not in set(self.scores["method"]):
            return pd.DataFrame()
        names = [m for m in METRICS if m in self.scores]
        return verdicts(self.scores, focus, self.rivals(), names)

    def rivals(self) -> list[str]:
        """Methods that the focus may be compared with: neither its variants nor oracles."""
        entries = self.scores.drop_duplicates("method").set_index("method")
        others = entries[~entries["role"].isin(["ceiling", "oracle"])]
        return [str(m) for m in others.index[others["entry"] != self.config.focus]]

    def calibration(self) -> pd.DataFrame:
        """Whether stated uncertainty is informative: :func:`gpjepa.benchmark.calibration`."""
        return calibration(self.scores)

    def failed(self, focus_only: bool = False) -> pd.DataFrame:
        """The cells of the grid on which a method failed, or the focus alone.

        A focus that was not run has failed too.
        """
        lost = self.runs[self.runs["status"] == "failed"]
        mine = self.runs[self.runs["method"] == self.config.focus]
        mine = mine[~mine["status"].isin(["run", "not tested"])]
        return mine if focus_only else pd.concat([lost, mine]).drop_duplicates()

    def save(self, out: str | Path) -> None:
        """Write the tables, the splits and the configuration, each whole or not at all.

        Parameters
        ----------
        out
            Directory; other files there stay.
        """
        out = Path(out)
        for name in FRAMES:
            with written_whole(out / f"{name}.csv") as draft:
                getattr(self, name).to_csv(draft, index=False)
        with written_whole(out / "table.csv") as draft:
            self.table().to_csv(draft, index=False)
        with written_whole(out / "config.json") as draft:
            draft.write_text(self.config.as_given())
        for name, manifest in self.manifests.items():
            with written_whole(out / "splits" / f"{name}.json") as draft:
                manifest.write(draft)

    @classmethod
    def read(cls, out: str | Path) -> Self:
        """What :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the directory holds no result.
        """
        import json

        out = Path(out)
        files = ("config.json", *(f"{n}.csv" for n in FRAMES))
        missing = [f for f in files if not (out / f).is_file()]
        if missing:
            raise ValueError(f"{out} is not the result of a benchmark: it has no {missing}.")
        frames = {n: read_frame(out / f"{n}.csv") for n in FRAMES}
        # Methods of others need not be there to read what they reached.
        config = BenchmarkConfig.model_validate(
            json.loads((out / "config.json").read_text()), context={"import": False}
        )
        manifests = {d.name: Manifest.read(out / "splits" / f"{d.name}.json") for d in config.data}
        return cls(config, frames["scores"], frames["runs"], manifests, frames["dropped"])
