"""How the data sets of pertpy are written, and how they are brought to one shape.

pertpy downloads; a recipe says where labels and counts are. Facts are from pertpy's sources and
tutorials and from scPerturb's processing scripts.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace

import anndata as ad
import pandas as pd

from gpjepa.perturbations import LabelReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How one data set is written.

    Attributes
    ----------
    reader
        How labels are written.
    column
        Column of ``obs`` with the perturbation.
    reject
        Regular expression of labels that show that the file is another data set.
    counts
        Layer with raw counts; None for ``X``.
    modality
        Modality to take from a MuData.
    """

    reader: LabelReader
    column: str = "perturbation"
    reject: str | None = None
    counts: str | None = None
    modality: str | None = None

    def label(self, written: str) -> str | None:
        """The label in this package's form; None for cells to drop."""
        text = written.strip()
        if self.reject and re.search(self.reject, text):
            raise ValueError(
                f"The label {text!r} does not belong to this data set: the file in the cache is "
                "another one. Delete it and update pertpy."
            )
        if text in ("nan", ""):
            return None
        perturbation = self.reader.read(text)
        odd = [t for t in (perturbation.targets if perturbation else ()) if "+" in t]
        if odd:
            raise ValueError(f"The name {odd[0]!r} holds '+', which joins combinations here.")
        return None if perturbation is None else str(perturbation)

    def apply(self, adata: ad.AnnData) -> ad.AnnData:
        """Bring an AnnData to ``obs["perturbation"]`` and ``layers["counts"]``."""
        if self.column not in adata.obs:
            raise KeyError(
                f"The file has no column obs[{self.column!r}]; it has {list(adata.obs.columns)}."
            )
        column = adata.obs[self.column]
        unique = {w: self.label(str(w)) for w in column.dropna().unique()}
        labels = column.map(unique).astype(object)
        assigned = labels.notna().to_numpy()
        if not assigned.all():
            logger.info("Dropped %d cells without an assigned perturbation.", (~assigned).sum())
            adata, labels = adata[assigned].copy(), labels[assigned]
        if "control" not in set(labels):
            raise ValueError(
                f"No cell has the control label {' or '.join(map(str, self.reader.controls))} in "
                f"obs[{self.column!r}]: the file is not as this recipe expects it."
            )
        adata.obs["perturbation"] = pd.Categorical(labels)
        if self.counts != "counts":  # a copy, so that X can be normalised
            adata.layers["counts"] = (
                adata.X if self.counts is None else adata.layers[self.counts]
            ).copy()
        return adata


_ADAMSON = LabelReader(
    ("62(mod)", "63(mod)", "Gal4-4(mod)", "3x_neg_ctrl", "control"),
    separator=None,
    strip=r"_p(DS|BA|MJ)\d+(-\d)?$",
    drop="*",
)
# scPerturb's own column keeps only the first gene of a combination: read the guides.
_FRANGIEH = Recipe(
    LabelReader(("NO_SITE", "ONE_NON-GENE_SITE"), separator=";", strip=r"_\d+$"), column="guide_id"
)
_REPLOGLE = Recipe(
    LabelReader(("control", "non-targeting"), separator=None), reject=r"_top_two|^chr\d"
)

RECIPES: dict[str, Recipe] = {
    "norman_2019": Recipe(LabelReader(), column="perturbation_name", counts="counts"),
    "papalexi_2021": Recipe(
        LabelReader("NT", separator=None), column="gene_target", modality="rna"
    ),
    "kang_2018": Recipe(LabelReader("ctrl", separator=None), column="label"),
    "frangieh_2021_rna": _FRANGIEH,
    "frangieh_2021_protein": _FRANGIEH,
    "adamson_2016_pilot": Recipe(_ADAMSON),
    "adamson_2016_upr_perturb_seq": Recipe(_ADAMSON),
    "adamson_2016_upr_epistasis": Recipe(
        replace(
            _ADAMSON,
            rename={
                "ATF6_only": "ATF6",
                "PERK_only": "EIF2AK3",
                "IRE1_only": "ERN1",
                "ATF6_PERK": ["ATF6", "EIF2AK3"],
                "ATF6_IRE1": ["ATF6", "ERN1"],
                "PERK_IRE1": ["EIF2AK3", "ERN1"],
                "ATF6_PERK_IRE1": ["ATF6", "EIF2AK3", "ERN1"],
            },
        )
    ),
    "replogle_2022_k562_essential": _REPLOGLE,
    "replogle_2022_k562_gwps": _REPLOGLE,
    "replogle_2022_rpe1": _REPLOGLE,
    "srivatsan_2020_sciplex3": Recipe(
        LabelReader(
            separator=None,
            rename={
                "(+)-JQ1": "JQ1",
                "ENMD-2076 L-(+)-Tartaric acid": "ENMD-2076 L-Tartaric acid",
            },
        )
    ),
    "datlinger_2021": Recipe(LabelReader(separator=None, strip=r"_\d+$")),
}
