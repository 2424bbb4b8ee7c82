"""
The readers of model.py: which checkpoints and vocabularies they accept and with what result, and
that every damaged or foreign one is refused by an InputError whose message is one line and names
what is wrong. The safetensors package is the judge of the file format, where it is installed.

    python -m pytest tests/test_loading.py
"""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from model import GPT, TRANSPOSED, Config, InputError, read_header, read_safetensors
from value import load_tokenizer, write_safetensors
from test_model import SHARED, tiny_weights, write_checkpoint


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


def refused(call, *words):
    """call() raises InputError, with a message of one line that holds every one of the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert [word for word in words if word not in message] == [], message


# ------------------------------------------------------------------- loading: what must be accepted

MASK = {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril().bool(),
        "h.0.attn.masked_bias": torch.tensor(-1e4)}


@pytest.mark.parametrize("extra", [{}, MASK, {"lm_head.weight": tiny_weights()["wte.weight"]}],
                         ids=["plain", "mask", "head"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_prefix_mask_and_repeated_head(prefix, extra, tiny, tmp_path):
    weights = {prefix * (name != "lm_head.weight") + name: tensor
               for name, tensor in {**tiny_weights(), **extra}.items()}
    other = GPT.from_pretrained(write_checkpoint(tmp_path / "other", weights))
    tokens = torch.arange(20)[None]
    assert torch.equal(other(tokens), GPT.from_pretrained(tiny)(tokens))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_stored_and_wanted_precision(stored, wanted, tmp_path):
    weights = {name: tensor.to(stored) for name, tensor in tiny_weights().items()}
    model = GPT.from_pretrained(write_checkpoint(tmp_path / "tiny", weights), dtype=wanted)
    loaded = model.state_dict()
    for name, tensor in weights.items():
        linear = tensor.dim() == 2 and name.startswith("h.")
        assert torch.equal(loaded[name], (tensor.T if linear else tensor).to(wanted)), name
    hidden = model(torch.arange(5)[None])
    assert hidden.dtype == wanted and model.unembed(hidden).dtype == torch.float32


# -------------------------------------------------------------------- loading: what must be refused

CHANGES = {      # what is put in (None: taken out) -> what the message must say
    "missing": ({"h.1.mlp.c_fc.bias": None, "wpe.weight": None},
                ["Missing", "h.1.mlp.c_fc.bias", "wpe.weight"]),
    "unexpected": ({"h.2.ln_1.bias": torch.ones(16), "score.weight": torch.ones(1, 16)},
                   ["Unexpected", "h.2.ln_1.bias", "score.weight"]),
    "shape": ({"wte.weight": torch.ones(37, 15), "h.0.mlp.c_fc.weight": torch.ones(64)},
              ["wte.weight", "[37, 15]", "[37, 16]", "h.0.mlp.c_fc.weight"]),
    "transposed": ({"h.0.attn.c_attn.weight": torch.ones(48, 16)}, ["h.0.attn.c_attn.weight"]),
    "renamed": ({"ln_f.weight": None, "model.ln_f.weight": torch.ones(16)},
                ["Unexpected", "model.ln_f.weight", "Missing", '"ln_f.weight"']),
    "twice": ({"transformer.wpe.weight": torch.ones(24, 16)}, ["wpe.weight twice"]),
    "newline": ({"a\nb": torch.ones(1)}, ["Unexpected"]),
    "not finite": ({"h.1.ln_1.bias": torch.full((16,), math.nan),
                    "wpe.weight": torch.full((24, 16), math.inf)},
                   ["NaN or infinite", "wpe.weight, h.1.ln_1.bias;", "fetch it again"]),
    "untied": ({"lm_head.weight": torch.ones(37, 16)}, ["lm_head.weight"]),
    "untied, smaller": ({"lm_head.weight": torch.ones(36, 16)}, ["lm_head.weight"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_do_not_fit_are_named(name, tmp_path):
    changes, words = CHANGES[name]
    weights = {key: tensor for key, tensor in {**tiny_weights(), **changes}.items()
               if tensor is not None}
    directory = write_checkpoint(tmp_path / "tiny", weights)
    refused(lambda: GPT.from_pretrained(directory), *words)


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("tie_word_embeddings", False),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
    ("add_cross_attention", True), ("n_head", 3), ("n_layer", 0), ("vocab_size", "37"),
    ("n_positions", None), ("n_embd", {"a": 1}), ("n_inner", -1), ("layer_norm_epsilon", "small"),
    ("layer_norm_epsilon", None), ("layer_norm_epsilon", -1.0), ("eos_token_id", 37),
    ("bos_token_id", None), ("n_embd", 10 ** 15), ("vocab_size", 2 ** 63), ("n_layer", 10 ** 7),
    ("n_inner", 10 ** 18)])
def test_configurations_refused(key, value, tmp_path):
    directory = write_checkpoint(tmp_path / "tiny", **{key: value})
    refused(lambda: GPT.from_pretrained(directory), str(directory / "config.json"))


NO_OBJECT = (b"", b"{", b"[]", b"null", b"<html>\n</html>", b"\xff\xfe", b"[" * 100_000)


def test_json_files_that_hold_no_object(tiny):
    for content in NO_OBJECT:
        (tiny / "vocab.json").write_bytes(content)
        refused(lambda: load_tokenizer(tiny), "vocab.json")
    for content in NO_OBJECT:
        (tiny / "config.json").write_bytes(content)
        refused(lambda: GPT.from_pretrained(tiny), "config.json")


def test_files_that_are_not_there(tiny):
    refused(lambda: GPT.from_pretrained(tiny / "none"), "none")
    (tiny / "model.safetensors").unlink()
    refused(lambda: GPT.from_pretrained(tiny), "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (tiny / name).write_text("{}")
        refused(lambda: GPT.from_pretrained(tiny), name)
        (tiny / name).unlink()
    (tiny / "config.json").unlink()
    refused(lambda: GPT.from_pretrained(tiny), "config.json")


def test_cut_lengthened_and_replaced_weights(tiny):
    path = tiny / "model.safetensors"
    whole = path.read_bytes()
    data = read_header(path)[2]
    cuts = [whole[:end] for end in (0, 7, 8, 9, data // 2, data, data + 1, len(whole) - 1)]
    others = [whole + b"\0", b"Not Found\n", b"version https://git-lfs.github.com/spec/v1\n" * 3,
              b"\xff" * 8 + whole[8:], whole[:8] + b"\xff" + whole[9:]]
    for content in cuts + others:
        path.write_bytes(content)
        refused(lambda: GPT.from_pretrained(tiny), "model.safetensors")


FIRST = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
LIES = [{"data_offsets": offsets} for offsets in ([8, 12, 16], [8], ["8", "16"], "89", [8.0, 16.0],
        [8, float("inf")], [16, 8], [-8, 0], [12, 20], [8, 12])]
LIES += [{"shape": shape} for shape in ([3], [-1, -2], [2.0], "2", 2, None)]
LIES += [{"dtype": dtype} for dtype in ("F33", None, ["F32"])]
LIES += [{"shape": [4], "data_offsets": [0, 16]}, {"shape": [1], "data_offsets": [12, 16]}]


@pytest.mark.parametrize("lie", [{}, *LIES], ids=str)
def test_headers_that_lie(lie, tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"first": FIRST, "second": {**SECOND, **lie}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.float32([1, 2, 3, 4]).tobytes())
    if lie:
        refused(lambda: list(read_safetensors(path)), "w.safetensors")
    else:
        tensors = {name: tensor.tolist() for name, tensor in read_safetensors(path)}
        assert tensors == {"first": [1, 2], "second": [3, 4]}


ENTRY = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {      # what the file holds between its header's length and its one tensor -> what is said of it
    "a name twice": ("{%s, %s}" % (ENTRY, ENTRY), "twice"),
    "a key twice": ('{"w": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 4]}}', "twice"),
    "NaN": ('{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "NaN"),
    "true": ('{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "extent"),
    "nesting": ('{"w": %s}' % ("[" * 100_000), "Recursion"),
    "not UTF-8": (b'{"\xff": 1}', "UnicodeDecode"),
    "a list": ("[%s]" % ENTRY.partition(": ")[2], "object"),
    "a long number": ('{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000), "whole"),
    "many dimensions": ('{"w": {"dtype": "F32", "shape": %s, "data_offsets": [0, 4]}}' % ([1] * 99), "extent"),
    "a shape that is none": ('{"w": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}', "extent"),
    "overflow": ('{"w": {"dtype": "F32", "shape": [%d, 4], "data_offsets": [0, 4]}}' % 2 ** 62, "extent"),
    "nothing, overflowing": ('{"w": {"dtype": "F32", "shape": [0, %d, 4], "data_offsets": [0, 0]}, "v": '
                             '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}' % 2 ** 62, "extent"),
    "no dtype": ('{"w": {"shape": [1], "data_offsets": [0, 4]}}', "dtype"),
    "metadata": ('{%s, "__metadata__": 3}' % ENTRY, "whole"),
}


def write_header(path, header, data=bytes(4)):
    header = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_headers_refused(name, tmp_path):
    header, word = HEADERS[name]
    path = write_header(tmp_path / "w.safetensors", header)
    refused(lambda: list(read_safetensors(path)), "w.safetensors", word)


def test_headers_accepted(tmp_path):
    for header in ("{%s}" % ENTRY, "{%s}%s" % (ENTRY, " " * 37), ' {%s, "__metadata__": {"a": "b"}}' % ENTRY):
        path = write_header(tmp_path / "w.safetensors", header, np.float32(2.5).tobytes())
        assert dict(read_safetensors(path)) == {"w": torch.tensor([2.5])}


@pytest.mark.parametrize("content, word", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 497\n", "Git-LFS pointer"),
    (b"<!DOCTYPE html>\n<html><body>Not found" + bytes(90), "web page"),
    (b"\n <html>" + b"x" * 99, "web page")])
def test_what_lies_in_a_files_place_is_named(content, word, tiny):
    for file in ("model.safetensors", "config.json"):
        (tiny / file).write_bytes(content)
        refused(lambda: GPT.from_pretrained(tiny), file, word)


def test_a_header_longer_than_the_limit(tmp_path):
    for length in (100_000_000, 100_000_001):
        path = write_header(tmp_path / "w.safetensors", b"{}" + b" " * (length - 2), b"")
        if length <= 100_000_000:
            assert list(read_safetensors(path)) == []
        else:
            refused(lambda: read_header(path), "w.safetensors", "header")
    path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_takes_little_more_than_the_model(tiny, tmp_path):
    """Peak memory of from_pretrained in bfloat16, in a process of its own, over the bytes of the weights."""
    config = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    shapes = {name: tensor.shape[::-1] if name.endswith(TRANSPOSED) else tensor.shape
              for name, tensor in GPT(Config(*config.values(), 3072)).state_dict().items()}
    directory = write_checkpoint(tmp_path / "large", {
        name: torch.randint(2 ** 14, tuple(shape), dtype=torch.int16).view(torch.bfloat16)
        for name, shape in shapes.items()}, **config)
    code = ("import sys, torch; from model import GPT; "
            "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024; "
            "GPT.from_pretrained(sys.argv[2]); before = peak(); "
            "model = GPT.from_pretrained(sys.argv[1], dtype=torch.bfloat16); "
            "print((peak() - before) / sum(p.nbytes for p in model.parameters()))")
    done = subprocess.run([sys.executable, "-c", code, directory, tiny], cwd=ROOT, capture_output=True,
                          text=True)
    assert 0.9 < float(done.stdout) < 1.2, done


def test_random_damage_is_a_load_or_one_line(tiny):
    path = tiny / "model.safetensors"
    whole, data = path.read_bytes(), read_header(path)[2]            # data: where the header ends
    tokens = torch.arange(20)[None]
    expected = GPT.from_pretrained(tiny)(tokens)
    random, refusals = np.random.RandomState(7), 0
    for _ in range(200):
        content = bytearray(whole)
        if random.rand() < 0.2:
            del content[random.randint(len(whole)):]
        else:
            content[random.randint(data)] = b'07e,"\\\x80'[random.randint(7)]
        path.write_bytes(content)
        try:
            assert torch.equal(GPT.from_pretrained(tiny)(tokens), expected)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
    assert 150 < refusals < 200              # some bytes are replaced by themselves, some by equals


# -------------------------------------------------------------------------------- safetensors files

TENSORS = {"bytes": torch.arange(3, dtype=torch.uint8),           # 3 bytes: the next is unaligned
           "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4),
           "flags": torch.tensor([True, False]), "strided": torch.arange(6.0).view(2, 3).T,
           "half": torch.tensor([1.5, -torch.inf]).half(), "long": torch.tensor([-1, 2 ** 62]),
           "bf16": torch.arange(6).view(2, 1, 3).bfloat16()}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        assert torch.equal(left[name], right[name]), name


def test_safetensors_round_trip(tmp_path):
    path, metadata = tmp_path / "t.safetensors", {"reward": "né \"quoted\"\n", "seed": "0"}
    write_safetensors(path, TENSORS, metadata)
    assert read_header(path)[1] == metadata
    loaded = dict(read_safetensors(path))
    same(loaded, TENSORS)
    loaded["long"][0] = 7                                         # a copy of its own
    same(dict(read_safetensors(path)), TENSORS)
    write_safetensors(path, {"w": torch.zeros(1)}, {})            # replaced, nothing left beside it
    same(dict(read_safetensors(path)), {"w": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_package_agrees(tmp_path):
    package, path = pytest.importorskip("safetensors.torch"), tmp_path / "t.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    write_safetensors(path, tensors, {"seed": "0"})
    same(package.load_file(path), tensors)
    package.save_file(tensors, path, {"seed": "1"})
    same(dict(read_safetensors(path)), tensors)
    assert read_header(path)[1] == {"seed": "1"}


# ---------------------------------------------------------------------------------------- tokenizer

def tiny_vocabulary():
    """All single bytes as GPT-2 writes them, printable ones first, a few words, the end of text."""
    plain = [chr(b) for b in range(256) if chr(b).isprintable() and b != 32]
    words = ["ab", "abc", "bc", "\u0120film", "<|endoftext|>"]    # \u0120 stands for the space
    characters = plain + [chr(256 + i) for i in range(256 - len(plain))] + words
    return {character: index for index, character in enumerate(characters)}


def write_vocabulary(directory, vocabulary):
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    return directory


def test_vocabulary_of_the_directory(tmp_path):
    vocabulary = tiny_vocabulary()
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, vocabulary))
    assert tokenizer.n_vocab == len(vocabulary) == 261
    ids = {"a film": ["a", "\u0120film"], "xabcd": ["x", "abc", "d"], "bcab": ["bc", "ab"],
           "é \n": ["\u00c3", "\u00a9", "\u0120", "\u010a"]}    # é is the bytes C3 A9
    for text, tokens in ids.items():
        assert tokenizer.encode(text) == [vocabulary[token] for token in tokens]
    assert tokenizer.encode("ab<|endoftext|>", allowed_special="all") == [256, 260]
    for text in ("It's 12 films,\n\n  naïve 日本 \U0001f3ac!\t", "\u00a0\u00ad\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("change", [{"a": None}, {"\u0120": None}, {"日": 261}, {"ab": 3},
                                    {"<|endoftext|>": 261}, {"ab": "256"}, {"ab": -1}, {"ab": 1.5},
                                    {"<|endoftext|>": "260"}], ids=str)
def test_vocabularies_refused(change, tmp_path):
    vocabulary = {token: index for token, index in {**tiny_vocabulary(), **change}.items()
                  if index is not None}
    refused(lambda: load_tokenizer(write_vocabulary(tmp_path, vocabulary)), "vocab.json")


def test_directory_without_vocabulary(tmp_path, monkeypatch):
    tiny = write_checkpoint(tmp_path / "tiny")
    refused(lambda: load_tokenizer(tiny), "37", "vocab.json")

    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    large = write_checkpoint(tmp_path / "large", vocab_size=50257)
    refused(lambda: load_tokenizer(large), "TIKTOKEN_CACHE_DIR")


def test_gpt2_vocabulary(tmp_path, monkeypatch):
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("../shared/tiktoken_cache is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = load_tokenizer(write_checkpoint(tmp_path / "large", vocab_size=50257))
    assert tokenizer.encode("hello world") == [31373, 995]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
