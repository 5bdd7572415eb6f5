"""The BERT cross-encoder: weights, vocabulary, the groups it trains on, its starts, its checkpoint."""
