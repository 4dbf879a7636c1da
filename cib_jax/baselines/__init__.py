"""Other methods that hash features without labels, for comparison: each a pure `fit(features, bits, key) -> encoder`.

`features` are the training images' features, float [n, features], or those of their views, float [views, n, features],
where `Baseline.views` is True. An encoder is a pytree that maps features [batch, features] to logits [batch, bits]; the
signs of the logits are the bits, and `cib_jax.pack_bits` packs them.
"""

from typing import NamedTuple

from cib_jax.baselines import autoencoders, contrastive, deep, linear, nonlinear
from cib_jax.baselines.linear import Encoder, Fit


class Baseline(NamedTuple):
    """A hashing method."""

    title: str
    """Name in tables."""
    source: str
    """Authors and year of the publication."""
    fit: Fit
    views: bool = False
    """Whether `fit` takes the features of several views of each image."""


lsh = Baseline("LSH", "Charikar 2002", linear.lsh)
pca_sign = Baseline("PCA sign", "Wang, Kumar and Chang 2010", linear.pca_sign)
itq = Baseline("ITQ", "Gong and Lazebnik 2011", linear.itq)
spectral = Baseline("Spectral hashing", "Weiss, Torralba and Fergus 2008", nonlinear.spectral)
spherical = Baseline("Spherical hashing", "Heo et al. 2012", nonlinear.spherical)
anchor_graph = Baseline("Anchor graph hashing", "Liu et al. 2011", nonlinear.anchor_graph)
greedy_hash = Baseline("GreedyHash", "Su et al. 2018", deep.greedy_hash)
bi_half = Baseline("Bi-half", "Li and van Gemert 2021", deep.bi_half)
autoencoder = Baseline("Binary auto-encoder", "Carreira-Perpiñán and Raziperchikolaei 2015", autoencoders.autoencoder)
ssdh = Baseline("SSDH", "Yang et al. 2018", deep.ssdh)
sdc = Baseline("SDC", "Ng et al. 2023", deep.sdc)
crovca = Baseline("CroVCA", "Moummad et al. 2025", contrastive.crovca, views=True)
cimon = Baseline("CIMON", "Luo et al. 2021", contrastive.cimon, views=True)
oh = Baseline("OH", "Yu, Shen and Zhang 2023", contrastive.overview_hashing, views=True)

BASELINES: dict[str, Baseline] = {
    "lsh": lsh,
    "pca_sign": pca_sign,
    "itq": itq,
    "spectral": spectral,
    "spherical": spherical,
    "anchor_graph": anchor_graph,
    "greedy_hash": greedy_hash,
    "bi_half": bi_half,
    "autoencoder": autoencoder,
    "ssdh": ssdh,
    "sdc": sdc,
    "crovca": crovca,
    "cimon": cimon,
    "oh": oh,
}
"""Baselines by their names in `compare.methods`."""

__all__ = ["BASELINES", "Baseline", "Encoder", "Fit"]
