"""Which perturbations, contexts or cells are held out; training, effects and benchmark share it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import numpy as np

from ._files import written_whole
from .perturbations import Perturbation

MIN_UNITS = 5
"""Fewer independent units than this decide nothing (stacking weights, a gate, early stopping)."""

Row = tuple[str, Perturbation]  # a perturbation in a context
T = TypeVar("T")


@dataclass(frozen=True)
class Holdout:
    """What was held out: ``units`` of one ``kind``."""

    kind: Literal["perturbations", "contexts", "cells"]
    units: tuple


def hold_out(
    rows: Sequence[tuple[str, Perturbation]], *, fraction: float = 0.15, seed: int = 0
) -> Holdout:
    """Choose what training holds out for early stopping.

    Of singles and of combinations a share, and at least five, where there are fifteen of them; five
    of both together if only their sum is fifteen; otherwise one context of at least three; otherwise
    cells.

    Parameters
    ----------
    rows
        The (context, perturbation) pairs measured in training; controls are ignored.
    fraction
        Share of the perturbations to hold out.
    seed
        Seed of the choice; the order of the rows does not matter.

    Returns
    -------
    Holdout
        ``units`` are perturbations, contexts, or empty for cells.
    """
    rng = np.random.default_rng(seed)
    perturbations = sorted({p for _, p in rows if not p.is_control})
    contexts = sorted({c for c, p in rows if not p.is_control})
    units = sorted({p.targets for p in perturbations})  # doses of the same targets stay together
    kinds = [[u for u in units if (len(u) == 1) == single] for single in (True, False)]
    enough = [kind for kind in kinds if len(kind) >= 3 * MIN_UNITS]
    if not enough and len(units) >= 3 * MIN_UNITS:
        enough = [units]
    out: set[tuple[str, ...]] = set()
    for kind in enough:
        n = max(MIN_UNITS, round(fraction * len(kind)))
        out |= {kind[i] for i in rng.permutation(len(kind))[:n]}
    if out:
        return Holdout("perturbations", tuple(p for p in perturbations if p.targets in out))
    if len(contexts) >= 3:
        return Holdout("contexts", (contexts[int(rng.integers(len(contexts)))],))
    return Holdout("cells", ())


def exclude(
    labels: Iterable[Perturbation], contexts: Iterable[str], holdout: Holdout
) -> np.ndarray:
    """Mask of the cells that a hold-out of perturbations or contexts takes out of training.

    Control cells stay: a context is known by them.
    """
    out = set(holdout.units)
    if holdout.kind == "perturbations":
        return np.fromiter((p in out for p in labels), bool)
    if holdout.kind == "contexts":
        pairs = zip(labels, contexts, strict=True)
        return np.fromiter((c in out and not p.is_control for p, c in pairs), bool)
    raise ValueError("Cells are held out at random, not by label.")


# Out-of-distribution splits


@dataclass(frozen=True)
class Split:
    """What a method may learn from, and what it is tested on; control cells belong to neither.

    Rows in neither list are left out altogether, such as combinations of a target that must stay
    unseen.

    Attributes
    ----------
    name
        Unique among the splits of a data set, such as ``"unseen-singles-0"``.
    kind
        The function that made it.
    train, test
        Rows (context, perturbation), sorted.
    seed
        Seed of the choice.

    Raises
    ------
    ValueError
        If a list is empty, holds the control, or both share a row.
    """

    name: str
    kind: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            rows: tuple[Row, ...] = tuple(sorted(set(getattr(self, part))))
            if not rows:
                raise ValueError(f"Split {self.name!r} has no {part} rows: nothing to {part} on.")
            if any(p.is_control for _, p in rows):
                raise ValueError(f"Split {self.name!r} lists control cells under {part!r}.")
            object.__setattr__(self, part, rows)
        both = [f"{p} in {c}" for c, p in sorted(set(self.train) & set(self.test))]
        if both:
            raise ValueError(f"Split {self.name!r} tests what it trains on: {both[:5]}.")


def unseen_singles(
    rows: Iterable[Row], *, folds: int = 5, seed: int = 0, blocks: Mapping[str, str] | None = None
) -> list[Split]:
    """K folds of single targets; nothing that holds a fold's targets is trained on.

    Parameters
    ----------
    rows
        Rows measured; controls are ignored, and the order does not matter.
    folds
        Number of folds.
    seed
        Seed of the folds.
    blocks
        Block of a target, such as its gene family or complex; a block stays in one fold. Targets
        without one are blocks of their own. See :func:`gene_families`, :func:`gene_set_blocks`.

    Returns
    -------
    list of Split

    Raises
    ------
    ValueError
        If there are fewer blocks than folds, or fewer than two folds.
    """
    measured = _measured(rows)
    singles = sorted({p.targets[0] for _, p in measured if len(p.targets) == 1})
    block = {t: (blocks or {}).get(t, t) for t in singles}
    names = sorted(set(block.values()))
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"{folds} folds of {len(names)} blocks of single targets: choose between 2 and "
            f"{len(names)} folds."
        )
    # Large blocks first, each into the smallest fold, so that folds are about equally large.
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    members = {name: [t for t in singles if block[t] == name] for name in names}
    fold: list[set[str]] = [set() for _ in range(folds)]
    for name in sorted(shuffled, key=lambda n: -len(members[n])):
        min(fold, key=len).update(members[name])
    kind = "unseen-singles" if blocks is None else "unseen-blocks"
    return [
        Split(
            f"{kind}-{i}",
            kind,
            tuple(r for r in measured if not set(r[1].targets) & out),
            tuple(r for r in measured if len(r[1].targets) == 1 and r[1].targets[0] in out),
            seed,
        )
        for i, out in enumerate(fold)
    ]


def gears_simulation(
    rows: Iterable[Row], *, seen: float = 0.75, seen2: float = 0.75, seed: int = 0
) -> Split:
    """The ``simulation`` split of GEARS (Roohani, Huang, Leskovec 2023).

    A share of the targets is seen. Trained on: their singles, and a share of the combinations of
    seen targets. Tested on: the rest, which are unseen singles and combinations with two, one or
    none of two targets seen.

    Parameters
    ----------
    rows
        Rows measured.
    seen
        Share of the targets that are seen.
    seen2
        Share of the combinations of seen targets that are trained on.
    seed
        Seed of both choices.

    Returns
    -------
    Split
    """
    measured = _measured(rows)
    rng = np.random.default_rng(seed)
    targets = sorted({t for _, p in measured for t in p.targets})
    known = set(_share(targets, seen, rng))
    pairs = sorted({p for _, p in measured if len(p.targets) > 1 and set(p.targets) <= known})
    trained = set(_share(pairs, seen2, rng))
    train = {
        r
        for r in measured
        if set(r[1].targets) <= known and (len(r[1].targets) == 1 or r[1] in trained)
    }
    test = tuple(r for r in measured if r not in train)
    return Split(f"gears-simulation-{seed}", "gears-simulation", tuple(train), test, seed)


def doubles(rows: Iterable[Row], *, fraction: float = 0.5, seed: int = 0) -> Split:
    """All singles and a share of the combinations are known (Ahlmann-Eltze, Huber, Anders 2025).

    Parameters
    ----------
    rows
        Rows measured.
    fraction
        Share of the combinations to train on.
    seed
        Seed of the choice.

    Returns
    -------
    Split
    """
    measured = _measured(rows)
    pairs = sorted({p for _, p in measured if len(p.targets) > 1})
    trained = set(_share(pairs, fraction, np.random.default_rng(seed)))
    test = tuple(r for r in measured if len(r[1].targets) > 1 and r[1] not in trained)
    train = tuple(r for r in measured if len(r[1].targets) == 1 or r[1] in trained)
    return Split(f"doubles-{seed}", "doubles", train, test, seed)


def leave_one_context_out(
    rows: Iterable[Row], *, groups: Mapping[str, str] | None = None
) -> list[Split]:
    """One split per context: tested on all of its perturbations, of which none is known.

    Parameters
    ----------
    rows
        Rows measured.
    groups
        Group of each context, such as the data set it comes from; a group is held out whole.

    Returns
    -------
    list of Split

    Raises
    ------
    ValueError
        If there is only one context or group.
    """
    measured = _measured(rows)
    group = {c: (groups or {}).get(c, c) for c, _ in measured}
    names = sorted(set(group.values()))
    if len(names) < 2:
        raise ValueError(f"Holding a context out needs at least 2; there is {names}.")
    kind = "held-out-context" if groups is None else "cross-dataset"
    return [
        Split(
            f"{kind}-{name}",
            kind,
            tuple(r for r in measured if group[r[0]] != name),
            tuple(r for r in measured if group[r[0]] == name),
        )
        for name in names
    ]


def few_shot_context(rows: Iterable[Row], *, known: int, seed: int = 0) -> list[Split]:
    """One split per context, of which a few perturbations are known, and all of the others.

    Parameters
    ----------
    rows
        Rows measured.
    known
        Perturbations of the held-out context to train on.
    seed
        Seed of their choice.

    Returns
    -------
    list of Split

    Raises
    ------
    ValueError
        If a context has too few perturbations to leave one for the test.
    """
    found = []
    for split in leave_one_context_out(rows):
        if not 0 < known < len(split.test):
            raise ValueError(
                f"{known} known perturbations of the {len(split.test)} of {split.test[0][0]!r}: "
                "at least one must be known, and one left to test on."
            )
        order = np.random.default_rng(seed).permutation(len(split.test))
        shown = {split.test[i] for i in order[:known]}
        name = f"few-shot-{known}-{split.test[0][0]}-{seed}"
        test = tuple(r for r in split.test if r not in shown)
        found.append(Split(name, "few-shot", (*split.train, *shown), test, seed))
    return found


def held_out_dose(rows: Iterable[Row], *, which: Literal["middle", "highest"]) -> Split:
    """One dose of every target that has at least three, in all contexts.

    Combinations of a target at that dose are left out altogether.

    Parameters
    ----------
    rows
        Rows measured.
    which
        The middle of its doses (of an even number, the lower of the two), or the highest.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        If no target was perturbed at three doses, or ``which`` is not known.
    """
    if which not in ("middle", "highest"):
        raise ValueError(f"which={which!r} is not known; choose 'middle' or 'highest'.")
    measured = _measured(rows)
    doses: dict[str, set[float]] = {}
    for _, p in measured:
        if len(p.targets) == 1:
            doses.setdefault(p.targets[0], set()).add(p.doses[0])
    several = {t: sorted(d) for t, d in doses.items() if len(d) > 2}
    if not several:
        raise ValueError(
            "No target was perturbed at three doses or more, so that none can be left out."
        )
    left = {t: d[-1 if which == "highest" else (len(d) - 1) // 2] for t, d in several.items()}
    out = {Perturbation.of([target], [dose]) for target, dose in left.items()}
    train = tuple(r for r in measured if not out.intersection(r[1].singles))
    test = tuple(r for r in measured if r[1] in out)
    return Split(f"{which}-dose", "held-out-dose", train, test)


# Roots of symbols whose numbers count genes that share a domain, or nothing, and not a family.
_ROOTS = "ANKRD|CCDC|C[0-9XY]+orf|FAM|KIAA|LINC|LOC|LRRC|RNF|TMEM|TTC|WDR|ZNF"


def gene_families(targets: Iterable[str]) -> dict[str, str]:
    """Family of each gene: its symbol without the last number and what follows it.

    ``IFNGR1`` and ``IFNGR2`` are of the family ``IFNGR``, ``NKX2-1`` and ``NKX2-5`` of ``NKX2``; a
    symbol without a number is a family of its own. HGNC numbers most families so. Where it numbers
    genes that share a domain or are not known yet (``TMEM``, ``ZNF``, ``C19orf``, ``FAM``), only
    letters after the number make a family: ``FAM83A`` and ``FAM83B``. For others use
    :func:`gene_set_blocks`.
    """
    found = {}
    for target in targets:
        numbered = re.fullmatch(rf"((?:{_ROOTS})[0-9]+)[A-Z]?", target, re.IGNORECASE)
        own = re.sub(r"((?<=[A-Za-z])|(?<=\d)-)\d+[A-Za-z]?$", "", target)
        found[target] = numbered[1] if numbered else own
    return found


def gene_set_blocks(targets: Iterable[str], sets: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Blocks of genes that share a set, such as a complex, directly or through other targets.

    Parameters
    ----------
    targets
        Genes to assign.
    sets
        Name → genes, as :func:`gpjepa.perturbations.read_gmt` returns.

    Returns
    -------
    dict
        Target → the first of its block by name.
    """
    block = {t: t for t in sorted(set(targets))}
    for genes in sets.values():
        joined = {block[g] for g in genes if g in block}
        if joined:
            first = min(joined)
            block = {t: first if b in joined else b for t, b in block.items()}
    return block


def _measured(rows: Iterable[Row]) -> list[Row]:
    return sorted({(c, p) for c, p in rows if not p.is_control})


def _share(items: Sequence[T], fraction: float, rng: np.random.Generator) -> list[T]:
    if not 0 < fraction < 1:
        raise ValueError(f"A share to train on must lie between 0 and 1, not {fraction}.")
    return [items[i] for i in rng.permutation(len(items))[: round(fraction * len(items))]]


# Manifests

_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Splits of one data set, as they are kept in a file.

    Attributes
    ----------
    data
        Name of the data set.
    data_hash
        Hash of its cells; a manifest is refused for other ones.
    splits
        The splits.
    """

    data: str
    data_hash: str
    splits: tuple[Split, ...]

    def __post_init__(self) -> None:
        names = [s.name for s in self.splits]
        repeats = sorted({n for n in names if names.count(n) > 1})
        if repeats or not names:
            raise ValueError(f"Splits need names of their own; repeated: {repeats or 'no splits'}.")

    def write(self, path: str | Path) -> None:
        """Write JSON; perturbations as ``str`` writes them: ``"A@0.5+B"``."""
        splits = [
            {
                "name": s.name,
                "kind": s.kind,
                "seed": s.seed,
                "train": [[c, str(p)] for c, p in s.train],
                "test": [[c, str(p)] for c, p in s.test],
            }
            for s in self.splits
        ]
        text = {"format": _FORMAT, "data": self.data, "data_hash": self.data_hash, "splits": splits}
        with written_whole(Path(path)) as draft:
            draft.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what :meth:`write` wrote, or what a user wrote in the same form.

        Raises
        ------
        ValueError
            If the file is not a manifest; the message names what is wrong.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']}, expected {_FORMAT}")
            splits = tuple(
                Split(
                    s["name"],
                    s.get("kind", "own"),
                    tuple((c, Perturbation.parse(p)) for c, p in s["train"]),
                    tuple((c, Perturbation.parse(p)) for c, p in s["test"]),
                    s.get("seed", 0),
                )
                for s in content["splits"]
            )
            return cls(content["data"], content["data_hash"], splits)
        except KeyError as error:
            raise ValueError(f"{path} is not a manifest of splits: it lacks {error}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a manifest of splits: {error}") from error

    def check(self, rows: Iterable[Row], data_hash: str) -> None:
        """Refuse a data set that these splits were not made for.

        Raises
        ------
        ValueError
            If the cells differ, or rows of a split do not occur.
        """
        here = set(rows)
        for split in self.splits:
            missing = [f"{p} in {c}" for c, p in (*split.train, *split.test) if (c, p) not in here]
            if missing:
                raise ValueError(
                    f"Split {split.name!r} names {len(missing)} rows that the data do not have, "
                    f"such as {missing[:3]}."
                )
        if self.data_hash != data_hash:
            raise ValueError(
                f"The manifest was made for other cells of {self.data!r} (hash "
                f"{self.data_hash[:12]}, these have {data_hash[:12]}): make the splits anew."
            )
