"""Which layers stay at 16 bits: what a search measured, and what follows from it."""
