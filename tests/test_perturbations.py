import pandas as pd
import pytest

from gpjepa.perturbations import LabelReader, Perturbation, UnknownTargetError, Vocabulary


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
    with pytest.raises(ValueError, match="empty target|not a dose|positive"):
        LabelReader().read(label)


@pytest.mark.parametrize(
    ("labels", "proposal"),
    [
        (["KLF1+ctrl", "ctrl"], "control='ctrl'"),
        (["A", "NT"], "control='NT'"),
        (["A_B", "A", "B", "control"], "separator='_', control='control'"),
        (["KLF1+ctrl", "control"], r"control=\['control', 'ctrl'\]"),
        (["A", "control", "non-targeting"], r"control=\['control', 'non-targeting'\]"),
        (["x", "y"], "with control="),
    ],
)
def test_undeclared_spellings_are_errors_that_propose_the_call(labels, proposal):
    with pytest.raises(ValueError, match=proposal):
        LabelReader().read_column(column(*labels))


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match="1 cells have no perturbation"):
        LabelReader().read_column(column("control", None))


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
    assert LabelReader(separator=separator).read(perturbation.label(separator)) == perturbation


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
