"""Arguments that users of scvi-tools know by name: used, or refused with what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Any

import lightning.pytorch as pl
from scvi.train import Trainer

_HELD_OUT = (
    "what is held out are perturbations, chosen by their labels, never cells at random. To keep "
    "perturbations for a test, leave their cells out of the AnnData (gpjepa.benchmark.compare)"
)
_STOPPING = "training watches the error on held-out perturbations (early_stopping_patience=)"
_PLAN = "it is an option of a stage: plan_kwargs={{{0!r}: ...}}, pretrain_kwargs={{{0!r}: ...}}"
_ADVICE = {
    "labels_key": "perturbation_key names the perturbation, context_key the cell type or line",
    "size_factor_key": "library_size_key is the column with the counts of the whole cell",
    "categorical_covariate_keys": "batch_key and context_key are the covariates that are known",
    "continuous_covariate_keys": "batch_key and context_key are the covariates that are known",
    "use_gpu": "accelerator='gpu' or 'cpu' chooses the device",
    "train_size": _HELD_OUT,
    "validation_size": _HELD_OUT,
    "shuffle_set_split": _HELD_OUT,
    "datasplitter_kwargs": _HELD_OUT,
    "early_stopping_monitor": _STOPPING,
    "early_stopping_mode": _STOPPING,
    "early_stopping_min_delta": _STOPPING,
    "early_stopping_warmup_epochs": _STOPPING,
    "checkpointing_monitor": _STOPPING,
    "additional_val_metrics": _STOPPING,
    "load_sparse_tensor": "counts stay sparse until a mini-batch is made",
    "n_epochs": "max_epochs and pretrain_epochs are the numbers of epochs",
    "epochs": "max_epochs and pretrain_epochs are the numbers of epochs",
    **{name: _PLAN.format(name) for name in ("lr", "weight_decay")},
    "enable_checkpointing": "the best epoch is kept in any case; model.save() writes it",
    **dict.fromkeys(
        (
            "limit_val_batches",
            "limit_test_batches",
            "limit_predict_batches",
            "val_check_interval",
            "num_sanity_val_steps",
            "overfit_batches",
        ),
        _STOPPING,
    ),
    **dict.fromkeys(
        ("simple_progress_bar", "progress_bar_refresh_rate"), "enable_progress_bar=False hides bars"
    ),
    "n_epochs_kl_warmup": "there is no warm-up; plan_kwargs={'kl_weight': ...} sets the weight",
}
_TRAINER = {
    name
    for trainer in (pl.Trainer, Trainer)
    for name in inspect.signature(trainer.__init__).parameters
} - {"self", "kwargs", "early_stopping", "early_stopping_patience", *_ADVICE}


def refuse_unknown(where: str, given: Collection[str], known: Collection[str]) -> None:
    """Refuse arguments by name, with what takes their place.

    Raises
    ------
    TypeError
        Naming the first of them.
    """
    for name in given:
        if name in known:
            continue
        near = get_close_matches(name, [*known], n=1)
        hint = _ADVICE.get(name) or (f"did you mean {near[0]}=?" if near else "")
        raise TypeError(f"{where}() has no argument {name!r}" + (f": {hint}." if hint else "."))


def check_training(
    where: str,
    trainer_kwargs: Mapping[str, Any],
    parameters: Collection[str],
    devices: Any = "auto",
    **numbers: Any,
) -> None:
    """Refuse unknown arguments of the trainer, several devices, and counts that are no counts."""
    if devices not in ("auto", 1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise ValueError(
            f"devices={devices!r}: training runs on one device. Leave it out, or name one: devices=[0]."
        )
    for name in trainer_kwargs:
        if name not in _TRAINER:
            refuse_unknown(where, [name], [*parameters, *sorted(_TRAINER)])
    for name, value in numbers.items():
        epochs = name.endswith("epochs")
        least = 0 if epochs else 1
        whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        if not whole and not (epochs and value is None):
            raise ValueError(
                f"{name}={value!r}: expected a whole number from {least}"
                + (", or None for the default." if epochs else ".")
            )


def check_plan(plan: type, given: Mapping[str, Any] | None) -> None:
    """Refuse options that a stage does not have."""
    own = [
        p.name
        for p in inspect.signature(plan).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    wrong = [option for option in given or () if option not in own]
    if wrong:
        raise TypeError(
            f"{plan.__name__} has no option {', '.join(map(repr, wrong))}; its options are "
            f"{', '.join(own)}."
        )
