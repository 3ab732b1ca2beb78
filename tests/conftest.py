import os

import numpy as np
import pytest
import torch
from helpers import train_quickly
from threadpoolctl import threadpool_limits

import gpjepa
from gpjepa import splits
from gpjepa.benchmark import Task, standard_cells
from gpjepa.benchmark.tasks import measured_rows

# Small arrays are slower on several threads, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
threadpool_limits(1)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated():
    """A small screen: 15 singles, 16 combinations, two contexts, two batches."""
    return gpjepa.datasets.simulate(
        2_500, 120, n_targets=15, n_combinations=16, n_contexts=2, n_batches=2, seed=1
    )


@pytest.fixture(scope="session")
def held_out(simulated):
    labels = simulated.obs["perturbation"].cat.categories
    return [label for label in labels if "+" in label][-1]


@pytest.fixture(scope="session")
def model(simulated, held_out):
    keep = (simulated.obs["perturbation"] != held_out).to_numpy()
    return train_quickly(simulated[keep], context_key="context", batch_key="batch")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cells():
    """Cells of a small screen, as the benchmark takes them."""
    adata = gpjepa.datasets.simulate(2_500, 80, n_targets=12, n_combinations=16, seed=2)
    return standard_cells(adata, context_key="context")


@pytest.fixture(scope="session")
def task(cells):
    """Some of its combinations held out."""
    return Task.of(cells, splits.doubles(measured_rows(cells), seed=1))
