import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import scvi

import gpjepa

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def real_file(name: str) -> Path:
    """A file of the shared real data; they come beside a checkout, not in it."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the real cells of {name} are not beside this checkout")
    return path


def train_quickly(adata, *, train=None, model=None, **setup):
    """A model after a few epochs: enough for everything but accuracy."""
    adata = adata.copy()
    scvi.settings.seed = 0
    gpjepa.GPJEPA.setup_anndata(adata, **setup)
    fitted = gpjepa.GPJEPA(adata, **({"n_latent": 16, "n_hidden": 32} | (model or {})))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.train(**({"max_epochs": 3, "pretrain_epochs": 2, "enable_progress_bar": False}
                        | (train or {})))  # fmt: skip
    return fitted


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints when it runs `code`."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr[-3_000:]
    return run.stdout
