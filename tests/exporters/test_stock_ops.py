"""`--ops stock`: files without an operator of ours compute what the weights say, and are read back as what they were."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.bundled import MODEL, UNSEEN_STORY, golden
from support.bundled import PROMPT as STORY
from support.checkpoints import small_config
from support.gguf_checkpoints import gguf_checkpoint, gguf_config
from support.onnx_llama import OnnxLlama
from support.random_weights import random_weights

from fbiedge import cli
from fbiedge.bits import pack_bits
from fbiedge.config import ModelConfig, ScalingPattern
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.exporters.gguf import export_gguf
from fbiedge.exporters.onnx import export_onnx, open_onnx, verify_export
from fbiedge.exporters.onnx.options import StockBits
from fbiedge.exporters.onnx.stock import CODES, packed_signs, sign_codes
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.weights import BinaryLinear, Weights

from .test_writer import MadeUp

MakeWeights = Callable[[ModelConfig], Weights]
PATTERNS: tuple[ScalingPattern, ...] = ("column", "row", "single", "block", "none")
BITS: tuple[StockBits, ...] = (1, 2, 4)
EXACT: dict[str, Any] = {"accuracy_level": "fp32", "head": "fp32", "block_scales": "fp32"}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def assert_computes(weights: Weights, path: Path, tolerance: float = 1e-4) -> None:
    """Prefill and then decoding, in ONNX Runtime without our library, against the numpy reference."""
    reference, model = Reference(weights), OnnxLlama(path, weights.config)
    for ids in (PROMPT, [5], [3, 5]):
        expected = reference.logits(ids)
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def domains(path: Path) -> set[str]:
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}
    assert not model.functions
    return used


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_stock_operators_compute_what_the_weights_say(
    pattern: ScalingPattern, bits: StockBits, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights, path = make_weights(small_config(pattern, head_dim=16)), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=bits, **EXACT)
    assert domains(path) == {"", "com.microsoft"}
    assert_computes(weights, path)


@pytest.mark.parametrize("bits", BITS)
def test_heads_that_attention_can_not_rotate_itself(bits: StockBits, make_weights: MakeWeights, tmp_path: Path) -> None:
    weights, path = make_weights(small_config(head_dim=8)), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=bits, **EXACT)
    assert_computes(weights, path)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_a_quantised_head_costs_what_it_costs_with_our_operators(
    head: Any, bits: StockBits, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights, path = make_weights(small_config(head_dim=16)), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=bits, accuracy_level="fp32", head=head)
    assert_computes(open_onnx(path), path)  # which has the head as it was rounded
    np.testing.assert_allclose(open_onnx(path).tensor("lm_head.weight"), weights.tensor("lm_head.weight"), atol=0.1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_qwen3_with_rows_of_1_bit(tied: bool, bits: StockBits, tmp_path: Path) -> None:
    config = small_config(
        "block", head_dim=16, hidden_size=128, model_type="qwen3", tie_word_embeddings=tied, vocab_size=83
    )
    weights, path = random_weights(config, binary_head=True), tmp_path / "model.onnx"
    report = export_onnx(weights, path, operators="stock", stock_bits=bits, accuracy_level="fp32")
    assert domains(path) == {"", "com.microsoft"}
    assert {row["group"]: row["form"] for row in report.inventory}["head"].startswith("1-bit block")
    assert_computes(weights, path, 1e-3)  # scales of tiles are fp16
    back = open_onnx(path)
    np.testing.assert_array_equal(back.tensor("lm_head.weight"), weights.tensor("lm_head.weight"))
    np.testing.assert_array_equal(back.tensor("model.embed_tokens.weight"), weights.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize("pattern", ["column", "block"])
def test_int8_activations_lose_no_more_than_with_our_operators(
    pattern: ScalingPattern, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """Both round the inputs of a linear by groups of 128."""
    weights = make_weights(small_config(pattern, head_dim=16))
    losses = {}
    for operators in ("fbiedge", "stock"):
        report = export_onnx(
            weights, tmp_path / f"{operators}.onnx", operators=operators, kv_cache="fp32", verify_on=PROMPT * 4
        )
        assert report.loss is not None
        losses[operators] = report.loss
    assert 0 < losses["stock"].kl_divergence < 3 * losses["fbiedge"].kl_divergence
    assert losses["stock"].note == "32 tokens, through stock operators" and not losses["stock"].op_library


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_read_back_exports_to_the_same_file_of_ours(
    pattern: ScalingPattern, bits: StockBits, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config(pattern, head_dim=16))
    stock, ours, again = (tmp_path / f"{name}.onnx" for name in ("stock", "ours", "again"))
    export_onnx(weights, ours)
    level = {"accuracy_level": "fp32"} if bits == 1 else {}
    export_onnx(weights, stock, operators="stock", stock_bits=bits, block_scales="fp32", embed_limit_bytes=0, **level)
    export_onnx(open_onnx(stock), again)
    assert again.read_bytes() == ours.read_bytes()
    for name in weights.config.linear_shapes():
        linear, original = (w.linear(f"model.layers.1.{name}") for w in (open_onnx(stock), weights))
        if isinstance(original, BinaryLinear):
            assert isinstance(linear, BinaryLinear)
            np.testing.assert_array_equal(linear.packed, original.packed)


@pytest.mark.parametrize("bits", BITS)
def test_column_shared_stays_what_it_is(bits: StockBits, tmp_path: Path) -> None:
    """`column` whose scales are partly equal, as GGUF needs them: exact here too, and a GGUF of it is the same to the bit."""
    weights, path = gguf_checkpoint(tmp_path / "in", gguf_config("column")), tmp_path / "model.onnx"
    export_onnx(weights, path, operators="stock", stock_bits=bits, **EXACT)
    assert domains(path) == {"", "com.microsoft"}
    assert_computes(weights, path)
    assert verify_export(weights, path, PROMPT).top1_agreement == 1
    ggufs = []
    for source, name in ((weights, "of-weights"), (open_onnx(path), "of-stock")):
        (tmp_path / name).mkdir()
        export_gguf(source, tmp_path / name / "model.gguf")
        ggufs.append([(tmp_path / name / file).read_bytes() for file in ("model.gguf", "model.beta.gguf")])
    assert ggufs[0] == ggufs[1]


@pytest.mark.parametrize(("bits", "level"), [(1, "fp32"), (2, "int8"), (4, "fp32"), (4, "int8")])
def test_commands_run_the_bundled_model_of_stock_operators(
    bits: StockBits, level: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text begins as that of our operators at one of their levels: each rounds elsewhere, and near ties fall either way."""
    path, text = tmp_path / "model.onnx", tmp_path / "story.txt"
    text.write_text(UNSEEN_STORY, encoding="utf-8")
    export_onnx(open_onnx(MODEL), path, operators="stock", stock_bits=bits, accuracy_level=level)

    def out(*arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    greedy = ("--temperature", 0, "--max-tokens", 40)
    said = out("generate", path, "-p", STORY, *greedy).removesuffix("\n")
    levels = ("fp32",) if level == "fp32" else ("fp32", "int8")
    assert len(said) > 100 and any(golden(known).startswith(said) for known in levels)
    for options in (
        ("--lookup-tokens", 8),
        ("--prompt-cache", tmp_path / "cache"),
        ("--prompt-cache", tmp_path / "cache"),
    ):
        assert out("generate", path, "-p", STORY, *greedy, *options).removesuffix("\n") == said
    assert out("chat", path, *greedy, stdin="Hello\n") == out("chat", MODEL, *greedy, stdin="Hello\n")
    perplexities = [
        json.loads(out("eval", model, "--text", text, "--json").splitlines()[-1])["perplexity"]
        for model in (path, MODEL)
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.02)


def test_codes_that_are_no_signs_are_refused(make_weights: MakeWeights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make_weights(small_config(head_dim=16)), path, operators="stock")
    model = onnx.load(path)
    name = "model.layers.1.mlp.up_proj"
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{name}.{CODES}")
    codes.raw_data = b"\x79" * 35 + b"\x78" + codes.raw_data[36:]
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match=rf"{name} holds codes other than 7 and 9, which are no signs"):
        open_onnx(path).linear(name)


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_the_signs_around_the_zero_point(bits: int) -> None:
    signs = np.random.default_rng(bits).choice([-1.0, 1.0], (3, 140)).astype(np.float32)
    codes = sign_codes(pack_bits(signs), 140, bits)
    assert codes.shape == (3, 2 * 16 * bits)
    unpacked = (codes[..., None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
    values = unpacked.reshape(3, 256).astype(int) - (1 << (bits - 1))
    assert np.array_equal(values[:, :140], signs) and not values[:, 140:].any()
    np.testing.assert_array_equal(packed_signs(codes.reshape(3, 2, -1), 140, "codes"), pack_bits(signs))


def test_linears_of_one_bit_in_the_file_are_one_matmul_when_opened(make_weights: MakeWeights, tmp_path: Path) -> None:
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    weights = make_weights(small_config(head_dim=16))
    export_onnx(weights, path, operators="stock", stock_bits=1)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    assert nodes["MatMul"] == 7 * weights.config.num_hidden_layers + 1
    assert not {"MatMulNBits", "Transpose", "Flatten"} & set(nodes)
    assert 4 * path.stat().st_size < optimized.stat().st_size


def test_scales_of_ones_are_stored_once_a_size(make_weights: MakeWeights, tmp_path: Path) -> None:
    report = export_onnx(make_weights(small_config(head_dim=16)), tmp_path / "m.onnx", operators="stock")
    (ones,) = (row for row in report.inventory if row["group"] == "ones")
    assert ones["tensors"] == 5  # q; k and v; o; gate and up; down


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    config = small_config(
        head_dim=16, vocab_size=4000, hidden_size=512, intermediate_size=8192, num_hidden_layers=20,
        num_attention_heads=32,
    )  # fmt: skip
    tracemalloc.start()
    try:
        report = export_onnx(MadeUp(config), tmp_path / "model.onnx", operators="stock", embed_limit_bytes=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.data_bytes > 120e6
    assert peak < 40e6


def test_sessions_run_them_without_the_library(make_weights: MakeWeights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = make_weights(small_config(head_dim=16))
    export_onnx(weights, path, operators="stock", **EXACT)
    session = Session.open(path, threads=1)
    assert (session.isa, session.warning) == (None, None)
    assert session.description == "stock ops, fp32 activations"
    expected = Reference(weights).logits(PROMPT)
    np.testing.assert_allclose(session.all_logits(PROMPT), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(
        UsageError, match="is of stock operators, whose level is in the file: fp32; export it with .* or 4$"
    ):
        Session.open(path, accuracy_level="int8")
    assert verify_export(weights, path, PROMPT).top1_agreement == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "int8"}, "a KV cache of int8 is an operator of ours; with --ops stock it is fp32"),
        ({"stock_bits": 1, "accuracy_level": "int8"}, r"fp32 \(1 bit in stock operators\) take fp32 activations only"),
        ({"stock_bits": 8}, "stock_bits is 8, expected one of 1, 2, 4"),
    ],
)
def test_options_that_contradict_stock_operators(
    options: dict[str, Any], message: str, weights: Weights, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export_onnx(weights, tmp_path / "model.onnx", operators="stock", **options)
    assert not (tmp_path / "model.onnx").exists()


def test_the_command(weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "checkpoint", tmp_path / "model.onnx"
    assert cli.run(["export", str(source), "--ops", "stock", "--stock-bits", "2", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1-bit column, 2 bits stored" in out and "through stock operators" in out
    assert domains(path) == {"", "com.microsoft"}
    assert cli.run(["inspect", str(path)]) == 0
    assert "operators" in capsys.readouterr().out
    assert cli.run(["export", str(source), "--stock-bits", "2", "-o", str(path)]) == 2
    assert capsys.readouterr().err == "error: --stock-bits has no effect without --ops stock; leave it out\n"
    assert cli.run(["export", str(source), "--ops", "stock", "-o", str(tmp_path / "model.gguf")]) == 2
    assert "--ops is for --to onnx, and this goes to gguf" in capsys.readouterr().err
    assert cli.run(["export", str(source), "--ops", "mine", "-o", str(path)]) == 2
    assert capsys.readouterr().err.endswith("error: operators is 'mine', expected one of fbiedge, stock\n")
