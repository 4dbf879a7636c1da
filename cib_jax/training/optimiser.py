"""The optimiser: Adam, with a learning rate for the head and one for the backbone."""

import optax

from cib_jax.encoder import Params


def adam(learning_rate: float, backbone_learning_rate: float = 0.0) -> optax.GradientTransformation:
    """Returns Adam with a constant learning rate; the backbone's own, where it is given and another than the head's."""
    if backbone_learning_rate in (0, learning_rate):
        return optax.adam(learning_rate)
    rates = {"head": optax.adam(learning_rate), "backbone": optax.adam(backbone_learning_rate)}

    def labels(params: Params) -> dict[str, str]:
        return {name: "head" if name == "head" else "backbone" for name in params}

    return optax.partition(rates, labels)
