"""
The two scripts end to end on the tiny model, in a folder of their own: what they print and write,
what they refuse (one line, exit code 2, no file left), and what an interrupt leaves behind.

    python -m pytest tests/test_scripts.py     without ../shared one test skips
"""
import gzip
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import model as model_module
import sample
import train_value
from conftest import ROOT
from control import Rollout
from model import InputError
from test_model import SHARED, write_checkpoint
from value import sentiment, write_safetensors

TOY = ROOT / "tests" / "toy"
HH = SHARED / "hh-rlhf" / "harmless-base-test.jsonl.gz"
FEW = ["--model", str(TOY), "--rollouts", "64", "--held-out", "32", "--tokens", "8", "--device", "cpu"]
TRAIN = [*FEW, "--epochs", "1"]
SAMPLE = ["--model", str(TOY), "--samples", "2", "--tokens", "8", "--device", "cpu"]
STRONG = ["--step-size", "2000"]       # V of 64 rollouts knows little; this changes the texts anyway


def how(method):
    """Options of a short training by that method."""
    return [*(TRAIN if "epochs" in train_value.METHODS[method] else FEW), "--method", method]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A value net of 64 rollouts."""
    path = tmp_path_factory.mktemp("trained") / "value.safetensors"
    train_value.main([*TRAIN, "--out", str(path)])
    return path.read_bytes()


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A folder to work in, with the value net where sample.py looks for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "value.safetensors").write_bytes(trained)
    return tmp_path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(name="texts.json"):
    with open(name, encoding="utf-8") as file:
        return json.load(file)


def texts(run, label="controlled"):
    return [entry["text"] for entry in run[label]["texts"]]


# ------------------------------------------------------------------------------------- what they do

def test_train_value_writes_a_value_net(trained, here, capsys):
    train_value.main([*TRAIN, "--out", "new/folder/value.safetensors"])
    out = capsys.readouterr().out
    assert (here / "new/folder/value.safetensors").read_bytes() == trained   # the same seed
    for words in ("epoch  1", "held-out states", "correlation", "calibration", "peak memory"):
        assert words in out
    assert sorted(files(here)) == ["new/folder/value.safetensors", "out/value.safetensors"]
    train_value.main([*TRAIN, "--seed", "1"])
    assert (here / "out/value.safetensors").read_bytes() != trained


@pytest.mark.parametrize("method, rounds", [("q", "1"), ("q", "2"), ("draws", "1"), ("plain", "1"),
                                            ("static", "1")])
def test_states_that_do_not_fit_are_read_again(method, rounds, here, capsys):
    """With hardly any memory for them the same net is trained, to rounding."""
    nets, words = [], "read again from the tokens"
    for memory in ("1", "0.0007"):
        train_value.main([*how(method), "--rounds", rounds, "--batch", "32",
                          "--max-memory", memory])
        assert (words in capsys.readouterr().out) == (memory == "0.0007")
        nets.append(dict(model_module.read_safetensors("out/value.safetensors")))
    for name, kept in nets[0].items():
        assert (nets[1][name] - kept).norm() <= 1e-3 * kept.norm() + 1e-6, name


@pytest.mark.parametrize("method", train_value.METHODS)
def test_every_method_trains_and_steers(method, here, capsys):
    train_value.main([*how(method), "--reward", "sentiment"])
    sample.main([*SAMPLE])
    assert f"method {method}, reward sentiment" in capsys.readouterr().out
    train_value.main([*how(method), "--dtype", "bfloat16"])    # states and psi in bfloat16 too
    state = dict(model_module.read_safetensors("out/value.safetensors"))
    raw = torch.equal(state["mean"], torch.zeros(64)) and torch.equal(state["std"], torch.ones(64))
    assert raw == (method == "paper")
    info = json.loads(model_module.read_header("out/value.safetensors")[1]["nanocontrol"])
    settings = train_value.METHODS[method]
    given = {"epochs": 1} if "epochs" in settings else {}
    assert {**settings, **given, "tokens": 8, "rollouts": 64, "seed": 0}.items() <= info.items()


def test_rounds_of_policy_iteration_and_excitation(here, capsys):
    sample.main([*SAMPLE, "--json", "one.json"])
    for more in (["--rounds", "2"], ["--excitation", "0.2"]):
        train_value.main([*TRAIN, *more, "--nats", "0.2"])
        first, *later = re.findall(r"64 rollouts of 8 tokens: .*", capsys.readouterr().out)
        kl = [float(re.search(r"KL ([\d.]+) nats", line)[1]) for line in (later or [first])]
        assert 0.001 < kl[0] < 2                               # the last round was controlled, or excited
        info = json.loads(model_module.read_header("out/value.safetensors")[1]["nanocontrol"])
        assert info["nats"] == 0.2 and info[more[0][2:]] == float(more[1])
        sample.main([*SAMPLE, "--json", "two.json"])
        assert texts(written("two.json")) != texts(written("one.json"))


def test_the_report_is_on_texts_like_those_learned_from(here, monkeypatch):
    """After a second round: drawn under the first round's control, and its KL, at beta, is a cost."""
    reported, controls, improve = [], [], train_value.improve
    monkeypatch.setattr(train_value, "report", lambda value, *rest: reported.append(rest))
    monkeypatch.setattr(train_value, "improve",
                        lambda *how, **more: controls.append(improve(*how, **more)) or controls[-1])
    for more in (["--rounds", "2"], [], ["--excitation", "0.2"]):
        train_value.main([*TRAIN, *more])
    (controlled, _, costs), (plain, _, no_costs), (after_excitation, _, none_either) = reported
    assert no_costs is None and none_either is None and not plain.kl.any() and not after_excitation.kl.any()
    assert controlled.kl[controlled.mask].mean() > 1e-4 and controls[0].step_size != controls[1].step_size
    assert torch.equal(costs, controlled.kl / controls[0].step_size)
    model, encoder, _, prompts = sample.load(sample.parse_args(SAMPLE))
    again, _, _ = sample.roll_out(model, encoder, sentiment, prompts, 32, 8, 1, control=controls[0])
    assert torch.equal(again.tokens, controlled.tokens)


def test_the_report_counts_the_costs_still_to_come(capsys):
    """A V that is the outcome itself has no error, and stands in the bins as it is."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    costs, rewards = 0.1 * torch.arange(12.0).view(4, 3), torch.tensor([1.0, -1.0, 0.5, 0.0])
    outcome = torch.tensor([[0.7, 0.8, 1.0], [-1.4, -1.0, 0.0], [0.5, 0.0, 0.0], [-2.1, -1.1, 0.0]])
    rollout = Rollout(**{**dict.fromkeys(Rollout.__dataclass_fields__), "mask": mask,
                         "hidden": outcome[:, :, None]})
    train_value.report(lambda hidden: hidden[:, :, 0], rollout, rewards, costs)
    out = capsys.readouterr().out
    assert "outcome 0.0000," in out and out.count("V -1.750   outcome -1.750") == 1


def test_several_values_are_one_weighted_sum(here, capsys):
    (here / "rewards.py").write_text("def short(texts):\n    return [-len(text) / 50 for text in texts]\n")
    train_value.main([*TRAIN, "--reward", "rewards.py:short", "--out", "out/short.safetensors"])
    both = ["--value", "out/value.safetensors:0.7", "--value", "out/short.safetensors:0.3"]
    sample.main([*SAMPLE, *STRONG, *both, "--json", "both.json"])
    out = capsys.readouterr().out
    assert "weight 0.7, method q, reward sentiment" in out and "weight 0.3" in out
    for entry in written("both.json")["controlled"]["texts"]:
        expected = 0.7 * sentiment([entry["text"]])[0] - 0.3 * len(entry["text"]) / 50
        assert entry["reward"] == pytest.approx(expected, abs=1e-6)
    sample.main([*SAMPLE, *STRONG, *both, "--reward", "sentiment", "--json", "one.json"])
    assert texts(written("one.json")) == texts(written("both.json"))           # the judge alone has changed
    sample.main([*SAMPLE, *STRONG, "--json", "plain.json"])
    assert texts(written("plain.json")) != texts(written("both.json"))


@pytest.mark.parametrize("parts, share", [([2], 0.5), ([-0.25], 4), ([0.5, 0.5], 1), ([0.5, -0.5], 1)])
def test_the_step_of_a_weighted_sum(here, parts, share, capsys):
    """Twice V needs half the step; a sum costs no more than its parts at theirs, whatever their signs."""
    saved = json.loads(model_module.read_header("out/value.safetensors")[1]["nanocontrol"])["step_size"]
    sample.main([*SAMPLE, *(x for part in parts for x in ("--value", f"out/value.safetensors:{part}"))])
    assert f"control: 1 step of {saved * share:.3g}, " in capsys.readouterr().out


def test_a_target_below_every_value_is_no_control(here, capsys):
    sample.main([*SAMPLE, *STRONG, "--target", "-1000", "--json", "low.json"])
    run = written("low.json")
    assert texts(run) == texts(run, "uncontrolled") and run["controlled"]["figures"]["kl_text"] == 0
    assert "up to V = -1000" in capsys.readouterr().out


def test_guided_decoding(here, capsys):
    guided = [*SAMPLE, "--method", "guided", "--candidates", "5"]
    sample.main([*guided, "--step-size", "0", "--json", "none.json"])
    assert texts(written("none.json"), "guided") == texts(written("none.json"), "uncontrolled")
    sample.main([*guided, "--step-size", "30", "--json", "guided.json"])
    assert written("guided.json")["guided"]["figures"]["kl_text"] > 0.01
    assert "value-guided decoding: 5 candidates" in capsys.readouterr().out


def test_a_prefix_is_seen_by_the_model_and_by_nothing_else(here, capsys):
    how = ["--method", "base", "--prefix", "the cast was lovely . ", "--samples", "200", "--json", "run.json"]
    sample.main([*SAMPLE, *how])
    run = written("run.json")
    assert "prefix: 'the cast was lovely . '" in capsys.readouterr().out
    assert all(text.startswith(("the", "this")) and "the cast was lovely . the" not in text
               for text in texts(run, "base"))
    assert run["base"]["figures"]["reward"] > run["uncontrolled"]["figures"]["reward"] + 0.1   # moods persist
    assert 0.005 < run["base"]["figures"]["kl_text"] < 2    # a mean of log-ratios, not sure to be positive
    sample.main([*SAMPLE, *how, "--temperature", "0.9"])
    assert written("run.json")["base"]["figures"]["kl_text"] is None           # not known there


@pytest.mark.parametrize("method", ["base", "control", "guided"])
@pytest.mark.parametrize("by", ["reward", "value"])
def test_best_of_n_keeps_the_best(method, by, here, capsys):
    how = ["--method", method, "--samples", "40", "--only", "--json", "run.json"]
    how += {"control": ["--step-size", "1"], "guided": ["--candidates", "5"], "base": []}[method]
    label = "controlled" if method == "control" else method
    runs = {}
    for n in (1, 4):
        sample.main([*SAMPLE, *how, *(["--best-of", "4", "--by", by] if n == 4 else [])])
        runs[n] = written("run.json")[label]
    assert "best of 4 by" in capsys.readouterr().out
    assert len(runs[4]["texts"]) == len(runs[1]["texts"]) == 80
    assert runs[4]["figures"]["reward"] > runs[1]["figures"]["reward"] + 0.2
    gap = runs[4]["figures"]["kl_text"] - runs[1]["figures"]["kl_text"]
    assert 0 < gap < math.log(4) - 3 / 4 + 0.6                # of the choice, and of what the choice shifts
    if by == "reward":                                         # draws 40..: candidate j of text i is 80 j + i
        assert all(a["reward"] <= b["reward"] for a, b in zip(runs[1]["texts"], runs[4]["texts"]))


def test_the_base_model_needs_no_value_net(here):
    (here / "out" / "value.safetensors").unlink()
    base = [*SAMPLE, "--method", "base", "--reward", "sentiment", "--json", "run.json"]
    sample.main([*base, "--best-of", "2"])
    assert set(written("run.json")) == {"settings", "uncontrolled", "base"}
    sample.main(base)
    assert set(written("run.json")) == {"settings", "uncontrolled"}


COLUMNS = (("reward", 3), ("error", 3), ("positive", 2), ("kl_token", 4), ("kl_text", 3), ("perplexity", 2),
           ("before", 3), ("after", 3), ("diversity", 2), ("distinct_1", 2), ("distinct_2", 2),
           ("distinct_3", 2))


@pytest.mark.parametrize("temperature", ["1", "0"])
def test_json_holds_what_the_table_shows(temperature, here, capsys):
    sample.main([*SAMPLE, *STRONG, "--samples", "5", "--json", "texts.json",
                 "--temperature", temperature])
    out, run = capsys.readouterr().out, written()
    assert run["settings"]["samples"] == 5 and run["settings"]["temperature"] == float(temperature)
    for label in ("uncontrolled", "controlled"):
        figures, entries = run[label]["figures"], run[label]["texts"]
        line, = re.findall(rf"^{label} .*\+-.*$", out, re.M)                 # its row of the table
        cells = re.findall(r"-?\d+\.\d+|n/a|nan", line)
        assert len(cells) == len(COLUMNS)
        for cell, (name, digits) in zip(cells, COLUMNS):
            shown = figures[name]
            assert cell == ("n/a" if shown is None else f"{shown:.{digits}f}"), name
        assert [entry["prompt"] for entry in entries] == ["the", "this"] * 5
        assert all(entry["text"].startswith(entry["prompt"]) for entry in entries)
        assert [entry["reward"] for entry in entries] == pytest.approx(sentiment(texts(run, label)))
        assert figures["reward"] == pytest.approx(sum(e["reward"] for e in entries) / 10)
        if temperature == "1":
            assert figures["kl_text"] == pytest.approx(sum(e["kl"] for e in entries) / 10)
            assert (figures["kl_text"] > 0) == (label == "controlled")
        else:                                                                # KL is not defined
            assert figures["kl_text"] is None and {e["kl"] for e in entries} == {None}


def test_radius_0_gives_equal_texts(here):
    sample.main([*SAMPLE, *STRONG, "--radius", "0", "--json", "texts.json"])
    still = written()
    assert texts(still) == texts(still, "uncontrolled")
    assert still["controlled"]["figures"]["kl_text"] == 0
    sample.main([*SAMPLE, *STRONG, "--only", "--json", "texts.json"])
    assert "uncontrolled" not in written() and texts(written()) != texts(still)


def test_the_sign_turns_v_around(here):
    moved = {}
    for sign in ("1", "-1"):
        sample.main([*SAMPLE, *STRONG, "--sign", sign, "--radius", "0.1", "--json", "texts.json"])
        figures = written()["controlled"]["figures"]
        moved[sign] = figures["after"] - figures["before"]
    assert moved["1"] > 0 > moved["-1"]


def test_one_text_is_streamed(here, capsys):
    sample.main([*SAMPLE, "--prompt", "the plot", "--samples", "1", "--json", "texts.json"])
    out, run = capsys.readouterr().out, written()
    for label in ("uncontrolled", "controlled"):
        assert f"\n{label}: {texts(run, label)[0]}\n" in out


def test_a_reward_of_ones_own(here):
    (here / "mine.py").write_text("def reward(texts): return [len(text) for text in texts]\n")
    train_value.main([*TRAIN, "--reward", "mine.py:reward"])
    sample.main([*SAMPLE, "--json", "texts.json"])    # V says which reward it learned
    assert [e["reward"] for e in written()["controlled"]["texts"]] == [*map(len, texts(written()))]


# ---------------------------------------------------------------------------------- prompts on file

def test_prompts_of_text_files(here):
    (here / "some.txt").write_bytes("the plot\r\n\r\n  \nthis café\n".encode())
    assert sample.read_prompts("some.txt") == ["the plot", "this café"]
    sample.main([*SAMPLE, "--prompts", "some.txt", "--prompt", "the", "--json", "texts.json"])
    assert [e["prompt"] for e in written()["controlled"]["texts"]] == ["the", "the plot",
                                                                          "this café"] * 2


def test_prompts_of_dialogues(here):
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: gold answer"
    lines = [json.dumps({"chosen": dialogue, "rejected": "no"}), "",
             json.dumps({"chosen": "\n\nHuman: d\u2028e\n\nAssistant:"}, ensure_ascii=False)]
    with gzip.open("some.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    (here / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = ["\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
                "\n\nHuman: d\u2028e\n\nAssistant:"]
    for name in ("some.jsonl.gz", "some.jsonl"):
        assert sample.read_prompts(name) == expected


@pytest.mark.skipif(not HH.is_file(), reason="../shared/hh-rlhf is not there")
def test_prompts_of_hh_rlhf():
    prompts = sample.read_prompts(HH)
    assert len(prompts) == 2312
    assert all(p.startswith("\n\nHuman:") and p.endswith("\n\nAssistant:") for p in prompts)
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        chosen = [json.loads(line)["chosen"] for line in file]
    assert all("\n\nAssistant:" not in text.removeprefix(p) for p, text in zip(prompts, chosen))


# --------------------------------------------------------------------------------- what they refuse

BROKEN = """
def nan(texts): return [float("nan")] * len(texts)
def short(texts): return [0.0]
def raises(texts): raise RuntimeError("first line\\nsecond line")
def leaves(texts): raise SystemExit(0)
"""
REFUSED = {      # what is wrong -> arguments of both scripts, a word of the message
    "no model": (["--model", "absent"], "absent"),
    "model is a file": (["--model", "file"], "file"),
    "empty prompt": (["--prompt", ""], "empty prompt"),
    "prompt beyond the context": (["--prompt", "the plot" * 40], "context of 64"),
    "tokens beyond the context": (["--tokens", "63"], "context of 64"),
    "prompts absent": (["--prompts", "absent.txt"], "absent.txt"),
    "prompts a directory": (["--prompts", "folder"], "folder"),
    "prompts binary": (["--prompts", "binary"], "binary"),
    "prompts not gzip": (["--prompts", "binary.gz"], "binary.gz"),
    "prompts empty": (["--prompts", "empty.txt"], "empty.txt"),
    "line not JSON": (["--prompts", "bad.jsonl"], "bad.jsonl, line 2"),
    "line no dialogue": (["--prompts", "foreign.jsonl"], "foreign.jsonl, line 1"),
    "prompt not UTF-8": (["--prompt", "the \udcff plot"], "prompt"),
    "reward absent": (["--reward", "absent.py:f"], "absent.py:f"),
    "reward unknown": (["--reward", "joy"], "joy"),
    "reward without its function": (["--reward", "broken.py:absent"], "broken.py:absent"),
    "reward nan": (["--reward", "broken.py:nan"], "nan"),
    "reward too short": (["--reward", "broken.py:short"], "returned 1 scores"),
    "reward raises": (["--reward", "broken.py:raises"], "RuntimeError"),
    "reward leaves": (["--reward", "broken.py:leaves"], "SystemExit"),
    "no tokens": (["--tokens", "0"], "--tokens"),
    "tokens no number": (["--tokens", "many"], "--tokens"),
    "no batch": (["--batch", "0"], "--batch"),
    "prompts without a name": (["--prompts", ""], "--prompts"),
    "too little memory": (["--max-memory", "0.0001"], "--max-memory"),
    "device unknown": (["--device", "nonsense"], "nonsense"),
    "device absent": (["--device", "cuda"], "no CUDA device"),
    "device that holds no data": (["--device", "meta"], "meta"),
    "seed beyond 64 bits": (["--seed", "9" * 20], "--seed"),
    "option unknown": (["--colour", "red"], "--colour"),
}
REFUSED_BY_SAMPLE = {
    "top-k 0": (["--top-k", "0"], "--top-k"),
    "top-k above the vocabulary": (["--top-k", "288"], "--top-k"),
    "top-p 0": (["--top-p", "0"], "--top-p"),
    "temperature -1": (["--temperature", "-1"], "--temperature"),
    "temperature nan": (["--temperature", "nan"], "--temperature"),
    "temperature below float32": (["--temperature", "1e-40"], "--temperature"),
    "radius nan": (["--radius", "nan"], "--radius"),
    "radius -1": (["--radius", "-1"], "--radius"),
    "step size nan": (["--step-size", "nan"], "--step-size"),
    "step size infinite": (["--step-size", "inf"], "--step-size"),
    "step size beyond float32": (["--step-size", "1e30"], "--step-size"),
    "max KL -1": (["--max-kl", "-1"], "--max-kl"),
    "sign 0": (["--sign", "0"], "--sign"),
    "no samples": (["--samples", "0"], "--samples"),
    "method unknown": (["--method", "best"], "--method"),
    "no candidates": (["--candidates", "0"], "--candidates"),
    "target, guided": (["--method", "guided", "--target", "0.5"], "--target"),
    "steps, guided": (["--method", "guided", "--steps", "3"], "--steps"),
    "budget, no control": (["--method", "base", "--max-kl", "1"], "--max-kl"),
    "weight nan": (["--value", "out/value.safetensors:nan"], "nan"),
    "radius, no control": (["--method", "base", "--radius", "3"], "--radius"),
    "target, no draw": (["--temperature", "0", "--target", "0.5"], "--temperature 0"),
    "best of none": (["--best-of", "0"], "--best-of"),
    "judge unknown": (["--by", "taste"], "--by"),
    "nothing to judge": (["--by", "value"], "--best-of"),
    "candidates, not guided": (["--candidates", "7"], "--method control has no --candidates"),
    "sign, no control": (["--method", "base", "--sign", "-1"], "no --sign"),
    "JSON without a name": (["--json", ""], "--json"),
    "prefix beyond the context": (["--prefix", "the plot" * 40], "context of 64"),
    "prefix beside a long prompt": (["--prefix", "the plot " * 13, "--prompt", "the plot " * 15], "--prefix"),
    "prefix not UTF-8": (["--prefix", "the \udcff plot"], "--prefix"),
    "value absent": (["--value", "absent.safetensors"], "absent.safetensors"),
    "value without a name": (["--value", ""], "--value"),
    "value a directory": (["--value", "folder"], "folder: cannot be read"),
    "value cut off": (["--value", "short.safetensors"], "short.safetensors"),
    "value is the model": (["--value", f"{TOY}/model.safetensors"], "model.safetensors"),
    "JSON below a file": (["--json", "file/texts.json"], "file/texts.json"),
    "JSON a directory": (["--json", "folder"], "folder"),
}
REFUSED_BY_TRAIN_VALUE = {
    "lam 2": (["--lam", "2"], "--lam"),
    "lam -1": (["--lam", "-1"], "--lam"),
    "lam nan": (["--lam", "nan"], "--lam"),
    "rollouts 0": (["--rollouts", "0"], "--rollouts"),
    "no rounds": (["--rounds", "0"], "--rounds"),
    "states beyond memory": (["--rollouts", "1000000", "--max-memory", "0.1", "--excitation", "0.1"],
                             "fewer --rollouts"),
    "nats 0": (["--nats", "0"], "--nats"),
    "excitation nan": (["--excitation", "nan"], "--excitation"),
    "rate nan": (["--rate", "nan"], "--rate"),
    "rate infinite": (["--rate", "inf"], "--rate"),
    "rate at which V diverges": (["--rate", "1e5", "--epochs", "3"], "--rate"),
    "method unknown": (["--method", "best"], "--method"),
    "ridge of a net": (["--ridge", "5"], "--method q has no --ridge"),
    "width of a direction": (["--method", "static", "--width", "7"], "no --width"),
    "out below a file": (["--out", "file/value.safetensors"], "file/value.safetensors"),
    "out without a name": (["--out", ""], "--out"),
    "out a directory": (["--out", "folder"], "folder"),
}


@pytest.fixture
def mess(here, trained, monkeypatch):
    """The folder, with every wrong file the cases above name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (here / "folder").mkdir()
    for name, data in {"file": b"kept", "empty.txt": b" \n\n", "binary": b"\xff\xfe\x00\x80" * 9,
                       "binary.gz": b"\x1f\x8b\x08\x00\xff", "foreign.jsonl": b'{"prompt": "a"}\n',
                       "bad.jsonl": b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}\n{"chosen"\n',
                       "short.safetensors": trained[:-1], "broken.py": BROKEN.encode()}.items():
        (here / name).write_bytes(data)
    return here


def refuses(script, argv, word, folder, capsys):
    before = files(folder)
    with pytest.raises(SystemExit) as ended:
        sample.run(lambda: script.main(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert word in error and "Traceback" not in error
    assert {n: d for n, d in files(folder).items() if "__pycache__" not in n} == before


@pytest.mark.parametrize("case", {**REFUSED, **REFUSED_BY_SAMPLE})
def test_sample_refuses(case, mess, capsys):
    argv, word = {**REFUSED, **REFUSED_BY_SAMPLE}[case]
    refuses(sample, [*SAMPLE, "--json", "texts.json", *argv], word, mess, capsys)


def test_the_batch_is_what_fits_in_memory():
    """Half the memory: half as many texts; and what a batch really takes stays within what it was given."""
    model = model_module.GPT(model_module.Config(50257, 600, 64, 2, 8, 256)).eval().requires_grad_(False)
    fit = [sample.fit_batch(model, 500, 32, gib * 2 ** 30) for gib in (9.0, 1.0, 0.5, 0.25)]
    assert fit[0] == 256 and fit[1] > fit[2] > fit[3] and all(2 * b == a for a, b in zip(fit[1:], fit[2:]))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_batch_stays_within_its_memory():
    """The peak of drawing one, long prompts, states recorded, over what it was fitted to, in its own process."""
    program = ("import sys; sys.path[:0] = sys.argv[1:]; import torch, bench, sample, control\n"
               "from model import GPT, Config\n"
               "model = GPT(Config(50257, 600, 64, 2, 8, 256)).eval().requires_grad_(False).pack()\n"
               "prompts, spare = [[0] * 500], 2 ** 28\n"
               "batch, cpu = sample.fit_batch(model, 500, 32, spare), torch.device('cpu')\n"
               "draw = lambda n: control.generate(model, prompts * n, torch.rand(n, 32), record=True, batch=n,\n"
               "                                  control=control.Controller(sample.ValueNet(64, 8), max_kl=0.1))\n"
               "draw(1); before = bench.memory(cpu, since_now=True); draw(batch)\n"
               "print(batch, (bench.memory(cpu) - before) / spare)")
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(ROOT / "tests")], capture_output=True,
                          text=True)
    batch, share = done.stdout.split()
    assert int(batch) >= 4 and 0.1 < float(share) < 1, (done.stdout, done.stderr)


@pytest.mark.parametrize("case", {**REFUSED, **REFUSED_BY_TRAIN_VALUE})
def test_train_value_refuses(case, mess, capsys):
    argv, word = {**REFUSED, **REFUSED_BY_TRAIN_VALUE}[case]
    refuses(train_value, [*TRAIN, *argv], word, mess, capsys)


def test_sample_refuses_the_value_net_of_another_model(mess, capsys):
    other = write_checkpoint(mess / "other", vocab_size=287, n_positions=64, bos_token_id=286,
                             eos_token_id=286, n_embd=64, weights=other_weights())
    (other / "vocab.json").write_bytes((TOY / "vocab.json").read_bytes())
    (other / "prompts.txt").write_text("the\n")
    refuses(sample, [*SAMPLE, "--model", "other"], "another model", mess, capsys)


def other_weights():
    """The tiny model's, one number of them changed."""
    weights = dict(model_module.read_safetensors(TOY / "model.safetensors"))
    return {name: tensor + 0.1 * (name == "ln_f.bias") for name, tensor in weights.items()}


def test_the_extremes_that_are_allowed(here):
    """No ball, no budget, one token."""
    for argv in (["--radius", "inf"], ["--max-kl", "0"], ["--steps", "3"], ["--tokens", "1"],
                 ["--top-k", "287"], ["--top-k", "1"], ["--temperature", "0.001"], ["--show", "0"]):
        sample.main([*SAMPLE, *STRONG, *argv, "--json", "texts.json"])
        assert all(math.isfinite(e["kl"]) for e in written()["controlled"]["texts"]), argv


@pytest.mark.parametrize("script, argv", [("sample.py", ["--model", "absent"]),
                                          ("train_value.py", ["--lam", "2"])])
def test_the_command_line(script, argv, tmp_path):
    ended = subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=tmp_path, text=True,
                           capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.fullmatch(r"error: .*\n", ended.stderr)
    assert files(tmp_path) == {}


# --------------------------------------------------------------------------------------- interrupts

def interrupt(*_, **__):
    raise KeyboardInterrupt


# "replace" is the last moment: the new file is whole, and not yet under its name.
@pytest.mark.parametrize("where", ["generate", "train", "report", "replace"])
def test_an_interrupt_leaves_the_old_value_net(where, here, monkeypatch, capsys):
    owner = {"replace": model_module.os, "generate": sample}.get(where, train_value)
    monkeypatch.setattr(owner, where, interrupt)
    (here / "out/value.safetensors").write_bytes(b"the old one")
    with pytest.raises(SystemExit) as ended:
        sample.run(lambda: train_value.main([*TRAIN, "--seed", "1"]))
    assert ended.value.code == 130
    assert files(here) == {"out/value.safetensors": b"the old one"}
    assert re.fullmatch("interrupted.*\n", capsys.readouterr().err)


def test_an_interrupt_after_saving_does_not_deny_it(here, monkeypatch, capsys):
    monkeypatch.setattr(sample, "show_pairs", interrupt)
    before = files(here)
    with pytest.raises(SystemExit) as ended:
        sample.run(lambda: train_value.main([*TRAIN, "--seed", "1"]))
    assert ended.value.code == 130 and files(here) != before
    assert "nothing was written" not in capsys.readouterr().err


def test_an_interrupt_leaves_the_old_json(here, monkeypatch):
    (here / "texts.json").write_text("the old one")
    monkeypatch.setattr(sample.os, "replace", interrupt)
    before = files(here)
    with pytest.raises(SystemExit) as ended:
        sample.run(lambda: sample.main([*SAMPLE, "--json", "texts.json"]))
    assert ended.value.code == 130 and files(here) == before


def test_a_terminal_without_all_characters(trained, here):
    argv = [sys.executable, str(ROOT / "sample.py"), *SAMPLE, "--prompt", "the caf\u00e9"]
    ended = subprocess.run(argv, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and b"the caf?" in ended.stdout


def test_a_link_stays_a_link(here):
    (here / "real.json").write_text("the old one")
    os.symlink("real.json", "link.json")
    sample.main([*SAMPLE, "--json", "link.json"])
    assert os.path.islink("link.json") and "controlled" in written("real.json")


def test_a_pipe_is_no_file_to_write(here):
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="pipe: .* no regular file"):
        sample.check_writable("pipe")


def test_dialogues_are_not_wrapped_again(here):
    args = sample.parse_args(["--model", str(TOY), "--tokens", "2", "--device", "cpu", "--dialogue",
                              "--prompt", "warm", "--prompt", "\n\nHuman: the\n\nAssistant:"])
    assert sample.load(args)[2] == ["\n\nHuman: warm\n\nAssistant:", "\n\nHuman: the\n\nAssistant:"]


def test_one_prompt_has_no_static_direction(here):
    with pytest.raises(InputError, match="more prompts"):
        train_value.main([*how("static-h0"), "--prompt", "the"])


def test_a_value_net_of_nan_is_refused(trained, here):
    state = dict(model_module.read_safetensors("out/value.safetensors"))
    state["w2"] = state["w2"] * math.nan
    metadata = model_module.read_header("out/value.safetensors")[1]
    write_safetensors("nan.safetensors", state, metadata)
    with pytest.raises(InputError, match="nan.safetensors"):
        sample.main([*SAMPLE, "--value", "nan.safetensors"])


def test_a_reward_that_does_not_vary_is_refused(here):
    (here / "rewards.py").write_text("def flat(texts):\n    return [1.0] * len(texts)\n")
    before = files(here)
    with pytest.raises(sample.InputError, match="every text has the reward 1"):
        train_value.main([*TRAIN, "--reward", "rewards.py:flat", "--out", "out/flat.safetensors"])
    assert {name: data for name, data in files(here).items() if "__pycache__" not in name} == before
