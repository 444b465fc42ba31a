"""`statecore dynamics`: `record` measures the states of a model while it reads, `prune` makes a model with fewer heads
from that, `lower` one with states of lower rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mamba2Config, PreTrainedModel

from .. import segmentation
from ..adapter import is_adapter, load_adapter, save_adapter
from ..data import PATTERNS_FILE, load_prepared
from ..outputs import new_folder, write_json
from ..ssd.model import SSDForCausalLM
from ..traces import RowProblem, read_lines
from . import recording
from .pruning import (
    Directions,
    Order,
    Scope,
    branches,
    choose_bases,
    choose_heads,
    compare,
    head_scores,
    key_covariances,
    lower_ranks,
    prune_heads,
    side_of_the_asymmetry,
)
from .recording import EPSILON, POSITIONS, Trajectory, step_tokens, summarise
from .report import (
    draw_heads,
    draw_spectra,
    draw_trajectories,
    draw_variants,
    dynamics_text,
    variants_table,
)

RECORD_FILE, PRUNING_FILE = "dynamics.json", "pruning.json"
HELD_OUT = 0.2  # of the texts, where no held-out ones are named

# ----------------------------------------------------------------------------------------------------------------------
# Models and texts


def load_model(model: str, base: str | None = None, dtype: str = "float32", *, own: bool = False) -> PreTrainedModel:
    """A causal language model, state-transition checkpoint, or adapter on its base; on the GPU where there is one.

    own: a Mamba2 checkpoint of transformers as our SSD model, which can be pruned.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if is_adapter(model):
        loaded = load_adapter(base, model, dtype=kind)
    else:
        is_mamba2 = own and AutoConfig.from_pretrained(model).model_type == Mamba2Config.model_type
        model_class = SSDForCausalLM if is_mamba2 else AutoModelForCausalLM
        loaded, info = model_class.from_pretrained(model, dtype=kind, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{model} must hold a causal language model; {len(missing)} weights are missing ({missing[0]}, ...)"
            )
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Text:
    """Tokens with their step ends (how many tokens have been read where each step ends)."""

    name: str
    tokens: list[int]
    step_ends: list[int]


@dataclass(frozen=True)
class TextOptions:
    """How texts are read."""

    tokenizer: str | None = None
    field: str = "thinking"
    split: str = "train"
    limit: int | None = None
    max_tokens: int | None = None
    shortest: int = 32
    longest: int = 512


def read_texts(source: str, model: PreTrainedModel, name: str, options: TextOptions) -> list[Text]:
    """Texts as the model reads them: a text file, the rows of a .jsonl, .jsonl.gz or .parquet file or of a hub dataset,
    or a prepared training set. Steps are found as `statecore prepare` finds them; a state-transition model reads step
    tokens around them, pattern after pattern, and the first step in the place of the prompt.
    """
    longest = options.max_tokens or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    starts, ends = step_tokens(model)
    if (Path(source) / PATTERNS_FILE).is_file():
        found = _prepared_texts(source, options, {*starts, *ends})
    else:
        words = _tokenizer(options.tokenizer or name)
        found = (_text(*row, words, options, (starts, ends)) for row in _rows(source, options))
    texts = []
    for text in islice(found, options.limit):
        tokens = text.tokens[:longest]
        texts.append(Text(text.name, tokens, [end for end in text.step_ends if end <= len(tokens)]))
    if not any(text.tokens for text in texts):
        raise ValueError(f"{source} is empty: expected text to read")
    return [text for text in texts if text.tokens]


def _tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(Path(name) / "tokenizer" if (Path(name) / "tokenizer").is_dir() else name)


def _rows(source: str, options: TextOptions) -> Iterator[tuple[str, str]]:
    """(name, text) of every row."""
    path = Path(source)
    if path.is_file() and not source.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        try:
            yield path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source} must be a text in UTF-8 ({error}), or a .jsonl, .jsonl.gz or .parquet file"
            ) from error
        return
    for line, row in read_lines(source, options.split):
        if isinstance(row, RowProblem):
            raise ValueError(f"{source}, line {line}: {row}")
        value = row.get(options.field)
        if not isinstance(value, str):
            raise ValueError(
                f"{source}, line {line}: expected a text in the field {options.field!r}, got {type(value).__name__}; "
                f"the row has {', '.join(map(repr, row))}: name another with --text-field"
            )
        yield str(row.get("id", f"{path.name}:{line}")), value


def _text(name: str, text: str, words: Any, options: TextOptions, markers: tuple[list[int], list[int]]) -> Text:
    (ids,), (spans,) = segmentation.encode(words, [text])
    if not ids:
        return Text(name, [], [])
    bounds = np.array([end for _, end in spans])
    sentences = segmentation.sentence_starts(text)
    places = np.searchsorted(bounds, sentences, side="right").tolist()
    transitions = segmentation.choose_transitions()
    opens: dict[int, bool] = {}
    for place, opening in zip(places, segmentation.sentence_openings(text, sentences, "word"), strict=True):
        opens[place] = opens.get(place, False) or opening in transitions
    opens.pop(len(ids), None)
    if not opens:
        return Text(name, ids, [len(ids)])
    steps = segmentation.split_steps(
        list(opens), list(opens.values()), len(ids), shortest=options.shortest, longest=options.longest
    )
    steps = [0, *steps[1:], len(ids)]
    starts, ends = markers
    if not starts:
        return Text(name, ids, steps[1:])
    marked, step_ends = ids[: steps[1]], [steps[1]]
    for i, (begin, stop) in enumerate(pairwise(steps[1:])):
        marked = [*marked, starts[i % len(starts)], *ids[begin:stop], ends[i % len(ends)]]
        step_ends.append(len(marked))
    return Text(name, marked, step_ends)


def _prepared_texts(source: str, options: TextOptions, known: set[int]) -> Iterator[Text]:
    """Rows of a prepared set; a model without step tokens reads them without."""
    prepared = load_prepared(source)
    part = {"train": prepared.train, "eval": prepared.eval}.get(options.split)
    if part is None:
        raise ValueError(f"{source} has no part {options.split!r}: expected train, or eval where there is one")
    markers = {*prepared.step_start_token_ids, *prepared.step_end_token_ids}
    if known and known != markers:
        raise ValueError(f"the model's step tokens are not those of {source}: prepare the set for this model")
    for row in part:
        ids, numbers = np.asarray(row["input_ids"]), np.asarray(row["step_ids"])
        ends = np.flatnonzero(np.diff(numbers, append=numbers[-1] + 1)) + 1  # of the prompt, each step, the answer
        if not known:
            stays = ~np.isin(ids, list(markers))
            ends, ids = np.cumsum(stays)[ends - 1], ids[stays]
        yield Text(str(row["id"]), ids.tolist(), ends.tolist())


def hold_out(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts to calibrate with, and the last fifth of them to score on; of a single text its last fifth."""
    count = max(round(HELD_OUT * len(texts)), 1)
    if len(texts) > 1:
        return list(texts[:-count]), list(texts[-count:])
    (text,) = texts
    cut = len(text.tokens) - round(HELD_OUT * len(text.tokens))
    if not 1 <= cut <= len(text.tokens) - 2:
        raise ValueError(f"{text.name} has {len(text.tokens)} tokens, too few to hold some out: name --heldout")
    ends = [end for end in text.step_ends if end <= cut]
    return [Text(text.name, text.tokens[:cut], ends)], [Text(text.name, text.tokens[cut:], [])]


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def record(
    model: str,
    text: str,
    *,
    out: Path,
    base: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32",
    text_field: str = "thinking",
    split: str = "train",
    limit: int | None = 8,
    max_tokens: int | None = None,
    positions: Sequence[int] = POSITIONS,
    every: int | None = None,
    epsilon: float = EPSILON,
    min_step_tokens: int = 32,
    max_step_tokens: int = 512,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Record rank and norm of a model's linear-attention states while it reads, over tokens and at step ends.

    Writes pictures of the heads, their trajectories and spectra, each with its JSON, trajectories.npz with those of all
    inputs, dynamics.json and a report. The model is not changed; no state is kept.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model, or one of transformers' with recurrent states of
            one matrix a head (Mamba2, Qwen3-Next, ...).
        text: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a prepared training set.
        out: the folder to write; it appears when everything is written.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own.
        dtype: what the model computes in; states in half precision have no honest rank.
        text_field: which field of a row is read.
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        limit: read no more inputs than this.
        max_tokens: read no more tokens of an input than this; default: what the model was made for.
        positions: tokens behind which states are measured, besides the step ends and the last token.
        every: also measure behind every so many tokens.
        epsilon: share of the largest singular value above which others count as rank.
        min_step_tokens: a shorter step joins the one before it.
        max_step_tokens: a longer step is halved at a sentence.
        overwrite: replace an existing folder of this kind.
    """
    with new_folder(out, overwrite, marker=RECORD_FILE) as folder:
        language = load_model(model, base, dtype)
        options = TextOptions(tokenizer, text_field, split, limit, max_tokens, min_step_tokens, max_step_tokens)
        texts = read_texts(text, language, model, options)
        found = record_texts(language, texts, positions=positions, every=every, epsilon=epsilon)
        settings = {"model": model, "text": text, "dtype": dtype, "epsilon": epsilon}
        result = {"settings": settings} | summarise(found)
        report = write_record(folder, found, result)
    print(report)
    return result


def record_texts(model: PreTrainedModel, texts: Sequence[Text], **options: Any) -> list[Trajectory]:
    return [
        recording.record(model, text.tokens, name=text.name, step_ends=text.step_ends, **options)
        for text in tqdm(texts, desc="recording", unit="text")
    ]


def write_record(folder: Path, found: Sequence[Trajectory], result: Mapping[str, Any]) -> str:
    """All files of a recording; returns the report."""
    write_json(folder / RECORD_FILE, result)
    draw_heads(folder / "heads.png", result)
    draw_trajectories(folder / "trajectories.png", found[0])
    draw_spectra(folder / "spectra.png", found[0], result["settings"].get("epsilon", EPSILON))
    arrays = {}
    for i, one in enumerate(found):
        arrays |= {f"{i}/positions": one.positions, f"{i}/is_step_end": one.is_step_end}
        arrays |= {f"{i}/{measured}": values for measured, values in one.values.items()}
    np.savez_compressed(folder / "trajectories.npz", **arrays)
    report = dynamics_text(result)
    (folder / "report.md").write_text(report, encoding="utf-8")
    return report


def prune(
    model: str,
    text: str,
    *,
    out: Path,
    keep: float = 0.5,
    by: Order = "joint",
    alpha: float = 0.5,
    scope: Scope = "model",
    heldout: str | None = None,
    draws: int = 3,
    seed: int = 0,
    base: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32",
    text_field: str = "thinking",
    split: str = "train",
    limit: int | None = 8,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Prune state heads by joint rank and norm, without training, beside random and reverse pruning of the same budget.

    Writes the pruned model, what it and its rivals cost and save on held-out text (pruning.json, pruning.png), and a
    report. Heads are gone for good: less state, less time, a smaller checkpoint, which loads like any other.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model or a Mamba2 checkpoint.
        text: what heads are judged by: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a prepared
            training set.
        out: the folder to write; it appears when everything is written, the model in its folder `model`.
        keep: share of all heads of the model that stays, in (0, 1]; one stays in each layer.
        by: which heads of the saved model go first: those with the highest score ("joint"), the lowest ("reverse"), or
            any ("random"). All three are compared.
        alpha: weight of the rank in the score; 1 - alpha is that of the norm. The paper's is unknown.
        scope: norms count as a share of the largest in the "model", or in each "layer".
        heldout: texts that the models are compared on; default: the last fifth of `text`, which then judges no head.
        draws: how many random prunings there are to compare with.
        seed: of the random prunings.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own.
        dtype: what the models compute in and are written in.
        text_field: which field of a row is read.
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        limit: read no more inputs than this.
        max_tokens: read no more tokens of an input than this; default: what the model was made for.
        overwrite: replace an existing folder of this kind.
    """
    options = TextOptions(tokenizer, text_field, split, limit, max_tokens)
    with new_folder(out, overwrite, marker=PRUNING_FILE) as folder:
        language, known, scored = _prunable(model, text, heldout, base, dtype, options)
        found = record_texts(language, known)
        heads, scores = head_scores(found, alpha, scope)
        kept = {
            "joint": choose_heads(heads, scores, keep),
            "reverse": choose_heads(heads, scores, keep, "reverse"),
            **{f"random {i + 1}": choose_heads(heads, scores, keep, "random", seed + i) for i in range(max(draws, 1))},
        }
        variants = {name: prune_heads(language, chosen) for name, chosen in kept.items()}
        rows = compare(language, variants, [text.tokens for text in scored], scored[0].tokens[:64])
        chosen = "random 1" if by == "random" else by
        _save(variants[chosen], model, folder / "model")
        settings = {"model": model, "text": text, "heldout": heldout, "keep": keep, "by": by, "alpha": alpha}
        result = {
            "settings": settings | {"scope": scope, "seed": seed},
            "heads": [
                {"layer": head.layer, "head": head.head, "score": float(score)}
                for head, score in zip(heads, scores, strict=True)
            ],
            "kept": {name: {str(layer): which for layer, which in chosen.items()} for name, chosen in kept.items()},
            "rows": rows,
            "asymmetry": side_of_the_asymmetry(rows),
        }
        report = _write_pruning(
            folder, result, f"# Pruning state heads: {keep:.0%} stay", [result["asymmetry"], "", f"Saved: {chosen}."]
        )
    print(report)
    return result


def lower(
    model: str,
    text: str,
    *,
    out: Path,
    keep: float = 0.5,
    by: Directions = "leading",
    heldout: str | None = None,
    seed: int = 0,
    base: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32",
    text_field: str = "thinking",
    split: str = "train",
    limit: int | None = 8,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Lower the rank of every head's state, without training, beside random and reverse directions of the same budget.

    Writes the model with narrower states, what it and its rivals cost and save on held-out text (pruning.json,
    pruning.png), and a report.

    Args:
        model: a state-transition checkpoint or adapter, an SSD model or a Mamba2 checkpoint.
        text: what directions are found with: a text file, a .jsonl, .jsonl.gz or .parquet file, a hub dataset, or a
            prepared training set.
        out: the folder to write; it appears when everything is written, the model in its folder `model`.
        keep: share of the width of the states' key side that stays, in (0, 1].
        by: the saved model's directions: those in which calibration states are largest ("leading"), smallest
            ("trailing"), or "random" ones. All three are compared.
        heldout: texts that the models are compared on; default: the last fifth of `text`, not used otherwise then.
        seed: of the random directions.
        base: the base checkpoint under an adapter; default: the one the adapter names.
        tokenizer: folder or hub name; default: the folder `tokenizer` in the model's, or the model's own.
        dtype: what the models compute in and are written in.
        text_field: which field of a row is read.
        split: split of a hub dataset; "train" or "eval" of a prepared set.
        limit: read no more inputs than this.
        max_tokens: read no more tokens of an input than this; default: what the model was made for.
        overwrite: replace an existing folder of this kind.
    """
    options = TextOptions(tokenizer, text_field, split, limit, max_tokens)
    with new_folder(out, overwrite, marker=PRUNING_FILE) as folder:
        language, known, scored = _prunable(model, text, heldout, base, dtype, options)
        covariances = key_covariances(language, [text.tokens for text in known])
        variants = {
            direction: lower_ranks(language, choose_bases(covariances, keep, direction, seed))
            for direction in ("leading", "trailing", "random")
        }
        rows = compare(language, variants, [text.tokens for text in scored], scored[0].tokens[:64])
        _save(variants[by], model, folder / "model")
        settings = {"model": model, "text": text, "heldout": heldout, "keep": keep, "by": by, "seed": seed}
        result = {"settings": settings, "state_ranks": variants[by].config.state_ranks, "rows": rows}
        report = _write_pruning(folder, result, f"# States of lower rank: {keep:.0%} of the width", [f"Saved: {by}."])
    print(report)
    return result


def _prunable(
    model: str, text: str, heldout: str | None, base: str | None, dtype: str, options: TextOptions
) -> tuple[PreTrainedModel, list[Text], list[Text]]:
    """The model, texts to calibrate with, and texts to compare on."""
    language = load_model(model, base, dtype, own=True)
    branches(language)  # refuses models that cannot be pruned before anything is read
    texts = read_texts(text, language, model, options)
    if heldout is None:
        return language, *hold_out(texts)
    return language, texts, read_texts(heldout, language, model, options)


def _save(pruned: PreTrainedModel, source: str, folder: Path) -> None:
    """The checkpoint (of an adapter: the adapter) with tokenizer and prompt format of the model that it comes from."""
    if is_adapter(source):
        save_adapter(pruned, folder)
    else:
        pruned.save_pretrained(folder)
    if (Path(source) / "tokenizer").is_dir():
        shutil.copytree(Path(source) / "tokenizer", folder / "tokenizer")
    for name in (PATTERNS_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def _write_pruning(folder: Path, result: Mapping[str, Any], title: str, remarks: Sequence[str]) -> str:
    write_json(folder / PRUNING_FILE, result)
    draw_variants(folder / "pruning.png", result["rows"])
    report = "\n".join([title, "", *variants_table(result["rows"]), "", *remarks, ""])
    (folder / "report.md").write_text(report, encoding="utf-8")
    return report
