"""export_gguf writes what stock llama.cpp runs: the checkpoint's logits, everything about it, whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_checkpoints import FILES, IDS, gguf_checkpoint, gguf_config, relative
from support.gguf_files import write_gguf
from support.stock_llama_cpp import StockLlamaCpp

from fbiedge.errors import CheckpointError, ModelFileError, OutputError, UsageError
from fbiedge.exporters.gguf import GgufReport, Provenance, adapter_path, export_gguf, open_gguf
from fbiedge.exporters.gguf.fold import exactness
from fbiedge.exporters.gguf.folded import DenseWeights, FoldedModel
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_tensors import dequantize
from fbiedge.metrics import compare_logits
from fbiedge.reference import Reference
from fbiedge.rope import RopeScaling
from fbiedge.weights import Weights

# llama.cpp rounds the inputs of every linear to 8 bits, in blocks of 32: less than 1 % of the largest, times a few layers.
TOLERANCE = 0.03


def llama_cpp_logits(report: GgufReport, *, adapter: bool = True) -> np.ndarray:
    llama = StockLlamaCpp(report.model, *([report.adapter] if adapter and report.adapter else []))
    try:
        return llama.logits(IDS)
    finally:
        llama.close()


def expected_logits(weights: Weights) -> np.ndarray:
    return Reference(weights).logits(IDS)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("row", {}),
        ("single", {}),
        ("block", {}),
        ("block", {"model_type": "qwen3", "tie_word_embeddings": True}),
        ("column", {}),
        ("column", {"model_type": "qwen3", "head_dim": 64}),
        ("column", {"num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 384}),
        ("column", {"tie_word_embeddings": True}),
        ("none", {}),
    ],
)
def test_stock_llama_cpp_computes_the_same(tmp_path: Path, pattern: Any, changes: dict[str, Any]) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(pattern, **changes))
    report = export_gguf(weights, tmp_path / "model.gguf")
    assert report.exact and not report.errors
    expected, got = expected_logits(weights), llama_cpp_logits(report)
    assert relative(got, expected) < TOLERANCE
    assert compare_logits(expected, got).kl_divergence < 5e-3
    if pattern not in ("block", "none"):  # without beta it is another model
        assert relative(llama_cpp_logits(report, adapter=False), expected) > 3 * TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_without_its_8_bits_llama_cpp_is_near(tmp_path: Path, model_type: Any) -> None:
    """The same folded weights, with beta, in float32: what is left is the rounding of scales to fp16."""
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(model_type=model_type))
    dense = DenseWeights(model=FoldedModel(weights=weights, folds=exactness(weights).folds, fitted={}))
    report = export_gguf(dense, tmp_path / "model.gguf", head="f32", embedding="f32")
    assert relative(llama_cpp_logits(report), expected_logits(weights)) < 5e-3


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="linear", factor=2.0),
        RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=32),
        RopeScaling(
            rope_type="yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1 + 0.1 * math.log(2)
        ),  # the default, spelt out
        RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
        RopeScaling(rope_type="factors", factors=tuple(1.0 + i / 4 for i in range(16))),
    ],
)
def test_rope_scaling_is_llama_cpps(tmp_path: Path, scaling: RopeScaling) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("none", rope_scaling=scaling))
    report = export_gguf(weights, tmp_path / "model.gguf", head="f32", embedding="f32")
    assert relative(llama_cpp_logits(report), expected_logits(weights)) < 1e-4


@pytest.mark.parametrize(
    "change", [{"attention_factor": 0.7}, {"attention_factor": 1.0}, {"beta_fast": 16.0}, {"truncate": False}]
)
def test_rope_that_llama_cpp_does_not_have(tmp_path: Path, change: dict[str, Any]) -> None:
    scaling = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, **change)
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("none", rope_scaling=scaling))
    with raises_line(CheckpointError, "llama.cpp has no RoPE of type 'yarn' with"):
        export_gguf(weights, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
        RopeScaling(rope_type="factors", factors=tuple(1.0 + i / 4 for i in range(16))),
    ],
)
def test_divisors_that_llama_cpp_does_not_read(tmp_path: Path, scaling: RopeScaling) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("none", model_type="qwen3", rope_scaling=scaling))
    with raises_line(
        CheckpointError, f"llama.cpp has RoPE of type '{scaling.rope_type}' for models of type 'llama' only"
    ):
        export_gguf(weights, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("embedding", "head", "bound"), [("f32", "f32", 1e-6), ("f16", "f16", 1e-3), ("q8_0", "q8_0", 0.01), ("q1_0", "q1_0", 2)]
)  # fmt: skip
def test_forms_of_embedding_and_head(tmp_path: Path, embedding: Any, head: Any, bound: float) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    report = export_gguf(weights, tmp_path / "model.gguf", embedding=embedding, head=head)
    file = GgufFile.open(report.model)
    for name, ours in (("token_embd.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")):
        assert file.tensors[name].ggml_type == embedding.upper()
        stored = dequantize(file.tensors[name], file.data(name))
        assert relative(stored, weights.tensor(ours)) < bound
    assert np.isfinite(llama_cpp_logits(report)).all()


@pytest.mark.parametrize("form", ["f16", "q8_0", "q1_0"])
def test_what_embedding_and_head_lose_is_part_of_the_cost(form: Any, tmp_path: Path) -> None:
    """The numbers printed are those of the file's own tensors, as the reader finds them."""
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    report = export_gguf(
        weights, tmp_path / "model.gguf", embedding=form, head=form, verify_ids=IDS, allow_lossy=form == "q1_0"
    )
    stored = Reference(open_gguf(report.model)).logits(IDS)
    expected = compare_logits(Reference(weights).logits(IDS), stored)
    assert report.costs is not None
    assert report.costs.with_adapter.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-2)
    assert (expected.kl_divergence > 1e-3) == (form == "q1_0")


@pytest.mark.parametrize("options", [{"embedding": "q1_0"}, {"head": "q1_0"}, {"embedding": "q1_0", "head": "q1_0"}])
def test_a_form_that_loses_much_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    forms = " and ".join(f"{option} q1_0" for option in options)
    parts = ("KL divergence", "nats, perplexity", "on 20 tokens", "--allow-lossy", "choose q8_0 or f16")
    with raises_line(UsageError, f"{forms} would lose much of this model", *parts):
        export_gguf(weights, tmp_path / "model.gguf", verify_ids=IDS, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_table_that_is_binary_loses_nothing_as_q1_0(tmp_path: Path) -> None:
    def binary(tensors: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.where(tensors[name] < 0, -0.5, 0.5).astype(np.float32)

    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"), edit=binary)
    report = export_gguf(weights, tmp_path / "model.gguf", embedding="q1_0", head="q1_0", verify_ids=IDS)
    assert report.costs and report.costs.with_adapter.kl_divergence < 1e-4


def test_what_is_not_run_in_llama_cpp_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fbiedge.exporters.gguf import cost

    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))

    def missing() -> None:
        raise UsageError("it isn't installed")

    monkeypatch.setattr(cost, "load_library", missing)
    costs = export_gguf(weights, tmp_path / "model.gguf", verify_ids=IDS).costs
    assert costs and costs.in_llama_cpp is None and costs.not_run == "it isn't installed"
    monkeypatch.setattr(cost, "RESIDENT_LIMIT_BYTES", 1000)
    costs = export_gguf(weights, tmp_path / "model.gguf", verify_ids=IDS).costs
    assert costs and costs.in_llama_cpp is None and "in float32 are not run there" in str(costs.not_run)


def test_gguf_dump_reads_it(tmp_path: Path) -> None:
    report = export_gguf(gguf_checkpoint(tmp_path / "in", gguf_config()), tmp_path / "model.gguf")
    for path in (report.model, report.adapter):
        dump = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--json", str(path)]
        found = json.loads(subprocess.run(dump, check=True, capture_output=True, text=True).stdout)
        tensors = found["tensors"]
        if path == report.model:
            assert tensors["blk.1.ffn_down.weight"] | {"index": 0, "offset": 0} == {
                "index": 0, "shape": [256, 128], "type": "Q1_0", "offset": 0,
            }  # fmt: skip
            assert found["metadata"]["general.file_type"]["value"] == 40
        else:
            assert tensors["blk.1.ffn_down.weight.lora_a"]["shape"] == [256, 1]
            assert tensors["blk.1.ffn_down.weight.lora_b"]["shape"] == [1, 128]


def test_what_travels_along(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 30}
    files = FILES | {"generation_config.json": json.dumps(generation), "chat_template.jinja": "{{ messages }}"}
    config = gguf_config("row", head_dim=64, rope_theta=5e5, rms_norm_eps=1e-6)
    about = Provenance(name="tiny", base_model="Somebody/Base", license="apache-2.0", recipe='{"steps": 3}')
    report = export_gguf(gguf_checkpoint(tmp_path / "in", config, files=files), tmp_path / "m.gguf", provenance=about)
    found = GgufFile.open(report.model).metadata
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "tiny", "general.file_type": 40,
        "general.license": "apache-2.0", "general.base_model.0.name": "Somebody/Base", "llama.block_count": 2,
        "llama.context_length": 64, "llama.embedding_length": 128, "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64, "llama.rope.freq_base": 5e5, "llama.vocab_size": 264,
        "tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7,
        "general.sampling.top_k": 30, "fbiedge.format_version": "1", "fbiedge.scaling_pattern": "row",
        "fbiedge.exact": True, "fbiedge.feed_forward_length": 200, "fbiedge.recipe": '{"steps": 3}',
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert found["general.sampling.temp"] == pytest.approx(0.7) and "general.sampling.min_p" not in found
    assert report.adapter
    adapter = GgufFile.open(report.adapter).metadata
    assert adapter["fbiedge.beta_of"] == found["fbiedge.weights_sha256"] and adapter["adapter.lora.alpha"] == 1
    assert len(found["fbiedge.weights_sha256"]) == 64 and set(found["fbiedge.weights_sha256"]) != {"0"}


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config())
    first, second = (export_gguf(weights, tmp_path / name / "m.gguf") for name in "ab")
    assert first.model.read_bytes() == second.model.read_bytes()
    assert first.adapter and second.adapter and first.adapter.read_bytes() == second.adapter.read_bytes()


def test_size(tmp_path: Path) -> None:
    """1.125 bits a binary weight plus the rest, within 1 %."""
    config = gguf_config("block", hidden_size=512, intermediate_size=1536, head_dim=128, num_hidden_layers=4)
    report = export_gguf(gguf_checkpoint(tmp_path / "in", config), tmp_path / "model.gguf")
    assert {row["bits_per_weight"] for row in report.inventory if row["form"] == "Q1_0"} == {1.125}
    linears = config.num_hidden_layers * sum(n * k for n, k in config.linear_shapes().values())
    rest = 2 * 2 * config.vocab_size * config.hidden_size + 4 * (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert report.model_bytes == report.model.stat().st_size
    assert abs(report.model_bytes / (1.125 / 8 * linears + rest) - 1) < 0.01


@pytest.mark.parametrize(
    ("changes", "name", "inputs"),
    [
        ({"hidden_size": 192}, "model.layers.0.self_attn.q_proj", 192),
        ({"head_dim": 24}, "model.layers.0.self_attn.o_proj", 96),
    ],
)
def test_inputs_that_fill_no_blocks(tmp_path: Path, changes: dict[str, Any], name: str, inputs: int) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(**changes))
    with raises_line(CheckpointError, f"{name} has {inputs} inputs", "in blocks of 128"):
        export_gguf(weights, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("pattern", "changes", "options", "parts"),
    [
        ("none", {"intermediate_size": 192}, {"head": "q1_0"}, ["mlp.down_proj has 192 inputs", "f32 or f16 or q8_0 fits"]),
        ("none", {}, {"head": "q1_0"}, ["head can't be q1_0: model.layers.0.mlp.down_proj has 200 inputs"]),
        ("none", {"intermediate_size": 201}, {"head": "q8_0"}, ["down_proj has 201 inputs", "of 32; f32 or f16 fits"]),
        ("none", {"hidden_size": 96}, {"embedding": "q1_0"}, ["embedding can't be q1_0: model.embed_tokens.weight has 96"]),
    ],
)  # fmt: skip
def test_forms_that_do_not_fit(
    tmp_path: Path, pattern: Any, changes: dict[str, Any], options: dict[str, Any], parts: list[str]
) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(pattern, **changes))
    with raises_line(UsageError, *parts):
        export_gguf(weights, tmp_path / "model.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_new_model_without_beta_takes_the_old_adapter_away(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    assert export_gguf(gguf_checkpoint(tmp_path / "a", gguf_config()), target).adapter == adapter_path(target)
    assert adapter_path(target).exists()
    report = export_gguf(gguf_checkpoint(tmp_path / "b", gguf_config("block")), target)
    assert report.adapter is None and not adapter_path(target).exists()


@pytest.mark.parametrize("pattern", ["column", "block"])
@pytest.mark.parametrize("kind", ["text", "model", "lora", "dangling link"])
def test_what_is_no_adapter_of_ours_stays(tmp_path: Path, pattern: Any, kind: str) -> None:
    """Whether the new model has an adapter or not."""
    target, beta = tmp_path / "model.gguf", tmp_path / "model.beta.gguf"
    if kind == "text":
        beta.write_text("notes")
    elif kind == "dangling link":
        beta.symlink_to(tmp_path / "elsewhere")
    else:
        write_gguf(beta, {"general.architecture": "llama", "general.type": "adapter" if kind == "lora" else "model"})
    before = beta.lstat().st_ino
    with raises_line(
        OutputError, f"{beta} lies where the adapter goes and isn't one of ours; move it, or choose another"
    ):
        export_gguf(gguf_checkpoint(tmp_path / "in", gguf_config(pattern)), target)
    assert beta.lstat().st_ino == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "model.beta.gguf",
    ]


def test_a_file_that_comes_while_the_export_runs_stays(tmp_path: Path) -> None:
    beta = tmp_path / "model.beta.gguf"
    with raises_line(OutputError, "lies where the adapter goes"):
        export_gguf(
            gguf_checkpoint(tmp_path / "in", gguf_config()), tmp_path / "model.gguf",
            progress=lambda *_: None if beta.exists() else beta.write_text("notes") and None,
        )  # fmt: skip
    assert beta.read_text() == "notes" and not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("fails", ["adapter", "tensor", "interrupt"])
def test_both_files_or_neither(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fbiedge.exporters.gguf import adapter, plan

    weights, target = gguf_checkpoint(tmp_path / "in", gguf_config()), tmp_path / "model.gguf"
    target.write_bytes(b"an earlier one")
    full = OSError(28, "No space left on device")

    def fail(*_: object) -> Any:
        raise KeyboardInterrupt if fails == "interrupt" else full

    if fails == "adapter":
        monkeypatch.setattr(adapter.Adapter, "write", fail)
    else:
        monkeypatch.setattr(plan, "q1_0_blocks", fail)
    with pytest.raises(KeyboardInterrupt if fails == "interrupt" else OutputError) as caught:
        export_gguf(weights, target)
    if fails != "interrupt":
        assert str(caught.value) == f"can't write {target}: No space left on device; nothing was left there"
    assert target.read_bytes() == b"an earlier one" and sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "model.gguf",
    ]


def test_an_export_that_comes_out_wrong_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished file runs in llama.cpp before it appears."""
    from fbiedge.exporters.gguf import plan

    right = plan.q1_0_blocks
    monkeypatch.setattr(plan, "q1_0_blocks", lambda packed, d, name: right(~packed, d, name))
    weights = gguf_checkpoint(tmp_path / "in", gguf_config())
    out = tmp_path / "model.gguf"
    with raises_line(
        OutputError, f"the export to {out} came out wrong and was dropped: in llama.cpp its KL divergence is"
    ):
        export_gguf(weights, out, verify_ids=IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", [ModelFileError, UsageError])
def test_what_llama_cpp_refuses_is_named_as_the_user_did(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the name that the file has for now."""
    from fbiedge.exporters.gguf import cost

    def refuse(path: Path, **_: object) -> Any:
        raise kind(f"{adapter_path(path)} and {path} are wrong")

    monkeypatch.setattr(cost.LlamaCppSession, "open", refuse)
    out = tmp_path / "model.gguf"
    with raises_line(OutputError, f"to {out}, and it was dropped: {adapter_path(out)} and {out} are wrong"):
        export_gguf(gguf_checkpoint(tmp_path / "in", gguf_config()), out, verify_ids=IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    with raises_line(OutputError, "it needs 0 MB and", "free; nothing was written"):
        export_gguf(weights, tmp_path / "model.gguf")


def test_a_source_is_not_its_own_output(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    export_onnx(weights, tmp_path / "model.onnx")
    for name in ("model.onnx", "link.gguf"):
        if name == "link.gguf":
            (tmp_path / name).symlink_to(tmp_path / "model.onnx")
        with raises_line(UsageError, "choose another name for the output"):
            export_gguf(open_onnx(tmp_path / "model.onnx"), tmp_path / name)


def test_unknown_options(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    options: list[dict[str, Any]] = [{"head": "int8"}, {"embedding": "q4_0"}]
    for option in options:
        with raises_line(UsageError, *option, "expected one of f16, q8_0, q1_0, f32"):
            export_gguf(weights, tmp_path / "model.gguf", **option)


def test_progress_counts_bytes(tmp_path: Path) -> None:
    weights, seen = gguf_checkpoint(tmp_path / "in", gguf_config("block")), []
    export_gguf(weights, tmp_path / "model.gguf", progress=lambda *event: seen.append(event))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0][0] == "token_embd.weight" and seen[-1][0] == "output.weight" and seen[-1][1] == seen[-1][2]


def test_zeros_are_counted(tmp_path: Path) -> None:
    def clear(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, :5] = 0

    weights = gguf_checkpoint(tmp_path / "in", gguf_config("row"), edit=clear)
    assert export_gguf(weights, tmp_path / "model.gguf").zeros == 5
