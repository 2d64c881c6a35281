"""The Celery process of one device: it takes bundles, supervises their runners, and records their results."""
