"""What a job is and where it is remembered."""
