"""SSD models: against transformers' Mamba2, against a Transformer of equal size, and the two-phase curriculum.

    python -m benchmarks.papers.ssd                     all; writes benchmarks/results/papers/ssd.{md,json,png}
    python -m benchmarks.papers.ssd --only timing       about 6 minutes
    python -m benchmarks.papers.ssd --only curriculum   about 10 minutes; --traces FILE names the chains of phase 1
    python -m benchmarks.papers.ssd --only page         page and picture again, from the json file

A part that was not run keeps its figures. The curriculum's first phase needs a file of chains of thought with the
fields problem, thinking and answer.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from benchmarks.machine import versions
from benchmarks.timing import interleaved
from statecore.cache import cache_bytes
from statecore.ssd import SSDConfig, SSDForCausalLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "papers"
RECIPE = ROOT / "recipes" / "ssd-tiny.yaml"
TRACES = Path(os.environ.get("STATECORE_SHARED", ROOT.parent / "shared")) / "data" / "longcot_clean" / "train.jsonl.gz"
TITLE = "# SSD models (PromptCoT-Mamba)"
COMMAND = "python -m benchmarks.papers.ssd"

SIZE = {"hidden_size": 256, "vocab_size": 1024, "tie_word_embeddings": True, "initializer_range": 0.02}
SIZE |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
# A published head (64 wide, state of 128), expansion, convolution.
BLOCK = SIZE | {"expand": 2, "num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1}
LAYERS = 4
CONTEXTS = (256, 1024, 4096, 16384, 65536)
GENERATED = (1024, 4096, 16384, 65536)
# What the paper's caps of 24 and 72 GB leave a 7B Transformer in bfloat16 (15.2 GB; 57,344 bytes of keys and values per
# token), in tokens: both models are given as many here.
CAPS = {"24 GB": int((24e9 - 15.2e9) / 57344), "72 GB": int((72e9 - 15.2e9) / 57344)}
PAPER_GAIN = {"24 GB": 3.66, "72 GB": 1.69}
# Float32 states of 64 layers with 128 heads of 64 x 128 (hidden size 4096), in tokens of those keys and values.
PAPER_STATE_TOKENS = 64 * 128 * 64 * 128 * 4 / 57344
LARGEST_BATCH = 64


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers' Mamba2


def compare_with_transformers(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Forward, prefill into a cache, and forward + backward of the same model, two layers."""
    rows = []
    # At 4,096 tokens the peer's default chunk of 256 takes tens of seconds and 20 GB: there it gets its faster 64 only.
    for length, chunk in ((1024, 256), (1024, 64), (4096, 64)):
        config = Mamba2Config(**BLOCK, num_hidden_layers=2, chunk_size=chunk)
        torch.manual_seed(0)
        theirs = Mamba2ForCausalLM(config)
        ours = SSDForCausalLM(SSDConfig.from_mamba2(config))
        ours.load_state_dict(theirs.state_dict())
        ids = torch.randint(2, SIZE["vocab_size"], (1, length))
        with torch.no_grad():
            difference = (ours(ids, use_cache=False).logits - theirs(ids, use_cache=False).logits).abs().max()
        assert difference < 1e-3, f"logits differ by {difference}"

        def forward(model: PreTrainedModel, use_cache: bool, ids=ids) -> None:
            with torch.no_grad():
                model(ids, use_cache=use_cache, logits_to_keep=1)

        def both(model: PreTrainedModel, ids=ids) -> None:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        runs: dict[str, Callable] = {
            "forward": lambda m: forward(m, False), "prefill": lambda m: forward(m, True), "forward + backward": both,
        }  # fmt: skip
        for direction, run in runs.items():
            timing = interleaved({"ours": lambda run=run, m=ours: run(m), "theirs": lambda run=run, m=theirs: run(m)})
            mine, peer = timing["ours"], timing["theirs"]
            rows.append(
                {
                    "direction": direction, "tokens": length, "peer_chunk": chunk, "ours_ms": mine.median * 1e3,
                    "spread": mine.spread, "peer_ms": peer.median * 1e3,
                    "ratio": peer.median / mine.median,
                }
            )  # fmt: skip
            say(f"{direction}, {length} tokens, chunk {chunk}: {rows[-1]['ratio']:.1f} times transformers' speed")
        del ours, theirs
        gc.collect()
    return rows


def where_time_goes() -> dict[str, dict[str, float]]:
    """Share of our own time by operation, 4096 tokens."""
    torch.manual_seed(0)
    model = SSDForCausalLM(SSDConfig(**BLOCK, num_hidden_layers=2))
    ids = torch.randint(2, SIZE["vocab_size"], (1, 4096))

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    def both() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    names = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
        "SSD operator": ("statecore::linear_attention", "statecore::linear_attention_backward"),
        "convolution": ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_conv_depthwise2d"),
    }
    shares = {}
    for direction, run in (("forward", forward), ("forward + backward", both)):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        found = {name: sum(spent.get(key, 0) for key in keys) for name, keys in names.items()}
        found["element by element"] = sum(spent.values()) - sum(found.values())
        shares[direction] = {name: value / sum(spent.values()) for name, value in found.items()}
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# Beside a Transformer of equal size


def pair() -> tuple[SSDForCausalLM, LlamaForCausalLM]:
    """An SSD model and a Transformer with as many parameters and layers; four query heads share one of keys."""
    torch.manual_seed(0)
    ours = SSDForCausalLM(SSDConfig(**BLOCK, num_hidden_layers=LAYERS)).eval()
    wanted = count(ours)

    def llama(width: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                **SIZE, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=1, head_dim=64,
                intermediate_size=width, max_position_embeddings=1 << 18,
            )
        ).eval()  # fmt: skip

    width = 8 + round((wanted - count(llama(8))) / (3 * SIZE["hidden_size"] * LAYERS))
    return ours, llama(width)


def count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def filled(model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
    """A cache as after `context` tokens. A Transformer's keys and values are constants: their values cost no time."""
    cache = DynamicCache(config=model.config)
    if isinstance(model, SSDForCausalLM):
        for piece in torch.randint(2, SIZE["vocab_size"], (1, context)).split(4096, 1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(batch)
    else:
        for layer in range(LAYERS):
            keys = torch.full((batch, 1, context, 64), 0.01)
            cache.update(keys, keys.clone(), layer)
    return cache


def bytes_of(cache: DynamicCache) -> int:
    if hasattr(cache.layers[0], "state_bytes"):
        return cache_bytes(cache).kv + cache_bytes(cache).state
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def seconds_a_token(model: PreTrainedModel, cache: DynamicCache, batch: int, tokens: int) -> float:
    """Median seconds of a decoding step of `batch` rows."""
    token, seconds = torch.full((batch, 1), 5), []
    for _ in range(tokens + 1):
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.no_grad()
def against_length(say: Callable[[str], None]) -> list[dict[str, Any]]:
    ours, theirs = pair()
    rows = []
    for context in CONTEXTS:
        row: dict[str, Any] = {"context": context}
        for name, model in (("ssd", ours), ("transformer", theirs)):
            cache = filled(model, 1, context)
            row[f"{name}_bytes"] = bytes_of(cache)
            row[f"{name}_ms"] = seconds_a_token(model, cache, 1, 15) * 1e3
        rows.append(row)
        say(f"after {context:,} tokens: {row['ssd_ms']:.2f} ms per token, Transformer {row['transformer_ms']:.2f} ms")
    return rows


@torch.no_grad()
def under_caps(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Tokens per second when as many sequences run side by side as the cap allows at their full length.

    The time of a step is that after half of the tokens: a Transformer's grows linearly, an SSD model's does not grow.
    """
    ours, theirs = pair()
    a_token = bytes_of(filled(theirs, 1, 1))
    rows, timed = [], {}
    for cap, tokens in CAPS.items():
        free = tokens * a_token
        for length in GENERATED:
            state = bytes_of(filled(ours, 1, 1))
            row: dict[str, Any] = {"cap": cap, "free_bytes": free, "length": length, "state_tokens": state / a_token}
            for name, model in (("ssd", ours), ("transformer", theirs)):
                each = state if name == "ssd" else length * a_token
                batch = min(LARGEST_BATCH, free // each)
                row[f"{name}_batch"], row[f"{name}_tokens_s"] = batch, 0.0
                if batch:
                    key = (name, batch, None if name == "ssd" else length)
                    if key not in timed:
                        cache = filled(model, batch, 64 if name == "ssd" else length // 2)
                        timed[key] = batch / seconds_a_token(model, cache, batch, 5)
                        del cache
                        gc.collect()
                    row[f"{name}_tokens_s"] = timed[key]
            rows.append(row)
            say(f"{cap}, {length:,} tokens: {row['ssd_tokens_s']:.0f} and {row['transformer_tokens_s']:.0f} tokens/s")
    return rows


def timing(say: Callable[[str], None]) -> dict[str, Any]:
    ours, theirs = pair()
    return {
        "machine": versions() | {"threads": str(torch.get_num_threads())},
        "parameters": {"ssd": count(ours), "transformer": count(theirs)},
        "transformers": compare_with_transformers(say),
        "shares": where_time_goes(),
        "length": against_length(say),
        "caps": under_caps(say),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Curriculum


def curriculum(traces: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The tiny recipe with real chains of thought in phase 1, with and without each phase."""
    from statecore.ssd.recipe import parse_recipe
    from statecore.ssd.train import run_recipe

    if not traces.is_file():
        raise SystemExit(
            f"there is no file {traces}: give chains of thought with the fields problem, thinking and answer "
            "(.jsonl, .jsonl.gz or .parquet) as --traces, or leave the curriculum out with --only timing"
        )
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    values["tokenizer"] = {"train": 1024}
    open_traces = {"source": str(traces), "rows": 2400}
    values["phases"][0] = {
        "name": "open traces",
        "mixture": [open_traces | {"part": [0.05, 1.0]}],
        "training": {"max_steps": 250, "per_device_train_batch_size": 8},
    }
    # Short programs come in phase 2 only: phase 1 alone has never seen one.
    values["evaluation"] = [
        {"name": "open traces", **open_traces, "part": [0.0, 0.05], "rows": 60},
        *values["evaluation"],
    ]
    values["training"]["disable_tqdm"] = True
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = run_recipe(parse_recipe(values), Path(folder), ablate=True, seed=0, say=say)
    for run in record["runs"]:
        run.pop("folder")
    settings = {"phases": values["phases"], "model": values["model"], "max_tokens": values["max_tokens"]}
    settings["phases"][0]["mixture"][0]["source"] = traces.name
    return record | {"machine": versions(), "settings": settings, "minutes": (time.perf_counter() - start) / 60}


# ----------------------------------------------------------------------------------------------------------------------
# Page


def page(results: dict[str, Any]) -> str:
    lines = [TITLE, "", f"Command: `{COMMAND}` (`--only timing`, `--only curriculum --traces FILE`).", ""]
    lines += ["![curves of the tables below](ssd.png)", ""]
    if "timing" in results:
        lines += timing_page(results["timing"])
    if "curriculum" in results:
        lines += curriculum_page(results["curriculum"])
    return "\n".join(lines)


def timing_page(found: dict[str, Any]) -> list[str]:
    size = found["parameters"]
    lines = ["Machine: " + "; ".join(f"{name}: {value}" for name, value in found["machine"].items()) + ".", ""]
    lines += ["## Against transformers' Mamba2 on the CPU", ""]
    lines += [
        f"The same weights, float32, batch 1, two layers of {BLOCK['hidden_size']} channels with {BLOCK['num_heads']} "
        f"heads of {BLOCK['head_dim']} x {BLOCK['state_size']}; both sides in one run, interleaved medians, logits "
        "equal to 1e-3. The chunk is transformers' own setting (256 is its default; ours has none).",
        "",
        "| direction | tokens | its chunk | ours, ms | spread | its, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['direction']} | {r['tokens']} | {r['peer_chunk']} | {r['ours_ms']:.1f} | {r['spread']:.0%} "
        f"| {r['peer_ms']:.0f} | **{r['ratio']:.1f}** |"
        for r in found["transformers"]
    ]
    lines += ["", "What bounds ours at 4096 tokens, as shares of its time:", ""]
    names = list(found["shares"]["forward"])
    lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {way} | " + " | ".join(f"{shares[n]:.0%}" for n in names) + " |" for way, shares in found["shares"].items()
    ]
    lines += ["", "## One more token, after ever more tokens", ""]
    lines += [
        f"Batch 1, {LAYERS} layers; {size['ssd']:,} parameters here and {size['transformer']:,} in transformers' "
        "Llama, which has four query heads on one head of keys and values and its usual DynamicCache.",
        "",
        "| tokens before | SSD, ms | Transformer, ms | SSD, MB | Transformer, MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['context']:,} | {r['ssd_ms']:.2f} | {r['transformer_ms']:.2f} | {r['ssd_bytes'] / 1e6:.2f} "
        f"| {r['transformer_bytes'] / 1e6:.2f} |"
        for r in found["length"]
    ]
    lines += ["", "## Tokens per second under a memory cap", ""]
    tokens = ", ".join(f"{name}: {count:,}" for name, count in CAPS.items())
    lines += [
        "The setting of the paper's figure 2: as many sequences side by side as fit beside the weights. Memory is "
        "counted in tokens of the Transformer's keys and values, so many as the paper's caps leave a 7B Transformer "
        f"({tokens}); at most {LARGEST_BATCH} sequences. The paper reports {PAPER_GAIN['24 GB']} times the tokens "
        f"under 24 GB and {PAPER_GAIN['72 GB']} times under 72 GB, on long generations with 7B models on GPUs; its "
        "absolute figures are not published. A state costs as much as "
        f"{found['caps'][0]['state_tokens']:,.0f} tokens of keys and values here and {PAPER_STATE_TOKENS:,.0f} at 7B "
        "(float32, published shapes), so the caps bind this small SSD model less than the paper's.",
        "",
        "| cap | length | SSD: sequences | tokens/s | Transformer: sequences | tokens/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["caps"]:
        there = r["transformer_batch"]
        ratio = f"**{r['ssd_tokens_s'] / r['transformer_tokens_s']:.2f}**" if there else "does not fit"
        lines.append(
            f"| {r['cap']} | {r['length']:,} | {r['ssd_batch']} | {r['ssd_tokens_s']:.0f} | {there} "
            f"| {r['transformer_tokens_s']:.0f} | {ratio} |"
        )
    return [*lines, ""]


def curriculum_page(found: dict[str, Any]) -> list[str]:
    from statecore.ssd.evaluation import best_guess
    from statecore.ssd.recipe import read_recipe
    from statecore.ssd.report import report_table
    from statecore.ssd.rows import rows_of

    runs = {" + ".join(run["phases"]): run for run in found["runs"]}
    open_, hard = (phase["name"] for phase in found["settings"]["phases"])
    whole, alone = runs[f"{open_} + {hard}"], runs[hard]
    sets = [name for name, value in whole["evaluation"].items() if "exact" in value]
    gains = ", ".join(
        f"{100 * (whole['evaluation'][s]['exact'] - alone['evaluation'][s]['exact']):+.0f} points on {s}" for s in sets
    )
    before, kept = runs[""]["evaluation"][open_]["loss"], runs[open_]["evaluation"][open_]["loss"]
    lost = whole["evaluation"][open_]["loss"] - kept
    rows = whole["evaluation"][sets[0]]["rows"]
    guesses = ", ".join(f"{best_guess(list(rows_of(e))):.0%}" for e in read_recipe(RECIPE).evaluation)
    most = max(runs[open_]["evaluation"][s]["exact"] for s in sets)
    return [
        "## The two-phase curriculum, small",
        "",
        f"`recipes/ssd-tiny.yaml` with real chains of thought in phase 1, cut at {found['settings']['max_tokens']} "
        f"tokens: {found['parameters']:,} parameters from random weights, one run a line (seed {found['seed']}), "
        f"{found['minutes']:.1f} minutes in all. Phase 2 are synthetic programs of 4 to 7 steps and a few short ones. "
        f"Loss in nats a predicted token; exact answers of {rows} held-out problems a column by greedy decoding; "
        f"always saying the commonest answer would give {guesses}.",
        "",
        report_table(found),
        "",
        f"Phase 1 before phase 2, against phase 2 alone: {gains} (the standard error of a column is up to "
        f"{50 / rows**0.5:.0f} points). Phase 1 alone answers at most {most:.0%} of any column. Phase 2, "
        f"whose mixture holds nothing of phase 1, changes the loss on the text of phase 1 by {lost:+.2f} nats, against "
        f"{before - kept:.2f} gained by phase 1: what a later mixture leaves out is forgotten. The paper's ablation is "
        "AIME24 35.2 with and 11.7 without the synthetic phase, which agrees in direction; that open chains of thought "
        "help the synthetic problems cannot be seen at this scale.",
        "",
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.4), constrained_layout=True)
    if "timing" in results:
        draw_timing(results["timing"], *axes[0])
    if "curriculum" in results:
        draw_training(results["curriculum"], *axes[1])
    for axis in axes.flat:
        if not axis.has_data():
            axis.axis("off")
    working = path.with_name(f".{path.name}.part.png")
    figure.savefig(working, dpi=100)
    plt.close(figure)
    os.replace(working, path)


def draw_timing(found: dict[str, Any], bars: Any, length: Any, caps: Any) -> None:
    rows = found["transformers"]
    bars.barh([f"{r['direction']}, {r['tokens']}, chunk {r['peer_chunk']}" for r in rows], [r["ratio"] for r in rows])
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=7)
    bars.set(title="speed against transformers' Mamba2", xlabel="times as fast")
    contexts = [r["context"] for r in found["length"]]
    memory = length.twinx()
    for name, colour in (("ssd", "C0"), ("transformer", "C1")):
        length.loglog(contexts, [r[f"{name}_ms"] for r in found["length"]], "o-", color=colour, label=f"{name}, ms")
        memory.loglog(
            contexts, [r[f"{name}_bytes"] / 1e6 for r in found["length"]], "x--", color=colour, label=f"{name}, MB"
        )
    length.set(title="one token more", xlabel="tokens before", ylabel="ms per token (solid)")
    memory.set_ylabel("MB a sequence (dashed)")
    length.legend(fontsize=7)
    for place, cap in enumerate(CAPS):
        shown = [r for r in found["caps"] if r["cap"] == cap]
        for name, mark in (("ssd", "o-"), ("transformer", "x--")):
            points = [(r["length"], r[f"{name}_tokens_s"]) for r in shown if r[f"{name}_batch"]]
            caps.loglog(*zip(*points, strict=True), mark, color=f"C{place}", label=f"{name}, {cap}")
    caps.set(title="under a memory cap", xlabel="tokens generated", ylabel="tokens a second")
    caps.legend(fontsize=7)


def draw_training(found: dict[str, Any], curves: Any, losses: Any, bars: Any) -> None:
    runs = [run for run in found["runs"] if run["phases"]]
    for place, run in enumerate(runs):
        label = " + ".join(run["phases"])
        last = " after ".join(reversed(run["phases"]))
        curves.semilogy([x["step"] for x in run["history"]], [x["loss"] for x in run["history"]], label=last)
        shift = (place - (len(runs) - 1) / 2) * 0.8 / len(runs)
        for axis, key in ((losses, "loss"), (bars, "exact")):
            sets = [name for name, value in run["evaluation"].items() if key in value]
            places = [i + shift for i in range(len(sets))]
            axis.bar(places, [run["evaluation"][s][key] for s in sets], 0.8 / len(runs), label=label)
            axis.set_xticks(range(len(sets)), sets, fontsize=8)
    curves.set(title="training loss of a phase", xlabel="update", ylabel="nats per token")
    losses.set(title="held-out loss", ylabel="nats per token")
    bars.set(title="exact answers", ylim=(0, 1))
    curves.legend(fontsize=7)


def write(part: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "ssd.json"
    results = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | part
    for target, text in ((path, json.dumps(results, indent=1) + "\n"), (path.with_suffix(".md"), page(results))):
        working = target.with_name(f".{target.name}.part")
        working.write_text(text, encoding="utf-8")
        os.replace(working, target)
    draw(results, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("timing", "curriculum", "page"))
    parser.add_argument("--traces", type=Path, default=TRACES, help="chains of thought for phase 1")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    if options.only == "page":
        write({})
    if options.only in (None, "curriculum"):
        write({"curriculum": curriculum(options.traces, say)})
    if options.only in (None, "timing"):
        write({"timing": timing(say)})


if __name__ == "__main__":
    main()
