"""The response layer: the prior over screens, the networks, the gate, the predictor."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LinearRegression
from test_effects import random_table, read, table_of

from gpjepa.datasets import random_screen, simulate
from gpjepa.effects import ROLES, EffectAnchor, EffectTable, control_halves, effect_table
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.response import ResponsePredictor, load_network, pretrain, save_network
from gpjepa.response._attention import TargetAttention
from gpjepa.response._episodes import draw_episode
from gpjepa.response._gate import fit_gate
from gpjepa.response._inputs import make_query
from gpjepa.response._pretrain import episode_loss
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
        rng = np.random.default_rng(seed)
        unit = rng.normal(size=len(table.genes))
        unit = unit[:1] * np.ones(len(table.genes)) if correlated else unit
        moved = np.sqrt(control) * unit
        seen = replace(table, effect={ON: table.effect[ON] - moved})
        one, other = control_halves(seen, ON, rng)
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
    one, _ = control_halves(table, ON, rng)
    assert one.scales == [ON]
    own = table.variance[ON]
    np.testing.assert_allclose(one.noise(ON) - own, 2 * (table.noise(ON) - own), rtol=1e-5)
    moved = one.control[ON]["a"] - table.control[ON]["a"]
    row = [c for c, _ in table.rows].index("a")
    np.testing.assert_allclose(
        one.effect[ON][row], table.effect[ON][row] - moved, rtol=1e-4, atol=1e-5
    )


# What the network reads, and the network


@pytest.fixture(scope="module")
def asked():
    """Combinations and targets that two contexts of a screen were not shown."""
    found = screen(3, contexts=2)
    table = found.effects
    several = np.array([len(p.targets) > 1 for _, p in table.rows])
    out = several & (np.arange(len(several)) % 3 == 0)
    out |= np.array([table.rows[0][1].targets[0] in p.targets for _, p in table.rows])
    anchor = EffectAnchor(found.features, "mean").fit(table.subset(~out))
    pairs = [(p, c) for (c, p), o in zip(table.rows, out, strict=True) if o]
    return anchor, [p for p, _ in pairs], [c for _, c in pairs], table.scales[0]


def test_experts_add_up_to_the_anchor(asked):
    anchor, perturbations, contexts, on = asked
    predicted = anchor.predict(perturbations, contexts, on)
    floor = np.stack([-anchor.effects_.control[on][c] for c in contexts])
    assert {"seen2", "unseen"} <= set(predicted.regime)
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
    query = make_query(*asked)
    mean, log_ratio = ResponseNetwork(len(ROLES))(query.inputs)
    np.testing.assert_allclose(
        mean.detach().numpy() * query.scale[:, None], query.anchor.mean, atol=1e-5
    )
    assert not log_ratio.any()


def test_neither_the_order_of_genes_nor_that_of_experts_matters(asked):
    x, network = make_query(*asked).inputs, random_network()
    mean, log_ratio = network(x)
    genes = torch.randperm(mean.shape[1])
    for found, expected in zip(network(x.genes(genes)), (mean, log_ratio), strict=True):
        torch.testing.assert_close(found, expected[:, genes], atol=1e-4, rtol=1e-4)
    experts = torch.randperm(x.roles.shape[1])
    other = {k: getattr(x, k)[:, experts] for k in ("experts", "noise", "roles", "per_expert")}
    torch.testing.assert_close(network(replace(x, **other))[0], mean, atol=1e-4, rtol=1e-4)


def test_rows_do_not_see_each_other_nor_what_fills_the_gaps(asked):
    x, network = make_query(*asked).inputs, random_network()
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
    dealt = table.subset(rows)
    dealt = replace(
        dealt,
        genes=dealt.genes[genes],
        effect={ON: dealt.effect[ON][:, genes]},
        variance={ON: dealt.variance[ON][:, genes]},
        control={ON: {"c": table.control[ON]["c"][genes]}},
        control_variance={ON: {"c": table.control_variance[ON]["c"][genes]}},
    )
    one, other = (
        TargetAttention(EffectAnchor(features).fit(t), ON).predict(names[50:53], "c")
        for t in (table.subset(np.arange(48)), dealt)
    )
    np.testing.assert_allclose(other, one[:, genes], atol=0.02)


def test_few_targets_are_not_enough_for_attention(rng):
    table, features, _, _ = many_targets(rng, n=12)
    assert not TargetAttention(EffectAnchor(features).fit(table), ON).contexts


# The gate


def judged(rng, n=30, n_genes=200, right=(1.0, 0.0), noise=0.1):
    """Rows of which the networks say what the anchor misses, times a factor."""
    table = random_table(rng, n_targets=n, n_pairs=0, n_genes=n_genes, noise=noise)
    measured = table.effect[ON]
    anchor = measured + rng.normal(0, 1, measured.shape)
    missed = measured - anchor
    networks = [anchor + f * missed + (1 - f) * rng.normal(0, 1, missed.shape) for f in right]
    return np.stack(networks), anchor, table


def test_the_gate_opens_for_the_network_that_is_right(rng):
    networks, anchor, table = judged(rng)
    found = fit_gate(networks, anchor, table, range(30), ON, np.zeros(2))
    assert found.weights[0] > 0.9 and found.weights[1] < 0.05 and found.n_units == 30
    assert found.error_gated < 0.1 * found.error_anchor


def test_the_gate_stays_shut_for_networks_that_only_add_noise(rng):
    networks, anchor, table = judged(rng, right=(0.0, 0.0))
    found = fit_gate(networks, anchor, table, range(30), ON, np.zeros(2))
    assert found.weights.max() < 0.03


def test_weights_are_at_most_one_in_all(rng):
    networks, anchor, table = judged(rng, right=(0.6, 0.6))
    found = fit_gate(networks, anchor, table, range(30), ON, np.zeros(2))
    assert found.weights.min() > 0.3 and found.weights.sum() <= 1 + 1e-9


def test_the_gate_is_least_squares_where_nothing_is_held_back(rng):
    """One network, many units: the weight that scikit-learn finds."""
    networks, anchor, table = judged(rng, n=200, right=(0.4,))
    table.control_variance[ON]["c"][:] = 0
    scored = ~table.targeted(range(200))
    plain = LinearRegression(fit_intercept=False).fit(
        (networks[0] - anchor)[scored][:, None], (table.effect[ON] - anchor)[scored]
    )
    found = fit_gate(networks, anchor, table, range(200), ON, np.zeros(1))
    assert found.weights[0] == pytest.approx(plain.coef_[0], rel=0.03)


def test_few_units_leave_the_gate_at_its_prior(rng):
    networks, anchor, table = judged(rng, n=4)
    assert fit_gate(networks, anchor, table, range(4), ON, np.array([0.5, 0])).weights.tolist() == [
        0.5,
        0,
    ]
    networks, anchor, table = judged(rng, n=6)
    weight = fit_gate(networks, anchor, table, range(6), ON, np.array([0.5, 0])).weights[0]
    assert 0.5 < weight < 1


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


def test_the_order_of_pairs_and_of_targets_does_not_matter(simulated):
    table, _ = simulated
    wanted = [p for _, p in table.rows if len(p.targets) > 1][:6]
    rest = table.subset(np.array([p not in wanted for _, p in table.rows]))
    predictor = ResponsePredictor().fit(rest)
    one = predictor.predict(wanted, ["c"] * 6)
    turned = [Perturbation.of(p.targets[::-1]) for p in wanted[::-1]]
    other = predictor.predict(turned, ["c"] * 6)
    np.testing.assert_allclose(other.mean[::-1], one.mean, atol=1e-5)
    again = ResponsePredictor().fit(rest).predict(wanted, ["c"] * 6)
    np.testing.assert_array_equal(again.mean, one.mean)


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
    predictor = ResponsePredictor().fit(simulated[0])
    with pytest.raises(ValueError, match="gate=0.5 is not known"):
        predictor.predict([read("A")], ["c"], gate=0.5)
    with pytest.raises(KeyError, match="without control cells"):
        predictor.predict([simulated[0].rows[0][1]], ["elsewhere"])


# Training


def test_training_is_the_same_again_and_learns():
    """A little of it; a network starts as the anchor."""
    told = []
    one, two = (
        pretrain(120, 2, n_hidden=8, lr=1e-2, n_workers=1, progress=told.append) for _ in range(2)
    )
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=0, atol=0)
    rng = np.random.default_rng(5)
    episodes = [e for _ in range(30) if (e := draw_episode(random_screen(rng), rng)) is not None]
    with torch.no_grad():
        before, after = (
            np.mean([float(episode_loss(n, e)) for e in episodes])
            for n in (ResponseNetwork(len(ROLES), 8), one)
        )
    assert after < before


def test_a_saved_network_comes_back(tmp_path):
    network = random_network()
    save_network(network, tmp_path / "mine.safetensors", "by hand")
    found = load_network(tmp_path / "mine.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no response network of this version"):
        load_network(tmp_path / "other.safetensors")


def test_the_network_of_the_package_is_small():
    assert PRETRAINED.stat().st_size < 4e6
    assert load_network().n_hidden > 8
