"""Seconds and peak memory of each stage of training and of predictions, on the device there is.

python docs/gpu.py small             # 6,000 cells × 500 genes
python docs/gpu.py norman            # as large as Norman's screen: 75,000 cells × 5,000 genes
python docs/gpu.py norman --scvi 2   # also scVI, for two epochs

Simulated screens. It takes a GPU where there is one, else the CPU (`--cpu` asks for it). Memory is
the process's, and the GPU's where it is CUDA's; off Linux, it is the most so far, not of the stage.
"""

import argparse
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import scvi
import torch

import gpjepa

SIZES = {
    "small": {"n_cells": 6_000, "n_genes": 500},
    "norman": {"n_cells": 75_000, "n_genes": 5_000, "n_targets": 105, "n_combinations": 65},
}


def resident() -> float:
    """Gigabytes of memory that the process holds now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    unit = 1 if sys.platform == "darwin" else 1_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def measured(name: str, above: float) -> Iterator[None]:
    """Print how long it took, and the most memory it held above what there was before."""
    peak, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    since = time.perf_counter()
    yield
    on_gpu = ""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        on_gpu = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
    seconds = time.perf_counter() - since
    done.set()
    watcher.join()
    print(f"| {name} | {seconds:.1f} | {peak - above:.1f} | {on_gpu} |", flush=True)


def run(adata: ad.AnnData, accelerator: str, scvi_epochs: int) -> None:
    """Every stage, then predictions."""
    above = resident()
    options = {"accelerator": accelerator, "enable_progress_bar": False}
    print("| what | seconds | GB above the data | GB on the GPU |\n|---|--:|--:|--:|")
    with measured("set-up", above):
        gpjepa.GPJEPA.setup_anndata(adata)
        model = gpjepa.GPJEPA(adata)
    with measured("stage A", above):
        model.pretrain(**options)
    with measured("anchor, stages B and C", above):
        model.train(**options)
    epochs = {k: len(model.history[k]) for k in ("pretrain_loss", "train_loss")}
    targets = sorted(model.anchor.effects_.regimes.alone)
    pairs = [f"{a}+{b}" for i, a in enumerate(targets) for b in targets[:i]]
    several = (pairs * (1 + 1_000 // len(pairs)))[:1_000]
    with measured(f"mean effects of {len(set(several))} combinations", above):
        model.predict_effects(several)
    with measured("500 cells of one combination", above):
        model.predict_perturbation(adata, pairs[0], n_samples=500)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.zarr"
        with measured(f"500 cells of each of {len(set(several))}, to disk", above):
            model.predict_perturbation(adata, several, n_samples=500, layers=(), out=path)
    if scvi_epochs:
        scvi.model.SCVI.setup_anndata(adata)
        other = scvi.model.SCVI(adata)
        with measured(f"scVI, {scvi_epochs} epochs", above):
            other.train(scvi_epochs, accelerator=accelerator, enable_progress_bar=False)
    gates = {regime: round(gate.gate, 2) for regime, gate in model.response_.judged.gates.items()}
    print(f"\nepochs: {epochs}; gates: {gates}")


def main() -> None:
    """Read the arguments, simulate, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--scvi", type=int, default=0, help="epochs of scVI to time beside")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    scvi.settings.seed = 0
    accelerator, where = "cpu", f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available() and not arguments.cpu:
        accelerator, where = "gpu", torch.cuda.get_device_name()
    elif torch.backends.mps.is_available() and not arguments.cpu:
        accelerator, where = "mps", "Apple GPU"
    print(f"{arguments.size} on {where}, torch {torch.__version__}\n", flush=True)
    run(gpjepa.datasets.simulate(**SIZES[arguments.size]), accelerator, arguments.scvi)


if __name__ == "__main__":
    main()
