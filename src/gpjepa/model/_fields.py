"""Registry fields: counts checked to be counts, and labels that may be new in another AnnData.

scvi-tools' CategoricalObsField refuses categories that training has not seen. A perturbation or a
context may well be unseen, so these fields append what is new behind what training knew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data.fields import BaseAnnDataField, LayerField, NumericalObsField

from gpjepa._checks import (
    check_columns,
    check_counts,
    check_layer,
    count_sums,
    same_values,
    text_of,
)
from gpjepa.perturbations import LabelReader, Perturbation

PERTURBATION_KEY = "perturbation"
CONTEXT_KEY = "context"
BATCH_KEY = REGISTRY_KEYS.BATCH_KEY
REPLICATE_KEY = "replicate"
LIBRARY_KEY = "library_size"
DATASET_KEY = "dataset"
MEASURED = "measured"
"""Where ``varm`` says which data set measured which gene."""
N_KNOWN, HASH, DOSE_HASH = "n_known", "hash", "dose_hash"
NO_VALUE = -1
"""Code of a cell without a perturbation."""
_SHARED = (
    "X and layers[{0!r}] hold the same values: the layer was assigned without a copy, and was "
    "changed together with X. Assign adata.layers[{0!r}] = adata.X.copy() before X is normalised."
)
ONLY = "all"
"""Name of the context, or batch, of data that have just one."""


class CountsField(LayerField):
    """Raw counts; every value is checked, before any long work starts."""

    SUMS = "sums"

    @property
    def where(self) -> str:
        """What the user calls the matrix."""
        return "X" if self.attr_key is None else f"layers[{self.attr_key!r}]"

    def validate_field(self, adata: AnnData) -> None:
        """Refuse values that are not counts."""
        check_layer(adata, self.attr_key)
        data = self.get_field_data(adata)
        if data is None:
            raise ValueError("X is empty; give the layer with raw counts, e.g. layer='counts'.")
        try:
            check_counts(data, self.where)
        except ValueError as error:
            if same_values(adata, self.attr_key):
                raise ValueError(f"{error.args[0]} {_SHARED.format(self.attr_key)}") from error
            raise

    def register_field(self, adata: AnnData) -> dict:
        """Remember sums of the counts, which tell later whether they were changed."""
        return {**super().register_field(adata), self.SUMS: count_sums(self.get_field_data(adata))}

    def check_unchanged(self, adata: AnnData, state_registry: dict) -> None:
        """Refuse counts that were normalised or replaced since they were registered."""
        names = np.asarray(state_registry[self.COLUMN_NAMES_KEY])
        if not np.array_equal(adata.var_names.to_numpy().astype(str), names.astype(str)):
            raise ValueError(
                "The genes of the AnnData were changed, renamed or put in another order after "
                "setup_anndata. Put them back, or call setup_anndata and create a new model."
            )
        registered = state_registry.get(self.SUMS)  # models of older versions have none
        if registered is None or count_sums(self.get_field_data(adata)) == tuple(registered):
            return
        shared = (
            _SHARED.format(self.attr_key)
            if same_values(adata, self.attr_key)
            else ("Normalise a copy, or keep raw counts: adata.layers['counts'] = adata.X.copy().")
        )
        raise ValueError(
            f"{self.where} was changed after setup_anndata: it no longer holds the registered "
            f"counts. {shared} Put the raw counts back, or call setup_anndata and create a new model."
        )


def _hash(column: pd.Series) -> str:
    """Tells whether a column was changed; depends on the order of cells."""
    place = np.arange(1, len(column) + 1, dtype=np.uint64)
    text = text_of(column).to_numpy(dtype=object)
    return hex(int((pd.util.hash_array(text) * place).sum(dtype=np.uint64)))


def _check_column(adata: AnnData, column: str, state_registry: dict) -> None:
    registered = state_registry.get(HASH)  # models of older versions have none
    if registered is None or (column in adata.obs and _hash(adata.obs[column]) == registered):
        return
    raise ValueError(
        f"obs[{column!r}] was changed or removed after setup_anndata. Put the column back, or call "
        "setup_anndata and create a new model."
    )


class LibraryField(NumericalObsField):
    """Library sizes, which must not change after they were registered."""

    def register_field(self, adata: AnnData) -> dict:
        """Remember a hash of the column."""
        return {**super().register_field(adata), HASH: _hash(adata.obs[self.attr_key])}

    def check_unchanged(self, adata: AnnData, state_registry: dict) -> None:
        """Refuse a column that was changed since it was registered."""
        _check_column(adata, self.attr_key, state_registry)


class _CodesField(BaseAnnDataField):
    """Integer codes in ``.obs`` for values that the state registry lists."""

    def __init__(self, registry_key: str, obs_key: str | None) -> None:
        super().__init__()
        self._registry_key = registry_key
        self.obs_key = obs_key

    @property
    def registry_key(self) -> str:
        return self._registry_key

    @property
    def attr_name(self) -> str:
        return "obs"

    @property
    def attr_key(self) -> str:
        return f"_gpjepa_{self._registry_key}"

    @property
    def is_empty(self) -> bool:
        return False

    def _column(self, adata: AnnData) -> pd.Series:
        check_columns(adata, {f"{self._registry_key}_key": self.obs_key})
        return adata.obs[self.obs_key]

    def _read(self, adata: AnnData, training: bool) -> list[Any]:
        """Value of each cell; None for a cell that has none."""
        raise AssertionError("each field says how it reads")

    def _describe(self, value: Any) -> Any:
        return value

    def validate_field(self, adata: AnnData) -> None:
        """Values are checked as they are read."""

    def register_field(self, adata: AnnData) -> dict:
        """List the values in sorted order and write their codes."""
        values = self._read(adata, training=True)
        order = sorted(set(values) - {None})
        return self._write(adata, values, order, len(order))

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Keep the codes of known values and append new ones."""
        values = self._read(adata_target, training=False)
        known = [self._restore(v) for v in state_registry["values"]]
        new = sorted(set(values) - {None, *known})
        n_known = state_registry.get(N_KNOWN, len(known))
        return self._write(adata_target, values, [*known, *new], n_known)

    def _restore(self, described: Any) -> Any:
        return described

    def _write(self, adata: AnnData, values: list[Any], order: list[Any], n_known: int) -> dict:
        code = {None: NO_VALUE} | {value: i for i, value in enumerate(order)}
        adata.obs[self.attr_key] = np.fromiter((code[v] for v in values), np.int64, len(values))
        return {
            "values": [self._describe(v) for v in order],
            N_KNOWN: n_known,
            "obs_key": self.obs_key,
            HASH: _hash(adata.obs[self.obs_key]) if self.obs_key in adata.obs else None,
        }

    def check_unchanged(self, adata: AnnData, state_registry: dict) -> None:
        """Refuse a column that was changed since it was registered."""
        if self.obs_key is not None:
            _check_column(adata, self.obs_key, state_registry)

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Number of values."""
        return {f"n_{self._registry_key}": len(state_registry["values"])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """The values and their codes."""
        table = rich.table.Table(title=f"{self._registry_key} State Registry")
        table.add_column("Source")
        table.add_column("Value")
        table.add_column("Code")
        for i, value in enumerate(state_registry["values"]):
            table.add_row(f"adata.obs[{self.obs_key!r}]" if i == 0 else "", str(value), str(i))
        return table


class LabelField(_CodesField):
    """Context or batch of each cell; one for all where no column is given."""

    def _read(self, adata: AnnData, training: bool) -> list[Any]:
        if self.obs_key is None:
            return [ONLY] * adata.n_obs
        column = self._column(adata)
        if column.isna().any():
            raise ValueError(
                f"{int(column.isna().sum())} cells have no value in obs[{self.obs_key!r}]; "
                "label or remove them."
            )
        return text_of(column).tolist()


class ReplicateField(LabelField):
    """Guide, animal or well of each cell; cells to predict from need none."""

    def _read(self, adata: AnnData, training: bool) -> list[Any]:
        if not training and self.obs_key not in adata.obs:
            return [None] * adata.n_obs
        return super()._read(adata, training)


class DatasetField(LabelField):
    """Data set of each cell, and in ``varm["measured"]`` the genes that it measured."""

    def _read(self, adata: AnnData, training: bool) -> list[str]:
        values = super()._read(adata, training)
        table = adata.varm.get(MEASURED)
        known = list(map(str, table.columns)) if isinstance(table, pd.DataFrame) else []
        absent = sorted(set(values) - set(known))
        if absent:
            raise ValueError(
                f"varm[{MEASURED!r}] does not say which genes {', '.join(map(repr, absent))} "
                f"measured: expected a DataFrame of booleans with a column per data set, as "
                f"gpjepa.datasets.join makes it; found columns {known}."
            )
        return values


class PerturbationField(_CodesField):
    """Perturbation of each cell, read as the user said labels are written."""

    def __init__(self, obs_key: str, reader: LabelReader, dosage_key: str | None) -> None:
        super().__init__(PERTURBATION_KEY, obs_key)
        self.reader = reader
        self.dosage_key = dosage_key

    def _doses(self, adata: AnnData) -> pd.Series | None:
        return None if self.dosage_key is None else adata.obs[self.dosage_key]

    def _read(self, adata: AnnData, training: bool) -> list[Perturbation | None]:
        if not training and self.dosage_key not in adata.obs:  # control cells need no dose
            return self.reader.read_cells(self._column(adata), unreadable=None)
        column, doses = self._column(adata), self._doses(adata)
        if training:
            self.reader = self.reader.checked(column, genes=adata.var_names)
            return self.reader.read_cells(column, doses)
        return self.reader.read_cells(column, doses, unreadable=None)

    def register_field(self, adata: AnnData) -> dict:
        """Also what the data call each perturbation, and names that hold the separator."""
        state = super().register_field(adata)
        if self.dosage_key is not None:
            state[DOSE_HASH] = _hash(adata.obs[self.dosage_key])
        said = self.reader.spellings(self._column(adata), self._doses(adata))
        return {
            **state,
            "spelling": [said[self._restore(v)] for v in state["values"]],
            "targets": sorted(self.reader.declared),
        }

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """As training read them, with what training called them."""
        kept = {k: state_registry[k] for k in ("spelling", "targets") if k in state_registry}
        self.reader = replace(self.reader, targets=kept.get("targets", ()))
        state = super().transfer_field(state_registry, adata_target, **kwargs)
        if self.dosage_key in adata_target.obs:
            kept[DOSE_HASH] = _hash(adata_target.obs[self.dosage_key])
        return {**state, **kept}

    def check_unchanged(self, adata: AnnData, state_registry: dict) -> None:
        """Refuse labels or doses that were changed since they were registered."""
        super().check_unchanged(adata, state_registry)
        if self.dosage_key is not None:
            _check_column(adata, self.dosage_key, {HASH: state_registry.get(DOSE_HASH)})

    def _describe(self, value: Perturbation) -> tuple:
        return (value.targets, value.doses)

    def _restore(self, described: Any) -> Perturbation:
        targets, doses = described
        return Perturbation.of(targets, doses) if targets else Perturbation()
