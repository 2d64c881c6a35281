"""The runner: the process that uses the device for one bundle."""
