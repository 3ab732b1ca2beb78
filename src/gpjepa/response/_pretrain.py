"""Training the response network on screens drawn from the prior."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from math import cos, pi

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from gpjepa.datasets import random_screen
from gpjepa.effects import ROLES
from gpjepa.nn import ResponseNetwork

from ._episodes import Episode, draw_episode

_GENES = 256  # of each screen that training sees
_PER_STEP = 4  # episodes
_CHUNK = 50  # screens that a worker draws at a time
LEAST_SIZE = 0.15
"""Squared effect, in units of the scale, below which errors are not taken in proportion to it."""

_DROPPED = 0.15  # of episodes
_DROPPED_EXPERTS = 0.3


def pretrain(
    n_screens: int = 12_000,
    n_epochs: int = 3,
    *,
    seed: int = 0,
    n_hidden: int = 48,
    lr: float = 2e-3,
    n_workers: int = 2,
    progress: Callable[[str], object] = print,
) -> ResponseNetwork:
    """Train a response network from nothing.

    Parameters
    ----------
    n_screens
        Screens drawn; each is one episode.
    n_epochs
        How often each is seen.
    seed
        Of everything drawn.
    n_hidden
        Width of the network.
    lr
        Largest learning rate of AdamW, after a warm-up and before a cosine decay.
    n_workers
        Processes that draw screens.
    progress
        Is told in words how far training is.

    Notes
    -----
    Screens are drawn in processes that import the calling script: call it under
    ``if __name__ == "__main__":`` there. 10,000 screens need about 1 GB.

    Returns
    -------
    ResponseNetwork
    """
    episodes = draw_episodes(n_screens, seed=seed, n_workers=n_workers, progress=progress)
    if len(episodes) < _PER_STEP:
        raise ValueError(f"n_screens={n_screens}: too few to train on; give at least 100.")
    return train_network(episodes, n_epochs, seed=seed, n_hidden=n_hidden, lr=lr, progress=progress)


def train_network(
    episodes: list[Episode],
    n_epochs: int = 3,
    *,
    seed: int = 0,
    n_hidden: int = 48,
    lr: float = 2e-3,
    progress: Callable[[str], object] = print,
) -> ResponseNetwork:
    """Train a response network from nothing on episodes, as :func:`pretrain` does."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResponseNetwork(len(ROLES), n_hidden)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-3)
    n_steps = n_epochs * len(episodes) // _PER_STEP
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * (0.5 * (1 + cos(pi * s / n_steps)) + 0.01)
    )
    order: list[int] = []
    shown: list[float] = []
    for step in range(n_steps):
        if len(order) < _PER_STEP:
            order += rng.permutation(len(episodes)).tolist()
        optimizer.zero_grad()
        for _ in range(_PER_STEP):
            episode = _with_less(episodes[order.pop()].to(torch.float32), rng)
            loss = episode_loss(network, episode)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss.item()} at step {step + 1}.")
            (loss / _PER_STEP).backward()
            shown.append(loss.item())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            progress(f"step {step + 1} of {n_steps}: loss {np.mean(shown):.4f}")
            shown = []
    return network.eval()


def draw_episodes(
    n: int, *, seed: int, n_workers: int = 2, progress: Callable[[str], object] = lambda _: None
) -> list[Episode]:
    """One episode each of so many screens, of some of their genes."""
    starts = range(0, n, _CHUNK)
    draw = partial(_chunk, n=n, seed=seed)
    found: list[Episode] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=spawn) as workers:
        for i, mine in enumerate(workers.map(draw, starts)):
            found += pickle.loads(mine)
            if i % 20 == 19:
                progress(f"{min((i + 1) * _CHUNK, n)} of {n} screens")
    return found


def _chunk(start: int, n: int, seed: int) -> bytes:
    # Tensors would each go through a file of their own in shared memory.
    found = []
    with threadpool_limits(1):  # each worker has a core
        for i in range(start, min(start + _CHUNK, n)):
            rng = np.random.default_rng([seed, i])
            episode = draw_episode(random_screen(rng), rng)
            if episode is not None:
                some = rng.permutation(episode.truth.shape[1])[:_GENES]
                found.append(episode.genes(torch.from_numpy(np.sort(some))).to(torch.float16))
    return pickle.dumps(found)


def _with_less(episode: Episode, rng: np.random.Generator) -> Episode:
    """Without controls, as in tables of effects, or without some of the experts, now and then."""
    inputs = episode.inputs
    if rng.random() < _DROPPED:
        per_gene = inputs.per_gene.clone()
        per_gene[..., 2:4] = 0
        inputs = replace(inputs, per_gene=per_gene)
    if rng.random() < _DROPPED:
        kept = torch.from_numpy(rng.random(inputs.roles.shape[1]) > _DROPPED_EXPERTS)
        inputs = replace(inputs, roles=inputs.roles.where(kept, -1))
    return replace(episode, inputs=inputs)


def episode_loss(network: ResponseNetwork, episode: Episode) -> torch.Tensor:
    """Squared error of each row in proportion to its effect, and the likelihood of its variance.

    Large errors count less, so that rows that nothing predicts do not dominate.
    """
    mean, log_ratio = network(episode.inputs)
    error = (mean - episode.truth).square()
    relative = episode.mean(error) / (episode.mean(episode.truth.square()) + LEAST_SIZE)
    log_variance = episode.variance.clamp_min(1e-6).log() + log_ratio.clamp(-6, 4)
    misfit = (error.detach() / log_variance.exp()).clamp_max(50)
    likelihood = episode.mean(0.5 * (log_variance + misfit))
    of_mean = 0.5 * relative.clamp_min(1e-9).sqrt() + relative / (1 + 0.3 * relative)
    return (of_mean + 0.05 * likelihood).mean()
