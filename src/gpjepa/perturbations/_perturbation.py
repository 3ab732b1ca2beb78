from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

_CONTROL_NAMES = {
    "control", "ctrl", "nt", "non-targeting", "non_targeting", "nontargeting", "neg_ctrl",
    "negative_control", "vehicle", "dmso", "unperturbed", "untreated", "none", "mock", "nc",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Perturbation:
    """A set of targets, each with a dose; the control has no targets.

    Make one with :meth:`of` or a :class:`LabelReader`: they sort the targets, so that ``A+B`` and
    ``B+A`` are equal.

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
        names = list(targets)
        amounts = [1.0] * len(names) if doses is None else [float(d) for d in doses]
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

    def label(self, separator: str = "+") -> str:
        """The perturbation as a :class:`LabelReader` with this separator reads it back."""
        if self.is_control:
            return "control"
        return separator.join(
            t if d == 1.0 else f"{t}@{np.format_float_positional(d, trim='-')}"
            for t, d in zip(self.targets, self.doses, strict=True)
        )

    def __str__(self) -> str:
        return self.label()


@dataclass(frozen=True)
class LabelReader:
    r"""Reads labels such as ``"KLF1+MAP2K6"`` into perturbations, as the user said they are written.

    Nothing is guessed: a label that looks as if it were written in another way is an error that
    proposes the call.

    Parameters
    ----------
    control
        Label or labels of control cells. They are also dropped from combinations, so that
        ``KLF1+ctrl`` is ``KLF1``.
    separator
        What stands between the targets of a combination; None for labels that hold one target each.
    strip
        Regular expression removed from every target, for guide suffixes: ``r"_g?\d+$"``; control
        guides are recognised by what is left.
    """

    control: str | Sequence[str] = "control"
    separator: str | None = "+"
    strip: str | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.control, str):
            object.__setattr__(self, "control", (self.control,))
        object.__setattr__(self, "control", tuple(str(c) for c in self.control))
        if not self.control:
            raise ValueError("`control` is empty: name the label(s) of the control cells.")
        if self.separator == "":
            raise ValueError("`separator` is empty: give a character, or None for single targets.")
        if self.strip is not None:
            re.compile(self.strip)

    def read(self, label: str | Perturbation, dose: str | float | None = None) -> Perturbation:
        """Read one label.

        Parameters
        ----------
        label
            ``"A"``, ``"A+B"``, ``"A@0.5+B"`` (``@`` gives the dose of a target), a control label,
            or a :class:`Perturbation`, which is returned as it is.
        dose
            Dose of the cell: one number for all targets, or one per target joined by the
            separator, in the order of the label: ``"0.5+1"``.

        Returns
        -------
        Perturbation
        """
        if isinstance(label, Perturbation):
            return label
        key = (label, dose)
        if key not in self._cache:
            self._cache[key] = self._read(label, dose)
        return self._cache[key]

    def _read(self, label: str, dose: str | float | None) -> Perturbation:
        if not isinstance(label, str):
            raise TypeError(f"A perturbation is a string such as 'KLF1+MAP2K6', not {label!r}.")
        if label.strip() in self.control:
            return Perturbation()
        parts = self._parts(label)
        amounts = self._doses(label, dose, len(parts))
        targets: dict[str, float] = {}
        for (name, written), amount in zip(parts, amounts, strict=True):
            if name in self.control:
                continue
            if written:
                try:
                    amount = float(written)
                except ValueError:
                    raise ValueError(
                        f"In the label {label!r}, {written!r} after '@' is not a dose."
                    ) from None
            if not name:
                raise ValueError(f"The label {label!r} has an empty target; expected e.g. 'A+B'.")
            if name in targets and targets[name] != amount:
                raise ValueError(f"The label {label!r} gives two doses for {name!r}.")
            targets[name] = amount  # two guides for the same target are that target
        return Perturbation.of(targets, targets.values())

    def _parts(self, label: str) -> list[tuple[str, str]]:
        """Target and dose of each part of a label, as written, without guide suffixes."""
        found = []
        for part in label.split(self.separator) if self.separator else [label]:
            name, at, dose = part.strip().rpartition("@")
            name = name if at else dose
            if self.strip and name not in self.control:
                name = re.sub(self.strip, "", name)
            found.append((name, dose if at else ""))
        return found

    def _doses(self, label: str, dose: str | float | None, n: int) -> list[float]:
        if dose is None:
            return [1.0] * n
        try:
            values = [float(d) for d in str(dose).split(self.separator or "+")]
        except ValueError:
            raise ValueError(f"The dose {dose!r} of {label!r} is not a number.") from None
        if len(values) not in (1, n):
            raise ValueError(f"The label {label!r} has {n} targets and the dose {dose!r}.")
        return values * n if len(values) == 1 else values

    def read_column(
        self, labels: pd.Series, doses: pd.Series | None = None, *, need_control: bool = True
    ) -> list[Perturbation]:
        """Read a column of ``.obs``, one perturbation per cell.

        Parameters
        ----------
        labels
            Labels; no value may be missing.
        doses
            Doses, read as in :meth:`read`; those of control cells are ignored.
        need_control
            Whether at least one cell must be a control cell.

        Raises
        ------
        ValueError
            If labels are missing, no cell carries a control label, or labels look as if they were
            written in a way that was not declared.
        """
        if labels.isna().any():
            raise ValueError(
                f"{int(labels.isna().sum())} cells have no perturbation in obs['{labels.name}']. "
                "Remove them, or label them (control cells carry the control label)."
            )
        text = labels.astype(str)
        unique = sorted(set(text))
        if need_control:
            self._check_control(unique, str(labels.name))
        plain = {(self.separator or "").join(name for name, _ in self._parts(u)) for u in unique}
        self._check_separator(sorted(plain), str(labels.name))
        if doses is None:
            read = {label: self.read(label) for label in unique}
            return [read[label] for label in text]
        # The dose of a control cell (0, NaN, "none") says nothing.
        return [
            Perturbation() if self._is_control(label) else self.read(label, dose)
            for label, dose in zip(text, doses, strict=True)
        ]

    def _check_control(self, unique: list[str], column: str) -> None:
        if any(self._is_control(label) for label in unique):
            return
        likely = [u for u in unique if u.lower() in _CONTROL_NAMES]
        found = ", ".join(map(repr, unique[:8])) + (" ..." if len(unique) > 8 else "")
        raise ValueError(
            f"No cell has the control label {' or '.join(map(repr, self.control))} in "
            f"obs['{column}'], which holds {found}. "
            + (
                f"Did you mean control={likely[0]!r}?"
                if likely
                else "Say which label marks control cells with control=..."
            )
        )

    def _is_control(self, label: str) -> bool:
        names = [name for name, _ in self._parts(label)]
        return label in self.control or all(name in self.control for name in names)

    def _check_separator(self, unique: list[str], column: str) -> None:
        """Refuse labels that are combinations of other labels, joined by an undeclared separator."""
        known = set(unique)
        for other in ("+", "_", ";", "|", ",", "&"):
            if other == self.separator:
                continue
            hits: list[tuple[str, str | None]] = []
            for label in unique:
                parts = [p.strip() for p in label.split(other)]
                names = [p for p in parts if p.lower() in _CONTROL_NAMES or p in self.control]
                if len(parts) == 2 and label not in self.control and len(names) == 1:
                    hits.append((label, names[0]))
                elif len(parts) > 1 and len(set(parts)) > 1 and all(p in known for p in parts):
                    hits.append((label, None))
            if hits:
                also = sorted({n for _, n in hits if n and n not in self.control})
                control = [*self.control, *also]
                said = repr(control[0]) if len(control) == 1 else repr(control)
                raise ValueError(
                    f"{len(hits)} labels in obs['{column}'] look like combinations joined by "
                    f"{other!r}, such as {hits[0][0]!r}, but the separator is "
                    f"{self.separator!r}. If they are, call with separator={other!r}, "
                    f"control={said}; if they are single targets, rename them."
                )
        likely = [
            u for u in unique if u.lower() in _CONTROL_NAMES and u not in self.control
        ]  # fmt: skip
        parts = [
            p for u in unique if self.separator for p in u.split(self.separator)
            if p.lower() in _CONTROL_NAMES and p not in self.control
        ]  # fmt: skip
        extra = sorted({*likely, *parts})
        if extra:
            raise ValueError(
                f"obs['{column}'] also holds {extra}, which look like controls, beside "
                f"{list(self.control)}. If they are, call with "
                f"control={[*self.control, *extra]!r}; if not, rename them."
            )
