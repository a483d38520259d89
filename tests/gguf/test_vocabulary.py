"""tokenizer.json in a GGUF: llama.cpp's ids are ours on any text, or the tokenizer is refused."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_checkpoints import FILES, gguf_config
from support.vocabularies import TEXTS, byte_level_metadata, sentence_piece_metadata

from fbiedge.errors import CheckpointError
from fbiedge.exporters.gguf.metadata import add_metadata
from fbiedge.exporters.gguf.provenance import Provenance
from fbiedge.exporters.gguf.storage import GgufOptions
from fbiedge.exporters.gguf.vocabulary import Vocabulary, read_vocabulary
from fbiedge.exporters.gguf.writer import write_model
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_tokenizer import sidecars_from_gguf
from fbiedge.model_file import ModelFile
from fbiedge.tokenizer import Tokenizer

Files = dict[str, str]


def vocabulary(files: Files, vocab_size: int | None = None) -> Vocabulary:
    return read_vocabulary(gguf_config(vocab_size=vocab_size or size_of(files)), files)


def size_of(files: Files) -> int:
    model = json.loads(files["tokenizer.json"])
    return 1 + max([*model["model"]["vocab"].values(), *(token["id"] for token in model["added_tokens"])])


def write(path: Path, files: Files, vocab_size: int | None = None) -> Path:
    """A GGUF of nothing but metadata."""
    config = gguf_config(vocab_size=vocab_size or size_of(files))
    found = read_vocabulary(config, files)
    write_model(
        path,
        "llama",
        lambda writer: add_metadata(writer, config, files, found, GgufOptions(), Provenance(), exact=True),
        [],
    )
    return path


def bundled() -> Files:
    model = ModelFile.open(Path(__file__).parents[2] / "fbiedge/models/default.onnx")
    names = {
        f"{name}.json": model.metadata.get(name) for name in ("tokenizer", "tokenizer_config", "generation_config")
    }
    return {name: text for name, text in names.items() if text}


def gpt2(shared_data: Path) -> Files:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    folder = shared_data / "tokenizers/gpt2"
    vocab = json.loads(lzma.decompress((folder / "vocab.json.xz").read_bytes()))
    lines = lzma.decompress((folder / "merges.txt.xz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    library = Library(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return {"tokenizer.json": library.to_str(), "tokenizer_config.json": json.dumps(config)}


def llama2(shared_data: Path) -> Files:
    text = lzma.decompress((shared_data / "tokenizers/llama2/tokenizer.json.xz").read_bytes()).decode()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config)}


def sidecars(metadata: dict[str, Any]) -> Files:
    """Of metadata as a GGUF file's reader gives it, numbers as arrays."""
    read = {key: np.array(value) if type(value) is list and type(value[0]) is not str else value
            for key, value in metadata.items()}  # fmt: skip
    return sidecars_from_gguf(read)


def corpus(shared_data: Path) -> str:
    """About 300 kB of many kinds."""
    parts = []
    for folder in sorted((shared_data / "corpora").iterdir()):
        for path in sorted(folder.rglob("*"))[:1]:
            data = path.read_bytes()
            parts.append((lzma.decompress(data) if path.suffix == ".xz" else data)[:50_000].decode(errors="replace"))
    return "\n".join(parts)


def check(path: Path, files: Files, open_llama: Callable[..., Any], texts: list[str]) -> None:
    ours = Tokenizer(files["tokenizer.json"], json.loads(files.get("tokenizer_config.json", "{}")))
    theirs = open_llama(path)
    for text in texts:
        if text:  # of nothing, ours makes the beginning of a text where a model has one
            assert theirs(text, add_bos=True) == ours.encode(text), text


@pytest.mark.parametrize("which", ["bundled", "bytes", "gpt2", "llama2"])
def test_ids_are_equal(which: str, tmp_path: Path, llama_tokenizer: Any, request: pytest.FixtureRequest) -> None:
    texts = list(TEXTS)
    if which in ("bundled", "bytes"):
        files = bundled() if which == "bundled" else FILES
    else:
        shared = request.getfixturevalue("shared_data")
        files = gpt2(shared) if which == "gpt2" else llama2(shared)
        texts.append(corpus(shared))
    check(write(tmp_path / "model.gguf", files), files, llama_tokenizer, texts)


@pytest.mark.parametrize(
    "pre", ["default", "falcon", "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "qwen35", "sentencepiece"]
)
def test_what_the_reader_writes_comes_back(pre: str, tmp_path: Path, llama_tokenizer: Any) -> None:
    """GGUF -> tokenizer.json -> GGUF: the same tokens, merges and way of cutting; and llama.cpp gives the same ids."""
    metadata = sentence_piece_metadata() if pre == "sentencepiece" else byte_level_metadata(pre)
    files = sidecars(metadata | {"tokenizer.ggml.add_bos_token": True})
    found = vocabulary(files)
    assert found.tokens == metadata["tokenizer.ggml.tokens"]
    assert found.merges == metadata.get("tokenizer.ggml.merges")
    if pre != "sentencepiece":
        assert found.pre == pre
    assert found.add_bos and found.special["bos"] == metadata["tokenizer.ggml.bos_token_id"]
    check(write(tmp_path / "model.gguf", files), files, llama_tokenizer, TEXTS)


def test_of_the_bundled_model() -> None:
    """What a chat in llama.cpp depends on."""
    found = vocabulary(bundled())
    assert (found.model, found.pre, found.add_bos, found.add_eos, found.notes) == ("gpt2", "gpt-2", True, False, ())
    assert found.special == {"bos": 1, "eos": 2, "eot": 5, "unknown": 0}
    assert found.tokens[:6] == ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert found.types[:7] == [3, 3, 3, 3, 3, 3, 1]


def test_rows_without_a_token_get_names() -> None:
    found = vocabulary(FILES, vocab_size=264)
    assert found.tokens[259:] == [f"[UNUSED_{i}]" for i in range(259, 264)] and found.types[258:] == [1, *[5] * 5]


def changed(files: Files, **parts: Any) -> Files:
    return files | {"tokenizer.json": json.dumps(json.loads(files["tokenizer.json"]) | parts)}


def trained(kind: str) -> Files:
    metadata = sentence_piece_metadata() if kind == "llama" else byte_level_metadata("gpt-2")
    return sidecars(metadata)


def model_of(files: Files, **parts: Any) -> Files:
    return changed(files, model=json.loads(files["tokenizer.json"])["model"] | parts)


SPLIT = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("kind", "parts", "reason"),
    [
        ("gpt2", {"pre_tokenizer": SPLIT}, "it cuts texts by [a-z]+, for which llama.cpp has no name"),
        ("gpt2", {"pre_tokenizer": None}, "it cuts texts by nothing"),
        ("gpt2", {"pre_tokenizer": {"type": "Whitespace"}}, "it cuts texts by Whitespace"),
        ("gpt2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "puts a space before every text"),
        ("gpt2", {"normalizer": {"type": "Lowercase"}}, "it changes texts by Lowercase"),
        ("gpt2", {"post_processor": {"type": "BertProcessing"}}, "it adds tokens by BertProcessing"),
        ("llama", {"normalizer": {"type": "NFKC"}}, "it changes texts by NFKC"),
        ("llama", {"normalizer": None}, "nothing turns its spaces into ▁"),
        ("llama", {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}, "but has tokens with spaces inside"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_have(kind: str, parts: Any, reason: str) -> None:
    with raises_line(CheckpointError, "llama.cpp can't have this tokenizer", reason, "--tokenizer FILE"):
        vocabulary(changed(trained(kind), **parts))


def test_models_that_llama_cpp_does_not_have() -> None:
    files = trained("llama")
    merges = json.loads(files["tokenizer.json"])["model"]["merges"]
    for parts, reason in (
        ({"merges": merges[:-3]}, "3 ways to put two tokens together are no merges"),
        ({"byte_fallback": False}, "no byte tokens"),
        ({"type": "Unigram"}, "its model is 'Unigram', expected 'BPE'"),
        ({"dropout": 0.1}, "its model has dropout 0.1"),
    ):
        with raises_line(CheckpointError, "llama.cpp can't have this tokenizer", reason):
            vocabulary(model_of(files, **parts))


def test_ignored_merges_must_be_llama_cpps() -> None:
    """gpt-2's pieces with ignored merges are no tokenizer that it has."""
    with raises_line(CheckpointError, "for which llama.cpp has no name"):
        vocabulary(model_of(trained("gpt2"), ignore_merges=True))


def test_differences_on_rare_texts_are_said() -> None:
    found = vocabulary(changed(trained("gpt2"), normalizer={"type": "NFC"}))
    assert found.notes == ("characters written in two parts aren't joined first (NFC)",)


def test_missing_broken_or_too_large() -> None:
    with raises_line(CheckpointError, "there is no tokenizer.json", "--tokenizer FILE"):
        vocabulary({}, 300)
    with raises_line(CheckpointError, "tokenizer.json can't be read: KeyError 'model'"):
        vocabulary({"tokenizer.json": "{}"}, 300)
    with raises_line(CheckpointError, "tokenizer.json has ids up to 258, but the vocabulary is 200"):
        vocabulary(FILES, 200)


def test_merges_written_in_the_older_way() -> None:
    files = trained("gpt2")
    merges = [" ".join(merge) for merge in json.loads(files["tokenizer.json"])["model"]["merges"]]
    assert vocabulary(model_of(files, merges=merges)) == vocabulary(files)


def test_the_pairs_of_a_file(tmp_path: Path) -> None:
    metadata = GgufFile.open(write(tmp_path / "model.gguf", FILES)).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2" and list(metadata["tokenizer.ggml.merges"]) == []
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_eos_token"] is False
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
