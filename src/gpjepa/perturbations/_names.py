"""What names of controls, guides, doses and unassigned cells look like."""

from __future__ import annotations

import re

NOTHING = {"", "nan", "none", "na", "n/a", "null", "<na>", "nat"}
# As `plain` gives them: in lower case, without spaces, underscores and hyphens.
UNASSIGNED = {
    "unassigned",
    "notassigned",
    "noassignment",
    "unassignedguide",
    "doublet",
    "doublets",
    "multiplet",
    "multiplets",
    "multiple",
    "multi",
    "ambiguous",
    "*",
    "?",
    "-",
    "negative",
    "unknown",
    "undetermined",
    "unmapped",
    "noguide",
    "nosgrna",
    "nogrna",
    "noguidedetected",
}
_SHORT = r"neg(ative)?(ctrls?|controls?)?|ctrls?|controls?|ctl|ntc?|nc|non?targeting|safe"
"""Controls that also stand in combinations; GFP or DMSO may be part of another name."""
_CONTROL = re.compile(
    rf"({_SHORT}|nontargeting(control|ctrl)|nontarget|safetargeting|safeharbou?r|scrambled?|mock|"
    r"vehicle|dmso(tf)?|pbs|unperturbed|untreated|untransduced|wt|wildtype|none|aavs1|rosa26|e?gfp|"
    r"lacz|luciferase|emptyvector|nosite)"
)
_GENES_WITH_A_NUMBER = {"wt", "nc", "neg", "gfp", "egfp", "safe"}  # WT1
_NUMBERED = re.compile(r"(.*?)([\s_.#-]*(?:sg|g|guide|sgrna|grna)?)(\d+)")
SEPARATORS = ("__", "+", "＋", "_", ";", "|", ",", "&", "/", ":", "-", " ")
ALWAYS = {"＋", ";", "|", "&"}
"""Separators that hardly occur in names: enough if one of the parts occurs again."""
# Guides: what they may add to a name, as `strip` would take it off.
PREFIX = r"^sg[_-]?(?=[A-Z])"
POSITION = r"_[+-]_\d+(\.\d+)?(-P\d(P\d)?)?$"
GUIDES = (
    r"[_-](sg|g|guide|sgRNA|gRNA)[_-]?\d+$",
    r"g\d+$",
    r"_\d{1,5}$",
    r"-\d{1,5}$",
    r"\.\d{1,2}$",
    r"#\d+$",
    r" \d{1,2}$",
)
_NUMBER = r"(?P<dose>\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?)"
_UNIT = r"(?P<unit>[pnuµμm][Mg](?:/m[lL])?)"
DOSES = (
    rf"[_ @-]{_NUMBER} ?{_UNIT}$",
    rf" ?\({_NUMBER} ?{_UNIT}\)$",
    rf"^{_NUMBER} ?{_UNIT}[_ -]",
    rf"[_ ]{_NUMBER} ?{_UNIT}(?=[_ ])",
    rf"[_ ]{_NUMBER} ?(?P<unit>[Mg])$",
)
BARE_DOSES = (rf"_{_NUMBER}$", rf"@{_NUMBER}$")
TUPLE = r"\('(?P<target>.+?)', (?P<dose>[\d.eE+-]+), '(?P<unit>\w+)'\)"


def control_like(name: str) -> bool:
    """Whether a name is one that control cells often carry."""
    return _CONTROL.fullmatch(plain(name)) is not None


def plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()) or name.strip()


def control_guide(name: str) -> re.Pattern[str] | None:
    """For a numbered control such as ``NegCtrl10``, what matches all of them."""
    match = _NUMBERED.fullmatch(name)
    if match is None or not control_like(match[1]) or control_like(name):
        return None
    if not match[2] and plain(match[1]) in _GENES_WITH_A_NUMBER:
        return None
    return re.compile(
        "".join(re.escape(m).replace(r"\-", "-") for m in match.groups()[:2]) + r"\d+"
    )


def bare(name: str) -> str:
    """A name without what guides and doses add to it."""
    for pattern in (PREFIX, POSITION, *DOSES, *GUIDES):
        if (match := re.search(pattern, name)) and match[0] != name:
            name = name[: match.start()] + name[match.end() :]
    return name


def is_short_control(name: str) -> bool:
    return control_guide(name) is not None or re.fullmatch(_SHORT, plain(name)) is not None
