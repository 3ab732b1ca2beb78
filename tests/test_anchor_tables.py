"""What the documentation claims of the anchor on real cells, on fewer resamplings."""

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, real_file

from gpjepa.effects import SCALES, EffectAnchor, EffectTable
from gpjepa.perturbations import LabelReader, TargetFeatures

N = 5
FIT, PREDICT = 100, 50  # passes over as many numbers as a prediction of all pairs has


@pytest.fixture(scope="module")
def tables():
    path = Path(__file__).parents[1] / "docs" / "anchor_tables.py"
    spec = importlib.util.spec_from_file_location("anchor_tables", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(table):
    return {title.split(",")[0]: rows for title, rows in table}


def test_doubles_of_norman(tables):
    real_file("norman_2019_mini.h5ad")
    ((_, rows),) = tables.doubles(DATA, N)
    for cells, ratio in rows["anchor"].items():
        assert ratio.value <= 0.5, cells


def test_held_out_contexts(tables):
    for name in ("zhao_2021", "datlinger_2021", "mcfaline_2023"):
        real_file(f"{name}_mini.h5ad")
    rows = found(tables.contexts(DATA, N))
    assert rows["zhao_2021"]["anchor"]["corrected"].value <= 0.78
    for name in ("datlinger_2021", "mcfaline_2023"):
        assert rows[name]["anchor"]["plain"].value <= 1.01
        assert rows[name]["transfer: mean"]["plain"].value > 1.3  # what carelessness costs


@pytest.mark.slow
def test_unseen_targets(tables):
    for name in ("papalexi_2021", "datlinger_2021", "norman_2019", "mcfaline_2023"):
        real_file(f"{name}_mini.h5ad")
    rows = {t.split(", each")[0]: r for t, r in tables.unseen(DATA, 20)}
    assert rows["papalexi_2021"]["anchor, gene sets"]["corrected"].value <= 0.62
    assert rows["datlinger_2021"]["anchor, gene sets"]["corrected"].value <= 0.75
    for name in ("norman_2019", "mcfaline_2023, by cell_line"):
        assert rows[name]["anchor, gene sets"]["plain"].value <= 1.01
    for by_method in rows.values():
        best = min(1.0, by_method["shrunken mean"]["corrected"].value)
        assert by_method["anchor, shuffled gene sets"]["corrected"].value <= 1.03 * best


@pytest.mark.slow
def test_norman_sized_screens_are_quick(rng):
    names = [f"T{i:03d}" for i in range(105)]
    pairs = [f"{a}+{b}" for i, a in enumerate(names) for b in names[:i]]
    labels = sorted(names + list(rng.permutation(pairs)[:131]))
    effects = rng.normal(0, 0.1, (236, 5_000)).astype(np.float32)
    noise = np.full_like(effects, 0.002)
    control = {"c": np.ones(5_000, np.float32)}
    table = EffectTable(
        np.array([f"g{i}" for i in range(5_000)], object),
        tuple(("c", LabelReader().read(x)) for x in labels), np.full(236, 300),
        dict.fromkeys(SCALES, effects), dict.fromkeys(SCALES, noise),
        dict.fromkeys(SCALES, control), dict.fromkeys(SCALES, {"c": noise[0]}),
    )  # fmt: skip
    features = TargetFeatures(names, rng.normal(size=(105, 20)))
    # In units of a plain pass over as many numbers as a prediction has: another machine, or one that
    # has other things to do, is slower at both.
    weights = rng.normal(size=(len(pairs), len(labels))).astype(np.float32)
    unit = min(_seconds(lambda: np.sqrt(np.abs(weights @ effects)) + noise[0]) for _ in range(3))
    anchor = EffectAnchor(features)

    def fit():
        anchor.fit(table)
        for scale in SCALES:
            anchor.predict([LabelReader().read(pairs[0])], ["c"], scale)

    assert _seconds(fit) < FIT * unit
    wanted = [LabelReader().read(x) for x in pairs]
    took = [_seconds(lambda: anchor.predict(wanted, ["c"] * len(wanted), "mean_log1p"))
            for _ in range(3)]  # fmt: skip
    assert min(took) < PREDICT * unit
    assert anchor.predict(wanted[:2], ["c"] * 2, "mean_log1p").mean.shape == (2, 5_000)


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
