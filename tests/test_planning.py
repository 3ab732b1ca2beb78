"""Goals, ranking, search, reverse, design and power."""

import json
from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import train_quickly
from scipy.stats import multivariate_normal, norm
from typer.testing import CliRunner

import gpjepa
from gpjepa import planning
from gpjepa.cli import app
from gpjepa.datasets import simulate
from gpjepa.effects import Additive, EffectAnchor, EffectTable, denoise, effect_table
from gpjepa.perturbations import Perturbation, TargetFeatures, UnknownTargetError
from gpjepa.planning import Constraints, Signature, TowardsCells, TowardsEffect
from gpjepa.plotting._planning import unbeaten
from gpjepa.response import ResponsePredictor

ON = "mean_log1p"
run = CliRunner().invoke


def table_of(adata, context_key=None):
    library = np.asarray(adata.X.sum(1), float).ravel()
    labels = adata.obs["perturbation"].astype(str)
    known = {x: Perturbation.parse(x) for x in set(labels)}
    contexts = ["all"] * adata.n_obs if context_key is None else adata.obs[context_key].astype(str)
    perturbations = [known[x] for x in labels]
    return effect_table(adata.X, library, perturbations, list(contexts), adata.var_names)


@pytest.fixture(scope="module")
def screen():
    return simulate(3_000, 120, n_targets=12, n_combinations=15, seed=3)


@pytest.fixture(scope="module")
def table(screen):
    return table_of(screen)


@pytest.fixture(scope="module")
def anchor(table):
    return EffectAnchor().fit(table)


@pytest.fixture(scope="module")
def goal(screen):
    truth = screen.uns["simulation"]
    return TowardsEffect(pd.Series(truth["effect"][ON][-1], screen.var_names))


@pytest.fixture(scope="module")
def model():
    screen = simulate(2_400, 60, n_targets=8, n_combinations=8, n_contexts=2, seed=4)
    fitted = train_quickly(screen, context_key="context", model={"response": None})
    return fitted


def of_numbers(rng, n_targets=8, n_genes=30, combined=6, sd=0.05):
    """A table without cells: no saturation, no floor."""
    single = rng.normal(size=(n_targets, n_genes))
    names = [f"T{i}" for i in range(n_targets)]
    pairs = list(combinations(range(n_targets), 2))[:combined]
    values = np.vstack([single, *(single[[i]] + single[[j]] for i, j in pairs)])
    labels = names + [f"T{i}+T{j}" for i, j in pairs]
    values = values + sd * rng.normal(size=values.shape)
    frame = pd.DataFrame(values, columns=[f"G{i}" for i in range(n_genes)])
    return EffectTable.from_frame(frame, labels, sd=np.full(values.shape, sd), unit="score")


# Effects together


def test_draws_have_the_stated_mean_and_variance(anchor):
    known = [p for p in anchor.effects_.perturbations if len(p.targets) == 1][:3]
    asked = [
        *known,
        *[Perturbation.of([a.targets[0], b.targets[0]]) for a, b in combinations(known, 2)],
    ]
    joint = anchor.joint(asked, ["all"] * len(asked), ON)
    draws = np.stack(list(joint.draws(2_000)))
    free = draws.min(0) > joint.floor + 1e-6  # where no draw met the floor
    found = draws.mean(0)[free] - joint.mean[free]
    assert np.abs(found / np.sqrt(joint.variance[free] / 2_000)).mean() == pytest.approx(
        0.8, abs=0.1
    )
    np.testing.assert_allclose(draws.var(0)[free], joint.variance[free], rtol=0.25)
    predicted = anchor.predict(asked, ["all"] * len(asked), ON)
    np.testing.assert_array_equal(joint.mean, predicted.mean)
    np.testing.assert_array_equal(joint.variance, predicted.variance)


def test_pairs_that_share_a_target_share_its_error(rng):
    table = of_numbers(rng, combined=0, sd=0.5)
    anchor = EffectAnchor().fit(table)
    asked = [Perturbation.parse(p) for p in ("T0+T1", "T0+T2", "T3+T4")]
    joint = anchor.joint(asked, ["all"] * 3, "score")
    draws = np.stack(list(joint.draws(1_500))) - joint.mean
    alike = (draws[:, 0] * draws[:, 1]).mean()
    other = (draws[:, 0] * draws[:, 2]).mean()
    assert alike > 5 * abs(other)
    # With both singles taken as measured, the covariance is the noise of the one they share.
    weights = [anchor.explain(str(p), scale="score").sources for p in asked[:2]]
    of = [w.set_index("perturbation")["weight"] for w in weights]
    both = of[0].index.intersection(of[1].index)
    expected = (of[0][both] * of[1][both]).sum() * table.variance["score"].mean()
    assert alike > 0.7 * expected


def test_a_draw_of_a_pair_does_not_depend_on_the_others(anchor):
    pairs = [(p, "all") for p in anchor.effects_.perturbations]
    some = anchor.joint([p for p, _ in pairs[:6]], ["all"] * 6, ON)
    alone = anchor.joint([pairs[3][0]], ["all"], ON)
    one, other = (np.stack(list(j.draws(23, seed=5))) for j in (some, alone))
    np.testing.assert_allclose(one[:, 3], other[:, 0], atol=1e-5)


@pytest.mark.parametrize("features", [False, True])
def test_sums_of_pairs_are_the_anchor_s_predictions(rng, features):
    table = of_numbers(rng)
    kinds = [TargetFeatures([f"T{i}" for i in range(10)], rng.normal(size=(10, 4)), "some")]
    anchor = EffectAnchor(kinds if features else (), "mean").fit(table)
    singles = [Perturbation.of([f"T{i}"]) for i in range(10)]  # the last two were never perturbed
    sums = anchor.pair_sums(singles, "all", "score")
    pairs = [(i, j) for i, j in combinations(range(10), 2)]
    measured = set(table.perturbations)
    pairs = [(i, j) for i, j in pairs if Perturbation.of([f"T{i}", f"T{j}"]) not in measured]
    asked = [Perturbation.of([f"T{i}", f"T{j}"]) for i, j in pairs]
    predicted = anchor.predict(asked, ["all"] * len(asked), "score").mean
    made = np.stack([sums.effect(i, j) for i, j in pairs])
    np.testing.assert_allclose(made, predicted, atol=1e-5)
    linear, metric = rng.normal(size=30), rng.random(30)
    values = sums.quadratic(range(10), linear, metric)
    for (i, j), d in zip(pairs, predicted, strict=True):
        assert values[i, j] == pytest.approx(linear @ d + metric @ d**2, rel=1e-4, abs=1e-4)
        assert values[j, i] == pytest.approx(values[i, j], rel=1e-5, abs=1e-5)


# Targeted genes


def test_targeted_genes_keep_what_no_other_perturbation_does_to_them(screen, table, anchor):
    truth = screen.uns["simulation"]
    of = dict(zip(truth["rows"]["perturbation"], truth["effect"][ON], strict=True))
    gene = {g: i for i, g in enumerate(table.genes)}
    rows = table.perturbations
    contexts = ["all"] * len(rows)
    plain, whole = (anchor.predict(rows, contexts, ON, own_genes=o).mean for o in (False, True))
    own = np.array([[g in p.targets for g in gene] for p in rows])
    true = np.stack([of[str(p)] for p in rows])
    np.testing.assert_array_equal(plain[~own], whole[~own])
    assert ((whole - true)[own] ** 2).mean() < 0.3 * ((plain - true)[own] ** 2).mean()
    denoised = denoise(table, ON)
    at = [str(p) for p in rows]
    np.testing.assert_allclose(denoised[at].X, whole, atol=1e-5)
    # Also in pairs that were not measured.
    pairs = [p for p in map(Perturbation.parse, of) if len(p.targets) == 2]
    rest = EffectAnchor().fit(table.subset(np.array([len(p.targets) == 1 for _, p in table.rows])))
    plain, whole = (
        rest.predict(pairs, ["all"] * len(pairs), ON, own_genes=o).mean for o in (False, True)
    )
    own = np.array([[g in p.targets for g in gene] for p in pairs])
    true = np.stack([of[str(p)] for p in pairs])
    assert ((whole - true)[own] ** 2).mean() < 0.7 * ((plain - true)[own] ** 2).mean()


def test_where_targeted_genes_are_like_others_nothing_changes(rng):
    table = of_numbers(rng)
    renamed = [Perturbation.of([f"G{t[1:]}" for t in p.targets]) for _, p in table.rows]
    values = pd.DataFrame(table.effect["score"], columns=table.genes)
    sd = np.full(values.shape, 3.0)  # all of it could be noise
    same = EffectTable.from_frame(values, renamed, sd=sd, unit="score")
    anchor = EffectAnchor().fit(same)
    plain, whole = (
        anchor.predict(renamed, ["all"] * len(renamed), "score", own_genes=o).mean
        for o in (False, True)
    )
    np.testing.assert_allclose(plain, whole, atol=1e-6)


def test_networks_do_not_see_targeted_genes_treated_by_themselves(table):
    predictor = ResponsePredictor().fit(table)
    known = sorted(p for p in table.perturbations if len(p.targets) == 1)
    asked = [Perturbation.of([known[0].targets[0], known[-1].targets[0]])]
    whole = predictor.predict(asked, ["all"], ON, gate=1)
    own = np.isin(table.genes, asked[0].targets)
    np.testing.assert_array_equal(whole.mean[:, own], whole.anchor[:, own])
    assert np.abs(whole.mean[:, ~own] - whole.anchor[:, ~own]).max() > 1e-3


# Goals


def test_the_score_of_an_effect_is_the_share_of_the_way(anchor):
    wanted = pd.Series([1.0, -2.0], anchor.effects_.genes[[3, 5]])
    objective = TowardsEffect(wanted).objective(planning.as_model(anchor), "all")
    effects = np.zeros((4, len(anchor.effects_.genes)))
    effects[1, [3, 5]] = 1, -2
    effects[2, [3, 5]] = 0.5, -1
    effects[3, [3, 5, 7]] = 1, -2, 9  # a gene that the goal does not name
    np.testing.assert_allclose(objective(effects), [0, 1, 0.75, 1])
    variance = np.full(effects.shape, 0.1)
    draws = effects[2] + np.sqrt(0.1) * np.random.default_rng(0).normal(
        size=(20_000, effects.shape[1])
    )
    expected = objective.expected(effects, variance)[2]
    assert objective(draws).mean() == pytest.approx(expected, abs=0.01)


def test_a_signature_is_the_mean_change_in_the_wanted_direction(anchor, rng):
    genes = anchor.effects_.genes
    goal = Signature(up=list(genes[:2]), down=[genes[4]])
    objective = goal.objective(planning.as_model(anchor), "all")
    effects = rng.normal(size=(5, len(genes)))
    expected = (effects[:, 0] + effects[:, 1] - effects[:, 4]) / 3
    np.testing.assert_allclose(objective(effects), expected)


def test_cells_are_their_mean_difference_from_the_controls(screen, anchor, table):
    name = str(table.rows[4][1])
    cells = screen[(screen.obs["perturbation"] == name).to_numpy()]
    model = planning.as_model(anchor)
    objective = TowardsCells(cells).objective(model, "all")
    np.testing.assert_allclose(objective.goal, table.effect[ON][4], atol=1e-4)
    # Noise is taken off, so that the true effect is all of the way there.
    truth = screen.uns["simulation"]
    at = list(truth["rows"]["perturbation"]).index(name)
    assert objective(truth["effect"][ON][[at]])[0] == pytest.approx(1, abs=0.08)


def test_a_state_is_learned_from_labels(screen, anchor, table):
    name = str(table.rows[np.argmax((table.effect[ON] ** 2).sum(1))][1])
    state = planning.CellState(screen, "perturbation", name, "control")
    ranking = planning.rank(anchor, state)
    assert state.accuracy_ > 0.8
    assert name in list(ranking.table(5)["perturbation"])
    assert "log odds" in ranking.unit


def test_any_function_can_be_a_goal(anchor):
    gene = anchor.effects_.genes[0]
    one = planning.rank(anchor, planning.Score(lambda f: f[gene], "change of one gene"))
    other = planning.rank(anchor, Signature(up=[gene]))
    assert list(one.table(10)["perturbation"]) == list(other.table(10)["perturbation"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Signature(), "at least one gene"),
        (Signature(up=["A"], down=["A"]), "both up and down"),
        (Signature(up=["A"], weights={"B": 1}), "either"),
        (Signature(up=["nobody"]), "nobody"),
        (TowardsEffect({"nobody": 1.0}), "nobody"),
        (TowardsEffect({"TF": np.nan}), "TF"),
        (TowardsEffect({}), "not significantly different"),
    ],
)
def test_goals_that_make_no_sense_are_refused(anchor, wrong, said):
    with pytest.raises((ValueError, TypeError), match=said):
        planning.rank(anchor, wrong)


def test_a_goal_like_the_control_is_refused(screen, anchor):
    control = screen[(screen.obs["perturbation"] == "control").to_numpy()]
    with pytest.raises(ValueError, match="not significantly different from the control"):
        planning.rank(anchor, TowardsCells(control[:60]))


def test_cells_without_some_genes_or_counts_are_refused(screen, anchor):
    few = screen[:50, :20].copy()
    with pytest.raises(ValueError, match="lack 100 of the model's 120 genes"):
        planning.rank(anchor, TowardsCells(few))
    logged = ad.AnnData(np.log1p(screen.X[:50].toarray()), obs=screen.obs[:50], var=screen.var)
    with pytest.raises(ValueError, match="X"):
        planning.rank(anchor, TowardsCells(logged))


# Ranking


def test_the_true_pair_is_found_and_the_table_says_how_sure(anchor, goal, screen):
    name = screen.uns["simulation"]["rows"]["perturbation"].iloc[-1]
    rest = EffectAnchor().fit(
        anchor.effects_.subset(np.array([str(p) != name for _, p in anchor.effects_.rows]))
    )
    ranking = planning.rank(rest, goal)
    table = ranking.table()
    assert ranking.n_candidates == len(table) == 12 + 66
    assert list(table["perturbation"]).index(name) < 5
    assert (table["score"].diff().dropna() <= 1e-12).all()
    assert table["p_best"].sum() == pytest.approx(1)
    drawn = table.dropna(subset="sd")
    assert ((drawn["lower"] < drawn["expected"]) & (drawn["expected"] < drawn["upper"])).all()
    np.testing.assert_allclose(drawn["expected_rank"].mean(), (len(drawn) + 1) / 2)


def test_screening_finds_what_predicting_everything_finds(anchor, goal):
    every = planning.rank(anchor, goal, n_joint=5).table()
    few = planning.rank(anchor, goal, n_full=25, n_joint=5).table()
    assert len(few) < len(every)
    assert list(few["perturbation"][:8]) == list(every["perturbation"][:8])
    limits = Constraints(leave_alone=list(anchor.effects_.genes[:20]), max_change=0.2, weight=0.5)
    every = planning.rank(anchor, goal, n_joint=5, constraints=limits).table()
    few = planning.rank(anchor, goal, n_full=25, n_joint=5, constraints=limits).table()
    assert every["feasible"].any() and not every["feasible"].all()
    assert few["perturbation"][0] == every["perturbation"][0]


def test_order_of_candidates_and_genes_does_not_matter(screen, table, goal, rng):
    names = [str(p) for p in table.perturbations]
    one = planning.rank(EffectAnchor().fit(table), goal, names).table()
    shuffled = EffectAnchor().fit(table_of(screen[:, rng.permutation(screen.n_vars)].copy()))
    other = planning.rank(shuffled, goal, list(rng.permutation(names))).table()
    same = ["perturbation", "score", "expected"]
    pd.testing.assert_frame_equal(one[same], other[same], atol=1e-4)
    again = planning.rank(EffectAnchor().fit(table), goal, list(rng.permutation(names))).table()
    pd.testing.assert_frame_equal(one, again, atol=1e-4)


def test_targets_never_measured_are_listed_apart(table, goal):
    names = [f"N{i}" for i in range(3)]
    anchor = EffectAnchor((), "mean").fit(table)
    known = str(next(p for p in table.perturbations if len(p.targets) == 1))
    ranking = planning.rank(anchor, goal, targets=[known, *names])
    assert list(ranking.table()["perturbation"]) == [known]
    assert len(ranking.extrapolated()) == 3 + 6
    assert set(ranking.extrapolated()["regime"]) == {"unseen", "seen1", "seen0"}
    assert "extrapolated()" in repr(ranking)


def test_constraints_bind(anchor, goal):
    genes = list(anchor.effects_.genes[:30])
    singles = [p.targets[0] for p in anchor.effects_.perturbations if len(p.targets) == 1]
    free = planning.rank(anchor, goal)
    best = free.best.split("+")
    limits = Constraints(forbidden=best[:1], max_targets=1)
    table = planning.rank(anchor, goal, constraints=limits).table()
    assert best[0] not in set(table["perturbation"])
    assert not table["perturbation"].str.contains("+", regex=False).any()
    limits = Constraints(cost=dict.fromkeys(singles, 2.0), max_cost=3.0)
    table = planning.rank(anchor, goal, constraints=limits).table()
    assert (table["cost"] == 2).all() and len(table) == len(singles)
    limits = Constraints(leave_alone=genes, max_change=0.1)
    table = planning.rank(anchor, goal, constraints=limits).table()
    within = table["side_effect"] <= 0.1
    assert within.any() and list(table["feasible"]) == list(within)
    assert not table["feasible"].is_monotonic_increasing  # the feasible ones come first
    effects = planning.rank(anchor, goal, constraints=limits).effects(1)
    assert np.sqrt((effects[genes] ** 2).mean(axis=1)).iloc[0] == pytest.approx(
        table["side_effect"][0]
    )


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"allowed": ["TF001"], "forbidden": ["TF001"]}, "both allowed and forbidden"),
        ({"allowed": ["nothing"]}, "not a target"),
        ({"max_change": 0.1}, "leave_alone"),
        ({"max_cost": -1}, "max_cost"),
        ({"min_dose": 2, "max_dose": 1}, "above"),
        ({"unchanged_in": ["elsewhere"]}, "elsewhere"),
        ({"leave_alone": ["nobody"]}, "nobody"),
        ({"forbidden": ["tf002"]}, "Did you mean TF002"),
        ({"cost": {"nothing": 1.0}}, "not a target"),
        ({"cost": {"TF001": -1.0}}, "cost of TF001"),
        ({"leave_alone": ["GENE00000"], "max_change": 1e-9}, "None of 78 candidates"),
    ],
)
def test_contradictory_constraints_are_refused(anchor, goal, limits, said):
    with pytest.raises(ValueError, match=said):
        planning.rank(anchor, goal, constraints=Constraints(**limits))


def test_what_cannot_be_ranked_is_refused(anchor, goal, table):
    with pytest.raises(ValueError, match="empty"):
        planning.rank(anchor, goal, [])
    with pytest.raises(ValueError, match="known are"):
        planning.rank(anchor, goal, context="elsewhere")
    with pytest.raises(TypeError, match="one name"):
        planning.rank(anchor, goal, "TF001")
    with pytest.raises(ValueError, match="risk"):
        planning.rank(anchor, goal, risk="high")
    with pytest.raises(TypeError, match="not a model"):
        planning.rank(3, goal)
    with pytest.raises(TypeError, match="not a goal"):
        planning.rank(anchor, {"TF001": 1})
    score = planning.Score(lambda f: f.iloc[:, 0], "one gene")
    with pytest.raises(ValueError, match="n_full"):
        planning.rank(anchor, score, n_full=5)
    featured = EffectAnchor(TargetFeatures(["X"], np.ones((1, 2)), "some")).fit(table)
    with pytest.raises(UnknownTargetError, match="nobody"):
        planning.rank(featured, goal, ["nobody"])


def test_probabilities_are_those_of_correlated_normals(rng):
    table = of_numbers(rng, n_targets=3, combined=0, sd=0.3)
    anchor = EffectAnchor().fit(table)
    goal = Signature(up=[str(g) for g in table.genes[:5]])
    ranking = planning.rank(anchor, goal, n_draws=4_000, threshold=0.1)
    frame = ranking.table()
    names = [Perturbation.parse(p) for p in frame["perturbation"]]
    joint = anchor.joint(names, ["all"] * len(names), "score")
    scores = np.stack([d[:, :5].mean(1) for d in joint.draws(4_000, seed=9)])
    mean, covariance = scores.mean(0), np.cov(scores.T)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(frame["sd"], sd, rtol=0.1)
    np.testing.assert_allclose(frame["p_success"], norm.sf((0.1 - mean) / sd), atol=0.04)
    drawn = multivariate_normal(mean, covariance, allow_singular=True).rvs(20_000, random_state=0)
    best = np.bincount(drawn.argmax(1), minlength=len(mean)) / 20_000
    np.testing.assert_allclose(frame["p_best"], best, atol=0.04)


def test_risk_orders_by_what_it_says(anchor, goal):
    for risk, column in (("mean", "score"), ("success", "p_success")):
        table = planning.rank(anchor, goal, risk=risk, threshold=0.7).table().dropna(subset="sd")
        assert (table[column].diff().dropna() <= 1e-12).all()
    mean, cautious = (planning.rank(anchor, goal, risk=r).table(1) for r in ("mean", "quantile"))
    assert cautious["lower"][0] >= mean["lower"][0] - 0.02


def test_baselines_and_functions_can_be_ranked(table, goal):
    baseline = Additive().fit(table)
    ranking = planning.rank(baseline, goal)
    assert ranking.table()["sd"].max() < 1e-9
    names = list(ranking.table()["perturbation"])
    asked = [Perturbation.parse(n) for n in names]
    by_hand = goal.objective(planning.as_model(baseline), "all")(
        baseline.predict(asked, ["all"] * len(asked))
    )
    np.testing.assert_allclose(ranking.table()["score"], by_hand)

    def wrong(perturbations, context):
        return np.zeros((1, 3))

    model = planning.OfFunction(wrong, table.genes, {"all": ["A", "B"]})
    with pytest.raises(ValueError, match="shape"):
        planning.rank(model, goal)


def test_results_go_to_scanpy_and_figures(anchor, goal):
    limits = Constraints(leave_alone=list(anchor.effects_.genes[:30]))
    ranking = planning.rank(anchor, goal, constraints=limits)
    found = ranking.to_anndata(20)
    assert found.shape == (20, len(anchor.effects_.genes))
    assert found.obs_names[0] == ranking.best
    np.testing.assert_allclose(found.X, ranking.effects(20), atol=1e-6)
    for kind in ("ranking", "side_effects", "effect"):
        axes = ranking.plot(kind).axes[0]
        assert axes.get_xlabel()
    with pytest.raises(ValueError, match="kind"):
        ranking.plot("other")
    with pytest.raises(ValueError, match="side effects"):
        planning.rank(anchor, goal).plot("side_effects")


def test_the_front_is_what_nothing_beats(rng):
    score, side = rng.random(60), rng.random(60)
    plain = [
        not any(score[j] >= score[i] and side[j] <= side[i] and j != i for j in range(60))
        for i in range(60)
    ]
    assert list(unbeaten(score, side)) == plain


def test_parts_of_a_score_add_up(anchor, goal):
    ranking = planning.rank(anchor, goal)
    pair = next(p for p in ranking.table()["perturbation"] if "+" in p)
    why = ranking.why(pair)
    assert why.parts["adds"].sum() == pytest.approx(why.score)
    by_name = ranking.table().set_index("perturbation")["score"]
    for target in pair.split("+"):
        assert why.parts["alone"][target] == pytest.approx(by_name[target])
    assert why.unknown.sum() == pytest.approx(1)
    single = next(p for p in ranking.table()["perturbation"] if "+" not in p)
    assert ranking.why(single).unknown["its targets"] == 0
    with pytest.raises(KeyError, match="not in the table"):
        ranking.why("nothing")


# Search


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_the_best_of_all_sets(rng, seed):
    table = of_numbers(rng, n_targets=24, combined=30)
    anchor = EffectAnchor().fit(table)
    names = [f"T{i}" for i in range(24)]
    sets = ["+".join(sorted(s)) for k in (1, 2, 3) for s in combinations(names, k)]
    mine = np.random.default_rng(seed).choice(24, 3, replace=False)
    goal = TowardsEffect(pd.Series(table.effect["score"][mine].sum(0), table.genes))
    every = planning.rank(anchor, goal, sets, n_joint=1)
    found = planning.plan(anchor, goal, 3, seed=seed)
    assert sorted(found.best.split("+")) == sorted(every.best.split("+"))
    assert found.n_evaluated < len(sets) / 3
    assert found.history["n_evaluated"].iloc[-1] == found.n_evaluated


def test_the_search_keeps_to_the_constraints(anchor, goal):
    names = sorted(p.targets[0] for p in anchor.effects_.perturbations if len(p.targets) == 1)
    limits = Constraints(
        cost=dict.fromkeys(names, 1.0), max_cost=2.0, forbidden=names[:3], max_targets=3
    )
    found = planning.plan(anchor, goal, 3, constraints=limits)
    chosen = found.table()
    assert (chosen["cost"] <= 2).all()
    assert not any(n in p.split("+") for p in chosen["perturbation"] for n in names[:3])
    with pytest.raises(ValueError, match="not a target"):
        planning.plan(anchor, goal, constraints=Constraints(allowed=["nothing"]))
    with pytest.raises(ValueError, match="No candidates"):
        planning.plan(anchor, goal, constraints=Constraints(forbidden=names))
    with pytest.raises(ValueError, match="n_elite"):
        planning.plan(anchor, goal, n_samples=5, n_elite=6)


def test_the_search_chooses_doses_and_no_target_twice(rng):
    profiles = rng.normal(size=(4, 25))
    labels = [f"D{i}@{d}" for i in range(4) for d in (1, 10, 100)]
    values = np.vstack([profiles[i] * s for i in range(4) for s in (0.1, 0.5, 1.0)])
    frame = pd.DataFrame(values, columns=[f"G{i}" for i in range(25)])
    table = EffectTable.from_frame(frame, labels, sd=np.full(values.shape, 0.02), unit="score")
    anchor = EffectAnchor().fit(table)
    goal = TowardsEffect(pd.Series(profiles[1], frame.columns))
    found = planning.plan(anchor, goal, 2, constraints=Constraints(max_dose=10))
    assert found.best.startswith("D1@10")
    for perturbation in found.ranking.perturbations:
        assert len(set(perturbation.targets)) == len(perturbation.targets)
        assert max(perturbation.doses) <= 10
    assert planning.plan(anchor, goal, 1).best == "D1@100"


@pytest.mark.parametrize("risk", ["expected", "quantile", "success"])
def test_the_search_can_be_careful(anchor, goal, risk):
    small = {"n_samples": 20, "n_elite": 5, "n_rounds": 4, "n_restarts": 1}
    found = planning.plan(anchor, goal, 2, risk=risk, **small)
    every = planning.rank(anchor, goal, risk=risk, n_joint=78)
    if risk == "success":  # several succeed in all draws
        assert found.table(1)["p_success"][0] >= every.table(1)["p_success"][0] - 0.05
    else:
        assert found.best in list(every.table(5)["perturbation"])


# Reverse


def test_cells_are_traced_to_what_made_them(screen, table):
    rng = np.random.default_rng(0)
    half = rng.random(screen.n_obs) < 0.5
    anchor = EffectAnchor().fit(table_of(screen[half]))
    control = (screen.obs["perturbation"] == "control").to_numpy()
    cells = screen[~half & ~control]
    found = planning.reverse(anchor, cells, "perturbation", controls=screen[half & control])
    truth = {g: g for g in found.groups.index}
    ranks = found.ranks(truth)
    assert found.recall(truth, 1) == (ranks == 1).mean() > 0.5
    assert found.recall(truth, 5) > 0.85
    assert found.ndcg(truth) == pytest.approx((1 / np.log2(1 + ranks)).mean())
    assert (found.groups["called"] != "none of these").mean() > 0.9
    # The order is that of squared distances.
    one = found.table(found.groups.index[0])
    mean = np.asarray(anchor.effects_.control[ON]["all"], float)
    names = [Perturbation.parse(p) for p in one["perturbation"]]
    effects = anchor.predict(names, ["all"] * len(names), ON).mean
    mine = cells[(cells.obs["perturbation"] == found.groups.index[0]).to_numpy()]
    apart = planning.as_model(anchor).log1p_counts(mine).toarray().mean(0) - mean
    assert (np.diff(((effects - apart) ** 2).sum(1)) >= -1e-5).all()


def test_control_cells_are_none_of_these(screen, anchor):
    control = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    rng = np.random.default_rng(1)
    order = rng.permutation(control.n_obs)
    mine, rest = control[order[:150]].copy(), control[order[150:]]
    mine.obs["group"] = [f"g{i % 15}" for i in range(150)]
    found = planning.reverse(anchor, mine, "group", controls=rest)
    assert (found.groups["called"] == "none of these").mean() >= 0.8
    open_ = planning.reverse(anchor, mine, "group")
    assert (
        open_.groups["pvalue"].isna().all()
        and (open_.groups["called"] == open_.groups["best"]).all()
    )
    with pytest.raises(ValueError, match="obs has no column"):
        planning.reverse(anchor, mine, "nothing")
    with pytest.raises(ValueError, match="too few to calibrate"):
        planning.reverse(anchor, mine, "group", controls=rest[:10])
    with pytest.raises(ValueError, match="which group"):
        found.table()


# Design and power


def test_a_design_takes_off_what_conditioning_takes_off(rng):
    anchor = EffectAnchor().fit(of_numbers(rng, sd=0.3))
    names = ["+".join(p) for p in combinations([f"T{i}" for i in range(8)], 2)]
    names = [n for n in names if Perturbation.parse(n) not in anchor.effects_.perturbations]
    found = planning.design(anchor, 3, names, n_cells=1)
    asked = [Perturbation.parse(n) for n in names]
    covariance, noise = anchor.unknown(asked, "all", "score")
    at = [names.index(p) for p in found.table()["perturbation"]]
    block = covariance[np.ix_(at, at)] + noise * np.eye(3)
    left = covariance - covariance[:, at] @ np.linalg.solve(block, covariance[at])
    assert found.table()["reached"].iloc[-1] == pytest.approx(np.trace(left) / np.trace(covariance))
    first = (covariance**2).sum(0) / (np.diag(covariance) + noise)
    assert first[at[0]] == pytest.approx(first.max())


def test_what_is_unknown_together_is_left_by_the_process(rng):
    anchor = EffectAnchor().fit(of_numbers(rng, sd=0.3))
    process = anchor._fit_of("score").singles.unseen._of_combinations
    asked = [Perturbation.parse(p) for p in ("T5+T6", "T6+T7", "T0+T1")]
    measured = [p for _, p in anchor.effects_.rows]
    covariance = anchor.unknown(asked, "all", "score")[0]

    def prior(one, other):
        found = process._covariance([one], [other])[0, 0]
        return found + process.variances[-1] * (one == other and len(one.targets) > 1)

    near = np.array([[prior(a, m) for m in measured] for a in asked])
    whole = np.array([[prior(a, m) for m in measured] for a in measured])
    whole += process.denoiser.noise("all", np.arange(len(measured)))
    own = np.array([[prior(a, b) for b in asked] for a in asked])
    np.testing.assert_allclose(covariance, own - near @ np.linalg.solve(whole, near.T), atol=1e-10)


def test_a_design_for_a_goal_covers_the_draws(anchor, goal):
    found = planning.design(anchor, 4, goal=goal, threshold=0.6)
    reached = found.table()["reached"]
    assert reached.is_monotonic_increasing and reached.iloc[0] > found.table()["random"].iloc[0]
    assert "0.6" in found.measure
    assert found.plot().axes
    with pytest.raises(ValueError, match="fewer than"):
        planning.design(anchor, 10_000)
    with pytest.raises(TypeError, match="unknown of perturbations together"):
        planning.design(Additive().fit(anchor.effects_), 2)


def test_power_is_what_tests_of_cells_find():
    # Independent genes with a normal spread, of which a quarter change.
    rng = np.random.default_rng(0)
    change = np.where(np.arange(400) < 100, 0.5, 0.0)
    effects = np.vstack([change, rng.normal(size=(6, 400))])
    names = [f"T{i}" for i in range(7)]
    frame = pd.DataFrame(effects, columns=[f"G{i}" for i in range(400)])
    table = EffectTable.from_frame(
        frame, names, sd=np.full(effects.shape, 1e-3), n=np.full(7, 1e6), unit="score"
    )
    found = planning.power(EffectAnchor().fit(table), "T0", n_cells=[20, 50], n_draws=10)
    for n, expected in zip(found.frame["n_cells"], found.frame["power"], strict=True):
        shares = []
        for _ in range(20):
            cells = change + rng.normal(size=(n, 400))
            p = 2 * norm.sf(np.abs(cells.mean(0)) * np.sqrt(n))
            order = np.sort(p)
            under = np.flatnonzero(order <= 0.05 * np.arange(1, 401) / 400)
            level = order[under[-1]] if len(under) else 0
            shares.append((p <= level)[:100].mean())
        assert expected == pytest.approx(np.mean(shares), abs=0.05)
    assert found.n_cells == (50 if found.frame["power"][1] >= 0.8 else None)
    assert planning.power(EffectAnchor().fit(table), "T0", n_cells=5_000).n_cells == 5_000
    with pytest.raises(ValueError, match="empty"):
        planning.power(EffectAnchor().fit(table), "T0", n_cells=[])
    assert found.n_changed == pytest.approx(100, abs=3)


# The model


def test_a_model_ranks_plans_and_traces(model):
    cells = model.adata
    name = str(model.anchor.effects_.perturbations[-1])
    here = (cells.obs["context"] == "context0").to_numpy()
    wanted = cells[here & (cells.obs["perturbation"] == name).to_numpy()]
    goal = TowardsCells(wanted)
    ranking = model.rank_perturbations(goal, context="context0")
    assert name in list(ranking.table(5)["perturbation"])
    selective = model.rank_perturbations(
        goal,
        context="context0",
        constraints=Constraints(unchanged_in=["context1"], weight=1.0),
    )
    assert selective.table(1)["side_effect"][0] <= _side(model, ranking.best) + 1e-6
    with pytest.raises(ValueError, match="Say in which context"):
        model.rank_perturbations(goal)
    with pytest.raises(UnknownTargetError):
        model.rank_perturbations(goal, context="context0", candidates=["nobody"])
    energies = planning.latent_energy(
        model, wanted, list(ranking.table(8)["perturbation"]), "context0", n_cells=100
    )
    assert energies["energy"].is_monotonic_increasing and energies["score"].max() > 0
    both = ranking.frame.set_index("perturbation")["score"][energies["perturbation"]]
    expected = both.reset_index(drop=True).corr(energies["score"], method="spearman")
    assert ranking.agreement(energies) == pytest.approx(expected)
    found = planning.reverse(model, wanted, context="context0")
    assert found.groups["pvalue"].notna().all()
    assert list(found.table()["perturbation"]).index(name) < 3


def _side(model, perturbation):
    effects = model.predict_effects(perturbation, "context1")["effect"]
    return np.sqrt((effects**2).mean())


def test_a_loaded_model_ranks_the_same(model, tmp_path):
    goal = Signature(up=[str(model.genes[0]), str(model.genes[5])])
    one = model.rank_perturbations(goal, context="context1").table()
    model.save(tmp_path / "model")
    loaded = gpjepa.GPJEPA.load(str(tmp_path / "model"), adata=False)
    pd.testing.assert_frame_equal(one, loaded.rank_perturbations(goal, context="context1").table())


def test_the_command_line_plans_and_designs(model, tmp_path):
    model.save(tmp_path / "model")
    cells = model.adata
    name = str(model.anchor.effects_.perturbations[-1])
    wanted = cells[
        (cells.obs["context"] == "context0").to_numpy() & (cells.obs["perturbation"] == name)
    ]
    wanted = wanted.copy()
    wanted.write_h5ad(tmp_path / "wanted.h5ad")
    at = ["plan", str(tmp_path / "model"), "--context", "context0"]
    files = ["--out", str(tmp_path / "table.csv"), "--figure", str(tmp_path / "ranking.png")]
    result = run(app, [*at, "--goal", str(tmp_path / "wanted.h5ad"), *files])
    assert result.exit_code == 0, result.output
    ranking = model.rank_perturbations(TowardsCells(wanted), context="context0")
    found = pd.read_csv(tmp_path / "table.csv")
    np.testing.assert_allclose(found["score"], ranking.frame["score"], rtol=1e-6)
    assert (tmp_path / "ranking.png").stat().st_size > 5_000
    effect = pd.DataFrame({"gene": model.genes, "effect": np.arange(60) / 60})
    effect.to_csv(tmp_path / "effect.csv", index=False)
    search = ["--goal", str(tmp_path / "effect.csv"), "--max-targets", "3", "--json"]
    result = run(app, [*at, *search])
    assert result.exit_code == 0, result.output
    goal = TowardsEffect(effect.set_index("gene")["effect"])
    assert (
        json.loads(result.stdout)["best"] == planning.plan(model, goal, 3, context="context0").best
    )
    some = ["design", *at[1:], "-n", "3", "--json"]
    result = run(app, some)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["table"]
    assert [r["perturbation"] for r in rows] == list(
        planning.design(model, 3, context="context0").table()["perturbation"]
    )
    for wrong, said in (
        ([*at], "--goal FILE"),
        ([*at, "--up", "nobody"], "nobody"),
        ([*at, "--goal", str(tmp_path / "none.csv")], "no file"),
        (
            [*at, "--up", str(model.genes[0]), "--out", str(tmp_path / "table.csv")],
            "already exists",
        ),
        ([*at[:2], "--up", str(model.genes[0])], "--context"),
    ):
        result = run(app, wrong)
        assert result.exit_code == 1
        assert said in " ".join(result.stderr.split()), result.stderr


# What was found by trying to break it


def test_a_score_that_is_no_number_is_refused(anchor):
    def score(effects):
        return np.where(effects.index == 3, np.nan, 1.0)

    for call in (planning.rank, planning.plan):
        with pytest.raises(ValueError, match="finite"):
            call(anchor, planning.Score(score, "nothing"))


def test_what_is_unknown_does_not_depend_on_what_else_is_asked(rng):
    values = rng.normal(size=(6, 20))
    labels = ["D0@1", "D0@10", "D1@1", "D1@10", "D2@1", "D3@1"]
    frame = pd.DataFrame(values, columns=[f"G{i}" for i in range(20)])
    table = EffectTable.from_frame(frame, labels, sd=np.full(values.shape, 0.3), unit="score")
    anchor = EffectAnchor().fit(table)
    asked = [Perturbation.parse(p) for p in ("D0@10", "D0@1", "D2@5", "D2@1", "D4@1", "D4@5")]
    whole = anchor.unknown(asked, "all", "score")[0]
    for i, p in enumerate(asked):
        assert anchor.unknown([p], "all", "score")[0][0, 0] == pytest.approx(whole[i, i])
    assert np.linalg.eigvalsh(whole).min() > -1e-9
    found = planning.design(anchor, 3, [str(p) for p in asked], n_cells=1).table()
    assert found[["reached", "lower", "upper"]].stack().between(0, 1).all()


def test_a_design_for_a_goal_is_not_judged_by_the_draws_that_chose_it(rng):
    values = np.zeros((40, 10))
    names = [f"T{i}" for i in range(40)]
    frame = pd.DataFrame(values, columns=[f"G{i}" for i in range(10)])
    model = planning.OfFunction(
        lambda p, context: (np.zeros((len(p), 10)), np.ones((len(p), 10))),
        frame.columns,
        {"all": names},
    )
    goal = Signature(up=["G0"])
    reached = [
        planning.design(model, 3, names, goal=goal, threshold=1.5, seed=s).table().iloc[-1]
        for s in range(20)
    ]
    # All candidates are alike: 1 - (1 - P(z > 1.5))³.
    expected = 1 - norm.cdf(1.5) ** 3
    assert np.mean([r["reached"] for r in reached]) == pytest.approx(expected, abs=0.025)
    assert np.mean([r["random"] for r in reached]) == pytest.approx(expected, abs=0.025)


def test_library_sizes_of_the_whole_cell_must_be_given(screen):
    cells = screen.copy()
    cells.obs["whole"] = np.asarray(cells.X.sum(1)).ravel() * 7
    known = {x: Perturbation.parse(x) for x in set(cells.obs["perturbation"].astype(str))}
    perturbations = [known[x] for x in cells.obs["perturbation"].astype(str)]
    library = cells.obs["whole"].to_numpy(float)
    table = effect_table(cells.X, library, perturbations, ["all"] * cells.n_obs, cells.var_names)
    anchor = EffectAnchor().fit(table)
    name = str(table.rows[0][1])
    goal = TowardsCells(cells[(cells.obs["perturbation"] == name).to_numpy()])
    with pytest.raises(ValueError, match="library_size_key"):
        planning.rank(anchor, goal)
    model = planning.OfPredictor(anchor, library_size_key="whole")
    assert name in list(planning.rank(model, goal).table(3)["perturbation"])


def test_names_of_a_ranking_can_be_asked_for():
    screen = simulate(900, 40, n_targets=4, n_combinations=3, seed=2)
    labels = screen.obs["perturbation"].astype(str).str.replace("+", "_")
    screen.obs["perturbation"] = labels.str.replace("TF0", "TF-0")
    fitted = train_quickly(screen, separator="_", model={"response": None})
    goal = Signature(up=[str(fitted.genes[1])])
    names = list(fitted.rank_perturbations(goal).table()["perturbation"])
    assert len(names) == 10 and not any("+" in n for n in names)
    again = planning.rank(fitted, goal, names).table()
    assert sorted(again["perturbation"]) == sorted(names)
    assert set(fitted.predict_effects(names)["perturbation"]) == set(names)
    written = ["_".join(reversed(n.split("_"))) for n in names]
    assert list(planning.rank(fitted, goal, written).table()["perturbation"]) != names


def test_targets_that_cannot_be_predicted_alone_are_left_out(rng):
    values = rng.normal(size=(4, 12))
    frame = pd.DataFrame(values, columns=[f"G{i}" for i in range(12)])
    labels = ["T0", "T1", "T2", "T2+X"]
    table = EffectTable.from_frame(frame, labels, sd=np.full(values.shape, 0.1), unit="score")
    features = TargetFeatures(["T0", "T1", "T2"], rng.normal(size=(3, 2)), "some")
    goal = Signature(up=["G0"])
    with pytest.warns(UserWarning, match="1 targets are left out.*X"):
        ranking = planning.rank(EffectAnchor(features).fit(table), goal)
    assert ranking.n_candidates == 6
    assert "T2+X" not in set(ranking.table()["perturbation"])


def test_a_limit_counts_in_what_is_best(anchor, goal):
    limits = Constraints(leave_alone=list(anchor.effects_.genes[:20]), max_change=0.15)
    table = planning.rank(anchor, goal, constraints=limits).table().dropna(subset="p_best")
    within = table["feasible"]
    assert table["p_best"][within].sum() > table["p_best"][~within].sum()
    gene = str(anchor.effects_.genes[3])
    with pytest.raises(ValueError, match="leave_alone"):
        planning.rank(anchor, Signature(up=[gene]), constraints=Constraints(leave_alone=[gene]))


def test_draws_of_a_function_do_not_depend_on_their_place(table):
    def function(perturbations, context):
        effects = np.array([[len(p.targets)] * len(table.genes) for p in perturbations], float)
        return effects, np.ones_like(effects)

    model = planning.OfFunction(function, table.genes, {"all": ["A", "B", "A+B"]})
    goal = Signature(up=list(table.genes[:3]))
    one, other = (
        planning.rank(model, goal, names).table().set_index("perturbation").sort_index()
        for names in (["A", "B", "A+B"], ["A+B", "B", "A"])
    )
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("n", [60, 150])
def test_other_control_cells_are_no_goal(screen, n):
    control = np.flatnonzero((screen.obs["perturbation"] == "control").to_numpy())
    few, rest = control[:30], control[30:][:n]
    kept = np.setdiff1d(np.arange(screen.n_obs), control[30:])
    assert set(few) <= set(kept)
    anchor = EffectAnchor().fit(table_of(screen[kept]))
    with pytest.raises(ValueError, match="not significantly different"):
        planning.rank(anchor, TowardsCells(screen[rest]))


def test_known_pairs_of_other_contexts_are_among_the_candidates():
    screen = simulate(2_400, 60, n_targets=8, n_combinations=8, n_contexts=2, seed=4)
    here = (screen.obs["context"] == "context0").to_numpy()
    pair = screen.obs["perturbation"].astype(str).str.contains("+", regex=False).to_numpy()
    anchor = EffectAnchor().fit(table_of(screen[~(here & pair)], "context"))
    genes = list(map(str, anchor.effects_.genes[:3]))
    few, every = (
        planning.rank(anchor, Signature(up=genes), context="context0", n_full=n, n_joint=2).table()
        for n in (10, 100)
    )
    assert list(few["perturbation"][:3]) == list(every["perturbation"][:3])
    elsewhere = {str(p) for c, p in anchor.effects_.rows if c == "context1" and len(p.targets) > 1}
    assert elsewhere <= set(few["perturbation"])


def test_a_target_s_own_gene_is_screened(anchor):
    singles = [p for p in anchor.effects_.perturbations if len(p.targets) == 1]
    sums = anchor.pair_sums(singles, "all", ON)
    genes = {g: i for i, g in enumerate(anchor.effects_.genes)}
    pairs = [(i, j) for i, j in combinations(range(len(singles)), 2)]
    asked = [Perturbation.of([singles[i].targets[0], singles[j].targets[0]]) for i, j in pairs]
    new = [k for k, p in enumerate(asked) if p not in anchor.effects_.perturbations]
    predicted = anchor.predict([asked[k] for k in new], ["all"] * len(new), ON).mean
    own = np.array([predicted[n, genes[asked[k].targets[0]]] for n, k in enumerate(new)])
    made = np.array([sums.effect(*pairs[k])[genes[asked[k].targets[0]]] for k in new])
    assert np.corrcoef(own, made)[0, 1] > 0.97
