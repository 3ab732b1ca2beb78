"""Random streams that belong to (seed, perturbation, cell), not to positions or batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np
import torch

_THREADS = 4


def key(*parts: object) -> int:
    """A number of 128 bits that is the same for the same parts."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def stream(*parts: object) -> np.random.Generator:
    """A generator that is the same for the same parts, whatever came before."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def choose(names: np.ndarray, n: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose cells by name: positions in the order of the names, and the draw each stands for.

    With more draws than cells, cells are used again; None takes each cell once.
    """
    by_name = np.argsort(names, kind="stable")
    if n is None:
        return by_name, np.zeros(len(names), int)
    by_lot = sorted(by_name, key=lambda i: key(seed, names[i]))
    picked = [(by_lot[k % len(names)], k // len(names)) for k in range(n)]
    picked.sort(key=lambda pick: (names[pick[0]], pick[1]))
    return np.array([i for i, _ in picked]), np.array([draw for _, draw in picked])


def gamma_poisson(
    shape: np.ndarray, scale: np.ndarray, names: np.ndarray, draws: np.ndarray, *parts: object
) -> np.ndarray:
    """Counts of each cell whose rates are gamma variables, shape (n_cells, n_genes).

    A negative binomial with mean μ and dispersion θ has shape θ and scale μ/θ.
    """
    shape = np.broadcast_to(shape, scale.shape)
    result = np.empty(scale.shape, np.float32)

    def draw(i: int) -> None:
        rng = stream("counts", *parts, names[i], draws[i])
        result[i] = rng.poisson(rng.standard_gamma(shape[i]) * scale[i])

    # Every cell has a stream of its own, so that threads change no number.
    with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as threads:
        list(threads.map(draw, range(len(names))))
    return result
