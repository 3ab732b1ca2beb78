from __future__ import annotations

from ._training import Trainable


class GPJEPA(Trainable):
    r"""Predicts how single cells respond to perturbations, and says how sure it is.

    A joint-embedding predictive architecture for perturbations: an encoder that predicts the
    embedding of hidden genes (stage A), a predictor in which the perturbation is the action
    (stage B), and a negative-binomial decoder (stage C), on top of a closed-form anchor
    (:class:`gpjepa.effects.EffectAnchor`). The mean effect is

    .. math:: d = A + g_r\,(N - A),

    with the anchor *A*, the mean effect *N* of the network's decoded cells, and a gate
    :math:`g_r` between 0 and 1, above 0 only where held-out perturbations of the regime show that the
    network helps (:func:`gpjepa.effects.fit_gate`).

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    registry
        Registry of a saved model, instead of ``adata``.
    n_latent
        Dimensions of the state.
    encoder
        ``"mlp"``; ``"perceiver"``: learned queries that attend to all genes; ``"transformer"``:
        self-attention among the expressed genes; or ``"components"``: the components of
        :class:`gpjepa.nn.ComponentEncoder`, without stage A, the control of a learned encoder.
    components
        Whether states start from those components, to which the encoder adds. Without them it has
        to find those directions itself, and finds fewer of them.
    n_hidden
        Width of hidden layers.
    target_features
        What is known of targets besides their effects (:class:`gpjepa.perturbations.TargetFeatures`,
        one kind or several), so that targets never perturbed can be distinguished. Without any they
        all take the shrunken mean effect.
    missing_features
        A target never perturbed that no features know is refused (``"error"``), or takes the
        shrunken mean effect (``"mean"``).
    targets
        Further names that may be asked for, such as those of a guide library, although no gene and
        no feature has them. Other names are refused, as they may be misspelt.
    pretrained
        Directory of a saved model whose encoder to start from, matched gene by gene by name. Its
        ``n_latent``, ``encoder``, ``components`` and ``n_hidden`` are taken over; genes that it does
        not know are hidden from it until :meth:`pretrain` is called. ``model.pretrained_`` says how
        many there are.

    Examples
    --------
    >>> adata = gpjepa.datasets.simulate()
    >>> gpjepa.GPJEPA.setup_anndata(adata)
    >>> model = gpjepa.GPJEPA(adata)
    >>> model.train()
    >>> cells = model.predict_perturbation(adata, "TF001+TF002")
    """
