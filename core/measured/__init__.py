"""The results of a measurement: one tree of dataclasses, which workers write and views read."""

if __name__ != "qbatch.core.measured":
    raise ImportError("this is qbatch.core.measured, and has no other name")
