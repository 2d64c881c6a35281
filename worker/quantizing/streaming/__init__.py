"""One pass over a source that writes several checkpoints at once."""
