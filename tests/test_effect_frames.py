"""Effect tables without cells: published effects, wells and ranks."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import real_file

from gpjepa.effects import EffectAnchor, EffectTable, Transfer, effect_features
from gpjepa.perturbations import Perturbation, TargetFeatures

GENES = [f"g{i}" for i in range(60)]


def frame(values):
    return pd.DataFrame(values, columns=GENES[: values.shape[1]])


def test_effects_with_standard_errors_are_taken_as_they_are(rng):
    values, sd = rng.normal(size=(4, 60)), rng.uniform(0.1, 0.2, (4, 60))
    labels = ["A", "B", "A+B", "A"]
    table = EffectTable.from_frame(
        frame(values), labels, ["x", "x", "x", "y"], sd=sd, unit="z-score"
    )
    assert [(c, str(p)) for c, p in table.rows] == [
        ("x", "A"),
        ("x", "A+B"),
        ("x", "B"),
        ("y", "A"),
    ]
    assert table.scales == ["z-score"]
    assert table.contexts == ["x", "y"]
    order = [0, 2, 1, 3]
    np.testing.assert_allclose(table.effect["z-score"], values[order], rtol=1e-6)
    np.testing.assert_allclose(table.noise("z-score"), sd[order] ** 2, rtol=1e-6)
    assert not table.has_controls
    adata = table.to_anndata()
    np.testing.assert_allclose(adata["A in y"].X[0], values[3], rtol=1e-6)


def test_wells_with_controls_are_differences_within_plates(rng):
    """Noise is what replicates differ by, and of plates it is that of their own controls."""
    plate = np.repeat(["p1", "p2"], 40)
    labels = np.tile(["control"] * 20 + ["A"] * 4 + ["B"] * 4 + ["C"] * 12, 2)
    shift = {"p1": rng.normal(size=60), "p2": rng.normal(size=60)}
    effect = {x: rng.normal(size=60) * (x != "control") for x in ("control", "A", "B", "C")}
    noise, found = [], []
    for _ in range(50):
        values = [effect[x] + shift[p] for x, p in zip(labels, plate, strict=True)]
        values = frame(np.array(values) + rng.normal(0, 0.5, (80, 60)))
        table = EffectTable.from_frame(values, labels, batch=plate, unit="z")
        found.append(table.effect["z"])
        noise.append(table.noise("z"))
    assert table.has_controls
    assert list(table.n_cells) == [8, 8, 24]
    truth = np.stack([effect[x] for x in "ABC"])
    np.testing.assert_allclose(np.mean(found, 0), truth, atol=0.15)
    ratio = np.var(found, 0).mean(1) / np.mean(noise, 0).mean(1)
    np.testing.assert_allclose(ratio, 1, atol=0.15)


def test_controls_have_a_label_and_replicates_that_differ_count(rng):
    values = rng.normal(size=(6, 60))
    names = ["DMSO", "vehicle", "A", "A", "B", "B"]
    table = EffectTable.from_frame(
        frame(values), names, control=["DMSO", "vehicle"], batch=["p"] * 6, unit="z"
    )
    assert [str(p) for _, p in table.rows] == ["A", "B"]
    np.testing.assert_allclose(
        table.effect["z"][0], values[2:4].mean(0) - values[:2].mean(0), rtol=1e-4
    )
    apart = EffectTable.from_frame(
        frame(values[2:]), names[2:], sd=np.full((4, 60), 0.01), unit="z"
    )
    assert apart.variance["z"].mean() > 0.2
    same = EffectTable.from_frame(frame(np.repeat(values[:2], 2, 0)), list("AABB"), unit="z")
    assert (same.variance["z"] > 0).all()


def test_noise_that_nobody_states_is_never_zero(rng):
    low = rng.normal(size=(80, 3)) @ rng.normal(size=(3, 60))
    noisy = EffectTable.from_frame(frame(low + rng.normal(0, 0.3, low.shape)), labels(80), unit="z")
    assert noisy.variance["z"].mean() == pytest.approx(0.3**2, rel=0.35)
    flat = low.copy()
    flat[:, :5] = 0
    table = EffectTable.from_frame(frame(flat), labels(80), unit="z")
    assert (table.variance["z"] > 0).all()
    assert (EffectTable.from_frame(frame(low[:3]), labels(3), unit="z").variance["z"] > 0).all()


def labels(n):
    return [f"T{i:02d}" for i in range(n)]


def test_the_anchor_works_on_effects_without_cells(rng):
    """Unseen targets from features, contexts without control profiles, and negative effects."""
    groups = rng.normal(size=(3, 60)) * 3
    names = labels(30)
    values = np.stack([groups[i % 3] for i in range(30)]) + rng.normal(0, 0.3, (30, 60))
    features = TargetFeatures([*names, "NEW"], np.eye(3)[[*(i % 3 for i in range(30)), 1]])
    contexts = ["x"] * 30 + ["y"] * 30 + ["z"] * 30
    both = np.vstack([values] * 3) + rng.normal(0, 0.1, (90, 60))
    table = EffectTable.from_frame(frame(both), names * 3, contexts, unit="z")
    anchor = EffectAnchor(features).fit(table)
    asked = [Perturbation.parse("NEW")], ["x"]
    found = anchor.predict(*asked, "z")
    assert ((found.mean[0] - groups[1]) ** 2).sum() < 0.1 * (groups[1] ** 2).sum()
    assert found.mean.min() < -1
    with pytest.raises(
        ValueError, match="scale='mean_log1p' is not known; choose one of \\['z'\\]"
    ):
        anchor.predict(*asked, "mean_log1p")
    held = table.subset([not (c == "z" and p.targets[0] == "T00") for c, p in table.rows])
    carried = EffectAnchor().fit(held).predict([Perturbation.parse("T00")], ["z"], "z")
    assert carried.regime == ["new context"]
    assert ((carried.mean[0] - groups[0]) ** 2).sum() < 0.2 * (groups[0] ** 2).sum()
    # They may also be what other data are predicted with, and not these.
    assert effect_features(table).covers("T00")
    with pytest.raises(ValueError, match="same cells"):
        EffectAnchor(effect_features(table)).fit(table)
    with pytest.raises(ValueError, match="form='log_rate' needs the control profiles"):
        Transfer("log_rate", "z").fit(table)
    assert "control" not in table.to_anndata().varm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbation": ["A"]}, "perturbation has 1 entries; the values have 2 rows"),
        ({"sd": np.ones((2, 3))}, "sd is of shape"),
        ({"sd": np.zeros((2, 60))}, "sd must be positive"),
        ({"n": [1, 0]}, "n must be positive"),
        ({"values": frame(np.full((2, 60), np.nan))}, "NaN or infinite"),
        (
            {"control_profiles": {"x": np.zeros(60)}},
            r"control_profiles has no profile of \['all'\]",
        ),
        ({"perturbation": ["A", None]}, "1 rows have no perturbation"),
        ({"context": ["x", np.nan]}, "1 rows have no context"),
        ({"batch": ["p", "q"]}, r"No row is a control \('control'\).*control="),
        (
            {"perturbation": ["control", "A"], "context": ["x", "y"]},
            "No control rows in context 'y'",
        ),
        (
            {"perturbation": ["control", "A"], "control_profiles": {"all": np.zeros(60)}},
            "leave control_profiles out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message, rng):
    given = {"values": frame(rng.normal(size=(2, 60))), "perturbation": ["A", "B"], **change}
    with pytest.raises(ValueError, match=message):
        EffectTable.from_frame(**given, unit="z")


def test_real_wells_whose_replicates_show_their_noise():
    """nELISA: secreted proteins of four plates, and intervals that hold a left-out replicate."""
    adata = ad.read_h5ad(real_file("nelisa_a549.h5ad"))
    names = [
        Perturbation.of([p]) if p != "control" else Perturbation()
        for p in adata.obs["perturbation"]
    ]
    seen, rng = {}, np.random.default_rng(0)
    for i in rng.permutation(len(names)):  # one replicate of each compound is left out
        if not names[i].is_control and sum(p == names[i] for p in names) > 2:
            seen.setdefault(names[i], i)
    out = np.isin(np.arange(len(names)), list(seen.values()))
    plate = adata.obs["plate"].astype(str).to_numpy()
    frames = adata.to_df()

    def made(keep):
        mine = [p for p, k in zip(names, keep, strict=True) if k]
        return EffectTable.from_frame(frames[keep], mine, batch=plate[keep], unit="NPX")

    is_control = np.array([p.is_control for p in names])
    rest, left = made(~out), made(out | is_control)
    row = {p: i for i, (_, p) in enumerate(rest.rows)}
    at = [row[p] for _, p in left.rows]
    apart = rest.effect["NPX"][at] - left.effect["NPX"]
    # Both share the controls, whose noise is not in their difference.
    z = apart / np.sqrt(rest.variance["NPX"][at] + left.variance["NPX"])
    assert 0.9 < np.mean(np.abs(z) < 1.96) < 0.98


def test_real_ranks_of_many_knock_downs():
    """Replogle 2022: in one line, what another line shows of the same knock-downs."""
    adata = ad.read_h5ad(real_file("replogle_2022_up_ranks.h5ad"))
    adata = adata[:, :1_000].copy()
    table = EffectTable.from_anndata(adata, context_key="context", unit="rank score")
    here, there = (table.subset([c == x for c, _ in table.rows]) for x in ("K562", "RPE1"))
    anchor = EffectAnchor(effect_features(there), "mean").fit(here)
    effect = here.effect["rank score"].astype(float)
    mean = (effect.sum(0) - effect) / (len(effect) - 1)
    left_out = anchor.out_of_fold("rank score")
    assert ((left_out - effect) ** 2).sum() < 0.95 * ((mean - effect) ** 2).sum()


def test_effects_are_carried_to_a_context_of_which_only_controls_are_known(rng):
    effects = pd.DataFrame(rng.normal(size=(8, 20)), columns=[f"g{i}" for i in range(20)])
    names = [f"T{i}" for i in range(8)]
    profiles = {"line": np.ones(20), "new line": np.full(20, 1.5)}
    table = EffectTable.from_frame(
        effects, names, ["line"] * 8, sd=effects * 0 + 0.1, control_profiles=profiles, unit="z"
    )
    assert table.contexts == ["line", "new line"]
    found = EffectAnchor().fit(table).predict([Perturbation.parse("T3")], ["new line"], "z")
    assert found.regime == ["new context"]
    similar = np.corrcoef(found.mean[0], effects.iloc[3])[0, 1]
    assert similar > 0.9
