"""What every training program shares: the Trainer's set-up, batches of groups and texts, tokens, losses."""
