"""`statecore demo`: the whole path on a small task, from a full-attention teacher to decoding with states."""

import inspect
import time
from pathlib import Path
from typing import Any

import torch
import typer

from ..outputs import write_json

DECODED_STEPS = (4, 8, 12, 14, 16)  # problem lengths that are decoded
TABLED_STEPS = (8, 16)  # those of them with a printed table
COST_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
COST_BATCH = 8


def demo(
    output_dir: Path = Path("statecore-demo"),
    *,
    train_teacher: bool = False,
    updates: int | None = None,
    problems: int = 200,
    seed: int = 0,
) -> Path:
    """Turn a small full-attention reasoning model into a state-transition model and show what that bought.

    Takes the teacher that comes with the package, distils it into its own state-transition form, decodes held-out
    problems with both, and writes a table, pictures and a page that opens offline. Nothing is downloaded.

    Args:
        output_dir: folder that everything is written to.
        train_teacher: train a teacher from scratch in place of the one in the package.
        updates: number of updates of the distillation; default: the recipe's.
        problems: number of problems decoded at each length.
        seed: of training set, training and problems.

    Returns:
        The page.
    """
    from . import distil, measure, page, task, teacher  # imported here: `statecore --help` needs no transformers

    began = time.perf_counter()

    def say(text: str) -> None:
        typer.echo(f"[{time.perf_counter() - began:4.0f} s] {text}")

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if train_teacher:
        say("training a teacher with full attention")
        teacher.train_teacher(output_dir / "teacher", seed=seed)
    else:
        say("the teacher is the one in the package")
        teacher.copy_teacher(output_dir / "teacher")
    full = teacher.load_teacher(output_dir / "teacher")
    say(f"{sum(p.numel() for p in full.parameters()):,} parameters. Distilling it into its state-transition form")
    student = distil.distil(output_dir / "teacher", output_dir, updates=updates, seed=seed)
    say("decoding held-out problems with generate()")
    rows = measure.compare(full, student, DECODED_STEPS, problems, seed=1_000_000 + seed)
    say("what one more token costs, up to lengths that have nothing to do with the task")
    costs = measure.cost_curves(full, student, COST_LENGTHS, COST_BATCH)
    held_out = task.draw(6, max(TABLED_STEPS), torch.Generator().manual_seed(2_000_000 + seed))
    trajectories, shares = measure.state_trajectories(student, held_out)

    settings = {"updates": updates, "problems": problems, "seed": seed, "longest_trained": distil.LONGEST_TRAINED}
    minutes = (time.perf_counter() - began) / 60
    results = {"settings": settings, "decoding": rows, "cost": costs, "state_variance": shares, "minutes": minutes}
    write_json(output_dir / "results.json", results)
    tables = _tables(rows)
    figures = {
        "accuracy": page.draw_accuracy(rows, distil.LONGEST_TRAINED),
        "cost": page.draw_cost(costs),
        "states": page.draw_states(trajectories, shares),
    }
    written = page.write_page(output_dir, figures, tables, **_texts(problems), example=_example(student, held_out))
    for heading, cells in tables.items():
        typer.echo(f"\n{heading}\n{_aligned(cells)}")
    typer.echo()
    say(f"page: {written}   table: {output_dir / 'results.json'}")
    return written


def _tables(rows: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Header and cells of the tables of TABLED_STEPS, by heading."""
    from . import distil, page

    tables = {}
    for steps in TABLED_STEPS:
        heading = f"{steps} steps" + (", longer than any trained on" if steps > distil.LONGEST_TRAINED else "")
        tables[heading] = page.format_table([row for row in rows if row["steps"] == steps])
    return tables


def _texts(problems: int) -> dict[str, str]:
    """The paragraphs of the page."""
    from . import distil, task

    return {
        "introduction": "A small reasoning model with full attention was turned into a state-transition model: softmax "
        "attention covers the prompt and the current step, everything before is held in a state of fixed size. Only "
        "the new linear branches and the step tokens were trained, on problems of up to "
        f"{distil.LONGEST_TRAINED} steps.",
        "note": f"{problems} held-out problems per row, greedy decoding with generate(), all in one batch; bytes are "
        "those of one sequence at their peak, ms per token those of a pass over the batch. An accuracy of 95 % has a "
        f"standard error of {100 * (0.95 * 0.05 / problems) ** 0.5:.1f} points. The rows without momentum and without "
        "the state are the same weights with that part switched off; all models but the teacher are made to decode in "
        "steps.",
        "cost_note": f"Batch of {COST_BATCH}, float32. The state's size does not depend on the length; in this small "
        "model it is as large as the keys and values of about 100 tokens.",
        "task": inspect.cleandoc(task.__doc__).split("\n\n")[1],
    }


def _example(student: torch.nn.Module, problems) -> str:
    """The first problem, the student's solution, and the right answer."""
    from . import measure, task

    tokenizer, starts, ends = task.tokenizer_with_steps()
    first = task.Problems(problems.input_ids[:1], problems.patterns[:1], problems.steps)
    solution = tokenizer.decode(measure.decode(student, first).tokens[0])
    for token in tokenizer.convert_ids_to_tokens(starts):
        solution = solution.replace(token, f"\n{token}")
    for token in tokenizer.convert_ids_to_tokens(ends):
        solution = solution.replace(f"done {token} ", f"done {token}\n")
    return f"{tokenizer.decode(first.prompts[0])}{solution}\n\nright: {tokenizer.decode(first.answers[0])}"


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(lines)
