"""Why decoding is as fast as it is."""
