from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

_DENSE = 0.1  # share of values from which on dense products are faster


class TargetFeatures:
    """What is known of targets besides their effects, so that unseen ones can be predicted.

    Two targets are alike by the cosine of their features. A target whose features are all 0 is not
    covered.

    Parameters
    ----------
    targets
        Names of the targets, without repeats.
    values
        Features, shape (n_targets, n_features); dense or SciPy sparse.
    name
        What explanations and errors call these features.
    source
        Hashes of the perturbed cells that the features are made of, so that they are not used to
        predict effects of those same cells.
    other_names
        Further names of some of the targets, such as former symbols.

    Raises
    ------
    ValueError
        If names repeat, shapes do not fit, or values are not finite.
    """

    def __init__(
        self,
        targets: Sequence[str],
        values: np.ndarray | sp.spmatrix,
        name: str = "features",
        source: np.ndarray | None = None,
        other_names: Mapping[str, str] | None = None,
    ) -> None:
        names = [str(t) for t in targets]
        rows = sp.csr_matrix(values, dtype=float)
        if rows.shape[0] != len(names):
            raise ValueError(f"{name}: {len(names)} targets came with {rows.shape[0]} rows.")
        if len(set(names)) < len(names):
            repeats = sorted({t for t in names if names.count(t) > 1})[:3]
            raise ValueError(f"{name}: targets occur more than once, such as {repeats}.")
        if not np.isfinite(rows.data).all():
            raise ValueError(f"{name}: features hold NaN or infinite values; fill or drop them.")
        self.name = name
        self.source = np.zeros(0, np.uint64) if source is None else source
        # The targets, in the order of the rows, and then what else they are called.
        self.index = {t: i for i, t in enumerate(names)}
        for other, target in (other_names or {}).items():
            if target not in self.index:
                raise ValueError(f"{name}: {other!r} is to be {target!r}, which is no target.")
            self.index.setdefault(other, self.index[target])
        length = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
        self._covered = length > 0
        self._rows = sp.csr_matrix(sp.diags(1 / np.where(length > 0, length, 1)) @ rows)

    def __repr__(self) -> str:
        n, m = self._rows.shape
        return (
            f"TargetFeatures {self.name!r}: {int(self._covered.sum())} of {n} targets, {m} features"
        )

    @property
    def targets(self) -> list[str]:
        """The targets that are covered."""
        return [t for t, covered in zip(self._names, self._covered, strict=True) if covered]

    @cached_property
    def _names(self) -> list[str]:
        """The targets in the order of the rows, by the first of their names."""
        return list(self.index)[: len(self._covered)]

    def called(self, target: str) -> str | None:
        """The first of a target's names; None if it is not among the targets."""
        return self._names[self.index[target]] if target in self.index else None

    def covers(self, target: str) -> bool:
        """Whether anything is known of the target."""
        return target in self.index and bool(self._covered[self.index[target]])

    def coverage(self, targets: Iterable[str]) -> pd.Series:
        """Number of features that each target has, 0 where nothing is known.

        Returns
        -------
        pandas.Series
            Indexed by target.
        """
        n = np.diff(self._rows.indptr)
        found = {t: int(n[self.index[t]]) if self.covers(t) else 0 for t in targets}
        return pd.Series(found, name=self.name, dtype=int)

    def kernel(self, targets: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Cosine of the features of each pair, 0 where one is not covered.

        Returns
        -------
        numpy.ndarray
            Shape (n_targets, n_others).
        """
        left, right = self.take(targets), self.take(others)
        if self._rows.nnz > _DENSE * np.prod(self._rows.shape):
            return left.toarray() @ right.toarray().T
        return (left @ right.T).toarray()

    def take(self, targets: Sequence[str]) -> sp.csr_matrix:
        """Features of some targets at unit length, zeros for those not covered.

        Returns
        -------
        scipy.sparse.csr_matrix
            Shape (n_targets, n_features).
        """
        known = [(i, self.index[t]) for i, t in enumerate(targets) if t in self.index]
        at = np.array(known, int).reshape(-1, 2)
        pick = sp.csr_matrix(
            (np.ones(len(at)), (at[:, 0], at[:, 1])), shape=(len(targets), self._rows.shape[0])
        )
        return sp.csr_matrix(pick @ self._rows)

    def permuted(self, seed: int) -> TargetFeatures:
        """The same features, dealt out to other targets: a control that must not help."""
        targets = list(np.random.default_rng(seed).permutation(self._names))
        name = f"{self.name}, permuted"
        return TargetFeatures(targets, self._rows, name, self.source, self._other_names)

    @property
    def _other_names(self) -> dict[str, str]:
        return {o: self._names[i] for o, i in self.index.items() if o != self._names[i]}

    @classmethod
    def from_table(cls, table: pd.DataFrame, name: str = "table") -> TargetFeatures:
        """Any table, one row per target: embeddings of text, proteins or a foundation model.

        Columns are brought to mean 0 and standard deviation 1 over the table: cosines of raw
        embeddings are all close to 1.
        """
        values = table.to_numpy(float)
        spread = values.std(0)
        values = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
        return cls(table.index.astype(str).tolist(), values, name)

    @classmethod
    def from_gene_sets(
        cls,
        gene_sets: str | Path | Sequence[str | Path] | Mapping[str, Iterable[str]],
        name: str = "gene sets",
    ) -> TargetFeatures:
        """Membership in gene sets, each divided by the square root of the set's size.

        That is the covariance of effects if every set has an effect of its own with a variance of
        one over its size: small sets say more.

        Parameters
        ----------
        gene_sets
            One or several GMT files, or genes by name of the set.
        name
            What explanations call these features.
        """
        if isinstance(gene_sets, Mapping):
            text = [k for k, v in gene_sets.items() if isinstance(v, str)]
            if text:
                raise TypeError(f"{name}: set {text[0]!r} is a string; give a list of genes.")
            sets = {str(k): set(v) for k, v in gene_sets.items()}
        else:
            paths = [gene_sets] if isinstance(gene_sets, str | Path) else list(gene_sets)
            sets = {f"{p}:{k}": v for p in paths for k, v in read_gmt(p).items()}
        if not any(sets.values()):
            raise ValueError(f"{name}: the gene sets hold no genes.")
        of_gene: dict[str, list[str]] = {}
        for label, genes in sets.items():
            for gene in genes:
                of_gene.setdefault(gene, []).append(label)
        targets = sorted(of_gene)
        return cls(targets, _rare_first([of_gene[t] for t in targets]), name)

    @classmethod
    def from_smiles(
        cls, structures: Mapping[str, str] | pd.Series, *, radius: int = 2, name: str = "structure"
    ) -> TargetFeatures:
        """Substructures of drugs: Morgan fingerprints, in which rare ones count for more.

        Parameters
        ----------
        structures
            SMILES or InChI by name of the drug, of those perturbed and those to be predicted. Of a
            salt the largest molecule counts. Drugs without a structure (empty or NaN) are not
            covered.
        radius
            Bonds around each atom.
        name
            What explanations call these features.

        Raises
        ------
        ValueError
            Naming structures that cannot be read, or drugs that occur twice; or if no drug has one.
        ImportError
            If RDKit is not installed (the extra ``chemistry``).

        References
        ----------
        Rogers and Hahn (2010), extended-connectivity fingerprints.
        """
        table = pd.Series(structures, dtype=object)
        if not table.index.is_unique:
            repeats = sorted({str(d) for d in table.index[table.index.duplicated()]})[:3]
            raise ValueError(f"{name}: drugs occur more than once, such as {repeats}.")
        given = {str(k): v for k, v in table.items() if isinstance(v, str) and v}
        if not given:
            raise ValueError(f"{name}: none of the {len(table)} drugs has a structure.")
        return cls(list(given), _rare_first(_substructures(given, radius, name)), name)

    @classmethod
    def from_drug_targets(
        cls,
        drug_targets: Mapping[str, Iterable[str]],
        genes: TargetFeatures | Sequence[TargetFeatures],
    ) -> list[TargetFeatures]:
        """What is known of the genes that drugs act on: each drug is the mean of its targets.

        Genes stay covered, so that a drug is like a knock-out of its target.

        Parameters
        ----------
        drug_targets
            Genes by name of the drug.
        genes
            Features of the genes, of one kind or several, such as
            :func:`gpjepa.perturbations.human_genes`.

        Returns
        -------
        list of TargetFeatures
            One for each kind that knows a gene on which a drug acts.

        Raises
        ------
        TypeError
            If the genes of a drug are not a list.
        ValueError
            If none of the genes is known.

        Examples
        --------
        >>> acts_on = {"ruxolitinib": ["JAK1", "JAK2"], "erlotinib": ["EGFR"]}
        >>> features = TargetFeatures.from_drug_targets(acts_on, human_genes())
        """
        for drug, acts_on in drug_targets.items():
            if isinstance(acts_on, str) or not isinstance(acts_on, Iterable):
                raise TypeError(f"Drug {drug!r} acts on {acts_on!r}; expected a list of genes.")
        kinds = (genes,) if isinstance(genes, TargetFeatures) else tuple(genes)
        known = {str(drug): list(acts_on) for drug, acts_on in drug_targets.items()}
        found = [of for kind in kinds if (of := kind._of_drugs(known)) is not None]
        if not found:
            raise ValueError(
                f"None of the genes that the {len(known)} drugs act on is known. Are they symbols of "
                "the same species?"
            )
        return found

    def _of_drugs(self, drug_targets: Mapping[str, Sequence[str]]) -> TargetFeatures | None:
        """Drugs as the means of the genes that they act on, and the genes."""
        drugs = {d: [g for g in acts_on if self.covers(g)] for d, acts_on in drug_targets.items()}
        drugs = {drug: acts_on for drug, acts_on in drugs.items() if acts_on}
        if not drugs:
            return None
        means = np.array([self.take(acts_on).mean(0).A1 for acts_on in drugs.values()])
        others = [t for t in self.targets if t not in drugs]
        values = sp.vstack([sp.csr_matrix(means), self.take(others)])
        kept = set(others)
        names = {o: t for o, t in self._other_names.items() if t in kept and o not in drugs}
        name = f"{self.name} of drug targets"
        return TargetFeatures([*drugs, *others], values, name, self.source, names)

    @classmethod
    def from_regulons(cls, regulons: pd.DataFrame, name: str = "regulons") -> TargetFeatures:
        """Signed regulons: a regulator by the genes it acts on, a gene by its regulators.

        Parameters
        ----------
        regulons
            Columns ``source``, ``target`` and ``weight`` (the sign or strength), such as CollecTRI
            (Müller-Dott et al. 2023).
        name
            What explanations call these features.
        """
        _need_columns(regulons, ("source", "target", "weight"), name)
        edges = regulons.groupby(["source", "target"], as_index=False)["weight"].mean()
        targets = sorted({*edges["source"], *edges["target"]})
        index = {t: i for i, t in enumerate(targets)}
        source, target = edges["source"].map(index), edges["target"].map(index)
        n = len(targets)
        weight = edges["weight"].to_numpy(float)
        acts = sp.csr_matrix((weight, (source, target)), shape=(n, n))
        # What many regulators share, or what acts on many genes, says little, as for gene sets.
        acts = acts @ _inverse_root_size(acts.T)
        is_acted_on = sp.csr_matrix((weight, (target, source)), shape=(n, n))
        is_acted_on = is_acted_on @ _inverse_root_size(is_acted_on.T)
        return cls(targets, sp.hstack([acts, is_acted_on]), name)

    @classmethod
    def from_graph(
        cls, edges: pd.DataFrame, *, restart: float = 0.5, name: str = "graph"
    ) -> TargetFeatures:
        """Random walks with restart on a graph: targets are alike if their walks meet.

        Parameters
        ----------
        edges
            The first two columns name the ends; a third, ``weight``, is optional. Undirected.
        restart
            Probability to start again at each step; larger stays nearer.
        name
            What explanations call these features.
        """
        if edges.shape[1] < 2:
            raise ValueError(f"{name}: expected two columns with the ends of each edge.")
        if not 0 < restart <= 1:
            raise ValueError(f"{name}: restart={restart}; expected a number above 0, at most 1.")
        ends = edges.iloc[:, :2].astype(str).to_numpy()
        weight = edges["weight"].to_numpy(float) if "weight" in edges else np.ones(len(edges))
        if not (np.isfinite(weight) & (weight > 0)).all():
            raise ValueError(f"{name}: weights of edges must be positive numbers.")
        targets = sorted(set(ends.ravel()))
        index = {t: i for i, t in enumerate(targets)}
        i, j = (np.array([index[t] for t in ends[:, k]]) for k in (0, 1))
        shape = (len(targets), len(targets))
        adjacency = sp.csr_matrix(
            (np.tile(weight, 2), (np.append(i, j), np.append(j, i))), shape=shape
        )
        degree = np.asarray(adjacency.sum(1)).ravel()
        step = sp.diags(1 / np.where(degree > 0, degree, 1)) @ adjacency
        walk = here = sp.identity(len(targets), format="csr") * restart
        while True:
            here = (1 - restart) * here @ step
            here.data[np.abs(here.data) < 1e-5] = 0
            here.eliminate_zeros()
            if not here.nnz:
                return cls(targets, walk, name)
            walk = walk + here


def read_gmt(path: str | Path) -> dict[str, set[str]]:
    """Gene sets of a GMT file: name, description, genes, separated by tabs.

    Raises
    ------
    ValueError
        Naming the line that is not of this form.
    """
    sets: dict[str, set[str]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = line.rstrip().split("\t")
        genes = {gene for gene in fields[2:] if gene}
        if len(fields) < 3 or not genes:
            raise ValueError(
                f"{path}, line {number}: expected name, description and genes separated by tabs."
            )
        sets[fields[0]] = sets.get(fields[0], set()) | genes
    return sets


def _rare_first(has: Sequence[Iterable[Hashable]]) -> sp.csr_matrix:
    """What each target has, each column divided by the square root of how many have it."""
    columns: dict[Hashable, int] = {}
    pairs = [(i, columns.setdefault(x, len(columns))) for i, each in enumerate(has) for x in each]
    rows, at = np.array(pairs, int).reshape(-1, 2).T
    size = np.bincount(at, minlength=len(columns))
    return sp.csr_matrix((size[at] ** -0.5, (rows, at)), shape=(len(has), len(columns)))


def _substructures(structures: Mapping[str, str], radius: int, name: str) -> list[dict[int, int]]:
    try:
        from rdkit import Chem
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
        from rdkit.rdBase import BlockLogs
    except ImportError as error:
        raise ImportError(
            'Structures need RDKit; install it with pip install "gpjepa[chemistry]".'
        ) from error
    generator, found, wrong = GetMorganGenerator(radius), [], []
    with BlockLogs():
        for drug, text in structures.items():
            read = Chem.MolFromInchi if text.startswith("InChI=") else Chem.MolFromSmiles
            molecule = read(text)
            if molecule is None:
                wrong.append(f"{drug} ({text})")
                continue
            parts = Chem.GetMolFrags(molecule, asMols=True)
            largest = max(parts, key=lambda part: part.GetNumHeavyAtoms())
            found.append(generator.GetSparseCountFingerprint(largest).GetNonzeroElements())
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} structures are neither SMILES nor InChI: {', '.join(wrong[:5])}. "
            "Correct them, or leave these drugs out."
        )
    return found


def _need_columns(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    missing = [c for c in columns if c not in frame]
    if missing:
        raise ValueError(f"{name}: columns {missing} are missing; found {list(frame.columns)}.")


def _inverse_root_size(members: sp.spmatrix) -> sp.spmatrix:
    size = np.diff(sp.csr_matrix(members).indptr)
    return sp.diags(1 / np.sqrt(np.maximum(size, 1)))
