"""Print the tables of docs/anchor.md: the anchor beside the baselines it is made of.

    python docs/anchor_tables.py TABLE DIRECTORY [--resamplings 20]

TABLE is doubles, contexts, unseen, simulation, interactions, speed or gate. DIRECTORY holds the real cells
(norman_2019_mini.h5ad, papalexi_2021_mini.h5ad, ...) and knowledge/*.gmt; simulation,
interactions and speed read nothing from it.

In every resampling the control cells are split in half: predictions see one half, effects are
measured against the other. Errors are sums over all genes but the targeted ones; "corrected" is
without the sampling noise of the measurement. Intervals are 95% bootstrap intervals over the
resamplings.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import gpjepa
from gpjepa.effects import (
    Additive,
    EffectAnchor,
    EffectTable,
    KernelRidge,
    LargerSingle,
    MatchingMean,
    MeanEffect,
    NoChange,
    ShrunkenAdditive,
    ShrunkenMean,
    Transfer,
    effect_table,
    interaction_recall,
    noise_corrected_error,
)
from gpjepa.perturbations import Perturbation, TargetFeatures

SCALE = "mean_log1p"
DOUBLES = ("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")
CONTEXT = {"zhao_2021": "patient", "mcfaline_2023": "cell_line", "datlinger_2021": "treatment"}
INTERACTS = 0.1  # an interaction larger than this, in mean log1p counts per 10,000, is one
read = Perturbation.parse

Predictor = Callable[[EffectTable, list[Perturbation], list[str]], np.ndarray]


@dataclass
class Cells:
    """Counts with what an effect table needs."""

    counts: sp.csr_matrix
    library: np.ndarray
    perturbations: list[Perturbation]
    contexts: list[str]
    genes: np.ndarray

    @classmethod
    def of(cls, adata: ad.AnnData, context: str | None = None) -> Cells:
        counts = sp.csr_matrix(adata.X)
        total = np.asarray(counts.sum(1)).ravel().astype(float)
        library = (
            adata.obs["library_size"].to_numpy(float) if "library_size" in adata.obs else total
        )
        some = library > 0
        obs = adata.obs[some]
        contexts = ["all"] * int(some.sum()) if context is None else obs[context].astype(str)
        return cls(
            counts[some], library[some], [read(p) for p in obs["perturbation"].astype(str)],
            list(contexts), adata.var_names.to_numpy(),
        )  # fmt: skip

    @property
    def is_control(self) -> np.ndarray:
        return np.array([p.is_control for p in self.perturbations])

    def table(self, keep: np.ndarray) -> EffectTable:
        return effect_table(
            self.counts, self.library, self.perturbations, self.contexts, self.genes, keep
        )

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the two halves of the control cells of each context."""
        first = np.zeros(len(self.library), bool)
        contexts = np.array(self.contexts, object)
        for context in sorted(set(self.contexts)):
            mine = rng.permutation(np.flatnonzero(self.is_control & (contexts == context)))
            first[mine[: len(mine) // 2]] = True
        return first, self.is_control & ~first


def errors(predicted: np.ndarray, measured: EffectTable) -> tuple[float, float]:
    """Noise-corrected and plain squared error over the rows of a table."""
    scored = np.array([~np.isin(measured.genes, p.targets) for _, p in measured.rows])
    effect, noise = measured.effect[SCALE], measured.noise(SCALE)
    corrected = noise_corrected_error(predicted, effect, noise, scored).sum()
    return float(corrected), float(np.where(scored, (predicted - effect) ** 2, 0).sum())


def predict(method: Predictor, training: EffectTable, wanted: EffectTable) -> np.ndarray:
    return method(training, [p for _, p in wanted.rows], [c for c, _ in wanted.rows])


def baseline(kind: type, *args: object) -> Predictor:
    return lambda table, p, c: kind(*args).fit(table).predict(p, c)


def anchor(*features: TargetFeatures) -> Predictor:
    return lambda table, p, c: EffectAnchor(features, "mean").fit(table).predict(p, c, SCALE).mean


@dataclass(frozen=True)
class Ratio:
    """Ratio of sums over resamplings, with its bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, over: np.ndarray, under: np.ndarray) -> Ratio:
        draws = np.random.default_rng(0).integers(0, len(over), (2_000, len(over)))
        low, high = np.quantile(over[draws].sum(1) / under[draws].sum(1), [0.025, 0.975])
        return cls(over.sum() / under.sum(), low, high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


Table = tuple[str, dict[str, dict[str, Any]]]  # title, then methods by columns


def doubles(directory: Path, n: int) -> Iterator[Table]:
    cells = Cells.of(ad.read_h5ad(directory / "norman_2019_mini.h5ad"))
    held = {read(x) for x in DOUBLES}
    is_held = np.array([p in held for p in cells.perturbations])
    methods: dict[str, Predictor] = {
        "anchor": anchor(), "shrunken additive": baseline(ShrunkenAdditive),
        "larger single": baseline(LargerSingle), "matching mean": baseline(MatchingMean),
        "additive": baseline(Additive), "no change": baseline(NoChange),
    }  # fmt: skip
    columns: dict[str, dict[str, Ratio]] = {name: {} for name in methods}
    for per in (15, 30, 60, 100):
        found: dict[str, list[float]] = {name: [] for name in methods}
        for r in range(n):
            rng = np.random.default_rng([r, per])
            ours, theirs = cells.halves(rng)
            some = ours.copy()
            for p in sorted(set(cells.perturbations)):
                mine = np.flatnonzero([q == p for q in cells.perturbations])
                if not p.is_control and p not in held:
                    some[rng.permutation(mine)[:per]] = True
            training = cells.table(some)
            measured = cells.table(theirs | is_held)
            for name, method in methods.items():
                found[name].append(errors(predict(method, training, measured), measured)[0])
        for name in methods:
            columns[name][f"{per} cells"] = Ratio.of(
                np.array(found[name]), np.array(found["additive"])
            )
    yield "Norman 2019, five doubles: corrected error / additive", columns


def contexts(directory: Path, n: int) -> Iterator[Table]:
    for name in ("zhao_2021", "datlinger_2021", "mcfaline_2023"):
        cells = Cells.of(ad.read_h5ad(directory / f"{name}_mini.h5ad"), CONTEXT[name])
        methods: dict[str, Predictor] = {
            "anchor": anchor(),
            **{f"transfer: {f}": baseline(Transfer, f)
               for f in ("mean", "similar", "log_rate", "state")},
            "no change": baseline(NoChange),
        }  # fmt: skip
        held = sorted(set(cells.contexts))
        found = {m: {c: np.zeros((n, 2)) for c in held} for m in methods}
        for r in range(n):
            ours, theirs = cells.halves(np.random.default_rng(r))
            training, measured = (cells.table(x | ~cells.is_control) for x in (ours, theirs))
            for c in held:
                rest = training.subset(np.array([k != c for k, _ in training.rows]))
                here = measured.subset(np.array([k == c for k, _ in measured.rows]))
                for m, method in methods.items():
                    found[m][c][r] = errors(predict(method, rest, here), here)
        base = found["no change"]
        rows = {}
        for m, by_context in found.items():
            total = sum(by_context.values())
            rows[m] = {
                kind: Ratio.of(total[:, k], sum(base.values())[:, k])
                for k, kind in enumerate(("corrected", "plain"))
            } | {c: Ratio.of(e[:, 0], base[c][:, 0]) for c, e in by_context.items()}
        yield f"{name}, each context held out: error / no change", rows


def shuffled(
    features: TargetFeatures, targets: list[str], rng: np.random.Generator
) -> TargetFeatures:
    """The features of other targets of the screen."""
    known = [t for t in targets if features.covers(t)]
    other = features.take([known[i] for i in rng.permutation(len(known))])
    return TargetFeatures(known, other, "shuffled")


def kernel_or_mean(features: TargetFeatures) -> Predictor:
    def predicted(table: EffectTable, p: list[Perturbation], c: list[str]) -> np.ndarray:
        known = features.covers(p[0].targets[0])
        return (KernelRidge(features) if known else MeanEffect()).fit(table).predict(p, c)

    return predicted


def unseen(directory: Path, n: int) -> Iterator[Table]:
    features = gene_sets(directory)
    for name, context in (
        ("papalexi_2021", None), ("datlinger_2021", None), ("datlinger_2021", "treatment"),
        ("norman_2019", None), ("mcfaline_2023", "cell_line"),
    ):  # fmt: skip
        cells = Cells.of(ad.read_h5ad(directory / f"{name}_mini.h5ad"), context)
        targets = sorted({p.targets[0] for p in cells.perturbations if len(p.targets) == 1})
        found: dict[str, np.ndarray] = {}
        for r in range(n):
            rng = np.random.default_rng(r)
            ours, theirs = cells.halves(rng)
            training, measured = (cells.table(x | ~cells.is_control) for x in (ours, theirs))
            methods: dict[str, Predictor] = {
                "anchor, gene sets": anchor(features), "anchor, no features": anchor(),
                "anchor, shuffled gene sets": anchor(shuffled(features, targets, rng)),
                "kernel ridge, λ=0.3": kernel_or_mean(features),
                "shrunken mean": baseline(ShrunkenMean), "mean": baseline(MeanEffect),
                "no change": baseline(NoChange),
            }  # fmt: skip
            for t in targets:
                rest = training.subset(np.array([t not in p.targets for _, p in training.rows]))
                here = measured.subset(np.array([p.targets == (t,) for _, p in measured.rows]))
                for m, method in methods.items():
                    found.setdefault(m, np.zeros((n, 2)))[r] += errors(
                        predict(method, rest, here), here
                    )
        base = found["no change"]
        rows = {
            m: {
                kind: Ratio.of(e[:, k], base[:, k]) for k, kind in enumerate(("corrected", "plain"))
            }
            for m, e in found.items()
        }
        where = "" if context is None else f", by {context}"
        yield f"{name}{where}, each target held out: error / no change", rows


def gene_sets(directory: Path) -> TargetFeatures:
    names = ("hallmark", "reactome", "go_biological_process")
    return TargetFeatures.from_gene_sets([directory / "knowledge" / f"{n}.gmt" for n in names])


def network_features(adata: ad.AnnData) -> TargetFeatures:
    """The simulated network as signed regulons: informative features."""
    network = adata.uns["simulation"]["network"]
    regulators, genes = list(network["regulators"]), list(adata.var_names)
    edges = []
    for weights, ends in ((network["regulation"], regulators), (network["response"], genes)):
        i, j = np.nonzero(weights)
        edges.append(pd.DataFrame({
            "source": [regulators[k] for k in i], "target": [ends[k] for k in j],
            "weight": weights[i, j],
        }))  # fmt: skip
    return TargetFeatures.from_regulons(pd.concat(edges))


def true_effects(adata: ad.AnnData) -> dict[Perturbation, np.ndarray]:
    truth = adata.uns["simulation"]
    labels = truth["rows"]["perturbation"]
    return {read(p): e for p, e in zip(labels, truth["effect"][SCALE], strict=True)}


def true_errors(
    predicted: np.ndarray, wanted: Sequence[Perturbation], truth: dict, genes: np.ndarray
) -> np.ndarray:
    return np.array([((x - truth[p])[~np.isin(genes, p.targets)] ** 2).sum()
                     for x, p in zip(predicted, wanted, strict=True)])  # fmt: skip


def screens(n: int) -> Iterator[tuple[int, Cells, ad.AnnData]]:
    """Norman-sized simulated screens, five resamplings of each."""
    for r in range(n):
        if r % 5 == 0:
            adata = gpjepa.datasets.simulate(
                60_000, 5_000, n_targets=105, n_combinations=131, seed=r // 5
            )
            cells = Cells.of(adata)
        yield r, cells, adata


def simulation(directory: Path, n: int) -> Iterator[Table]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for r, cells, adata in screens(n):
        truth, informative = true_effects(adata), network_features(adata)
        singles = sorted(p for p in truth if len(p.targets) == 1)
        pairs = sorted(p for p in truth if len(p.targets) == 2)
        rng = np.random.default_rng(r)
        training = cells.table(cells.halves(rng)[0] | ~cells.is_control)
        noise = TargetFeatures(
            [p.targets[0] for p in singles], rng.normal(size=(len(singles), 30)), "noise"
        )
        some_pairs = {pairs[i] for i in rng.permutation(len(pairs))[: len(pairs) // 2]}
        targets = {singles[i].targets[0] for i in rng.permutation(len(singles))[:21]}
        with_targets = {p for p in truth if set(p.targets) & targets}
        methods: dict[str, Predictor] = {
            "anchor, network as features": anchor(informative), "anchor, no features": anchor(),
            "anchor, noise as features": anchor(noise), "additive": baseline(Additive),
            "shrunken additive": baseline(ShrunkenAdditive), "larger single": baseline(LargerSingle),
            "matching mean": baseline(MatchingMean), "shrunken mean": baseline(ShrunkenMean),
            "mean": baseline(MeanEffect), "no change": baseline(NoChange),
        }  # fmt: skip
        for held in (some_pairs, with_targets):
            rest = training.subset(np.array([p not in held for _, p in training.rows]))
            wanted = sorted(held)
            fitted = EffectAnchor().fit(rest)
            regimes = np.array([fitted.regime(p, "all") for p in wanted])
            for m, method in methods.items():
                wrong = true_errors(
                    method(rest, wanted, ["all"] * len(wanted)), wanted, truth, cells.genes
                )
                for regime in sorted(set(regimes)):
                    found.setdefault(m, {}).setdefault(regime, np.zeros(n))[r] += wrong[
                        regimes == regime
                    ].sum()
    base = found["no change"]
    rows = {m: {k: Ratio.of(e[k], base[k]) for k in sorted(base)} for m, e in found.items()}
    yield "Norman-sized simulation: error against the truth / no change", rows


def interactions(directory: Path, n: int) -> Iterator[Table]:
    """What is not additive in held-out combinations: gain over additive, and recall."""
    recall: dict[str, list[pd.Series]] = {}
    error: dict[str, list[float]] = {}
    covered, shares = [], []
    for r, cells, adata in screens(n):
        rows = adata.uns["simulation"]["rows"]["perturbation"]
        true = dict(
            zip(map(read, rows), adata.uns["simulation"]["interaction"][SCALE], strict=True)
        )
        rng = np.random.default_rng(r)
        pairs = sorted(p for p in true if len(p.targets) == 2)
        held = [pairs[i] for i in sorted(rng.permutation(len(pairs))[: len(pairs) // 2])]
        table = cells.table(cells.halves(rng)[0] | ~cells.is_control)
        rest = table.subset(np.array([p not in set(held) for _, p in table.rows]))
        where = ["all"] * len(held)
        scored = np.array([~np.isin(cells.genes, p.targets) for p in held])
        truth = np.stack([true[p] for p in held])
        interacts = (np.abs(truth) > INTERACTS) & scored
        shares.append(interacts.sum() / scored.sum())
        additive = Additive().fit(rest).predict(held, where)
        predicted = EffectAnchor().fit(rest).predict_interactions(held, where, SCALE)
        inside = np.abs(predicted.mean - truth) < 1.96 * np.sqrt(predicted.variance)
        covered.append(inside[scored].mean())
        methods = {"anchor": predicted.mean} | {
            name: kind().fit(rest).predict(held, where) - additive
            for name, kind in (("larger single", LargerSingle), ("matching mean", MatchingMean))
        }
        for name, found in (methods | {"additive": np.zeros_like(truth)}).items():
            error.setdefault(name, []).append(float(((found - truth)[scored] ** 2).sum()))
            calls = np.where(scored, found, 0)
            recall.setdefault(name, []).append(interaction_recall(calls, interacts))
    base = np.array(error["additive"])
    yield (
        f"Norman-sized simulation, held-out combinations: {np.mean(shares):.1%} of the genes "
        f"interact by more than {INTERACTS}; 95% intervals hold {np.mean(covered):.1%}",
        {name: {"error / none predicted": Ratio.of(np.array(e), base)}
               | {f"recall at {level:g} false": f"{np.mean([x[level] for x in recall[name]]):.3f}"
                  for level in recall[name][0].index} for name, e in error.items()},
    )  # fmt: skip


def speed(directory: Path, n: int) -> Iterator[Table]:
    adata = gpjepa.datasets.simulate(60_000, 5_000, n_targets=105, n_combinations=131)
    features = network_features(adata)
    cells = Cells.of(adata)
    table = cells.table(np.ones(len(cells.library), bool))
    names = sorted({p.targets[0] for _, p in table.rows if len(p.targets) == 1})
    pairs = [Perturbation.of([a, b]) for i, a in enumerate(names) for b in names[:i]]

    def fit() -> EffectAnchor:
        fitted = EffectAnchor(features).fit(table)
        for scale in ("mean_log1p", "log1p_mean"):
            fitted.predict(pairs[:1], ["all"], scale)
        return fitted

    fitted = fit()
    yield (
        f"{len(table.rows)} perturbations x {len(table.genes)} genes",
        {
            "effect table": measured_cost(lambda: cells.table(np.ones(len(cells.library), bool))),
            "fit, both scales": measured_cost(fit),
            f"{len(pairs)} pairs": measured_cost(
                lambda: fitted.predict(pairs, ["all"] * len(pairs), SCALE)
            ),
        },
    )


def measured_cost(what: Callable[[], object]) -> dict[str, str]:
    start = time.perf_counter()
    what()
    took = time.perf_counter() - start
    tracemalloc.start()
    what()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": f"{took:.1f}", "GB above the data": f"{peak / 1e9:.2f}"}


def gate(directory: Path, n: int) -> Iterator[Table]:
    """GP-JEPA with each gate; sums over folds of held-out targets, one training per fold."""
    features = gene_sets(directory)
    for name, size in (("papalexi_2021", 5), ("datlinger_2021", 5), ("norman_2019", 3)):
        adata = ad.read_h5ad(directory / f"{name}_mini.h5ad")
        if "library_size" not in adata.obs:
            adata.obs["library_size"] = np.asarray(adata.X.sum(1)).ravel()
        adata = adata[adata.obs["library_size"] > 0].copy()
        cells = Cells.of(adata)
        targets = sorted({p.targets[0] for p in cells.perturbations if len(p.targets) == 1})
        found: dict[str, list[float]] = {"auto": [], "1": [], "anchor": [], "no change": []}
        gates = []
        for r in range(n):
            rng = np.random.default_rng(r)
            ours, theirs = cells.halves(rng)
            measured = cells.table(theirs | ~cells.is_control)
            order = rng.permutation(targets)
            for start in range(0, len(order), size):
                out = set(order[start : start + size])
                known = np.array([not set(p.targets) & out for p in cells.perturbations])
                model = trained(adata[known & ~theirs], r, features, "library_size")
                asked = {t for t in out if t in model.vocabulary.index}  # others are refused
                here = measured.subset(np.array(
                    [len(p.targets) == 1 and p.targets[0] in asked for _, p in measured.rows]
                ))  # fmt: skip
                for m in found:
                    found[m].append(errors(by_gate(model, m, [p for _, p in here.rows]), here)[0])
                gates.append(model.gate_.get("unseen", {}).get("gate", 0.0))
        yield from show_gate(
            f"{name}, unseen targets", {m: np.array(e) for m, e in found.items()}, gates
        )
    yield from simulated_gate(n)


def simulated_gate(n: int) -> Iterator[Table]:
    found: dict[str, dict[str, list[float]]] = {}
    gates: dict[str, list[float]] = {}
    for r in range(5 * n):
        adata = gpjepa.datasets.simulate(12_000, seed=100 + r)
        adata.obs["library_size"] = np.asarray(adata.X.sum(1)).ravel()
        truth = true_effects(adata)
        rng = np.random.default_rng(r)
        singles = sorted(p for p in truth if len(p.targets) == 1)
        pairs = sorted(p for p in truth if len(p.targets) == 2)
        order = rng.permutation(len(singles))
        never = {singles[i].targets[0] for i in order[:3]}
        alone = {singles[i] for i in order[3:6]}
        held = {p for p in truth if set(p.targets) & never} | alone
        rest = [p for p in pairs if p not in held]
        held |= {rest[i] for i in rng.permutation(len(rest))[:6]}
        known = np.array([read(p) not in held for p in adata.obs["perturbation"].astype(str)])
        model = trained(adata[known], r, (), "library_size")
        wanted = sorted(held)
        regimes = [model.anchor.regime(p, "all") for p in wanted]
        for m in ("auto", "1", "anchor", "no change"):
            wrong = true_errors(by_gate(model, m, wanted), wanted, truth, model.genes)
            for regime in sorted(set(regimes)):
                mine = np.array([x == regime for x in regimes])
                found.setdefault(regime, {}).setdefault(m, []).append(wrong[mine].sum())
        for regime in set(regimes):
            gates.setdefault(regime, []).append(model.gate_.get(regime, {}).get("gate", 0.0))
    for regime, e in sorted(found.items()):
        yield from show_gate(
            f"simulation, {regime}", {m: np.array(x) for m, x in e.items()}, gates[regime]
        )


def trained(adata: ad.AnnData, seed: int, features: object, library_size_key: str):
    import scvi

    adata = adata.copy()
    scvi.settings.seed = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpjepa.GPJEPA.setup_anndata(adata, library_size_key=library_size_key)
        model = gpjepa.GPJEPA(adata, target_features=features, missing_features="mean")
        model.train(enable_progress_bar=False)
    return model


def by_gate(model: gpjepa.GPJEPA, method: str, wanted: list[Perturbation]) -> np.ndarray:
    if method == "no change":
        return np.zeros((len(wanted), len(model.genes)))
    gate = {"auto": "auto", "1": 1, "anchor": 0}[method]
    return np.stack([model.predict_effects(p, gate=gate)["effect"].to_numpy() for p in wanted])


def show_gate(title: str, found: dict[str, np.ndarray], gates: list[float]) -> Iterator[Table]:
    base = found["no change"]
    rows = {m: {"error / no change": Ratio.of(e, base), "error / anchor": Ratio.of(e, found["anchor"])}
            for m, e in found.items()}  # fmt: skip
    difference = (found["auto"] - found["anchor"]) / base.mean()
    draws = np.random.default_rng(0).integers(0, len(difference), (2_000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    yield f"{title} ({len(base)} trainings)", rows
    yield "auto - anchor, in units of no change", {
        "": {
            "mean": f"{difference.mean():.4f}", "interval": f"{low:.4f} to {high:.4f}",
            "gate above 0": f"{np.mean(np.array(gates) > 0):.0%}",
            "mean gate": f"{np.mean(gates):.2f}",
        }
    }  # fmt: skip


if __name__ == "__main__":
    tables = {
        f.__name__: f
        for f in (
            doubles,
            contexts,
            unseen,
            simulation,
            interactions,
            speed,
            gate,
        )
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=tables)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--resamplings", type=int, default=20)
    given = parser.parse_args()
    for title, rows in tables[given.table](given.directory, given.resamplings):
        print(f"\n{title}\n\n{pd.DataFrame(rows).T.to_string()}", flush=True)
