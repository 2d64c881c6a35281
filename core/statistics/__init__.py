"""Whether a difference between two models is more than chance. Plain Python, so that views can use it."""
