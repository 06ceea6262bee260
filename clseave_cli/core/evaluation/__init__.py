"""Scoring models: the run, metrics, results, comparison, distances between languages, report."""
