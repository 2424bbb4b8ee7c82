"""
Control and the closed loop against their definitions: the nine lines at the top of control.py, the
projection, the KL-optimal policy, a plain sort, the whole CDF, and each text drawn alone.
"""
import math
import textwrap

import pytest
import torch

import control
from control import (Sampler, ascend, controlled_log_probs, draw, generate, kl_ball, kl_divergence,
                     nucleus, readable, step_for_kl, uniform_table)
from model import GPT, Config, InputError, load
from tests.conftest import ROOT
from value import ValueNet

TOY = ROOT / "tests" / "toy"


def random_model(eos_ids=(3, 5), dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(Config(60, 200, 32, 2, 4, 64, bos_id=0, eos_ids=list(eos_ids)))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def net(n_embd=32, seed=1):
    torch.manual_seed(seed)
    value = ValueNet(n_embd, 16)
    value.std.uniform_(0.5, 2)
    torch.nn.init.normal_(value.gradient_head.weight)
    return value.requires_grad_(False)


MODEL, VALUE = random_model(), net()
PROMPTS = [[0] + list(range(10, 10 + i % 5)) for i in range(20)]


def push(hidden):
    return ascend(VALUE, hidden, step_size=0.5)


def columns(rollout):
    """What means something: entries up to each text's end."""
    return [column[rollout.mask] for column in vars(rollout).values() if column.size(1)]


# -------------------------------------------------------------------------------------- the definition

def likeliest(p, top_p):
    """The nucleus by a plain loop: p (n_vocab,) -> the likeliest tokens, until they hold top_p"""
    p = p.tolist()
    kept, held = [], 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if held < top_p:
            kept.append(token)
        held += p[token]
    return kept


class Tempered:
    """The model that the definition reads: logits over a temperature, and of p's nucleus alone"""
    config = MODEL.config

    def __init__(self, temperature, top_p):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, tokens):
        self.hidden = MODEL(tokens)
        return self.hidden

    def unembed(self, hidden):
        p = (MODEL.unembed(self.hidden[0, -1]) / self.temperature).softmax(-1)
        kept = likeliest(p, self.top_p)
        logits = torch.full((1, len(p)), -math.inf)
        logits[0, kept] = MODEL.unembed(hidden)[0, kept] / self.temperature
        return logits


def definition(model, controller, prompt, uniforms):
    """The lines at the top of control.py, run as they stand there -> the tokens drawn"""
    lines = control.__doc__.split("batched and cached:\n")[1].split("\nSource")[0]
    names = {"torch": torch, "model": model, "controller": controller, "prompt": prompt,
             "uniforms": uniforms}
    exec(textwrap.dedent(lines), names)
    return names["tokens"][len(prompt):]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
@pytest.mark.parametrize("controller", [None, push])
def test_texts_are_those_of_the_definition(controller, temperature, top_p):
    """Uniforms read in reverse order, or of a neighbour, draw other texts: this alone notices."""
    table = uniform_table(20, 10, 1)
    rollout = generate(MODEL, PROMPTS, table, controller, temperature, top_p)
    for i, prompt in enumerate(PROMPTS):
        truth = definition(Tempered(temperature, top_p), controller or torch.zeros_like, prompt, table[i])
        assert rollout.drawn(i) == truth
    assert 0 < rollout.mask.float().mean() < 1                  # some texts end early


# -------------------------------------------------------------------------------------- u

def test_one_step_is_the_step_size_times_the_gradient():
    h = torch.randn(4, 32)
    for size in (0.1, -0.1):
        torch.testing.assert_close(ascend(VALUE, h, 1, size, math.inf), size * VALUE.gradient(h))
    two = ascend(VALUE, h, 2, 0.1, math.inf)
    one = ascend(VALUE, h, 1, 0.1, math.inf)
    torch.testing.assert_close(two, one + 0.1 * VALUE.gradient(h + one))


def test_u_stays_in_the_ball_of_standard_deviations():
    h = torch.randn(50, 32)
    u = ascend(VALUE, h, 1, 3.0, 0.7)
    free = ascend(VALUE, h, 1, 3.0, math.inf)
    length = (u / VALUE.std).norm(dim=-1)
    whole = (free / VALUE.std).norm(dim=-1)
    torch.testing.assert_close(length, whole.clamp(max=0.7 * math.sqrt(32)), atol=1e-4, rtol=1e-4)
    assert (whole > 0.7 * math.sqrt(32)).any() and (whole < 100).all()
    torch.testing.assert_close(u / u.norm(dim=-1, keepdim=True), free / free.norm(dim=-1, keepdim=True))


def test_one_step_is_the_kl_optimal_policy_for_q():
    """softmax(W (h + g / beta)) = p(y) exp(Q(h, y) / beta) / Z, and no other policy gains more."""
    torch.manual_seed(0)
    W, h, beta = MODEL.wte.weight, torch.randn(3, 32), 2.0
    log_p, log_q = controlled_log_probs(MODEL, h, lambda hidden: ascend(
        VALUE, hidden, 1, 1 / beta, math.inf))
    p = log_p.exp()
    grad_log_p = W - (p @ W)[:, None]                                           # (3, 60, 32)
    Q = (grad_log_p * VALUE.gradient(h)[:, None]).sum(-1)                       # (3, 60), less V
    torch.testing.assert_close(log_q, (log_p + Q / beta).log_softmax(-1), atol=1e-4, rtol=1e-4)

    def worth(log_policy):
        return (log_policy.exp() * Q).sum(-1) - beta * kl_divergence(log_policy, log_p)
    for _ in range(20):
        other = (log_q + 0.3 * torch.randn(3, 60)).log_softmax(-1)
        assert (worth(other) < worth(log_q)).all()


@pytest.mark.parametrize("max_kl", [0.01, 0.3, 2.0])
def test_kl_ball_spends_its_budget_and_no_more(max_kl):
    torch.manual_seed(0)
    for spread, size in ((1, 0.01), (1, 1), (5, 3), (15, 10)):
        logits, delta = spread * torch.randn(64, 500), size * torch.randn(64, 500)
        log_p = logits.log_softmax(-1)
        s = kl_ball(logits, delta, max_kl)
        kl = kl_divergence((log_p + s[:, None] * delta).log_softmax(-1), log_p)
        whole = kl_divergence((log_p + delta).log_softmax(-1), log_p)
        assert (kl <= max_kl * 1.001 + 1e-6).all()
        assert (s[whole < 0.98 * max_kl] == 1).all()
        assert (kl[whole > max_kl] < 0.97 * max_kl).sum() <= 3                  # of 64


def test_a_budget_holds_for_every_token_that_is_drawn():
    table = uniform_table(20, 12, 1)
    free = generate(MODEL, PROMPTS, table, push)
    bound = generate(MODEL, PROMPTS, table, push, max_kl=0.05)
    assert free.kl[free.mask].max() > 0.2
    assert 0.045 < bound.kl[bound.mask].max() <= 0.0501


@pytest.mark.parametrize("top_p", [0.0001, 0.3, 0.9, 0.9999])
def test_the_nucleus_is_that_of_a_plain_sort(top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(20, 50)
    cut = nucleus(logits, top_p)
    for row, before in zip(cut, logits):
        kept = likeliest(before.softmax(-1), top_p)
        assert row.softmax(-1).nonzero()[:, 0].tolist() == sorted(kept)
        torch.testing.assert_close(row[kept], before[kept], atol=0, rtol=0)
    log_p = cut.log_softmax(-1)
    other = (cut + torch.randn(20, 50)).log_softmax(-1)
    assert kl_divergence(other, log_p).isfinite().all()


# -------------------------------------------------------------------------------------- the draw

@pytest.mark.parametrize("n_vocab", [364, 256, 1000, 50257])
def test_draws_are_those_of_the_whole_cdf(n_vocab):
    torch.manual_seed(0)
    rows = 30 if n_vocab > 1000 else 200
    probs = (8 * torch.randn(rows, n_vocab)).softmax(-1)
    cdf = probs.double().cumsum(-1)
    border = cdf.gather(1, torch.randint(n_vocab, (rows, 1)))   # float32 sums would miss the token
    uniform = torch.rand(rows, 1)
    uniform[::2] = border[::2].float().clamp(max=1 - 2.0 ** -24)
    truth = torch.searchsorted(cdf, uniform.double() * cdf[:, -1:], right=True)[:, 0]
    torch.testing.assert_close(draw(probs, uniform), truth)
    probs[:, ::2] = 0                                           # never a token without probability
    probs[:, :n_vocab // 2] = 0
    for edge in (0.0, 1 - 2.0 ** -24):
        tokens = draw(probs, torch.full((rows, 1), edge))
        assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_draw_at_the_border_of_two_blocks_has_probability():
    """Two sums of the same numbers differ by rounding: what is left may be more than the block holds."""
    torch.manual_seed(0)
    block = torch.rand(500, 254) ** 20
    turned = block[:, torch.randperm(254)]
    probs = torch.nn.functional.pad(torch.stack([block, turned], 1), (1, 1)).flatten(1)     # (500, 512)
    tokens = draw(probs, torch.full((500, 1), 0.5))
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_texts_draws_depend_on_the_seed_and_its_number_alone():
    few, many = uniform_table(3, 5, 7), uniform_table(6, 9, 7)
    torch.testing.assert_close(few, many[:3, :5], atol=0, rtol=0)
    assert not torch.equal(few, uniform_table(3, 5, 8)) and len(many.unique()) == 54
    assert 0 <= many.min() and many.max() < 1


# -------------------------------------------------------------------------------------- the closed loop

def test_zero_control_is_none_to_the_bit():
    table = uniform_table(20, 20, 1)
    free = generate(MODEL, PROMPTS, table, record=True)
    still = generate(MODEL, PROMPTS, table, torch.zeros_like, record=True)
    for a, b in zip(vars(free).values(), vars(still).values()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert (free.kl == 0).all()


@pytest.mark.parametrize("how", [{}, {"max_kl": 0.05}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_batch_is_its_texts_drawn_alone(how, monkeypatch):
    monkeypatch.setattr(control.Cache, "WINDOW", 8)
    table = uniform_table(20, 20, 1)                            # beyond the first windows
    whole = generate(MODEL, PROMPTS, table, push, record=True, **how)
    assert 0 < whole.mask.float().mean() < 1                    # some texts end early
    for few, batch in ((6, 1), (20, 7)):
        parts = generate(MODEL, PROMPTS[:few], table[:few], push, record=True, batch=batch, **how)
        for a, b in zip(columns(whole), columns(parts)):
            torch.testing.assert_close(a[:len(b)], b, atol=1e-3, rtol=1e-3)
        assert torch.equal(parts.mask, whole.mask[:few])


def test_progress_counts_the_texts_that_are_done():
    seen = []
    generate(MODEL, PROMPTS, uniform_table(20, 2, 1), batch=7, progress=lambda *at: seen.append(at))
    assert seen == [(7, 20), (14, 20), (20, 20)]


def test_a_run_leaves_nothing_behind_for_the_next():
    """Texts that end before the last step: what an earlier run wrote beyond it is gone."""
    sampler = Sampler(MODEL, 4, 60, 40)
    with torch.no_grad():
        first = sampler.run(PROMPTS[:4], uniform_table(4, 40, 3)).mask.clone()
        sampler.run(PROMPTS[4:8], uniform_table(4, 40, 1))
        torch.testing.assert_close(sampler.run(PROMPTS[:4], uniform_table(4, 40, 3)).mask, first)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_what_is_recorded_is_what_a_plain_pass_computes(how):
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 20, 1), push, record=True, **how)
    W = MODEL.wte.weight
    for i, prompt in enumerate(PROMPTS):
        mask = rollout.mask[i]
        tokens = rollout.tokens[i][mask]
        hidden = MODEL(torch.tensor([prompt + tokens.tolist()]))[0, len(prompt) - 1:-1]
        log_p, log_q = controlled_log_probs(MODEL, hidden, push, **how)
        if not how:                                             # written out
            log_p = MODEL.unembed(hidden).log_softmax(-1)
            log_q = MODEL.unembed(hidden + push(hidden)).log_softmax(-1)
        truth = {"hidden": hidden, "kl": (log_q.exp() * (log_q - log_p)).sum(-1),
                 "grad_log_p": W[tokens] - log_q.exp() @ W,
                 "log_p": log_p.gather(1, tokens[:, None])[:, 0],
                 "log_q": log_q.gather(1, tokens[:, None])[:, 0]}
        for name, column in truth.items():
            torch.testing.assert_close(getattr(rollout, name)[i][mask], column, atol=1e-3, rtol=1e-3,
                                       msg=lambda text: f"{name}: {text}")


def test_a_text_ends_with_the_first_of_its_ends():
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 30, 2))
    for tokens, mask in zip(rollout.tokens.tolist(), rollout.mask):
        ends = [t for t, token in enumerate(tokens) if token in (3, 5)]
        length = ends[0] + 1 if ends else 30
        assert mask.tolist() == [True] * length + [False] * (30 - length)
    assert generate(random_model(eos_ids=()), PROMPTS, uniform_table(20, 30, 2)).mask.all()


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(InputError, match="exceed the model's context of 200"):
        generate(MODEL, [[0] * 190], uniform_table(1, 11, 0))
    generate(MODEL, [[0] * 198], uniform_table(1, 2, 0))        # the whole context is used


class Letters:
    """A tokenizer: token 0 is special, 1 a blank, the others are letters"""
    def decode(self, tokens):
        return "".join(" " if token == 1 else chr(95 + token) for token in tokens if token)


def test_texts_and_their_beginnings_stop_at_the_end():
    rollout = control.Rollout.empty(3, 3, 1, torch.zeros(1), False)
    rollout.tokens = torch.tensor([[4, 5, 6], [4, 0, 9], [0, 9, 9]])
    rollout.mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    prompts = [[0, 2], [0], [0]]
    assert rollout.texts(Letters(), prompts) == ["acde", "c", "a"]
    assert rollout.beginnings(Letters(), prompts, 0) == ["a", "ac", "acd", "acde"]
    assert rollout.beginnings(Letters(), prompts, 1) == ["a", "c", "c"]
    assert rollout.beginnings(Letters(), prompts, 2) == ["a", "a"]
    assert readable(Letters(), [0, 1, 1]) == "a"                # blanks alone hold no word
    assert readable(Letters(), [1, 2]) == " a"


def test_the_step_costs_the_nats_it_is_asked_for():
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 25, 1), record=True)
    for nats, power in ((0.05, 1), (0.5, 1), (0.5, 1.9), (0.5, 4)):     # KL grows as step^(2 power)
        def controller_at(hidden, step_size):
            return ascend(VALUE, hidden, 1, step_size ** power)
        step_size = step_for_kl(MODEL, controller_at, rollout, nats)
        hidden = rollout.hidden[rollout.mask]
        log_p, log_q = controlled_log_probs(MODEL, hidden, lambda h: controller_at(h, step_size))
        spent = kl_divergence(log_q, log_p).sum() / 20
        assert abs(spent - nats) < 0.01 * nats
    with pytest.raises(InputError, match="control cannot cost"):
        step_for_kl(MODEL, lambda h, s: torch.zeros_like(h), rollout, 0.5)


def test_a_step_is_found_on_a_part_of_the_states():
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 25, 1), record=True)
    seen = []

    def controller_at(hidden, step_size):
        seen.append(len(hidden))
        return ascend(VALUE, hidden, 1, step_size)
    step_for_kl(MODEL, controller_at, rollout, 0.5, n_states=50)
    assert set(seen) == {50} and rollout.mask.sum() > 50


def test_the_ascend_that_is_read_is_the_one_that_runs(monkeypatch, tmp_path, capsys):
    """A student's body of ascend that returns zeros makes controlled texts the uncontrolled ones."""
    import sample
    monkeypatch.setattr(sample, "ascend", lambda value, hidden, **_: torch.zeros_like(hidden))
    seen = {}

    def watch(model, prompts, uniforms, controller=None, **how):
        seen[controller is None] = generate(model, prompts, uniforms, controller, **how)
        return seen[controller is None]
    monkeypatch.setattr(sample, "generate", watch)
    info = {"model": str(TOY), "tokenizer": None, "dtype": "float32", "reward": "sentiment",
            "reward_tokenizer": None, "method": "q", "rollouts": 1, "tokens": 20, "seed": 1,
            "step_size": 1.0, "radius": 10.0, "nats": 0.5}
    net(64).save(tmp_path / "v.pt", load(TOY)[0], info)
    sample.main(["--value", str(tmp_path / "v.pt"), "--samples", "30", "--show", "0"])
    torch.testing.assert_close(seen[True].tokens, seen[False].tokens, atol=0, rtol=0)


# -------------------------------------------------------------------------------------- on a GPU

def buffers(sampler):
    return [sampler.hidden, sampler.alive, sampler.uniforms, sampler.t, sampler.cache.lengths,
            sampler.cache.keys, sampler.cache.values, *vars(sampler.out).values()]


def test_nothing_a_step_writes_is_allocated_by_it():
    """A step changes the sampler's own buffers, so that a replay of it changes them again."""
    sampler = Sampler(MODEL, 4, 40, 20, True, push)
    places = [tensor.data_ptr() for tensor in buffers(sampler)]
    with torch.no_grad():
        sampler.prefill(PROMPTS[:4], uniform_table(4, 20, 0))
        for _ in range(3):
            sampler.step()
    assert places == [tensor.data_ptr() for tensor in buffers(sampler)]
    assert sampler.t.item() == 3 and (sampler.out.tokens[:, :3] != 0).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("how", [{}, {"max_kl": 0.05}, {"record": True}, {"top_p": 0.8}])
def test_captured_steps_are_eager_steps(how, monkeypatch):
    model, value, table = random_model().cuda(), net().cuda(), uniform_table(20, 150, 1)
    replayed = generate(model, PROMPTS, table, lambda h: ascend(value, h), **how)
    monkeypatch.setattr(Sampler, "step_or_replay", Sampler.step)
    eager = generate(model, PROMPTS, table, lambda h: ascend(value, h), **how)
    for a, b in zip(columns(replayed), columns(eager)):
        torch.testing.assert_close(a, b)
