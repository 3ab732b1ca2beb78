"""What a method must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import anndata as ad

from gpjepa.splits import Split


@runtime_checkable
class Method(Protocol):
    """What a method must be able to do. Nothing has to be inherited.

    ``fit`` gets the training cells: counts in ``X``; ``obs`` ``perturbation`` (``"A+B"``,
    ``"control"``), ``context``, ``library_size``, and ``batch`` where the data name it; and the
    split, whose ``test`` rows it may know by name.

    ``predict`` is called once per context, with the names of the perturbations and the control
    cells of that context, and returns an AnnData with the same genes (in any order),
    ``obs["perturbation"]``, and ``uns["scale"]`` saying what ``X`` is:

    ``"counts"``
        Predicted cells, as many as it likes; ``obs["library_size"]`` if the counts of the whole
        cell are not their sum times what the panel misses of control cells.
    ``"log1p"``
        log1p of counts per 10,000. Several rows of a perturbation are cells, which are scored as
        they are; one row is its mean profile, and its cells are control cells moved to it.

    It may state more: ``uns["effect"]``, the mean effects (perturbations × genes, differences of
    mean log1p counts per 10,000 from the control), to which cells with counts are then moved, and
    ``uns["effect_sd"]``, their standard deviations. Several predictions of one training, such as
    with two settings, are returned as a dict of names to AnnData.

    If it has a method ``embed(cells)``, from cells with counts, ``context`` and ``library_size`` to
    an array, shape (n_cells, n_dimensions), its own space is scored as well. Genes that tested
    perturbations target are 0 in these cells.

    A perturbation that it cannot predict is left out: it is scored as the mean response, and the
    report says how many were. So is a split on which it fails.
    """

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Learn from the training cells."""

    def predict(
        self, perturbations: Sequence[str], control: ad.AnnData
    ) -> ad.AnnData | dict[str, ad.AnnData]:
        """Predict perturbations of the context of the control cells."""
