import json
import re
import shlex

import anndata as ad
import pandas as pd
import pytest
import requests
import scanpy as sc
from helpers import python
from typer.testing import CliRunner

import gpjepa
from gpjepa import plotting
from gpjepa.cli import app
from gpjepa.cli._common import in_options

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
    for command in ("demo", "train", "predict", "simulate", "benchmark", "completion"):
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


def test_predict_writes_effects_and_takes_a_gate(cells, tmp_path):
    model = tmp_path / "model"
    quick = ["--max-epochs", "1", "--pretrain-epochs", "1", "--batch-size", "64"]
    arguments = ["--encoder", "components", "--accelerator", "cpu", "--quiet", *quick]
    result = run(app, ["train", str(cells), "--out", str(model), *arguments])
    assert result.exit_code == 0, result.output
    assert result.output == ""
    effects = tmp_path / "effects.csv"
    predict = ["predict", str(model), label(cells), "--effects", str(effects), "--gate", "0"]
    result = run(app, [*predict, "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["predicted"]
    assert row["regime"] == "seen"
    frame = pd.read_csv(effects)
    assert (frame["effect"] == frame["anchor"]).all()
    assert row["genes_changed"] == ((frame["lower"] > 0) | (frame["upper"] < 0)).sum()
    assert not list(tmp_path.glob("*.h5ad"))


def test_train_goes_on_from_checkpoints_and_predicts_to_a_store(cells, tmp_path):
    quick = ["--max-epochs", "1", "--pretrain-epochs", "1", "--quiet"]
    kept = ["--checkpoint-dir", str(tmp_path / "kept")]
    model, out = tmp_path / "model", tmp_path / "cells.zarr"
    assert run(app, ["train", str(cells), "--out", str(model), *quick, *kept]).exit_code == 0
    refused = run(app, ["train", str(cells), "--out", str(tmp_path / "n"), *quick, *kept])
    assert refused.exit_code == 1
    assert "holds checkpoints of another training" in refused.stderr
    again = run(app, ["train", str(cells), "--out", str(tmp_path / "n"), *quick, *kept, "--resume"])
    assert again.exit_code == 0, again.output
    found = []
    for n, more in (("20", []), ("5", ["--overwrite"])):
        options = [label(cells), "--out", str(out), "--n-samples", n, *more]
        result = run(app, ["predict", str(model), *options])
        assert result.exit_code == 0, result.output
        found.append(ad.read_zarr(out).n_obs)
    assert found == [20, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.zarr", "kept", "model", "n"]


def test_train_says_how_well_it_predicts_what_was_hidden(cells, tmp_path):
    model = tmp_path / "model"
    quick = ["--max-epochs", "1", "--pretrain-epochs", "1"]
    result = run(app, ["train", str(cells), "--out", str(model), *quick])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    loaded = gpjepa.GPJEPA.load(model, adata=False)
    assert lines[:4] == loaded.summary().splitlines()
    assert lines[0].startswith("Measured effects were hidden in turn")
    assert lines[4].startswith("Words: the anchor is")
    assert lines[5].startswith(f"Wrote {model}/. Next: gpjepa predict {model} ")
    noise = [line for line in result.stderr.splitlines() if line]
    assert [re.sub(r" \(.*", "", line) for line in noise] == [
        "Mean effects: hidden in turn",
        "Stage A: cell states",
        "Anchor: out of fold",
        "Stages B and C: populations",
    ]


def test_version():
    result = run(app, ["--version"])
    assert result.stdout.strip() == gpjepa.__version__


def test_options_of_labels_are_those_of_set_up(cells, tmp_path):
    adata = ad.read_h5ad(cells)
    text = adata.obs["perturbation"].astype(str)
    other = (
        text.str.replace("+", ";").replace("control", "nt_1").where(text.index > "cell000005", "x")
    )
    adata.obs["guide"] = other
    path = tmp_path / "other.h5ad"
    adata.write_h5ad(path)
    options = [
        "--perturbation-key",
        "guide",
        "--separator",
        ";",
        "--drop",
        "x",
        "--control-pattern",
        r"nt_\d+",
        "--max-epochs",
        "1",
        "--pretrain-epochs",
        "1",
    ]
    result = run(app, ["train", str(path), "--out", str(tmp_path / "m"), *options])
    assert result.exit_code == 0, result.output
    refused = run(app, ["train", str(path), "--out", str(tmp_path / "n"), *options[:2]])
    assert refused.exit_code == 1
    said = " ".join(refused.stderr.split())
    assert "add --separator ';' --control-pattern 'nt_\\d+'" in said
    assert "separator=" not in said
    assert "Ellipsis" not in said
    call = re.search(r"add (--.*?)\. ", said)[1]
    again = run(
        app,
        [
            "train",
            str(path),
            "--out",
            str(tmp_path / "n"),
            *options[:2],
            "--drop",
            "x",
            *shlex.split(call),
            "--max-epochs",
            "0",
            "--pretrain-epochs",
            "0",
        ],
    )
    assert again.exit_code == 0, again.output
    invalid = run(app, ["train", str(path), "--out", str(tmp_path / "o"), "--control-pattern", "("])
    assert "--control-pattern ( is not a regular expression" in invalid.stderr
    assert "_gpjepa" not in said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "call with library_size_key='n_counts', so that",
            "add --library-size-key n_counts, so that",
        ),
        ("Did you mean control=['a', 'b c']?", "Did you mean --control a --control 'b c'?"),
        ("give overwrite=True", "give --overwrite"),
        ("context_key='x' is not a column", "--context-key x is not a column"),
        ("with control=...", "with --control"),
        ("GPJEPA(adata, targets=[...])", "GPJEPA(adata, --targets)"),
        (
            "declare them with targets=['A', 'B C'].",
            "declare them with --targets A --targets 'B C'.",
        ),
        ("perturbation_key=None pretrains", "perturbation_key=None pretrains"),
        ("max_epochs=-1: expected", "--max-epochs -1: expected"),
        ("drop=['a', 'b[1]'].", "--drop a --drop 'b[1]'."),
        ("control=re.compile(r'NTC')", "--control-pattern 'NTC'"),
        ("rename={'a': 'b'}: expected", "rename={'a': 'b'}: expected"),
        ("read by dosage_key=. If", "read by --dosage-key. If"),
        ("--rename a=: expected", "--rename a=: expected"),
        ("n=3 cells", "n=3 cells"),
    ],
)
def test_errors_speak_of_options(message, said):
    assert in_options(ValueError(message)) == said


def test_a_failed_download_is_told_once(monkeypatch, tmp_path, request):
    def fail(url, *args, **kwargs):
        asked = requests.Request("GET", url)
        raise requests.exceptions.ConnectionError("no network", request=asked)

    monkeypatch.setattr("requests.head", fail)
    monkeypatch.setattr("requests.get", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    request.addfinalizer(
        lambda before=sc.settings.datasetdir: setattr(sc.settings, "datasetdir", before)
    )
    sc.settings.datasetdir = tmp_path
    for name in ("norman_2019", "norman_mini"):
        result = run(app, ["train", name, "--out", str(tmp_path / "m")])
        assert result.exit_code == 1
        assert result.output.count("could not be downloaded") == 1
        assert "attempt" not in result.output
        assert (
            len(result.stderr.strip().splitlines()) <= 2
        )  # where it is fetched from, and the error
        assert str(tmp_path) in result.stderr
        assert "https://" in result.stderr


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
        (["predict", "nowhere", "A", "--effects", "x.h5ad"], "must end in .csv"),
        (["predict", "nowhere", "A"], "Say what to write"),
        (
            ["predict", "m", "A", "--effects", "x.csv", "--n-samples", "3"],
            "are for predicted cells",
        ),
        (["train", "x.h5ad", "--out", "m", "--rename", "a"], "expected OLD=NEW"),
        (
            ["train", "x.h5ad", "--out", "m", "--pretrained", "p"],
            "p is not the directory of a saved",
        ),
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


def test_comparison_scores_every_method_on_independent_controls(simulated, held_out, tmp_path):
    result = gpjepa.benchmark.compare(
        simulated,
        [held_out],
        setup={"context_key": "context"},
        train={"max_epochs": 1, "pretrain_epochs": 1, "enable_progress_bar": False},
    )
    assert list(result.table.index) == ["GP-JEPA", "additive", "mean", "no change", "replicate"]
    assert result.table.loc["no change", "relative_error"] == 1
    assert len(result.scores) == 5 * 2
    for cells in (result.predicted, result.model.control_cells()):
        cells.write_h5ad(tmp_path / "cells.h5ad")  # as the demo does
    seen = set(result.model.adata.obs_names)
    controls = simulated.obs_names[simulated.obs["perturbation"] == "control"]
    assert 0.4 < len(seen & set(controls)) / len(controls) < 0.6
    assert held_out not in set(result.model.adata.obs["perturbation"])
    for figure in (
        plotting.method_errors(result.scores),
        plotting.effect_scatter(result.effects_of(0), title=result.title(0)),
        plotting.top_genes(result.effects_of(0), title=result.title(0)),
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
    cells = tmp_path / "cells.h5ad"
    label = ad.read_h5ad(out / "predicted.h5ad").obs["perturbation"].iloc[0]
    result = run(app, ["predict", str(out / "model"), label, "--out", str(cells)])
    assert result.exit_code == 0, result.output


# The benchmark


@pytest.fixture
def bench(tmp_path):
    """Writes a configuration with these methods, of which the last one is the focus."""
    from benchmarks import one_split

    def write(*methods, **more):
        config = one_split(
            methods=["mean", "replicate", *methods],
            focus=more.pop("focus", None),
            metrics=["squared_error"],
            **more,
        )
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps(config))
        return [str(path), "--out", str(tmp_path / "out")]

    return write


def test_a_benchmark_whose_focus_fails_ends_with_1(bench, tmp_path):
    broken = {"name": "benchmarks:FailsAlways", "label": "ours"}
    result = run(app, ["benchmark", *bench("anchor", broken, focus="ours")])
    assert result.exit_code == 1
    assert "ours failed on doubles-0: ArithmeticError: does not converge" in result.output
    assert (tmp_path / "out" / "report.html").exists()
    other = bench("anchor", broken, focus="anchor")
    assert run(app, ["benchmark", *other]).exit_code == 0
    assert run(app, ["benchmark", *other, "--strict"]).exit_code == 1


def test_a_benchmark_of_some_methods_and_seeds(bench):
    arguments = bench("anchor", "additive", "mean plus noise", focus="anchor")
    some = ["--methods", "mean plus noise", "--seeds", "2", "--json"]
    result = run(app, ["benchmark", *arguments, *some])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {r["method"] for r in said["table"]} == {"mean", "replicate", "mean plus noise"}
    assert said["status"] == {"run": 4}
    wrong = run(app, ["benchmark", *arguments, "--methods", "adtive"])
    assert wrong.exit_code == 1
    assert "['adtive'] are none of the methods, which are mean" in " ".join(wrong.stderr.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gene_sets": ["no.gmt"]}, "simulated: there is no file no.gmt"),
        ({"features": [{"regulons": "no.csv"}]}, "simulated: there is no file no.csv"),
        ({"features": [{"gene_sets": ["no.gmt"]}]}, "simulated: there is no file no.gmt"),
        (
            {"splits": [{"kind": "unseen-singles", "blocks": "no.gmt"}]},
            "simulated: there is no file no.gmt",
        ),
    ],
)
def test_check_finds_missing_files(bench, change, message):
    result = run(app, ["benchmark", *bench("anchor", data=change), "--check"])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("GP-JEPA", {"modle": {}}, "no options ['modle']; it has ['gates', 'model'"),
        (
            "GP-JEPA",
            {"train": {"max_epoch": 1}},
            "train() has no argument 'max_epoch': did you mean max_epochs=?",
        ),
        ("anchor", {"ridge": 1}, "no options ['ridge']; it has none"),
        ("kernel ridge", {"rigde": 1}, "no options ['rigde']; it has ['ridge']"),
        ("benchmarks:Stranger", {"depth": 1}, "no options ['depth']; it has none"),
    ],
)
def test_check_finds_misspelt_options(bench, name, options, message):
    result = run(app, ["benchmark", *bench({"name": name, "options": options}), "--check"])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_check_runs_nothing_and_says_what_will_not_run(bench, tmp_path):
    lost = {"name": "theirs", "script": str(tmp_path / "no.py")}
    result = run(app, ["benchmark", *bench("anchor", lost), "--check"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "simulated: 1 splits, 4 methods." in said
    assert "Will not run: theirs: there is no script" in said
    assert not (tmp_path / "out").exists()


def test_presets_are_named():
    result = run(app, ["benchmark", "--list-presets"])
    assert result.exit_code == 0
    assert "smoke: Smoke test" in result.output
    nothing = run(app, ["benchmark"])
    assert nothing.exit_code == 1
    assert "gpjepa benchmark smoke --out" in nothing.stderr
