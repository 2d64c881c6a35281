"""The commands of the command line: parse, one call, print. Nothing heavy is imported before a command needs it."""

if __name__ != "qbatch.commands":
    raise ImportError("import this package as qbatch.commands, not under another name")
