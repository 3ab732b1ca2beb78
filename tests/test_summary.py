import numpy as np
import pandas as pd
import pytest
from helpers import train_quickly
from sklearn.exceptions import NotFittedError

from gpjepa import GPJEPA
from gpjepa.effects import EffectAnchor, Gate, control_halves, noise_corrected_error
from gpjepa.model._summary import in_words
from gpjepa.response import METHODS, Judged
from gpjepa.response._judge import folds


def judged(gates=None, **rows):
    """Errors by regime: of GP-JEPA and of no change."""
    columns = ["regime", *METHODS, "no change"]
    found = [[r, *[e] * 5, b] for r, pairs in rows.items() for e, b in pairs]
    return Judged(gates or {}, pd.DataFrame(found, columns=columns), None)


def test_a_summary_says_how_well_what_was_hidden_is_predicted_and_what_to_expect():
    half = {"seen2": Gate(0.4, 9, 0.0, 0.0, 0.0)}
    found = judged(
        half, seen2=[(1, 10), (2, 10)], unseen=[(9, 10)], seen0=[(10, 10)], seen1=[(1, -1)]
    )
    lines = in_words(found).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Measured effects were hidden in turn")
    assert "GP-JEPA 0.59, anchor 0.59" in lines[1]  # 23 of 39
    assert lines[2] == (
        "What to expect: predicted well: combinations of targets that were all measured alone (0.15, "
        "2 hidden, 40% of the network); predicted in part: targets never perturbed (0.90, 1 "
        "hidden); no better than predicting no change: combinations of which no target was measured "
        "alone (1.00, 1 hidden); no measurable effect: combinations of which some targets were "
        "measured alone (–, 1 hidden)."
    )


def test_a_gate_that_nothing_judged_is_called_a_default():
    found = judged({"seen2": Gate(0.5, 3, 0.0, 0.0, 0.0)}, seen2=[(1, 10)] * 3)
    assert "(0.10, 3 hidden, 50% of the network by default)" in in_words(found)


def test_nothing_hidden_is_said():
    text = in_words(judged())
    assert "half of the network" not in text  # there is none
    assert "half of the network" in in_words(judged({"seen2": Gate(0.5, 0, 0.0, 0.0, 0.0)}))
    assert "no estimate yet of how well new perturbations are predicted" in text
    assert len(text.splitlines()) == 3


def test_errors_are_those_of_the_rows_that_were_hidden(model):
    """Against refits by hand, with either half of the controls."""
    found = model.response_.judged.errors
    halves = control_halves(model.anchor.effects_, "mean_log1p")
    by_hand = []
    for k, hidden in enumerate(folds(model.anchor)):
        known, measured = halves[:: 1 if k % 2 else -1]
        known, measured = known.subset(~hidden), measured.subset(hidden)
        asked = [p for _, p in measured.rows], [c for c, _ in measured.rows]
        anchor = EffectAnchor((), "mean").fit(known).predict(*asked, "mean_log1p")
        truth = measured.effect["mean_log1p"], measured.noise("mean_log1p")
        scored = np.array([~np.isin(model.genes, p.targets) for p in asked[0]])
        by_hand += [
            (regime, *errors)
            for regime, *errors in zip(
                anchor.regime,
                noise_corrected_error(anchor.mean, *truth, scored),
                noise_corrected_error(0 * anchor.mean, *truth, scored),
                strict=True,
            )
        ]
    regimes, of_anchor, nothing = zip(*by_hand, strict=True)
    assert list(found["regime"]) == list(regimes)
    np.testing.assert_allclose(found["anchor"], of_anchor, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["no change"], nothing, rtol=1e-4, atol=1e-4)
    shut = ~found["regime"].isin([r for r, g in model.response_.judged.gates.items() if g.gate])
    np.testing.assert_allclose(found["GP-JEPA"][shut], found["anchor"][shut])


def test_rows_are_hidden_by_target_combination_and_context(model):
    rows = model.anchor.effects_.rows
    found = [{rows[i] for i in np.flatnonzero(hidden)} for hidden in folds(model.anchor)]
    assert len(found) == 12  # five of targets, five of combinations, two contexts
    assert all(len(hidden) < len(rows) for hidden in found)
    for hidden in found[:5]:
        singles = {p.targets[0] for _, p in hidden if len(p.targets) == 1}
        assert {row for row in rows if singles & {*row[1].targets}} == hidden
    assert found[10:] == [{row for row in rows if row[0] == c} for c in ("context0", "context1")]


def test_a_summary_is_kept_with_the_model(model, tmp_path):
    model.save(tmp_path / "model")
    assert GPJEPA.load(tmp_path / "model", adata=False).summary() == model.summary()


def test_an_untrained_model_has_no_summary(simulated):
    adata = simulated.copy()
    GPJEPA.setup_anndata(adata)
    with pytest.raises(NotFittedError, match="not trained"):
        GPJEPA(adata).summary()


@pytest.mark.parametrize("shown", [True, False])
def test_training_writes_a_line_for_each_stage_off_a_terminal(simulated, capsys, caplog, shown):
    with caplog.at_level("INFO"):
        train_quickly(simulated, train={"max_epochs": 1, "enable_progress_bar": shown})
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "Seed set" not in line]
    names = [line.split(" (")[0] for line in lines]
    expected = ["Mean effects: hidden in turn", "Stage A: cell states"]
    expected += ["Anchor: out of fold", "Stages B and C: populations"]
    assert names == (expected if shown else [])
    assert captured.out == ""
    noise = [r.message for r in caplog.records if "lightning.pytorch" in r.name]
    assert noise == []
