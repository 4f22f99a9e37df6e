"""The verb serve, which answers over HTTP as OpenAI's API does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from trol_edge.cli.show import Fallback, OfOrt, Threads, extra


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    host: Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File with one key per line; callers send one as Authorization: Bearer KEY.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM) for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of the certificate.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.  [default: the bundle's model]")
    ] = None,
    queue: Annotated[int, typer.Option(help="Most calls that wait or run; more are refused with 429.")] = 16,
    sessions: Annotated[int, typer.Option(help="Conversations that are kept, each in a K/V cache of its own.")] = 2,
    max_body_mb: Annotated[int, typer.Option(help="Largest request, in MB.")] = 32,
    files: Annotated[
        list[Path] | None, typer.Option(help="Folder below which file: pictures may be read; repeatable.")
    ] = None,
    fetch_host: Annotated[
        list[str] | None, typer.Option(help="Host from which http(s) pictures may be fetched; repeatable.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write questions into the log, too.")] = False,
    grace_s: Annotated[float, typer.Option(help="Seconds that a running answer gets when the server is stopped.")] = 10,
    threads: Threads = None,
    provider: OfOrt = None,
    fallback: Fallback = None,
) -> None:
    """Serve a bundle over HTTP as OpenAI's API does, with a page at / for a camera and questions."""
    with extra("serve"):
        from trol_edge.serve.app import App
        from trol_edge.serve.door import Server
        from trol_edge.serve.host import Host
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.runtime import Runtime
    from trol_edge.serve.journal import Journal
    from trol_edge.serve.security import Keys, read_keys
    from trol_edge.serve.settings import Settings
    from trol_edge.verify.passed import wanted
    from trol_edge.verify.replay import first_load

    def open_runtime(reached: Any) -> Runtime:
        runtime = Runtime(
            bundle, threads=threads, selftest=False, provider=cast(Any, provider), fallback=cast(Any, fallback)
        )
        if wanted(None):
            reached("verifying")
            first_load(runtime.model)
        return runtime

    model = Bundle(bundle).manifest.model
    settings = Settings(
        name=name or model,
        host=host,
        port=port,
        keys=Keys() if keys is None else read_keys(keys),
        tls_cert=tls_cert,
        tls_key=tls_key,
        queue=queue,
        sessions=sessions,
        body_bytes=max_body_mb << 20,
        folders=tuple(files or ()),
        fetch_hosts=tuple(fetch_host or ()),
        log_prompts=log_prompts,
        grace_s=grace_s,
    )
    Server(App(settings, Host(open_runtime, settings.sessions), Journal(settings.log_prompts))).run()
