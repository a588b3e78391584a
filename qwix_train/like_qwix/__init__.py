"""The names of `qwix` 0.1.8, with its signatures and defaults, for `as_qwix`."""
