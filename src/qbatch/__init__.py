"""A job queue that quantizes models in batches, benchmarks them, and recommends which to ship.

The folders next to this file are links to those at the top of the repository, which are imported as ``qbatch.worker``
and so on.
"""
