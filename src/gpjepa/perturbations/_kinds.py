"""What a column of labels may hold that was not declared, and the call that would read it.

One entry of :data:`KINDS` is one row of the table in ``docs/your-data.md``.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ._names import (
    ALWAYS,
    BARE_DOSES,
    DOSES,
    GUIDES,
    NOTHING,
    POSITION,
    PREFIX,
    SEPARATORS,
    TUPLE,
    UNASSIGNED,
    bare,
    control_guide,
    control_like,
    is_short_control,
    plain,
)

if TYPE_CHECKING:
    from ._reader import LabelReader


class _Told(Exception):
    """A message and the call that it proposes, which the command line puts in its own words.

    Attributes
    ----------
    said, otherwise
        What was found, and what else may be meant.
    changes
        Arguments of :class:`LabelReader` that would read the labels.
    """

    def __init__(self, said: str, changes: Mapping[str, Any], otherwise: str = "") -> None:
        self.said, self.changes, self.otherwise = said, dict(changes), otherwise
        call = ", ".join(f"{name}={_said(value)}" for name, value in changes.items())
        if not call and said.endswith(","):  # "To read them," leads to a call
            self.said = said = said.rpartition(". ")[0] + "."
        parts = said, f"call with {call}." if call else "", otherwise
        super().__init__(" ".join(filter(None, parts)))


class LabelError(_Told, ValueError):
    """Labels that look as if they were written in a way that was not declared."""


class LabelWarning(_Told, UserWarning):
    """Labels that were read, although something else may have been meant."""


@dataclass(frozen=True)
class Finding:
    """What was found, and which arguments would read it."""

    said: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    otherwise: str = ""


@dataclass(frozen=True)
class Labels:
    """A column of labels as it is checked.

    Attributes
    ----------
    reader
        How they are said to be written.
    column
        Name of the column of ``obs``.
    n_cells
        Cells of each label.
    genes
        Names of the measured genes.
    need_control
        Whether there must be control cells.
    """

    reader: LabelReader
    column: str
    n_cells: Mapping[str, int]
    genes: frozenset[str]
    need_control: bool

    @cached_property
    def kept(self) -> list[str]:
        """The labels that are neither dropped nor declared, sorted."""
        declared = self.reader.declared
        return sorted(
            u for u in self.n_cells if not self.reader.drops(u) and u.strip() not in declared
        )

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The names in each label, without guide suffixes and doses."""
        return {u: self._names(u) for u in self.kept}

    def _names(self, label: str) -> list[str]:
        try:
            return [name for name, _ in self.reader.parts(label)]
        except ValueError:  # of a dose that cannot be read, which a check will tell
            separator = self.reader.separator
            return [p.strip() for p in (label.split(separator) if separator else [label])]

    @cached_property
    def names(self) -> set[str]:
        """All names that are not controls."""
        found = {n for names in self.parts.values() for n in names}
        return {n for n in found if n and not self.reader.is_control(n)} - self.reader.declared

    def known(self, name: str) -> bool:
        """Whether a name stands alone somewhere, or is a measured gene."""
        return name in self.alone or name in self.genes or name in self.reader.declared

    @cached_property
    def alone(self) -> set[str]:
        return {names[0] for names in self.parts.values() if len(names) == 1}

    def count(self, labels: Any) -> str:
        """Labels with their numbers of cells."""
        each = [f"{u!r} ({_n(self.n_cells[u], 'cell')})" for u in sorted(labels)]
        return ", ".join(each[:8]) + (f" and {len(each) - 8} more" if len(each) > 8 else "")


def _n(count: Any, noun: str) -> str:
    """A number, or the length of a list, with its noun."""
    n = count if isinstance(count, int) else len(count)
    return f"{n} {noun}" + ("" if n == 1 else "s")


# One function a kind: what it finds, or None.


def _without_label(labels: Labels) -> Finding | None:
    found = [
        u for u in labels.kept if u.strip().lower() in NOTHING and not labels.reader.is_control(u)
    ]
    if not found:
        return None
    n = sum(labels.n_cells[u] for u in found)
    return Finding(
        f"{_n(n, 'cell')} without a perturbation: {labels.count(found)}. To leave them out,",
        {"drop": found},
        f"If they are control cells, name them in control={found}.",
    )


def _unassigned(labels: Labels) -> Finding | None:
    found = [
        u
        for u, names in labels.parts.items()
        if not labels.reader.is_control(u)
        and any(re.sub(r"(?<=\D)\d+$", "", plain(n)) in UNASSIGNED for n in (u, *names) if n)
    ]
    if not found:
        return None
    return Finding(
        f"Some labels look like cells without one assigned perturbation: {labels.count(found)}. "
        "To leave them out,",
        {"drop": found},
        f"If they are perturbations, declare them with targets={found}.",
    )


def _doses_inside(labels: Labels) -> Finding | None:
    if labels.reader.dose_pattern:
        return None
    names = {n for names in labels.parts.values() for n in names} - labels.genes
    found_by = {
        TUPLE: [u for u in labels.kept if re.search(TUPLE, u)],
        **{p: [n for n in names if (m := re.search(p, n)) and m[0] != n] for p in DOSES},
        **{p: _bare_doses(p, names) for p in BARE_DOSES},
    }
    pattern, found = next(((p, of) for p, of in found_by.items() if of), ("", []))
    if not found:
        return None
    return Finding(
        f"{_n(found, 'name')} with a dose inside, such as {min(found)!r}: each dose would be a "
        "target of its own. To read doses (in micromolar or micrograms, where units are given),",
        {"dose_pattern": pattern},
        "Doses in a column of obs are read by dosage_key=. If these are names, declare them with "
        f"targets={_some(found)}.",
    )


def _bare_doses(pattern: str, names: set[str]) -> list[str]:
    """Names that end in numbers that do not count guides: decimals, or steps such as 10, 100."""
    found = {n: m for n in names if (m := re.search(pattern, n)) and m.start()}
    bases: dict[str, set[str]] = defaultdict(set)
    for name, match in found.items():
        bases[name[: match.start()]].add(match["dose"])
    counts = Counter(v for of in bases.values() for v in of)
    decimals = any("." in v or "," in v for v in counts)
    steps = max((float(v) for v in counts if v.isdecimal()), default=0) > 20 and len(counts) <= 12
    # Doses are shared by compounds; numbers of compounds are not.
    shared = 2 * sum(n > 1 for n in counts.values()) >= len(counts) > 1
    several = sum(len(of) > 1 for of in bases.values())
    alike = 2 * len(found) >= len(names) and len(found) > 1 and 2 * several >= len(bases)
    return [*found] if alike and (decimals or (steps and shared)) else []


def _twice(labels: Labels) -> Finding | None:
    """``A_B__A_B``, as the two guides of one vector are called."""
    names = [names[0] for names in labels.parts.values() if len(names) == 1]
    found = [n for n in names if "__" in n and len(set(n.split("__"))) == 1]
    if not found or 2 * len(found) < len(names):
        return None
    return Finding(
        f"{_n(found, 'label')} with the same text before and after '__', such as {found[0]!r}. To "
        "read it once,",
        {"strip": r"__.*$"},
    )


def _guides(labels: Labels) -> Finding | None:
    strip = labels.reader.strip
    positions = [
        u for u in labels.kept if re.search(POSITION, u) and not (strip and re.search(strip, u))
    ]
    if positions:
        return _guide_finding(POSITION, set(positions), labels)
    names = {n for names in labels.parts.values() for n in names}
    names = {n for n in names if n and n not in labels.genes and n not in labels.reader.declared}
    others = {n for n in names if not control_like(n) and not labels.reader.is_control(n)}
    prefixed = {n for n in others if re.search(PREFIX, n)}
    pattern = PREFIX if len(prefixed) * 2 > len(others) else ""
    bare = {re.sub(pattern, "", n) if pattern else n for n in names}
    suffix = next((s for s in GUIDES if _is_guide(s, bare, labels)), "")
    if strip == "__.*$" and suffix:  # of both halves
        suffix = f"({suffix.removesuffix('$')})?__.*$"
        strip = None
    pattern = "|".join(filter(None, [pattern, suffix]))
    return _guide_finding(pattern, others, labels) if pattern else None


def _guide_finding(pattern: str, names: set[str], labels: Labels) -> Finding:
    changed = sorted(n for n in names if re.search(pattern, n))
    n_targets = len({re.sub(pattern, "", n) for n in names})
    strip = labels.reader.strip
    if strip and not (strip == "__.*$" and "__" in pattern):
        pattern = f"{strip}|{pattern}"
    return Finding(
        f"{_n(changed, 'name')} that look like guides, such as {', '.join(map(repr, changed[:3]))}: "
        f"{_n(names, 'target')} as they are, {n_targets} without the suffix. To take it off,",
        {"strip": pattern},
        f"If they are targets, declare them with targets={_some(changed)}.",
    )


def _is_guide(suffix: str, names: set[str], labels: Labels) -> bool:
    """Whether a suffix numbers the guides of one target."""
    others = {n for n in names if not control_like(n) and not labels.reader.is_control(n)}
    bases: dict[str, set[int]] = defaultdict(set)
    for name in others:
        match = re.search(suffix, name)
        if match and match.start() and not control_like(name[: match.start()]):
            bases[name[: match.start()]].add(int(re.sub(r"\D", "", match[0])))
    found = sum(map(len, bases.values()))
    if not found or 2 * found < len(others):
        return False
    if suffix == r"g\d+$" and not all(b.isupper() or b[-1:].isdigit() for b in bases):
        return False  # Atg5 and Atg7 are genes
    known = sum(b in labels.genes or b in labels.alone - names for b in bases)
    if suffix == GUIDES[0] or 2 * known >= len(bases):
        return True
    if suffix not in (r"g\d+$", r"_\d{1,5}$", r"#\d+$"):
        return False  # IL-2 and NKX2-1 are names
    # Guides are numbered anew for every target, and their controls as they are.
    anew = sum(len(of) > 1 and max(of) <= 12 for of in bases.values())
    controls = any((m := re.search(suffix, n)) and control_like(n[: m.start()]) for n in names)
    return len(bases) > 1 and (2 * anew >= len(bases) or (controls and found == len(others)))


def _undeclared_control_parts(labels: Labels) -> Finding | None:
    """Controls in combinations, and numbered ones."""
    strings: set[str] = set()
    patterns: dict[str, re.Pattern[str]] = {}
    seen: set[str] = set()
    others: set[str] = set()
    for label, names in labels.parts.items():
        for name in names:
            if labels.reader.is_control(name) or name in labels.genes | labels.reader.declared:
                continue
            guide = control_guide(name)
            if guide is not None:
                patterns[guide.pattern] = guide
                others.add(name)
                seen.add(label)
            elif control_like(name) and len(names) > 1:
                strings.add(name)
                seen.add(label)
    if not seen:
        return None
    return Finding(
        f"{_n(seen, 'label')} with controls that were not declared, such as {min(seen)!r}. "
        "To read them as control,",
        {"control": [*_present(labels), *sorted(strings), *patterns.values()]},
        f"If they are targets, declare them with targets={_some(strings | others)}.",
    )


def _present(labels: Labels) -> list[str | re.Pattern[str]]:
    """The declared controls that occur."""
    found = {name for u in labels.kept for name in (u.strip(), *labels.parts[u])}
    return [c for c in labels.reader.controls if not isinstance(c, str) or c in found]


def _other_separator(labels: Labels) -> Finding | None:
    singles = {names[0] for names in labels.parts.values() if len(names) == 1} - labels.genes
    singles = {n for n in singles if not control_like(n) and not labels.reader.is_control(n)}
    alone = {bare(n) for n in singles}
    for other in SEPARATORS:
        if other == labels.reader.separator:
            continue
        split = {n: [bare(p.strip()) for p in n.split(other)] for n in sorted(singles)}
        counts = Counter(p for parts in split.values() for p in set(parts))
        often = {p for p, n in counts.items() if n > 1} if other in ALWAYS else set()
        hits = [
            n
            for n, parts in split.items()
            if _joins(parts, alone, often, labels) or _two_guides(n.split(other), parts)
        ]
        if not hits:
            continue
        found = {p for n in hits for p in split[n] if not labels.reader.is_control(p)}
        guides = {g.pattern: g for p in found if (g := control_guide(p))}
        words = sorted(p for p in found if is_short_control(p) and not control_guide(p))
        changes: dict[str, Any] = {"separator": other}
        if words or guides:
            changes["control"] = [*dict.fromkeys([*_present(labels), *words]), *guides.values()]
        return Finding(
            f"{_n(hits, 'label')} that could be combinations joined by {other!r}, such as "
            f"{hits[0]!r}; but the separator is {labels.reader.separator!r}. If they are,",
            changes,
            f"If they are single targets, declare them with targets={_some(hits)}.",
        )
    return None


def _joins(parts: list[str], alone: set[str], often: set[str], labels: Labels) -> bool:
    """Whether the parts of a name are targets, or a target and a control."""
    if len(parts) < 2 or not all(re.match(r"\w", p) for p in parts):
        return False
    control = [p for p in parts if labels.reader.is_control(p) or is_short_control(p)]
    rest = [p for p in parts if p not in control]
    if not rest:
        return any(control_guide(p) for p in parts)
    if len(set(parts)) > 1 and (
        often & set(rest) or all(labels.known(p) or p in alone for p in rest)
    ):
        return True
    guide = re.fullmatch(r"(sg|g|guide|sgRNA|gRNA)?[_-]?\d+", rest[0])
    if len(parts) != 2 or len(control) != 1 or guide or not rest[0][0].isalpha():
        return False
    # The control stands alone somewhere, or numbered: NTC_ACGT is a guide.
    return control[0] in labels.kept or control_guide(control[0]) is not None


def _two_guides(pieces: list[str], parts: list[str]) -> bool:
    """``KLF1_1|KLF1_2``: two guides of one target."""
    pieces = [p.strip() for p in pieces]
    return (
        len(parts) > 1
        and len(set(parts)) == 1
        and len(set(pieces)) > 1
        and bool(all(piece.startswith(parts[0]) for piece in pieces) and len(parts[0]) > 1)
    )


def _no_control(labels: Labels) -> Finding | None:
    if not labels.need_control or any(labels.reader.is_control(u) for u in labels.kept):
        return None
    names = sorted({names[0] for names in labels.parts.values() if len(names) == 1})
    names = [n for n in names if n not in labels.genes]
    likely = [n for n in names if control_like(n)]
    guides = {g.pattern: g for n in names if (g := control_guide(n))}
    shown = ", ".join(map(repr, labels.kept[:8])) + (" ..." if len(labels.kept) > 8 else "")
    words = " or ".join(repr(c) if isinstance(c, str) else _said(c) for c in labels.reader.controls)
    said = f"No cell has the control label {words}; the labels are {shown}."
    if not likely and not guides:
        return Finding(f"{said} Say which label marks control cells with control=...")
    return Finding(f"{said} If it is another,", {"control": [*likely, *guides.values()]})


def _names_with_separator(labels: Labels) -> Iterator[tuple[str, bool]]:
    """Labels that the separator would cut to pieces that are no names, and if a piece is known."""
    separator = labels.reader.separator
    if separator is None:
        return
    for label in labels.kept:
        if separator not in label or labels.reader.is_control(label):
            continue
        if label.strip() in labels.genes:
            yield label, False
            continue
        names = labels.parts[label]
        odd = [
            n
            for n in names
            if not re.search(r"[^\W\d]", n)
            or n.count("(") != n.count(")")
            or n.count("[") != n.count("]")
        ]
        if len(names) > 1 and odd:
            yield label, any(labels.known(n) or labels.reader.is_control(n) for n in names if n)


def _cut_names(labels: Labels) -> Finding | None:
    found = [label for label, known in _names_with_separator(labels) if known]
    if not found:
        return None
    return Finding(
        f"The separator {labels.reader.separator!r} cuts {', '.join(map(repr, found[:3]))} into "
        "pieces, some of which are names and some are not. If labels hold one target each,",
        {"separator": None},
        f"If only some do, declare these with targets={_some(found)}.",
    )


def _other_controls(labels: Labels) -> Finding | None:
    found = [
        u
        for u in labels.kept
        if len(labels.parts[u]) == 1
        and control_like(labels.parts[u][0])
        and (u not in labels.genes or u in ("AAVS1", "GFP", "LacZ"))
        and not labels.reader.is_control(u)
    ]
    if not found:
        return None
    return Finding(
        f"These labels are kept as targets, although they look like controls: {labels.count(found)}. "
        "To read them as control,",
        {"control": [*labels.reader.controls, *found]},
        f"To keep them without this warning, add targets={sorted({*found, *labels.reader.declared})}.",
    )


def _cases(labels: Labels) -> Finding | None:
    by_lower: dict[str, list[str]] = defaultdict(list)
    for name in sorted(labels.names - set(labels.reader.rename)):
        by_lower[name.lower()].append(name)
    found = [names for names in by_lower.values() if len(names) > 1]
    if not found:
        return None
    rename: dict[str, Any] = dict(labels.reader.rename)
    for names in found:
        best = next((n for n in names if n in labels.genes), names[0])
        rename |= {n: best for n in names if n != best}
    shown = "; ".join(", ".join(map(repr, names)) for names in found[:5])
    return Finding(
        f"{_n(found, 'target')} in several spellings, which are kept apart: {shown}. To join them,",
        {"rename": rename},
    )


@dataclass(frozen=True)
class Kind:
    """One thing that a column of labels may hold.

    Attributes
    ----------
    name
        What it is, for the docs.
    outcome
        Whether the column is refused, or read with a warning.
    argument
        The argument that reads it.
    find
        What is found in a column.
    """

    name: str
    outcome: Literal["error", "warning"]
    argument: str
    find: Callable[[Labels], Finding | None]


KINDS = (
    Kind("cells without a label", "error", "drop", _without_label),
    Kind("cells without one assigned perturbation", "error", "drop", _unassigned),
    Kind("labels with the same text twice", "error", "strip", _twice),
    Kind("another separator", "error", "separator", _other_separator),
    Kind("doses inside labels", "error", "dose_pattern", _doses_inside),
    Kind("guides", "error", "strip", _guides),
    Kind("undeclared or numbered controls", "error", "control", _undeclared_control_parts),
    Kind("no control", "error", "control", _no_control),
    Kind("names that the separator cuts", "error", "separator", _cut_names),
    Kind("other controls", "warning", "control", _other_controls),
    Kind("upper and lower case", "warning", "rename", _cases),
)


def check_labels(
    reader: LabelReader,
    column: str,
    n_cells: Mapping[str, int],
    genes: frozenset[str],
    need_control: bool,
) -> frozenset[str]:
    """Refuse or warn of what was not declared; names that hold the separator."""
    labels = Labels(reader, column, n_cells, genes, need_control)
    # Names that hold the separator are names in combinations, too.
    names = {label.strip() for label, known in _names_with_separator(labels) if not known}
    labels = replace(labels, reader=replace(reader, targets=reader.declared | names))
    finding = _first_error(labels)
    if finding is not None:
        raise LabelError(
            f"obs[{column!r}]: {finding.said}", _until_read(labels, finding), finding.otherwise
        )
    warned = [k.find(labels) for k in KINDS if k.outcome == "warning"]
    for found in (*warned, _unused_names(labels)):
        if found is not None:
            said = f"obs[{column!r}]: {found.said}"
            warnings.warn(LabelWarning(said, found.changes, found.otherwise), stacklevel=4)
    return frozenset(names)


def _unused_names(labels: Labels) -> Finding | None:
    """Keys of ``rename`` that no label has."""
    here = {name for names in labels.parts.values() for name in names}
    unused = sorted(set(labels.reader.rename) - here)
    return Finding(f"No label holds {', '.join(map(repr, unused))} of rename.") if unused else None


def _first_error(labels: Labels) -> Finding | None:
    errors = (k.find(labels) for k in KINDS if k.outcome == "error")
    return next((found for found in errors if found is not None), None)


def _until_read(labels: Labels, finding: Finding) -> dict[str, Any]:
    """All arguments that are needed before the column is read; none if they would not do."""
    changes: dict[str, Any] = {}
    found: Finding | None = finding
    for _ in range(len(KINDS)):
        if found is None or not found.changes:
            break
        changes |= found.changes
        if "drop" in found.changes:
            changes["drop"] = [*labels.reader.dropped, *found.changes["drop"]]
        labels = replace(labels, reader=replace(labels.reader, **changes))
        found = _first_error(labels)
    return changes if found is None else {}


def _some(names: Iterable[str]) -> list[str]:
    """Names as an argument that can be copied, if they are not too many."""
    return sorted(names)[:20]


def _said(value: Any) -> str:
    """An argument as one would type it."""
    if isinstance(value, re.Pattern):
        return f"re.compile({_said(value.pattern)})"
    if isinstance(value, list | tuple):
        return _said(value[0]) if len(value) == 1 else f"[{', '.join(map(_said, value))}]"
    return (
        f"r{value!r}".replace("\\\\", "\\")
        if isinstance(value, str) and "\\" in value
        else repr(value)
    )
