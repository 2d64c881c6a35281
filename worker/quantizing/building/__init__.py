"""Checkpoints written by building the whole model."""
