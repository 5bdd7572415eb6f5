"""The A/B router's parts: HTTP bodies, scoring with fallbacks, guardrails, shadow scoring, metrics."""
