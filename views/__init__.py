"""Tables, sentences, JSON and CSV for people and programs."""

if __name__ != "qbatch.views":
    raise ImportError("import this package as qbatch.views, not under another name")
