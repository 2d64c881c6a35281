"""The process that owns the device while one bundle is worked on."""
