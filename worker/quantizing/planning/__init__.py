"""What a checkpoint's files will hold, known before any weight is read."""
