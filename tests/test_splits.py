import pytest

from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.splits import (
    Manifest,
    Split,
    doubles,
    exclude,
    few_shot_context,
    gears_simulation,
    gene_families,
    gene_set_blocks,
    held_out_dose,
    hold_out,
    leave_one_context_out,
    unseen_singles,
)


def rows(n_singles, n_pairs=0, contexts=("a",)):
    labels = [f"T{i:02d}" for i in range(n_singles)]
    labels += [f"T{i:02d}+T{i + 1:02d}" for i in range(n_pairs)]
    return [(c, LabelReader().read(x)) for c in contexts for x in [*labels, "control"]]


def test_kinds_with_enough_perturbations_spare_five_each():
    held = hold_out(rows(20, 16))
    assert held.kind == "perturbations"
    assert sum(len(p.targets) == 1 for p in held.units) == 5
    assert sum(len(p.targets) == 2 for p in held.units) == 5


def test_doses_of_one_target_leave_together():
    labels = [f"T{i:02d}@{d}" for i in range(15) for d in (1, 10)]
    held = hold_out([("a", LabelReader().read(x)) for x in labels])
    assert len({p.targets for p in held.units}) == 5
    assert len(held.units) == 10


def test_order_of_the_rows_does_not_matter():
    assert hold_out(rows(20, 16)) == hold_out(rows(20, 16)[::-1])


def test_few_perturbations_fall_back_to_contexts_then_cells():
    held = hold_out(rows(4, 0, ("a", "b", "c")))
    assert held.kind == "contexts"
    assert hold_out(rows(4)).kind == "cells"


def test_exclusion_keeps_control_cells():
    held = hold_out(rows(4, 0, ("a", "b", "c")))
    out = exclude([Perturbation(), LabelReader().read("T01")], [held.units[0]] * 2, held)
    assert out.tolist() == [False, True]
    with pytest.raises(ValueError, match="at random"):
        exclude([], [], hold_out(rows(4)))


# Out-of-distribution splits


def targets(rows):
    return {t for _, p in rows for t in p.targets}


def test_unseen_singles_are_each_tested_once_and_never_trained_on():
    folds = unseen_singles(rows(12, 8), folds=4, seed=3)
    assert all(not targets(f.train) & targets(f.test) for f in folds)
    tested = [p for f in folds for _, p in f.test]
    assert len(tested) == len(set(tested)) == 12
    assert {len(f.test) for f in folds} == {3}
    assert folds == unseen_singles(rows(12, 8)[::-1], folds=4, seed=3)
    assert folds != unseen_singles(rows(12, 8), folds=4, seed=4)


def test_blocks_stay_together():
    names = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "STAT2", "MAP2K3", "MAP2K6", "CD86"]
    family = gene_families(names)
    assert family["IFNGR1"] == family["IFNGR2"] == "IFNGR"
    assert family["MAP2K3"] == family["MAP2K6"] == "MAP2K"
    families = {
        "TMEM14": ["TMEM14A", "TMEM14B"],
        "TMEM9": ["TMEM9"],
        "Tmem14": ["Tmem14a", "Tmem14b"],  # of the mouse
        "ZNF10": ["ZNF10"],
        "C19orf12": ["C19orf12"],
        "NKX2": ["NKX2-1", "NKX2-5"],
        "HLA-DRB": ["HLA-DRB1", "HLA-DRB5"],
        "KLF": ["KLF1", "KLF14"],
        "TP": ["TP53"],
        "12": ["12"],
    }
    expected = {gene: family for family, genes in families.items() for gene in genes}
    assert gene_families(expected) == expected
    read = LabelReader().read
    for fold in unseen_singles([("a", read(n)) for n in names], folds=3, blocks=family):
        assert not {family[t] for t in targets(fold.test)} & {
            family[t] for t in targets(fold.train)
        }
    sets = {"x": ["A", "B"], "y": ["B", "C", "not perturbed"], "z": ["E"]}
    assert gene_set_blocks("EDCBA", sets) == {"A": "A", "B": "A", "C": "A", "D": "D", "E": "E"}


def test_gears_simulation_has_every_kind_of_unseen():
    split = gears_simulation(rows(40, 39), seed=1)
    seen = targets(split.train)
    n_seen = [(len(p.targets), sum(t in seen for t in p.targets)) for _, p in split.test]
    assert {(1, 0), (2, 0), (2, 1), (2, 2)} == set(n_seen)
    assert len(seen) == 30
    singles = {p.targets[0] for _, p in split.train if len(p.targets) == 1}
    assert singles == seen


def test_doubles_keep_all_singles():
    split = doubles(rows(20, 15), fraction=0.6)
    assert all(len(p.targets) == 2 for _, p in split.test)
    assert len(split.test) == 6
    assert sum(len(p.targets) == 1 for _, p in split.train) == 20


def test_contexts_are_held_out_whole():
    measured = rows(4, 0, ("a", "b", "c"))
    for split in leave_one_context_out(measured):
        (context,) = {c for c, _ in split.test}
        assert context not in {c for c, _ in split.train}
        assert len(split.test) == 4
    sets = leave_one_context_out(measured, groups={"a": "one", "b": "one", "c": "two"})
    assert [s.name for s in sets] == ["cross-dataset-one", "cross-dataset-two"]
    for split in few_shot_context(measured, known=1):
        (context,) = {c for c, _ in split.test}
        assert sum(c == context for c, _ in split.train) == 1
        assert len(split.test) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unseen_singles(rows(3), folds=5), "choose between 2 and 3"),
        (lambda: doubles(rows(5)), "no test rows"),
        (lambda: doubles(rows(5, 4), fraction=1.0), "between 0 and 1"),
        (lambda: leave_one_context_out(rows(4)), "at least 2"),
        (lambda: few_shot_context(rows(4, 0, ("a", "b")), known=4), "one left to test on"),
        (lambda: Split("x", "own", tuple(rows(2)[:2]), tuple(rows(2)[:1])), "tests what it trains"),
        (lambda: Split("x", "own", tuple(rows(2)), tuple(rows(4)[3:4])), "lists control cells"),
    ],
)
def test_splits_that_test_nothing_or_what_they_train_on_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_manifest_comes_back_and_knows_its_data(tmp_path):
    measured = [("a", LabelReader().read(x)) for x in ("A", "B@0.5", "A+B", "C", "A@2+C")]
    manifest = Manifest("mine", "abc", (doubles(measured), *unseen_singles(measured, folds=3)))
    manifest.write(tmp_path / "splits.json")
    assert Manifest.read(tmp_path / "splits.json") == manifest
    manifest.check(measured, "abc")
    with pytest.raises(ValueError, match="other cells"):
        manifest.check(measured, "abd")
    with pytest.raises(ValueError, match="do not have, such as"):
        manifest.check(measured[:2], "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "lacks 'format'"),
        ("nothing", "not a manifest"),
        ('{"format": 9}', "its format is 9"),
        ('{"format": 1, "data": "x", "data_hash": "", "splits": []}', "no splits"),
        (
            '{"format": 1, "data": "x", "data_hash": "", "splits": ['
            '{"name": "s", "train": [["a", "A"]], "test": [["a", "A"]]}]}',
            "tests what it trains on",
        ),
    ],
)
def test_broken_manifests_are_refused(tmp_path, text, message):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path / "splits.json")


def test_one_dose_of_every_drug_is_left_out():
    read = Perturbation.parse
    rows = [(c, read(f"A@{d}")) for c in "xy" for d in (1, 10, 100, 1000)]
    rows += [("x", read(f"B@{d}")) for d in (5, 50)] + [("x", read("C"))]
    middle = held_out_dose(rows, which="middle")
    assert middle.test == (("x", read("A@10")), ("y", read("A@10")))
    highest = held_out_dose(rows, which="highest")
    assert [p for _, p in highest.test] == [read("A@1000")] * 2
    assert len(highest.train) == len(rows) - 2
    with pytest.raises(ValueError, match="at three doses or more"):
        held_out_dose(rows[-3:], which="middle")
