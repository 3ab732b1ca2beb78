"""How the response network depends on what it was trained on: docs/response.md.

python docs/response_training.py DATA   # two hours on one CPU core
"""

import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from response import CELLS, ON, SEEDS, SPLITS, table_of

from gpjepa.datasets import RandomScreen, random_screen, simulate
from gpjepa.datasets._random_screens import LAWS
from gpjepa.effects import EffectAnchor, noise_corrected_error
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import Perturbation
from gpjepa.response import ResponsePredictor
from gpjepa.response._networks import Networks
from gpjepa.response._pretrain import draw_episodes, train_network

N_SCREENS = 4_000  # a third of those behind the network of the package, so that it can be repeated
TRAINING_SEEDS = range(5)
N_TESTED = 16  # screens of each law
LEAST_PAIRS = 12
TESTED_FROM = 10_000_000  # a seed that training does not reach


def networks() -> dict[str, ResponseNetwork]:
    """By name: of five seeds, and of the first seed without each of the laws."""
    found = {}
    for seed in TRAINING_SEEDS:
        episodes = draw_episodes(N_SCREENS, seed=seed, n_workers=1)
        found[f"seed {seed}"] = train_network(episodes, seed=seed, progress=lambda _: None)
        print(f"seed {seed}: {len(episodes)} episodes", flush=True)
        for law in LAWS if seed == 0 else ():
            some = [episode for episode in episodes if law not in episode.laws]
            found[f"without {law}"] = train_network(some, seed=seed, progress=lambda _: None)
            print(f"without {law}: {len(some)} episodes", flush=True)
    return found


def on_other_screens(found: dict[str, ResponseNetwork], data: Path) -> pd.DataFrame:
    """Errors with gate 1 over those of the anchor, where training had no part."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    rows["simulated, no pair measured"] = _pooled(found, _simulated())
    rows["Norman, both targets measured alone"] = _pooled(found, _norman(data))
    return pd.DataFrame(rows).round(3)


def _simulated():
    for seed, n_cells in zip(SEEDS, CELLS, strict=True):
        adata = simulate(n_cells, 600, seed=seed)
        table, truth = table_of(adata), adata.uns["simulation"]
        effect = dict(zip(truth["rows"]["perturbation"], truth["effect"][ON], strict=True))
        out = np.array([len(p.targets) > 1 for _, p in table.rows])
        wanted = [p for p, o in zip((p for _, p in table.rows), out, strict=True) if o]
        true, scored = np.stack([effect[str(p)] for p in wanted]), ~table.targeted(out.nonzero()[0])
        yield table.subset(~out), wanted, lambda said, t=true, s=scored: ((said - t) * s) ** 2


def _norman(data: Path):
    adata = ad.read_h5ad(data / "norman_2019_mini.h5ad")
    spelt = {x: str(Perturbation.parse(x)) for x in adata.obs["perturbation"].unique()}
    labels = adata.obs["perturbation"].map(spelt).astype(str).to_numpy()
    alone = {x for x in labels if "+" not in x}
    both = sorted({x for x in labels if "+" in x and set(x.split("+")) <= alone})
    for split in range(SPLITS):
        controls = np.random.default_rng(split).permutation(np.flatnonzero(labels == "control"))
        train, test = ~np.isin(labels, both), np.isin(labels, both)
        train[controls[1::2]], test[controls[1::2]] = False, True
        other = table_of(adata, test)
        at = [i for i, (_, p) in enumerate(other.rows) if str(p) in both]
        truth = other.effect[ON][at], other.noise(ON)[at], ~other.targeted(at)
        wanted = [other.rows[i][1] for i in at]
        yield table_of(adata, train), wanted, lambda said, t=truth: noise_corrected_error(said, *t)


def _pooled(found: dict[str, ResponseNetwork], screens) -> pd.Series:
    """The anchor is fitted once for all networks."""
    total: dict[str, float] = {}
    for table, wanted, errors in screens:
        anchor = EffectAnchor().fit(table)
        pairs = [(p, "all") for p in wanted]
        said = anchor.predict(wanted, ["all"] * len(wanted), ON)
        for name, network in found.items():
            mean = Networks(network, anchor, ON, 0).predict(pairs, said).mean
            total[name] = total.get(name, 0) + float(np.sum(errors(mean)))
        total["anchor"] = total.get("anchor", 0) + float(np.sum(errors(said.mean)))
    errors = pd.Series(total)
    return errors.drop("anchor") / errors["anchor"]


def screens_of(law: str) -> list[RandomScreen]:
    """New screens of which the combinations follow a law."""
    found, seed = [], TESTED_FROM
    while len(found) < N_TESTED:
        screen, seed = random_screen(np.random.default_rng(seed)), seed + 1
        pairs = [p for _, p in screen.effects.rows if len(p.targets) > 1]
        if law in screen.laws and len(set(pairs)) >= LEAST_PAIRS:
            found.append(screen)
    return found


def by_law(found: dict[str, ResponseNetwork]) -> pd.DataFrame:
    """Errors over no change as measured, mean over screens, with a law known or new."""
    rows = {}
    for law in LAWS:
        networks = {"known": found["seed 0"], "new": found[f"without {law}"]}
        errors = pd.DataFrame([_of_screen(screen, networks) for screen in screens_of(law)])
        rows[law] = errors.mean()
        print(law, errors.mean().round(3).to_dict(), flush=True)
    return pd.DataFrame(rows).T.round(3)


def _of_screen(screen: RandomScreen, networks: dict[str, ResponseNetwork]) -> dict[str, float]:
    table, [on] = screen.effects, screen.effects.scales
    pairs = sorted({p for _, p in table.rows if len(p.targets) > 1})
    hidden = set(pairs[::3])
    out = np.array([p in hidden for _, p in table.rows])
    at = np.flatnonzero(out)
    asked = [table.rows[i][1] for i in at], [table.rows[i][0] for i in at]
    scored, truth = ~table.targeted(at), screen.truth[at]
    noise = (
        table.noise(on)[at] * scored
    ).sum()  # where nothing happens, errors are small against it
    nothing = float(((truth * scored) ** 2).sum() + noise)
    found = {}
    for name, network in networks.items():
        predictor = ResponsePredictor((), network).fit(table.subset(~out))
        for gate in (0, 1, "auto"):
            said = predictor.predict(*asked, on, gate)
            error = float((((said.mean - truth) * scored) ** 2).sum()) / nothing
            found["anchor" if gate == 0 else f"{name}, gate {gate}"] = error
        found[f"{name}, mean gate"] = float(said.gate.mean())
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    trained = networks()
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if out:
        torch.save({name: network.state_dict() for name, network in trained.items()}, out)
    print(on_other_screens(trained, Path(sys.argv[1])).to_string())
    print(by_law(trained).to_string())
