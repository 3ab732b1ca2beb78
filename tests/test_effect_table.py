"""Mean effects from cells: batches, replicates, few counts, and cells that lie elsewhere."""

import anndata as ad
import dask.array
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import gpjepa
from gpjepa.effects import CellSums, EffectAnchor, effect_table
from gpjepa.effects._measured import Measured
from gpjepa.effects._weighted import Weights
from gpjepa.perturbations import Perturbation

CONTROL = Perturbation()
A, B = map(Perturbation.parse, "AB")


def made(x, library, labels, batches=None, **more):
    genes = [f"g{i}" for i in range(x.shape[1])]
    contexts = more.pop("contexts", ["c"] * len(labels))
    return effect_table(sp.csr_matrix(x), library, labels, contexts, genes, batches=batches, **more)


@pytest.fixture(scope="module")
def screen():
    """Two perturbations in four batches that shift all genes; A mostly in the first two."""
    rng = np.random.default_rng(1)
    n, genes = 1_200, 30
    batch = rng.integers(4, size=n)
    chance = np.where(batch < 2, 0.6, 0.1)
    kind = np.where(rng.random(n) < chance, 1, np.where(rng.random(n) < 0.4, 2, 0))
    library = rng.integers(500, 3_000, n)
    shift = rng.normal(0, 1, (4, genes))
    effect = np.vstack([np.zeros(genes), rng.normal(0, 0.3, (2, genes))])
    rate = np.exp(rng.normal(-6, 1, genes) + shift[batch] + effect[kind])
    counts = rng.poisson(rate * library[:, None])
    labels = [(CONTROL, A, B)[k] for k in kind]
    return counts, library, labels, [f"b{b}" for b in batch]


def test_effects_are_differences_within_batches(screen):
    """Against a plain loop over the batches."""
    counts, library, labels, batches = screen
    table = made(*screen)
    y = np.log1p(1e4 * counts / library[:, None])
    labels, batches = np.array(labels, object), np.array(batches)
    for i, (_, perturbation) in enumerate(table.rows):
        weights, effects, rates = [], [], []
        for b in sorted(set(batches)):
            own = (labels == perturbation) & (batches == b)
            control = (labels == CONTROL) & (batches == b)
            n, m = own.sum(), control.sum()
            weights.append(n * m / (n + m))
            effects.append(y[own].mean(0) - y[control].mean(0))
            rates.append([1e4 * counts[x].sum(0) / library[x].sum() for x in (own, control)])
        weights = np.array(weights) / np.sum(weights)
        np.testing.assert_allclose(table.effect["mean_log1p"][i], weights @ effects, atol=1e-5)
        ours, theirs = np.log1p(np.einsum("b,bkg->kg", weights, rates))
        np.testing.assert_allclose(table.effect["log1p_mean"][i], ours - theirs, atol=1e-5)
    # One batch that all cells are in is no batch.
    same, none = made(*screen[:3], ["b"] * len(labels)), made(*screen[:3])
    for scale in table.scales:
        np.testing.assert_array_equal(same.effect[scale], none.effect[scale])
        np.testing.assert_array_equal(same.variance[scale], none.variance[scale])


def test_noise_of_effects_within_batches_is_that_of_repeated_experiments():
    rng = np.random.default_rng(0)
    n, genes = 240, 12
    batch = np.repeat([0, 0, 1, 1, 1, 2], n // 6)
    kind = np.tile([0, 1, 1, 2], n // 4)
    library = rng.integers(500, 3_000, n)
    rate = np.exp(rng.normal(-5, 0.5, genes) + rng.normal(0, 0.5, (3, genes))[batch])
    labels = [(CONTROL, A, B)[k] for k in kind]
    found, noise = [], []
    for _ in range(200):
        counts = rng.poisson(rate * library[:, None])
        table = made(counts, library, labels, [f"b{b}" for b in batch])
        one, two = Weights.equal([0]), Weights.equal([1])
        for scale in table.scales:
            measured = Measured(table, scale)
            sums = measured.assemble([[(1.0, one)], [(1.0, two)], [(1.0, one), (-1.0, two)]])
            found.append(measured.mean(sums))
            noise.append(measured.noise(sums))
            np.testing.assert_allclose(noise[-1][:2], table.noise(scale), rtol=1e-4)
    ratio = np.var(np.reshape(found, (200, 2, 3, genes)), 0) / np.mean(
        np.reshape(noise, (200, 2, 3, genes)), 0
    )
    # A variance between batches that is estimated as 0 or more adds some.
    assert 0.75 < ratio.mean() < 1.05


def test_perturbations_of_one_batch_each_are_compared_with_its_own_controls():
    """Simulated screen whose perturbations were each made in one of four batches."""
    adata = gpjepa.datasets.simulate(
        3_000, 100, n_targets=24, n_combinations=0, n_batches=4, seed=3
    )
    labels = [Perturbation.parse(p) for p in adata.obs["perturbation"]]
    batch = adata.obs["batch"].astype(str).to_numpy()
    names = sorted({str(p) for p in labels if not p.is_control})
    mine = {name: sorted(set(batch))[i % 4] for i, name in enumerate(names)}
    keep = np.array([p.is_control or mine[str(p)] == b for p, b in zip(labels, batch, strict=True)])
    x, library = adata.layers["counts"], np.asarray(adata.layers["counts"].sum(1)).ravel()

    def errors(keep, batches):
        table = made(x, library, labels, batches, keep=keep)
        return table, table.effect["mean_log1p"]

    whole = made(x, library, labels, list(batch))  # all four batches: what is to be found
    within, stratified = errors(keep, list(batch))
    _, pooled = errors(keep, None)
    truth = whole.effect["mean_log1p"]
    by_batch = np.zeros_like(truth)
    for i, (_, p) in enumerate(within.rows):
        own = keep & (batch == mine[str(p)])
        alone = made(x, library, labels, keep=own)
        by_batch[i] = alone.effect["mean_log1p"][alone.rows.index(("c", p))]
    np.testing.assert_allclose(stratified, by_batch, atol=1e-5)
    assert ((stratified - truth) ** 2).sum() < 0.75 * ((pooled - truth) ** 2).sum()


def test_a_batch_without_controls_is_named_and_compared_with_all(screen):
    counts, library, labels, batches = screen
    keep = np.array(
        [not (p == CONTROL and b == "b3") for p, b in zip(labels, batches, strict=True)]
    )
    with pytest.warns(UserWarning, match="Batches without control cells: 'b3'"):
        table = made(counts, library, labels, batches, keep=keep)
    only = keep & np.array(
        [p == CONTROL or b == "b3" for p, b in zip(labels, batches, strict=True)]
    )
    with pytest.warns(UserWarning, match="'b3'"):
        lonely = made(counts, library, labels, batches, keep=only)
    pooled = made(counts, library, labels, keep=only)
    np.testing.assert_allclose(lonely.effect["mean_log1p"], pooled.effect["mean_log1p"], atol=1e-5)
    # Other batches' controls differ from its own: that is part of its variance, and was not before.
    assert np.median(lonely.noise("mean_log1p") / pooled.noise("mean_log1p")) > 2
    assert np.isfinite(table.noise("log1p_mean")).all()


@pytest.mark.parametrize("of", ["batches", "replicates"])
def test_intervals_hold_what_differs_between_batches_and_replicates(of):
    """Effects of guides, or of batches, that scatter around a perturbation's own."""
    rng = np.random.default_rng(0)
    genes, n_targets, each = 40, 20, 4
    covered, plain = [], []
    for _ in range(5):
        effect = rng.normal(0, 0.3, (n_targets, genes))
        labels, parts, logs = (
            [CONTROL] * 400,
            [f"p{i % each}" for i in range(400)],
            [np.zeros(genes)] * 400,
        )
        for t in range(n_targets):
            # Two of the four, and each has an effect of its own.
            for r in rng.permutation(each)[:2]:
                own = effect[t] + rng.normal(0, 0.3, genes)
                labels += [Perturbation.parse(f"T{t:02d}")] * 30
                parts += [f"p{r}" if of == "batches" else f"T{t}-{r}"] * 30
                logs += [own] * 30
        library = rng.integers(2_000, 6_000, len(labels))
        counts = rng.poisson(np.exp(-5 + np.array(logs)) * library[:, None])
        for found, more in ((covered, {of: parts}), (plain, {})):
            table = made(counts, library, labels, **more)
            scale = "log1p_mean"
            truth = np.log1p(1e4 * np.exp(-5 + effect)) - np.log1p(1e4 * np.exp(-5))
            z = (table.effect[scale] - truth) / np.sqrt(table.noise(scale))
            found.append(np.abs(z) < 1.96)
    assert np.mean(plain) < 0.7
    assert 0.9 < np.mean(covered) < 0.98


def test_no_interval_has_width_zero():
    """Genes without counts in some or all cells, and perturbations of one cell."""
    rng = np.random.default_rng(0)
    n = 400
    library = rng.integers(500, 3_000, n)
    rate = np.exp(rng.normal(-8, 1.5, 60))
    rate[:5] = 0
    counts = rng.poisson(rate * library[:, None])
    labels = [CONTROL] * 300 + [A] * 99 + [B]
    table = made(counts, library, labels)
    assert (counts[399] == 0).sum() > 30
    anchor = EffectAnchor().fit(table)
    for scale in table.scales:
        variance = table.interval_variance(scale)
        assert (variance > 0).all()
        # A gene that was never counted is known better than one that was counted a little.
        assert variance[0, :5].max() < np.median(variance[0, 5:])
        # One cell says less than 99.
        assert np.median(variance[1] / variance[0]) > 10
        assert (anchor.predict([A, B], ["c", "c"], scale).variance > 0).all()
        part = table.subset(np.array([1]))
        np.testing.assert_array_equal(part.interval_variance(scale), variance[1:])


def test_variances_are_unbiased_and_those_of_intervals_not_much_larger():
    """Groups of few cells and sparse genes, over repeated experiments, against many cells."""
    rng = np.random.default_rng(0)
    genes = 300
    rate = np.exp(rng.normal(-9.5, 1.5, genes))

    def cells(n):
        size = rng.integers(1_000, 5_000, n)
        return rng.poisson(rng.gamma(4, rate / 4, (n, genes)) * size[:, None]), size

    many, size = cells(20_000)
    true = np.log1p(1e4 * many / size[:, None]).var(0)
    sizes = {"T1": 1, "T2": 3, "T3": 10, "T4": 50, "T5": 200}
    labels = [CONTROL] * 300 + [Perturbation.parse(p) for p, n in sizes.items() for _ in range(n)]
    plain, wide = [], []
    for _ in range(40):
        table = made(*cells(len(labels)), labels)
        expected = true / table.n_cells[:, None]
        for found, variance in (
            (plain, table.variance["mean_log1p"]),
            (wide, table.interval_variance("mean_log1p")[:5]),
        ):
            found.append(variance.sum(1) / expected.sum(1))
    found = np.mean(plain, 0)
    np.testing.assert_allclose(found[1:], 1, atol=0.05)
    assert found[0] == pytest.approx(1, abs=0.15)  # one cell: from what the other groups show
    assert (np.mean(wide, 0) < 1.5).all()


def test_large_library_sizes_in_small_integers(screen):
    counts, library, labels, _ = screen
    small = made(counts, (library * 40).astype(np.int32), labels)
    large = made(counts, (library * 40).astype(float), labels)
    assert (library.astype(np.int64) * 40).max() ** 2 > np.iinfo(np.int32).max
    for scale in small.scales:
        np.testing.assert_array_equal(small.variance[scale], large.variance[scale])


def test_sums_add_up_over_files_and_arrays_on_disk(screen, tmp_path):
    counts, library, labels, batches = screen
    whole = made(*screen)
    sums = CellSums([f"g{i}" for i in range(counts.shape[1])])
    for half in (slice(0, 500), slice(500, None)):
        sums.add(
            sp.csr_matrix(counts[half]),
            library[half],
            labels[half],
            ["c"] * len(labels[half]),
            batches=batches[half],
        )
    ad.AnnData(sp.csr_matrix(counts.astype(np.float32))).write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    lazy = dask.array.from_array(counts, chunks=(300, counts.shape[1]))
    contexts = ["c"] * len(labels)
    others = [sums.table()]
    for x in (backed.X, lazy):
        others.append(effect_table(x, library, labels, contexts, whole.genes, batches=batches))
    for other in others:
        assert other.rows == whole.rows
        for scale in whole.scales:
            np.testing.assert_allclose(other.effect[scale], whole.effect[scale], atol=1e-5)
            np.testing.assert_allclose(other.noise(scale), whole.noise(scale), rtol=1e-4)


def test_the_anchor_knows_which_noise_effects_of_different_batches_share():
    """Pure noise: perturbations of one batch share that of its controls, which is no mean effect."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(5):
        n = 20 * 60 + 80
        labels = [Perturbation.parse(f"T{i:02d}") for i in range(20) for _ in range(60)] + [
            CONTROL
        ] * 80
        batches = [f"b{i % 2}" for i in range(20) for _ in range(60)] + ["b0"] * 40 + ["b1"] * 40
        library = rng.integers(800, 2_000, n)
        rate = np.exp(rng.normal(-6, 1, 150))
        table = made(rng.poisson(rate * library[:, None]), library, labels, batches)
        anchor = EffectAnchor().fit(table)
        left_out = anchor.out_of_fold("mean_log1p")
        gains.append((left_out**2).sum() / (table.effect["mean_log1p"] ** 2).sum())
    assert np.mean(gains) < 0.05


def test_tables_of_older_versions_can_be_read(screen):
    """As they stand in saved models: without batches, cells and what few counts need."""
    table = made(*screen[:3])
    old = object.__new__(type(table))
    later = {"strata", "has_controls", "few", "cells", "cell_rows"}
    old.__setstate__({k: v for k, v in vars(table).items() if k not in later})
    found, expected = (
        EffectAnchor().fit(t).predict([A], ["c"], "mean_log1p") for t in (old, table)
    )
    np.testing.assert_array_equal(found.mean, expected.mean)
    assert old.subset(np.array([0])).few == {}


def test_guides_of_perturbations_say_nothing_of_a_control_with_one_label():
    """Guides that differ are no reason to doubt controls that have no guides."""
    rng = np.random.default_rng(0)
    labels, guides, logs = [CONTROL] * 400, ["ntc"] * 400, [np.zeros(40)] * 400
    for t in range(12):
        effect = rng.normal(0, 0.3, 40)
        for g in range(2):
            own = effect + rng.normal(0, 0.3, 40)
            labels += [Perturbation.parse(f"T{t:02d}")] * 40
            guides += [f"T{t}-{g}"] * 40
            logs += [own] * 40
    library = rng.integers(2_000, 6_000, len(labels))
    counts = rng.poisson(np.exp(-5 + np.array(logs)) * library[:, None])
    plain, table = made(counts, library, labels), made(counts, library, labels, replicates=guides)
    for scale in table.scales:
        np.testing.assert_allclose(
            table.control_variance[scale]["c"], plain.control_variance[scale]["c"], rtol=1e-6
        )
        assert table.variance[scale].mean() > 2 * plain.variance[scale].mean()


def test_a_guide_in_many_batches_is_still_one_guide():
    """Guides × lanes, the usual design: what a guide adds does not average out over lanes."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(5):
        labels, guides, lanes, logs, truth = [], [], [], [], {}
        for t in range(-1, 15):
            p = CONTROL if t < 0 else Perturbation.parse(f"T{t:02d}")
            effect = rng.normal(0, 0.3, 40) * (t >= 0)
            truth[p] = effect
            for g in range(4 if t < 0 else 2):
                own = effect + rng.normal(0, 0.3, 40) * (t >= 0)
                labels += [p] * 80
                guides += [f"{t}-{g}"] * 80
                lanes += [f"l{i % 4}" for i in range(80)]
                logs += [own] * 80
        library = rng.integers(2_000, 6_000, len(labels))
        counts = rng.poisson(np.exp(-5 + np.array(logs)) * library[:, None])
        table = made(counts, library, labels, lanes, replicates=guides)
        scale = "log1p_mean"
        rate = 1e4 * np.exp(-5)
        true = np.log1p(rate * np.exp([truth[p] for _, p in table.rows])) - np.log1p(rate)
        covered.append(np.abs(table.effect[scale] - true) < 1.96 * np.sqrt(table.noise(scale)))
    assert 0.9 < np.mean(covered) < 0.98


def test_noise_of_a_batch_with_other_expression_is_its_own():
    """Few controls in a batch that expresses ten times less."""
    rng = np.random.default_rng(0)
    labels = [CONTROL] * 220 + [A] * 100 + [B] * 100
    batches = ["b0"] * 200 + ["b1"] * 20 + ["b1"] * 100 + ["b0"] * 100
    library = rng.integers(1_000, 3_000, len(labels))
    rate = np.exp(rng.normal(-6, 0.5, 30)) * np.where(np.array(batches) == "b1", 0.1, 1)[:, None]
    found, noise = [], []
    for _ in range(100):
        table = made(rng.poisson(rate * library[:, None]), library, labels, batches)
        found.append([table.effect[s] for s in table.scales])
        noise.append([table.noise(s) for s in table.scales])
    ratio = np.mean(noise, 0).sum(-1) / np.var(found, 0).sum(-1)
    np.testing.assert_allclose(ratio, 1, atol=0.35)


def test_measured_effects_within_batches_are_not_cut_by_other_batches():
    """A batch that expresses more of a gene can lose more than all controls have on average."""
    rng = np.random.default_rng(0)
    labels = [CONTROL] * 400 + [A] * 200 + [B] * 200
    batches = ["b0"] * 200 + ["b1"] * 200 + ["b1"] * 200 + ["b0"] * 200
    kind = np.array([0] * 400 + [1] * 200 + [2] * 200)
    library = np.full(800, 3_000)
    log = np.full((800, 20), -7.0)
    log[np.array(batches) == "b1"] += 3  # twenty times as much
    log[kind == 1, :5] -= 6
    table = made(rng.poisson(np.exp(log) * library[:, None]), library, labels, batches)
    scale = "log1p_mean"
    assert (table.effect[scale][0, :5] < -table.control[scale]["c"][:5]).all()
    found = EffectAnchor().fit(table).predict([A], ["c"], scale)
    np.testing.assert_allclose(found.mean[0, :5], table.effect[scale][0, :5], rtol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": np.ones(3)}, "'library': 3"),
        ({"genes": list("abc")}, "counts has 2 columns; there are 3 genes"),
        ({"library": np.array([5.0, 0, 5, 5])}, "1 cells have no counts"),
        ({"batches": ["x", None, "x", "x"]}, "1 cells have no value in batches"),
    ],
)
def test_cells_that_do_not_fit_are_refused(change, message):
    given = {
        "counts": sp.csr_matrix(np.ones((4, 2))),
        "library": np.full(4, 5.0),
        "perturbations": [CONTROL, CONTROL, A, A],
        "contexts": ["c"] * 4,
        "genes": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        effect_table(**{**given, **change})


def test_batches_may_be_a_column_of_obs(screen):
    counts, library, labels, batches = screen
    column = pd.Series(batches, dtype="category")
    found, expected = made(counts, library, labels, column), made(*screen)
    np.testing.assert_array_equal(found.effect["mean_log1p"], expected.effect["mean_log1p"])
