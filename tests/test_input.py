"""What a newcomer gives that is not what was meant: refused with a sentence, or told."""

import re
import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import train_quickly

import gpjepa
from gpjepa import GPJEPA
from gpjepa.benchmark.methods._gpjepa import GPJEPAMethod
from gpjepa.perturbations import Perturbation


@pytest.fixture(scope="module")
def screen():
    """Four singles and two combinations, 40 cells each; counts in X alone."""
    adata = gpjepa.datasets.simulate(400, 30, n_targets=4, n_combinations=2, seed=3)
    del adata.layers["counts"]
    return adata


@pytest.fixture
def cells(screen):
    return screen.copy()


def relabelled(screen, rename=None, **columns):
    """The screen with targets A, B, ... and other labels."""
    adata = screen.copy()
    names = sorted({t for p in adata.obs["perturbation"] for t in p.split("+")} - {"control"})
    short = dict(zip(names, "ABCDEFGH", strict=False))
    text = ["+".join(short.get(t, t) for t in p.split("+")) for p in adata.obs["perturbation"]]
    adata.obs["perturbation"] = [(rename or {}).get(t, t) for t in text]
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def quick(adata, *, train=None, **setup):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_quickly(
            adata, train={"max_epochs": 1, "pretrain_epochs": 1} | (train or {}), **setup
        )


# Data that were changed after set-up


@pytest.mark.parametrize("call", ["predict", "train", "latent", "pretrain"])
@pytest.mark.parametrize("change", ["normalise", "add", "replace"])
def test_counts_that_were_changed_after_set_up_are_refused(screen, change, call):
    fitted = quick(screen)
    adata = fitted.adata
    label = next(p for p in adata.obs["perturbation"] if p != "control")
    if change == "normalise":
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    elif change == "add":
        adata.X.data[0] += 1
    else:
        adata.X = sp.csr_matrix(adata.shape)
    with pytest.raises(ValueError, match="X was changed after setup_anndata.*Normalise a copy"):
        {
            "predict": lambda: fitted.predict_perturbation(adata, label),
            "train": lambda: fitted.train(max_epochs=1),
            "pretrain": lambda: fitted.pretrain(1),
            "latent": lambda: fitted.get_latent_representation(),
        }[call]()


def test_counts_in_another_format_or_order_are_the_same_counts(screen):
    fitted = quick(screen)
    before = fitted.get_latent_representation()
    fitted.adata.X = sp.csr_matrix(fitted.adata.X.tocsc().astype(np.int64))
    np.testing.assert_array_equal(fitted.get_latent_representation(), before)


def test_a_layer_without_a_copy_is_told(screen, cells):
    cells.layers["counts"] = cells.X
    sc.pp.normalize_total(cells)
    with pytest.raises(ValueError, match=r"the layer was assigned without a copy.*X\.copy\(\)"):
        GPJEPA.setup_anndata(cells)
    cells = screen.copy()
    cells.layers["counts"] = cells.X
    GPJEPA.setup_anndata(cells)
    fitted = GPJEPA(cells)
    cells.layers["counts"].data *= 2
    with pytest.raises(ValueError, match=r"layers\['counts'\] was changed.*without a copy"):
        fitted.pretrain(1)


# Labels in and out


def test_names_with_the_separator_survive(screen):
    """Targets `NAD+` and `A+x` in training, prediction, explanation and comparison."""
    adata = relabelled(screen, {"A": "NAD+"})
    adata.obs["perturbation"] = [p.replace("A+", "NAD++") for p in adata.obs["perturbation"]]
    singles = adata[adata.obs["perturbation"].isin(["control", "NAD+", "B", "C", "D"])].copy()
    fitted = quick(singles)
    assert "NAD+" in fitted.vocabulary.perturbed
    cells = fitted.predict_perturbation(singles, "NAD+")
    assert set(cells.obs["perturbation"]) == {"NAD+"}
    assert fitted.predict_effects("NAD+")["regime"].unique().tolist() == ["seen"]
    assert fitted.explain("NAD+").perturbation == "NAD+"
    joined = relabelled(screen)
    joined.obs["perturbation"] = [
        p.replace("+", ";").replace("A", "A+x") for p in joined.obs["perturbation"]
    ]
    pair = next(p for p in joined.obs["perturbation"] if ";" in p)
    result = gpjepa.benchmark.compare(
        joined,
        [pair],
        setup={"separator": ";"},
        train={"max_epochs": 1, "pretrain_epochs": 1, "enable_progress_bar": False},
    )
    assert set(result.scores["regime"]) == {"seen2"}
    standard = gpjepa.benchmark.standard_cells(joined, separator=";")
    read = {Perturbation.parse(p) for p in standard.obs["perturbation"]}
    assert {t for p in read for t in p.targets} == {"A+x", "B", "C", "D"}


def test_results_use_the_labels_of_the_data(screen):
    adata = relabelled(screen)
    pair = next(p for p in adata.obs["perturbation"] if "+" in p)
    swapped = "+".join(reversed(pair.split("+")))
    adata.obs["guide"] = adata.obs["perturbation"].replace({pair: swapped, "control": "NT"})
    where = np.flatnonzero(adata.obs["guide"] == "NT")[:5]
    adata.obs.loc[adata.obs_names[where], "guide"] = "NT2"
    fitted = quick(adata, perturbation_key="guide", control=["NT", "NT2"])
    cells = fitted.predict_perturbation(adata, [pair, "NT"])
    assert set(cells.obs["perturbation"]) == {swapped, "NT", "NT2"}
    assert (cells.obs["guide"] == cells.obs["perturbation"]).all()
    own = cells[cells.obs["perturbation"] != swapped].obs
    measured = adata.obs.loc[own["control_cell"], "guide"].to_numpy()
    np.testing.assert_array_equal(own["perturbation"], measured)
    assert cells.uns["rank_genes_groups"]["params"]["reference"] == "NT"
    assert set(fitted.predict_effects(swapped)["perturbation"]) == {swapped}
    assert swapped in fitted.get_perturbation_representation().index
    assert set(fitted.explain(pair).sources["perturbation"]) <= set(adata.obs["guide"])
    new = next(
        f"{b}+{a}"
        for a in "ABCD"
        for b in "ABCD"
        if a < b and not {f"{a}+{b}", f"{b}+{a}"} & set(adata.obs["guide"])
    )
    assert set(fitted.predict_effects(new)["perturbation"]) == {new}  # as it was asked for


def test_dropped_cells_are_not_trained_on(screen):
    adata = relabelled(screen)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(object)
    adata.obs.iloc[:7, adata.obs.columns.get_loc("perturbation")] = "unassigned"
    adata.obs.iloc[7:9, adata.obs.columns.get_loc("perturbation")] = None
    fitted = quick(adata, drop=["unassigned", "nan"])
    assert len(fitted._training_cells()) == adata.n_obs - 9
    assert "unassigned" not in fitted.vocabulary.perturbed
    assert fitted.get_latent_representation().shape[0] == adata.n_obs
    assert fitted.control_cells().n_obs == (adata.obs["perturbation"] == "control").sum()
    pair = next(p for p in adata.obs["perturbation"] if isinstance(p, str) and "+" in p)
    assert fitted.predict_perturbation(adata, pair).n_obs == fitted.control_cells().n_obs


def test_single_precision_doses_are_known_doses(screen):
    adata = relabelled(screen)
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "control", np.nan, 0.1)
    adata.obs["dose"] = adata.obs["dose"].astype(np.float32)
    fitted = quick(adata, dosage_key="dose")
    frame = fitted.predict_effects("A@0.1")
    assert set(frame["regime"]) == {"seen"}
    assert set(frame["perturbation"]) == {"A@0.1"}


def test_doses_are_either_in_labels_or_in_a_column(screen):
    with pytest.raises(ValueError, match="give one of them"):
        GPJEPA.setup_anndata(
            relabelled(screen, dose=1.0), dosage_key="dose", dose_pattern=r"_(?P<dose>\d+)$"
        )


def test_batches_are_compared_by_value(screen):
    adata = relabelled(screen, batch=np.arange(400) % 2)
    fitted = quick(adata, batch_key="batch")
    floats = adata.copy()
    floats.obs["batch"] = floats.obs["batch"].astype(float)
    a, b = (fitted.predict_perturbation(x, "A") for x in (adata, floats))
    assert (a.X != b.X).nnz == 0
    floats.obs["batch"] = "new"
    with pytest.warns(UserWarning, match="batch 'new'.* not in the training data"):
        fitted.predict_perturbation(floats, "A")


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 0.9}, "train.. has no argument 'train_size'.*never cells at random"),
        ({"datasplitter_kwargs": {}}, "has no argument 'datasplitter_kwargs'"),
        ({"use_gpu": True}, "'use_gpu': accelerator='gpu'"),
        ({"early_stopping_monitor": "elbo"}, "early_stopping_patience="),
        ({"val_check_interval": 1}, "error on held-out perturbations"),
        ({"lr": 1e-3}, "plan_kwargs={'lr'"),
        ({"n_epochs": 3}, "max_epochs and pretrain_epochs"),
        ({"max_epoch": 3}, "did you mean max_epochs="),
        ({"anything": 3}, "has no argument 'anything'"),
    ],
)
def test_names_of_other_models_are_refused_by_name(screen, arguments, message):
    cells = screen.copy()
    GPJEPA.setup_anndata(cells)
    model = GPJEPA(cells)
    for method in (model.train, model.pretrain):
        with pytest.raises(TypeError, match=message.replace("train..", r"train\(\)")):
            method(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": -1},
        {"pretrain_epochs": 1.5},
        {"max_epochs": True},
        {"batch_size": 0},
        {"early_stopping_patience": 0},
    ],
)
def test_numbers_that_make_no_sense(cells, arguments):
    GPJEPA.setup_anndata(cells)
    ((name, _),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}=.*expected a whole number"):
        GPJEPA(cells).train(**arguments)


def test_patience_is_used(cells):
    def epochs(patience):
        fitted = quick(cells, train={"max_epochs": 12, "early_stopping_patience": patience})
        return len(fitted.history["train_loss"])

    assert epochs(1) < epochs(12) == 12


@pytest.mark.parametrize(
    ("setup", "error", "message"),
    [
        ({"labels_key": "perturbation"}, TypeError, "'labels_key': perturbation_key names"),
        ({"anything": 1}, TypeError, r"setup_anndata\(\) has no argument 'anything'"),
        ({"control": 0}, TypeError, "control=0 is not text"),
        ({"control": None}, TypeError, "control=None"),
        ({"control": 3}, TypeError, "control='3'"),
        ({"context_key": True}, TypeError, "context_key=True: expected the name of a column"),
        ({"batch_key": "nothing"}, KeyError, "batch_key='nothing' is not a column of obs"),
        ({"perturbation_key": "guide"}, KeyError, "perturbation_key='guide' is not a column"),
        ({"layer": "raw"}, KeyError, "layer='raw' is not in adata.layers"),
    ],
)
def test_set_up_that_cannot_be_read(cells, setup, error, message):
    with pytest.raises(error, match=message):
        GPJEPA.setup_anndata(cells, **setup)
    assert not [c for c in cells.obs if c.startswith("_")]


def test_columns_of_our_own_are_not_listed(cells):
    GPJEPA.setup_anndata(cells)
    with pytest.raises(KeyError) as caught:
        GPJEPA.setup_anndata(cells, context_key="line")
    assert "_gpjepa" not in str(caught.value)
    assert "_scvi" not in str(caught.value)


# Data that cannot be used


def nameless(cells):
    cells.var_names = pd.Index([np.nan, *cells.var_names[1:]])
    return cells


def repeated(cells):
    cells.obs_names = ["x"] * cells.n_obs
    return cells


def on_disk(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda a, t: on_disk(a, t), ValueError, "backed by .*to_memory"),
        (lambda a, t: mudata.MuData({"rna": a}), TypeError, r"MuData .*mdata\['rna'\]"),
        (lambda a, t: "cells.h5ad", TypeError, "got the path 'cells.h5ad'.*read_h5ad"),
        (lambda a, t: a.to_df(), TypeError, "Expected an AnnData, got DataFrame"),
        (lambda a, t: nameless(a), ValueError, "Genes without a name: 1"),
        (lambda a, t: repeated(a), ValueError, "Names of cells occur more than once"),
        (lambda a, t: a[:, :1].copy(), ValueError, "holds 1 gene; at least 2"),
        (lambda a, t: a[:0].copy(), ValueError, "holds no cells: the selection is empty"),
        (lambda a, t: a[:, :0].copy(), ValueError, "holds no genes: the selection is empty"),
        (
            lambda a, t: a[a.obs["perturbation"] == "control"].copy(),
            ValueError,
            "Every cell is a control cell.*perturbation_key=None",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_data_that_cannot_be_used_are_refused_at_set_up(cells, tmp_path, make, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        GPJEPA.setup_anndata(make(cells, tmp_path))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([["A", "B"]], TypeError, r"not \['A', 'B'\].*Perturbation.of"),
        (3, TypeError, "not 3"),
        ([None], TypeError, "not None"),
        ([], ValueError, "No perturbation was given"),
        ("", ValueError, "empty target"),
    ],
)
def test_perturbations_that_cannot_be_read(screen, asked, error, message):
    fitted = quick(relabelled(screen))
    with pytest.raises(error, match=message):
        fitted.predict_effects(asked)
    with pytest.raises(TypeError, match="context=True: expected the name"):
        fitted.predict_perturbation(None, "A", context=True)


@pytest.mark.parametrize("column", ["total_counts", "nCount_RNA", "n_counts", "library_size"])
def test_a_library_size_of_the_whole_cell_is_proposed(cells, column):
    total = np.asarray(cells.X.sum(1)).ravel()
    cells.obs[column] = total * 5
    with pytest.warns(UserWarning, match=f"call with library_size_key='{column}'"):
        GPJEPA.setup_anndata(cells)
    cells.obs[column] = total
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPJEPA.setup_anndata(cells)
    cells.obs[column] = total * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPJEPA.setup_anndata(cells, library_size_key=column)


# Data that were changed after set-up, in other ways


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("guide", lambda o: o["guide"].to_numpy()[::-1]),
        ("line", lambda o: o["line"].to_numpy()[::-1]),
        ("total", lambda o: o["total"] + 1),
        ("dose", lambda o: o["dose"] * 1000),
        ("guide", None),
        ("dose", None),
    ],
)
def test_columns_that_were_changed_after_set_up_are_refused(screen, column, change):
    adata = relabelled(screen, line=np.arange(400) // 2 % 2)
    adata.obs["guide"] = adata.obs["perturbation"]
    adata.obs["total"] = np.asarray(adata.X.sum(1)).ravel() * 2
    adata.obs["dose"] = 0.5
    fitted = quick(
        adata,
        perturbation_key="guide",
        context_key="line",
        library_size_key="total",
        dosage_key="dose",
    )
    fitted.adata.obs["line"] = fitted.adata.obs["line"].astype(float)  # the same values
    assert len(fitted._attached_cells()) == 400
    if change is None:
        del fitted.adata.obs[column]
    else:
        fitted.adata.obs[column] = change(fitted.adata.obs)
    with pytest.raises(ValueError, match=rf"obs\['{column}'\] was changed or removed"):
        fitted.predict_perturbation(None, "A@0.5")


def test_counts_that_were_dealt_out_to_other_cells_are_refused(screen):
    fitted = quick(screen)
    fitted.adata.X = fitted.adata.X[::-1].copy()
    with pytest.raises(ValueError, match="X was changed"):
        fitted.get_latent_representation()


@pytest.mark.parametrize("change", ["order", "names"])
def test_genes_that_were_changed_after_set_up_are_refused(screen, change):
    fitted = quick(screen)
    if change == "order":
        fitted.adata._inplace_subset_var(np.arange(30)[::-1])
    else:
        fitted.adata.var_names = [f"other{i}" for i in range(30)]
    with pytest.raises(ValueError, match="genes of the AnnData were changed"):
        fitted.get_latent_representation()


def test_set_up_that_fails_leaves_the_data_as_they_were(screen):
    adata = relabelled(screen)
    adata.obs["line"] = np.where(adata.obs["perturbation"] == "control", "x", "y")
    columns, uns = list(adata.obs), list(adata.uns)
    with pytest.raises(ValueError, match="No control cells in context 'y'"):
        GPJEPA.setup_anndata(adata, context_key="line")
    assert (list(adata.obs), list(adata.uns)) == (columns, uns)


@pytest.mark.parametrize("make", ["simulate", "prepare"])
def test_data_of_the_package_can_be_normalised(screen, make):
    adata = gpjepa.datasets.simulate(300, 30, n_targets=3, n_combinations=1)
    if make == "prepare":
        adata = gpjepa.datasets.prepare(adata, min_counts=1)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    GPJEPA.setup_anndata(adata)


# After loading with data


@pytest.mark.parametrize("attached", [True, False])
def test_a_loaded_model_keeps_spelling_and_names(screen, tmp_path, attached):
    adata = relabelled(screen, {"A": "NAD+"})
    adata = adata[~adata.obs["perturbation"].str.contains(r"A\+|\+A")].copy()
    pair = next((p for p in adata.obs["perturbation"] if re.fullmatch(r"\w\+\w", p)), None)
    if pair is not None:
        swapped = "+".join(reversed(pair.split("+")))
        adata.obs["perturbation"] = adata.obs["perturbation"].replace({pair: swapped})
    fitted = quick(adata)
    fitted.save(tmp_path / "model")
    again = GPJEPA.load(tmp_path / "model", adata.copy() if attached else False)
    again.save(tmp_path / "again")
    again = GPJEPA.load(tmp_path / "again", adata=False)
    for label in ["NAD+", *([swapped] if pair else [])]:
        assert set(again.predict_effects(label)["perturbation"]) == {label}
    named = again.predict_effects("NAD++B")
    assert set(named["perturbation"]) == {"NAD++B"}
    assert set(named["regime"]) == {"seen2"}
    assert again.vocabulary.perturbed == fitted.vocabulary.perturbed


def test_a_model_is_loaded_with_batches_and_labels_that_are_new(screen, tmp_path):
    adata = relabelled(screen, batch=np.arange(400) % 2)
    quick(adata, batch_key="batch").save(tmp_path / "model")
    other = adata.copy()
    other.obs["batch"] = other.obs["batch"] + 1
    other.obs["perturbation"] = other.obs["perturbation"].replace({"B": "C+D+E"})
    again = GPJEPA.load(tmp_path / "model", other)
    assert again.module.decoder.batch.num_embeddings == 3  # and one for all unknown ones
    assert "E" not in again.vocabulary.perturbed
    assert again.predict_perturbation(None, "B").n_obs == again.control_cells().n_obs
    with pytest.raises(gpjepa.perturbations.UnknownTargetError, match="'E'"):
        again.train(max_epochs=1)


def test_contexts_may_come_in_any_sequence(screen):
    fitted = quick(relabelled(screen))
    for contexts in (["all"], np.array(["all"]), pd.Index(["all"]), ("all",)):
        assert len(fitted.predict_effects("A", contexts)) == 30
    with pytest.raises(ValueError, match="n_samples=1.5"):
        fitted.predict_perturbation(None, "A", n_samples=1.5)


# In a comparison and in the benchmark

FAST = {"max_epochs": 1, "pretrain_epochs": 1, "enable_progress_bar": False}


def test_a_comparison_uses_the_labels_of_the_data_and_leaves_empty_cells_out(screen):
    adata = relabelled(screen, line=np.arange(400) % 2 / 1.0)
    adata.obs["perturbation"] = adata.obs["perturbation"].str.replace("+", ";")
    pair = next(p for p in adata.obs["perturbation"] if ";" in p)
    swapped = ";".join(reversed(pair.split(";")))
    adata.obs["perturbation"] = adata.obs["perturbation"].replace({pair: swapped})
    empty = np.flatnonzero(adata.obs["perturbation"] == swapped)[:10]
    lost = sp.lil_matrix(adata.X)
    lost[empty] = 0
    emptied = adata.copy()
    emptied.X = sp.csr_matrix(lost)
    setup = {"separator": ";", "context_key": "line"}
    with pytest.warns(UserWarning, match="10 of 400 cells have no counts and are left out"):
        result = gpjepa.benchmark.compare(emptied, [swapped], setup=setup, train=FAST)
    ours = "+".join(sorted(pair.split(";")))
    assert {p for _, p in result.rows} == {ours} == set(result.predicted.obs["perturbation"])
    assert {c for c, _ in result.rows} == {"0", "1"}
    assert set(result.scores["perturbation"]) == {ours}
    keep = np.ones(400, bool)
    keep[empty] = False
    other = gpjepa.benchmark.compare(adata[keep].copy(), [swapped], setup=setup, train=FAST)
    np.testing.assert_allclose(result.effects["measured"], other.effects["measured"])
    assert result.model.predict_effects(ours)["perturbation"].iloc[0] == ours


@pytest.mark.parametrize(
    ("hold_out", "error", "message"),
    [("A", TypeError, "is one label"), (["control"], ValueError, "Cannot hold out the control")],
)
def test_what_cannot_be_held_out(screen, hold_out, error, message):
    with pytest.raises(error, match=message):
        gpjepa.benchmark.compare(relabelled(screen), hold_out, train=FAST)


def test_the_benchmarks_model_gets_perturbations_not_labels(screen):
    """Declared names that look like something else, and names with the separator."""
    adata = relabelled(screen, {"A": "negative", "B": "A+x"})
    adata.obs["perturbation"] = [
        p if p == "A+x" else p.replace("+", ";").replace("A;", "negative;")
        for p in adata.obs["perturbation"]
    ]
    cells = gpjepa.benchmark.standard_cells(adata, separator=";", targets=["negative"])
    rows = [("all", Perturbation.parse(p)) for p in sorted(set(cells.obs["perturbation"]))]
    test = [row for row in rows if len(row[1].targets) > 1][:1]
    train = [row for row in rows if row not in test and not row[1].is_control]
    split = gpjepa.splits.Split("one", "own", tuple(train), tuple(test))
    method = GPJEPAMethod(
        gates=(0,), model={"n_latent": 4, "n_hidden": 8}, train={k: FAST[k] for k in FAST}
    )
    kept = cells[cells.obs["perturbation"] != str(test[0][1])].copy()
    method.fit(kept, split)
    assert {"negative", "A+x"} <= set(method.model_.vocabulary.perturbed)
    control = cells[cells.obs["perturbation"] == "control"].copy()
    (found,) = method.predict([str(test[0][1])], control).values()
    assert set(found.obs["perturbation"]) == {str(test[0][1])}
    assert list(found.uns["effect"].index) == [str(test[0][1])]
