"""Published checkpoints: written under their name, verified."""
