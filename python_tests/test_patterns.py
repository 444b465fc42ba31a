"""Step embeddings, clusters, pattern tokens."""

import numpy as np
import pytest
import torch
from text_cases import byte_pair_tokenizer, chains, character_tokenizer, tiny_model

from statecore import patterns, segmentation
from statecore.windows import token_windows


def unit_rows(rows: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5))


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


def steps_about(topics: list[str]) -> tuple[list[str], list[str], list[int]]:
    """Texts, topics and kinds of two kinds of steps for each topic."""
    check, other = "wait let me check the {} again", "alternatively maybe the {} is something else"
    texts = [form.format(topic) for topic in topics for form in (check, other)]
    return texts, [topic for topic in topics for _ in range(2)], [kind for _ in topics for kind in range(2)]


def test_tfidf_groups_by_what_a_step_does_and_not_by_its_topic():
    texts, topics, kinds = steps_about([f"{chr(97 + i)}{chr(98 + i)}topic" for i in range(10)])
    rows = patterns.tfidf_embedding(texts, topics)
    assert rows.dtype == np.float32
    assert unit_rows(rows)
    same_kind = np.equal.outer(kinds, kinds)
    cosines = rows @ rows.T
    assert cosines[same_kind].min() > 0.999
    assert cosines[~same_kind].max() < 0.5
    assert np.array_equal(rows, patterns.tfidf_embedding(texts, topics))


def test_tfidf_chunks_are_one_map(monkeypatch):
    texts, topics, _ = steps_about(["apple", "pear", "plum", "fig"])
    whole = patterns.tfidf_embedding(texts, topics)
    monkeypatch.setattr(patterns, "_CHUNK", 3)
    np.testing.assert_allclose(patterns.tfidf_embedding(texts, topics), whole, atol=1e-6)


def test_tfidf_step_without_known_words_and_set_without_any():
    rows = patterns.tfidf_embedding(["wait so", "wait so", "3 + 4 = 7"], [0, 1, 2])
    assert unit_rows(rows[:2])
    assert not rows[2].any()
    with pytest.raises(ValueError, match="share no words"):
        patterns.tfidf_embedding(["1 + 1", "2 + 2"], [0, 1])


@pytest.mark.parametrize("layer", [None, 0, -1])
@pytest.mark.parametrize("window", [None, 64])
def test_hidden_state_embedding_is_the_mean_state(layer, window):
    tokenizer = character_tokenizer()
    model = tiny_model(len(tokenizer))
    texts = [row["thinking"] for row in chains(4)]
    spans = []
    for text in texts:
        starts = segmentation.sentence_starts(text)
        # Neither the first sentence nor the last character belongs to a step.
        spans.append(list(zip(starts[1:], [*starts[2:], len(text) - 1], strict=True)))
    got = patterns.hidden_state_embedding(
        model, tokenizer, texts, spans, layer=layer, window=window, batch_size=3, progress=False
    )
    means = []
    for text, steps in zip(texts, spans, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        states = torch.zeros(len(ids), model.config.hidden_size)
        for begin, end, first in token_windows(len(ids), window or 512):
            out = model(ids[None, begin:end], output_hidden_states=True).hidden_states
            states[first:end] = out[1 if layer is None else layer][0, first - begin :].detach()
        means += [states[begin:end].mean(0).numpy() for begin, end in steps]
    means = np.stack(means)
    means -= means.mean(0)
    np.testing.assert_allclose(got, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-4)


def test_hidden_state_embedding_refuses_a_layer_that_is_not_there():
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="layer 3 does not exist: expected -3 to 2"):
        patterns.hidden_state_embedding(tiny_model(len(tokenizer)), tokenizer, ["a"], [[(0, 1)]], layer=3)


# ----------------------------------------------------------------------------------------------------------------------
# Clusters


def blobs(sizes: tuple[int, ...] = (60, 30, 90), width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around one axis for each size, and the axis that each belongs to."""
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = np.eye(width)[owner] + 0.1 * rng.normal(size=(len(owner), width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), owner


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_found_and_numbered_by_size(seed):
    points, owner = blobs()
    labels, centres = patterns.cluster_steps(points, 3, seed=seed)
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [90, 60, 30]
    assert all(len({*owner[labels == i]}) == 1 for i in range(3))
    for i in range(3):
        assert np.argmax(centres[i]) == owner[labels == i][0]
    assert np.array_equal(labels, patterns.cluster_steps(points, 3, seed=seed)[0])


def test_more_patterns_than_steps_are_refused():
    with pytest.raises(ValueError, match="5 thinking patterns cannot be made of 4 steps"):
        patterns.cluster_steps(np.eye(4, dtype=np.float32), 5)


def test_elbow_shows_the_true_number():
    points, _ = blobs((60, 30, 90, 50))
    table = patterns.elbow(points, [2, 3, 4, 8, 1000])
    assert [row["patterns"] for row in table] == [2, 3, 4, 8]
    inertia = [row["inertia"] for row in table]
    assert inertia == sorted(inertia, reverse=True)
    assert max(table, key=lambda row: row["silhouette"])["patterns"] == 4


def test_typical_steps_are_the_nearest_and_differ():
    points = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6], [0, 1], [1, 0]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 0])
    texts = ["Wait, a.", "b", "c", "d", "Wait,  a."]
    centres = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert patterns.typical_steps(points, labels, centres, texts, most=2) == [[0, 2], [3], []]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and figures


def test_pattern_tokens_are_single_tokens_behind_the_old_ones():
    tokenizer = byte_pair_tokenizer()
    before = len(tokenizer)
    text = "Wait, let me check."
    plain = tokenizer(text)["input_ids"]
    starts, ends = patterns.add_pattern_tokens(tokenizer, 12)
    assert sorted(starts + ends) == list(range(before, before + 24)) == list(range(before, len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens([starts[0], ends[0], starts[11], ends[11]]) == [
        "<|step_0|>", "<|/step_0|>", "<|step_11|>", "<|/step_11|>",
    ]  # fmt: skip
    assert tokenizer(f"<|step_11|>{text}<|/step_11|>")["input_ids"] == [starts[11], *plain, ends[11]]
    assert tokenizer.decode([starts[0], *plain, ends[0]], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="already has pattern tokens"):
        patterns.add_pattern_tokens(tokenizer, 1)


def test_figures_are_drawn(tmp_path):
    table = [{"patterns": 2, "inertia": 0.5, "silhouette": 0.1}, {"patterns": 4, "inertia": 0.4, "silhouette": 0.2}]
    patterns.draw_figures(tmp_path / "figures", table, [5, 3, 1])
    for name in ("elbow.png", "pattern_sizes.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
