from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass
from sklearn.exceptions import NotFittedError

from gpjepa import plotting
from gpjepa._checks import check_anndata, check_columns, unchanged_on_error
from gpjepa._files import written_whole
from gpjepa.effects import (
    SCALES,
    EffectAnchor,
    Explanation,
    Scale,
    check_scale,
    denoise,
    enrichment,
    log1p_rates,
)
from gpjepa.perturbations import (
    MissingFeatures,
    Perturbation,
    TargetFeatures,
    Vocabulary,
    choose_features,
)
from gpjepa.response import GateOption, ResponsePredictor
from gpjepa.splits import MIN_UNITS

from . import _pretrained, _random
from ._arguments import check_plan, check_training, refuse_unknown
from ._cells import Cells, as_trained, positions
from ._data import Data
from ._generation import ControlCells, Generation
from ._module import MATCHINGS, GPJEPAModule
from ._populations import actions
from ._progress import quiet
from ._response import Asked, Response, predicted_effects
from ._results import (
    LAYERS,
    PredictedEffect,
    Results,
    checked_file,
    effect_frame,
    interaction_frame,
)
from ._running import Checkpoints, TrainingOptions
from ._setup import check_cells, check_groups, make_fields
from ._stage_a import PretrainPlan
from ._stages_bc import ActionPlan
from ._states import States
from ._summary import in_words
from ._training import (
    ActionOptions,
    ActionTraining,
    History,
    Pretraining,
    mean_effects,
    standardise,
)
from ._training_cells import TrainingCells

if TYPE_CHECKING:
    from gpjepa.planning import Goal, Ranking

_MANY = 250_000_000  # numbers in the layers of predicted cells, above which they are left out


class GPJEPA(BaseModelClass):
    r"""Predicts how single cells respond to perturbations, and says how sure it is.

    A joint-embedding predictive architecture for perturbations: an encoder that predicts the
    embedding of hidden genes (stage A), a predictor in which the perturbation is the action
    (stage B), and a negative-binomial decoder (stage C). Mean effects come from a closed-form anchor
    and networks that add to it (:class:`gpjepa.response.ResponsePredictor`):

    .. math:: D = A + g_r\,(N - A),

    with the anchor *A*, the network *N* of the regime, and a gate :math:`g_r` between 0 and 1: as
    large as measured perturbations, hidden as the regime hides them, show that the network helps.
    Predicted cells are control cells with that mean effect.

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    registry
        Registry of a saved model, instead of ``adata``.
    n_latent
        Dimensions of the state.
    encoder
        ``"mlp"``; ``"perceiver"``: learned queries that attend to all genes; ``"transformer"``:
        self-attention among the expressed genes; or ``"components"``: the components of
        :class:`gpjepa.nn.ComponentEncoder`, without stage A, the control of a learned encoder.
    components
        Whether states start from those components, to which the encoder adds. Without them it has
        to find those directions itself, and finds fewer of them.
    n_hidden
        Width of hidden layers.
    target_features
        What is known of targets besides their effects, so that targets never perturbed can be
        distinguished. ``"auto"``: what is known of human genes
        (:func:`gpjepa.perturbations.human_genes`), if at least half of the perturbed targets are
        among them. Or your own (:class:`gpjepa.perturbations.TargetFeatures`, one kind or several).
        None: targets never perturbed all take the shrunken mean effect.
    response
        What adds to the anchor: ``"pretrained"``, the response network that comes with the package,
        trained further on the screen where 20 pairs of targets were measured, and attention;
        ``"scratch"``, the same without what came with the package; or None, the anchor alone.
    missing_features
        A target never perturbed that no features know is refused (``"error"``), or takes the
        shrunken mean effect (``"mean"``). By default ``"mean"`` with ``"auto"`` features, and
        ``"error"`` with your own.
    targets
        Further names that may be asked for, such as those of a guide library, although no gene and
        no feature has them. Other names are refused, as they may be misspelt.
    pretrained
        Directory of a saved model whose encoder to start from, matched gene by gene by name. Its
        ``n_latent``, ``encoder``, ``components`` and ``n_hidden`` are taken over; genes that it does
        not know are hidden from it until :meth:`pretrain` is called. ``model.pretrained_`` says how
        many there are.

    Examples
    --------
    >>> adata = gpjepa.datasets.simulate()
    >>> gpjepa.GPJEPA.setup_anndata(adata)
    >>> model = gpjepa.GPJEPA(adata)
    >>> model.train()
    >>> cells = model.predict_perturbation(adata, "TF001+TF002")
    """

    _module_cls = GPJEPAModule
    is_pretrained_: bool
    init_params_: dict[str, Any]

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 64,
        encoder: Literal["mlp", "perceiver", "transformer", "components"] = "mlp",
        components: bool = True,
        n_hidden: int = 256,
        target_features: Literal["auto"]
        | TargetFeatures
        | Sequence[TargetFeatures]
        | None = "auto",
        response: Literal["pretrained", "scratch"] | None = "pretrained",
        missing_features: MissingFeatures | None = None,
        targets: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        if isinstance(targets, str):
            raise TypeError(f"targets={targets!r} is one name; give a list of names.")
        if response not in ("pretrained", "scratch", None):
            raise ValueError(
                f"response={response!r} is not known; choose 'pretrained', 'scratch' or None."
            )
        if encoder == "components" and not components:
            raise ValueError("encoder='components' needs components=True.")
        for name, size in (("n_latent", n_latent), ("n_hidden", n_hidden)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name}={size!r}: expected a whole number from 1.")
        super().__init__(adata, registry)
        sizes: dict[str, Any] = {
            "n_latent": n_latent,
            "encoder": encoder,
            "components": components,
            "n_hidden": n_hidden,
        }
        source = None
        if pretrained is not None:
            source = type(self).load(str(pretrained), adata=False)
            if not source.is_pretrained_:
                raise ValueError(
                    f"The encoder of {pretrained} is not trained: call its pretrain() first."
                )
            theirs = source.init_params_["non_kwargs"]
            sizes = _pretrained.sizes(sizes, theirs, type(self).__init__)
            n_latent, encoder, components, n_hidden = sizes.values()
        self._data = Data(self.registry_, type(self).setup_anndata)
        perturbed = [t for p in self._data.spellings for t in p.targets]
        features, missing = choose_features(target_features, missing_features, perturbed)
        self._new_predictor = partial(ResponsePredictor, features, missing_features=missing)
        self._network = response
        self._features = EffectAnchor(features, missing).features
        self.vocabulary = Vocabulary(perturbed, [*map(str, self.genes), *targets], self._features)
        self.module = GPJEPAModule(
            len(self.genes),
            len(self.vocabulary.perturbed),
            len(self.vocabulary),
            self._data.n_batches,
            rest=self._data.arguments["library_size_key"] is not None,
            **sizes,
        )
        self._model_summary_string = (
            f"GPJEPA with n_latent: {n_latent}, encoder: {encoder}, n_hidden: {n_hidden}, "
            f"genes: {len(self.genes)}, perturbed targets: {len(self.vocabulary.perturbed)}."
        )
        # Names that end with an underscore are saved.
        self.is_pretrained_ = False
        self.response_: Response | None = None
        self.gene_share_ = np.ones(len(self.genes)) / len(self.genes)
        self.history_: History | None
        self.pretrained_: dict[str, Any] = {}
        self._predictor: ResponsePredictor | None = None
        if source is not None:
            self.pretrained_ = _pretrained.take_over(
                self.module, self.genes, source.module, source.genes, str(pretrained)
            )
            cells = self._training_cells()
            self.gene_share_ = standardise(self.module, cells, np.arange(len(cells)))
            self.is_pretrained_ = True
            pretrained = None  # a saved model needs it no more
        self.init_params_ = self._get_init_params(locals())

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes, in the model's order."""
        return self._data.genes

    # Set-up

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
        fields = make_fields(layer, setup_method_args["setup_args"])
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        with unchanged_on_error(adata):
            manager.register_fields(adata, source_registry, **kwargs)
            if source_registry is None:
                check_cells(manager)
                if perturbation_key is not None:
                    check_groups(manager)
        cls.register_manager(manager)

    # Training

    def pretrain(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int = 256,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        **trainer_kwargs: Any,
    ) -> None:
        """Stage A alone: learn cell states by predicting the embedding of hidden genes.

        Works on unlabelled cells (``perturbation_key=None``). Of labelled ones, those that
        :meth:`train` holds out are left out here too. :meth:`train` then starts from here. What was
        learned before (``pretrained``) is where it starts, and what :meth:`train` found is dropped. Of
        2,000 unlabelled cells or more, a fiftieth is held out for the validation curve; where genes are new and components fitted
        to half of these cells say more of the other half than those brought along, the components
        are fitted again, and the network starts with adding nothing to them.

        Parameters
        ----------
        max_epochs
            Epochs; by default as many as make about 1,000 steps.
        batch_size
            Cells in a mini-batch.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs
            Options of :class:`gpjepa.model.PretrainPlan`.
        checkpoint_dir, resume
            As in :meth:`train`.
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`.
        """
        check_plan(PretrainPlan, plan_kwargs)
        check_training(
            "pretrain",
            trainer_kwargs,
            inspect.signature(self.pretrain).parameters,
            devices=devices,
            max_epochs=max_epochs,
            batch_size=batch_size,
        )
        data = TrainingCells(self._training_cells(), self.genes, self._data.batch_names)
        stage = self._stage_a(data, plan_kwargs, batch_size)
        what = {
            "method": "pretrain",
            "epochs of stage A": max_epochs,
            "stage A": plan_kwargs,
            "batch_size": batch_size,
            "trainer": trainer_kwargs,
        }
        checkpoints = self._checkpoints(data, what, checkpoint_dir, resume)
        options = TrainingOptions.of(checkpoints, accelerator, devices, trainer_kwargs)
        with self._restored_on_error():
            options = options.begin(self.module, self.is_pretrained_)
            share = standardise(self.module, data.cells, data.inside)
            history, _ = stage.run(max_epochs, options, options.callbacks)
        # What was learned of perturbations was learned of other states.
        self.response_ = self._predictor = None
        self.gene_share_, self.history_ = share, history
        self.is_pretrained_ = self.is_trained_ = True

    def train(
        self,
        max_epochs: int | None = None,
        pretrain_epochs: int | None = None,
        *,
        matching: str = "prototype",
        batch_size: int = 256,
        early_stopping: bool = True,
        early_stopping_patience: int = 8,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict | None = None,
        pretrain_kwargs: dict | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        **trainer_kwargs: Any,
    ) -> None:
        """Fit mean effects, then the encoder (stage A), then predictor and decoder (stages B, C).

        Mean effects are fitted on everything; how much of the networks counts is judged by hiding
        measured perturbations in turn. A share of the perturbations (fewer than fifteen: a context,
        else cells) is held out from stages A to C for early stopping. Ctrl-C during these ends
        training early and leaves a model that predicts; before, it leaves the model as it was.

        Parameters
        ----------
        max_epochs
            Epochs of stages B and C, 25 steps each; 40 by default.
        pretrain_epochs
            Epochs of stage A; by default as many as make about 1,000 steps, and none if
            :meth:`pretrain` was called.
        matching
            How unpaired control and perturbed cells are compared: ``"prototype"`` (means),
            ``"energy"``, ``"mmd"``, ``"sliced_wasserstein"`` (sets), or ``"ot"`` (entropic optimal
            transport pairs after removing the mean shift).
        batch_size
            Cells in a mini-batch of stage A, and perturbed cells in one of stages B and C.
        early_stopping, early_stopping_patience
            Stop when the error on what is held out has not improved so many times that it was
            judged, which is after every epoch by default; the best epoch is kept in any case.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs, pretrain_kwargs
            Options of :class:`gpjepa.model.ActionPlan` and :class:`gpjepa.model.PretrainPlan`.
        checkpoint_dir
            Directory in which every epoch leaves a checkpoint, under its name only once it is whole.
        resume
            Go on from the checkpoints in ``checkpoint_dir``, if there are any: after a crash, the
            same call gives the numbers of training that was never interrupted.
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`; ``callbacks`` are those of stages B and C, and
            ``check_val_every_n_epoch`` says how often what is held out is judged.
        """
        check_plan(ActionPlan, plan_kwargs)
        check_plan(PretrainPlan, pretrain_kwargs)
        check_training(
            "train",
            trainer_kwargs,
            inspect.signature(self.train).parameters,
            devices=devices,
            max_epochs=max_epochs,
            pretrain_epochs=pretrain_epochs,
            batch_size=batch_size,
            early_stopping_patience=early_stopping_patience,
        )
        if matching not in MATCHINGS:
            raise ValueError(f"matching={matching!r} is not known; choose one of {MATCHINGS}.")
        data = self._labelled_cells()
        patience = early_stopping_patience if early_stopping else None
        action_options = ActionOptions(
            max_epochs, batch_size, matching, patience, dict(plan_kwargs or {})
        )
        what = {
            "method": "train",
            "stages B and C": action_options,
            "epochs of stage A": pretrain_epochs,
            "stage A": pretrain_kwargs,
            "trainer": trainer_kwargs,
        }
        checkpoints = self._checkpoints(data, what, checkpoint_dir, resume)
        options = TrainingOptions.of(checkpoints, accelerator, devices, trainer_kwargs)
        pretrained = self.is_pretrained_
        if checkpoints is not None and checkpoints.begun is not None:
            pretrained = checkpoints.begun["pretrained"]
        pretrains = pretrain_epochs is not None or not pretrained
        stage_a = self._stage_a(data, pretrain_kwargs, batch_size) if pretrains else None
        share, history, interrupted = self.gene_share_, dict(self.history_ or {}), False
        with self._restored_on_error():
            options = options.begin(self.module, pretrained)
            predictor = self._new_predictor(self._network)
            action = ActionTraining(self.module, data, self._features, self.vocabulary)
            response = mean_effects(predictor, action.effects, data, options.shown)
            if stage_a is not None or not history:  # the decoder is not standardised yet
                share = standardise(self.module, data.cells, data.inside)
            if stage_a is not None:
                found, interrupted = stage_a.run(pretrain_epochs, options)
                history = found or history
            found = action.run(action_options, options, options.callbacks, skip=interrupted)
        history = {k: v for k, v in history.items() if k.startswith("pretrain")}
        self.response_, self._predictor = response, predictor
        self.gene_share_, self.history_ = share, history | found
        self.is_pretrained_ = self.is_trained_ = True

    def _labelled_cells(self) -> TrainingCells:
        """Training cells with perturbations that can be trained on."""
        if not self._data.labelled:
            raise ValueError(
                "The cells have no perturbations (perturbation_key=None): call pretrain(), or set "
                "the AnnData up with perturbation_key."
            )
        cells = self._training_cells()
        if cells.measured is not None:
            raise ValueError(
                "Cells of several data sets with genes of their own can be pretrained on, not "
                "trained on. Save this model, and start from it with one data set: "
                "GPJEPA(adata, pretrained=PATH)."
            )
        for perturbation in set(cells.each_perturbation):  # data that were loaded may hold new ones
            self.vocabulary.check(perturbation)
        return TrainingCells(cells, self.genes, self._data.batch_names)

    def _stage_a(
        self, data: TrainingCells, plan_kwargs: dict | None, batch_size: int
    ) -> Pretraining:
        return Pretraining(
            self.module, data, PretrainPlan(self.module, **(plan_kwargs or {})), batch_size
        )

    def _checkpoints(
        self,
        data: TrainingCells,
        what: Mapping[str, Any],
        directory: str | Path | None,
        resume: bool,
    ) -> Checkpoints | None:
        """Where training stands, if it was asked for; refused where it stands elsewhere."""
        if directory is None:
            if resume:
                raise ValueError("resume=True needs checkpoint_dir, where the checkpoints are.")
            return None
        features = [
            (f.name, f"{_random.key(*f.targets, f.take(f.targets).sum()):032x}")
            for f in self._features
        ]
        asked = {"model": self._model_summary_string, "target_features": features, **what}
        # Callbacks and loggers are other objects in another process.
        plain = {k: v for k, v in what["trainer"].items() if isinstance(v, int | float | str)}
        asked["trainer"] = {k: v for k, v in plain.items() if k != "enable_progress_bar"}
        written = {name: _written(value) for name, value in asked.items()}
        return Checkpoints(directory, resume, {**data.fingerprint(), **written})

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        """Training that fails, or is interrupted twice, leaves the model as it was."""
        before = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        try:
            yield
        except BaseException:
            self.module.load_state_dict(before)
            self.module.eval()
            raise

    def summary(self) -> str:
        """How well measured effects were predicted when hidden, and what to expect of predictions.

        Errors are those of the mean effect, freed of sampling noise, without the targeted genes, and
        as if predictions knew half of the controls and were judged by the others
        (:func:`gpjepa.effects.control_halves`). The gates were set on the same perturbations, so that
        the first number is a little too good; ``gpjepa.benchmark`` measures perturbations that
        nothing was chosen on.

        Returns
        -------
        str
            Four lines; the last says what targets never perturbed are predicted from.
        """
        return f"{in_words(self.mean_effects.judge())}\n{self._about_features()}"

    def _about_features(self) -> str:
        """What targets never perturbed are predicted from."""
        weights, n = self.anchor.feature_weights(), len(self.vocabulary.perturbed)
        if weights.empty:
            return "Targets never perturbed: all take the same mean effect; no target features are used."
        covers = [f.covers for f in self.anchor.features]
        known = sum(any(of(t) for of in covers) for t in self.vocabulary.perturbed)
        said = [f"{name} {w:.2f}" for name, w in weights["weight"].items() if w >= 0.005]
        covered = f"target features cover {known} of {n} perturbed targets"
        if said:
            how = f"predicted from similar targets; weight of {', '.join(said)}"
        elif known < MIN_UNITS:
            how = f"all take the same mean effect: features need {MIN_UNITS} to be judged by"
        else:
            how = "all take the same mean effect: features did not predict targets left out"
        return f"Targets never perturbed: {how} ({covered})."

    def plot_history(self, **kwargs: Any) -> Any:
        """Curves of training, a panel per stage (:func:`gpjepa.plotting.history`)."""
        if not self.history_:
            raise NotFittedError("The model is not trained yet: call train() first.")
        return plotting.history(self.history_, **kwargs)

    # Mean effects

    @property
    def anchor(self) -> EffectAnchor:
        """The closed-form predictor of mean effects, fitted on the training cells."""
        return self.mean_effects.anchor_

    @property
    def mean_effects(self) -> ResponsePredictor:
        """The predictor of mean effects: anchor, networks and gates."""
        if self.response_ is None:
            # Also an AttributeError, or scvi-tools could not save a model that is only pretrained.
            raise NotFittedError(
                "The model is not trained on perturbations yet: call train() first."
            )
        if self._predictor is None:
            found = self.response_
            predictor = self._new_predictor(found.judged.network)
            self._predictor = predictor.fit(found.effects, found.judged)
        return self._predictor

    def _effects(
        self, asked: Sequence[Asked], gate: GateOption, scales: Sequence[Scale] = SCALES
    ) -> list[PredictedEffect]:
        return predicted_effects(self.mean_effects, asked, gate, scales)

    def parse(
        self, perturbations: str | Perturbation | Sequence[str | Perturbation]
    ) -> dict[Perturbation, str]:
        """Read perturbations that can be predicted: by each, what results call it.

        Raises
        ------
        UnknownTargetError
            If nothing is known about a target; names the nearest known names.
        """
        anchor = self.anchor
        wanted = self._data.parse(perturbations)
        for p in wanted:
            self.vocabulary.check(p)
        anchor.check(list(wanted))
        return wanted

    def _contexts(self, wanted: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
        known = self.anchor.effects_.contexts
        if wanted is not None and not isinstance(wanted, Iterable):
            raise TypeError(f"context={wanted!r}: expected the name of a context, such as {known}.")
        chosen = (
            [wanted] if isinstance(wanted, str) else list(present if wanted is None else wanted)
        )
        if not chosen:
            raise ValueError(f"No context was given; known are {known}.")
        unknown = [c for c in chosen if c not in known]
        if unknown:
            raise ValueError(
                f"Unknown context {', '.join(map(repr, unknown))}; known are {known}. A context is "
                "known once its control cells are in the training data."
            )
        return chosen

    def predict_effects(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        contexts: str | Sequence[str] | None = None,
        *,
        scale: Scale = "mean_log1p",
        gate: GateOption = "auto",
    ) -> pd.DataFrame:
        """Mean effects, with their uncertainty.

        Parameters
        ----------
        perturbations
            One perturbation or several, such as ``["KLF1", "KLF1+MAP2K6"]``.
        contexts
            Contexts; all that training knows by default.
        scale
            ``"mean_log1p"``: mean over cells of log1p counts per 10,000; ``"log1p_mean"``: log1p
            of the pooled rate per 10,000.
        gate
            ``"auto"``, 0 (the anchor alone) or 1 (the network).

        Returns
        -------
        pandas.DataFrame
            One row per perturbation × context × gene: ``perturbation, context, gene, effect, sd,
            lower, upper, anchor, regime``; ``effect`` is the difference from the control of the
            context, ``lower`` and ``upper`` a 95% interval of the mean effect.

        Raises
        ------
        UnknownTargetError
            If nothing is known about a target; names the nearest known names.
        """
        check_scale(scale)
        _check_gate(gate)
        wanted = self.parse(perturbations)
        chosen = self._contexts(contexts, self.anchor.effects_.contexts)
        pairs = [(p, label, c) for p, label in wanted.items() for c in chosen]
        effects = self._effects(pairs, gate, [scale])
        return effect_frame(effects, self.genes, scale)

    def explain(
        self,
        perturbation: str | Perturbation,
        context: str | None = None,
        *,
        scale: Scale = "mean_log1p",
    ) -> Explanation:
        """What the anchor's prediction is made of: which expert says what, with which weight.

        Parameters
        ----------
        perturbation
            Such as ``"KLF1+MAP2K6"``.
        context
            Where; may be left out if there is only one.
        scale
            Scale of the effect.

        Returns
        -------
        gpjepa.effects.Explanation
            Tables of experts and measured effects; ``plot()`` draws them.
        """
        ((wanted, label),) = self.parse([perturbation]).items()
        if context is not None:
            self._contexts(context, [])
        found = self.anchor.explain(wanted, context, scale, self.vocabulary)
        said = {str(p): text for p, text in self._data.spellings.items()} | {str(wanted): label}
        sources = found.sources.replace({"perturbation": said})
        return replace(found, perturbation=label, sources=sources)

    def measured_effects(
        self, *, denoised: bool = False, scale: Scale = "mean_log1p", context: str | None = None
    ) -> AnnData:
        """The mean effects that training measured, for scanpy and pertpy.

        Parameters
        ----------
        denoised
            Free them of noise by what the effects of a context have in common
            (:func:`gpjepa.effects.denoise`).
        scale
            Scale of the effects.
        context
            The context to take; all of them by default.

        Returns
        -------
        anndata.AnnData
            One row per perturbation, and one of zeros for the control of each context, as
            :meth:`gpjepa.effects.EffectTable.to_anndata` gives; denoised, with the measured effects
            and the variance of what remains unknown in ``layers``.
        """
        check_scale(scale)
        effects = self.anchor.effects_
        return denoise(effects, scale, context) if denoised else effects.to_anndata(scale, context)

    def predict_interactions(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        contexts: str | Sequence[str] | None = None,
        *,
        scale: Scale = "mean_log1p",
        gate: GateOption = "auto",
    ) -> pd.DataFrame:
        """The part of combinations' mean effects that is not the sum of their singles' effects.

        Parameters
        ----------
        perturbations
            Combinations, such as ``"KLF1+MAP2K6"``.
        contexts, scale, gate
            As in :meth:`predict_effects`.

        Returns
        -------
        pandas.DataFrame
            One row per combination × context × gene: ``perturbation, context, gene, interaction,
            sd, lower, upper, additive, regime``; ``additive`` is the sum of the predicted effects
            of the singles, ``lower`` and ``upper`` a 95% interval of the interaction, as wide as that
            of the anchor's.

        Raises
        ------
        ValueError
            If a perturbation has fewer than two targets.
        """
        check_scale(scale)
        _check_gate(gate)
        wanted = self.parse(perturbations)
        chosen = self._contexts(contexts, self.anchor.effects_.contexts)
        pairs = [(p, label, c) for p, label in wanted.items() for c in chosen]
        found = self.anchor.predict_interactions(
            [p for p, _, _ in pairs], [c for _, _, c in pairs], scale
        )
        asked = [(q, label, c) for p, label, c in pairs for q in (p, *p.singles)]
        parts = iter(self._effects(asked, gate, [scale]))
        frames = [
            interaction_frame(
                found.rows(np.array([i])),
                [next(parts) for _ in range(1 + len(p.targets))],
                self.genes,
                scale,
            )
            for i, (p, _, _) in enumerate(pairs)
        ]
        return pd.concat(frames, ignore_index=True)

    def predict_enrichment(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        gene_sets: str | Path | Sequence[str | Path] | Mapping[str, Iterable[str]],
        contexts: str | Sequence[str] | None = None,
        *,
        gate: GateOption = "auto",
        min_genes: int = 5,
    ) -> pd.DataFrame:
        """Gene sets that predicted effects raise or lower (:func:`gpjepa.effects.enrichment`).

        Parameters
        ----------
        perturbations, contexts, gate
            As in :meth:`predict_effects`.
        gene_sets
            One or several GMT files, or genes by name of the set.
        min_genes
            Genes of a set that must have been measured.

        Returns
        -------
        pandas.DataFrame
            One row per perturbation × context × set: ``perturbation, context, set, score, pvalue,
            padj, n_genes``. The targeted genes themselves are left out.
        """
        wanted = self.parse(perturbations)
        frame = self.predict_effects(perturbations, contexts, gate=gate)
        targets = {label: p.targets for p, label in wanted.items()}
        return enrichment(frame, gene_sets, targets=targets, min_genes=min_genes)

    def rank_perturbations(
        self, goal: Goal, candidates: Sequence[str | Perturbation] | None = None, **kwargs: Any
    ) -> Ranking:
        """Rank perturbations by how well they meet a goal: :func:`gpjepa.planning.rank`.

        Parameters
        ----------
        goal
            What is wanted, such as :class:`gpjepa.planning.TowardsCells`.
        candidates, **kwargs
            Options of :func:`gpjepa.planning.rank`.

        Returns
        -------
        gpjepa.planning.Ranking
        """
        from gpjepa.planning import rank

        return rank(self, goal, candidates, **kwargs)

    # Cells

    def predict_perturbation(
        self,
        adata: AnnData | None,
        perturbation: str | Perturbation | Sequence[str | Perturbation],
        *,
        context: str | Sequence[str] | None = None,
        n_samples: int | None = None,
        return_mean: bool = False,
        layers: Sequence[str] | None = None,
        out: str | Path | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        gate: GateOption = "auto",
    ) -> AnnData:
        """Predict the cells that a perturbation makes of control cells.

        Each predicted cell is a control cell with other rates: what its own counts say of its
        rates beyond its state (the gamma posterior behind the negative binomial) is kept, all rates
        of a gene are multiplied so that their mean is the predicted one, and counts are drawn anew.

        Parameters
        ----------
        adata
            Cells; the control cells among them are taken. None for the training cells.
        perturbation
            One perturbation or several, such as ``"KLF1+MAP2K6"``.
        context
            Contexts; by default all whose control cells are in ``adata``.
        n_samples
            Predicted cells per perturbation and context; by default one per control cell.
        return_mean
            Put expected counts into ``X`` instead of sampled ones.
        layers
            Dense layers to keep for every cell: ``"expected"``, ``"expected_sd"``. By default both,
            unless they would take more than a gigabyte.
        out
            File, ``.h5ad`` or ``.zarr``, to which cells are written as they come, instead of being
            held in memory.
        batch_size
            Cells encoded and decoded at a time.
        seed
            Seed; the same seed gives the same cells, in whatever order cells and genes come.
        gate
            As in :meth:`predict_effects`.

        Returns
        -------
        anndata.AnnData
            ``X`` sampled counts; ``layers["expected"]`` expected counts per 10,000 and
            ``layers["expected_sd"]`` their standard deviation from that of the mean effect;
            ``varm`` the same of each perturbation's mean, in the order of
            ``uns["gpjepa"]["effects"]``; ``obsm["X_gpjepa"]`` states; ``obs`` perturbation, context, control cell, library size;
            ``uns["rank_genes_groups"]`` the predicted differential expression in scanpy's format;
            ``uns["gpjepa"]`` units, regime, gate, shares of anchor and network, seed, versions.

        Raises
        ------
        UnknownTargetError
            If nothing is known about a target; names the nearest known names.
        ValueError
            If ``adata`` has no control cells of a wanted context.
        FileExistsError
            If ``out`` exists.
        """
        wanted = self.parse(perturbation)
        if n_samples is not None and not (isinstance(n_samples, Integral) and n_samples > 0):
            raise ValueError(f"n_samples={n_samples}: expected a whole number from 1, or None.")
        _check_gate(gate)
        path = None if out is None else checked_file(out)
        if layers is not None and (isinstance(layers, str) or not {*layers} <= {*LAYERS}):
            raise ValueError(f"layers={layers!r}: expected a list of some of {list(LAYERS)}.")
        states = States(self.module, batch_size).in_double()
        controls = self._control_cells(adata, context, n_samples, seed, states)
        n_cells = len(wanted) * sum(len(c.cells) for c in controls.values())
        if layers is None:
            layers = LAYERS if n_cells * len(self.genes) * len(LAYERS) <= _MANY else ()
            if not layers:
                warnings.warn(
                    f"{n_cells} cells of {len(self.genes)} genes are predicted without "
                    "layers['expected'] and layers['expected_sd'], which would be dense: varm has "
                    "both per perturbation. layers=['expected'] asks for them per cell; out=FILE "
                    "writes cells as they come.",
                    UserWarning,
                    stacklevel=2,
                )
        results = Results(
            self.genes,
            seed,
            "expected counts" if return_mean else "sampled counts",
            {self._data.arguments[k]: k[:-4] for k in ("context_key", "perturbation_key")},
            self._data.label(Perturbation()),
            layers,
        )
        pairs = [(p, label, c) for p, label in wanted.items() for c in controls]
        assert self.response_ is not None
        generation = Generation(self.response_.library_shifts, seed, return_mean)
        effects = self._effects(pairs, gate)
        parts = (cells for e in effects for cells in generation.cells(e, controls[e.context]))
        return results.in_memory(parts) if path is None else results.on_disk(parts, path)

    def _control_cells(
        self,
        adata: AnnData | None,
        context: str | Sequence[str] | None,
        n_samples: int | None,
        seed: int,
        states: States,
    ) -> dict[str, ControlCells]:
        """Control cells of each wanted context."""
        cells = self._query_cells(adata, decodes=True)
        if cells.perturbations is None:
            key = self._data.arguments["perturbation_key"]
            raise ValueError(f"The AnnData has no column obs[{key!r}] that marks control cells.")
        control = np.flatnonzero(cells.is_control & cells.expressed)
        if not len(control):
            raise ValueError(
                "The AnnData has no control cells; predictions start from them. Pass the training "
                "AnnData, or control cells of your own."
            )
        at: dict[str, list[int]] = {}
        for i in control:
            at.setdefault(cells.contexts[i], []).append(int(i))
        chosen = self._contexts(context, sorted(at))
        absent = [c for c in chosen if c not in at]
        if absent:
            raise ValueError(f"The AnnData has no control cells of context {absent}.")
        found = {}
        for c in chosen:
            mine = cells.take(np.array(at[c]))
            where, draws = _random.choose(mine.names, n_samples, seed)
            rate = np.expm1(self.anchor.effects_.control["log1p_mean"][c].astype(float))
            found[c] = ControlCells(states, mine.take(where), draws, rate, len(chosen))
        return found

    # Measured cells

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """States of cells.

        Parameters
        ----------
        adata
            Cells, aligned by gene name; the training cells by default.
        indices
            Cells to take; all by default.
        batch_size
            Cells encoded at a time.

        Returns
        -------
        numpy.ndarray
            Shape (n_cells, n_latent).
        """
        self._check_states()
        cells = self._query_cells(adata)
        where = positions(len(cells), indices)
        # Batches in the order of the names: the same cells give the same numbers to the last bit.
        order = np.argsort(cells.names[where], kind="stable")
        states = States(self.module, batch_size)
        result = np.empty((len(where), states.n_latent), np.float32)
        result[order] = states.encode(cells, where[order])
        return result

    def embed(self, adata: AnnData, batch_size: int | None = None) -> None:
        """Write the states of cells to ``adata.obsm["X_gpjepa"]``."""
        adata.obsm["X_gpjepa"] = self.get_latent_representation(adata, batch_size=batch_size)

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        batch_size: int | None = None,
        return_numpy: bool = False,
    ) -> pd.DataFrame | np.ndarray:
        """Expression of measured cells, decoded from their states.

        Parameters
        ----------
        adata
            Cells; the training cells by default.
        indices
            Cells to take; all by default.
        gene_list
            Genes to take; all by default.
        library_size
            Counts of a cell that rates are given for, such as 10,000; ``"latent"`` for its own.
        batch_size
            Cells decoded at a time.
        return_numpy
            Give an array instead of a DataFrame.

        Returns
        -------
        pandas.DataFrame or numpy.ndarray
            Shape (n_cells, n_genes).
        """
        self._check_states(decodes=True)
        cells = self._query_cells(adata, decodes=True)
        where = positions(len(cells), indices)
        if isinstance(gene_list, str):
            raise TypeError(f"gene_list={gene_list!r} is one name; give a list of names.")
        if library_size != "latent" and not isinstance(library_size, Real):
            raise ValueError(f"library_size={library_size!r}: expected a number, or 'latent'.")
        names = self.genes if gene_list is None else np.asarray(gene_list, dtype=object)
        columns = pd.Index(self.genes).get_indexer(pd.Index(names))
        if (columns < 0).any():
            raise ValueError(
                f"Genes that the model does not know: {list(names[columns < 0])[:10]}."
            )
        states = States(self.module, batch_size)
        size = (
            cells.library[where] if library_size == "latent" else np.full(len(where), library_size)
        )
        found = np.empty((len(where), len(columns)), np.float32)
        for start in range(0, len(where), states.batch_size):
            at = slice(start, start + states.batch_size)
            part = where[at]
            share = states.decode(states.encode(cells, part), cells.batch[part])
            found[at] = share[:, columns] * size[at, None]
        return found if return_numpy else pd.DataFrame(found, cells.names[where], names)

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
    ) -> Any:
        """Counts drawn from each cell's own state, for :mod:`scvi.criticism`.

        Parameters
        ----------
        adata
            Cells; the training cells by default.
        indices
            Cells to take; all by default.
        n_samples
            Draws per cell.
        batch_size
            Cells decoded at a time.

        Returns
        -------
        sparse.GCXS
            Shape (n_cells, n_genes), with a third axis (n_samples,) if there are several.
        """
        import sparse

        self._check_states(decodes=True)
        cells = self._query_cells(adata, decodes=True)
        where = positions(len(cells), indices)
        states = States(self.module, batch_size).in_double()
        draws = [states.sample(cells, where, k) for k in range(n_samples)]
        return draws[0] if n_samples == 1 else sparse.stack(draws, axis=2)

    def log1p_counts(self, adata: AnnData | None = None) -> sp.csr_matrix:
        """Log1p counts per 10,000 of cells, as effects are measured on.

        Parameters
        ----------
        adata
            Cells, aligned by gene name; the training cells by default.

        Returns
        -------
        scipy.sparse.csr_matrix
            Shape (n_cells, n_genes).
        """
        cells = self._query_cells(adata)
        if not cells.visible.all():
            missing = self.genes[~cells.visible]
            raise ValueError(
                f"The cells lack {len(missing)} of the model's {len(self.genes)} genes, such as "
                f"{', '.join(map(str, missing[:5]))}: what they express is unknown."
            )
        return log1p_rates(cells.counts, cells.library)

    def get_perturbation_representation(self) -> pd.DataFrame:
        """Action embeddings of the training perturbations.

        Returns
        -------
        pandas.DataFrame
            One row per perturbation, shape (n_perturbations, n_action).
        """
        perturbations = self.anchor.effects_.perturbations
        embedding = actions(self.module, self.vocabulary, perturbations).cpu().numpy()
        return pd.DataFrame(embedding, index=[self._data.label(p) for p in perturbations])

    def _check_states(self, *, decodes: bool = False) -> None:
        if decodes and self.response_ is None:
            raise NotFittedError("The decoder is not trained yet: call train() first.")
        if not self.is_pretrained_:
            self._check_if_trained(warn=True)

    def _training_cells(self) -> Cells:
        return self._data.training(self.adata, self._manager, self.gene_share_)

    def _attached_cells(self) -> Cells:
        return self._data.attached(self.adata, self._manager, self.gene_share_)

    def _query_cells(self, adata: AnnData | None, *, decodes: bool = False) -> Cells:
        """The attached cells, or those of any AnnData, aligned by gene name."""
        if adata is None or adata is self.adata:
            return self._attached_cells()
        return self._data.query(adata, self.gene_share_, decodes=decodes)

    @property
    def _manager(self) -> AnnDataManager | None:
        return None if self.adata is None else self.adata_manager

    def control_cells(self) -> AnnData:
        """The control cells among the training cells, all that predictions need of the data."""
        cells = self._attached_cells()
        assert self.adata is not None
        return self._data.controls(self.adata, cells)

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
            if isinstance(error, AttributeError | ImportError) and "gpjepa" in str(error):
                raise ValueError(_earlier(dir_path)) from error
            raise ValueError(
                f"{file} cannot be read as a model: it is truncated or of another kind "
                f"({type(error).__name__}: {error})."
            ) from error
        name = registry.get("model_name")
        if name != cls.__name__:
            raise ValueError(f"{dir_path} holds a model of class {name}, not {cls.__name__}.")
        visible = None
        if isinstance(adata, AnnData):
            adata, visible = as_trained(adata, registry)
        with quiet("scvi.data._download"):
            model = super().load(str(dir_path), adata, prefix=prefix, **kwargs)
        if hasattr(model, "effects_"):
            raise ValueError(_earlier(dir_path))
        model._data.visible = visible
        return model


def _earlier(path: str) -> str:
    return (
        f"{path} was saved by an earlier development version, whose models this one cannot read. "
        "Train the model again."
    )


def _written(value: Any) -> str:
    """A value as text that is the same in every process, whatever the order of sets is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return _written(sorted(value, key=str))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


def _check_gate(gate: GateOption) -> None:
    if gate not in ("auto", 0, 1):
        raise ValueError(f"gate={gate!r}: choose 'auto', 0 (anchor) or 1 (network).")
