"""How every client reaches Triton: addresses, TLS, token, deadline, scores of a request, reranking with failover."""
