"""`fbiedge bench`: the structure and the arithmetic of what it reports. Nothing here depends on how fast a machine is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import onnx
import pytest
from onnx import TensorProto
from support.tiny_model import tiny_model

from fbiedge import cli
from fbiedge.bench import (
    BenchOptions,
    BenchReport,
    Spread,
    Step,
    Worker,
    bench,
    weight_bytes_per_token,
)
from fbiedge.errors import FbiEdgeError, ModelFileError, UsageError
from fbiedge.inspection import inspect
from fbiedge.kv_cache import Precision, cache_bytes
from fbiedge.machine import describe_machine, peak_rss_bytes
from fbiedge.model_file import ModelFile
from fbiedge.read_speed import ReadLoop

from .conftest import NO_LIBRARY

QUICK = BenchOptions(prompt_tokens=5, gen_tokens=3, depths=(0, 20), threads=(1, 2), repetitions=3)


def settings(model: Path, depth: int = 0) -> dict[str, object]:
    return {"model": str(model), "accuracy_level": None, "threads": 1, "depth": depth, "tokens": 1}


def run(path: Path, options: BenchOptions = QUICK) -> tuple[list[Step], BenchReport]:
    *steps, report = bench(path, options)
    assert isinstance(report, BenchReport) and all(isinstance(step, Step) for step in steps)
    return [step for step in steps if isinstance(step, Step)], report


@pytest.fixture(scope="module")
def quick_run(external_model: Path) -> tuple[list[Step], BenchReport]:
    """One run for the tests that only look at its report: it starts six processes."""
    return run(external_model)


def test_a_run_measures_every_configuration(quick_run: tuple[list[Step], BenchReport]) -> None:
    steps, report = quick_run
    assert [(m.kind, m.depth, m.threads, m.tokens) for m in report.measurements] == [
        ("prefill", 0, 1, 5), ("prefill", 0, 2, 5),
        ("decode", 0, 1, 3), ("decode", 0, 2, 3),
        ("decode", 20, 1, 3), ("decode", 20, 2, 3),
    ]  # fmt: skip
    assert [step.done for step in steps] == list(range(6 * 4)) and {step.total for step in steps} == {6 * 4}
    assert [bandwidth.threads for bandwidth in report.bandwidth] == [1, 2]
    for measurement in report.measurements:
        spread = measurement.tokens_per_second
        assert 0 < spread.minimum <= spread.median <= spread.maximum
        assert measurement.load_seconds > 0 and measurement.first_token_seconds > 0
    assert report.isa in report.machine.isas


def test_bandwidth_and_its_share_add_up(quick_run: tuple[list[Step], BenchReport]) -> None:
    _, report = quick_run
    weights, bandwidth = report.weight_bytes_per_token, {b.threads: b for b in report.bandwidth}
    assert weights is not None
    for measurement in report.measurements:
        if measurement.kind == "prefill":
            assert measurement.weights_gb_per_second is None and measurement.share_of_bandwidth is None
            continue
        gigabytes = weights * measurement.tokens_per_second.median / 1e9
        assert measurement.weights_gb_per_second == pytest.approx(gigabytes)
        mapped = bandwidth[measurement.threads].mapped_file
        assert mapped is not None and measurement.share_of_bandwidth == pytest.approx(gigabytes / mapped.median)
    assert all(b.mapped_file is not None for b in report.bandwidth)


def test_weight_bytes_are_those_of_the_tensors_that_a_token_reads(external_model: Path) -> None:
    model = onnx.load(external_model, load_external_data=False)
    expected = 0
    for tensor in model.graph.initializer:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for dim in tensor.dims:
            size *= dim
        if tensor.name.startswith(("model.embed_tokens", "rope.")):
            size //= tensor.dims[0]  # one row
        elif tensor.name.startswith(("constants.", "logits_to_keep")):
            continue
        expected += size
    assert weight_bytes_per_token(inspect(external_model)) == expected


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_cache_bytes(precision: Precision, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, export={"kv_cache": precision})
    per_token = 0
    for value in onnx.load(path).graph.input:
        if value.name.startswith("past_key_values"):
            dims = value.type.tensor_type.shape.dim
            row = dims[3].dim_value if len(dims) == 4 else 1
            per_token += dims[1].dim_value * row * (1 if value.type.tensor_type.elem_type == TensorProto.INT8 else 4)
    assert ModelFile.open(path).kv_cache == precision
    assert cache_bytes(inspect(path).config, precision, 7) == 7 * per_token


def test_spread() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    assert Spread.of(values) == Spread(median=median(values), minimum=1.0, maximum=10.0)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_reads_everything(threads: int, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 16))
    loop = ReadLoop([tmp_path / "weights"], size=1 << 16)
    assert loop.memory(threads) > 0 and (loop.mapped_file(threads) or 0) > 0
    assert ReadLoop([], size=1 << 16).mapped_file(threads) is None


def test_embedded_weights_are_not_mapped_and_the_fallback_reads_other_bytes(
    plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", NO_LIBRARY)
    _, report = run(plain_model, BenchOptions(prompt_tokens=2, gen_tokens=1, depths=(3,), threads=(1,), repetitions=1))
    assert report.isa is None and report.machine.isas == () and NO_LIBRARY in (report.fallback_reason or "")
    assert report.weight_bytes_per_token is None
    assert all(measurement.weights_gb_per_second is None for measurement in report.measurements)
    assert [bandwidth.mapped_file for bandwidth in report.bandwidth] == [None]


def test_defaults_take_the_depths_that_fit() -> None:
    def depths(context: int) -> tuple[int, ...] | None:
        return BenchOptions().for_context(context).depths

    assert depths(2048) == (0, 512, 1024)
    assert depths(1024) == (0, 512)
    assert depths(512) == (0,)
    assert BenchOptions(threads=(4,)).for_context(2048).threads == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_tokens": 5, "depths": (0, 60), "gen_tokens": 5},
            r"--depth 60 and --gen-tokens 5 don't fit in this model's context of 64",
        ),
        ({"prompt_tokens": 65, "gen_tokens": 5}, r"--prompt-tokens 65 is more than this model's context of 64"),
        ({"prompt_tokens": 5}, r"--depth 0 and --gen-tokens 64 don't fit .* 63"),
        ({"gen_tokens": 0}, r"--gen-tokens is '0', expected whole numbers of at least 1"),
        ({"repetitions": 0}, r"--repetitions is '0'"),
        ({"threads": (2, 0)}, r"--threads is '2,0'"),
        ({"depths": (5, 5)}, r"--depth is '5,5'.* none twice"),
    ],
)
def test_numbers_that_cannot_be(options: dict[str, object], message: str) -> None:
    context = 63 if "63" in message else 64
    with pytest.raises(UsageError, match=message):
        BenchOptions(**options).for_context(context)  # type: ignore[arg-type]


def test_errors_of_a_worker_keep_their_class_and_text(plain_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="accuracy level is 'int9', expected one of int8, fp32"):
        run(plain_model, BenchOptions(gen_tokens=1, prompt_tokens=1, accuracy_level="int9"))
    with pytest.raises(ModelFileError, match="does not exist"):
        Worker(settings(tmp_path / "absent.onnx"))


def test_a_worker_that_dies_is_an_error(plain_model: Path) -> None:
    worker = Worker(settings(plain_model, depth=4))
    worker._process.kill()
    with pytest.raises(FbiEdgeError, match="the benchmark's process of 1 threads at depth 4 was killed by signal 9"):
        worker.ask("decode")
    worker.close()


def test_peak_rss_is_this_process_alone(plain_model: Path) -> None:
    """A worker started by a larger process must not report that one's memory."""
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(range(0, len(ballast), 4096))
    worker = Worker(settings(plain_model))
    peak, own = worker.ask("memory")["peak_rss_bytes"], peak_rss_bytes()
    worker.close()
    if peak is None or own is None:
        pytest.skip("this system doesn't tell how much memory a process used")
    assert own > len(ballast) > peak > 1 << 20
    del ballast


def test_machine() -> None:
    machine = describe_machine()
    assert machine.cpu and machine.cores >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", machine.date)
    assert {"fbiedge", "python", "onnxruntime", "numpy"} <= set(machine.versions)
    assert machine.commit is None or re.fullmatch(r"[0-9a-f]{12,}(-dirty)?", machine.commit)


def test_command(external_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--prompt-tokens 4 --gen-tokens 2 --depth 0,9 --threads 1 --repetitions 1"
    assert cli.run(["bench", str(external_model), *arguments.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *table, last = out.splitlines()
    report = json.loads(last)
    assert {"cpu", "cores", "isas", "versions", "commit", "date"} <= set(report["machine"])
    assert [m["depth"] for m in report["measurements"]] == [0, 0, 9]
    assert any(re.match(r"decode 2 at depth 9 +1 +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+ +\d+ %", line) for line in table), out
    assert any(
        re.match(r"reading  1 thread: memory [\d.]+ GB/s .*, the mapped model file [\d.]+", line) for line in table
    )


def test_command_without_json_prints_only_the_table(plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--prompt-tokens 4 --gen-tokens 2 --depth 0 --threads 1 --repetitions 1"
    assert cli.run(["bench", str(plain_model), *arguments.split()]) == 0
    assert "{" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1;2"], "--threads is '1;2', expected whole numbers with commas between, such as 1,2"),
        (["--depth", ""], "--depth is ''"),
        (["--depth", "64"], "--depth 64 and --gen-tokens 64 don't fit in this model's context of 64"),
    ],
)
def test_command_errors(
    arguments: list[str], message: str, plain_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", str(plain_model), "--prompt-tokens", "1", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
