"""People judge two rankings side by side: which queries, what they said, how far they agree, when it is enough."""
