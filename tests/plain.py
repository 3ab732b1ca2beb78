"""Slow and plain versions of what is made fast: the judges of it."""

import numpy as np
import torch


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
