"""A whole model on the CPU: long prefill and decoding with statecore against the same model with stock attention.

`python -m benchmarks.bench_decoding [--quick]` prints its table.

The shape of Qwen2.5-0.5B but for the vocabulary. Random weights, the same in both models; the state-transition model
has its linear branches on top. Token ids are given and the same for both, so both do equal work: a prompt, then steps
between their markers. Stock attention is transformers' "sdpa".
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks import suite
from benchmarks.contest import OURS, Instruments, Question
from benchmarks.memory import peak_growth
from benchmarks.record import COMPARISON, Row
from benchmarks.timing import Timing, seconds_per_call
from benchmarks.workload import ALL_THREADS, Case
from statecore.adapter import convert

LAYERS, INTERMEDIATE, VOCABULARY = 24, 4864, 32_768
STEP_START, STEP_END = VOCABULARY - 2, VOCABULARY - 1
STOCK = "stock sdpa"
BLOCKS = 16  # of tokens, in which the two models take turns


def questions(device: str) -> list[Question]:
    # float32: torch's own bfloat16 products of a single token are many times slower on CPUs
    case = Case(dtype=torch.float32, time=8192, heads=(14, 2), width=64, threads=ALL_THREADS)
    return [Question("model", "Qwen2", case, measure=decode)] if device == "cpu" else []


@torch.no_grad()
def decode(question: Question, instruments: Instruments) -> Iterator[Row]:
    """Prefill, one run each; then decoding, the two models taking turns."""
    case = question.case
    decoded = case.time // 16
    models, tokens = build(case), chain(case, case.time + decoded)
    for model in models.values():  # first calls set libraries up
        read(model, tokens[:, : case.prompt + case.step], DynamicCache(config=model.config))
    caches = {side: DynamicCache(config=model.config) for side, model in models.items()}
    samples: dict[str, list[float]] = {side: [] for side in models}
    grown = {}
    for side, model in models.items():
        grown[side], seconds = peak_growth(
            lambda: seconds_per_call(lambda: read(model, tokens[:, : case.time], caches[side]))  # noqa: B023
        )
        samples[side].append(seconds)
    largest = {side: cache_bytes(cache) for side, cache in caches.items()}
    yield phase(question, "prefill", case.time, samples, largest, grown)
    samples = {side: [] for side in models}
    for block in torch.arange(case.time, case.time + decoded).chunk(BLOCKS):
        for side, model in models.items():
            for at in block.tolist():
                token = tokens[:, at : at + 1]
                samples[side].append(seconds_per_call(lambda: read(model, token, caches[side])))  # noqa: B023
                largest[side] = max(largest[side], cache_bytes(caches[side]))
    yield phase(question, "decoding", decoded, samples, largest)


def build(case: Case) -> dict[str, PreTrainedModel]:
    """Both models with the same random weights; the last two tokens of the vocabulary open and close a step."""
    queries, keys = case.heads
    config = Qwen2Config(
        hidden_size=queries * case.width, num_hidden_layers=LAYERS, num_attention_heads=queries,
        num_key_value_heads=keys, intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY,
        max_position_embeddings=8 * case.time, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    stock = Qwen2ForCausalLM(config).to(case.dtype).eval()
    markers = {"step_start_token_ids": [STEP_START], "step_end_token_ids": [STEP_END]}
    return {OURS: convert(stock, **markers, la_rank=2 * case.width), STOCK: stock}


def chain(case: Case, count: int) -> Tensor:
    """Token ids [1, count]: a prompt, then steps, markers included."""
    tokens = torch.randint(1, STEP_START, (1, count))
    tokens[:, case.prompt :: case.step] = STEP_START
    tokens[:, case.prompt + case.step - 1 :: case.step] = STEP_END
    return tokens


def read(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the last token [1, 1, vocabulary]."""
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def cache_bytes(cache: DynamicCache) -> int:
    """Keys and values, and the states where there are any."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "states"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def phase(
    question: Question, name: str, tokens: int, samples: dict[str, list[float]], caches: dict[str, int],
    grown: dict[str, int | None] | None = None,
) -> Row:  # fmt: skip
    """grown: the peak memory."""
    numbers = {}
    for side, its in ((OURS, ""), (STOCK, "peer ")):
        seconds, spread = sum(samples[side]), Timing.of(samples[side]).spread if samples[side][1:] else None
        numbers |= {f"{its}time": (seconds, "ms"), f"{its}rate": (tokens / seconds, "tokens/s")}
        numbers |= {f"{its}spread": (spread, "percent"), f"{its}cache": (caches[side], "MB")}
        numbers |= {f"{its}peak memory growth": (grown[side], "MB")} if grown else {}
    numbers["ratio"] = numbers["peer time"][0] / numbers["time"][0], "times"
    case, hidden = question.case.labels() | {"T": tokens}, question.case.heads[0] * question.case.width
    shape = f"Qwen2 (hidden {hidden}, {LAYERS} layers, intermediate {INTERMEDIATE}, vocabulary {VOCABULARY})"
    aim = {"judged": "ratio", "unit": "times"}
    return question.row(COMPARISON, operator=shape, direction=name, what=STOCK, case=case, numbers=numbers, **aim)


if __name__ == "__main__":
    suite.main_of_operator(questions)
