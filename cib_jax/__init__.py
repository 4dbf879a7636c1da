"""cib_jax: unsupervised hashing with a contrastive information bottleneck, in JAX."""
