"""Tables, sentences, JSON and CSV for people and programs."""

if __name__ != "qbatch.views":
    raise ImportError("this is qbatch.views, and has no other name")
