"""Benchmarks that compare qbatch with what a user would do without it."""
