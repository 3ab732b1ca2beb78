from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, cast

import pandas as pd

from ._kinds import check_labels
from ._perturbation import Perturbation, at_dose

NO_LABEL = "nan"
"""What a missing value is called in ``drop`` and in messages."""
_PREFIXES = {"p": 1e-6, "n": 1e-3, "u": 1.0, "µ": 1.0, "μ": 1.0, "m": 1e3, "": 1e6}
UNITS = {prefix + unit: factor for unit in "Mg" for prefix, factor in _PREFIXES.items()}
"""Units of doses inside labels, in micromolar or micrograms (per millilitre)."""


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
        Molar units become micromolar, and masses (per millilitre) micrograms.
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
        if not isinstance(self.rename, Mapping) or not all(map(_is_name, self.rename.values())):
            raise TypeError(
                f"rename={self.rename!r}: expected a dict of old names to new ones, or to lists of "
                "new ones for several targets."
            )
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
        return cast(tuple[str | re.Pattern[str], ...], self.control)

    @property
    def dropped(self) -> tuple[str | re.Pattern[str], ...]:
        """Labels and patterns of cells that are left out."""
        return cast(tuple[str | re.Pattern[str], ...], self.drop)

    @property
    def declared(self) -> frozenset[str]:
        """Names that are targets whatever they look like."""
        return cast(frozenset[str], self.targets)

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
            if not name:
                raise ValueError(f"The label {label!r} has an empty target; expected e.g. 'A+B'.")
            amount = amount if written is None else written
            for target in self._renamed(name):
                if _matches(target, self.control):
                    continue
                if amount != amount:
                    raise ValueError(f"The label {label!r} has no dose.")
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
        try:
            names = [new for name, _ in self.parts(label) for new in self._renamed(name)]
        except ValueError:  # of a dose that cannot be read
            return False
        return all(_matches(name, self.control) for name in names)

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
        return [self._part(piece.strip(), label, pattern) for piece in self._split(text)]

    def _split(self, text: str) -> list[str]:
        """The pieces between separators; declared names that hold a separator stay whole."""
        if self.separator is None:
            return [text]
        end = re.escape(self.separator)
        pad = "" if self.separator.isspace() else r"\s*"
        whole = sorted((t for t in self.declared if self.separator in t), key=len, reverse=True)
        names = [rf"{pad}{re.escape(name)}{pad}(?={end}|$)" for name in whole]
        piece = re.compile("|".join([*names, rf"(?:(?!{end}).)*"]), re.DOTALL)
        pieces, start = [], 0
        while match := piece.match(text, start):
            pieces.append(match[0])
            if match.end() >= len(text):
                break
            start = match.end() + len(self.separator)
        return pieces

    def _part(
        self, piece: str, label: str, pattern: re.Pattern[str] | None
    ) -> tuple[str, float | None]:
        if piece in self.targets or _matches(piece, self.control):
            return piece, None
        dose, name = None, piece
        if pattern and "target" not in pattern.groupindex and (match := pattern.search(piece)):
            dose = _amount(match, label)
            name = piece[: match.start()] + piece[match.end() :]
        elif "@" in piece:
            name, _, written = piece.rpartition("@")
            dose = number(written, label)
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
        self,
        labels: pd.Series,
        doses: pd.Series | None = None,
        *,
        genes: Collection[str] = (),
        need_control: bool = True,
    ) -> list[Perturbation | None]:
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
        values = _text(labels)
        counts = Counter(label for label in values if isinstance(label, str))
        if not counts:
            return self  # perturbations, not labels
        need_control &= Perturbation() not in values
        names = check_labels(
            self, str(labels.name), counts, frozenset(map(str, genes)), need_control
        )
        return replace(self, targets=self.declared | names) if names else self

    def read_cells(
        self,
        labels: pd.Series,
        doses: pd.Series | None = None,
        *,
        unreadable: Literal["error"] | None = "error",
    ) -> list[Perturbation | None]:
        """As :meth:`read_column`, of labels that were checked or need not be.

        With ``unreadable=None``, a label that cannot be read is one in ``drop``.
        """
        keys = self._keys(labels, doses)
        if unreadable == "error":
            self._check_doses(keys, doses)
        read: dict[tuple, Perturbation | None] = {}
        for key in set(keys):
            try:
                read[key] = self.read(*key)
            except ValueError:
                if unreadable == "error":
                    raise
                read[key] = None
        return [read[key] for key in keys]

    def _keys(self, labels: pd.Series, doses: pd.Series | None) -> list[tuple]:
        """Label and dose of each cell; None where a dose is missing."""
        text = _text(labels)
        if doses is None:
            return [(label, None) for label in text]
        known = zip(text, doses, doses.isna(), strict=True)
        return [(label, None if missing else dose) for label, dose, missing in known]

    def _check_doses(self, keys: list[tuple], doses: pd.Series | None) -> None:
        if doses is None:
            return
        without = Counter(label for label, dose in keys if dose is None)
        for label in list(without):
            if not isinstance(label, str) or self.drops(label) or self.is_control(label):
                del without[label]
        if without:
            raise ValueError(
                f"{without.total()} perturbed cells have no dose in obs[{doses.name!r}], such as "
                f"those of {next(iter(without))!r}. Fill them in, or leave these cells out."
            )

    def spellings(
        self, labels: pd.Series, doses: pd.Series | None = None
    ) -> dict[Perturbation, str]:
        """What results call each perturbation: as most of its cells are labelled."""
        counts: dict[Perturbation, Counter[str]] = {}
        for (label, dose), n in Counter(self._keys(labels, doses)).items():
            perturbation = self.read(label, dose)
            if isinstance(label, Perturbation):
                counts.setdefault(label, Counter())[str(label)] += n
            elif perturbation is not None:
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
    """The dose that a pattern found, in micromolar or micrograms."""
    unit = match.groupdict().get("unit")
    if unit is None:
        return number(match["dose"], label)
    factor = UNITS.get(re.sub(r"/m[lL]$", "", unit))
    if factor is None:
        raise ValueError(
            f"In {label!r}, the unit {unit!r} of dose_pattern is not known; known are "
            f"{', '.join(UNITS)}, masses also per ml."
        )
    return float(f"{number(match['dose'], label) * factor:.12g}")


def _text(labels: pd.Series) -> list[Any]:
    """Labels as text; perturbations stay what they are."""
    found = labels.astype(object).where(labels.notna(), NO_LABEL)
    return [x if isinstance(x, Perturbation) else str(x) for x in found]


def _is_name(new: Any) -> bool:
    several = [new] if isinstance(new, str) else new
    return (
        isinstance(several, list | tuple)
        and bool(several)
        and all(isinstance(x, str) and x for x in several)
    )


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
