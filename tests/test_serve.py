"""The server as programs use it: OpenAI's client, sync, async and streaming, and what the server says of itself."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NANO
from tests.serving import Served, serving, waited_for
from trol_edge.errors import UsageError
from trol_edge.runtime import Runtime
from trol_edge.serve.app import App
from trol_edge.serve.door import Server
from trol_edge.serve.host import Host
from trol_edge.serve.journal import Journal
from trol_edge.serve.settings import Settings
from trol_edge.testing import ScriptedRuntime

httpx = pytest.importorskip("httpx", reason="openai is not installed here")
openai = pytest.importorskip("openai", reason="openai is not installed here")

SCENE = NANO / "scene.png"
SCRIPT = {"One?": "first", "Two?": "second", "Is it on?": "Yes.", "Long?": "x" * 200}
TYPED = {"content-type": "application/json"}
PICTURE = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()


def scripted(reached: Any) -> Runtime:
    """A Runtime with a script, which takes a moment per token."""
    return ScriptedRuntime(SCRIPT, step_s=0.002)


def asking(text: str, *urls: str) -> dict[str, Any]:
    """A user's message."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(scripted) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def nano_served(nano_bundle: Path) -> Iterator[Served]:
    """trol-nano; its own Runtime, because the server closes it."""
    with serving(lambda reached: Runtime(nano_bundle)) as found:
        yield found


@pytest.fixture(scope="module")
def nano_client(nano_served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{nano_served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(client: Any, *messages: Any, **more: Any) -> Any:
    """One completion."""
    given = [asking(m) if isinstance(m, str) else m for m in messages]
    return client.chat.completions.create(model="trol", messages=given, **more)


def test_models(client: Any) -> None:
    """By OpenAI's client."""
    (model,) = client.models.list().data
    assert model.id == "trol" and client.models.retrieve("trol").context == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_an_answer(client: Any) -> None:
    """Text, reason, counts, and the labels that change nothing."""
    found = ask(client, "One?", user="me", metadata={"a": "b"}, n=1, frequency_penalty=0.0)
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("first", "assistant", "stop")
    assert found.usage.completion_tokens == 5
    assert found.usage.total_tokens == found.usage.prompt_tokens + 5 and found.id.startswith("chatcmpl-")
    assert found.trol_edge["finish_reason"] == "stop" and found.trol_edge["timings"]["decode_ms"] > 0
    cut = ask(client, "One?", max_completion_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("fi", "length")
    assert ask(client, "One?", stop=["rs"]).choices[0].message.content == "fi"
    assert ask(client, "One?", max_tokens=2).choices[0].message.content == "fi"


def test_a_stream(client: Any) -> None:
    """Chunks by token, the counts only if asked for, and the same text."""
    chunks = list(ask(client, "Two?", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "second"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 6 and not chunks[-1].choices
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in ask(client, "Two?", stream=True))


def test_async_calls(served: Served) -> None:
    """Several at a time, whole and streaming; all are right."""

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def stream(text: str) -> str:
                found = await ask(client, text, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in found])

            async def whole(text: str) -> str:
                return str((await ask(client, text)).choices[0].message.content)

            return await asyncio.gather(*(f(t) for t in ("One?", "Two?") for f in (stream, whole) for _ in range(3)))

    assert asyncio.run(work()) == ["first"] * 6 + ["second"] * 6


def test_conversations_are_those_of_python(nano: Runtime, nano_client: Any) -> None:
    """Several turns with a picture: the same answers and counts as Chat, and the prefix is used again."""
    messages: list[Any] = []
    with nano.chat() as chat:
        for text, image in (("What is left of the red star?", SCENE), ("Describe the scene.", None)):
            want = chat.ask(text, image)
            messages.append(asking(text, *([PICTURE] if image else [])))
            found = ask(nano_client, *messages, extra_body={"conversation": "robot"})
            assert found.choices[0].message.content == want.text
            assert found.usage.prompt_tokens == want.prompt_tokens
            assert found.usage.prompt_tokens_details.cached_tokens == want.cached_tokens
            messages.append(found.choices[0].message.model_dump())
        ask(nano_client, "Something else?")  # in another session
        again = ask(nano_client, *messages[:-1], extra_body={"conversation": "robot"})
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_places_of_pictures_and_system_texts(nano: Runtime, nano_client: Any) -> None:
    """Around a text a picture comes first; between texts it stays; a system text begins the first question."""
    text = {"type": "text", "text": "Describe the scene."}
    picture = {"type": "image_url", "image_url": {"url": PICTURE}}
    first = nano.generate("Describe the scene.", SCENE)
    for content in ([text, picture], [picture, text]):
        assert ask(nano_client, {"role": "user", "content": content}).choices[0].message.content == first.text
    found = ask(nano_client, {"role": "user", "content": [{"type": "text", "text": "Look: "}, picture, text]})
    import trol_edge

    want = nano.generate(["Look: ", trol_edge.IMAGE, "Describe the scene."], SCENE)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (want.text, want.prompt_tokens)
    told = ask(nano_client, {"role": "system", "content": "Be short."}, {"role": "user", "content": [picture, text]})
    want = nano.generate("Be short.\nDescribe the scene.", SCENE)
    assert (told.choices[0].message.content, told.usage.prompt_tokens) == (want.text, want.prompt_tokens)


def test_logprobs(nano: Runtime, nano_client: Any) -> None:
    """Those of Python, whole and in a stream."""
    want = nano.generate("Describe the scene.", SCENE, logprobs=2, max_new_tokens=4)
    options = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 4}
    found = ask(nano_client, asking("Describe the scene.", PICTURE), **options).choices[0].logprobs.content
    chunks = list(ask(nano_client, asking("Describe the scene.", PICTURE), stream=True, **options))
    streamed = [entry for c in chunks for entry in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert want.logprobs is not None
    for entries in (found, streamed):
        assert [e.logprob for e in entries] == pytest.approx([t.logprob for t in want.logprobs], abs=1e-4)
        assert [len(e.top_logprobs) for e in entries] == [2] * 4
        assert b"".join(bytes(e.bytes) for e in entries).decode().strip() == want.text.strip()


def test_formats(client: Any) -> None:
    """A JSON schema and a regular expression bind the answer."""
    pytest.importorskip("llguidance")
    schema: dict[str, Any] = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "state", "schema": schema, "strict": True}}
    assert set(json.loads(ask(client, "One?", response_format=form).choices[0].message.content)) == {"on"}
    form = {"type": "regex", "regex": "one|two"}
    assert ask(client, "One?", extra_body={"response_format": form}).choices[0].message.content in ("one", "two")
    nothing = {"type": "json_schema", "json_schema": {"name": "no", "schema": {"type": "string", "enum": []}}}
    with pytest.raises(openai.BadRequestError):
        ask(client, "One?", response_format=nothing)


def test_choices(client: Any) -> None:
    """The extensions choose and yes_no, whole and streaming."""
    found = ask(client, "One?", extra_body={"choose": ["second", "first"]})
    assert found.choices[0].message.content == "first" and found.trol_edge["choice"]["index"] == 1
    assert sum(o["probability"] for o in found.trol_edge["choice"]["options"]) == pytest.approx(1)
    found = ask(client, "Is it on?", extra_body={"yes_no": True})
    assert found.choices[0].message.content == "Yes" and found.trol_edge["yes_no"]["probability"] > 0.5
    chunks = list(ask(client, "Is it on?", stream=True, extra_body={"yes_no": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Yes"


def test_deadlines_count_from_arrival(client: Any, served: Served) -> None:
    """A call that waits for another one answers in time with what there is: nothing."""
    busy = threading.Thread(target=ask, args=(client, "Long?"))
    busy.start()
    waited_for(lambda: served.app.line.inside == 1)
    time.sleep(0.05)
    found = ask(client, "One?", extra_body={"deadline_ms": 30})
    assert found.trol_edge["finish_reason"] == "deadline" and found.choices[0].finish_reason == "length"
    assert found.choices[0].message.content == ""
    with pytest.raises(openai.InternalServerError) as late:
        ask(client, "One?", extra_body={"deadline_ms": 30, "yes_no": True})
    assert late.value.status_code == 504 and late.value.response.headers["x-should-retry"] == "false"
    busy.join()
    part = ask(client, "Long?", extra_body={"deadline_ms": 60})
    assert 0 < len(part.choices[0].message.content) < 200


def test_a_full_queue() -> None:
    """429 with Retry-After, at once; what waits is answered in order."""
    with (
        serving(scripted, queue=3) as small,
        openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as own,
    ):
        order: list[int] = []

        def work(i: int) -> None:
            ask(own, "Long?")
            order.append(i)

        threads = []
        for i in range(3):
            threads.append(threading.Thread(target=work, args=(i,)))
            threads[-1].start()
            # inside is who has sent his headers; his place comes with the body
            waited_for(lambda i=i: small.app.line.waiting == i and sum(small.app.metrics.wait.counts) == 1)
        with pytest.raises(openai.RateLimitError) as full:
            ask(own, "One?")
        assert full.value.code == "queue_full" and int(full.value.response.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert order == [0, 1, 2]
        assert ask(own, "One?").choices[0].message.content == "first"


def test_a_client_that_leaves(served: Served, client: Any) -> None:
    """Its call ends within steps, whether it streams, waits for the whole, or for its turn."""
    with ask(client, "Long?", stream=True) as stream:
        next(stream)
    waited_for(lambda: served.app.line.inside == 0)
    lines = waited_for(lambda: [line for line in served.requests() if line.get("left")])
    assert lines[-1]["ms"] < 300  # 200 tokens of 2 ms would take longer
    for timeout in (0.05, 0.02):
        busy = threading.Thread(target=ask, args=(client, "Long?"))
        if timeout == 0.02:
            busy.start()
            waited_for(lambda: served.app.line.inside == 1)
        with pytest.raises(openai.APITimeoutError):
            ask(client, "Long?", timeout=timeout)
        if timeout == 0.02:
            busy.join()
        waited_for(lambda: served.app.line.inside == 0)
    assert served.app.metrics.left >= 3
    assert ask(client, "One?").choices[0].message.content == "first"


@pytest.mark.parametrize("extra", [{"choose": [f"{first}xxxxxxxxx" for first in "abcd"]}, {"yes_no": True}])
def test_a_client_that_leaves_a_choice(extra: dict[str, Any]) -> None:
    """Its call ends within steps, too: fewer are computed than for one that waits."""
    steps: list[str] = []
    step_s = 0.0

    def script(question: str) -> str:  # asked at each step
        steps.append(question)
        time.sleep(step_s)
        return "first"

    with serving(lambda reached: ScriptedRuntime(script)) as found:
        body = json.dumps({"messages": [asking("Which?")], **extra}).encode()
        assert httpx.post(f"{found.url}/v1/chat/completions", content=body, headers=TYPED).status_code == 200
        whole, step_s = len(steps), 0.2
        post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", found.server.port)) as leaving:
            leaving.sendall(post + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            waited_for(lambda: len(steps) > whole)
        waited_for(lambda: found.app.line.inside == 0)
        step_s = 0.0
        assert httpx.post(f"{found.url}/v1/chat/completions", content=body, headers=TYPED).status_code == 200
        assert len(steps) < 3 * whole and found.app.metrics.left == 1


def test_health_and_metrics(served: Served, client: Any) -> None:
    """States, counts and times, as Prometheus reads them."""
    ask(client, "One?")
    assert httpx.get(f"{served.url}/health/live").json() == {"status": "alive"}
    assert httpx.get(f"{served.url}/health/ready").json()["status"] == "ready"
    text = httpx.get(f"{served.url}/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z_]+(\{([a-z]+="[^"]*",?)*\})? [-+.\de]+', line), line
    names = ("prompt_tokens_cached_total", "queue_length", "resident_bytes", "vision_cache_hits_total")
    for name in ("gen_ai_server_time_to_first_token_seconds_count", *(f"trol_edge_{name}" for name in names)):
        assert re.search(rf"^{name} [\d.]", text, re.M), name
    assert 'trol_edge_state{state="ready"} 1' in text
    assert re.search(r'trol_edge_requests_total\{path="/v1/chat/completions",status="200"\} [1-9]', text)


def test_states_while_it_loads() -> None:
    """503 until the model is there, and the reason if it never will be."""
    go = threading.Event()

    def slow(reached: Any) -> Runtime:
        reached("verifying")
        go.wait(30)
        raise RuntimeError("planted")

    with serving(slow, ready=False) as found:
        ready = waited_for(lambda: httpx.get(f"{found.url}/health/ready"))
        assert ready.status_code == 503 and ready.json()["status"] in ("loading", "verifying")
        body = {"messages": [asking("One?")]}
        early = httpx.post(f"{found.url}/v1/chat/completions", json=body)
        assert early.status_code == 503 and early.headers["retry-after"] == "5"
        go.set()
        waited_for(lambda: found.app.host.state == "failed")
        assert httpx.get(f"{found.url}/health/ready").json()["reason"] == "RuntimeError: planted"
        assert httpx.get(f"{found.url}/health/live").status_code == 200
        assert "planted" in httpx.post(f"{found.url}/v1/chat/completions", json=body).json()["error"]["message"]


def test_a_graceful_stop() -> None:
    """The running answer ends whole, one that waits is refused, and no new one is taken."""
    with (
        serving(scripted, grace_s=5.0) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as own,
    ):
        answers: list[Any] = []

        def work() -> None:
            try:
                answers.append(ask(own, "Long?").choices[0].message.content)
            except openai.APIError as error:
                answers.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for i, thread in enumerate(threads):
            thread.start()
            waited_for(lambda i=i: found.app.line.inside == i + 1)
        found.server.should_exit = True
        for thread in threads:
            thread.join()
    assert "x" * 200 in answers
    (error,) = [a for a in answers if not isinstance(a, str)]
    assert isinstance(error, openai.InternalServerError) and error.status_code == 503
    assert [line["event"] for line in found.log][-1] == "stopped"


def test_the_grace_is_bounded() -> None:
    """An answer that takes longer ends with what there is."""
    with (
        serving(lambda reached: ScriptedRuntime("x" * 1000, step_s=0.01), grace_s=0.2) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as own,
    ):
        stream = ask(own, "One?", stream=True, max_completion_tokens=1000)
        next(stream)
        found.server.should_exit = True
        *_, last = stream
    assert last.trol_edge["finish_reason"] == "stopped"


def test_log_lines_have_ids_and_no_prompts(served: Served, client: Any) -> None:
    """A caller's id if it is a plain word; prompts only with log_prompts."""
    for given, kept in (("robot-7", True), ("a b", False), ("x" * 65, False)):
        found = httpx.post(
            f"{served.url}/v1/chat/completions",
            json={"messages": [asking("One?")]},
            headers={"x-request-id": given},
        )
        id = found.headers["x-request-id"]
        assert (id == given) == kept and re.fullmatch(r"[\w.-]+", id)
        line = waited_for(lambda id=id: [line for line in served.requests() if line["request_id"] == id])[0]
        assert line["status"] == 200 and line["answer_tokens"] == 5 and line["wait_ms"] >= 0
    assert "One?" not in json.dumps(served.log)
    with serving(scripted, log_prompts=True) as loud:
        httpx.post(f"{loud.url}/v1/chat/completions", json={"messages": [asking("One?")]})
    assert [line["prompt"] for line in loud.requests()] == ["One?"]


def test_the_verb_refuses_what_cannot_be_served(
    nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded: no bundle, an open door, half of a certificate, a folder that is none."""
    from trol_edge.cli.main import main

    short = tmp_path / "keys"
    short.write_text("# mine\nshort\n")
    for words, said in (
        ([str(tmp_path)], "bundle.json"),
        ([str(nano_bundle), "--host", "0.0.0.0"], "--keys"),
        ([str(nano_bundle), "--tls-cert", "cert.pem"], "--tls-key"),
        ([str(tmp_path), "--name", "given"], "bundle.json"),
        (
            [str(nano_bundle), "--tls-cert", "cert.pem", "--tls-key", "key.pem"],
            "cert.pem with --tls-key key.pem cannot",
        ),
        ([str(nano_bundle), "--keys", str(short)], "key 1 should have at least 16"),
        ([str(nano_bundle), "--keys", str(short)], f"--keys {short}"),
        ([str(nano_bundle), "--files", str(tmp_path / "none")], "is not a folder"),
        ([str(nano_bundle), "--keys", str(tmp_path / "none")], "cannot be read"),
        ([str(nano_bundle), "--queue", "0"], "at least 1"),
        ([str(nano_bundle), "--max-body-mb", "0"], "at least 1024"),
        ([str(nano_bundle), "--sessions", "0"], "at least 1"),
    ):
        assert main(["serve", *words]) == 1, words
        assert said in capsys.readouterr().err, words


def test_an_address_that_is_taken() -> None:
    """An error with advice, instead of the library's own end of the process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(name="model", port=taken.getsockname()[1])
        host = Host(lambda reached: ScriptedRuntime(SCRIPT), settings.sessions)
        with pytest.raises(UsageError, match=r"127\.0\.0\.1:\d+ cannot be listened to .* give another --port"):
            Server(App(settings, host, Journal(False))).run()
