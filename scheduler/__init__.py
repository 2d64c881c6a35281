"""How jobs are planned and queued. Never imports torch."""

if __name__ != "qbatch.scheduler":
    raise ImportError("import this package as qbatch.scheduler, not under another name")
