"""The verb sign, which signs bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trol_edge.cli.show import Json, out, print_json


def sign(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    key: Annotated[Path, typer.Option(help="PEM file of an ed25519 private key.")],
    as_json: Json = False,
) -> None:
    """Sign a bundle and its engines, so that Runtime(..., trusted_keys=[...]) opens it."""
    from trol_edge.bundle.signing import sign as sign_bundle

    public = sign_bundle(bundle, key)
    if as_json:
        print_json({"bundle": str(bundle), "public_key": public})
    else:
        out.print(f"{bundle}: signed by the key {public}", soft_wrap=True)
