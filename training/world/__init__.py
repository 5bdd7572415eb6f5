"""The synthetic collection for trying the product: generated documents, queries, judgments, click log."""
