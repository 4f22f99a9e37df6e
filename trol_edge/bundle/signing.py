"""Signs a bundle. All of it is read and checked first, because a signature vouches for it."""

from __future__ import annotations

import os
from pathlib import Path

from trol_edge.bundle import engines, signature
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.targets import TARGETS
from trol_edge.errors import BundleError


def sign(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> str:
    """Sign a bundle and the engines in it with the ed25519 private key of a PEM file; returns the public key in hex.

    Raises BundleError for a bundle that is damaged, UsageError for another kind of key, or if nothing can be written.
    """
    private = signature.private_key(Path(key))
    bundle = Bundle(folder)
    if not bundle.is_unaltered(WEIGHTS):
        raise BundleError(f"{bundle.path(WEIGHTS)}: altered since export (sha256 differs); copy the bundle again")
    statements = [signature.bundle_statement(bundle.identity)]
    for target in TARGETS:
        if engines.folder_of(bundle, target).exists():
            found = engines.read(bundle, target)
            for name in found.engines:
                engines.verified(bundle, found, name)
            statements.append(signature.engines_statement(bundle.identity, target, engines.digest(bundle, target)))
    return signature.add(bundle.folder, private, statements)
