"""Descriptions of the quantization methods, for planning, storing and showing. Imports no library that computes."""

if __name__ != "qbatch.core.methods":
    raise ImportError("this is qbatch.core.methods, and has no other name")
