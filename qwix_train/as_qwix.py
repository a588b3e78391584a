"""`import qwix` is this library, in the whole process.

    import qwix_train.as_qwix  # before anything imports qwix

Other packages that write ``import qwix`` or ``import qwix.pallas as qpl``, such as
Tunix and MaxText, then get this library, under the names, signatures and defaults of
`qwix` 0.1.8. docs/as_qwix.md has every name, and what it is here. Where this library
refuses what `qwix` takes, since it would have no effect, these names warn.

Nothing is changed but what Python imports as `qwix`. It is an `ImportError` if that was
imported before.
"""

from qwix_train.like_qwix.modules import install as _install

_install()
