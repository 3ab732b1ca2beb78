"""Seconds and peak memory of the anchor by the size of its table: docs/anchor.md.

python docs/anchor_size.py            # all sizes, each in a process of its own
python docs/anchor_size.py 1000x2000  # one of them
"""

import resource
import subprocess
import sys
import time

import numpy as np

from gpjepa.effects import EffectAnchor, EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures

# Contexts, perturbations of each, genes, kinds of features, unseen targets to predict.
SIZES = {
    "60x500": (1, 60, 500, 1, 1),
    "1000x2000": (1, 1_000, 2_000, 0, 1_000),
    "1000x2000+features": (1, 1_000, 2_000, 1, 10_000),
    "4000x2000+features": (1, 4_000, 2_000, 1, 1_000),
    "50x1000x1000": (50, 1_000, 1_000, 0, 1_000),
    "9000x8000+features": (1, 9_000, 8_000, 1, 1_000),
}


def simulated(
    contexts: int, n: int, genes: int, kinds: int, unseen: int
) -> tuple[EffectTable, list[TargetFeatures]]:
    """Effects of rank 20 and noise; features that know the programmes of each target."""
    rng = np.random.default_rng(0)
    programmes = rng.normal(size=(20, genes)).astype(np.float32) / 20
    names = [f"T{i:05d}" for i in range(n + unseen)]
    loadings = rng.normal(size=(n + unseen, 20)).astype(np.float32)
    signal = loadings[:n] @ programmes
    shared = rng.normal(0, 0.02, (contexts, genes)).astype(np.float32)
    effect = np.empty((contexts * n, genes), np.float32)
    for c in range(contexts):
        noise = rng.normal(0, 0.05, (n, genes)).astype(np.float32)
        effect[c * n : (c + 1) * n] = signal + noise - shared[c]
    where = [f"C{c:02d}" for c in range(contexts)]
    profile = rng.gamma(1.0, 1.0, (contexts, genes)).astype(np.float32)
    table = EffectTable(
        np.array([f"G{g}" for g in range(genes)], object),
        tuple((c, Perturbation.parse(t)) for c in where for t in names[:n]),
        np.full(contexts * n, 100),
        {"mean_log1p": effect},
        {"mean_log1p": np.full_like(effect, 0.05**2)},
        {"mean_log1p": dict(zip(where, profile, strict=True))},
        {"mean_log1p": {c: np.full(genes, 0.02**2, np.float32) for c in where}},
    )
    known = [np.hstack([loadings, rng.normal(size=(n + unseen, 30))]) for _ in range(kinds)]
    return table, [TargetFeatures(names, x, f"features {i}") for i, x in enumerate(known)]


def measure(size: str) -> None:
    """Fit, predict the rows measured and targets never perturbed; print one line."""
    table, features = simulated(*SIZES[size])
    before = peak()
    unseen = SIZES[size][-1]
    context = table.contexts[0]
    new = [Perturbation.parse(f"T{SIZES[size][1] + i:05d}") for i in range(unseen)]
    times = []
    for _ in range(5 if size == "60x500" else 1):
        start = time.perf_counter()
        anchor = EffectAnchor(features).fit(table)
        anchor.predict(new[:1], [context], "mean_log1p")
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    some = range(min(len(table.rows), 10_000))
    anchor.predict([table.rows[i][1] for i in some], [table.rows[i][0] for i in some], "mean_log1p")
    seen = time.perf_counter() - start
    start = time.perf_counter()
    anchor.predict(new, [context] * unseen, "mean_log1p")
    never = time.perf_counter() - start
    print(
        f"{size}: fit {min(times):.3f} s, predict {len(some)} measured {seen:.1f} s, "
        f"{unseen} unseen {never:.1f} s; peak {peak():.2f} GB (table {before:.2f})",
        flush=True,
    )


def peak() -> float:
    """Peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    if len(sys.argv) == 2:
        measure(sys.argv[1])
    else:
        for name in SIZES:
            subprocess.run([sys.executable, __file__, name], check=True)
