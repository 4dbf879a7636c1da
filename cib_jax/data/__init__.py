"""From data sets to uint8 batches: sources, the protocol's splits, the loader. Knows nothing of networks."""
