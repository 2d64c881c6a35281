"""Jobs, models, checkpoints and settings as plain values. Needs neither a database nor torch."""

if __name__ != "qbatch.core":
    raise ImportError("import this package as qbatch.core, not under another name")
