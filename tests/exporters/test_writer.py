"""The files on disk: embedded or external, aligned, streamed, and whole or not there at all."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support.checkpoints import small_config
from support.onnx_llama import OnnxLlama

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, OutputError, UsageError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.weights import BinaryLinear, Weights


def test_small_models_are_one_file(weights: Weights, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export_onnx(weights, out / "model.onnx")
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    assert (report.data, report.data_bytes) == (None, 0)
    assert report.model_bytes == (out / "model.onnx").stat().st_size


def test_external_data_is_aligned_and_computes_the_same(library: Path | None, weights: Weights, tmp_path: Path) -> None:
    embedded, external = tmp_path / "embedded.onnx", tmp_path / "external.onnx"
    export_onnx(weights, embedded)
    report = export_onnx(weights, external, embed_limit_bytes=0)
    assert report.data == tmp_path / "external.onnx.data"
    assert report.data_bytes == report.data.stat().st_size
    data, end = report.data.read_bytes(), 0
    whole = {tensor.name: tensor.raw_data for tensor in onnx.load(embedded).graph.initializer}
    placed = 0
    for tensor in onnx.load(external, load_external_data=False).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert tensor.raw_data == whole[tensor.name] and len(tensor.raw_data) < 1024
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(entries["offset"]), int(entries["length"])
        assert entries["location"] == "external.onnx.data"
        assert offset % 4096 == 0 and offset >= end
        assert data[offset : offset + length] == whole[tensor.name]
        end, placed = offset + length, placed + 1
    assert placed >= 10 and end == len(data)
    ids = [3, 1, 4, 1, 5]
    expected = OnnxLlama(embedded, weights.config, library).logits(ids)
    np.testing.assert_array_equal(OnnxLlama(external, weights.config, library).logits(ids), expected)


class MadeUp:
    """A model of zeros, made as it is read: none of it is held by the weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.files: dict[str, str] = {}

    def tensor(self, name: str) -> np.ndarray:
        config = self.config
        matrix = name in ("model.embed_tokens.weight", "lm_head.weight")
        return np.zeros((config.vocab_size, config.hidden_size) if matrix else config.hidden_size, np.float32)

    def linear(self, name: str) -> BinaryLinear:
        n, k = self.config.linear_shapes()[name.split(".", 3)[3]]
        packed, ones = np.zeros((n, -(-k // 8)), np.uint8), np.ones(k, np.float32)
        return BinaryLinear(packed=packed, n=n, k=k, pattern="column", alpha=ones, beta=ones, zeros=0)


LARGE = small_config(
    head_dim=16, vocab_size=4000, hidden_size=512, intermediate_size=8192, num_hidden_layers=40, num_attention_heads=32
)


def test_large_tensors_are_aligned_for_windows_and_memory_holds_one_tensor(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        report = export_onnx(MadeUp(LARGE), tmp_path / "model.onnx", head="fp32", embed_limit_bytes=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = LARGE.vocab_size * LARGE.hidden_size * 4  # 8 MB
    assert report.data_bytes > 9 * largest
    assert peak < 2.5 * largest  # the head, and its transposed copy
    large = 0
    for tensor in onnx.load(report.model, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if int(entries.get("length", 0)) >= 1 << 20:
            assert int(entries["offset"]) % 65536 == 0
            large += 1
    assert large == 2


def test_progress_ends_at_the_total(weights: Weights, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = export_onnx(weights, tmp_path / "model.onnx", progress=lambda *step: seen.append(step))
    assert len(seen) == sum(row["tensors"] for row in report.inventory)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(row["bytes"] for row in report.inventory)


def test_a_smaller_model_of_the_same_name_removes_the_data_file(weights: Weights, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_onnx(weights, out / "model.onnx", embed_limit_bytes=0)
    export_onnx(weights, out / "model.onnx")
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


class Failing(MadeUp):
    """Weights that can't be read to the end."""

    def linear(self, name: str) -> BinaryLinear:
        if name == "model.layers.1.mlp.down_proj":
            raise CheckpointError("the shard ends here")
        return super().linear(name)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["external", "embedded"])
def test_a_failure_half_way_leaves_what_was_there(limit: int, weights: Weights, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_onnx(weights, out / "model.onnx", embed_limit_bytes=limit)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="the shard ends here"):
        export_onnx(Failing(small_config(head_dim=16)), out / "model.onnx", embed_limit_bytes=limit)
    with pytest.raises(CheckpointError, match="the shard ends here"):
        export_onnx(Failing(small_config(head_dim=16)), out / "new.onnx", embed_limit_bytes=limit)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


FULL_DISK = """
import resource, sys
from pathlib import Path

from fbiedge.errors import OutputError
from fbiedge.exporters.onnx import export_onnx
from fbiedge.weights import open_checkpoint
weights = open_checkpoint(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the kernel refuses to grow a file beyond it
try:
    export_onnx(weights, Path(sys.argv[2]), embed_limit_bytes=int(sys.argv[3]))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["external", "embedded"])
def test_a_write_that_the_system_refuses_leaves_nothing(limit: int, weights: Weights, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoint"), str(out / "model.onnx"), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "can't write" in result.stdout and "nothing was left there" in result.stdout
    assert not list(out.iterdir())


def test_a_full_disk_is_said_before_writing(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"it needs 0 MB and .* has 0 MB free; nothing was written"):
        export_onnx(weights, out / "model.onnx")
    assert not out.exists()


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["external", "embedded"])
def test_what_a_check_refuses_does_not_appear(limit: int, weights: Weights, tmp_path: Path) -> None:
    """The check sees a whole model; only then it replaces the earlier one."""
    out = tmp_path / "out"
    export_onnx(weights, out / "model.onnx", embed_limit_bytes=limit)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    report = export_onnx(weights, out / "model.onnx", embed_limit_bytes=limit, verify_on=[3, 1, 4], head="fp32")
    assert report.loss is not None and report.loss.kl_divergence < 0.1
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys() and after != before
    with pytest.raises(UsageError, match="at least one token"):
        export_onnx(weights, out / "model.onnx", embed_limit_bytes=limit, verify_on=[])
    with pytest.raises(UsageError, match="at least one token"):
        export_onnx(weights, out / "new.onnx", embed_limit_bytes=limit, verify_on=[])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == after


def test_a_link_leads_to_the_file_that_is_replaced(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "elsewhere/real.onnx")
    report = export_onnx(weights, tmp_path / "link.onnx", embed_limit_bytes=0)
    assert report.model == tmp_path / "elsewhere/real.onnx"
    assert report.data == tmp_path / "elsewhere/real.onnx.data" and report.data.is_file()
    assert (tmp_path / "link.onnx").is_symlink()
    assert open_onnx(report.model).config == weights.config


def test_data_that_would_replace_a_folder_is_refused_before_writing(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "out/model.onnx.data").mkdir(parents=True)
    read: list[str] = []
    with pytest.raises(OutputError, match=r"model.onnx.data: it is a folder"):
        export_onnx(
            weights, tmp_path / "out/model.onnx", embed_limit_bytes=0, progress=lambda name, *_: read.append(name)
        )
    assert read == [] and [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx.data"]


def test_somebody_elses_data_stays(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "notes.data").write_text("precious")
    export_onnx(weights, tmp_path / "notes")
    assert (tmp_path / "notes.data").read_text() == "precious"


def test_a_folder_as_target_is_refused(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        export_onnx(weights, tmp_path / "model.onnx")


def test_a_folder_that_can_not_be_made_is_an_output_error(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="can't write"):
        export_onnx(weights, tmp_path / "file" / "model.onnx")
