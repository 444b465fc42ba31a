"""Sentences, transitions by entropy, step boundaries."""

import json
import math
import random
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from text_cases import CHARACTERS, chains, character_tokenizer, save_language_model, tiny_model

from statecore import segmentation
from statecore.dynamics.texts import read_texts
from statecore.labels import label_agreement
from statecore.segmentation import (
    Corpus,
    EntropyOptions,
    OpeningEntropy,
    StepOptions,
    TransitionOptions,
    Transitions,
)
from statecore.traces import StepRules, Trace, tokenise
from statecore.windows import encode, token_windows

# ----------------------------------------------------------------------------------------------------------------------
# Sentences


def sentences(text: str) -> list[str]:
    starts = segmentation.sentence_starts(text)
    return [text[a:b].strip() for a, b in pairwise([*starts, len(text)])]


@pytest.mark.parametrize(
    "expected",
    [
        ["So x is 3.14.", "Then it is 2."],
        ["Wait, what?", "no, really!", "Yes."],
        ["I think... maybe not.", "Hmm...", "Okay."],
        ["We have $a. B$ here.", "Next."],
        ["It is $$a. B! C$$ so.", "Next."],
        [r"Put \(x. Y\) in.", r"Get \[ a. B \] out.", "Done."],
        [r"See \begin{align}a. B\\C. D\end{align} now.", "Done."],
        ["It costs $5.", "He has $10 left."],
        ["It costs $5 and 7.", "Then $8 more."],
        ["Use e.g. Newton, i.e. Isaac, vs. Leibniz etc. Now on.", "Done."],
        ["See No. 5 and Eq. 7 for that.", "Done."],
        ["Wait, no.", "Let me see."],
        ["Call `a. B` twice.", "Done."],
        ["Is it (really so?)", 'He said "no."', "Then **yes.**", "Well."],
        ["好的。", "等一下！", "对。"],
        ["An unclosed \\[ formula here.", "Goes on."],
        ["An unclosed $ sign here.", "Goes on."],
    ],
)
def test_sentences_end_where_people_end_them(expected):
    assert sentences("  " + (" " if expected[0].isascii() else "").join(expected) + " \n") == expected


def test_lines_and_list_numbers():
    text = "List:\n1. First item.\n2. Second. Part two\n\n- a dot 3.5\n```py\nx = 1. \nY = 2\n```\nWait"
    assert sentences(text) == [
        "List:", "1. First item.", "2. Second.", "Part two", "- a dot 3.5", "```py\nx = 1. \nY = 2\n```", "Wait",
    ]  # fmt: skip


def test_blank_text_has_no_sentence():
    assert segmentation.sentence_starts("") == segmentation.sentence_starts(" \n\t ") == []


def test_starts_are_visible_and_in_order():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(CHARACTERS + ".. \n\n$$") for _ in range(rng.randint(1, 200)))
        starts = segmentation.sentence_starts(text)
        assert all(a < b for a, b in pairwise(starts))
        assert not any(text[start].isspace() for start in starts)
        assert starts[:1] == ([len(text) - len(text.lstrip())] if text.strip() else [])


def test_long_runs_take_no_time():
    for text in (" " * 200_000 + "A", "\\[" * 20_000, "$" * 50_000, "```" * 20_001):
        segmentation.sentence_starts(text)


def test_first_word():
    words = {
        "Wait, no": "wait",
        "**Hmm** so": "hmm",
        "\"Let's go": "let's",
        "- But": "but",
        "3 apples": None,
        "$x$ is": None,
        "": None,
    }
    assert {text: segmentation.first_word(text, 0) for text in words} == words
    assert segmentation.first_word("So. But", 4) == "but"


# ----------------------------------------------------------------------------------------------------------------------
# Entropy


@pytest.mark.parametrize(("length", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (23, 6), (24, 7), (100, 2)])
def test_windows_read_every_token_once_with_half_a_window_of_context(length, size):
    read = []
    for begin, end, first in token_windows(length, size):
        assert 0 <= begin <= first < end <= length
        assert end - begin <= size
        assert first - begin == (size // 2 if begin else 0)
        read += range(first, end)
    assert read == list(range(length))


@pytest.mark.parametrize("unit", ["word", "token"])
@pytest.mark.parametrize(("window", "batch_size"), [(None, 1), (None, 3), (64, 1), (64, 4)])
def test_entropies_are_the_models(unit, window, batch_size):
    tokenizer = character_tokenizer()
    model = tiny_model(len(tokenizer))
    texts = [f"{row['problem']}\n{row['thinking']}" for row in chains(5)]
    starts = [segmentation.sentence_starts(text) for text in texts]
    wanted = defaultdict(list)
    for text, text_starts in zip(texts, starts, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        for begin, end, first in token_windows(len(ids), window or 512):
            p = model(ids[None, begin:end]).logits[0].double().softmax(-1)
            entropy = -(p * p.log2()).sum(-1)
            for start in text_starts:
                if first <= start - 1 < end:
                    opening = segmentation.first_word(text, start) if unit == "word" else text[start]
                    wanted[opening].append(entropy[start - 1 - begin].item())
    got = segmentation.opening_entropies(
        model, tokenizer, texts, starts, unit=unit, window=window, batch_size=batch_size, progress=False
    )
    assert {row.opening: row.count for row in got} == {opening: len(values) for opening, values in wanted.items()}
    for row in got:
        assert math.isclose(row.entropy_bits, sum(wanted[row.opening]) / row.count, rel_tol=1e-4)
    assert [row.entropy_bits for row in got] == sorted((row.entropy_bits for row in got), reverse=True)
    assert sum(row.count for row in got) == sum(len(s) - 1 for s in starts)  # nothing predicts a text's first token


def test_uniform_model_has_log2_of_the_vocabulary_in_bits():
    tokenizer = character_tokenizer()
    model = tiny_model(len(tokenizer), tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    (row,) = segmentation.opening_entropies(model, tokenizer, ["A. But"], [[3]], progress=False)
    assert (row.opening, row.count) == ("but", 1)
    assert math.isclose(row.entropy_bits, math.log2(len(tokenizer)), rel_tol=1e-6)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="no character offsets"):
        encode(Slow(), ["a"])


# ----------------------------------------------------------------------------------------------------------------------
# Choice of transitions

TABLE = [
    OpeningEntropy("so", 50, 0.9),
    OpeningEntropy("wait", 30, 2.0),
    OpeningEntropy("zounds", 2, 3.0),
    OpeningEntropy("but", 40, 1.5),
]


def test_selection_by_rank_and_by_threshold():
    def words(**how):
        return [row.opening for row in segmentation.select_transitions(TABLE, min_count=20, **how)]

    assert words(top=2) == words(threshold_bits=1.5) == ["wait", "but"]
    assert words(top=10) == ["wait", "but", "so"]
    assert [row.opening for row in segmentation.select_transitions(TABLE, top=1, min_count=1)] == ["zounds"]


def test_selection_refuses_what_leaves_nothing():
    with pytest.raises(ValueError, match=r"highest mean is 2\.000 bits"):
        segmentation.select_transitions(TABLE, threshold_bits=2.5)
    with pytest.raises(ValueError, match="none is that frequent"):
        segmentation.select_transitions(TABLE, top=3, min_count=51)
    with pytest.raises(ValueError, match="either top or threshold_bits"):
        segmentation.select_transitions(TABLE, top=3, threshold_bits=1.0)


def test_transitions_from_files(tmp_path):
    file = tmp_path / "words"
    for text in ("# openers\nWait\n\n Hmm \n", '["Wait", "Hmm"]', '[{"opening": "Wait"}, {"opening": "Hmm"}]'):
        file.write_text(text)
        assert segmentation.load_transitions(file) == ["Wait", "Hmm"]
    file.write_text(json.dumps({"transitions": [{"opening": "Wait", "steps": 3}], "patterns": []}))
    assert segmentation.load_transitions(file) == ["Wait"]
    for text in ('{"patterns": []}', '{"a": 1}\n{"a": 2}\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON list"):
            segmentation.load_transitions(file)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no transition"):
        segmentation.load_transitions(file)


class Language:
    """Measures the entropies of TABLE at whatever it reads."""

    def opening_entropies(self, traces, unit):
        self.read = (traces, unit)
        return TABLE


def test_strategies_by_precedence(tmp_path):
    (tmp_path / "words").write_text("Wait\nHmm\n")
    of_file = EntropyOptions(tmp_path / "words")
    by_entropy = EntropyOptions(None, "token", entropy_rows=3, top_transitions=2)
    corpus, without_model = Corpus(range(10), Language()), Corpus(range(10))
    choose = segmentation.choose_transitions
    assert choose() == Transitions(segmentation.DEFAULT_TRANSITIONS, "word")
    assert choose(by_entropy, without_model) == Transitions(segmentation.DEFAULT_TRANSITIONS, "token")
    assert choose(TransitionOptions(), corpus) == Transitions(segmentation.DEFAULT_TRANSITIONS, "word")
    assert choose(of_file, corpus) == choose(TransitionOptions(tmp_path / "words")) == Transitions(["Wait", "Hmm"])
    assert choose(by_entropy, corpus) == Transitions(["wait", "but"], "token", TABLE)
    traces, unit = corpus.language.read
    assert (len(traces), traces, unit) == (3, sorted(traces), "token")
    by_threshold = EntropyOptions(entropy_threshold_bits=1.0, min_opening_count=31)
    assert choose(by_threshold, corpus).openings == ["but"]


def test_a_strategy_is_a_function_and_a_table_entry(monkeypatch):
    def shouted(options, corpus):
        return Transitions(["WAIT"], options.opening_unit) if options.opening_unit == "token" else None

    monkeypatch.setattr(segmentation, "STRATEGIES", (shouted, *segmentation.STRATEGIES))
    assert segmentation.choose_transitions(TransitionOptions(opening_unit="token")).openings == ["WAIT"]
    assert segmentation.choose_transitions().openings == segmentation.DEFAULT_TRANSITIONS


class Shouted(Transitions):
    """Steps start at sentences in capitals."""

    def sentence_openings(self, text, starts, offsets):
        ends = [*starts[1:], len(text)]
        return ["shout" if text[a:b].isupper() else None for a, b in zip(starts, ends, strict=True)]


def test_a_strategy_may_go_by_something_other_than_words(tmp_path, monkeypatch):
    def shouted(options, corpus):
        return Shouted(["shout"])

    monkeypatch.setattr(segmentation, "STRATEGIES", (shouted, *segmentation.STRATEGIES))
    thinking, steps = "So. OH NO! Wait. WHAT?", StepOptions(1, 100)
    trace = Trace("a", [], thinking, "7", "rows", 1, head="Q:")
    (row,) = tokenise([trace], character_tokenizer(), "\n", StepRules(segmentation.choose_transitions(), steps))
    assert row.step_chars == [0, 4, 17]
    assert row.openings == [None, "shout", "shout"]
    folder = save_language_model(tmp_path)
    (tmp_path / "a.txt").write_text(thinking)
    model = tiny_model(len(character_tokenizer()))
    (text,) = read_texts(str(tmp_path / "a.txt"), model, str(folder / "tokenizer"), steps=steps)
    assert text.step_ends == [4, 17, len(thinking)]


def test_words_are_compared_without_case_and_tokens_with_it():
    word, token = (Transitions(["Wait"], unit) for unit in ("word", "token"))
    assert "wait" in word
    assert "waiting" not in word
    assert None not in word
    assert "Wait" in token
    assert "wait" not in token


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def test_steps_start_at_the_tokens_of_their_sentences():
    text = "One two. Wait, three. So four. But five."
    spans = [(0, 4), (4, 8), (8, 13), (13, 21), (21, 30), (30, 34), (34, 40)]
    sentences = segmentation.sentence_starts(text)
    openings = segmentation.sentence_openings(text, sentences, "word")

    def starts(end: int, transitions: Transitions = Transitions()) -> list[tuple]:
        found = segmentation.find_steps(sentences, openings, spans, end, transitions, StepOptions(1, 100))
        return [(step.token, step.char, step.opening) for step in found]

    assert starts(7) == [(0, 0, "one"), (2, 9, "wait"), (5, 31, "but")]
    assert starts(5) == [(0, 0, "one"), (2, 9, "wait")]
    assert starts(0) == []
    assert starts(7, Transitions(["so"])) == [(0, 0, "one"), (4, 22, "so")]
    spans[:3] = [(0, 13)] * 3  # two sentences start in one token: the transition counts
    assert starts(7)[0][2] == "wait"


def test_short_pieces_join_the_step_before():
    # Pieces of 10, 3, 10, 2 and 10 tokens.
    got = segmentation.split_steps([5, 15, 18, 28, 30], [True] * 5, 40, shortest=5, longest=100)
    assert got == [5, 18, 30]


def test_short_first_piece_takes_in_what_follows():
    assert segmentation.split_steps([0, 2, 12], [True] * 3, 22, shortest=5, longest=100) == [0, 12]


def test_only_transitions_split():
    assert segmentation.split_steps([0, 10, 20, 30], [True, False, True, False], 40, shortest=1, longest=100) == [0, 20]


def test_long_steps_are_halved_at_sentences():
    sentences = [0, 11, 24, 37, 48, 62, 75, 88]
    got = segmentation.split_steps(sentences, [False] * 8, 100, shortest=5, longest=30)
    assert got == [0, 24, 48, 75]
    assert segmentation.split_steps([0, 3], [False, False], 100, shortest=5, longest=30) == [0]


def test_bounds_of_steps_hold_on_random_chains():
    rng = random.Random(1)
    for _ in range(500):
        shortest = rng.randint(1, 12)
        longest = rng.randint(2 * shortest, 60)
        sentences = [0]
        for _ in range(rng.randint(0, 30)):
            sentences.append(sentences[-1] + rng.randint(1, 25))
        end = sentences[-1] + rng.randint(1, 25)
        opens = [rng.random() < 0.4 for _ in sentences]
        steps = segmentation.split_steps(sentences, opens, end, shortest=shortest, longest=longest)
        assert steps[0] == 0
        assert set(steps) <= set(sentences)
        for begin, stop in pairwise([*steps, end]):
            assert stop - begin >= shortest or len(steps) == 1
            if stop - begin > longest:
                assert not any(begin + shortest <= s <= stop - shortest for s in sentences)
        kept = [s for s, opener in zip(sentences, opens, strict=True) if opener and s in steps[1:]]
        inner = [s for s in steps[1:] if s not in kept]
        for s in inner:  # a boundary without a transition comes only from halving a step that was too long
            before = max([k for k in [0, *kept] if k < s])
            after = min([k for k in [*kept, end] if k > s])
            assert after - before > longest


# ----------------------------------------------------------------------------------------------------------------------
# Labels


def test_agreement_with_labels():
    labels = {
        "a": [
            [0, 5, "Start", 1.0],
            [6, 9, "Deduction", 1.0],
            [10, 14, "Deduction", 2.0],
            [15, 20, "Backtracking", 4.0],
        ],
        "b": [[0, 5, "Start"], [6, 9, "Deduction"]],
        "not prepared": [[0, 5, "Start"]],
    }
    got = label_agreement({"a": [7, 10, 15], "b": [6], "not labelled": [3]}, labels)
    assert (got["traces"], got["boundaries"], got["labelled_sentences"]) == (2, 4, 4)
    assert got["boundaries_on_a_sentence_start"] == 0.75
    assert got["category_change_precision"] == 0.5  # of four boundaries, those at a's 15 and b's 6
    assert got["category_change_recall"] == round(2 / 3, 4)  # a's 6 is missed
    assert got["categories"]["Backtracking"] == {
        "sentences": 1, "share_of_sentences": 0.25, "share_of_boundaries": round(1 / 3, 4), "start_a_step": 1.0,
    }  # fmt: skip
    assert got["categories"]["Deduction"]["start_a_step"] == round(2 / 3, 4)
    assert got["entropy"] == {
        "at_boundaries": {"sentences": 2, "mean": 3.0},
        "elsewhere": {"sentences": 1, "mean": 1.0},
    }
