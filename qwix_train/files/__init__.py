"""Formats on disk. `writing` is how every writer of the package replaces files."""
