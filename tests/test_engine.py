"""How training runs and where results go: order, hold-outs, checkpoints, files, devices."""

import os
import shutil
import signal
import subprocess
import sys

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from helpers import train_quickly
from sklearn.exceptions import NotFittedError

import gpjepa
from gpjepa import GPJEPA
from gpjepa.effects import CellSums, EffectAnchor, effect_table
from gpjepa.model._populations import actions
from gpjepa.model._states import States
from gpjepa.model._training import ActionTraining
from gpjepa.model._training_cells import TrainingCells

QUIET = {"enable_progress_bar": False}


@pytest.fixture(scope="module")
def small():
    """Three singles and their combinations in one context."""
    return gpjepa.datasets.simulate(600, 40, n_targets=4, n_combinations=3, seed=2)


def untrained(adata, seed=0, **setup):
    scvi.settings.seed = seed
    adata = adata.copy()
    GPJEPA.setup_anndata(adata, **setup)
    return GPJEPA(adata, n_latent=8, n_hidden=16)


# What is held out, and what is judged


def test_a_context_with_few_controls_is_judged_too(simulated):
    control = (simulated.obs["perturbation"] == "control").to_numpy()
    there = (simulated.obs["context"] == "context1").to_numpy()
    few = np.flatnonzero(control & there)[3:]
    adata = simulated[np.setdiff1d(np.arange(simulated.n_obs), few)]
    fitted = train_quickly(adata, context_key="context", train={"max_epochs": 1})
    judged = fitted.response_.judged
    assert judged.gates["seen2"].n_units >= 5
    assert np.isfinite(judged.errors.drop(columns="regime").to_numpy()).all()


def test_a_context_is_held_out_where_perturbations_are_few():
    screen = gpjepa.datasets.simulate(
        1_200, 40, n_targets=6, n_combinations=0, n_contexts=3, seed=1
    )
    fitted = train_quickly(screen, context_key="context", train={"max_epochs": 1})
    data = TrainingCells(fitted._training_cells(), fitted.genes)
    assert data.holdout.kind == "contexts"
    assert set(fitted.response_.judged.errors["regime"]) == {"new context", "unseen"}
    # Perturbed cells of the context are out, and half of its controls.
    there, control = np.array(data.cells.contexts) == data.holdout.units[0], data.cells.is_control
    assert data.out[there & ~control].all()
    assert data.out[there & control].mean() == pytest.approx(0.5, abs=0.01)
    assert not data.out[~there].any()


def test_the_epoch_that_is_kept_is_the_best_one(simulated):
    fitted = train_quickly(simulated, train={"max_epochs": 6, "plan_kwargs": {"lr": 0.02}})
    data = TrainingCells(fitted._training_cells(), fitted.genes)
    stage = ActionTraining(fitted.module, data, (), fitted.vocabulary)
    anchor = EffectAnchor((), "mean").fit(stage.inside)
    watch = stage.watch(anchor, States(fitted.module).encode(data.cells))
    wrong, base = watch.squares(range(len(watch.measured.rows)))
    errors = fitted.history["holdout_error"].to_numpy(float).ravel()
    assert errors.argmin() < len(errors) - 1  # or the test could not fail
    assert wrong / base == pytest.approx(errors.min(), rel=1e-4)


def test_few_controls_of_held_out_cells_are_not_what_is_trained_on():
    """Where a tenth of the cells is held out, and none of the controls among it."""
    screen = gpjepa.datasets.simulate(200, 30, n_targets=3, n_combinations=0, seed=1)
    control = np.flatnonzero(screen.obs["perturbation"] == "control")
    fitted = train_quickly(
        screen[np.setdiff1d(np.arange(200), control[9:])], train={"max_epochs": 1}
    )
    data = TrainingCells(fitted._training_cells(), fitted.genes)
    stage = ActionTraining(fitted.module, data, (), fitted.vocabulary)
    assert data.holdout.kind == "cells"
    assert stage.outside is stage.inside


# Order and repetition


@pytest.mark.slow
def test_training_does_not_depend_on_the_order_of_cells(simulated, rng):
    order = rng.permutation(simulated.n_obs)
    one, other = (
        train_quickly(cells, context_key="context", batch_key="batch")
        for cells in (simulated, simulated[order])
    )
    for name in ("pretrain_loss", "train_loss", "holdout_error"):
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=1e-4)
    label = one.anchor.effects_.perturbations[0]
    for again in (False, True):
        if again:  # and once more, on what was learned
            for m in (one, other):
                scvi.settings.seed = 1
                m.train(2, 1, **QUIET)
        a, b = (m.predict_effects(label, gate=1)["effect"] for m in (one, other))
        np.testing.assert_allclose(a, b, atol=2e-4)


class _Stop(pl.Callback):
    """Interrupts, or fails, after an epoch."""

    def __init__(self, error=None):
        self.error = error

    def on_train_epoch_end(self, trainer, plan):
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_training_that_fails_leaves_the_model_as_it_was(small):
    fitted = train_quickly(small)
    label = fitted.anchor.effects_.perturbations[0]
    before, gates = fitted.predict_effects(label, gate=1), fitted.response_
    with pytest.raises(ZeroDivisionError):
        fitted.train(5, 1, callbacks=[_Stop(ZeroDivisionError())], **QUIET)
    assert fitted.response_ is gates
    pd.testing.assert_frame_equal(fitted.predict_effects(label, gate=1), before)


def test_a_second_training_that_is_interrupted_predicts_the_same_mean_effects(simulated):
    fitted = train_quickly(simulated)
    first, label = fitted.response_, fitted.anchor.effects_.perturbations[0]
    before = fitted.predict_effects(label, gate=1)
    with pytest.warns(UserWarning, match="interrupted"):
        fitted.train(50, callbacks=[_Stop()], **QUIET)
    assert fitted.response_ is not first
    assert fitted.response_.judged.gates == first.judged.gates
    pd.testing.assert_frame_equal(fitted.predict_effects(label, gate=1), before)
    assert len(fitted.history["train_loss"]) == 1


def test_checkpoints_know_training_in_other_orders(small, tmp_path, rng):
    """Of cells, and of sets in options, which differ between processes."""
    sets = {"A": set(small.var_names[:9]), "B": set(small.var_names[9:15])}
    kwargs = {"ablation": {"masks": "gene_sets", "gene_sets": sets}}
    first = untrained(small)
    first.train(1, 1, pretrain_kwargs=kwargs, checkpoint_dir=tmp_path, **QUIET)
    (tmp_path / ".actions").mkdir()  # somebody else's
    (tmp_path / ".action.ckpt-1234").mkdir()  # what a killed process left
    again = untrained(small[rng.permutation(small.n_obs)], seed=4)
    again.train(1, 1, pretrain_kwargs=kwargs, checkpoint_dir=tmp_path, resume=True, **QUIET)
    np.testing.assert_array_equal(again.history["train_loss"], first.history["train_loss"])
    assert (tmp_path / ".actions").exists()
    assert not (tmp_path / ".action.ckpt-1234").exists()


def test_training_that_goes_on_after_it_could_have_stopped(small, tmp_path):
    options = {"max_epochs": 9, "pretrain_epochs": 1, "early_stopping_patience": 1, **QUIET}
    whole = untrained(small)
    whole.train(**options, min_epochs=6)
    n = len(whole.history["train_loss"])
    assert n >= 6

    class Fail(pl.Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 5:
                raise ZeroDivisionError

    kept = untrained(small)
    with pytest.raises(ZeroDivisionError):
        kept.train(**options, min_epochs=6, checkpoint_dir=tmp_path, callbacks=[Fail()])
    kept.train(**options, min_epochs=6, checkpoint_dir=tmp_path, resume=True)
    np.testing.assert_allclose(kept.history["train_loss"], whole.history["train_loss"], rtol=1e-5)


def test_callbacks_are_those_of_stages_b_and_c(small):
    seen = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer, plan):
            seen.append(type(plan).__name__)

    fitted = untrained(small)
    fitted.train(1, 1, callbacks=[Spy()], **QUIET)
    assert seen == ["ActionPlan"]
    fitted.pretrain(1, callbacks=[Spy()], **QUIET)
    assert seen == ["ActionPlan", "PretrainPlan"]


def test_a_model_that_starts_from_another_is_not_trained(small, tmp_path, recwarn):
    source = untrained(small)
    source.pretrain(1, **QUIET)
    source.save(tmp_path / "source")
    adata = small.copy()
    GPJEPA.setup_anndata(adata)
    started = GPJEPA(adata, pretrained=tmp_path / "source")
    assert started.is_pretrained_
    assert not started.is_trained_
    started.embed(adata)
    assert not [w for w in recwarn if "untrained" in str(w.message)]


def test_history_has_curves_of_what_is_not_trained_on(model, simulated):
    curves = model.history
    assert len(curves["pretrain_validation_loss"]) == len(curves["pretrain_loss"]) == 2
    assert len(curves["holdout_error"]) == len(curves["train_loss"]) == 3
    figure = model.plot_history()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Stage A: loss",
        "Stage A: effective rank of states",
        "Stages B and C: loss",
        "Stages B and C: error ÷ no change",
    ]
    with pytest.raises(ValueError, match="no curve that is known"):
        gpjepa.plotting.history({"magic": pd.DataFrame()})


def test_held_out_rows_may_be_judged_now_and_then(small):
    fitted = untrained(small)
    fitted.train(4, 1, check_val_every_n_epoch=2, **QUIET)
    assert list(fitted.history["holdout_error"].index) == [1, 3]
    assert list(fitted.history["train_loss"].index) == [0, 1, 2, 3]


def test_train_takes_what_autotune_gives_it(small, tmp_path):
    """As scvi.autotune calls it, and where it looks for the metric."""
    found = []

    class Report(pl.Callback):
        def on_train_end(self, trainer, plan):
            found.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    fitted = untrained(small)
    fitted.train(
        accelerator="auto",
        devices="auto",
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        logger=pl.loggers.CSVLogger(tmp_path),
        callbacks=[Report()],
        max_epochs=2,
        pretrain_epochs=1,
    )
    last = fitted.history["holdout_error"].iloc[-1].item()
    assert found[0]["holdout_error"] == pytest.approx(last)


# Checkpoints

_KILLED = """
import os, signal, sys, warnings
import lightning.pytorch as pl, scvi, gpjepa
warnings.simplefilter("ignore")
class Kill(pl.Callback):
    def on_train_epoch_start(self, trainer, plan):
        if type(plan).__name__ == sys.argv[2] and trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
adata = gpjepa.datasets.simulate(600, 40, n_targets=4, n_combinations=3, seed=2)
scvi.settings.seed = 0
gpjepa.GPJEPA.setup_anndata(adata)
model = gpjepa.GPJEPA(adata, n_latent=8, n_hidden=16)
if sys.argv[2] == "PretrainPlan":
    model.pretrain(4, checkpoint_dir=sys.argv[1], enable_progress_bar=False, callbacks=[Kill()])
model.train(6, 4, checkpoint_dir=sys.argv[1], enable_progress_bar=False, callbacks=[Kill()])
"""


@pytest.mark.parametrize("stage", ["PretrainPlan", "ActionPlan"])
def test_training_goes_on_after_it_was_killed(small, tmp_path, stage):
    kept = tmp_path / "kept"
    run = subprocess.run([sys.executable, "-c", _KILLED, str(kept), stage], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-2_000:]
    assert not [f for f in kept.iterdir() if f.name.startswith(".")]
    found = {}
    for name, options in (
        ("killed", {"checkpoint_dir": kept, "resume": True}),
        ("whole", {"checkpoint_dir": tmp_path / "whole"}),
        ("without", {}),
    ):
        fitted = untrained(small, seed=0 if name != "killed" else 7)
        if stage == "PretrainPlan":
            fitted.pretrain(4, **options, **QUIET)
        else:
            fitted.train(6, 4, **options, **QUIET)
        found[name] = fitted
    for name in ("killed", "without"):
        for key, curve in found["whole"].history.items():
            np.testing.assert_allclose(found[name].history[key], curve, rtol=1e-5, err_msg=key)
    if stage == "ActionPlan":
        assert len(found["killed"].history["train_loss"]) == 6
        label = found["whole"].anchor.effects_.perturbations[0]
        a, b = (found[n].predict_effects(label, gate=1)["effect"] for n in ("killed", "whole"))
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_training_goes_on_after_it_was_interrupted(simulated, tmp_path):
    """In mid-epoch, in the same session and in another; with early stopping and gates."""
    options = {"max_epochs": 9, "early_stopping_patience": 3, **QUIET}
    whole = untrained(simulated, context_key="context")
    whole.train(**options)
    n = len(whole.history["train_loss"])
    assert 3 < n < 9

    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            if type(plan).__name__ == "ActionPlan" and (trainer.current_epoch, batch_idx) == (2, 9):
                os.kill(os.getpid(), signal.SIGINT)

    stopped = untrained(simulated, context_key="context")
    with pytest.warns(UserWarning, match="interrupted"):
        stopped.train(**options, checkpoint_dir=tmp_path, callbacks=[Interrupt()])
    elsewhere = untrained(simulated, seed=5, context_key="context")
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy")
    for fitted, kept in ((stopped, tmp_path), (elsewhere, copy)):
        fitted.train(**options, checkpoint_dir=kept, resume=True)
        for key, curve in whole.history.items():
            np.testing.assert_allclose(fitted.history[key], curve, rtol=1e-4, err_msg=key)
        judged, expected = fitted.response_.judged, whole.response_.judged
        assert judged.gates == expected.gates
        pd.testing.assert_frame_equal(judged.errors, expected.errors)
        assert not (kept / "action.ckpt").exists()  # the last epoch says that it is the last
    again = untrained(simulated, seed=6, context_key="context")
    again.train(**options, checkpoint_dir=tmp_path, resume=True)
    assert len(again.history["train_loss"]) == n


def test_checkpoints_of_another_training_are_refused(small, tmp_path):
    fitted = untrained(small)
    fitted.train(1, 1, checkpoint_dir=tmp_path, **QUIET)
    assert {f.name for f in tmp_path.iterdir()} == {
        "start.pt",
        "pretrain-finished.ckpt",
        "action-finished.ckpt",
    }
    with pytest.raises(ValueError, match="resume=True needs checkpoint_dir"):
        untrained(small).train(1, 1, resume=True, **QUIET)
    with pytest.raises(ValueError, match="holds checkpoints of another training"):
        untrained(small).train(1, 1, checkpoint_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="of another training .*epochs of stage A: 1 there, 2"):
        untrained(small).train(1, 2, checkpoint_dir=tmp_path, resume=True, **QUIET)
    other = small[:-1]
    with pytest.raises(ValueError, match="cells: 600 there, 599 here"):
        untrained(other).train(1, 1, checkpoint_dir=tmp_path, resume=True, **QUIET)
    with pytest.raises(ValueError, match="n_hidden: 16.* there, .*n_hidden: 32"):
        adata = small.copy()
        GPJEPA.setup_anndata(adata)
        larger = GPJEPA(adata, n_latent=8, n_hidden=32)
        larger.train(1, 1, checkpoint_dir=tmp_path, resume=True, **QUIET)
    with pytest.raises(ValueError, match="gradient_clip_val"):
        options = {"gradient_clip_val": 0.1, **QUIET}
        untrained(small).train(1, 1, checkpoint_dir=tmp_path, resume=True, **options)
    with pytest.raises(ValueError, match="target_features"):
        adata = small.copy()
        GPJEPA.setup_anndata(adata)
        table = pd.DataFrame({"x": [1.0, 2.0]}, ["TF000", "TF001"])
        features = gpjepa.perturbations.TargetFeatures.from_table(table)
        featured = GPJEPA(adata, n_latent=8, n_hidden=16, target_features=features)
        featured.train(1, 1, checkpoint_dir=tmp_path, resume=True, **QUIET)
    with pytest.raises(ValueError, match="method: 'train' there, 'pretrain' here"):
        untrained(small).pretrain(1, checkpoint_dir=tmp_path, resume=True, **QUIET)
    again = untrained(small, seed=3)
    again.train(1, 1, checkpoint_dir=tmp_path, resume=True, **QUIET)  # nothing is left to do
    np.testing.assert_array_equal(again.history["train_loss"], fitted.history["train_loss"])
    (tmp_path / "start.pt").unlink()
    with pytest.raises(ValueError, match=r"has lost start\.pt"):
        untrained(small).train(1, 1, checkpoint_dir=tmp_path, resume=True, **QUIET)


# Cells on disk


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_cells_on_disk_are_those_in_memory(model, simulated, held_out, tmp_path, suffix):
    asked = [held_out, "TF000"]
    expected = model.predict_perturbation(simulated, asked)
    path = tmp_path / f"cells{suffix}"
    backed = model.predict_perturbation(simulated, asked, out=path, layers=["expected"])
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    assert list(backed.obs_names) == list(expected.obs_names)
    assert backed.raw is None
    assert (backed[5:9].to_memory().X != expected[5:9].X).nnz == 0
    backed.file.close()
    found = ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path)
    assert (found.X != expected.X).nnz == 0
    np.testing.assert_array_equal(found.layers["expected"], expected.layers["expected"])
    assert "expected_sd" not in found.layers
    np.testing.assert_array_equal(found.obsm["X_gpjepa"], expected.obsm["X_gpjepa"])
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_categorical=False)
    assert set(found.uns["rank_genes_groups"]) == set(expected.uns["rank_genes_groups"])
    np.testing.assert_allclose(found.varm["expected"], expected.varm["expected"])
    with pytest.raises(FileExistsError, match="already exists"):
        model.predict_perturbation(simulated, asked, out=path)


def test_expected_values_are_kept_per_perturbation(model, simulated, held_out, monkeypatch):
    cells = model.predict_perturbation(simulated, [held_out, "TF000"])
    said = cells.uns["gpjepa"]["effects"]
    assert len(said) == 4 == cells.varm["expected"].shape[1]
    for i, (label, context) in enumerate(said[["perturbation", "context"]].to_numpy()):
        mine = (cells.obs["perturbation"] == label) & (cells.obs["context"] == context)
        part = cells[mine.to_numpy()]
        mean = part.layers["expected"].mean(0)
        np.testing.assert_allclose(cells.varm["expected"][:, i], mean, rtol=1e-3, atol=1e-4)
        sd = part.layers["expected_sd"].mean(0)
        np.testing.assert_allclose(cells.varm["expected_sd"][:, i], sd, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("gpjepa.model._gpjepa._MANY", 1)
    with pytest.warns(UserWarning, match="varm has both per perturbation"):
        few = model.predict_perturbation(simulated, held_out)
    assert not few.layers
    assert set(few.varm) == {"expected", "expected_sd"}
    with pytest.raises(ValueError, match="expected a list of some of"):
        model.predict_perturbation(simulated, held_out, layers=["counts"])
    with pytest.raises(ValueError, match="must end in"):
        model.predict_perturbation(simulated, held_out, out="cells.csv")


@pytest.mark.parametrize("gate", [0, 1])
def test_cells_made_in_parts_are_those_made_at_once(model, simulated, held_out, monkeypatch, gate):
    expected = model.predict_perturbation(simulated, held_out, gate=gate)
    monkeypatch.setattr("gpjepa.model._generation._AT_A_TIME", 10 * simulated.n_vars)
    found = model.predict_perturbation(simulated, held_out, gate=gate)
    assert (found.X != expected.X).nnz == 0
    np.testing.assert_allclose(found.layers["expected"], expected.layers["expected"], rtol=1e-5)


def test_a_file_that_fails_leaves_nothing(model, simulated, held_out, tmp_path, monkeypatch):
    def fails(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("gpjepa.model._random.gamma_poisson", fails)
    with pytest.raises(ZeroDivisionError):
        model.predict_perturbation(simulated, held_out, out=tmp_path / "cells.h5ad")
    assert not list(tmp_path.iterdir())


def test_normalized_expression_is_decoded(model, simulated):
    some = [5, 3, 8]
    found = model.get_normalized_expression(simulated, some, library_size=1e4)
    assert list(found.index) == list(simulated.obs_names[some])
    assert list(found.columns) == list(model.genes)
    np.testing.assert_allclose(found.sum(1), 1e4, rtol=1e-4)
    genes = [model.genes[7], model.genes[2]]
    own = model.get_normalized_expression(
        simulated, some, gene_list=genes, library_size="latent", batch_size=1, return_numpy=True
    )
    library = np.asarray(simulated.layers["counts"][some].sum(1)).ravel()
    np.testing.assert_allclose(own, found[genes] * library[:, None] / 1e4, rtol=1e-4)
    with pytest.raises(ValueError, match="does not know"):
        model.get_normalized_expression(simulated, gene_list=["MAGIC"])
    with pytest.raises(TypeError, match="is one name"):
        model.get_normalized_expression(simulated, gene_list="MAGIC")
    with pytest.raises(ValueError, match="library_size='large'"):
        model.get_normalized_expression(simulated, library_size="large")


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_batch_sizes_that_are_none(model, simulated, size):
    for method in (
        model.get_latent_representation,
        model.get_normalized_expression,
        model.posterior_predictive_sample,
    ):
        with pytest.raises(ValueError, match="batch_size="):
            method(simulated, batch_size=size)


def test_states_that_change_take_with_them_what_was_learned_of_perturbations(small):
    fitted = train_quickly(small)
    fitted.pretrain(1, **QUIET)
    fitted.embed(fitted.adata)
    for method in (fitted.predict_effects, fitted.get_normalized_expression):
        with pytest.raises(NotFittedError, match="call train"):
            method("TF000") if method == fitted.predict_effects else method()
    assert "train_loss" not in fitted.history


# Devices


def test_several_devices_are_refused(small):
    for devices in (2, -1, [0, 1]):
        with pytest.raises(ValueError, match="one device"):
            untrained(small).train(1, 1, devices=devices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu(simulated):
    """States, decoded effects and losses of the same weights; random numbers differ in training."""
    fitted = train_quickly(simulated, train={"accelerator": "cpu"})
    label = fitted.anchor.effects_.perturbations[0]
    states, effects = fitted.get_latent_representation(), fitted.predict_effects(label, gate=1)
    fitted.to_device("cuda:0")
    np.testing.assert_allclose(fitted.get_latent_representation(), states, atol=1e-4)
    found = fitted.predict_effects(label, gate=1)
    np.testing.assert_allclose(found["effect"], effects["effect"], atol=1e-4)
    assert actions(fitted.module, fitted.vocabulary, [label]).device.type == "cuda"
    # Losses that no random numbers are in, of one mini-batch.
    cells = fitted._training_cells()
    batch = cells.tensors(np.arange(64)) | {"latent": torch.from_numpy(states[:64])}
    shift = torch.ones(1, 16)
    found = {}
    for device in ("cpu", "cuda"):
        module = fitted.module.to(device)
        given = (
            {k: v.to(device) for k, v in batch.items()},
            actions(module, fitted.vocabulary, [label]),
            shift.to(device),
        )
        weights = {"vicreg": 0.0, "nb": 0.0, "kl": 1.0}
        losses = module.action_loss(*given, matching="prototype", weights=weights)
        found[device] = {k: float(losses[k]) for k in ("predict", "kl")}
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)
    on_gpu = train_quickly(simulated, train={"accelerator": "gpu"})
    assert on_gpu.module.anchor_map.device.type == "cuda"


# Sums that add up


def test_sums_of_two_sides_are_those_of_all_cells(cells, rng):
    counts, library = cells.X, cells.obs["library_size"].to_numpy()
    perturbations = [gpjepa.perturbations.Perturbation.parse(p) for p in cells.obs["perturbation"]]
    contexts = list(cells.obs["context"].astype(str))
    out = rng.random(cells.n_obs) < 0.4
    sides = [
        CellSums(cells.var_names).add(counts, library, perturbations, contexts, keep)
        for keep in (out, ~out)
    ]
    found = sides[0].plus(sides[1]).table()
    expected = effect_table(counts, library, perturbations, contexts, cells.var_names)
    assert found.rows == expected.rows
    for scale in expected.scales:
        np.testing.assert_allclose(found.effect[scale], expected.effect[scale], atol=1e-6)
        np.testing.assert_allclose(found.variance[scale], expected.variance[scale], rtol=1e-5)
        for context, draws in expected.draws[scale].items():
            np.testing.assert_allclose(found.draws[scale][context], draws, atol=1e-6)
    assert sorted(found.cells) == sorted(expected.cells)
    one = sides[0].table([contexts[0]])
    assert one.contexts == [contexts[0]]
