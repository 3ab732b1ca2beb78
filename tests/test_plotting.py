import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import python
from matplotlib.figure import Figure
from scipy.stats import norm, ttest_ind

from gpjepa import effects, plotting


@pytest.fixture
def frame(rng):
    """Effects of three perturbations on sixty genes."""
    genes = [f"G{i:02d}" for i in range(60)]
    return pd.concat(
        pd.DataFrame(
            {
                "perturbation": p,
                "context": "all",
                "gene": genes,
                "effect": rng.normal(0, s, 60),
                "sd": 0.1,
            }
        )
        for p, s in (("A", 0.05), ("B", 0.3), ("A+B", 0.5))
    )


@pytest.fixture
def one(frame):
    return frame[frame["perturbation"] == "B"]


def scored(one):
    return pd.DataFrame(
        {
            "perturbation": "B",
            "context": "all",
            "set": [f"SET_{i}" for i in range(20)],
            "score": np.linspace(-5, 5, 20),
            "padj": np.linspace(0, 1, 20),
        }
    )


def test_a_volcano_colours_the_genes_whose_interval_excludes_no_change(one):
    axes = plotting.volcano(one, return_fig=False)
    points = axes.collections[0]
    z = (one["effect"] / one["sd"]).to_numpy()
    p = 2 * norm.sf(np.abs(z))
    np.testing.assert_allclose(points.get_offsets()[:, 1], -np.log10(p))
    up, down = (z > 1.96).sum(), (z < -1.96).sum()
    assert f"{up} genes up, {down} down" in axes.get_title("left")
    colors = points.get_facecolors()[:, :3].round(3).tolist()
    assert len({tuple(c) for c in colors}) == 3
    assert colors.count(colors[int(np.argmin(np.abs(z)))]) == 60 - up - down
    shown = {t.get_text() for t in axes.texts}
    top = one.assign(z=np.abs(z))[np.abs(z) > 1.96]
    assert shown == set(top.loc[top["effect"].abs().nlargest(12).index, "gene"])


def test_labels_do_not_overlap(one):
    figure = plotting.volcano(one)
    boxes = [t.get_window_extent(figure.canvas.get_renderer()) for t in figure.axes[0].texts]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(a.overlaps(b) for a, b in pairs) <= 1


def test_a_heat_map_holds_the_effects_of_the_strongest_genes(frame):
    axes = plotting.effect_heatmap(frame, n_genes=10, return_fig=False)
    genes = [t.get_text() for t in axes.get_yticklabels()]
    names = [t.get_text() for t in axes.get_xticklabels()]
    wide = frame.pivot(index="gene", columns="perturbation", values="effect")
    assert set(genes) == set(wide.abs().max(axis=1).nlargest(10).index)
    np.testing.assert_array_equal(axes.images[0].get_array(), wide.loc[genes, names])


def test_bars_of_gene_sets_are_grey_where_nothing_is_significant(one):
    axes = plotting.enrichment(scored(one), return_fig=False)
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == sorted(widths)
    assert len(widths) == 15
    colors = {bar.get_facecolor() for bar, w in zip(axes.patches, widths, strict=True) if w > 0}
    assert len(colors) == 1  # all of them have p above .05


@pytest.mark.parametrize(
    "draw",
    [
        lambda frame, one, **k: plotting.volcano(one, **k),
        lambda frame, one, **k: plotting.effect_heatmap(frame, **k),
        lambda frame, one, **k: plotting.enrichment(scored(one), **k),
        lambda frame, one, **k: plotting.top_genes(
            one.assign(measured=one["effect"], additive=0.0, **{"GP-JEPA": one["effect"]}), **k
        ),
        lambda frame, one, **k: plotting.method_errors(
            pd.DataFrame({"method": ["no change", "x"], "squared_error": [1.0, 0.5]}), **k
        ),
        lambda frame, one, **k: plotting.explanation(
            pd.DataFrame(np.ones((2, 3)), list("ab"), list("xyz")),
            pd.Series(2.0, list("xyz")),
            pd.Series(1.0, list("xyz")),
            **k,
        ),
    ],
)
def test_figures_draw_where_they_are_told_to(frame, one, draw):
    assert isinstance(draw(frame, one), Figure)
    figure, axes = plt.subplots()
    assert draw(frame, one, ax=axes, return_fig=False) is axes
    assert draw(frame, one, ax=axes) is figure
    plt.close(figure)


def test_several_perturbations_in_a_figure_of_one_are_refused(frame):
    with pytest.raises(ValueError, match="found 3, such as"):
        plotting.volcano(frame)


# Enrichment


def test_enrichment_is_a_test_of_the_sets_genes_against_the_others(frame):
    """ULM's slope on membership is Student's t of two groups with one variance."""
    genes = frame["gene"].unique()
    sets = {"few": genes[:3], "some": genes[:10], "many": [*genes[30:], "elsewhere"]}
    table = effects.enrichment(frame, sets, targets={"B": ["G00"]})
    assert list(table.columns) == [
        "perturbation",
        "context",
        "set",
        "score",
        "pvalue",
        "padj",
        "n_genes",
    ]
    assert set(table["set"]) == {"some", "many"}
    assert dict(zip(table["set"], table["n_genes"], strict=True)) == {"some": 10, "many": 30}
    for label in ("A", "B"):
        mine = frame[frame["perturbation"] == label].set_index("gene")
        z = mine["effect"] / mine["sd"]
        if label == "B":
            z["G00"] = 0  # the target's own effect is no evidence
        inside = z.index.isin(sets["some"])
        t, p = ttest_ind(z[inside], z[~inside])
        row = table[(table["perturbation"] == label) & (table["set"] == "some")].iloc[0]
        assert row["score"] == pytest.approx(t, rel=1e-6)
        assert row["pvalue"] == pytest.approx(p, rel=1e-6)
    with pytest.raises(ValueError, match="None of the 1 gene sets has 5 of the 60 genes"):
        effects.enrichment(frame, {"other": ["X", "Y"]})


def test_a_model_leaves_out_the_targets_of_each_perturbation(model, held_out):
    genes = list(model.genes)
    target = held_out.split("+")[0]
    sets = {"with": [target, *genes[50:60]], "others": genes[:40]}
    found = model.predict_enrichment(held_out, sets, "context0")
    frame = model.predict_effects(held_out, "context0")
    by_hand = effects.enrichment(frame, sets, targets={held_out: held_out.split("+")})
    pd.testing.assert_frame_equal(found, by_hand)
    assert not found["score"].equals(effects.enrichment(frame, sets)["score"])


def test_a_missing_extra_is_named(frame, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "decoupler", None)
    with pytest.raises(ImportError, match=r"pip install 'gpjepa\[enrichment\]'"):
        effects.enrichment(frame, {"some": frame["gene"].unique()[:10]})


def test_an_overview_shows_the_focus_beside_the_best_other_method():
    """A line per data set; the rival is the best that is neither an oracle nor the focus itself."""
    values = {"ours": 0.4, "ours (gate 0)": 0.3, "good": 0.5, "poor": 0.9, "mean": 1.1, "half": 0.1}
    roles = {"mean": "floor", "half": "ceiling"}
    rows = [
        {
            "data": d,
            "kind": "doubles",
            "method": m,
            "entry": m.split(" (")[0],
            "metric": "error",
            "role": roles.get(m, "method"),
            "value": v + shift,
            "low": v - 0.1,
            "high": v + 0.1,
            "label": "error",
            "direction": "lower",
            "best": 0.0,
        }
        for d, shift in (("a", 0), ("b", 0.2))
        for m, v in values.items()
    ]
    (axes,) = plotting.benchmark_overview(pd.DataFrame(rows), "ours", "error").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["ours"] == [[0.4, 1], [pytest.approx(0.6), 0]]
    assert lines["best other method"] == [[0.5, 1], [pytest.approx(0.7), 0]]
    assert {t.get_text() for t in axes.texts} == {"good"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b\ndoubles", "a\ndoubles"]
    with pytest.raises(ValueError, match="no values of 'error' for 'theirs'"):
        plotting.benchmark_overview(pd.DataFrame(rows), "theirs", "error")


def test_notebooks_draw_figures_before_pyplot_is_used():
    pytest.importorskip("IPython", reason="IPython, which notebooks bring, is not installed")
    said = python(
        """
import sys, types
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
import pandas as pd, gpjepa
figure = gpjepa.plotting.history({"train_loss": pd.DataFrame({"train_loss": [2.0, 1.0]})})
data, _ = shell.display_formatter.format(figure)
print(sorted(data))
"""
    )
    assert said.strip() == "['image/png', 'text/plain']"


def test_notebooks_keep_the_format_that_they_were_told():
    pytest.importorskip("IPython", reason="IPython, which notebooks bring, is not installed")
    said = python(
        """
import sys, types
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
shell = InteractiveShell.instance()
select_figure_formats(shell, {"svg"})
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
import pandas as pd, gpjepa
figure = gpjepa.plotting.history({"train_loss": pd.DataFrame({"train_loss": [2.0, 1.0]})})
data, _ = shell.display_formatter.format(figure)
print(sorted(data))
"""
    )
    assert said.strip() == "['image/svg+xml', 'text/plain']"
