"""A teacher that needs no training: rankers that exist, standardised and added up with weights."""
