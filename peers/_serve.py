"""What the scripts of all peers share.

A script runs in the environment of its peer, which knows nothing of gpjepa: this file needs numpy,
pandas, scipy and anndata only. It is started once per fit and speaks through files in a folder:

``train.h5ad``
    Training cells: counts in ``X``; ``obs`` ``perturbation``, ``context``, ``library_size``, and
    ``batch`` where the data name it.
``task.json``
    ``test`` rows (context, perturbation), ``targets`` of each perturbation by name, ``options``,
    ``seed``.
``features.h5ad``
    Features of the targets, one row per target, where the data have any; 0 where nothing is known.
``control.h5ad``, ``wanted.json``
    Control cells of one context, and the perturbations to predict in it.
``prediction.h5ad``
    The answer, as ``gpjepa.benchmark.Method`` asks for it.

Commands (``start``, ``fit``, ``predict``) come as lines of standard input, and one line of JSON
answers each: ``ok``, ``error``, ``seconds``, and ``about`` the method, such as its peak of memory.
"""

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

FEATURES = 64  # components of the features of targets


def serve(fit, predict, given, options=()):
    """Answer commands until the input ends.

    Parameters
    ----------
    fit
        From training cells and the task to whatever ``predict`` needs.
    predict
        From that, control cells and the names of perturbations to an AnnData.
    given
        What the method is given besides the training cells, and what it is not, in words.
    options
        Names of its options; others are refused.
    """
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    if (folder / "features.h5ad").exists():
        task["features"] = ad.read_h5ad(folder / "features.h5ad").to_df()
    np.random.seed(task["seed"])
    # Peers print; what they print belongs to the log, not to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    state = None
    lines = queue.SimpleQueue()
    threading.Thread(target=listen, args=(lines,), daemon=True).start()
    while True:
        line, start = lines.get(), time.perf_counter()
        try:
            if line.strip() == "start":
                unknown = sorted(set(task["options"]) - set(options))
                if unknown:
                    raise ValueError(f"no options {unknown}; it has {sorted(options)}")
            elif line.strip() == "fit":
                state = fit(read(folder / "train.h5ad"), task)
            else:
                wanted = json.loads((folder / "wanted.json").read_text())
                found = predict(state, read(folder / "control.h5ad"), wanted)
                found.write_h5ad(folder / "prediction.h5ad")
            answer = {"ok": True}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answer["seconds"] = time.perf_counter() - start
        answer["about"] = {"peak_memory_gb": peak_memory(), "given": given}
        print(json.dumps(answer), file=answers, flush=True)


def peak_memory():
    """Peak of resident memory in GB, of this process or the largest that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:
        # Not getrusage: a process starts there with the peak of the one that started it.
        status = Path("/proc/self/status").read_text()
        own = int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])
    except OSError:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1_024
    return max(own, children) * unit / 1e9


def listen(lines):
    """Pass commands on, and end at once when nobody is left to answer, even in the middle of a fit."""
    left = b""
    # Not through sys.stdin: a process that a peer forks would wait for its lock for ever.
    while chunk := os.read(0, 4096):
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    os.killpg(0, signal.SIGKILL)  # with whatever it started: it leads a group of its own


def read(path):
    """Cells of a file, labels as plain strings."""
    cells = ad.read_h5ad(path)
    for column in (c for c in ("perturbation", "context", "batch") if c in cells.obs):
        cells.obs[column] = cells.obs[column].astype(str).astype(object)
    return cells


def device():
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def log1p(cells):
    """log1p of counts per 10,000, sparse."""
    size = cells.obs["library_size"].to_numpy(float)
    values = sp.csr_matrix(sp.diags(1e4 / size) @ sp.csr_matrix(cells.X))
    values.data = np.log1p(values.data)
    return values.astype(np.float32)


def as_arrays(frame):
    """A table, perturbations × genes, in a form that fits into a file however many genes it has."""
    return {
        "values": frame.to_numpy(),
        "perturbations": np.asarray(frame.index, dtype=object),
        "genes": np.asarray(frame.columns, dtype=object),
    }


def target_codes(trained, features):
    """What stands for each target: components of its features, so that unseen ones have any too.

    Without features, or where they know nothing of a trained target, one code per trained target.
    """
    from sklearn.decomposition import TruncatedSVD

    parts = pd.DataFrame(np.eye(len(trained)), sorted(trained))
    if features is not None:
        n = min(FEATURES, *(d - 1 for d in features.shape))
        found = TruncatedSVD(n, random_state=0).fit_transform(features.to_numpy())
        known = pd.DataFrame(found / max(found.std(), 1e-12), features.index)
        known = known[(features != 0).any(axis=1).to_numpy()]
        if trained <= set(known.index):
            parts = known
        else:
            parts = pd.concat([parts, known], axis=1, ignore_index=True).fillna(0)
    return parts.astype(np.float32)


def answer(values, perturbations, genes, scale, library=None):
    """Predicted cells or profiles in the form of an answer."""
    obs = pd.DataFrame({"perturbation": np.asarray(perturbations, dtype=object)})
    if library is not None:
        obs["library_size"] = np.asarray(library, float)
    obs.index = obs.index.astype(str)
    var = pd.DataFrame(index=np.asarray(genes, dtype=object))
    return ad.AnnData(np.asarray(values, np.float32), obs=obs, var=var, uns={"scale": scale})
