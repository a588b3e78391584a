"""Saved params of every format that this package knows: described, and converted."""

from qwix_train.saved.conversion import convert as convert
from qwix_train.saved.conversion import describe as describe
