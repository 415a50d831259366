"""Suites of runs: what they found, compared by seed and against null models."""
