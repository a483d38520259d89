"""Tokenizers out of GGUF files: their ids are llama.cpp's, on any text; what can't be read is refused by its name."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.errors import raises_line
from support.gguf_files import write_gguf
from support.vocabularies import TEXTS, byte_level_metadata, sentence_piece_metadata

from fbiedge.errors import ModelFileError
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_tokenizer import PRE_TOKENIZERS, sidecars_from_gguf
from fbiedge.tokenizer import DetokenizeStream, Tokenizer

LlamaTokenizer = Callable[[Any], Callable[..., list[int]]]


def tokenizer(source: Path | dict[str, Any], tmp_path: Path) -> Tokenizer:
    """Ours, by way of a file."""
    path = (
        source
        if isinstance(source, Path)
        else write_gguf(tmp_path / "ours.gguf", {"general.architecture": "llama", **source})
    )
    files = sidecars_from_gguf(GgufFile.open(path).metadata)
    return Tokenizer(files["tokenizer.json"], json.loads(files["tokenizer_config.json"]))


def sidecars(metadata: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = write_gguf(tmp_path / "ours.gguf", {"general.architecture": "llama", **metadata})
    return sidecars_from_gguf(GgufFile.open(path).metadata)


def assert_equal_ids(ours: Tokenizer, theirs: Callable[..., list[int]], texts: list[str]) -> None:
    for text in texts:
        assert ours.encode_rendered(text) == theirs(text), text
        if text and not text.startswith("<s>"):
            assert ours.encode(text) == theirs(text, add_bos=True), text


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentence_piece(space_prefix: bool, llama_tokenizer: LlamaTokenizer, tmp_path: Path) -> None:
    metadata = sentence_piece_metadata({"tokenizer.ggml.add_space_prefix": space_prefix})
    ours = tokenizer(metadata, tmp_path)
    assert_equal_ids(ours, llama_tokenizer(metadata), TEXTS)
    for text in TEXTS:
        if "<" not in text and "▁" not in text:
            assert ours.decode(ours.encode_rendered(text)) == text


def test_the_left_one_of_two_ways_to_a_token(llama_tokenizer: LlamaTokenizer, tmp_path: Path) -> None:
    """In an·a·na both neighbours may become ana; ranks alone would take one of the two cuts wherever it is."""
    pieces = ["an", "na", "ana", "nan", "aa", "aaa", "▁b", "b", "n", "a", "▁"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *pieces],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *(-float(i) for i in range(len(pieces)))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * len(pieces),
    }
    for order in (
        pieces,
        ["na", "ana", "an", *pieces[3:]],
        ["ana", "aaa", "aa", *(set(pieces) - {"ana", "aaa", "aa"})],
    ):
        metadata["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "</s>", *order]
        texts = ["banana", "anana", "ananana bananana", "aaaaaaa", "naaanaanaaa", "b aaa nanan"]
        assert_equal_ids(tokenizer(metadata, tmp_path), llama_tokenizer(metadata), texts)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level(pre: str, llama_tokenizer: LlamaTokenizer, tmp_path: Path) -> None:
    metadata = byte_level_metadata(pre)
    ours = tokenizer(metadata, tmp_path)
    assert_equal_ids(ours, llama_tokenizer(metadata), TEXTS)
    for text in TEXTS:
        if "<" not in text:
            assert ours.decode(ours.encode_rendered(text)) == text


def test_common_pre_tokenizers_cut_a_large_text_as_llama_cpp(
    shared_data: Path, llama_tokenizer: LlamaTokenizer, tmp_path: Path
) -> None:
    """GPT-2's vocabulary will do for all of them."""
    folder = shared_data / "tokenizers/gpt2"
    vocabulary = json.loads(read(folder / "vocab.json.xz"))
    text = read(shared_data / "corpora/wikitext2/wiki.test.raw.xz")[:60_000]
    for pre in ("default", "smollm", "llama-bpe", "qwen2"):
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
            "tokenizer.ggml.merges": read(folder / "merges.txt.xz").split("\n")[1:-1],
            "tokenizer.ggml.bos_token_id": 50256,
            "tokenizer.ggml.eos_token_id": 50256,
        }
        assert tokenizer(metadata, tmp_path).encode_rendered(text) == llama_tokenizer(metadata)(text)


@pytest.fixture(scope="module")
def llama_vocabulary(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's, as llama.cpp's own tests have it."""
    path = tmp_path_factory.mktemp("llama") / "llama-spm.gguf"
    packed = shared_data / "tokenizers/ggml_vocab/ggml-vocab-llama-spm.gguf.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    return path


def vectors(shared_data: Path) -> Iterator[tuple[str, list[int]]]:
    folder = shared_data / "tokenizers/ggml_vocab"
    texts = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    ids = (folder / "ggml-vocab-llama-spm.gguf.out").read_text().splitlines()
    assert len(texts) == len(ids) + 1  # nothing but a newline after the last mark
    return ((text, [int(token) for token in line.split()]) for text, line in zip(texts, ids, strict=False))


def test_vectors_of_llama_cpp(shared_data: Path, llama_vocabulary: Path, tmp_path: Path) -> None:
    ours = tokenizer(llama_vocabulary, tmp_path)
    for text, ids in vectors(shared_data):
        assert ours.encode_rendered(text) == ids, text


def test_llama_2_on_a_large_text(
    shared_data: Path, llama_vocabulary: Path, llama_tokenizer: LlamaTokenizer, tmp_path: Path
) -> None:
    text = read(shared_data / "corpora/wikitext2/wiki.test.raw.xz")[:400_000]
    ours = tokenizer(llama_vocabulary, tmp_path)
    theirs = llama_tokenizer(llama_vocabulary)
    assert_equal_ids(ours, theirs, TEXTS)
    ids = ours.encode_rendered(text)
    assert ids == theirs(text)
    # And the same as Hugging Face's file for the same model.
    assert ids == Tokenizer(read(shared_data / "tokenizers/llama2/tokenizer.json.xz")).encode_rendered(text)


def read(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8").read()


def test_streamed_text_leaves_out_special_tokens_and_keeps_user_defined_ones(tmp_path: Path) -> None:
    for metadata in (sentence_piece_metadata(), byte_level_metadata("qwen2")):
        ours = tokenizer(metadata, tmp_path)
        stream = DetokenizeStream(ours)
        ids = ours.encode("<|user|>Hi 🚀<think>there<|end|></s>")
        text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
        assert text.replace(" ", "") == "Hi🚀<think>there"


def test_files_beside_the_tokenizer(tmp_path: Path) -> None:
    metadata = sentence_piece_metadata({
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": 7,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
    })  # fmt: skip
    files = sidecars(metadata, tmp_path)
    end = metadata["tokenizer.ggml.tokens"].index("<|end|>")
    assert files["chat_template.jinja"] == metadata["tokenizer.chat_template"]
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1, "eos_token_id": [2, 7, end], "do_sample": True, "temperature": 0.7, "top_k": 20,
    }  # fmt: skip
    config = json.loads(files["tokenizer_config.json"])
    expected = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
    }
    assert expected.items() <= config.items()


def test_tokens_around_the_text(tmp_path: Path) -> None:
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    for metadata in (sentence_piece_metadata(both), byte_level_metadata("qwen2", both)):
        ours = tokenizer(metadata, tmp_path)
        bos, eos = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
        assert ours.encode("a")[0] == bos and ours.encode("a")[-1] == eos
        ours = tokenizer({**metadata, **dict.fromkeys(both, False)}, tmp_path)
        assert ours.encode("a") == ours.encode_rendered("a")


def test_without_a_tokenizer(tmp_path: Path) -> None:
    files = sidecars({"tokenizer.ggml.model": "no_vocab"}, tmp_path)
    assert files.keys() == {"generation_config.json"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer.ggml.model": None}, ("no tokenizer", "tokenizer.ggml.model is missing")),
        ({"tokenizer.ggml.model": "t5"}, ("kind 't5'", "'llama' or 'gpt2'")),
        ({"tokenizer.ggml.model": 3}, ("tokenizer.ggml.model is an integer",)),
        ({"tokenizer.ggml.tokens": None}, ("no tokenizer.ggml.tokens",)),
        ({"tokenizer.ggml.tokens": [1, 2]}, ("tokenizer.ggml.tokens is numbers", "a list of texts")),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, ("holds 'a' twice",)),
        ({"tokenizer.ggml.scores": None}, ("no tokenizer.ggml.scores",)),
        ({"tokenizer.ggml.scores": [1.0]}, ("tokenizer.ggml.scores holds 1 numbers",)),
        ({"tokenizer.ggml.token_type": [1, 2]}, ("tokenizer.ggml.token_type holds 2 numbers",)),
        ({"tokenizer.ggml.bos_token_id": 99999}, ("tokenizer.ggml.bos_token_id is 99999", "below")),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, ("tokenizer.ggml.eos_token_id is text",)),
        ({"tokenizer.ggml.add_bos_token": 1}, ("tokenizer.ggml.add_bos_token is an integer",)),
        ({"tokenizer.chat_template": 1}, ("tokenizer.chat_template is an integer",)),
    ],
)
def test_unusable_sentence_piece(changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    with raises_line(ModelFileError, *parts):
        sidecars(sentence_piece_metadata() | changes, tmp_path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer.ggml.pre": "bloom"}, ("pre-tokenizer 'bloom'", "qwen2")),
        ({"tokenizer.ggml.merges": None}, ("no tokenizer.ggml.merges",)),
        ({"tokenizer.ggml.merges": ["a b", "nospace"]}, ("'a b'", "not all tokens")),
        ({"tokenizer.ggml.merges": ["nospace"]}, ("'nospace'", "not all tokens")),
    ],
)
def test_unusable_byte_level(changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    with raises_line(ModelFileError, *parts):
        sidecars(byte_level_metadata("qwen2") | changes, tmp_path)
