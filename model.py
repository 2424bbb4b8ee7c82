"""
GPT-2 with its state in the open. A language model is a discrete-time stochastic dynamical system:

    state      h_t      = the last hidden state, after the final layer norm      (B, n_embd)
    output     logits_t = W h_t,  W the token embedding, which is also the head  (B, n_vocab)
    dynamics   y_t ~ softmax(logits_t),   h_{t+1} = f(h_t, y_t)

    hidden = model(tokens, cache)       # f: the cache of keys and values is the rest of the state
    logits = model.unembed(hidden)      # W h, a call of its own: control acts between the two
Source: Radford et al. 2019, in the layout of the public checkpoints. Limitations: inference only,
one model.safetensors (not sharded, not pickled), byte-pair tokenizers of GPT-2's kind.
"""
import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn

class InputError(ValueError):
    """Something the user can fix. The message is one line: the cause, then the fix."""

@dataclass
class Config:
    n_vocab: int
    n_positions: int             # the context, in tokens
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    eps: float = 1e-5            # of every layer norm
    gelu: str = "tanh"           # GPT-2's GELU is the tanh approximation; "none" is the exact one
    bos_id: int | None = None     # comes before every prompt, where the model has such a token
    eos_ids: list = ()             # any of these tokens ends a text

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.n_embd, config.n_head
        assert d % self.n_head == 0, "n_head does not divide n_embd"
        self.ln_1, self.ln_2 = nn.LayerNorm(d, config.eps), nn.LayerNorm(d, config.eps)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(d, config.n_inner), gelu=nn.GELU(config.gelu),
                                      c_proj=nn.Linear(config.n_inner, d)))

    def attention(self, x, layer, cache, mask):                         # x (B, T, n_embd)
        B, T, C = x.shape
        heads = self.attn.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                          # each (B, n_head, T, d)
        if cache is not None:
            k, v = cache.store(layer, k, v)                             # (B, n_head, window, d)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=cache is None)
        return self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))     # (B, T, n_embd)

    def forward(self, x, layer, cache, mask):
        x = x + self.attention(self.ln_1(x), layer, cache, mask)
        return x + self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(self.ln_2(x))))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)          # W: embedding and head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.eps)

    def forward(self, tokens, cache=None, lengths=None):
        """
        tokens (B, T) -> hidden (B, T, n_embd), the state from which each next token is drawn.
        With a cache the tokens continue each row. Rows of unequal length are padded on the right,
        and lengths (B,) says how many of their tokens are real (None: all).
        """
        T, mask = tokens.size(1), None
        positions = torch.arange(T, device=tokens.device)
        if cache is not None:
            positions, mask = cache.open(T, lengths)                    # (B, T), (B, 1, T, window)
        x = self.wte(tokens) + self.wpe(positions)                      # (B, T, n_embd)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, mask)
        return self.ln_f(x)

    def unembed(self, hidden):
        """hidden (..., n_embd) -> logits (..., n_vocab) = W hidden, float32"""
        return nn.functional.linear(hidden.to(self.wte.weight.dtype), self.wte.weight).float()

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """A frozen GPT-2: one of PUBLIC, or a directory. `load` says what else may be wrong."""
        with torch.device("meta"):                                      # shapes, without memory
            model = cls(read_config(name))
        state = {}
        for key, tensor in read_safetensors(find_file(name, "model.safetensors")).items():
            key = re.sub(r"^((_orig_mod|module|transformer)\.)+", "", key)
            tensor = tensor.T if key.endswith(TRANSPOSED) else tensor
            if not key.endswith((".attn.bias", ".attn.masked_bias")):   # old files keep the mask
                state[key] = tensor.to(device, dtype).contiguous()
        W = state.setdefault("wte.weight", state.get("lm_head.weight"))
        if not torch.equal(state.pop("lm_head.weight", W), W):
            raise ValueError("its head is not its embedding: only tied weights are implemented")
        model.extra = {key: state.pop(key) for key in set(state) - set(model.state_dict())}
        model.load_state_dict(state, assign=True)                       # lists all that is wrong
        return model.eval().requires_grad_(False)

class Cache:
    """
    Keys and values of every layer, at most `size` tokens a row; row b holds lengths[b] of them.
    Attention reads the first `window` slots: enough for the longest row, in multiples of WINDOW, so
    that shapes change rarely (a CUDA graph needs fixed ones). Slots beyond a row's own are masked.
    """
    WINDOW = 64
    def __init__(self, model, batch, size):
        config, weight = model.config, model.wte.weight
        d = config.n_embd // config.n_head
        self.keys, self.values = weight.new_zeros(2, config.n_layer, batch, config.n_head, size, d)
        self.rows = torch.arange(batch, device=weight.device)[:, None]
        self.lengths = torch.zeros_like(self.rows[:, 0])
        self.used = 0                   # a bound on lengths that is known without asking the device

    def open(self, T, lengths=None):
        """Room for T more -> their positions (B, T), and mask (B, 1, T, window), 0 or -inf"""
        self.used += T
        self.window = min(-(-self.used // self.WINDOW) * self.WINDOW, self.keys.size(3))
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.rows.device)
        self.lengths += T if lengths is None else lengths
        seen = torch.arange(self.window, device=self.rows.device) <= self.positions[:, :, None]
        return self.positions, seen[:, None].to(self.keys.dtype).log()  # as bools: 34 kernels more

    def store(self, layer, k, v):
        """Write k, v (B, n_head, T, d) at self.positions (B, T) -> those of the window's slots"""
        self.keys[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.values[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window]

# --------------------------------------------------------------------------- weights and tokenizers

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# What else config.json may ask for: {key: what is implemented; first, what a missing key means}.
NETWORK = {"model_type": ("gpt2",), "scale_attn_weights": (True,), "add_cross_attention": (False,),
           "scale_attn_by_inverse_layer_idx": (False,),
           "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")}
# OpenAI stored these four as (in, out); nn.Linear wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              I64=torch.int64, U8=torch.uint8, BOOL=torch.bool)
# Models fetched by name, and the sha256 of their model.safetensors (None: not known here).
PUBLIC = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
          "gpt2-medium": None, "gpt2-large": None,
          "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
          "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b"}

def find_file(name, file):
    """A model's file: in the directory `name`, in the hub's cache, or fetched if it is PUBLIC."""
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    repo = f"{owner}/{name}" if name in PUBLIC else str(name)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"), f"models--{repo.replace('/', '--')}")
    main, own = hub / "refs" / "main", Path(torch.hub.get_dir(), repo)
    cached = hub / "snapshots" / (main.read_text().strip() if main.is_file() else "")
    for path in (Path(name, file), cached / file, own / file):
        if path.is_file():
            return path
    if name not in PUBLIC or Path(name).is_dir():
        raise InputError(f"{name}: no {file} there; name a directory with config.json and one "
                         f"model.safetensors (not sharded, not pickled), or {', '.join(PUBLIC)}")
    own.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(f"https://huggingface.co/{repo}/resolve/main/{file}", own / file,
                                   PUBLIC[name] if file == "model.safetensors" else None)
    return own / file

def read_json(path):
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}

def read_config(name):
    """config.json, and generation_config.json's ends -> Config. ValueError for another network."""
    raw = read_json(path := find_file(name, "config.json"))
    for key, known in NETWORK.items():
        if raw.get(key, known[0]) not in known:
            raise ValueError(f"{key} is {raw[key]!r}")
    bos, *ends = (50256 if raw.get(key) is None else raw[key]   # null, too, means GPT-2's own
                  for key in ("bos_token_id", "eos_token_id"))
    ends += [read_json(path.with_name("generation_config.json")).get("eos_token_id")]
    ends = [end for item in ends for end in (item if isinstance(item, list) else [item])]
    gelu = "none" if raw.get("activation_function") == "gelu" else "tanh"
    return Config(*(raw[key] for key in SIZES), raw.get("n_inner") or 4 * raw["n_embd"],
                  raw.get("layer_norm_epsilon", 1e-5), gelu,
                  bos if bos in range(raw["vocab_size"]) else None, list({*ends} - {None}))

def read_safetensors(path):
    """
    path -> {name: tensor}. The format (github.com/huggingface/safetensors): length of the header, 8
    bytes; {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..}; the tensors.
    """
    data = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
    header, tensors = json.loads(bytes(data[8:start].tolist())), {}
    for name in header.keys() - {"__metadata__"}:
        dtype, shape, (begin, end) = map(header[name].get, ("dtype", "shape", "data_offsets"))
        flat = data[start + begin:start + end].clone()          # a copy is aligned, as views need
        tensors[name] = flat.view(DTYPES[dtype]).view(shape)
    if start + sum(tensor.nbytes for tensor in tensors.values()) != len(data):
        raise ValueError(f"{len(data)} bytes in {path.name} are not those of its tensors")
    return tensors

# How GPT-2 cuts text into pieces before pairs are merged: contractions, words, numbers, signs.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Tokenizer files write each byte as a printable character: {character: byte}.
BYTES = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in BYTES)}

class Tokenizer:
    """Text <-> tokens. Special tokens are read in prompts, and are no part of a text."""
    def __init__(self, encoding, special):
        self.encoding, self.special, self.n_vocab = encoding, frozenset(special), encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode(text, allowed_special="all")
    def decode(self, tokens):
        return self.encoding.decode([token for token in tokens if token not in self.special])

def load_tokenizer(name, default=None):
    """The model's own vocabulary, never guessed: for a directory without one, `default`'s."""
    if name in PUBLIC and not Path(name).is_dir():
        return Tokenizer(tiktoken.get_encoding("gpt2"), special={50256})
    folder = find_file(name, "config.json").parent
    added = read_json(folder / "added_tokens.json")
    if raw := read_json(folder / "tokenizer.json"):
        bpe, names, cut = raw["model"], raw["added_tokens"], raw["pre_tokenizer"]
        plain = not (raw["normalizer"] or cut["type"] != "ByteLevel" or cut["add_prefix_space"])
        added = {token["content"]: token["id"] for token in names}
        text = {token["id"] for token in names if not token["special"]}
    elif (folder / "vocab.json").is_file():
        vocab, merges = read_json(folder / "vocab.json"), folder / "merges.txt"
        lines = filter(None, merges.read_text("utf-8").split("\n")[1:]) if merges.is_file() else \
            sorted((token for token in vocab if token[:2] != "<|"), key=vocab.get)     # words
        bpe, text = {"vocab": vocab, "merges": lines}, ()
        plain = not read_json(folder / "tokenizer_config.json").get("add_prefix_space")
    elif default:
        return load_tokenizer(default)
    else:
        raise ValueError("no tokenizer.json, no vocab.json; --tokenizer gpt2 says it is GPT-2's")
    vocabulary = bpe["vocab"] | added
    merged = ["".join(pair).replace(" ", "") for pair in bpe["merges"]]     # "a b" or ["a", "b"]
    ranks = {bytes(map(BYTES.get, token)): vocabulary[token] for token in [*BYTES, *merged]}
    taken = {*ranks.values()}
    rest = {token: i for token, i in vocabulary.items() if i not in taken}
    if not plain or merged != sorted(merged, key=vocabulary.get) \
            or set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError("its tokenizer is not GPT-2's kind")
    return Tokenizer(tiktoken.Encoding(str(folder), pat_str=PIECES, mergeable_ranks=ranks,
                                       special_tokens=rest), set(rest.values()) - set(text))

def load(name, tokenizer=None, device="cpu", dtype=torch.float32):
    """-> model, tokenizer. Rows of W that name no token are cut off: they cannot be drawn."""
    try:
        model = GPT.from_pretrained(name, device, dtype)
        tokenizer = load_tokenizer(name, tokenizer)
        if (n := tokenizer.n_vocab) > model.config.n_vocab:
            raise ValueError(f"{n} names for {model.config.n_vocab} tokens")
    except Exception as error:          # damaged files may raise anything; tiktoken fetches, too
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: no plain, whole GPT-2 ({type(error).__name__}, "
                         f"{str(error)[:400]!r}); fetch it again, or choose another") from None
    model.wte.weight = nn.Parameter(model.wte.weight[:n].clone(), requires_grad=False)
    model.config.n_vocab = n
    return model, tokenizer


def read_prompts(model, tokenizer, name, texts=(), path=None):
    """
    Texts and the lines of a text file -> [[bos, token, ..], ..], bos if the model `name` has one.
    Without either: the lines of name/prompts.txt, or the empty text.
    """
    own, texts = Path(name, "prompts.txt"), list(texts)
    if path is None and not texts:
        path, texts = (own, []) if own.is_file() else (None, [""])
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); name a text file") from None
        if Path(path).suffix in (".csv", ".tsv", ".json", ".jsonl"):
            raise InputError(f"{path}: no plain text; write one prompt a line into a .txt file")
        texts = texts + [line for line in lines if line.strip()]
    bos = [] if model.config.bos_id is None else [model.config.bos_id]
    prompts = [bos + tokenizer.encode(text) for text in texts]
    if not all(prompts) or not prompts:
        raise InputError(f"{path or 'a prompt'} is empty; write at least one word")
    return prompts


def in_turn(prompts, n, seed):
    """n prompts, in turn; of more than n prompts, n that the seed draws"""
    if len(prompts) > n:
        prompts = random.Random(seed).sample(prompts, n)
    return [prompts[i % len(prompts)] for i in range(n)]


def show_progress(label, done, total):
    """On stderr: a terminal's line is written again, a log gets one for each tenth."""
    if sys.stderr.isatty():
        print(f"\r\033[K{label} {done} of {total}", end="\n" * (done == total), file=sys.stderr)


def run_script(main):
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
