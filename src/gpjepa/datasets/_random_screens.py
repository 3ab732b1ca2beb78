"""A wide prior over perturbation screens at the level of mean effects, for models that learn from many.

Nothing here is fitted to a data set, and :func:`gpjepa.datasets.simulate`, the benchmark's simulator,
is not one of its families: what is learned here can be judged there. A screen is drawn in
milliseconds; its effects have the sampling noise that cells would give them, with that of the
controls in all effects of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gpjepa.effects import EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures

SCALE = "log1p_mean"
_N_PARTS = 32  # parts of the control cells behind the table's ``draws``
_STEPS = 25  # of a network towards its steady state

Rng = np.random.Generator


@dataclass(frozen=True)
class RandomScreen:
    """A screen and its truth.

    Attributes
    ----------
    effects
        Measured effects of all perturbations in all contexts, on the scale ``log1p_mean``.
    truth
        True effects of the same rows, shape (n_rows, n_genes).
    features
        Features of the targets: informative, weak, useless or none.
    laws
        Which of ``LAWS`` the combinations follow, in any context; none in networks.
    """

    effects: EffectTable
    truth: np.ndarray
    features: tuple[TargetFeatures, ...]
    laws: frozenset[str]


def random_screen(rng: Rng) -> RandomScreen:
    """Draw a screen: its size, its biology, its depth and its features are all random.

    Single effects come from gene regulatory networks of random size, density, hubs, saturation and
    sign, or from random sparse or low-rank matrices. Combinations follow the network, or a mixture
    of laws (additive, scaled, dominant, the larger, masking, saturating by gene or by programme, a
    common part that is not doubled, same-sign saturation), and something of their own. Contexts share
    most of an effect, and differ in expression, strength and in what is special to them.
    """
    n_genes = int(_log_uniform(rng, 50, 1_000))
    n_contexts = 1 if rng.random() < 0.7 else int(rng.integers(2, 5))
    n_targets = int(rng.integers(5, 41 if n_contexts == 1 else 21))
    pairs = _pairs(rng, n_targets, int(_log_uniform(rng, 4, 45 / n_contexts)))
    biology = _network if rng.random() < 0.35 else _matrices
    rate = np.exp(rng.normal(rng.uniform(-3.5, 1), rng.uniform(0.5, 2), n_genes))
    scene = _Scene(rng, rate, _log_uniform(rng, 0.3, 30), _own_genes(rng, n_targets, n_genes))
    log_fold, of_pairs, features = biology(rng, n_targets, n_genes, pairs)
    effects = scene.in_contexts(n_contexts, log_fold, of_pairs, pairs)
    if rng.random() < 0.06:  # next to nothing happens
        effects = effects.scaled(_log_uniform(rng, 1e-3, 0.1))
    return _measured(rng, scene, effects, pairs, _features(rng, features))


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _pairs(rng: Rng, n_targets: int, n: int) -> np.ndarray:
    """Different pairs of targets, shape (n_pairs, 2)."""
    every = np.array([(i, j) for i in range(n_targets) for j in range(i)])
    return every[rng.permutation(len(every))[:n]]


def _own_genes(rng: Rng, n_targets: int, n_genes: int) -> np.ndarray:
    """Which gene of the panel each target is, -1 for targets that are not among them."""
    found = np.full(n_targets, -1)
    if rng.random() < 0.7:
        n = min(n_targets, n_genes)
        on_panel = np.flatnonzero(rng.random(n) < rng.uniform(0.2, 1))
        found[on_panel] = rng.permutation(n_genes)[on_panel]
    return found


# Where effects come from


def _network(
    rng: Rng, n_targets: int, n_genes: int, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Log fold changes at the steady state of a random regulatory network."""
    n = int(rng.integers(n_targets, n_targets + 80))
    respond = _RESPONSES[rng.integers(len(_RESPONSES))]
    hubs = rng.pareto(rng.uniform(1, 3), n) + 0.2
    hubs /= hubs.mean()
    present = rng.random((n, n)) < np.clip(_log_uniform(rng, 0.01, 0.2) * hubs, 0, 0.9)
    weights = rng.normal(size=(n, n)) * present
    weights *= rng.uniform(0.2, 2.5) / max(np.sqrt((weights**2).sum(1).mean()), 1e-6)
    if rng.random() < 0.4:
        weights = np.tril(weights, -1)  # without feedback
    basal = rng.normal(size=n) * rng.uniform(0, 1.5)
    chosen = np.zeros((1 + n_targets + len(pairs), n), bool)
    chosen[1 + np.arange(n_targets), np.arange(n_targets)] = True
    for k, pair in enumerate(pairs):
        chosen[1 + n_targets + k, pair] = True
    activity = _steady_state(rng, respond, weights, basal, chosen)
    acts = rng.random((n, n_genes)) < np.clip(_log_uniform(rng, 0.005, 0.2) * hubs[:, None], 0, 0.9)
    onto_genes = rng.normal(size=(n, n_genes)) * acts
    change = (activity - activity[:1])[1:] @ onto_genes
    largest = max(np.abs(change[:n_targets]).max(), 1e-6)
    change *= _log_uniform(rng, 0.3, 3) * rng.uniform(1, 3) / largest
    if rng.random() < 0.4:
        most = rng.uniform(0.5, 3)
        change = most * np.tanh(change / most)
    of_targets = onto_genes[:n_targets] + weights.T[:n_targets] @ onto_genes
    return change[:n_targets], change[n_targets:], of_targets


_RESPONSES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    np.tanh,
    lambda x: 1 / (1 + np.exp(-x)),
    lambda x: np.clip(x, 0, 1),
    lambda x: np.clip(x, 0, None) ** 2 / (1 + np.clip(x, 0, None) ** 2),
)


def _steady_state(
    rng: Rng,
    respond: Callable[[np.ndarray], np.ndarray],
    weights: np.ndarray,
    basal: np.ndarray,
    chosen: np.ndarray,
) -> np.ndarray:
    """Activities when regulators are set to a level or pushed, shape (n_perturbations, n)."""
    activation, pushed = rng.random() < 0.6, rng.random() < 0.4
    level = rng.uniform(1, 3) if activation else rng.uniform(-0.2, 0.2)
    push = rng.uniform(1, 4) * (1 if activation else -1)
    activity = np.tile(respond(basal), (len(chosen), 1))
    for _ in range(_STEPS):
        drive = activity @ weights.T + basal + (chosen * push if pushed else 0)
        new = respond(drive)
        activity = 0.5 * activity + 0.5 * (new if pushed else np.where(chosen, level, new))
    return activity


def _matrices(
    rng: Rng, n_targets: int, n_genes: int, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Sparse, or low-rank, log fold changes; combinations follow laws."""
    kind = rng.integers(3)
    if kind == 0:
        density = np.exp(rng.uniform(np.log(0.01), np.log(0.6), (n_targets, 1)))
        change = rng.standard_t(rng.uniform(2.2, 8), (n_targets, n_genes))
        change *= rng.random(change.shape) < density
        shared = rng.normal(size=(n_targets, 8))
    else:
        q = int(rng.integers(1, 12))
        shared = rng.normal(size=(n_targets, q))
        shared *= rng.random(shared.shape) < rng.uniform(0.2, 1)
        programmes = rng.standard_t(3, (q, n_genes))
        programmes *= rng.random(programmes.shape) < _log_uniform(rng, 0.03, 0.8)
        change = shared @ programmes / np.sqrt(q)
        if kind == 2:
            own = rng.standard_t(3, change.shape) * (rng.random(change.shape) < 0.1)
            change = change + rng.uniform(0, 1) * own
    strength = np.exp(rng.normal(0, rng.uniform(0.2, 1.2), n_targets))
    change *= strength[:, None] * _log_uniform(rng, 0.1, 1.2)
    if rng.random() < 0.7:  # a response that all perturbations cause, such as stress
        common = rng.standard_t(3, n_genes) * (rng.random(n_genes) < _log_uniform(rng, 0.05, 1))
        share = np.abs(rng.normal(1, rng.uniform(0, 0.7), (n_targets, 1)))
        change = change + share * common * _log_uniform(rng, 0.03, 0.8) * rng.choice([1, -1])
    if rng.random() < 0.3:  # many do next to nothing
        change[rng.random(n_targets) < rng.uniform(0.1, 0.7)] *= 0.02
    return change, None, shared


# How effects combine: each law takes two sets of effects (n, n_genes), and what is common to all


def _scaled(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    return _about(rng, rng.uniform(0.3, 1.3), rng.uniform(0, 0.2), len(a)) * (a + b)


def _scaled_apart(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    one, other = (_about(rng, rng.uniform(0.4, 1.1), 0.25, len(a)) for _ in range(2))
    return one * a + other * b


def _dominant(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    first = (a**2).sum(1, keepdims=True) >= (b**2).sum(1, keepdims=True)
    strong, weak = np.where(first, a, b), np.where(first, b, a)
    keeps, adds = rng.uniform(0.8, 1.1), rng.uniform(0, 0.6)
    return _about(rng, keeps, 0.1, len(a)) * strong + _about(rng, adds, 0.15, len(a)) * weak


def _larger(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    larger = np.where(np.abs(a) >= np.abs(b), a, b)
    return larger + rng.uniform(0, 0.7) * (a + b - larger)


def _masking(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    masks = rng.random((len(a), 1)) < rng.uniform(0.2, 0.9)
    first = rng.random((len(a), 1)) < 0.5
    left = rng.uniform(0, 0.5, 2)
    return np.where(masks, np.where(first, a + left[0] * b, b + left[1] * a), a + b)


def _saturating(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    most = np.abs(a + b).max() * _log_uniform(rng, 0.15, 2)
    most = most * np.exp(rng.normal(0, 0.4, a.shape[1])) + 1e-9
    return most * np.tanh((a + b) / most)


def _common_once(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    size = max((common**2).sum(), 1e-9)
    of_a, of_b = ((x @ common / size)[:, None] for x in (a, b))
    smaller = np.where(np.abs(of_a) < np.abs(of_b), of_a, of_b)
    return a + b - rng.uniform(0.3, 1.2) * smaller * common


def _same_sign(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    larger = np.where(np.abs(a) >= np.abs(b), a, b)
    together = larger + rng.uniform(0, 1) * (a + b - larger)
    return np.where(a * b > 0, together, a + rng.uniform(0.7, 1.2) * b)


def _programmes_saturate(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    axes = np.linalg.svd(np.vstack([a, b]), full_matrices=False)[2][: int(rng.integers(1, 8))]
    on_a, on_b = a @ axes.T, b @ axes.T
    most = np.abs(np.vstack([on_a, on_b])).max(0) * rng.uniform(0.5, 2) + 1e-9
    return a + b + (most * np.tanh((on_a + on_b) / most) - on_a - on_b) @ axes


def _additive(rng: Rng, a: np.ndarray, b: np.ndarray, common: np.ndarray) -> np.ndarray:
    return a + b


def _about(rng: Rng, mean: float, sd: float, n: int) -> np.ndarray:
    return mean + sd * rng.normal(size=(n, 1))


Law = Callable[[Rng, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
LAWS: Mapping[str, Law] = {
    "additive": _additive,
    "scaled": _scaled,
    "scaled apart": _scaled_apart,
    "dominant": _dominant,
    "larger": _larger,
    "masking": _masking,
    "saturating": _saturating,
    "common once": _common_once,
    "same sign": _same_sign,
    "programmes saturate": _programmes_saturate,
}
"""How the effects of two perturbations combine."""


def _combined(
    rng: Rng, singles: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, frozenset[str]]:
    """Effects of pairs by a law, or by two of them, and what is special to each; and the laws."""
    a, b, common = singles[pairs[:, 0]], singles[pairs[:, 1]], singles.mean(0)
    names = list(LAWS)
    law = other = names[rng.integers(len(names))]
    found = LAWS[law](rng, a, b, common)
    if rng.random() < 0.5:
        share = rng.random()
        other = names[rng.integers(len(names))]
        found = share * found + (1 - share) * LAWS[other](rng, a, b, common)
    size = np.abs(a) + np.abs(b)
    found = found + 0.7 * _log_uniform(rng, 0.02, 0.5) * size * rng.normal(size=size.shape)
    if rng.random() < 0.4:  # something that no single shows
        strength = rng.normal(size=(len(a), 1)) * _log_uniform(rng, 0.02, 0.4)
        new = rng.standard_t(3, a.shape[1]) * (rng.random(a.shape[1]) < 0.3)
        found = found + strength * np.sqrt((size**2).mean()) * new
    return found, frozenset({law, other})


# Contexts, and what is measured


@dataclass(frozen=True)
class _Effects:
    """True effects (n_contexts, n, n_genes) of singles and pairs, and rates (n_contexts, n_genes)."""

    rate: np.ndarray
    singles: np.ndarray
    pairs: np.ndarray
    laws: frozenset[str]

    def scaled(self, factor: float) -> _Effects:
        return replace(self, singles=factor * self.singles, pairs=factor * self.pairs)


@dataclass(frozen=True)
class _Scene:
    """Expression of the genes, and how deeply it is sequenced."""

    rng: Rng
    rate: np.ndarray
    depth: float
    own_genes: np.ndarray

    def level(self, rate: np.ndarray) -> np.ndarray:
        """log1p of the rate in counts."""
        return np.log1p(self.depth * rate)

    def in_contexts(
        self, n: int, log_fold: np.ndarray, of_pairs: np.ndarray | None, pairs: np.ndarray
    ) -> _Effects:
        """Effects in contexts that share most of them."""
        rng = self.rng
        multiplicative = rng.random() < 0.5
        spread = _log_uniform(rng, 0.05, 1) if n > 1 else 0.0
        apart = _log_uniform(rng, 0.05, 1.5) if n > 1 else 0.0
        direct = rng.uniform(1, 5) * rng.choice([1, -1]) * rng.uniform(0.5, 1.2, len(log_fold))
        found, laws = [], frozenset[str]()
        for _ in range(n):
            rate = self.rate * np.exp(spread * rng.normal(size=len(self.rate)))
            strength = np.exp(0.5 * apart * rng.normal(size=(len(log_fold), 1)))
            factor = strength * (1 + apart * rng.normal(size=log_fold.shape) * (rng.random() < 0.7))
            mine = log_fold * (factor if n > 1 else 1.0)
            mine = self._with_direct(mine, direct)
            if of_pairs is not None:
                both = of_pairs * (np.sqrt(np.prod(strength[pairs], axis=1)) if n > 1 else 1.0)
                both = self._pairs_with_direct(both, mine, pairs)
                found.append((rate, self._seen(mine, rate), self._seen(both, rate)))
                continue
            both, used = _combined(rng, mine, pairs)
            laws |= used
            if multiplicative:
                found.append((rate, self._seen(mine, rate), self._seen(both, rate)))
            else:
                floor = -self.level(rate)
                found.append((rate, np.maximum(mine, floor), np.maximum(both, floor)))
        rates, singles, of_all = (np.stack(each) for each in zip(*found, strict=True))
        return _Effects(rates, singles, of_all, laws)

    def _seen(self, log_fold: np.ndarray, rate: np.ndarray) -> np.ndarray:
        return self.level(rate * np.exp(np.clip(log_fold, -6, 6))) - self.level(rate)

    def _with_direct(self, log_fold: np.ndarray, direct: np.ndarray) -> np.ndarray:
        """What each perturbation does to its own target."""
        log_fold = log_fold.copy()
        on_panel = np.flatnonzero(self.own_genes >= 0)
        log_fold[on_panel, self.own_genes[on_panel]] = direct[on_panel]
        return log_fold

    def _pairs_with_direct(
        self, both: np.ndarray, singles: np.ndarray, pairs: np.ndarray
    ) -> np.ndarray:
        both = both.copy()
        for k, pair in enumerate(pairs):
            for t in pair[self.own_genes[pair] >= 0]:
                both[k, self.own_genes[t]] = singles[t, self.own_genes[t]]
        return both


class _Noise:
    """Errors of profiles, which vary together between genes."""

    def __init__(self, rng: Rng, n_genes: int) -> None:
        self.rng = rng
        q = int(rng.integers(1, 6))
        axes = rng.standard_t(3, (q, n_genes))
        axes /= np.linalg.norm(axes, axis=0)
        share = rng.beta(1, 3, n_genes) if rng.random() < 0.7 else np.zeros(n_genes)
        self._axes, self._own = axes * np.sqrt(share), np.sqrt(1 - share)

    def unit(self, n: int) -> np.ndarray:
        """Errors of variance 1, shape (n, n_genes)."""
        rng = self.rng
        together = rng.normal(size=(n, len(self._axes))) @ self._axes
        return together + self._own * rng.normal(size=(n, len(self._own)))

    def stated(self, variance: np.ndarray) -> np.ndarray:
        """A variance as cells would estimate it."""
        return variance * np.exp(0.15 * self.rng.normal(size=variance.shape))

    def draws(self) -> np.ndarray:
        parts = self.unit(_N_PARTS)
        parts -= parts.mean(0)
        return (parts / np.linalg.norm(parts, axis=0)).astype(np.float32)


def _measured(
    rng: Rng,
    scene: _Scene,
    effects: _Effects,
    pairs: np.ndarray,
    features: Callable[[list[str]], tuple[TargetFeatures, ...]],
) -> RandomScreen:
    """Effects with the noise of cells, as a table."""
    n_targets, n_genes = effects.singles.shape[1:]
    genes = np.array([f"G{g:04d}" for g in range(n_genes)], dtype=object)
    targets = [str(genes[g]) if g >= 0 else f"T{t:03d}" for t, g in enumerate(scene.own_genes)]
    perturbations = [Perturbation.of([t]) for t in targets]
    perturbations += [Perturbation.of([targets[i], targets[j]]) for i, j in pairs]
    cells_of = [_log_uniform(rng, 10, 1_500) for _ in range(2)]
    n_controls, spread = _log_uniform(rng, 50, 5_000), rng.uniform(0, 0.7)
    overdispersion = _log_uniform(rng, 0.02, 1)
    rows: list[tuple[str, Perturbation]] = []
    effect, truth, variance, n_cells = [], [], [], []
    control, control_variance, draws = {}, {}, {}
    for c, rate in enumerate(effects.rate):
        mean = scene.depth * rate
        per_cell = (mean + overdispersion * mean**2) / (1 + mean) ** 2 + 1e-6
        noise, name = _Noise(rng, n_genes), f"context {c}"
        of_control = per_cell / n_controls
        error = np.sqrt(of_control) * noise.unit(1)[0]
        control[name] = np.maximum(np.log1p(mean) + error, 0)
        control_variance[name] = noise.stated(of_control)
        draws[name] = noise.draws()
        mine = np.concatenate([effects.singles[c], effects.pairs[c]])
        typical = np.repeat(np.log(cells_of), [n_targets, len(pairs)])
        n = np.maximum(np.exp(rng.normal(typical, spread)), 2)
        own = per_cell / n[:, None]
        effect.append(mine + np.sqrt(own) * noise.unit(len(mine)) - error)
        truth.append(mine)
        variance.append(noise.stated(own))
        n_cells.append(n)
        rows += [(name, p) for p in perturbations]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    table = EffectTable(
        genes,
        tuple(rows[i] for i in order),
        np.concatenate(n_cells)[order],
        {SCALE: np.concatenate(effect)[order]},
        {SCALE: np.concatenate(variance)[order]},
        {SCALE: control},
        {SCALE: control_variance},
        draws={SCALE: draws},
    )
    return RandomScreen(table, np.concatenate(truth)[order], features(targets), effects.laws)


def _features(rng: Rng, shared: np.ndarray) -> Callable[[list[str]], tuple[TargetFeatures, ...]]:
    """Features of targets, from what their effects are made of: informative, weak, useless, none."""
    kind = rng.random()
    n = len(shared)
    signal = shared
    if signal.shape[1] > 64:
        signal = signal @ rng.normal(size=(signal.shape[1], 64)) / 8
    scale = max(signal.std(), 1e-9)
    noise = rng.normal(size=signal.shape) * scale
    if kind < 0.3:
        return lambda targets: ()
    level = 0.0 if kind < 0.45 else rng.uniform(0.1, 1)
    values = level * signal + (1 - level) * noise
    values[rng.random(n) < rng.choice([0, 0, 0.3])] = 0  # nothing is known of some
    return lambda targets: (TargetFeatures(targets, values, "features"),)
