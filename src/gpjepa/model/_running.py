"""Runs a training plan: device, interruption, checkpoints, and what is said meanwhile."""

from __future__ import annotations

import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

_LOUD = ("lightning.pytorch", "lightning.fabric")


@dataclass(frozen=True)
class TrainingOptions:
    """How plans are run.

    Attributes
    ----------
    accelerator, devices
        As in scvi-tools.
    trainer
        Arguments of :class:`scvi.train.Trainer`.
    callbacks
        Those of ``train`` in stages B and C, those of ``pretrain`` in stage A.
    shown
        Whether progress is shown.
    checkpoints
        Where training stands, on disk; None for nowhere.
    seed
        From which every epoch's random numbers follow.
    """

    accelerator: str
    devices: Any
    trainer: Mapping[str, Any]
    callbacks: Sequence[pl.Callback]
    shown: bool
    checkpoints: Checkpoints | None
    seed: int = 0

    @classmethod
    def of(
        cls,
        checkpoints: Checkpoints | None,
        accelerator: str,
        devices: Any,
        trainer_kwargs: Mapping[str, Any],
    ) -> TrainingOptions:
        """From the arguments of training."""
        trainer = dict(trainer_kwargs)
        shown = trainer.pop("enable_progress_bar", True)
        callbacks = trainer.pop("callbacks", None) or []
        callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
        return cls(accelerator, devices, trainer, callbacks, shown, checkpoints)

    def begin(self, module: GPJEPAModule, pretrained: bool) -> TrainingOptions:
        """The same with a seed; the module is put where training that is resumed began."""
        seed = int(torch.randint(2**31 - 1, ()))
        if self.checkpoints is not None:
            seed = self.checkpoints.begin(module, seed, pretrained)
        return replace(self, seed=seed)

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
        accelerator, devices, device = parse_device_args(
            self.accelerator, self.devices, return_device="torch"
        )
        kept = None if self.checkpoints is None else self.checkpoints.of(plan)
        if kept is not None and kept.restore():
            plan.module.to(device)
            return False
        gpu = [device] if device.type == "cuda" else []
        # Epochs set the seed, which is nobody else's.
        with only_trainable(plan), torch.random.fork_rng(gpu), quiet(*_LOUD):
            trainer = Trainer(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                callbacks=[*callbacks, *([StageBar(name)] if self.shown else [])],
                enable_progress_bar=False,
                limit_val_batches=1.0 if batches.validation else 0,
                **{"log_every_n_steps": 1, "check_val_every_n_epoch": 1, **self.trainer},
            )
            with finish_on_interrupt(trainer) as interrupted:
                if kept is not None:
                    plan.keep = lambda trainer: kept.write(trainer, interrupted)
                trainer.fit(plan, batches, ckpt_path=None if kept is None else kept.there)
        plan.module.to(device).eval()
        if interrupted:
            warnings.warn(
                "Training was interrupted; the model keeps what it has learned so far.",
                UserWarning,
                stacklevel=4,
            )
        return bool(interrupted)


@contextmanager
def only_trainable(plan: Plan) -> Iterator[None]:
    """Let gradients reach what the plan trains, and nothing else."""
    trained = plan.trained()
    plan.module.train().requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        plan.module.eval().requires_grad_(True)


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

    Attributes
    ----------
    begun
        What was kept at the start of what is there: module, seed, and whether the encoder was
        trained before; None for an empty directory.
    """

    def __init__(self, directory: str | Path, resume: bool, what: Mapping[str, Any]) -> None:
        self.directory, self.what = Path(directory), dict(what)
        self.start = self.directory / "start.pt"
        self.begun: dict[str, Any] | None = None
        there = [f for f in self.directory.glob("*") if f.suffix in (".pt", ".ckpt")]
        if not there:
            return
        if not resume:
            raise ValueError(
                f"{directory} holds checkpoints of another training. Go on with it by resume=True, or "
                "choose another directory."
            )
        if self.start not in there:
            raise ValueError(
                f"{directory} has lost {self.start.name}: training cannot go on from it."
            )
        self.begun = torch.load(self.start, map_location="cpu", weights_only=True)
        found = self.begun["what"]
        other = [
            f"{k}: {found.get(k)} there, {v} here"
            for k, v in self.what.items()
            if found.get(k) != v
        ]
        if other:
            raise ValueError(
                f"The checkpoints in {directory} are of another training ({'; '.join(other)}). Call "
                "it as it was called then, with the same data, or choose another directory."
            )

    def begin(self, module: GPJEPAModule, seed: int, pretrained: bool) -> int:
        """Keep the module as it is and the seed, or take over those that were kept."""
        if self.begun is not None:
            module.load_state_dict(self.begun["module"])
            return int(self.begun["seed"])
        with written_whole(self.start) as draft:
            kept = {"module": module.state_dict(), "seed": seed, "pretrained": pretrained}
            torch.save({**kept, "what": self.what}, draft)
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
        for path in (self.path, self.finished):
            # Of a process that was killed as it wrote.
            for left in directory.glob(f".{path.name}-*"):
                shutil.rmtree(left, ignore_errors=True)

    @property
    def there(self) -> str | None:
        """What to go on from."""
        return str(self.path) if self.path.exists() else None

    def restore(self) -> bool:
        """Put a stage where it ended; False if it has not."""
        if not self.finished.exists():
            return False
        kept = torch.load(self.finished, map_location="cpu", weights_only=True)
        self.plan.cpu().load_state_dict(kept["state_dict"])
        self.plan.on_load_checkpoint(kept)
        self.plan.module.eval()
        return True

    def write(self, trainer: pl.Trainer, interrupted: Sequence[int]) -> None:
        """Keep where the stage stands; after the last epoch, the name says that it has ended.

        An epoch that was interrupted is no whole one.
        """
        stops = trainer.should_stop  # before the question who stopped it
        if interrupted:
            return
        ended = stops and trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
        last = ended or trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        with written_whole(self.finished if last else self.path) as draft:
            trainer.save_checkpoint(draft)
        if last:
            self.path.unlink(missing_ok=True)


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
