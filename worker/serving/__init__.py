"""The Celery process of one device: takes bundles, watches their runners, records what they say."""
