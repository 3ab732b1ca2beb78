"""Random streams that belong to (seed, perturbation, cell), not to positions or batches."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def _key(*parts: object) -> int:
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def stream(*parts: object) -> np.random.Generator:
    """A generator that is the same for the same parts, whatever came before."""
    return np.random.Generator(np.random.Philox(key=_key(*parts)))


def choose(names: np.ndarray, n: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose cells by name: positions in the order of the names, and the draw each stands for.

    With more draws than cells, cells are used again; None takes each cell once.
    """
    by_name = np.argsort(names, kind="stable")
    if n is None:
        return by_name, np.zeros(len(names), int)
    by_lot = sorted(by_name, key=lambda i: _key(seed, names[i]))
    picked = [(by_lot[k % len(names)], k // len(names)) for k in range(n)]
    picked.sort(key=lambda pick: (names[pick[0]], pick[1]))
    return np.array([i for i, _ in picked]), np.array([draw for _, draw in picked])


def normal(names: np.ndarray, draws: np.ndarray, n: int, *parts: object) -> np.ndarray:
    """Standard normal noise of each cell, shape (n_cells, n)."""
    rows = [
        stream("state", *parts, name, draw).standard_normal(n, dtype=np.float32)
        for name, draw in zip(names, draws, strict=True)
    ]
    return np.stack(rows)


def negative_binomial(
    mean: np.ndarray, dispersion: np.ndarray, names: np.ndarray, draws: np.ndarray, *parts: object
) -> np.ndarray:
    """Negative-binomial counts of each cell, shape (n_cells, n_genes)."""
    result = np.empty(mean.shape, np.float32)
    for i, (name, draw) in enumerate(zip(names, draws, strict=True)):
        rng = stream("counts", *parts, name, draw)
        result[i] = rng.poisson(rng.standard_gamma(dispersion) * (mean[i] / dispersion))
    return result


def perturbed_counts(
    counts: np.ndarray, mean: np.ndarray, dispersion: np.ndarray, visible: np.ndarray,
    ratio: np.ndarray, names: np.ndarray, draws: np.ndarray, *parts: object,
) -> np.ndarray:  # fmt: skip
    """Counts of each cell had its rates been ``ratio`` times what they are, shape (n_cells, n_genes).

    A negative binomial is a Poisson whose rate is a gamma variable with shape θ and rate θ/μ. Given
    the cell's own counts k that rate is again gamma, with shape θ + k and rate θ/μ + 1; genes that
    are not visible have no k, and keep the first.
    """
    result = np.empty(mean.shape, np.float32)
    for i, (name, draw) in enumerate(zip(names, draws, strict=True)):
        rng = stream("counts", *parts, name, draw)
        shape, rate = dispersion + counts[i], dispersion / mean[i] + visible
        result[i] = rng.poisson(rng.standard_gamma(shape) / rate * ratio[i])
    return result
