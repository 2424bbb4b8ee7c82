"""
The network and its cache against what is known by other means: transformers (where it is installed;
golden.json keeps what it once computed), and one causal pass for the cached one.
"""
import json

import numpy as np
import pytest
import torch
from tests.conftest import ROOT, SHARED, write_safetensors

from model import GPT, TRANSPOSED, Cache, Config, load, read_safetensors

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
    "lightning": lambda w: {f"model.transformer.{k}": t for k, t in w.items()},
    "peft": lambda w: {f"base_model.model.transformer.{k}": t for k, t in w.items()},
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


def test_the_toys_file_holds_what_its_network_needs():
    assert {key for key in read_safetensors(TOY / "model.safetensors")} == set(
        GPT.from_pretrained(TOY).state_dict())
    assert any(key.endswith(TRANSPOSED) for key in read_safetensors(TOY / "model.safetensors"))
