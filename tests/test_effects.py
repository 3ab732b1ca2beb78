import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import nbinom

from gpjepa.effects import (
    SCALES,
    Additive,
    EffectAnchor,
    EffectTable,
    MeanEffect,
    NoChange,
    effect_table,
    expected_log1p,
    library_shift,
    library_shifts,
    noise_corrected_error,
)
from gpjepa.perturbations import LabelReader, Perturbation

read = LabelReader().read


def table_of(effects, noise=0.0, contexts=("c",), n_genes=None):
    """An effect table with given effects {(context, label): vector} and equal noise."""
    rows = sorted((c, read(p)) for c, p in effects)
    values = {(c, read(p)): np.asarray(e, np.float32) for (c, p), e in effects.items()}
    n_genes = n_genes or len(next(iter(values.values())))
    stacked = np.stack([values[r] for r in rows])
    per_context = {c: np.full(n_genes, noise, np.float32) for c in contexts}
    return EffectTable(
        np.array([f"g{i}" for i in range(n_genes)], object), tuple(rows),
        np.full(len(rows), 50), dict.fromkeys(SCALES, stacked),
        {s: np.full_like(stacked, noise) for s in SCALES},
        {s: {c: np.ones(n_genes, np.float32) for c in contexts} for s in SCALES},
        dict.fromkeys(SCALES, per_context),
    )  # fmt: skip


@pytest.mark.parametrize("mean", [0.01, 0.7, 12.0])
@pytest.mark.parametrize("theta", [0.4, 3.0])
@pytest.mark.parametrize("library", [800.0, 12_000.0])
def test_expected_log1p_is_the_sum_over_the_negative_binomial(mean, theta, library):
    k = np.arange(5_000)
    exact = (nbinom.pmf(k, theta, theta / (theta + mean)) * np.log1p(1e4 * k / library)).sum()
    got = expected_log1p(np.array([[mean]]), np.array([theta]), np.array([library]))
    assert got[0, 0] == pytest.approx(exact, rel=1e-3)


@pytest.fixture
def cells(rng):
    n = 300
    library = rng.integers(800, 2_000, n).astype(float)
    counts = rng.poisson(rng.gamma(1.0, 1.0, 40) * library[:, None] / 1_000)
    obs = pd.DataFrame(
        {
            "perturbation": rng.choice(["control", "A", "B", "A+B"], n),
            "context": rng.choice(["x", "y"], n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs), library


def make_table(adata, library):
    labels = [read(p) for p in adata.obs["perturbation"]]
    return effect_table(adata.X, library, labels, list(adata.obs["context"]), adata.var_names)


def test_effects_and_variances_agree_with_scanpy(cells):
    adata, library = cells
    table = make_table(adata, library)
    logged = adata.copy()
    logged.X = sp.csr_matrix(np.log1p(adata.X.toarray() / library[:, None] * 1e4))
    grouped = sc.get.aggregate(logged, by=["context", "perturbation"], func=["mean", "var"])
    for i, (context, perturbation) in enumerate(table.rows):
        mine = (grouped.obs["context"] == context) & (
            grouped.obs["perturbation"] == str(perturbation)
        )
        control = (grouped.obs["context"] == context) & (grouped.obs["perturbation"] == "control")
        effect = grouped.layers["mean"][mine] - grouped.layers["mean"][control]
        np.testing.assert_allclose(table.effect["mean_log1p"][i], effect[0], atol=1e-5)
        n = table.n_cells[i]
        np.testing.assert_allclose(
            table.variance["mean_log1p"][i], grouped.layers["var"][mine][0] / n, rtol=1e-4
        )


def test_pooled_rate_and_its_variance_by_bootstrap(cells, rng):
    adata, library = cells
    table = make_table(adata, library)
    mine = ((adata.obs["context"] == "x") & (adata.obs["perturbation"] == "control")).to_numpy()
    counts, size = adata.X.toarray()[mine], library[mine]
    pooled = np.log1p(1e4 * counts.sum(0) / size.sum())
    np.testing.assert_allclose(table.control["log1p_mean"]["x"], pooled, rtol=1e-5)
    draws = []
    for _ in range(2_000):
        w = rng.integers(0, mine.sum(), mine.sum())
        draws.append(np.log1p(1e4 * counts[w].sum(0) / size[w].sum()))
    ratio = np.var(draws, axis=0) / table.control_variance["log1p_mean"]["x"]
    assert np.median(ratio) == pytest.approx(1.0, abs=0.1)


def test_order_of_cells_and_genes_does_not_matter(cells, rng):
    adata, library = cells
    table = make_table(adata, library)
    cell, gene = rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)
    moved = make_table(adata[cell, gene], library[cell])
    for scale in SCALES:
        np.testing.assert_allclose(moved.effect[scale], table.effect[scale][:, gene], atol=1e-5)


def test_a_context_without_control_cells_is_an_error(cells):
    adata, library = cells
    keep = ~((adata.obs["context"] == "y") & (adata.obs["perturbation"] == "control")).to_numpy()
    with pytest.raises(ValueError, match="No control cells in context 'y'"):
        make_table(adata[keep], library[keep])


def test_noise_corrected_error_is_unbiased(rng):
    truth, prediction = rng.normal(size=200), rng.normal(size=200)
    noise = np.full((500, 200), 0.3)
    measured = truth + rng.normal(0, np.sqrt(0.3), (500, 200))
    errors = noise_corrected_error(prediction, measured, noise)
    standard_error = errors.std() / np.sqrt(500)
    assert abs(errors.mean() - ((prediction - truth) ** 2).sum()) < 4 * standard_error


def test_baselines_by_hand():
    table = table_of({("c", "A"): [1, 0], ("c", "B"): [0, 2], ("c", "C"): [2, 1]})
    pairs = [read("A+B"), read("A+D"), read("D")], ["c"] * 3
    assert NoChange().fit(table).predict(*pairs).tolist() == [[0, 0]] * 3
    assert MeanEffect().fit(table).predict(*pairs).tolist() == [[1, 1]] * 3
    assert Additive().fit(table).predict(*pairs).tolist() == [[1, 2], [2, 1], [1, 1]]
    with pytest.raises(ValueError, match="scale='log'"):
        NoChange("log")


def test_without_noise_the_anchor_is_additive():
    table = table_of({("c", "A"): [1, 0, 3], ("c", "B"): [0, 2, 0]})
    anchor = EffectAnchor().fit(table)
    predicted = anchor.predict([read("B+A"), read("A")], ["c", "c"], "mean_log1p")
    np.testing.assert_allclose(predicted.mean, [[1, 2, 3], [1, 0, 3]], atol=1e-6)
    assert predicted.regime == ["seen2", "seen"]


def test_shrinkage_beats_additive_on_noisy_singles(rng):
    """Out of fold, over 40 draws: the reason why the anchor is not plain additive."""
    ratios = []
    for _ in range(40):
        truth = {f"T{i}": rng.normal(0, rng.gamma(1, 0.1), 200) for i in range(12)}
        noisy = {("c", t): e + rng.normal(0, 0.15, 200) for t, e in truth.items()}
        table = table_of(noisy, noise=0.15**2 / 2)
        pairs = [read(f"T{i}+T{i + 1}") for i in range(11)]
        true = np.stack([truth[f"T{i}"] + truth[f"T{i + 1}"] for i in range(11)])
        contexts = ["c"] * 11
        shrunken = EffectAnchor().fit(table).predict(pairs, contexts, "mean_log1p").mean
        raw = Additive().fit(table).predict(pairs, contexts)
        ratios.append(((shrunken - true) ** 2).sum() / ((raw - true) ** 2).sum())
    assert np.mean(ratios) < 0.8


def test_shared_control_noise_does_not_pass_for_a_mean_effect(rng):
    """Pure noise with shared controls: the slope on the mean must stay near 0, not near 1."""
    slopes = []
    for _ in range(30):
        shared = rng.normal(0, 0.3, 300)
        effects = {("c", f"T{i}"): shared + rng.normal(0, 0.1, 300) for i in range(10)}
        table = table_of(effects, noise=0.0)
        for scale in SCALES:
            table.variance[scale][:] = 0.1**2
            table.control_variance[scale]["c"][:] = 0.3**2
        mean = EffectAnchor().fit(table).predict([read("NEW")], ["c"], "mean_log1p").mean[0]
        slopes.append(np.linalg.norm(mean) / np.linalg.norm(shared))
    assert np.mean(slopes) < 0.2


def test_nothing_is_carried_over_from_a_single_context_but_from_several():
    effect = np.array([1.0, -2.0, 0.5])
    one = table_of({("a", "A"): effect}, contexts=("a", "new"))
    predicted = EffectAnchor().fit(one).predict([read("A")], ["new"], "mean_log1p")
    assert predicted.regime == ["new context"]
    assert not predicted.mean.any()
    several = {(c, "A"): effect for c in "abcd"}
    table = table_of(several, contexts=("a", "b", "c", "d", "new"))
    predicted = EffectAnchor().fit(table).predict([read("A")], ["new"], "mean_log1p")
    np.testing.assert_allclose(predicted.mean[0], effect, atol=1e-6)


def test_regimes():
    table = table_of(
        {("c", x): [1.0, 2.0] for x in ("A", "B", "A+B")} | {("d", "A"): [1.0, 2.0]},
        contexts=("c", "d", "e"),
    )
    regime = EffectAnchor().fit(table).regime
    found = [
        regime(read(p), c)
        for p, c in [("A", "c"), ("A+B", "c"), ("A+Z", "c"), ("Y+Z", "c"), ("Z", "c"), ("B", "d"),
                     ("A", "e"), ("control", "c")]
    ]  # fmt: skip
    assert found == ["seen", "seen", "seen1", "seen0", "unseen", "new context", "new context",
                     "control"]  # fmt: skip
    with pytest.raises(KeyError, match="nowhere"):
        EffectAnchor().fit(table).predict([read("A")], ["nowhere"], "mean_log1p")


def test_doses_between_measured_ones_are_interpolated():
    table = table_of({("c", "A@1"): [1.0, 0.0], ("c", "A@3"): [2.0, 1.0]})
    anchor = EffectAnchor().fit(table)
    doses = ["A@0.5", "A@1", "A@2", "A@3", "A@10"]
    predicted = anchor.predict([read(d) for d in doses], ["c"] * 5, "mean_log1p").mean[:, 0]
    share = (np.log1p(2) - np.log1p(1)) / (np.log1p(3) - np.log1p(1))
    below = np.log1p(0.5) / np.log1p(1)
    np.testing.assert_allclose(predicted, [below, 1, 1 + share, 2, 2], rtol=1e-6)
    assert anchor.regime(read("A@2"), "c") == "new dose"


def test_doses_of_one_target_are_not_several_targets(rng):
    """Five doses of one drug say as little about another drug as one dose does."""
    effect = rng.normal(size=40)
    table = table_of({("c", f"A@{d}"): effect for d in (1, 2, 3, 4, 5)}, noise=1e-6)
    other = EffectAnchor().fit(table).predict([read("B")], ["c"], "mean_log1p").mean[0]
    np.testing.assert_allclose(other, 0.5 * effect, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_intervals_of_singles_and_sums_cover_the_truth(rng, n, size):
    """Also where there is no signal at all, and where one noisy control is shared by everything."""
    inside = {"single": [], "sum": []}
    for _ in range(20):
        truth = {f"T{i:02d}": rng.normal(0, size, 200) for i in range(n)}
        shared = rng.normal(0, 0.2, 200)
        rows = {("c", t): e + rng.normal(0, 0.2, 200) - shared for t, e in truth.items()}
        table = table_of(rows, noise=0.2**2)
        anchor = EffectAnchor().fit(table)
        single = anchor.predict([read("T00")], ["c"], "mean_log1p")
        z = (single.mean[0] - truth["T00"]) / np.sqrt(single.variance[0])
        inside["single"].append(np.abs(z) < 1.96)
        if n > 1:
            pair = anchor.predict([read("T00+T01")], ["c"], "mean_log1p")
            z = (pair.mean[0] - truth["T00"] - truth["T01"]) / np.sqrt(pair.variance[0])
            inside["sum"].append(np.abs(z) < 1.96)
    assert np.mean(inside["single"]) > 0.9
    assert n == 1 or np.mean(inside["sum"]) > 0.9


def test_pure_noise_is_shrunk_away_with_few_perturbations(rng):
    for n in (1, 2, 5):
        kept = []
        for _ in range(20):
            table = table_of({("c", f"T{i}"): rng.normal(0, 0.1, 500) for i in range(n)}, noise=0.0)
            for scale in SCALES:
                table.variance[scale][:] = 0.1**2
            mean = EffectAnchor().fit(table).predict([read("T0")], ["c"], "mean_log1p").mean[0]
            kept.append((mean**2).sum() / (table.effect["mean_log1p"][0] ** 2).sum())
        assert np.mean(kept) < 0.05


def test_a_combination_measured_elsewhere_does_not_hide_its_singles_here():
    singles = {("x", "A"): [1.0, 0.0, 3.0], ("x", "B"): [0.0, 3.0, 0.0]}
    table = table_of(singles | {("y", "A+B"): [9.0, 9.0, 9.0]}, contexts=("x", "y"))
    predicted = EffectAnchor().fit(table).predict([read("A+B")], ["x"], "mean_log1p")
    np.testing.assert_allclose(predicted.mean[0], [1, 3, 3], atol=1e-6)
    assert predicted.regime == ["seen2"]


def test_out_of_fold_rows_do_not_know_themselves(rng):
    effects = {("c", f"T{i}"): rng.normal(size=30) for i in range(12)}
    effects |= {("c", f"T{i}+T{i + 1}"): rng.normal(size=30) for i in range(6)}
    table = table_of(effects, noise=1e-4)
    before = EffectAnchor().fit(table).out_of_fold("mean_log1p")
    changed = table_of(effects | {("c", "T3+T4"): rng.normal(size=30) * 9}, noise=1e-4)
    after = EffectAnchor().fit(changed).out_of_fold("mean_log1p")
    row = table.rows.index(("c", read("T3+T4")))
    np.testing.assert_array_equal(before[row], after[row])


def test_library_shifts_add_up_and_noise_is_shrunk(rng):
    labels = [Perturbation()] * 500 + [read("A")] * 500 + [read("B")] * 500
    library = np.exp(rng.normal(9, 0.3, 1_500))
    library[500:1_000] *= 0.5
    shifts = library_shifts(library, labels, ["c"] * 1_500)
    assert shifts[read("A")] == pytest.approx(np.log(0.5), abs=0.08)
    assert abs(shifts[read("B")]) < 0.03
    assert library_shift(shifts, read("A+B")) == shifts[read("A")] + shifts[read("B")]
    assert library_shift(shifts, read("C")) == 0
