from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_SPECIAL = re.compile(r"[\\+@]")


@dataclass(frozen=True, order=True)
class Perturbation:
    r"""A set of targets, each with a dose; the control has no targets.

    Make one with :meth:`of` or a :class:`LabelReader`: they sort the targets, so that ``A+B`` and
    ``B+A`` are equal. ``str`` writes it as ``"A+B@0.5"``, with a backslash before a ``+``, ``@`` or
    ``\`` that belongs to a name; :meth:`parse` reads that back exactly.

    Parameters
    ----------
    targets
        Names of the targets, sorted and without repeats.
    doses
        One dose per target, in the units of the data; 1.0 where none was given.
    """

    targets: tuple[str, ...] = ()
    doses: tuple[float, ...] = ()

    @classmethod
    def of(cls, targets: Iterable[str], doses: Iterable[float] | None = None) -> Perturbation:
        """Make a perturbation from targets in any order.

        Raises
        ------
        ValueError
            If a target repeats or is empty, or a dose is not a positive number.
        """
        if isinstance(targets, str):
            raise TypeError(f"targets={targets!r} is one name; give a list of names.")
        names = list(targets)
        amounts = [1.0] * len(names) if doses is None else [_decimal(d) for d in doses]
        if len(amounts) != len(names):
            raise ValueError(f"{len(names)} targets {names} came with {len(amounts)} doses.")
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"The targets {names} repeat or are empty; name each target once.")
        bad = [d for d in amounts if not (np.isfinite(d) and d > 0)]
        if bad:
            raise ValueError(
                f"Doses must be positive numbers, but {names} has {bad}. "
                "Cells without treatment belong to the control."
            )
        pairs = sorted(zip(names, amounts, strict=True))
        return cls(tuple(n for n, _ in pairs), tuple(d for _, d in pairs))

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """Read back what ``str`` wrote, whatever the targets are called.

        Raises
        ------
        ValueError
            If a target is empty or named twice, or a dose is not a positive number.
        """
        if text.strip() == "control":
            return cls()
        names, doses = [], []
        for part in _unescaped_split(text, "+"):
            name, *dose = _unescaped_split(part, "@")
            names.append(re.sub(r"\\(.)", r"\1", name.strip()))
            doses.append(float(dose[0]) if dose else 1.0)
        return cls.of(names, doses)

    @property
    def is_control(self) -> bool:
        """Whether nothing was perturbed."""
        return not self.targets

    @property
    def singles(self) -> tuple[Perturbation, ...]:
        """The perturbations of each target alone, at its dose."""
        return tuple(
            Perturbation((t,), (d,)) for t, d in zip(self.targets, self.doses, strict=True)
        )

    def __str__(self) -> str:
        if self.is_control:
            return "control"
        names = [_SPECIAL.sub(r"\\\g<0>", t) for t in self.targets]
        text = "+".join(n + at_dose(d) for n, d in zip(names, self.doses, strict=True))
        return "\\" + text if text == "control" else text


def _unescaped_split(text: str, mark: str) -> list[str]:
    parts = [""]
    for piece in re.findall(r"\\.|.", text, flags=re.DOTALL):
        if piece == mark:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def at_dose(dose: float) -> str:
    """How a label says the dose of a target: ``@0.5``, and nothing for 1."""
    return "" if dose == 1 else f"@{np.format_float_positional(dose, trim='-')}"


def _decimal(dose: float) -> float:
    """The decimal that was meant: single precision turns 0.1 into 0.10000000149011612."""
    single = np.float32(dose) if abs(float(dose)) < 1e38 else np.float32(np.inf)
    return float(str(single)) if float(single) == float(dose) else float(dose)
