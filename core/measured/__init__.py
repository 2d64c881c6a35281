"""What a measurement holds: one tree of dataclasses, which workers fill and views read."""

if __name__ != "qbatch.core.measured":
    raise ImportError("this is qbatch.core.measured, and has no other name")
