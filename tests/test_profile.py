"""`trol-edge profile`: what is read from a machine, when a run counts, what is slower, and one real run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NANO
from tests.machines import BOARDS, RUN, TIME, described, made, tree
from trol_edge.bundle.manifest import Bundle
from trol_edge.cli.main import main
from trol_edge.errors import BackendError, BundleError, ContextError, ImageError, UsageError
from trol_edge.machine import sensors as jetson
from trol_edge.measure import bench, process, starts
from trol_edge.measure import peaks as peaks_module
from trol_edge.measure import run as profile_run
from trol_edge.measure.compare import compare, judge
from trol_edge.measure.record import Profile, load, per_answer, percentiles, pooled, tokens_per_s
from trol_edge.measure.samples import energy, integral, power, summary, verdict
from trol_edge.runtime import Runtime

__all__ = ["tree"]  # a fixture
Tree = Callable[..., Path]


def verdict_of(profile: Profile) -> Any:
    """The verdict on its only run."""
    return verdict(profile, profile.bundles[0], profile.bundles[0].runs[0])


def energy_of(profile: Profile) -> Any:
    """The energy of its only run."""
    return energy(profile.bundles[0], profile.bundles[0].runs[0])


# -- what a machine says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_rails_of_each_board(tree: Tree, board: str) -> None:
    """Watts by name as tegrastats shows them; sums of shunts and rails that are not connected are left out."""
    data = described(board)
    assert "not recorded on a device" in data["source"]
    sample = jetson.Sensors(tree(board)).sample(os.getpid())
    rails = {name.removeprefix("power_w/"): value for name, value in sample.items() if name.startswith("power_w/")}
    assert rails == pytest.approx(data["expect_w"])
    assert jetson.Sensors(tree(board)).missing() == []


def test_orin_nano(tree: Tree) -> None:
    """Identity, mode by its name, clocks and caps, memory, counters; gated sensors are None, never 0."""
    machine = jetson.Sensors(tree("orin-nano"))
    identity = machine.identity()
    assert "Orin Nano" in str(identity["model"]) and identity["board"] == "p3767" and identity["l4t"] == "36.4.7"
    assert (identity["power_mode"], identity["power_mode_name"]) == (2, "MAXN_SUPER")
    assert (identity["gpu_max_hz"], identity["emc_cap_hz"], identity["cores"]) == (1.02e9, 3.199e9, 6)
    sample = machine.sample(os.getpid())
    assert sample["gpu_load"] == pytest.approx(0.992) and sample["gpu_hz"] == 1.02e9 and sample["cpu_hz"] == 1.728e9
    assert sample["cma_free_bytes"] == 245760 * 1024 and sample["available_bytes"] == 7258112 * 1024
    assert sample["largest_free_block_bytes"] == 4 << 20  # of tegrastats' "lfb 61x4MB"
    assert sample["counter/oc3"] == 12
    assert sample["temperature_c/tj"] == pytest.approx(49.593)
    assert [sample[f"temperature_c/cv{i}"] for i in range(3)] == [None] * 3
    assert machine.total_power() == ("power_w/VDD_IN",)
    assert sample["rss_bytes"] and sample["rss_bytes"] > 1e6  # this process, not one of the tree


def test_agx_orin(tree: Tree) -> None:
    """Its total is a sum; a gated sensor reads -256 degrees there and is left out."""
    machine = jetson.Sensors(tree("agx-orin"))
    sample = machine.sample(os.getpid())
    assert sample["temperature_c/GPU-therm"] is None and sample["temperature_c/tj-therm"] == 42
    assert sample["gpu_load"] == 0 and sample["gpu_hz"] == 1.3005e9
    assert machine.identity()["power_mode_name"] == "MAXN"
    assert set(machine.total_power()) == {"power_w/VDD_GPU_SOC", "power_w/VDD_CPU_CV", "power_w/VIN_SYS_5V0"}


def test_thor(tree: Tree) -> None:
    """Its total has a chip of its own; memory has a clock, the GPU's load no file."""
    machine = jetson.Sensors(tree("thor"))
    sample = machine.sample(os.getpid())
    assert machine.total_power() == ("power_w/VIN",)
    assert (sample["gpu_hz"], sample["emc_hz"], sample["emc_cap_hz"]) == (1.575e9, 4.266e9, 4.266e9)
    assert "gpu_load" not in sample and "cma_free_bytes" not in sample
    assert machine.identity()["power_mode_name"] == "120W"


def test_what_a_tree_lacks_is_said(tree: Tree) -> None:
    """Missing rails, counters, clocks, mode, mode names: partial, in words, and no energy without the total."""
    path = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    root = tree("orin-nano", {f"{path}/in1_label": None, f"{path}/in3_label": None, "var/lib/nvpmodel/status": None,
                              "sys/class/hwmon/hwmon3/oc2_event_cnt": None, "etc/nvpmodel.conf": None,
                              "sys/class/devfreq/17000000.gpu/device/of_node/name": None})  # fmt: skip
    machine = jetson.Sensors(root)
    assert machine.missing() == [
        "rail VDD_IN is missing", "rail VDD_SOC is missing", "energy needs VDD_IN, so there is none",
        "over-current counter oc2 is missing", "GPU clock is missing", "power mode is missing",
    ]  # fmt: skip
    assert machine.total_power() == () and energy_of(made(root=root)) is None
    assert set(machine.missing()) <= set(verdict_of(made(root=root)).partial)


def test_nothing_at_all_is_no_error(tmp_path: Path) -> None:
    """An empty tree: no identity, no sensors, and a word about it."""
    machine = jetson.Sensors(tmp_path)
    assert set(machine.identity().values()) == {None}
    assert machine.missing() == ["no power sensor here (no rails, no RAPL): no energy"]
    assert machine.sample(os.getpid())["largest_free_block_bytes"] is None


def test_rapl(tmp_path: Path) -> None:
    """A package's counter becomes watts, its wrap no reading; a counter for root only is named."""
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0")
    (zone / "energy_uj").write_text("1000")
    assert jetson.Sensors(tmp_path).total_power() == ("energy_uj/package-0",)
    counter = (1e6 * 7 * TIME) % 40e6  # 7 W, with wraps
    profile = made(columns={"energy_uj/package-0": counter})
    measured = dataclasses.replace(profile.bundles[0], total_power=("energy_uj/package-0",))
    found = power(measured)
    assert found is not None and np.allclose(found[1], 7) and len(found[1]) == len(TIME) - 1 - 2
    (zone / "energy_uj").write_text("")  # as one that this user may not read: no number comes
    closed = jetson.Sensors(tmp_path)
    assert closed.missing() == ["RAPL package-0 is there, but only root may read it"] and closed.total_power() == ()


@pytest.mark.parametrize("interval", ["0.02", "0"])
def test_the_sampler_is_a_light_process(tree: Tree, interval: str) -> None:
    """Run as a file it needs the standard library only, ends when whoever started it does, and may be late (0)."""
    command = [sys.executable, "-I", "-S", jetson.__file__, str(tree("orin-nano")), str(os.getpid()), interval]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdin is not None and sampler.stdout is not None
        rows = [json.loads(sampler.stdout.readline()) for _ in range(4)]
        sampler.stdin.close()
        assert sampler.wait(30) == 0
    times = [row["t_s"] for row in rows]
    assert times == sorted(times) and times[0] < time.monotonic()
    assert all(row["power_w/VDD_IN"] == pytest.approx(5.971) and row["temperature_c/cv0"] is None for row in rows)
    assert "cpu" not in rows[0] and {"cpu", "cpu_own"} <= set(rows[1])


# -- when a run counts -------------------------------------------------------------------------------------------------


def test_a_good_run_is_valid(tree: Tree) -> None:
    """Nothing is wrong; what is gated is named as partial, once."""
    found = verdict_of(made(root=tree("orin-nano"), target="jetson-jp6"))
    assert found.invalid == [] and found.remarks == []
    assert [text for text in found.partial if "cv0" in text] == [
        "temperature cv0: none of its samples could be read, gated"
    ]


def dipped(value: float, low: float, samples: int) -> list[float]:
    """A column that is low for `samples` samples, four seconds in."""
    column = np.full(len(TIME), value)
    column[40 : 40 + samples] = low
    return column.tolist()


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("gpu_hz", dipped(1.02e9, 6.12e8, 3), "GPU clock sagged to 612 of 1020 MHz, 3 samples in a row"),
        ("gpu_max_hz", dipped(1.02e9, 5e8, 5), "GPU clock sagged to 500 of 1020 MHz, 5 samples"),
        ("emc_cap_hz", dipped(3.199e9, 2.133e9, 4), "memory clock sagged to 2133 of 3199 MHz"),
        ("counter/oc3", np.repeat([12.0, 14.0], len(TIME) // 2), r"counter oc3 \(instantaneous.* rose by 2"),
    ],
)
def test_throttling_is_invalid(tree: Tree, column: str, values: Any, reason: str) -> None:
    """Clocks that sag under load, ceilings that come down, counters that move."""
    found = verdict_of(made(root=tree("orin-nano"), target="jetson-jp6", columns={column: values}))
    assert len(found.invalid) == 1
    assert re.search(reason, found.invalid[0]), found.invalid


def test_what_is_no_throttling(tree: Tree) -> None:
    """Two low samples, a GPU that rests, a counter that does not move, a dip outside the run, a CPU bundle."""
    root = tree("orin-nano")
    before = np.full(len(TIME), 1.02e9)
    before[:15] = 3e8
    for target, columns in (
        ("jetson-jp6", {"gpu_hz": dipped(1.02e9, 3e8, 2)}),
        ("jetson-jp6", {"gpu_hz": dipped(1.02e9, 3e8, 9), "gpu_load": dipped(0.99, 0.1, 9)}),
        ("jetson-jp6", {"gpu_hz": before}),
        ("jetson-jp6", {"counter/oc3": 99.0}),
        ("cpu", {"gpu_hz": 3e8}),
    ):
        assert verdict_of(made(root=root, target=target, columns=columns)).invalid == [], columns
    throttled = made(columns={"cpu_hz": dipped(3e9, 1e9, 4)})
    assert verdict_of(throttled).invalid == ["CPU clock sagged to 1000 of 3000 MHz, 4 samples in a row"]


def without(profile: Profile, kept: Any) -> Profile:
    """The profile with some of its samples only."""
    measured = profile.bundles[0]
    samples = {name: tuple(np.array(column, object)[kept]) for name, column in measured.samples.items()}
    return dataclasses.replace(profile, bundles=(dataclasses.replace(measured, samples=samples),))


def test_gaps_are_invalid() -> None:
    """One long gap, and many short ones; and samples that did not fall into the run at all."""
    gap = without(made(), (TIME < 5) | (TIME > 5.75))
    assert "0.90 s without a sample" in verdict_of(gap).invalid[0]
    sparse = without(made(), np.arange(len(TIME)) % 4 == 0)
    assert re.match(r"samples cover \d %", verdict_of(sparse).invalid[0])
    found = verdict_of(without(made(), TIME < 1))
    assert found.invalid and "no sample fell into this run" in " ".join(found.partial)


def test_partial_rails_and_busy_machines_are_said(tree: Tree) -> None:
    """A rail that is silent now and then, no counts, no tokenizer, others at work."""
    silent: list[float | None] = [None if i % 10 == 0 else 2.3 for i in range(len(TIME))]
    profile = made(root=tree("orin-nano"), columns={"power_w/VDD_SOC": silent, "cpu_own": 0.5})
    run = profile.bundles[0].runs[0]
    bare = dataclasses.replace(run, work=None, answers=(dataclasses.replace(run.answers[0], detokenise_ms=()),))
    measured = dataclasses.replace(profile.bundles[0], runs=(bare,))
    found = verdict(profile, measured, bare)
    said = " / ".join(found.partial)
    assert re.search(r"rail VDD_SOC: (90|91) of 10\d of its samples could be read", said), said
    assert "no counts in this bundle" in said and "no tokenizer in this bundle" in said
    assert found.remarks == ["other processes kept 1.4 processors busy: these figures are too slow"]


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_energy_is_the_area_under_the_power(tree: Tree) -> None:
    """10 W while answering, 4 W at rest: by hand, per token and per answer, gross and net."""
    watts = np.where(np.abs(TIME - sum(RUN) / 2) <= (RUN[1] - RUN[0]) / 2 + 0.05, 10.0, 4.0)
    profile = made(root=tree("orin-nano"), columns={"power_w/VDD_IN": watts}, jitter=0.0)
    answer = profile.bundles[0].runs[0].answers[0]
    decode_s, answer_s = (answer.total_ms - answer.first_token_ms) / 1e3, answer.total_ms / 1e3
    found = energy_of(profile)
    assert found.mean_w == pytest.approx(10) and found.idle_w == pytest.approx(4)
    assert found.token_j == pytest.approx(10 * decode_s / 40)
    assert found.token_net_j == pytest.approx(6 * decode_s / 40)
    assert found.answer_j == pytest.approx(10 * answer_s) and found.answer_net_j == pytest.approx(6 * answer_s)
    ramp = np.arange(5.0)
    assert integral(ramp, 2 * ramp, 0.5, 3.25) == pytest.approx(3.25**2 - 0.5**2)
    assert energy_of(made(root=tree("agx-orin"))).mean_w == pytest.approx(2.39 + 0.796 + 3.522)


def test_percentiles_and_rates() -> None:
    """Interpolated percentiles; medians per answer; tokens after the first by their time."""
    assert percentiles(np.arange(101.0)) == (50, 90, 99)
    profile = made(jitter=0.0)
    run = profile.bundles[0].runs[0]
    assert len(pooled(run)["step_ms"]) == 20 * 40 and len(per_answer(run)["step_ms"]) == 20
    assert tokens_per_s(run) == pytest.approx(40 / (0.4 + 41 * 0.02e-3))
    row = summary(profile)[0]
    assert row["step_ms"] == {"p50": pytest.approx(10), "p90": pytest.approx(10), "p99": pytest.approx(10), "n": 800}
    assert row["cold_ms"]["p50"] == 600 and row["warm_ms"]["p50"] == 500 and row["energy"] is None
    assert row["second_first_token_ms"]["p50"] == pytest.approx(20)


# -- against a baseline ------------------------------------------------------------------------------------------------


def test_the_same_again_is_not_slower() -> None:
    """Another draw of the same noise."""
    old, new = made(), made(names=("x-fp32", "trol-nano-fp32"))
    new = dataclasses.replace(new, bundles=new.bundles[1:])  # another seed
    found = compare(old, new)
    assert found.slower == [] and found.unjudged == () and len(found.changes) == 12


@pytest.mark.parametrize(("how", "what"), [({"step_ms": 11.5}, "decode step"), ({"first_ms": 120.0}, "prefill")])
def test_what_is_slower_is_named(how: dict[str, float], what: str) -> None:
    """15 and 20 % beyond noise of 2 %; the other stages are not blamed."""
    slower = {change.what for change in compare(made(), made(**how)).slower}
    assert what in slower
    assert ("decode step" in slower) == (what == "decode step")
    assert compare(made(**how), made()).slower == []  # quicker is not slower


def test_noise_is_not_slower() -> None:
    """15 % more with a spread of 40 %, or with a run that drifts by itself: not judged to be slower."""
    rng = np.random.default_rng(0)
    wild = [np.abs(10 * (1 + 0.4 * rng.standard_normal(12))) for _ in range(2)]
    assert not judge("here", "prefill", "ms", wild[0], wild[1] * 1.15).slower
    drifting = np.repeat([10.0, 11.0, 12.5], 5)
    assert not judge("here", "prefill", "ms", drifting, drifting * 1.15).slower
    steady = np.repeat(10.0, 15)
    assert judge("here", "prefill", "ms", steady, steady * 1.15).slower
    assert not judge("here", "prefill", "ms", steady, steady * 1.04).slower
    few = np.array([100.0, 110.0, 120.0])
    assert judge("here", "start", "ms", few, few + 40).slower and not judge("here", "start", "ms", few, few + 15).slower
    tiny = np.repeat(0.01, 15)  # half of nothing
    assert not judge("here", "detokenise", "ms", tiny, tiny * 1.5).slower


def test_an_invalid_run_is_not_judged() -> None:
    """Neither then nor now."""
    bad = without(made(step_ms=20.0), (TIME < 5) | (TIME > 6.5))
    for pair in ((made(), bad), (bad, made())):
        found = compare(*pair)
        assert not [change for change in found.changes if change.what == "decode step"]
        assert len(found.unjudged) == 1 and "without a sample" in found.unjudged[0]


def test_other_machines_bundles_and_cases_are_refused(tree: Tree) -> None:
    """With what differs, and what to do."""
    nano = made(root=tree("orin-nano"))
    with pytest.raises(UsageError, match=r"another machine \(model .*Orin Nano.*take a baseline on this one"):
        compare(made(), nano)
    mode = dataclasses.replace(nano, machine=nano.machine | {"power_mode": 0, "power_mode_name": "15W"})
    with pytest.raises(UsageError, match="power mode name '15W' there, 'MAXN_SUPER' here"):
        compare(mode, nano)
    with pytest.raises(UsageError, match=r"other bundles \(trol-nano cpu int8 2048\)"):
        compare(made(names=("trol-nano-int8",)), made())
    run = made().bundles[0].runs[0]
    other = dataclasses.replace(run, case=dataclasses.replace(run.case, size=(320, 240)))
    old = dataclasses.replace(made(), bundles=(dataclasses.replace(made().bundles[0], runs=(other,)),))
    with pytest.raises(UsageError, match="the baseline measured other cases"):
        compare(old, made())
    new = dataclasses.replace(made().bundles[0], library="onnxruntime 2")
    assert (
        "onnxruntime 1 then, onnxruntime 2 now"
        in compare(made(), dataclasses.replace(made(), bundles=(new,))).remarks[0]
    )


# -- the file ----------------------------------------------------------------------------------------------------------


def test_it_is_written_and_read(tmp_path: Path) -> None:
    """Equal; and with its schema in it."""
    profile = made()
    profile.save(tmp_path / "deep" / "profile.json")
    assert load(tmp_path / "deep" / "profile.json") == profile
    data = json.loads((tmp_path / "deep" / "profile.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("trol-edge-profile", 1)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["profile.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        profile.save(tmp_path / "file" / "profile.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "not readable as JSON"),
        (lambda data: [1], "not a profile"),
        (lambda data: {"format": "trol-edge-bundle"}, "not a profile"),
        (lambda data: data | {"schema_version": 7}, "profile schema 7, this trol-edge reads schema 1"),
        (lambda data: data | {"colour": "red"}, "unknown key 'colour'"),
        (lambda data: {k: v for k, v in data.items() if k != "peaks"}, "missing key 'peaks'"),
        (lambda data: data | {"created": 7}, "expected str, found 7"),
        (lambda data: data["bundles"][0]["samples"]["rss_bytes"].pop() and data, "samples of .* are damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    """Other schemas, other files, damaged ones: before anything is measured, with what to do."""
    made().save(tmp_path / "p.json")
    changed = change(json.loads((tmp_path / "p.json").read_text()))
    (tmp_path / "p.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "p.json")
    with pytest.raises(UsageError, match=r"gone\.json"):
        load(tmp_path / "gone.json")


# -- a real run --------------------------------------------------------------------------------------------------------


def job(bundle: Path, **more: Any) -> process.Job:
    """One quick case."""
    plain: dict[str, Any] = {
        "bundle": str(bundle), "sizes": ((160, 120),), "prompt_tokens": (None,), "image": None, "tokens": 6,
        "warmup": 1, "runs": 2, "threads": None, "interval_s": 0.05, "root": "/",
    }  # fmt: skip
    return process.Job(**(plain | more))


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait for an idle second."""
    monkeypatch.setattr(bench, "IDLE_S", 0.1)


@pytest.mark.usefixtures("no_rest")
def test_answers_are_those_of_the_runtime(each_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as `generate`; stages add up; the second question reuses picture and prefix; case by case."""
    pushed: list[int] = []

    class Noted(bench.TextStream):
        """The stream of the answers that are measured; opening a bundle decodes text, too."""

        def push(self, token: int) -> str:
            pushed.append(token)
            return super().push(token)

    monkeypatch.setattr(bench, "TextStream", Noted)
    measured = bench.measure(job(each_bundle, image=str(NANO / "scene.png"), sizes=()))
    run = measured.runs[0]
    with Runtime(each_bundle) as runtime:
        wanted = [runtime.generate(question, NANO / "scene.png", max_new_tokens=6) for question in bench.QUESTIONS]
    assert wanted[0].prompt_tokens == run.case.prompt_tokens
    for i, answer in enumerate(wanted):  # after their end the profile goes on
        assert tuple(pushed[6 * i : 6 * i + len(answer.token_ids)]) == answer.token_ids
    assert run.case.size is not None and run.case.image_tokens % 64 == 0 and run.case.tokens == 6
    assert (len(run.warmup), len(run.answers), len(run.second)) == (1, 2, 2)
    for answer in (*run.answers, *run.second):
        assert (len(answer.step_ms), len(answer.sample_ms), len(answer.detokenise_ms)) == (5, 6, 6)
        stages = answer.preprocess_ms + answer.vision_ms + answer.prefill_ms
        assert 0 < stages <= answer.first_token_ms <= answer.total_ms
        rest = sum(answer.step_ms) + sum(answer.sample_ms[1:]) + sum(answer.detokenise_ms[1:])
        assert answer.first_token_ms + rest <= answer.total_ms
    assert all(answer.reused_tokens == 0 for answer in run.answers)
    assert all(answer.reused_tokens > run.case.image_tokens for answer in run.second)
    assert run.peak_rss_bytes and run.peak_rss_bytes > 2e7
    assert measured.load_s[0] < measured.load_s[1] <= run.start_s < run.end_s
    assert {"t_s", "rss_bytes", "available_bytes"} <= set(measured.samples)


@pytest.mark.usefixtures("no_rest")
def test_a_sweep(nano_bundle: Path, tree: Tree) -> None:
    """Sizes x prompt lengths, no picture among them; on a board's tree the samples have its rails."""
    measured = bench.measure(
        job(nano_bundle, sizes=((320, 200), None), prompt_tokens=(None, 300), root=str(tree("orin-nano")), warmup=0)
    )
    cases = [(run.case.size, run.case.prompt_tokens, run.case.image_tokens) for run in measured.runs]
    assert [(size, image) for size, _, image in cases] == [((320, 200), 64)] * 2 + [(None, 0)] * 2
    assert [tokens for _, tokens, _ in cases][1::2] == [300, 300]
    assert "vision_ms" not in pooled(measured.runs[2])
    assert measured.total_power == ("power_w/VDD_IN",)
    assert all(watts == pytest.approx(5.971) for watts in measured.samples["power_w/VDD_IN"])
    assert set(measured.samples["temperature_c/cv0"]) == {None}


@pytest.mark.usefixtures("no_rest")
def test_a_bundle_without_a_tokenizer(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up ids stand for the text; nothing is detokenised, and that is said."""
    monkeypatch.setattr(bench, "Runtime", without_tokenizer)
    measured = bench.measure(job(nano_bundle, prompt_tokens=(None, 120), runs=1, warmup=0))
    assert [run.case.prompt_tokens for run in measured.runs] == [80, 120]
    assert measured.runs[0].answers[0].detokenise_ms == ()
    assert measured.runs[0].second[0].reused_tokens == 76


def without_tokenizer(*arguments: Any, **more: Any) -> Runtime:
    """A Runtime that serves token ids only."""
    runtime = Runtime(*arguments, **more)
    runtime.model.tokenizer = None
    return runtime


@pytest.mark.usefixtures("no_rest")
def test_bad_cases_are_refused(nano_bundle: Path, tmp_path: Path) -> None:
    """Prompts that are too short or too long, sizes, bundles, pictures, numbers: in words."""
    with pytest.raises(UsageError, match="a prompt of 20 tokens is too short: template, picture and question take"):
        bench.measure(job(nano_bundle, prompt_tokens=(20,)))
    with pytest.raises(ContextError, match="do not fit the context of"):
        bench.measure(job(nano_bundle, prompt_tokens=(5000,)))
    with pytest.raises(UsageError, match="a picture of 0x5 is not measured"):
        bench.measure(job(nano_bundle, sizes=((0, 5),)))
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        profile_run.profile([tmp_path])
    with pytest.raises(ImageError):
        profile_run.profile([nano_bundle], image=tmp_path / "gone.png")
    with pytest.raises(UsageError, match="no bundle to profile"):
        profile_run.profile([])
    with pytest.raises(UsageError, match="tokens, runs: too small"):
        profile_run.profile([nano_bundle], tokens=1, runs=0)


def test_an_error_crosses_the_process(nano_bundle: Path) -> None:
    """The measuring process's own error arrives as what it was; its death as one sentence."""
    with pytest.raises(UsageError, match="a prompt of 20 tokens is too short"):
        process.in_process("bench.measure_job", job(nano_bundle, prompt_tokens=(20,)))
    with pytest.raises(BackendError, match=r"the process that measures it ended: ImportError.*nothing_of_this_name"):
        process.in_process("bench.nothing_of_this_name", job(nano_bundle))


def test_the_page_cache_is_really_cold(nano_bundle: Path, tmp_path: Path) -> None:
    """mincore says how much of some files is cached; reading brings them back."""
    data = tmp_path / "data"
    data.write_bytes(bytes(1 << 20))
    (tmp_path / "empty").write_bytes(b"")
    assert starts.cached_share([data, tmp_path / "empty"]) == 1.0
    assert starts.cached_share([]) is None


def test_counts_make_the_roofline(nano_bundle: Path) -> None:
    """Operations and bytes of each stage from the graphs' costs, chunk by chunk; without them None."""
    bundle = Bundle(nano_bundle)
    manifest = bundle.manifest
    if all(getattr(graph, "costs", None) is None for graph in manifest.graphs.values()):
        assert bench.work(bundle, [5] * 10, 4) is None

    class Costs:
        """1 operation per token and 1 byte per token before it, as the interface has it."""

        def at(self, **dims: int) -> Any:
            flops = dims.get("tokens", dims.get("images", 1))
            return dataclasses.make_dataclass("Cost", ["flops", "weight_bytes", "activation_bytes", "cache_bytes"])(
                flops, 10, flops, dims.get("slots", 0)
            )

    graphs = {name: with_costs(graph, Costs()) for name, graph in manifest.graphs.items()}
    bundle.manifest = dataclasses.replace(manifest, graphs=graphs)
    ids = [5] * 300
    ids[3:67] = [manifest.spec.image_token_id] * 64
    found = bench.work(bundle, ids, 40)
    assert found is not None and set(found) == {"vision", "prefill", "step"}
    assert (found["vision"].flops, found["vision"].bytes) == (1, 11)
    assert (found["prefill"].flops, found["prefill"].bytes) == (300, 20 + 300 + 256 + 300)
    assert (found["step"].flops, found["step"].bytes) == (1, 10 + 1 + 320)
    text_only = bench.work(bundle, [5] * 10, 4)
    assert text_only is not None and "vision" not in text_only


def with_costs(graph: Any, costs: Any) -> Any:
    """The graph's description with costs, whether or not the manifest has such a field."""
    twin = dataclasses.replace(graph)
    object.__setattr__(twin, "costs", costs)
    return twin


def test_the_command(nano_bundle: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, JSON file and page of one run, in processes of its own; then the same against a quicker past."""
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    quick = ["--size", "120x90", "--runs", "2", "--warmup", "1", "--tokens", "4"]
    assert main(["profile", str(nano_bundle), *quick, "--starts", "1", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    for text in ("preprocess", "vision + projector", "prefill", "decode step", "detokenise", "tokens/s", "peak memory",
                 "second question, first token", "start, page cache cold", "the projector is a part of"):  # fmt: skip
        assert text in said, text
    profile = load(out / "profile.json")
    measured = profile.bundles[0]
    assert measured.bundle.model == "trol-nano" and measured.bundle.precision == "fp32"
    cold, warm = measured.starts
    assert cold.cold and not warm.cold
    assert cold.import_ms + cold.load_ms + cold.answer_ms == pytest.approx(cold.total_ms)
    assert warm.cached_share is None or warm.cached_share > 0.9
    assert profile.peaks is not None and profile.peaks.flops_per_s > 1e8 and profile.peaks.bytes_per_s > 1e8
    assert "<figure" in (out / "profile.html").read_text(encoding="utf-8")

    quicker = json.loads((out / "profile.json").read_text())
    for answer in quicker["bundles"][0]["runs"][0]["answers"]:
        answer["prefill_ms"] /= 1000
    (tmp_path / "old.json").write_text(json.dumps(quicker))
    arguments = [*quick, "--starts", "0", "--baseline", str(tmp_path / "old.json"), "-o", str(out)]
    assert main(["profile", str(nano_bundle), *arguments]) == 1
    said = capsys.readouterr().out
    assert ("slower: " in said and "prefill" in said) or "not judged" in said
    assert "Against the baseline" in (out / "profile.html").read_text(encoding="utf-8")

    assert main(["profile", str(nano_bundle), "--size", "big"]) == 2
    assert "write it as 640x480" in capsys.readouterr().err
    assert main(["profile", str(nano_bundle), "--baseline", str(tmp_path / "gone.json")]) == 1
    assert "gone.json: not readable" in capsys.readouterr().err


def test_peaks_of_a_jetson(tree: Callable[..., Path]) -> None:
    """The table's, in the power mode that is set; none where the table does not know the mode."""
    for board, changes, tera, giga in (
        ("orin-nano", {}, 16.7, 102.4),
        ("orin-nano", {"var/lib/nvpmodel/status": "pmode:0000 fmode:fanNull\n"}, 10.0, 68.3),
        ("agx-orin", {}, 42.6, 204.8),
        ("agx-orin", {"var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n"}, 20.1, 204.8),
        ("thor", {"var/lib/nvpmodel/status": "pmode:0000 fmode:default\n"}, 258, 273),
    ):
        peaks = peaks_module.table_peaks(jetson.Sensors(tree(board, changes)))
        assert peaks is not None and peaks.source.startswith("table of devices: Jetson ")
        assert (peaks.flops_per_s / 1e12, peaks.bytes_per_s / 1e9) == (pytest.approx(tera, rel=0.01), giga)
    assert peaks_module.table_peaks(jetson.Sensors(tree("thor"))) is None
