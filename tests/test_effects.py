from dataclasses import replace
from itertools import combinations

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
    KernelRidge,
    LargerSingle,
    LinearModel,
    MatchingMean,
    MeanEffect,
    NearestPerturbation,
    NoChange,
    OtherDose,
    ShrunkenAdditive,
    Transfer,
    UnseenTargets,
    _process,
    coexpression_features,
    effect_features,
    effect_table,
    expected_log1p,
    fit_gate,
    interaction_recall,
    library_shift,
    library_shifts,
    measured_interactions,
    noise_corrected_error,
    significant_interactions,
)
from gpjepa.effects._gain import SharedNoise
from gpjepa.effects._measured import Measured
from gpjepa.effects._stack import Experts, control_terms, shrink
from gpjepa.effects._weighted import Weights
from gpjepa.perturbations import LabelReader, Perturbation, TargetFeatures, UnknownTargetError

read = LabelReader().read


def table_of(effects, noise=0.0, contexts=("c",), n_genes=None):
    """An effect table with given effects {(context, label): vector} and equal noise."""
    rows = sorted((c, read(p)) for c, p in effects)
    values = {(c, read(p)): np.asarray(e, np.float32) for (c, p), e in effects.items()}
    n_genes = n_genes or len(next(iter(values.values())))
    stacked = np.stack([values[r] for r in rows])
    per_context = {c: np.full(n_genes, noise, np.float32) for c in contexts}
    return EffectTable(
        np.array([f"g{i}" for i in range(n_genes)], object),
        tuple(rows),
        np.full(len(rows), 50),
        dict.fromkeys(SCALES, stacked),
        {s: np.full_like(stacked, noise) for s in SCALES},
        {s: {c: np.full(n_genes, 9, np.float32) for c in contexts} for s in SCALES},
        dict.fromkeys(SCALES, per_context),
    )


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
        NoChange("log").fit(table)


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


def test_a_quarter_is_carried_over_from_a_single_context_and_all_from_several():
    effect = np.array([1.0, -2.0, 0.5])
    one = table_of({("a", "A"): effect}, contexts=("a", "new"))
    predicted = EffectAnchor().fit(one).predict([read("A")], ["new"], "mean_log1p")
    assert predicted.regime == ["new context"]
    np.testing.assert_allclose(predicted.mean[0], 0.25 * effect, atol=1e-6)
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
        for p, c in [
            ("A", "c"),
            ("A+B", "c"),
            ("A+Z", "c"),
            ("Y+Z", "c"),
            ("Z", "c"),
            ("B", "d"),
            ("A", "e"),
            ("control", "c"),
        ]
    ]
    # What one other context knows is not carried to one with effects of its own.
    assert found == ["seen", "seen", "seen1", "seen0", "unseen", "unseen", "new context", "control"]
    with pytest.raises(KeyError, match="nowhere"):
        EffectAnchor().fit(table).predict([read("A")], ["nowhere"], "mean_log1p")


def test_doses_between_measured_ones_are_interpolated():
    table = table_of({("c", "A@1"): [1.0, 0.0], ("c", "A@3"): [2.0, 1.0]})
    anchor = EffectAnchor().fit(table)
    doses = ["A@0.5", "A@1", "A@2", "A@3", "A@10"]
    predicted = anchor.predict([read(d) for d in doses], ["c"] * 5, "mean_log1p").mean[:, 0]
    share = np.log(2) / np.log(3)
    np.testing.assert_allclose(predicted, [0.5, 1, 1 + share, 2, 2], rtol=1e-6)
    assert anchor.regime(read("A@2"), "c") == "new dose"


def dose_response(rng, doses, unit=1.0, n=8, noise=0.02):
    """Drugs whose effects keep their direction, with half-maximal doses from 1 to 100 units."""
    half, direction = unit * 10 ** rng.uniform(0, 2, (n, 1)), rng.normal(size=(n, 50))
    effects = {
        ("c", f"D{i}@{unit * d:g}"): direction[i] / (1 + half[i] / (unit * d))
        + rng.normal(0, noise, 50)
        for i in range(n)
        for d in doses
    }
    return table_of(effects, noise=noise**2), half, direction


@pytest.mark.parametrize("unit", [1.0, 1e-3])
@pytest.mark.parametrize("dose", [3.0, 1000.0])
def test_dose_responses_are_hill_curves(rng, dose, unit):
    """Between doses and beyond them; whatever the unit of the dose."""
    table, half, direction = dose_response(rng, [0.1, 1, 10, 30, 100], unit)
    wanted = [Perturbation.of([f"D{i}"], [dose * unit]) for i in range(8)]
    truth = direction / (1 + half / (dose * unit))
    predicted = EffectAnchor().fit(table).predict(wanted, ["c"] * 8, "mean_log1p")
    error = {
        form: ((OtherDose(form).fit(table).predict(wanted, ["c"] * 8) - truth) ** 2).sum()
        for form in ("hill", "log_linear", "nearest")
    }
    assert error["hill"] < 0.01 * (truth**2).sum()
    assert ((predicted.mean - truth) ** 2).sum() < 0.5 * error["log_linear"]
    assert error["log_linear"] <= error["nearest"]
    inside = np.abs(predicted.mean - truth) < 1.96 * np.sqrt(predicted.variance)
    assert inside.mean() > 0.9


def test_effects_do_not_shrink_as_doses_grow(rng):
    table, _, direction = dose_response(rng, [1, 3, 10, 30, 100], noise=1e-3)
    wanted = [Perturbation.of(["D3"], [d]) for d in np.geomspace(0.1, 1e4, 40)]
    predicted = EffectAnchor().fit(table).predict(wanted, ["c"] * 40, "mean_log1p").mean
    size = predicted @ direction[3] / (direction[3] ** 2).sum()
    assert (np.diff(size) > -0.01).all()
    assert 0 <= size[0] < 0.1


def test_few_doses_are_joined_by_lines(rng):
    """A Hill curve has a half-maximal dose and a steepness: three doses are too few."""
    table, *_ = dose_response(rng, [1, 10, 100])
    wanted = [Perturbation.of(["D1"], [d]) for d in (30.0, 1000.0)]
    said = OtherDose("hill").fit(table).predict(wanted, ["c", "c"])
    np.testing.assert_array_equal(said, OtherDose().fit(table).predict(wanted, ["c", "c"]))
    experts = EffectAnchor().fit(table).explain(wanted[0]).experts
    assert set(experts["part"]) == {"D1@10", "D1@100"}
    with pytest.raises(ValueError, match="form='linear' is not known"):
        OtherDose("linear")


@pytest.mark.parametrize("where", ["between", "beyond"])
def test_a_dose_left_out_has_no_weight_in_what_is_said_of_it(rng, where):
    table, *_ = dose_response(rng, [1, 3, 10, 30, 100])
    doses = EffectAnchor().fit(table)._fit_of("mean_log1p").singles.doses
    assert_left_out(table, doses.experts(where))


def assert_left_out(table, experts):
    assert len(experts.rows) > 4
    for i, row in enumerate(experts.rows):
        for terms in experts.of(i):
            for _, weights in terms:
                assert not weights.values[weights.columns == row].any(), table.rows[row]


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


@pytest.mark.parametrize("interaction", [0.0, 0.2])
def test_intervals_of_combinations_cover_the_truth(rng, interaction):
    """Measured ones, and ones that the stack of the others predicts."""
    inside = {"measured": [], "predicted": []}
    for _ in range(10):
        names = [f"T{i:02d}" for i in range(16)]
        truth = {t: rng.normal(0, 0.3, 150) for t in names}
        pairs = [f"{a}+{b}" for a, b in zip(names[:-1], names[1:], strict=True)]
        for pair in pairs:
            a, b = (truth[t] for t in pair.split("+"))
            truth[pair] = 0.8 * (a + b) + rng.normal(0, interaction, 150)
        shared = rng.normal(0, 0.1, 150)
        rows = {("c", t): e + rng.normal(0, 0.15, 150) - shared for t, e in truth.items()}
        held = pairs[::4]
        table = table_of({k: v for k, v in rows.items() if k[1] not in held})
        for scale in SCALES:
            table.variance[scale][:] = 0.15**2
            table.control_variance[scale]["c"][:] = 0.1**2
        anchor = EffectAnchor().fit(table)
        for kind, labels in (("predicted", held), ("measured", pairs[1::4])):
            found = anchor.predict([read(x) for x in labels], ["c"] * len(labels), "mean_log1p")
            z = (found.mean - np.stack([truth[x] for x in labels])) / np.sqrt(found.variance)
            inside[kind].append(np.abs(z) < 1.96)
    assert 0.9 < np.mean(inside["measured"]) < 0.99
    assert 0.9 < np.mean(inside["predicted"]) < 0.99


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


@pytest.mark.parametrize("shared", [20, 4])
def test_few_effects_here_say_what_those_elsewhere_are_worth(rng, shared):
    """Of the targets of one context, a few were measured in another: half of what is special."""
    common, special = rng.normal(size=60), rng.normal(size=(30, 60))
    effects = {("x", f"T{i:02d}"): s - common for i, s in enumerate(special)}
    effects |= {("y", f"T{i:02d}"): common + s / 2 for i, s in enumerate(special[:shared])}
    table = table_of(effects, noise=1e-3, contexts="xy")
    anchor = EffectAnchor().fit(table)
    predicted = anchor.predict([read(f"T{i}") for i in range(20, 30)], ["y"] * 10, "mean_log1p")
    truth = special[20:] / 2
    missed = ((predicted.mean - common - truth) ** 2).sum() / (truth**2).sum()
    if shared == 4:  # too few: as if it had never been perturbed
        assert set(predicted.regime) == {"unseen"}
        assert missed > 1
        return
    assert set(predicted.regime) == {"new context"}
    assert missed < 0.05
    experts = anchor.explain("T29", "y").experts
    assert "special to it elsewhere" in set(experts["expert"])
    assert_left_out(table, anchor._fit_of("mean_log1p").singles.few_shot.experts("y"))
    # A target that combinations of this context have is predicted from these.
    more = table_of(effects | {("y", "T28+T01"): special[3]}, noise=1e-3, contexts="xy")
    anchor = EffectAnchor().fit(more)
    assert anchor.regime(read("T28"), "y") == "unseen"
    assert "special to it elsewhere" not in set(anchor.explain("T28", "y").experts["expert"])


def test_what_is_special_elsewhere_is_measured_without_the_target(rng):
    """Else the prediction there, which is taken off, would know it."""
    effects = {(c, f"T{i}"): rng.normal(size=40) for c in "xy" for i in range(8)}
    table = table_of(effects, noise=1e-3, contexts="xy")
    singles = EffectAnchor().fit(table)._fit_of("mean_log1p").singles
    special = singles.few_shot._special(read("T3"), "y")
    row = table.rows.index(("x", read("T3")))
    own = {
        float(weights.values[weights.columns == row].sum() * factor)
        for terms in special
        for factor, weights in terms
    }
    [(_, measured)] = singles.denoiser.terms(row)
    assert own <= {0.0, float(measured.values[measured.columns == row][0])}


@pytest.mark.parametrize("shared", [5, 20])
def test_contexts_that_have_nothing_in_common_do_no_harm(rng, shared):
    """Two alike, and one of which a few effects show that the others say nothing of it."""
    there, here = rng.normal(size=(40, 60)), rng.normal(size=(40, 60))
    effects = {(c, f"T{i}"): there[i] for c in "xy" for i in range(40)}
    effects |= {("z", f"T{i}"): here[i] for i in range(shared)}
    anchor = EffectAnchor().fit(table_of(effects, noise=1e-3, contexts="xyz"))
    rest = range(shared, 40)
    found = anchor.predict([read(f"T{i}") for i in rest], ["z"] * len(rest), "mean_log1p")
    assert ((found.mean - here[shared:]) ** 2).sum() < 1.02 * (here[shared:] ** 2).sum()
    inside = np.abs(found.mean - here[shared:]) < 1.96 * np.sqrt(found.variance)
    assert inside.mean() > 0.88


def test_doses_of_one_drug_are_not_several_targets_of_few_effects(rng):
    """One drug at six doses does not show how well other drugs' effects transfer."""
    effect = rng.normal(size=(4, 40))
    effects = {(c, f"D{i}@10"): effect[i] for c in "xy" for i in range(1, 4)}
    effects |= {
        (c, f"D0@{d}"): effect[0] * d / (d + 9) for c in "xyz" for d in (1, 3, 9, 30, 90, 300)
    }
    anchor = EffectAnchor().fit(table_of(effects, noise=1e-3, contexts="xyz"))
    found = anchor.predict([read("D3@10")], ["z"], "mean_log1p")
    np.testing.assert_allclose(found.mean[0], effect[3], atol=0.2)


def test_weights_rest_on_enough_targets_where_there_are_many(rng, monkeypatch):
    loadings = rng.normal(size=(60, 3))
    effects = loadings @ rng.normal(size=(3, 50)) + rng.normal(0, 0.2, (60, 50))
    names = [f"T{i:02d}" for i in range(60)]
    table = table_of({("c", n): e for n, e in zip(names[:50], effects, strict=False)}, noise=0.04)
    features = TargetFeatures(names, loadings)
    wanted = [read(n) for n in names[50:]], ["c"] * 10, "mean_log1p"
    of_all = EffectAnchor(features).fit(table).predict(*wanted).mean
    monkeypatch.setattr("gpjepa.effects._unseen._ENOUGH", 20)
    anchor = EffectAnchor(features).fit(table)
    some = anchor.predict(*wanted).mean
    assert anchor._fit_of("mean_log1p").singles.unseen.stack_.n_units == 17
    assert ((some - of_all) ** 2).sum() < 0.01 * (of_all**2).sum()


def test_out_of_fold_rows_do_not_know_themselves(rng):
    effects = {("c", f"T{i}"): rng.normal(size=30) for i in range(12)}
    effects |= {("c", f"T{i}+T{i + 1}"): rng.normal(size=30) for i in range(6)}
    table = table_of(effects, noise=1e-4)
    before = EffectAnchor().fit(table).out_of_fold("mean_log1p")
    changed = table_of(effects | {("c", "T3+T4"): rng.normal(size=30) * 9}, noise=1e-4)
    after = EffectAnchor().fit(changed).out_of_fold("mean_log1p")
    row = table.rows.index(("c", read("T3+T4")))
    np.testing.assert_array_equal(before[row], after[row])


def test_leaving_out_in_closed_form_is_refitting(rng, monkeypatch):
    """Two contexts, features, combinations: as ten refits say, but for the weights of experts."""
    singles = [f"T{i:02d}" for i in range(40)]
    loadings = rng.normal(size=(40, 4))
    programmes = rng.normal(size=(4, 30))
    effects = {}
    for context in "xy":
        for i, name in enumerate(singles):
            effects[context, name] = loadings[i] @ programmes + rng.normal(0, 0.2, 30)
        for i in range(0, 39, 2):
            both = effects[context, singles[i]] + effects[context, singles[i + 1]]
            effects[context, f"{singles[i]}+{singles[i + 1]}"] = both + rng.normal(0, 0.2, 30)
    table = table_of(effects, noise=0.02, contexts="xy")
    features = TargetFeatures(singles, np.hstack([loadings, rng.normal(size=(40, 2))]))
    anchor = EffectAnchor(features, "mean").fit(table)
    with monkeypatch.context() as patched:
        patched.setattr("gpjepa.effects._anchor.MANY_UNITS", 500)
        refitted = anchor.out_of_fold("mean_log1p", n_folds=20)
    monkeypatch.setattr("gpjepa.effects._anchor.MANY_UNITS", 20)
    closed = anchor.out_of_fold("mean_log1p")
    truth = table.effect["mean_log1p"]
    assert anchor.n_folds == 1
    assert ((closed - refitted) ** 2).sum() < 0.01 * (truth**2).sum()
    error, other = (((x - truth) ** 2).sum() for x in (closed, refitted))
    assert error == pytest.approx(other, rel=0.05)
    # Another measurement of a row moves what is said of it by the weights of experts alone.
    changed = effects | {("x", "T05"): effects["x", "T05"] + rng.normal(size=30)}
    after = EffectAnchor(features, "mean").fit(table_of(changed, noise=0.02, contexts="xy"))
    row = table.rows.index(("x", read("T05")))
    moved = after.out_of_fold("mean_log1p")[row] - closed[row]
    assert (moved**2).sum() < 0.01 * (closed[row] ** 2).sum()


def test_library_shifts_add_up_and_noise_is_shrunk(rng):
    labels = [Perturbation()] * 500 + [read("A")] * 500 + [read("B")] * 500
    library = np.exp(rng.normal(9, 0.3, 1_500))
    library[500:1_000] *= 0.5
    shifts = library_shifts(library, labels, ["c"] * 1_500)
    assert shifts[read("A")] == pytest.approx(np.log(0.5), abs=0.08)
    assert abs(shifts[read("B")]) < 0.03
    assert library_shift(shifts, read("A+B")) == shifts[read("A")] + shifts[read("B")]
    assert library_shift(shifts, read("C")) == 0


# Baselines and experts against independent references


def random_table(rng, n_targets=12, n_pairs=8, n_genes=40, contexts=("c",), noise=1e-3):
    """Random singles and pairs; genes are named like the targets, so that these can be looked up."""
    names = [f"g{i}" for i in range(n_targets)]
    labels = [*names, *(f"{names[i]}+{names[i + 1]}" for i in range(n_pairs))]
    effects = {(c, x): rng.normal(0, 1, n_genes) for c in contexts for x in labels}
    return table_of(effects, noise=noise, contexts=contexts)


def random_features(rng, table, n_features=5, names=None):
    names = names or sorted({p.targets[0] for _, p in table.rows})
    return TargetFeatures(names, rng.normal(size=(len(names), n_features)), "random")


def test_combination_baselines_by_hand():
    table = table_of({("c", "A"): [1, 0], ("c", "B"): [0, 3]})
    pairs = [read("A+B"), read("A+D")], ["c", "c"]
    assert LargerSingle().fit(table).predict(*pairs).tolist() == [[0, 3], [0.5, 1.5]]
    assert MatchingMean().fit(table).predict(*pairs).tolist() == [[0.5, 1.5], [0.75, 0.75]]
    assert ShrunkenAdditive().fit(table).predict(*pairs)[0].tolist() == [1, 3]  # no noise at all


def test_the_linear_model_is_its_formula_in_plain_loops(rng):
    table = random_table(rng, n_pairs=0)
    singles = [p for _, p in table.rows]
    got = LinearModel(n_components=4).fit(table).predict(singles, ["c"] * len(singles))
    effect = table.effect["mean_log1p"].astype(float)
    control = table.control["mean_log1p"]["c"]
    x = np.column_stack([*(e + control for e in effect), control])  # genes × conditions
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    g = u[:, :4] * s[:4]
    row = {gene: i for i, gene in enumerate(table.genes)}
    p = np.array([g[row[q.targets[0]]] for q in singles] + [np.zeros(4)])
    y = np.column_stack([*effect, np.zeros(len(control))])
    b = np.array([sum(line) / len(line) for line in y])
    ridge = 0.1 * np.eye(4)
    w = np.linalg.inv(g.T @ g + ridge) @ g.T @ (y - b[:, None]) @ p @ np.linalg.inv(p.T @ p + ridge)
    for i in range(len(singles)):
        for j in range(len(control)):
            one = b[j] + sum(g[j, k] * w[k, m] * p[i, m] for k in range(4) for m in range(4))
            assert got[i, j] == pytest.approx(one, abs=1e-5)


def test_the_linear_model_refuses_what_it_cannot_know(rng):
    table, other = random_table(rng, n_pairs=0), random_table(rng, n_pairs=0)
    model = LinearModel(other, n_components=3).fit(table)
    assert np.isfinite(model.predict([read("g3")], ["c"])).all()
    with pytest.raises(ValueError, match="not g1\\+g2"):
        model.predict([read("g1+g2")], ["c"])
    with pytest.raises(ValueError, match="no embedding of 'NEW'"):
        model.predict([read("NEW")], ["c"])


def test_kernel_ridge_is_that_of_scikit_learn(rng):
    from sklearn.kernel_ridge import KernelRidge as Reference

    table = random_table(rng, n_pairs=0)
    names = sorted(p.targets[0] for _, p in table.rows)
    values = rng.normal(size=(len(names) + 1, 6))
    features = TargetFeatures([*names, "NEW"], values, "random")
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    order = [table.rows.index(("c", read(n))) for n in names]
    reference = Reference(alpha=0.3).fit(unit[:-1], table.effect["mean_log1p"][order])
    got = KernelRidge(features, 0.3).fit(table).predict([read("NEW")], ["c"])
    np.testing.assert_allclose(got, reference.predict(unit[-1:]), rtol=1e-6)
    nearest = NearestPerturbation(features).fit(table).predict([read("NEW")], ["c"])
    alike = int(np.argmax(unit[:-1] @ unit[-1]))
    np.testing.assert_array_equal(nearest[0], table.effect["mean_log1p"][order[alike]])


def test_leave_out_shortcuts_are_refits(rng):
    """One target, or several, or a new one: as if the others had been all there was."""
    table = random_table(rng, n_pairs=2)
    features = random_features(rng, table)
    whole = UnseenTargets([features]).fit(table)
    whole.stack_ = replace(whole.stack_, weights=np.array([0.3, 0.5]))
    whole.mean_stack_ = replace(whole.mean_stack_, weights=np.array([0.7]))
    names = [p.targets[0] for _, p in table.rows if len(p.targets) == 1]
    for out in ([names[0]], [names[2]], names[1:4], names[4:6]):
        keep = np.array([not set(out) & set(p.targets) for _, p in table.rows])
        part = UnseenTargets([features]).fit(table.subset(keep))
        part.stack_, part.mean_stack_ = whole.stack_, whole.mean_stack_
        part.process.variances = whole.process.variances
        part.process._inverses.clear()
        for target in (out[0], names[-1], "NEW"):
            expected = part.of_targets([read(target)], "c")[0].weights
            found = whole.without(read(target), "c", out)
            dense = np.bincount(found.columns, found.values, len(table.rows))
            theirs = np.bincount(expected.columns, expected.values, keep.sum())
            np.testing.assert_allclose(dense[keep], theirs, atol=1e-9)
            assert not dense[~keep].any()


def test_shrinkage_is_the_closed_form_of_james_and_stein(rng):
    table = random_table(rng, n_pairs=0, noise=0.3)
    n = len(table.rows)
    measured = Measured(table, "mean_log1p")
    found = shrink(measured, range(n), [lambda j: []])
    effect = table.effect["mean_log1p"].astype(float)
    by_hand = np.maximum(1 - 0.6 * 40 / (effect**2).sum(1), 0)
    np.testing.assert_allclose(found.factor, by_hand, rtol=1e-5)
    mean = Weights.equal(range(n))
    found = shrink(measured, range(n), [lambda j: [(1.0, mean)]])
    square = ((effect - effect.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(found.factor, 1 - 0.3 * (1 - 1 / n) * 40 / square, rtol=1e-5)


def test_steins_risk_is_the_true_error(rng):
    """Towards no change, the mean, and an independent guess that shares the control's noise."""
    truth = rng.normal(0, 0.4, (6, 400))
    errors, best = {0: [], 1: []}, []
    for _ in range(60):
        shared = rng.normal(0, 0.3, 400)
        values = truth + rng.normal(0, 0.3, truth.shape) - shared
        table = table_of({("c", f"T{i}"): v for i, v in enumerate(values)}, noise=0.09)
        measured = Measured(table, "mean_log1p")
        mean = Weights.equal(range(6))
        options = [lambda j: [], lambda j, mean=mean: [(1.0, mean)]]
        for k, option in enumerate(options):
            factor = shrink(measured, range(6), [option]).factor[:, None]
            got = factor * values + (1 - factor) * k * values.mean(0)
            errors[k].append(((got - truth) ** 2).sum())
        best.append(shrink(measured, range(6), options).target)
    # No change takes the control's noise off as well, the mean keeps it.
    assert np.mean(best) == (np.mean(errors[1]) < np.mean(errors[0]))


@pytest.mark.parametrize("seed", range(3))
def test_shared_control_noise_gets_no_weight(seed):
    """All effects are 0: what they have in common is the noise of one control."""
    rng = np.random.default_rng(seed)
    weights, naive = [], []
    for _ in range(20):
        shared = rng.normal(0, 0.3, 300)
        effects = {("c", f"T{i:02d}"): rng.normal(0, 0.1, 300) - shared for i in range(15)}
        table = table_of(effects)
        for scale in SCALES:
            table.variance[scale][:] = 0.1**2
            table.control_variance[scale]["c"][:] = 0.3**2
        fit = UnseenTargets([random_features(rng, table)]).fit(table)
        said = fit.of_targets([read("NEW")], "c")[0].weights
        weights.append(np.abs(said.values).sum())
        effect = table.effect["mean_log1p"]
        loo = (effect.sum(0) - effect) / (len(effect) - 1)
        naive.append((loo * effect).sum() / (loo**2).sum())
    assert np.mean(naive) > 0.9
    assert np.mean(weights) < 0.1


def test_stacking_finds_the_expert_that_is_right(rng):
    """Effects that follow the features: the kernel gets weight, and unseen targets are predicted."""
    values = rng.normal(size=(41, 3))
    load = rng.normal(size=(3, 200))
    truth = values / np.linalg.norm(values, axis=1, keepdims=True) @ load
    names = [f"T{i:02d}" for i in range(41)]
    noisy = {("c", t): e + rng.normal(0, 0.1, 200) for t, e in zip(names[:40], truth, strict=False)}
    table = table_of(noisy, noise=0.005)
    features = TargetFeatures(names, values, "informative")
    anchor = EffectAnchor(features).fit(table)
    predicted = anchor.predict([read("T40")], ["c"], "mean_log1p")
    error = ((predicted.mean[0] - truth[40]) ** 2).sum()
    plain = EffectAnchor().fit(table).predict([read("T40")], ["c"], "mean_log1p")
    assert error < 0.2 * ((plain.mean[0] - truth[40]) ** 2).sum()
    assert error < 0.2 * (truth[40] ** 2).sum()
    assert predicted.regime == ["unseen"]
    assert predicted.variance.mean() < plain.variance.mean()
    inside = np.abs(predicted.mean[0] - truth[40]) < 1.96 * np.sqrt(predicted.variance[0])
    assert inside.mean() > 0.85


def test_a_target_without_features_is_refused_or_takes_the_mean(rng):
    table = random_table(rng)
    features = random_features(rng, table)
    with pytest.raises(UnknownTargetError, match="without any feature in random: NEW"):
        EffectAnchor(features).fit(table).predict([read("g1+NEW")], ["c"], "mean_log1p")
    with pytest.raises(ValueError, match="missing_features='zero'"):
        EffectAnchor(features, "zero")
    lenient = EffectAnchor(features, "mean").fit(table)
    plain = EffectAnchor().fit(table)
    pair = [read("NEW")], ["c"], "mean_log1p"
    np.testing.assert_allclose(lenient.predict(*pair).mean, plain.predict(*pair).mean, atol=1e-6)


def test_features_made_of_the_same_cells_are_refused(cells, rng):
    """One cell fewer, and another order of genes and cells, are still the same cells."""
    adata, library = cells

    def table_of_cells(cells, genes=slice(None)):
        part = adata[cells][:, genes]
        labels = [read(p) for p in part.obs["perturbation"]]
        contexts = list(part.obs["context"])
        return effect_table(part.X, library[cells], labels, contexts, part.var_names)

    table = table_of_cells(np.arange(300))
    fewer = table_of_cells(rng.permutation(299), rng.permutation(40))
    for other in (fewer, fewer.subset(np.arange(2))):
        with pytest.raises(ValueError, match="effects of the same cells"):
            EffectAnchor(effect_features(other)).fit(table)
        with pytest.raises(ValueError, match="same cells"):
            LinearModel(other).fit(table)
    # Rows of the same table that share the controls alone may speak of each other.
    here, elsewhere = (table.subset([c == x for c, _ in table.rows]) for x in "xy")
    EffectAnchor(effect_features(elsewhere)).fit(here)
    half = np.arange(300) % 2 == 0
    EffectAnchor(effect_features(table_of_cells(half))).fit(table_of_cells(~half))


def test_effects_elsewhere_are_features(rng):
    """Another screen in which the same targets act alike tells unseen targets apart."""
    groups = rng.normal(size=(3, 100))
    here = {("c", f"T{i:02d}"): groups[i % 3] + rng.normal(0, 0.1, 100) for i in range(20)}
    there = rng.normal(size=(3, 60))
    screen = table_of(
        {("c", f"T{i:02d}"): there[i % 3] + rng.normal(0, 0.1, 60) for i in range(21)}, noise=0.005
    )
    anchor = EffectAnchor(effect_features(screen)).fit(table_of(here, noise=0.004))
    new = anchor.predict([read("T20")], ["c"], "mean_log1p").mean[0]
    assert ((new - groups[20 % 3]) ** 2).sum() < 0.1 * (groups[20 % 3] ** 2).sum()


def test_coexpression_finds_genes_that_vary_together(rng):
    library = np.full(400, 10_000.0)
    state = rng.gamma(2, 1, (400, 2))
    counts = rng.poisson(20 * np.repeat(state, 5, axis=1))
    features = coexpression_features(sp.csr_matrix(counts), library, [f"g{i}" for i in range(10)])
    kernel = features.kernel(["g0"], [f"g{i}" for i in range(1, 10)])[0]
    assert kernel[:4].min() > 0.5 > kernel[4:].max()


@pytest.mark.parametrize("form", ["mean", "similar", "log_rate", "state"])
def test_transfer_of_an_effect_that_is_the_same_everywhere(rng, form):
    effect = rng.normal(0, 0.3, 50)
    table = table_of({(c, "A"): effect for c in "abc"}, contexts=("a", "b", "c", "new"))
    for i, c in enumerate(("a", "b", "c", "new")):
        table.control["mean_log1p"][c] = np.full(50, 2.0 + 0.1 * i, np.float32)
    got = Transfer(form).fit(table).predict([read("A")], ["new"])[0]
    tolerance = 0.15 if form == "log_rate" else 0.02
    np.testing.assert_allclose(got, effect, atol=tolerance)
    assert not Transfer(form).fit(table).predict([read("B")], ["new"]).any()


def test_states_more_alike_than_their_controls_are_carried_over(rng):
    """The perturbed state is the same in every context, wherever the controls were."""
    state = rng.normal(2, 1, 80)
    control = {c: rng.normal(2, 1, 80) for c in "abcde"}
    effects = {(c, "A"): state - control[c] for c in "abcd"}
    table = table_of(effects, contexts=tuple("abcde"))
    for scale in SCALES:
        table.control[scale] = {c: v.astype(np.float32) for c, v in control.items()}
    truth = state - control["e"]
    for predicted in (
        EffectAnchor().fit(table).predict([read("A")], ["e"], "mean_log1p").mean[0],
        Transfer("state").fit(table).predict([read("A")], ["e"])[0],
    ):
        assert ((predicted - truth) ** 2).sum() < 0.01 * (truth**2).sum()


def test_order_of_the_genes_does_not_matter_to_the_anchor(rng):
    table = random_table(rng, noise=0.05)
    order = rng.permutation(40)
    moved = EffectTable(
        table.genes[order],
        table.rows,
        table.n_cells,
        {s: table.effect[s][:, order] for s in SCALES},
        {s: table.variance[s][:, order] for s in SCALES},
        {s: {"c": table.control[s]["c"][order]} for s in SCALES},
        {s: {"c": table.control_variance[s]["c"][order]} for s in SCALES},
    )
    features = random_features(rng, table, names=[*(f"g{i}" for i in range(12)), "NEW"])
    pairs = [read("NEW"), read("g1+g7"), read("g1+NEW"), read("g1")], ["c"] * 4, "mean_log1p"
    a, b = (EffectAnchor(features).fit(t).predict(*pairs) for t in (table, moved))
    np.testing.assert_allclose(a.mean[:, order], b.mean, atol=1e-5)
    np.testing.assert_allclose(a.variance[:, order], b.variance, atol=1e-5)


def test_interactions_are_predicted_with_intervals_that_cover_them(rng):
    truth = {f"T{i:02d}": rng.normal(0, 0.5, 150) for i in range(30)}
    pairs = {
        f"T{i:02d}+T{i + 1:02d}": 0.7 * (truth[f"T{i:02d}"] + truth[f"T{i + 1:02d}"])
        + rng.normal(0, 0.1, 150)
        for i in range(29)
    }
    rows = {("c", k): v + rng.normal(0, 0.1, 150) for k, v in {**truth, **pairs}.items()}
    held = ["T03+T04", "T11+T12", "T20+T21"]
    table = table_of({k: v for k, v in rows.items() if k[1] not in held}, noise=0.005)
    anchor = EffectAnchor().fit(table)
    found = anchor.predict_interactions([read(x) for x in held], ["c"] * 3, "mean_log1p")
    true = np.stack([pairs[x] - sum(truth[t] for t in x.split("+")) for x in held])
    assert np.corrcoef(found.mean.ravel(), true.ravel())[0, 1] > 0.8
    inside = np.abs(found.mean - true) < 1.96 * np.sqrt(found.variance)
    assert 0.88 < inside.mean() <= 1
    with pytest.raises(ValueError, match="fewer than 2 targets"):
        anchor.predict_interactions([read("T01")], ["c"], "mean_log1p")


def test_measured_interactions_and_their_noise(rng):
    values = []
    for _ in range(300):
        control = rng.normal(0, 0.2, 10)
        effects = {("c", x): rng.normal(0, 0.2, 10) - control for x in ("A", "B", "A+B")}
        rows, interaction, variance = measured_interactions(table_of(effects, noise=0.04))
        values.append(interaction[0])
    assert rows == [("c", read("A+B"))]
    assert np.var(values) == pytest.approx(variance.mean(), rel=0.1)
    found = significant_interactions(interaction + 50, variance)
    assert found.shape == interaction.shape
    assert found.all()
    assert not significant_interactions(np.zeros((1, 10)), variance).any()


def test_recall_of_interactions_by_hand():
    predicted = np.array([9.0, -8.0, 7.0, 6.0, 0.0])
    interacts = np.array([True, True, False, True, True])
    recall = interaction_recall(predicted, interacts, (0.0, 0.1, 0.3))
    assert recall.tolist() == [0.5, 0.5, 0.75]
    with pytest.raises(ValueError, match="nothing interacts"):
        interaction_recall(predicted, np.zeros(5, bool))


def test_an_explanation_adds_up(rng):
    table = random_table(rng, noise=0.05)
    features = random_features(rng, table, names=[*(f"g{i}" for i in range(12)), "NEW"])
    anchor = EffectAnchor(features).fit(table)
    for label in ("g3", "g1+g7", "g0+g1", "g1+NEW", "NEW"):
        explained = anchor.explain(label)
        np.testing.assert_allclose(explained.contributions.sum(0), explained.mean, atol=1e-5)
        weights = explained.sources.set_index("perturbation")["weight"]
        by_source = sum(
            w * table.effect["mean_log1p"][table.rows.index(("c", read(p)))]
            for p, w in weights.items()
        )
        # A saturating sum is not a weighted sum of measured effects.
        rest = (explained.experts["expert"] == "saturating sum - sum").to_numpy()
        by_source = by_source + explained.contributions[rest].sum(0)
        np.testing.assert_allclose(by_source, explained.mean, atol=1e-5)
        assert explained.plot().axes
    with pytest.raises(ValueError, match="Say in which context"):
        EffectAnchor().fit(random_table(rng, contexts=("a", "b"))).explain("g1")


def test_pertpy_adds_the_effects_up(rng):
    import pertpy

    table = random_table(rng, n_pairs=0)
    adata = table.to_anndata()
    assert adata.obs["perturbation"].tolist()[0] == "control"
    space = pertpy.tl.PseudobulkSpace()
    # Effects are differences from the control already.
    summed = space.add(adata, perturbations=["g1", "g2"], ensure_consistency=False)
    additive = Additive().fit(table).predict([read("g1+g2")], ["c"])
    np.testing.assert_allclose(summed["g1+g2"].X, additive, rtol=1e-5)
    several = random_table(rng, n_pairs=0, contexts=("a", "b"))
    assert several.to_anndata().n_obs == 2 * len(several.to_anndata(context="a"))
    with pytest.raises(ValueError, match="Unknown context 'z'"):
        several.to_anndata(context="z")


def test_held_out_rows_move_nothing(rng):
    """Whatever a held-out perturbation did, the prediction of it is the same."""
    table = random_table(rng, noise=0.05)
    features = random_features(rng, table)
    keep = np.array([p != read("g3") for _, p in table.rows])
    changed = random_table(rng, noise=0.05)
    for scale in SCALES:
        changed.effect[scale][keep] = table.effect[scale][keep]
        changed.effect[scale][~keep] += 100
    pair = [read("g3")], ["c"], "mean_log1p"
    a, b = (EffectAnchor(features).fit(t.subset(keep)).predict(*pair) for t in (table, changed))
    np.testing.assert_array_equal(a.mean, b.mean)
    row = table.rows.index(("c", read("g3")))
    before = EffectAnchor(features).fit(table).out_of_fold("mean_log1p")[row]
    after = EffectAnchor(features).fit(changed).out_of_fold("mean_log1p")[row]
    np.testing.assert_array_equal(before, after)


def test_what_is_measured_here_is_not_forgotten_for_one_other_context(rng):
    common = rng.normal(size=60)
    here = {("c1", f"T{i:02d}"): common + rng.normal(0, 0.1, 60) for i in range(12)}
    there = {("c2", "X"): rng.normal(size=60), ("c2", "T00+X"): rng.normal(size=60)}
    table = table_of(here | there, noise=0.003, contexts=("c1", "c2"))
    found = EffectAnchor().fit(table).predict([read("X"), read("T00+X")], ["c1"] * 2, "mean_log1p")
    assert ((found.mean[0] - common) ** 2).sum() < 0.1 * (common**2).sum()
    assert (found.mean[1] ** 2).sum() > (common**2).sum()
    assert found.regime == ["unseen", "seen1"]  # as they are predicted


def test_combinations_in_a_context_without_any(rng):
    """All combinations do the same, whatever their singles do: so they do where none was made."""
    same = rng.normal(size=60)
    singles = {(c, f"T{i:02d}"): rng.normal(0, 0.3, 60) for c in ("c1", "c2") for i in range(12)}
    pairs = {("c1", f"T{i:02d}+T{i + 1:02d}"): same for i in range(10)}
    table = table_of(singles | pairs, noise=1e-3, contexts=("c1", "c2"))
    found = EffectAnchor().fit(table).predict([read("T00+T09")], ["c2"], "mean_log1p").mean[0]
    assert ((found - same) ** 2).sum() < 0.2 * (same**2).sum()


def test_intervals_of_interactions_know_how_well_the_singles_are_known(rng):
    inside = []
    for _ in range(20):
        truth = {f"T{i:02d}": rng.normal(0, 0.3, 100) for i in range(12)}
        pairs = {
            f"T{i:02d}+T{i + 1:02d}": truth[f"T{i:02d}"] + truth[f"T{i + 1:02d}"] for i in range(11)
        }
        rows = {("c", k): v + rng.normal(0, 0.3, 100) for k, v in truth.items()}
        rows |= {("c", k): v + rng.normal(0, 0.03, 100) for k, v in pairs.items()}
        table = table_of(rows)
        for scale in SCALES:
            for i, (_, p) in enumerate(table.rows):
                table.variance[scale][i] = 0.3**2 if len(p.targets) == 1 else 0.03**2
        found = (
            EffectAnchor()
            .fit(table)
            .predict_interactions([read(x) for x in pairs], ["c"] * 11, "mean_log1p")
        )
        inside.append(np.abs(found.mean) < 1.96 * np.sqrt(found.variance))
    assert np.mean(inside) > 0.9


def test_a_target_never_perturbed_is_no_surer_in_a_new_context(rng):
    effects = {}
    for i in range(10):
        effect = rng.normal(size=50)
        effects |= {(c, f"T{i:02d}"): effect for c in ("a", "b", "c")}
    table = table_of(effects, noise=1e-3, contexts=("a", "b", "c", "new"))
    anchor = EffectAnchor().fit(table)
    found = anchor.predict([read("NEW")] * 2, ["a", "new"], "mean_log1p").variance.mean(1)
    assert found[1] >= 0.9 * found[0]


def test_measured_perturbations_need_no_features(rng):
    table = random_table(rng)
    anchor = EffectAnchor(random_features(rng, table, names=["g0", "g1"])).fit(
        table.subset(np.array([p != read("g3") for _, p in table.rows]))
    )
    assert anchor.predict([read("g3+g4")], ["c"], "mean_log1p").regime == ["seen"]
    with pytest.raises(UnknownTargetError, match="without any feature in random: g3"):
        anchor.predict([read("g3")], ["c"], "mean_log1p")


def test_combinations_alone_do_not_predict_themselves(rng):
    """Effects that have nothing in common say nothing of the next."""
    kept = []
    for _ in range(20):
        effects = {("c", f"A{i}+B{i}"): rng.normal(0, 1, 200) for i in range(8)}
        anchor = EffectAnchor().fit(table_of(effects, noise=1e-3))
        new = anchor.predict([read("X+Y")], ["c"], "mean_log1p").mean[0]
        mean = np.mean(list(effects.values()), axis=0)
        kept.append((new**2).sum() / (mean**2).sum())
    assert np.mean(kept) < 0.1


def test_explanations_are_of_known_targets(rng):
    with pytest.raises(UnknownTargetError, match="'g1_g2'"):
        EffectAnchor().fit(random_table(rng)).explain("g1_g2")


def test_combinations_at_other_doses_teach_combinations(rng):
    """Singles at dose 1, pairs at half of it: weights are fitted where they are used."""
    truth = {f"T{i:02d}": rng.normal(size=80) for i in range(12)}
    effects = {("c", f"{t}@1"): e for t, e in truth.items()}
    for i in range(10):
        a, b = f"T{i:02d}", f"T{i + 1:02d}"
        effects["c", f"{a}@0.5+{b}@0.5"] = 0.3 * (truth[a] + truth[b])
    anchor = EffectAnchor().fit(table_of(effects, noise=1e-3))
    found = anchor.predict([read("T00@0.5+T11@0.5")], ["c"], "mean_log1p").mean[0]
    true = 0.3 * (truth["T00"] + truth["T11"])
    assert ((found - true) ** 2).sum() < 0.2 * (true**2).sum()


def test_few_targets_with_features_do_not_lose_the_mean(rng):
    common = rng.normal(size=50)
    effects = {("c", f"T{i:02d}"): common + rng.normal(0, 0.05, 50) for i in range(20)}
    features = TargetFeatures(["T00", "T01", "NEW"], rng.normal(size=(3, 4)))
    anchor = EffectAnchor(features).fit(table_of(effects, noise=1e-3))
    found = anchor.predict([read("NEW")], ["c"], "mean_log1p").mean[0]
    assert ((found - common) ** 2).sum() < 0.05 * (common**2).sum()


def test_regimes_of_three_targets_and_of_other_contexts():
    table = table_of(
        {("c", x): [1.0, 2.0] for x in ("A", "B", "C", "A+Z")} | {("d", "D"): [1.0, 2.0]},
        contexts=("c", "d"),
    )
    regime = EffectAnchor().fit(table).regime
    found = [
        regime(read(p), c)
        for p, c in [
            ("A+B+C", "c"),
            ("A+B+Y", "c"),
            ("X+Y+W", "c"),
            ("Z", "c"),
            ("A+D", "c"),
            ("A+B", "d"),
        ]
    ]
    assert found == ["seen2", "seen1", "seen0", "in combinations", "seen1", "seen0"]


def test_nothing_measured_is_nothing_known(rng):
    table = random_table(rng, noise=0.1)
    empty = EffectAnchor().fit(table.subset(np.zeros(len(table.rows), bool)))
    found = empty.predict([read("g1")], ["c"], "mean_log1p")
    assert not found.mean.any()
    assert (found.variance > 0).all()


def test_wrong_features_of_the_anchor_are_refused():
    with pytest.raises(TypeError, match="not DataFrame"):
        EffectAnchor([pd.DataFrame()])
    with pytest.raises(ValueError, match="no target that was perturbed alone"):
        effect_features(table_of({("c", "A+B"): [1.0, 2.0]}))


def test_noise_and_genes_that_never_vary_are_no_features(rng):
    noisy = {("c", f"T{i}"): rng.normal(0, 0.1, 300) for i in range(5)}
    noisy["c", "T5"] = rng.normal(0, 3, 300)
    features = effect_features(table_of(noisy, noise=0.02))
    assert features.targets == ["T5"]
    counts = sp.csr_matrix(np.column_stack([rng.poisson(5, (50, 3)), np.zeros(50)]))
    coexpression = coexpression_features(counts, np.full(50, 100.0), list("abcd"))
    assert coexpression.targets == list("abc")


def controlled(rng, loadings, n_control=60):
    """Cells without effects whose genes vary together, and how much they do."""
    labels = ["control"] * n_control + [f"T{i}" for i in range(4) for _ in range(30)]
    activity = rng.normal(0, 0.5, len(labels))[:, None] * loadings
    counts = rng.poisson(3 * np.exp(activity)).astype(float)
    library = np.full(len(labels), 1_000.0)
    return effect_table(
        sp.csr_matrix(counts),
        library,
        [read(x) for x in labels],
        ["c"] * len(labels),
        [f"g{g}" for g in range(counts.shape[1])],
    )


@pytest.mark.parametrize("scale", SCALES)
def test_noise_of_controls_is_that_of_genes_that_vary_together(scale):
    """The variance of a sum over genes, against repeated experiments; a diagonal is far off."""
    rng = np.random.default_rng(0)
    loadings = np.where(np.arange(80) < 40, 1.0, -1.0)
    weights = np.sign(loadings)[None]
    sums, expected, diagonal = [], [], []
    for _ in range(150):
        table = controlled(rng, loadings)
        sums.append((weights @ table.control[scale]["c"]).item())
        expected.append(table.variance_on_control(scale, 0, weights).item())
        diagonal.append(table.control_variance[scale]["c"].sum())
    assert 0.75 < np.var(sums) / np.mean(expected) < 1.3
    assert np.var(sums) > 5 * np.mean(diagonal)


def test_what_rows_share_of_the_controls_is_added_to_their_spread(rng):
    """The variance of a sum that shares one control: by pairs of rows, and none of single rows."""
    table = random_table(rng, n_pairs=0, noise=0.3)
    by = rng.normal(size=(6, 40))
    shared = SharedNoise(table, "mean_log1p")
    shared.add([(np.ones((6, 1)), by)])
    pairs = sum(0.3 * by[i] @ by[j] for i in range(6) for j in range(6) if i != j)
    assert shared.variance == pytest.approx(max(pairs, 0))
    alone = SharedNoise(table, "mean_log1p")
    alone.add([(np.ones((1, 1)), by[:1])])
    assert alone.variance == 0


def test_derivatives_by_the_controls_are_those_of_the_gain(rng):
    """Against finite differences: the control moves, and all effects and predictions with it."""
    table = random_table(rng, n_pairs=0, noise=0.1)
    measured = Measured(table, "mean_log1p")
    n = len(table.rows)
    mean = [Weights.equal([j for j in range(n) if j != i]) for i in range(n)]
    experts = Experts(range(n), range(n), lambda i: [[(1.0, mean[i])], [(0.5, mean[(i + 1) % n])]])
    change, towards = np.array([0.4, 0.2]), np.array([0.3, 0.1])

    def along(moved):
        shifted = replace(table, effect={"mean_log1p": table.effect["mean_log1p"] - moved})
        values = Measured(shifted, "mean_log1p").values
        said = (
            np.array(
                [
                    [w.values @ values[w.columns] for w in (mean[i], mean[(i + 1) % n])]
                    for i in range(n)
                ]
            )
            * np.array([1.0, 0.5])[None, :, None]
        )
        scored = ~table.targeted(range(n))
        changed, missed = (np.einsum("ikg,k->ig", said, w) for w in (change, towards))
        return (changed * (values - missed) * scored).sum()

    step = rng.normal(0, 1e-2, 40).astype(np.float32)
    terms = control_terms(measured, experts, range(n), change, towards)
    derivative = sum((on[:, :1] * each).sum(0) for on, each in terms)
    assert derivative @ step == pytest.approx((along(step) - along(-step)) / 2, rel=1e-2)


# The gate


def gate_case(rng, n=12, adds=0.5, noise=0.1, one_unit=False):
    """What a network and an anchor say of rows that were measured."""
    anchor = rng.normal(size=(n, 60))
    network = anchor + rng.normal(size=(n, 60))
    measured = anchor + adds * (network - anchor) + rng.normal(0, noise, (n, 60))
    names = [f"T@{i + 1:03d}" if one_unit else f"T{i:03d}" for i in range(n)]
    table = table_of({("c", name): d for name, d in zip(names, measured, strict=True)}, noise**2)
    return network, anchor, table, range(n)


def test_the_gate_is_least_squares(rng):
    network, anchor, table, rows = gate_case(rng, n=400)
    gate = fit_gate(network, anchor, table, rows)
    x, y = (network - anchor).ravel(), (table.effect["mean_log1p"] - anchor).ravel()
    assert gate.gate == pytest.approx((x @ y) / (x @ x), rel=1e-2)
    assert gate.error_gated < gate.error_anchor
    doses_of_one = gate_case(rng, n=400, one_unit=True)
    assert fit_gate(*doses_of_one).gate == 0


def test_the_gate_stays_shut_for_a_network_that_knows_nothing(rng):
    gates = [fit_gate(*gate_case(rng, adds=0.0, noise=1.0)).gate for _ in range(100)]
    assert np.mean(gates) < 0.02


def test_common_noise_of_the_controls_does_not_open_the_gate(rng):
    """A network that guesses one profile for all is right by chance as often as the control moves."""
    gates = []
    for _ in range(200):
        shared = rng.normal(size=60)
        network = np.tile(rng.normal(size=60), (12, 1))
        effects = {("c", f"T{i:02d}"): shared + rng.normal(0, 0.1, 60) for i in range(12)}
        table = table_of(effects, noise=1.0)
        gates.append(fit_gate(network, np.zeros((12, 60)), table, range(12)).gate)
    assert np.mean(gates) < 0.05


def test_sums_do_not_go_below_no_expression(rng):
    """Two knock-outs that each take most of a gene: together they take all, and not more."""
    effects = {("c", x): [-6.0, 1.0] for x in ("A", "B")} | {("c", "C"): [0.5, 0.5]}
    anchor = EffectAnchor().fit(table_of(effects, noise=1e-6))
    found = anchor.predict([read("A+B"), read("A+C")], ["c"] * 2, "mean_log1p")
    np.testing.assert_allclose(found.mean, [[-9, 2], [-5.5, 1.5]], atol=1e-3)
    # The explanation is of the sum itself.
    np.testing.assert_allclose(anchor.explain("A+B").mean, [-12, 2], atol=1e-3)


def test_intervals_of_shrunken_effects_hold_the_genes_that_respond_most(rng):
    """A few genes respond strongly, most do not: one factor for all takes too much off the few."""
    inside, top = [], []
    for _ in range(20):
        truth = {f"T{i:02d}": rng.normal(0, 0.02, 400) for i in range(12)}
        for values in truth.values():
            values[rng.permutation(400)[:4]] = rng.choice([-1, 1], 4) * 1.5
        noisy = {("c", t): v + rng.normal(0, 0.2, 400) for t, v in truth.items()}
        table = table_of(noisy, noise=0.0)
        for scale in SCALES:
            table.variance[scale][:] = 0.2**2
        names = list(truth)
        found = (
            EffectAnchor().fit(table).predict([read(t) for t in names], ["c"] * 12, "mean_log1p")
        )
        true = np.stack(list(truth.values()))
        covered = np.abs(found.mean - true) < 1.96 * np.sqrt(found.variance)
        inside.append(covered.mean())
        top.append(covered[np.abs(true) > 1].mean())
    assert np.mean(inside) > 0.93
    assert np.mean(top) > 0.9


def test_combinations_of_unknown_targets_are_the_mean_of_the_combinations(rng):
    """Fewer than five combinations, whose effects are alike and half as large as sums."""
    common = rng.normal(size=80)
    effects = {("c", f"T{i:02d}"): common + rng.normal(0, 0.3, 80) for i in range(10)}
    pairs = {("c", f"T0{i}+T0{i + 1}"): common + rng.normal(0, 0.3, 80) for i in (0, 2, 4)}
    anchor = EffectAnchor().fit(table_of(effects | pairs, noise=1e-3))
    found = anchor.predict([read("X+Y")], ["c"], "mean_log1p")
    assert found.regime == ["seen0"]
    assert ((found.mean[0] - common) ** 2).sum() < 0.1 * (common**2).sum()


@pytest.mark.parametrize("n_pairs", [1, 2, 4, 12])
def test_intervals_of_combinations_of_unknown_targets(rng, n_pairs):
    """Every combination is its own: how far they lie apart is in the interval of another one."""
    inside = []
    for _ in range(10):
        effects = {("c", f"T{i:02d}"): rng.normal(size=100) for i in range(20)}
        names = [f"T{2 * i % 20:02d}+T{(2 * i + 1 + i // 10) % 20:02d}" for i in range(n_pairs)]
        effects |= {("c", x): rng.normal(size=100) for x in names}
        anchor = EffectAnchor().fit(table_of(effects, noise=1e-3))
        found = anchor.predict([read("Y+Z")], ["c"], "mean_log1p")
        z = (found.mean[0] - rng.normal(size=100)) / np.sqrt(found.variance[0])
        inside.append(np.abs(z) < 1.96)
    assert np.mean(inside) > 0.85


def test_what_shrinkage_leaves_is_counted_once(rng):
    """Variance of measured singles against their error, at several levels of noise."""
    for noise in (0.3, 1.0, 3.0):
        stated = true = 0.0
        for _ in range(10):
            truth = {f"T{i:02d}": rng.normal(size=200) for i in range(10)}
            noisy = {("c", t): v + rng.normal(0, noise**0.5, 200) for t, v in truth.items()}
            table = table_of(noisy, noise=0.0)
            for scale in SCALES:
                table.variance[scale][:] = noise
            names = [read(t) for t in truth]
            found = EffectAnchor().fit(table).predict(names, ["c"] * 10, "mean_log1p")
            stated += found.variance.sum()
            true += ((found.mean - np.stack(list(truth.values()))) ** 2).sum()
        assert 0.85 < stated / true < 1.6


def test_regimes_are_how_a_prediction_is_made():
    singles = {("z", "A"): [1.0, 2], ("z", "B"): [2.0, 1]}
    pairs = {(c, "A+B"): [5.0, 5] for c in "xy"}
    anchor = EffectAnchor().fit(table_of(singles | pairs, noise=1e-6, contexts="xyz"))
    found = anchor.predict([read("A+B")], ["z"], "mean_log1p")
    assert found.regime == ["seen2"]
    np.testing.assert_allclose(found.mean[0], [3, 3], atol=0.01)
    doses = {("z", "A@1"): [1.0, 2]} | {(c, "A@5"): [5.0, 5] for c in "xy"}
    anchor = EffectAnchor().fit(table_of(doses, noise=1e-6, contexts="xyz"))
    assert anchor.predict([read("A@5")], ["z"], "mean_log1p").regime == ["new dose"]


def test_a_saturating_sum_is_an_expert_on_combinations(rng):
    """Two knock-outs that each leave a third of a rate: together a ninth, where a sum leaves less."""
    genes, singles = 60, [f"T{i}" for i in range(8)]
    control = np.full(genes, 2.0)
    kept = {s: np.where(rng.random(genes) < 0.4, 1 / 3, 1.0) for s in singles}
    rate = np.expm1(control)
    effects = {("c", s): np.log1p(rate * k) - control for s, k in kept.items()}
    pairs = [(a, b) for i, a in enumerate(singles) for b in singles[i + 1 :]]
    for a, b in pairs:
        effects["c", f"{a}+{b}"] = np.log1p(rate * kept[a] * kept[b]) - control
    noisy = {k: v + rng.normal(0, 0.01, genes) for k, v in effects.items()}
    table = table_of(noisy, noise=1e-4)
    for scale in SCALES:
        table.control[scale]["c"][:] = control
    held = [f"{a}+{b}" for a, b in pairs[:8]]
    training = table.subset([str(p) not in held for _, p in table.rows])
    anchor = EffectAnchor().fit(training)
    asked = [read(x) for x in held], ["c"] * len(held)
    truth = np.array([effects["c", x] for x in held])
    error = ((anchor.predict(*asked, "mean_log1p").mean - truth) ** 2).sum()
    additive = ((Additive().fit(training).predict(*asked) - truth) ** 2).sum()
    assert error < 0.1 * additive
    explained = anchor.explain(held[0])
    assert explained.experts["expert"].str.startswith("saturating sum").any()
    np.testing.assert_allclose(explained.contributions.sum(0), explained.mean, atol=1e-6)


def test_nothing_goes_below_no_expression_measured_or_not(rng):
    """A measured pair of knock-outs is shrunk towards their sum, which is below none."""
    labels = [x for x in ("control", "A", "B", "C", "A+B", "A+C") for _ in range(40)]
    kept = {"A": 0.1, "B": 0.2, "C": 0.5}
    rate = np.array([np.prod([kept.get(t, 1.0) for t in x.split("+")]) for x in labels])
    counts = rng.poisson(2 * rate[:, None], (len(labels), 30))
    library, read_labels = np.full(len(labels), 1_000.0), [read(x) for x in labels]
    genes = [f"g{i}" for i in range(30)]
    table = effect_table(sp.csr_matrix(counts), library, read_labels, ["c"] * len(labels), genes)
    anchor = EffectAnchor().fit(table)
    pairs = [p for _, p in table.rows]
    for scale in SCALES:
        found = anchor.predict(pairs, ["c"] * len(pairs), scale).mean
        assert (found >= -table.control[scale]["c"]).all()


def test_no_prediction_is_certain_where_nothing_is_seen(rng):
    """Effects that are all noise, without controls: unseen targets and interactions have widths."""
    names = [*(f"T{i:02d}" for i in range(20)), *(f"T{i:02d}+T{i + 1:02d}" for i in range(12))]
    values = pd.DataFrame(rng.normal(size=(32, 50)), columns=[f"g{i}" for i in range(50)])
    table = EffectTable.from_frame(values, names, sd=np.ones((32, 50)), unit="z")
    anchor = EffectAnchor().fit(table)
    assert (anchor.predict([read("NEW")], ["all"], "z").variance > 0).all()
    unseen = [read("T00+T05"), read("T00+NEW"), read("NEW+OTHER")]
    assert (anchor.predict_interactions(unseen, ["all"] * 3, "z").variance > 0).all()
    # Values that are no expression have no rates to multiply.
    experts = anchor.explain("T00+T05", scale="z").experts["expert"]
    assert not experts.str.contains("saturating").any()


def test_few_controls_have_noise_too(rng):
    """Too few to show which genes vary together: then genes are independent, not certain."""
    for _ in range(20):
        counts = rng.poisson(3, (6, 10))
        labels = [read(x) for x in ("control", "control", "A", "A", "B", "B")]
        table = effect_table(
            sp.csr_matrix(counts), np.full(6, 100.0), labels, ["c"] * 6, list("abcdefghij")
        )
        shown = table.control_variance["mean_log1p"]["c"]
        found = table.variance_on_control("mean_log1p", 0, np.ones((1, 10)))
        np.testing.assert_allclose(found, shown.sum(), rtol=1e-5)


# Many pairs at once


@pytest.mark.parametrize("kept", [True, False])
def test_pairs_predicted_together_are_those_predicted_one_at_a_time(rng, kept, monkeypatch):
    """Also where the covariances of so many targets are not kept, and from other contexts."""
    if not kept:
        monkeypatch.setattr(_process, "_MOST_KEPT", 3)
    names = [f"T{i}" for i in range(8)]
    effects = {(c, t): rng.normal(size=40) for c in "xy" for t in names}
    effects |= {("x", f"{a}+{b}"): rng.normal(size=40) for a, b in combinations(names[:5], 2)}
    table = table_of(effects, noise=0.05, contexts="xy")
    asked = [read(f"{a}+{b}") for a, b in combinations(names, 2)]
    for context in "xy":
        anchor = EffectAnchor((), "mean").fit(table)
        together = anchor.predict(asked, [context] * len(asked), "mean_log1p")
        for i, p in enumerate(asked):
            alone = anchor.predict([p], [context], "mean_log1p")
            np.testing.assert_allclose(together.mean[i], alone.mean[0], atol=1e-6)
            np.testing.assert_allclose(together.variance[i], alone.variance[0], rtol=1e-5)


def test_sums_of_absurd_effects_saturate_to_numbers():
    effects = {("c", t): np.full(10, 400.0) for t in "AB"}
    found = (
        EffectAnchor().fit(table_of(effects, noise=0.1)).predict([read("A+B")], ["c"], "mean_log1p")
    )
    assert np.isfinite(found.mean).all() and np.isfinite(found.variance).all()
