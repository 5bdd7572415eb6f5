"""What an experiment is: arms, shares, coverage, the assignment of users, interleaving."""
