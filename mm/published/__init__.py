"""Checkpoints as their publishers wrote them, turned into the suite's configurations, weights and preparation."""
