"""The parts of clients/label_corpus.py: reading candidates, asking the teacher, writing shards."""
