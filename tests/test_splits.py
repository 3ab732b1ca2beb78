import pytest

from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.splits import exclude, hold_out


def rows(n_singles, n_pairs=0, contexts=("a",)):
    labels = [f"T{i:02d}" for i in range(n_singles)]
    labels += [f"T{i:02d}+T{i + 1:02d}" for i in range(n_pairs)]
    return [(c, LabelReader().read(x)) for c in contexts for x in [*labels, "control"]]


def test_kinds_with_enough_perturbations_spare_five_each():
    held = hold_out(rows(20, 16))
    assert held.kind == "perturbations"
    assert sum(len(p.targets) == 1 for p in held.units) == 5
    pairs = [p for p in held.units if len(p.targets) == 2]
    out = {p.targets for p in held.units if len(p.targets) == 1}
    whole = [all((t,) not in out for t in p.targets) for p in pairs]
    assert whole.count(True) == whole.count(False) == 5


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
    assert "only 4 perturbations" in held.reason
    assert hold_out(rows(4)).kind == "cells"


def test_exclusion_keeps_control_cells():
    held = hold_out(rows(4, 0, ("a", "b", "c")))
    out = exclude([Perturbation(), LabelReader().read("T01")], [held.units[0]] * 2, held)
    assert out.tolist() == [False, True]
    with pytest.raises(ValueError, match="at random"):
        exclude([], [], hold_out(rows(4)))
