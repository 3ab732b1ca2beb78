"""Targets never perturbed: attention over those measured, learned on the screen itself."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, cos, pi

import numpy as np
import torch

from gpjepa.effects import EffectAnchor, Scale
from gpjepa.nn import SimilarityAttention
from gpjepa.perturbations import TargetFeatures

_MOST_VALUES = 60  # leading components of the effects of a context: no more can be predicted
_MOST_COORDINATES = 64  # of each kind of features
_DROPPED = 0.25
_CONTEXTS_PER_STEP = 4
_TARGETS_PER_STEP = 1_000
ENOUGH_TARGETS = 25
"""Targets with features that have to be measured in a context before attention is learned."""


class TargetAttention:
    """Attention over the measured targets of each context, alike in all of them.

    Effects of targets, less the mean effect, are predicted in their leading components from
    similarities by the features, and from coordinates of the targets: their leading components by
    each kind of similarity. Training hides a fifth of the targets at a time.

    Parameters
    ----------
    anchor
        The fitted anchor, with features.
    scale
        Scale of the effects.
    n_steps, n_members
        Steps of training, and networks whose predictions are averaged.
    seed
        Of everything drawn.

    Attributes
    ----------
    contexts
        Those in which it can predict: of enough targets, something is known.
    """

    def __init__(
        self,
        anchor: EffectAnchor,
        scale: Scale,
        n_steps: int = 400,
        n_members: int = 2,
        seed: int = 0,
    ) -> None:
        self.features = anchor.features
        by_context = self.measured(anchor)
        self.contexts: dict[str, _Values] = {}
        if not by_context:
            return
        # A few contexts are seen at each step.
        self.n_steps = n_steps * min(ceil(len(by_context) / _CONTEXTS_PER_STEP), 4)
        targets = sorted({t for of in by_context.values() for t in of})
        self._map = _Coordinates(self.features, targets)
        self.similarity, self.coordinates = self._map.of(targets)
        at = {t: i for i, t in enumerate(targets)}
        effect = anchor.effects_.effect[scale]
        self.contexts = {c: _Values(effect, of, at) for c, of in by_context.items()}
        seeds = np.random.SeedSequence(seed).generate_state(n_members).tolist()
        self.members = [self._trained(each) for each in seeds]

    @staticmethod
    def measured(anchor: EffectAnchor) -> dict[str, dict[str, list[int]]]:
        """Rows of the targets with features, of the contexts that have enough of them."""
        found: dict[str, dict[str, list[int]]] = {}
        for i, (context, p) in enumerate(anchor.effects_.rows):
            if len(p.targets) == 1 and anchor.covers(p.targets[0]):
                found.setdefault(context, {}).setdefault(p.targets[0], []).append(i)
        return {
            c: dict(sorted(of.items()))
            for c, of in sorted(found.items())
            if len(of) >= ENOUGH_TARGETS
        }

    def predict(self, targets: Sequence[str], context: str) -> np.ndarray:
        """Effects beyond the mean effect of targets in a context, shape (n, n_genes)."""
        similarity, coordinates = self._map.of(targets)
        of = self.contexts[context]
        with torch.inference_mode():
            each = [
                member[context](
                    similarity[:, :, of.at], coordinates, self.coordinates[of.at], of.values
                )
                for member in self.members
            ]
        return of.effects(torch.stack(each).mean(0))

    def _trained(self, seed: int) -> dict[str, SimilarityAttention]:
        """One network; contexts differ in the size of what it says only."""
        generator = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            n_values = {c: of.values.shape[1] for c, of in self.contexts.items()}
            first, *rest = (
                SimilarityAttention(len(self.features), self.coordinates.shape[1], n)
                for n in n_values.values()
            )
            for other in rest:  # all but `out` is shared
                for name in ("kinds", "sharpness", "query", "key", "null"):
                    setattr(other, name, getattr(first, name))
            found = dict(zip(self.contexts, (first, *rest), strict=True))
            modules = torch.nn.ModuleList(found.values())
            optimizer = torch.optim.AdamW(modules.parameters(), 5e-3, weight_decay=1e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda s: min(1, (s + 1) / 20) * (0.5 * (1 + cos(pi * s / self.n_steps)) + 0.01),
            )
            names = list(found)
            for _ in range(self.n_steps):
                optimizer.zero_grad()
                some = generator.permutation(len(names))[:_CONTEXTS_PER_STEP]
                losses = [self._loss(found[names[i]], names[i], generator) for i in some]
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
        return found

    def _loss(
        self, network: SimilarityAttention, context: str, rng: np.random.Generator
    ) -> torch.Tensor:
        """Squared error of a fifth of the targets, predicted from the others."""
        of = self.contexts[context]
        order = torch.from_numpy(rng.permutation(len(of.at))[:_TARGETS_PER_STEP])
        out, rest = order[: len(order) // 5], order[len(order) // 5 :]
        kept = torch.from_numpy(rng.random(self.coordinates.shape[1]) > _DROPPED)
        coordinates = self.coordinates[of.at] * kept / (1 - _DROPPED)
        similarity = self.similarity[:, of.at[out]][:, :, of.at[rest]]
        mean = of.values[rest].mean(0)
        said = network(similarity, coordinates[out], coordinates[rest], of.values[rest] - mean)
        return (said + mean - of.values[out]).square().sum(1).mean()


class _Values:
    """Effects of the targets of a context in their leading components, at unit length on average."""

    def __init__(self, effect: np.ndarray, rows: dict[str, list[int]], at: dict[str, int]) -> None:
        self.at = torch.tensor([at[t] for t in rows])
        effects = np.stack([effect[mine].mean(0) for mine in rows.values()]).astype(float)
        effects -= effects.mean(0)
        values, vectors = np.linalg.eigh(effects @ effects.T)
        n = min(_MOST_VALUES, int((values > 1e-9 * max(values.max(), 1e-300)).sum()))
        left, size = vectors[:, ::-1][:, :n], np.sqrt(values[::-1][:n])
        self.axes = left.T @ effects / size[:, None]
        scores = left * size
        self.size = max(float(np.sqrt((scores**2).sum(1).mean())), 1e-300)
        self.values = torch.from_numpy(scores / self.size).float()

    def effects(self, values: torch.Tensor) -> np.ndarray:
        """Effects of some values, shape (n, n_genes)."""
        return values.numpy() @ self.axes * self.size


class _Coordinates:
    """Similarities to measured targets, and coordinates that follow from these (Nyström 1930)."""

    def __init__(self, features: Sequence[TargetFeatures], measured: Sequence[str]) -> None:
        self.features, self.measured = features, measured
        self._onto = []
        for kind in features:
            values, vectors = np.linalg.eigh(kind.kernel(measured, measured))
            kept = np.argsort(-values)[:_MOST_COORDINATES]
            kept = kept[values[kept] > 1e-6 * max(values.max(), 1e-12)]
            self._onto.append(vectors[:, kept] / np.sqrt(values[kept]))

    def of(self, targets: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes (n_kinds, n_targets, n_measured) and (n_targets, n_coordinates)."""
        similar = [kind.kernel(targets, self.measured) for kind in self.features]
        coordinates = [k @ onto for k, onto in zip(similar, self._onto, strict=True)]
        return (
            torch.from_numpy(np.stack(similar)).float(),
            torch.from_numpy(np.concatenate(coordinates, 1)).float(),
        )
