"""How fast the encoders are: beside a plain implementation, GeneJEPA's, and scVI; over density.

Usage: ``python docs/encoder_speed.py OUT [GENEJEPA]``; two threads, medians of five. Writes
``OUT.png``. GENEJEPA is a clone of https://github.com/BiostateAI/GeneJEPA, which needs
``pip install ema-pytorch``.
"""

import contextlib
import resource
import sys
import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain import plain_perceiver

from gpjepa.nn import PerceiverEncoder

BATCH, N_LATENT, REPEATS = 64, 64, 5
TURN = 1.0  # seconds of every way in every round, at least


def cells(n, n_genes, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    expressed = torch.rand(n, n_genes, generator=generator) < density
    return 4 * torch.rand(n, n_genes, generator=generator) * expressed


def cells_per_second(functions):
    """Medians over rounds in which every way takes its turn, forward and backward."""
    rates = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            function().square().sum().backward()  # finds the caches full of another way's numbers
            start, calls = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < TURN:
                function().square().sum().backward()
                calls += 1
            rates[name].append(calls * BATCH / seconds)
    return {name: median(found) for name, found in rates.items()}


def beside_others(genejepa):
    for n_genes in (2_000, 5_000):
        torch.manual_seed(0)
        encoder, values = PerceiverEncoder(n_genes, N_LATENT), cells(BATCH, n_genes, 0.1)
        ways = {
            "ours": lambda e=encoder, v=values: e(v),
            "plain": lambda e=encoder, v=values: plain_perceiver(e, v, None)[0],
        }
        if genejepa:
            ways |= genejepa_ways(genejepa, values)
        found = cells_per_second(ways)
        for name, rate in found.items():
            print(f"{n_genes:,} genes, 10% expressed: {name} {rate:,.0f} cells/s; ours is "
                  f"{found['ours'] / rate:.1f} times as fast")  # fmt: skip


def genejepa_ways(path, values):
    """Its encoder at our width, queries and heads, with its one latent block."""
    sys.path.insert(0, str(path))
    from genejepa.configs import ModelConfig
    from genejepa.models import GenePerceiverEncoder

    ways = {}
    for chunk, how in ((ModelConfig.cross_attn_chunk_size, "as published"),
                       (values.shape[1], "genes in one chunk")):  # fmt: skip
        theirs = GenePerceiverEncoder(ModelConfig(
            d=128, latents_L=16, heads_h=4, blocks_D=1, gene_vocab_size=values.shape[1],
            cross_attn_chunk_size=chunk,
        ))  # fmt: skip
        for which, seen in (("expressed genes", values != 0), ("all genes", values >= 0)):
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), seen.sum(1).cumsum(0)])
            args = seen.nonzero()[:, 1], values[seen], offsets
            ways[f"GeneJEPA {how}, {which}"] = lambda t=theirs, a=args: silent(t, *a)
    return ways


def silent(encoder, *args):
    with contextlib.redirect_stdout(None):  # now and then it prints what it sees
        return encoder(*args)


def over_density(out):
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for n_genes, color in ((2_000, "#0072B2"), (5_000, "#E69F00")):
        torch.manual_seed(0)
        encoder = PerceiverEncoder(n_genes, N_LATENT)
        densities, milliseconds = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4), []
        for density in densities:
            values = cells(BATCH, n_genes, density)
            found = cells_per_second({"ours": lambda e=encoder, v=values: e(v)})
            milliseconds.append(1_000 / found["ours"])
            print(f"{n_genes:,} genes, {density:.0%} expressed: {found['ours']:,.0f} cells/s")
        axes.plot([100 * d for d in densities], milliseconds, "o-", color=color,
                  label=f"{n_genes:,} genes")  # fmt: skip
    axes.set(xlabel="genes expressed, %", ylabel="milliseconds per cell", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(f"{out}.png", dpi=150)


def beside_scvi(n_cells=50_000, n_genes=2_000, max_epochs=1):
    """Cells per second of one epoch of stage A, and of scVI with its defaults."""
    import scvi

    from gpjepa import GPJEPA

    counts = sp.random(n_cells, n_genes, 0.1, "csr", np.float32, random_state=0,
                       data_rvs=lambda n: np.random.default_rng(0).integers(1, 8, n))  # fmt: skip
    adata = AnnData(counts.astype(np.float32))
    quiet = {"enable_progress_bar": False, "logger": False}
    GPJEPA.setup_anndata(adata, perturbation_key=None)
    scvi.model.SCVI.setup_anndata(adata)
    took = {"scVI": [], "mlp": [], "perceiver": []}
    for _ in range(REPEATS):
        for name, seconds in took.items():
            scvi.settings.seed = 0
            if name == "scVI":
                model = scvi.model.SCVI(adata)
                run = lambda m=model: m.train(max_epochs, train_size=1.0, **quiet)
            else:
                model = GPJEPA(adata, encoder=name)
                run = lambda m=model: m.pretrain(max_epochs, **quiet)
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    base = n_cells / median(took["scVI"])
    for name, seconds in took.items():
        rate = n_cells / median(seconds)
        print(f"{name}: {rate:,.0f} cells/s, {rate / base:.2f} of scVI's")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory: {peak:.2f} GiB")


if __name__ == "__main__":
    torch.set_num_threads(2)
    beside_scvi()  # first: the peak of memory is that of the process so far
    beside_others(sys.argv[2] if len(sys.argv) > 2 else None)
    over_density(sys.argv[1])
