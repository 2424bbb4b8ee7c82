"""
What model.py reads: weights, settings, vocabularies and prompts. What is right gives the right model;
what another network, another tokenizer or damage would change is refused in one line.
"""
import ast
import io
import json
import random
import sys

import pytest
import torch
from tests.conftest import ROOT, SHARED
from tests.test_model import CONFIG, TOY, checkpoint, tiny_weights

from model import (BYTES, GPT, InputError, in_turn, load, load_tokenizer, read_prompts, read_safetensors,
                   show_progress)

# ----------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("edit, message", [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"model_type": "llama"}, "llama"), ({"activation_function": "relu"}, "relu"),
    ({"n_layer": 3}, "Missing key"), ({"n_head": 3}, "n_head 3 does not divide n_embd 16"),
    ({"n_embd": None}, "n_embd|NoneType"), ({"n_embd": "16"}, "n_embd"), ({"n_head": 0}, "n_head"),
    ({"n_layer": -1}, "n_layer"), ({"n_positions": 24.0}, "n_positions"), ({"n_inner": True}, "n_inner"),
    ({"layer_norm_epsilon": "1e-5"}, "TypeError"), ({"layer_norm_epsilon": -1}, "eps")])
def test_another_network_and_odd_numbers_are_refused_in_one_line(tmp_path, edit, message):
    with pytest.raises(InputError, match=message) as error:
        load(checkpoint(tmp_path / "x", **edit))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("config, generation, ends", [
    ({}, None, {36}), ({"eos_token_id": [5, 6]}, None, {5, 6}), ({"eos_token_id": None}, None, set()),
    ({"eos_token_id": 0}, None, {0}), ({}, {"eos_token_id": 7}, {36, 7}),
    ({}, {"eos_token_id": [7, 0]}, {36, 7, 0}), ({}, {"eos_token_id": None}, {36})])
def test_any_listed_end_ends_a_text(tmp_path, config, generation, ends):
    folder = checkpoint(tmp_path / "x", **config)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert set(GPT.from_pretrained(folder).config.eos_ids) == ends


def test_nothing_is_checked_by_assert():
    """python -O runs no assert."""
    tree = ast.parse((ROOT / "model.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


# ------------------------------------------------------------------------------------- the weights


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json there"):
        load(tmp_path)
    folder = checkpoint(tmp_path / "x")
    whole = (folder / "model.safetensors").read_bytes()
    for damage in (whole[:-100], whole + b"more", whole[:6], b""):
        (folder / "model.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match="no plain, whole GPT-2"):
            load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not sharded"):
        load(folder)
    with pytest.raises(InputError, match="no network in tests"):
        load("gpt2")


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("header, message", [
    ({"a": ENTRY, "b": ENTRY}, "not where"),                                    # shared bytes
    ({"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 36]}}, "not where"),       # a hole
    ({"a": ENTRY | {"shape": [-4]}}, "not where"), ({"a": ENTRY | {"shape": [2 ** 62, 4]}}, "not where"),
    ({"a": ENTRY | {"dtype": "I8"}}, "a is stored as 'I8'"),
    ({"a": ENTRY | {"dtype": "F8_E4M3"}}, "a is stored as 'F8_E4M3'")])
def test_the_bytes_of_tensors_follow_each_other(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(36))
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path / "x")


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path):
    (tmp_path / "x").write_bytes((2 ** 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError):
        read_safetensors(tmp_path / "x")


NAN = torch.full((37, 16), torch.nan)


@pytest.mark.parametrize("parts, message", [
    ({"h.0.attn.c_attn.lora_A": torch.ones(8, 16)}, "'h.0.attn.c_attn.lora_A' is not a part"),
    ({"lm_head.bias": torch.ones(37)}, "'lm_head.bias' is not a part"),
    ({"wte.weight": NAN}, "wte.weight is not finite"),
    ({"wte.weight": NAN, "lm_head.weight": NAN}, "wte.weight is not finite"),   # not: untied
    ({"lm_head.weight": torch.zeros(37, 16)}, "head is not its embedding")])
def test_only_heads_are_left_out_and_all_weights_are_finite(tmp_path, parts, message):
    with pytest.raises(InputError, match=message):
        load(checkpoint(tmp_path / "x", tiny_weights() | parts))


# --------------------------------------------------------------------------------------- tokenizers

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("g", "o"), ("o", "d"), ("go", "od"), ("Ġ", "good")]
VOCAB = {t: i for i, t in enumerate([*BYTES, *("".join(pair) for pair in MERGES), "<user>", "</s>"])}
TEXT = "the good <user> thegood</s> The  été\n\n"
ADDED = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE = {"type": "BPE", "vocab": VOCAB, "merges": MERGES}


def vocabulary_files(folder, vocab=VOCAB, merges=MERGES, header="#version: 0.2\n", special=("<user>", "</s>")):
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(header + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": special}))


def tokenizer_file(folder, vocab=VOCAB, special=("<user>", "</s>"), **edit):
    raw = {"normalizer": None, "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL,
           "model": BPE | {"vocab": vocab},
           "added_tokens": [{"id": vocab[name], "content": name, **ADDED} for name in special]}
    (folder / "tokenizer.json").write_text(json.dumps(raw | edit))


def random_model(folder, rows=len(VOCAB), **config):
    return checkpoint(folder, tiny_weights() | {"wte.weight": torch.randn(rows, 16)}, vocab_size=rows,
                      **config)


def test_tokens_are_those_of_the_tokenizers_library(tmp_path):
    """Special tokens of any form are not split, and are no part of a decoded text."""
    tokenizers, folder = pytest.importorskip("tokenizers"), random_model(tmp_path / "x")
    tokenizer_file(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    ours = load_tokenizer(folder)
    assert ours.encode(TEXT) == theirs
    assert ours.decode(theirs) == "the good  thegood The  été\n\n"
    (folder / "tokenizer.json").unlink()
    vocabulary_files(folder)
    assert load_tokenizer(folder).encode(TEXT) == theirs


def test_trained_vocabularies_are_read_as_the_tokenizers_library_reads_them(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    rng, lines = random.Random(0), (ROOT / "README.md").read_text().splitlines()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    for size in (300, 900):
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = tokenizers.decoders.ByteLevel()
        theirs.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
            show_progress=False))
        theirs.add_tokens(["covid", "covid19"])             # one begins with the other
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        for _ in range(100):
            text = "".join(rng.choice([*lines, "covid19", "<|endoftext|>", "  \n", "été 日本 🙂", "it's"])
                           for _ in range(4))
            tokens = theirs.encode(text).ids
            assert ours.encode(text) == tokens
            assert ours.decode(tokens) == theirs.decode(tokens)


def test_special_are_bos_eos_and_what_files_call_special(tmp_path):
    """Added words and words that no merge makes vanished from texts; an end was read to the reward."""
    extra = {"Ġodd": len(VOCAB), "covid": len(VOCAB) + 1, "<end>": len(VOCAB) + 2}
    folder = random_model(tmp_path / "x", len(VOCAB) + 3, eos_token_id=len(VOCAB) + 2)
    names = [{"id": extra[name], "content": name, **ADDED, "special": False} for name in ("covid", "<end>")]
    tokenizer_file(folder, VOCAB | extra, added_tokens=names)
    tokenizer = load(folder)[1]
    assert tokenizer.encode("goodcovid<user>")[:2] == [VOCAB["good"], extra["covid"]]
    assert tokenizer.decode(extra.values()) == " oddcovid"
    assert tokenizer.decode([VOCAB["<user>"]]) == "<user>"


def test_the_end_that_settings_name_is_special(tmp_path):
    tokenizer_file(tmp_path, special=[])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("good</s>")) == "good"


def test_merges_without_a_version_line_and_with_windows_lines(tmp_path):
    """The first merge was lost."""
    vocabulary_files(tmp_path, header="")
    assert load_tokenizer(tmp_path).encode("the") == [VOCAB["the"]]
    (tmp_path / "merges.txt").write_bytes((tmp_path / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode("the") == [VOCAB["the"]]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_cut_merges_are_refused(tmp_path, cut):
    vocabulary_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "merges.txt"
    path.write_bytes(path.read_bytes()[:-1 - cut])
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("edit, name", [
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"), ({"pre_tokenizer": None}, "pre_tokenizer"),
    ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "use_regex"),
    ({"decoder": {"type": "WordPiece"}}, "decoder"), ({"model": BPE | {"type": "WordPiece"}}, "WordPiece"),
    ({"model": BPE | {"dropout": 0.1}}, "dropout"), ({"model": BPE | {"byte_fallback": True}}, "byte_fall"),
    ({"model": BPE | {"merges": MERGES[::-1]}}, "out of order"),
    ({"model": BPE | {"merges": MERGES[1:]}}, "out of order"),              # th of the is not made
    ({"model": BPE | {"vocab": VOCAB | {"<pad>": 300}}}, "not numbered"),   # a hole
    ({"model": BPE | {"vocab": VOCAB | {"<pad>": 5}}}, "not numbered"),     # twice
    ({"model": BPE | {"vocab": {t: i for t, i in VOCAB.items() if t != "é"}}}, "some bytes are no token"),
    *[({"added_tokens": [{"id": VOCAB["</s>"], "content": "</s>", **ADDED, flag: True}]}, f"'</s>': {flag}")
      for flag in ("lstrip", "rstrip", "single_word")]])
def test_a_tokenizer_that_we_cannot_follow_is_refused_by_name(tmp_path, edit, name):
    folder = random_model(tmp_path / "x")
    tokenizer_file(folder, **edit)
    with pytest.raises(InputError, match=f"not GPT-2's kind.*{name}"):
        load(folder)


def test_an_unk_token_changes_nothing_where_each_byte_is_a_token(tmp_path):
    tokenizer_file(tmp_path, model=BPE | {"unk_token": "<unk>"})
    assert load_tokenizer(tmp_path).encode("the") == [VOCAB["the"]]


def test_an_added_name_without_letters_is_never_found(tmp_path):
    """An added "" was found everywhere, for ever."""
    vocab = VOCAB | {"": len(VOCAB)}
    tokenizer_file(tmp_path, vocab, special=["", "<user>"])
    assert load_tokenizer(tmp_path).encode("the<user>") == [VOCAB["the"], VOCAB["<user>"]]


def test_names_in_added_tokens_count_and_rows_without_a_name_are_cut(tmp_path):
    folder = random_model(tmp_path / "x", rows=len(VOCAB) + 7)
    vocabulary_files(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": len(VOCAB)}))
    model, tokenizer = load(folder)
    assert tokenizer.encode("good[PAD]") == [VOCAB["good"], len(VOCAB)]
    assert model.config.n_vocab == len(model.wte.weight) == len(VOCAB) + 1
    (folder / "added_tokens.json").write_text(json.dumps({f"<{i}>": len(VOCAB) + i for i in range(8)}))
    with pytest.raises(InputError, match="rows in W, none for '<7>'"):
        load(folder)


def test_a_vocabulary_is_never_guessed(tmp_path):
    """Even at GPT-2's size: a model without tokenizer files is refused, unless it is told whose it has."""
    with pytest.raises(InputError, match="--tokenizer gpt2"):
        load(random_model(tmp_path / "x"))
    vocabulary_files(tmp_path)                              # a folder without a config.json
    assert load(random_model(tmp_path / "y", 300), tokenizer=tmp_path)[0].config.n_vocab == len(VOCAB)
    with pytest.raises(InputError, match="has its own tokenizer; leave out"):
        load(TOY, tokenizer=tmp_path)


@pytest.mark.parametrize("number", [50256, None])
def test_gpt2s_end_may_be_a_word_of_another_vocabulary(tmp_path, number):
    """Each text ended at that word, and the reward did not read it."""
    folder = random_model(tmp_path / "x", 50300, bos_token_id=number, eos_token_id=number)
    merges = [(a, b) for a in BYTES for b in BYTES][:50040]
    vocab = {token: i for i, token in enumerate([*BYTES, *map("".join, merges)])}
    vocabulary_files(folder, vocab, merges, special=[])
    model, tokenizer = load(folder)
    assert (model.config.bos_id, model.config.eos_ids) == (None, [])
    assert 50256 not in tokenizer.special


@pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="../shared is not here")
def test_null_is_gpt2s_end_in_gpt2s_vocabulary(tmp_path):
    folder = random_model(tmp_path / "x", 50257, bos_token_id=None, eos_token_id=None)
    model, tokenizer = load(folder, "gpt2")
    assert (model.config.bos_id, model.config.eos_ids) == (50256, [50256])
    assert tokenizer.decode([31373, 50256]) == "hello"


def test_a_bos_without_a_name_is_no_bos(tmp_path):
    folder = random_model(tmp_path / "x", len(VOCAB) + 3, bos_token_id=len(VOCAB) + 1, eos_token_id=-1)
    tokenizer_file(folder)
    config = load(folder)[0].config
    assert (config.bos_id, config.eos_ids) == (None, [])


# ------------------------------------------------------------------------------ caches and messages


@pytest.mark.parametrize("repo", ["models--gpt2", "models--openai-community--gpt2"])
@pytest.mark.parametrize("variable, below", [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("HOME", ".cache/huggingface/hub"),
                                             ("XDG_CACHE_HOME", "huggingface/hub")])
def test_a_model_that_other_tools_cached_is_found_without_network(tmp_path, monkeypatch, repo, variable, below):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    snapshot = tmp_path / below / repo / "snapshots" / "abc"
    random_model(snapshot)
    tokenizer_file(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc\n")
    model, tokenizer = load("gpt2")
    assert tokenizer.n_vocab == model.config.n_vocab == len(VOCAB)


def test_without_a_home_there_is_no_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert load(TOY)[0].config.n_layer == 2


def test_no_control_character_of_a_name_reaches_the_terminal(tmp_path):
    folder = random_model(tmp_path / "x")
    tokenizer_file(folder, model=BPE | {"type": "\x1b[2J\u202e\n"})
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value).isprintable()


# ----------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def toy():
    return load(TOY)


def test_prompts_end_at_line_ends_only(toy, tmp_path):
    model, tokenizer = toy
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffthe plot\u2028was\r\n\r\nthis\x0ccast\nthe \x85 end\n \n".encode())
    prompts = read_prompts(model, tokenizer, "", path=path)
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["the plot\u2028was", "this\x0ccast", "the \x85 end"]
    assert all(prompt[0] == model.config.bos_id for prompt in prompts)


def test_prompts_that_are_none_are_refused_in_one_line(toy, tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n\n")
    for file, message in (("x.csv", "no plain text"), ("x.txt", "cannot be read"), ("none", "cannot be read"),
                          ("empty.txt", "is empty")):
        with pytest.raises(InputError, match=message):
            read_prompts(*toy, "", path=tmp_path / file)
    with pytest.raises(InputError, match="more than 8192 characters"):    # tiktoken dies of it
        read_prompts(*toy, "", texts=[" " * 1_000_000 + "x"])


def test_prompts_are_taken_in_turn_or_drawn_by_the_seed():
    """With more prompts than texts only the first ones were used."""
    assert in_turn("abc", 7, 1) == list("abcabca")
    many = list(range(100))
    assert len(set(in_turn(many, 10, 1))) == 10
    assert in_turn(many, 10, 1) == in_turn(many, 10, 1) != in_turn(many, 10, 2)
    assert max(in_turn(many, 10, 1)) > 20


def test_a_log_gets_a_line_each_tenth(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for run in range(2):
        for done in range(1, 101):
            show_progress("drawn", done, 100)
    assert log.getvalue().splitlines().count("drawn 100 of 100") == 2
    assert len(log.getvalue().splitlines()) == 22


# ------------------------------------------------------------------------------------------ damage


def damaged(rng, data):
    """Bytes flipped, swapped, lost or cut off"""
    data, a, b = bytearray(data), rng.randrange(len(data)), rng.randrange(len(data))
    how = rng.randrange(4)
    if how == 0:
        data[a] ^= 1 << rng.randrange(8)
    elif how == 1:
        data[a], data[b] = data[b], data[a]
    elif how == 2:
        del data[a:a + 20]
    else:
        del data[a:]
    return bytes(data)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors",
                                  "tokenizer.json", "vocab.json", "merges.txt", "prompts.txt"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, file):
    folder = random_model(tmp_path / "x")
    if file in ("vocab.json", "merges.txt"):
        vocabulary_files(folder)
    else:
        tokenizer_file(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [36, 7]}))
    (folder / "prompts.txt").write_text("the good\nétait <user> bon\n")
    whole, rng = (folder / file).read_bytes(), random.Random(file)
    for _ in range(30):
        (folder / file).write_bytes(damaged(rng, whole))
        try:
            read_prompts(*load(folder), folder)
        except InputError as error:
            assert str(error).isprintable()
