"""Denoised effects, and the Gaussian process over perturbations."""

import numpy as np
import pytest
import scipy.linalg
from helpers import real_file
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from test_effects import SCALES, random_features, random_table, read, table_of

from gpjepa.effects import EffectAnchor, denoise, effect_table, noise_corrected_error
from gpjepa.effects._denoise import Denoiser
from gpjepa.effects._measured import Measured
from gpjepa.effects._process import Process


def low_rank(rng, n=20, n_genes=200, rank=2, noise=0.3, shared=0.2):
    """Effects along few directions, with noise of their own and that of one control."""
    truth = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, n_genes)) / 4
    noisy = truth + rng.normal(0, noise, truth.shape) - rng.normal(0, shared, n_genes)
    table = table_of({("c", f"T{i:02d}"): row for i, row in enumerate(noisy)})
    for scale in SCALES:
        table.variance[scale][:] = noise**2
        table.control_variance[scale]["c"][:] = shared**2
    return table, truth


def test_denoised_effects_are_nearer_to_the_truth(rng):
    table, truth = low_rank(rng)
    found = denoise(table)
    said, measured = found.X[1:], found.layers["measured"][1:]
    assert ((said - truth) ** 2).sum() < 0.25 * ((measured - truth) ** 2).sum()
    z = (said - truth) / np.sqrt(found.layers["variance"][1:])
    assert 0.92 < np.mean(np.abs(z) < 1.96) <= 1
    np.testing.assert_array_equal(measured, table.effect["mean_log1p"])


def test_directions_are_the_generalised_eigenvectors(rng):
    """By scipy's solver of S U = C U Λ, with the shrinkage written out."""
    table, _ = low_rank(rng, n=8)
    denoiser = Denoiser(Measured(table, "mean_log1p"))
    effects = table.effect["mean_log1p"].astype(float)
    h = (0.3**2 + 0.2**2) ** -0.25
    noise = h * 200 * (0.3**2 * np.eye(8) + 0.2**2)
    values, vectors = scipy.linalg.eigh(h * effects @ effects.T, noise)
    gamma = 8 / 200
    kept = np.sqrt(np.maximum((values - gamma - 1) ** 2 - 4 * gamma, 0)) / values
    kept[values < 1.7] = 0  # the largest of noise is about 1.6, the directions' are above 5
    by_hand = noise @ vectors @ np.diag(kept) @ vectors.T
    found = denoiser.through("c", np.eye(8))
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


def test_without_noise_nothing_is_changed(rng):
    table = table_of({("c", f"T{i}"): rng.normal(size=30) for i in range(6)})
    np.testing.assert_allclose(denoise(table).X[1:], table.effect["mean_log1p"], atol=1e-5)


def test_noise_alone_has_no_direction(rng):
    """In about 99 of 100 tables; what is kept of single effects is little."""
    found = []
    for _ in range(40):
        table, _ = low_rank(rng, n=12, rank=0, noise=0.2, shared=0.3)
        denoiser = Denoiser(Measured(table, "mean_log1p"))
        found.append(len(denoiser.of("c").core))
        assert (denoise(table).X ** 2).sum() < 0.05 * (table.effect["mean_log1p"] ** 2).sum()
    assert sum(found) <= 2


def test_a_row_left_out_has_no_say(rng):
    """As if it had never been measured, whatever it is."""
    table, _ = low_rank(rng)
    keep = np.arange(20) != 5
    alone = Denoiser(Measured(table.subset(keep), "mean_log1p")).of("c").weights(range(19))
    table.effect["mean_log1p"][5] = 1e3
    found = Denoiser(Measured(table, "mean_log1p")).of("c", without=[5])
    np.testing.assert_allclose(found.weights(np.flatnonzero(keep)), alone, atol=1e-9)


def test_a_large_table_is_denoised_by_its_strongest_directions(rng, monkeypatch):
    table, _ = low_rank(rng, n=60)
    whole = denoise(table).X
    monkeypatch.setattr("gpjepa.effects._denoise._EXACT", 30)
    monkeypatch.setattr("gpjepa.effects._denoise._DIRECTIONS", 4)
    np.testing.assert_allclose(denoise(table).X, whole, atol=1e-4)


def test_no_direction_of_a_large_table_is_lost(rng, monkeypatch):
    """More of them stand out than are found first."""
    table = table_of({("c", f"T{i:02d}"): rng.normal(size=200) for i in range(60)}, noise=1e-3)
    monkeypatch.setattr("gpjepa.effects._denoise._EXACT", 30)
    monkeypatch.setattr("gpjepa.effects._denoise._DIRECTIONS", 4)
    found = Denoiser(Measured(table, "mean_log1p")).of("c")
    assert len(found.core) == 60


def test_leaving_out_of_a_large_table_is_like_finding_directions_anew(rng, monkeypatch):
    """Pairs of alike targets, of which one leaves: the other still stands for their direction."""
    pairs = rng.normal(size=(20, 150))
    effects = np.repeat(pairs, 2, axis=0) + rng.normal(0, 0.5, (40, 150))
    table = table_of({("c", f"T{i:02d}"): e for i, e in enumerate(effects)}, noise=0.25)
    exact = Denoiser(Measured(table, "mean_log1p")).of("c", [3]).weights([2])[0]
    monkeypatch.setattr("gpjepa.effects._denoise._EXACT_WITHOUT", 10)
    found = Denoiser(Measured(table, "mean_log1p")).of("c", [3]).weights([2])[0]
    said, wanted = found @ effects, exact @ np.delete(effects, 3, 0)
    assert not found[3]
    assert ((said - wanted) ** 2).sum() < 0.05 * (wanted**2).sum()


def test_own_effects_and_common_ones_have_honest_intervals(rng):
    inside = []
    for _ in range(10):
        table, truth = low_rank(rng, n=20, n_genes=300, rank=1, noise=0.0, shared=0.0)
        truth = truth + rng.normal(0, 0.2, truth.shape)
        for scale in SCALES:
            table.effect[scale][:] = truth + rng.normal(0, 0.3, truth.shape)
            table.variance[scale][:] = 0.3**2
        found = denoise(table)
        z = (found.X[1:] - truth) / np.sqrt(found.layers["variance"][1:])
        inside.append(np.abs(z) < 1.96)
    assert 0.9 < np.mean(inside) < 0.99


def test_rows_keep_their_order_where_contexts_alternate(rng):
    effects = {(c, f"T{i}"): rng.normal(size=30) for c in "ab" for i in range(3)}
    table = table_of(effects, contexts=("a", "b")).subset(np.array([0, 3, 1, 4, 2, 5]))
    found = denoise(table)
    np.testing.assert_allclose(found.X[2:], table.effect["mean_log1p"], atol=1e-5)


@pytest.mark.parametrize("label", ["A+B", "A+NEW"])
def test_what_is_known_elsewhere_only_is_not_lost_in_a_combination(rng, label):
    """In a context of controls alone, and in one with effects of other targets."""
    truth = {t: rng.normal(size=80) for t in "ABCDEFGH"}
    names = [*truth, *(f"{a}+{b}" for a, b in zip("ABCDEFG", "BCDEFGH", strict=True))]
    effects = {(c, n): sum(truth[t] for t in n.split("+")) for c in "xy" for n in names}
    effects |= {("own", f"Z{i}"): rng.normal(size=80) for i in range(6)}
    noisy = {k: v + rng.normal(0, 0.2, 80) for k, v in effects.items() if k[1] != label}
    anchor = EffectAnchor().fit(table_of(noisy, noise=0.04, contexts=("x", "y", "own", "new")))
    wanted = sum(truth.get(t, 0) for t in label.split("+"))
    for context in ("new", "own"):
        found = anchor.predict([read(label)], [context], "mean_log1p")
        assert found.mean[0] @ wanted > 0.6 * wanted @ wanted
        assert found.variance.mean() > 0.04


def test_a_target_of_combinations_is_known_alone(rng):
    truth = {t: rng.normal(size=60) for t in "ABCDEF"}
    labels = ["A", "C", "D", "E", "F", "A+B", "C+D", "E+F"]
    effects = {("c", x): sum(truth[t] for t in x.split("+")) for x in labels}
    table = table_of({k: v + rng.normal(0, 0.1, 60) for k, v in effects.items()}, noise=0.01)
    found = EffectAnchor().fit(table).predict([read("B")], ["c"], "mean_log1p")
    assert found.regime == ["in combinations"]
    assert found.mean[0] @ truth["B"] > 0.5 * truth["B"] @ truth["B"]


def test_genes_that_vary_together_count_for_less(rng):
    """Two hundred genes in ten blocks have the noise of about ten."""
    table, _ = low_rank(rng, n=6, rank=0)
    blocks = np.repeat(rng.normal(size=(32, 10)), 20, axis=1)
    blocks -= blocks.mean(0)
    draws = (blocks / np.sqrt((blocks**2).sum(0))).astype(np.float32)
    alone = table.effective_genes("mean_log1p", "c", np.ones(200))
    table.draws["mean_log1p"] = {"c": draws}
    assert alone == pytest.approx(200)
    assert 6 < table.effective_genes("mean_log1p", "c", np.ones(200)) < 16


@pytest.mark.parametrize(
    ("name", "bound", "setup"),
    [("norman", 0.65, {}), ("papalexi", 0.9, {}), ("mcfaline", 1.02, {"context": "cell_line"})],
)
def test_half_of_the_cells_predicts_the_other_half(name, bound, setup):
    """Better than whole vectors shrunk one by one; where nothing is, hardly worse than nothing."""
    import anndata as ad

    year = {"norman": 2019, "papalexi": 2021, "mcfaline": 2023}[name]
    adata = ad.read_h5ad(real_file(f"{name}_{year}_mini.h5ad"))
    perturbations = [read(p) for p in adata.obs["perturbation"]]
    contexts = list(adata.obs[setup["context"]]) if setup else ["all"] * adata.n_obs
    library = np.asarray(adata.obs.get("library_size", adata.X.sum(1)), float).ravel()
    rng = np.random.default_rng(0)
    error = {"denoised": 0.0, "shrunken": 0.0, "nothing": 0.0}
    for _ in range(3):
        half = rng.random(adata.n_obs) < 0.5
        one, other = (
            effect_table(adata.X, library, perturbations, contexts, adata.var_names, keep)
            for keep in (half, ~half)
        )
        rows = [one.rows.index(r) for r in other.rows if r in set(one.rows)]
        where = [other.rows.index(one.rows[i]) for i in rows]
        truth, noise = (x[where] for x in (other.effect["mean_log1p"], other.noise("mean_log1p")))
        said = denoise(one)[len(one.contexts) :].X[np.argsort(np.argsort(rows))]
        effects, own = (x[rows] for x in (one.effect["mean_log1p"], one.noise("mean_log1p")))
        factor = np.maximum(1 - own.sum(1) / (effects**2).sum(1), 0)[:, None]
        for key, predicted in (
            ("denoised", said),
            ("shrunken", factor * effects),
            ("nothing", 0 * said),
        ):
            error[key] += noise_corrected_error(predicted, truth, noise).sum()
    against = "nothing" if name == "mcfaline" else "shrunken"
    assert error["denoised"] < bound * error[against]


def process_of(table, features=()):
    return Process(Denoiser(Measured(table, "mean_log1p")), features)


def test_the_process_is_that_of_scikit_learn(rng):
    """Without a shared control; each target has its column, that of the mean, and its features."""
    table = random_table(rng, n_pairs=0, noise=0.05)
    for scale in SCALES:
        table.control_variance[scale]["c"][:] = 0
    names = [p.targets[0] for _, p in table.rows]
    features = random_features(rng, table, names=[*names, "NEW"])
    process = process_of(table, [features])
    mean, own, alike, _ = process.variances

    def columns(targets):
        known = features.take(targets).toarray() * np.sqrt(alike)
        itself = np.array([[t == n for n in names] for t in targets]) * np.sqrt(own)
        return np.hstack([np.full((len(targets), 1), np.sqrt(mean)), itself, known])

    noise = np.diag(process.denoiser.noise("c", np.arange(len(names))))
    kernel = DotProduct(sigma_0=0, sigma_0_bounds="fixed")
    theirs = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    effects = table.effect["mean_log1p"].astype(float)
    expected = theirs.fit(columns(names), effects).predict(columns(["NEW"]))
    found = process.weights([read("NEW")], "c") @ effects
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_where_nothing_is_shared_the_process_says_nothing(rng):
    """As it is where all variances are fitted to be zero."""
    process = process_of(random_table(rng))
    process.variances[:] = 0
    assert not process.weights([read("g3+g5")], "c").any()


@pytest.mark.parametrize("label", ["g3", "g1+g2", "NEW", "g3+NEW"])
def test_rows_leave_the_process_as_if_they_had_not_been_measured(rng, label):
    """Singles, combinations and unknown targets, where all effects share a noisy control."""
    table = random_table(rng, noise=0.3)
    names = [f"g{i}" for i in range(12)]
    features = random_features(rng, table, names=[*names, "NEW"])
    process = process_of(table, [features])
    out = [i for i, (_, p) in enumerate(table.rows) if p == read(label) or "g3" in p.targets]
    keep = np.setdiff1d(np.arange(len(table.rows)), out)
    rest = process_of(table.subset(keep), [features])
    rest.variances = process.variances
    found = process.without(read(label), "c", np.array(out))
    np.testing.assert_allclose(found[keep], rest.weights([read(label)], "c")[0], atol=1e-9)
    assert not found[out].any()


def test_combinations_teach_targets_that_were_never_alone(rng):
    """B is known from A+B and A: so is B+C from these and C."""
    truth = {t: rng.normal(size=60) for t in "ABCDEF"}
    labels = ["A", "C", "D", "E", "F", "A+B", "C+D", "E+F"]
    effects = {("c", x): sum(truth[t] for t in x.split("+")) for x in labels}
    table = table_of({k: v + rng.normal(0, 0.1, 60) for k, v in effects.items()}, noise=0.01)
    found = EffectAnchor().fit(table).predict([read("B+C")], ["c"], "mean_log1p").mean[0]
    wanted = truth["B"] + truth["C"]
    assert ((found - wanted) ** 2).sum() < 0.25 * (wanted**2).sum()


def test_pertpy_adds_denoised_effects_up(rng):
    import pertpy

    adata = denoise(low_rank(rng)[0])
    space = pertpy.tl.PseudobulkSpace()
    summed = space.add(adata, perturbations=["T00", "T01"], ensure_consistency=False)
    expected = adata["T00"].X + adata["T01"].X
    np.testing.assert_allclose(summed["T00+T01"].X, expected, rtol=1e-5)
    assert not adata["control"].X.any()


def test_contexts_are_denoised_by_themselves(rng):
    one, _ = low_rank(rng)
    both = {
        (c, str(p)): e
        for c in "ab"
        for (_, p), e in zip(one.rows, one.effect["mean_log1p"], strict=True)
    }
    table = table_of(both, noise=0.09, contexts=("a", "b"))
    found = denoise(table)
    np.testing.assert_array_equal(
        found[found.obs["context"] == "b"].X, denoise(table, context="b").X
    )
    with pytest.raises(ValueError, match="Unknown context 'z'"):
        denoise(table, context="z")
    with pytest.raises(ValueError, match="scale='nothing' is not known"):
        denoise(table, "nothing")
