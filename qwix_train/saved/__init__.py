"""Saved params: `describe` says what is in a file, `convert` makes another."""

from qwix_train.saved.conversion import convert as convert
from qwix_train.saved.conversion import describe as describe
