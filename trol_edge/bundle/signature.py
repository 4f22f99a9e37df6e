"""Says who signed a bundle, by ed25519 signatures in `signatures.json`, which `trol-edge sign` makes.

A manifest's own hash covers every file that it lists, so a signature covers that hash. Engines are built later, on the
robot or for it, and are programs, so each target's list of engines has its own signature, bound to the bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol_edge.bundle.folder import new_file, writing
from trol_edge.bundle.names import SIGNATURES
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.numeric import shown
from trol_edge.reading import guard, printable, read_json, read_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = "trol-edge-signatures"
PublicKey = str | os.PathLike[str] | bytes  # a PEM file, or its content, or the 32 bytes of a key
PATHS = (str, bytes, os.PathLike)
RAW_BYTES = 32  # size of a public key
MOST_BYTES = 1 << 20  # largest file of a key or of signatures


def bundle_statement(identity: str) -> bytes:
    """The bytes that are signed for a bundle. identity: its manifest's own hash."""
    return f"trol-edge bundle 1\n{identity}".encode()


def engines_statement(identity: str, target: str, digest: str) -> bytes:
    """The bytes that are signed for the engines of a target. digest: the hash of their engines.json."""
    return f"trol-edge engines 1\n{identity}\n{target}\n{digest}".encode()


def public_keys(given: Sequence[PublicKey]) -> tuple[bytes, ...]:
    """The 32 bytes of each key. Raises UsageError if they are not a list of ed25519 public keys."""
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(k, PATHS) for k in given):
        raise UsageError(f"trusted_keys {shown(given)} should be a list of one or more ed25519 public keys (PEM files)")
    return tuple(map(_public_key, given))


def _public_key(given: PublicKey) -> bytes:
    if isinstance(given, bytes) and len(given) == RAW_BYTES:
        return given
    advice = "give a PEM file of an ed25519 public key: openssl pkey -in key.pem -pubout -out key.pub.pem"
    where = "a trusted key" if isinstance(given, bytes) else os.fspath(given)
    data = given if isinstance(given, bytes) else read_plain(Path(given), UsageError, advice, MOST_BYTES)
    _require_library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    with guard(where, UsageError, advice):
        key = serialization.load_pem_public_key(data)
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError("a key of another kind")
        return key.public_bytes_raw()


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read the private key of a PEM file. Raises UsageError if it is not one."""
    advice = "give a PEM file of an ed25519 private key: openssl genpkey -algorithm ed25519 -out key.pem"
    data = read_plain(path, UsageError, advice, MOST_BYTES)
    _require_library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    with guard(path, UsageError, advice):
        key = serialization.load_pem_private_key(data, None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("a key of another kind")
        return key


def add(folder: Path, key: Ed25519PrivateKey, statements: Sequence[bytes]) -> str:
    """Write a key's signatures of some statements into a bundle's folder, beside those of other keys.

    Older ones of the same key are removed. Returns the public key in hex.
    """
    public = key.public_key().public_bytes_raw().hex()
    found = {name: signed for name, signed in _read(folder).items() if name != public}
    found[public] = [key.sign(statement).hex() for statement in statements]
    path = folder / SIGNATURES
    with writing(path, UsageError, "sign a copy of the bundle that can be written"), new_file(path) as part:
        part.write_text(json.dumps({"format": FORMAT, "signatures": found}, indent=1) + "\n", encoding="utf-8")
        part.chmod(0o644)
    return public


def require(folder: Path, keys: Sequence[bytes], statement: bytes, what: str) -> None:
    """Raise BundleError if none of the keys signed a statement."""
    if keys and not any(_holds(key, signed, statement) for key, signed in _signed(folder, keys)):
        raise BundleError(
            f"{folder}: {what} is signed by none of the {len(keys)} trusted key(s), so it was not opened; take it from "
            "someone whom you trust, or sign it yourself with `trol-edge sign`"
        )


def _signed(folder: Path, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    found = _read(folder)
    for key in keys:
        for signature in found.get(key.hex(), ()):
            yield key, bytes.fromhex(signature)


def _holds(key: bytes, signature: bytes, statement: bytes) -> bool:
    _require_library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public: Ed25519PublicKey = Ed25519PublicKey.from_public_bytes(key)
    try:
        public.verify(signature, statement)
    except InvalidSignature:
        return False
    return True


def _read(folder: Path) -> dict[str, list[str]]:
    """Public key -> its signatures in hex; empty if the bundle has none."""
    path, advice = folder / SIGNATURES, "remove it, and sign the bundle again"
    if not path.exists():
        return {}
    data: dict[str, Any] = read_json(path, BundleError, advice)
    with guard(path, BundleError, advice):
        if data["format"] != FORMAT:
            raise ValueError(f"format {printable(data['format'])[:80]}")
        return {
            bytes.fromhex(key).hex(): [bytes.fromhex(s).hex() for s in data["signatures"][key]]
            for key in data["signatures"]
        }


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401 (to see whether it is installed)
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'trol-edge[sign]'") from error
