"""The A/B report's parts: totals per user from the log, statistics, charts, the page."""
