"""The parts of clients/label_corpus.py: reading candidates, asking the teacher's servers, writing label shards."""
