"""Small tokenizers, a small language model and made-up chains of thought for the tests of data preparation."""

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()<>=+-*/$\\{}[]"
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; 0 unknown, 1 end of sequence."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: i for i, c in enumerate(CHARACTERS, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def byte_pair_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Qwen and Llama 3: spaces and line breaks are joined to words and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([row["thinking"] for row in chains(40)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def tiny_model(vocabulary: int, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.3,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes))).eval()


def save_language_model(folder: Path) -> Path:
    """A checkpoint folder with a model, and its tokenizer of characters in a subfolder.

    Beside a Qwen2 model, AutoTokenizer would take the characters for Qwen2's byte-level BPE.
    """
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_model(len(tokenizer)).save_pretrained(folder)
    return folder


def chains(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with problem, thinking and answer; two rows per problem."""
    rng = random.Random(seed)
    openings = ("Wait, ", "But ", "Alternatively, ", "So ", "Then ", "Hmm, ")
    bodies = (
        "let me check that again", "I should count the apples once more", "maybe the total is {} instead",
        "we get $x = {}.5$ from this", "that makes {} in all", "another way is to add {} first",
    )  # fmt: skip
    rows = []
    for i in range(count):
        sentences = [f"Okay, there are {rng.randint(2, 9)} apples."]
        for _ in range(rng.randint(4, 12)):
            gap = rng.choice((" ", " ", "\n\n"))
            sentences.append(gap + rng.choice(openings) + rng.choice(bodies).format(rng.randint(2, 99)) + ".")
        problem = f"How many apples does person {i // 2} have?"
        rows.append({"id": f"row-{i}", "problem": problem, "thinking": "".join(sentences), "answer": f"It is {i}."})
    return rows
