import os
import signal
import threading

import anndata as ad
import numpy as np
import pandas as pd
import pertpy
import pytest
import scanpy as sc
import scipy.sparse as sp
import scvi
import torch
from helpers import python, real_file, train_quickly
from sklearn.exceptions import NotFittedError

import gpjepa
from gpjepa import GPJEPA
from gpjepa.model._plan import Plan
from gpjepa.model._states import States
from gpjepa.perturbations import TargetFeatures, UnknownTargetError
from gpjepa.splits import hold_out


@pytest.fixture(scope="module")
def predicted(model, simulated, held_out):
    return model.predict_perturbation(simulated, held_out)


@pytest.fixture(scope="module")
def tiny():
    """Counts, two singles and their combination, 60 cells each."""
    return gpjepa.datasets.simulate(300, 40, n_targets=3, n_combinations=1, seed=2)


# What a prediction holds


def test_predicted_cells_are_counts_with_their_expectation(predicted, model, simulated, held_out):
    controls = (simulated.obs["perturbation"] == "control").sum()
    assert predicted.n_obs == controls
    assert list(predicted.var_names) == list(simulated.var_names)
    assert (predicted.X.data == np.rint(predicted.X.data)).all()
    assert (predicted.layers["expected_sd"] > 0).all()
    assert predicted.obsm["X_gpjepa"].shape == (controls, 16)
    assert set(predicted.obs["control_cell"]) <= set(simulated.obs_names)
    info = predicted.uns["gpjepa"]
    assert info["effects"]["regime"].tolist() == ["seen2", "seen2"]
    assert info["seed"] == 0
    assert info["units"]["X"] == "sampled counts"


def test_sampled_counts_follow_the_expected_rates(predicted, model, simulated):
    """Sums of counts against the mean and the variance of a gamma-Poisson given a cell's own counts."""
    library = predicted.obs["library_size"].to_numpy()[:, None]
    mean = predicted.layers["expected"] * library / 1e4
    own = simulated[predicted.obs["control_cell"]].layers["counts"].toarray()
    variance = mean + mean**2 / (model.module.decoder.dispersion.detach().numpy() + own)
    z = (np.asarray(predicted.X.sum(0)).ravel() - mean.sum(0)) / np.sqrt(variance.sum(0))
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 0.3
    assert 0.8 < z.std() < 1.2


@pytest.mark.parametrize("gate", [0, 1])
def test_expected_rates_hit_the_predicted_mean(model, simulated, held_out, gate):
    """log1p(1e4 × mean rate) = y_ctrl + d, floored at 0, in every context."""
    cells = model.predict_perturbation(simulated, held_out, gate=gate)
    effects = model.predict_effects(held_out, scale="log1p_mean", gate=gate)
    for context in ("context0", "context1"):
        rate = cells.layers["expected"][cells.obs["context"] == context].mean(0)
        d = effects.loc[effects["context"] == context, "effect"].to_numpy()
        control = model.anchor.effects_.control["log1p_mean"][context]
        np.testing.assert_allclose(np.log1p(rate), np.maximum(control + d, 0), atol=1e-4)


def test_effects_are_a_tidy_table(model, held_out):
    frame = model.predict_effects([held_out])
    assert list(frame.columns) == [
        "perturbation",
        "context",
        "gene",
        "effect",
        "sd",
        "lower",
        "upper",
        "anchor",
        "regime",
    ]
    assert len(frame) == 2 * 120
    assert ((frame["lower"] < frame["effect"]) & (frame["effect"] < frame["upper"])).all()
    np.testing.assert_allclose(frame["upper"] - frame["effect"], 1.959964 * frame["sd"], rtol=1e-3)
    anchored = model.predict_effects(held_out, gate=0)
    np.testing.assert_allclose(anchored["effect"], anchored["anchor"])
    assert not np.allclose(model.predict_effects(held_out, gate=1)["effect"], anchored["effect"])


def test_control_has_no_effect(model, simulated):
    assert not model.predict_effects("control")["effect"].any()
    cells = model.predict_perturbation(simulated, "control", context="context0")
    rate = np.log1p(cells.layers["expected"].mean(0))
    np.testing.assert_allclose(
        rate, model.anchor.effects_.control["log1p_mean"]["context0"], atol=1e-4
    )


def test_unseen_gene_is_predicted_as_unseen(model):
    frame = model.predict_effects("GENE00001")
    assert set(frame["regime"]) == {"unseen"}
    assert frame["sd"].mean() > 0


# Invariances, bit for bit


def same(a, b):
    assert (a.X != b.X).nnz == 0
    np.testing.assert_array_equal(a.layers["expected"], b.layers["expected"])
    np.testing.assert_array_equal(a.obsm["X_gpjepa"], b.obsm["X_gpjepa"])
    pd.testing.assert_frame_equal(a.obs, b.obs)


def test_order_of_targets_cells_and_genes_does_not_matter(model, simulated, held_out, rng):
    reference = model.predict_perturbation(simulated, held_out, gate=1)
    backwards = "+".join(held_out.split("+")[::-1])
    swapped = model.predict_perturbation(simulated, backwards, gate=1)
    assert set(swapped.obs["perturbation"]) == {backwards}  # as it was asked for
    swapped.obs_names = reference.obs_names
    swapped.obs["perturbation"] = reference.obs["perturbation"]
    same(reference, swapped)
    moved = simulated[rng.permutation(simulated.n_obs), rng.permutation(simulated.n_vars)].copy()
    same(reference, model.predict_perturbation(moved, held_out, gate=1))
    controls = moved[moved.obs["perturbation"] == "control"].copy()
    same(reference, model.predict_perturbation(controls, held_out, gate=1))


def test_other_perturbations_in_the_list_do_not_matter(model, simulated, held_out):
    alone = model.predict_perturbation(simulated, held_out)
    other = str(model.anchor.effects_.perturbations[0])
    both = model.predict_perturbation(simulated, [other, held_out])
    mine = both[both.obs["perturbation"] == held_out]
    assert list(mine.obs_names) == list(alone.obs_names)
    assert (mine.X != alone.X).nnz == 0


def test_seed_changes_the_sampled_cells_only(model, simulated, held_out):
    a = model.predict_perturbation(simulated, held_out, seed=1, gate=0)
    b = model.predict_perturbation(simulated, held_out, seed=2, gate=0)
    assert (a.X != b.X).nnz > 0
    np.testing.assert_array_equal(a.layers["expected"], b.layers["expected"])


def test_number_of_samples(model, simulated, held_out):
    few = model.predict_perturbation(simulated, held_out, n_samples=7, context="context1")
    assert few.n_obs == 7
    many = model.predict_perturbation(simulated, held_out, n_samples=500, context="context1")
    assert many.n_obs == 500
    assert many.obs_names.is_unique
    mean = model.predict_perturbation(simulated, held_out, n_samples=7, return_mean=True)
    assert mean.uns["gpjepa"]["units"]["X"] == "expected counts"


def test_saved_model_predicts_the_same(model, simulated, held_out, tmp_path):
    model.save(tmp_path / "model")
    for adata in (simulated.copy(), False):
        again = GPJEPA.load(tmp_path / "model", adata)
        same(
            model.predict_perturbation(simulated, held_out, gate=1),
            again.predict_perturbation(simulated, held_out, gate=1),
        )
        pd.testing.assert_frame_equal(
            model.predict_effects(held_out), again.predict_effects(held_out)
        )
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("gate", [0, 1])
def test_cells_do_not_depend_on_threads_or_mini_batches(model, simulated, held_out, request, gate):
    """Another number of threads moves states in single precision by 4e-6."""
    reference = model.predict_perturbation(simulated, held_out, gate=gate)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    for size, n in ((3, threads), (512, 1), (1, 1)):
        torch.set_num_threads(n)
        again = model.predict_perturbation(simulated, held_out, gate=gate, batch_size=size)
        assert (reference.X != again.X).nnz == 0
        np.testing.assert_allclose(again.layers["expected"], reference.layers["expected"], 1e-6)
    assert next(model.module.parameters()).dtype == torch.float32


def test_scores_and_fold_changes_have_one_sign(model, simulated, held_out):
    cells = model.predict_perturbation(simulated, [held_out, "GENE00001"])
    for label in (held_out, "GENE00001"):
        frame = sc.get.rank_genes_groups_df(cells, label)
        assert (frame["scores"] * frame["logfoldchanges"] >= -1e-12).all()


def test_loading_aligns_genes(model, simulated, held_out, tmp_path, rng):
    model.save(tmp_path / "model")
    moved = simulated[:, rng.permutation(simulated.n_vars)].copy()
    again = GPJEPA.load(tmp_path / "model", moved)
    same(
        model.predict_perturbation(simulated, held_out), again.predict_perturbation(None, held_out)
    )


# In the ecosystem


def test_result_works_in_scanpy_and_pertpy(predicted, simulated, held_out, tmp_path):
    import matplotlib.pyplot as plt

    frame = sc.get.rank_genes_groups_df(predicted, held_out)
    assert list(frame.columns) == ["names", "scores", "logfoldchanges", "pvals", "pvals_adj"]
    assert frame["scores"].is_monotonic_decreasing
    for draw in (
        sc.pl.rank_genes_groups,
        sc.pl.rank_genes_groups_violin,
        sc.pl.rank_genes_groups_dotplot,
        sc.pl.rank_genes_groups_heatmap,
        sc.pl.rank_genes_groups_matrixplot,
    ):
        draw(predicted.copy(), show=False)
        plt.close("all")
    shown = predicted.copy()
    sc.pp.neighbors(shown, use_rep="X_gpjepa")
    sc.tl.umap(shown, maxiter=20)
    sc.pl.umap(shown, color="context", show=False)
    plt.close("all")
    observed = simulated[simulated.obs["perturbation"] == held_out]
    both = ad.concat([predicted, observed], label="kind", keys=["predicted", "observed"])
    both.layers["counts"] = both.X
    sc.pp.normalize_total(both)
    sc.pp.log1p(both)
    sc.pp.pca(both)
    distance = pertpy.tl.Distance("edistance", obsm_key="X_pca")
    found = distance.pairwise(both, groupby="kind", show_progressbar=False)
    assert np.isfinite(found.to_numpy(float)).all()
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    same(predicted, ad.read_h5ad(tmp_path / "predicted.h5ad"))


def test_predicted_fold_changes_are_those_of_the_expected_rates(model, simulated, held_out):
    cells = model.predict_perturbation(simulated, held_out, context="context0")
    frame = sc.get.rank_genes_groups_df(cells, held_out).set_index("names")
    control = np.expm1(model.anchor.effects_.control["log1p_mean"]["context0"])
    expected = np.log2((cells.layers["expected"].mean(0) + 1e-9) / (control + 1e-9))
    found = frame.loc[cells.var_names, "logfoldchanges"]
    expressed = control > 1
    np.testing.assert_allclose(found[expressed], expected[expressed], atol=1e-3)


def test_posterior_predictive_sample_feeds_scvi_criticism(model):
    adata = model.adata.copy()
    adata.layers["raw"] = adata.layers["counts"].astype(int)  # scvi-tools compares sparse floats
    check = scvi.criticism.PosteriorPredictiveCheck(
        adata, {"gpjepa": model}, n_samples=2, count_layer_key="raw"
    )
    check.coefficient_of_variation("features")
    (metric,) = check.metrics.values()
    assert np.isfinite(metric["gpjepa"]).mean() > 0.9
    assert model.posterior_predictive_sample(indices=[0, 3]).shape == (2, 120)


def test_representations(model, simulated, rng):
    states = model.get_latent_representation(simulated)
    assert states.shape == (simulated.n_obs, 16)
    order = rng.permutation(simulated.n_obs)
    np.testing.assert_array_equal(
        model.get_latent_representation(simulated[order].copy()), states[order]
    )
    picked = model.get_latent_representation(simulated, indices=[3, 1])
    np.testing.assert_allclose(picked, states[[3, 1]], atol=1e-5)
    query = simulated[:20].copy()
    before = list(query.obs.columns)
    model.embed(query)
    assert query.obsm["X_gpjepa"].shape == (20, 16)
    assert list(query.obs.columns) == before
    actions = model.get_perturbation_representation()
    assert len(actions) == len(model.anchor.effects_.perturbations)


def test_unseen_labels_can_be_embedded_and_transferred(model, simulated):
    new = simulated[:30].copy()
    new.obs["perturbation"] = "NEVER+SEEN"
    new.obs["context"] = "elsewhere"
    new.obs["batch"] = "other"
    assert model.get_latent_representation(new).shape == (30, 16)
    manager = model.adata_manager.transfer_fields(new)
    values = manager.get_state_registry("perturbation")["values"]
    assert (("NEVER", "SEEN"), (1.0, 1.0)) in [tuple(v) for v in values]


def test_a_state_is_decoded_as_its_cell(model, simulated):
    """The scvi-tools interface of the module: state, counts, likelihood."""
    cells = model._query_cells(simulated)
    tensors = cells.tensors(np.arange(64))
    _, generated, loss = model.module(tensors)
    assert generated["px"].mu.shape == (64, 120)
    assert np.isfinite(loss.loss.item())
    counts = tensors["X"]
    baseline = counts.mean(0).expand(64, -1)
    own = np.corrcoef(generated["px"].mu.detach().ravel(), counts.ravel())[0, 1]
    assert own > 0.9 * np.corrcoef(baseline.ravel(), counts.ravel())[0, 1]
    # Tensors of scvi-tools' own loader are taken as well.
    loaded = next(iter(scvi.dataloaders.AnnDataLoader(model.adata_manager, batch_size=64)))
    inferred, _, loss = model.module(loaded)
    assert inferred["z"].shape == (64, 16)
    assert np.isfinite(loss.loss.item())


# Training


def test_history_and_hold_out(model):
    assert {"pretrain_loss", "pretrain_effective_rank", "train_loss", "holdout_error"} <= set(
        model.history
    )
    assert len(model.history["train_loss"]) == 3
    assert set(model.response_.judged.gates) == {"seen2", "seen1"}
    rows = list(model.anchor.effects_.rows)
    assert hold_out(rows).kind == "perturbations"


def test_history_has_the_means_over_the_cells_of_an_epoch(simulated, monkeypatch):
    steps, add = [], Plan.add

    def spy(self, losses, kind, n_cells):
        if kind == "pretrain":
            steps.append((losses["predict"].item(), n_cells))
        return add(self, losses, kind, n_cells)

    monkeypatch.setattr(Plan, "add", spy)
    small, large = simulated[:100].copy(), simulated[100:].copy()
    adata = gpjepa.datasets.join({"small": small, "large": large})
    GPJEPA.setup_anndata(
        adata, perturbation_key=None, dataset_key="dataset", library_size_key="library_size"
    )
    fitted = GPJEPA(adata, n_latent=8, n_hidden=16)
    fitted.pretrain(2, batch_size=300, enable_progress_bar=False)
    epochs = np.array(steps).reshape(2, -1, 2)
    assert set(epochs[0, :, 1]) == {98, 300}  # two are held out
    means = [np.average(epoch[:, 0], weights=epoch[:, 1]) for epoch in epochs]
    assert fitted.history["pretrain_predict"].to_numpy(float).ravel() == pytest.approx(means)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("n_cells", [8, 9, 12])
def test_small_screens_train(tiny, n_cells, steps):
    """Few perturbations of few cells: something is held out if it can be, and nothing crashes."""
    singles = [p for p in tiny.obs["perturbation"].cat.categories if "+" not in p]
    labels = ["control", *[p for p in singles if p != "control"][:4]]
    keep = np.concatenate([np.flatnonzero(tiny.obs["perturbation"] == p)[:n_cells] for p in labels])
    fitted = train_quickly(
        tiny[keep],
        train={"max_epochs": 1, "pretrain_epochs": steps, "batch_size": n_cells * 5 // 3},
    )
    assert fitted.predict_effects(labels[1])["effect"].notna().all()


@pytest.mark.parametrize("matching", ["energy", "mmd", "sliced_wasserstein", "ot"])
def test_every_matching_trains(tiny, matching):
    fitted = train_quickly(tiny, train={"max_epochs": 1, "matching": matching})
    assert np.isfinite(fitted.history["train_loss"].to_numpy(float)).all()


def test_perceiver_trains_and_predicts(tiny):
    fitted = train_quickly(tiny, model={"encoder": "perceiver"}, train={"max_epochs": 1})
    label = next(p for p in tiny.obs["perturbation"].cat.categories if "+" in p)
    assert fitted.predict_perturbation(tiny, label, gate=1).n_obs == 30


def test_pretraining_learns_to_predict_hidden_genes_without_labels(simulated):
    adata = simulated.copy()
    del adata.obs["perturbation"]
    scvi.settings.seed = 0
    GPJEPA.setup_anndata(adata, perturbation_key=None)
    fitted = GPJEPA(adata, n_latent=16, n_hidden=64)
    fitted.pretrain(15, enable_progress_bar=False)
    loss = fitted.history["pretrain_predict"].to_numpy(float).ravel()
    assert loss[-1] < 0.9 * loss[0]
    fitted.embed(adata)
    assert adata.obsm["X_gpjepa"].std() > 0.1
    with pytest.raises(ValueError, match="call pretrain"):
        fitted.train()
    with pytest.raises(NotFittedError, match="not trained on perturbations"):
        fitted.predict_effects("TF001")


def test_a_library_size_of_the_whole_cell_is_used(simulated):
    adata = simulated.copy()
    adata.obs["total"] = np.asarray(adata.X.sum(1)).ravel() * 4
    fitted = train_quickly(adata, library_size_key="total", train={"max_epochs": 1})
    control = np.expm1(fitted.anchor.effects_.control["log1p_mean"]["all"])
    assert control.sum() == pytest.approx(2_500, rel=0.05)


def test_the_gate_can_be_set_and_is_the_prior_without_evidence(model, simulated, held_out):
    with pytest.raises(ValueError, match="gate=0.5"):
        model.predict_effects(held_out, gate=0.5)
    few = simulated[simulated.obs["perturbation"].isin(["control", *held_out.split("+")])]
    fitted = train_quickly(few)
    assert fitted.response_.judged.errors.empty and "no estimate yet" in fitted.summary()
    cells = fitted.predict_perturbation(few, held_out)
    assert cells.uns["gpjepa"]["effects"]["gate"].tolist() == [0.5]


@pytest.mark.slow
def test_a_network_trained_on_the_screen_is_saved_with_the_model(tmp_path):
    """In two contexts, with pairs enough to train on."""
    adata = gpjepa.datasets.simulate(
        3_000, 60, n_targets=12, n_combinations=24, n_contexts=2, seed=3
    )
    fitted = train_quickly(adata, context_key="context", train={"max_epochs": 1})
    asked = [str(p) for p in fitted.anchor.effects_.perturbations if len(p.targets) == 1]
    asked = [f"{a}+{b}" for a, b in zip(asked, asked[1:], strict=False)]
    before = fitted.predict_effects(asked, gate=1)
    assert not np.allclose(before["effect"], before["anchor"])
    fitted.save(tmp_path / "model")
    again = GPJEPA.load(tmp_path / "model", adata=False)
    pd.testing.assert_frame_equal(again.predict_effects(asked, gate=1), before)
    pd.testing.assert_frame_equal(again.predict_effects(asked), fitted.predict_effects(asked))
    assert again.summary() == fitted.summary()


def test_without_a_response_network_the_anchor_predicts(simulated, held_out):
    fitted = train_quickly(simulated, train={"max_epochs": 1}, model={"response": None})
    found = fitted.predict_effects(held_out, gate=1)
    np.testing.assert_array_equal(found["effect"], found["anchor"])
    assert "network" not in fitted.summary().split("What to expect")[1]
    with pytest.raises(ValueError, match="response='large' is not known"):
        GPJEPA(fitted.adata, response="large")


def test_interrupted_training_leaves_a_model_that_predicts(tiny, tmp_path):
    adata = tiny.copy()
    GPJEPA.setup_anndata(adata)
    fitted = GPJEPA(adata, n_latent=8, n_hidden=16)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.warns(UserWarning, match="interrupted"):
        fitted.train(max_epochs=100_000, pretrain_epochs=100_000, enable_progress_bar=False)
    timer.join()
    label = next(p for p in tiny.obs["perturbation"].cat.categories if "+" in p)
    fitted.save(tmp_path / "model")
    again = GPJEPA.load(tmp_path / "model", adata=False)
    assert again.predict_perturbation(tiny, label).n_obs == 30


# Bad input, before any long work


def setup(adata, **kwargs):
    GPJEPA.setup_anndata(adata, **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.log1p, "looks normalised"),
        (lambda x: x - 3, "negative values"),
        (lambda x: np.where(x == 0, np.nan, x), "NaN or infinite"),
        (lambda x: np.where(x == 0, np.inf, x), "NaN or infinite"),
    ],
)
def test_values_that_are_not_counts(tiny, change, message):
    adata = tiny.copy()
    adata.layers["counts"] = change(adata.X.toarray())
    with pytest.raises(ValueError, match=message):
        setup(adata)


def test_one_odd_value_among_many_is_found(tiny):
    adata = tiny.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["counts"].data[-1] = 1.5
    with pytest.raises(ValueError, match="such as 1.5"):
        setup(adata)


def test_setup_errors(tiny):
    with pytest.raises(KeyError, match="layer='raw' is not in adata.layers"):
        setup(tiny.copy(), layer="raw")
    with pytest.raises(KeyError, match="'guide' is not a column"):
        setup(tiny.copy(), perturbation_key="guide")
    with pytest.raises(ValueError, match="No cell has the control label 'NT'"):
        setup(tiny.copy(), control="NT")
    with pytest.raises(ValueError, match="selection is empty"):
        setup(tiny[:0].copy())
    twice = tiny.copy()
    twice.var_names = ["SAME"] * 2 + list(tiny.var_names[2:])
    with pytest.raises(ValueError, match="var_names_make_unique"):
        setup(twice)


def test_a_context_without_control_cells(simulated):
    keep = ~(
        (simulated.obs["context"] == "context1") & (simulated.obs["perturbation"] == "control")
    )
    with pytest.raises(ValueError, match="No control cells in context 'context1'"):
        setup(simulated[keep].copy(), context_key="context")


def test_small_perturbations_are_listed(tiny):
    label = tiny.obs["perturbation"].cat.categories[1]
    keep = np.r_[
        np.flatnonzero(tiny.obs["perturbation"] != label),
        np.flatnonzero(tiny.obs["perturbation"] == label)[:4],
    ]
    with pytest.warns(UserWarning, match=rf"fewer than 10 cells.*{label} \(4\)"):
        setup(tiny[keep].copy())


def test_cells_without_counts_are_left_out_with_a_warning(tiny):
    adata = tiny.copy()
    adata.layers["counts"] = sp.csr_matrix(adata.X.multiply(np.arange(300)[:, None] > 3))
    with pytest.warns(UserWarning, match="4 of 300 cells have no counts and are left out"):
        setup(adata)
    fitted = GPJEPA(adata)
    assert len(fitted._training_cells()) == 296
    assert np.isfinite(States(fitted.module).encode(fitted._attached_cells())).all()
    adata.layers["counts"] = sp.csr_matrix(adata.shape)
    with pytest.raises(ValueError, match="None of the 300 cells has any counts"):
        setup(adata)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (1.0, "more counts than the library size in obs\\['total'\\]"),
        (np.inf, "300 cells have no positive, finite library size .* such as inf"),
        (0.0, "300 cells have no positive, finite library size"),
    ],
)
def test_library_sizes_that_make_no_sense(tiny, library, message):
    adata = tiny.copy()
    adata.obs["total"] = library
    with pytest.raises(ValueError, match=message):
        setup(adata, library_size_key="total")


def test_unknown_targets_contexts_and_options(model, simulated):
    with pytest.raises(UnknownTargetError, match=r"'TF00x' \(nearest: TF0"):
        model.predict_perturbation(simulated, "TF00x")
    with pytest.raises(ValueError, match="Unknown context 'liver'"):
        model.predict_effects("TF001", contexts="liver")
    with pytest.raises(ValueError, match="scale='log'"):
        model.predict_effects("TF001", scale="log")
    with pytest.raises(ValueError, match="No perturbation"):
        model.predict_effects([])
    with pytest.raises(ValueError, match="n_samples=0"):
        model.predict_perturbation(simulated, "TF001", n_samples=0)
    with pytest.raises(ValueError, match="matching='nearest'"):
        model.train(matching="nearest")


def test_queries_that_cannot_be_used(model, simulated, held_out):
    perturbed = simulated[simulated.obs["perturbation"] != "control"].copy()
    with pytest.raises(ValueError, match="no control cells; predictions start"):
        model.predict_perturbation(perturbed, held_out)
    with pytest.raises(ValueError, match="no cells: the selection is empty"):
        model.predict_perturbation(simulated[:0].copy(), held_out)
    unlabelled = simulated.copy()
    del unlabelled.obs["perturbation"]
    with pytest.raises(ValueError, match="marks control cells"):
        model.predict_perturbation(unlabelled, held_out)
    repeated = simulated[:10].copy()
    repeated.obs_names = ["x"] * 10
    with pytest.raises(ValueError, match="obs_names_make_unique"):
        model.get_latent_representation(repeated)
    here = simulated[simulated.obs["context"] == "context0"].copy()
    with pytest.raises(ValueError, match="no control cells of context"):
        model.predict_perturbation(here, held_out, context="context1")
    with pytest.raises(TypeError, match="Expected an AnnData"):
        model.get_latent_representation(simulated.X)


def test_missing_genes_are_hidden_and_counted(model, simulated, held_out, tmp_path):
    fewer = simulated[:, :100].copy()
    with pytest.warns(UserWarning, match="20 of the model's 120 genes"):
        cells = model.predict_perturbation(fewer, held_out)
    assert cells.n_vars == 120
    with pytest.warns(UserWarning, match="hidden"):
        hidden = model.get_latent_representation(fewer)
    zeros = simulated.copy()
    zeros.X = zeros.layers["counts"] = (
        zeros.layers["counts"] @ sp.diags((np.arange(120) < 100).astype(np.float32))
    ).tocsr()
    assert np.abs(hidden - model.get_latent_representation(zeros)).max() > 0.1
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="hidden"):
        attached = GPJEPA.load(tmp_path / "model", fewer)
    np.testing.assert_array_equal(attached.get_latent_representation(), hidden)
    with pytest.raises(ValueError, match="lacks 20 of the model's genes"):
        attached.train()
    with pytest.raises(ValueError, match="90 of the model's 120 genes are not in the data"):
        model.predict_perturbation(simulated[:, :30].copy(), held_out)
    other = simulated.copy()
    other.var_names = [f"ENSG{i}" for i in range(120)]
    with pytest.raises(ValueError, match="are both gene symbols"):
        model.predict_perturbation(other, held_out)


def test_model_directories_that_cannot_be_used(model, tmp_path):
    with pytest.raises(ValueError, match=r"no file model\.pt"):
        GPJEPA.load(tmp_path)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="already exists"):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True)
    whole = (tmp_path / "model" / "model.pt").read_bytes()
    (tmp_path / "model" / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or of another kind"):
        GPJEPA.load(tmp_path / "model")


def test_a_model_of_another_class_is_refused(tiny, tmp_path):
    adata = tiny.copy()
    scvi.model.SCVI.setup_anndata(adata)
    scvi.model.SCVI(adata).save(tmp_path / "scvi")
    with pytest.raises(ValueError, match="of class SCVI, not GPJEPA"):
        GPJEPA.load(tmp_path / "scvi")


# Real cells


@pytest.mark.slow
def test_norman_doubles_that_were_never_seen():
    adata = ad.read_h5ad(real_file("norman_2019_mini.h5ad"))
    held = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]
    result = gpjepa.benchmark.compare(
        adata,
        held,
        setup={"library_size_key": "library_size"},
        train={"enable_progress_bar": False},
    )
    error = result.table["relative_error"]
    assert error["GP-JEPA"] < error["additive"]
    assert error["GP-JEPA"] < error["mean"]
    assert set(result.scores["regime"]) == {"seen2"}


@pytest.mark.slow
def test_zhao_patient_that_was_never_treated():
    adata = ad.read_h5ad(real_file("zhao_2021_mini.h5ad"))
    result = gpjepa.benchmark.compare(
        adata,
        hold_out_context="PW030",
        setup={"context_key": "patient"},
        train={"enable_progress_bar": False},
    )
    assert result.table["relative_error"]["GP-JEPA"] < 1
    assert set(result.scores["regime"]) == {"new context"}


@pytest.mark.slow
def test_training_never_makes_the_matrix_dense():
    """50,000 × 5,000 cells: peak memory above the data's stays under half of it plus 300 MB."""
    script = """
import threading, time, os
import numpy as np, scipy.sparse as sp, anndata as ad, pandas as pd, warnings
warnings.filterwarnings("ignore")
import gpjepa, gpjepa.model, scanpy, pertpy, ot, sklearn.utils.extmath
rng = np.random.default_rng(0)
n, genes = 50_000, 5_000
parts = [sp.csr_matrix(rng.poisson(rng.gamma(0.3, 0.35, genes), (1000, genes)).astype(np.float32)) for _ in range(50)]
counts = sp.vstack(parts, format="csr"); del parts
labels = np.array(["control"] + [f"T{i}" for i in range(30)])
obs = pd.DataFrame({"perturbation": labels[rng.integers(0, 31, n)]}, index=[f"c{i}" for i in range(n)])
adata = ad.AnnData(counts, obs=obs)
size = counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
page = os.sysconf("SC_PAGESIZE")
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
# A tiny run first: what libraries allocate on first use belongs to the imports.
small = adata[:400].copy(); gpjepa.GPJEPA.setup_anndata(small)
gpjepa.GPJEPA(small).train(max_epochs=1, pretrain_epochs=1, enable_progress_bar=False); del small
gpjepa.GPJEPA.setup_anndata(adata)
before = peak = resident(); done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident()); time.sleep(0.02)
thread = threading.Thread(target=watch, daemon=True); thread.start()
model = gpjepa.GPJEPA(adata)
model.train(max_epochs=2, pretrain_epochs=1, enable_progress_bar=False)
done = True; thread.join()
print("RESULT", peak - before, size)
"""
    # Freed blocks go back at once: resident memory is then what is in use, not what glibc keeps.
    printed = python(script, MALLOC_MMAP_THRESHOLD_="1000000")
    line = next(x for x in printed.splitlines() if x.startswith("RESULT"))
    _, above, size = line.split()
    assert int(above) < 0.5 * int(size) + 300e6, f"{int(above) / 1e6:.0f} MB for {size} bytes"


def test_predicted_cells_vary_as_cells_do(model, simulated):
    """The simulator's inverse dispersion is 5; expressed genes show it."""
    counts = np.asarray(simulated.layers["counts"].mean(0)).ravel()
    theta = model.module.decoder.dispersion.detach().numpy()[counts > 1]
    assert 2.5 < np.median(theta) < 8
    control = simulated[(simulated.obs["perturbation"] == "control").to_numpy()]
    same = model.predict_perturbation(simulated, "control")

    def spread(x):
        rates = x.X.toarray() / np.asarray(x.X.sum(1))
        return np.log1p(1e4 * rates).var(0).sum()

    # After the three epochs of this model; a dispersion left at its start would double it.
    assert 0.67 < spread(same) / spread(control) < 1.5


def test_measured_effects_are_those_of_the_training_cells(model):
    measured = model.measured_effects()
    denoised = model.measured_effects(denoised=True, scale="log1p_mean")
    table, rows = model.response_.effects, (measured.obs["perturbation"] != "control").to_numpy()
    np.testing.assert_array_equal(measured.X[rows], table.effect["mean_log1p"])
    np.testing.assert_array_equal(denoised.layers["measured"][rows], table.effect["log1p_mean"])
    context, perturbation = table.rows[0]
    effects = model.predict_effects(str(perturbation), context, scale="log1p_mean", gate=0)
    np.testing.assert_allclose(effects["effect"], denoised.X[rows][0], atol=1e-5)


# Target features and interactions


@pytest.fixture(scope="module")
def featured(simulated):
    """One target never perturbed, known by the network that made the cells; the others as well."""
    network = simulated.uns["simulation"]["network"]
    values = np.hstack([network["response"], network["regulation"], network["regulation"].T])
    features = TargetFeatures(list(network["regulators"]), values, "network")
    labels = simulated.obs["perturbation"].astype(str)
    out = next(x for x in sorted(set(labels)) if x.startswith("TF") and "+" not in x)
    keep = ~labels.str.split("+").apply(lambda targets: out in targets).to_numpy()
    model = train_quickly(
        simulated[keep], context_key="context", model={"target_features": features}
    )
    return model, out


def test_targets_never_perturbed_are_predicted_from_features(featured, simulated, tmp_path):
    model, out = featured
    effects = model.predict_effects(out, "context0")
    assert set(effects["regime"]) == {"unseen"}
    explained = model.explain(out, "context0")
    assert explained.experts["expert"].str.contains("network|mean effect").all()
    with pytest.raises(UnknownTargetError, match="without any feature in network: GENE00001"):
        model.predict_perturbation(simulated, "GENE00001")
    model.save(tmp_path / "model")
    again = GPJEPA.load(tmp_path / "model", adata=False)
    pd.testing.assert_frame_equal(again.predict_effects(out, "context0"), effects)


def test_a_target_outside_the_panel_is_predicted_if_features_know_it(simulated):
    features = TargetFeatures(["ELSEWHERE", "TF001"], np.ones((2, 1)), "own")
    setup = {"target_features": features, "missing_features": "mean"}
    model = train_quickly(simulated, train={"max_epochs": 1}, model=setup)
    assert len(model.predict_effects(["ELSEWHERE", "GENE00001"])) == 2 * simulated.n_vars
    for gate in (0, 1):
        assert model.predict_perturbation(simulated, "ELSEWHERE", n_samples=5, gate=gate).n_obs == 5
    with pytest.raises(UnknownTargetError, match="NOWHERE"):
        model.predict_effects("NOWHERE")


def test_a_target_of_which_only_the_name_is_known_takes_the_shrunken_mean(simulated, tmp_path):
    model = train_quickly(simulated, train={"max_epochs": 1}, model={"targets": ["NAMED"]})
    effects = model.predict_effects("NAMED", gate=0)
    other = model.predict_effects("GENE00001", gate=0)
    np.testing.assert_array_equal(effects["effect"], other["effect"])
    assert model.predict_perturbation(simulated, "NAMED+TF001", n_samples=5, gate=1).n_obs == 5
    with pytest.raises(UnknownTargetError, match=r"'NAMEDD' \(nearest: NAMED"):
        model.predict_effects("NAMEDD")
    assert model.explain("NAMED").regime == "unseen"
    with pytest.raises(TypeError, match="give a list of names"):
        GPJEPA(model.adata, targets="NAMED")
    model.save(tmp_path / "model")
    again = GPJEPA.load(tmp_path / "model", adata=False)
    pd.testing.assert_frame_equal(again.predict_effects("NAMED", gate=0), effects)


def test_features_that_cover_no_training_target_are_told(simulated):
    features = TargetFeatures(["tf001", "tf002"], np.ones((2, 1)), "lower case")
    adata = simulated.copy()
    GPJEPA.setup_anndata(adata)
    fitted = GPJEPA(adata, n_latent=8, n_hidden=16, target_features=features)
    with pytest.warns(UserWarning, match="cover 0 of the 15 targets perturbed alone"):
        fitted.train(1, 1, enable_progress_bar=False)


@pytest.mark.parametrize("n", [2, 3])
def test_few_control_cells_train(simulated, n):
    """Too few to spare half of them for what is held out."""
    control = np.flatnonzero(simulated.obs["perturbation"] == "control")
    keep = np.ones(simulated.n_obs, bool)
    keep[control[n:]] = False
    fitted = train_quickly(simulated[keep], train={"max_epochs": 1})
    assert len(fitted.predict_effects("TF001", gate=1)) == simulated.n_vars


def test_explanations_take_labels_as_they_are_declared(model):
    label = str(model.anchor.effects_.perturbations[0])
    with pytest.raises(ValueError, match="Say in which context"):
        model.explain(label)
    with pytest.raises(ValueError, match="Unknown context 'nowhere'"):
        model.explain(label, "nowhere")
    with pytest.raises(UnknownTargetError, match="TF1"):
        model.explain("TF1", "context0")
    assert model.explain(label, "context0").regime == "seen"


@pytest.mark.parametrize("gate", [0, 1])
def test_interactions_are_what_is_not_additive(model, held_out, gate):
    found = model.predict_interactions(held_out, "context0", gate=gate)
    whole = model.predict_effects(held_out, "context0", gate=gate)["effect"].to_numpy()
    singles = [
        model.predict_effects(t, "context0", gate=gate)["effect"].to_numpy()
        for t in held_out.split("+")
    ]
    np.testing.assert_allclose(found["interaction"], whole - sum(singles), atol=1e-6)
    np.testing.assert_allclose(found["additive"], sum(singles), atol=1e-6)
    assert (found["lower"] < found["interaction"]).all()
    with pytest.raises(ValueError, match="fewer than 2 targets"):
        model.predict_interactions(held_out.split("+")[0])


def test_compare_refuses_targets_without_features_before_training(simulated, monkeypatch):
    monkeypatch.setattr(GPJEPA, "train", lambda self: pytest.fail("trained"))
    features = TargetFeatures(["TF999"], np.ones((1, 1)), "own")
    label = next(x for x in simulated.obs["perturbation"].cat.categories if "TF" in x)
    single = label.split("+")[0]
    with pytest.raises(UnknownTargetError, match=f"without any feature in own: {single}"):
        gpjepa.benchmark.compare(simulated, [single], model={"target_features": features})


def test_batches_and_replicates_reach_the_effects(simulated, tmp_path):
    """Within batches, with what guides differ by; cells to predict from need no guides."""
    adata = simulated.copy()
    rng = np.random.default_rng(0)
    adata.obs["guide"] = adata.obs["perturbation"].astype(str) + rng.choice(
        ["-1", "-2"], adata.n_obs
    )
    plain, model = (
        train_quickly(adata, context_key="context", batch_key="batch", replicate_key=key)
        for key in (None, "guide")
    )
    scale = "mean_log1p"
    assert model.anchor.effects_.strata.weights.shape[1] == 4  # two contexts × two batches
    np.testing.assert_allclose(
        model.anchor.effects_.effect[scale], plain.anchor.effects_.effect[scale], atol=1e-5
    )
    assert (
        model.anchor.effects_.variance[scale].mean() > plain.anchor.effects_.variance[scale].mean()
    )
    model.save(str(tmp_path / "model"))
    control = adata[adata.obs["perturbation"] == "control"].copy()
    del control.obs["guide"]
    loaded = gpjepa.GPJEPA.load(str(tmp_path / "model"), control)
    name = next(p for p in adata.obs["perturbation"].unique() if p != "control")
    assert loaded.predict_perturbation(control, name, n_samples=5).n_obs == 10
    found = loaded.predict_effects(name)
    assert (found["lower"] < found["upper"]).all()
