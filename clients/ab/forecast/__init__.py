"""What an arm that nobody has seen yet would be clicked, estimated from pages that were logged without it."""
