"""What training says while it runs: one named bar per stage on a terminal or in a notebook."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from tqdm.auto import tqdm

MEAN_EFFECTS, STAGE_A, ANCHOR, STAGES_BC = (
    "Mean effects: hidden in turn", "Stage A: cell states", "Anchor: out of fold",
    "Stages B and C: populations",
)  # fmt: skip


class Stage:
    """A bar, or one line at the end where nobody watches; both on stderr.

    Parameters
    ----------
    name
        Name of the stage.
    total
        Steps that it will take at most.
    shown
        Nothing is written without.
    """

    def __init__(self, name: str, total: int, shown: bool) -> None:
        self.name, self.shown, self.since = name, shown, time.perf_counter()
        self.watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.bar = tqdm(
            desc=name, total=total, disable=not (shown and self.watched), file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def advance(self, note: str = "") -> None:
        """One step; the note stands behind the bar."""
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()

    def close(self, how: str = "") -> None:
        """End the bar where it stands, or write the line."""
        if self.bar.total is not None:
            self.bar.total = self.bar.n  # stopped early, and done
        self.bar.refresh()
        self.bar.close()
        if self.shown and not self.watched:
            seconds = time.perf_counter() - self.since
            said = ", ".join(filter(None, [how, f"{seconds:.0f} s"]))
            print(f"{self.name} ({said})", file=sys.stderr, flush=True)


class StageBar(pl.Callback):
    """Shows a stage that Lightning runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage: Stage | None = None
        self.note = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = (trainer.max_epochs or 1) * int(trainer.num_training_batches)
        self.stage = Stage(self.name, steps, True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = trainer.callback_metrics
        if "holdout_error" in found:
            self.note = f", error on what is held out {float(found['holdout_error']):.3f}"

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.stage is not None:
            self.stage.advance(self.note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(f"{trainer.current_epoch} epochs")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close("stopped")

    def _close(self, how: str) -> None:
        if self.stage is not None:
            self.stage.close(how)
        self.stage = None


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence what libraries say below a warning, and of their own deprecations."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            # The teacher is, and what a stage does not train may be.
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", r".*LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
