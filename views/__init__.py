"""What people look at."""

if __name__ != "qbatch.views":
    raise ImportError("this is qbatch.views, and has no other name")
