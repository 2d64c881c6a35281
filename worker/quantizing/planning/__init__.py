"""Determines the contents of a checkpoint's files before any weight is read."""
