"""All sections as one page.

python -m benchmarks.papers        joins what the scripts of the single papers wrote: results/papers/README.md
"""

from pathlib import Path

from statecore.outputs import write_text

RESULTS = Path(__file__).parents[1] / "results" / "papers"
SECTIONS = ("ssd", "dynamics", "metastable", "flow")  # in the order of the papers' place in the package


def page(sections: list[str]) -> str:
    """Each section's headings go one level down, below a table of contents."""
    titles = [section.splitlines()[0].removeprefix("# ") for section in sections]
    anchors = ["".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_") for title in titles]
    contents = [f"- [{title}](#{anchor})" for title, anchor in zip(titles, anchors, strict=True)]
    lowered = ["\n".join(f"#{x}" if x.startswith("#") else x for x in section.splitlines()) for section in sections]
    head = (
        "# Four papers on the same operators\n\n"
        "`python -m benchmarks.papers` joins the sections; each names the command that made it."
    )
    return "\n\n".join([head, "\n".join(contents), *lowered]) + "\n"


if __name__ == "__main__":
    write_text(RESULTS / "README.md", page([(RESULTS / f"{name}.md").read_text() for name in SECTIONS]))
