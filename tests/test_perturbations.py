import sys

import numpy as np
import pandas as pd
import pytest

from gpjepa.perturbations import (
    LabelReader,
    Perturbation,
    TargetFeatures,
    UnknownTargetError,
    Vocabulary,
    read_gmt,
)


def column(*labels):
    return pd.Series(labels, name="guide")


def test_order_of_targets_does_not_matter():
    read = LabelReader().read
    assert read("KLF1+MAP2K6") == read("MAP2K6+KLF1") == read(" MAP2K6 + KLF1")
    assert str(read("MAP2K6+KLF1")) == "KLF1+MAP2K6"


def test_control_labels_are_dropped_from_combinations():
    reader = LabelReader(control=["ctrl", "non-targeting"])
    assert reader.read("KLF1+ctrl") == reader.read("KLF1")
    assert reader.read("ctrl").is_control
    assert reader.read("non-targeting+ctrl").is_control


def test_guide_suffixes_are_stripped_when_asked_for():
    reader = LabelReader(control="NT", separator=None, strip=r"g\d+$")
    assert str(reader.read("STAT1g2")) == "STAT1"
    assert str(LabelReader(strip=r"_\d$").read("A_1+A_2")) == "A"


@pytest.mark.parametrize(
    ("label", "dose", "expected"),
    [("B@0.5+A", None, "A+B@0.5"), ("B+A", "0.5+2", "A@2+B@0.5"), ("A+B", 3, "A@3+B@3")],
)
def test_doses(label, dose, expected):
    read = LabelReader().read(label, dose)
    assert str(read) == expected
    assert LabelReader().read(str(read)) == read


@pytest.mark.parametrize("label", ["A++B", "A@x", "A@-1", "A@0"])
def test_bad_labels_are_refused(label):
    with pytest.raises(ValueError, match="empty target|is not a number|positive"):
        LabelReader().read(label)


def test_doses_of_control_cells_say_nothing():
    doses = pd.Series([0.0, 0.5, 1.0])
    read = LabelReader().read_column(column("control", "A", "A"), doses)
    assert [str(p) for p in read] == ["control", "A@0.5", "A"]


def test_guides_of_the_control_are_control():
    column = pd.Series(["NT_g1", "NT_g2", "STAT1_g1", "STAT1_g2"], name="guide")
    reader = LabelReader("NT", strip=r"_g\d+$")
    assert [str(p) for p in reader.read_column(column)] == ["control"] * 2 + ["STAT1"] * 2
    joined = LabelReader("NT", separator=None, strip=r"g\d+$")
    column = pd.Series(["NT", "NTg2", "STAT1g1"], name="guide")
    assert [str(p) for p in joined.read_column(column)] == ["control"] * 2 + ["STAT1"]


@pytest.mark.parametrize("dose", [1e6, 1 / 3, 0.001, 2.0])
@pytest.mark.parametrize("separator", ["+", "_"])
def test_written_labels_can_be_read_back(dose, separator):
    perturbation = Perturbation.of(["A", "B"], [dose, 1.0])
    reader = LabelReader(separator=separator)
    assert reader.read(reader.write(perturbation)) == perturbation


@pytest.mark.parametrize(
    "targets", [["NAD+"], ["A+x", "B"], ["x", "A", "B"], ["a@b"], ["\\", "+"], ["control"], ["A\\"]]
)
def test_text_holds_any_name(targets):
    """A perturbation is a value; what `str` writes names it whatever its targets are called."""
    perturbation = Perturbation.of(targets, [0.5] + [1.0] * (len(targets) - 1))
    assert Perturbation.parse(str(perturbation)) == perturbation
    plain = Perturbation.of(targets)
    assert Perturbation.parse(str(plain)) == plain
    assert not Perturbation.parse(str(plain)).is_control


@pytest.mark.parametrize("text", ["A++B", "+", "A+A", "A@x"])
def test_text_that_names_no_perturbation(text):
    with pytest.raises(ValueError, match="empty|could not convert"):
        Perturbation.parse(text)


def test_doses_in_single_precision_are_the_decimals_that_were_meant():
    doses = pd.Series(np.array([0.1, 0.1, 10, 2.5], np.float32))
    read = LabelReader().read_column(column("control", "A", "B", "C"), doses)
    assert [str(p) for p in read] == ["control", "A@0.1", "B@10", "C@2.5"]
    assert Perturbation.of(["A"], [np.float32(0.1)]) == Perturbation.of(["A"], [0.1])
    assert Perturbation.of(["A"], [1 / 3]).doses == (1 / 3,)


@pytest.mark.parametrize(
    ("dose", "hint"),
    [("10uM", "one unit for all cells, without 'uM'"), ("0,1", "with a point: 0.1")],
)
def test_doses_that_are_no_numbers(dose, hint):
    with pytest.raises(ValueError, match=hint):
        LabelReader().read("A", dose)


def test_repeated_targets_are_refused():
    with pytest.raises(ValueError, match="repeat"):
        Perturbation.of(["A", "A"])


def test_unknown_targets_are_named_with_their_neighbours():
    vocabulary = Vocabulary(["KLF1", "MAP2K6"], ["ACTB", "KLF10"])
    assert vocabulary.perturbed == ("KLF1", "MAP2K6")
    assert len(vocabulary) == 4
    vocabulary.check(LabelReader().read("KLF1+ACTB"))
    with pytest.raises(UnknownTargetError, match=r"'KLF2' \(nearest: KLF1"):
        vocabulary.check(LabelReader().read("KLF2+MAP2K6"))


# Target features


def test_gene_sets_weigh_small_sets_more(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("small\tabout\tA\tB\n\nlarge\tabout\t" + "\t".join("ABCDEFGH") + "\n")
    features = TargetFeatures.from_gene_sets(path)
    same, other = features.kernel(["A"], ["B", "C"])[0]
    assert same == pytest.approx(1.0)
    # A: 1/√2 and 1/√8; C: 1/√8 alone.
    assert other == pytest.approx((1 / 8) / np.sqrt((1 / 2 + 1 / 8) * (1 / 8)))
    assert features.coverage(["A", "C", "Z"]).tolist() == [2, 1, 0]
    assert not features.covers("Z")
    assert not features.kernel(["Z"], ["A"]).any()
    mapped = TargetFeatures.from_gene_sets({"small": ["A", "B"], "large": list("ABCDEFGH")})
    np.testing.assert_allclose(mapped.kernel(["A"], ["C"]), other)


def test_tables_are_standardised(rng):
    table = pd.DataFrame(rng.normal(50, [1, 100, 1e-3], (20, 3)), [f"T{i}" for i in range(20)])
    features = TargetFeatures.from_table(table)
    z = ((table - table.mean()) / table.std(ddof=0)).to_numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(features.kernel(["T1"], ["T2", "T3"])[0], z[[2, 3]] @ z[1])


def test_regulons_have_signs():
    edges = pd.DataFrame(
        [("A", "x", 1), ("A", "y", 1), ("B", "x", -1), ("B", "y", -1), ("C", "z", 1)],
        columns=["source", "target", "weight"],
    )
    features = TargetFeatures.from_regulons(edges)
    assert features.kernel(["A"], ["B", "C"])[0].tolist() == pytest.approx([-1, 0])
    assert features.kernel(["x"], ["y"])[0, 0] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"columns \['weight'\] are missing"):
        TargetFeatures.from_regulons(edges.drop(columns="weight"))


def test_graph_diffusion_is_its_matrix_inverse(rng):
    ends = pd.DataFrame([("A", "B"), ("B", "C"), ("C", "D"), ("D", "E"), ("A", "E")])
    features = TargetFeatures.from_graph(ends, restart=0.3)
    names = list("ABCDE")
    adjacency = np.zeros((5, 5))
    for a, b in ends.to_numpy():
        adjacency[names.index(a), names.index(b)] = adjacency[names.index(b), names.index(a)] = 1
    walk = 0.3 * np.linalg.inv(np.eye(5) - 0.7 * adjacency / adjacency.sum(1, keepdims=True))
    walk /= np.linalg.norm(walk, axis=1, keepdims=True)
    np.testing.assert_allclose(features.kernel(names, names), walk @ walk.T, atol=1e-3)
    for wrong, match in (({"restart": 0}, "restart=0"), ({}, "two columns")):
        with pytest.raises(ValueError, match=match):
            TargetFeatures.from_graph(ends if wrong else ends[[0]], **wrong)


@pytest.mark.parametrize(
    ("targets", "values", "match"),
    [
        (["A", "A"], np.ones((2, 2)), r"more than once, such as \['A'\]"),
        (["A"], np.ones((2, 2)), "1 targets came with 2 rows"),
        (["A"], np.array([[np.nan]]), "NaN or infinite"),
    ],
)
def test_wrong_features_are_refused(targets, values, match):
    with pytest.raises(ValueError, match=match):
        TargetFeatures(targets, values)


def test_a_line_that_is_no_gene_set_is_named(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("fine\tabout\tA\nname only\n")
    with pytest.raises(ValueError, match="line 2: expected name, description and genes"):
        read_gmt(path)
    with pytest.raises(ValueError, match="hold no genes"):
        TargetFeatures.from_gene_sets({})
    with pytest.raises(TypeError, match="set 'S' is a string"):
        TargetFeatures.from_gene_sets({"S": "STAT1"})


def test_permuted_features_are_those_of_other_targets():
    names = list("ABCDEFGH")
    features = TargetFeatures(names, np.eye(8), "own")
    other = features.permuted(1)
    assert set(other.targets) == set(names)
    assert other.name == "own, permuted"
    moved = other.take(names).toarray()
    assert not np.array_equal(moved, np.eye(8))
    np.testing.assert_array_equal(moved.sum(0), 1)
    np.testing.assert_array_equal(moved.sum(1), 1)


def test_structures_are_alike_by_what_they_share():
    """SMILES or InChI, with or without the salt."""
    pytest.importorskip("rdkit", reason="structures need the extra chemistry")
    drugs = {
        "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
        "the same": "InChI=1S/C9H8O4/c1-6(10)13-8-5-3-2-4-7(8)9(11)12/h2-5H,1H3,(H,11,12)",
        "its salt": "[Na+].CC(=O)Oc1ccccc1C(=O)[O-]",
        "salicylic acid": "O=C(O)c1ccccc1O",
        "ethanol": "CCO",
        "unknown": "",
        "not known either": np.nan,
    }
    features = TargetFeatures.from_smiles(drugs)
    assert features.targets == list(drugs)[:5]
    alike = features.kernel(["aspirin"], list(drugs))[0]
    assert alike[1] == pytest.approx(1)
    assert alike[1] > alike[2] > alike[3] > alike[4] > -1e-12
    assert alike[3] > 0.2
    assert (alike[5:] == 0).all()
    with pytest.raises(ValueError, match="1 structures are neither SMILES nor InChI: x .benzen"):
        TargetFeatures.from_smiles({"x": "benzen", "y": "CCO"})


def test_without_rdkit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match=r"gpjepa\[chemistry\]"):
        TargetFeatures.from_smiles({"ethanol": "CCO"})


def test_drugs_are_the_mean_of_the_genes_they_act_on(rng):
    values = np.vstack([rng.normal(size=(2, 4)), np.zeros(4)])
    hashes = np.array([7], np.uint64)
    genes = TargetFeatures(["A", "B", "C"], values, "GO", hashes, {"formerly A": "A"})
    nothing = TargetFeatures(["D"], np.ones((1, 1)), "other genes")
    acts_on = {"d": ["A"], "e": ["A", "B"], "f": ["C"]}
    [features] = TargetFeatures.from_drug_targets(acts_on, [genes, nothing])
    assert features.name == "GO of drug targets"
    assert features.targets == ["d", "e", "A", "B"]
    assert features.source is hashes
    np.testing.assert_allclose(features.kernel(["d"], ["A", "formerly A"]), 1)
    both = genes.take(["A", "B"]).toarray().sum(0)
    expected = both / np.linalg.norm(both)
    np.testing.assert_allclose(features.take(["e"]).toarray()[0], expected)
    with pytest.raises(ValueError, match="None of the genes that the 1 drugs act on is known"):
        TargetFeatures.from_drug_targets({"d": ["nowhere"]}, genes)
    for wrong in ("A", None):
        with pytest.raises(TypeError, match="'d' acts on .* expected a list of genes"):
            TargetFeatures.from_drug_targets({"d": wrong}, genes)


def test_drugs_without_or_with_two_structures_are_refused():
    pytest.importorskip("rdkit", reason="structures need the extra chemistry")
    with pytest.raises(ValueError, match="drugs occur more than once, such as ..a.."):
        TargetFeatures.from_smiles(pd.Series(["C", "CC", "CCO"], ["a", "a", "b"]))
    with pytest.raises(ValueError, match="none of the 2 drugs has a structure"):
        TargetFeatures.from_smiles({"a": "", "b": np.nan})


def test_other_names_are_those_of_targets():
    with pytest.raises(ValueError, match="'a' is to be 'C', which is no target"):
        TargetFeatures(["B"], np.ones((1, 1)), other_names={"a": "C"})
