"""What is known of human genes, and how a model comes to use it."""

import gzip
import runpy
from pathlib import Path

import numpy as np
import pytest
from helpers import real_file, train_quickly

import gpjepa
from gpjepa import GPJEPA
from gpjepa.effects import EffectAnchor, EffectTable
from gpjepa.perturbations import (
    Perturbation,
    TargetFeatures,
    UnknownTargetError,
    Vocabulary,
    choose_features,
    human_genes,
)

KNOWLEDGE = Path(gpjepa.perturbations.__file__).parent / "knowledge"
SCRIPT = Path(__file__).parents[1] / "docs" / "human_genes.py"
KINDS = ["GO annotation", "co-citation", "Reactome", "GO processes", "gene families"]


@pytest.fixture(scope="module")
def named(simulated):
    """The simulated screen with names of human genes; related genes follow each other."""
    genes = "STAT1 STAT2 IRF9 IRF1 JAK1 JAK2 TYK2 IFNGR1 IFNGR2 KLF1 GATA1 MAP2K3 MAP2K6 TP53 MDM2"
    adata = simulated.copy()
    targets = sorted({t for p in adata.obs["perturbation"] for t in p.split("+")} - {"control"})
    called = dict(zip(targets, genes.split(), strict=True))
    rename = {"+".join(called.get(t, t) for t in p.split("+")) for p in adata.obs["perturbation"]}
    assert len(rename) == adata.obs["perturbation"].nunique()
    adata.obs["perturbation"] = [
        "+".join(called.get(t, t) for t in p.split("+")) for p in adata.obs["perturbation"]
    ]
    return adata


def test_related_genes_are_alike_in_every_kind():
    assert [f.name for f in human_genes()] == KINDS
    for features in human_genes():
        alike = features.kernel(["IFNGR1", "RPL3"], ["IFNGR2", "RPL5"])
        assert min(alike[0, 0], alike[1, 1]) > 0.3, features.name
        assert max(alike[0, 1], alike[1, 0]) < 0.2, features.name


def test_former_symbols_aliases_and_ensembl_ids_are_the_gene():
    for features in human_genes():
        same = features.take(["AARS1", "AARS", "ENSG00000090861"]).toarray()
        assert (same[0] != 0).any()
        np.testing.assert_array_equal(same[1:], same[[0, 0]])
        assert features.called("AARS") == "AARS1"
        assert "AARS" not in features.targets


def test_a_name_means_one_gene():
    with np.load(KNOWLEDGE / "human_genes.npz") as file:
        symbols, others, ensembl = (set(file[k].tolist()) for k in ("symbol", "other", "ensembl"))
    assert len(symbols) == 20_598
    assert not symbols & others
    assert not ensembl & (symbols | others)
    assert not {"COX1", "COX2", "H", "NA"} & (symbols | others)  # of mitochondria, or of many


def test_it_is_small_enough_to_come_along():
    assert sum(f.stat().st_size for f in KNOWLEDGE.iterdir()) < 12e6


def test_auto_is_for_screens_of_human_genes():
    known, missing = choose_features("auto", None, ["STAT1", "JAK2", "guide-7"])
    assert (known, missing) == (human_genes(), "mean")
    assert choose_features("auto", None, ["STAT1", "guide-7", "guide-8"])[0] == ()
    assert choose_features("auto", "error", ["STAT1"])[1] == "error"
    assert choose_features(None, None, ["STAT1"]) == ((), "error")
    own = TargetFeatures(["a"], np.ones((1, 1)))
    assert choose_features(own, None, ["STAT1"]) == ((own,), "error")
    with pytest.raises(ValueError, match="'Auto' is not known; give 'auto', None, or"):
        choose_features("Auto", None, ["STAT1"])


def test_a_gene_by_another_of_its_names_is_refused():
    """It would be predicted as if it had never been perturbed."""
    # Measured under one name and perturbed under another: it is the latter that has an effect.
    named = ["GATA1", "AARS1", "ENSG00000141510"]
    vocabulary = Vocabulary(["AARS", "TP53"], named, human_genes())
    vocabulary.check(Perturbation.parse("STAT1+AARS+GATA1"))
    for name, here in {"AARS1": "AARS", "ENSG00000141510": "TP53"}.items():
        with pytest.raises(UnknownTargetError, match=f"{name!r} .called {here!r} here"):
            vocabulary.check(Perturbation.parse(name))
    with pytest.raises(UnknownTargetError, match="'P29' .symbol: 'PRTN3'"):
        vocabulary.check(Perturbation.parse("P29"))
    with pytest.raises(UnknownTargetError, match="nearest: STAT1"):
        vocabulary.check(Perturbation.parse("STAT11"))
    assert vocabulary.place("STAT1") == len(vocabulary) == 5


def test_a_model_knows_human_genes_by_itself(named, tmp_path):
    model = train_quickly(named, context_key="context")
    assert [f.name for f in model.anchor.features] == KINDS
    table = model.predict_effects(["NRAS", "IFNAR1"], "context0")
    assert set(table["regime"]) == {"unseen"}
    about = model.summary().splitlines()[3]
    assert about.startswith("Targets never perturbed: ")
    assert about.endswith("(target features cover 15 of 15 perturbed targets).")
    explained = model.explain("NRAS", "context0")
    assert list(explained.features.index) == KINDS
    assert explained.features["covered"].all()
    assert model.explain("STAT1", "context0").features.empty
    model.save(tmp_path / "model", save_anndata=True)
    again = GPJEPA.load(tmp_path / "model")
    np.testing.assert_array_equal(
        again.predict_effects(["NRAS", "IFNAR1"], "context0")["effect"], table["effect"]
    )
    # A target that nothing is known of takes the mean effect, without a word of permission.
    assert model.predict_effects(str(named.var_names[0]), "context0")["effect"].notna().all()


def test_without_features_all_take_the_mean(model):
    """The names of the simulated screen are no genes."""
    assert model.anchor.features == ()
    assert model.summary().splitlines()[3].endswith("no target features are used.")


def test_knowledge_predicts_real_knock_downs():
    """A fifth of 400 targets: better than the mean; dealt out at random, no worse."""
    adata = gpjepa.datasets.load(str(real_file("replogle_2022_up_ranks.h5ad")))
    adata = adata[adata.obs["context"] == "K562"].copy()
    targets = sorted(adata.obs["perturbation"].astype(str))
    by_symbol = [t for t in targets if any(t in f.targets for f in human_genes())]
    covered = [t for t in targets if any(f.covers(t) for f in human_genes())]
    assert (len(targets), len(by_symbol), len(covered)) == (400, 384, 398)
    out = adata.obs["perturbation"].isin(np.random.default_rng(0).permutation(targets)[:80])
    variable = np.argsort(-adata[~out].X.toarray().var(0))[:1_000]
    adata = adata[:, np.sort(variable)].copy()
    train = EffectTable.from_anndata(adata[~out], "perturbation", unit="rank")
    truth, mean = adata[out].X.toarray(), adata[~out].X.toarray().mean(0)
    wanted = [Perturbation.of([str(t)]) for t in adata.obs["perturbation"][out]]

    def error(features):
        anchor = EffectAnchor(features, "mean").fit(train)
        return ((anchor.predict(wanted, ["all"] * len(wanted), "rank").mean - truth) ** 2).sum()

    of_mean = ((mean - truth) ** 2).sum()
    assert error(human_genes()) < 0.85 * of_mean
    assert error([f.permuted(0) for f in human_genes()]) < 1.01 * of_mean


def test_the_script_makes_what_the_package_reads(tmp_path, monkeypatch):
    """From files of a few genes, as the public ones are written."""
    columns = "symbol entrez_id ensembl_gene_id prev_symbol alias_symbol gene_family locus_group"
    coding = "protein-coding gene"
    rows = [
        ["G1", "1", "ENSG1", "OLD1", "X|ALIAS|BOTH", "F|H", coding],
        ["G2", "2", "ENSG2", "", "BOTH|OLD1", "F", coding],
        ["G3", "3", "", "", "G1", "H", coding],
        ["R1", "4", "ENSG4", "", "", "", "non-coding RNA"],
    ]
    lines = ["\t".join(columns.split()), *("\t".join(row) for row in rows)]
    (tmp_path / "hgnc_complete_set.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "reactome.gmt").write_text("A\t\tOLD1\tG2\nB\t\tG3\tnowhere\n")
    (tmp_path / "go_biological_process.gmt").write_text("C\t\tG1\tG2\tG3\n")
    (tmp_path / "go-basic.obo").write_text(
        "[Term]\nid: GO:0000001\n\n[Term]\nid: GO:0000002\nis_a: GO:0000001 ! above\n\n"
        "[Term]\nid: GO:0000003\nrelationship: part_of GO:0000002 ! whole\n[Typedef]\nid: x\n"
    )
    for name, text in {
        "gene2go": "9606\t1\tGO:0000003\tIDA\t-\n9606\t2\tGO:0000002\tIDA\t-\n"
        "9606\t3\tGO:0000003\tIDA\tNOT involved_in\n10090\t3\tGO:0000003\tIDA\t-\n",
        "gene2pubmed": "9606\t1\t77\n9606\t3\t77\n9606\t2\t78\n",
    }.items():
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write(text)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "HERE", tmp_path)
    monkeypatch.setitem(script["main"].__globals__, "SIZES", {"go": 2, "pubmed": 2})
    script["main"](tmp_path, None)
    monkeypatch.setattr("gpjepa.perturbations._knowledge._HERE", tmp_path)
    go, cited, reactome, process, families = human_genes.__wrapped__()
    assert go.kernel(["G1"], ["G2", "G3"])[0] == pytest.approx(
        [go.kernel(["OLD1"], ["G2"])[0, 0], 0]
    )
    assert go.kernel(["G1"], ["G2"])[0, 0] > 0.1
    assert cited.kernel(["G1"], ["G2", "G3"])[0] == pytest.approx([0, 1])
    assert reactome.targets == ["G1", "G2"]  # of a set with one gene nothing is learned
    assert process.targets == families.targets == ["G1", "G2", "G3"]
    assert families.kernel(["G2"], ["G3"])[0, 0] == 0
    assert [go.called(n) for n in ("X", "ALIAS", "OLD1", "ENSG2", "BOTH", "G1")] == [
        None, "G1", "G1", "G2", None, "G1"
    ]  # fmt: skip
