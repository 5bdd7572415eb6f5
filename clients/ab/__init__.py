"""The A/B experiment: how traffic is split, how a page is ranked and logged, what the report claims."""
