"""The splits that a configuration can ask for: one registry of kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gpjepa import splits
from gpjepa.perturbations import read_gmt
from gpjepa.splits import Row, Split

from ._published import NORMAN_DOUBLES, published_splits

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """A part of a configuration: keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UnseenSingles(Strict):
    """K folds of targets that are in no training perturbation."""

    kind: Literal["unseen-singles"]
    folds: Annotated[int, Field(ge=2)] = 5
    seeds: list[int] = [0]
    blocks: Literal["family"] | Path | None = Field(
        None, description="Keep gene families, or genes that share a set of a GMT file, together."
    )

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        targets = {t for _, p in rows for t in p.targets}
        blocks = None
        if self.blocks == "family":
            blocks = splits.gene_families(targets)
        elif self.blocks is not None:
            blocks = splits.gene_set_blocks(targets, read_gmt(self.blocks))
        found = []
        for seed in self.seeds:
            for s in splits.unseen_singles(rows, folds=self.folds, seed=seed, blocks=blocks):
                found.append(Split(f"{s.name}-seed-{seed}", s.kind, s.train, s.test, seed))
        return found


class GearsSimulation(Strict):
    """GEARS's simulation split: unseen singles, and combinations with 2, 1 or 0 targets seen."""

    kind: Literal["gears-simulation"]
    seen: Share = 0.75
    seen2: Share = 0.75
    seeds: list[int] = [0]

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return [
            splits.gears_simulation(rows, seen=self.seen, seen2=self.seen2, seed=seed)
            for seed in self.seeds
        ]


class Doubles(Strict):
    """All singles and a share of the combinations are known."""

    kind: Literal["doubles"]
    fraction: Share = 0.5
    seeds: list[int] = [0]

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return [splits.doubles(rows, fraction=self.fraction, seed=seed) for seed in self.seeds]


class HeldOutContext(Strict):
    """Each context in turn, or some of them, of which only control cells are known."""

    kind: Literal["held-out-context"]
    contexts: list[str] | None = None

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        found = splits.leave_one_context_out(rows)
        if self.contexts is None:
            return found
        held = {s.test[0][0]: s for s in found}
        if missing := sorted(set(self.contexts) - set(held)):
            raise ValueError(f"contexts: {missing} do not occur; there are {sorted(held)}.")
        return [held[c] for c in self.contexts]


class FewShot(Strict):
    """Each context in turn, of which some perturbations are known."""

    kind: Literal["few-shot"]
    known: Positive
    seeds: list[int] = [0]

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return [
            s
            for seed in self.seeds
            for s in splits.few_shot_context(rows, known=self.known, seed=seed)
        ]


class HeldOutDose(Strict):
    """The middle or the highest dose of every target."""

    kind: Literal["held-out-dose"]
    which: Literal["middle", "highest"]

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return [splits.held_out_dose(rows, which=self.which)]


class CrossDataset(Strict):
    """Each of several joined data sets in turn, of which only control cells are known."""

    kind: Literal["cross-dataset"]

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return splits.leave_one_context_out(rows, groups=contexts)


class OwnManifest(Strict):
    """Splits of a manifest: JSON as :class:`gpjepa.splits.Manifest` writes it."""

    kind: Literal["manifest"]
    path: Path


class Published(Strict):
    """Splits of a published table, beside whose numbers the report puts ours."""

    kind: Literal["published"]
    path: Path = NORMAN_DOUBLES

    def make(self, rows: list[Row], contexts: dict[str, str]) -> list[Split]:
        return published_splits(self.path, rows)


AnySplit = Annotated[
    UnseenSingles
    | GearsSimulation
    | Doubles
    | HeldOutContext
    | FewShot
    | HeldOutDose
    | CrossDataset
    | OwnManifest
    | Published,
    Field(discriminator="kind"),
]
