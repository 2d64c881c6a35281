"""The worker: runs jobs on a device."""

if __name__ != "qbatch.worker":
    raise ImportError("import this package as qbatch.worker, not under another name")
