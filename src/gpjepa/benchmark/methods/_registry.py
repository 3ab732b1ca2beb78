"""Methods by name, and what part each plays in a report."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpjepa.effects import (
    Additive,
    KernelRidge,
    LargerSingle,
    LinearModel,
    MatchingMean,
    MeanEffect,
    NearestPerturbation,
    NoChange,
    OtherDose,
    ShrunkenAdditive,
    ShrunkenMean,
    Transfer,
)
from gpjepa.perturbations import TargetFeatures

from . import _effects as effects
from ._oracles import ORACLES
from ._protocol import Method

Features = Sequence[TargetFeatures]
Role = Literal["floor", "ceiling", "oracle", "negative", "method"]
FLOOR, CEILING = "mean", "replicate"
_RESPONSE = f"{__package__}._response"


@dataclass(frozen=True)
class Known:
    """A method of our own.

    Attributes
    ----------
    make
        From features of the targets, a seed and options to the method.
    seeded
        Whether another seed changes it.
    negative
        Whether it is a negative control: where it wins, the metric or the split says nothing.
    takes_features
        Whether it makes use of features of the targets.
    options
        What takes its options; None if it has none.
    module
        Where its code is; what this imports decides whether kept results are still valid.
    """

    make: Callable[[Features, int, dict[str, Any]], Method]
    seeded: bool = False
    negative: bool = False
    takes_features: bool = False
    options: Callable[..., Any] | None = None
    module: str = effects.__name__

    @property
    def of_effects(self) -> bool:
        """Whether it learns from mean effects alone, and needs no cells."""
        return self.module in (effects.__name__, _RESPONSE)


def _gpjepa(features: Features, seed: int, options: dict[str, Any]) -> Method:
    from ._gpjepa import GPJEPAMethod

    return GPJEPAMethod(features, seed, **options)


def _response(features: Features, seed: int, options: dict[str, Any]) -> Method:
    from ._response import ResponseMethod

    return ResponseMethod(features, **options)


def _plain(kind: Callable[..., Any], **about: Any) -> Known:
    about = {"options": kind, **about}
    return Known(lambda f, s, o: effects.baseline(lambda: kind(**o)), **about)


METHODS: dict[str, Known] = {
    "no change": _plain(NoChange, negative=True),
    "mean": _plain(MeanEffect, negative=True),
    "shrunken mean": _plain(ShrunkenMean),
    "matching mean": _plain(MatchingMean, negative=True),
    "additive": _plain(Additive),
    "shrunken additive": _plain(ShrunkenAdditive),
    "larger single": _plain(LargerSingle),
    "linear": Known(lambda f, s, o: effects.linear(**o), options=LinearModel),
    "kernel ridge": Known(
        lambda f, s, o: effects.of_features(KernelRidge, f, **o),
        takes_features=True,
        options=KernelRidge,
    ),
    "nearest": Known(
        lambda f, s, o: effects.of_features(NearestPerturbation, f), takes_features=True
    ),
    "transfer": _plain(Transfer),
    "other dose": _plain(OtherDose),
    "anchor": Known(lambda f, s, o: effects.anchor(f), takes_features=True),
    "response": Known(
        _response,
        takes_features=True,
        options=lambda gate="auto": None,
        module=_RESPONSE,
    ),
    "permuted labels": Known(
        lambda f, s, o: effects.permuted_labels(f, s),
        seeded=True,
        negative=True,
        takes_features=True,
    ),
    "random features": Known(
        lambda f, s, o: effects.random_features(s), seeded=True, negative=True
    ),
    "mean plus noise": Known(lambda f, s, o: effects.noisy_mean(s), seeded=True, negative=True),
    "GP-JEPA": Known(_gpjepa, seeded=True, takes_features=True, module=f"{__package__}._gpjepa"),
}
"""Methods of our own by name."""

NEGATIVE = tuple(name for name, known in METHODS.items() if known.negative)
"""Negative controls: a metric or a split on which one of them wins says nothing."""


def role_of(name: str) -> Role:
    """The part that a method plays in a report, by what it is and not by what it is called."""
    if name == FLOOR:
        return "floor"
    if name in ORACLES:
        return "ceiling" if name == CEILING else "oracle"
    return "negative" if name in NEGATIVE else "method"


def make_method(name: str, features: Features, seed: int, options: Mapping[str, Any]) -> Method:
    """A method by name, or by where it can be imported from.

    A class of others gets its options, and ``features`` and ``seed`` if it has such parameters.
    """
    if name in METHODS:
        return METHODS[name].make(features, seed, dict(options))
    kind = imported(name)
    offered = {"features": features, "seed": seed}
    taken = inspect.signature(kind).parameters
    return kind(**{k: v for k, v in offered.items() if k in taken}, **options)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have.

    Raises
    ------
    ValueError
        Naming what it has.
    """
    if name == "GP-JEPA":
        from gpjepa.model import GPJEPA

        from ._gpjepa import GPJEPAMethod

        _check_call("", GPJEPAMethod, options)
        _check_call("model: ", GPJEPA, options.get("model") or {})
        _check_train(options.get("train") or {})
        gates = set(options.get("gates") or ()) - {"auto", 0, 1}
        if gates:
            raise ValueError(f"gates: {sorted(map(str, gates))} are none of 'auto', 0 and 1")
    elif name in METHODS or name in ORACLES:
        known = METHODS.get(name)
        _check_call("", None if known is None else known.options, options)
        if options.get("gate", "auto") not in ("auto", 0, 1):
            raise ValueError(f"gate: {options['gate']!r} is none of 'auto', 0 and 1")
    else:
        _check_call("", imported(name), options)


def _check_train(options: Mapping[str, Any]) -> None:
    """Arguments of ``train`` and of Lightning's trainer, as ``train`` itself checks them."""
    from gpjepa.model import GPJEPA, Ablation, ActionPlan, PretrainPlan
    from gpjepa.model._arguments import check_plan, check_training

    known = inspect.signature(GPJEPA.train).parameters
    try:
        check_training("train", {k: v for k, v in options.items() if k not in known}, known)
        check_plan(ActionPlan, options.get("plan_kwargs"))
        check_plan(PretrainPlan, options.get("pretrain_kwargs"))
        Ablation.of((options.get("pretrain_kwargs") or {}).get("ablation"))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_call(where: str, takes: Callable[..., Any] | None, options: Mapping[str, Any]) -> None:
    parameters = {} if takes is None else inspect.signature(takes).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = sorted(set(parameters) - {"self", "features", "seed", "adata", "scale"})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{where}no options {unknown}; it has {known or 'none'}")


def imported(name: str) -> type:
    """The class that ``"package.module:Class"`` names.

    Raises
    ------
    ValueError
        If it cannot be imported or is no method.
    """
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    lacking = [f for f in ("fit", "predict") if not callable(getattr(kind, f, None))]
    if lacking:
        raise ValueError(f"{name!r} is no method: it has no {' and no '.join(lacking)}")
    return kind


def is_seeded(name: str) -> bool:
    """Whether another seed changes a method."""
    if name in METHODS:
        return METHODS[name].seeded
    return name not in ORACLES and "seed" in inspect.signature(imported(name)).parameters


def takes_features(name: str) -> bool:
    """Whether a method makes use of features of the targets."""
    if name in METHODS:
        return METHODS[name].takes_features
    return name not in ORACLES and "features" in inspect.signature(imported(name)).parameters
