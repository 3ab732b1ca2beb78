import anndata as ad
import pandas as pd
import pytest
from helpers import python
from typer.testing import CliRunner

import gpjepa
from gpjepa import plotting
from gpjepa.cli import app

run = CliRunner().invoke


def test_importing_is_light():
    heavy = "torch", "scvi", "pertpy", "scanpy", "anndata"
    code = f"import gpjepa, gpjepa.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).strip() == "[]"
    assert "GPJEPA" in dir(gpjepa)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpjepa.nothing


def test_help_names_every_command():
    result = run(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "train", "predict", "simulate"):
        assert command in result.output


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    arguments = ["--n-cells", "400", "--n-genes", "40", "--n-targets", "4", "--n-combinations", "3"]
    result = run(app, ["simulate", "--out", str(path), *arguments])
    assert result.exit_code == 0, result.output
    return path


def label(cells):
    return next(p for p in ad.read_h5ad(cells).obs["perturbation"].cat.categories if "+" in p)


def test_train_then_predict(cells, tmp_path):
    model, out = tmp_path / "model", tmp_path / "predicted.h5ad"
    quick = ["--max-epochs", "1", "--pretrain-epochs", "1"]
    result = run(app, ["train", str(cells), "--out", str(model), *quick])
    assert result.exit_code == 0, result.output
    result = run(app, ["predict", str(model), label(cells), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert ad.read_h5ad(out).n_obs == 40
    again = run(app, ["predict", str(model), label(cells), "--out", str(out)])
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    unknown = run(app, ["predict", str(model), "NOPE", "--out", str(tmp_path / "x.h5ad")])
    assert unknown.exit_code == 1
    assert "Unknown target 'NOPE'" in unknown.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "predicted.h5ad"]


def test_target_that_exists_is_refused_before_training(cells, tmp_path):
    result = run(app, ["train", str(cells), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "already exists" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.h5ad", "--out", "m"], "does not exist"),
        (["train", "nothing", "--out", "m"], "neither a known data set nor a file"),
        (["predict", "nowhere", "A", "--out", "x.h5ad"], "not the directory of a saved model"),
        (["predict", "nowhere", "A", "--out", "x.csv"], "must end in .h5ad"),
        (["simulate", "--out", "x.h5ad", "--n-cells", "3"], "Cannot simulate"),
        (["demo", "nowhere.h5ad", "--out", "d"], "Say what to hold out"),
    ],
)
def test_errors_are_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(app, arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_comparison_scores_every_method_on_independent_controls(simulated, held_out):
    result = gpjepa.benchmark.compare(
        simulated, [held_out], setup={"context_key": "context"},
        train={"max_epochs": 1, "pretrain_epochs": 1, "enable_progress_bar": False},
    )  # fmt: skip
    assert list(result.table.index) == ["GP-JEPA", "additive", "mean", "no change", "replicate"]
    assert result.table.loc["no change", "relative_error"] == 1
    assert len(result.scores) == 5 * 2
    seen = set(result.model.adata.obs_names)
    controls = simulated.obs_names[simulated.obs["perturbation"] == "control"]
    assert 0.4 < len(seen & set(controls)) / len(controls) < 0.6
    assert held_out not in set(result.model.adata.obs["perturbation"])
    for figure in (
        plotting.method_errors(result.scores),
        plotting.effect_scatter(result),
        plotting.top_genes(result),
    ):
        assert figure.axes[0].get_title("left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hold_out": ["NOPE"]}, "no cell has that perturbation"),
        ({"hold_out_context": "nowhere"}, "No perturbed cells in context 'nowhere'"),
        ({}, "Say what to hold out"),
    ],
)
def test_hold_outs_that_do_not_occur(simulated, arguments, message):
    with pytest.raises(ValueError, match=message):
        gpjepa.benchmark.compare(simulated, **arguments, setup={"context_key": "context"})


@pytest.mark.slow
def test_demo_shows_the_model_ahead_of_the_baselines(tmp_path):
    out = tmp_path / "demo"
    result = run(app, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out / "table.csv").set_index("method")["relative_error"]
    assert table["GP-JEPA"] < min(table["additive"], table["mean"], table["no change"])
    for name in ("predicted.h5ad", "model", "scores.csv", "errors.png", "effects.png", "genes.png"):
        assert (out / name).exists()
    assert gpjepa.GPJEPA.load(out / "model", adata=False).is_trained
