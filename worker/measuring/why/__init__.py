"""What limits the speed of decoding."""
