import copy

import numpy as np
import ot
import pytest
import torch
from scipy.stats import nbinom
from torch import nn

from gpjepa.nn import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    MLPEncoder,
    PerceiverEncoder,
    PerturbationEncoder,
    ema_copy,
    ema_update,
    make_encoder,
)
from gpjepa.objectives import (
    effective_rank,
    energy_distance,
    gaussian_kl,
    gene_blocks,
    mmd,
    negative_binomial_nll,
    optimal_transport_pairs,
    sliced_wasserstein,
    vicreg,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain_perceiver(encoder, values, visible):
    """Every token formed, standard attention: the judge of the split keys and values."""
    phi = encoder.fourier((values - encoder.center) / encoder.scale)
    token = encoder.gene + encoder.expression(phi)
    n, heads = len(values), encoder.n_heads

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    query = split(encoder.to_query(encoder.queries)).expand(n, -1, -1, -1)
    key, value = split(encoder.to_key(token)), split(encoder.to_value(token))
    logits = query @ key.transpose(-1, -2) / np.sqrt(query.shape[-1])
    logits = logits.masked_fill(~visible, -torch.inf)
    state = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2) + encoder.queries
    state = state + encoder.mix(state)
    return encoder.out(state.flatten(1))


def test_perceiver_equals_attention_over_explicit_tokens():
    encoder = PerceiverEncoder(30, 8, n_queries=3, n_heads=2, width=16)
    values, visible = torch.rand(5, 30) * 3, torch.rand(30) > 0.3
    encoder.center.uniform_()
    plain = plain_perceiver(encoder, values, visible)
    plain.square().sum().backward()
    expected = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    split = encoder(values, visible)
    split.square().sum().backward()
    torch.testing.assert_close(split, plain, atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "perceiver"])
def test_hidden_genes_have_no_influence(kind):
    encoder = make_encoder(kind, 20, 4, 16)
    visible = torch.arange(20) < 12
    values = torch.rand(3, 20)
    changed = values.clone()
    changed[:, 12:] += 5
    torch.testing.assert_close(encoder(values, visible), encoder(changed, visible))
    assert not torch.allclose(encoder(values), encoder(changed))


def test_unknown_encoder_and_width_are_refused():
    with pytest.raises(ValueError, match="encoder='gpt'"):
        make_encoder("gpt", 4, 2, 2)
    with pytest.raises(ValueError, match="not a multiple"):
        PerceiverEncoder(4, 2, width=10, n_heads=3)


def test_ema_moves_the_teacher_by_the_momentum():
    student = nn.Linear(3, 2)
    teacher = ema_copy(student)
    before = copy.deepcopy(teacher.weight)
    nn.init.ones_(student.weight)
    ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_block_predictor_is_told_which_genes_are_hidden():
    predictor = BlockPredictor(20, 4, 16)
    blocks = gene_blocks(20, 2, 0.5)
    predicted = predictor(torch.zeros(3, 4), blocks)
    assert predicted.shape == (2, 3, 4)
    assert not torch.allclose(predicted[0], predicted[1])


def test_action_embedding_is_a_set_function_with_doses():
    encoder = PerturbationEncoder(3, 5, 2, 8)
    encoder.trained[:3] = 1
    encoder.features[:5].normal_()
    doses = torch.ones(1, 2)
    ab, ba = encoder(torch.tensor([[0, 1]]), doses), encoder(torch.tensor([[1, 0]]), doses)
    torch.testing.assert_close(ab, ba)
    a = encoder(torch.tensor([[0, -1]]), doses)
    torch.testing.assert_close(a, encoder(torch.tensor([[0]]), doses[:, :1]))
    assert not torch.allclose(a, encoder(torch.tensor([[0, -1]]), 3 * doses))
    # Unperturbed targets 3 and 4 are told apart by their features alone.
    assert not torch.allclose(encoder(torch.tensor([[3]]), doses[:, :1]),
                              encoder(torch.tensor([[4]]), doses[:, :1]))  # fmt: skip


def test_untrained_head_predicts_no_residual():
    mean, log_variance = GaussianHead(6, 8, 3)(torch.randn(4, 4), torch.randn(4, 2))
    assert not mean.any()
    assert (log_variance < 0).all()


@pytest.mark.parametrize("rest", [False, True])
def test_shares_of_the_library_size(rest):
    decoder = CountDecoder(4, 8, 10, 2, rest)
    nn.init.normal_(decoder.batch.weight)
    with torch.no_grad():
        decoder.batch.weight[2] = 0
    share = decoder(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert share.shape == (3, 10)
    total = share.sum(1)
    assert (total < 1).all() if rest else torch.allclose(total, torch.ones(3))


def test_vicreg_by_hand():
    z = torch.randn(64, 5)
    covariance = np.cov(z.numpy().T)
    spread = np.maximum(1 - np.sqrt(np.diag(covariance) + 1e-4), 0).mean()
    off = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    assert vicreg(z).item() == pytest.approx(spread + 0.04 * off / 5, rel=1e-4)
    assert vicreg(z * 0) > vicreg(z)


def test_effective_rank_of_a_plane():
    plane = torch.randn(200, 2) @ torch.randn(2, 10)
    assert 1 < effective_rank(plane) <= 2.001


def test_kl_and_likelihood_agree_with_references():
    m, v = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m[0], (0.5 * v[0]).exp()),
        torch.distributions.Normal(m[1], (0.5 * v[1]).exp()),
    ).sum(-1)
    torch.testing.assert_close(gaussian_kl(m[0], v[0], m[1], v[1]), expected)
    counts, mean = torch.poisson(torch.rand(4, 3) * 5), torch.rand(4, 3) * 5 + 0.1
    theta = torch.tensor([0.5, 2.0, 10.0])
    exact = -nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(1)
    np.testing.assert_allclose(negative_binomial_nll(counts, mean, theta), exact, rtol=1e-4)


def test_energy_distance_is_the_unbiased_statistic():

    x, y = torch.randn(40, 3), torch.randn(30, 3) + 1
    a, b = x.numpy(), y.numpy()

    def mean_distance(p, q, pairs):
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1)).sum() / pairs

    expected = 2 * mean_distance(a, b, 1200) - mean_distance(a, a, 1560) - mean_distance(b, b, 870)
    assert energy_distance(x, y).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", [energy_distance, mmd])
def test_unbiased_distances_are_zero_on_average_for_one_distribution(distance):
    same = np.array([distance(torch.randn(20, 3), torch.randn(20, 3)).item() for _ in range(200)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(200)
    assert (same < 0).any()
    assert distance(torch.randn(50, 3), torch.randn(50, 3) + 2) > same.max()


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(200, 3)
    shift = torch.tensor([1.0, 2.0, 0.0])
    # E over directions of (u·s)² is |s|²/d.
    assert sliced_wasserstein(x, x + shift, 4_000).item() == pytest.approx(5 / 3, rel=0.1)
    with pytest.raises(ValueError, match="equal sizes"):
        sliced_wasserstein(x, x[:10])


def test_optimal_transport_pairs_ignore_the_mean_shift():
    x = torch.randn(30, 4)
    order = torch.randperm(30)
    pairs = optimal_transport_pairs(x, (x + 5)[order], epsilon=0.005)
    exact = ot.emd([], [], ot.dist(x.numpy(), x[order].numpy())).argmax(1)
    assert (pairs == exact).mean() > 0.9


def test_blocks_are_disjoint_and_leave_genes_visible():
    blocks = gene_blocks(100, 4, 0.4)
    assert blocks.sum(1).tolist() == [10] * 4
    assert blocks.sum(0).max() == 1
    with pytest.raises(ValueError, match="none visible"):
        gene_blocks(10, 2, 1.0)


def test_mlp_encoder_reads_the_expression():
    encoder = MLPEncoder(5, 2, 4)
    assert not torch.allclose(encoder(torch.zeros(1, 5)), encoder(torch.ones(1, 5)))
