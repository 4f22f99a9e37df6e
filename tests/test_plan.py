"""`trol-edge plan`: verdicts, times and the device table, and the errors a user meets."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import plan_check
from trol_edge.bundle.costs import Costs, Operation
from trol_edge.bundle.manifest import Bundle, write_manifest
from trol_edge.bundle.names import MANIFEST
from trol_edge.bundle.program_counts import ProgramCounts, Work, grown
from trol_edge.bundle.targets import TARGETS
from trol_edge.cli.main import main
from trol_edge.errors import BundleError, UsageError
from trol_edge.machine import cpus, devices
from trol_edge.machine.table import to_json
from trol_edge.plan import compare, duration, shipped
from trol_edge.plan import estimate as plan
from trol_edge.plan import memory as memory_module
from trol_edge.plan import rates as rates_module
from trol_edge.plan import subject as subject_module

GB = 1_000_000_000
NANO = "orin-nano-8gb"


def graph(weights: int, peak: int = 0) -> Costs:
    """One product per token that reads all weights, attention over the cache."""
    linear = Operation("linear", "float16", "float16", 1, {"tokens": 10**9, "1": 10**9}, weights, {"tokens": 100}, {})
    attend = Operation("attention", "float16", None, 4, {"tokens*slots": 1000}, 0, {}, {"slots": 2000})
    return Costs((linear, attend), ({"1": peak},), {"tokens": 1, "slots": 2048})


def subject(weights: float = 1.0, precision: str = "fp16", **changes: Any) -> subject_module.Subject:
    """A model whose decoder takes `weights` GB, with 0.5 GB of cache."""
    size = round(weights * GB)
    given = subject_module.Subject(
        name="made-up",
        target="jetson-jp6",
        precision=precision,
        context=2048,
        layers=10,
        twice=10,
        tokens_per_tile=256,
        most_tiles=4,
        graphs={"vision": graph(GB // 10, GB // 20), "traverse": graph(size, GB // 10), "step": graph(size)},
        weights={"vision": GB // 10, "traverse": size, "step": size},
        decoder_bytes=size,
        shareable_bytes=0,
        shared=False,
        embedding_bytes=GB // 100,
        cache_bytes=GB // 2,
    )
    return dataclasses.replace(given, **changes)


@pytest.fixture
def nano() -> rates_module.Platform:
    return rates_module.platform_of(*devices.find(NANO))


def test_table_follows_its_rule() -> None:
    """Dense TFLOPS of FP16 and TOPS of INT8 as the makers state them."""
    stated = {"orin-nano-8gb:MAXN_SUPER": (16.7, 33), "orin-nx-16gb": (15.0, 30), "agx-orin-64gb": (42.6, 85)}
    stated |= {"agx-thor": (258, 516), "rtx-4090": (165, 330), "rtx-a2000": (32, 64)}
    for name, (fp16, int8) in stated.items():
        device, mode = devices.find(name)
        assert device.flops(mode, "float16") / 1e12 == pytest.approx(fp16, rel=0.02)
        assert device.flops(mode, "int8") / 1e12 == pytest.approx(int8, rel=0.03)
    for name, device in devices.DEVICES.items():
        assert device.name == name
        assert device.target in TARGETS and device.sources and device.modes


def test_processors_have_the_peaks_that_their_units_give() -> None:
    """By hand: 4 cores x 2.4 GHz x 8 multiply-adds x 2; 8 bits four times as many. None of them is a GPU's name."""
    pi = cpus.PROCESSORS["pi5-8gb"]
    assert pi.flops("float32") == pytest.approx(153.6e9) and pi.flops("int8") == pytest.approx(614.4e9)
    assert not cpus.PROCESSORS.keys() & devices.DEVICES.keys()
    for name, processor in cpus.PROCESSORS.items():
        platform = rates_module.platform_of_processor(processor)
        assert platform.name == name and platform.target == "cpu" and processor.sources
        assert platform.os_bytes + platform.desktop_bytes < platform.memory_bytes
        for kind, ((_, peak),) in platform.peak.arithmetic.items():
            assert 0 < platform.reached.arithmetic[kind][0][1] < peak


def test_own_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--show-device", "pi5-8gb"]) == 0
    mine = tmp_path / "mine.json"
    mine.write_text(capsys.readouterr().out)
    assert cpus.find(str(mine)) == cpus.PROCESSORS["pi5-8gb"] and cpus.find(NANO) is None
    data = json.loads(mine.read_text())
    for change, said in (({"cores": 0}, "cores 0 is not above 0"), ({"volts": 5}, "unknown key 'volts'")):
        mine.write_text(json.dumps(data | change))
        with pytest.raises(UsageError, match=said):
            cpus.find(str(mine))
    mine.write_text(to_json(devices.DEVICES["agx-thor"]))
    assert cpus.find(str(mine)) is None


def test_a_processor_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--model", "trol-nano", "--precision", "int8-dynamic", "--device"]
    assert main([*given, "pi5-8gb", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert (found["device"], found["verdict"]) == ("pi5-8gb", "fits")
    assert 0 < found["first_token"]["floor"] < found["first_token"]["expected"]


def test_unknown_device_says_how_to_add_one() -> None:
    with pytest.raises(UsageError, match=r"'xavier' is not in the table .*--show-device .*--device mine\.json"):
        devices.find("xavier")
    with pytest.raises(UsageError, match="no mode '99W' in the table; there are 15W, MAXN_SUPER"):
        devices.find(f"{NANO}:99W")


def test_own_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--show-device", NANO]) == 0
    mine = tmp_path / "mine.json"
    mine.write_text(capsys.readouterr().out)
    assert devices.find(str(mine)) == devices.find(NANO)
    assert devices.find(f"{mine}:maxn_super")[1].name == "MAXN_SUPER"
    data = json.loads(mine.read_text())
    for change, said in (
        ({"sms": 0}, "sms 0 is not above 0"),
        ({"modes": []}, "no modes"),
        ({"watts": 5}, "unknown key 'watts'"),
        ({"target": "abacus"}, "target 'abacus' is not one of"),
        ({"os_bytes": -1}, "os_bytes -1 is below 0"),
    ):
        mine.write_text(json.dumps(data | change))
        with pytest.raises(UsageError, match=said):
            devices.find(str(mine))
    mine.write_text("{")
    with pytest.raises(UsageError, match="not readable as JSON"):
        devices.find(str(mine))


def test_times(nano: rates_module.Platform) -> None:
    """By hand: a step of 1 GB of weights and 8 MB of cache at 68.3 GB/s; five kernels to start."""
    found = duration.graph_time("step", graph(GB), GB, nano, slots=1000)
    moved = GB + 4 * 2000 * 1000
    assert found.floor == pytest.approx(moved / 68.3e9)
    start = 5 * rates_module.OPERATOR_CYCLES / 612e6
    assert found.expected == pytest.approx(moved / (68.3e9 * rates_module.BANDWIDTH) + start, rel=1e-3)
    assert found.bound == "memory"
    prompt = duration.graph_time("traverse", graph(GB), GB, nano, tokens=2000, slots=2000)
    flops = 2001 * 10**9 + 4 * 1000 * 2000**2
    peak = 2 * 8 * 1024 * 612e6
    assert prompt.floor == pytest.approx(flops / peak)
    assert prompt.bound == "arithmetic"
    assert prompt.expected > prompt.floor / rates_module.ARITHMETIC["float16"]


def counts(weights: int, scratch: int = 0, **ranges: tuple[int, int]) -> ProgramCounts:
    """A step's program that reads all weights in 8-bit products, a cache of 2000 bytes a row, and copies that."""
    work = (
        Work("attention", {}, {"capacity": 2000}),
        Work("int8", {"1": 2 * weights}, {"1": weights}),
        Work("rest", {}, {"capacity": 4000, "1": 1000}),
    )
    return ProgramCounts(ranges, 30, weights, scratch, work, {"cache copy": {"1": 4000 * 2048}})


def test_times_of_a_program(nano: rates_module.Platform) -> None:
    """By hand: what the engine moves at 68.3 GB/s; the floor and what it takes to start operators stay the graph's."""
    plain = duration.graph_time("step", graph(GB), GB, nano, slots=1000)
    found = duration.graph_time("step", graph(GB), GB, nano, [counts(GB)], 2048, slots=1000)
    moved = GB + 1000 + 6000 * 2048
    start = 5 * rates_module.OPERATOR_CYCLES / 612e6
    assert (found.moved, plain.moved) == (moved, None)
    assert found.expected == pytest.approx(moved / (68.3e9 * rates_module.BANDWIDTH) + start, rel=1e-3)
    assert (found.floor, found.bytes, found.bound) == (plain.floor, plain.bytes, "memory")
    wider = dataclasses.replace(counts(GB), work=(Work("int8", {"1": GB}, {"1": GB}), Work("rest", {}, {"1": 2 * GB})))
    slow = duration.graph_time("step", graph(GB), GB, nano, [wider], 2048, slots=1000)
    assert slow.moved == 3 * GB
    assert slow.expected == pytest.approx(3 * GB / (68.3e9 * rates_module.BANDWIDTH) + start, rel=1e-3)


def test_products_of_a_program(nano: rates_module.Platform) -> None:
    """The types in which the engine multiplies count, not those that were asked for; the profile is chosen by size."""
    many = {"tokens": 2 * GB}

    def program(kind: str, low: int, high: int) -> ProgramCounts:
        return ProgramCounts({"tokens": (low, high)}, 1, 0, 0, (Work(kind, many, {"1": 8}),), {})

    both = [program("int8", 1, 64), program("float16", 65, 2048)]
    short, long = (
        duration.graph_time("traverse", graph(GB), GB, nano, both, 2048, tokens=n, slots=n) for n in (64, 1280)
    )
    starts = 5 * rates_module.OPERATOR_CYCLES / 612e6
    rates = {kind: nano.reached.arithmetic[kind][0][1] for kind in ("int8", "float16")}
    assert short.expected == pytest.approx(64 * 2 * GB / rates["int8"] + starts, rel=1e-3)
    assert long.expected == pytest.approx(1280 * 2 * GB / rates["float16"] + starts, rel=1e-3)
    assert (short.bound, long.bound) == ("arithmetic", "arithmetic")


def test_plan_of_a_subject_with_programs(nano: rates_module.Platform) -> None:
    """A graph whose engine was counted is planned from it, and the others from their own counts."""
    plain, known = plan.plan(subject(), nano), plan.plan(subject(programs={"step": (counts(2 * GB),)}), nano)
    assert known.tokens_per_second[0] == plain.tokens_per_second[0]
    assert known.tokens_per_second[1] < 0.55 * plain.tokens_per_second[1]
    assert known.first_token == plain.first_token
    assert [stage.moved is None for stage in known.stages] == [True, True, False]


def test_scratch_memory_of_a_counted_engine_is_needed(nano: rates_module.Platform) -> None:
    """Where it holds more than its graph's tensors take at their largest, and not where it holds less."""
    plain = plan.plan(subject(), nano).memory
    less, more = (plan.plan(subject(programs={"step": (counts(GB, scratch=n),)}), nano).memory for n in (0, 3 * GB))
    assert less.activations == plain.activations
    assert 2 * GB < more.activations - plain.activations <= 3 * GB


def test_counts_of_more_layers() -> None:
    """Each further layer counts as much as the second one adds; a kind that one engine lacks is none there."""
    one, two = counts(5, 100), counts(8, 130)
    two = dataclasses.replace(two, work=(*two.work, Work("float16", {"1": 7}, {"tokens": 3})))
    found = grown(one, two, 4)
    assert (found.constants, found.scratch, found.kernels) == (14, 190, 30)
    work = {w.kind: (w.operations, w.bytes) for w in found.work}
    assert work["int8"] == ({"1": 28}, {"1": 14})
    assert work["float16"] == ({"1": 21}, {"tokens": 9})
    assert work["attention"] == ({}, {"capacity": 2000})
    assert found.avoidable == {"cache copy": {"1": 4000 * 2048}}


def test_shipped_counts() -> None:
    """Of each model that they name, for the precisions and graphs that a plan has; other models have none."""
    found = shipped.shipped()
    assert found.library.startswith("TensorRT for RTX 1.7")
    names = {(c.model, c.recipe, target) for c in found.engines for target in c.targets}
    for model in ("trol-1.8b", "trol-3.8b"):
        for target in ("jetson-jp6", "jetson-jp72", "rtx"):
            assert {(model, recipe, target) for recipe in ("fp16", "int8", "int4", "fp8")} <= names
            for recipe in ("int8", "int4"):
                assert "traverse" in shipped.programs(model, target, recipe, 4, 4)
    assert shipped.programs("trol-9b", "jetson-jp6", "int4", 4, 4) == {}
    for model, recipe, target in names:
        engines = shipped.programs(model, target, recipe, 4, 4)
        assert "step" in engines and engines.keys() <= {"vision", "traverse", "step"}
        step = engines["step"][0]
        assert step.moved({"capacity": 2048, "slots": 2048, "tokens": 1}) > step.constants > 0
        assert all(counts.scratch >= 0 for graph in engines.values() for counts in graph)
        assert not step.avoidable


def test_element_wise_operators_wait_for_memory(nano: rates_module.Platform) -> None:
    """On a CPU, where they take time; what a product reads and writes adds to its arithmetic there."""
    peak = dataclasses.replace(nano.peak, touches=((1, 1e9),))
    reached = dataclasses.replace(nano.reached, touches=((1, 1e9),), fused=False, operator=0.0, product=0.0)
    cpu = dataclasses.replace(nano, peak=peak, reached=reached)

    def run(kind: str) -> duration.GraphTime:
        one = Operation(kind, "float16", None, 1, {"1": 10**9}, 0, {"1": 10**7}, {})
        return duration.graph_time("step", Costs((one,), ({"1": 0},), {}), 0, cpu)

    assert (run("pointwise").expected, run("pointwise").bound) == (pytest.approx(0.01), "memory")
    assert (run("norm").expected, run("norm").bound) == (pytest.approx(0.01), "memory")
    rate = cpu.reached.arithmetic["float16"][0][1]
    assert (run("linear").expected, run("linear").bound) == (pytest.approx(0.01 + 1e9 / rate), "arithmetic")


def test_rates_between_points() -> None:
    points = ((10, 1.0), (1000, 100.0))
    assert [duration.rate_at(points, n) for n in (1, 10, 100, 1000, 5000)] == pytest.approx([1, 1, 10, 100, 100])


def test_verdicts(nano: rates_module.Platform) -> None:
    fits = plan.plan(subject(1.0), nano)
    assert (fits.verdict, fits.changes) == ("fits", ())
    memory = fits.memory
    assert memory.weights == 2.1 * GB, "traverse and step hold their weights each"
    assert (memory.cache, memory.activations) == (GB, GB // 10 + GB // 20 + GB // 8), (
        "an eighth is new rows, 256 of 2048"
    )
    assert memory.embedding == GB // 100, "a Jetson's GPU shares the memory in which the table is"
    assert memory.remains == memory.usable - memory.system - 3_385_000_000 - memory_module.RUNTIME_BYTES["gpu"]
    assert (
        plan.plan(subject(1.0, target="rtx"), rates_module.platform_of(*devices.find("rtx-4090"))).memory.embedding == 0
    )

    desktop = plan.plan(subject(1.75, cache_bytes=GB), nano, desktop=True)
    assert desktop.verdict == "fits with these changes"
    assert desktop.changes == ("boot without a desktop",)
    assert desktop.memory.remains < plan.RESERVE_BYTES, "the numbers are those of what was asked for"

    fewer = plan.plan(subject(2.1, cache_bytes=3 * GB), nano, desktop=True, reserve=3 * GB)
    assert fewer.changes == (
        "at most 1 tile(s) a picture (--max-tiles 1) and a context of 512 tokens",
        "boot without a desktop",
        "engines by layer (trol-edge build --engines layers)",
        "one K/V set (prefix_reuse=False; each question is computed again)",
    )
    assert plan.plan(subject(2.1, cache_bytes=2 * GB), nano, reserve=10 * GB).verdict == "does not fit"

    building = plan.plan(subject(2.4, cache_bytes=GB // 4), nano)
    assert building.verdict == "fits with these changes"
    assert [text.split(" ", 2)[2] for text in building.changes] == ["of swap while the engines are built"]

    shareable = subject(3.2, shareable_bytes=3 * GB)
    assert plan.plan(shareable, nano).changes == (
        "one copy of the decoder's weights for both engines (--shared-weights)",
    )
    shared = plan.plan(dataclasses.replace(shareable, shared=True), nano)
    assert (shared.verdict, shared.memory.weights) == ("fits", 3.5 * GB)
    assert shared.memory.build < plan.plan(shareable, nano).memory.build, "weights outside are not built in"

    smaller = plan.plan(subject(9.0), nano, smaller=lambda: iter([subject(1.0, "int4")]))
    assert smaller.changes == ("precision int4",)
    assert plan.plan(subject(9.0), nano).verdict == "does not fit"


def test_engines_by_layer(nano: rates_module.Platform) -> None:
    """They hold the decoder once, take turns with one scratch memory, and can do without the second K/V set."""
    made = subject(3.0, hidden_size=1000, programs={"traverse": (counts(GB, scratch=4 * GB),)})
    whole, layered = plan.plan(made, nano), plan.plan(made.in_layers(), nano)
    assert whole.changes == ("engines by layer (trol-edge build --engines layers)",)
    assert (whole.memory.weights, layered.memory.weights) == (6.1 * GB, 3.1 * GB)
    states, new = 3 * 4 * 1000 * 2048, GB // 2 // 10 // 8
    assert layered.memory.activations == GB // 10 + states + new, "the larger of the two peaks, once"
    assert (layered.verdict, layered.memory.cache) == ("fits", GB)
    held = dataclasses.replace(made.in_layers(), scratch_bytes=GB)
    assert plan.plan(held, nano).memory.activations == GB + states + new
    assert layered.memory.build < whole.memory.build / 3
    tight = plan.plan(subject(3.0, cache_bytes=2 * GB, most_tiles=0), nano, subject_module.Workload(answer=1900))
    assert [text.split(" (")[0] for text in tight.changes] == ["engines by layer", "one K/V set"]
    shareable = plan.plan(subject(3.2, shareable_bytes=3 * GB).in_layers(), nano, reserve=6 * GB)
    assert shareable.verdict == "does not fit", "engines by layer share nothing"


def test_shorter_context(nano: rates_module.Platform) -> None:
    found = plan.plan(subject(1.0, cache_bytes=5 * GB), nano, subject_module.Workload(tiles=1))
    assert found.changes[-1] == "a context of 512 tokens"


def test_one_set_on_a_cpu() -> None:
    """Only ONNX Runtime's back end can do without the second set; weights are shared by its graphs."""
    rates = dataclasses.replace(rates_module.platform_of(*devices.find(NANO)).reached, fused=False)
    found = plan.plan(
        subject(1.0, target="cpu", cache_bytes=GB), rates_module.platform_of_host(rates, 4 * GB, 3_000_000_000)
    )
    assert (found.memory.weights, found.memory.embedding) == (1.1 * GB, GB // 100)
    assert [text.split(" (")[0] for text in found.changes] == ["one K/V set"]
    assert found.memory.build == 0
    assert found.next_question is not None


def test_question_beyond_context(nano: rates_module.Platform) -> None:
    with pytest.raises(UsageError, match=r"9 tile\(s\) of 256 tokens.*do not fit a context of 2048"):
        plan.plan(subject(), nano, subject_module.Workload(tiles=9))


def test_other_target_says_nothing(nano: rates_module.Platform) -> None:
    with pytest.raises(UsageError, match="made for target cpu"):
        plan.plan(subject(target="cpu"), nano)


def test_best_precision_for_a_goal(nano: rates_module.Platform) -> None:
    plans = [plan.plan(subject(w, p), nano) for w, p in ((9.0, "fp16"), (2.0, "int8"), (1.0, "int4"))]
    fast = plans[2].tokens_per_second[1]
    assert compare.best(plans, None, None) is plans[1], "FP16 does not fit"
    assert compare.best(plans, None, fast - 1) is plans[2]
    assert compare.best(plans, None, fast + 1) is None
    assert compare.best(plans, 1e-6, None) is None


def test_fewer_second_passes(nano: rates_module.Platform) -> None:
    """Beside the plan: the prompt by its counts, whatever is known of the engines, less cache, the same answer."""
    half = graph(GB, GB // 10)
    half = dataclasses.replace(
        half, operations=(dataclasses.replace(half.operations[0], flops={"tokens": 10**9 // 2}),)
    )
    less = subject(twice=5, second_bytes=GB // 4)
    less = dataclasses.replace(less, graphs={**less.graphs, "traverse": half})
    plain = plan.plan(subject(), nano, fewer=less)
    assert plain.fewer is not None and plain.fewer.twice == 5
    assert plain.memory.cache - plain.fewer.memory.cache == GB // 4
    alone = plan.plan(less, nano)
    assert plain.fewer.first_token == pytest.approx(alone.first_token)
    assert plain.fewer.first_token[1] < plain.first_token[1] and plain.tokens_per_second == alone.tokens_per_second
    known = plan.plan(subject(programs={"traverse": (counts(2 * GB, scratch=GB),)}), nano, fewer=less)
    assert known.fewer is not None
    held = [p.memory.activations - q.memory.activations for p, q in ((known, plain), (known.fewer, plain.fewer))]
    assert held[0] == held[1] > 0
    seen = known.stages[0].expected
    share = (plain.fewer.first_token[1] - seen) / (plain.first_token[1] - seen)
    assert known.fewer.first_token[1] - seen == pytest.approx((known.first_token[1] - seen) * share)
    assert plan.to_dict(known)["fewer"]["first_token"]["expected"] == known.fewer.first_token[1]
    assert plan.to_dict(alone)["fewer"] is None and plan.to_dict(alone)["passes"] == {"layers": 10, "twice": 5}


def test_the_share_of_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Said to be an assumption, and in how many layers."""
    assert main(["plan", "--model", "trol-nano", "--device", NANO, "--precision", "fp16"]) == 0
    text = capsys.readouterr().out
    assert "8 layers x 2 passes" in text and "first token (*)" in text
    assert "(*) an assumption: a second pass in 4 of 8 layers" in text


def test_bundle_on_the_robot(nano_bundle: Path) -> None:
    """No torch and no onnx: from the manifest, on a machine whose rates are measured."""
    code = f"""
import sys
from trol_edge.runtimes import rates
rates.SECONDS, rates.WORKING_SETS, rates.TENSORS = 0.002, (1 << 20, 4 << 20), (1 << 16, 1 << 20)
from trol_edge.cli.main import main
code = main(["plan", {str(nano_bundle)!r}, "--json"])
assert not {{"torch", "onnx", "onnx_ir"}} & set(sys.modules), "the thin side imported the workshop"
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["plans"]
    assert (found["device"], found["precision"]) == ("host", "fp32")
    reached = found["reached"]
    assert all(rate > 0 for points in (reached["reads"], reached["touches"]) for _, rate in points)
    assert {kind: len(points) for kind, points in reached["arithmetic"].items()} == {
        "float32": 4,
        "int8": 4,
        rates_module.PACKED: 4,
        "attention": 2,
    }
    assert set(reached["stored"]) == {"int8", "int4"}
    stages = {stage["graph"]: stage for stage in found["stages"]}
    assert stages.keys() == {"vision", "traverse", "step"}
    assert all(stage["expected"] > 0 for stage in stages.values())


def test_bundle_without_counts(nano_bundle: Path, tmp_path: Path) -> None:
    """One that an older version wrote: it opens, and plan says what to do."""
    manifest = Bundle(nano_bundle).manifest
    graphs = {name: dataclasses.replace(info, costs=None) for name, info in manifest.graphs.items()}
    for file in nano_bundle.iterdir():
        if file.name != MANIFEST:
            shutil.copy(file, tmp_path)
    write_manifest(tmp_path, dataclasses.replace(manifest, graphs=graphs))
    data = json.loads((tmp_path / MANIFEST).read_text())
    for info in data["graphs"].values():
        del info["costs"]
    from trol_edge.bundle.folder import digest_of

    data["manifest_sha256"] = digest_of({k: v for k, v in data.items() if k != "manifest_sha256"})
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"never counted.*export it again"):
        subject_module.subject_of(Bundle(tmp_path))


@pytest.mark.slow  # every precision of every device is traced
@pytest.mark.parametrize("model", [("trol-nano",), ("trol-nano-phi3", "--tiles", "1")], ids=str)
def test_command(model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """A model, two devices, two precisions, one goal; the table and the JSON say the same."""
    given = ["plan", "--model", *model, "--device", NANO, "--device", "agx-thor"]
    given += ["--precision", "fp16", "--precision", "int4", "--goal-tokens-per-second", "10"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(p["device"], p["precision"]) for p in found["plans"]] == [
        (device, precision) for device in (f"{NANO}:15W", "agx-thor:MAXN") for precision in ("fp16", "int4")
    ]
    assert found["best"] == {f"{NANO}:15W": "fp16", "agx-thor:MAXN": "fp16"}
    for p in found["plans"]:
        assert p["verdict"] == "fits"
        assert 0 < p["first_token"]["floor"] < p["first_token"]["expected"]
        assert p["tokens_per_second"]["floor"] > p["tokens_per_second"]["expected"] > 10
    assert main(["plan"]) == 2
    assert "either a bundle folder or --model" in capsys.readouterr().err
    assert main(["plan", "--model", "trol-nano-phi3", "--device", "xavier"]) == 1
    assert "not in the table" in capsys.readouterr().err


@pytest.mark.slow  # each peer costs six traces
@pytest.mark.parametrize("peer", plan_check.PEERS)
def test_published_figures(peer: str) -> None:
    """What others measured with comparable models on a board comes out within 30 percent, in both power modes."""
    rows = plan_check.published_rows([peer])
    assert len(rows) == sum(figure.peer == peer for figure in plan_check.FIGURES) > 0
    assert {figure.peer for figure in plan_check.FIGURES} == set(plan_check.PEERS)
    assert max(abs(row["off_percent"]) for row in rows) < 30
