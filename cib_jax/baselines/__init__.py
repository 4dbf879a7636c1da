"""Other ways to hash features without labels, to compare with: each a pure `fit(features, bits, key) -> encoder`.

`features` are those of the training images, float [n, features]; an encoder is a pytree that, called with features
[batch, features], returns logits [batch, bits] whose signs are the bits. `cib_jax.pack_bits` makes codes of them.
"""

from typing import NamedTuple

from cib_jax.baselines import anchor_graph, autoencoder, bi_half, greedy_hash, itq, lsh, pca_sign, spectral, spherical
from cib_jax.baselines.fitting import Fit


class Baseline(NamedTuple):
    """A way to hash."""

    title: str
    """As tables name it."""
    source: str
    """Who published it."""
    fit: Fit


BASELINES: dict[str, Baseline] = {
    "lsh": Baseline("LSH", "Charikar 2002", lsh.fit),
    "pca_sign": Baseline("PCA sign", "Wang, Kumar and Chang 2010", pca_sign.fit),
    "itq": Baseline("ITQ", "Gong and Lazebnik 2011", itq.fit),
    "spectral": Baseline("Spectral hashing", "Weiss, Torralba and Fergus 2008", spectral.fit),
    "spherical": Baseline("Spherical hashing", "Heo et al. 2012", spherical.fit),
    "anchor_graph": Baseline("Anchor graph hashing", "Liu et al. 2011", anchor_graph.fit),
    "greedy_hash": Baseline("GreedyHash", "Su et al. 2018", greedy_hash.fit),
    "bi_half": Baseline("Bi-half", "Li and van Gemert 2021", bi_half.fit),
    "autoencoder": Baseline("Binary auto-encoder", "Carreira-Perpiñán and Raziperchikolaei 2015", autoencoder.fit),
}
"""By the name that a comparison gives them."""

__all__ = ["BASELINES", "Baseline", "Fit"]
