"""
Reward models and dialogues: a classifier's scores against the reference implementation and a published
accuracy, read at the last token of each text; prompts of dialogues without the answer in them; turns that end.

    python -m pytest tests/test_reward.py      without transformers or ../shared some tests skip
"""
import gzip
import json
import shutil

import pytest
import torch

import control
import sample
import train_value
from model import GPT, Config, InputError, read_safetensors
from sample import end_turns, read_prompts
from test_loading import refused
from test_model import CONFIG, SHARED, tiny_weights, write_checkpoint
from test_scripts import TOY
from value import RewardModel, load_reward, load_tokenizer, write_safetensors

WORDS = json.loads((TOY / "vocab.json").read_text())


def write_classifier(directory, labels=1, seed=1, **config):
    """A classifier with the tiny model's vocabulary and random weights, in the public layout."""
    config = {"vocab_size": len(WORDS), "eos_token_id": WORDS["<|endoftext|>"], "bos_token_id": None, **config}
    if config["bos_token_id"] is None:
        del config["bos_token_id"]
    generator = torch.Generator().manual_seed(seed)
    weights = {f"transformer.{name}": tensor for name, tensor in tiny_weights().items()}
    wide = CONFIG["n_embd"]
    weights["transformer.wte.weight"] = torch.randn(len(WORDS), wide, generator=generator) / 5
    weights["score.weight"] = torch.randn(labels, wide, generator=generator)
    write_checkpoint(directory, weights, **config)
    (directory / "vocab.json").write_text(json.dumps(WORDS))
    return directory


ROWS = [[5, 9, 2, 11], [7], [3, 3, 8, 1, 0, 2, 9, 9, 4], [12, 6]]


@pytest.mark.parametrize("labels", [1, 2])
def test_scores_equal_the_reference(labels, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = write_classifier(tmp_path / "classifier", labels)
    reference = transformers.GPT2ForSequenceClassification.from_pretrained(directory, num_labels=labels).eval()
    scores = RewardModel(directory).rate(ROWS)
    for row, score in zip(ROWS, scores):                       # it refuses batches without a padding token
        with torch.no_grad():
            logits = reference(torch.tensor([row])).logits[0]
        assert score == pytest.approx((logits[-1] - (logits[0] if labels == 2 else 0)).item(), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(tmp_path):
    model = RewardModel(write_classifier(tmp_path / "classifier"))
    alone = [model.rate([row])[0] for row in ROWS]
    assert model.rate(ROWS) == pytest.approx(alone, abs=1e-5)
    assert model.rate(ROWS, batch=2) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(alone) and model.rate([]) == []


def test_the_last_token_is_found_by_length(tmp_path):
    """A genuine end of text at the end is read; so is the token that padding is made of."""
    model, end = RewardModel(write_classifier(tmp_path / "classifier")), WORDS["<|endoftext|>"]
    for last in (end, 0):
        long = ROWS[0] + [last]
        hidden = model.gpt(torch.tensor([long]))[0, -1]
        assert model.rate([ROWS[2], long])[1] == pytest.approx((model.score @ hidden).item(), abs=1e-5)
        assert model.rate([long]) != pytest.approx(model.rate([ROWS[0]]), abs=1e-3)


def test_special_tokens_in_a_text_are_text(tmp_path):
    model = RewardModel(write_classifier(tmp_path / "classifier"))
    assert model(["a<|endoftext|>"]) == model.rate([[WORDS[c] for c in "a<|endoftext|>"]])


def test_a_long_text_loses_its_beginning_with_a_warning(tmp_path, capsys):
    model = RewardModel(write_classifier(tmp_path / "classifier"))
    context = model.gpt.config.n_positions
    row = [i % 50 for i in range(context + 5)]
    assert model.rate([row, ROWS[0]]) == pytest.approx(model.rate([row[-context:], ROWS[0]]), abs=1e-6)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "1 text" in warning and str(context) in warning


def test_what_is_no_classifier(tmp_path):
    refused(lambda: load_reward(str(TOY)), "--reward", "score.weight")
    refused(lambda: load_reward(str(write_classifier(tmp_path / "three", labels=3))), "--reward", "(3, ")
    refused(lambda: load_reward("org/none"), "--reward", "org/none", "config.json")
    refused(lambda: GPT.from_pretrained(write_classifier(tmp_path / "one")), "score.weight")


def test_classifiers_that_are_damaged(tmp_path):
    directory = write_classifier(tmp_path / "nan")
    weights = dict(read_safetensors(directory / "model.safetensors"))
    weights["score.weight"][0, 0] = float("nan")
    write_safetensors(directory / "model.safetensors", weights, {})
    refused(lambda: RewardModel(directory), "NaN or infinite numbers in score.weight;")
    directory = write_classifier(tmp_path / "words")
    (directory / "vocab.json").write_text(json.dumps({**WORDS, "onemore": len(WORDS)}))
    refused(lambda: RewardModel(directory), f"{len(WORDS) + 1} tokens")


def test_film_review_classifier():
    if not (SHARED / "imdb-reward").is_dir() or not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("../shared is not there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        reward = RewardModel(SHARED / "imdb-reward")
    with open(SHARED / "imdb-reward/test-windows.jsonl", encoding="utf-8") as file:
        windows = [json.loads(line) for line in file]
    scores = reward([window["text"] for window in windows])
    assert scores[:3] == pytest.approx([1.6257, 1.1738, -1.2094], abs=1e-3)
    right = sum((score > 0) == window["label"] for score, window in zip(scores, windows))
    assert right / len(windows) == pytest.approx(0.733, abs=0.0015)


def test_train_and_steer_by_a_classifier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "classifier")
    train_value.main(["--model", str(TOY), "--rollouts", "64", "--held-out", "16", "--tokens", "6", "--epochs",
                      "1", "--device", "cpu", "--reward", "classifier"])
    sample.main(["--model", str(TOY), "--samples", "2", "--tokens", "6", "--device", "cpu"])
    assert "reward classifier" in capsys.readouterr().out
    sample.main(["--model", str(TOY), "--samples", "2", "--tokens", "6", "--device", "cpu", "--reward",
                 "sentiment"])                                 # another judge on the same control


# ---------------------------------------------------------------------------------------- dialogues

def test_prompt_files_that_are_damaged(tmp_path):
    path, line = tmp_path / "d.jsonl.gz", json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b"})
    whole = gzip.compress(b"\xef\xbb\xbf" + (line + "\n").encode() * 20, mtime=0)
    path.write_bytes(whole)
    assert read_prompts(path) == ["\n\nHuman: a\n\nAssistant:"] * 20      # a byte-order mark is no text
    for i in range(10, len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:])
        try:
            read_prompts(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    refused(lambda: read_prompts(tmp_path / "deep.jsonl"), "line 1")


def test_every_real_dialogue_parses_without_its_answer():
    path = SHARED / "hh-rlhf/harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip("../shared is not there")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        chosen = [json.loads(line)["chosen"] for line in file]
    prompts = read_prompts(path)
    assert len(prompts) == len(chosen) == 2312
    for prompt, whole in zip(prompts, chosen):
        assert prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:")
        assert whole.startswith(prompt) and "\n\nAssistant:" not in whole[len(prompt):]


def drawn(encoder, texts):
    """A rollout whose rows spell the texts, the shorter ones padded."""
    rows = [encoder.encode(text) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(tokens.size(1)) < torch.tensor([[len(row)] for row in rows])
    return control.Rollout(tokens, mask, *[torch.zeros(len(rows), tokens.size(1))] * 5,
                          *[torch.zeros(len(rows), 0, 1)] * 2, torch.zeros(mask.shape))


def test_an_answer_ends_where_the_next_turn_begins():
    encoder = load_tokenizer(TOY)
    texts = [" yes.\n\nHuman: and", " no", "\n\nHuman: x",
             " a\n\nHumane: b\n\nHuman:c\n\nHuman:", " é\n\nHuman: y"]
    rollout = drawn(encoder, texts)
    end_turns(encoder, rollout)
    kept = sample.decode(encoder, [[0]] * len(texts), rollout, WORDS["<|endoftext|>"])
    assert kept == [" yes.", " no", "\n", " a\n\nHumane: b", " é"]


def test_prompts_that_do_not_fit_are_left_out_with_a_warning(capsys):
    encoder, model = load_tokenizer(TOY), GPT(Config(len(WORDS), 24, 8, 1, 1, 8))
    texts, prompts = sample.encode_prompts(model, encoder, ["the plot", "x" * 30, "this"], 20)
    assert texts == ["the plot", "this"] and len(prompts) == 2
    assert "1 of 3 prompts" in capsys.readouterr().err
    refused(lambda: sample.encode_prompts(model, encoder, ["x" * 30], 20), "1 of 1 prompts", "--tokens")


def test_without_prompts_texts_are_drawn_from_their_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "toy", ignore=shutil.ignore_patterns("prompts.txt"))
    few = ["--model", "toy", "--tokens", "6", "--device", "cpu"]
    train_value.main([*few, "--rollouts", "64", "--held-out", "16", "--epochs", "1"])
    sample.main([*few, "--samples", "40", "--json", "texts.json"])
    run = json.loads((tmp_path / "texts.json").read_text())["uncontrolled"]
    texts = [entry["text"] for entry in run["texts"]]
    assert {text.split()[0] for text in texts} == {"the", "this"}              # as the language's texts begin


def test_a_prompt_becomes_a_dialogue(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_value.main(["--model", str(TOY), "--rollouts", "64", "--held-out", "16", "--tokens", "6", "--epochs",
                      "1", "--device", "cpu"])
    sample.main(["--model", str(TOY), "--prompt", "the plot", "--dialogue", "--samples", "2", "--tokens", "6",
                 "--device", "cpu", "--json", "texts.json"])
    texts = json.loads((tmp_path / "texts.json").read_text())["controlled"]["texts"]
    assert all(entry["prompt"] == "\n\nHuman: the plot\n\nAssistant:" for entry in texts)
    assert all(entry["text"].startswith(entry["prompt"]) for entry in texts)


@pytest.mark.parametrize("first", [[], [2]])
def test_beginnings_are_scored_as_texts_of_their_own(first, tmp_path):
    """By a reward model in one pass, and by any other reward text by text."""
    encoder, classifier = load_tokenizer(TOY), RewardModel(write_classifier(tmp_path / "classifier"))
    rollout = drawn(encoder, ["the plot was dull", "this cast"])
    prompts = [[0, *first], [0, *first]]
    for reward in (classifier, lambda texts: [float(len(text)) for text in texts]):
        earned = sample.score_beginnings(encoder, reward, prompts, rollout)
        for row, real, scores in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist(), earned):
            for t in range(real):
                text = encoder.decode(first + row[:t])
                assert scores[t].item() == pytest.approx(reward([text])[0], abs=1e-5)
            assert not scores[real:].any()
