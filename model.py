"""
GPT-2, with its state in the open. A language model is a discrete-time stochastic dynamical system:

    state       h_t      = the hidden state after the final layer norm   model(tokens)    (B, T, n_embd)
    output      logits_t = W h_t,  W the token embedding (tied head)     model.unembed(h) (B, T, n_vocab)
    dynamics    y_t ~ softmax(logits_t),  h_{t+1} = f(h_t, y_t)          model(y_t, cache)

Most implementations hide the state. Here the step from state to logits is the caller's, because all this
project does happens there: V(h_t) is read, the control u_t is added, logits_t = W (h_t + u_t).

The network is the one OpenAI published (Radford et al. 2019), its module names the public checkpoints'.
Below it: reading weights, and fetching them. But: inference only; no sharded or pickled checkpoints.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import json
import math
import mmap
import os
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

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


class Linear(nn.Linear):
    """y = W x + b, and its GELU; once packed, with W in the blocks that oneDNN multiplies by (GPT.pack)."""
    blocks = None

    def pack(self):
        # For products with 16 rows: any number but 1 gives the same blocks, which are good for 1 too.
        self.blocks, self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 16), None

    def forward(self, x, gelu=False):
        """x (..., in) -> (..., out)"""
        if self.blocks is not None:
            # One row as four equal ones: for those oneDNN reads the blocks faster.
            rows = x.expand(4, 1, x.size(-1)) if x.numel() == x.size(-1) else x
            return onednn_linear(rows, self.blocks, self.bias, "gelu" if gelu else "none")[:len(x)]
        with kernels_for(x):
            y = super().forward(x)
        return F.gelu(y, approximate="tanh") if gelu else y


def onednn_linear(x, weight, bias=None, then="none"):
    """W x + b without gradients, by oneDNN, W packed or not; F.linear leaves float32 to a slower library."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "tanh")


def product(x, W, out=None):
    """x (.., n), W (m, n) -> W x (.., m) in W's dtype, handed on as float32; into `out` (B, m), if given."""
    x = x.to(W.dtype)
    if out is not None and W.dtype == torch.float32:
        return torch.mm(x, W.T, out=out)
    return F.linear(x, W).float() if out is None else out.copy_(F.linear(x, W))


def alone(x):
    """Whether x (..., n) is one row in bfloat16 on a CPU."""
    return x.is_cpu and x.dtype == torch.bfloat16 and x.numel() == x.size(-1)


@contextlib.contextmanager
def kernels_for(x):
    """In here products of a row `alone` go to torch's own kernels: oneDNN lays out W anew even for one."""
    enabled = torch.backends.mkldnn.enabled
    if alone(x):
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def give_back():
    """Hand freed memory back to the system, as glibc does only when asked."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, cache, positions, future):
        """
        x (B, T, n_embd) -> (B, T, n_embd), each row attending to itself and what came before: `future`
        (B, 1, T, reach), added to the scores, is -inf at what comes after.
        """
        (B, T, C), d = x.shape, x.size(2) // self.n_head
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, d)
        if cache is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)               # each (B, n_head, T, d)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            q = qkv[:, :, 0].transpose(1, 2)                   # (B, n_head, T, d)
            k, v = cache.store(layer, qkv[:, :, 1:], positions)            # each (B, n_head, reach, d)
            scores = torch.add(future, q @ k.mT, alpha=d ** -0.5)          # (B, n_head, T, reach)
            y = scores.softmax(-1) @ v                         # (B, n_head, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_inner)
        self.c_proj = Linear(config.n_inner, config.n_embd)

    def forward(self, x):
        """x (B, T, n_embd) -> (B, T, n_embd)"""
        return self.c_proj(self.c_fc(x, gelu=True))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        """x (B, T, n_embd) -> (B, T, n_embd); the rest is Attention's."""
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
        self.packed = False

    def forward(self, tokens, cache=None, lengths=None):
        """
        tokens (B, T) -> hidden (B, T, n_embd), the state from which each next token is drawn.
        Without a cache: one causal pass. With one: the tokens continue each row. Rows are padded on the
        right; `lengths` (B,) of their tokens are real (None: all). States at padding mean nothing.
        """
        positions, future = torch.arange(tokens.size(1), device=tokens.device), None
        if cache is not None:
            positions = cache.lengths[:, None] + positions                        # (B, T)
            cache.span = min(cache.span + tokens.size(1), cache.size)
            cache.make_room()
            slots = torch.arange(cache.reach, device=tokens.device)
            future = (slots > positions[:, :, None])[:, None]                     # (B, 1, T, reach)
            future = self.wte.weight.new_zeros(()).masked_fill(future, -torch.inf)
        x = self.wte(tokens) + self.wpe(positions)                                # (B, T, n_embd)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, positions, future)
        if cache is not None:
            cache.lengths += tokens.size(1) if lengths is None else lengths
        return self.ln_f(x)

    def unembed(self, hidden, out=None):
        """
        hidden (..., n_embd) -> logits (..., n_vocab) = W hidden: in W's dtype, handed on as float32; into
        `out` (B, n_vocab) if there is one.
        """
        W = self.wte.weight
        hidden = hidden.to(W.dtype)
        if not self.packed or alone(hidden):
            with kernels_for(hidden):
                return product(hidden, W, out)
        out = torch.empty(*hidden.shape[:-1], len(W)) if out is None else out
        # In parts, as oneDNN lays out anew what it multiplies by: all of W would be much memory.
        for part, logits in zip(W.split(4096), out.split(4096, -1)):
            logits.copy_(onednn_linear(hidden, part))
        return out

    def pack(self, batch=None):
        """
        -> self, frozen for good: on a CPU the weights of all layers are laid out anew, in the blocks that
        oneDNN reads. Otherwise it does so at every product, which at few rows takes as long as the product.
        The embedding stays as it is, being looked up as well; so do all for a `batch` of 1 in bfloat16, which
        torch's own kernels are better at.
        """
        W = self.wte.weight
        if W.is_cpu and torch.backends.mkldnn.is_available() and not self.packed and (
                W.dtype == torch.float32 or batch != 1 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack()
                    give_back()                                # the old layout
            self.packed = True
        return self

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, extra=()):
        """A frozen GPT-2: a directory or a model of the hub. Tensors named in `extra` end in model.extra."""
        with torch.device("meta"):                             # shapes only: no memory, no init
            model = cls(read_config(name))
        model.extra = load_weights(model, name, device, dtype, extra)
        return model.eval().requires_grad_(False)


class Cache:
    """
    Keys and values of every layer, allocated once for `size` tokens a row; row b holds lengths[b] so far.
    A padded slot is masked until a real token overwrites it, so rows never see their neighbours.

    `span` is the host's bound on lengths.max(): attention reads that many slots, `reach`, not all; rounded up
    to a multiple of 32, as a CPU compiles its bfloat16 products anew for every shape. There the slots that
    are read lie side by side, `room` a row, and move apart when they become more: a product would otherwise
    copy them every time. On a GPU nothing moves, its graphs know where all is.
    """
    def __init__(self, model, batch, size):
        config, weight = model.config, model.wte.weight
        self.shape = batch, config.n_head, config.n_embd // config.n_head
        self.pairs = weight.new_zeros(config.n_layer, 2, batch * size * config.n_embd)    # keys, values
        self.lengths = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.rows = torch.arange(batch, device=weight.device)[:, None]            # (B, 1)
        self.size = size
        self.clear()

    @property
    def reach(self):
        """Slots that attention reads."""
        return min(-(-self.span // 32) * 32, self.size)

    def clear(self):
        """Forget all tokens."""
        self.lengths.zero_()
        self.span, self.room = 0, self.size if self.pairs.is_cuda else 0

    def slots(self, flat, room):
        """Keys or values, or both (.., batch * size * n_embd) -> (.., B, n_head, room, d)"""
        batch, heads, d = self.shape
        return flat[..., :batch * heads * room * d].unflatten(-1, (batch, heads, room, d))

    def make_room(self):
        """Move the slots of all rows apart, to `reach` a row: a few rows at a time, the last first."""
        if self.reach > self.room:
            for flat in self.pairs.flatten(0, 1):
                near, apart = (self.slots(flat, room).split(4) for room in (self.room, self.reach))
                # A new place overlaps old ones of later rows, moved already, and its own: hence the clone.
                for few, place in zip(reversed(near), reversed(apart)):
                    place[:, :, :self.room] = few.clone()
            self.room = self.reach

    def store(self, layer, pairs, positions):
        """Write pairs (B, T, 2, n_head, d) at positions (B, T) -> all live ones (2, B, n_head, reach, d)."""
        slots = self.slots(self.pairs[layer], self.room)
        slots[:, self.rows, :, positions] = pairs
        return slots[:, :, :, :self.reach]


# ------------------------------------------------------------------------- configuration, weights

# What config.json may ask for: {key: what is implemented, that of a file without the key first}.
IMPLEMENTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
               "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
               "add_cross_attention": (False,), "tie_word_embeddings": (True,)}
SIZES, ENDS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), ("bos_token_id", "eos_token_id")
# OpenAI stored these four as (in, out), a 1x1 convolution's way; nn.Linear wants (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
IGNORED = (".attn.bias", ".attn.masked_bias")      # the causal mask, a constant in old checkpoints


def read_config(name):
    """config.json -> Config. InputError where it asks for a network this file does not implement."""
    raw = read_json(path := find(name, "config.json"))
    off = [key for key, values in IMPLEMENTED.items() if raw.get(key, values[0]) not in values]
    off += [key for key in SIZES if type(raw.get(key)) is not int
            or not 0 < raw[key] < (1000 if key == "n_layer" else 2 ** 24)]
    if not off:
        last, inner = raw["vocab_size"] - 1, raw.get("n_inner") or 4 * raw["n_embd"]
        ends, eps = [raw.get(key, last) for key in ENDS], raw.get("layer_norm_epsilon", 1e-5)
        off += ["n_head"] * (raw["n_embd"] % raw["n_head"] > 0)
        off += ["n_inner"] * (type(inner) is not int or not 0 < inner < 2 ** 24)
        off += ["layer_norm_epsilon"] * (type(eps) not in (int, float) or not 0 <= eps < 1)
        off += [key for key, end in zip(ENDS, ends) if type(end) is not int or not 0 <= end <= last]
    if off:
        raise InputError(f"{path}: {', '.join(f'{key} is {raw.get(key)!r}' for key in off)}: no plain GPT-2; "
                         f"choose another model, or fetch it again")
    return Config(*(raw[key] for key in SIZES), inner, eps, *ends)


def load_weights(model, name, device, dtype, extra):
    """Fill the model from a public checkpoint, all of it checked -> {name: tensor} of `extra`."""
    path, state, off = find(name, "model.safetensors"), {}, []
    for key, tensor in read_safetensors(path):
        key = key.removeprefix("transformer.")
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.T
        off += [f"{key} twice"] * (key in state)
        if not key.endswith(IGNORED):
            state[key] = tensor.to(device, dtype).contiguous()
    if damaged := [key for key, tensor in state.items() if not tensor.sum().isfinite()]:
        raise InputError(f"{path}: NaN or infinite numbers in {', '.join(damaged)[:2000]}; fetch it again, "
                         f"or choose another model")
    head, extra = state.pop("lm_head.weight", None), {key: state.pop(key, None) for key in extra}
    off += [f"missing {key}" for key, tensor in extra.items() if tensor is None]
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        off.append("lm_head.weight differs from wte.weight, and only a tied head is implemented")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:                              # lists every name that is off
        off.append(str(error)[:2000])
    if off:
        raise InputError(f"{path}: not the weights wanted: {'; '.join(off)}; choose a plain GPT-2 model")
    return extra


# ------------------------------ JSON and safetensors (https://github.com/huggingface/safetensors)
# 8 bytes little-endian header length, a JSON header, the tensors' bytes one after the other. The header:
# {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {str: str}}.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64":
          torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def recognise(data):
    """ValueError where the bytes begin like what is often found in a file's place."""
    for start, what in ((b"version https://git-lfs", "Git-LFS pointer"), (b"<", "web page")):
        if data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            raise ValueError(f"a {what} lies in its place")


def parse_json(data):
    """UTF-8 bytes -> the JSON object in them. ValueError for anything else, a repeated name, NaN."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)
    recognise(data)
    parsed = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=int)  # int("NaN") raises
    if not isinstance(parsed, dict):
        raise ValueError("no JSON object")
    return parsed


def read_json(path):
    try:
        return parse_json(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it again") from None


def read_header(path):
    """path -> (header, metadata, offset of the data). Every extent is checked against the file."""
    size, end = os.path.getsize(path), 0
    with open(path, "rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        try:
            if len(start) < 8 or length > min(100_000_000, size - 8):
                recognise(start)
                raise ValueError(f"{size} bytes cannot hold its header")
            file.seek(8)
            header = parse_json(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            for (begin, stop), shape, dtype in sorted(
                    (entry["data_offsets"], entry["shape"], entry["dtype"]) for entry in header.values()):
                if any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) or len(shape) > 8 \
                        or type(shape) is not list or math.prod(n or 1 for n in shape) >= 2 ** 63:
                    raise ValueError("a tensor's extent is none")
                if begin != end or stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise ValueError("the tensors' extents do not fit together")
                end = stop
            if 8 + length + end != size:
                raise ValueError(f"{size} bytes where the header promises {8 + length + end}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({type(error).__name__}: {error}); "
                             f"fetch it again") from None
    return header, metadata, 8 + length


def read_safetensors(path):
    """Yield (name, tensor) one at a time, read straight into pages of its own, which go back when it does."""
    header, _, offset = read_header(path)
    with open(path, "rb") as file:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            pages = mmap.mmap(-1, max(end - begin, 1))         # malloc would keep them, in pieces: half as
            file.seek(offset + begin)                          # much again for a model in bfloat16
            if file.readinto(memoryview(pages)[:end - begin]) < end - begin:
                raise InputError(f"{path}: changed while it was read; try again")
            flat = torch.frombuffer(pages, dtype=torch.uint8)[:end - begin].view(DTYPES[entry["dtype"]])
            yield name, flat.view(entry["shape"])


# ----------------------------------------------------------------------- files: directory, cache, hub
# A model is a directory or a name of the hub, cached as models--org--name/snapshots/<commit>/<file>.

PUBLIC = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")}
PUBLIC["distilgpt2"] = "distilbert/distilgpt2"
OFFLINE, TIMEOUT = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), 30      # seconds without a byte


def find(name, file, optional=False):
    """The path of a model's file, fetched if need be; None where a model lacks an optional one."""
    name, env = str(name), os.environ.get
    home = env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    home = Path(os.path.expanduser(home))
    cache = Path(os.path.expanduser(env("HF_HUB_CACHE") or home / "hub"))
    aliases = [name] + [other for pair in PUBLIC.items() if name in pair for other in pair]
    folders = [cache / f"models--{alias.replace('/', '--')}" for alias in aliases]
    places = [folder / "snapshots" / text_of(folder / "refs/main") for folder in folders]
    if local := os.path.isdir(name):
        places = [Path(name)]
    elif not re.fullmatch(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError(f"{name}: no such directory, nor a name of the hub; check it")
    found = next((place / file for place in places if os.path.isfile(place / file)), None)
    if not found and not local:
        try:
            if {str(env(flag)).lower() for flag in OFFLINE} & {"1", "on", "yes", "true"}:
                raise ConnectionError(f"offline: unset {' and '.join(filter(env, OFFLINE))}")
            token = env("HF_TOKEN") or text_of(Path(env("HF_TOKEN_PATH") or home / "token"))
            endpoint = env("HF_ENDPOINT") or "https://huggingface.co"
            found = fetch(name, file, folders[0], endpoint, "".join(token.split()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            network = (URLError, ConnectionError, TimeoutError, ValueError, http.client.HTTPException)
            mend = ("check the name, or set HF_TOKEN" if getattr(error, "code", 0) in (401, 403) else
                    "try again, or set HF_ENDPOINT to a mirror, or HF_HUB_CACHE to a cache that has it"
                    if isinstance(error, network) else "make room, or set HF_HUB_CACHE to another directory")
            if getattr(error, "code", 0) != 404:               # which says that there is no such file
                raise InputError(f"{name}: no directory here, and {file} is not in {cache} nor can be "
                                 f"fetched into it ({error}); {mend}") from None
    if not found and not optional:
        raise InputError(f"{name}: has no {file}; a model is a config.json and a model.safetensors (no "
                         f"sharded model.safetensors.index.json, no pickled pytorch_model.bin), here or on "
                         f"the hub")
    return found


def text_of(path):
    """The text of a small file, "" where there is none."""
    readable = os.path.isfile(path) and os.access(path, os.R_OK)
    return path.read_text(errors="replace").strip() if readable else ""


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follow redirects, take the token to no other host, and keep what every hop tells of the file."""
    told = {}

    def redirect_request(self, request, answer, code, message, headers, url):
        """urllib's hook: the request to follow a redirect to `url` with."""
        self.told = self.told | {key.lower(): text for key, text in headers.items()}
        after = super().redirect_request(request, answer, code, message, headers, url)
        if urlsplit(url)[:2] != urlsplit(request.full_url)[:2]:
            after.headers.pop("Authorization", None)
        return after


def ask(url, headers):
    """GET -> (response, {header: text} of all hops)"""
    hops, request = Redirect(), urllib.request.Request(url, headers=headers)
    response = urllib.request.build_opener(hops).open(request, timeout=TIMEOUT)
    return response, hops.told | {key.lower(): text for key, text in response.headers.items()}


def fetch(name, file, folder, endpoint, token):
    """A file of a model from the hub into its folder of the cache -> its path."""
    ref, headers = folder / "refs/main", {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint.rstrip('/')}/{PUBLIC.get(name, name)}/resolve/{text_of(ref) or 'main'}/{file}"
    response, told = ask(url, headers)
    commit, etag = told.get("x-repo-commit", ""), told.get("x-linked-etag", told.get("etag", "")).strip('W/"')
    size = int(told.get("x-linked-size") or response.headers["Content-Length"] or -1)         # -1: not said
    if not re.fullmatch("[0-9a-f]{40}", commit) or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise ConnectionError(f"{endpoint} does not answer like the hub")
    path, began = folder / "snapshots" / commit / file, time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    ref.parent.mkdir(exist_ok=True)
    with open(f"{path}.{etag}.part", "a+b") as part:
        fcntl.flock(part, fcntl.LOCK_EX)                       # another process at it: wait, then use its
        if not path.exists():
            had = have = part.seek(0, 2)
            if 0 < had < size:                                 # a transfer that broke: ask for the rest
                response, _ = ask(url, {**headers, "Range": f"bytes={had}-"})
            if have != size and response.status != 206:
                had = have = part.truncate(0)
            while (have < size or size < 0) and (chunk := response.read1(2 ** 20)):
                have += part.write(chunk)
                if sys.stderr.isatty():
                    speed = (have - had) / (time.time() - began)
                    print(f"\033[K{file}: {have / 1e6:.0f} of {size / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s, "
                          f"{(size - have) / speed:.0f} s left", end="\r\n"[have == size], file=sys.stderr)
            part.seek(0)
            digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % have)     # as git's
            for chunk in iter(lambda: part.read(2 ** 20), b""):
                digest.update(chunk)
            if have < size:
                raise ConnectionError(f"the transfer broke at {have} of {size} bytes, and goes on from there")
            if digest.hexdigest() != etag:
                part.truncate(0)
                raise ConnectionError(f"what {endpoint} sent has another hash than it announced")
            os.replace(part.name, path)
        Path(part.name).unlink(missing_ok=True)
    text_of(ref) == commit or ref.write_text(commit)           # the rewriting would show it empty
    return path
