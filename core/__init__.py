"""What a job, a model and a checkpoint are, and what the environment says. Needs neither a database nor torch."""

if __name__ != "qbatch.core":
    raise ImportError("this is qbatch.core, and has no other name")
