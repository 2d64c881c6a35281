"""A model brought to the node."""
