"""The shared vocabulary of DisRanker: tables, text formats, metrics and score cards. No torch, no network."""
