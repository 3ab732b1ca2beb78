"""Registry fields: counts checked to be counts, and labels that may be new in another AnnData.

scvi-tools' CategoricalObsField refuses categories that training has not seen. A perturbation or a
context may well be unseen, so these fields append what is new behind what training knew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi.data.fields import BaseAnnDataField, LayerField

from gpjepa._checks import check_counts, check_gene_names
from gpjepa.perturbations import LabelReader, Perturbation

PERTURBATION_KEY = "perturbation"
CONTEXT_KEY = "context"
BATCH_KEY = "batch_label"
LIBRARY_KEY = "library_size"
DATASET_KEY = "dataset"
MEASURED = "measured"
"""Where ``varm`` says which data set measured which gene."""
ONLY = "all"
"""Name of the context, or batch, of data that have just one."""


class CountsField(LayerField):
    """Raw counts; every value is checked, before any long work starts."""

    def validate_field(self, adata: AnnData) -> None:
        """Refuse empty data, duplicate genes, and values that are not counts."""
        if adata.n_obs == 0 or adata.n_vars == 0:
            raise ValueError(
                f"The AnnData holds {adata.n_obs} cells and {adata.n_vars} genes: the selection "
                "is empty."
            )
        check_gene_names(adata.var_names)
        where = "X" if self.attr_key is None else f"layers[{self.attr_key!r}]"
        if self.attr_key is not None and self.attr_key not in adata.layers:
            raise KeyError(
                f"layer={self.attr_key!r} is not in adata.layers, which has "
                f"{sorted(map(str, adata.layers))}."
            )
        data = self.get_field_data(adata)
        if data is None:
            raise ValueError("X is empty; give the layer with raw counts, e.g. layer='counts'.")
        check_counts(data, where)


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
        if self.obs_key not in adata.obs:
            raise KeyError(
                f"{self.obs_key!r} is not a column of adata.obs, which has "
                f"{list(map(str, adata.obs.columns))}."
            )
        return adata.obs[self.obs_key]

    def _read(self, adata: AnnData, training: bool) -> list[Any]:
        raise AssertionError("each field says how it reads")

    def _describe(self, value: Any) -> Any:
        return value

    def validate_field(self, adata: AnnData) -> None:
        """Values are checked as they are read."""

    def register_field(self, adata: AnnData) -> dict:
        """List the values in sorted order and write their codes."""
        values = self._read(adata, training=True)
        return self._write(adata, values, sorted(set(values)))

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Keep the codes of known values and append new ones."""
        values = self._read(adata_target, training=False)
        known = [self._restore(v) for v in state_registry["values"]]
        new = sorted(set(values) - set(known))
        return self._write(adata_target, values, [*known, *new])

    def _restore(self, described: Any) -> Any:
        return described

    def _write(self, adata: AnnData, values: list[Any], order: list[Any]) -> dict:
        code = {value: i for i, value in enumerate(order)}
        adata.obs[self.attr_key] = np.fromiter((code[v] for v in values), np.int64, len(values))
        return {"values": [self._describe(v) for v in order], "obs_key": self.obs_key}

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Number of values."""
        return {f"n_{self._registry_key}s": len(state_registry["values"])}

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

    def _read(self, adata: AnnData, training: bool) -> list[str]:
        if self.obs_key is None:
            return [ONLY] * adata.n_obs
        column = self._column(adata)
        if column.isna().any():
            raise ValueError(
                f"{int(column.isna().sum())} cells have no value in obs[{self.obs_key!r}]; "
                "label or remove them."
            )
        return column.astype(str).tolist()


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

    def _read(self, adata: AnnData, training: bool) -> list[Perturbation]:
        doses = None
        if self.dosage_key is not None:
            if self.dosage_key not in adata.obs:
                raise KeyError(f"dosage_key={self.dosage_key!r} is not a column of adata.obs.")
            doses = adata.obs[self.dosage_key]
        return self.reader.read_column(self._column(adata), doses, need_control=training)

    def _describe(self, value: Perturbation) -> tuple:
        return (value.targets, value.doses)

    def _restore(self, described: Any) -> Perturbation:
        return Perturbation(tuple(described[0]), tuple(described[1]))
