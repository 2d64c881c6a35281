"""The results of a measurement: one tree of dataclasses, which workers write and views read."""
