"""What a job is and where it is remembered."""

if __name__ != "qbatch.models_db":
    raise ImportError("this is qbatch.models_db, and has no other name")
