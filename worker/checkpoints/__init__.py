"""Publishing and verifying checkpoints."""
