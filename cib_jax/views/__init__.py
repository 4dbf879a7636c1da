"""What a network sees of an item: random views in training, resized and normalised at test time."""
