"""What a benchmark runs, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from gpjepa import datasets
from gpjepa.perturbations import TargetFeatures, human_genes, read_gmt
from gpjepa.splits import Manifest, Split

from ._splits import AnySplit, OwnManifest, Positive, Strict
from .methods import (
    CEILING,
    FLOOR,
    METHODS,
    ORACLES,
    Isolated,
    Peer,
    Role,
    check_options,
    check_peer,
    imported,
    is_seeded,
    role_of,
    takes_features,
)
from .metrics import METRICS
from .tasks import data_hash, measured_rows, standard_cells, standard_effects


class Features(Strict):
    """Features of targets, from one kind of file."""

    gene_sets: list[Path] | None = None
    regulons: Path | None = None
    graph: Path | None = None
    table: Path | None = None
    structures: Path | None = Field(None, description="CSV: drug, SMILES or InChI.")
    drug_targets: Path | None = Field(None, description="CSV: drug, gene; a row per pair.")
    human_genes: Literal[True] | None = Field(None, description="What comes with the package.")
    name: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Features:
        kinds = [k for k in type(self).model_fields if k != "name"]
        given = [k for k in kinds if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(kinds)}; found {given}")
        if self.name is not None and (self.human_genes or self.drug_targets):
            raise ValueError(f"{given[0]}: several kinds with names of their own; leave name out")
        return self

    def read(self) -> list[TargetFeatures]:
        if self.human_genes:
            return list(human_genes())
        if self.gene_sets:
            return [TargetFeatures.from_gene_sets(self.gene_sets, self.name or "gene sets")]
        if self.regulons:
            regulons = pd.read_csv(self.regulons)
            return [TargetFeatures.from_regulons(regulons, self.name or "regulons")]
        if self.graph:
            return [TargetFeatures.from_graph(pd.read_csv(self.graph), name=self.name or "graph")]
        if self.structures:
            known = _two_columns(self.structures).set_index(0)[1]
            return [TargetFeatures.from_smiles(known, name=self.name or "structure")]
        if self.drug_targets:
            acts_on = _two_columns(self.drug_targets).dropna().groupby(0)[1].agg(list)
            return TargetFeatures.from_drug_targets(acts_on.to_dict(), human_genes())
        table = pd.read_csv(self.table, index_col=0)
        return [TargetFeatures.from_table(table, self.name or "table")]


def _two_columns(path: Path) -> pd.DataFrame:
    """The first two columns of a CSV file, as text."""
    table = pd.read_csv(path, dtype=str)
    if table.shape[1] < 2:
        raise ValueError(f"{path}: expected two columns; found {list(table.columns)}.")
    return table.iloc[:, :2].set_axis([0, 1], axis=1)


class _Cells(Strict):
    """Where cells come from, and how they are labelled; see ``GPJEPA.setup_anndata``."""

    source: str | None = Field(None, description="A data set by name, or a .h5ad or .zarr file.")
    simulate: dict[str, Any] | None = Field(None, description="Arguments of datasets.simulate.")
    layer: str | None = None
    perturbation_key: str = "perturbation"
    control: str | list[str] = "control"
    control_pattern: str | None = Field(None, description="Regular expression of control labels.")
    context_key: str | None = None
    batch_key: str | None = None
    replicate_key: str | None = None
    dosage_key: str | None = None
    library_size_key: str | None = None
    cell_type_key: str | None = Field(None, description="Column of cell types, for avg_bio.")
    separator: str | None = "+"
    strip: str | None = None
    drop: list[str] = []
    drop_pattern: str | None = Field(None, description="Regular expression of labels to drop.")
    rename: dict[str, str] = {}
    targets: list[str] = []
    dose_pattern: str | None = None

    def load(self) -> ad.AnnData:
        """The cells, as every method gets them."""
        if self.simulate is not None:
            adata = datasets.simulate(**self.simulate)
        else:
            adata = datasets.load(str(self.source))
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"{self.source} holds {type(adata).__name__}; give an AnnData.")
        setup = self._setup()
        if self.simulate is not None and setup["context_key"] is None:
            setup["context_key"] = "context" if "context" in adata.obs else None
        return standard_cells(adata, **setup)

    def _setup(self) -> dict[str, Any]:
        elsewhere = {"source", "simulate", "control_pattern", "drop_pattern"}
        setup = {k: getattr(self, k) for k in _Cells.model_fields if k not in elsewhere}
        for key in ("control", "drop"):
            pattern = getattr(self, f"{key}_pattern")
            if pattern is not None:
                given = [setup[key]] if isinstance(setup[key], str) else setup[key]
                setup[key] = [*given, re.compile(pattern)]
        return setup


class Effects(Strict):
    """What the values are, where the data are effects or profiles and not cells."""

    unit: str = Field(description="Such as 'z-score'.")
    sd_layer: str | None = Field(None, description="Layer of standard errors.")


class Source(_Cells):
    """One of several data sets that are joined."""

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.source is None) == (self.simulate is None):
            raise ValueError("give either `source` or `simulate`")
        return self


class Data(_Cells):
    """A data set, or several joined on their shared genes, and how it is split."""

    name: Annotated[str, Field(pattern=r"^[^/\\\\]+$", description="Also the name of a file.")]
    join: dict[str, Source] | None = Field(
        None, description="Data sets by name instead of `source`; contexts are named after them."
    )
    effects: Effects | None = Field(None, description="Values that are effects, not cells.")
    n_cells: Positive | None = Field(None, description="Cells to draw, for curves over size.")
    n_genes: Positive | None = Field(None, description="Variable genes, chosen on training cells.")
    features: list[Features] = []
    gene_sets: list[Path] = Field([], description="GMT files, for the agreement of enrichment.")
    splits: Annotated[list[AnySplit], Field(min_length=1)]

    @model_validator(mode="after")
    def _one(self) -> Data:
        given = [k for k in ("source", "simulate", "join") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of `source`, `simulate` and `join`; found {given}")
        if self.effects is not None:
            of_cells = ["simulate", "join", "n_cells", "n_genes", "replicate_key", "dosage_key"]
            of_cells += ["library_size_key", "cell_type_key"]
            if wrong := [k for k in of_cells if getattr(self, k) is not None]:
                raise ValueError(f"{wrong} are for cells; leave them out with `effects`")
        if self.join is not None and self.n_cells is not None:
            raise ValueError("n_cells draws from one data set; leave it out with `join`")
        return self

    def load_joined(self) -> tuple[ad.AnnData, dict[str, str]]:
        """The cells, and the data set that each context comes from."""
        if self.effects is not None:
            cells = self._load_effects(self.effects)
            return cells, dict.fromkeys(cells.obs["context"].unique(), self.name)
        if self.join is None:
            cells = self.load()
            if self.n_cells is not None and self.n_cells < cells.n_obs:
                some = np.random.default_rng(0).permutation(cells.n_obs)[: self.n_cells]
                cells = cells[np.sort(some)].copy()
            return cells, dict.fromkeys(cells.obs["context"].unique(), self.name)
        parts: list[ad.AnnData] = []
        origin: dict[str, str] = {}
        for name, source in self.join.items():
            part = source.load()
            single = part.obs["context"].nunique() == 1
            context = name if single else name + ": " + part.obs["context"].astype(str)
            part.obs["context"] = context
            part.obs_names = name + ":" + part.obs_names
            origin |= dict.fromkeys(part.obs["context"].unique(), name)
            parts.append(part)
        joined = ad.concat(parts, join="inner")
        if joined.n_vars == 0:
            raise ValueError(f"{self.name}: {list(self.join)} share no gene by name.")
        # Counts of genes that others lack are part of the library size still.
        return joined[joined.obs_names.argsort()].copy(), origin

    def _load_effects(self, effects: Effects) -> ad.AnnData:
        adata = datasets.load(str(self.source))
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"{self.source} holds {type(adata).__name__}; give an AnnData.")
        setup = self._setup()
        for key in ("replicate_key", "dosage_key", "library_size_key", "cell_type_key"):
            del setup[key]
        return standard_effects(adata, unit=effects.unit, sd_layer=effects.sd_layer, **setup)

    def missing(self) -> list[Path]:
        """Files that it names and that are not there."""
        return _missing(self, Path)  # a source can be a data set by name

    def read_gene_sets(self) -> dict[str, set[str]] | None:
        """Genes by set, of all files; None without a file."""
        found = {f"{p.stem}: {k}": v for p in self.gene_sets for k, v in read_gmt(p).items()}
        return found or None

    def make_splits(self, cells: ad.AnnData, origin: dict[str, str]) -> Manifest:
        """All splits of these cells.

        Raises
        ------
        ValueError
            If a manifest is for other cells, or a split is empty.
        """
        rows = list(measured_rows(cells))
        found: list[Split] = []
        hashed = data_hash(cells)
        for split in self.splits:
            if isinstance(split, OwnManifest):
                manifest = Manifest.read(split.path)
                manifest.check(rows, hashed)
                found += manifest.splits
            else:
                found += split.make(rows, origin)
        return Manifest(self.name, hashed, tuple(found))


class MethodConfig(Strict):
    """A method by name, with options."""

    name: str
    label: str | None = Field(None, description="What tables call it; its name by default.")
    options: dict[str, Any] = {}
    script: Path | None = Field(None, description="Script of a method in its own environment.")
    python: Path | None = Field(None, description="Interpreter for the script, instead of uv.")
    data: list[str] | None = Field(None, description="Data sets it runs on; all by default.")
    not_run: str | None = Field(None, description="Why it is left out, for the report to say.")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self, info: ValidationInfo) -> MethodConfig:
        if self.script is not None or self.not_run is not None:
            return self
        known = [*METHODS, *ORACLES]
        if ":" in self.name:
            if (info.context or {}).get("import", True):
                imported(self.name)
        elif self.name not in known:
            raise ValueError(
                f"{self.name!r} is not a method; known are {', '.join(known)}, yours as "
                "'package.module:Class', and others with the `script` that runs them"
            )
        return self

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def role(self) -> Role:
        """The part that it plays, by what it is: a script or what is not run is just a method."""
        own = self.script is None and self.not_run is None
        return role_of(self.name) if own else "method"

    @property
    def is_oracle(self) -> bool:
        """Whether it sees the truth."""
        return self.role in ("ceiling", "oracle")

    @property
    def of_effects(self) -> bool:
        """Whether it can learn from effects without cells; classes of others may."""
        if self.script is not None:
            return False
        return self.name not in METHODS or METHODS[self.name].of_effects

    @property
    def seeded(self) -> bool:
        """Whether another seed changes it."""
        if self.not_run is not None:
            return False
        return self.script is not None or is_seeded(self.name)

    def start(self, features: list[TargetFeatures], seed: int, keep: Path) -> Isolated | Peer:
        """The method in a process of its own; answers of a script are kept in a folder."""
        if self.script is not None:
            return Peer(self.script, features, seed, self.options, self.python, keep)
        return Isolated(self.name, features, seed, self.options)

    def given(self, features: list[TargetFeatures]) -> str:
        """What it gets besides the training cells."""
        takes = self.script is None and takes_features(self.name)
        return ", ".join(f.name for f in features) if features and takes else "nothing else"

    def problem(self) -> str | None:
        """What keeps it from being run, as far as that can be seen before."""
        try:
            missing = _missing(self.options, str)
            if missing and self.not_run is None:
                raise ValueError(f"there is no file {missing[0]}")
            if self.not_run is None and self.script is not None:
                check_peer(self.script, self.python)
            elif self.not_run is None:
                check_options(self.name, self.options)
        except ValueError as error:
            return f"{self.title}: {error}"
        return None


class BenchmarkConfig(Strict):
    """A benchmark: data × splits × methods × seeds.

    Made from a YAML file or a preset by :meth:`read`.
    """

    title: str
    description: str = ""
    data: Annotated[list[Data], Field(min_length=1)]
    methods: Annotated[list[MethodConfig], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    metrics: Annotated[list[str], Field(min_length=1)] = list(METRICS)
    focus: str | None = Field(None, description="The method that the report speaks of.")
    _given: BenchmarkConfig | None = PrivateAttr(None)  # before its files were looked up

    def as_given(self) -> str:
        """The configuration as JSON, its files as it names them and not where they are."""
        return (self._given or self).model_dump_json(indent=1, exclude_defaults=True)

    @model_validator(mode="after")
    def _whole(self) -> BenchmarkConfig:
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics: {unknown} are not known; known are {', '.join(METRICS)}")
        _no_repeats("methods", [m.title for m in self.methods])
        _no_repeats("data", [d.name for d in self.data])
        if self.focus is not None and self.focus not in {m.title for m in self.methods}:
            raise ValueError(f"focus: {self.focus!r} is none of the methods")
        named = {n for m in self.methods for n in m.data or []} - {d.name for d in self.data}
        if named:
            raise ValueError(f"methods: {sorted(named)} are none of the data sets")
        # What scaled values are made of is always run.
        for data in self.data:
            here = {m.name for m, _ in self.on(data) if m.role in ("floor", "ceiling")}
            missing = [n for n in (FLOOR, CEILING) if n not in here]
            if missing:
                raise ValueError(
                    f"methods: floor and ceiling of scaled values are missing for {data.name}: "
                    f"{missing}"
                )
        return self

    def roles(self) -> dict[str, Role]:
        """The part of each method by title; only the first mean is the floor."""
        found: dict[str, Role] = {}
        for method in self.methods:
            role = method.role
            once = role in ("floor", "ceiling") and role in found.values()
            found[method.title] = role if not once else "negative" if role == "floor" else "oracle"
        return found

    def on(self, data: Data) -> list[tuple[MethodConfig, int]]:
        """The methods that run on a data set, each with its seeds: one where it has no use."""
        mine = [m for m in self.methods if data.name in (m.data or [data.name])]
        return [(m, s) for m in mine for s in (self.seeds if m.seeded else self.seeds[:1])]

    def narrowed(
        self, methods: Sequence[str] | None = None, n_seeds: int | None = None
    ) -> BenchmarkConfig:
        """The same with some of the methods, and with seeds 0, 1, ...

        Parameters
        ----------
        methods
            Titles of methods; floor and ceiling of scaled values always stay.
        n_seeds
            Number of seeds.

        Raises
        ------
        ValueError
            If a method is not among them.
        """
        unknown = sorted(set(methods or ()) - {m.title for m in self.methods})
        if unknown:
            known = [m.title for m in self.methods]
            raise ValueError(f"{unknown} are none of the methods, which are {', '.join(known)}.")
        roles = self.roles()
        keep = [
            m
            for m in self.methods
            if not methods or m.title in methods or roles[m.title] in ("floor", "ceiling")
        ]
        focus = self.focus if self.focus in {m.title for m in keep} else None
        seeds = self.seeds if n_seeds is None else list(range(n_seeds))
        found = self.model_copy(update={"methods": keep, "focus": focus, "seeds": seeds})
        if self._given is not None:
            found._given = self._given.narrowed(methods, n_seeds)
        return found

    def check(self) -> None:
        """Find files that are missing and options that no method has, before anything is loaded.

        A script that cannot be run is no error here: the report says why it was not.

        Raises
        ------
        ValueError
            With a line for each.
        """
        found = [f"{d.name}: there is no file {p}" for d in self.data for p in d.missing()]
        found += [p for m in self.methods if m.script is None and (p := m.problem())]
        if found:
            raise ValueError("The benchmark cannot be run:\n" + "\n".join(f"  {x}" for x in found))

    @classmethod
    def read(
        cls, source: str | Path | dict[str, Any], folder: str | Path | None = None
    ) -> BenchmarkConfig:
        """A preset by name, a YAML file, or a dict of the same form.

        Parameters
        ----------
        source
            The preset, file or dict.
        folder
            Where files are that it names, if they are not beside it.

        Raises
        ------
        ValueError
            Naming each key that is wrong.
        """
        import yaml

        name, folders = "the configuration", [Path.cwd() if folder is None else Path(folder)]
        if isinstance(source, dict):
            content = source
        else:
            path = PRESETS / f"{source}.yaml"
            if not path.exists():
                path = Path(source)
                folders.append(path.parent)
            if not path.is_file():
                raise ValueError(
                    f"{source!r} is neither a file nor a preset; presets are {', '.join(presets())}."
                )
            name = str(source)
            try:
                content = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise ValueError(f"{source} is not YAML: {error}") from error
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{name} is not a benchmark:\n{_told(error)}") from error
        found = cls.model_validate(_anchored(content, folders))
        found._given = config
        return found


PRESETS = Path(__file__).parent / "presets"


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def _no_repeats(key: str, names: Iterable[str]) -> None:
    seen = list(names)
    repeats = sorted({n for n in seen if seen.count(n) > 1})
    if repeats:
        raise ValueError(f"{key}: {repeats} occur more than once; give each a name or label")


def _told(error: ValidationError) -> str:
    """One line per wrong key, such as ``data.0.splits.1.folds``."""
    lines = []
    for e in error.errors():
        where = ".".join(str(x) for x in e["loc"]) or "(whole file)"
        lines.append(f"  {where}: {e['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


PATHS = (
    *("source", "path", "regulons", "graph", "table", "blocks", "gene_sets"),
    *("structures", "drug_targets"),
    *("python", "script", "weights"),
)
"""Names under which a configuration, or the options of a method, hold files and folders."""


def mapped(value: Any, change: Callable[[Any, str], Any], key: str = "") -> Any:
    """A part of a configuration with every value changed, given the name that it stands under."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {k: mapped(v, change, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(v, change, key) for v in value]
    return change(value, key)


def is_path(value: Any, key: str) -> bool:
    """Whether a value of a configuration is a file or a folder."""
    return isinstance(value, Path) or (key in PATHS and isinstance(value, str))


def _missing(value: Any, kind: type[Path] | type[str]) -> list[Path]:
    """Paths in a part of a configuration that are not there."""
    found: list[Path] = []

    def look(leaf: Any, key: str) -> None:
        if is_path(leaf, key) and isinstance(leaf, kind) and not Path(leaf).exists():
            found.append(Path(leaf))

    mapped(value, look)
    return sorted(set(found))


def _anchored(content: Any, folders: Sequence[Path]) -> Any:
    """Paths made absolute: in the first of the folders that holds them."""

    def change(value: Any, key: str) -> Any:
        if not is_path(value, key):
            return value
        there = (str((f / value).absolute()) for f in folders if (f / value).exists())
        return next(there, value)

    return mapped(content, change)
