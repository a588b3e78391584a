"""The package `qwix.contrib`."""
