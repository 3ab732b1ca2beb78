import numpy as np
import pandas as pd
import pytest
from helpers import train_quickly
from sklearn.exceptions import NotFittedError

from gpjepa import GPJEPA
from gpjepa.effects import effect_table, noise_corrected_error
from gpjepa.model._held_out import HeldOut
from gpjepa.model._training_cells import TrainingCells


def errors(**rows):
    """Errors by regime: of GP-JEPA and of no change."""
    columns = ["GP-JEPA", "anchor", "network", "additive", "mean effect", "no change"]
    found = [(r, [*e, *e[:1] * 4, b]) for r, pairs in rows.items() for *e, b in pairs]
    return pd.DataFrame([v for _, v in found], [r for r, _ in found], columns)


def test_a_summary_says_what_was_held_out_how_well_and_what_to_expect():
    table = errors(seen2=[(1, 10), (2, 10)], unseen=[(9, 10)], seen0=[(10, 10)], seen1=[(1, -1)])
    lines = HeldOut("5 perturbations", table, {"seen2": 0.4}).text().splitlines()
    assert len(lines) == 3
    assert lines[0] == "Held out: 5 perturbations and half of the control cells."
    assert "GP-JEPA 0.59, anchor 0.59" in lines[1]  # 23 of 39
    assert lines[2] == (
        "What to expect: predicted well: combinations of targets that were all measured alone (0.15, "
        "2 held out, 40% of the network); predicted in part: targets never perturbed (0.90, 1 held "
        "out); no better than predicting no change: combinations of which no target was measured "
        "alone (1.00, 1 held out); no measurable effect: combinations of which some targets were "
        "measured alone (–, 1 held out)."
    )


def test_nothing_held_out_is_said():
    text = HeldOut("a tenth of the cells (only 3 perturbations)", None, {}).text()
    assert "no estimate yet of how well new perturbations are predicted" in text
    assert len(text.splitlines()) == 3


def test_errors_are_those_of_the_rows_that_were_held_out(model):
    """Against errors computed anew from the cells."""
    cells = model._training_cells()
    data = TrainingCells(cells, model.genes)
    holdout, out = data.holdout, data.out
    assert f"{len(holdout.units)} perturbations" in model.summary()
    found = model.response_.held_out.errors
    table = effect_table(
        cells.counts,
        cells.library,
        cells.perturbations,
        cells.contexts,
        model.genes,
        out,
        batches=[str(b) for b in cells.batch],
    )
    keep = np.array([p in holdout.units for _, p in table.rows])
    table = table.subset(keep)
    scored = np.array([~np.isin(model.genes, p.targets) for _, p in table.rows])
    by_hand = noise_corrected_error(
        np.zeros_like(table.effect["mean_log1p"]),
        table.effect["mean_log1p"],
        table.noise("mean_log1p"),
        scored,
    )
    assert len(found) == len(table.rows)
    np.testing.assert_allclose(sorted(found["no change"]), sorted(by_hand), rtol=1e-5)
    assert set(found.index) == set(model.response_.gate)
    gated = pd.Series({r: g.gate for r, g in model.response_.gate.items()})
    shut = found[[gated[r] == 0 for r in found.index]]
    np.testing.assert_allclose(shut["GP-JEPA"], shut["anchor"])


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
    expected = ["Stage A: cell states", "Anchor: closed form", "Stages B and C: response"]
    assert names == (expected if shown else [])
    assert captured.out == ""
    noise = [r.message for r in caplog.records if "lightning.pytorch" in r.name]
    assert noise == []
