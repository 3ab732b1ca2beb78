r"""A mechanistic Perturb-seq simulator with known truth.

Regulators (transcription factors) act on each other and on genes. The activity of regulator *t* in
a cell is at the steady state of

.. math:: x_t = b_{c,t} + \sum_s W_{st}\,(\sigma(x_s) - r_s) + u_t + \varepsilon_t,
   \qquad a_t = \sigma(x_t),

with the basal input :math:`b_{c}` of context *c*, the resting activities :math:`r`, the push
:math:`u_t` of the perturbation times the
cell's own efficiency (0 in escapers), and the state :math:`\varepsilon` of the cell. Because the
activity saturates, combinations interact. The log rate of gene *g* is
:math:`\beta_{c,g} + \sum_t V_{tg} (a_t - r_t)` plus the direct effect on the targeted gene itself; counts
are negative binomial given the cell's library size.

The constants below are fixed by statistics of Norman et al. 2019 (Science 365:786), not by any
method's result; ``docs/simulator.md`` sets both side by side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.effects._scales import PER, SCALES, expected_log1p
from gpjepa.perturbations import Perturbation

_N_TRANSCRIPTOME = 20_000
_N_VIRTUAL = 512  # cells behind each true mean effect
_CHUNK = 2_000  # cells held dense at a time


@dataclass(frozen=True)
class _Settings:
    """The benchmark's constants; a change of them is a change of the benchmark."""

    log_library_mean: float = 9.48  # whole cell, Norman 2019: median 13,523 counts
    log_library_sd: float = 0.41
    log_expression_sd: float = 2.0
    inverse_dispersion: float = 5.0
    n_regulators: int = 100
    regulators_per_regulator: int = 4
    regulators_per_gene: int = 1
    regulator_weight: float = 2.0
    gene_weight: float = 0.2
    n_hubs: int = 4
    hub_inputs: float = 0.6
    hub_input: float = 4.8
    hub_weight: float = 0.6
    hub_genes: float = 0.12
    hub_basal: float = -1.3
    push: float = 4.5
    log_fold_direct: float = 1.5
    escapers: float = 0.1
    efficiency: tuple[float, float] = (5.0, 2.0)
    state_sd: float = 0.25
    context_sd: float = 0.8
    context_expression_sd: float = 0.4
    lowest_dose: float = 10.0  # as sci-Plex: 10 nM, and ten times as much with each dose
    log10_half_maximal: tuple[float, float] = (1.0, 4.0)
    log_hill_sd: float = 0.3
    batch_sd: float = 0.1


@dataclass(frozen=True)
class _Network:
    """What is drawn once: who regulates whom, and how strongly."""

    regulators: np.ndarray  # indices of the regulators among the genes
    regulation: np.ndarray  # W, (n_regulators, n_regulators): row acts on column
    response: np.ndarray  # V, (n_regulators, n_genes)
    rest: np.ndarray  # r, (n_regulators,)
    basal: np.ndarray  # b, (n_contexts, n_regulators)
    log_rate: np.ndarray  # β, (n_contexts, n_genes)
    batch: np.ndarray  # (n_batches, n_genes)
    panel_share: float  # of a cell's counts that fall on the simulated genes


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _draw_network(
    rng: np.random.Generator, s: _Settings, n_genes: int, n_contexts: int, n_batches: int
) -> _Network:
    transcriptome = np.sort(rng.normal(0, s.log_expression_sd, _N_TRANSCRIPTOME))[::-1]
    share = np.exp(transcriptome[:n_genes]).sum() / np.exp(transcriptome).sum()
    log_rate = rng.permutation(transcriptome[:n_genes])
    n = min(s.n_regulators, n_genes // 2)
    regulators = np.sort(rng.choice(n_genes, n, replace=False))

    regulation = np.zeros((n, n), np.float32)
    for t in range(n):
        sources = rng.choice(np.delete(np.arange(n), t), min(s.regulators_per_regulator, n - 1))
        sign = np.where(rng.random(sources.size) < 0.7, 1, -1)
        regulation[sources, t] = sign * s.regulator_weight * rng.gamma(2, 0.5, sources.size)

    response = np.zeros((n, n_genes), np.float32)
    for g in range(n_genes):
        sources = rng.choice(n, min(s.regulators_per_gene, n), replace=False)
        response[sources, g] = s.gene_weight * rng.standard_t(4, sources.size)
    # Every regulator acts on a few hubs with many genes: effects of different perturbations
    # resemble each other, and combinations meet at hubs that saturate.
    hubs = rng.choice(n, min(s.n_hubs, n), replace=False)
    sign = np.where(rng.random((n, hubs.size)) < 0.8, 1, -1)
    acts = rng.random((n, hubs.size)) < s.hub_inputs
    regulation[:, hubs] = s.hub_input * sign * acts * rng.gamma(1, 1, (n, hubs.size))
    regulation[hubs] = 0  # hubs act on genes alone: loops through them would make cells bistable
    chosen = rng.random((hubs.size, n_genes)) < s.hub_genes
    response[hubs] += (s.hub_weight * chosen * rng.standard_t(4, chosen.shape)).astype(np.float32)

    common = rng.normal(-1.5, 1.0, n).astype(np.float32)
    common[hubs] = s.hub_basal
    basal = common + rng.normal(0, s.context_sd, (n_contexts, n)) * (n_contexts > 1)
    shift = rng.normal(0, s.context_expression_sd, (n_contexts, n_genes))
    if n_contexts == 1:
        shift[:] = 0
    batch = rng.normal(0, s.batch_sd, (n_batches, n_genes)) * (n_batches > 1)
    return _Network(
        regulators,
        regulation,
        response,
        _sigmoid(common),
        basal.astype(np.float32),
        (log_rate + shift).astype(np.float32),
        batch.astype(np.float32),
        float(share),
    )


def _steady_state(network: _Network, drive: np.ndarray) -> np.ndarray:
    """Activities at the fixed point of x = drive + (a - r) W, by damped iteration."""
    drive = drive - network.rest @ network.regulation
    x = drive
    for _ in range(40):
        x = 0.5 * x + 0.5 * (drive + _sigmoid(x) @ network.regulation)
    return _sigmoid(x)


def _rates(
    network: _Network,
    s: _Settings,
    context: np.ndarray,
    batch: np.ndarray | None,
    push: np.ndarray,
    state: np.ndarray,
) -> np.ndarray:
    """Share of each gene in the panel's counts, shape (n_cells, n_genes)."""
    drive = network.basal[context] + push + state
    activity = _steady_state(network, drive.astype(np.float32))
    log_rate = (activity - network.rest) @ network.response
    log_rate += network.log_rate[context]
    if batch is not None:
        log_rate += network.batch[batch]
    # The targeted gene itself answers to the perturbation, besides what its network does.
    log_rate[:, network.regulators] += np.float32(s.log_fold_direct / s.push) * push
    log_rate -= log_rate.max(1, keepdims=True)
    rates = np.exp(log_rate, out=log_rate)
    rates /= rates.sum(1, keepdims=True)
    return rates


def _negative_binomial(
    rng: np.random.Generator, mean: np.ndarray, inverse_dispersion: float
) -> sp.csr_matrix:
    gamma = rng.standard_gamma(inverse_dispersion, mean.shape, dtype=np.float32)
    gamma *= mean / np.float32(inverse_dispersion)
    return sp.csr_matrix(rng.poisson(gamma).astype(np.float32))


def _efficiencies(rng: np.random.Generator, s: _Settings, shape: tuple[int, int]) -> np.ndarray:
    efficiency = rng.beta(*s.efficiency, shape)
    efficiency[rng.random(shape) < s.escapers] = 0
    return efficiency.astype(np.float32)


class _MeanCounts:
    """mean_log1p as a function of the rate: the NB and the library sizes are integrated out."""

    def __init__(self, s: _Settings, panel_share: float) -> None:
        from scipy.stats import norm

        quantiles = norm.ppf((np.arange(64) + 0.5) / 64)
        library = panel_share * np.exp(s.log_library_mean + s.log_library_sd * quantiles)
        self.grid = np.linspace(np.log(1e-9), 0, 600)
        mean = library[:, None] * np.exp(self.grid)
        theta = np.full(self.grid.size, s.inverse_dispersion)
        self.value = expected_log1p(mean, theta, library).mean(0)

    def __call__(self, rates: np.ndarray) -> np.ndarray:
        at = (np.log(np.maximum(rates, 1e-9)) - self.grid[0]) / (self.grid[1] - self.grid[0])
        low = np.minimum(at.astype(np.int32), self.grid.size - 2)
        return self.value[low] + (at - low) * (self.value[low + 1] - self.value[low])


def _true_effects(
    rng: np.random.Generator,
    network: _Network,
    s: _Settings,
    mode: str,
    perturbations: list[tuple[int, ...]],
    strength: np.ndarray,
) -> dict[str, np.ndarray]:
    """Mean effect of every context × perturbation, from the same virtual cells for all of them."""
    n, k = _N_VIRTUAL, len(network.regulators)
    state = rng.normal(0, s.state_sd, (n, k)).astype(np.float32)
    efficiency = _efficiencies(rng, s, (n, k))
    mean_counts = _MeanCounts(s, network.panel_share)
    effects: dict[str, list[np.ndarray]] = {scale: [] for scale in SCALES}
    for c in range(len(network.basal)):
        context = np.full(n, c)
        control: dict[str, np.ndarray] = {}
        for targets, share in zip([(), *perturbations], [0.0, *strength], strict=True):
            push = _push(targets, efficiency, s, mode) * np.float32(share)
            rates = _rates(network, s, context, None, push, state)
            profile = {
                "log1p_mean": np.log1p(PER * rates.mean(0)),
                "mean_log1p": mean_counts(rates).mean(0),
            }
            if not targets:
                control = profile
                continue
            for scale in SCALES:
                effects[scale].append(profile[scale] - control[scale])
    return {scale: np.stack(rows).astype(np.float32) for scale, rows in effects.items()}


def _push(targets: tuple[int, ...], efficiency: np.ndarray, s: _Settings, mode: str) -> np.ndarray:
    push = np.zeros_like(efficiency)
    sign = 1 if mode == "activation" else -1
    push[:, list(targets)] = sign * s.push * efficiency[:, list(targets)]
    return push


def _dose_responses(
    rng: np.random.Generator, s: _Settings, n_targets: int, n_doses: int
) -> tuple[np.ndarray, np.ndarray]:
    """Doses, and the share of the full push at each of them, shape (n_targets, n_doses)."""
    doses = s.lowest_dose * 10.0 ** np.arange(n_doses)
    half = 10 ** rng.uniform(*s.log10_half_maximal, (n_targets, 1))
    steep = np.exp(rng.normal(0, s.log_hill_sd, (n_targets, 1)))
    return doses, 1 / (1 + (half / doses) ** steep)


def _interactions(rows: pd.DataFrame, effect: np.ndarray) -> np.ndarray:
    """Effect of each combination minus the sum of its singles; 0 for singles."""
    where = {
        key: i for i, key in enumerate(zip(rows["context"], rows["perturbation"], strict=True))
    }
    result = np.zeros_like(effect)
    for i, (context, label) in enumerate(where):
        parts = label.split("+")
        if len(parts) > 1:
            result[i] = effect[i] - sum(effect[where[context, part]] for part in parts)
    return result


def _interaction_types(rows: pd.DataFrame, effect: np.ndarray) -> list[str]:
    """How a combination relates to its singles, after Norman 2019: d_AB ≈ c_A d_A + c_B d_B."""
    where = {
        key: i for i, key in enumerate(zip(rows["context"], rows["perturbation"], strict=True))
    }
    types = []
    for i, (context, label) in enumerate(where):
        parts = label.split("+")
        if len(parts) == 1:
            types.append("single")
            continue
        singles = np.stack([effect[where[context, part]] for part in parts])
        c, *_ = np.linalg.lstsq(singles.T, effect[i], rcond=None)
        size = np.linalg.norm(c) / np.sqrt(len(parts))
        if np.abs(c).max() > 3 * max(np.abs(c).min(), 1e-9):
            types.append("epistatic")
        elif size > 1.15:
            types.append("synergistic")
        elif size < 0.85:
            types.append("buffering")
        else:
            types.append("additive")
    return types


def simulate(
    n_cells: int = 6_000,
    n_genes: int = 1_000,
    *,
    n_targets: int = 24,
    n_combinations: int = 36,
    n_contexts: int = 1,
    n_batches: int = 1,
    n_doses: int = 1,
    mode: Literal["activation", "repression"] = "activation",
    seed: int = 0,
) -> ad.AnnData:
    """Simulate a Perturb-seq screen from a regulatory network, with known truth.

    Parameters
    ----------
    n_cells
        Cells in all; a tenth are controls, the others are shared evenly by the perturbations.
    n_genes
        Genes measured: the most highly expressed of a transcriptome of 20,000.
    n_targets
        Regulators perturbed alone; the network has 100 regulators, or as many as are perturbed.
    n_combinations
        Pairs of these perturbed together, drawn at random.
    n_contexts
        Contexts that differ in basal state; every perturbation is made in each.
    n_batches
        Batches with gene-wise shifts, crossed with everything else.
    n_doses
        Doses of every target, as in a screen of drugs: 10, 100, ... The push on the regulator is
        a Hill function of the dose, with its own half-maximal dose and steepness for each target.
        Without combinations.
    mode
        ``"activation"`` (CRISPRa) or ``"repression"`` (CRISPRi, knock-out).
    seed
        Seed of everything drawn.

    Returns
    -------
    anndata.AnnData
        Counts in ``X`` and ``layers["counts"]`` (CSR); ``obs`` has ``perturbation``,
        ``context``, ``batch`` and the mean ``efficiency`` of the cell's perturbation;
        ``uns["simulation"]`` has the settings, the network, and the truth: ``rows`` (context,
        perturbation, kind of interaction), and per scale ``effect`` and ``interaction``, shape
        (n_rows, n_genes).

    Raises
    ------
    ValueError
        If the sizes do not fit together.
    """
    s = _Settings()
    s = replace(s, n_regulators=max(s.n_regulators, n_targets))
    n_single = n_targets * n_doses
    _check_sizes(s, n_cells, n_genes, n_targets, n_combinations, n_contexts, n_batches, n_single)
    if mode not in ("activation", "repression"):
        raise ValueError(f"mode={mode!r} is not known; choose 'activation' or 'repression'.")
    rng, truth_rng, cell_rng = np.random.default_rng(seed).spawn(3)
    network = _draw_network(rng, s, n_genes, n_contexts, n_batches)
    genes = np.array([f"GENE{i:05d}" for i in range(n_genes)])
    genes[network.regulators] = [f"TF{i:03d}" for i in range(len(network.regulators))]

    targets = np.sort(rng.choice(len(network.regulators), n_targets, replace=False))
    pairs = list(combinations(targets, 2))
    chosen = sorted(rng.choice(len(pairs), n_combinations, replace=False)) if n_combinations else []
    perturbations: list[tuple[int, ...]] = [(t,) for t in targets] + [pairs[i] for i in chosen]
    labels = ["+".join(f"TF{t:03d}" for t in p) for p in perturbations]
    strength = np.ones(len(perturbations))
    if n_doses > 1:
        doses, responses = _dose_responses(rng, s, n_targets, n_doses)
        labels = [str(Perturbation.of([t], [dose])) for t in labels for dose in doses]
        perturbations = [p for p in perturbations for _ in doses]
        strength = responses.ravel()

    adata = _draw_cells(
        cell_rng, network, s, mode, n_cells, [(), *perturbations], ["control", *labels], strength
    )
    adata.var_names = genes
    contexts = [f"context{c}" for c in range(n_contexts)]
    rows = pd.DataFrame(
        [(c, label) for c in contexts for label in labels], columns=["context", "perturbation"]
    )
    effect = _true_effects(truth_rng, network, s, mode, perturbations, strength)
    rows["interaction"] = _interaction_types(rows, effect["log1p_mean"])
    rows.index = rows.index.astype(str)
    adata.uns["simulation"] = {
        "settings": {**_plain(s), "mode": mode, "seed": seed},
        "network": {
            "regulators": genes[network.regulators].astype(object),
            "panel_share": network.panel_share,
            "regulation": network.regulation,
            "response": network.response,
            "basal": network.basal,
        },
        "rows": rows,
        "effect": effect,
        "interaction": {scale: _interactions(rows, effect[scale]) for scale in SCALES},
    }
    return adata


def _plain(s: _Settings) -> dict[str, Any]:
    """Settings as AnnData writes them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(s).items()}


def _check_sizes(
    s: _Settings,
    n_cells: int,
    n_genes: int,
    n_targets: int,
    n_combinations: int,
    n_contexts: int,
    n_batches: int,
    n_single: int,
) -> None:
    n_regulators = min(s.n_regulators, n_genes // 2)
    n_pairs = n_targets * (n_targets - 1) // 2
    n_groups = n_contexts * (1 + n_single + n_combinations)
    problems = [
        (not 20 <= n_genes <= _N_TRANSCRIPTOME, f"n_genes={n_genes}: 20 to {_N_TRANSCRIPTOME}"),
        (not 1 <= n_targets <= n_regulators, f"n_targets={n_targets}: 1 to {n_regulators}"),
        (not 0 <= n_combinations <= n_pairs, f"n_combinations={n_combinations}: 0 to {n_pairs}"),
        (n_contexts < 1 or n_batches < 1, "n_contexts and n_batches: at least 1"),
        (n_single < n_targets, "n_doses: at least 1"),
        (
            n_single > n_targets and n_combinations > 0,
            f"n_combinations={n_combinations}: 0 with several doses",
        ),
        (n_cells < 2 * n_groups, f"n_cells={n_cells}: at least {2 * n_groups}, 2 per condition"),
    ]
    said = [message for wrong, message in problems if wrong]
    if said:
        raise ValueError("Cannot simulate: " + "; ".join(said) + ".")


def _draw_cells(
    rng: np.random.Generator,
    network: _Network,
    s: _Settings,
    mode: str,
    n_cells: int,
    perturbations: list[tuple[int, ...]],
    labels: list[str],
    strength: np.ndarray,
) -> ad.AnnData:
    n_contexts, k = network.basal.shape
    n_control = max(n_contexts * 2, n_cells // 10)
    which = np.concatenate(
        [np.zeros(n_control, int), 1 + np.arange(n_cells - n_control) % (len(perturbations) - 1)]
    )
    # Runs of n_contexts cells of one perturbation visit every context.
    context = np.empty(n_cells, int)
    for p in range(len(perturbations)):
        mine = np.flatnonzero(which == p)
        context[mine] = np.arange(mine.size) % n_contexts
    order = rng.permutation(n_cells)
    which, context = which[order], context[order]
    batch = rng.integers(len(network.batch), size=n_cells)
    library = rng.lognormal(s.log_library_mean, s.log_library_sd, n_cells) * network.panel_share

    member = np.zeros((len(perturbations), k), np.float32)
    for i, targets in enumerate(perturbations):
        member[i, list(targets)] = 1
    share = np.append(0, strength)[:, None].astype(np.float32)
    chunks, efficiencies = [], []
    for start in range(0, n_cells, _CHUNK):
        cells = slice(start, min(start + _CHUNK, n_cells))
        n = cells.stop - start
        active = _efficiencies(rng, s, (n, k)) * member[which[cells]]
        push = (1 if mode == "activation" else -1) * s.push * active * share[which[cells]]
        state = rng.normal(0, s.state_sd, (n, k)).astype(np.float32)
        mean = _rates(network, s, context[cells], batch[cells], push, state)
        mean *= library[cells, None].astype(np.float32)
        chunks.append(_negative_binomial(rng, mean, s.inverse_dispersion))
        efficiencies.append(active.sum(1) / np.maximum(member[which[cells]].sum(1), 1))
    counts = sp.vstack(chunks, format="csr")
    del chunks  # or the counts would be in memory three times below
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(which, labels),
            "context": pd.Categorical.from_codes(
                context, [f"context{c}" for c in range(n_contexts)]
            ),
            "batch": pd.Categorical.from_codes(
                batch, [f"batch{b}" for b in range(len(network.batch))]
            ),
            "efficiency": np.concatenate(efficiencies),
        },
        index=[f"cell{i:06d}" for i in range(n_cells)],
    )
    return ad.AnnData(counts, obs=obs, layers={"counts": counts.copy()})
