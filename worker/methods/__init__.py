"""What is done to a weight, method by method."""
