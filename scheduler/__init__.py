"""How jobs are planned and queued. Never imports torch."""

if __name__ != "qbatch.scheduler":
    raise ImportError("this is qbatch.scheduler, and has no other name")
