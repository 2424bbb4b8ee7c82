"""
Control and the closed loop against their definitions: the projection, the KL-optimal policy, the
whole CDF, a plain forward pass, and each text drawn alone.
"""
import math

import pytest
import torch
from tests.conftest import ROOT

import control
from control import (Sampler, ascend, draw, generate, kl_ball, kl_divergence, read_prompts, steer,
                     step_for_kl, uniform_table)
from model import GPT, Config, InputError, load
from value import ValueNet


def random_model(ends=(3, 5), n_vocab=60):
    torch.manual_seed(0)
    model = GPT(Config(n_vocab, 200, 32, 2, 4, 64, bos=0, ends=list(ends)))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


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


def test_one_step_is_the_step_size_times_the_gradient():
    h = torch.randn(4, 32)
    for size in (0.1, -0.1):
        torch.testing.assert_close(ascend(VALUE, h, 1, size, math.inf), size * VALUE.gradient(h))
    two = ascend(VALUE, h, 2, 0.1, math.inf)
    one = ascend(VALUE, h, 1, 0.1, math.inf)
    torch.testing.assert_close(two, one + 0.1 * VALUE.gradient(h + one))


def test_u_stays_in_the_ball_of_standard_deviations():
    h = torch.randn(50, 32)
    u, free = ascend(VALUE, h, 1, 3.0, 0.7), ascend(VALUE, h, 1, 3.0, math.inf)
    length, whole = (u / VALUE.std).norm(dim=-1), (free / VALUE.std).norm(dim=-1)
    torch.testing.assert_close(length, whole.clamp(max=0.7 * math.sqrt(32)), atol=1e-4, rtol=1e-4)
    assert (whole > 0.7 * math.sqrt(32)).any() and (whole < 100).all()
    torch.testing.assert_close(u / u.norm(dim=-1, keepdim=True), free / free.norm(dim=-1, keepdim=True))


def test_one_step_is_the_kl_optimal_policy_for_q():
    """softmax(W (h + g / beta)) = p(y) exp(Q(h, y) / beta) / Z, and no other policy gains more."""
    W, h, beta = MODEL.wte.weight, torch.randn(3, 32), 2.0
    log_p, log_q = steer(MODEL, h, lambda hidden: ascend(VALUE, hidden, 1, 1 / beta, math.inf))
    p = log_p.exp()
    Q = VALUE.q(h[:, None].expand(-1, 60, -1), W - (p @ W)[:, None])            # (3, 60)
    optimal = (log_p + Q / beta).log_softmax(-1)
    torch.testing.assert_close(log_q, optimal, atol=1e-4, rtol=1e-4)

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
        s, log_p = kl_ball(logits, delta, max_kl), logits.log_softmax(-1)
        kl = kl_divergence((log_p + s[:, None] * delta).log_softmax(-1), log_p)
        whole = kl_divergence((log_p + delta).log_softmax(-1), log_p)
        assert (kl <= max_kl * 1.001 + 1e-6).all()
        torch.testing.assert_close(s[whole < 0.98 * max_kl], torch.ones_like(s)[whole < 0.98 * max_kl])
        assert (kl[whole > max_kl] < 0.97 * max_kl).sum() <= 3              # of 64


@pytest.mark.parametrize("n_vocab", [364, 256, 1000, 50257])
def test_draws_are_those_of_the_whole_cdf(n_vocab):
    torch.manual_seed(0)
    probs = (8 * torch.randn(200, n_vocab)).softmax(-1)
    uniform = torch.rand(200, 1)
    cdf = probs.double().cumsum(-1)
    truth = torch.searchsorted(cdf, uniform.double() * cdf[:, -1:], right=True)[:, 0]
    torch.testing.assert_close(draw(probs, uniform), truth)
    probs[:, ::2] = 0                                           # never a token without probability
    for edge in (0.0, 1 - 2.0 ** -24):
        tokens = draw(probs, torch.full((200, 1), edge))
        assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_zero_control_is_none_to_the_bit():
    u = uniform_table(20, 30, 1)
    free = generate(MODEL, PROMPTS, u, record=True)
    still = generate(MODEL, PROMPTS, u, lambda hidden: torch.zeros_like(hidden), record=True)
    for a, b in zip(vars(free).values(), vars(still).values()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert (free.kl == 0).all()


@pytest.mark.parametrize("how", [{}, {"max_kl": 0.05}, {"temperature": 0.7}])
def test_a_batch_is_its_texts_drawn_alone(how):
    u = uniform_table(20, 90, 1)                                # beyond the first window
    whole = generate(MODEL, PROMPTS, u, push, record=True, **how)
    assert 0 < whole.mask.float().mean() < 1                    # some texts end early
    for batch in (1, 7):
        parts = generate(MODEL, PROMPTS, u, push, record=True, batch=batch, **how)
        for a, b in zip(columns(whole), columns(parts)):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_run_leaves_nothing_behind_for_the_next():
    """Texts that end before the last step: what an earlier run wrote beyond it is gone."""
    sampler = Sampler(MODEL, 4, 100, 60, False, lambda hidden: steer(MODEL, hidden, None))
    with torch.no_grad():
        first = sampler.run(PROMPTS[:4], uniform_table(4, 60, 3)).mask.clone()
        sampler.run(PROMPTS[4:8], uniform_table(4, 60, 1))
        torch.testing.assert_close(sampler.run(PROMPTS[:4], uniform_table(4, 60, 3)).mask, first)


def test_a_texts_draws_depend_on_the_seed_and_its_number_alone():
    few, many = uniform_table(3, 5, 7), uniform_table(6, 9, 7)
    torch.testing.assert_close(few, many[:3, :5], atol=0, rtol=0)
    assert not torch.equal(few, uniform_table(3, 5, 8)) and len(many.unique()) == 54
    assert 0 <= many.min() and many.max() < 1


def test_what_is_recorded_is_what_a_plain_pass_computes():
    rollout, W = generate(MODEL, PROMPTS, uniform_table(20, 30, 1), push, record=True), MODEL.wte.weight
    for i, prompt in enumerate(PROMPTS):
        mask = rollout.mask[i]
        tokens = rollout.tokens[i][mask]
        hidden = MODEL(torch.tensor([prompt + tokens.tolist()]))[0, len(prompt) - 1:-1]
        log_p = MODEL.unembed(hidden).log_softmax(-1)
        log_q = MODEL.unembed(hidden + push(hidden)).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        for name, truth in (("hidden", hidden), ("kl", kl), ("score", W[tokens] - log_q.exp() @ W),
                            ("logp", log_p.gather(1, tokens[:, None])[:, 0]),
                            ("logq", log_q.gather(1, tokens[:, None])[:, 0])):
            torch.testing.assert_close(getattr(rollout, name)[i][mask], truth, atol=1e-3, rtol=1e-3,
                                       msg=lambda text: f"{name}: {text}")


def test_a_text_ends_with_the_first_of_its_ends():
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 60, 2))
    for tokens, mask in zip(rollout.tokens, rollout.mask):
        ends = [t for t, token in enumerate(tokens.tolist()) if token in (3, 5)]
        assert int(mask.sum()) == (ends[0] + 1 if ends else 60)
    assert generate(random_model(ends=()), PROMPTS, uniform_table(20, 60, 2)).mask.all()


def test_temperature_divides_the_logits():
    u, cold = uniform_table(20, 20, 3), random_model(ends=())
    hot = random_model(ends=())
    cold_texts = generate(cold, PROMPTS, u, temperature=0.5).tokens
    hot.unembed = lambda hidden: 2 * GPT.unembed(hot, hidden)
    torch.testing.assert_close(cold_texts, generate(hot, PROMPTS, u).tokens)


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(InputError, match="exceed the model's context of 200"):
        generate(MODEL, [[0] * 190], uniform_table(1, 11, 0))


def test_the_step_costs_the_nats_it_is_asked_for():
    rollout = generate(MODEL, PROMPTS, uniform_table(20, 25, 1), record=True)
    for nats, power in ((0.05, 1), (0.5, 1), (0.5, 1.9), (0.5, 4)):     # KL grows as step^(2 power)
        def control(hidden, step):
            return ascend(VALUE, hidden, 1, step ** power)
        step = step_for_kl(MODEL, control, rollout, nats)
        log_p, log_q = steer(MODEL, rollout.hidden[rollout.mask], lambda h: control(h, step))
        spent = kl_divergence(log_q, log_p).sum() / 20
        assert abs(spent - nats) < 0.01 * nats
    with pytest.raises(InputError, match="V is flat"):
        step_for_kl(MODEL, lambda h, s: torch.zeros_like(h), rollout, 0.5)


def test_the_ascend_that_is_read_is_the_one_that_runs(monkeypatch, tmp_path):
    """A student's body of ascend that returns zeros makes controlled texts the uncontrolled ones."""
    import sample
    monkeypatch.setattr(sample, "ascend", lambda value, hidden, *_: torch.zeros_like(hidden))
    seen = {}
    original = control.generate

    def watch(model, prompts, uniforms, controller=None, *args, **kwargs):
        seen[controller is None] = original(model, prompts, uniforms, controller, *args, **kwargs)
        return seen[controller is None]
    monkeypatch.setattr(sample, "generate", watch)
    model, value = load(ROOT / "tests" / "toy")[0], net(64)
    path = tmp_path / "v.pt"
    value.save(path, model, dict(model=str(ROOT / "tests" / "toy"), tokenizer=None, dtype="float32",
                                 reward="sentiment", method="q", step_rewards=True, step_size=1.0,
                                 radius=10.0))
    sample.main(["--value", str(path), "--samples", "30", "--show", "1"])
    torch.testing.assert_close(seen[True].tokens, seen[False].tokens, atol=0, rtol=0)


def buffers(sampler):
    return [sampler.hidden, sampler.alive, sampler.t, sampler.cache.lengths, sampler.cache.keys,
            sampler.cache.values, *vars(sampler.out).values()]


def test_nothing_a_step_writes_is_allocated_by_it():
    """A step changes the sampler's own buffers, so that a replay of it changes them again."""
    sampler = Sampler(MODEL, 4, 40, 20, True, lambda hidden: steer(MODEL, hidden, push))
    with torch.no_grad():
        sampler.begin(PROMPTS[:4], uniform_table(4, 20, 0))
        places = [tensor.data_ptr() for tensor in buffers(sampler)]
        for _ in range(3):
            sampler.step()
    assert places == [tensor.data_ptr() for tensor in buffers(sampler)]
    assert sampler.t.item() == 3 and (sampler.out.tokens[:, :3] != 0).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("how", [{}, {"max_kl": 0.05}, {"record": True}])
def test_captured_steps_are_eager_steps(how, monkeypatch):
    model, value, u = random_model().cuda(), net().cuda(), uniform_table(20, 150, 1)
    replayed = generate(model, PROMPTS, u, lambda h: ascend(value, h), **how)
    monkeypatch.setattr(Sampler, "advance", Sampler.step)
    eager = generate(model, PROMPTS, u, lambda h: ascend(value, h), **how)
    for a, b in zip(columns(replayed), columns(eager)):
        torch.testing.assert_close(a, b)


def test_prompts_are_read_with_bos_and_bad_files_are_named(tmp_path):
    model, tokenizer = load(ROOT / "tests" / "toy")
    toy = ROOT / "tests" / "toy"
    the, this, cast, end = map(tokenizer.encoding.encode_single_token,
                               ["the", "this", " cast", "<|endoftext|>"])
    assert read_prompts(model, tokenizer, toy) == [[end, the], [end, this]]
    assert read_prompts(model, tokenizer, "x") == [[end]]
    (tmp_path / "p.txt").write_bytes("\ufeffthe\r\n\r\nthis cast\n".encode())
    assert read_prompts(model, tokenizer, toy, ["this"], tmp_path / "p.txt") == [
        [end, this], [end, the], [end, this, cast]]
    for name, content, message in (("e.txt", b"\n\n", "is empty"), ("p.csv", b"a,b", "no plain text"),
                                   ("p.jsonl", b"{}", "no plain text"), ("b.txt", b"\xff\xfe", "cannot")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_prompts(model, tokenizer, toy, path=tmp_path / name)
