"""The command line: every verb, its exit codes, what goes to which stream, and that no error shows a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import trol_edge
from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST
from trol_edge.calibration.evaluate import heading
from trol_edge.cli.main import app, main
from trol_edge.export import scenes
from trol_edge.runtime import Runtime

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
SCENE = NANO / "scene.png"
QUESTION = "What is left of the red circle?"
VERBS = (
    *("export", "run", "inspect", "synth", "calibrate", "mix", "outliers", "evaluate", "compare", "demo", "verify"),
    *("soak", "sign", "profile", "plan", "targets", "build", "doctor", "version", "chat", "serve", "gates"),
)


class Result(NamedTuple):
    """What one command line did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON object on standard output, where the command succeeded and said nothing else."""
        assert self.code == 0, self.err
        assert self.err == ""
        return json.loads(self.out)

    def failed(self, code: int, message: str) -> None:
        """Check an error: its code, its message on standard error, no traceback, and no output but the error itself."""
        assert self.code == code
        assert re.search(message, self.err.replace("\n", " ")), self.err
        assert self.err.lstrip().startswith("error: ")
        assert "Traceback" not in self.err
        if self.out:  # with --json, the error as an object too
            assert re.search(message, json.loads(self.out)["error"]["message"])


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


def process(*arguments: object, code: str | None = None, **environment: str) -> Result:
    """Run a command line in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "trol_edge"]), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    return Result(done.returncode, done.stdout, done.stderr)


# -- help and usage ----------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(cli: Callable[..., Result]) -> None:
    """Also without arguments; each verb with one line about it."""
    for arguments in ([], ["--help"]):
        result = cli(*arguments)
        assert result.code == 0
        for verb in VERBS:
            assert re.search(rf"^\s*{verb} +\S+", result.out, re.MULTILINE), verb
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert commands == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_parses(cli: Callable[..., Result], verb: str) -> None:
    """Every option in it exists."""
    result = cli(verb, "--help")
    assert (result.code, result.err) == (0, "")
    (rest,) = re.findall(r"Example: (.*)", result.out, re.DOTALL)  # the last of it, perhaps on several lines
    example = re.sub(r" \(fetches .*", "", " ".join(rest.split()))
    words = shlex.split(example)
    assert words[:2] == ["trol-edge", verb]
    for option in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", result.out.removesuffix(rest)), option
    assert "Usage" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command"),
        (["--fly"], "No such option"),
        (["run"], "Missing"),
        (["run", "somewhere"], "Missing option.*--prompt"),
        (["run", "somewhere", "--prompt", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["export", "trol-nano"], "Missing option.*--output"),
        (
            ["export", "no/such/folder", "-o", "x"],
            "neither a checkpoint folder nor one of trol-nano, trol-nano-phi3, trol-1.8b",
        ),
        (["export", "trol-13b", "-o", "x"], "neither a checkpoint folder"),
        (["evaluate", "somewhere", "-n", "0"], "--number"),
        (["inspect", "a", "b"], "unexpected extra argument"),
    ],
)
def test_bad_usage(cli: Callable[..., Result], arguments: list[str], message: str) -> None:
    """Exit code 2, and where to look."""
    result = cli(*arguments)
    result.failed(2, message)
    assert "--help" in result.err


def test_version(cli: Callable[..., Result]) -> None:
    """On its own line, for scripts."""
    assert cli("version") == (0, f"{trol_edge.__version__}\n", "")
    assert process("version") == (0, f"{trol_edge.__version__}\n", "")


def test_module_returns_the_exit_code() -> None:
    """`python -m trol_edge` for a shell."""
    process("inspect", "nowhere").failed(1, r"no bundle\.json here")
    assert process("inspect").code == 2


def test_interrupt(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ctrl-C: 130, as shells expect, and no traceback."""
    from trol_edge.export import pipeline

    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export", interrupted)
    result = cli("export", NANO, "-o", tmp_path / "out")
    assert result.code == 130
    assert "no unfinished files" in result.err
    assert "Traceback" not in result.err


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.bundle
@pytest.mark.parametrize("name", [NANOS[1], *slow(NANOS[0])])
def test_export(cli: Callable[..., Result], tmp_path: Path, name: str) -> None:
    """A folder or a name; what exists is refused or replaced; the bundle runs."""
    out = tmp_path / "out"
    result = cli("export", CHECKPOINTS / name, "-o", out, "--model", "my-model")
    assert result.code == 0
    assert re.search(r"my-model: \d+\.\d MB in \S+, \d+ s, peak memory \d+\.\d\d GB", result.out)
    assert Bundle(out).manifest.model == "my-model"
    cli("export", CHECKPOINTS / name, "-o", out).failed(1, r"out: exists; .*--force")
    data = cli("export", name, "-o", out, "--force", "--json").json()
    assert Bundle(out).manifest.model == name
    files = Bundle(out).manifest.files.values()
    assert data["bundle"] == str(out)
    assert data["bytes"] == sum(info.bytes for info in files)
    assert data["seconds"] > 0 < data["peak_bytes"]
    Runtime(out)


@pytest.mark.usefixtures("nano_bundle")
def test_export_errors(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Exit code 1, the message of the library, nothing left."""
    out = tmp_path / "place" / "out"
    cli("export", NANO, "-o", out, "--context", 5000).failed(1, r"context 5000: .*choose 2\.\.2048")
    cli("export", NANO, "-o", out, "--target", "gpu").failed(1, "target 'gpu' is not one of cpu, onnx")
    cli("export", tmp_path, "-o", out).failed(1, r"config\.json: missing; copy it")
    assert not out.exists()


def test_export_for_other_tools(cli: Callable[..., Result], tmp_path: Path, nano_bundle: Path) -> None:
    """--target onnx; the Runtime says that it does not run these."""
    assert cli("export", NANO, "-o", tmp_path / "out", "--target", "onnx", "--json").json()["bytes"] > 10**6
    cli("run", tmp_path / "out", "--prompt", "x").failed(1, "target 'onnx'.*--target cpu")


def test_export_of_a_published_model_without_network(tmp_path: Path) -> None:
    """Names the files, where they are, and both places where they may be put."""
    result = process(
        *("export", "trol-1.8b", "-o", tmp_path / "out", "--checkpoints", tmp_path / "checkpoints"),
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    result.failed(1, r"BK-Lee/TroL-1\.8B could not be fetched")
    for part in ("config.json", "trol_gating.pt", "model*.safetensors", "tokenizer.model", "added_tokens.json",
                 "https://huggingface.co/BK-Lee/TroL-1.8B", str(tmp_path / "checkpoints" / "trol-1.8b"),
                 "CHECKPOINT=folder"):  # fmt: skip
        assert part in result.err, part
    assert not (tmp_path / "out").exists()


MISSING = """
import sys
sys.modules[{library!r}] = None
from trol_edge.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("library", "extra", "arguments"),
    [
        ("torch", "export", ["export", "trol-nano", "-o", "build/never"]),
        ("torch", "export", ["synth", "--model", "trol-1.8b", "-o", "build/never"]),
        *slow(
            ("torch", "export", ["demo", "build/never"]),
            ("onnx_ir", "export", ["export", "trol-nano", "-o", "build/never"]),
        ),
    ],
)
def test_missing_extra_is_named(library: str, extra: str, arguments: list[str]) -> None:
    """A small installation: which verb needs what."""
    result = process(*arguments, code=MISSING.format(library=library))
    result.failed(1, rf"{library} is not installed; pip install 'trol-edge\[{extra}\]'")


def test_missing_back_end_is_named(nano_bundle: Path) -> None:
    """Without onnxruntime there is nothing to run on."""
    result = process("run", nano_bundle, "--prompt", "x", code=MISSING.format(library="onnxruntime"))
    result.failed(1, r"onnxruntime is not usable here.*pip install 'trol-edge\[cpu\]'")


# -- run ---------------------------------------------------------------------------------------------------------------


def test_run(cli: Callable[..., Result], each_nano: Runtime) -> None:
    """The answer alone on standard output; how long it took on standard error."""
    answer = each_nano.generate(QUESTION, SCENE)
    result = cli("run", each_nano.bundle.folder, "--image", SCENE, "--prompt", QUESTION)
    assert (result.code, result.out) == (0, f"{answer.text}\n")
    rope = "" if answer.rope == "plain" else f", {answer.rope} rope factors"
    assert re.search(rf"^{len(answer.token_ids)} tokens, stop{rope}; ms: preprocess [\d.]+, vision", result.err)


def test_run_json(cli: Callable[..., Result], nano: Runtime, nano_bundle: Path) -> None:
    """Everything that the answer object has."""
    answer = nano.generate(QUESTION, SCENE)
    data = cli("run", nano_bundle, "-i", SCENE, "-p", QUESTION, "--json").json()
    assert data["text"] == answer.text
    assert tuple(data["token_ids"]) == answer.token_ids
    assert data["finish_reason"] == "stop"
    assert set(data["timings"]) == {"preprocess_ms", "wait_ms", "vision_ms", "prefill_ms", "decode_ms"}


def test_run_options(cli: Callable[..., Result], nano: Runtime, nano_bundle: Path) -> None:
    """Each option reaches generate; --image and --stop may be repeated."""

    def ask(*options: object) -> Any:
        return cli("run", nano_bundle, "--prompt", QUESTION, "--json", *options).json()

    assert tuple(ask()["token_ids"]) == nano.generate(QUESTION).token_ids
    two = nano.generate(QUESTION, [SCENE, SCENE], max_new_tokens=5)
    assert tuple(ask("-i", SCENE, "-i", SCENE, "--max-new-tokens", 5)["token_ids"]) == two.token_ids
    one = ask("-i", SCENE, "--max-new-tokens", 1)
    assert (len(one["token_ids"]), one["finish_reason"]) == (1, "length")
    options = {"temperature": 9.0, "top_k": 40, "top_p": 0.99, "min_p": 0.001, "repetition_penalty": 1.5, "seed": 4}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    sampled = nano.generate(QUESTION, SCENE, max_new_tokens=8, **options)  # type: ignore[arg-type]
    assert tuple(ask("-i", SCENE, "--max-new-tokens", 8, *flags)["token_ids"]) == sampled.token_ids
    text = nano.generate(QUESTION, SCENE).text
    stopped = ask("-i", SCENE, "--stop", "never said", "--stop", text[2:4], "--threads", 1)
    assert stopped["text"] == text[: text.index(text[2:4])]


def test_run_errors(cli: Callable[..., Result], nano_bundle: Path, tmp_path: Path) -> None:
    """Exit code 1 with the library's message."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for arguments, message in (
        (["-p", "x", "-i", tmp_path / "none.png"], r"none\.png' does not exist"),
        (["-p", "x", "-i", broken], r"broken\.png' is not a picture"),
        (["-p", ""], "the prompt has no text"),
        (["-p", "x", "--temperature", -1], r"temperature -1\.0"),
        (["-p", "x", "--max-new-tokens", 0], "max_new_tokens"),
        (["-p", "a " * 3000], r"this bundle holds \d+"),
    ):
        cli("run", nano_bundle, *arguments).failed(1, message)
    cli("run", tmp_path, "-p", "x").failed(1, r"no bundle\.json here")


def test_markup_in_a_prompt_is_text(cli: Callable[..., Result], nano_bundle: Path, tmp_path: Path) -> None:
    """Square brackets are no style for the terminal library, in answers and in errors."""
    cli("inspect", tmp_path / "[red]x[/red]").failed(1, re.escape("[red]x[/red]: no bundle.json"))
    assert cli("run", nano_bundle, "-p", "[bold]What?[/]", "--json").code == 0


# -- inspect, synth, evaluate, demo ------------------------------------------------------------------------------------


def test_inspect(cli: Callable[..., Result], each_bundle: Path) -> None:
    """Graphs, operators, ports, weights, and what a step reads: no LoRA, each weight once."""
    result = cli("inspect", each_bundle)
    assert (result.code, result.err) == (0, "")
    manifest = Bundle(each_bundle).manifest
    for name, graph in manifest.graphs.items():
        assert f"{name} ({graph.file})" in result.out
        assert f"{len(graph.weights)} tensors" in result.out
    assert re.search(r"A step reads \d+\.\d\d MB of weights \(float32, each once, 0 LoRA tensors\)", result.out)
    assert "In no graph: embedding" in result.out
    assert "inputs_embeds float32 [1, 1, 128]; position_ids int64 [1, 1]" in result.out
    assert f"Attention {2 * manifest.spec.num_layers}" in result.out  # two passes


def test_inspect_json(cli: Callable[..., Result], nano_bundle: Path) -> None:
    """The manifest, and the numbers for a budget."""
    data = cli("inspect", nano_bundle, "--json").json()
    manifest = json.loads((nano_bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest.pop("manifest_sha256")
    manifest["spec"].setdefault("more_end_ids", [])  # left out of the file where there are none
    manifest["spec"].setdefault("traversed", None)  # and this where every layer has a second pass
    manifest.setdefault("traversal", None)  # and this where that was not chosen by measurement
    manifest["plan"].setdefault("embedding", None)  # and this where the table of words is not rounded
    manifest["plan"].setdefault("kv", None)  # and these where keys and values are kept as they are computed
    manifest.setdefault("requires", {})
    assert {key: data[key] for key in manifest} == manifest
    step = manifest["graphs"]["step"]["weights"]
    assert data["weight_bytes"]["step"] == sum(data["weights"][name]["bytes"] for name in step)
    assert not any(".lora_" in name for name in step)
    assert data["kv_bytes_per_token"] == 2 * 8 * 2 * 32 * 4


def test_inspect_errors(cli: Callable[..., Result], tmp_path: Path) -> None:
    """A folder that is no bundle."""
    cli("inspect", tmp_path).failed(1, r"no bundle\.json here")
    (tmp_path / MANIFEST).write_text("{")
    cli("inspect", tmp_path).failed(1, "not readable as JSON")


def test_synth(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model's shapes by name; here a tiny one."""
    from trol_edge.export.reference import hub as models
    from trol_edge.export.reference import internlm2

    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    clip = json.loads((NANO / "clip_vision_config.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(models.MODELS, "tiny", models.Published("tiny", "nobody/tiny", internlm2.FAMILY, config))
    monkeypatch.setattr(internlm2, "CLIP_L_14_336", clip)
    out = tmp_path / "tiny"
    data = cli("synth", "--model", "tiny", "-o", out, "--json").json()
    assert data["checkpoint"] == str(out)
    assert data["bytes"] == 2 * data["parameters"]
    cli("synth", "--model", "tiny", "-o", out).failed(1, "exists")
    result = cli("synth", "--model", "tiny", "-o", out, "--force", "--seed", 3)
    assert result.code == 0
    assert re.search(r"tiny, random weights: [\d,]+ parameters, 0\.\d\d GB in ", result.out)
    cli("synth", "--model", "trol-13b", "-o", tmp_path / "no").failed(1, "no model 'trol-13b'; choose one of")


@pytest.mark.parametrize("each_bundle", [NANOS[1], *slow(NANOS[0])], indirect=True)
def test_evaluate(cli: Callable[..., Result], each_bundle: Path, tmp_path: Path) -> None:
    """A table, or JSON; and a report's section of each picture size written once."""
    report = tmp_path / "REPORT.md"
    report.write_text("# mine\n", encoding="utf-8")
    data = cli("evaluate", each_bundle, "-n", 20, "--json", "--report", report).json()
    assert (data["scale"], data["tiles"], data["scenes"]) == (1, 1, 20)
    assert sum(data["asked"][kind] for kind in scenes.EASY_KINDS) == 20 > data["asked"]["nearer"] > 0
    assert 0 <= data["short_percent"] <= 100 and 0 <= data["hard_percent"] <= 100
    for _ in range(2):
        data = cli("evaluate", each_bundle, "-n", 5, "--scale", 2, "--json", "--report", report).json()
    assert (data["scale"], data["tiles"]) == (2, 1 if Bundle(each_bundle).manifest.image.max_tiles == 1 else 5)
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# mine\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [heading(1), heading(2)]
    result = cli("evaluate", each_bundle, "-n", 5)
    assert result.code == 0
    assert "| " in result.out
    shares = ("--image-tokens", "1", "--image-tokens", "0.5")
    result = cli("evaluate", each_bundle, "-n", 7, *shares)
    assert ": kind | asked | image_tokens=1 | image_tokens=0.5 |" in result.out
    whole, half = cli("evaluate", each_bundle, "-n", 7, *shares, "--json").json()["scores"]
    assert (whole["image_tokens"], half["image_tokens"]) == (1, 0.5) and whole["asked"] == half["asked"]
    cli("evaluate", each_bundle, *shares, "--report", report).failed(1, "--report is for all image tokens")
    cli("evaluate", each_bundle, "--image-tokens", "0").failed(1, "image_tokens 0.0 should be the share")


def test_inspect_of_fewer_second_passes(cli: Callable[..., Result], exported: Callable[..., Path]) -> None:
    """The layers that have one, and the bytes of both sets."""
    bundle = exported(CHECKPOINTS / "trol-nano", traversal="1,3")
    spec = Bundle(bundle).manifest.spec
    out = cli("inspect", bundle).out
    assert f"{spec.num_layers} layers, second pass in 2 (1, 3)" in out
    one = 2 * spec.num_kv_heads * spec.head_dim * 4
    assert f"{one * spec.num_layers} bytes per token in the first pass's set, {one * 2} in the second's" in out
    data = cli("inspect", bundle, "--json").json()
    assert (data["kv_bytes_per_token"], data["second_kv_bytes_per_token"]) == (one * spec.num_layers, one * 2)
    assert data["spec"]["traversed"] == [1, 3]
    cli("export", CHECKPOINTS / "trol-nano", "-o", "nowhere", "--traversal", "9").failed(1, "this model has 8 layers")


@pytest.mark.parametrize("each_bundle", [NANOS[1], *slow(NANOS[0])], indirect=True)
def test_demo(cli: Callable[..., Result], each_nano: Runtime) -> None:
    """What `make engine` ends with: picture, question, answer, bundle, and what to type next."""
    bundle = each_nano.bundle.folder
    result = cli("demo", bundle)
    assert (result.code, result.err) == (0, "")
    said = dict(re.findall(r"^(picture|question|answer|bundle): +(.*)$", result.out, re.MULTILINE))
    picture = CHECKPOINTS / each_nano.bundle.manifest.model / "scene.png"
    report = json.loads((picture.parent / "report.json").read_text(encoding="utf-8"))
    assert picture.samefile(ROOT / said["picture"])
    assert said["answer"] == each_nano.generate(said["question"], picture).text == report["demo"]["right"]
    assert said["bundle"] == str(bundle)
    commands = re.findall(r"^  (\S+/trol-edge .*|\S+/python -c .*)$", result.out, re.MULTILINE)
    assert len(commands) == 3
    run = shlex.split(commands[0])
    assert cli(*run[1:]).code == 0
    assert cli(*shlex.split(commands[1])[1:]).code == 0
    assert said["answer"] in process(code=shlex.split(commands[2])[2]).out
    cli("demo", bundle / "nowhere").failed(1, r"no bundle\.json here")


@pytest.mark.slow
def test_a_limit_on_the_loss_raises_linears(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mix` writes the plan that `export --max-loss` takes by itself."""
    monkeypatch.setattr("trol_edge.cli.export.SENSITIVITY_SAMPLES", 1)
    statistics, plan = tmp_path / "statistics", tmp_path / "int4.json"
    assert cli("calibrate", NANO, "--samples", 2, "-o", statistics, "--json").code == 0
    rest = {"vision": "fp32", "lora": "fp32", "lm_head": "fp32", "scaling": False, "clipping": False}
    plan.write_text(json.dumps({"recipe": "int4", **rest}), encoding="utf-8")
    chosen = (NANO, "--calibration", statistics, "--precision", plan)
    loose = cli("mix", *chosen, "--max-loss", 9, "--samples", 1, "-o", tmp_path / "mixed.json", "--json").json()
    limit = loose["recipe_nats"] / 2
    assert loose["reached"] and not loose["linears"]
    export = ("export", *chosen, "-o", tmp_path / "bundle", "--json")
    assert cli(*export, "--max-loss", limit).code == 0
    plans = Bundle(tmp_path / "bundle").manifest.plan.linears
    raised = [name for name in loose["sensitivity"] if plans[name].precision != "int4"]
    assert 0 < len(raised) < len(loose["sensitivity"])
    assert max(loose["sensitivity"], key=loose["sensitivity"].get) in raised
    cli(*export, "--max-loss", 0, "--force").failed(1, "choose a limit above 0")
    assert Bundle(tmp_path / "bundle").manifest.plan.linears == plans
