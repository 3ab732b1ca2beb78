"""Encoders that start elsewhere: several data sets, genes that some lack, alignment by name."""

import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from plain import assert_same_axes, half_of, plain_components

import gpjepa
from gpjepa import GPJEPA
from gpjepa.datasets import join
from gpjepa.model._batches import RandomBatches
from gpjepa.model._components import _information
from gpjepa.model._masks import masks
from gpjepa.model._moments import moments
from gpjepa.model._stage_a import Ablation
from gpjepa.nn import ENCODERS
from gpjepa.objectives import gene_blocks

QUIET = {"enable_progress_bar": False}


def unlabelled(adata, **options):
    GPJEPA.setup_anndata(adata, perturbation_key=None, **options)
    return adata


@pytest.fixture(scope="module")
def cells():
    adata = gpjepa.datasets.simulate(300, 50, n_targets=4, n_combinations=2, seed=5)
    return ad.AnnData(adata.layers["counts"].copy(), adata.obs.copy(), adata.var[[]].copy())


@pytest.fixture(scope="module")
def saved(cells, tmp_path_factory):
    """A model per encoder, trained without labels, and where it was saved."""
    found = {}
    for encoder in ENCODERS:
        scvi.settings.seed = 0
        model = GPJEPA(unlabelled(cells.copy()), n_latent=6, n_hidden=16, encoder=encoder)
        model.pretrain(2, batch_size=64, **QUIET)
        path = tmp_path_factory.mktemp("models") / encoder
        model.save(str(path))
        found[encoder] = model, path
    return found


def with_new_genes(cells, n=7):
    rng = np.random.default_rng(1)
    new = ad.AnnData(rng.poisson(2.0, (cells.n_obs, n)).astype(np.float32), cells.obs.copy())
    new.var_names = [f"NEW{i}" for i in range(n)]
    joined = ad.concat([cells, new], axis=1)
    joined.obs = cells.obs.copy()
    joined.obs["library_size"] = np.asarray(joined.X.sum(1)).ravel()
    return joined


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_genes_are_matched_by_name(cells, saved, encoder):
    model, path = saved[encoder]
    order = np.random.default_rng(0).permutation(cells.n_vars)
    other = GPJEPA(unlabelled(cells[:, order].copy()), pretrained=path)
    assert other.module.encoder.__class__ is model.module.encoder.__class__
    assert other.pretrained_ == {"path": str(path), "shared": 50, "new": [], "unused": 0}
    np.testing.assert_allclose(
        other.get_latent_representation(), model.get_latent_representation(), atol=2e-5
    )


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_new_genes_are_hidden_until_they_are_learned(cells, saved, encoder):
    _, path = saved[encoder]
    some = with_new_genes(cells[:, 10:].copy())
    with pytest.warns(UserWarning, match="knows 40 of the 47 genes here"):
        model = GPJEPA(unlabelled(some, library_size_key="library_size"), pretrained=path)
    assert model.pretrained_["shared"] == 40 and model.pretrained_["unused"] == 10
    assert model.pretrained_["new"] == [f"NEW{i}" for i in range(7)]
    changed = some.copy()
    changed.X = sp.csr_matrix(changed.X.toarray() * (np.arange(changed.n_vars) < 40))
    before = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(changed), before, atol=1e-5)
    model.pretrain(1, batch_size=64, **QUIET)
    after = model.get_latent_representation()
    assert not np.allclose(model.get_latent_representation(changed), after, atol=1e-3)


@pytest.mark.parametrize(("known", "again"), [(45, False), (3, True)])
def test_components_are_fitted_again_where_new_genes_say_more(cells, tmp_path, known, again):
    cells = cells.copy()
    cells.obs["library_size"] = np.asarray(cells.X.sum(1)).ravel()
    few = cells[:, :known].copy()
    source = GPJEPA(unlabelled(few, library_size_key="library_size"), n_latent=6, n_hidden=16)
    source.pretrain(3, batch_size=64, plan_kwargs={"lr": 1e-2}, **QUIET)
    source.save(str(tmp_path / "model"))
    theirs = source.module.encoder
    adata = unlabelled(cells, library_size_key="library_size")
    with pytest.warns(UserWarning, match=f"knows {known} of the 50 genes"):
        model = GPJEPA(adata, pretrained=tmp_path / "model")
    model.pretrain(0, **QUIET)  # nothing is learned, and so nothing is fitted
    assert not model.module.encoder.axes[known:].any()
    model.pretrain(1, plan_kwargs={"lr": 1e-12}, **QUIET)
    encoder = model.module.encoder
    assert encoder.axes[known:].any() == again
    if again:
        own = GPJEPA(adata, n_latent=6, encoder="components")
        own.pretrain(**QUIET)
        found, expected = (m.get_latent_representation() for m in (model, own))
        assert_same_axes(found, expected, 0.999)
    else:
        torch.testing.assert_close(encoder.axes[:known], theirs.axes)
        torch.testing.assert_close(encoder.residual.net[-1].weight, theirs.residual.net[-1].weight)


def test_information_does_not_depend_on_how_states_are_written(cells):
    model = GPJEPA(unlabelled(cells.copy()), n_latent=6, encoder="components")
    model.pretrain(**QUIET)
    read, encoder = model._training_cells(), model.module.encoder
    whole = _information(read, encoder)
    assert whole > 1
    axes, rng = encoder.axes.clone(), np.random.default_rng(0)
    encoder.axes.copy_(axes @ torch.from_numpy(rng.normal(size=(6, 6)).astype(np.float32)))
    assert abs(_information(read, encoder) - whole) < 0.01
    encoder.axes.copy_(axes)
    encoder.axes[:, 3:] = 0
    part = _information(read, encoder)
    assert 0 < part < whole
    share = np.asarray(read.counts.sum(0)).ravel() / read.counts.sum()
    noise = sp.csr_matrix(rng.poisson(read.library[:, None] * share).astype(np.float32))
    assert _information(replace(read, counts=noise), encoder) < 0.1


def test_a_model_that_started_elsewhere_needs_it_no_more(cells, saved, tmp_path):
    _, path = saved["mlp"]
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    model = GPJEPA(unlabelled(cells[:, 5:].copy()), pretrained=copy)
    model.save(str(tmp_path / "own"))
    shutil.rmtree(copy)
    again = GPJEPA.load(str(tmp_path / "own"), adata=unlabelled(cells[:, 5:].copy()))
    assert again.pretrained_ == model.pretrained_
    np.testing.assert_array_equal(
        again.get_latent_representation(), model.get_latent_representation()
    )


def test_training_on_perturbations_starts_from_a_pretrained_encoder(
    cells, saved, recwarn, monkeypatch
):
    source, path = saved["mlp"]
    labelled = cells.copy()
    GPJEPA.setup_anndata(labelled)
    scvi.settings.seed = 0
    model = GPJEPA(labelled, pretrained=path)
    model.train(1, **QUIET)
    assert "pretrain_loss" not in model.history
    assert not [w for w in recwarn if "in eval mode" in str(w.message)]
    for (name, mine), theirs in zip(
        model.module.encoder.named_parameters(), source.module.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name)
    name = next(p for p in labelled.obs["perturbation"].unique() if p != "control")
    assert model.predict_perturbation(None, str(name)).n_obs > 0
    # What is trained already is not put back to its start.
    monkeypatch.setattr(
        "gpjepa.model._gpjepa.standardise", lambda *args: pytest.fail("started again")
    )
    model.train(1, **QUIET)


def test_what_does_not_fit_is_told(cells, saved, tmp_path):
    _, path = saved["mlp"]
    adata = unlabelled(cells.copy())
    with pytest.raises(ValueError, match=r"encoder='perceiver' \(it has 'mlp'\)"):
        GPJEPA(adata, encoder="perceiver", pretrained=path)
    with pytest.raises(ValueError, match="not the directory of a saved model"):
        GPJEPA(adata, pretrained=tmp_path)
    strange = cells.copy()
    strange.var_names = [f"ENSG{i}" for i in range(strange.n_vars)]
    with pytest.raises(ValueError, match="None of the 50 genes"):
        GPJEPA(unlabelled(strange), pretrained=path)


@pytest.fixture(scope="module")
def two(cells):
    """Two data sets that share 30 genes; the first has ten of its own, the second 17."""
    first = cells[:180, :40].copy()
    second = with_new_genes(cells[180:, 10:].copy())
    del second.obs["library_size"]
    return {"first": first, "second": second}


def test_data_sets_are_joined_with_shared_genes_first(two, tmp_path):
    two["second"].write_h5ad(tmp_path / "second.h5ad")
    joined = join({"first": two["first"], "second": tmp_path / "second.h5ad"})
    assert list(joined.var_names[:30]) == list(two["first"].var_names[10:])
    measured = joined.varm["measured"]
    assert measured[:30].all().all() and measured["first"].sum() == 40
    assert list(joined.var_names[measured["second"].to_numpy()]) != []
    assert set(joined.var_names[measured["second"].to_numpy()]) == set(two["second"].var_names)
    for name, data in two.items():
        mine = joined[(joined.obs["dataset"] == name).to_numpy()]
        np.testing.assert_array_equal(mine[:, data.var_names].X.toarray(), data.X.toarray())
        np.testing.assert_array_equal(mine.obs["library_size"], np.asarray(data.X.sum(1)).ravel())


def test_data_sets_that_cannot_be_joined_are_told(two):
    with pytest.raises(ValueError, match="No data set"):
        join({})
    with pytest.raises(FileNotFoundError, match="'a': there is no file"):
        join({"a": "nowhere.h5ad"})
    with pytest.raises(KeyError, match="'first': layer='raw' is not in"):
        join(two, layer="raw")
    other = two["second"].copy()
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="shares no gene"):
        join({"first": two["first"], "second": other})
    half = two["second"].copy()
    half.X = half.X * 0.5
    with pytest.raises(ValueError, match="'second': X holds values that are not integers"):
        join({"first": two["first"], "second": half})


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_genes_that_a_data_set_did_not_measure_are_missing_and_not_zero(two, encoder):
    joined = join(two)
    unlabelled(joined, dataset_key="dataset", library_size_key="library_size")
    scvi.settings.seed = 0
    model = GPJEPA(joined, n_latent=6, n_hidden=16, encoder=encoder)
    model.pretrain(2, batch_size=32, **QUIET)
    states = model.get_latent_representation()
    first = (joined.obs["dataset"] == "first").to_numpy()
    changed = joined.copy()
    unmeasured = ~joined.varm["measured"]["first"].to_numpy()
    changed.X = sp.csr_matrix(changed.X.toarray() + np.outer(first, unmeasured).astype(np.float32))
    changed.obs["library_size"] = joined.obs["library_size"] + 100
    joined.obs["library_size"] += 100
    before, after = (model.get_latent_representation(x.copy()) for x in (joined, changed))
    np.testing.assert_allclose(after, before, atol=1e-5)
    # Cells of one of them, with its own genes only, are the same as among the others.
    alone = two["first"].copy()
    alone.obs["library_size"] = np.asarray(alone.X.sum(1)).ravel()
    with pytest.warns(UserWarning, match="hidden from the encoder"):
        np.testing.assert_allclose(model.get_latent_representation(alone), states[first], atol=1e-5)


def test_joined_data_sets_are_for_pretraining(two):
    joined = join(two)
    joined.obs["perturbation"] = joined.obs["perturbation"].astype(str)
    with pytest.raises(ValueError, match="needs library_size_key"):
        GPJEPA.setup_anndata(joined, dataset_key="dataset")
    keys = {"dataset_key": "dataset", "library_size_key": "library_size"}
    GPJEPA.setup_anndata(joined, **keys)
    model = GPJEPA(joined)
    with pytest.raises(ValueError, match="can be pretrained on, not trained on"):
        model.train(1, **QUIET)
    with pytest.raises(ValueError, match="cells of one data set"):
        model.pretrain(1, plan_kwargs={"ablation": {"set_size": 4}}, **QUIET)
    lone = join({"first": two["first"], "second": two["second"][:1].copy()})
    with pytest.raises(ValueError, match="the only one of its data set"):
        GPJEPA(unlabelled(lone, **keys)).pretrain(1, **QUIET)
    del joined.varm["measured"]
    with pytest.raises(ValueError, match=r"varm\['measured'\] does not say"):
        GPJEPA.setup_anndata(joined, **keys)


def test_names_of_data_sets_may_be_numbers(two):
    joined = join({2019: two["first"], 2021: two["second"]})
    assert set(joined.obs["dataset"]) == {"2019", "2021"}
    joined.varm["measured"].columns = [2019, 2021]
    unlabelled(joined, dataset_key="dataset", library_size_key="library_size")
    read = GPJEPA(joined)._training_cells()
    assert read.measured.sum(1).tolist() == [40, two["second"].n_vars]


def test_a_gene_that_one_data_set_did_not_measure_tells_no_perturbation():
    """Data sets hold different perturbations; what is missing in one would tell them apart."""
    rng, genes = np.random.default_rng(0), pd.DataFrame(index=[f"G{i}" for i in range(40)])
    noise = {
        name: ad.AnnData(
            sp.csr_matrix(rng.poisson(3.0, (150, n)).astype(np.float32)),
            pd.DataFrame(
                {"perturbation": np.resize(["control", label], 150)}, map(str, range(150))
            ),
            genes[:n],
        )
        for name, label, n in (("first", "A", 39), ("second", "B", 40))
    }
    joined = join(noise)
    GPJEPA.setup_anndata(joined, dataset_key="dataset", library_size_key="library_size")
    model = GPJEPA(joined)
    read = model._training_cells()
    weights = masks(Ablation(masks="adversarial"), read, model.genes, np.arange(len(read)))
    assert joined.var_names[-1] == "G39"
    assert weights["weights"][-1] < 3 * weights["weights"].mean()


def test_cells_without_a_gene_that_the_encoder_knows_have_no_state(cells, saved):
    _, path = saved["perceiver"]
    some = with_new_genes(cells[:, :1].copy())
    with pytest.warns(UserWarning, match="knows 1 of the 8 genes here"):
        model = GPJEPA(unlabelled(some, library_size_key="library_size"), pretrained=path)
    with (
        pytest.raises(ValueError, match="knows none of the 7 genes"),
        pytest.warns(UserWarning, match="hidden from the encoder"),
    ):
        model.get_latent_representation(some[:, 1:].copy())


def test_moments_are_over_the_cells_that_measured_a_gene(two):
    joined = join(two)
    unlabelled(joined, dataset_key="dataset", library_size_key="library_size")
    read = GPJEPA(joined)._training_cells()
    found = moments(read, np.arange(len(read)))
    values = np.sqrt(read.counts.toarray() / read.library[:, None] * 1e4)
    for name in two:
        own = (joined.varm["measured"].drop(columns=name).to_numpy() == 0).all(1)
        mine = values[(joined.obs["dataset"] == name).to_numpy()][:, own]
        np.testing.assert_allclose(found.root[own], mine.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.spread[own], mine.std(0), rtol=1e-4, atol=1e-6)
    both = joined.varm["measured"].all(axis=1).to_numpy()
    np.testing.assert_allclose(found.root[both], values[:, both].mean(0), rtol=1e-5)


def test_what_a_data_set_did_not_measure_is_no_component(two):
    """It is at its mean, and no difference between data sets."""
    joined = join(two)
    unlabelled(joined, dataset_key="dataset", library_size_key="library_size")
    model = GPJEPA(joined, n_latent=4, encoder="components")
    model.pretrain(**QUIET)
    seen = joined.varm["measured"][joined.obs["dataset"]].to_numpy().T
    read = model._training_cells()
    counts = np.where(seen, read.counts.toarray(), np.nan)
    expected = plain_components(counts, read.library, half_of(counts), 3)
    assert_same_axes(model.get_latent_representation(), expected, 0.9)  # other halves were drawn


def test_mini_batches_are_of_one_data_set():
    groups = [np.arange(100), np.arange(100, 130)]
    sampler = RandomBatches(groups, 20)
    batches = [batch for batch, _ in sampler]
    assert len(batches) == len(sampler) == 6
    assert all((b < 100).all() or (b >= 100).all() for b in batches)
    assert len(np.unique(np.concatenate(batches))) == 120


def test_only_genes_that_were_measured_are_hidden():
    among = torch.arange(40) < 20
    for _ in range(20):
        blocks = gene_blocks(40, 2, 0.5, among=among)
        assert int(blocks.any(0).sum()) == 10
        assert not (blocks & ~among).any()
    with pytest.raises(ValueError, match="hide 50% of the 1 genes"):
        gene_blocks(40, 2, 0.5, among=torch.arange(40) < 1)
