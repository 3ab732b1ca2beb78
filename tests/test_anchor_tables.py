"""What the documentation claims of the anchor on real cells, on fewer resamplings."""

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers import DATA, real_file

N = 5


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
