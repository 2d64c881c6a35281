"""Files on the storage: staging, content hashes, stored baseline outputs."""
