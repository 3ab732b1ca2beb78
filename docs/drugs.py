"""Tables of drugs that docs/effects.yaml reads: structures, drug targets, scaffolds.

python docs/drugs.py DATA OUT
"""

import csv
import sys
from pathlib import Path

import anndata as ad
import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem.Scaffolds import MurckoScaffold

RDLogger.DisableLog("rdApp.*")


def write(path: Path, header: list[str], rows: list[tuple]) -> None:
    """A CSV file."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def lincs(data: Path, out: Path) -> None:
    """Structures, drugs by scaffold, and signatures as the signed log of z.

    Raw z is ruled by a few drugs.
    """
    adata = ad.read_h5ad(data / "lincs_drugs.h5ad")
    drugs = adata.obs["drug"].astype(str)
    write(
        out / "lincs_structures.csv",
        ["drug", "structure"],
        list(zip(drugs, adata.obs["inchi"], strict=True)),
    )
    scaffolds: dict[str, list[str]] = {}
    structures: dict[str, list[str]] = {}
    for drug, inchi in zip(drugs, adata.obs["inchi"], strict=True):
        generic = MurckoScaffold.MakeScaffoldGeneric(Chem.MolFromInchi(inchi))
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=generic) or "no ring"
        scaffolds.setdefault(scaffold, []).append(drug)
        # Salts, isotopes and stereoisomers are one drug.
        structures.setdefault(Chem.InchiToInchiKey(inchi)[:14], []).append(drug)
    for file, blocks in [("lincs_scaffolds", scaffolds), ("lincs_connectivity", structures)]:
        lines = ["\t".join([name, "", *sorted(set(of))]) for name, of in blocks.items()]
        (out / f"{file}.gmt").write_text("\n".join(lines) + "\n")
    z = np.asarray(adata.X)
    adata.X = np.sign(z) * np.log1p(np.abs(z))
    adata.write_h5ad(out / "lincs_log.h5ad")


def nelisa(data: Path, out: Path) -> None:
    """Structures, and the genes that the compounds act on."""
    wells = ad.read_h5ad(data / "nelisa_a549.h5ad", backed="r").obs
    wells = wells.astype(str).drop_duplicates("perturbation").query("perturbation != 'control'")
    columns = wells["perturbation"], wells["smiles"], wells["targets"]
    rows = list(zip(*columns, strict=True))
    write(out / "nelisa_structures.csv", ["drug", "structure"], [(d, s) for d, s, _ in rows])
    pairs = [(drug, gene) for drug, _, genes in rows for gene in genes.split("|") if gene]
    write(out / "nelisa_targets.csv", ["drug", "gene"], pairs)


if __name__ == "__main__":
    here, there = Path(sys.argv[1]), Path(sys.argv[2])
    there.mkdir(parents=True, exist_ok=True)
    lincs(here, there)
    nelisa(here, there)
