"""What lies on the storage while it is written, and whether it stayed the same."""
