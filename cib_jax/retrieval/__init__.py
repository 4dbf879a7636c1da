"""Everything that starts from packed codes: ranking, the metrics of the protocol, code health."""
