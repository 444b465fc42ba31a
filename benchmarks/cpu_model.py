"""A whole model on the CPU: long prefill and decoding with statecore against the same model with stock attention.

    python -m benchmarks.cpu_model             the shape of Qwen2.5-0.5B; prints, `benchmarks.cpu --only model` writes
    python -m benchmarks.cpu_model --quick     a tiny model

Random weights, the same in both models; the state-transition model has its linear branches on top. Token ids are given
and the same for both, so both do equal work: a prompt, then steps between their markers. Stock attention is
transformers' "sdpa".
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.memory import peak_growth
from benchmarks.page import phase_table
from benchmarks.rows import Phase
from benchmarks.timing import Timing, seconds_a_call
from benchmarks.workload import ALL_THREADS, QUICK, ModelShape
from statecore.adapter import convert

DTYPE = torch.float32  # torch's own bfloat16 products of a single token are many times slower than float32 on CPUs
OURS, STOCK = "ours", "stock"


@torch.no_grad()
def phases(shape: ModelShape, threads: int) -> Iterator[Phase]:
    """Prefill, one run each; then decoding, the two models taking turns every `block` tokens."""
    torch.set_num_threads(threads)
    models = build(shape)
    tokens = chain(shape)
    for model in models.values():  # first calls set libraries up
        read(model, tokens[:, : shape.prompt + shape.step], DynamicCache(config=model.config))
    caches = {side: DynamicCache(config=model.config) for side, model in models.items()}
    seconds, extra = {}, {}
    for side, model in models.items():
        extra[side], seconds[side] = peak_growth(
            lambda: seconds_a_call(lambda: read(model, tokens[:, : shape.prefill], caches[side]))  # noqa: B023
        )
    largest = {side: cache_bytes(cache) for side, cache in caches.items()}
    yield phase("prefill", shape, shape.prefill, threads, seconds, largest, extra=extra)
    samples: dict[str, list[float]] = {side: [] for side in models}
    for begin in range(shape.prefill, shape.prefill + shape.decoded, shape.block):
        for side, model in models.items():
            for at in range(begin, begin + shape.block):
                token = tokens[:, at : at + 1]
                samples[side].append(seconds_a_call(lambda: read(model, token, caches[side])))  # noqa: B023
                largest[side] = max(largest[side], cache_bytes(caches[side]))
    yield phase(
        "decoding", shape, shape.decoded, threads, {side: sum(s) for side, s in samples.items()}, largest,
        spread={side: Timing.of(s).spread for side, s in samples.items()},
    )  # fmt: skip


def build(shape: ModelShape) -> dict[str, PreTrainedModel]:
    """Both models with the same random weights; the last two tokens of the vocabulary open and close a step."""
    queries, keys = shape.heads
    config = Qwen2Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=queries,
        num_key_value_heads=keys, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
        max_position_embeddings=4 * (shape.prefill + shape.decoded), tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    stock = Qwen2ForCausalLM(config).to(DTYPE).eval()
    start, end = shape.vocabulary - 2, shape.vocabulary - 1
    ours = convert(stock, step_start_token_ids=[start], step_end_token_ids=[end], la_rank=shape.rank)
    return {OURS: ours, STOCK: stock}


def chain(shape: ModelShape) -> Tensor:
    """Token ids [1, prefill + decoded]: a prompt, then steps of `step` tokens, markers included."""
    tokens = torch.randint(1, shape.vocabulary - 2, (1, shape.prefill + shape.decoded))
    tokens[:, shape.prompt :: shape.step] = shape.vocabulary - 2
    tokens[:, shape.prompt + shape.step - 1 :: shape.step] = shape.vocabulary - 1
    return tokens


def read(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the last token [1, 1, vocabulary]."""
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def cache_bytes(cache: DynamicCache) -> int:
    """Keys and values, and the states where there are any."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "states"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def phase(
    name: str, shape: ModelShape, tokens: int, threads: int, seconds: dict[str, float], caches: dict[str, int],
    *, extra: dict[str, int | None] | None = None, spread: dict[str, float] | None = None,
) -> Phase:  # fmt: skip
    extra, spread = extra or {}, spread or {}
    return Phase(
        operator=name, shape=str(shape), dtype=str(DTYPE).removeprefix("torch."), time=tokens,
        heads="/".join(map(str, shape.heads)), width=shape.hidden // shape.heads[0], threads=threads,
        ours_s=seconds[OURS], stock_s=seconds[STOCK], ours_spread=spread.get(OURS), stock_spread=spread.get(STOCK),
        ours_cache=caches[OURS], stock_cache=caches[STOCK],
        ours_extra=extra.get(OURS), stock_extra=extra.get(STOCK),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    shape = QUICK.model if parser.parse_args().quick else ModelShape()
    torch.manual_seed(0)
    print("\n".join(phase_table(list(phases(shape, ALL_THREADS)))))


if __name__ == "__main__":
    main()
