"""What the tests of the benchmark share."""

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa.benchmark import METHODS, METRICS, Scoring, score
from gpjepa.benchmark.methods import predict_rows

TINY = {
    "title": "tiny",
    "data": [
        {
            "name": "simulated",
            "simulate": {"n_cells": 1_200, "n_genes": 40, "n_targets": 8, "n_combinations": 8},
            "splits": [{"kind": "doubles"}, {"kind": "unseen-singles", "folds": 2}],
        }
    ],
    "methods": ["additive", "anchor", "mean", "no change", "replicate", "truth"],
    "focus": "anchor",
}
QUICK = {"train": {"max_epochs": 1, "pretrain_epochs": 1}, "model": {"n_hidden": 16}}


def one_split(**changes):
    """The tiny benchmark with one split, and whatever else is changed."""
    data = {**TINY["data"][0], "splits": [{"kind": "doubles"}], **changes.pop("data", {})}
    return {**TINY, "data": [data], **changes}


def fitted(name, task, features=(), seed=0, **options):
    method = METHODS[name].make(features, seed, options)
    method.fit(task.train, task.split)
    return predict_rows(method, task, name)[name]


def scores(task, prediction, half=0, metrics=tuple(METRICS)):
    return score(Scoring(task, task.truths[half], prediction), metrics)


class Stranger:
    """The method of the documentation: every effect is twice the mean."""

    def fit(self, train, split):
        rates = np.log1p(1e4 * train.X.toarray() / train.obs[["library_size"]].to_numpy())
        control = (train.obs["perturbation"] == "control").to_numpy()
        self.effect = rates[~control].mean(0) - rates[control].mean(0)

    def predict(self, perturbations, control):
        rates = np.log1p(1e4 * control.X.toarray() / control.obs[["library_size"]].to_numpy())
        profile = np.maximum(rates.mean(0) + 2 * self.effect, 0)
        obs = pd.DataFrame({"perturbation": perturbations}, index=perturbations)
        values = np.tile(profile, (len(obs), 1))
        return ad.AnnData(values, obs, control.var, uns={"scale": "log1p"})


class Unchanged(Stranger):
    """Control cells as they are, with counts and without library sizes."""

    def predict(self, perturbations, control):
        found = ad.concat([control] * len(perturbations), index_unique="-")
        found.obs = pd.DataFrame(
            {"perturbation": np.repeat(perturbations, control.n_obs)}, index=found.obs_names
        )
        return ad.AnnData(found.X, found.obs, control.var[[]], uns={"scale": "counts"})


class Fails(Stranger):
    """Cannot learn where a target is held out."""

    def fit(self, train, split):
        if split.name.startswith("unseen-singles-1"):
            raise ArithmeticError("does not converge")
        super().fit(train, split)


class FailsInOne(Stranger):
    """Cannot learn where the first context is held out."""

    def fit(self, train, split):
        if split.name.endswith("0"):
            raise ArithmeticError("does not converge")
        super().fit(train, split)


class FailsAlways(Stranger):
    def fit(self, train, split):
        raise ArithmeticError("does not converge")


class Dies(Stranger):
    """Its process is killed, as when memory runs out."""

    def fit(self, train, split):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


class Large(Stranger):
    """Needs half a gigabyte."""

    def fit(self, train, split):
        self.ballast = np.ones(64_000_000)
        super().fit(train, split)


class LosesItsStates(Stranger):
    """Predicts, and cannot embed."""

    def embed(self, cells):
        raise ArithmeticError("no states")


class Starts(Stranger):
    """Starts something that would go on for ever, and says which process that is."""

    def __init__(self, pid_file):
        self.pid_file = pid_file

    def fit(self, train, split):
        import subprocess
        import sys
        from pathlib import Path

        code = "import time; time.sleep(600)"
        self.other = subprocess.Popen([sys.executable, "-c", code])
        Path(self.pid_file).write_text(str(self.other.pid))
        super().fit(train, split)
