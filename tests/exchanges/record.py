"""Records what our side writes for a published method and what the method answers.

Usage: ``python tests/exchanges/record.py NAME [PYTHON]``, with the interpreter of an environment that
is there, or without for ``uv`` to make it.
The tests replay it, so that the adapter is exercised where the method cannot be installed. Networks
are tiny and hardly trained: what is recorded is the form of the answers, not how good they are.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gpjepa
from gpjepa import splits
from gpjepa.benchmark import Task, standard_cells
from gpjepa.benchmark.methods import Peer
from gpjepa.benchmark.tasks import measured_rows

HERE = Path(__file__).parent
PEERS = HERE.parents[1] / "peers"
FILES = ("task.json", "wanted.json", "prediction.h5ad")
SHARED = ("train.h5ad", "control.h5ad")  # the same for every method
OPTIONS = {
    "CellFlow": {
        "num_iterations": 20,
        "batch_size": 32,
        "network": {"hidden_dims": [16], "decoder_dims": [16]},
    },
    "State": {
        "max_steps": 4,
        "batch_size": 2,
        "overrides": ["model.kwargs.cell_set_len=16", "model.kwargs.hidden_dim=32"],
    },
    "scGPT": {"epochs": 1, "weights": "weights"},
}

WEIGHTS = """
import json, sys
from pathlib import Path
from run_scgpt import SPECIAL, pretrained, stand_in_for_torchtext
import torch
stand_in_for_torchtext()
from scgpt.model import TransformerGenerator
folder, genes = Path(sys.argv[1]), sys.argv[2:]
size = {"embsize": 16, "nheads": 2, "d_hid": 16, "nlayers": 1, "n_layers_cls": 1}
vocabulary = {g: i for i, g in enumerate([*genes, *SPECIAL])}
torch.manual_seed(0)
model = TransformerGenerator(len(vocabulary), 16, 2, 16, 1, nlayers_cls=1, n_cls=1,
    vocab=vocabulary, pad_token="<pad>", pad_value=0, pert_pad_id=2, use_fast_transformer=False)
(folder / "args.json").write_text(json.dumps(size))
(folder / "vocab.json").write_text(json.dumps(vocabulary))
torch.save(model.state_dict(), folder / "best_model.pt")
"""
"""Random weights of the smallest scGPT: real ones are brought by the user."""


def exchange_task() -> Task:
    """A small task with combinations and singles, in one context."""
    cells = standard_cells(gpjepa.datasets.simulate(600, 24, n_targets=4, n_combinations=6, seed=5))
    return Task.of(cells, splits.doubles(measured_rows(cells), seed=0))


def record(name: str, python: Path | None) -> None:
    task, script = exchange_task(), PEERS / f"run_{name.lower()}.py"
    options = dict(OPTIONS[name])
    with tempfile.TemporaryDirectory() as weights:
        if "weights" in options:
            assert python is not None, "random weights are made with the interpreter of scGPT"
            subprocess.run([python, "-c", WEIGHTS, weights, *task.genes], cwd=PEERS, check=True)
            options["weights"] = weights
        _record(name, task, Peer(script, options=options, python=python))
    text = (HERE / name / "task.json").read_text()
    (HERE / name / "task.json").write_text(text.replace(weights, "weights"))


def _record(name: str, task: Task, peer: Peer) -> None:
    try:
        peer.fit(task.train, task.split)
        peer.predict([str(p) for _, p in task.rows], task.control)
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for file in FILES:
            shutil.copy(Path(peer.folder.name) / file, out)
        for file in SHARED:
            shutil.copy(Path(peer.folder.name) / file, HERE)
    finally:
        print((Path(peer.folder.name) / "log.txt").read_text()[-3_000:], file=sys.stderr)
        peer.close()


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else None)
