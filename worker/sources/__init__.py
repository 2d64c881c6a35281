"""Fetching models: folders, hub repositories, the cache, and the conversion of pickles."""
