"""stories260K, exported as an ordinary Llama, continues its prompt as known, through ONNX Runtime's cache in place."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.onnx_llama import OnnxLlama
from support.stories260k import GOLDEN, PROMPT
from tokenizers import Tokenizer

from fbiedge.exporters.onnx import export_onnx, open_onnx, verify_export
from fbiedge.weights import open_checkpoint


@pytest.mark.parametrize("head", ["fp32", "int8"])
def test_continues_once_upon_a_time(stories260k: Path, tmp_path: Path, head: str) -> None:
    path = tmp_path / "stories260k.onnx"
    export_onnx(open_checkpoint(stories260k), path, accuracy_level="fp32", head=head)
    weights = open_onnx(path)
    tokenizer = Tokenizer.from_str(weights.files["tokenizer.json"])
    prompt, golden = tokenizer.encode(PROMPT).ids, tokenizer.encode(GOLDEN).ids
    generated = OnnxLlama(path, weights.config).greedy(prompt, len(golden) - len(prompt))
    assert tokenizer.decode(prompt + generated) == GOLDEN


def test_int8_head_costs_little_on_real_text(stories260k: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "stories260k.onnx", open_checkpoint(stories260k)
    export_onnx(weights, path)
    ids = Tokenizer.from_str(weights.files["tokenizer.json"]).encode(GOLDEN).ids
    report = verify_export(weights, path, ids)
    assert 0 < report.max_logit_error < 0.5
    assert report.kl_divergence < 1e-3
    assert report.top1_agreement > 0.97
    assert report.tokens == len(ids)
