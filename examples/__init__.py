"""What shows qbatch at work: small models that are made on the spot."""
