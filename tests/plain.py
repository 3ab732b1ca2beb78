"""Slow and plain versions of what is made fast: the judges of it."""

import numpy as np
import scipy.linalg
import torch
from sklearn.decomposition import PCA


def plain_perceiver(encoder, values, visible):
    """Every token formed, standard attention: the judge of the two identities."""
    tokens = encoder.tokens
    token = tokens.gene + tokens.expression(tokens.fourier(values))
    n, heads = len(values), encoder.n_heads

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    query = split(encoder.to_query(encoder.queries)).expand(n, -1, -1, -1)
    key, value = split(encoder.to_key(token)), split(encoder.to_value(token))
    logits = query @ key.transpose(-1, -2) / np.sqrt(query.shape[-1])
    if visible is not None:
        hidden = ~visible if visible.dim() == 1 else ~visible[:, None, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    state = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2) + encoder.queries
    state = state + encoder.mix(state)
    return encoder.out(state.flatten(1)), logits


def half_of(counts):
    """Half of the counts, drawn at random; what is not a number stays so."""
    half = np.random.default_rng(1).binomial(np.nan_to_num(counts).astype(int), 0.5)
    return np.where(np.isnan(counts), np.nan, half)


def plain_components(counts, library, half, n, n_basis=128):
    """States by the components that two halves of the counts share, shape (n_cells, n).

    Genes that a cell's data set did not measure are not a number.
    """

    def centred(k, size):
        x = np.sqrt(1e4 * k / size[:, None])
        return np.nan_to_num(x - np.nanmean(x, 0))

    x = centred(counts, library)
    basis = PCA(min(n_basis, *(d - 1 for d in x.shape)), svd_solver="full").fit(x).components_.T
    a, b = centred(half, library / 2) @ basis, centred(counts - half, library / 2) @ basis
    noise = (a - b).T @ (a - b) / 2
    ridge = np.trace(noise) / len(noise) * np.eye(len(noise))
    axes = scipy.linalg.eigh((a.T @ b + b.T @ a) / 2, noise + ridge)[1][:, ::-1][:, :n]
    return x @ basis @ axes


def assert_same_axes(found, expected, at_least):
    """Every column is the other's, up to its sign and size."""
    for k in range(expected.shape[1]):
        assert abs(np.corrcoef(found[:, k], expected[:, k])[0, 1]) > at_least, k
