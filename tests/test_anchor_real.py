"""What the documentation claims of the anchor on real cells, by the benchmark's own protocol."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DATA, real_file

from gpjepa import benchmark

DOCS = Path(__file__).parents[1] / "docs"
CLOSED = ["anchor", "no change", "mean", "shrunken mean", "additive", "random features"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    real_file("norman_2019_mini.h5ad")
    config = benchmark.BenchmarkConfig.read(DOCS / "benchmark.yaml", DATA).narrowed(CLOSED)
    config = config.model_copy(update={"metrics": ["squared_error"]})
    return benchmark.run(config, tmp_path_factory.mktemp("anchor"), progress=False)


@pytest.fixture
def errors(result):
    """Error of each closed form relative to no change, by data set."""
    table = result.table(metrics=["squared_error"])
    return table.pivot(index="data", columns="method", values="value")


@pytest.mark.slow
def test_the_anchor_is_hardly_worse_than_no_change_anywhere(errors):
    assert len(errors) == 5
    assert (errors["anchor"] < 1.02).all()
    for name in ("Datlinger 2021", "McFaline 2023"):
        assert errors.loc[name, "mean"] > 1.05  # what carelessness costs


@pytest.mark.slow
def test_the_anchor_is_better_where_something_can_be_known(errors, result):
    assert errors.loc["Papalexi 2021", "anchor"] < 0.7
    assert errors.loc["Zhao 2021", "anchor"] < 0.82
    by_regime = result.table(("regime",), ["squared_error"]).set_index(["data", "regime", "method"])
    known = by_regime["value"].loc["Norman 2019", "seen2"]  # both singles were measured
    assert known["anchor"] < 0.7 * known["additive"]


@pytest.mark.slow
def test_features_that_say_nothing_do_no_harm(errors):
    best = errors["shrunken mean"].clip(upper=1)
    assert errors.loc["Papalexi 2021", "random features"] < 1.05 * best["Papalexi 2021"]


def test_every_configuration_of_the_docs_can_be_run(tmp_path):
    """Names, options and files, as far as they can be checked without running anything."""
    real_file("norman_2019_mini.h5ad")
    for path in DATA.iterdir():
        (tmp_path / path.name).symlink_to(path.absolute())
    subprocess.run([sys.executable, DOCS / "drugs.py", DATA, tmp_path / "drugs"], check=True)
    for path in sorted(DOCS.glob("*.yaml")):
        config = benchmark.BenchmarkConfig.read(path, tmp_path)
        config.check()
        for data in config.data:
            if data.source is not None:
                assert data.make_splits(*data.load_joined()).splits
