"""Networks, their published weights, and the encoder that joins one with a hash head."""
