"""How every client reaches Triton: addresses, TLS, token, deadline, the tensors of a ranking request."""
