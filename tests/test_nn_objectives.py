import copy

import numpy as np
import ot
import pytest
import torch
from plain import assert_same_axes, half_of, plain_components, plain_perceiver
from scipy.stats import nbinom
from torch import nn

from gpjepa.nn import (
    ENCODERS,
    BlockPredictor,
    ComponentEncoder,
    CountDecoder,
    GaussianHead,
    MLPEncoder,
    PerceiverEncoder,
    PerturbationEncoder,
    ResidualEncoder,
    ema_copy,
    ema_update,
    make_encoder,
)
from gpjepa.nn._tokens import expressed_alike
from gpjepa.objectives import (
    effective_rank,
    energy_distance,
    gaussian_kl,
    gene_blocks,
    info_nce,
    mmd,
    negative_binomial_nll,
    optimal_transport_pairs,
    sigreg,
    sliced_wasserstein,
    vicreg,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sparse_cells(n, n_genes, density):
    return (torch.rand(n, n_genes) * 4) * (torch.rand(n, n_genes) < density)


def assert_same(encoder, values, visible):
    """Output and gradients of the plain and of the fast way, to 1e-5 of their size."""
    plain, logits = plain_perceiver(encoder, values, visible)
    plain.square().sum().backward()
    expected = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    fast = encoder(values, visible)
    fast.square().sum().backward()
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
        size = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5 * max(size, 1), rtol=1e-5)
    encoder.zero_grad()
    return logits


@pytest.mark.parametrize("masked", ["nothing", "genes", "each cell"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_perceiver_equals_attention_over_explicit_tokens(density, masked):
    encoder = PerceiverEncoder(60, 8, n_queries=3, n_heads=2, width=16)
    values = sparse_cells(37, 60, density)
    values[0] = 0  # a cell without any expressed gene
    visible = {
        "nothing": None,
        "genes": torch.rand(60) > 0.3,
        "each cell": torch.rand(37, 60) > 0.3,
    }
    assert_same(encoder, values, visible[masked])


def test_perceiver_works_on_many_cells_in_parts(monkeypatch):
    monkeypatch.setattr("gpjepa.nn._perceiver._PLACES", 100)
    encoder = PerceiverEncoder(60, 8, n_queries=3, n_heads=2, width=16)
    assert_same(encoder, sparse_cells(37, 60, 0.3), torch.rand(60) > 0.3)


def test_perceiver_takes_cells_of_all_depths(monkeypatch):
    monkeypatch.setattr("gpjepa.nn._tokens._WORTH", 20)
    encoder = PerceiverEncoder(60, 8, n_queries=3, n_heads=2, width=16)
    assert_same(encoder, sparse_cells(37, 60, torch.rand(37, 1)), torch.rand(60) > 0.3)


def test_lists_of_expressed_genes_are_little_longer_than_need_be():
    """Cells of 10 to 2,000 genes: all in one list would be mostly empty places."""
    values = sparse_cells(256, 2_000, torch.logspace(-2.3, 0, 256)[torch.randperm(256), None])
    lists, where = expressed_alike(values, None)
    assert sum(x.index.numel() for x in lists) < 1.3 * (values > 0).sum() < 0.3 * values.numel()
    assert len(lists) < 10
    genes = [index[index < 2_000] for x in lists for index in x.index]
    for cell, at in zip(values, where, strict=True):
        assert torch.equal(genes[at], cell.nonzero().ravel())


@pytest.mark.parametrize("scale", [4.0, 10.0])
def test_perceiver_keeps_its_digits_at_the_logits_of_a_trained_model(scale):
    """Where a few genes hold nearly all of the attention, whether they are expressed or not."""
    encoder = PerceiverEncoder(80, 8, n_queries=4, n_heads=2, width=16)
    with torch.no_grad():
        encoder.to_key.weight.mul_(scale)
        encoder.to_query.weight.mul_(scale)
        encoder.tokens.gene[:5] *= 2
    values = sparse_cells(20, 80, 0.1)
    values[:10, :5] = 2.0
    logits = assert_same(encoder, values, torch.rand(80) > 0.2)
    assert logits[logits.isfinite()].abs().max() > (20 if scale > 4 else 3)


def test_perceiver_takes_the_way_over_expressed_genes_where_it_can(monkeypatch):
    encoder = PerceiverEncoder(300, 8)
    values = sparse_cells(8, 300, 0.1)
    monkeypatch.setattr(encoder, "_over_all", lambda *args: pytest.fail("all genes"))
    encoder(values)
    monkeypatch.undo()
    # A gene that is everything to a query at 0, and nothing as soon as it is expressed.
    with torch.no_grad():
        query = encoder.to_query(encoder.queries)[0, :32] @ encoder.to_key.weight[:32] / 32**0.5
        direction = query / query.square().sum()
        encoder.tokens.gene[0] = 15 * direction
        encoder.tokens.expression.weight[:, 0] = -5 * direction
    values[:, 0] = 3.0
    went = []
    original = encoder._over_all
    monkeypatch.setattr(encoder, "_over_all", lambda *args: went.append(1) or original(*args))
    assert_same(encoder, values, None)
    assert went


def test_a_cell_does_not_depend_on_an_outlier_in_its_batch():
    """Nor do the digits of its weights, where the outlier's leave the range of floats."""
    encoder = PerceiverEncoder(40, 8, n_queries=2, n_heads=1, width=16)
    values = sparse_cells(6, 40, 0.2)
    with torch.no_grad():
        query = (encoder.to_query(encoder.queries)[0] @ encoder.to_key.weight) / 4
        encoder.tokens.expression.weight[:, 0] = query / query.square().sum()
    for logit in (20.0, 80.0, 112.0, 118.0, 150.0):
        with_outlier = torch.cat([values, values[:1]])
        with_outlier[-1, with_outlier[-1] > 0] = logit
        torch.testing.assert_close(
            encoder(with_outlier)[:-1], encoder(values), atol=1e-5, rtol=1e-5
        )


def test_perceiver_trains_in_mixed_precision():
    encoder, values = PerceiverEncoder(50, 8), sparse_cells(9, 50, 0.2)
    expected = encoder(values)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(values)
        found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("worth", [10, 1_000])
def test_transformer_equals_attention_cell_by_cell(monkeypatch, worth):
    monkeypatch.setattr("gpjepa.nn._tokens._WORTH", worth)
    encoder = make_encoder("transformer", 30, 4, 0).eval()
    values = sparse_cells(9, 30, torch.rand(9, 1))
    visible = torch.rand(30) > 0.2
    for cell, found in zip(values, encoder(values, visible), strict=True):
        seen = torch.nonzero((cell > 0) & visible).ravel()
        tokens = encoder.tokens.gene[seen] + encoder.tokens.expression(
            encoder.tokens.fourier(cell[seen])
        )
        alone = encoder.layers(torch.cat([encoder.cell[0], tokens])[None])[:, 0]
        torch.testing.assert_close(encoder.out(alone)[0], found, atol=1e-5, rtol=1e-5)


def fit(encoder, values):
    """Components as after pretraining."""
    if isinstance(encoder, ComponentEncoder):
        x = encoder.standardise(values, None)
        encoder.fit(x, lambda axes: (x @ axes, 0.9 * x @ axes))


def fit_and_train(encoder, values):
    """The same, and something added to them."""
    fit(encoder, values)
    if isinstance(encoder, ResidualEncoder):
        last = [m for m in encoder.residual.modules() if isinstance(m, torch.nn.Linear)][-1]
        torch.nn.init.normal_(last.weight)


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_the_order_of_the_genes_is_no_input(kind, components):
    """With the parameters of each gene in the same order, states are the same."""
    encoder = make_encoder(kind, 25, 4, 16, components).double()
    values, order = sparse_cells(5, 25, 0.4).double(), torch.randperm(25)
    fit_and_train(encoder, sparse_cells(50, 25, 0.4).double())
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
            if tensor.shape[:1] == (25,):
                tensor.copy_(tensor[order].clone())
            elif name.endswith("net.0.weight"):
                tensor.copy_(tensor[:, order].clone())
    visible = torch.rand(25) > 0.3
    torch.testing.assert_close(
        other(values[:, order], visible[order]), encoder(values, visible), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_hidden_genes_have_no_influence(kind, components):
    encoder = make_encoder(kind, 20, 4, 16, components)
    visible = torch.arange(20) < 12
    fit_and_train(encoder, torch.rand(30, 20))
    values = torch.rand(3, 20)
    changed = values.clone()
    changed[:, 12:] += 5
    torch.testing.assert_close(encoder(values, visible), encoder(changed, visible))
    assert not torch.allclose(encoder(values), encoder(changed))


def test_components_are_those_of_a_plain_generalised_eigenproblem():
    rng = np.random.default_rng(0)
    counts = rng.poisson(
        rng.gamma(2, 2, 40) * np.exp(0.3 * rng.normal(size=(300, 5)) @ rng.normal(size=(5, 40)))
    ).astype(float)
    library, half = counts.sum(1), half_of(counts)
    encoder = make_encoder("components", 40, 5, 0)

    def values(k, size):
        return torch.from_numpy(np.log1p(1e4 * k / size[:, None])).float()

    def halves(axes):
        found = (
            encoder.standardise(values(k, library / 2), None) @ axes for k in (half, counts - half)
        )
        return tuple(x - x.mean(0) for x in found)

    whole = values(counts, library)
    encoder.fit(encoder.standardise(whole, None), halves)
    assert_same_axes(encoder(whole), plain_components(counts, library, half, 5), 0.9999)


def test_an_encoder_starts_from_the_components_it_adds_to():
    encoder, values = make_encoder("mlp", 20, 4, 16, components=True), torch.rand(30, 20)
    alone = make_encoder("components", 20, 4, 16)
    for one in (encoder, alone):
        torch.manual_seed(0)
        fit(one, values)
    assert float(alone(values).std(0).min()) > 0.1
    torch.testing.assert_close(encoder(values), alone(values))


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
    # Unperturbed targets 3 and 4 differ in their features alone.
    assert not torch.allclose(
        encoder(torch.tensor([[3]]), doses[:, :1]), encoder(torch.tensor([[4]]), doses[:, :1])
    )


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
    assert (pairs.numpy() == exact).mean() > 0.9


def test_optimal_transport_pairs_are_drawn_from_the_plan():
    """By which every perturbed cell is drawn equally often; its largest entries are not."""
    x, y = torch.randn(2, 12, 3), torch.randn(2, 12, 3) * 2
    pairs = torch.stack([optimal_transport_pairs(x, y, epsilon=0.5) for _ in range(3_000)])
    for k in range(2):
        a, b = (z[k] - z[k].mean(0) for z in (x, y))
        cost = ot.dist(a.double().numpy(), b.double().numpy())
        plan = ot.sinkhorn([], [], cost / cost.mean(), reg=0.5)
        drawn = torch.nn.functional.one_hot(pairs[:, k], 12).double().mean(0).numpy()
        np.testing.assert_allclose(drawn, 12 * plan, atol=0.04)
        np.testing.assert_allclose(drawn.sum(0), 1, atol=0.08)
        assert len(set(plan.argmax(1))) < 12


def test_blocks_are_disjoint_and_leave_genes_visible():
    blocks = gene_blocks(100, 4, 0.4)
    assert blocks.sum(1).tolist() == [10] * 4
    assert blocks.sum(0).max() == 1
    for n, share in ((2, 1.0), (4, 0.3)):
        with pytest.raises(ValueError, match="one must stay visible"):
            gene_blocks(10, n, share)


def test_blocks_overlap_and_differ_in_size_as_asked():
    torch.manual_seed(0)
    blocks = gene_blocks(400, 4, 0.5, overlap=0.2)
    assert blocks.any(0).sum() == 200
    assert blocks.sum(1).tolist() == [60] * 4
    sizes = torch.stack([gene_blocks(400, 4, 0.5, size_spread=0.7).sum(1) for _ in range(200)])
    assert (sizes.sum(1) == 200).all()
    assert (sizes >= 1).all()
    assert sizes.float().std() > 20


def test_blocks_are_made_of_whole_groups():
    groups = torch.zeros(12, 100, dtype=torch.bool)
    for i in range(12):
        groups[i, 8 * i : 8 * i + 8] = True  # four genes are in none
    hidden = torch.stack([gene_blocks(100, 3, 0.5, groups=groups).any(0) for _ in range(300)])
    assert not hidden[:, 96:].any()
    share = hidden[:, :96].unflatten(1, (12, 8)).float().mean(2)
    assert ((share == 0) | (share == 1)).all()
    assert torch.allclose(share.mean(0), torch.tensor(0.5), atol=0.1)


def test_heavier_genes_are_hidden_more_often():
    weights = torch.ones(50)
    weights[:10], weights[40:] = 5.0, 0.0
    few = torch.arange(50) < 10
    for _ in range(20):
        hidden = gene_blocks(50, 2, 0.5, weights=few.float()).any(0)
        assert not (hidden & ~few).any() and int((hidden & few).sum()) == 5
    counts = sum(gene_blocks(50, 2, 0.4, weights=weights).any(0).float() for _ in range(400))
    assert counts[40:].sum() == 0
    assert counts[:10].min() > 1.5 * counts[10:40].max()


def test_sigreg_is_the_epps_pulley_statistic_and_0_for_a_gaussian():
    z = torch.randn(40, 1, dtype=torch.float64) * 1.5 + 0.3
    u = z.ravel()
    pairs = torch.exp(-((u[:, None] - u) ** 2) / 2).mean()
    # Baringhaus and Henze 1988, with a smoothing parameter of 1.
    closed = pairs - 2**0.5 * torch.exp(-(u**2) / 4).mean() + 3**-0.5
    assert float(sigreg(z)) == pytest.approx(float(closed), abs=1e-4)
    many = torch.randn(20_000, 8)
    assert float(sigreg(many)) < 1e-3
    for other in (many * 0.1, many * 3, many + 1, many[:, :1].sign()):
        assert float(sigreg(other)) > 0.01


def test_info_nce_knows_pairs_from_strangers():
    z = torch.randn(64, 16)
    assert float(info_nce(z, z + 0.01 * torch.randn_like(z))) < 0.1
    assert float(info_nce(z, torch.randn(64, 16))) > np.log(64)
    logits = torch.nn.functional.cosine_similarity(z[:, None], z.flip(0)[None], dim=2) / 0.5
    slow = -(logits.softmax(0).diag().log() + logits.softmax(1).diag().log()).mean() / 2
    assert float(info_nce(z, z.flip(0), 0.5)) == pytest.approx(float(slow), rel=1e-5)


def test_mlp_encoder_reads_the_expression():
    encoder = MLPEncoder(5, 2, 4)
    assert not torch.allclose(encoder(torch.zeros(1, 5)), encoder(torch.ones(1, 5)))
