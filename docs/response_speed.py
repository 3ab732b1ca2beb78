"""How long judging and predicting take on a screen as large as Norman's: docs/response.md.

python docs/response_speed.py
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import numpy as np
from response import table_of

from gpjepa.datasets import simulate
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.response import ResponsePredictor


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long something took."""
    since = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - since:.0f} s", flush=True)


if __name__ == "__main__":
    # Effects of so many rows take as long whatever the number of cells behind them.
    table = table_of(simulate(20_000, 5_000, n_targets=105, n_combinations=65, seed=1))
    targets = sorted({p.targets[0] for _, p in table.rows if len(p.targets) == 1})
    values = np.random.default_rng(0).normal(size=(len(targets), 20))
    predictor = ResponsePredictor(TargetFeatures(targets, values, "of any kind")).fit(table)
    with timed("judging"):
        predictor.judge()
    pairs = [Perturbation.of(pair) for pair in combinations(targets, 2)]
    for asked in (pairs[:1_000], pairs):
        with timed(f"{len(asked)} pairs"):
            predictor.predict(asked, ["all"] * len(asked))
    with timed(f"{len(pairs)} pairs, the anchor alone"):
        predictor.anchor_.predict(pairs, ["all"] * len(pairs), "mean_log1p")
