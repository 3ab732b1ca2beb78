"""Benchmarks of effects without cells: published tables, signatures, wells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from gpjepa import benchmark, plotting
from gpjepa.benchmark import BenchmarkConfig
from gpjepa.benchmark.tasks import Task, standard_effects
from gpjepa.effects import EffectTable, MeanEffect
from gpjepa.perturbations import Perturbation
from gpjepa.splits import unseen_singles

GROUPS = 3


def wells(rng, n=24, replicates=3, controls=16):
    """Profiles of perturbations of three kinds, several times each, with control wells."""
    centre = rng.normal(size=(GROUPS, 40))
    labels = [f"T{i:02d}" for i in range(n) for _ in range(replicates)] + ["control"] * controls
    kind = [i % GROUPS for i in range(n) for _ in range(replicates)]
    values = np.vstack([centre[kind], np.zeros((controls, 40))]) + 5
    values += rng.normal(0, 0.3, values.shape)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"w{i}" for i in range(len(labels))])
    return ad.AnnData(values, obs, pd.DataFrame(index=[f"P{g}" for g in range(40)]))


def config(path, methods=(), **data):
    return {
        "title": "wells",
        "data": [
            {
                "name": "wells",
                "source": str(path),
                "effects": {"unit": "log signal"},
                "splits": [{"kind": "unseen-singles", "folds": 3}],
                **data,
            }
        ],
        "methods": ["anchor", "mean", "no change", "replicate", "truth", *methods],
        "metrics": ["squared_error", "pearson_delta", "energy_distance_unbiased", "coverage_95"],
    }


def test_wells_are_split_and_scored_by_their_replicates(rng, tmp_path):
    path = tmp_path / "wells.h5ad"
    adata = wells(rng)
    adata.write_h5ad(path)
    table = pd.DataFrame(np.eye(GROUPS)[np.arange(24) % GROUPS], [f"T{i:02d}" for i in range(24)])
    table.to_csv(tmp_path / "kinds.csv")
    given = config(path, ["GP-JEPA"], features=[{"table": str(tmp_path / "kinds.csv")}])
    result = benchmark.run(given, tmp_path / "out", progress=False)
    found = result.table((), ["squared_error", "coverage_95"])
    error = found[found["metric"] == "squared_error"].set_index("method")["value"]
    assert error["anchor"] < 0.15 < error["mean"] < 1.2
    assert error["no change"] == pytest.approx(1)
    assert error["replicate"] < 0.15
    coverage = found[found["metric"] == "coverage_95"].set_index("method")["value"]
    assert 0.85 < coverage["anchor"] < 1
    assert result.scores["energy_distance_unbiased"].isna().all()
    runs = result.runs.groupby("method")[["status", "reason"]].first()
    assert tuple(runs.loc["GP-JEPA"]) == ("not run", "it learns from cells")
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_the_response_predictor_is_a_method(rng, tmp_path):
    """With its gates; the networks read tables without cells."""
    path = tmp_path / "wells.h5ad"
    wells(rng, n=60, replicates=2).write_h5ad(path)
    table = pd.DataFrame(np.eye(GROUPS)[np.arange(60) % GROUPS], [f"T{i:02d}" for i in range(60)])
    table.to_csv(tmp_path / "kinds.csv")
    arms = [{"name": "response", "label": f"gate {g}", "options": {"gate": g}} for g in (0, 1)]
    given = config(path, ["response", *arms], features=[{"table": str(tmp_path / "kinds.csv")}])
    given["metrics"] = ["squared_error"]
    result = benchmark.run(given, tmp_path / "out", progress=False)
    assert set(result.runs["status"]) == {"run"}
    error = result.table((), ["squared_error"]).set_index("method")["value"]
    assert error["gate 0"] == pytest.approx(error["anchor"])
    assert error["gate 1"] != pytest.approx(error["anchor"])
    assert error["response"] < 1.05 * error["anchor"]


def test_controls_and_replicates_are_never_on_both_sides(rng):
    values = standard_effects(wells(rng), unit="z")
    rows = [("all", Perturbation.parse(f"T{i:02d}")) for i in range(24)]
    split = unseen_singles(rows, folds=3)[0]
    task = Task.of(values, split)
    assert task.replicated and not task.has_cells
    assert set(task.rows) == set(split.test)
    shown = {tuple(np.round(x, 6)) for x in np.asarray(task.train.X)}
    held = [str(p) for _, p in split.test]
    hidden = np.asarray(values[values.obs["perturbation"].isin(held).to_numpy()].X)
    assert not shown & {tuple(np.round(x, 6)) for x in hidden}
    assert (task.train.obs["perturbation"] == "control").sum() == 8
    one, other = (t.table.control["z"]["all"] for t in task.truths)
    assert (one != other).all() and (one != task.training.control["z"]["all"]).all()
    # The truth is a mean of replicates minus a mean of controls.
    assert abs(task.truths[0].effect.mean()) < 0.5


@pytest.mark.parametrize("plates", [1, 3])
def test_the_true_effects_have_no_error(rng, plates):
    """What is taken off for noise is what noise adds, with plates that differ and without."""
    errors, sizes = [], []
    for _ in range(12):
        adata = wells(rng, n=30, replicates=3 * plates, controls=48)
        centre = {f"T{i:02d}": rng.normal(size=40) for i in range(30)}
        effect = np.array([centre.get(p, np.zeros(40)) for p in adata.obs["perturbation"]])
        plate = np.arange(adata.n_obs) % plates
        adata.obs["plate"] = [f"p{i}" for i in plate]
        noise = rng.normal(0, 0.3, adata.shape)
        adata.X = effect + rng.normal(0, 0.5, (plates, 40))[plate] + noise
        values = standard_effects(adata, unit="z", batch_key="plate" if plates > 1 else None)
        rows = [("all", Perturbation.parse(t)) for t in centre]
        for split in unseen_singles(rows, folds=3):
            task = Task.of(values, split)
            exact = np.array([centre[str(p)] for _, p in task.rows])
            for half in task.truths:
                noise = half.table.noise("z")
                errors.append(((half.effect - exact) ** 2 - noise).sum())
                sizes.append(noise.sum())
    assert abs(np.sum(errors)) < 0.04 * np.sum(sizes)


def test_other_errors_or_units_are_computed_anew(rng, tmp_path):
    adata = wells(rng)
    adata.layers["few"], adata.layers["many"] = (np.full(adata.shape, x) for x in (0.3, 3.0))
    adata.write_h5ad(tmp_path / "wells.h5ad")
    found = {}
    for layer in ("few", "many"):
        given = config(tmp_path / "wells.h5ad", effects={"unit": "mean_log1p", "sd_layer": layer})
        result = benchmark.run(given, tmp_path / "out", progress=False)
        assert set(result.runs["status"]) == {"run"}
        scores = result.scores
        found[layer] = scores.loc[scores["method"] == "anchor", "coverage_95"].mean()
    assert found["few"] < found["many"]


def test_effects_measured_once_have_no_replicate(rng, tmp_path):
    adata = wells(rng, replicates=1, controls=0)
    adata.X = adata.X - 5
    adata.write_h5ad(tmp_path / "effects.h5ad")
    result = benchmark.run(config(tmp_path / "effects.h5ad"), tmp_path / "out", progress=False)
    runs = result.runs.groupby("method")[["status", "reason"]].first()
    assert tuple(runs.loc["replicate"]) == ("not run", "some were measured once only")
    assert runs.loc["anchor", "status"] == "run"
    adata.obs["context"] = ["x", "y"] * 12
    adata.write_h5ad(tmp_path / "two.h5ad")
    apart = {"context_key": "context", "splits": [{"kind": "held-out-context"}]}
    with pytest.raises(ValueError, match="Nothing is left to learn from in context 'x'"):
        benchmark.run(config(tmp_path / "two.h5ad", **apart), tmp_path / "two", progress=False)
    # With controls the halves differ, and yet are one measurement.
    wells(rng, replicates=1).write_h5ad(tmp_path / "once.h5ad")
    result = benchmark.run(config(tmp_path / "once.h5ad"), tmp_path / "once", progress=False)
    assert "replicate" not in set(result.scores["method"])
    few = wells(rng, controls=4)
    few.write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(ValueError, match="has 4 control rows; at least 8 are needed"):
        benchmark.run(config(tmp_path / "few.h5ad"), tmp_path / "none", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_genes": 100}, r"\['n_genes'\] are for cells; leave them out with `effects`"),
        ({"replicate_key": "well"}, r"\['replicate_key'\] are for cells"),
        ({"effects": {"units": "z"}}, "unit"),
    ],
)
def test_what_effects_do_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig.read(config("wells.h5ad", **change))


def test_effects_can_be_plotted_and_looked_up(rng):
    table = EffectTable.from_anndata(wells(rng), unit="log signal")
    frame = table.to_frame()
    one = frame[frame["perturbation"] == "T00"].set_index("gene")
    np.testing.assert_allclose(one["effect"], table.effect["log signal"][0], rtol=1e-6)
    np.testing.assert_allclose(one["sd"] ** 2, table.noise("log signal")[0], rtol=1e-5)
    assert ((one["upper"] - one["lower"]) / one["sd"]).to_numpy() == pytest.approx(3.92)
    plotting.volcano(frame[frame["perturbation"] == "T00"])
    plotting.effect_heatmap(frame[frame["perturbation"].isin(["T00", "T01"])])
    mean = MeanEffect("log signal").fit(table).predict([Perturbation.parse("NEW")], ["all"])
    np.testing.assert_allclose(mean[0], table.effect["log signal"].mean(0), rtol=1e-5)
