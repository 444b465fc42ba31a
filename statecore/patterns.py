"""Steps into thinking patterns: embeddings, K-means, the two tokens of each pattern.

A thinking pattern is a cluster of steps that read alike. Pattern i has an opening and a closing token, `<|step_i|>` and
`<|/step_i|>`. The State-Transition Framework (arXiv 2602.01198) uses MiniBatch K-Means with cosine similarity and, for
example, 128 clusters. Its embedding model is not published.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize
from tokenizers import AddedToken
from tqdm.auto import tqdm

from .figures import new_figure
from .windows import context_size, encode, window_batches

_FIT_STEPS = 200_000  # TF-IDF weights and singular vectors are fitted on a sample of this many steps
_CHUNK = 50_000  # steps that are transformed at a time

# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


def tfidf_embedding(
    steps: Sequence[str], problems: Sequence[Hashable], *, width: int = 128, seed: int = 0
) -> np.ndarray:
    """Embeddings of steps without a language model: TF-IDF projected onto `width` singular vectors.

    The vocabulary is words and word pairs, without numbers and symbols. `problems[i]` is the problem of step i. Only
    words in the steps of at least 5% of all problems, and of two, count, so that steps are close by what they do ("let
    me double check") rather than by what they are about ("the wavelength").

    Returns float32 `[steps, width]` with unit rows, or zero rows for steps without such a word; a small vocabulary
    lowers `width`. Raises ValueError if there is no such word at all.
    """
    words = {"token_pattern": r"(?u)\b[^\W\d_]+\b", "ngram_range": (1, 2)}
    texts: dict[Hashable, list[str]] = {}
    for step, problem in zip(steps, problems, strict=True):
        texts.setdefault(problem, []).append(step)
    rarest = min(len(texts), max(2, math.ceil(len(texts) / 20)))
    counter = CountVectorizer(**words, min_df=rarest, binary=True)
    try:
        vocabulary = sorted(counter.fit("\n".join(own) for own in texts.values()).vocabulary_)
    except ValueError as error:
        raise ValueError(
            f"the steps of {len(texts)} problems share no words to compare them by ({error}): embed them with a "
            "language model instead"
        ) from error
    vectorizer = TfidfVectorizer(**words, vocabulary=vocabulary, sublinear_tf=True, dtype=np.float32)
    chosen = np.random.default_rng(seed).permutation(len(steps))[:_FIT_STEPS]
    fitted = vectorizer.fit_transform([steps[i] for i in np.sort(chosen)])
    svd = TruncatedSVD(n_components=min(width, len(vocabulary)), random_state=seed).fit(fitted)
    chunks = [svd.transform(vectorizer.transform(steps[at : at + _CHUNK])) for at in range(0, len(steps), _CHUNK)]
    return normalize(np.concatenate(chunks).astype(np.float32, copy=False))


@torch.inference_mode()
def hidden_state_embedding(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    steps: Sequence[Sequence[tuple[int, int]]],
    *,
    layer: int | None = None,
    window: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> np.ndarray:
    """Embeddings of steps from a causal language model: its mean hidden state over each step, float32 `[steps, hidden]`
    with unit rows.

    `steps[i]` are the character spans of the steps of `texts[i]`; a token belongs to the step that holds its last
    character. The model reads each step after the text before it. `layer` counts from 0 (the embeddings) to the number
    of layers, negative from the end. The default is the middle layer, whose states say more about what a text does than
    those of the last, which serve to predict the next token. The mean over all steps is subtracted before the rows are
    normalised: hidden states share a large common component that would bring all cosines close to 1.
    """
    model.eval()
    layers = model.config.num_hidden_layers
    index = layers // 2 if layer is None else layer
    if not -layers - 1 <= index <= layers:
        raise ValueError(
            f"layer {layer} does not exist: expected {-layers - 1} to {layers} for a model of {layers} layers"
        )
    ids, offsets = encode(tokenizer, texts)
    first_step = np.cumsum([0, *(len(spans) for spans in steps)])
    step_of_token = [_step_of_token(*row) for row in zip(steps, offsets, first_step[:-1], strict=True)]
    sums = np.zeros((first_step[-1], model.config.hidden_size), dtype=np.float32)
    counts = np.zeros(first_step[-1], dtype=np.int64)
    device = next(model.parameters()).device
    batches = window_batches(
        ids, context_size(model, window), batch_size, device, "embedding steps" if progress else None
    )
    for batch, input_ids, mask in batches:
        output = model(
            input_ids=input_ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False
        )
        states = output.hidden_states[index].float().cpu().numpy()
        for b, (i, begin, end, first) in enumerate(batch):
            rows = step_of_token[i][first:end]
            inside = rows >= 0
            np.add.at(sums, rows[inside], states[b, first - begin : end - begin][inside])
            np.add.at(counts, rows[inside], 1)
    read = counts > 0
    means = sums[read] / counts[read, None]
    sums[read] = means - means.mean(axis=0)
    return normalize(sums)


def _step_of_token(steps: Sequence[tuple[int, int]], tokens: Sequence[tuple[int, int]], first_step: int) -> np.ndarray:
    """The row of the step that each token belongs to, -1 for none, from the character spans of both."""
    last = np.array([end - 1 for _, end in tokens], dtype=np.int64)
    begins = np.array([begin for begin, _ in steps], dtype=np.int64)
    ends = np.array([end for _, end in steps], dtype=np.int64)
    step = np.searchsorted(begins, last, side="right") - 1
    inside = (step >= 0) & (last < ends[np.maximum(step, 0)])
    return np.where(inside, step + first_step, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Clusters


def cluster_steps(embeddings: np.ndarray, patterns: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pattern of each step `[steps]` int32, and the centres of the patterns `[patterns, width]` float32.

    MiniBatch K-Means; on unit vectors, distances rank like cosines. Patterns are numbered by size, the largest first.
    Raises ValueError if there are fewer steps than patterns.
    """
    if len(embeddings) < patterns:
        raise ValueError(
            f"{patterns} thinking patterns cannot be made of {len(embeddings)} steps: ask for fewer patterns, or "
            "read more rows"
        )
    kmeans = MiniBatchKMeans(patterns, random_state=seed, n_init=1).fit(embeddings)
    order = np.argsort(-np.bincount(kmeans.labels_, minlength=patterns), kind="stable")
    rank = np.empty(patterns, dtype=np.int32)
    rank[order] = np.arange(patterns, dtype=np.int32)
    return rank[kmeans.labels_], kmeans.cluster_centers_[order]


def elbow(
    embeddings: np.ndarray, counts: Sequence[int], *, seed: int = 0, sample: int = 20_000
) -> list[dict[str, float]]:
    """How well the steps fall into each number of patterns, on at most `sample` steps.

    `inertia` is the mean squared distance to the nearest centre: it falls as patterns are added, and its bend (the
    elbow) suggests their number. `silhouette`, of 2,000 of the steps, lies between -1 and 1, and is higher the further
    apart the patterns are. Counts that the sample is too small for are left out.
    """
    rng = np.random.default_rng(seed)
    points = embeddings[rng.choice(len(embeddings), min(len(embeddings), sample), replace=False)]
    table = []
    for count in tqdm([c for c in counts if 2 <= c < len(points)], desc="elbow", unit="fit"):
        kmeans = MiniBatchKMeans(count, random_state=seed, n_init=1).fit(points)
        some = slice(0, 2_000)
        distinct = len(np.unique(kmeans.labels_[some]))
        score = (
            silhouette_score(points[some], kmeans.labels_[some]) if 1 < distinct < len(points[some]) else float("nan")
        )
        table.append({"patterns": count, "inertia": float(kmeans.inertia_ / len(points)), "silhouette": float(score)})
    return table


def typical_steps(
    embeddings: np.ndarray, labels: np.ndarray, centres: np.ndarray, steps: Sequence[str], *, most: int = 5
) -> list[list[int]]:
    """Indices of the most typical steps of each pattern, nearest to its centre first, without repeated texts."""
    similarity = np.einsum("ij,ij->i", embeddings, normalize(centres)[labels])
    order = np.lexsort((-similarity, labels))
    bounds = np.searchsorted(labels[order], np.arange(len(centres) + 1))
    chosen: list[list[int]] = []
    for begin, end in pairwise(bounds):
        seen: dict[str, int] = {}
        for i in order[begin:end]:
            seen.setdefault(" ".join(steps[i].split()), int(i))
            if len(seen) == most:
                break
        chosen.append(list(seen.values()))
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# Thinking patterns


@dataclass(frozen=True)
class PatternOptions:
    """How steps are grouped into thinking patterns.

    Args:
        count: number of thinking patterns; each adds two tokens to the tokenizer.
        embedding: "hidden_states" of the model or "tfidf"; default: hidden states where there is a model.
        layer: the model's layer whose states are used; default: the middle one.
        elbow: numbers of patterns to compare in the report.
    """

    count: int = field(default=128, metadata={"option": "patterns"})
    embedding: Literal["tfidf", "hidden_states"] | None = None
    layer: int | None = field(default=None, metadata={"option": "embedding_layer"})
    elbow: Sequence[int] = (16, 32, 64, 128, 256)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"patterns: expected 1 or more, got {self.count}")


@dataclass(frozen=True)
class ThinkingPatterns:
    """Thinking patterns, the largest first."""

    of_step: np.ndarray  # [steps] int32, the pattern of each
    sizes: list[int]
    examples: list[list[str]]  # the most typical steps of each
    elbow: list[dict[str, float]]  # see `elbow`


def find_patterns(embeddings: np.ndarray, steps: Sequence[str], options: PatternOptions, seed: int) -> ThinkingPatterns:
    of_step, centres = cluster_steps(embeddings, options.count, seed=seed)
    typical = typical_steps(embeddings, of_step, centres, steps)
    return ThinkingPatterns(
        of_step,
        np.bincount(of_step, minlength=options.count).tolist(),
        [[steps[i] for i in chosen] for chosen in typical],
        elbow(embeddings, options.elbow, seed=seed),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and figures


def add_pattern_tokens(tokenizer: Any, patterns: int) -> tuple[list[int], list[int]]:
    """Adds `<|step_i|>` and `<|/step_i|>` for each pattern to the tokenizer, and returns the ids of the opening and of
    the closing tokens.

    New ids follow the tokenizer's last one. If the model's embedding has spare rows (Qwen2.5 has room for 271 tokens,
    135 patterns), these ids use them, and the embedding need not grow. Raises ValueError if the tokenizer has such
    tokens already.
    """
    names = [name for i in range(patterns) for name in pattern_tokens(i)]
    known = sorted(tokenizer.get_vocab().keys() & set(names))
    if known:
        raise ValueError(
            f"the tokenizer already has pattern tokens ({known[0]}, ...): expected the base model's tokenizer"
        )
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    return ids[0::2], ids[1::2]


def pattern_tokens(pattern: int) -> tuple[str, str]:
    """The texts of a pattern's opening and closing token."""
    return f"<|step_{pattern}|>", f"<|/step_{pattern}|>"


def draw_figures(folder: Path, table: Sequence[dict[str, float]], sizes: Sequence[int]) -> None:
    """Writes `elbow.png`, inertia and silhouette over the number of patterns, and `pattern_sizes.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = new_figure((6, 4))
    left = figure.add_subplot(xlabel="thinking patterns", ylabel="inertia per step", xscale="log")
    right = left.twinx()
    right.set_ylabel("silhouette")
    counts = [row["patterns"] for row in table]
    lines = left.plot(counts, [row["inertia"] for row in table], "o-", color="tab:blue", label="inertia per step")
    lines += right.plot(counts, [row["silhouette"] for row in table], "s--", color="tab:orange", label="silhouette")
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    figure.legend(handles=lines, loc="outside upper center", ncols=2)
    figure.savefig(folder / "elbow.png", dpi=120)

    figure = new_figure((6, 4))
    axes = figure.add_subplot(xlabel="thinking pattern, by size", ylabel="steps")
    axes.bar(range(len(sizes)), sizes, width=1.0, color="tab:blue")
    figure.savefig(folder / "pattern_sizes.png", dpi=120)
