"""Runs a training plan: device, interruption, checkpoints, and what is said meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from scvi.model._utils import parse_device_args
from scvi.train import Trainer

from gpjepa._files import written_whole

from ._batches import Batches
from ._module import GPJEPAModule
from ._plan import Plan
from ._progress import StageBar, quiet


@dataclass(frozen=True)
class TrainingOptions:
    """How plans are run.

    Attributes
    ----------
    trainer
        Arguments of :class:`scvi.train.Trainer`.
    seed
        From which every epoch's random numbers follow.
    checkpoints
        Where training stands, on disk; None for nowhere.
    accelerator, devices
        As in scvi-tools.
    shown
        Whether progress is shown.
    """

    seed: int
    checkpoints: Checkpoints | None = None
    accelerator: str = "auto"
    devices: Any = "auto"
    shown: bool = True
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        name: str,
        plan: Plan,
        batches: Batches,
        max_epochs: int,
        callbacks: Sequence[pl.Callback] = (),
    ) -> bool:
        """Run a plan, or go on with it; whether it was interrupted.

        Parameters
        ----------
        name
            What the stage is called.
        plan, batches, max_epochs
            What is trained, on what, for how long.
        callbacks
            More of them.
        """
        plan.seed = batches.sampler.seed = self.seed
        kept = None if self.checkpoints is None else self.checkpoints.of(plan)
        if kept is not None:
            if kept.restore():
                return False
            plan.keep = kept.write
        callbacks = [*callbacks, *([StageBar(name)] if self.shown else [])]
        accelerator, devices, device = parse_device_args(
            self.accelerator, self.devices, return_device="torch"
        )
        trained = plan.trained()
        plan.module.train().requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        # Epochs set the seed, which is nobody else's.
        with quiet("lightning.pytorch", "lightning.fabric"), torch.random.fork_rng(devices=[]):
            trainer = Trainer(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                callbacks=callbacks,
                enable_progress_bar=False,
                limit_val_batches=1.0 if batches.validation else 0,
                **{"log_every_n_steps": 1, "check_val_every_n_epoch": 1, **self.trainer},
            )
            with finish_on_interrupt(trainer) as interrupted:
                trainer.fit(plan, batches, ckpt_path=None if kept is None else kept.there)
        plan.module.to(device).eval().requires_grad_(True)
        if interrupted:
            warnings.warn(
                "Training was interrupted; the model keeps what it has learned so far.",
                UserWarning,
                stacklevel=4,
            )
        elif kept is not None:
            kept.finish()
        return bool(interrupted)


class Checkpoints:
    """Where training stands, in a directory: the start, and each stage after its last epoch.

    Parameters
    ----------
    directory
        Directory.
    resume
        Whether to go on with what is there.
    what
        What is trained, in comparable values: going on with anything else is refused.
    """

    def __init__(self, directory: str | Path, resume: bool, what: Mapping[str, Any]) -> None:
        self.directory, self.what = Path(directory), dict(what)
        self.start = self.directory / "start.pt"
        if not self.start.exists():
            return
        if not resume:
            raise ValueError(
                f"{directory} holds checkpoints of another training. Go on with it by resume=True, or "
                "choose another directory."
            )
        found = torch.load(self.start, weights_only=True)["what"]
        other = [
            f"{k}: {found.get(k)} there, {v} here"
            for k, v in self.what.items()
            if found.get(k) != v
        ]
        if other:
            raise ValueError(
                f"The checkpoints in {directory} are of another training ({'; '.join(other)}). Call "
                "train as it was called then, with the same data, or choose another directory."
            )

    def begin(self, module: GPJEPAModule, seed: int) -> int:
        """Keep the module as it is and the seed, or take over those that were kept."""
        if self.start.exists():
            kept = torch.load(self.start, weights_only=True)
            module.load_state_dict(kept["module"])
            return int(kept["seed"])
        with written_whole(self.start) as draft:
            torch.save({"module": module.state_dict(), "seed": seed, "what": self.what}, draft)
        return seed

    def of(self, plan: Plan) -> StageCheckpoint:
        """That of a stage."""
        return StageCheckpoint(plan, self.directory)


class StageCheckpoint:
    """Writes where a stage stands after every epoch: whole, or not at all."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.path = directory / f"{plan.stage}.ckpt"
        self.finished = directory / f"{plan.stage}-finished.ckpt"

    @property
    def there(self) -> str | None:
        """What to go on from."""
        return str(self.path) if self.path.exists() else None

    def restore(self) -> bool:
        """Put a stage where it ended; False if it has not."""
        if not self.finished.exists():
            return False
        kept = torch.load(self.finished, map_location="cpu", weights_only=True)
        self.plan.load_state_dict(kept["state_dict"])
        self.plan.on_load_checkpoint(kept)
        self.plan.module.eval()
        return True

    def write(self, trainer: pl.Trainer) -> None:
        """Keep where the stage stands."""
        with written_whole(self.path) as draft:
            trainer.save_checkpoint(draft)

    def finish(self) -> None:
        """Say that the stage has ended, by the name of the file."""
        if self.path.exists():
            os.replace(self.path, self.finished)


@contextmanager
def finish_on_interrupt(trainer: pl.Trainer) -> Iterator[list[int]]:
    """Let Ctrl-C end training after the current step; a second one interrupts at once.

    Lightning answers the first by ``sys.exit``, which would lose the model. Yields a list that is
    not empty once training was interrupted.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def stop(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        trainer.should_stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
