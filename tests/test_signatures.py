"""Signatures: with trusted keys nothing is opened that none of them signed, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from trol_edge.bundle import engines
from trol_edge.bundle.folder import digest_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST, SIGNATURES, WEIGHTS
from trol_edge.bundle.signing import sign
from trol_edge.cli.main import main
from trol_edge.errors import BundleError, UsageError
from trol_edge.runtime import Runtime

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PLAIN, PUBLIC = serialization.NoEncryption(), serialization.PublicFormat.SubjectPublicKeyInfo


def key_pair(folder: Path, name: str, kind: Any = ed25519.Ed25519PrivateKey) -> tuple[Path, Path]:
    """Files of a private and a public key, as openssl writes them."""
    key = kind.generate() if kind is ed25519.Ed25519PrivateKey else kind
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(nano_bundle, tmp_path / "copy"))


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path]:
    """Our private and public key."""
    return key_pair(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Path]:
    """Somebody else's."""
    return key_pair(tmp_path, "theirs")


@pytest.mark.slow
def test_the_command_line_opens_what_its_keys_signed(
    copy: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb that takes --trusted-key refuses an unsigned bundle, and opens it once it is signed."""
    question = ["--prompt", "Is there a star?", "--max-new-tokens", "1"]
    verbs = {
        "run": question,
        "inspect": [],
        "demo": [],
        "verify": [],
        "soak": ["--minutes", "0.01"],
        "profile": ["--size", "none", "--runs", "1", "--warmup", "0", "--starts", "0", "--tokens", "2"],
    }
    for verb, more in verbs.items():
        assert main([verb, str(copy), *more, "--trusted-key", str(ours[1])]) == 1, verb
        assert "sign" in capsys.readouterr().err, verb
    sign(copy, ours[0])
    for verb, more in verbs.items():
        keys = ["--trusted-key", str(theirs[1]), "--trusted-key", str(ours[1])]
        assert main([verb, str(copy), *more, *keys]) == 0, (verb, capsys.readouterr())


def seal(folder: Path, **changes: Any) -> None:
    """What whoever may write a bundle can do: change the manifest, and compute its hash again."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data.pop("manifest_sha256")
    data |= changes
    (folder / MANIFEST).write_text(json.dumps(data | {"manifest_sha256": digest_of(data)}), encoding="utf-8")


def test_only_what_a_trusted_key_signed(copy: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    """Not signed, signed by another, signed, and without trusted keys."""
    with pytest.raises(BundleError, match=r"signed by none of the 1 trusted key.*trol-edge sign"):
        Runtime(copy, trusted_keys=[ours[1]])
    public = sign(copy, theirs[0])
    with pytest.raises(BundleError, match="signed by none"):
        Runtime(copy, trusted_keys=[ours[1]])
    assert sign(copy, ours[0]) != public
    for keys in ([ours[1]], [theirs[1]], [str(ours[1]), theirs[1].read_bytes()], [bytes.fromhex(public)]):
        with Runtime(copy, trusted_keys=keys) as runtime:
            assert runtime.session().prefill([5]).shape == (800,)
    Runtime(copy)


def test_a_changed_bundle_is_not_the_signed_one(copy: Path, ours: tuple[Path, Path]) -> None:
    """Its own hashes fit, and the signature does not; without trusted keys it opens, because only hashes are asked."""
    sign(copy, ours[0])
    seal(copy, model="another")
    with pytest.raises(BundleError, match="signed by none"):
        Bundle(copy, [ours[1]])
    assert Bundle(copy).manifest.model == "another"


def test_weights_are_hashed_whatever_the_caller_says(copy: Path, ours: tuple[Path, Path]) -> None:
    """A signature covers hashes only, so verify=False has no effect with trusted keys."""
    sign(copy, ours[0])
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    Runtime(copy, verify=False)
    with pytest.raises(BundleError, match="sha256 differs"):
        Runtime(copy, verify=False, trusted_keys=[ours[1]])
    with pytest.raises(BundleError, match="sha256 differs"):
        sign(copy, ours[0])


def with_engines(folder: Path, content: bytes = b"program") -> None:
    """Engines of a target, as a build leaves them."""
    place = folder / "engines" / "rtx"
    place.mkdir(parents=True, exist_ok=True)
    infos = {}
    for name in engines.ENGINES:
        (place / f"{name}.engine").write_bytes(content)
        digest = engines.sha256_of(place / f"{name}.engine")
        infos[name] = engines.EngineInfo(f"{name}.engine", len(content), digest, "", 0, {}, (), 0.0)
    key = engines.Key("rtx", "TensorRT", "", "", "")
    engines.write(place, engines.EngineSet(engines.FORMAT_VERSION, "", key, "fp32", "", infos))


def test_engines_are_signed_too(copy: Path, ours: tuple[Path, Path]) -> None:
    """They are programs, and built after the bundle: those that came later, or were changed, are not opened."""
    sign(copy, ours[0])
    with_engines(copy)
    trusting = Bundle(copy, [ours[1]])
    with pytest.raises(BundleError, match=r"engines for rtx is signed by none"):
        engines.read(trusting, "rtx")
    assert engines.read(Bundle(copy), "rtx").key.target == "rtx"
    sign(copy, ours[0])
    assert engines.read(trusting, "rtx").key.target == "rtx"
    with_engines(copy, b"another program")
    with pytest.raises(BundleError, match="signed by none"):
        engines.read(trusting, "rtx")


def test_a_signature_of_another_bundle_is_none(
    copy: Path, tmp_path: Path, bundle_of: Any, ours: tuple[Path, Path]
) -> None:
    """Copied from one to the other."""
    sign(copy, ours[0])
    other = Path(shutil.copytree(bundle_of("trol-nano-phi3"), tmp_path / "other"))
    shutil.copy(copy / SIGNATURES, other / SIGNATURES)
    with pytest.raises(BundleError, match="signed by none"):
        Bundle(other, [ours[1]])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "trol-edge-signatures", "signatures": {"zz": 5}}', "[" * 99999, "\ufeff{}"]
)
def test_damaged_signatures(copy: Path, ours: tuple[Path, Path], content: str) -> None:
    """An error of ours; who has no trusted keys does not look."""
    (copy / SIGNATURES).write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=SIGNATURES):
        Bundle(copy, [ours[1]])
    Bundle(copy)


def test_unusable_keys(copy: Path, tmp_path: Path, ours: tuple[Path, Path]) -> None:
    """Each with what a key is."""
    (tmp_path / "text").write_text("no key", encoding="utf-8")
    other = key_pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    for keys in (
        [],
        str(ours[1]),
        [tmp_path / "nothing"],
        [tmp_path / "text"],
        [ours[0]],
        [other[1]],
        [b"short"],
        [copy],
    ):
        with pytest.raises(UsageError, match="ed25519 public key"):
            Bundle(copy, keys)
    for key in (ours[1], other[0], tmp_path / "text", tmp_path / "nothing", copy):
        with pytest.raises(UsageError, match="ed25519 private key"):
            sign(copy, key)


def test_the_verb(copy: Path, ours: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It names the public key; a bundle that is signed can be exported over."""
    assert main(["sign", str(copy), "--key", str(ours[0]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bundle"] == str(copy) and bytes.fromhex(told["public_key"])
    Bundle(copy, [bytes.fromhex(told["public_key"])])
    assert os.stat(copy / SIGNATURES).st_mode & 0o777 == 0o644
    assert main(["sign", str(copy), "--key", str(ours[1])]) != 0
    assert "ed25519 private key" in capsys.readouterr().err.replace("\n", " ")
