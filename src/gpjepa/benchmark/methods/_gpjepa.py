"""GP-JEPA as a method of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np

from gpjepa.model import GPJEPA
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.splits import Split


@dataclass
class GPJEPAMethod:
    """GP-JEPA, predicted with each of several gates after one training.

    Parameters
    ----------
    features
        Features of targets that were never perturbed.
    seed
        Seed of training and of the predicted cells.
    gates
        Gates to predict with: ``"auto"``, 0, 1.
    permute_features
        Deal the features out to other targets: what they say must matter.
    model, train
        Arguments of :class:`gpjepa.GPJEPA` and of its ``train``.
    """

    features: Sequence[TargetFeatures] = ()
    seed: int = 0
    gates: Sequence[Any] = ("auto", 0, 1)
    permute_features: bool = False
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Train on the cells."""
        import scvi

        scvi.settings.seed = self.seed
        cells, features = train.copy(), self.features
        if self.permute_features:
            features = [f.permuted(self.seed) for f in features]
        # Values, not labels to be read again: names may hold anything.
        cells.obs["perturbation"] = [Perturbation.parse(p) for p in cells.obs["perturbation"]]
        GPJEPA.setup_anndata(
            cells,
            context_key="context",
            library_size_key="library_size",
            batch_key="batch" if "batch" in cells.obs else None,
            replicate_key="replicate" if "replicate" in cells.obs else None,
        )
        targets = sorted({t for _, p in split.test for t in p.targets})
        options = {"targets": targets, "missing_features": "mean", "target_features": features}
        self.model_ = GPJEPA(cells, **{**options, **(self.model or {})})
        self.model_.train(**{"enable_progress_bar": False, **(self.train or {})})
        self.n_parameters_ = sum(p.numel() for p in self.model_.module.parameters())

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> dict[str, ad.AnnData]:
        """Cells with each gate, and their mean effects."""
        context = str(control.obs["context"].iloc[0])
        wanted = [Perturbation.parse(p) for p in perturbations]
        found = {}
        for gate in self.gates:
            cells = self.model_.predict_perturbation(
                control, wanted, context=context, seed=self.seed, gate=gate
            )
            tidy = self.model_.predict_effects(wanted, context, gate=gate)
            stated = {
                name: tidy.pivot(index="perturbation", columns="gene", values=column)
                for name, column in (("effect", "effect"), ("effect_sd", "sd"))
            }
            cells.uns = {"scale": "counts", **stated}
            found["" if gate == "auto" else f"gate {gate}"] = cells
        return found

    def embed(self, cells: ad.AnnData) -> np.ndarray:
        """States of cells."""
        # Sampled counts can add up to more than the library size that they were sampled with.
        total = np.asarray(cells.X.sum(1)).ravel()
        cells.obs["library_size"] = np.maximum(cells.obs["library_size"], total)
        return self.model_.get_latent_representation(cells)
