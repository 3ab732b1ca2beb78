"""The script behind the tables of encoders: its thinning, its scores, its intervals."""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import representation


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    rates = np.where(np.arange(400)[:, None] < 200, [[2, 9, 4]], [[6, 3, 4]])
    counts = sp.csr_matrix(rng.poisson(np.repeat(rates, 10, 1)).astype(np.float32))
    obs = {"state": ["a"] * 200 + ["b"] * 200, "library_size": counts.sum(1).A1 + 50}
    return ad.AnnData(counts, pd.DataFrame(obs, index=map(str, range(400))))


def test_thinning_keeps_a_share_of_the_counts_and_of_the_library(cells):
    read = representation.plain(cells, "state")
    thin = representation.thinned(read, 0.25)
    assert thin.X.sum() / read.X.sum() == pytest.approx(0.25, rel=0.02)
    assert (thin.obs["library"] >= thin.X.sum(1).A1).all()
    assert thin.obs["library"].sum() / read.obs["library"].sum() == pytest.approx(0.25, rel=0.02)
    np.testing.assert_array_equal(representation.thinned(read, 1.0).X.toarray(), read.X.toarray())


def test_states_that_tell_labels_apart_score_and_those_that_do_not_do_not(cells, tmp_path):
    """The scores are read again from the folder, and the table is their mean over labels."""
    read = representation.plain(cells, "state")

    def telling(train, seed):
        return lambda other: other.X.toarray()

    def nothing(train, seed):
        rng = np.random.default_rng(seed)
        return lambda other: rng.normal(size=(other.n_obs, 2))

    arms, splits = {"telling": telling, "nothing": nothing}, representation.halves(
        read.obs["label"].to_numpy()
    )  # fmt: skip
    first = representation.screen_scores("screen", read, splits, arms, tmp_path)
    scores, folds, labels = representation.screen_scores("screen", read, splits,
                                                         dict.fromkeys(arms), tmp_path)  # fmt: skip
    np.testing.assert_array_equal(scores["nothing"], first[0]["nothing"])
    table = representation.summary(scores, folds, labels).set_index(["encoder", "measure"])
    assert table.loc[("telling", "probe"), "depth 1"] > 0.95
    printed = representation.markdown(table.reset_index()).splitlines()
    assert printed[2].startswith("| telling | ") and " to -" in printed[3]
    tables = [table.reset_index().assign(data=name) for name in ("one", "two")]
    aside = representation.side_by_side(tables, "probe").splitlines()
    assert aside[0] == "| probe | one | two |" and aside[3].count(" to -") == 2
    for measure in ("probe", "retrieval"):
        row = table.loc[("nothing", measure)]
        assert row["area"] == pytest.approx(0.5, abs=0.1)
        assert row["lower"] < row["difference"] < row["upper"] < 0
        k = ("probe", "retrieval").index(measure)
        slow = [scores["nothing"][k, 0][:, labels == label].mean() for label in "ab"]
        assert row["depth 1"] == pytest.approx(np.mean(slow), rel=1e-5)


def test_intervals_are_wider_where_folds_disagree():
    rng = np.random.default_rng(0)
    folds, labels = np.repeat(np.arange(4), 200), np.tile(["a", "b"], 400)
    base = rng.random((2, 4, 1, 800))
    same = representation.summary({"one": base, "other": base + 0.05}, folds, labels)
    apart = representation.summary(
        {"one": base, "other": base + 0.05 + 0.2 * (folds % 2 * 2 - 1)}, folds, labels
    )
    width = [(t["upper"] - t["lower"]).iloc[-1] for t in (same, apart)]
    assert width[0] < 1e-6 and width[1] > 0.1
    assert same["difference"].iloc[-1] == pytest.approx(0.05, abs=1e-6)
