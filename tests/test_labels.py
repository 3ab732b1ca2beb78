"""Labels as public data sets write them: what is read, refused with a call, or warned of."""

import re
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import real_file

from gpjepa.perturbations import LabelReader, LabelWarning, Perturbation
from gpjepa.perturbations._kinds import KINDS

GENES = ["KLF1", "MAP2K6", "STAT1", "IRF1", "JAK2", "HLA-A", "NKX2-1", "NKX2-5", "Atg5", "Atg7"]
C = "control"
GUIDE = r"[_-](sg|g|guide|sgRNA|gRNA)[_-]?\d+$"
NUMBER = r"(?P<dose>\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?)"
MOLAR = rf"[_ @-]{NUMBER} ?(?P<unit>[pnuµμm][Mg](?:/m[lL])?)$"
TUPLE = r"\('(?P<target>.+?)', (?P<dose>[\d.eE+-]+), '(?P<unit>\w+)'\)"
SG = r"^sg[_-]?(?=[A-Z])"


def column(labels):
    return pd.Series(labels, name="guide", dtype=object)


def read(labels, genes=GENES, **declared):
    """What each label is read as, the error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = LabelReader(**declared).read_column(column(labels), genes=genes)
        except ValueError as error:
            return None, str(error), []
    return [None if p is None else str(p) for p in found], "", [str(w.message) for w in caught]


PLAIN = [
    (["control", "KLF1", "KLF1+MAP2K6"], {}, ["control", "KLF1", "KLF1+MAP2K6"]),
    (["control", "MAP2K6+KLF1", " KLF1 + MAP2K6"], {}, ["control", "KLF1+MAP2K6", "KLF1+MAP2K6"]),
    (["ctrl", "KLF1+ctrl", "ctrl+KLF1"], {"control": "ctrl"}, ["control", "KLF1", "KLF1"]),
    (["NT", "KLF1_MAP2K6"], {"control": "NT", "separator": "_"}, ["control", "KLF1+MAP2K6"]),
    (["0", "1", "2"], {"control": "0"}, ["control", "1", "2"]),
    (["control", "HLA-A", "NKX2-1", "NKX2-5"], {}, ["control", "HLA-A", "NKX2-1", "NKX2-5"]),
    (["control", "Atg5", "Atg7"], {}, ["control", "Atg5", "Atg7"]),
    (
        ["control", "CD3G", "Cd3g", "CD45M"],
        {"targets": ["Cd3g"]},
        ["control", "CD3G", "Cd3g", "CD45M"],
    ),
    (
        ["control", "IL-2", "IL-3", "IL-4", "IL-6", "TNF"],
        {},
        ["control", "IL-2", "IL-3", "IL-4", "IL-6", "TNF"],
    ),
    (["control", "NKX2-2", "NKX2-3", "NKX3-1"], {}, ["control", "NKX2-2", "NKX2-3", "NKX3-1"]),
    (["control", "H1-0", "H1-1", "H1-2"], {}, ["control", "H1-0", "H1-1", "H1-2"]),
    (["control", "chr1.12", "chr1.13", "chr2.9"], {}, ["control", "chr1.12", "chr1.13", "chr2.9"]),
    (["control", "Ly6g", "Fcer1g"], {}, ["control", "Ly6g", "Fcer1g"]),
    (
        ["control", "salicylic-acid|sodium-salicylate", "x"],
        {},
        ["control", "salicylic-acid|sodium-salicylate", "x"],
    ),
    (["control", "KLF1", "WT1", "NC1"], {}, ["control", "KLF1", "WT1", "NC1"]),
    (["control", "compound_1", "compound_2"], {}, ["control", "compound_1", "compound_2"]),
    (["control", "MIR_10", "MIR_155", "LET_7"], {}, ["control", "MIR_10", "MIR_155", "LET_7"]),
    (["control", "IL-1", "IL-2", "PD-1", "PD-2"], {}, ["control", "IL-1", "IL-2", "PD-1", "PD-2"]),
    (["NTC_ACGT", "KLF1"], {"control": "NTC_ACGT"}, ["control", "KLF1"]),
    (
        ["control", "ABT-737", "ABT-263", "AZD-8055"],
        {},
        ["control", "ABT-737", "ABT-263", "AZD-8055"],
    ),
    (["control", "Valproic acid", "IL-2"], {}, ["control", "Valproic acid", "IL-2"]),
    (["control", "T-ALL", "5-FU", "2-DG"], {}, ["control", "T-ALL", "5-FU", "2-DG"]),
    (["control", "NAD+"], {}, ["control", r"NAD\+"]),
    (["control", "(+)-JQ1", "(-)-JQ1"], {}, ["control", r"(\+)-JQ1", "(-)-JQ1"]),
    (["control", "NAD+"], {"separator": None}, ["control", r"NAD\+"]),
    (["control", "A+x;B"], {"separator": ";"}, ["control", r"A\+x+B"]),
    (["control", "A@0.5+B"], {}, ["control", "A@0.5+B"]),
    (["control", "unassigned", "KLF1"], {"drop": "unassigned"}, ["control", None, "KLF1"]),
    (["control", None, "KLF1"], {"drop": ["nan"]}, ["control", None, "KLF1"]),
    (["control", "negative", "KLF1"], {"targets": ["negative"]}, ["control", "negative", "KLF1"]),
    (["control", "klf1", "KLF1"], {"rename": {"klf1": "KLF1"}}, ["control", "KLF1", "KLF1"]),
    (["control", "both"], {"rename": {"both": ["KLF1", "IRF1"]}}, ["control", "IRF1+KLF1"]),
    (["NT_g1", "KLF1_g1"], {"control": "NT", "strip": r"_g\d+$"}, ["control", "KLF1"]),
    (["NT", "STAT1g2"], {"control": "NT", "strip": r"g\d+$"}, ["control", "STAT1"]),
    (["nt_01", "KLF1"], {"control": re.compile(r"nt_\d+")}, ["control", "KLF1"]),
    (["a.c", "abc"], {"control": "a.c"}, ["control", "abc"]),  # text is no pattern
    (
        ["DMSO", "JQ1_500nM", "JQ1_0.5uM"],
        {"control": "DMSO", "dose_pattern": MOLAR},
        ["control", "JQ1@0.5", "JQ1@0.5"],
    ),
    (
        ["[('DMSO_TF', 0.0, 'uM')]", "[('A', 0.05, 'uM'), ('B', 2.0, 'uM')]"],
        {"control": "DMSO_TF", "dose_pattern": TUPLE},
        ["control", "A@0.05+B@2"],
    ),
    (
        ["NegCtrl0_NegCtrl1__NegCtrl0_NegCtrl1", "KLF1_NegCtrl0__KLF1_NegCtrl0", "A_B__A_B"],
        {"separator": "_", "strip": "__.*$", "control": re.compile(r"NegCtrl\d+")},
        ["control", "KLF1", "A+B"],
    ),
]


@pytest.mark.parametrize(("labels", "declared", "expected"), PLAIN)
def test_labels_that_are_read(labels, declared, expected):
    assert read(labels, **declared) == (expected, "", [])


REFUSED = [
    ([C, "nan", "KLF1"], "drop='nan'", [C, None, "KLF1"]),
    ([C, None, "KLF1"], "drop='nan'", [C, None, "KLF1"]),
    ([C, float("nan"), "KLF1"], "drop='nan'", [C, None, "KLF1"]),
    ([C, "None", "KLF1"], "drop='None'", [C, None, "KLF1"]),
    ([C, "", "KLF1"], "drop=''", [C, None, "KLF1"]),
    ([C, "NA", "N/A", "KLF1"], "drop=['N/A', 'NA']", [C, None, None, "KLF1"]),
    ([C, "unassigned", "KLF1"], "drop='unassigned'", [C, None, "KLF1"]),
    ([C, "Unassigned", "doublet"], "drop=['Unassigned', 'doublet']", [C, None, None]),
    ([C, "multiplet", "KLF1"], "drop='multiplet'", [C, None, "KLF1"]),
    ([C, "ambiguous", "KLF1"], "drop='ambiguous'", [C, None, "KLF1"]),
    ([C, "*", "KLF1"], "drop='*'", [C, None, "KLF1"]),
    ([C, "negative", "KLF1"], "drop='negative'", [C, None, "KLF1"]),
    ([C, "KLF1+unassigned", "KLF1"], "drop='KLF1+unassigned'", [C, None, "KLF1"]),
    ([C, "doublet_1", "doublet_2"], "drop=['doublet_1', 'doublet_2']", [C, None, None]),
    ([C, "no_guide_detected", "KLF1"], "drop='no_guide_detected'", [C, None, "KLF1"]),
    ([C, "KLF1_g0", "KLF1_g1", "IRF1_g0"], f"strip=r'{GUIDE}'", [C, "KLF1", "KLF1", "IRF1"]),
    ([C, "KLF1-sg1", "KLF1-sg2", "IRF1-sg1"], f"strip=r'{GUIDE}'", [C, "KLF1", "KLF1", "IRF1"]),
    ([C, "KLF1_1", "KLF1_2", "IRF1_1"], r"strip=r'_\d{1,5}$'", [C, "KLF1", "KLF1", "IRF1"]),
    (
        [C, "FOO_1", "FOO_2", "BAR_1", "BAR_2"],
        r"strip=r'_\d{1,5}$'",
        [C, "FOO", "FOO", "BAR", "BAR"],
    ),
    ([C, "KLF1.1", "KLF1.2", "IRF1.1"], r"strip=r'\.\d{1,2}$'", [C, "KLF1", "KLF1", "IRF1"]),
    ([C, "KLF1 1", "KLF1 2", "IRF1 1"], r"strip=r' \d{1,2}$'", [C, "KLF1", "KLF1", "IRF1"]),
    (
        [C, "sgKLF1-1", "sgKLF1-2", "sgIRF1-1"],
        rf"strip=r'{SG}|-\d{{1,5}}$'",
        [C, "KLF1", "KLF1", "IRF1"],
    ),
    ([C, "sgKLF1", "sgIRF1"], f"strip='{SG}'", [C, "KLF1", "IRF1"]),
    (
        ["STAT1g1", "STAT1g2", "IRF1g1", "NTg1"],
        r"strip=r'g\d+$', control='NT'",
        ["STAT1", "STAT1", "IRF1", C],
    ),
    (
        [C, "KLF1_g0+IRF1_g1", "KLF1_g0", "KLF1_g1"],
        f"strip=r'{GUIDE}'",
        [C, "IRF1+KLF1", "KLF1", "KLF1"],
    ),
    (["control_g1", "KLF1_g1"], f"strip=r'{GUIDE}'", [C, "KLF1"]),
    (["NT_g1", "KLF1_g1", "KLF1_g2"], f"strip=r'{GUIDE}', control='NT'", [C, "KLF1", "KLF1"]),
    (
        [C, "FOO_-_17352.23-P1P2", "FOO_+_17352.23-P1P2", "BAR_+_33548.1-P1"],
        r"strip=r'_[+-]_\d+(\.\d+)?(-P\d(P\d)?)?$'",
        [C, "FOO", "FOO", "BAR"],
    ),
    (
        ["KLF1_g1__KLF1_g1", "IRF1_g1__IRF1_g1", C],
        r"strip=r'([_-](sg|g|guide|sgRNA|gRNA)[_-]?\d+)?__.*$'",
        ["KLF1", "IRF1", C],
    ),
    (["NT", "FOO_g2", "BAR_g3"], f"strip=r'{GUIDE}', control='NT'", [C, "FOO", "BAR"]),
    (
        ["NTC_1", "FOO_1", "FOO_4", "BAR_1", "BAR_3"],
        r"strip=r'_\d{1,5}$', control='NTC'",
        [C, "FOO", "FOO", "BAR", "BAR"],
    ),
    (
        ["NTC_1;NTC_2", "FOO_1;NTC_2", "FOO_1;BAR_2"],
        r"separator=';', control=re.compile(r'NTC_\d+'), strip=r'_\d{1,5}$'",
        [C, "FOO", "BAR+FOO"],
    ),
    (
        [C, "KLF1_1|KLF1_2", "STAT1_1|STAT1_2"],
        r"separator='|', strip=r'_\d{1,5}$'",
        [C, "KLF1", "STAT1"],
    ),
    ([C, "KLF1/MAP2K6"], "separator='/'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1-MAP2K6"], "separator='-'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1-MAP2K6", "HLA-A", "NKX2-9"], "separator='-'", [C, "KLF1+MAP2K6", "HLA-A", "NKX2-9"]),
    ([C, "KLF1 MAP2K6"], "separator=' '", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1__MAP2K6"], "separator='__'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1＋MAP2K6"], "separator='＋'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1,MAP2K6"], "separator=','", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1_MAP2K6"], "separator='_'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1|MAP2K6"], "separator='|'", [C, "KLF1+MAP2K6"]),
    ([C, "KLF1;MAP2K6;IRF1"], "separator=';'", [C, "IRF1+KLF1+MAP2K6"]),
    ([C, "foo;bar", "foo;baz"], "separator=';'", [C, "bar+foo", "baz+foo"]),
    ([C, "foo&bar", "foo", "bar"], "separator='&'", [C, "bar+foo", "foo", "bar"]),
    (
        [C, "KLF1-1|MAP2K6-2", "KLF1-1", "MAP2K6-2"],
        r"separator='|', strip=r'-\d{1,5}$'",
        [C, "KLF1+MAP2K6", "KLF1", "MAP2K6"],
    ),
    (
        [C, "KLF1_sg1;MAP2K6_sg2", "KLF1_sg2"],
        f"separator=';', strip=r'{GUIDE}'",
        [C, "KLF1+MAP2K6", "KLF1"],
    ),
    (
        [C, "JQ1 10uM; SAHA 1uM", "JQ1 1uM"],
        f"separator=';', dose_pattern=r'{MOLAR}'",
        [C, "JQ1@10+SAHA", "JQ1"],
    ),
    (["ctrl", "foo_ctrl"], "separator='_', control='ctrl'", [C, "foo"]),
    (["foo+ctrl", "ctrl"], "control='ctrl'", ["foo", C]),
    (["foo+ctrl", C], "control=['control', 'ctrl']", ["foo", C]),
    (
        ["NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0", "FOO_NegCtrl0__FOO_NegCtrl0", "A_B__A_B"],
        r"strip='__.*$', separator='_', control=re.compile(r'NegCtrl\d+')",
        [C, "FOO", "A+B"],
    ),
    (
        ["NegCtrl10_NegCtrl0", "FOO_NegCtrl0", "A_B"],
        r"separator='_', control=re.compile(r'NegCtrl\d+')",
        [C, "FOO", "A+B"],
    ),
    (
        [C, "non-targeting_00001", "non-targeting_00002", "KLF1"],
        r"control=['control', re.compile(r'non-targeting_\d+')]",
        [C, C, C, "KLF1"],
    ),
    (
        ["non-targeting_1", "KLF1", "IRF1"],
        r"control=re.compile(r'non-targeting_\d+')",
        [C, "KLF1", "IRF1"],
    ),
    (["safe_5", "safe_6", "KLF1"], r"control=re.compile(r'safe_\d+')", [C, C, "KLF1"]),
    (["foo", "NT"], "control='NT'", ["foo", C]),
    (["foo", "DMSO"], "control='DMSO'", ["foo", C]),
    (
        ["DMSO", "JQ1_10uM", "JQ1_1uM"],
        f"dose_pattern=r'{MOLAR}', control='DMSO'",
        [C, "JQ1@10", "JQ1"],
    ),
    (["DMSO", "JQ1 10 nM"], f"dose_pattern=r'{MOLAR}', control='DMSO'", [C, "JQ1@0.01"]),
    (["DMSO", "JQ1-0.5µM"], f"dose_pattern=r'{MOLAR}', control='DMSO'", [C, "JQ1@0.5"]),
    (["DMSO", "JQ1_1e-3uM"], f"dose_pattern=r'{MOLAR}', control='DMSO'", [C, "JQ1@0.001"]),
    ([C, "JQ1@10uM"], f"dose_pattern=r'{MOLAR}'", [C, "JQ1@10"]),
    ([C, "LPS_1ug/ml", "LPS_100ng/ml"], f"dose_pattern=r'{MOLAR}'", [C, "LPS", "LPS@0.1"]),
    (
        [C, "JQ1 (10 µM)"],
        rf"dose_pattern=r' ?\({NUMBER} ?(?P<unit>[pnuµμm][Mg](?:/m[lL])?)\)$'",
        [C, "JQ1@10"],
    ),
    (
        [C, "10uM JQ1"],
        rf"dose_pattern=r'^{NUMBER} ?(?P<unit>[pnuµμm][Mg](?:/m[lL])?)[_ -]'",
        [C, "JQ1@10"],
    ),
    ([C, "JQ1_0.1", "JQ1_1.0"], rf"dose_pattern=r'_{NUMBER}$'", [C, "JQ1@0.1", "JQ1"]),
    (
        [C, "JQ1_100", "JQ1_1000", "SAHA_100", "SAHA_1000"],
        rf"dose_pattern=r'_{NUMBER}$'",
        [C, "JQ1@100", "JQ1@1000", "SAHA@100", "SAHA@1000"],
    ),
    (
        ["[('DMSO_TF', 0.0, 'uM')]", "[('Trametinib', 5e-06, 'mM')]"],
        f"dose_pattern=r\"{TUPLE}\", control='DMSO_TF'",
        [C, "Trametinib@0.005"],
    ),
    ([C, "KLF1", "KLF1+"], "separator=None", [C, "KLF1", r"KLF1\+"]),
]


@pytest.mark.parametrize(("labels", "proposal", "expected"), REFUSED)
def test_labels_that_are_refused_with_the_call_that_reads_them(labels, proposal, expected):
    found, error, _ = read(labels)
    assert found is None
    said = re.search(r"call with (.*?)\.(?: |$)(?=[A-Z]|$)", error)[1]
    assert said == proposal
    assert read(labels, **eval(f"dict({said})")) == (expected, "", [])


def test_what_was_declared_stays_in_the_call():
    labels = ["NT", "sgKLF1_1", "sgKLF1_2", "sgIRF1_1"]
    assert r"strip=r'^sg|_\d{1,5}$'" in read(labels, control="NT", strip="^sg")[1]
    (warning,) = read([C, "negative", "GFP"], targets=["negative"])[2]
    assert "targets=['GFP', 'negative']" in warning


def test_a_call_that_would_not_do_is_not_proposed():
    _, error, _ = read(["foo", "bar"])
    assert "call with" not in error
    assert "No cell has the control label 'control'; the labels are 'bar', 'foo'" in error


@pytest.mark.parametrize(
    ("pattern", "label", "message"),
    [
        (
            r"_(?P<dose>[\d.]+)(?P<unit>\w+)$",
            "JQ1_24h",
            "the unit 'h' of dose_pattern is not known",
        ),
        (r"_(?P<dose>[\d.]+)(?P<unit>\w+)$", "JQ1_500nm", "the unit 'nm'"),
        (r"_(?P<dose>\w+)$", "JQ1_high", "the dose 'high' is not a number"),
    ],
)
def test_doses_with_a_unit_that_is_not_known(pattern, label, message):
    assert message in read([C, label], dose_pattern=pattern)[1]


def test_missing_doses_are_counted():
    doses = pd.Series([np.nan, np.nan, 1.0, np.nan], name="dose")
    labels = column([C, "KLF1", "KLF1", "IRF1"])
    with pytest.raises(ValueError, match=r"2 perturbed cells have no dose in obs\['dose'\]"):
        LabelReader().read_column(labels, doses)
    with pytest.raises(ValueError, match="'KLF1' has no dose"):
        LabelReader().read("KLF1", np.nan)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("NAD++KLF1", r"KLF1+NAD\+"), ("KLF1+NAD+", r"KLF1+NAD\+"), ("NAD+", r"NAD\+")],
)
def test_declared_names_stay_whole_in_combinations(label, expected):
    assert str(LabelReader(targets=["NAD+"]).read(label)) == expected
    assert read([C, "NAD+", label])[0][2] == expected  # also if the column shows the name


def test_renaming_to_the_control_and_to_nothing():
    assert read([C, "x"], rename={"x": C})[0] == [C, C]
    for wrong in ({"x": []}, {"x": 5}, {"x": ""}):
        with pytest.raises(TypeError, match="expected a dict"):
            LabelReader(rename=wrong)
    (warning,) = read([C, "KLF1"], rename={"klf": "KLF1"})[2]
    assert "No label holds 'klf' of rename" in warning


def test_perturbations_in_a_column_are_taken_as_they_are():
    values = [Perturbation(), Perturbation.of(["negative"]), Perturbation.of(["A_1", "A_2"])]
    assert LabelReader().read_column(column(values)) == values
    assert set(LabelReader().spellings(column(values)).values()) == set(map(str, values))


WARNED = [
    ([C, "NTC", "KLF1"], "'NTC' (1 cell)", "control=['control', 'NTC']"),
    ([C, "scramble", "KLF1"], "'scramble' (1 cell)", "control=['control', 'scramble']"),
    ([C, "safe-targeting", "KLF1"], "safe-targeting", "control=['control', 'safe-targeting']"),
    ([C, "AAVS1", "GFP", "LacZ"], "'GFP' (1 cell)", "control=['control', 'AAVS1', 'GFP', 'LacZ']"),
    ([C, "PBS", "DMSO", "DMSO"], "'DMSO' (2 cells)", "control=['control', 'DMSO', 'PBS']"),
    ([C, "WT", "KLF1"], "'WT' (1 cell)", "control=['control', 'WT']"),
    ([C, "klf1", "KLF1", "Klf1"], "kept apart", "rename={'Klf1': 'KLF1', 'klf1': 'KLF1'}"),
]


@pytest.mark.parametrize(("labels", "said", "proposal"), WARNED)
def test_labels_that_are_read_with_a_warning(labels, said, proposal):
    found, error, (message,) = read(labels)
    assert error == ""
    assert found == labels
    assert said in message
    assert f"call with {proposal}" in message
    assert read(labels, **eval(f"dict({proposal})"))[2] == []


def test_every_kind_of_label_has_a_row_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "your-data.md").read_text()
    for kind in KINDS:
        (row,) = re.findall(rf"^\| {re.escape(kind.name)} \|.*$", page, re.MULTILINE)
        assert kind.outcome in row
        assert f"`{kind.argument}=" in row


def test_cells_are_counted_in_errors():
    assert "'doublet' (3 cells)" in read([C, "KLF1"] + ["doublet"] * 3)[1]
    assert "4 cells without a perturbation" in read([C, "KLF1", "nan", "nan", None, ""])[1]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"control": 0}, "control=0 is not text.*control='0'"),
        ({"control": None}, "control=None: expected a label.*perturbation_key=None"),
        ({"control": []}, "control is empty"),
        ({"control": ["a", 3]}, "control=3 is not text"),
        ({"separator": ""}, "separator is empty"),
        ({"separator": 1}, "separator=1"),
        ({"strip": "("}, "strip='\\(' is not a regular expression"),
        ({"dose_pattern": r"\d"}, "has no group"),
        ({"targets": "KLF1"}, "is one name"),
        ({"rename": ["a"]}, "expected a dict"),
    ],
)
def test_declarations_that_make_no_sense(declared, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LabelReader(**declared)


@pytest.mark.parametrize(
    ("labels", "declared", "expected"),
    [
        (["SET+KLF1", "SET+KLF1", "KLF1+SET"], {}, "SET+KLF1"),
        (["KLF1+ctrl", "ctrl+KLF1", "ctrl+KLF1"], {"control": "ctrl"}, "ctrl+KLF1"),
        (["KLF1_g1", "KLF1_g2"], {"strip": r"_g\d$"}, "KLF1"),
        (["klf1"], {"rename": {"klf1": "KLF1"}}, "KLF1"),
        (["JQ1_10uM"], {"dose_pattern": MOLAR}, "JQ1_10uM"),
        (["SET;KLF1"], {"separator": ";"}, "SET;KLF1"),
        (["KLF1_NT1"], {"separator": "_", "control": re.compile(r"NT\d")}, "KLF1"),
    ],
)
def test_results_use_the_spelling_of_the_data(labels, declared, expected):
    reader = LabelReader(**declared)
    said = reader.spellings(column(labels))
    assert list(said.values()) == [expected]
    assert replace_strip(reader).read(expected) == next(iter(said))


def replace_strip(reader):
    return LabelReader(reader.control, reader.separator, dose_pattern=reader.dose_pattern)


@pytest.mark.parametrize(
    ("name", "key", "n_targets"),
    [
        ("norman_2019_mini", "perturbation", 31),
        ("mcfaline_2023_mini", "perturbation", 9),
        ("papalexi_2021_mini", "perturbation", 25),
        ("datlinger_2021_mini", "perturbation", 20),
        ("zhao_2021_mini", "perturbation", 1),
        ("lincs_drugs", "drug", 800),
        ("nelisa_a549", "perturbation", 301),
        ("replogle_2022_up_ranks", "perturbation", 400),
    ],
)
def test_real_labels_are_read_as_they_are(name, key, n_targets, recwarn):
    adata = ad.read_h5ad(real_file(f"{name}.h5ad"))
    need = "control" in set(adata.obs[key])
    found = LabelReader().read_column(adata.obs[key], genes=adata.var_names, need_control=need)
    assert len({t for p in found for t in p.targets}) == n_targets
    assert not [w for w in recwarn if isinstance(w.message, LabelWarning)]
