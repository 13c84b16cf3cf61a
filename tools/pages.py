"""The pages as files: run them, compare what they show with what is kept, export them, make the README.

    python tools/pages.py refresh [PAGE ...]   run in place, clean, export, README: after editing a page
    python tools/pages.py export               clean and export only
    python tools/pages.py readme               README.md from nbs/index.ipynb

A page runs in a kernel of its own with one thread, as a reader would run it;
tests/test_pages.py calls the same functions.
"""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
SECONDS = 120  # for one cell; a page takes 10 in all
GENERATED = "<!-- made from nbs/index.ipynb by tools/pages.py; edit the page -->"


def pages(under: Path = NBS) -> list[Path]:
    "Every page, in reading order; names that begin with _ are drafts."
    return sorted(p for p in under.rglob("*.ipynb")
                  if not any(part.startswith(("_", ".")) for part in p.relative_to(under).parts))


def module_of(page: Path) -> str | None:
    "The dotted name that a page exports to, without the package: `recipes.ink`."
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type == "code" and (found := re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M)):
            return found[1]
    return None


def execute(page: Path) -> nbformat.NotebookNode:
    "The page as it looks after running it top to bottom in a fresh kernel."
    from nbclient import NotebookClient
    notebook = nbformat.read(page, 4)
    quiet = ["--IPKernelApp.log_level=40",  # ipykernel warns of loopback TCP, which is what everybody uses
             "--IPKernelApp.exec_lines=from trainbook.registry import register; register('display', 'live')(lambda run: None)"]
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", extra_arguments=quiet,
                            resources={"metadata": {"path": str(page.parent)}})
    with tempfile.TemporaryDirectory(prefix="trainbook-page-") as home:  # what a page agrees to is no answer of yours
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                            "XDG_CONFIG_HOME": home})
    notebook.metadata.pop("widgets", None)  # no kernel, no widget: what a page keeps is pictures and tables
    return notebook


def shown(cell) -> list:
    "What a reader sees under a cell, without what differs from run to run."
    if cell.cell_type != "code" or re.search(r"^#\|\s*volatile", cell.source, re.M): return []
    seen = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream": data = {"text": output.text}
        elif output.output_type == "error": data = {"error": output.ename}
        else: data = {kind: "picture" if kind.startswith("image/") else value
                      for kind, value in output.get("data", {}).items() if "widget" not in kind}
        if seen and output.output_type == "stream" and "text" in seen[-1]: seen[-1]["text"] += data["text"]
        else: seen.append(data)
    return [{kind: re.sub(r" at 0x[0-9a-f]+", "", "".join(value)).strip() for kind, value in data.items()}
            for data in seen]


def stale(page: Path) -> list[str]:
    "Runs the page; one line for each cell that shows something else than what is kept in the file."
    kept, now = nbformat.read(page, 4), execute(page)
    return [f"{page.name} cell {i} ({old.source.strip().splitlines()[-1][:60]}):\n"
            f"  kept {shown(old)}\n  now  {shown(new)}"
            for i, (old, new) in enumerate(zip(kept.cells, now.cells)) if shown(old) != shown(new)]


def tool(name: str) -> None:
    "An nbdev command of this environment."
    subprocess.run([Path(sys.executable).parent/name], cwd=ROOT, check=True)


def readme() -> str:
    "The index page as Markdown: prose, code and what it prints; cells marked hide are left out."
    parts = [GENERATED]
    for cell in nbformat.read(NBS/"index.ipynb", 4).cells:
        if re.search(r"^#\|\s*hide", cell.source, re.M): continue
        if cell.cell_type == "markdown": parts.append(_from_the_top(cell.source))
        elif cell.cell_type == "code":
            source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
            if source: parts.append(f"```python\n{source}\n```")
            for output in shown(cell):
                if text := output.get("text") or output.get("text/plain"):
                    parts.append("```\n" + text.rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


def _from_the_top(text: str) -> str:
    "Links of a page in nbs/ as links of a file beside it."
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)",
                  lambda link: f"]({link[1][3:] if link[1].startswith('../') else 'nbs/' + link[1]})", text)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("verb", choices=["refresh", "export", "readme"])
    words.add_argument("page", nargs="*", type=Path)
    asked = words.parse_args()
    if asked.verb != "readme": tool("nbdev_clean"); tool("nbdev_export")
    if asked.verb == "refresh":
        for page in asked.page or pages():
            print(f"running {page}", flush=True)
            nbformat.write(execute(page.resolve()), page)
        tool("nbdev_clean"); tool("nbdev_export")
    if (NBS/"index.ipynb").exists(): (ROOT/"README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__": main()
