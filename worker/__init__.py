"""How a job runs."""

if __name__ != "qbatch.worker":
    raise ImportError("this is qbatch.worker, and has no other name")
