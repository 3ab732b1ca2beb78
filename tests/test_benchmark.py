"""The benchmark: what a metric says, what cannot win, and that a run can be trusted."""

import html
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from benchmarks import TINY, Stranger, fitted, one_split, scores
from exchanges import record as exchange
from helpers import real_file

import gpjepa
from gpjepa import benchmark, splits
from gpjepa.benchmark import METRICS, Prediction, Scoring, Task, standard_cells
from gpjepa.benchmark._config import PRESETS
from gpjepa.benchmark._runner import contents
from gpjepa.benchmark.methods import METHODS, MethodError, Peer, oracle, predict_rows
from gpjepa.benchmark.metrics import cell_eval_config
from gpjepa.benchmark.metrics._cell_eval import cell_eval_files
from gpjepa.benchmark.report._page import _scaling
from gpjepa.benchmark.tasks import data_hash, measured_rows
from gpjepa.perturbations import TargetFeatures

PEERS = Path(__file__).parents[1] / "peers"
LFC = "de_wilcoxon_lfc_nmae"  # not defined where few genes respond
EFFECT = [
    "squared_error",
    "pearson_delta",
    "pearson_centroid",
    "l2_top1000",
    "r2_top20",
    "embedding_cosine",
    "embedding_retrieval",
]


# What a task shows, and to whom


def test_nobody_sees_what_is_held_out(task, cells):
    train = set(task.train.obs_names)
    halves = [t.cells for t in task.truths]
    n_held = sum(n for r, n in measured_rows(cells).items() if r in task.rows)
    assert sum((h.row >= 0).sum() for h in halves) == n_held
    labels = set(task.train.obs["perturbation"])
    assert not labels & {str(p) for _, p in task.rows}
    n_control = (cells.obs["perturbation"] == "control").sum()
    n = [task.control.n_obs, *((h.row < 0).sum() for h in halves)]
    assert sum(n) == n_control
    assert abs(n[0] - n_control / 2) <= 1
    assert abs(n[1] - n_control / 4) <= 1
    assert set(task.control.obs_names) <= train


def test_only_tested_contexts_spare_control_cells():
    adata = gpjepa.datasets.simulate(1_500, 40, n_targets=4, n_combinations=1, n_contexts=2)
    both = standard_cells(adata, context_key="context")
    split = splits.leave_one_context_out(measured_rows(both))[0]
    found = Task.of(both, split)
    here, other = split.test[0][0], split.train[0][0]
    n = both.obs.query("perturbation == 'control'")["context"].value_counts()
    kept = found.train.obs.query("perturbation == 'control'")["context"].value_counts()
    assert kept[other] == n[other]
    assert abs(kept[here] - n[here] / 2) <= 1
    assert set(found.control.obs["context"]) == {here}
    for truth in found.truths:
        assert set(truth.cells.context) == {here}


def test_held_out_cells_decide_nothing_that_is_fitted(task, cells):
    """Other counts in the held-out cells leave training, components and genes as they were."""
    changed = cells.copy()
    held = changed.obs["perturbation"].isin([str(p) for _, p in task.rows]).to_numpy()
    scrambled = changed.X.toarray()
    scrambled[held] = np.random.default_rng(0).permutation(scrambled[held].T).T * 3
    changed.X = sp.csr_matrix(scrambled)
    changed.obs["library_size"] = scrambled.sum(1)
    for n_genes in (None, 40):
        a, b = (Task.of(x, task.split, n_genes) for x in (cells.copy(), changed.copy()))
        assert list(a.genes) == list(b.genes)
        assert (a.train.X != b.train.X).nnz == 0
        np.testing.assert_array_equal(a.pca.components_, b.pca.components_)
        np.testing.assert_array_equal(a.mean_response, b.mean_response)
    assert not np.allclose(a.truths[0].effect, b.truths[0].effect)


def test_order_of_cells_and_genes_does_not_matter(cells):
    adata = gpjepa.datasets.simulate(2_500, 80, n_targets=12, n_combinations=16, seed=2)
    rng = np.random.default_rng(0)
    mixed = adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()
    other = standard_cells(mixed, context_key="context")
    assert data_hash(other) == data_hash(cells)
    split = splits.doubles(measured_rows(cells))
    a, b = (fitted("additive", Task.of(x, split)) for x in (cells, other))
    order = other.var_names.get_indexer(cells.var_names)
    np.testing.assert_allclose(a.effect, b.effect[:, order], atol=1e-5)


def test_small_groups_are_told(cells):
    some = [str(p) for _, p in measured_rows(cells)][0]
    mine = np.flatnonzero(cells.obs["perturbation"] == some)
    few = cells[np.delete(np.arange(cells.n_obs), mine[5:])].copy()
    rows = list(measured_rows(few))
    (row,) = [r for r in rows if str(r[1]) == some]
    test = [r for r in rows if r[0] == row[0]][:4]
    split = splits.Split("mine", "own", tuple(set(rows) - {row, *test}), (row, *test))
    assert Task.of(few, split).dropped == {row: 5}
    lone = splits.Split("mine", "own", tuple(set(rows) - {row}), (row,))
    with pytest.raises(ValueError, match="nothing can be tested"):
        Task.of(few, lone)
    control = np.flatnonzero(few.obs["perturbation"] == "control")
    with pytest.raises(ValueError, match="has 3 control cells; at least 8"):
        Task.of(few[np.delete(np.arange(few.n_obs), control[3:])].copy(), split)


def test_unlabelled_and_normalised_cells_are_refused(cells):
    with pytest.raises(KeyError, match="guide"):
        standard_cells(cells, perturbation_key="guide")
    with pytest.raises(ValueError, match="not integers"):
        standard_cells(ad.AnnData(cells.X.copy() * 0.5, cells.obs))


# Metrics


def test_energy_distance_is_that_of_a_double_loop_and_pertpy():
    import pertpy

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(0.5, 1, (7, 4))

    def mean(a, b, skip):
        values = [
            np.sqrt(((p - q) ** 2).sum())
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip and i == j)
        ]
        return np.mean(values)

    ours = benchmark.energy_distance_unbiased(x, y)
    loop = 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)
    assert ours == pytest.approx(loop, abs=1e-10)
    # pertpy's is the V-statistic: a cell's distance 0 to itself is among the distances within.
    within = (mean(x, x, True) / len(x)) + (mean(y, y, True) / len(y))
    theirs = float(pertpy.tl.Distance("edistance")(x, y))
    assert theirs == pytest.approx(loop + within, abs=1e-6)


def test_values_are_those_of_cell_eval2_on_the_command_line(task, tmp_path):
    predicted = fitted("additive", task)
    found = scores(task, predicted)
    pred, real = cell_eval_files(task, task.truths[0], predicted.cells, task.rows[0][0])
    pred.write_h5ad(tmp_path / "pred.h5ad")
    real.write_h5ad(tmp_path / "real.h5ad")
    own = cell_eval_config().to_dict()
    assert own["de"]["backend"] == "scanpy"
    subprocess.run(
        [
            "cell-eval2",
            "run",
            "-ap",
            tmp_path / "pred.h5ad",
            "-ar",
            tmp_path / "real.h5ad",
            "--preset",
            "vcc2026",
            "--pert-col",
            "perturbation",
            "--control",
            "control",
            "--no-target-genes",
            "--set",
            "device=cpu",
            "--set",
            "de.backend=scanpy",
            "-o",
            tmp_path / "out",
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": _path()},
    )
    theirs = pd.read_csv(tmp_path / "out" / "results.csv")
    theirs = theirs.pivot(index="perturbation", columns="metric", values="value")
    theirs = theirs.loc[[str(p) for _, p in task.rows]]
    for name in (
        "pds_cosine",
        "de_wilcoxon_sig_jaccard",
        "de_wilcoxon_direction_reach_raw",
        "de_wilcoxon_direction_fidelity_yield_raw",
        "de_wilcoxon_lfc_nmae",
    ):
        np.testing.assert_allclose(found[name], theirs[name], atol=1e-8)
    np.testing.assert_allclose(
        found["expr_mse_unbiased_capped_norm"], theirs["expr_mse_unbiased_capped"], atol=1e-8
    )


def _path():
    return f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"


def test_what_does_not_depend_on_the_perturbation_has_chance_discrimination(task):
    for name in ("no change", "mean"):
        found = scores(task, fitted(name, task), metrics=["pds_cosine", "embedding_retrieval"])
        assert found["pds_cosine"].mean() == pytest.approx(0.5, abs=1e-12), name
        assert found["embedding_retrieval"].mean() == pytest.approx(0.5, abs=1e-12), name
    found = scores(task, fitted("mean", task), metrics=["pearson_centroid"])
    assert (found["pearson_centroid"] == 0).all()


def test_a_single_perturbation_is_told_from_nothing(task, cells):
    alone = replace(task.split, test=task.rows[:1])
    found = Task.of(cells, alone)
    values = scores(found, fitted("additive", found), metrics=["pds_cosine", "squared_error"])
    assert values["pds_cosine"].isna().all()
    assert values["squared_error"].notna().all()


def test_truth_is_perfect_and_no_change_has_the_measured_size(task):
    found = scores(task, oracle("truth", task, 0))
    for name, best in (
        ("pearson_delta", 1),
        ("l2_top1000", 0),
        ("r2_top20", 1),
        ("variance_log_ratio", 0),
        ("gene_correlation_error", 0),
        ("embedding_cosine", 0),
        ("embedding_retrieval", 1),
        ("pds_cosine", 1),
        ("de_wilcoxon_sig_jaccard", 1),
    ):
        np.testing.assert_allclose(found[name], best, atol=1e-6, err_msg=name)
    none = scores(task, fitted("no change", task), metrics=["squared_error"])
    np.testing.assert_allclose(none["squared_error"], none["squared_effect"])


def test_noisier_cells_and_wrong_spread_are_seen(task):
    truth = oracle("truth", task, 0)
    values = truth.cells.counts.copy()
    values.data = values.data * np.random.default_rng(0).choice([1, 4], values.nnz)
    noisy = replace(truth, drawn=replace(truth.cells, counts=values))
    names = ["variance_log_ratio", "energy_distance_unbiased", "gene_correlation_error"]
    before, after = (scores(task, p, metrics=names).mean() for p in (truth, noisy))
    assert (after > before + 0.01).all()


def test_intervals_are_as_wide_as_their_errors(task):
    rng = np.random.default_rng(0)
    truth = task.truths[0]
    sd = np.full_like(truth.effect, 0.3)
    noise = np.sqrt(truth.table.noise("mean_log1p"))
    centre = truth.effect - rng.normal(size=sd.shape) * np.sqrt(sd**2 + noise**2)
    good = Prediction(centre, oracle("truth", task, 0).cells, sd)
    names = [f"coverage_{x}" for x in benchmark.INTERVALS]
    found = scores(task, good, metrics=[*names, "crps"])
    for name in names:
        assert found[name].mean() == pytest.approx(METRICS[name].best, abs=0.03)
    for factor in (0.3, 3):
        other = replace(good, sd=sd * factor)
        assert scores(task, other, metrics=["crps"])["crps"].mean() > found["crps"].mean()
    error = np.arange(1.0, 9.0)
    assert benchmark.risk_coverage(error, error) < 0.7
    assert benchmark.risk_coverage(error, -error) > 1.3
    assert benchmark.risk_coverage(np.ones(5), error[:5]) == 1


def test_enrichment_agrees_with_the_truth_and_with_plain_regression(cells, task):
    rng = np.random.default_rng(0)
    sets = {f"set {i}": set(rng.choice(task.genes, 12, replace=False)) for i in range(8)}
    sets["too small"] = set(task.genes[:2])
    known = replace(task, gene_sets=sets)
    names = ["gene_set_agreement", "signature_ranking"]
    np.testing.assert_allclose(scores(known, oracle("truth", known, 0), metrics=names), 1)
    assert (scores(known, fitted("no change", known), metrics=names) == 0).all(None)
    assert scores(task, fitted("no change", task), metrics=names).isna().all(None)
    base = Scoring(known, known.truths[0], fitted("additive", known))
    predicted, _ = base.enrichment
    assert "too small" not in predicted
    # The score of a set is the t statistic of its slope (Badia-i-Mompel et al. 2022).
    effect = np.where(known.scored, base.predicted.effect, 0)[0]
    member = np.isin(known.genes, sorted(sets["set 3"]))
    from scipy.stats import linregress

    fit = linregress(member.astype(float), effect)
    assert predicted.loc["0", "set 3"] == pytest.approx(fit.slope / fit.stderr, rel=1e-4)


def test_own_states_are_scored_on_their_own(task):
    """With principal components as its states, a method is scored as if it had none."""

    def components(cells):
        rates = np.log1p(1e4 * cells.X.toarray() / cells.obs[["library_size"]].to_numpy())
        return task.pca.transform(rates)

    names = ["own_embedding_cosine", "probe_error"]
    truth = oracle("truth", task, 0)
    plain = scores(task, truth, metrics=names)
    own = scores(task, replace(truth, embed=components), metrics=names)
    assert plain["own_embedding_cosine"].isna().all()
    np.testing.assert_allclose(own["probe_error"], plain["probe_error"], rtol=1e-3)
    # The predicted controls are those of training, so the truth is near, not at, itself.
    assert (own["own_embedding_cosine"] < 0.5).mean() > 0.5
    noise = np.random.default_rng(0).normal(size=(len(task.genes), 5)) * 1e-3
    poor = scores(task, replace(truth, embed=lambda c: np.tanh(c.X @ noise)), metrics=names)
    assert poor["probe_error"].sum() > own["probe_error"].sum()
    assert own["probe_error"].sum() < 0.7 * own["squared_effect"].sum()


def test_cells_are_retrieved_by_their_neighbours(task):
    from sklearn.neighbors import KNeighborsClassifier

    name = "neighbour_retrieval"
    none, replicate, truth = (
        scores(task, p, metrics=[name])[name]
        for p in (fitted("no change", task), oracle("replicate", task, 0), oracle("truth", task, 0))
    )
    chance = 1 / (1 + len(task.rows))
    assert none.mean() < chance < replicate.mean() < truth.mean()
    # All measured cells have equally many of each label where groups are of one size.
    rows, cells = range(len(task.rows)), task.truths[0].cells
    n = min(100, *((cells.row == r).sum() for r in (-1, *rows)))
    rng = np.random.default_rng(0)
    some = np.concatenate(
        [np.sort(rng.permutation(np.flatnonzero(cells.row == r))[:n]) for r in (-1, *rows)]
    )
    targets = np.isin(task.genes, [t for _, p in task.rows for t in p.targets])

    def components(values):
        values = values.toarray()
        values[:, targets] = 0
        return task.pca.transform(values)

    near = KNeighborsClassifier(10).fit(components(cells.log1p[some]), cells.row[some])
    other = oracle("replicate", task, 0).cells
    votes = [
        near.predict_proba(components(other.log1p[other.row == r]))[:, 1 + r].mean() for r in rows
    ]
    np.testing.assert_allclose(replicate, votes, atol=1e-9)


def test_interactions_are_found_by_what_knows_them_and_by_nothing_additive():
    many = standard_cells(gpjepa.datasets.simulate(9_000, 60, n_targets=5, n_combinations=8))
    task = Task.of(many, splits.doubles(measured_rows(many)))
    name = "interaction_recall"
    alone = {p.targets for _, p in task.training.rows}
    known = [all((t,) in alone for t in p.targets) for _, p in task.rows]
    assert any(known)
    truth, replicate, additive = (
        scores(task, p, metrics=[name])[name]
        for p in (oracle("truth", task, 0), oracle("replicate", task, 0), fitted("additive", task))
    )
    np.testing.assert_array_equal(truth.notna(), known)
    assert (additive[known] == 0).all()
    assert 0 < replicate[known].mean() < truth[known].mean()


def test_states_that_separate_cell_types_score_high():
    adata = gpjepa.datasets.simulate(1_500, 40, n_targets=4, n_combinations=1, n_contexts=2)
    adata.obs["type"] = adata.obs["context"]
    typed = standard_cells(adata, cell_type_key="type")
    found = Task.of(typed, splits.unseen_singles(measured_rows(typed), folds=2)[0])
    assert "cell_type" not in found.train.obs
    truth = oracle("truth", found, 0)

    def of(embed, task=found):
        return scores(task, replace(truth, embed=embed), metrics=["avg_bio"])["avg_bio"]

    types = found.truths[0].cells.cell_type
    assert set(types) == set(adata.obs["type"])
    right = {n: np.array([[10.0 * (t == types[0])] for t in types]) for n in [len(types)]}
    perfect = of(lambda c: right.get(c.n_obs, np.zeros((c.n_obs, 1))))
    assert perfect.nunique() == 1
    assert perfect[0] == pytest.approx(1)
    nothing = of(lambda c: np.random.default_rng(0).normal(size=(c.n_obs, 3)))
    assert nothing[0] < 0.25
    bare = replace(
        found,
        truths=tuple(replace(t, cells=replace(t.cells, cell_type=None)) for t in found.truths),
    )
    assert of(None, bare).isna().all()
    adata.obs["type"] = adata.obs["type"].astype(object)
    adata.obs.loc[adata.obs_names[::2], "type"] = np.nan
    half = standard_cells(adata, cell_type_key="type")
    assert set(half.obs["cell_type"]) == {"", *types}
    part = Task.of(half, splits.unseen_singles(measured_rows(half), folds=2)[0])
    known = part.truths[0].cells.cell_type
    told = np.array(
        [[10.0 * (t == types[0]), 100 * np.sin(i) * (t == "")] for i, t in enumerate(known)]
    )
    own = replace(oracle("truth", part, 0), embed=lambda c: told)
    assert scores(part, own, metrics=["avg_bio"])["avg_bio"][0] == pytest.approx(1)


def test_one_value_for_all_rows_has_no_interval():
    rows = [
        {
            "data": "d",
            "kind": "doubles",
            "split": "s",
            "context": "c",
            "perturbation": f"A+B{i}",
            "method": m,
            "avg_bio": v,
            "refused": False,
            "half": 0,
            "role": {"mean": "floor", "replicate": "ceiling"}.get(m, "method"),
            "entry": m,
        }
        for m, v in (("mean", 0.3), ("replicate", 0.31), ("ours", 0.305))
        for i in range(30)
    ]
    table = benchmark.summarise(pd.DataFrame(rows))
    assert table[["low", "high", "scaled"]].isna().all(None)
    assert set(table["unscaled"]) == {"one value for all rows, so no interval"}


def test_files_that_options_name_decide_what_is_kept(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best_model.pt").write_text("one")
    (tmp_path / "sets.gmt").write_text("a")
    options = {
        "weights": str(tmp_path / "weights"),
        "train": {"gene_sets": [str(tmp_path / "sets.gmt")]},
    }
    before = contents(options)
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    there = {"weights": str(moved / "weights"), "train": {"gene_sets": [str(moved / "sets.gmt")]}}
    assert contents(there) == before
    (tmp_path / "weights" / "best_model.pt").write_text("two")
    assert contents(options)["weights"] != before["weights"]
    assert contents(options)["train"] == before["train"]
    # Only what stands under the name of a path is one.
    assert contents({"encoder": "weights", "text": "x" * 300})["encoder"] == "weights"


def test_e_test_finds_what_responds_and_is_repeatable(task):
    p = task.e_test
    assert p.min() < 0.05
    again = replace(task)
    np.testing.assert_array_equal(p, again.e_test)
    assert np.random.default_rng().random() != np.random.default_rng().random()
    scrambled = [
        replace(t, cells=replace(t.cells, row=np.random.default_rng(i).permutation(t.cells.row)))
        for i, t in enumerate(task.truths)
    ]
    # Eight tests of nothing, with a family-wise error of 5%: at most one false alarm.
    assert (replace(task, truths=tuple(scrambled)).e_test < 0.05).sum() <= 1 < (p < 0.05).sum()


def test_crps_is_that_of_the_definition(task):
    """The integral of (F(x) - [x > y])² over x, of the first scored genes of the first row."""
    from scipy.integrate import quad
    from scipy.stats import norm

    truth, few = task.truths[0], np.flatnonzero(task.scored[0])[:4]
    sd = np.full_like(truth.effect, 0.3)
    predicted = Prediction(truth.effect + 0.2, oracle("truth", task, 0).cells, sd)
    spread = np.sqrt(sd**2 + truth.table.noise("mean_log1p"))
    wanted = []
    for gene in few:
        y, mu, s = truth.effect[0, gene], predicted.effect[0, gene], spread[0, gene]
        below = quad(lambda x, mu=mu, s=s: norm.cdf(x, mu, s) ** 2, mu - 12 * s, y)[0]
        above = quad(lambda x, mu=mu, s=s: norm.sf(x, mu, s) ** 2, y, mu + 12 * s)[0]
        wanted.append(below + above)
    scored = np.zeros_like(task.scored)
    scored[:, few] = True
    only = replace(task)
    only.__dict__["scored"] = scored
    found = scores(only, predicted, metrics=["crps"])["crps"]
    assert found[0] == pytest.approx(np.mean(wanted), rel=1e-5)


# Exploits


def test_known_ways_of_gaming_do_not_win(task):
    """Each raises some metric elsewhere; here an honest prediction stays ahead of it."""
    honest = scores(task, fitted("shrunken additive", task)).mean()
    mean, noisy = (scores(task, fitted(n, task)).mean() for n in ("mean", "mean plus noise"))
    # Predicting what all share is no discrimination, and noise on top of it neither.
    for cheat in (mean, noisy):
        assert cheat["pearson_centroid"] < honest["pearson_centroid"]
        assert cheat["pds_cosine"] < honest["pds_cosine"]
        assert cheat["squared_error"] > honest["squared_error"]
    # Effects blown up keep every correlation and rank, and are caught by error and cells.
    base = fitted("additive", task)
    names = ["pearson_delta", "squared_error", "expr_mse_unbiased_capped_norm"]
    large = scores(task, replace(base, effect=base.effect * 4), metrics=names[:2]).mean()
    plain = scores(task, base, metrics=names).mean()
    assert large["pearson_delta"] == pytest.approx(plain["pearson_delta"])
    assert large["squared_error"] > 3 * plain["squared_error"]
    # Moving every cell to its mean removes the noise of the counts, and the distribution with it.
    flat = base.cells.counts.copy()
    for row in range(len(task.rows)):
        mine = np.flatnonzero(base.cells.row == row)
        flat = sp.lil_matrix(flat)
        flat[mine] = np.rint(np.asarray(flat[mine].mean(0)))
    collapsed = replace(base, drawn=replace(base.cells, counts=sp.csr_matrix(flat)))
    names = ["energy_distance_unbiased", "variance_log_ratio", "gene_correlation_error"]
    assert (
        scores(task, collapsed, metrics=names).mean() > scores(task, base, metrics=names).mean()
    ).all()


# Methods of others


def test_a_stranger_can_take_part(task):
    stranger = Stranger()
    assert isinstance(stranger, benchmark.Method)
    stranger.fit(task.train, task.split)
    predicted = predict_rows(stranger, task, "twice")["twice"]
    found = scores(task, predicted)
    assert np.isfinite(found["squared_error"]).all()
    assert found["pds_cosine"].mean() == pytest.approx(0.5, abs=1e-12)
    assert found["coverage_95"].isna().all()


def test_what_a_method_leaves_out_is_scored_as_the_mean_response(task):
    class Partial(Stranger):
        def predict(self, perturbations, control):
            return super().predict(perturbations[1:], control)

    method = Partial()
    method.fit(task.train, task.split)
    predicted = predict_rows(method, task, "partial")["partial"]
    assert list(predicted.refused) == [True] + [False] * (len(task.rows) - 1)
    mean = fitted("mean", task)
    np.testing.assert_allclose(predicted.effect[0], mean.effect[0], rtol=1e-6)
    first = [s.counts[s.row == 0] for s in (predicted.cells, mean.cells)]
    assert (first[0] != first[1]).nnz == 0


def test_gp_jepa_takes_part_with_every_gate(task):
    quick = {"train": {"max_epochs": 1, "pretrain_epochs": 1}, "model": {"n_hidden": 16}}
    method = METHODS["GP-JEPA"].make([], 0, quick)
    method.fit(task.train, task.split)
    predicted = predict_rows(method, task, "GP-JEPA")
    assert set(predicted) == {"GP-JEPA", "GP-JEPA (gate 0)", "GP-JEPA (gate 1)"}
    found = {name: scores(task, p) for name, p in predicted.items()}
    anchor = scores(task, fitted("anchor", task))
    names = ["squared_error", "pearson_delta", "coverage_95", "crps"]
    np.testing.assert_allclose(found["GP-JEPA (gate 0)"][names], anchor[names], rtol=1e-4)
    # Without gene sets, cell types, or interactions above noise.
    undefined = ["gene_set_agreement", "signature_ranking", LFC, "avg_bio", "interaction_recall"]
    for table in found.values():
        assert table.drop(columns=undefined).notna().all(None)


def test_what_features_know_nothing_of_is_left_out_alone(cells):
    """And not the whole split with it; several kinds of features are taken side by side."""
    (split, *_) = splits.unseen_singles(measured_rows(cells), folds=3)
    task = Task.of(cells, split)
    targets = sorted({t for _, p in (*split.train, *split.test) for t in p.targets})
    unknown = task.rows[0][1].targets[0]
    rng = np.random.default_rng(0)
    known = [t for t in targets if t != unknown]
    features = [TargetFeatures(known, rng.normal(size=(len(known), 4)), n) for n in ("one", "two")]
    for name in ("kernel ridge", "nearest"):
        predicted = fitted(name, task, features)
        left = [str(p) for (_, p), r in zip(task.rows, predicted.refused, strict=True) if r]
        assert left == [unknown]
        half = fitted(name, task, features[:1])
        assert np.abs(half.effect - predicted.effect).max() > 0


def test_a_stranger_is_named_in_the_configuration(tmp_path, monkeypatch):
    code = inspect.getsource(Stranger)
    (tmp_path / "their_method.py").write_text(
        f"import anndata as ad\nimport numpy as np\nimport pandas as pd\n\n{code}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = {"name": "their_method:Stranger", "label": "twice the mean"}
    config = {**TINY, "methods": ["mean", "replicate", name], "focus": "twice the mean"}
    found = benchmark.run(config, tmp_path / "out", progress=False)
    assert set(found.scores["method"]) == {"mean", "replicate", "twice the mean"}
    assert "twice the mean" in (tmp_path / "out" / "report.md").read_text()
    for wrong, message in (
        ("their_method:Nobody", "cannot be imported"),
        ("their_method:np", "is no method: it has no fit and no predict"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.BenchmarkConfig.read({**config, "methods": ["mean", "replicate", wrong]})


def test_the_linear_model_leaves_out_what_it_has_no_embedding_of(cells):
    (split, *_) = splits.unseen_singles(measured_rows(cells), folds=3)
    name = split.test[0][1].targets[0]
    without = Task.of(cells[:, cells.var_names != name].copy(), split)
    predicted = fitted("linear", without)
    assert [str(p) for (_, p), r in zip(without.rows, predicted.refused, strict=True) if r] == [
        name
    ]
    pairs = Task.of(cells, splits.doubles(measured_rows(cells), seed=1))
    with pytest.raises(ValueError, match="none of the perturbations"):
        fitted("linear", pairs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[:, :5].copy(), "repeat or lack 75"),
        (lambda a: a[:0].copy(), "predicts none of"),
        (lambda a: ad.AnnData(a.X, a.obs, a.var), "say 'counts' or 'log1p'"),
        (lambda a: ad.AnnData(a.X - 9, a.obs, a.var, uns=a.uns), "negative or not finite"),
        (lambda a: ad.AnnData(a.X, a.obs[[]], a.var, uns=a.uns), "no obs"),
        (lambda a: a.to_df(), "not an AnnData"),
    ],
)
def test_predictions_of_another_form_are_refused(task, spoil, message):
    class Spoilt(Stranger):
        def predict(self, perturbations, control):
            return spoil(super().predict(perturbations, control))

    method = Spoilt()
    method.fit(task.train, task.split)
    with pytest.raises(ValueError, match=message):
        predict_rows(method, task, "spoilt")


def test_genes_may_come_in_any_order(task):
    class Mixed(Stranger):
        def predict(self, perturbations, control):
            return super().predict(perturbations, control)[:, ::-1].copy()

    a, b = Stranger(), Mixed()
    for method in (a, b):
        method.fit(task.train, task.split)
    x, y = (predict_rows(m, task, "x")["x"] for m in (a, b))
    np.testing.assert_array_equal(x.effect, y.effect)
    assert (x.cells.counts != y.cells.counts).nnz == 0


# Runs


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    return benchmark.run(TINY, out, progress=False), out


def test_floor_is_0_ceiling_is_1_and_truth_is_no_worse(result):
    table = result[0].table()
    scaled = table.pivot_table(index=["kind", "metric"], columns="method", values="scaled")
    assert len(scaled) > 10
    np.testing.assert_allclose(scaled["mean"], 0, atol=1e-12)
    np.testing.assert_allclose(scaled["replicate"], 1, atol=1e-12)
    errors = ["squared_error", "l2_top1000", "pearson_delta", "pds_cosine", "embedding_cosine"]
    best = scaled["truth"].unstack("kind").reindex(errors).to_numpy()
    assert (best[np.isfinite(best)] >= 1 - 1e-9).all()


def test_two_runs_give_the_same_tables_and_a_second_one_computes_nothing(result, tmp_path):
    first, out = result
    again = benchmark.run(TINY, tmp_path, progress=False)
    pd.testing.assert_frame_equal(first.scores, again.scores)
    assert (tmp_path / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    kept = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    benchmark.run(TINY, out, progress=False)
    assert {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == kept


def test_corrupt_cells_are_computed_again_and_said_so(result, caplog):
    first, out = result
    kept = sorted((out / "cells").iterdir())
    (kept[0] / "scores.csv").write_text("nothing")
    (kept[1] / "run.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = benchmark.run(TINY, out, progress=False)
    assert caplog.text.count("is corrupt") == 2
    pd.testing.assert_frame_equal(first.scores, again.scores)


def test_what_decides_a_score_decides_where_it_is_kept(result, tmp_path):
    out = shutil.copytree(result[1], tmp_path / "out")
    before = set(os.listdir(out / "cells"))
    more = {
        **TINY,
        "methods": [*TINY["methods"], {"name": "transfer", "options": {"form": "similar"}}],
    }
    benchmark.run(more, out, progress=False)
    after = set(os.listdir(out / "cells"))
    assert len(after - before) == 3
    assert before < after


@pytest.mark.slow
def test_a_killed_run_goes_on(result, tmp_path):
    code = f"""
import json
from gpjepa import benchmark
benchmark.run(json.loads({json.dumps(json.dumps(TINY))}), {str(tmp_path / "out")!r}, progress=False)
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    kept = tmp_path / "out" / "cells"
    while not (kept.exists() and len(os.listdir(kept)) >= 4):
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    times = {p.name: p.stat().st_mtime_ns for p in kept.iterdir() if not p.name.startswith(".")}
    assert 0 < len(times) < 18
    again = benchmark.run(TINY, tmp_path / "out", progress=False)
    assert {p: (kept / p).stat().st_mtime_ns for p in times} == times
    pd.testing.assert_frame_equal(result[0].scores, again.scores)


def test_a_method_that_fails_is_named_and_the_others_go_on(tmp_path):
    config = {**TINY, "methods": [*TINY["methods"], "kernel ridge"]}
    config["data"] = [{**TINY["data"][0], "splits": [{"kind": "doubles"}]}]
    found = benchmark.run(config, tmp_path, progress=False)
    lost = found.runs[found.runs["status"] == "not run"]
    assert list(lost["method"]) == ["kernel ridge"]
    assert "needs features" in lost["reason"].iloc[0]
    assert "needs features" in (tmp_path / "report.md").read_text()
    assert "needs features" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["additve", "mean", "replicate"]}, "methods.0: 'additve' is not a method"),
        ({"methods": ["mean"], "focus": None}, "floor and ceiling"),
        (
            {"methods": ["mean", "mean", "replicate"], "focus": None},
            r"methods: \['mean'\] occur more than once",
        ),
        ({"metrics": ["r2"]}, r"\['r2'\] are not known"),
        ({"title": None}, "title: "),
        ({"sedes": [1]}, "sedes: Extra inputs"),
        ({"focus": "mine"}, "focus: 'mine' is none"),
        ({"data": []}, "data: "),
        ({"data": [{**TINY["data"][0], "source": "x.h5ad"}]}, "give one of `source`"),
        ({"data": [{**TINY["data"][0], "name": "a/b"}]}, "data.0.name: String should match"),
        (
            {"methods": [{"name": "mean", "data": ["x"]}, "replicate"], "focus": None},
            r"methods: \['x'\] are none of the data",
        ),
        (
            {"data": [{**TINY["data"][0], "splits": [{"kind": "unseen-singles", "folds": 1}]}]},
            "data.0.splits.0.unseen-singles.folds: ",
        ),
        ({"data": [{**TINY["data"][0], "splits": [{"kind": "random"}]}]}, "data.0.splits.0: "),
    ],
)
def test_errors_of_a_configuration_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        benchmark.BenchmarkConfig.read({**TINY, **change})


def test_some_contexts_can_be_held_out():
    split = {"kind": "held-out-context", "contexts": ["context1"]}
    screen = {"n_cells": 600, "n_genes": 30, "n_targets": 4, "n_combinations": 0, "n_contexts": 3}
    data = {"name": "x", "simulate": screen, "context_key": "context", "splits": [split]}
    (read,) = benchmark.BenchmarkConfig.read({**TINY, "data": [data]}).data
    (made,) = read.make_splits(*read.load_joined()).splits
    assert {c for c, _ in made.test} == {"context1"}
    split["contexts"] = ["context9"]
    (read,) = benchmark.BenchmarkConfig.read({**TINY, "data": [data]}).data
    with pytest.raises(ValueError, match=r"\['context9'\] do not occur"):
        read.make_splits(*read.load_joined())


def test_configurations_that_are_not_there_name_the_presets(tmp_path):
    with pytest.raises(ValueError, match="presets are .*smoke"):
        benchmark.BenchmarkConfig.read("smok")
    (tmp_path / "x.yaml").write_text("title: [")
    with pytest.raises(ValueError, match="is not YAML"):
        benchmark.BenchmarkConfig.read(tmp_path / "x.yaml")
    for name in benchmark.presets():
        assert benchmark.BenchmarkConfig.read(name).title


def test_a_report_names_files_as_the_configuration_does(tmp_path):
    adata = gpjepa.datasets.simulate(400, 40, n_targets=4, n_combinations=2, seed=0)
    adata.X = adata.layers["counts"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    data = {
        "name": "mine",
        "source": "cells.h5ad",
        "splits": [{"kind": "unseen-singles", "folds": 2}],
    }
    content = {**TINY, "data": [data], "methods": ["mean", "replicate"], "focus": None}
    config = benchmark.BenchmarkConfig.read(content, folder=tmp_path)
    assert config.data[0].source == str(tmp_path / "cells.h5ad")
    benchmark.run(config, tmp_path / "out", progress=False)
    for report in ("report.html", "report.md"):
        text = (tmp_path / "out" / report).read_text()
        assert "cells.h5ad" in text and str(tmp_path) not in text


def test_own_manifest_is_followed(result, tmp_path):
    _, out = result
    (tmp_path / "b.yaml").write_text(
        json.dumps(
            {
                **TINY,
                "data": [{**TINY["data"][0], "splits": [{"kind": "manifest", "path": "m.json"}]}],
            }
        )
    )
    manifest = splits.Manifest.read(out / "splits" / "simulated.json")
    replace(manifest, splits=manifest.splits[:1]).write(tmp_path / "m.json")
    config = benchmark.BenchmarkConfig.read(tmp_path / "b.yaml")
    (data,) = config.data
    assert data.make_splits(*data.load_joined()).splits == manifest.splits[:1]
    other = data.model_copy(update={"simulate": {**data.simulate, "seed": 5}})
    with pytest.raises(ValueError, match=r"do not have|other cells"):
        other.make_splits(*other.load_joined())


def test_data_sets_are_joined_on_their_genes(tmp_path):
    paths = {}
    for i, name in enumerate(("one", "two")):
        adata = gpjepa.datasets.simulate(900, 40, n_targets=5, n_combinations=1, seed=0)
        paths[name] = {"source": str(tmp_path / f"{name}.h5ad")}
        adata[:, i * 4 : 36 + i * 4].copy().write_h5ad(paths[name]["source"])
    config = {
        **TINY,
        "data": [{"name": "both", "join": paths, "splits": [{"kind": "cross-dataset"}]}],
    }
    (data,) = benchmark.BenchmarkConfig.read(config).data
    cells, origin = data.load_joined()
    assert cells.n_vars == 32
    assert set(origin) == {"one", "two"}
    assert [s.kind for s in data.make_splits(cells, origin).splits] == ["cross-dataset"] * 2


def test_no_scale_where_floor_and_ceiling_do_not_differ(tmp_path):
    """McFaline's kinases hardly do anything: a replicate is no better than the mean response."""
    config = {
        **TINY,
        "data": [
            {
                "name": "mcfaline",
                "source": str(real_file("mcfaline_2023_mini.h5ad")),
                "context_key": "cell_line",
                "library_size_key": "library_size",
                "splits": [{"kind": "held-out-context"}],
            }
        ],
        "methods": ["mean", "no change", "replicate"],
        "focus": None,
        "metrics": ["squared_error", "pearson_delta", "pds_cosine", "embedding_retrieval"],
    }
    table = benchmark.run(config, tmp_path, progress=False).table()
    assert table["scaled"].isna().all()
    assert "fewer than 6 contexts or targets" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("replicate", "why"),
    [(0.6, "is not significantly different from"), (0.9, "is worse than"), (0.1, "")],
)
def test_there_is_a_scale_where_a_replicate_is_better_than_the_mean(replicate, why):
    noise = np.random.default_rng(0).normal(0, 0.5, 12) * (replicate == 0.6)
    frames = [
        pd.DataFrame(
            {
                "data": "d",
                "kind": "k",
                "split": "s",
                "context": "all",
                "method": m,
                "perturbation": [f"A{i}" for i in range(12)],
                "l2_top1000": v,
                "role": r,
                "refused": False,
                "entry": m,
            }
        )
        for m, v, r in (("mean", 0.6, "floor"), ("replicate", replicate + noise, "ceiling"))
    ]
    table = benchmark.summarise(pd.concat(frames))
    assert table["scaled"].isna().all() == bool(why)
    assert table["unscaled"].str.contains(why).all()


# Intervals


def test_rows_that_share_a_target_are_no_independent_witnesses():
    """The same values, of 28 targets or of four doses of seven."""
    rng = np.random.default_rng(0)
    values = np.repeat([0.0, 1.0, 3.0, 0.0, 1.0, 3.0, 2.0], 4) + rng.normal(0, 0.1, 28)

    def width(names):
        frames = [
            pd.DataFrame(
                {
                    "data": "d",
                    "kind": "k",
                    "split": "s",
                    "context": "all",
                    "method": m,
                    "perturbation": names,
                    "pearson_delta": v,
                    "role": r,
                    "refused": False,
                    "entry": m,
                }
            )
            for m, v, r in (("mean", 0 * values, "floor"), ("replicate", values, "ceiling"))
        ]
        table = benchmark.summarise(pd.concat(frames))
        row = table[table["method"] == "replicate"].iloc[0]
        assert row["low"] < row["value"] < row["high"]
        assert row["value"] == pytest.approx(values.mean())
        return row["high"] - row["low"]

    apart = width([f"A{i}" for i in range(28)])
    shared = width([f"A{i // 4}@{i % 4 + 1}" for i in range(28)])
    assert shared > 1.5 * apart
    # As wide as the textbook's interval, for targets that are independent.
    assert apart == pytest.approx(2 * 1.96 * values.std() / np.sqrt(28), rel=0.15)


# The page


@pytest.fixture
def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed to look at the page with")


def test_page_needs_nothing_else_fits_a_phone_and_sorts(result, tmp_path, browser):
    page = (result[1] / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", ""))
    assert "@import" not in page
    probe = """<script>
    const first = document.getElementById("first").getBoundingClientRect();
    const tall = document.documentElement.scrollHeight;
    document.getElementById("unfold").click();
    const table = document.querySelector("#methods table");
    const button = table.querySelectorAll("thead th")[2];
    const column = () => Array.from(table.tBodies[0].rows).map((r) => parseFloat(r.cells[2].textContent));
    const wide = document.documentElement.scrollWidth > window.innerWidth;
    button.click(); const up = column(); button.click(); const down = column();
    document.title = "PROBE" + JSON.stringify({wide, up, down, tall, first: first.top});
    </script>"""
    file = tmp_path / "probe.html"
    file.write_text(page.replace("</body>", f"{probe}</body>"))
    seen = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--disable-quic",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=500,900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = json.loads(html.unescape(re.search(r"<title>PROBE(.*?)</title>", seen).group(1)))
    assert not found["wide"]
    assert found["tall"] < 6_000
    assert found["first"] < 900, "the first screen does not show the focus"
    assert found["up"] == sorted(found["up"])
    assert found["down"] == sorted(found["up"], reverse=True)
    assert len(found["up"]) == 6


def test_scaling_draws_a_line_per_model_over_its_sizes():
    methods = {
        "small": "GP-JEPA",
        "large": "GP-JEPA",
        "CPA s": "CPA",
        "CPA l": "CPA",
        "mean": "mean",
    }
    runs = pd.DataFrame(
        {
            "data": np.repeat(list("ab"), len(methods)),
            "kind": "doubles",
            "method": [*methods] * 2,
            "family": [*methods.values()] * 2,
            "seconds_fit": [20, 60, 30, 50, 0.1] * 2,
            "peak_memory_gb": [0.5, 0.7, 0.6, 0.9, 0.2] * 2,
            "parameters": [100, 1_000, *[np.nan] * 3] * 2,
        }
    )
    table = runs[["data", "kind", "method"]].assign(
        metric="squared_error",
        label="error",
        value=[0.5, 0.4, 0.9, 0.8, 1.0, 0.6, 0.3, 0.9, 0.7, 1.0],
    )
    figure = gpjepa.plotting.scaling(table, runs)
    assert [x.get_text() for x in figure.legends[0].get_texts()] == ["GP-JEPA", "CPA"]
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["a", "b"]
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [20, 60]
    assert list(line.get_ydata()) == [0.5, 0.4]
    assert list(figure.axes[3].lines[1].get_xdata()) == [0.6, 0.9]  # memory, b, CPA
    assert "<svg" in _scaling(table, runs)
    # Variants that do not grow, such as ablations, are no curve, and no reason for a report to fail.
    same = runs.assign(parameters=runs["parameters"].where(runs["parameters"].isna(), 100))
    for other in (same, runs[runs["method"] != "small"], runs.drop(columns="parameters")):
        assert _scaling(table, other) == ""
        with pytest.raises(ValueError, match="No model was run in two sizes"):
            gpjepa.plotting.scaling(table, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ablations", "scaling"])
def test_every_arm_of_a_preset_runs(name, tmp_path):
    """As it stands, but for the size of the screen and the length of the training."""
    content = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    for data in content["data"]:
        data["simulate"] = {"n_cells": 700, "n_genes": 60, "n_targets": 8, "n_combinations": 6}
        data["splits"] = data["splits"][:1]
    methods = []
    for method in content["methods"]:
        method = {"name": method} if isinstance(method, str) else method
        if method["name"] == "GP-JEPA":
            train = method.setdefault("options", {}).setdefault("train", {})
            method["options"]["train"] = {"max_epochs": 1, "pretrain_epochs": 1} | train
        methods.append(method)
    small = {
        **content,
        "methods": methods,
        "seeds": [0],
        "metrics": ["squared_error", "probe_error"],
    }
    found = benchmark.run(small, tmp_path / "out", progress=False)
    assert (found.runs["status"] == "run").all(), found.runs["reason"].unique()
    page = (tmp_path / "out" / "report.html").read_text()
    # A curve over sizes; ablations are not sizes of one model.
    assert ('aria-label="Compute"' in page) == (name == "scaling")


def test_both_twins_say_the_same(result):
    page, text = ((result[1] / f"report.{x}").read_text() for x in ("html", "md"))
    table = result[0].table()
    for _, row in table[table["metric"] == "squared_error"].iterrows():
        shown = f"{row['value']:.3f}"
        assert shown in page
        assert shown in text
    for line in re.findall(r"^- (.*)$", text, re.M):
        assert line in html.unescape(page)


def test_published_numbers_stand_beside_ours_on_their_rows(tmp_path):
    """A stand-in for Norman's screen, and a table that its true effects would have given."""
    source = {"n_cells": 2_500, "n_genes": 60, "n_targets": 6, "n_combinations": 8, "seed": 4}
    adata = gpjepa.datasets.simulate(**source)
    doubles = sorted({p for p in adata.obs["perturbation"] if "+" in p})
    rows = [
        (seed, "theirs", p, float(i), 0.5)
        for seed in (1, 2)
        for i, p in enumerate(doubles[seed - 1 : seed + 3])
    ]
    table = pd.DataFrame(rows, columns=["seed", "method", "perturbation", "l2", "pearson_delta"])
    path = tmp_path / "published.csv"
    table.to_csv(path, index=False)
    config = {
        "title": "Beside",
        "methods": ["additive", "mean", "replicate"],
        "metrics": ["squared_error"],
        "data": [
            {
                "name": "screen",
                "simulate": source,
                "splits": [{"kind": "published", "path": str(path)}],
            }
        ],
    }
    found = benchmark.run(config, tmp_path / "out", progress=False)
    (one, two) = found.manifests["screen"].splits
    assert {str(p) for _, p in one.test} == set(doubles[:4])
    assert {str(p) for _, p in two.test} == set(doubles[1:5])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| theirs | published | 1.500 | 0.500 | 8 |" in report
    # By hand, from all cells of a held-out perturbation.
    cells = standard_cells(adata, context_key="context")
    task = Task.of(cells, one)
    mine = cells[(cells.obs["perturbation"] == str(task.rows[0][1])).to_numpy()]
    rates = np.log1p(1e4 * mine.X.toarray() / mine.obs[["library_size"]].to_numpy())
    effect = fitted("additive", task).effect[0]
    l2 = np.linalg.norm(task.control_profiles[0] + effect - rates.mean(0))
    scores = found.scores[
        (found.scores["split"] == one.name) & (found.scores["method"] == "additive")
    ]
    first = scores[scores["perturbation"] == str(task.rows[0][1])]["published_l2"]
    np.testing.assert_allclose(first, l2, rtol=1e-5)
    table.assign(perturbation="A+B").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"1 perturbations of published.csv are not in the data"):
        benchmark.run(config, tmp_path / "other", progress=False)


def test_the_published_table_of_normans_doubles_has_its_published_means():
    from gpjepa.benchmark._published import NORMAN_DOUBLES, read_published

    means = read_published(NORMAN_DOUBLES).groupby("method")["l2"].mean()
    for name, value in (("additive_model", 2.77), ("gears", 4.10), ("scgpt", 4.62), ("cpa", 12.2)):
        assert means[name] == pytest.approx(value, abs=0.05), name


def test_predicted_cells_of_a_new_context_are_as_much_cells_as_moved_controls():
    """The decoder has seen few of its cells; what control cells say of themselves must not be lost."""
    adata = gpjepa.datasets.simulate(2_400, 80, n_targets=6, n_combinations=2, n_contexts=2, seed=1)
    both = standard_cells(adata, context_key="context")
    task = Task.of(both, splits.leave_one_context_out(measured_rows(both))[0])
    names = ["energy_distance_unbiased", "variance_log_ratio", "gene_correlation_error"]
    moved = scores(task, fitted("anchor", task), metrics=names).mean()
    quick = {"max_epochs": 2, "pretrain_epochs": 2}
    method = METHODS["GP-JEPA"].make((), 0, {"train": quick, "gates": [0, 1]})
    method.fit(task.train, task.split)
    for name, prediction in predict_rows(method, task, "ours").items():
        ours = scores(task, prediction, metrics=names).mean()
        # Where the cells lie is the mean effect's merit: that of gate 1 is a network's, hardly trained.
        kept = names if "gate 0" in name else names[1:]
        assert (ours < 1.3 * moved + 0.02)[kept].all(), name


# Published methods

THEIRS = """
import multiprocessing
import time

import numpy as np
from _serve import answer, log1p, serve


def fit(train, task):
    print("peers print what they like")
    if task["options"].get("fail") == "fit":
        raise ValueError("cannot be fitted")
    if task["options"].get("fail") == "sleep":
        print("sleeping")
        time.sleep(120)
    with multiprocessing.get_context("fork").Pool(1) as pool:  # as GEARS does
        assert pool.map(abs, [-1]) == [1]
    rates = log1p(train).toarray()
    control = (train.obs["perturbation"] == "control").to_numpy()
    return rates[~control].mean(0) - rates[control].mean(0), task


def predict(state, control, wanted):
    effect, task = state
    if task["options"].get("fail") == "die":
        raise SystemExit(3)
    profile = np.maximum(log1p(control).toarray().mean(0) + 2 * effect, 0)
    return answer([profile] * len(wanted), wanted, control.var_names, "log1p")


if __name__ == "__main__":
    serve(fit, predict, "nothing else", ["fail"])
"""


@pytest.fixture
def theirs(tmp_path):
    shutil.copy(PEERS / "_serve.py", tmp_path)
    (tmp_path / "theirs.py").write_text(THEIRS)

    def make(keep=None, seed=0, **options):
        python = Path(sys.executable)
        return Peer(tmp_path / "theirs.py", (), seed, options, python, keep)

    return make


def test_a_peer_answers_through_files(task, theirs):
    peer, stranger = theirs(), Stranger()
    for method in (peer, stranger):
        method.fit(task.train, task.split)
    a, b = (predict_rows(m, task, "x")["x"] for m in (peer, stranger))
    np.testing.assert_allclose(a.effect, b.effect, atol=1e-5)
    folder = Path(peer.folder.name)
    assert "peers print what they like" in (folder / "log.txt").read_text()
    peer.close()
    assert peer.process.poll() is not None
    assert not folder.exists()


def test_answers_of_a_peer_are_kept_and_of_other_questions_are_not(task, theirs, tmp_path):
    other = task.train[1:].copy()
    first = None
    asked = [(task.train, 0, True), (task.train, 0, False), (other, 0, True), (task.train, 1, True)]
    for train, seed, starts in asked:
        with theirs(keep=tmp_path / "answers", seed=seed) as peer:
            peer.fit(train, task.split)
            found = peer.predict(["A"], task.control)
            assert hasattr(peer, "process") == starts
            assert peer.cost["seconds_fit"] > 0
            first = found if first is None else first
            if not starts:
                np.testing.assert_array_equal(found.X, first.X)
                peer.predict(["B"], task.control)  # that was never asked
                assert hasattr(peer, "process")
    # What it needs is part of it, although it stands in a comment.
    script = tmp_path / "theirs.py"
    script.write_text("# /// script\n# dependencies = []\n# ///\n" + script.read_text())
    with theirs(keep=tmp_path / "answers") as peer:
        peer.fit(task.train, task.split)
        peer.predict(["A"], task.control)
        assert hasattr(peer, "process")


@pytest.mark.parametrize("name", sorted(exchange.OPTIONS))
def test_recorded_exchanges_with_published_methods_still_fit(name, tmp_path):
    """What a method was asked in its own environment is what we ask now; its answer is read."""
    recorded, task = exchange.HERE / name, exchange.exchange_task()
    shutil.copy(PEERS / "_serve.py", tmp_path)
    (tmp_path / "again.py").write_text(
        f"""
import anndata
from _serve import serve

serve(lambda train, task: None,
      lambda state, control, wanted: anndata.read_h5ad({str(recorded / "prediction.h5ad")!r}),
      "what was recorded", {list(exchange.OPTIONS[name])})
"""
    )
    options = exchange.OPTIONS[name]
    peer = Peer(tmp_path / "again.py", options=options, python=Path(sys.executable))
    peer.fit(task.train, task.split)
    found = predict_rows(peer, task, name)[name]
    here = Path(peer.folder.name)
    for file in ("task.json", "wanted.json"):
        assert json.loads((here / file).read_text()) == json.loads((recorded / file).read_text())
    for file in exchange.SHARED:
        ours, theirs = (ad.read_h5ad(f / file) for f in (here, exchange.HERE))
        assert list(ours.var_names) == list(theirs.var_names)
        assert type(ours.X) is type(theirs.X)
        assert ours.X.dtype == theirs.X.dtype
        assert ours.obs.dtypes.astype(str).to_dict() == theirs.obs.dtypes.astype(str).to_dict()
        assert set(ours.obs["perturbation"]) == set(theirs.obs["perturbation"])
    peer.close()
    answer = ad.read_h5ad(recorded / "prediction.h5ad")
    for i, (_, perturbation) in enumerate(task.rows):
        mine = answer[(answer.obs["perturbation"] == str(perturbation)).to_numpy(), task.genes]
        assert found.refused[i] == (mine.n_obs == 0)
        if mine.n_obs:
            expected = np.asarray(mine.X.mean(0)).ravel() - task.control_profiles[i]
            np.testing.assert_allclose(found.effect[i], expected, atol=1e-5)
    assert not found.refused.all()
    values = scores(task, found, metrics=["squared_error", "energy_distance_unbiased"])
    assert values.notna().all(None)


def test_scgpt_asks_for_its_weights(tmp_path):
    scgpt = peer_script("scgpt")
    with pytest.raises(ValueError, match="give the option weights"):
        scgpt.weights_folder({})
    (tmp_path / "args.json").touch()
    with pytest.raises(ValueError, match=r"vocab.json, best_model.pt missing"):
        scgpt.weights_folder({"weights": tmp_path})
    flags = scgpt.flags_of(["A+C", "B"], ["A", "B", "C"], {"A+C": ["A", "C"], "B": ["B"]})
    np.testing.assert_array_equal(flags, [[1, 0, 1], [0, 1, 0]])


def peer_script(name):
    sys.path.insert(0, str(PEERS))
    try:
        return importlib.import_module(f"run_{name}")
    finally:
        sys.path.remove(str(PEERS))


def test_what_happens_to_a_peer_is_told(task, theirs):
    peer = theirs(fail="fit")
    peer.fit(task.train, task.split)
    with pytest.raises(MethodError, match="ValueError: cannot be fitted"):
        peer.predict(["A"], task.control)
    peer.close()
    peer = theirs(fail="die")
    peer.fit(task.train, task.split)
    with pytest.raises(MethodError, match="exit code 3 at 'predict'"):
        peer.predict(["A"], task.control)
    peer.close()


def test_a_peer_ends_with_who_started_it(task, theirs):
    """Also in the middle of a fit: its input ends when the process at the other end is killed."""
    peer = theirs(fail="sleep")
    peer.fit(task.train, task.split)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(peer.predict, ["A"], task.control)
        while not hasattr(peer, "process") or "sleeping" not in _log(peer):
            time.sleep(0.1)
        peer.process.stdin.close()
        assert peer.process.wait(timeout=20) == -signal.SIGKILL
        with pytest.raises(MethodError, match="ended with exit code -9 at 'fit'"):
            answer.result()
    peer.close()


def _log(peer):
    return (Path(peer.folder.name) / "log.txt").read_text()


def test_a_peer_that_cannot_be_started_is_not_run_and_says_why(theirs, tmp_path, monkeypatch):
    theirs()
    script = {"name": "theirs", "script": str(tmp_path / "theirs.py")}
    methods = [
        "mean",
        "replicate",
        script,
        {**script, "label": "lost", "python": "/no/python"},
        {**script, "label": "misspelt", "python": sys.executable, "options": {"fial": 1}},
        {**script, "label": "works", "python": sys.executable},
    ]
    monkeypatch.setenv("PATH", "")
    config = benchmark.BenchmarkConfig.read(one_split(methods=methods, focus=None))
    found = benchmark.run(config, tmp_path / "out", progress=False).runs.set_index("method")
    status = found["status"].to_dict()
    assert status == {
        "mean": "run",
        "replicate": "run",
        "theirs": "not run",
        "lost": "not run",
        "misspelt": "failed",
        "works": "run",
    }
    assert "pip install uv" in found.loc["theirs", "reason"]
    assert "no interpreter /no/python" in found.loc["lost", "reason"]
    assert "no options ['fial']; it has ['fail']" in found.loc["misspelt", "reason"]
    assert found.loc["works", "given"] == "nothing else"
    assert found.loc["works", "peak_memory_gb"] > 0.03
    with pytest.raises(ValueError, match="there is no script"):
        Peer(tmp_path / "nowhere.py")


def test_scripts_of_peers_declare_what_they_need():
    """PEP 723: uv makes the environment from what stands at the top."""
    import tomllib

    for path in sorted(PEERS.glob("run_*.py")):
        head = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(), re.M)
        declared = tomllib.loads(re.sub(r"^# ?", "", head.group(1), flags=re.M))
        assert declared["dependencies"], path.name
        assert "requires-python" in declared, path.name


def test_a_method_that_is_left_out_on_purpose_says_why(tmp_path):
    left = {"name": "State", "not_run": "takes 38 h here"}
    other = {"name": "scGPT", "not_run": "needs weights"}
    config = {**TINY, "methods": ["mean", "replicate", left, other], "focus": None}
    config["data"] = [{**TINY["data"][0], "splits": [{"kind": "doubles"}]}]
    found = benchmark.run(config, tmp_path / "out", progress=False)
    (row,) = found.runs[found.runs["method"] == "State"].itertuples()
    assert (row.status, row.reason) == ("not run", "takes 38 h here")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| State | not run | takes 38 h here | – |" in page
    assert "| scGPT | not run | needs weights | 4.62, 0.527 |" in page  # as published for Norman


def test_peers_get_what_they_can_use():
    cpa, gears = peer_script("cpa"), peer_script("gears")
    labels = ["control"] * 8 + ["A"] * 4 + ["B"] * 4 + ["C+D"] * 4
    train = ad.AnnData(
        sp.csr_matrix(np.ones((20, 3), np.float32)),
        pd.DataFrame(
            {"perturbation": labels, "context": "all", "library_size": 3.0},
            index=[str(i) for i in range(20)],
        ),
    )
    targets = {
        "A": ["A"],
        "B": ["B"],
        "C+D": ["C", "D"],
        "A+B": ["A", "B"],
        "A+X": ["A", "X"],
        "X": ["X"],
    }
    task = {"test": [["all", "A+B"], ["all", "A+X"]], "targets": targets, "seed": 0}
    asked = cpa.with_questions(train.copy(), task)
    asked = asked.obs[asked.obs["split"] == "ood"]
    assert set(asked["perturbation"]) == {"A+B"}
    assert len(asked) == 8
    with pytest.raises(ValueError, match="none was asked for"):
        cpa.with_questions(train.copy(), {**task, "test": [["all", "X"]]})
    odd = {**targets, r"A\+x": ["A+x"]}
    for refuse in (
        lambda: cpa.with_questions(train.copy(), {**task, "targets": odd}),
        lambda: gears.as_gears_wants(train, {}, odd),
    ):
        with pytest.raises(ValueError, match=r"cannot tell names with '\+' from combinations"):
            refuse()
    known = {"A": {"t"}, "C": {"t"}, "D": {"t"}}
    cells = gears.as_gears_wants(train, known, targets)
    assert set(cells.obs["condition"]) == {"ctrl", "A+ctrl", "C+D"}
    parts = gears.lists(cells, 0)
    assert set(parts["train"]) | set(parts["val"]) == {"ctrl", "A+ctrl", "C+D"}
    assert not set(parts["train"]) & set(parts["val"])


def test_the_mean_effect_of_a_peer_that_draws_is_stable():
    """CPA's negative binomial: a single draw of each cell has four times the noise of many."""
    cpa = peer_script("cpa")
    rng = np.random.default_rng(0)
    mean, theta, library = rng.gamma(1, 1, (40, 60)), np.full(60, 2.0), np.full(40, 60.0)
    control = ad.AnnData(sp.csr_matrix(rng.poisson(1, (30, 60)).astype(np.float32)))
    control.obs["library_size"] = 60.0
    np.random.seed(0)
    found = [cpa.effects(mean, theta, np.array(["A"] * 40), library, control) for _ in range(2)]
    once = [np.log1p(1e4 * cpa.draw(mean, theta) / library[:, None]).mean(0) for _ in range(2)]
    assert list(found[0].index) == ["A"]
    noise = (found[0] - found[1]).to_numpy().std()
    assert noise < 0.25 * (once[0] - once[1]).std()


def test_peers_that_take_features_get_them(task, theirs):
    cellflow = peer_script("cellflow")
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 9)), list("ABCDEF"))
    features.loc["F"] = 0
    assert list(cellflow.target_codes({"A", "B"}, features).index) == list("ABCDE")
    both = cellflow.target_codes({"A", "F"}, features)
    assert set(both.index) == set("ABCDEF")
    assert (both.loc["F"] != 0).any()
    np.testing.assert_array_equal(cellflow.target_codes({"A", "B"}, None), np.eye(2))
    peer = theirs()
    targets = sorted({t for _, p in (*task.split.train, *task.split.test) for t in p.targets})
    peer.features = [TargetFeatures(targets[:2], np.eye(2))]
    peer.fit(task.train, task.split)
    peer.predict(["A"], task.control)
    given = ad.read_h5ad(Path(peer.folder.name) / "features.h5ad").to_df()
    assert list(given.index) == targets
    np.testing.assert_array_equal(given[:2], np.eye(2))
    assert (given[2:] == 0).all(None)
    peer.close()


WIDE = """
import numpy as np
import pandas as pd
from _serve import answer, as_arrays, serve

GENES = [f"G{i}/a" for i in range(6_000)]


def predict(state, control, wanted):
    cells = answer(np.ones((len(wanted), 6_000)), wanted, GENES, "counts")
    cells.uns["effect"] = as_arrays(pd.DataFrame(0.5, list(wanted), GENES))
    return cells


if __name__ == "__main__":
    serve(lambda train, task: None, predict, "nothing else")
"""


def test_effects_of_many_genes_pass_through_files(task, tmp_path):
    """Columns of a frame do not fit into a file's header from some 4,000 genes on."""
    shutil.copy(PEERS / "_serve.py", tmp_path)
    (tmp_path / "wide.py").write_text(WIDE)
    with Peer(tmp_path / "wide.py", python=Path(sys.executable)) as peer:
        peer.fit(task.train, task.split)
        found = peer.predict(["A", r"B\+x"], task.control)
    effect = found.uns["effect"]
    assert effect.shape == (2, 6_000)
    assert list(effect.index) == ["A", r"B\+x"]
    assert effect.columns[-1] == "G5999/a"


def test_peers_get_batches_where_the_data_name_them(theirs):
    adata = gpjepa.datasets.simulate(600, 30, n_targets=4, n_combinations=4)
    named = standard_cells(adata, context_key="context", batch_key="batch")
    found = Task.of(named, splits.doubles(measured_rows(named)))
    assert "batch" in found.train.obs
    peer = theirs()
    peer.fit(found.train, found.split)
    peer.predict(["A"], found.control)
    given = ad.read_h5ad(Path(peer.folder.name) / "train.h5ad")
    assert (given.obs["batch"].astype(str).to_numpy() == found.train.obs["batch"]).all()
    peer.close()
