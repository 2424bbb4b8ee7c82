"""
The network and its cache against what is known by other means: states and logits that transformers
computed (kept in golden.json, and live where transformers is installed), the uncached pass for the
cached one, each row alone for the batch, and a small language model trained on film reviews.

    python -m pytest tests/test_model.py     without transformers or ../shared, those tests skip
    python tests/test_model.py               writes golden.json again; needs transformers
"""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT        # and the root on sys.path
from model import GPT, Cache, Config, kernels_for, read_header
from value import fingerprint, write_safetensors

GOLDEN = Path(__file__).with_name("golden.json")
SHARED = ROOT.parent / "shared"
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
    random = np.random.RandomState(seed)         # the legacy stream: the same in every numpy
    weights = {name: torch.from_numpy(0.3 * random.randn(*shape)).float()
               for name, shape in SHAPES.items()}
    for name in weights:
        if "ln_" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


def write_checkpoint(directory, weights=None, **config):
    """A tiny GPT-2 directory without a vocabulary; keywords replace entries of CONFIG."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(directory / "model.safetensors", weights or tiny_weights(), {"format": "pt"})
    return directory


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def model(tiny):
    return GPT.from_pretrained(tiny)


# ------------------------------------------------------------------- states and logits: the network

def test_golden_states_and_logits(model):
    golden = json.loads(GOLDEN.read_text())
    hidden = model(torch.tensor(golden["tokens"]))
    assert (hidden - torch.tensor(golden["hidden"])).abs().max() < 1e-4
    assert (model.unembed(hidden) - torch.tensor(golden["logits"])).abs().max() < 1e-4


SIZES = {
    "tiny": {"vocab_size": 37, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "inner": {"vocab_size": 50, "n_positions": 24, "n_embd": 24, "n_layer": 3, "n_head": 4,
              "n_inner": 40, "activation_function": "gelu_pytorch_tanh"},
    "epsilon": {"vocab_size": 41, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 1,
                "layer_norm_epsilon": 0.1},
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}


@pytest.mark.parametrize("name", SIZES)
def test_equals_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes, end = SIZES[name], SIZES[name]["vocab_size"] - 1
    config = transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    generator = torch.Generator().manual_seed(0)
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():     # biases and norms too: they begin at 0 and 1
            scale = 0.5 / sizes["n_embd"] ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
        tokens = torch.randint(end, (2, 24), generator=generator)
        expected = reference(tokens, output_hidden_states=True)
    reference.save_pretrained(tmp_path)              # every name gets the prefix transformer.
    assert "transformer.wte.weight" in read_header(tmp_path / "model.safetensors")[0]
    model = GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()        # half a gigabyte at full size
    hidden = model(tokens)
    assert (hidden - expected.hidden_states[-1]).abs().max() <= 1e-4
    assert (model.unembed(hidden) - expected.logits).abs().max() <= 1e-4


def test_the_state_follows_the_final_norm_and_logits_are_w_h(model):
    hidden = model(torch.arange(12).view(2, 6))                              # (2, 6, 16)
    weights = tiny_weights()
    normed = (hidden - weights["ln_f.bias"]) / weights["ln_f.weight"]
    assert normed.mean(-1).abs().max() < 1e-5
    assert (normed.var(-1, unbiased=False) - 1).abs().max() < 1e-3
    assert torch.allclose(model.unembed(hidden), hidden @ weights["wte.weight"].T, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("cuts", [range(13), (0, 12), (0, 5, 6, 12)], ids=["each", "one", "chunks"])
def test_cached_pass_equals_the_full_one(model, cuts):
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = Cache(model, 2, 12)
    parts = [model(tokens[:, begin:end], cache) for begin, end in zip(cuts, cuts[1:])]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-5


def test_slots_move_apart_as_texts_grow_and_are_used_again():
    """Through several widths of what is read, on a cache that held other texts before."""
    model = GPT(Config(37, 96, 16, 2, 2, 64)).eval().requires_grad_(False)
    cache = Cache(model, 6, 93)
    for seed in range(2):
        tokens, rooms = torch.randint(37, (6, 93), generator=torch.Generator().manual_seed(seed)), []
        cache.clear()
        for t in range(93):
            state = model(tokens[:, t:t + 1], cache)[:, 0]
            assert (state - model(tokens[:, :t + 1])[:, -1]).abs().max() < 1e-5
            rooms.append(cache.room)
        assert sorted(set(rooms)) == [32, 64, 93]                            # as many as are read, no more


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_a_packed_model_is_the_same_model(dtype, error):
    """Its vocabulary has several parts, the last a short one."""
    model = GPT(Config(20_000, 24, 16, 2, 2, 64)).to(dtype).eval().requires_grad_(False)
    packed, tokens = copy.deepcopy(model).pack(), torch.arange(12).view(2, 6)
    able = torch.backends.mkldnn.is_available() and (dtype == torch.float32
                                                     or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert packed.packed == able == (packed.h[0].mlp.c_fc.weight is None) and packed.pack() is packed
    hidden = model(tokens)
    assert (packed(tokens) - hidden).norm() < error * hidden.norm()
    one = packed(tokens[:1, :1])                               # a row alone, which oneDNN is given as four
    assert one.shape == (1, 1, 16) and (one - hidden[:1, :1]).norm() < error * hidden[:1, :1].norm()
    cache, states = Cache(packed, 2, 6), []
    for t in range(6):
        states.append(packed(tokens[:, t:t + 1], cache))
    assert (torch.cat(states, 1) - hidden).norm() < error * hidden.norm()
    last, out = hidden[:, -1], torch.full((2, 20_000), torch.nan)
    logits = last.float() @ model.wte.weight.float().T
    for got in (packed.unembed(last), packed.unembed(last, out), out):
        assert got.dtype == torch.float32 and (got - logits).norm() < error * logits.norm()
    assert packed.unembed(hidden).shape == (2, 6, 20_000)


@pytest.mark.parametrize("packed", [False, True])
def test_one_row_in_bfloat16(packed):
    """It goes by other kernels, which are chosen for as long as it takes; for it alone nothing is packed."""
    torch.manual_seed(0)
    exact = GPT(Config(5000, 24, 16, 2, 2, 64)).eval().requires_grad_(False)
    model = copy.deepcopy(exact).to(torch.bfloat16).pack(2 if packed else 1)
    before, tokens = torch.backends.mkldnn.enabled, torch.arange(6)[None]
    cache, states, seen = Cache(model, 1, 6), [], []
    assert packed or not model.packed
    for t in range(6):
        with kernels_for(states[-1] if states else torch.zeros(1, 2)):
            seen.append(torch.backends.mkldnn.enabled)
        states.append(model(tokens[:, t:t + 1], cache))
    expected = exact(tokens)
    logits, out = exact.unembed(expected)[0, -1:], torch.full((1, 5000), torch.nan)
    assert (torch.cat(states, 1) - expected).norm() < 0.02 * expected.norm()
    last = states[-1][0]                                                     # (1, 16)
    for got in (model.unembed(last), model.unembed(last[None])[0], model.unembed(last, out), out):
        assert got.dtype == torch.float32 and (got - logits).norm() < 0.02 * logits.norm()
    assert seen == [before] + 5 * [False] and torch.backends.mkldnn.enabled == before


def test_ragged_batch_equals_its_rows_alone(model):
    texts = torch.randint(37, (3, 14), generator=torch.Generator().manual_seed(0))
    lengths, rows = torch.tensor([3, 8, 1]), torch.arange(3)
    decoded = []
    for padding in (0, 29):
        real = torch.arange(8) < lengths[:, None]                            # (3, 8)
        cache = Cache(model, 3, 14)
        states = [model(texts[:, :8].where(real, padding), cache, lengths)[rows, lengths - 1]]
        for step in range(6):
            states.append(model(texts[rows, lengths + step, None], cache)[:, 0])
        assert cache.lengths.tolist() == [9, 14, 7]
        decoded.append(torch.stack(states, 1))                               # (3, 7, 16)
    assert torch.equal(*decoded)                                             # padding is not seen
    for row, length in enumerate(lengths):
        alone = model(texts[row, None, :length + 6])[0, length - 1:]         # (7, 16)
        assert (decoded[0][row] - alone).abs().max() < 1e-4


def test_fingerprint(tiny, tmp_path):
    one = fingerprint(GPT.from_pretrained(tiny))
    assert one == fingerprint(GPT.from_pretrained(tiny, dtype=torch.bfloat16))
    for name in ("wte.weight", "ln_f.weight", "ln_f.bias"):
        weights = tiny_weights()
        weights[name].view(-1)[3] += 0.1
        other = GPT.from_pretrained(write_checkpoint(tmp_path / "other", weights))
        assert fingerprint(other) != one


# ------------------------------------------------------------------------------- a real small model

def test_film_review_model():
    if not (SHARED / "imdb-mini").is_dir():
        pytest.skip("../shared/imdb-mini is not there")
    model = GPT.from_pretrained(SHARED / "imdb-mini")
    tokens, cache, greedy = torch.tensor([[50256, 464, 3807, 373]]), Cache(model, 1, 12), []
    hidden = model(tokens, cache)[:, -1]                                     # (1, 256)
    expected = torch.tensor([0.3839, 0.3590, -0.4341, 1.6129])
    assert (hidden[0, :4] - expected).abs().max() < 1e-4
    assert abs(hidden.norm().item() - 20.3981) < 2e-4
    for _ in range(8):
        greedy.append(model.unembed(hidden).argmax(-1).item())
        hidden = model(torch.tensor([greedy[-1:]]), cache)[:, -1]
    assert greedy == [257, 1049, 3807, 13, 383, 3807, 373, 1049]


def write_golden():
    """golden.json: what transformers computes, in float32, for the checkpoint of tiny_weights()."""
    import tempfile
    from transformers import GPT2LMHeadModel
    tokens = torch.from_numpy(np.random.RandomState(1).randint(37, size=(2, 12)))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        reference = GPT2LMHeadModel.from_pretrained(write_checkpoint(Path(directory))).eval()
        output = reference(tokens, output_hidden_states=True)

    def rounded(tensor):
        return [[[float(f"{x:.6g}") for x in row] for row in rows] for rows in tensor.tolist()]
    GOLDEN.write_text(json.dumps({"tokens": tokens.tolist(), "logits": rounded(output.logits),
                                  "hidden": rounded(output.hidden_states[-1])}) + "\n")


if __name__ == "__main__":
    write_golden()
