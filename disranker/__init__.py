"""`python -m disranker`: every program of this repository under one command."""
