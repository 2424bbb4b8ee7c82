"""
The network, its cache, its files and its tokenizer against what is known by other means: transformers
(where it is installed; golden.json keeps what it once computed), one causal pass for the cached one.
"""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, write_safetensors

from model import BYTES, GPT, TRANSPOSED, Cache, Config, InputError, load, load_tokenizer, read_safetensors

TOY = ROOT / "tests" / "toy"
CONFIG = {"model_type": "gpt2", "vocab_size": 37, "n_positions": 24, "n_embd": 16, "n_layer": 2,
          "n_head": 2, "bos_token_id": 36, "eos_token_id": 36}
BLOCK = {"ln_1.weight": (16,), "ln_1.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
         "attn.c_attn.weight": (16, 48), "attn.c_attn.bias": (48,),          # (in, out)
         "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,),
         "mlp.c_fc.weight": (16, 64), "mlp.c_fc.bias": (64,),
         "mlp.c_proj.weight": (64, 16), "mlp.c_proj.bias": (16,)}
SHAPES = {"wte.weight": (37, 16), "wpe.weight": (24, 16), "ln_f.weight": (16,), "ln_f.bias": (16,),
          **{f"h.{layer}.{name}": shape for layer in (0, 1) for name, shape in BLOCK.items()}}


def tiny_weights(seed=0):
    """Random weights in the public layout, large enough that every part of the network matters."""
    random = np.random.RandomState(seed)
    weights = {name: torch.from_numpy(0.3 * random.randn(*shape)).float()
               for name, shape in SHAPES.items()}
    return {name: weight + 1 if "ln_" in name and name.endswith("weight") else weight
            for name, weight in weights.items()}


def checkpoint(folder, weights=None, **config):
    """A tiny GPT-2 directory without a vocabulary; keywords replace entries of CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder / "model.safetensors", weights or tiny_weights())
    return folder


@pytest.fixture
def tiny(tmp_path):
    return GPT.from_pretrained(checkpoint(tmp_path / "tiny"))


def test_states_and_logits_are_those_transformers_computed(tiny):
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())
    hidden = tiny(torch.tensor(golden["tokens"]))
    torch.testing.assert_close(hidden, torch.tensor(golden["hidden"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiny.unembed(hidden), torch.tensor(golden["logits"]), atol=1e-4,
                               rtol=1e-4)


VARIANTS = {
    "plain": lambda w: w,
    "prefixed": lambda w: {f"transformer.{k}": t for k, t in w.items()},
    "compiled": lambda w: {f"_orig_mod.transformer.{k}": t for k, t in w.items()},
    "masks": lambda w: w | {"h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8),
                            "h.0.attn.masked_bias": torch.tensor([-1e4])},
    "head only": lambda w: {"lm_head.weight" if k == "wte.weight" else k: t for k, t in w.items()},
    "both": lambda w: w | {"lm_head.weight": w["wte.weight"].clone()},
    "value head": lambda w: w | {"v_head.summary.weight": torch.zeros(1, 16)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_found_however_they_are_stored(tmp_path, tiny, variant):
    other = GPT.from_pretrained(checkpoint(tmp_path / "x", VARIANTS[variant](tiny_weights())))
    torch.testing.assert_close(other(torch.arange(9)[None]), tiny(torch.arange(9)[None]),
                               atol=0, rtol=0)
    assert ("v_head.summary.weight" in other.extra) == (variant == "value head")


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parity_with_transformers(tmp_path, activation, dtype):
    """Hidden states and logits to 1e-4, with GPT2Config's own ends, 50256, on a small vocabulary."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=3, n_head=4, activation_function=activation,
        initializer_range=0.3)).eval().to(dtype).float()
    theirs.config.save_pretrained(tmp_path)
    state = {key: tensor.to(dtype) for key, tensor in theirs.state_dict().items()
             if key != "lm_head.weight"}
    write_safetensors(tmp_path / "model.safetensors", state)
    ours, tokens = GPT.from_pretrained(tmp_path), torch.randint(300, (3, 40))
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
    torch.testing.assert_close(ours(tokens), out.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.unembed(ours(tokens)), out.logits, atol=1e-4, rtol=1e-4)
    assert ours.config.bos is None                              # 50256 is no token of 300


def test_cache_in_any_pieces_is_one_pass():
    torch.manual_seed(0)
    model = GPT(Config(50, 200, 32, 2, 4, 64)).eval().requires_grad_(False)
    tokens, cache = torch.randint(50, (2, 150)), Cache(model, 2, 150)       # windows of 64, 128, 150
    pieces = [model(part, cache) for part in tokens.split([30, 1, 40, 1, 1, 77], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_a_batch_of_unequal_rows_equals_its_rows():
    torch.manual_seed(0)
    model = GPT(Config(50, 64, 32, 2, 4, 64)).eval().requires_grad_(False)
    lengths, cache = torch.tensor([7, 1, 4]), Cache(model, 3, 20)
    rows = torch.randint(50, (3, 12))
    model(rows[:, :7], cache, lengths)                          # what lies beyond a length is padding
    after = [torch.cat([row[:n], row[7:]]) for row, n in zip(rows, lengths)]
    states = torch.cat([model(rows[:, t:t + 1], cache) for t in range(7, 12)], 1)
    for b in range(3):
        torch.testing.assert_close(states[b], model(after[b][None])[0, -5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edit, message", [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"model_type": "llama"}, "llama"), ({"activation_function": "relu"}, "relu"),
    ({"n_layer": 3}, "Missing key"), ({"n_head": 3}, "n_head does not divide"), ({"n_embd": None}, "n_embd|NoneType")])
def test_another_network_is_refused_in_one_line(tmp_path, edit, message):
    with pytest.raises(InputError, match=message) as error:
        load(checkpoint(tmp_path / "x", **edit))
    assert "\n" not in str(error.value)


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
    with pytest.raises(InputError, match="head is not its embedding"):
        load(checkpoint(tmp_path / "y", tiny_weights() | {"lm_head.weight": torch.zeros(37, 16)}))
    with pytest.raises(InputError, match="no network in tests"):
        load("gpt2")


@pytest.mark.parametrize("config, generation, ends", [
    ({}, None, {36}), ({"eos_token_id": [5, 6]}, None, {5, 6}), ({"eos_token_id": None}, None, {50256}),
    ({}, {"eos_token_id": 7}, {36, 7}), ({}, {"eos_token_id": [7, 0]}, {36, 7, 0}),
    ({}, {"eos_token_id": None}, {36})])
def test_any_listed_end_ends_a_text(tmp_path, config, generation, ends):
    folder = checkpoint(tmp_path / "x", **config)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert set(GPT.from_pretrained(folder).config.ends) == ends


# --------------------------------------------------------------------------------------- tokenizers

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("g", "o"), ("o", "d"), ("go", "od"), ("Ġ", "good")]
VOCAB = {t: i for i, t in enumerate([*BYTES, *("".join(pair) for pair in MERGES), "<user>", "</s>"])}
TEXT = "the good <user> thegood</s> The  été\n\n"


def vocabulary_files(folder, vocab, merges=MERGES):
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def tokenizer_file(folder, vocab, special=("<user>", "</s>"), **edit):
    raw = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                                                 "trim_offsets": True, "use_regex": True},
           "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in MERGES]},
           "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                       "use_regex": True}, "added_tokens": [
               {"id": vocab[t], "content": t, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False} for t in special]}
    (folder / "tokenizer.json").write_text(json.dumps({**raw, **edit}))


def random_model(folder, rows=len(VOCAB)):
    return checkpoint(folder, tiny_weights() | {"wte.weight": torch.randn(rows, 16)}, vocab_size=rows)


def test_tokens_are_those_of_the_tokenizers_library(tmp_path):
    """Special tokens of any form are not split, and are no part of a decoded text."""
    tokenizers, folder = pytest.importorskip("tokenizers"), random_model(tmp_path / "x")
    tokenizer_file(folder, VOCAB)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    ours = load_tokenizer(folder)
    assert ours.encode(TEXT) == theirs
    assert ours.decode(theirs) == "the good  thegood The  été\n\n"
    (folder / "tokenizer.json").unlink()
    vocabulary_files(folder, VOCAB)
    assert load_tokenizer(folder).encode(TEXT) == theirs


def test_names_in_added_tokens_count_and_rows_without_a_name_are_cut(tmp_path):
    folder = random_model(tmp_path / "x", rows=len(VOCAB) + 7)
    vocabulary_files(folder, VOCAB)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": len(VOCAB)}))
    model, tokenizer = load(folder)
    assert tokenizer.encode("good[PAD]") == [VOCAB["good"], len(VOCAB)]
    assert model.config.n_vocab == len(model.wte.weight) == len(VOCAB) + 1
    (folder / "added_tokens.json").write_text(json.dumps({f"<{i}>": len(VOCAB) + i for i in range(9)}))
    with pytest.raises(InputError, match="names for"):
        load(folder)


@pytest.mark.parametrize("edit", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}])
def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, edit):
    folder = random_model(tmp_path / "x")
    tokenizer_file(folder, VOCAB, **edit)
    with pytest.raises(InputError, match="not GPT-2's kind"):
        load(folder)


def test_a_vocabulary_is_never_guessed(tmp_path):
    """Even at GPT-2's size: a model without tokenizer files is refused, unless it is told whose it has."""
    with pytest.raises(InputError, match="--tokenizer gpt2"):
        load(random_model(tmp_path / "x"))
    assert load(random_model(tmp_path / "y", 400), tokenizer=TOY)[0].config.n_vocab == 364


@pytest.mark.skipif(not (SHARED / "imdb-mini").is_dir(), reason="../shared is not here")
def test_a_real_model_and_gpt2s_own_vocabulary():
    model, tokenizer = load(SHARED / "imdb-mini", "gpt2")
    assert tokenizer.encode("hello world") == [31373, 995]
    hidden = model(torch.tensor([[50256, 464, 3807, 373]]))[0, -1]
    golden = torch.tensor([0.3839, 0.3590, -0.4341, 1.6129])
    torch.testing.assert_close(hidden[:4], golden, atol=1e-3, rtol=1e-3)
    assert abs(hidden.norm().item() - 20.3981) < 1e-2
    tokens = [50256, 464, 3807, 373]
    for _ in range(8):
        tokens.append(model.unembed(model(torch.tensor([tokens]))[0, -1]).argmax().item())
    assert tokens[4:] == [257, 1049, 3807, 13, 383, 3807, 373, 1049]


def test_a_model_cached_by_other_tools_is_found(tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--someone--model" / "snapshots" / "abc"
    shutil.copytree(TOY, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load("someone/model")[0].config.n_vocab == 364


def test_the_toys_file_holds_what_its_network_needs():
    assert {key for key in read_safetensors(TOY / "model.safetensors")} == set(
        GPT.from_pretrained(TOY).state_dict())
    assert any(key.endswith(TRANSPOSED) for key in read_safetensors(TOY / "model.safetensors"))


def test_without_merges_every_name_is_a_word(tmp_path):
    words = ["the", "Ġcast", "Ġwas", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*BYTES, *words])}
    folder = random_model(tmp_path / "x", len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    assert load_tokenizer(folder).encode("the cast was<|endoftext|> x") == [
        256, 257, 258, 259, vocab["Ġ"], vocab["x"]]
