"""The database: its tables, and everything that reads or writes them."""

if __name__ != "qbatch.models_db":
    raise ImportError("import this package as qbatch.models_db, not under another name")
