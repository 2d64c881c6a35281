"""Loads a checkpoint with another library, in a process of its own, and compares what it predicts."""
