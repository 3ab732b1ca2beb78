from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import pandas as pd

from ._perturbation import Perturbation, at_dose

NO_LABEL = "nan"
"""What a missing value is called in ``drop`` and in messages."""
_MICROMOLAR = {"pM": 1e-6, "nM": 1e-3, "uM": 1.0, "µM": 1.0, "μM": 1.0, "mM": 1e3, "M": 1e6}


@dataclass(frozen=True)
class LabelReader:
    r"""Reads labels such as ``"KLF1+MAP2K6"`` into perturbations, as the user said they are written.

    Nothing is guessed: a column that looks as if it were written in another way is refused with
    the call that would read it.

    Parameters
    ----------
    control
        Label or labels of control cells. A string is a label, whatever it contains; a compiled
        regular expression stands for all labels that it matches whole. Controls are also dropped
        from combinations, so that ``KLF1+ctrl`` is ``KLF1``.
    separator
        What stands between the targets of a combination; None for labels that hold one target each.
    strip
        Regular expression removed from every target, for guide suffixes: ``r"_g\d+$"``. Control
        guides are recognised by what is left. What it matches across a separator is removed before
        the label is split.
    drop
        Labels (or compiled regular expressions) of cells to leave out: ``"unassigned"``; ``"nan"``
        for those without a label.
    rename
        Targets with another spelling: ``{"klf1": "KLF1"}``; a list stands for several targets.
    targets
        Names that are targets although they do not look like it: ``"negative"``, ``"NAD+"``.
    dose_pattern
        Regular expression with a group ``dose`` (a number) and perhaps ``unit``, for doses inside
        labels: ``r"_(?P<dose>[\d.]+)(?P<unit>\w+)$"`` reads ``JQ1_10uM``. What it matches is taken
        off the target. If it has a group ``target`` too, every match in a label is one target.
        Molar units become micromolar.
    """

    control: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = "control"
    separator: str | None = "+"
    strip: str | None = None
    drop: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = ()
    rename: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    targets: Collection[str] = ()
    dose_pattern: str | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("control", "drop"):  # checked once, then looked up for every label
            object.__setattr__(self, name, _labels(getattr(self, name), name))
        if not self.control:
            raise ValueError("control is empty: name the label(s) of the control cells.")
        if isinstance(self.targets, str):
            raise TypeError(f"targets={self.targets!r} is one name; give a list of names.")
        if not isinstance(self.rename, Mapping):
            raise TypeError(f"rename={self.rename!r}: expected a dict of old names to new ones.")
        object.__setattr__(self, "targets", frozenset(self.targets))
        if self.separator is not None and not isinstance(self.separator, str):
            raise TypeError(f"separator={self.separator!r}: expected text, or None.")
        if self.separator == "":
            raise ValueError("separator is empty: give a character, or None for single targets.")
        for name in ("strip", "dose_pattern"):
            _check_pattern(getattr(self, name), name)
        if self.dose_pattern and "dose" not in re.compile(self.dose_pattern).groupindex:
            raise ValueError(
                f"dose_pattern={self.dose_pattern!r} has no group (?P<dose>...) for the number."
            )

    @property
    def controls(self) -> tuple[str | re.Pattern[str], ...]:
        """Labels and patterns of control cells."""
        return _labels(self.control, "control")

    @property
    def dropped(self) -> tuple[str | re.Pattern[str], ...]:
        """Labels and patterns of cells that are left out."""
        return _labels(self.drop, "drop")

    @property
    def declared(self) -> frozenset[str]:
        """Names that are targets whatever they look like."""
        return frozenset(self.targets)

    @classmethod
    def from_setup(cls, arguments: Mapping[str, Any]) -> Self:
        """The reader that the arguments of :meth:`gpjepa.GPJEPA.setup_anndata` describe."""
        names = {f.name for f in fields(cls) if f.init}
        always = {"control", "separator"}  # of the others, None is the default
        return cls(
            **{k: v for k, v in arguments.items() if k in names and (v is not None or k in always)}
        )

    def read(
        self, label: str | Perturbation, dose: str | float | None = None
    ) -> Perturbation | None:
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
            None for a label in ``drop``.
        """
        if isinstance(label, Perturbation):
            return label
        key = (label, dose)
        if key not in self._cache:
            self._cache[key] = self._read(label, dose)
        return self._cache[key]

    def _read(self, label: str, dose: str | float | None) -> Perturbation | None:
        if not isinstance(label, str):
            raise TypeError(
                f"A perturbation is text such as 'KLF1+MAP2K6' or a Perturbation, not {label!r}."
            )
        if self.drops(label):
            return None
        if self.is_control(label):  # its dose (0, NaN, "none") says nothing
            return Perturbation()
        parts = self.parts(label)
        amounts = self._doses(label, dose, len(parts))
        found: dict[str, float] = {}
        for (name, written), amount in zip(parts, amounts, strict=True):
            if _matches(name, self.control):
                continue
            if not name:
                raise ValueError(f"The label {label!r} has an empty target; expected e.g. 'A+B'.")
            amount = amount if written is None else written
            for target in self._renamed(name):
                if found.setdefault(target, amount) != amount:
                    raise ValueError(f"The label {label!r} gives two doses for {target!r}.")
        return Perturbation.of(found, found.values())

    def drops(self, label: str) -> bool:
        """Whether cells with this label are left out."""
        return _matches(label.strip(), self.drop)

    def is_control(self, label: str) -> bool:
        """Whether this is a label of control cells."""
        if _matches(label.strip(), self.control):
            return True
        return all(_matches(name, self.control) for name, _ in self.parts(label))

    def parts(self, label: str) -> list[tuple[str, float | None]]:
        """Name and dose of each part of a label, controls too, in the order written."""
        text = label.strip()
        if text in self.targets:
            return [(text, None)]
        separator = self.separator
        pattern = re.compile(self.dose_pattern) if self.dose_pattern else None
        if pattern and "target" in pattern.groupindex:
            if found := [*pattern.finditer(text)]:
                return [(m["target"], _amount(m, label)) for m in found]
        if self.strip and separator:
            text = re.sub(self.strip, lambda m: "" if separator in m[0] else m[0], text)
        pieces = text.split(separator) if separator else [text]
        return [self._part(piece.strip(), label, pattern) for piece in pieces]

    def _part(
        self, piece: str, label: str, pattern: re.Pattern[str] | None
    ) -> tuple[str, float | None]:
        if piece in self.targets or _matches(piece, self.control):
            return piece, None
        name, at, written = piece.rpartition("@")
        dose = number(written, label) if at else None
        name = name if at else written
        if pattern and "target" not in pattern.groupindex and (match := pattern.search(name)):
            dose = _amount(match, label)
            name = name[: match.start()] + name[match.end() :]
        if self.strip and not _matches(name, self.control):
            name = re.sub(self.strip, "", name)
        return name, dose

    def _renamed(self, name: str) -> Sequence[str]:
        new = self.rename.get(name, name)
        return [new] if isinstance(new, str) else new

    def _doses(self, label: str, dose: str | float | None, n: int) -> list[float]:
        if dose is None:
            return [1.0] * n
        values = [number(d, label) for d in str(dose).split(self.separator or "+")]
        if len(values) not in (1, n):
            raise ValueError(f"The label {label!r} has {n} targets and the dose {dose!r}.")
        return values * n if len(values) == 1 else values

    # Back to text

    def write(self, perturbation: Perturbation) -> str:
        """A label that reads as this perturbation."""
        if perturbation.is_control:
            return next((c for c in self.controls if isinstance(c, str)), "control")
        pairs = zip(perturbation.targets, perturbation.doses, strict=True)
        return (self.separator or "+").join(t + at_dose(d) for t, d in pairs)

    def spelling(self, label: str, dose: str | float | None = None) -> str:
        """What results call this label: itself, less what ``strip`` and ``rename`` change.

        Names keep the order in which they are written.
        """
        perturbation = self.read(label, dose)
        words = [c for c in self.controls if isinstance(c, str)]
        plain = replace(self, strip=None, rename={}, control=words or ("control",))
        if dose is None or (perturbation is not None and perturbation.is_control):
            try:
                if plain.read(label) == perturbation:
                    return label.strip()
            except ValueError:
                pass
        if perturbation is None or perturbation.is_control:
            return self.parts(label)[0][0]
        amount = dict(zip(perturbation.targets, perturbation.doses, strict=True))
        names = dict.fromkeys(t for name, _ in self.parts(label) for t in self._renamed(name))
        return (self.separator or "+").join(t + at_dose(amount[t]) for t in names if t in amount)

    # Columns

    def read_column(
        self, labels: pd.Series, doses: pd.Series | None = None, *, genes: Collection[str] = (),
        need_control: bool = True,
    ) -> list[Perturbation | None]:  # fmt: skip
        """Read a column of ``.obs``, one perturbation per cell.

        Parameters
        ----------
        labels
            Labels. Missing ones are called ``"nan"``.
        doses
            Doses, read as in :meth:`read`; those of control cells are ignored.
        genes
            Names of the measured genes: they help to see what a label means.
        need_control
            Whether at least one cell must be a control cell.

        Returns
        -------
        list
            None for cells whose label is in ``drop``.

        Raises
        ------
        ValueError
            If no cell carries a control label, or labels look as if they were written in a way
            that was not declared; the message proposes the call (:doc:`/your-data`).
        """
        return self.checked(labels, genes=genes, need_control=need_control).read_cells(
            labels, doses
        )

    def checked(
        self, labels: pd.Series, *, genes: Collection[str] = (), need_control: bool = True
    ) -> Self:
        """Check a column; the reader that comes back also knows names that hold the separator.

        Raises
        ------
        ValueError
            As :meth:`read_column`.
        """
        from ._kinds import check_labels

        counts = Counter(_text(labels))
        names = check_labels(
            self, str(labels.name), counts, frozenset(map(str, genes)), need_control
        )
        return replace(self, targets=self.declared | names) if names else self

    def read_cells(
        self, labels: pd.Series, doses: pd.Series | None = None, *,
        unreadable: Literal["error"] | None = "error",
    ) -> list[Perturbation | None]:  # fmt: skip
        """As :meth:`read_column`, of labels that were checked or need not be.

        With ``unreadable=None``, a label that cannot be read is one in ``drop``.
        """
        keys = list(
            zip(_text(labels), [None] * len(labels) if doses is None else doses, strict=True)
        )
        read: dict[tuple, Perturbation | None] = {}
        for key in set(keys):
            try:
                read[key] = self.read(*key)
            except ValueError:
                if unreadable == "error":
                    raise
                read[key] = None
        return [read[key] for key in keys]

    def spellings(
        self, labels: pd.Series, doses: pd.Series | None = None
    ) -> dict[Perturbation, str]:
        """What results call each perturbation: as most of its cells are labelled."""
        keys = _text(labels) if doses is None else list(zip(_text(labels), doses, strict=True))
        counts: dict[Perturbation, Counter[str]] = {}
        for key, n in Counter(keys).items():
            label, dose = key if isinstance(key, tuple) else (key, None)
            perturbation = self.read(label, dose)
            if perturbation is not None:
                counts.setdefault(perturbation, Counter())[self.spelling(label, dose)] += n
        return {p: min(found, key=lambda s: (-found[s], s)) for p, found in counts.items()}


def number(text: str, label: str) -> float:
    """A dose, or what is wrong with it."""
    try:
        return float(text)
    except ValueError:
        pass
    hint = ""
    if re.fullmatch(r"\s*\d+,\d+\s*", text):
        hint = f" Write it with a point: {text.strip().replace(',', '.')}."
    elif match := re.match(r"\s*[\d.]+\s*([^\d\s.]\S*)\s*$", text):
        hint = f" Give numbers in one unit for all cells, without {match[1]!r}."
    raise ValueError(f"In {label!r}, the dose {text!r} is not a number.{hint}") from None


def _amount(match: re.Match[str], label: str) -> float:
    """The dose that a pattern found, molar units as micromolar."""
    unit = match.groupdict().get("unit")
    return number(match["dose"], label) * _MICROMOLAR.get(unit or "", 1.0)


def _text(labels: pd.Series) -> list[str]:
    return labels.astype(object).where(labels.notna(), NO_LABEL).astype(str).tolist()


def _labels(given: Any, name: str) -> tuple[str | re.Pattern[str], ...]:
    several = [given] if isinstance(given, str | re.Pattern) or given is None else given
    if not isinstance(several, list | tuple | set | frozenset):
        several = [several]
    for label in several:
        if label is None:
            raise TypeError(
                f"{name}=None: expected a label, as text."
                + (" For cells without labels, perturbation_key=None." if name == "control" else "")
            )
        if not isinstance(label, str | re.Pattern):
            raise TypeError(
                f"{name}={label!r} is not text. Labels are compared as text: {name}={str(label)!r}."
            )
    return tuple(several)


def _matches(text: str, labels: Any) -> bool:
    return any(
        label == text if isinstance(label, str) else label.fullmatch(text) is not None
        for label in labels
    )


def _check_pattern(pattern: str | None, name: str) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, str):
        raise TypeError(f"{name}={pattern!r}: expected a regular expression as text, or None.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}.") from error
