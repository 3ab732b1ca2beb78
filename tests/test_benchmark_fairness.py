"""Ways in which a benchmark flatters its authors, or punishes others; each was found once."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from benchmarks import QUICK, TINY, Stranger, Unchanged, fitted, one_split, scores
from helpers import real_file

from gpjepa import benchmark, datasets, splits
from gpjepa.benchmark import METHODS, METRICS, Task, calibrated, standard_cells
from gpjepa.benchmark._statistics import with_size
from gpjepa.benchmark.methods import (
    Isolated,
    mean_prediction,
    method_source,
    oracle,
    predict_rows,
)
from gpjepa.benchmark.methods._sources import package_source
from gpjepa.benchmark.metrics import cell_eval_config
from gpjepa.benchmark.report._page import contents
from gpjepa.benchmark.report._tables import controls
from gpjepa.benchmark.report._text import number
from gpjepa.benchmark.tasks import measured_rows
from gpjepa.perturbations import TargetFeatures

OF_CELLS = [n for n, m in METRICS.items() if m.axis in ("cells", "embedding")]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return benchmark.run(TINY, tmp_path_factory.mktemp("fair"), progress=False)


# Cells have the effect that their method states


def realised(task, predicted):
    """Mean of the predicted cells of each row, and the stated mean, both floored at 0."""
    means = [
        np.asarray(predicted.cells.log1p[predicted.cells.row == i].mean(0)).ravel()
        for i in range(len(task.rows))
    ]
    return np.stack(means), np.maximum(task.control_profiles + predicted.effect, 0)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("GP-JEPA", "linear")])
def test_cells_of_every_mean_effect_method_have_its_effect(task, name):
    rng = np.random.default_rng(0)
    names = sorted({t for _, p in (*task.split.train, *task.split.test) for t in p.targets})
    features = [TargetFeatures(names, rng.normal(size=(len(names), 5)))]
    predicted = fitted(name, task, features)
    means, stated = realised(task, predicted)
    # Exact up to a single molecule of one cell.
    base = task.controls
    molecule = np.log1p(1e4 / base.library.min()) / len(base.library)
    np.testing.assert_allclose(means, stated, atol=1.1 * molecule)
    counts = predicted.cells.counts
    assert (counts.data == np.rint(counts.data)).all()
    assert counts.min() >= 0


def test_cells_of_the_linear_model_have_its_effect(cells):
    """It predicts single targets that are measured genes."""
    task = Task.of(cells, splits.unseen_singles(measured_rows(cells), folds=3)[0])
    means, stated = realised(task, fitted("linear", task))
    molecule = np.log1p(1e4 / task.controls.library.min()) / len(task.controls.library)
    np.testing.assert_allclose(means, stated, atol=1.1 * molecule)


def test_counts_of_others_have_the_effect_that_these_state(task):
    class States(Unchanged):
        def predict(self, perturbations, control):
            found = super().predict(perturbations, control)
            effect = np.full((len(perturbations), control.n_vars), 0.1)
            found.uns["effect"] = pd.DataFrame(effect, perturbations, control.var_names)
            return found

    method = States()
    method.fit(task.train, task.split)
    (predicted,) = predict_rows(method, task, "x").values()
    means, stated = realised(task, predicted)
    molecule = np.log1p(1e4 / task.controls.library.min()) / len(task.controls.library)
    np.testing.assert_allclose(means, stated, atol=1.1 * molecule)
    np.testing.assert_allclose(stated - np.maximum(task.control_profiles, 0), 0.1)


def test_cells_of_gp_jepa_have_the_effect_that_it_states(task):
    predicted = fitted("GP-JEPA", task, **QUICK)
    means, stated = realised(task, predicted)
    library = predicted.cells.library
    n = min((predicted.cells.row == i).sum() for i in range(len(task.rows)))
    np.testing.assert_allclose(means, stated, atol=1.1 * np.log1p(1e4 / library.min()) / n)


def test_cells_of_real_patients_have_the_stated_effect():
    """Ratios of expm1 of means are no ratios of rates: they gave 1.2 to 1.5 times the effect."""
    found = standard_cells(
        datasets.load(str(real_file("zhao_2021_mini.h5ad"))), context_key="patient"
    )
    for split in splits.leave_one_context_out(measured_rows(found))[:2]:
        task = Task.of(found, split)
        predicted = fitted("anchor", task)
        means, stated = realised(task, predicted)
        change = stated - task.control_profiles
        slope = (change * (means - task.control_profiles)).sum() / (change**2).sum()
        assert slope == pytest.approx(1, abs=1e-3)


def test_calibration_thins_and_adds_and_leaves_the_rest_alone(task):
    base = task.controls
    profile = np.asarray(base.log1p.mean(0), float).ravel()
    wanted = profile.copy()
    wanted[:3] = profile[:3] * [0.5, 0, 1.2]
    wanted[3] = np.log1p(2_000)  # more counts than single molecules can be drawn for
    wanted[4] = -1
    wanted[5] = 12  # more than a cell has
    moved = calibrated(base, wanted)
    after = np.asarray(moved.log1p.mean(0)).ravel()
    np.testing.assert_allclose(after[:4], wanted[:4], atol=0.02)
    assert after[1] == after[4] == 0
    assert after[5] == pytest.approx(np.log1p(1e4), abs=0.02)
    assert (moved.counts[:, 6:] != base.counts[:, 6:]).nnz == 0
    assert (moved.counts[:, 0] > base.counts[:, 0]).nnz == 0
    assert (moved.counts[:, 2] < base.counts[:, 2]).nnz == 0
    assert calibrated(base, profile) is base
    again = calibrated(base, wanted)
    assert (again.counts != moved.counts).nnz == 0


# What a method does not predict


def test_a_split_on_which_a_method_fails_is_scored_as_the_mean_response(tmp_path):
    methods = ["mean", "replicate", "no change", {"name": "benchmarks:Fails", "label": "fails"}]
    found = benchmark.run({**TINY, "methods": methods, "focus": "fails"}, tmp_path, progress=False)
    runs = found.runs[found.runs["method"] == "fails"].set_index("split")["status"]
    assert list(runs) == ["run", "run", "failed"]
    assert "does not converge" in found.runs["reason"].iloc[-1]
    lost = found.scores[found.scores["split"] == runs.index[-1]].set_index("method")
    assert lost.loc["fails", "refused"].all()
    np.testing.assert_allclose(
        lost.loc["fails", "squared_error"], lost.loc["mean", "squared_error"], rtol=1e-6
    )
    table = found.table(metrics=["squared_error"])
    rows = table[table["kind"] == "unseen-singles"].set_index("method")["n_rows"]
    assert rows.nunique() == 1, "methods are averaged over different rows"
    as_mean = table.set_index(["kind", "method"])["n_as_mean"]
    assert as_mean["unseen-singles", "fails"] == len(lost.loc["fails"]) / 2
    assert as_mean["doubles", "fails"] == 0
    assert len(found.failed()) == len(found.failed(focus_only=True)) == 1
    text = (tmp_path / "report.md").read_text()
    assert "| failed |" in text and "rows as mean" in text


def test_a_method_that_always_fails_is_the_mean_response(tmp_path):
    methods = ["mean", "replicate", {"name": "benchmarks:FailsAlways", "label": "never"}]
    found = benchmark.run(one_split(methods=methods, focus="never"), tmp_path, progress=False)
    assert list(found.runs["status"]) == ["run", "run", "failed"]
    errors = found.scores.groupby("method")["squared_error"].mean()
    assert errors["never"] == pytest.approx(errors["mean"])
    text = (tmp_path / "report.md").read_text()
    assert "never failed on 1 runs and is scored there as the mean response" in text


def test_a_method_that_cannot_give_its_states_has_failed(tmp_path):
    methods = ["mean", "replicate", {"name": "benchmarks:LosesItsStates", "label": "lost"}]
    found = benchmark.run(one_split(methods=methods, focus=None), tmp_path, progress=False)
    assert list(found.runs["status"]) == ["run", "run", "failed"]
    assert found.runs["reason"].iloc[-1] == "ArithmeticError: no states"


def test_contexts_and_perturbations_may_look_like_numbers(tmp_path):
    """Read back as numbers, rows of a failed split would not be those of the others."""
    adata = datasets.simulate(1_500, 40, n_targets=6, n_combinations=1, n_contexts=2)
    adata.obs["context"] = adata.obs["context"].str.removeprefix("context")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    data = {
        "name": "7",
        "source": str(tmp_path / "cells.h5ad"),
        "context_key": "context",
        "splits": [{"kind": "held-out-context"}],
    }
    methods = ["mean", "replicate", {"name": "benchmarks:FailsInOne", "label": "64"}]
    config = {
        **TINY,
        "data": [data],
        "methods": methods,
        "focus": "64",
        "metrics": ["squared_error"],
    }
    found = benchmark.run(config, tmp_path / "out", progress=False)
    assert set(found.scores["context"]) == {"0", "1"}
    table = found.table(metrics=["squared_error"]).set_index("method")
    assert table["n_rows"].nunique() == 1
    (verdict,) = found.verdicts().itertuples()
    assert verdict.n_rows == table.loc["64", "n_rows"]
    again = benchmark.BenchmarkResult.read(tmp_path / "out")
    pd.testing.assert_frame_equal(again.table(), found.table())
    assert again.config.focus == "64"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.uns["effect"].iloc[1:], "effect: names repeat, or some are missing"),
        (lambda a: a.uns["effect"].iloc[:, 1:], "effect: names repeat, or some are missing"),
        (lambda a: a.uns["effect"] * np.nan, "effect holds values that are not finite"),
        (lambda a: a.uns["effect"].to_numpy(), "is a ndarray; give a frame"),
    ],
)
def test_nobody_hides_rows_by_stating_nothing_of_them(task, spoil, message):
    class Hides(Stranger):
        def predict(self, perturbations, control):
            found = super().predict(perturbations, control)
            found.uns["effect"] = found.to_df() * 0
            found.uns["effect"] = spoil(found)
            return found

    method = Hides()
    method.fit(task.train, task.split)
    with pytest.raises(ValueError, match=message):
        predict_rows(method, task, "hides")


def test_values_of_another_scale_are_refused(task):
    class Rates(Stranger):
        def predict(self, perturbations, control):
            found = super().predict(perturbations, control)
            found.X = np.expm1(found.X)
            return found

    method = Rates()
    method.fit(task.train, task.split)
    with pytest.raises(ValueError, match="at most 9.21: its values are on another scale"):
        predict_rows(method, task, "rates")


# Cells as they are predicted


def test_cells_on_the_log1p_scale_are_scored_as_they_are(task):
    replicate = oracle("replicate", task, 0).cells

    class Measured(Stranger):
        def predict(self, perturbations, control):
            at = {str(p): i for i, (_, p) in enumerate(task.rows)}
            which = np.concatenate([np.flatnonzero(replicate.row == at[p]) for p in perturbations])
            labels = [str(task.rows[r][1]) for r in replicate.row[which]]
            obs = pd.DataFrame({"perturbation": labels}, index=which.astype(str))
            values = replicate.log1p[which]
            return ad.AnnData(values, obs, control.var[[]], uns={"scale": "log1p"})

    method = Measured()
    method.fit(task.train, task.split)
    (found,) = predict_rows(method, task, "x").values()
    assert found.cells.counts is None
    ours, theirs = (scores(task, p) for p in (found, oracle("replicate", task, 0)))
    for name in ("variance_log_ratio", "gene_correlation_error", "energy_distance_unbiased"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
    counted = [n for n, m in METRICS.items() if "counts" in m.needs]
    assert len(counted) > 5
    assert ours[counted].isna().all(None)
    assert theirs["pds_cosine"].notna().all()


def test_targeted_genes_count_in_no_metric(task):
    """Neither in effects nor in cells, predicted or measured."""
    base = replace(fitted("additive", task), embed=lambda c: np.sqrt(c.X.toarray()))
    effect, counts = base.effect.copy(), base.cells.counts.toarray()
    effect[~task.scored] += 3
    for row in range(len(task.rows)):
        mine = np.flatnonzero(base.cells.row == row)
        counts[np.ix_(mine, np.flatnonzero(~task.scored[row]))] += 7
    cheat = replace(
        base,
        effect=effect,
        drawn=replace(base.cells, counts=sp.csr_matrix(counts)),
        known_states={},
    )
    names = [n for n in METRICS if METRICS[n].masked]
    assert set(OF_CELLS) <= set(names)
    pd.testing.assert_frame_equal(
        scores(task, base, metrics=names), scores(task, cheat, metrics=names)
    )


def test_predicted_counts_are_of_whole_cells_not_of_the_panel(cells, tmp_path):
    """Control cells as they are have no effect, also where the panel holds a part of the counts."""
    split = splits.doubles(measured_rows(cells), seed=1)
    part = Task.of(cells, split, n_genes=25)
    assert part.controls.counts.sum() < 0.9 * part.controls.library.sum()
    method = Unchanged()
    method.fit(part.train, part.split)
    (found,) = predict_rows(method, part, "x").values()
    size = np.abs(part.truths[0].effect).mean()
    assert np.abs(found.effect).mean() < 0.15 * size


def test_cells_are_drawn_only_for_metrics_that_need_them(task):
    def refuse():
        raise AssertionError("drawn")

    predicted = replace(fitted("anchor", task), drawn=refuse)
    names = [n for n, m in METRICS.items() if m.axis in ("effect", "calibration") and not m.needs]
    assert scores(task, predicted, metrics=[*names, "coverage_95", "crps"]).notna().any(axis=None)
    with pytest.raises(AssertionError, match="drawn"):
        scores(task, predicted, metrics=["variance_log_ratio"])


# Who is compared with whom


def test_a_renamed_replicate_is_still_no_rival(tmp_path):
    methods = [
        "additive",
        "anchor",
        {"name": "mean", "label": "average"},
        {"name": "replicate", "label": "other half"},
        {"name": "truth", "label": "best"},
    ]
    more = {"simulate": {**TINY["data"][0]["simulate"], "n_cells": 2_500, "n_combinations": 20}}
    config = one_split(methods=methods, data=more, metrics=["squared_error", "pearson_delta"])
    found = benchmark.run(config, tmp_path, progress=False)
    assert found.rivals() == ["additive", "average"]
    assert set(found.verdicts()["rival"]) <= {"additive", "average"}
    scaled = found.table(metrics=["squared_error"]).set_index("method")["scaled"]
    assert scaled["average"] == 0
    assert scaled["other half"] == 1


def test_two_means_have_one_floor():
    methods = ["replicate", {"name": "mean", "label": "first"}, {"name": "mean", "label": "second"}]
    config = benchmark.BenchmarkConfig.read(one_split(methods=methods, focus=None))
    assert config.roles() == {"replicate": "ceiling", "first": "floor", "second": "negative"}


def test_a_negative_control_does_not_beat_a_focus_that_is_better():
    def table(value):
        rows = [("focus", "method", value), ("mean", "floor", 0.5), ("other", "method", 0.9)]
        frame = pd.DataFrame(rows, columns=["method", "role", "value"])
        about = {"data": "d", "kind": "k", "metric": "squared_error", "unscaled": ""}
        return frame.assign(**about)

    assert len(controls(table(0.6))[0].frame) == 1
    assert len(controls(table(0.4))[0].frame) == 0
    assert "no negative control" in controls(table(0.4))[0].note
    assert len(controls(table(0.5))[0].frame) == 0  # as good is not beaten


@pytest.mark.parametrize("name", METRICS)
def test_a_report_of_any_one_metric_can_be_written(result, name):
    divide = METRICS[name].denominator
    others = [m for m in METRICS if m != name]
    kept = result.scores.drop(columns=others).drop(
        columns=[c for c in ("squared_effect", "expr_distance_unbiased") if c != divide]
    )
    config = result.config.model_copy(update={"metrics": [name]})
    page = contents(replace(result, config=config, scores=kept))
    assert page["sections"]
    if name != "squared_error":
        assert page["short"] == []


def test_a_data_set_without_any_headline_metric_does_not_end_the_report(result):
    """As where no change is no worse than the noise of the measurement."""
    others = [
        m for m in METRICS if m in result.scores and m not in ("squared_error", "pearson_delta")
    ]
    one = result.scores.assign(data="other", squared_error=np.nan).drop(columns=others)
    both = pd.concat([result.scores, one], ignore_index=True)
    page = contents(replace(result, scores=both))
    (methods,) = (s for s in page["sections"] if s.id == "methods")
    assert {t.title.split(":")[0] for t in methods.tables} == {"simulated"}


def test_an_interpolated_duplicate_is_half_replicate_half_mean(task):
    found, replicate = (oracle(n, task, 0) for n in ("interpolated duplicate", "replicate"))
    mean = mean_prediction(task)
    np.testing.assert_allclose(found.effect, (replicate.effect + mean.effect) / 2, rtol=1e-5)
    for row in range(len(task.rows)):
        mine, theirs, average = (p.cells.take(p.cells.row == row) for p in (found, replicate, mean))
        n = min(len(theirs.row), len(average.row))
        assert len(mine.row) == 2 * n
        known = {theirs.counts[i].toarray().tobytes() for i in range(len(theirs.row))}
        from_truth = sum(mine.counts[i].toarray().tobytes() in known for i in range(2 * n))
        assert from_truth == n


# Compute


def test_memory_is_that_of_a_method_alone(tmp_path):
    methods = ["mean", "replicate", {"name": "benchmarks:Large", "label": "large"}, "no change"]
    runs = benchmark.run(
        one_split(methods=methods, focus=None, metrics=["squared_error"]), tmp_path, progress=False
    ).runs.set_index("method")
    memory = runs["peak_memory_gb"]
    assert memory["large"] - memory["mean"] == pytest.approx(0.512, abs=0.1)
    assert memory["no change"] == pytest.approx(memory["mean"], abs=0.05)
    assert memory["mean"] > 0.05  # Python and its libraries are there as well
    assert np.isnan(memory["replicate"])


def test_a_method_that_is_killed_takes_nothing_with_it(tmp_path):
    methods = ["mean", "replicate", {"name": "benchmarks:Dies", "label": "dies"}, "no change"]
    found = benchmark.run(one_split(methods=methods, focus=None), tmp_path, progress=False)
    status = found.runs.set_index("method")
    assert status["status"].to_dict() == {
        "mean": "run",
        "replicate": "run",
        "dies": "failed",
        "no change": "run",
    }
    assert "signal 9, as when memory runs out" in status.loc["dies", "reason"]


def test_nothing_that_a_method_started_goes_on(task, tmp_path):
    options = {"pid_file": str(tmp_path / "pid")}
    with Isolated("benchmarks:Starts", (), 0, options) as method:
        method.fit(task.train, task.split)
        pid = (tmp_path / "pid").read_text()
        assert state_of(pid) not in ("", "Z")
    end = time.monotonic() + 20
    while state_of(pid) not in ("", "Z"):
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.1)


def state_of(pid):
    """As ps names it; Z for a process that ended and that nobody asked about, empty for none."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return shown.stdout.strip()[:1]


def test_a_script_without_a_main_guard_can_run_a_benchmark(tmp_path):
    """New processes must not run the user's script again."""
    from helpers import python

    file = tmp_path / "mine.py"
    file.write_text(
        "print('once')\nfrom gpjepa import benchmark\n"
        f"config = {one_split(methods=['mean', 'replicate'], focus=None, metrics=['squared_error'])!r}\n"
        f"found = benchmark.run(config, {str(tmp_path / 'out')!r}, progress=False)\n"
        "print(len(found.runs), 'runs')\n"
    )
    said = python(f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")
    assert said.split() == ["once", "2", "runs"]


# Kept results


def test_code_decides_what_is_kept_and_words_do_not(tmp_path, monkeypatch):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("VALUE = 1\n")
    (package / "other.py").write_text("VALUE = 1\n")
    text = "def fit():\n    from .inner import VALUE\n    return VALUE\n"
    (package / "method.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def now():
        package_source.cache_clear()
        return method_source("theirs.method:Theirs")

    before = now()
    (package / "inner.py").write_text('"""Words."""\nVALUE = 1  # a remark\n')
    (package / "other.py").write_text("VALUE = 2\n")
    (package / "method.py").write_text(text.replace("fit():\n", 'fit():\n    """Learn."""\n'))
    assert now() == before
    (package / "inner.py").write_text("VALUE = 2\n")
    assert now() != before
    script = tmp_path / "peer.py"
    script.write_text("VALUE = 1\n")
    first = method_source("peer", script)
    script.write_text("# a remark\nVALUE = 1\n")
    assert method_source("peer", script) == first


def test_code_that_scores_decides_what_is_kept(result, monkeypatch):
    """Also for an oracle, whose own code is none."""
    import gpjepa.benchmark._runner as runner

    (data,) = result.config.data
    manifest = result.manifests["simulated"]

    def keys():
        return [
            runner._key(result.config, data, manifest, manifest.splits[0], m, 0)
            for m in result.config.methods
        ]

    before = keys()
    original = runner.package_source
    for module in ("methods._predict", "methods._oracles", "metrics", "_published"):
        with monkeypatch.context() as patch:
            patch.setattr(
                runner,
                "package_source",
                lambda m, changed=module: original(m) + ("x" if m.endswith(changed) else ""),
            )
            assert not set(keys()) & set(before), module
    assert keys() == before
    # What calibrates cells and splits the controls is imported by all of these.
    from gpjepa.benchmark.methods._sources import package_modules

    for module in ("tasks._calibrate", "tasks._task", "metrics._effect", "metrics._cell_eval"):
        assert f"gpjepa.benchmark.{module}" in package_modules("gpjepa.benchmark.metrics"), module
    # But not our model, or every change of it would run the peers again.
    for module in runner._SCORING:
        assert not [m for m in package_modules(module) if m.startswith("gpjepa.model")], module


def test_the_network_is_no_part_of_a_baselines_code(monkeypatch):
    import gpjepa.benchmark.methods._sources as sources

    def changed_when(module):
        package_source.cache_clear()
        plain = {n: method_source(n) for n in ("anchor", "response", "GP-JEPA")}
        package_source.cache_clear()
        original = sources._code
        source = sources._file(module).read_text()
        with monkeypatch.context() as patch:
            patch.setattr(
                sources, "_code", lambda t: original(t) + ("changed" if t == source else "")
            )
            found = {n for n in plain if method_source(n) != plain[n]}
        package_source.cache_clear()
        return found

    assert changed_when("gpjepa.model._gpjepa") == {"GP-JEPA"}
    assert changed_when("gpjepa.response._networks") == {"GP-JEPA", "response"}
    assert changed_when("gpjepa.effects._anchor") == {"anchor", "response", "GP-JEPA"}


def test_other_weights_make_another_method(monkeypatch):
    read = Path.read_bytes
    names = ("anchor", "response")
    before = {n: method_source(n) for n in names}
    package_source.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"other")
    assert [method_source(n) == before[n] for n in names] == [True, False]
    monkeypatch.undo()
    package_source.cache_clear()


# Splits


def test_a_split_that_cannot_be_tested_does_not_end_the_run(result, tmp_path):
    manifest = result.manifests["simulated"]
    (config_data,) = result.config.data
    cells, _ = config_data.load_joined()
    whole = manifest.splits[0]
    some = whole.test[0]
    mine = np.flatnonzero(cells.obs["perturbation"] == str(some[1]))
    few = cells[np.delete(np.arange(cells.n_obs), mine[4:])].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    lone = replace(whole, name="lone", test=(some,))
    rest = replace(whole, name="rest", test=whole.test[1:], train=whole.train)
    hashed = benchmark.tasks.data_hash(few)
    replace(manifest, data_hash=hashed, splits=(lone, rest)).write(tmp_path / "m.json")
    data = {
        "name": "few",
        "source": str(tmp_path / "few.h5ad"),
        "context_key": "context",
        "library_size_key": "library_size",
        "splits": [{"kind": "manifest", "path": str(tmp_path / "m.json")}],
    }
    found = benchmark.run({**TINY, "data": [data]}, tmp_path / "out", progress=False)
    status = found.runs.groupby("split")["status"].unique()
    assert list(status["lone"]) == ["not tested"]
    assert list(status["rest"]) == ["run"]
    assert "nothing can be tested" in (tmp_path / "out" / "report.md").read_text()
    only = {**data, "splits": [{"kind": "manifest", "path": str(tmp_path / "lone.json")}]}
    replace(manifest, data_hash=hashed, splits=(lone,)).write(tmp_path / "lone.json")
    with pytest.raises(ValueError, match="Nothing was run: .*nothing can be tested"):
        benchmark.run({**TINY, "data": [only]}, tmp_path / "other", progress=False)


def test_a_manifest_may_name_targets_in_any_order(result, tmp_path):
    manifest = result.manifests["simulated"]
    manifest.write(tmp_path / "m.json")
    text = json.loads((tmp_path / "m.json").read_text())
    for split in text["splits"]:
        for part in ("train", "test"):
            split[part] = [[c, "+".join(reversed(p.split("+")))] for c, p in split[part]]
    (tmp_path / "m.json").write_text(json.dumps(text))
    assert splits.Manifest.read(tmp_path / "m.json").splits == manifest.splits


def test_data_are_loaded_once(tmp_path, monkeypatch):
    loaded = []
    original = datasets.simulate
    monkeypatch.setattr(datasets, "simulate", lambda **kw: loaded.append(kw) or original(**kw))
    config = one_split(methods=["mean", "replicate"], focus=None, metrics=["squared_error"])
    benchmark.run(config, tmp_path, progress=False)
    assert len(loaded) == 1


# Statistics


def frame(values, metric="pearson_delta", under=None, half=(0, 1), **more):
    """Scores of methods on rows of targets A0, A1, ..."""
    rows = []
    for method, each in values.items():
        for i, value in enumerate(each):
            for h in half:
                row = {"method": method, "entry": method, "role": "method", "half": h}
                row |= {"data": "d", "kind": "k", "split": "s", "context": "all", "refused": False}
                row |= {"perturbation": f"A{i}", metric: value}
                if under is not None:
                    row["squared_effect"] = under[i]
                rows.append(row | more)
    found = pd.DataFrame(rows)
    for name, role in (("mean", "floor"), ("replicate", "ceiling")):
        found.loc[found["method"] == name, "role"] = role
    return found


def test_a_ratio_whose_denominator_may_be_negative_has_no_interval():
    rng = np.random.default_rng(0)
    under = rng.normal(0.2, 1, 12)
    under += 0.15 - under.mean()
    found = frame({"a": np.full(12, 0.1)}, "squared_error", under)
    (row,) = benchmark.summarise(found).itertuples()
    assert row.value == pytest.approx(1.2 / under.sum())
    assert np.isnan(row.low) and np.isnan(row.high)
    sure = frame({"a": np.full(12, 0.1)}, "squared_error", np.abs(under) + 1)
    (row,) = benchmark.summarise(sure).itertuples()
    assert row.low < row.value < row.high


def test_which_of_two_methods_is_better_does_not_depend_on_what_divides_both():
    rng = np.random.default_rng(0)
    under = rng.normal(0.3, 1, 12)
    under += 0.2 - under.mean()
    error = np.abs(rng.normal(1, 0.1, 12))
    found = frame({"a": error, "b": error + 0.5 + rng.normal(0, 0.1, 12)}, "squared_error", under)
    (row,) = benchmark.verdicts(found, "a", ["b"], ["squared_error"]).itertuples()
    assert row.verdict == "better"
    assert row.low > 0


def test_strata_are_chosen_on_the_half_that_is_not_scored():
    """Pure noise: effects that look strong on one half are not stronger on the other."""
    rng = np.random.default_rng(0)
    rows = []
    for half in (0, 1):
        part = frame({"a": np.zeros(300)}, "squared_error", rng.normal(size=300), half=(half,))
        rows.append(part)
    found = with_size(pd.concat(rows, ignore_index=True))
    means = found.groupby("size")["squared_effect"].mean()
    assert abs(means["strong effects"] - means["weak effects"]) < 0.25
    counts = found.groupby(["size", "half"]).size()
    assert (counts == 100).all()


def test_many_verdicts_of_nothing_find_nothing():
    """Thirty metrics of two methods that are equally good: 5% of them would look better."""
    rng = np.random.default_rng(1)
    parts = []
    for i in range(30):
        values = {m: rng.normal(size=25) for m in ("a", "b")}
        parts.append(frame(values).assign(data=f"set {i}"))
    found = benchmark.verdicts(pd.concat(parts), "a", ["b"], ["pearson_delta"])
    assert len(found) == 30
    # Benjamini and Hochberg by hand: the k-th smallest p times n over k, and no more than the next.
    p = np.sort(found["p"])
    by_hand = np.minimum.accumulate((p * 30 / np.arange(1, 31))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(found["q"]), np.minimum(by_hand, 1))
    named = found["verdict"].isin(["better", "worse"])
    assert named.equals(found["q"] < 0.05)
    assert named.sum() < (found["p"] < 0.05).sum()
    assert named.sum() <= 1
    # And what there is, is found.
    real = {"a": rng.normal(1, 0.3, 25), "b": rng.normal(0, 0.3, 25)}
    parts[0] = frame(real).assign(data="set 0")
    found = benchmark.verdicts(pd.concat(parts), "a", ["b"], ["pearson_delta"])
    assert found.loc[found["data"] == "set 0", "verdict"].item() == "better"


def test_five_units_show_nothing():
    """All five agree: so would one in sixteen pairs of coins."""
    few = frame({"a": [0.9] * 5, "b": [0.1] * 5})
    (row,) = benchmark.verdicts(few, "a", ["b"], ["pearson_delta"]).itertuples()
    assert row.verdict == "too few to tell"
    assert benchmark.summarise(few)["low"].isna().all()
    more = frame({"a": [0.9] * 9, "b": [0.1] * 9})
    (row,) = benchmark.verdicts(more, "a", ["b"], ["pearson_delta"]).itertuples()
    assert row.verdict == "better"
    assert row.p >= 2 * 0.5**9
    assert benchmark.summarise(more)["low"].notna().all()


def test_units_are_counted_among_the_rows_that_are_compared():
    """Nine targets, of which the rival has a value for three."""
    found = frame({"a": [0.9] * 9, "b": [0.1] * 3 + [np.nan] * 6})
    (row,) = benchmark.verdicts(found, "a", ["b"], ["pearson_delta"]).itertuples()
    assert row.n_rows == 3
    assert row.verdict == "too few to tell"
    low = benchmark.summarise(found).set_index("method")["low"]
    assert np.isnan(low["b"]) and np.isfinite(low["a"])


def test_what_is_new_in_a_new_context_is_the_context():
    """Thirty targets in two held-out contexts are two witnesses of what happens in a new one."""
    both = pd.concat(
        [frame({"a": [0.9] * 30, "b": [0.1] * 30}).assign(context=c) for c in ("one", "two")]
    )
    for kind, verdict in (("held-out-context", "too few to tell"), ("unseen-singles", "better")):
        (row,) = benchmark.verdicts(
            both.assign(kind=kind), "a", ["b"], ["pearson_delta"]
        ).itertuples()
        assert row.verdict == verdict


def test_rounding_is_no_difference():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    found = frame({"a": values, "b": values + 1e-9})
    (row,) = benchmark.verdicts(found, "a", ["b"], ["pearson_delta"]).itertuples()
    assert row.verdict == "equal"
    assert row.gain == 0


def test_spaces_of_their_own_are_not_compared(result):
    own = {n for n, m in METRICS.items() if m.own_space}
    assert {"own_embedding_cosine", "neighbour_retrieval"} == own
    assert not own & set(result.verdicts()["metric"])


def test_the_e_test_leaves_random_numbers_alone(task, monkeypatch):
    original = np.random.default_rng

    def watched(seed=None):
        assert np.random.default_rng is watched
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", watched)
    again = replace(task)
    np.testing.assert_array_equal(again.e_test, task.e_test)


def test_small_numbers_are_not_zero():
    shown = [number(x) for x in (2.4e-5, -3e-4, 0, 0.0123, 12.34, 1234.5, float("nan"))]
    assert shown == ["2.4e-05", "-3.0e-04", "0", "0.012", "12.3", "1,234", "–"]


def test_cell_eval_is_pinned_by_its_preset():
    assert cell_eval_config().to_dict()["de"]["backend"] == "scanpy"
