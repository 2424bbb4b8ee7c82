"""
GPT-2, with its last hidden state in reach. In the terms of control theory:

    state      the text so far; the cache of keys and values stands for it
    observed   h_t = f(text so far)      the last hidden state: an output; the next step does not read it
    drawn      y_t ~ softmax(W h_t)      W: the token embedding, which is also the output layer

    hidden = model(tokens, cache)        # (B, T) -> (B, T, n_embd)
    logits = model.unembed(hidden)       # W h: a separate call, because control acts between the two

The names of the parts (wte, h, c_attn, ..) are those of the public checkpoints.

Source: Radford et al. 2019, in the layout of the public checkpoints. Limitations: inference only,
one model.safetensors (not sharded, not pickled), byte-pair tokenizers of GPT-2's kind.
"""
import json
import math
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
    def __str__(self):                  # names come from files: no control character is printed
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())

@dataclass
class Config:
    n_vocab: int
    n_positions: int             # the context, in tokens
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int                 # the width of the MLP
    eps: float = 1e-5            # of every layer norm
    gelu: str = "tanh"           # GPT-2's GELU is the tanh approximation; "none" is the exact one
    bos_id: int | None = None    # comes before every prompt, where the model has such a token
    eos_ids: list = ()           # any of these tokens ends a text

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C, config.eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C, config.eps)
        c_fc = nn.Linear(C, config.n_inner)
        c_proj = nn.Linear(config.n_inner, C)
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "gelu": nn.GELU(config.gelu), "c_proj": c_proj})

    def attention(self, x, layer, cache, mask):
        B, T, C = x.shape                                               # C = n_embd = n_head d
        heads = self.attn.c_attn(x)                                     # -> (B, T, 3 n_embd)
        heads = heads.view(B, T, 3, self.n_head, C // self.n_head)      # -> (B, T, 3, n_head, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                          # each (B, n_head, T, d)
        if cache is not None:
            k, v = cache.store(layer, k, v)                             # (B, n_head, window, d)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=cache is None)
        return self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))     # -> (B, T, n_embd)

    def forward(self, x, layer, cache, mask):
        x = x + self.attention(self.ln_1(x), layer, cache, mask)
        wide = self.mlp.gelu(self.mlp.c_fc(self.ln_2(x)))               # -> (B, T, n_inner)
        return x + self.mlp.c_proj(wide)                                # -> (B, T, n_embd)

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)          # W: embedding and head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))    # not h_t!
        self.ln_f = nn.LayerNorm(config.n_embd, config.eps)

    def forward(self, tokens, cache=None, lengths=None):
        """
        tokens (B, T) -> hidden (B, T, n_embd); from each of them a next token can be drawn.
        With a cache the tokens continue each row. Rows of unequal length are padded on the right,
        and lengths (B,) says how many of their tokens are real (None: all).
        """
        T = tokens.size(1)
        mask = None
        positions = torch.arange(T, device=tokens.device)
        if cache is not None:
            positions, mask = cache.open(T, lengths)                    # (B, T), (B, 1, T, window)
        x = self.wte(tokens) + self.wpe(positions)                      # (B, T) -> (B, T, n_embd)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, mask)
        return self.ln_f(x)

    def unembed(self, hidden):
        """hidden (.., n_embd) -> logits (.., n_vocab) = W hidden, float32"""
        W = self.wte.weight
        return nn.functional.linear(hidden.to(W.dtype), W).float()

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """A frozen GPT-2: one of PUBLIC, or a directory."""
        with torch.device("meta"):                                      # shapes, without memory
            model = cls(read_config(name))
        weights = read_weights(name, device, dtype)
        # Other heads beside GPT-2's own, such as a classifier's (RewardModel).
        model.extra = {key: weights.pop(key) for key in sorted(weights) if key.startswith(HEADS)}
        unknown = weights.keys() - model.state_dict().keys()
        if unknown:
            raise InputError(f"{name}: {min(unknown)!r} is not a part of GPT-2; choose another model")
        model.load_state_dict(weights, assign=True)                     # raises if one is missing
        return model.eval().requires_grad_(False)

class Cache:
    """
    Keys and values of every layer, at most `size` tokens a row; row b holds lengths[b] of them.
    Attention reads the first `window` slots: enough for the longest row, in multiples of WINDOW, so
    that shapes change rarely (a CUDA graph needs fixed ones). A row does not see slots beyond its
    length; padding lies there, and its next tokens overwrite it. Each pass calls `open` once, then
    `store` once a layer.
    """
    WINDOW = 64
    def __init__(self, model, batch, size):
        config, W = model.config, model.wte.weight
        shape = (config.n_layer, batch, config.n_head, size, config.n_embd // config.n_head)
        self.keys = W.new_zeros(shape)
        self.values = W.new_zeros(shape)
        self.rows = torch.arange(batch, device=W.device)[:, None]       # (B, 1)
        self.lengths = torch.zeros_like(self.rows[:, 0])                # (B,)
        self.used = 0       # at least the largest length, kept in Python: no wait for a GPU

    def open(self, T, lengths=None):
        """Room for T more -> their positions (B, T), and mask (B, 1, T, window), 0 or -inf"""
        self.used += T
        windows = math.ceil(self.used / self.WINDOW)
        self.window = min(windows * self.WINDOW, self.keys.size(3))
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.rows.device)
        self.lengths += (T if lengths is None else lengths)
        slots = torch.arange(self.window, device=self.rows.device)
        seen = slots <= self.positions[:, None, :, None]                # -> (B, 1, T, window)
        # log: 1 -> 0, 0 -> -inf, which is added. (Attention would make the same of a mask of bools.)
        return self.positions, seen.to(self.keys.dtype).log()

    def store(self, layer, k, v):
        """Write k, v (B, n_head, T, d) at self.positions (B, T) -> those of the window's slots"""
        # Two index tensors with a slice between them: their axes come first, (B, T, n_head, d).
        self.keys[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.values[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, :self.window], self.values[layer, :, :, :self.window]

# ------------------------------------ files from here on: the method can be read without them

# What config.json may ask for: {key: allowed values}. The first is meant if the key is missing.
NETWORK = {"model_type": ("gpt2",), "scale_attn_weights": (True,), "add_cross_attention": (False,),
           "scale_attn_by_inverse_layer_idx": (False,),
           "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")}
# Prefixes that wrappers put before a name are cut. HEADS change no logit: they go to model.extra.
PREFIXES = r"^((_orig_mod|module|base_model|model|transformer)\.)+"
HEADS = ("score.", "classifier.", "v_head.", "value_head.", "reward_head.", "multiple_choice_head.")
# OpenAI stored these four as (in, out); nn.Linear wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}
# Models fetched by name, and the sha256 of their model.safetensors (None: not known here).
PUBLIC = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
          "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
          "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
          "gpt2-medium": None, "gpt2-large": None}

def folders(name):
    """Where a model's files may lie: a directory, the hub's cache, torch's cache (for downloads)"""
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    found = [Path(name)]
    for repo in (str(name), f"{owner}/{name}"):
        model = Path(hub, "models--" + repo.replace("/", "--"))
        if os.path.isfile(model / "refs/main"):
            found.append(model / "snapshots" / (model / "refs/main").read_text().strip())
    return found + [Path(torch.hub.get_dir(), owner, name)]

def find_file(name, file):
    """-> the path of a model's file, which is fetched if the model is PUBLIC and not here"""
    for folder in folders(name):
        if os.path.isfile(folder / file):
            return folder / file
    if name not in PUBLIC or os.path.isdir(name):
        raise InputError(f"{name}: no {file} there; name a directory with config.json and one "
                         f"model.safetensors (not sharded, not pickled), or {', '.join(PUBLIC)}")
    folder = folders(name)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    url = f"https://huggingface.co/{folder.parent.name}/{name}/resolve/main/{file}"
    sha256 = PUBLIC[name] if file == "model.safetensors" else None
    try:
        torch.hub.download_url_to_file(url, folder / file, sha256)
    except OSError as error:
        raise InputError(f"{name}: {file} could not be fetched ({error}); is there a network?") from None
    return folder / file

def read_json(path):
    """-> the object in a JSON file; {} where there is no file"""
    return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.is_file() else {}

def check_known(raw, known, where):
    """InputError if raw asks for something else than the values in known (see NETWORK)"""
    for key, values in known.items():
        if raw.get(key, values[0]) not in values:
            allowed = ", ".join(map(repr, values))
            raise InputError(f"{where}: {key} is {raw[key]!r}, and only {allowed} is implemented; "
                             "choose another model")

def read_config(name):
    """config.json, with the ends of generation_config.json -> Config"""
    path = find_file(name, "config.json")
    raw = {key: item for key, item in read_json(path).items() if item is not None}
    check_known(raw, NETWORK, path)
    eos_ids = set()
    for file in (raw, read_json(path.with_name("generation_config.json"))):
        ends = file.get("eos_token_id")
        eos_ids.update(ends if isinstance(ends, list) else [ends])
    config = Config(n_vocab=raw["vocab_size"], n_positions=raw["n_positions"], n_embd=raw["n_embd"],
                    n_layer=raw["n_layer"], n_head=raw["n_head"],
                    n_inner=raw.get("n_inner", 4 * raw["n_embd"]),
                    eps=raw.get("layer_norm_epsilon", 1e-5), bos_id=raw.get("bos_token_id"),
                    gelu="none" if raw.get("activation_function") == "gelu" else "tanh",
                    eos_ids=list(eos_ids - {None}))
    for key, size in vars(config).items():
        if key.startswith("n_") and (type(size) is not int or size < 1):
            raise InputError(f"{path}: {key} is {size!r}, no whole number above 0; choose another")
    if config.n_embd % config.n_head or not 0 <= config.eps < 1:
        raise InputError(f"{path}: n_head {config.n_head} does not divide n_embd {config.n_embd}, or "
                         f"eps is {config.eps!r}; choose another model")
    return config

def read_safetensors(path):
    """
    path -> {name: tensor}. The format (github.com/huggingface/safetensors): the header's length, 8
    bytes; {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..}; the tensors.
    """
    size = os.path.getsize(path)
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(start, size) - 8))
    header.pop("__metadata__", None)
    tensors = {}
    place = start                                   # each tensor begins where the last one ended
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(f"{path}: {name} is stored as {entry['dtype']!r}; choose weights that "
                             f"are one of {', '.join(DTYPES)}")
        length = math.prod(entry["shape"]) * dtype.itemsize
        if entry["data_offsets"] != [place - start, place - start + length]:
            raise ValueError(f"{name} in {path.name} is not where it should be")
        flat = data[place:place + length].clone()   # a copy, because a view needs aligned memory
        tensors[name] = flat.view(dtype).view(entry["shape"])
        place += length
    if place != size:
        raise ValueError(f"{path.name} has {size} bytes, its tensors end at {place}")
    return tensors

def read_weights(name, device, dtype):
    """model.safetensors -> {name in GPT, or in HEADS: tensor}"""
    path = find_file(name, "model.safetensors")
    state = {}
    for key, tensor in read_safetensors(path).items():
        key = re.sub(PREFIXES, "", key)
        if key.endswith((".attn.bias", ".attn.masked_bias")):           # old files keep the mask
            continue
        tensor = tensor.T if key.endswith(TRANSPOSED) else tensor
        state[key] = tensor.to(device, dtype).contiguous()
        if not state[key].isfinite().all():
            raise InputError(f"{path}: {key} is not finite as {dtype}; choose other weights")
    head = state.pop("lm_head.weight", None)
    if head is not None:
        state.setdefault("wte.weight", head)
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise InputError(f"{path}: its head is not its embedding; choose a model with tied weights")
    return state

# GPT-2 first cuts text into pieces: contractions, words, numbers, signs. Then it merges in each.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Tokenizer files spell each byte as a printable character: {character: byte}.
BYTES = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in BYTES)}
END = 50256                     # <|endoftext|>, bos and eos of GPT-2's own vocabulary
# What tokenizer.json may ask for, as in NETWORK. (An unk_token is never used: each byte is a token.)
TOKENIZER = {
    "normalizer": {"type": (None,)}, "decoder": {"type": ("ByteLevel", None)},
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False, None),
                      "use_regex": (True,)},
    "model": {"type": ("BPE",), "dropout": (None, 0), "byte_fallback": (False,),
              "ignore_merges": (False,), "continuing_subword_prefix": (None, ""),
              "end_of_word_suffix": (None, "")}}
ADDED = {"lstrip": (False,), "rstrip": (False,), "single_word": (False,)}

class Tokenizer:
    """Text <-> tokens. Special tokens are read in prompts, and are no part of a text."""
    def __init__(self, encoding, added, special):
        self.encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.added = added                              # {name: token}
        self.special = set(special)                     # tokens
        names = sorted(filter(None, added), key=len, reverse=True)      # the longest is found first
        self.names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def encode(self, text):
        tokens = []
        for i, part in enumerate(self.names.split(text)):               # text, name, text, ..
            tokens += [self.added[part]] if i % 2 else self.encoding.encode_ordinary(part)
        return tokens

    def decode(self, tokens):
        return self.encoding.decode([token for token in tokens if token not in self.special])

def read_old_files(folder, settings):
    """vocab.json, merges.txt and added_tokens.json -> what a tokenizer.json would say"""
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    for token in vocab.keys() - {merge.replace(" ", "") for merge in merges}:
        if any(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token))):
            raise InputError(f"{folder}: merges.txt is cut off at {token!r}; fetch it again")
    added = read_json(folder / "added_tokens.json")
    entries = [{"content": name, "id": added[name]} for name in added]
    return {"pre_tokenizer": {"type": "ByteLevel"} | settings,          # add_prefix_space is there
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": entries}

def read_vocabulary(folder):
    """
    What the files say -> {spelling: token}, [[left, right], ..], {added name: token}, names of
    special tokens; None where there are no files. Another kind of tokenizer is refused.
    """
    settings = read_json(folder / "tokenizer_config.json")
    raw = read_json(folder / "tokenizer.json")
    if not raw and os.path.isfile(folder / "vocab.json"):
        raw = read_old_files(folder, settings)
    if not raw:
        return None
    where = f"{folder}: its tokenizer is not GPT-2's kind"
    for part, known in TOKENIZER.items():
        check_known(raw.get(part) or {"type": None}, known, f"{where}, {part}")
    added = {}
    special = {"<|endoftext|>"}                                         # GPT-2's own
    for entry in raw["added_tokens"]:
        check_known(entry, ADDED, f"{where}, {entry['content']!r}")
        added[entry["content"]] = entry["id"]
        if entry.get("special"):
            special.add(entry["content"])
    settings |= read_json(folder / "special_tokens_map.json")
    for key, value in settings.items():
        if key.endswith(("_token", "special_tokens")):
            for item in value if isinstance(value, list) else [value]:
                special.add(item.get("content") if isinstance(item, dict) else item)
    vocab = raw["model"]["vocab"]
    merges = raw["model"]["merges"]                                     # "a b", or ["a", "b"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    added |= {name: vocab[name] for name in special if name in vocab}
    return vocab | added, merges, added, special & added.keys()

def make_tokenizer(folder, vocab, merges, added, special):
    """What tiktoken needs: {bytes: token} of bytes and merges, in which a smaller token is merged
    first, and {name: token} of the tokens that no merge makes"""
    where = f"{folder}: its tokenizer is not GPT-2's kind"
    if not vocab.keys() >= BYTES.keys():
        raise InputError(f"{where}: some bytes are no token; train it with all in its alphabet")
    made = {character: vocab[character] for character in BYTES}
    newest = -1
    for left, right in merges:
        token = vocab.get(left + right, -1)
        if token <= newest or left not in made or right not in made:
            raise InputError(f"{where}: {left!r} and {right!r} are merged out of order")
        made[left + right] = newest = token
    ranks = {bytes(map(BYTES.get, spelling)): token for spelling, token in made.items()}
    names = {}                                              # of what no merge makes
    for spelling in vocab.keys() - made.keys():
        text = spelling if spelling in added else bytes(map(BYTES.get, spelling)).decode()
        names[text] = vocab[spelling]
    if sorted([*ranks.values(), *names.values()]) != list(range(len(vocab))):
        raise InputError(f"{where}: its {len(vocab)} tokens are not numbered 0, 1, 2, ..")
    encoding = tiktoken.Encoding(str(folder), pat_str=PIECES, mergeable_ranks=ranks,
                                 special_tokens=names)
    return Tokenizer(encoding, added, map(added.get, special))

def load_tokenizer(name, default=None):
    """The model's own tokenizer or, for a model without one, that of `default`. None is guessed."""
    for folder in folders(name):
        vocabulary = read_vocabulary(folder)
        if vocabulary and default:
            raise InputError(f"{name} has its own tokenizer; leave out --tokenizer {default}")
        if vocabulary:
            return make_tokenizer(folder, *vocabulary)
    if name in PUBLIC and not os.path.isdir(name):
        return Tokenizer(tiktoken.get_encoding("gpt2"), {"<|endoftext|>": END}, {END})
    if default:
        return load_tokenizer(default)
    raise InputError(f"{name}: no tokenizer.json, no vocab.json there; name a tokenizer, for example "
                     "--tokenizer gpt2")

def settle_ends(config, tokenizer):
    """
    Only tokens of the vocabulary can be bos or eos. If config.json names none and the vocabulary is
    GPT-2's, they are 50256. If config.json names 50256, but that is a word of this vocabulary, the
    number was left over from GPT-2 and is dropped.
    """
    own = [END] if tokenizer.encode("<|endoftext|>") == [END] else []
    known = set(range(tokenizer.n_vocab))
    if not tokenizer.encoding.is_special_token(END):
        known.discard(END)
    bos = own if config.bos_id is None else [config.bos_id]
    config.bos_id = bos[0] if bos and bos[0] in known else None
    config.eos_ids = sorted(known.intersection(config.eos_ids or own))
    tokenizer.special |= known & {config.bos_id, *config.eos_ids}

def load(name, tokenizer=None, device="cpu", dtype=torch.float32):
    """
    -> model, tokenizer. Rows of W without a token are cut off: they cannot be drawn. For a tiny model
    torch is set to one thread, for the whole process: more only get in each other's way.
    """
    try:
        model = GPT.from_pretrained(name, device, dtype)
        tokenizer = load_tokenizer(name, tokenizer)
        settle_ends(model.config, tokenizer)
    except InputError:
        raise
    except Exception as error:          # damaged files may raise anything; tiktoken fetches, too
        raise InputError(f"{name}: no plain, whole GPT-2 ({type(error).__name__}: "
                         f"{str(error)[:400]}); fetch it again, or choose another") from None
    n = tokenizer.n_vocab
    W = model.wte.weight
    if n > len(W):
        last = tokenizer.encoding.decode([n - 1])
        raise InputError(f"{name}: {n} tokens, but {len(W)} rows in W, none for {last!r}; choose the "
                         "model's own tokenizer, or remove the name from its files")
    model.wte.weight = nn.Parameter(W[:n].clone(), requires_grad=False)
    model.config.n_vocab = n
    if model.wte.weight.numel() < 1e6:
        torch.set_num_threads(1)
    return model, tokenizer

def read_prompts(model, tokenizer, name, texts=(), path=None):
    """
    Texts and the lines of a text file -> [[bos, token, ..], ..], bos if the model `name` has one.
    Without either: the lines of name/prompts.txt, or the empty text.
    """
    texts = list(texts)
    own = Path(name, "prompts.txt")
    if path is None and not texts:
        path = own if own.is_file() else None
        texts = [] if path else [""]
    if path is not None:
        if Path(path).suffix in (".csv", ".tsv", ".json", ".jsonl"):
            raise InputError(f"{path}: no plain text; write one prompt a line into a .txt file")
        try:
            lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); name a text file") from None
        texts += filter(str.strip, lines)
    longest = 128 * model.config.n_positions        # GPT-2's longest token has 128 characters
    if max(map(len, texts), default=0) > longest:
        raise InputError(f"{path or 'a prompt'} has more than {longest} characters; shorten it")
    bos = [] if model.config.bos_id is None else [model.config.bos_id]
    prompts = [bos + tokenizer.encode(text) for text in texts]
    if not prompts or [] in prompts:
        raise InputError(f"{path or 'a prompt'} is empty; write at least one word")
    return prompts

def check_length(model, prompts, n_tokens):
    """InputError if a text may grow longer than the model's context"""
    longest = max(map(len, prompts))
    if longest + n_tokens > model.config.n_positions:
        raise InputError(f"a prompt of {longest} tokens and {n_tokens} more exceed the model's context "
                         f"of {model.config.n_positions}; shorten the prompt or lower --tokens")

def in_turn(prompts, n, seed):
    """n of the prompts: repeated in order if there are fewer, chosen by the seed if there are more"""
    if len(prompts) > n:
        return random.Random(seed).sample(prompts, n)
    return [prompts[i % len(prompts)] for i in range(n)]

TENTHS = {}                     # {label: the last tenth printed}

def show_progress(label, done, total):
    """To stderr: a terminal's line is rewritten, a log gets a line each tenth."""
    tenth = 10 * done // total
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[K{label} {done} of {total}", end=end, file=sys.stderr, flush=True)
    elif TENTHS.get(label) != tenth:
        TENTHS[label] = tenth if done < total else None
        print(f"{label} {done} of {total}", file=sys.stderr, flush=True)

def run_script(main):
    """Run main(). Bad input prints one line and exits with code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # if the terminal cannot print blocks or é
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                             # the reader of the pipe, `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
