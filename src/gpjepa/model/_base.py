from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from gpjepa._checks import (
    check_anndata,
    check_columns,
    check_library,
    propose_library,
    unchanged_on_error,
)
from gpjepa._files import written_whole
from gpjepa.effects import EffectAnchor, EffectTable
from gpjepa.nn import load_genes
from gpjepa.perturbations import LabelReader, Perturbation, TargetFeatures, Vocabulary

from ._arguments import refuse_unknown
from ._cells import Cells, align, read_cells
from ._fields import (
    BATCH_KEY,
    CONTEXT_KEY,
    DATASET_KEY,
    LIBRARY_KEY,
    N_KNOWN,
    PERTURBATION_KEY,
    REPLICATE_KEY,
    CountsField,
    DatasetField,
    LabelField,
    LibraryField,
    PerturbationField,
    ReplicateField,
)
from ._held_out import HeldOut
from ._module import GPJEPAModule
from ._moments import moments
from ._progress import quiet

logger = logging.getLogger(__name__)

MIN_CELLS = 10
"""Perturbations with fewer cells than this are named in a warning."""


class Registered(BaseModelClass):
    """Cells in and out: set-up, alignment by gene name, files."""

    _module_cls = GPJEPAModule

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 64,
        encoder: Literal["mlp", "perceiver", "transformer", "components"] = "mlp",
        components: bool = True,
        n_hidden: int = 256,
        target_features: TargetFeatures | Sequence[TargetFeatures] = (),
        missing_features: Literal["error", "mean"] = "error",
        targets: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        if isinstance(targets, str):
            raise TypeError(f"targets={targets!r} is one name; give a list of names.")
        if encoder == "components" and not components:
            raise ValueError("encoder='components' needs components=True.")
        for name, size in (("n_latent", n_latent), ("n_hidden", n_hidden)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name}={size!r}: expected a whole number from 1.")
        super().__init__(adata, registry)
        if not isinstance(target_features, TargetFeatures):
            target_features = tuple(target_features)
        self.new_anchor = partial(EffectAnchor, target_features, missing_features)
        source = None
        if pretrained is not None:
            source = type(self).load(str(pretrained), adata=False)
            n_latent, encoder, components, n_hidden = self._sizes(
                {
                    "n_latent": n_latent,
                    "encoder": encoder,
                    "components": components,
                    "n_hidden": n_hidden,
                },
                source,
            ).values()
        fields = self.registry_["field_registries"]
        self.genes = np.asarray(fields[REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"])
        self.labelled = PERTURBATION_KEY in fields
        batches = fields[BATCH_KEY]["state_registry"]
        self.n_batches = batches.get(N_KNOWN, len(batches["values"]))
        known = self._trained_perturbations() if self.labelled else []
        featured = [t for f in self.new_anchor().features for t in f.targets]
        self.vocabulary = Vocabulary(
            [t for p in known for t in p.targets], [*map(str, self.genes), *featured, *targets]
        )
        self.module = GPJEPAModule(
            len(self.genes),
            len(self.vocabulary.perturbed),
            len(self.vocabulary),
            self.n_batches,
            n_latent=n_latent,
            n_hidden=n_hidden,
            encoder=encoder,
            components=components,
            rest=bool(fields.get(LIBRARY_KEY, {}).get("data_registry")),
        )
        self._model_summary_string = (
            f"GPJEPA with n_latent: {n_latent}, encoder: {encoder}, n_hidden: {n_hidden}, "
            f"genes: {len(self.genes)}, perturbed targets: {len(self.vocabulary.perturbed)}."
        )
        self.is_pretrained_ = False
        self.effects_: EffectTable | None = None
        self.library_shifts_: dict[Perturbation, float] = {}
        self.reference_: dict[str, dict[str, np.ndarray]] = {}
        self.gene_share_ = np.ones(len(self.genes)) / len(self.genes)
        self.gate_: dict[str, dict[str, Any]] = {}
        self.held_out_: HeldOut | None = None
        self._anchor: EffectAnchor | None = None
        self._visible: np.ndarray | None = None  # genes that attached data have; None for all
        self.history_: dict[str, pd.DataFrame] | None
        self.pretrained_: dict[str, Any] = {}
        if source is not None:
            self._start_from(source, str(pretrained))
            pretrained = None  # a saved model needs it no more
        self.init_params_ = self._get_init_params(locals())

    def _trained_perturbations(self) -> list[Perturbation]:
        state = self.get_state_registry(PERTURBATION_KEY)
        return [Perturbation.of(t, d) for t, d in state["values"][: state.get(N_KNOWN)]]

    # Data

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        perturbation_key: str | None = "perturbation",
        control: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = "control",
        context_key: str | None = None,
        batch_key: str | None = None,
        replicate_key: str | None = None,
        dosage_key: str | None = None,
        library_size_key: str | None = None,
        dataset_key: str | None = None,
        separator: str | None = "+",
        strip: str | None = None,
        drop: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = (),
        rename: Mapping[str, str | Sequence[str]] | None = None,
        targets: Sequence[str] = (),
        dose_pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        r"""Say where the counts and the labels are.

        Parameters
        ----------
        adata
            Cells of training: raw counts of perturbed and control cells.
        layer
            Layer with raw counts; by default ``layers["counts"]`` if there, else ``X``.
        perturbation_key
            Column of ``obs`` with the perturbation of each cell, such as ``"KLF1+MAP2K6"``. None
            for unlabelled cells: :meth:`pretrain` and :meth:`embed` only.
        control
            Label or labels of control cells; a compiled regular expression stands for all labels
            that it matches whole.
        context_key
            Column of ``obs`` with the context: cell line, cell type, donor, treatment. Every
            context needs control cells.
        batch_key
            Column of ``obs`` with the batch: effects are differences from the controls of the same
            batch, and the decoder has an offset for each.
        replicate_key
            Column of ``obs`` with what was repeated, such as guides, animals or wells; intervals
            hold how far these differ.
        dosage_key
            Column of ``obs`` with the dose: a number, or one per target (``"0.5+1"``).
        library_size_key
            Column of ``obs`` with the counts of the whole cell, where the genes here are only
            some. By default the sum over the genes.
        dataset_key
            Column of ``obs`` with the data set of each cell, where these measured different genes:
            ``varm["measured"]`` says which (:func:`gpjepa.datasets.join`). For :meth:`pretrain` and
            :meth:`embed`; genes that a data set did not measure are missing, not zero.
        separator
            What stands between the targets of a combination; None if labels hold one target.
        strip
            Regular expression removed from targets, for guide suffixes: ``r"_g?\d+$"``.
        drop
            Labels of cells that are left out of training, such as ``["unassigned", "nan"]``.
        rename
            Targets with another spelling: ``{"klf1": "KLF1"}``.
        targets
            Names that are targets although they look like something else.
        dose_pattern
            Regular expression with the groups ``dose`` and ``unit``, for doses inside labels:
            ``r"_(?P<dose>[\d.]+)(?P<unit>\w+)$"``.

        Raises
        ------
        ValueError, TypeError, KeyError
            If values are not counts, names of cells or genes repeat, a column is missing, labels
            look as if written in another way, no cell is perturbed, or a context has no control
            cells. Labels are read by :class:`gpjepa.perturbations.LabelReader`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        refuse_unknown("setup_anndata", kwargs, ("source_registry", "extend_categories"))
        check_anndata(adata)
        keys = {
            "perturbation_key": perturbation_key,
            "context_key": context_key,
            "batch_key": batch_key,
            "replicate_key": replicate_key,
            "dosage_key": dosage_key,
            "library_size_key": library_size_key,
            "dataset_key": dataset_key,
        }
        source_registry = kwargs.pop("source_registry", None)
        if source_registry is not None and replicate_key not in adata.obs:
            del keys["replicate_key"]  # cells to predict from need none
        check_columns(adata, keys)
        if dataset_key is not None and library_size_key is None:
            raise ValueError(
                f"dataset_key={dataset_key!r} needs library_size_key: sums over different genes are "
                "no library sizes that can be compared. gpjepa.datasets.join writes "
                "obs['library_size']."
            )
        if layer is None and "counts" in adata.layers:
            layer = "counts"
        arguments = setup_method_args["setup_args"]
        manager = AnnDataManager(
            fields=cls._fields(layer, arguments), setup_method_args=setup_method_args
        )
        with unchanged_on_error(adata):
            manager.register_fields(adata, source_registry, **kwargs)
            if source_registry is None:
                cls._check_cells(manager)
                if perturbation_key is not None:
                    cls._check_groups(manager)
        cls.register_manager(manager)

    @staticmethod
    def _fields(layer: str | None, arguments: Mapping[str, Any]) -> list:
        """Fields of the registry, by the arguments of :meth:`setup_anndata`."""
        fields = [
            CountsField(REGISTRY_KEYS.X_KEY, layer, is_count_data=True),
            LabelField(CONTEXT_KEY, arguments["context_key"]),
            LabelField(BATCH_KEY, arguments["batch_key"]),
        ]
        if arguments.get("replicate_key") is not None:
            fields.append(ReplicateField(REPLICATE_KEY, arguments["replicate_key"]))
        reader = LabelReader.from_setup(arguments)
        if arguments["perturbation_key"] is not None:
            dosage_key = arguments["dosage_key"]
            if dosage_key is not None and reader.dose_pattern is not None:
                raise ValueError(
                    "Doses are either in labels (dose_pattern) or in a column "
                    "(dosage_key): give one of them."
                )
            fields.append(PerturbationField(arguments["perturbation_key"], reader, dosage_key))
        if arguments["library_size_key"] is not None:
            fields.append(LibraryField(LIBRARY_KEY, arguments["library_size_key"]))
        if arguments["dataset_key"] is not None:
            fields.append(DatasetField(DATASET_KEY, arguments["dataset_key"]))
        return fields

    @staticmethod
    def _check_cells(manager: AnnDataManager) -> None:
        """Library sizes; cells without counts are counted."""
        adata = manager.adata
        counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        if counts.shape[1] < 2:
            raise ValueError(
                "The AnnData holds 1 gene; at least 2 are needed, as genes are predicted from each "
                "other. Were genes subset by mistake?"
            )
        total = np.asarray(counts.sum(1), float).ravel()
        if LIBRARY_KEY in manager.data_registry:
            key = manager.data_registry[LIBRARY_KEY]["attr_key"]
            library = pd.to_numeric(adata.obs[key], errors="coerce").to_numpy(float)
            check_library(library, counts, f"obs[{key!r}]")
            return
        n = int((total == 0).sum())
        if n == len(total):
            raise ValueError(f"None of the {n} cells has any counts.")
        if n:
            warnings.warn(
                f"{n} of {len(total)} cells have no counts and are left out of training. To remove "
                "them: scanpy.pp.filter_cells(adata, min_counts=1).",
                UserWarning,
                stacklevel=4,
            )
        column = propose_library(adata, total)
        if column is not None:
            warnings.warn(
                f"The genes here hold {np.median(total):.0f} counts per cell (median), "
                f"obs[{column!r}] says {adata.obs[column].median():.0f}: if these are the counts of "
                f"the whole cell, call with library_size_key={column!r}, so that counts per 10,000 "
                "mean the same as elsewhere.",
                UserWarning,
                stacklevel=4,
            )

    @staticmethod
    def _check_groups(manager: AnnDataManager) -> None:
        """Every context needs control cells; small groups are named."""
        values = manager.get_state_registry(PERTURBATION_KEY)["values"]
        if not any(targets for targets, _ in values):
            raise ValueError(
                "Every cell is a control cell: there is no perturbation to learn from. To pretrain "
                "on these cells alone, call with perturbation_key=None."
            )
        contexts = np.array(manager.get_state_registry(CONTEXT_KEY)["values"], dtype=object)
        code = manager.get_from_registry(PERTURBATION_KEY).ravel()
        counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        kept = code >= 0
        if LIBRARY_KEY not in manager.data_registry:
            kept &= np.asarray(counts.sum(1)).ravel() > 0
        code = code[kept]
        context = manager.get_from_registry(CONTEXT_KEY).ravel()[kept]
        control = [i for i, (targets, _) in enumerate(values) if not targets]
        without = sorted(set(context) - set(context[np.isin(code, control)]))
        if without:
            raise ValueError(
                f"No control cells in context {', '.join(map(repr, contexts[without]))}: an "
                "effect is a difference from the control cells of the same context. Add control "
                "cells, remove the context, or choose another context_key."
            )
        n_control = np.bincount(context[np.isin(code, control)], minlength=len(contexts))
        lone = [contexts[c] for c in np.flatnonzero(n_control == 1)]
        if lone:
            raise ValueError(
                f"A single control cell in context {', '.join(map(repr, lone))}: at least 2 are "
                "needed, better 50. Add control cells or remove the context."
            )
        n = np.bincount(code, minlength=len(values))
        spelling = manager.get_state_registry(PERTURBATION_KEY)["spelling"]
        small = [
            f"{spelling[i]} ({n[i]})" for i, (t, _) in enumerate(values) if t and n[i] < MIN_CELLS
        ]
        few = [f"control of {contexts[c]} ({m})" for c, m in enumerate(n_control) if m < MIN_CELLS]
        small = [*few, *small]
        if small:
            warnings.warn(
                f"Groups of fewer than {MIN_CELLS} cells, which weigh little: {len(small)}, namely "
                f"{', '.join(small[:20])}{' ...' if len(small) > 20 else ''}.",
                UserWarning,
                stacklevel=4,
            )

    # A pretrained encoder

    def _sizes(self, given: dict[str, Any], source: Registered) -> dict[str, Any]:
        """The sizes of a pretrained encoder, unless others were asked for."""
        theirs = source.init_params_["non_kwargs"]
        default = inspect.signature(type(self).__init__).parameters
        wrong = [
            f"{name}={value!r} (it has {theirs[name]!r})"
            for name, value in given.items()
            if value not in (default[name].default, theirs[name])
        ]
        if wrong:
            raise ValueError(
                f"The pretrained encoder cannot be used with {', '.join(wrong)}: leave them out."
            )
        return {name: theirs[name] for name in given}

    def _start_from(self, source: Registered, path: str) -> None:
        """Take over encoder and block predictor, gene by gene by name."""
        where = pd.Index(source.genes).get_indexer(pd.Index(self.genes))
        shared = int((where >= 0).sum())
        if not shared:
            raise ValueError(
                f"None of the {len(self.genes)} genes ({', '.join(self.genes[:3])}, ...) is known "
                f"to the encoder of {path}, which knows {', '.join(source.genes[:3])}, ...: are "
                "both gene symbols, of one species?"
            )
        if not source.is_pretrained_:
            raise ValueError(f"The encoder of {path} is not trained: call its pretrain() first.")
        places = torch.from_numpy(where)
        for part in ("encoder", "target_encoder", "block_predictor"):
            load_genes(getattr(self.module, part), getattr(source.module, part), places)
        self.module.known.copy_((places >= 0) & source.module.known[places])
        self.pretrained_ = {
            "path": path,
            "shared": shared,
            "new": [str(g) for g in self.genes[where < 0]],
            "unused": len(source.genes) - shared,
        }
        logger.info(
            "%d genes that the encoder of %s knows are not here.", len(source.genes) - shared, path
        )
        if shared < len(self.genes):
            warnings.warn(
                f"The encoder of {path} knows {shared} of the {len(self.genes)} genes here; the "
                "others are hidden from it until pretrain().",
                UserWarning,
                stacklevel=4,
            )
        self._standardise(cells := self._training_cells(), np.arange(len(cells)))
        self.is_pretrained_ = self.is_trained_ = True

    def _standardise(self, cells: Cells, where: np.ndarray) -> None:
        """What cells say of each gene, for the encoder's input and the decoder's start.

        Dispersion too: the steps that training has would not bring it there.
        """
        found = moments(cells, where)
        scale = max(float(np.sqrt(np.square(found.spread).mean())), 1e-3)
        for encoder in (self.module.encoder, self.module.target_encoder):
            encoder.set_standard(torch.from_numpy(found.root), scale)
        self.gene_share_ = np.maximum(found.share, 1e-8)
        decoder = self.module.decoder
        with torch.no_grad():
            rest = [max(1 - self.gene_share_.sum(), 1e-4)] if decoder.rest else []
            decoder.out.bias.copy_(torch.from_numpy(np.log(np.append(self.gene_share_, rest))))
            log_dispersion = np.log(np.clip(found.dispersion, 0.05, 100))
            decoder.log_dispersion.copy_(torch.from_numpy(log_dispersion))

    def _training_cells(self) -> Cells:
        """The attached cells that are trained on: those with counts and a perturbation."""
        if self._visible is not None:
            raise ValueError(
                f"The attached AnnData lacks {int((~self._visible).sum())} of the model's genes: "
                "it can be queried, not trained on."
            )
        cells = self._attached_cells()
        return cells if cells.usable.all() else cells.take(np.flatnonzero(cells.usable))

    def _attached_cells(self) -> Cells:
        if self.adata is None:
            raise ValueError("The model was loaded without data: give an AnnData.")
        manager = self.adata_manager
        for field in manager.fields:
            field.check_unchanged(self.adata, manager.get_state_registry(field.registry_key))
        self._validate_anndata(self.adata)
        return self._read(manager, self._visible)

    def _read(self, manager: AnnDataManager, visible: np.ndarray | None) -> Cells:
        cells = read_cells(manager, visible, self.n_batches, self._label_reader())
        if cells.visible.all() or self.registry_["setup_args"]["library_size_key"] is not None:
            return cells
        # The missing genes hold part of the library size, which the data do not show.
        share = self.gene_share_[cells.visible].sum() / self.gene_share_.sum()
        return replace(cells, library=cells.library / share)

    def _query_cells(self, adata: AnnData | None, *, decodes: bool = False) -> Cells:
        """Cells of any AnnData, aligned by gene name; the AnnData stays as it is.

        With ``decodes``, a warning names batches that training has not seen.
        """
        adata = self.adata if adata is None else adata
        if adata is None:
            raise ValueError("The model was loaded without data: give an AnnData.")
        if adata is self.adata:
            return self._attached_cells()
        check_anndata(adata)
        args = self._setup_arguments()
        check_columns(adata, {k: args[k] for k in ("context_key", "batch_key")})
        layer = self.registry_["field_registries"][REGISTRY_KEYS.X_KEY]["data_registry"]["attr_key"]
        for key in ("perturbation_key", "dataset_key"):
            if args[key] not in adata.obs:
                args[key] = None  # unlabelled cells can still be embedded
        light, visible = align(
            adata, self.genes, layer, [v for k, v in args.items() if k.endswith("_key")]
        )
        manager = AnnDataManager(fields=self._fields(layer, args))
        manager.register_fields(light, self.registry_)
        new = manager.get_state_registry(BATCH_KEY)["values"][self.n_batches :]
        if decodes and new:
            warnings.warn(
                f"{args['batch_key']} {', '.join(map(repr, new[:5]))}{' ...' * (len(new) > 5)} is "
                "not in the training data: counts are decoded without an offset for it.",
                UserWarning,
                stacklevel=3,
            )
        return self._read(manager, visible)

    # Methods, as scvi-tools looks up every property when a model is saved.

    def _setup_arguments(self) -> dict[str, Any]:
        """Arguments of :meth:`setup_anndata`; those that an older model lacks are None."""
        names = inspect.signature(type(self).setup_anndata).parameters
        return {**dict.fromkeys(names), **self.registry_["setup_args"]}

    def _label_reader(self) -> LabelReader:
        """How labels are written; it knows names that hold the separator."""
        reader = LabelReader.from_setup(self._setup_arguments())
        if not self.labelled:
            return reader
        found = self.get_state_registry(PERTURBATION_KEY).get("targets", ())
        return replace(reader, targets=reader.declared | set(found))

    def control_cells(self) -> AnnData:
        """The control cells among the training cells, all that predictions need of the data."""
        cells = self._attached_cells()
        assert self.adata is not None
        keep = self.adata[np.flatnonzero(cells.is_control & cells.expressed)]
        layer = self.registry_["field_registries"][REGISTRY_KEYS.X_KEY]["data_registry"]["attr_key"]
        counts = keep.X if layer is None else keep.layers[layer]
        own = [k for k in keep.obs if not str(k).startswith("_gpjepa_")]
        obs = keep.obs[own].copy()
        for name in own:
            # A file holds no perturbations that were set up as values.
            if any(isinstance(v, Perturbation) for v in obs[name].unique()):
                obs[name] = obs[name].astype(str)
        return AnnData(counts.copy(), obs=obs, var=keep.var[[]].copy())

    # Files

    def save(
        self, dir_path: str, prefix: str | None = None, overwrite: bool = False, **kwargs: Any
    ) -> None:
        """Save the model to a directory; nothing half written is left behind.

        Parameters
        ----------
        dir_path
            Directory; must not exist unless ``overwrite``.
        prefix
            Prepended to the names of the files.
        overwrite
            Replace the files of an existing directory.
        **kwargs
            As in :meth:`scvi.model.base.BaseModelClass.save`.
        """
        path = Path(dir_path)
        if path.exists() and not overwrite:
            raise ValueError(
                f"{dir_path} already exists. Choose another directory, or pass overwrite=True."
            )
        with written_whole(path) as draft:
            super().save(str(draft), prefix=prefix, overwrite=True, **kwargs)

    @classmethod
    def load(
        cls,
        dir_path: str,
        adata: AnnData | Literal[False] | None = None,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved model.

        Parameters
        ----------
        dir_path
            Directory that :meth:`save` wrote.
        adata
            Cells to attach, aligned by gene name; False for none.
        prefix
            Prefix of the names of the files.
        **kwargs
            As in :meth:`scvi.model.base.BaseModelClass.load`.

        Raises
        ------
        ValueError
            If the directory does not hold a whole model of this class.
        """
        file = Path(dir_path) / f"{prefix or ''}model.pt"
        if not file.is_file():
            raise ValueError(
                f"{dir_path} is not the directory of a saved model: it has no file {file.name}."
            )
        try:
            with quiet("scvi.data._download"):
                registry = cls.load_registry(str(dir_path), prefix)
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read as a model: it is truncated or of another kind "
                f"({type(error).__name__}: {error})."
            ) from error
        name = registry.get("model_name")
        if name != cls.__name__:
            raise ValueError(f"{dir_path} holds a model of class {name}, not {cls.__name__}.")
        visible = None
        if isinstance(adata, AnnData):
            adata, visible = cls._as_trained(adata, registry)
        with quiet("scvi.data._download"):
            model = super().load(str(dir_path), adata, prefix=prefix, **kwargs)
        model._visible = visible
        return model

    @staticmethod
    def _as_trained(adata: AnnData, registry: dict) -> tuple[AnnData, np.ndarray | None]:
        """The AnnData itself if its genes are the model's in their order, else an aligned copy.

        With a mask of the model's genes that it has, None for all.
        """
        counts = registry["field_registries"][REGISTRY_KEYS.X_KEY]
        genes = np.asarray(counts["state_registry"]["column_names"])
        if np.array_equal(adata.var_names.to_numpy().astype(str), genes.astype(str)):
            return adata, None
        light, visible = align(adata, genes, counts["data_registry"]["attr_key"], list(adata.obs))
        return light, None if visible.all() else visible
