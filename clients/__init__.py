"""Light programs that talk to the servers: labelling, reranking, A/B router and report. No torch, no transformers."""
