"""The causal language model that reads traces while a training set is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import patterns, segmentation
from .loading import load_causal_lm, load_tokenizer
from .traces import Tokenised, Trace


@dataclass(frozen=True)
class LanguageOptions:
    """A language model and how much it reads at once.

    Args:
        model: folder or hub name of a causal language model that finds the transitions and embeds the steps; without
            one the transitions come from a file or the built-in list, and the embeddings from TF-IDF.
        model_tokenizer: folder or hub name of that model's tokenizer, where it is not beside the model.
        window: tokens that the model reads at once; default: its context, at most 4096.
        batch_size: windows that the model reads at once.
    """

    model: str | None = None
    model_tokenizer: str | None = None
    window: int | None = None
    batch_size: int = 4


class LanguageModel:
    """Reads the thinking of traces behind their prompts, with a tokenizer of its own."""

    def __init__(self, options: LanguageOptions, base_tokenizer: Any):
        own = load_tokenizer(options.model_tokenizer or options.model)
        self.tokenizer = base_tokenizer if own.get_vocab() == base_tokenizer.get_vocab() else own
        self.model = load_causal_lm(options.model, dtype="auto")
        self.reading = {"window": options.window, "batch_size": options.batch_size}

    def opening_entropies(
        self, traces: Sequence[Trace], unit: segmentation.OpeningUnit
    ) -> list[segmentation.OpeningEntropy]:
        """Entropies at the starts of the traces' sentences, see segmentation.opening_entropies."""
        texts = [trace.text() for trace in traces]
        starts = [
            [len(trace.head) + start for start in segmentation.sentence_starts(trace.thinking)] for trace in traces
        ]
        return segmentation.opening_entropies(self.model, self.tokenizer, texts, starts, unit=unit, **self.reading)

    def step_embeddings(self, rows: Sequence[Tokenised], layer: int | None) -> np.ndarray:
        """Mean hidden states of all steps of the rows, see patterns.hidden_state_embedding."""
        texts = [row.trace.text() for row in rows]
        spans = [
            [(len(row.trace.head) + begin, len(row.trace.head) + end) for begin, end in row.step_spans()]
            for row in rows
        ]
        return patterns.hidden_state_embedding(self.model, self.tokenizer, texts, spans, layer=layer, **self.reading)
