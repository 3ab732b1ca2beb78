"""What states of cells hold, and how much of it is left when fewer counts are seen.

Usage:
``python docs/representation.py encoders|ablations|inner|pretrained|avgbio DATA OUT.csv [DATA_SET ...]``,
with DATA the folder of the real cells and of the knowledge. Every encoder learns from the same training cells,
without labels but where its name says so. Test cells are other cells, or other patients, whose
counts were thinned to a share of what was measured; no perturbation is held out, as this is about
states and not about predictions. Two scores, over depths the area under score against log depth:

``probe``
    Balanced accuracy of a logistic regression from states to labels.
``retrieval``
    Share of labels whose mean training state is farther (by cosine) than the cell's own label's.

Intervals (95%) are of the difference from the first encoder, over left-out patients, test cells and
seeds. A run that was stopped goes on where it was: what was scored lies in the folder OUT, by the
names of the encoders; after a change to one, take another.

``inner`` are the ablations on a split inside the (first) training cells, to choose by.

``pretrained`` is about encoders that learned from other data sets: their states of cells that they
never saw, probed for the cell states of Peterson 2017, as they are and after more pretraining there.

``avgbio`` is the benchmark's AvgBIO of test cells at full depth, whose labels no encoder saw: of
encoders that learned from the training cells, and, zero-shot, from the other files only.
"""

import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gpjepa
from gpjepa import GPJEPA
from gpjepa.benchmark import avg_bio
from gpjepa.model import Ablation, _moments

N_LATENT, DEPTHS, SEEDS, DRAWS = 32, (1.0, 0.5, 0.25, 0.1), (0, 1, 2), 1_000
TYPED = 2_000  # test cells whose AvgBIO is taken, at most
FILES = ("datlinger", "zhao", "papalexi", "norman", "mcfaline", "peterson")
GENE_SETS = ("hallmark.gmt", "reactome.gmt", "go_biological_process.gmt")
ALONE, FREE = {"components": False}, {"teacher": False}


def encoders(data, cells):
    """Options of the model and of stage A, by name; None for scVI."""
    return {
        "JEPA": ({}, {}),
        **masks(data, cells),
        "JEPA, whole views": ({}, {"thinning": 0.0}),
        "JEPA, SIGReg": ({}, {**FREE, "regulariser": "sigreg"}),
        "JEPA, Perceiver": ({"encoder": "perceiver"}, {}),
        "JEPA, network alone": (ALONE, {}),
        "masked reconstruction": ({}, {"objective": "reconstruction"}),
        "contrastive": ({}, {"objective": "contrastive"}),
        "components alone": ({"encoder": "components"}, {}),
        "PCA": principal_components,
        "random encoder": (ALONE, None),
        "scVI": None,
    }


def masks(data, cells):
    """The JEPA with every other kind of mask; simulated cells have their own regulons only."""
    knowledge, found = data / "knowledge", {}
    if "simulation" in cells.uns:
        network = cells.uns["simulation"]["network"]
        acting, on = np.nonzero(network["response"])
        regulons = pd.DataFrame(
            {"source": network["regulators"][acting], "target": cells.var_names[on]}
        )
    else:
        sets = [knowledge / name for name in GENE_SETS]
        found["masks: gene sets"] = ({}, {"masks": "gene_sets", "gene_sets": sets})
        regulons = knowledge / "collectri.csv"
    return {
        **found,
        "masks: regulons": ({}, {"masks": "regulons", "regulons": regulons}),
        "masks: adversarial (labels)": ({}, {"masks": "adversarial"}),
    }


def ablations(data, cells):
    """The defaults of stage A, each changed on its own."""
    changed = {
        "hidden: 25%": {"hidden": 0.25},
        "hidden: 75%": {"hidden": 0.75},
        "blocks: 4": {"n_blocks": 4},
        "blocks: 4, overlap 30%": {"n_blocks": 4, "overlap": 0.3},
        "blocks: 4 of unequal size": {"n_blocks": 4, "size_spread": 0.5},
        "EMA: from 0.9": {"momentum": 0.9},
        "EMA: no teacher": FREE,
        "regulariser: none": {"regulariser_weight": 0.0},
        "regulariser: VICReg x 0.1": {"regulariser_weight": 0.001},
        "regulariser: VICReg x 10": {"regulariser_weight": 0.1},
        "regulariser: SIGReg": {"regulariser": "sigreg"},
        "regulariser: SIGReg, no teacher": {**FREE, "regulariser": "sigreg"},
        "views: whole": {"thinning": 0.0},
        "views: noise": {"noise": 0.25},
        "level: conditions (labels)": {"set_size": 8},
        "learning rate x 3": {"lr": 1e-3},
    }
    return {
        "defaults": ({}, {}),
        "encoder: network alone": (ALONE, {}),
        "input: log1p": reading(lambda values: values),
        "input: counts per 10,000": reading(torch.expm1),
        **masks(data, cells),
        **{name: ({}, plan) for name, plan in changed.items()},
    }


def halves(labels, seed=0):
    """Half of the cells of every label for training."""
    rng, train = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        train[mine[: len(mine) // 2]] = True
    return [train]


def screens(data):
    """Per data set: cells, their labels, and masks of training cells."""
    zhao = ad.read_h5ad(data / "zhao_2021_mini.h5ad")
    patients = zhao.obs["patient"].astype(str).to_numpy()
    yield "Zhao", zhao, "perturbation", [patients != p for p in np.unique(patients)]
    for name in ("Norman", "Papalexi"):
        (path,) = data.glob(f"{name.lower()}_*_mini.h5ad")
        cells = ad.read_h5ad(path)
        yield name, cells, "perturbation", halves(cells.obs["perturbation"].astype(str).to_numpy())
    rna = peterson(data)
    yield "Peterson", rna, "state", halves(rna.obs["state"].to_numpy())
    told = gpjepa.datasets.simulate(3_000, 500, seed=0)
    told.X = told.layers["counts"]
    yield "simulated", told, "perturbation", halves(told.obs["perturbation"].astype(str).to_numpy())


def peterson(data):
    """RNA, and eight states of the proteins beside it."""
    pair = mudata.read_h5mu(data / "peterson_2017_reapseq_mini.h5mu")
    rna, protein = (pair.mod[m].copy() for m in ("rna", "protein"))
    counts = np.log1p(sp.csr_matrix(protein.X).toarray())
    counts -= counts.mean(1, keepdims=True)
    states = KMeans(8, n_init=10, random_state=0).fit_predict(counts)
    rna.obs["state"] = [f"state {s}" for s in states]
    return rna


def labelled(data):
    """Cells, what separates them, and the names of their files."""
    yield "Peterson 2017: states of proteins", peterson(data), "state", ["peterson"]
    lines = [ad.read_h5ad(data / f"{n}_mini.h5ad") for n in ("norman_2019", "mcfaline_2023")]
    lines = ad.concat(lines, index_unique="-")
    yield "Norman 2019 and McFaline 2023: cell lines", lines, "cell_line", ["norman", "mcfaline"]
    datlinger = ad.read_h5ad(data / "datlinger_2021_mini.h5ad")
    yield "Datlinger 2021: stimulation", datlinger, "treatment", ["datlinger"]
    zhao = ad.read_h5ad(data / "zhao_2021_mini.h5ad")
    yield "Zhao 2021: drug", zhao, "perturbation", ["zhao"]


def avgbio(data, out, wanted):
    """AvgBIO per file and encoder; of three seeds, or one of the encoder of all other files."""
    rows = []
    for name, cells, key, files in labelled(data):
        if wanted and not wanted & set(files):
            continue
        cells = plain(cells, key)
        cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()
        (train,) = halves(cells.obs["label"].to_numpy())
        arms = {
            "JEPA": ({}, {}),
            "JEPA, of the other files": zero_shot(data, files),
            "components alone": ({"encoder": "components"}, {}),
            "PCA": principal_components,
            "random encoder": (ALONE, None),
            "scVI": None,
        }
        some = np.random.default_rng(0).permutation(np.flatnonzero(~train))[:TYPED]
        test = cells[np.sort(some)].copy()
        for title, arm in arms.items():
            for seed in SEEDS[:1] if title == "JEPA, of the other files" else SEEDS:
                states = embedder(arm, cells[train].copy(), seed)(test.copy())
                value = avg_bio(states, test.obs["label"].to_numpy(), seed)
                rows.append({"data": name, "encoder": title, "seed": seed, "AvgBIO": value})
                pd.DataFrame(rows).to_csv(out, index=False)
            print(name, title, [round(r["AvgBIO"], 3) for r in rows[-3:]], flush=True)
    table = pd.DataFrame(rows).groupby(["encoder", "data"], sort=False)["AvgBIO"]
    spread = table.agg(["mean", "min", "max"]).apply(
        lambda r: f"{r['mean']:.3f} ({r['min']:.3f} to {r['max']:.3f})", axis=1
    )
    wide = spread.unstack("data")
    names = list(wide.columns)
    print(f"| AvgBIO | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", sep="\n")
    for title, row in wide.iterrows():
        print(f"| {title} | {' | '.join(row)} |")


def zero_shot(data, without):
    """An encoder of all other files, which share some genes with these cells."""

    def arm(cells, seed):
        sources = {}
        for name in (f for f in FILES if f not in without):
            if name == "peterson":
                sources[name] = as_source(peterson(data), "state")
            else:
                (path,) = data.glob(f"{name}_*_mini.h5ad")
                sources[name] = as_source(ad.read_h5ad(path), "perturbation")
        return started(pretrained_on(sources, "mlp", seed), 0)(cells, seed)

    return arm


def plain(cells, key):
    """Counts, labels and library sizes, and nothing else."""
    counts = sp.csr_matrix(cells.X).astype(np.float32)
    library = cells.obs.get("library_size", pd.Series(np.asarray(counts.sum(1)).ravel()))
    obs = pd.DataFrame(
        {"label": cells.obs[key].astype(str).to_numpy(), "library": library.to_numpy(float)},
        cells.obs_names,
    )
    return ad.AnnData(counts, obs, cells.var[[]])


def thinned(cells, depth):
    rng, found, counts = np.random.default_rng(0), cells.copy(), cells.X.copy()
    elsewhere = (cells.obs["library"].to_numpy() - np.asarray(counts.sum(1)).ravel()).round()
    counts.data = rng.binomial(counts.data.astype(np.int64), depth).astype(np.float32)
    found.X = counts
    found.obs["library"] = np.asarray(counts.sum(1)).ravel() + rng.binomial(
        elsewhere.astype(np.int64), depth
    )
    return found


def principal_components(cells, seed):
    """As is usual: of log1p counts per 10,000, centred."""

    def values(cells):
        library = cells.obs["library"].to_numpy()[:, None]
        return np.log1p(cells.X.toarray() / library * 1e4)

    components = PCA(N_LATENT, random_state=seed).fit(values(cells))
    return lambda other: components.transform(values(other))


def embedder(arm, cells, seed):
    """States of any cells, by an encoder that learned from these; an arm may be one itself."""
    if callable(arm):
        return arm(cells, seed)
    scvi.settings.seed = seed
    cells = cells.copy()
    if arm is None:
        scvi.model.SCVI.setup_anndata(cells)
        model = scvi.model.SCVI(cells, n_latent=N_LATENT)
        model.train(100, early_stopping=True, enable_progress_bar=False)
        return lambda other: model.get_latent_representation(other)
    options, plan = arm
    keys = {"perturbation_key": None}
    if plan and (plan.get("masks") == "adversarial" or "set_size" in plan):
        # Without controls, as where labels are cell states, any label may stand for them.
        labels = cells.obs["label"]
        control = "control" if "control" in set(labels) else labels.iloc[0]
        keys = {"perturbation_key": "label", "control": control}
    GPJEPA.setup_anndata(cells, library_size_key="library", **keys)
    model = GPJEPA(cells, n_latent=N_LATENT, **options)
    ablation = {f.name for f in fields(Ablation)}
    plan_kwargs = {k: v for k, v in (plan or {}).items() if k not in ablation}
    plan_kwargs["ablation"] = {k: v for k, v in (plan or {}).items() if k in ablation}
    epochs = 0 if plan is None else None
    model.pretrain(epochs, plan_kwargs=plan_kwargs, enable_progress_bar=False)
    return model.get_latent_representation


def reading(transform):
    """The defaults, but that encoders see this of log1p counts per 10,000, and not square roots."""

    def moments(cells, where):
        x = transform(torch.from_numpy(cells.log1p_rates(where))).double().numpy()
        return replace(_moments.moments(cells, where), root=x.mean(0), spread=x.std(0))

    @contextmanager
    def other():
        # There is no option for it: what is chosen here is part of what an encoder is.
        root, base = "gpjepa.nn._encoders._root", "gpjepa.model._training.moments"
        with patch(root, transform), patch(base, moments):
            yield

    def arm(cells, seed):
        with other():
            embed = embedder(({}, {}), cells, seed)
        return other()(embed)

    return arm


def by_cell(arm, train, tests, seed):
    """Probe and retrieval of every test cell at every depth, shape (2, n_depths, n_cells)."""
    embed = embedder(arm, train, seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    states, labels = embed(train.copy()), train.obs["label"].to_numpy()
    probe.fit(states, labels)
    scaler, classes = probe[0], probe.classes_
    states = scaler.transform(states)
    centres = np.stack([states[labels == c].mean(0) for c in classes])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    found = np.empty((2, len(tests), tests[0].n_obs))
    for at, test in enumerate(tests):
        own, states = test.obs["label"].to_numpy(), embed(test)
        found[0, at] = probe.predict(states) == own
        likeness = scaler.transform(states) @ centres.T
        mine = likeness[np.arange(len(own)), np.searchsorted(classes, own)]
        found[1, at] = (likeness < mine[:, None]).sum(1) / (len(classes) - 1)
    return found


def screen_scores(name, cells, splits, arms, folder):
    """Scores of every arm, shape (2, n_depths, n_seeds, n_cells); fold and label of every cell.

    What was scored before lies in the folder and is read from there.
    """
    folds, labels, scores = [], [], {arm: [] for arm in arms}
    for fold, train in enumerate(splits):
        tests = [thinned(cells[~train], depth) for depth in DEPTHS]
        seen = np.asarray(tests[-1].X.sum(1)).ravel() > 0
        tests = [test[seen].copy() for test in tests]
        folds += [fold] * tests[0].n_obs
        labels += list(tests[0].obs["label"])
        # Where several folds are left out, these are the repeats: one seed for each.
        seeds = SEEDS if len(splits) == 1 else [fold]
        for title, arm in arms.items():
            file = folder / f"{name} {fold} {title}.npy".replace("/", " ")
            if not file.exists():
                runs = [by_cell(arm, cells[train].copy(), tests, seed) for seed in seeds]
                np.save(folder / "part.npy", np.stack(runs, 2).astype(np.float32))
                (folder / "part.npy").rename(file)
            scores[title].append(np.load(file))
            found = scores[title][-1].mean((1, 2, 3)).round(3)
            print(f"{name}, fold {fold}: {title} {found}", flush=True)
    return (
        {title: np.concatenate(found, -1) for title, found in scores.items()},
        np.array(folds),
        np.array(labels),
    )


def summary(scores, folds, labels):
    """Areas, depths, and differences from the first arm with their intervals.

    Every label of every fold weighs the same. Folds, cells (by Poisson weights) and seeds are drawn
    anew for the intervals.
    """
    log, n_seeds = np.log10(DEPTHS), next(iter(scores.values())).shape[2]
    strata = np.array([f"{fold} {label}" for fold, label in zip(folds, labels, strict=True)])
    names, first, code = np.unique(strata, return_index=True, return_inverse=True)
    member, n_folds = np.eye(len(names))[code], len(np.unique(folds))
    rng = np.random.default_rng(0)
    cells = np.vstack([np.ones(len(strata)), rng.poisson(1, (DRAWS, len(strata)))])
    drawn = np.vstack(
        [np.ones(n_folds), rng.multinomial(n_folds, np.full(n_folds, 1 / n_folds), DRAWS)]
    )
    size = cells @ member
    weight = drawn[:, folds[first]] * (size > 0)
    weight /= weight.sum(1, keepdims=True)
    picks = np.vstack([np.arange(n_seeds), rng.integers(n_seeds, size=(DRAWS, n_seeds))])

    def mean(by_cell):  # (n_seeds, n_cells) -> estimate and draws
        means = np.stack(
            [(weight * ((cells * x) @ member / np.maximum(size, 1))).sum(1) for x in by_cell], 1
        )
        return np.take_along_axis(means, picks, 1).mean(1)

    rows, base = [], {}
    for title, found in scores.items():
        for measure, by_depth in zip(("probe", "retrieval"), found, strict=True):
            draws = mean(np.trapezoid(by_depth, log, axis=0) / (log[-1] - log[0]))
            change = draws - base.setdefault(measure, draws)
            lower, upper = np.percentile(change[1:], [2.5, 97.5])
            depths = {f"depth {d:g}": mean(x)[0] for d, x in zip(DEPTHS, by_depth, strict=True)}
            rows.append(
                {
                    "encoder": title,
                    "measure": measure,
                    "area": draws[0],
                    "difference": change[0],
                    "lower": lower,
                    "upper": upper,
                    **depths,
                }
            )
    return pd.DataFrame(rows)


def markdown(table):
    """The areas, and in brackets the differences from the first encoder."""
    lines = ["| encoder | probe | at 100, 50, 25, 10% | retrieval |", "|---|---|---|---|"]
    for title, rows in table.groupby("encoder", sort=False):
        cells = []
        for row in (rows[rows["measure"] == m].iloc[0] for m in ("probe", "retrieval")):
            interval = f" ({row['lower']:+.3f} to {row['upper']:+.3f})"
            cells.append(f"{row['area']:.3f}{interval if row['lower'] or row['upper'] else ''}")
        probe = rows[rows["measure"] == "probe"].iloc[0]
        depths = ", ".join(f"{probe[f'depth {d:g}']:.3f}" for d in DEPTHS)
        lines.append(f"| {title} | {cells[0]} | {depths} | {cells[1]} |")
    return "\n".join(lines)


def side_by_side(tables, measure):
    """One measure on all data sets: the first encoder's area, and the others' differences."""
    table = pd.concat(tables)
    names = list(dict.fromkeys(table["data"]))
    lines = [f"| {measure} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, rows in table[table["measure"] == measure].groupby("encoder", sort=False):
        cells = {
            row["data"]: f"{row['difference']:+.3f} ({row['lower']:+.3f} to {row['upper']:+.3f})"
            if row["lower"] or row["upper"]
            else f"{row['area']:.3f}"
            for _, row in rows.iterrows()
        }
        lines.append(f"| {title} | {' | '.join(cells.get(name, '') for name in names)} |")
    return "\n".join(lines)


def pretrained(data, cells):
    """Encoders of other data sets, as they are and trained on; what the genes they share hold."""
    genes, sources = cells.var_names, {}
    for name in ("Datlinger", "Zhao", "Papalexi", "Norman"):
        (path,) = data.glob(f"{name.lower()}_*_mini.h5ad")
        sources[name] = as_source(ad.read_h5ad(path), "perturbation")
    arms = {"own cells": ({}, {})}
    for name in (*sources, "all four"):
        some = sources if name == "all four" else {name: sources[name]}
        known = set().union(*(s.var_names for s in some.values()))
        shared = genes[genes.isin(known)]
        arms[f"components of own cells, the {len(shared)} genes of {name}"] = only(shared)
        for encoder in ("mlp", "perceiver"):
            path = pretrained_on(some, encoder, 0)
            arms[f"{name}, {encoder}"] = started(path, 0)
            arms[f"{name}, {encoder}, then own cells"] = started(path, None)
    return arms


SOURCE = {"perturbation_key": None, "library_size_key": "library_size"}


def as_source(cells, key):
    source = plain(cells, key)
    source.obs["library_size"] = source.obs.pop("library")
    GPJEPA.setup_anndata(source, **SOURCE)
    return source


def pretrained_on(sources, encoder, seed):
    """Where the encoder of one data set, or of several together, was saved."""
    if len(sources) > 1:
        cells = gpjepa.datasets.join(sources)
        GPJEPA.setup_anndata(cells, **SOURCE, dataset_key="dataset")
    else:
        (cells,) = sources.values()
    scvi.settings.seed = seed
    model = GPJEPA(cells, n_latent=N_LATENT, encoder=encoder)
    model.pretrain(enable_progress_bar=False)
    path = Path(tempfile.mkdtemp()) / "model"
    model.save(str(path))
    return path


def only(genes):
    """The components of some genes, without a network."""

    def arm(cells, seed):
        embed = embedder(({"encoder": "components"}, {}), cells[:, genes].copy(), seed)
        return lambda other: embed(other[:, genes].copy())

    return arm


def started(path, epochs):
    """A pretrained encoder, and so many more epochs."""

    def arm(cells, seed):
        scvi.settings.seed = seed
        cells = cells.copy()
        GPJEPA.setup_anndata(cells, perturbation_key=None, library_size_key="library")
        model = GPJEPA(cells, pretrained=path)
        if epochs is None:
            model.pretrain(enable_progress_bar=False)
        return model.get_latent_representation

    return arm


def main(which, data, out, wanted):
    warnings.filterwarnings("ignore")
    if which == "avgbio":
        avgbio(data, out, wanted)
        return
    tables, folder = [], Path(out).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, cells, key, splits in screens(data):
        if name not in (wanted or {name}) or (which == "pretrained" and name != "Peterson"):
            continue
        arms = {"encoders": encoders, "pretrained": pretrained}.get(which, ablations)(data, cells)
        read = plain(cells, key)
        if which == "inner":
            read = read[splits[0]].copy()
            splits = halves(read.obs["label"].to_numpy(), 1)
        found = summary(*screen_scores(name, read, splits, arms, folder))
        tables.append(found.assign(data=name))
        pd.concat(tables).to_csv(out, index=False)
        print(f"{name}\n\n{markdown(found)}\n", flush=True)
    for measure in ("probe", "retrieval") if len(tables) > 1 else ():
        print(f"{side_by_side(tables, measure)}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], set(sys.argv[4:]))
