"""The response layer: the prior over screens, the networks, the gate, the predictor."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from test_effects import random_table, read, table_of

from gpjepa.datasets import random_screen, simulate
from gpjepa.effects import (
    ROLES,
    EffectAnchor,
    EffectTable,
    control_halves,
    effect_table,
    fit_gate,
)
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.response import ResponsePredictor, _judge, _tuned, load_network, pretrain, save_network
from gpjepa.response._attention import TargetAttention
from gpjepa.response._episodes import draw_episode
from gpjepa.response._inputs import make_query
from gpjepa.response._judge import folds
from gpjepa.response._pretrain import episode_loss
from gpjepa.response._tuned import HiddenPairs, enough_pairs
from gpjepa.response._weights import PRETRAINED

ON = "mean_log1p"


def screen(seed, **wanted):
    """A random screen, the first from a seed on that is as wanted."""
    while True:
        found = random_screen(np.random.default_rng(seed))
        n_contexts = len(found.effects.contexts)
        if wanted.get("contexts", n_contexts) == n_contexts:
            return found
        seed += 1


def random_network(seed=0):
    """A network that has left its start."""
    torch.manual_seed(seed)
    network = ResponseNetwork(len(ROLES), 16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


# The prior over screens


def test_a_random_screen_is_drawn_again_from_its_seed():
    one, two = (random_screen(np.random.default_rng(7)) for _ in range(2))
    [on] = one.effects.scales
    np.testing.assert_array_equal(one.effects.effect[on], two.effects.effect[on])
    assert one.effects.rows == two.effects.rows == tuple(sorted(one.effects.rows))


def test_the_noise_of_random_screens_is_what_their_tables_state():
    """Each error over its standard deviation, of rows and of what they share, the controls."""
    own, shared = [], []
    for seed in range(40):
        found = random_screen(np.random.default_rng(seed))
        [on] = found.effects.scales
        error = found.effects.effect[on] - found.truth
        own.append(np.mean(error**2 / found.effects.noise(on)))
        first = [c == found.effects.contexts[0] for c, _ in found.effects.rows]
        mean = error[first].mean(0)
        control = found.effects.control_variance[on][found.effects.contexts[0]]
        shared.append(np.mean(mean**2) / np.mean(control))
    assert np.mean(own) == pytest.approx(1, abs=0.1)
    assert np.median(shared) > 0.8  # not averaged away


def test_random_screens_differ_in_what_they_have():
    found = [random_screen(np.random.default_rng(seed)) for seed in range(60)]
    assert {len(s.effects.contexts) for s in found} == {1, 2, 3, 4}
    assert {len(s.features) for s in found} == {0, 1}
    assert (
        min(len(s.effects.genes) for s in found)
        < 100
        < 500
        < max(len(s.effects.genes) for s in found)
    )


def test_the_kernel_of_random_features_tells_how_alike_effects_are_in_some_screens():
    """In others the features are useless."""
    found = []
    for seed in range(120):
        one = screen(seed, contexts=1)
        if not one.features:
            continue
        alone = [i for i, (_, p) in enumerate(one.effects.rows) if len(p.targets) == 1]
        targets = [one.effects.rows[i][1].targets[0] for i in alone]
        kernel = one.features[0].kernel(targets, targets)
        effects = one.truth[alone]
        length = np.linalg.norm(effects, axis=1)
        alike = effects @ effects.T / np.maximum(np.outer(length, length), 1e-9)
        above = np.triu_indices(len(alone), 1)
        if alike[above].std() > 0 and kernel[above].std() > 0:
            found.append(np.corrcoef(kernel[above], alike[above])[0, 1])
    assert np.quantile(found, 0.9) > 0.3
    assert abs(np.quantile(found, 0.25)) < 0.15


# Halves of the controls


@pytest.mark.parametrize("correlated", [False, True])
def test_halves_of_the_controls_have_independent_errors(rng, correlated):
    """Of many experiments: covariance of the two tables' effects is the rows' own alone."""
    table = random_table(rng, noise=0.0)
    control = table.control_variance[ON]["c"]
    control[:] = 0.5
    if correlated:
        parts = rng.normal(size=(32, 1)) * np.ones(len(table.genes))
        parts -= parts.mean(0)
        table = replace(table, draws={ON: {"c": parts / np.linalg.norm(parts, axis=0)}})
    errors = []
    for seed in range(3_000):
        unit = np.random.default_rng(seed).normal(size=len(table.genes))
        unit = unit[:1] * np.ones(len(table.genes)) if correlated else unit
        moved = np.sqrt(control) * unit
        seen = replace(table, effect={ON: table.effect[ON] - moved})
        one, other = control_halves(seen, ON, 10_000 + seed)
        errors.append([t.effect[ON][0, :2] - table.effect[ON][0, :2] for t in (one, other)])
    errors = np.array(errors)
    for half in range(2):
        np.testing.assert_allclose(errors[:, half].var(0), 2 * 0.5, rtol=0.1)
    across = (errors[:, 0] * errors[:, 1]).mean(0)
    np.testing.assert_allclose(across, 0, atol=0.06)
    between_genes = np.corrcoef(errors[:, 0].T)[0, 1]
    assert between_genes == pytest.approx(float(correlated), abs=0.06)


def test_halves_say_that_their_controls_are_twice_as_noisy(rng):
    table = random_table(rng, contexts=("a", "b"), noise=0.1)
    one, _ = control_halves(table, ON)
    assert one.scales == [ON]
    own = table.variance[ON]
    np.testing.assert_allclose(one.noise(ON) - own, 2 * (table.noise(ON) - own), rtol=1e-5)
    moved = one.control[ON]["a"] - table.control[ON]["a"]
    row = [c for c, _ in table.rows].index("a")
    np.testing.assert_allclose(
        one.effect[ON][row], table.effect[ON][row] - moved, rtol=1e-4, atol=1e-5
    )


def test_only_expression_has_a_floor(rng):
    """Controls in another unit may be negative."""
    values = pd.DataFrame(rng.normal(-3, 1, (12, 5))).add_prefix("G")
    labels = ["control"] * 4 + [f"T{i}" for i in range(8)]
    table = EffectTable.from_frame(values, labels, sd=np.full((12, 5), 0.5), unit="z")
    for half in control_halves(table, "z"):
        assert half.control["z"]["all"].max() < 0


# What the network reads, and the network


def known_here(seed, contexts=1):
    """An anchor that was not shown a third of the combinations, and one target; those rows."""
    found = screen(seed, contexts=contexts)
    table = found.effects
    out = np.array(
        [
            (len(p.targets) > 1 and i % 3 == 0) or table.rows[0][1].targets[0] in p.targets
            for i, (_, p) in enumerate(table.rows)
        ]
    )
    anchor = EffectAnchor(found.features, "mean").fit(table.subset(~out))
    return anchor, [(p, c) for (c, p), o in zip(table.rows, out, strict=True) if o]


@pytest.fixture(scope="module")
def asked():
    """Combinations of which one or both targets were measured alone, and the network's query."""
    anchor, pairs = known_here(3)
    [on] = anchor.effects_.scales
    pairs = [(p, c) for p, c in pairs if anchor.regime(p, c) in ("seen2", "seen1")]
    predicted = anchor.predict(*zip(*pairs, strict=True), on)
    assert set(predicted.regime) == {"seen2", "seen1"}
    return make_query(anchor, pairs, predicted, on)


@pytest.mark.parametrize("seed", [3, 5, 7])
def test_experts_add_up_to_the_anchor(seed):
    """In three contexts, of which one has no effects: combinations and targets are carried over."""
    anchor, pairs = known_here(seed, contexts=3)
    table = anchor.effects_
    [on] = table.scales
    elsewhere = np.array([c != table.contexts[0] for c, _ in table.rows])
    anchor = EffectAnchor(anchor.features, "mean").fit(table.subset(elsewhere))
    perturbations, contexts = zip(*pairs, strict=True)
    predicted = anchor.predict(perturbations, contexts, on)
    assert {"seen2", "unseen", "new context"} <= set(predicted.regime)
    floor = np.stack([-table.control[on][c] for c in contexts])
    experts = anchor.experts(perturbations, contexts, on)
    for each, mean, least in zip(experts, predicted.mean, floor, strict=True):
        assert set(each.roles) <= set(ROLES)
        np.testing.assert_allclose(np.maximum(each.weights @ each.mean, least), mean, atol=1e-5)
        assert each.mean.shape == each.noise.shape == (len(each.roles), len(least))


def test_how_often_an_expert_holds_the_noise_of_the_controls(rng):
    table = random_table(rng)
    [each] = EffectAnchor().fit(table).experts([read("g3+g7")], ["c"], ON)
    of = dict(zip(each.roles, each.on_control, strict=True))
    assert of["target as measured"] == pytest.approx(-1)
    assert of["mean effect"] == pytest.approx(-1)
    assert of["sum of the singles"] < -1.5


def test_a_new_network_is_the_anchor(asked):
    query = asked
    mean, log_ratio = ResponseNetwork(len(ROLES))(query.inputs)
    np.testing.assert_allclose(
        mean.detach().numpy() * query.scale[:, None], query.anchor.mean, atol=1e-5
    )
    assert not log_ratio.any()


def test_neither_the_order_of_genes_nor_that_of_experts_matters(asked):
    x, network = asked.inputs, random_network()
    mean, log_ratio = network(x)
    genes = torch.randperm(mean.shape[1])
    for found, expected in zip(network(x.genes(genes)), (mean, log_ratio), strict=True):
        torch.testing.assert_close(found, expected[:, genes], atol=1e-4, rtol=1e-4)
    experts = torch.randperm(x.roles.shape[1])
    other = {k: getattr(x, k)[:, experts] for k in ("experts", "noise", "roles", "per_expert")}
    torch.testing.assert_close(network(replace(x, **other))[0], mean, atol=1e-4, rtol=1e-4)


def test_rows_do_not_see_each_other_nor_what_fills_the_gaps(asked):
    x, network = asked.inputs, random_network()
    mean, _ = network(x)
    torch.testing.assert_close(network(x.rows(slice(1, 3)))[0], mean[1:3], atol=1e-4, rtol=1e-4)
    gaps = x.roles < 0
    assert gaps.any()
    filled = {
        k: torch.where(gaps.reshape(*gaps.shape, *[1] * (v.dim() - 2)), torch.ones_like(v), v)
        for k in ("experts", "noise", "per_expert")
        for v in [getattr(x, k)]
    }
    torch.testing.assert_close(network(replace(x, **filled))[0], mean, atol=1e-4, rtol=1e-4)


def test_the_unit_of_a_table_does_not_matter(rng):
    """Effects ten times as large are predicted ten times as large."""
    effects = {("c", f"g{i}"): rng.normal(size=30) for i in range(8)}
    effects |= {("c", f"g{i}+g{i + 1}"): rng.normal(size=30) for i in range(5)}
    predictions = []
    for factor in (1.0, 10.0):
        values = np.stack([factor * v for v in effects.values()])
        table = EffectTable.from_frame(
            pd.DataFrame(values).add_prefix("G"),
            [p for _, p in effects],
            sd=np.full(values.shape, 0.3 * factor),
            unit="z",
        )
        found = ResponsePredictor(network=random_network()).fit(table)
        predictions.append(found.predict([read("g0+g6")], ["all"], "z", gate=1).mean / factor)
    np.testing.assert_allclose(*predictions, rtol=1e-3, atol=1e-4)


# Attention over measured targets


def many_targets(rng, n=60, n_genes=80, noise=0.3):
    """Effects of targets that are alike where their features are; what a fold would not know."""
    hidden = rng.normal(size=(n, 3))
    names = [f"T{i:02d}" for i in range(n)]
    truth = np.tanh(hidden @ rng.normal(size=(3, n_genes)))
    effects = {
        ("c", t): row + rng.normal(0, noise, n_genes) for t, row in zip(names, truth, strict=True)
    }
    features = TargetFeatures(names, hidden / np.linalg.norm(hidden, axis=1)[:, None], "known")
    return table_of(effects, noise=noise**2), features, truth, names


def test_attention_learns_which_targets_are_alike(rng):
    table, features, truth, names = many_targets(rng)
    anchor = EffectAnchor(features).fit(table.subset(np.arange(48)))
    learned = TargetAttention(anchor, ON)
    mean = truth[:48].mean(0)
    error = ((mean + learned.predict(names[48:], "c") - truth[48:]) ** 2).sum()
    assert error < 0.6 * ((mean - truth[48:]) ** 2).sum()
    again = TargetAttention(anchor, ON).predict(names[48:], "c")
    np.testing.assert_array_equal(again, learned.predict(names[48:], "c"))


def test_attention_does_not_depend_on_the_order_of_rows_or_genes(rng):
    table, features, _, names = many_targets(rng)
    rows, genes = rng.permutation(48), rng.permutation(len(table.genes))
    dealt = in_gene_order(table.subset(rows), genes)
    one, other = (
        TargetAttention(EffectAnchor(features).fit(t), ON).predict(names[50:53], "c")
        for t in (table.subset(np.arange(48)), dealt)
    )
    np.testing.assert_allclose(other, one[:, genes], atol=0.02)


def test_few_targets_are_not_enough_for_attention(rng):
    table, features, _, _ = many_targets(rng, n=12)
    assert not TargetAttention(EffectAnchor(features).fit(table), ON).contexts


# The gate


def judged(rng, n=30, right=1.0, noise=0.1, n_genes=200):
    """Rows of which a network says a share of what the anchor misses, and noise for the rest."""
    table = random_table(rng, n_targets=n, n_pairs=0, n_genes=n_genes, noise=noise)
    anchor = table.effect[ON] + rng.normal(0, 1, table.effect[ON].shape)
    missed = table.effect[ON] - anchor
    return anchor + right * missed + (1 - right) * rng.normal(0, 1, missed.shape), anchor, table


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_gate_opens_for_a_network_that_is_right(rng, prior):
    found = fit_gate(*judged(rng), range(30), ON, prior)
    assert found.gate > 0.9 and found.n_units == 30
    assert found.error_gated < 0.05 * found.error_anchor


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_gate_shuts_for_a_network_that_only_adds_noise(rng, prior):
    assert fit_gate(*judged(rng, right=0.0), range(30), ON, prior).gate < 0.1


@pytest.mark.parametrize("control", [0.0, 1.0])
def test_noise_of_the_controls_does_not_keep_a_bad_network(control):
    """One that shifts all rows alike, for nothing, with a prior that trusted it."""
    gates = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        table = random_table(rng, n_targets=10, n_pairs=0, n_genes=200, noise=0.1)
        table.control_variance[ON]["c"][:] = control
        anchor = np.zeros_like(table.effect[ON])
        gates.append(
            fit_gate(anchor + rng.normal(0, 0.1, 200), anchor, table, range(10), ON, 0.5).gate
        )
    assert np.mean(gates) < 0.25


def test_few_units_leave_the_gate_at_its_prior(rng):
    assert fit_gate(*judged(rng, n=4), range(4), ON, 0.5).gate == 0.5
    assert 0.5 < fit_gate(*judged(rng, n=6), range(6), ON, 0.5).gate < 1


# The predictor


@pytest.fixture(scope="module")
def simulated():
    """A screen with known truth, of which some doubles were not measured."""
    adata = simulate(4_000, 300, n_targets=16, n_combinations=24, seed=3)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    labels = adata.obs["perturbation"]
    reader = {x: read(x) for x in labels.unique()}
    table = effect_table(
        adata.X,
        np.asarray(adata.X.sum(1)).ravel(),
        [reader[x] for x in labels],
        ["c"] * adata.n_obs,
        adata.var_names,
        np.ones(adata.n_obs, bool),
    )
    truth = pd.DataFrame(adata.uns["simulation"]["rows"])
    effect = adata.uns["simulation"]["effect"][ON]
    return table, dict(zip(truth["perturbation"], effect, strict=True))


def test_the_pretrained_network_is_better_than_the_anchor_on_doubles(simulated):
    """The simulator is not in the prior that it was trained on."""
    table, truth = simulated
    several = np.array([len(p.targets) > 1 for _, p in table.rows])
    predictor = ResponsePredictor().fit(table.subset(~several))
    wanted = [p for (_, p), many in zip(table.rows, several, strict=True) if many]
    true = np.stack([truth[str(p)] for p in wanted])
    found = {g: predictor.predict(wanted, ["c"] * len(wanted), gate=g) for g in (0, "auto", 1)}
    error = {g: ((p.mean - true) ** 2).sum() for g, p in found.items()}
    assert error[1] < 0.9 * error[0] and error["auto"] < 0.95 * error[0]
    assert (found["auto"].gate == 0.5).all()  # no double to judge it by
    z = (found["auto"].mean - true) / np.sqrt(found["auto"].variance)
    assert 0.85 < (np.abs(z) < 1.96).mean()


def test_gate_0_is_the_anchor_and_so_is_no_network(simulated):
    table, _ = simulated
    wanted = [p for _, p in table.rows if len(p.targets) > 1][:4]
    rest = table.subset(np.array([p not in wanted for _, p in table.rows]))
    anchor = EffectAnchor().fit(rest).predict(wanted, ["c"] * 4, ON)
    for predictor, gate in ((ResponsePredictor(), 0), (ResponsePredictor(network=None), "auto")):
        found = predictor.fit(rest).predict(wanted, ["c"] * 4, gate=gate)
        np.testing.assert_array_equal(found.mean, anchor.mean)
        np.testing.assert_array_equal(found.variance, anchor.variance)
        assert not found.gate.any() and found.regime == anchor.regime


def test_measured_perturbations_and_the_control_are_the_anchor_s(simulated):
    table, _ = simulated
    asked = [table.rows[0][1], Perturbation()]
    found = ResponsePredictor().fit(table).predict(asked, ["c"] * 2, gate=1)
    assert not found.gate.any()
    np.testing.assert_array_equal(found.mean, found.anchor)


def test_a_useless_network_does_no_harm(simulated):
    """One with random weights, judged on the doubles of the screen."""
    table, truth = simulated
    out = np.array([len(p.targets) > 1 and i % 3 == 0 for i, (_, p) in enumerate(table.rows)])
    wanted = [p for (_, p), o in zip(table.rows, out, strict=True) if o]
    predictor = ResponsePredictor(network=random_network()).fit(table.subset(~out))
    found = predictor.predict(wanted, ["c"] * len(wanted))
    true = np.stack([truth[str(p)] for p in wanted])
    error, bad, base = (
        ((x - true) ** 2).sum()
        for x in (
            found.mean,
            predictor.predict(wanted, ["c"] * len(wanted), gate=1).mean,
            found.anchor,
        )
    )
    assert bad > 2 * base
    assert error < 1.02 * base


def test_neither_the_order_of_pairs_nor_that_of_genes_matters(simulated):
    """With gates that the screen's own doubles judge."""
    table, _ = simulated
    several = [i for i, (_, p) in enumerate(table.rows) if len(p.targets) > 1]
    rest = table.subset(np.setdiff1d(np.arange(len(table.rows)), several[:6]))
    wanted = [table.rows[i][1] for i in several[:6]]
    predictor = ResponsePredictor().fit(rest)
    one = predictor.predict(wanted, ["c"] * 6)
    assert predictor.gates()["seen2"].n_units == len(several) - 6
    other = predictor.predict(wanted[::-1], ["c"] * 6)
    np.testing.assert_allclose(other.mean[::-1], one.mean, atol=1e-5)
    genes = np.random.default_rng(0).permutation(len(table.genes))
    found = ResponsePredictor().fit(in_gene_order(rest, genes)).predict(wanted, ["c"] * 6)
    np.testing.assert_allclose(found.mean, one.mean[:, genes], atol=2e-4)


def in_gene_order(table, genes):
    """The table with its genes in another order."""
    return replace(
        table,
        genes=table.genes[genes],
        effect={s: v[:, genes] for s, v in table.effect.items()},
        variance={s: v[:, genes] for s, v in table.variance.items()},
        control={s: {c: v[genes] for c, v in of.items()} for s, of in table.control.items()},
        control_variance={
            s: {c: v[genes] for c, v in of.items()} for s, of in table.control_variance.items()
        },
        few={s: v[:, genes] for s, v in table.few.items()},
        draws={s: {c: v[:, genes] for c, v in of.items()} for s, of in table.draws.items()},
    )


@pytest.mark.parametrize("known", [True, False])
def test_attention_is_judged_by_the_targets_of_the_screen(known):
    """Let in where it learns which features matter, and not where none does."""
    rng = np.random.default_rng(2)
    group, names = np.arange(90) % 4, [f"T{i:02d}" for i in range(90)]
    truth = rng.normal(size=(4, 80))[group]
    values = np.hstack([np.eye(4)[group], 0.5 * rng.normal(size=(90, 10))])
    features = TargetFeatures(names, values, "four of fourteen matter")
    features = features if known else features.permuted(1)
    effects = truth + rng.normal(0, 0.3, truth.shape)
    table = table_of({("c", t): e for t, e in zip(names, effects, strict=True)}, noise=0.09)
    predictor = ResponsePredictor(features).fit(table.subset(np.arange(72)))
    wanted = [Perturbation.of([t]) for t in names[72:]]
    found = predictor.predict(wanted, ["c"] * len(wanted))
    gate = predictor.gates()["unseen"]
    assert gate.n_units == 72
    error = ((found.mean - truth[72:]) ** 2).sum() / ((found.anchor - truth[72:]) ** 2).sum()
    assert (gate.gate > 0.3 and error < 0.95) if known else (gate.gate < 0.1 and error < 1.02)


def test_targets_that_no_feature_covers_are_the_anchor_s(rng):
    table, features, _, names = many_targets(rng)
    predictor = ResponsePredictor(features, missing_features="mean").fit(table)
    found = predictor.predict([read("NEW")], ["c"], gate=1)
    assert not found.gate.any()
    np.testing.assert_array_equal(found.mean, found.anchor)


def test_of_three_targets_the_network_was_not_trained_on_any(simulated):
    table, _ = simulated
    alone = [p.targets[0] for _, p in table.rows if len(p.targets) == 1]
    predictor = ResponsePredictor(network=load_network()).fit(table)
    assert not predictor.predict([Perturbation.of(alone[:3])], ["c"], gate=1).gate.any()


def test_a_published_table_needs_no_scale(rng):
    values = pd.DataFrame(rng.normal(size=(9, 30))).add_prefix("G")
    labels = [f"T{i}" for i in range(7)] + ["T0+T1", "T2+T3"]
    predictor = ResponsePredictor().fit(EffectTable.from_frame(values, labels, unit="z"))
    assert predictor.predict([read("T4+T5")], ["all"]).mean.shape == (1, 30)
    assert predictor.predict([], []).mean.shape == (0, 30)
    with pytest.raises(ValueError, match="scale='mean_log1p' is not known"):
        predictor.predict([read("T4+T5")], ["all"], "mean_log1p")


def test_nothing_is_predicted_below_no_expression(simulated):
    table, _ = simulated
    wanted = [p for _, p in table.rows if len(p.targets) > 1]
    network = random_network()
    rest = table.subset(np.array([len(p.targets) < 2 for _, p in table.rows]))
    found = (
        ResponsePredictor(network=network).fit(rest).predict(wanted, ["c"] * len(wanted), gate=1)
    )
    assert (found.mean + table.control[ON]["c"]).min() > -1e-5


def test_arguments_are_checked(simulated):
    with pytest.raises(ValueError, match="network='large' is not known; give 'pretrained'"):
        ResponsePredictor(network="large")
    with pytest.raises(ValueError, match="reads 3 kinds of experts"):
        ResponsePredictor(network=ResponseNetwork(3))
    predictor = ResponsePredictor().fit(simulated[0])
    with pytest.raises(ValueError, match="gate=0.5 is not known"):
        predictor.predict([read("A")], ["c"], gate=0.5)
    with pytest.raises(KeyError, match="without control cells"):
        predictor.predict([simulated[0].rows[0][1]], ["elsewhere"])


# Training on the screen


def test_training_leaves_rows_out():
    """What is measured of them changes nothing."""
    predictor = ResponsePredictor().fit(saturating(20)[0])
    judge = _judge.Judge(predictor.anchor_, predictor.network, tunes=True)
    fold = next(judge._each_fold(lambda: None))
    hidden = list(HiddenPairs.of(fold.anchor, fold.judged_by, fold.rows))
    [pairs] = hidden
    truth = pairs.episode.truth.clone()
    truth[:2] = 99
    changed = replace(pairs, episode=replace(pairs.episode, truth=truth))
    one, other, wrong = (
        _tuned.tuned(predictor.network, [each], without)
        for each, without in ((pairs, pairs.rows[:2]), (changed, pairs.rows[:2]), (changed, ()))
    )
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(wrong.own.weight, one.own.weight)


def pairs_in(contexts, singles=True):
    """Many pairs in one context or several, or no target alone."""
    table, _ = saturating(24)
    effects = table.effect[ON]
    measured = {
        (c, str(p)): effects[i]
        for c in contexts
        for i, (_, p) in enumerate(table.rows)
        if singles or len(p.targets) > 1
    }
    return table_of(measured, noise=0.01, contexts=contexts)


@pytest.mark.parametrize(("contexts", "singles"), [("ab", True), ("a", False)])
def test_pairs_of_several_contexts_or_without_singles_are_judged(contexts, singles, monkeypatch):
    monkeypatch.setattr(_tuned, "_N_STEPS", 2)
    table = pairs_in(contexts, singles)
    predictor = ResponsePredictor().fit(table)
    judged = predictor.judge()
    assert np.isfinite(judged.errors.drop(columns="regime").to_numpy(float)).all()
    # Where no target was measured alone, the network reads nothing that it could be trained on.
    assert (judged.network is predictor.network) == (not singles)


def test_from_scratch_there_is_no_network_of_few_pairs():
    table, rest = saturating(6)
    predictor = ResponsePredictor(network="scratch").fit(table)
    found = predictor.predict(list(rest), ["c"] * len(rest), gate=1)
    np.testing.assert_array_equal(found.mean, found.anchor)
    assert not found.gate.any() and not predictor.gates()


def saturating(n_pairs, seed=0):
    """A screen of which the pairs saturate, as no expert of the anchor does without controls."""
    rng = np.random.default_rng(seed)
    names = [f"T{i:02d}" for i in range(14)]
    singles = rng.normal(size=(14, 150)) * (rng.random((14, 150)) < 0.5)
    pairs = [(i, j) for i in range(14) for j in range(i)]
    pairs = [pairs[k] for k in rng.permutation(len(pairs))]
    truth = {
        Perturbation.of([names[i], names[j]]): np.tanh(singles[i] + singles[j]) for i, j in pairs
    }
    measured = dict(zip(names, singles, strict=True))
    measured |= {str(p): truth[p] for p in list(truth)[:n_pairs]}
    noisy = {("c", label): e + rng.normal(0, 0.1, e.shape) for label, e in measured.items()}
    return table_of(noisy, noise=0.01), {p: e for p, e in truth.items() if str(p) not in measured}


@pytest.mark.parametrize("network", ["pretrained", pytest.param("scratch", marks=pytest.mark.slow)])
def test_the_network_learns_from_the_pairs_of_the_screen(network):
    table, rest = saturating(40)
    asked, truth = list(rest), np.stack(list(rest.values()))
    predictor = ResponsePredictor(network=network).fit(table)
    found = predictor.predict(asked, ["c"] * len(asked), gate=1)
    as_it_is = predictor.network
    before = (
        ResponsePredictor(network=as_it_is).fit(table).predict(asked, ["c"] * len(asked), gate=1)
    )
    error, unlearned, of_anchor = (
        ((x - truth) ** 2).sum() for x in (found.mean, before.mean, found.anchor)
    )
    assert error < 0.9 * unlearned and error < 0.9 * of_anchor
    gates = predictor.gates()
    assert gates["seen2"].gate > 0.5 and gates["seen2"].error_network < gates["seen2"].error_anchor


def test_of_few_pairs_the_network_is_used_as_it_is():
    predictor = ResponsePredictor().fit(saturating(19)[0])
    assert predictor.judge().network is predictor.network
    assert enough_pairs(saturating(20)[0])


def test_no_row_is_predicted_by_a_network_that_was_trained_on_it(monkeypatch):
    seen, tune = [], _judge.tuned

    def spy(network, hidden, without, seed):
        seen.append({int(i) for each in hidden for i in each.rows} - {int(i) for i in without})
        return tune(network, hidden, without, seed)

    monkeypatch.setattr(_judge, "tuned", spy)
    monkeypatch.setattr(_tuned, "_N_STEPS", 2)
    table, _ = saturating(22)
    predictor = ResponsePredictor().fit(table)
    predictor.judge()
    hidden = [set(np.flatnonzero(h).tolist()) for h in folds(predictor.anchor_)]
    assert len(seen) == len(hidden) + 1  # and the one that predicts new pairs
    for rows, out in zip(seen, hidden, strict=False):
        assert rows and not rows & out
    pairs = {i for i, (_, p) in enumerate(table.rows) if len(p.targets) > 1}
    assert seen[-1] == pairs


# Training across screens


@pytest.mark.slow
def test_training_is_the_same_again_and_learns():
    """A little of it; a network starts as the anchor."""
    quick = {"n_hidden": 8, "n_workers": 1, "progress": lambda said: None}
    one, two = (pretrain(20, 2, lr=1e-2, **quick) for _ in range(2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=0, atol=0)
    # Of fewer screens, some networks learn nothing: 150 are enough for any seed.
    one = pretrain(150, 4, lr=5e-3, **quick)
    rng = np.random.default_rng(5)
    episodes = [e for _ in range(30) if (e := draw_episode(random_screen(rng), rng)) is not None]
    with torch.no_grad():
        before, after = (
            np.mean([float(episode_loss(n, e)) for e in episodes])
            for n in (ResponseNetwork(len(ROLES), 8), one)
        )
    assert after < before


def test_a_saved_network_comes_back(tmp_path):
    network = ResponseNetwork(len(ROLES), 16, 8)
    save_network(network, tmp_path / "mine.safetensors", "by hand")
    found = load_network(tmp_path / "mine.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no response network of this version"):
        load_network(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="text.safetensors holds no response network"):
        load_network(tmp_path / "text.safetensors")


def test_the_network_of_the_package_is_small():
    assert PRETRAINED.stat().st_size < 4e6
    assert load_network().n_hidden > 8
