"""A job queue that quantizes models in batches, measures them, and says which to ship.

The folders beside this file are links to those at the top of the repository: what lies there is imported as
``qbatch.worker`` and so on.
"""
