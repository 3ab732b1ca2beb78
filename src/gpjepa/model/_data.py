"""The cells behind a model: read as its registry describes them, aligned by gene name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from gpjepa._checks import check_anndata, check_columns
from gpjepa.perturbations import LabelReader, Perturbation

from ._cells import Cells, align, read_cells
from ._fields import BATCH_KEY, N_KNOWN, PERTURBATION_KEY
from ._setup import make_fields


class Data:
    """What a model's registry says of its cells.

    Parameters
    ----------
    registry
        The model's registry.
    setup
        ``setup_anndata``, whose arguments the registry holds.
    """

    def __init__(self, registry: Mapping[str, Any], setup: Callable[..., None]) -> None:
        self.registry = registry
        # Arguments that the set-up left out are None.
        names = inspect.signature(setup).parameters
        self.arguments: dict[str, Any] = {**dict.fromkeys(names), **registry["setup_args"]}
        self.fields = registry["field_registries"]
        counts = self.fields[REGISTRY_KEYS.X_KEY]
        self.genes = np.asarray(counts["state_registry"]["column_names"])
        self.layer: str | None = counts["data_registry"]["attr_key"]
        self.labelled = PERTURBATION_KEY in self.fields
        batches = self.fields[BATCH_KEY]["state_registry"]
        self.n_batches: int = batches.get(N_KNOWN, len(batches["values"]))
        self.visible: np.ndarray | None = None
        """Genes that the attached AnnData has; None for all."""

    @property
    def batch_names(self) -> list[str] | None:
        """Names of the batches of training; None where there is just one."""
        names = [str(v) for v in self.fields[BATCH_KEY]["state_registry"]["values"]]
        return names if len(names) > 1 else None

    @cached_property
    def spellings(self) -> dict[Perturbation, str]:
        """What the training data call each of their perturbations."""
        if not self.labelled:
            return {}
        state = self.fields[PERTURBATION_KEY]["state_registry"]
        known = state["values"][: state.get(N_KNOWN)]
        return {
            Perturbation.of(targets, doses): said
            for (targets, doses), said in zip(known, state["spelling"], strict=False)
        }

    def label(self, perturbation: Perturbation) -> str:
        """What results call a perturbation that nobody wrote down."""
        if perturbation in self.spellings:
            return self.spellings[perturbation]
        written = self.reader.write(perturbation)
        try:
            same = self._asked.read(written) == perturbation
        except ValueError:
            same = False
        return written if same else str(perturbation)

    @property
    def reader(self) -> LabelReader:
        """How labels are written; it knows names that hold the separator."""
        reader = LabelReader.from_setup(self.arguments)
        if not self.labelled:
            return reader
        found = self.fields[PERTURBATION_KEY]["state_registry"].get("targets", ())
        return replace(reader, targets=reader.declared | set(found))

    @property
    def _asked(self) -> LabelReader:
        """How perturbations are asked for: a target by its own name, not that of a guide."""
        reader = replace(self.reader, strip=None, drop=())
        return replace(reader, control=(*reader.controls, "control"))

    def parse(
        self, perturbation: str | Perturbation | Sequence[str | Perturbation]
    ) -> dict[Perturbation, str]:
        """What was asked for, and what results call it: as the data do, else as it was written."""
        if isinstance(perturbation, str | Perturbation) or not isinstance(perturbation, Iterable):
            perturbation = [perturbation]
        asked_for = list(perturbation)
        if not asked_for:
            raise ValueError("No perturbation was given.")
        said = self.spellings
        known = {str(p): p for p in said} | {text: p for p, text in said.items()}
        reader = self._asked
        wanted: dict[Perturbation, str] = {}
        for asked in asked_for:
            if not isinstance(asked, str | Perturbation):
                raise TypeError(
                    f"A perturbation is text such as 'KLF1+MAP2K6' or a Perturbation, not "
                    f"{asked!r}. A combination of targets: gpjepa.perturbations.Perturbation.of("
                    "['A', 'B'])."
                )
            read = known.get(asked) if isinstance(asked, str) else asked
            if read is None:
                read = reader.read(asked)
                assert read is not None  # nothing is dropped here
            name = asked.strip() if isinstance(asked, str) else self.label(asked)
            wanted.setdefault(read, said.get(read, name))
        return wanted

    # Cells

    def training(self, adata: AnnData | None, manager: AnnDataManager, share: np.ndarray) -> Cells:
        """The attached cells that are trained on: those with counts and a perturbation."""
        if self.visible is not None:
            raise ValueError(
                f"The attached AnnData lacks {int((~self.visible).sum())} of the model's genes: "
                "it can be queried, not trained on."
            )
        cells = self.attached(adata, manager, share)
        return cells if cells.usable.all() else cells.take(np.flatnonzero(cells.usable))

    def attached(self, adata: AnnData | None, manager: AnnDataManager, share: np.ndarray) -> Cells:
        """All cells of the attached AnnData, which must be what was registered."""
        if adata is None:
            raise ValueError("The model was loaded without data: give an AnnData.")
        for field in manager.fields:
            field.check_unchanged(adata, manager.get_state_registry(field.registry_key))
        return self._read(manager, self.visible, share)

    def query(self, adata: AnnData, share: np.ndarray, *, decodes: bool) -> Cells:
        """Cells of any AnnData, aligned by gene name; the AnnData stays as it is.

        With ``decodes``, a warning names batches that training has not seen.
        """
        check_anndata(adata)
        args = dict(self.arguments)
        check_columns(adata, {k: args[k] for k in ("context_key", "batch_key")})
        for key in ("perturbation_key", "dataset_key"):
            if args[key] not in adata.obs:
                args[key] = None  # unlabelled cells can still be embedded
        light, visible = align(
            adata, self.genes, self.layer, [v for k, v in args.items() if k.endswith("_key")]
        )
        manager = AnnDataManager(fields=make_fields(self.layer, args))
        manager.register_fields(light, self.registry)
        new = manager.get_state_registry(BATCH_KEY)["values"][self.n_batches :]
        if decodes and new:
            warnings.warn(
                f"{args['batch_key']} {', '.join(map(repr, new[:5]))}{' ...' * (len(new) > 5)} is "
                "not in the training data: counts are decoded without an offset for it.",
                UserWarning,
                stacklevel=4,
            )
        return self._read(manager, visible, share)

    def _read(
        self, manager: AnnDataManager, visible: np.ndarray | None, share: np.ndarray
    ) -> Cells:
        cells = read_cells(manager, visible, self.n_batches, self.reader)
        if cells.visible.all() or self.arguments["library_size_key"] is not None:
            return cells
        # The missing genes hold part of the library size, which the data do not show.
        return replace(cells, library=cells.library * share.sum() / share[cells.visible].sum())

    def controls(self, adata: AnnData, cells: Cells) -> AnnData:
        """The control cells among the attached ones, with what the user knows of them."""
        keep = adata[np.flatnonzero(cells.is_control & cells.expressed)]
        counts = keep.X if self.layer is None else keep.layers[self.layer]
        own = [k for k in keep.obs if not str(k).startswith("_gpjepa_")]
        obs = keep.obs[own].copy()
        for name in own:
            # A file holds no perturbations that were set up as values.
            if any(isinstance(v, Perturbation) for v in obs[name].unique()):
                obs[name] = obs[name].astype(str)
        return AnnData(counts.copy(), obs=obs, var=keep.var[[]].copy())
