"""How jobs are planned and queued. Never imports torch."""
