"""Small example models, trained on demand, to try qbatch with."""
