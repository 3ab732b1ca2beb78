"""What a column of labels may hold that was not declared, and the call that would read it.

One entry of :data:`KINDS` is one row of the table in ``docs/your-data.md``.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ._reader import LabelReader

_NOTHING = {"", "nan", "none", "na", "n/a", "null", "<na>", "nat"}
_UNASSIGNED = {
    "unassigned", "notassigned", "noassignment", "doublet", "doublets", "multiplet", "multiplets",
    "multiple", "multi", "ambiguous", "*", "?", "-", "negative", "unknown", "undetermined",
    "unmapped", "noguide", "nosgrna", "nogrna",
}  # fmt: skip
# As `_plain` gives them: in lower case, without spaces, underscores and hyphens.
_CONTROL = re.compile(
    r"(neg(ative)?(ctrls?|controls?)?|ctrls?|controls?|nt|ntc|nc|nontargeting(control|ctrl)?|"
    r"nontarget|safetargeting|safeharbou?r|scrambled?|mock|vehicle|dmso(tf)?|pbs|unperturbed|"
    r"untreated|untransduced|wt|wildtype|none|aavs1|rosa26|gfp|egfp|lacz|luciferase|emptyvector|"
    r"nosite|ctl)"
)
_NUMBERED = re.compile(r"(.*?)([\s_.#-]*(?:sg|g|guide|sgrna|grna)?)(\d+)")
_SEPARATORS = ("__", "+", "＋", "_", ";", "|", ",", "&", "/", ":", "-", " ")
# Guides: what they may add to a name, as `strip` would take it off.
_GUIDES = (
    r"_[+-]_\d+\.\d+-P\d(P\d)?$", r"[_-](sg|g|guide|sgRNA|gRNA)[_-]?\d+$", r"g\d+$", r"_\d{1,5}$",
    r"-\d{1,5}$", r"\.\d{1,2}$", r"#\d+$", r" \d{1,2}$",
)  # fmt: skip
_UNITS = r"(?:[pnuµμm]M|M|[pnuµμm]?g(?:/m[lL])?)"
_DOSES = (
    rf"[_ @-]?(?P<dose>\d+(?:\.\d+)?)[ _]?(?P<unit>{_UNITS})$", r"_(?P<dose>\d+\.\d+)$",
)  # fmt: skip
_TUPLE = r"\('(?P<target>.+?)', (?P<dose>[\d.]+), '(?P<unit>\w+)'\)"


class _Told(Exception):
    """A message with the call that it proposes, so that others can say the call in their way.

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
        return {u: [name for name, _ in self.reader.parts(u)] for u in self.kept}

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


def control_like(name: str) -> bool:
    """Whether a name is one that control cells often carry."""
    return _CONTROL.fullmatch(_plain(name)) is not None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()) or name.strip()


def _control_guide(name: str) -> re.Pattern[str] | None:
    """For a numbered control such as ``NegCtrl10``, what matches all of them."""
    match = _NUMBERED.fullmatch(name)
    if match is None or not control_like(match[1]) or control_like(name):
        return None
    return re.compile(
        re.escape(match[1]).replace(r"\-", "-") + re.escape(match[2]).replace(r"\-", "-") + r"\d+"
    )


# One function a kind: what it finds, or None.


def _without_label(labels: Labels) -> Finding | None:
    found = [u for u in labels.kept
             if u.strip().lower() in _NOTHING and not labels.reader.is_control(u)]  # fmt: skip
    if not found:
        return None
    n = sum(labels.n_cells[u] for u in found)
    return Finding(
        f"{_n(n, 'cell')} without a perturbation: {labels.count(found)}. To leave them out,",
        {"drop": found}, f"If they are control cells, name them in control={found}.",
    )  # fmt: skip


def _unassigned(labels: Labels) -> Finding | None:
    found = [u for u in labels.kept if _plain(u) in _UNASSIGNED and not labels.reader.is_control(u)]
    if not found:
        return None
    return Finding(
        f"Some labels look like cells without one assigned perturbation: {labels.count(found)}. "
        "To leave them out,",
        {"drop": found}, f"If they are perturbations, declare them with targets={found}.",
    )  # fmt: skip


def _doses_inside(labels: Labels) -> Finding | None:
    if labels.reader.dose_pattern:
        return None
    tuples = [u for u in labels.kept if re.search(_TUPLE, u)]
    found, pattern = tuples, _TUPLE
    if not found:
        names = labels.names - labels.genes
        for pattern in _DOSES:
            found = [n for n in names if (m := re.search(pattern, n)) and m.start()]
            if found and (pattern == _DOSES[0] or len(found) * 2 >= len(names) and len(found) > 1):
                break
        else:
            return None
    return Finding(
        f"{_n(found, 'name')} with a dose inside, such as {min(found)!r}: each dose would be a "
        "target of its own. To read doses (molar units become micromolar),",
        {"dose_pattern": pattern},
        "Doses in a column of obs are read by dosage_key=. If these are names, declare them with "
        f"targets={sorted(found)[:3]}.",
    )  # fmt: skip


def _twice(labels: Labels) -> Finding | None:
    """``A_B__A_B``, as the two guides of one vector are called."""
    names = [names[0] for names in labels.parts.values() if len(names) == 1]
    found = [n for n in names if "__" in n and len(set(n.split("__"))) == 1]
    if not found or 2 * len(found) < len(names):
        return None
    return Finding(
        f"{_n(found, 'label')} with everything said twice, such as {found[0]!r}. To read one half,",
        {"strip": r"__.*$"},
    )


def _guides(labels: Labels) -> Finding | None:
    names = {n for names in labels.parts.values() for n in names}
    names = {n for n in names if n and n not in labels.genes and n not in labels.reader.declared}
    prefixed = {n for n in names if re.match(r"sg[_-]?[A-Z]", n)}
    # Some plain controls may stand beside the guides of targets.
    others = {n for n in names if not control_like(n) and not labels.reader.is_control(n)}
    if others and len(prefixed & others) * 2 > len(others):
        stripped = {re.sub(r"^sg[_-]?", "", n) for n in names}
        suffix = next((s for s in _GUIDES if _is_guide(s, stripped, labels)), None)
        pattern = r"^sg[_-]?" + (f"|{suffix}" if suffix else "")
        return _guide_finding(pattern, names)
    suffix = next((s for s in _GUIDES if _is_guide(s, names, labels)), None)
    return None if suffix is None else _guide_finding(suffix, names)


def _guide_finding(pattern: str, names: set[str]) -> Finding:
    targets = {re.sub(pattern, "", n) for n in names}
    changed = sorted(n for n in names if re.search(pattern, n))
    return Finding(
        f"Names end or begin as guides do, such as {', '.join(map(repr, changed[:3]))}: "
        f"{_n(names, 'name')} would count as so many targets, but are {len(targets)} without that. "
        "To take it off,",
        {"strip": pattern}, "If these are names of targets, declare them with targets=[...].",
    )  # fmt: skip


def _is_guide(suffix: str, names: set[str], labels: Labels) -> bool:
    """Whether a suffix tells guides of one target from each other."""
    found = {n: re.sub(suffix, "", n) for n in names if (m := re.search(suffix, n)) and m.start()}
    others = {n for n in names if not control_like(n)}
    mine = {n: base for n, base in found.items() if not control_like(base)}
    if not mine or 2 * len(mine) < len(others):
        return False
    number = {n: int(re.sub(r"\D", "", n[len(base) :]) or 0) for n, base in mine.items()}
    bases = set(mine.values())
    members: dict[str, int] = defaultdict(int)
    for base in mine.values():
        members[base] += 1
    known = {b for b in bases if b in labels.genes or b in labels.alone - set(mine)}
    explicit = re.search("guide|P.d", suffix) is not None
    shared = sum(members[b] > 1 or b in known for b in bases)
    if suffix == r"g\d+$" and not known and not all(b.isupper() or b[-1:].isdigit() for b in bases):
        return False  # Atg5 and Atg7 are genes
    # Numbers of guides start again with every target; those of compounds (ABT-737) do not.
    small = max(number.values()) <= 20 or len(known) * 2 >= len(bases)
    return (2 * shared >= len(bases) or len(known) * 2 >= len(bases) > 0 and explicit) and small


def _undeclared_control_parts(labels: Labels) -> Finding | None:
    """Controls in combinations, and numbered ones."""
    strings: set[str] = set()
    patterns: dict[str, re.Pattern[str]] = {}
    seen: set[str] = set()
    for label, names in labels.parts.items():
        for name in names:
            if labels.reader.is_control(name):
                continue
            guide = _control_guide(name)
            if guide is not None:
                patterns[guide.pattern] = guide
                seen.add(label)
            elif control_like(name) and len(names) > 1:
                strings.add(name)
                seen.add(label)
    if not seen:
        return None
    declared = [c for c in labels.reader.controls
                if not isinstance(c, str) or _occurs(c, labels)]  # fmt: skip
    control = [*declared, *sorted(strings - set(declared)), *patterns.values()]
    return Finding(
        f"{_n(seen, 'label')} with controls that were not declared, such as {min(seen)!r}. "
        "To read them as control,",
        {"control": control}, "If they are targets, declare them with targets=[...].",
    )  # fmt: skip


def _occurs(control: str, labels: Labels) -> bool:
    return any(control in (u.strip(), *labels.parts[u]) for u in labels.kept)


def _other_separator(labels: Labels) -> Finding | None:
    singles = {n for names in labels.parts.values() if len(names) == 1 for n in names}
    for other in _SEPARATORS:
        if other == labels.reader.separator:
            continue
        hits: list[str] = []
        controls: set[str] = set()
        guides: dict[str, re.Pattern[str]] = {}
        for label in sorted(singles - labels.genes):
            parts = [p.strip() for p in label.split(other)]
            if len(parts) < 2 or control_like(label) or labels.reader.is_control(label):
                continue
            control = [p for p in parts if _plainly_control(p, labels.reader)]
            rest = [p for p in parts if p not in control]
            if (
                all(labels.known(p) for p in rest)
                and len(set(parts)) > 1
                or (len(control) == len(rest) == 1 and re.match("[A-Za-z]", rest[0]))
                or not rest
                and any(_control_guide(p) for p in parts)
            ):
                hits.append(label)
                guides |= {g.pattern: g for p in control if (g := _control_guide(p))}
                controls |= {p for p in control if not _control_guide(p)}
        if hits:
            new = [c for c in sorted(controls) if not labels.reader.is_control(c)]
            declared = [c for c in labels.reader.controls
                        if not isinstance(c, str) or c in controls or _occurs(c, labels)]  # fmt: skip
            changes: dict[str, Any] = {"separator": other}
            if new or guides:
                changes["control"] = [*declared, *new, *guides.values()]
            return Finding(
                f"{_n(hits, 'label')} that could be combinations joined by {other!r}, such as "
                f"{hits[0]!r}; but the separator is {labels.reader.separator!r}. If they are,",
                changes, "If they are single targets, declare them with targets=[...].",
            )  # fmt: skip
    return None


def _plainly_control(name: str, reader: LabelReader) -> bool:
    """Controls that stand in combinations; GFP or DMSO may be part of another name."""
    short = {"ctrl", "control", "nt", "ntc", "negctrl", "nontargeting", "negcontrol"}
    return (
        reader.is_control(name) or _control_guide(name) is not None
        or _plain(name) in short
    )  # fmt: skip


def _no_control(labels: Labels) -> Finding | None:
    if not labels.need_control or any(labels.reader.is_control(u) for u in labels.kept):
        return None
    names = sorted({names[0] for names in labels.parts.values() if len(names) == 1})
    likely = [n for n in names if control_like(n)]
    guides = {g.pattern: g for n in names if (g := _control_guide(n))}
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
        names = labels.parts[label]
        odd = [n for n in names if not n or not re.search(r"\w", n)
               or n.count("(") != n.count(")") or n.count("[") != n.count("]")]  # fmt: skip
        if odd:
            yield label, any(labels.known(n) or labels.reader.is_control(n) for n in names if n)


def _cut_names(labels: Labels) -> Finding | None:
    found = [label for label, known in _names_with_separator(labels) if known]
    if not found:
        return None
    return Finding(
        f"The separator {labels.reader.separator!r} cuts {', '.join(map(repr, found[:3]))} into "
        "pieces, some of which are names and some are not. If labels hold one target each,",
        {"separator": None}, f"If only some do, declare these with targets={found[:3]}.",
    )  # fmt: skip


def _other_controls(labels: Labels) -> Finding | None:
    found = [u for u in labels.kept
             if len(labels.parts[u]) == 1 and control_like(labels.parts[u][0])
             and not labels.reader.is_control(u)]  # fmt: skip
    if not found:
        return None
    return Finding(
        f"These labels are kept as targets, although they look like controls: {labels.count(found)}. "
        "To read them as control,",
        {"control": [*labels.reader.controls, *found]},
        f"To keep them without this warning, targets={found}.",
    )  # fmt: skip


def _cases(labels: Labels) -> Finding | None:
    by_lower: dict[str, list[str]] = defaultdict(list)
    for name in sorted(labels.names - set(labels.reader.rename)):
        by_lower[name.lower()].append(name)
    found = [names for names in by_lower.values() if len(names) > 1]
    if not found:
        return None
    rename: dict[str, str] = {}
    for names in found:
        best = next((n for n in names if n in labels.genes), names[0])
        rename |= {n: best for n in names if n != best}
    shown = "; ".join(", ".join(map(repr, names)) for names in found[:5])
    return Finding(
        f"{_n(found, 'target')} in several spellings, which are kept apart: {shown}. To join them,",
        {"rename": rename},
    )  # fmt: skip


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
    Kind("doses inside labels", "error", "dose_pattern", _doses_inside),
    Kind("labels that say everything twice", "error", "strip", _twice),
    Kind("guides", "error", "strip", _guides),
    Kind("another separator", "error", "separator", _other_separator),
    Kind("undeclared or numbered controls", "error", "control", _undeclared_control_parts),
    Kind("no control", "error", "control", _no_control),
    Kind("names that the separator cuts", "error", "separator", _cut_names),
    Kind("other controls", "warning", "control", _other_controls),
    Kind("upper and lower case", "warning", "rename", _cases),
)


def check_labels(
    reader: LabelReader, column: str, n_cells: Mapping[str, int], genes: frozenset[str],
    need_control: bool,
) -> frozenset[str]:  # fmt: skip
    """Refuse or warn of what was not declared; names that hold the separator."""
    labels = Labels(reader, column, n_cells, genes, need_control)
    finding = _first_error(labels)
    if finding is not None:
        raise LabelError(
            f"obs[{column!r}]: {finding.said}", _until_read(labels, finding), finding.otherwise
        )
    for kind in KINDS:
        if kind.outcome == "warning" and (found := kind.find(labels)) is not None:
            said = f"obs[{column!r}]: {found.said}"
            warnings.warn(LabelWarning(said, found.changes, found.otherwise), stacklevel=4)
    return frozenset(label.strip() for label, known in _names_with_separator(labels) if not known)


def _first_error(labels: Labels) -> Finding | None:
    errors = (k.find(labels) for k in KINDS if k.outcome == "error")
    return next((found for found in errors if found is not None), None)


def _until_read(labels: Labels, finding: Finding) -> dict[str, Any]:
    """All arguments that are needed before the column is read, not only the first."""
    changes: dict[str, Any] = {}
    found: Finding | None = finding
    for _ in range(len(KINDS)):
        if found is None or not found.changes:
            break
        for name, value in found.changes.items():
            if name == "drop":
                value = [*labels.reader.dropped, *value]
            changes[name] = value
        labels = replace(labels, reader=replace(labels.reader, **changes))
        found = _first_error(labels)
    return changes


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
