"""
GPT-2, with its state in the open.

A language model is a discrete-time stochastic dynamical system:

    state       h_t      = the hidden state after the final layer norm   model(tokens)    (B, T, n_embd)
    output      logits_t = W h_t,  W the token embedding (tied head)     model.unembed(h) (B, T, n_vocab)
    dynamics    y_t ~ softmax(logits_t),  h_{t+1} = f(h_t, y_t)          model(y_t, cache)

Most implementations return logits and hide the state; here the model returns its *state* and the
step from state to logits is the caller's, because everything this project does happens in between:
V(h_t) is read there and the control u_t is added there, logits_t = W (h_t + u_t).

The network is the one OpenAI published (Radford et al. 2019): pre-norm blocks, learned positions,
gelu in its tanh form, weights shared between embedding and head. Module names are the public
checkpoint's, so loading is one table and no renaming. Inference only: the weights are frozen.

But: no dropout, no training of the GPT itself, no sharded or pickled checkpoints, no download
(`from_pretrained` takes a directory).
"""
import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """Something the user can mend. The message is one line: the cause, then the mend."""
    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))       # whatever a file's names contain


# ----------------------------------------------------------------------------------------- the GPT

@dataclass
class Config:
    n_vocab: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    eps: float = 1e-5        # of every layer norm
    bos_token_id: int = 0    # precedes every prompt
    eos_token_id: int = 0    # ends a text


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, cache, positions, mask):
        """x (B, T, n_embd) -> (B, T, n_embd), each row attending to itself and what came before."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                   # each (B, n_head, T, d)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.store(layer, k, v, positions)         # each (B, n_head, span, d)
            scores = q @ k.mT / math.sqrt(q.size(-1))          # (B, n_head, T, span)
            scores = scores.masked_fill(~mask, -torch.inf)
            y = scores.float().softmax(-1).to(v.dtype) @ v     # (B, n_head, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        x = x + self.attn(self.ln_1(x), *attention_inputs)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)      # W: token embedding and head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.eps)

    def forward(self, tokens, cache=None, lengths=None):
        """
        tokens (B, T) -> hidden (B, T, n_embd), the state from which each next token is drawn.

        Without a cache: one causal pass. With one: the tokens continue each row from where it
        stands. Rows of different length are padded on the right; `lengths` (B,) says how many
        tokens of each row are real (all, if None). States at padding mean nothing.
        """
        positions, mask = torch.arange(tokens.size(1), device=tokens.device), None
        if cache is not None:
            positions = cache.lengths[:, None] + positions                        # (B, T)
            cache.span = min(cache.span + tokens.size(1), cache.size)
            slots = torch.arange(cache.span, device=tokens.device)
            mask = (slots <= positions[:, :, None])[:, None]                      # (B, 1, T, span)
        x = self.wte(tokens) + self.wpe(positions)                                # (B, T, n_embd)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, positions, mask)
        if cache is not None:
            cache.lengths += tokens.size(1) if lengths is None else lengths
        return self.ln_f(x)

    def unembed(self, hidden):
        """hidden (..., n_embd) -> logits (..., n_vocab) = W hidden: in W's dtype, handed on as float32."""
        return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight).float()

    def fingerprint(self):
        """sha256 of the final norm and the embedding in bfloat16, the same for float32 and bfloat16."""
        digest = hashlib.sha256()
        for weight in (self.ln_f.weight, self.ln_f.bias, self.wte.weight):
            digest.update(weight.detach().bfloat16().view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """A frozen GPT-2 from a directory holding config.json and model.safetensors."""
        model = cls._empty(read_config(directory))
        load_weights(model, find_weights(directory), device, dtype)
        return model.eval().requires_grad_(False)

    @classmethod
    def _empty(cls, config):
        with torch.device("meta"):                             # shapes only: no memory, no init
            return cls(config)


class Cache:
    """
    Keys and values of every layer, allocated once for `size` tokens a row.

    lengths (B,) are the tokens each row holds: the next token of row b goes to slot lengths[b].
    A padded slot is masked until a real token overwrites it, so rows never see their neighbours.
    `span` is the host's bound on lengths.max(): attention reads that many slots, not all.
    """
    def __init__(self, model, batch, size):
        config, weight = model.config, model.wte.weight
        shape = (config.n_layer, batch, config.n_head, size, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.rows = torch.arange(batch, device=weight.device)[:, None]            # (B, 1)
        self.size, self.span = size, 0

    def store(self, layer, k, v, positions):
        """Write k, v (B, n_head, T, d) at positions (B, T); return all live ones (.., span, d)."""
        self.keys[layer][self.rows, :, positions] = k.transpose(1, 2)
        self.values[layer][self.rows, :, positions] = v.transpose(1, 2)
        return self.keys[layer][:, :, :self.span], self.values[layer][:, :, :self.span]


# ------------------------------------------------------------------------- configuration, weights

def read_config(directory):
    """config.json -> Config. InputError where it asks for a network this file does not implement."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such directory; --model takes a directory holding "
                         f"config.json and model.safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {directory} a GPT-2 checkpoint?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no JSON object; fetch it again")
    implemented = {"model_type": "gpt2", "scale_attn_weights": True, "add_cross_attention": False,
                   "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in implemented.items():
        if raw.get(key, value) != value:
            raise InputError(f"{path}: {key} is {raw[key]!r}, and only {value!r} is implemented; "
                             f"choose a plain GPT-2 model")
    if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(f"{path}: activation_function is {raw['activation_function']!r}, and only "
                         f"'gelu_new' is implemented; choose a plain GPT-2 model")
    sizes = {name: raw.get(key) for name, key in (
        ("n_vocab", "vocab_size"), ("n_positions", "n_positions"), ("n_embd", "n_embd"),
        ("n_layer", "n_layer"), ("n_head", "n_head"))}
    if raw.get("n_inner"):
        sizes["n_inner"] = raw["n_inner"]
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InputError(f"{path}: {name} is {size!r}, not a positive integer; fetch it again")
    sizes.setdefault("n_inner", 4 * sizes["n_embd"])
    if sizes["n_embd"] % sizes["n_head"]:
        raise InputError(f"{path}: n_embd {sizes['n_embd']} is not a multiple of n_head "
                         f"{sizes['n_head']}; fetch it again")
    ends = [raw.get(key, sizes["n_vocab"] - 1) for key in ("bos_token_id", "eos_token_id")]
    if not all(type(end) is int and 0 <= end < sizes["n_vocab"] for end in ends):
        raise InputError(f"{path}: bos/eos_token_id {ends} lie outside the vocabulary of "
                         f"{sizes['n_vocab']}; fetch it again")
    eps = raw.get("layer_norm_epsilon", 1e-5)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise InputError(f"{path}: layer_norm_epsilon is {eps!r}, not a small positive number; "
                         f"fetch it again")
    return Config(**sizes, eps=eps, bos_token_id=ends[0], eos_token_id=ends[1])


def find_weights(directory):
    """The directory's model.safetensors, or one line saying what it holds instead."""
    directory = Path(directory)
    if (directory / "model.safetensors").is_file():
        return directory / "model.safetensors"
    for other, why in (("model.safetensors.index.json", "its weights are sharded over several files"),
                       ("pytorch_model.bin", "pickled weights can run code when they are read")):
        if (directory / other).exists():
            raise InputError(f"{directory}: only {other} is there, and {why}; "
                             f"save the model as one model.safetensors")
    raise InputError(f"{directory / 'model.safetensors'}: no such file; fetch it beside config.json")


# OpenAI stored these four as (in, out), a 1x1 convolution's way; nn.Linear wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Constants that old checkpoints carry along: the causal mask and the value behind it.
IGNORED = (".attn.bias", ".attn.masked_bias")
HEAD = "lm_head.weight"      # where it is repeated, it must repeat wte


def load_weights(model, path, device, dtype):
    """Fill the model from a public GPT-2 checkpoint; InputError lists every name that is off."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded, head, off, met = {}, None, [], set()
    for name, tensor in read_safetensors(path):
        name = name.removeprefix("transformer.")
        if name.endswith(IGNORED):
            continue
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.T
        met.add(name)
        if name == HEAD:
            head = tensor
        elif name not in wanted:
            off.append(f"unexpected {name}")
        elif tuple(tensor.shape) != wanted[name]:
            off.append(f"{name} is {tuple(tensor.shape)}, not {wanted[name]}")
        elif not tensor.is_floating_point():
            off.append(f"{name} holds {tensor.dtype}, not floating point")
        else:
            loaded[name] = tensor.to(device, dtype).contiguous()
    off += [f"missing {name}" for name in wanted if name not in met]
    if off:
        raise InputError(f"{path}: not the weights config.json describes: {', '.join(off)}; "
                         f"fetch both files from one model")
    if head is not None and not torch.equal(head.to(device, dtype), loaded["wte.weight"]):
        raise InputError(f"{path}: {HEAD} differs from wte.weight, and only a tied head is "
                         f"implemented; choose a plain GPT-2 model")
    model.load_state_dict(loaded, assign=True)


# ------------------------------------------------------------------------------------- safetensors
# The format: 8 bytes little-endian header length, a JSON header, the tensors' bytes one after the
# other. The header: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..,
# "__metadata__": {str: str}}. https://github.com/huggingface/safetensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool, "I64": torch.int64}


def extent(*numbers):
    """The numbers, if each is a whole number that fits 63 bits; else ValueError."""
    if not all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers):
        raise ValueError(f"{numbers} are no extent")
    return numbers


def read_header(path):
    """path -> (header, metadata, offset of the data). Every extent is checked against the file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(100_000_000, size - 8):
            raise InputError(f"{path}: not a whole safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
            metadata = dict(header.pop("__metadata__", {}))
            entries = sorted((*extent(*entry["data_offsets"]), str(entry["dtype"]),
                              extent(*entry["shape"])) for entry in header.values())
            if any(len(entry) != 4 for entry in entries):
                raise ValueError("an extent is a beginning and an end")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: its safetensors header is corrupt "
                             f"({type(error).__name__}); fetch it again") from None
    end = 0
    for begin, stop, dtype, shape in entries:
        if dtype not in DTYPES:
            raise InputError(f"{path}: holds a tensor of type {dtype!r}; only {', '.join(DTYPES)} are read")
        if begin != end or stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise InputError(f"{path}: its tensors' extents do not fit together; fetch it again")
        end = stop
    if 8 + length + end != size:
        raise InputError(f"{path}: {size} bytes where its header promises {8 + length + end}; "
                         f"the file is cut off or damaged: fetch it again")
    return header, metadata, 8 + length


def read_safetensors(path):
    """Yield (name, tensor) one at a time, each a copy of its own out of the mapped file."""
    header, _, offset = read_header(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for name, entry in header.items():
            begin, end = (offset + extent for extent in entry["data_offsets"])
            data = bytearray(mapped[begin:end])                # aligned, whatever the file is
            flat = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]) if data else \
                torch.empty(0, dtype=DTYPES[entry["dtype"]])
            yield name, flat.view(tuple(entry["shape"]))


def write_safetensors(path, tensors, metadata):
    """Write tensors and {str: str} metadata; the file appears whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, chunks, offset = {"__metadata__": metadata}, [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + len(data)]}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    write_whole(path, [len(text).to_bytes(8, "little"), text, *chunks])


def write_whole(path, chunks):
    """Write the bytes; whatever interrupts it, `path` holds all of the new or all of the old."""
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- tokenizer

# How GPT-2 cuts text into pieces before pairs are merged: contractions, words, numbers, signs.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def load_tokenizer(directory):
    """The directory's own vocab.json, or GPT-2's byte pairs where it has none and needs those."""
    path = Path(directory) / "vocab.json"
    if path.is_file():
        try:
            vocabulary = json.loads(path.read_text(encoding="utf-8"))
            special = {t: i for t, i in vocabulary.items() if t.startswith("<|") and t.endswith("|>")}
            ranks = {bytes(BYTES[c] for c in t): i for t, i in vocabulary.items() if t not in special}
            if any(type(i) is not int or not 0 <= i < 2 ** 31 for i in vocabulary.values()) \
                    or len(set(vocabulary.values())) < len(vocabulary):
                raise ValueError("the ids are not different whole numbers")
        except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a GPT-2 vocabulary ({type(error).__name__}); "
                             f"fetch it again") from None
        if any(bytes([b]) not in ranks for b in range(256)):
            raise InputError(f"{path}: some of the 256 single bytes are missing; fetch it again")
        return tiktoken.Encoding(str(path), pat_str=PIECES, mergeable_ranks=ranks,
                                 special_tokens=special)
    n_vocab = read_config(directory).n_vocab
    if n_vocab != 50257:
        raise InputError(f"{directory}: {n_vocab} tokens and no vocab.json to name them; fetch it")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:   # tiktoken fetches through requests: any of its errors may come
        raise InputError(f"GPT-2's vocabulary is not cached and cannot be fetched "
                         f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has "
                         f"it, or put GPT-2's vocab.json into {directory}") from None


def _byte_characters():
    """The printable character by which GPT-2's vocab.json writes each byte: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()
