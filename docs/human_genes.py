"""Regenerate the knowledge of human genes that comes with the package from public files.

python docs/human_genes.py FILES [TABLES]

FILES is a directory that holds

* ``hgnc_complete_set.txt``: symbols, other names, Entrez and Ensembl ids, families (HGNC);
* ``reactome.gmt`` and ``go_biological_process.gmt``: gene sets (Reactome; Gene Ontology);
* ``gene2go.gz``, ``gene2pubmed.gz`` (NCBI, ftp.ncbi.nlm.nih.gov/gene/DATA) and ``go-basic.obo``
  (geneontology.org): annotation and co-citation. They take minutes, and are not read if TABLES, a
  file with these tables as this script writes them, is given.

It writes ``human_genes.npz`` and ``gene_sets.npz`` into the package. The README beside them says
which editions they were made of.
"""

import csv
import gzip
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

import gpjepa.perturbations
from gpjepa.perturbations import read_gmt

HERE = Path(gpjepa.perturbations.__file__).parent / "knowledge"
HUMAN = "9606"
SIZES = {"go": 128, "pubmed": 64}
SHORTEST = 3  # letters of another name: shorter ones mean too many things
MOST_GENES = 100  # papers on more genes than this say little of each
SETS = ("reactome", "go_biological_process")


def main(files: Path, tables: Path | None) -> None:
    """Read the files and write what the package reads."""
    with open(files / "hgnc_complete_set.txt") as file:
        hgnc = list(csv.DictReader(file, delimiter="\t"))
    known = dict(np.load(tables)) if tables else make_tables(files, hgnc)
    # NCBI calls mitochondrial genes COX2, as others call PTGS2: HGNC's MT-CO2 is clear.
    clear = {g["entrez_id"]: g["symbol"] for g in hgnc if g["symbol"].startswith("MT-")}
    symbols = [clear.get(e, str(s)) for e, s in zip(known["entrez"], known["symbol"], strict=True)]
    others, ensembl, family = of_hgnc(hgnc, dict(zip(known["entrez"], symbols, strict=True)))
    np.savez_compressed(
        HERE / "human_genes.npz",
        entrez=known["entrez"],
        symbol=np.array(symbols),
        go=known["go"].astype(np.float16),
        pubmed=known["pubmed"].astype(np.float16),
        ensembl=np.array([ensembl.get(s, "") for s in symbols]),
        other=np.array(sorted(others)),
        other_is=np.array([symbols.index(others[o]) for o in sorted(others)], np.uint16),
    )
    at = {name: i for i, name in enumerate(symbols)} | {
        o: symbols.index(s) for o, s in others.items()
    }
    found = {name: read_gmt(files / f"{name}.gmt") for name in SETS} | {"families": family}
    np.savez_compressed(
        HERE / "gene_sets.npz",
        **{f"{name}_{k}": v for name, sets in found.items() for k, v in packed(sets, at).items()},
    )


def of_hgnc(
    hgnc: list[dict[str, str]], by_entrez: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Symbols by their other names, Ensembl ids by symbol, and members of families.

    A name that was the symbol of one gene and is an alias of another means the former; names that
    could mean several genes, and those of one or two letters, are left out.
    """
    symbols = set(by_entrez.values())
    before, alias = defaultdict(set), defaultdict(set)
    ensembl, family = {}, defaultdict(set)
    for gene in hgnc:
        symbol = by_entrez.get(gene["entrez_id"], gene["symbol"])
        if symbol not in symbols:
            continue
        for name in (gene["symbol"], *gene["prev_symbol"].split("|")):
            before[name].add(symbol)
        for name in (*gene["alias_symbol"].split("|"), symbol.upper()):
            alias[name].add(symbol)
        if gene["ensembl_gene_id"]:
            ensembl[symbol] = gene["ensembl_gene_id"]
        for name in filter(None, gene["gene_family"].split("|")):
            family[name].add(symbol)
    others = {}
    mitochondrial = {s.removeprefix("MT-") for s in symbols if s.startswith("MT-")}
    for name in {*before, *alias} - symbols - mitochondrial:
        means = before[name] or alias[name]
        if len(means) == 1 and len(name) >= SHORTEST:
            others[name] = next(iter(means))
    return others, ensembl, family


def packed(sets: dict[str, set[str]], at: dict[str, int]) -> dict[str, np.ndarray]:
    """Gene sets of two genes or more as places of their members."""
    members = {name: sorted({at[g] for g in genes if g in at}) for name, genes in sets.items()}
    members = {name: genes for name, genes in members.items() if len(genes) > 1}
    return {
        "name": np.array(list(members)),
        "genes": np.concatenate([np.array(g, np.uint16) for g in members.values()]),
        "start": np.cumsum([0, *map(len, members.values())]).astype(np.int32),
    }


def make_tables(files: Path, hgnc: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """Annotation and co-citation of every gene, as leading singular vectors."""
    genes = {g["entrez_id"]: g["symbol"] for g in hgnc if g["locus_group"] == "protein-coding gene"}
    at = {entrez: i for i, entrez in enumerate(genes)}
    above = ancestors(files / "go-basic.obo")
    annotated = ((g, t) for g, term in rows_of(files / "gene2go.gz") for t in above.get(term, ()))
    cited = list(rows_of(files / "gene2pubmed.gz"))
    papers = defaultdict(int)
    for _, paper in cited:
        papers[paper] += 1
    cited = [(g, p) for g, p in cited if papers[p] <= MOST_GENES]
    return {
        "entrez": np.array(list(genes)),
        "symbol": np.array(list(genes.values())),
        "go": leading(annotated, at, SIZES["go"]),
        "pubmed": leading(cited, at, SIZES["pubmed"]),
    }


def rows_of(path: Path) -> Iterator[tuple[str, str]]:
    """Gene and term, or paper, of every human line; annotations by "NOT" are passed over."""
    with gzip.open(path, "rt") as file:
        for line in file:
            fields = line.rstrip("\n").split("\t")
            if fields[0] == HUMAN and not (len(fields) > 4 and fields[4].startswith("NOT")):
                yield fields[1], fields[2]


def ancestors(path: Path) -> dict[str, set[str]]:
    """Each term of the ontology with all that it is, or is part of."""
    parents: dict[str, set[str]] = {}
    term = None
    for line in path.read_text().splitlines():
        if line.startswith("["):
            term = None
        elif line.startswith("id: GO:"):
            term = line[4:]
            parents[term] = set()
        elif term and line.startswith("is_a: "):
            parents[term].add(line[6:16])
        elif term and line.startswith("relationship: part_of "):
            parents[term].add(line[22:32])
    found: dict[str, set[str]] = {}

    def above(term: str) -> set[str]:
        if term not in found:
            found[term] = {term}.union(*(above(p) for p in parents.get(term, ())))
        return found[term]

    for term in parents:
        above(term)
    return found


def leading(pairs: Iterable[tuple[str, str]], at: dict[str, int], size: int) -> np.ndarray:
    """Genes by terms, rare terms counting for more, along the leading directions."""
    known = {(at[g], t) for g, t in pairs if g in at}
    terms = {t: i for i, t in enumerate(sorted({t for _, t in known}))}
    rows, columns = np.array([(g, terms[t]) for g, t in known]).T
    table = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(at), len(terms)))
    weight = np.log(len(at) / np.asarray(table.sum(0)).ravel())
    left, singular, _ = randomized_svd(table @ sp.diags(weight), size, random_state=0)
    return left * singular


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
