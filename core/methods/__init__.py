"""What each quantization method is, for those that plan, store and show. Never imports what computes."""

if __name__ != "qbatch.core.methods":
    raise ImportError("this is qbatch.core.methods, and has no other name")
