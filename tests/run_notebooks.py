"""Runs the notebooks headlessly: `make demo`, `make figures`.

    python tests/run_notebooks.py [--out FOLDER] [--html FOLDER] [-p NAME VALUE] [names ...]

`-p HOURS 0.5` sets a parameter, in a cell of its own below the one tagged "parameters", as
papermill does. With TRAIN=no in the environment nothing is trained: figures are drawn from what is
stored. Executed notebooks are kept as notebooks in --out and as pages in --html.
"""
import argparse
import ast
import os
import re
import time
from pathlib import Path

import latex2mathml.converter
import nbclient
import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


def inject(notebook, parameters: dict):
    """Puts the parameters into a cell after the one tagged "parameters"."""
    if not parameters:
        return
    tagged = [i for i, cell in enumerate(notebook.cells)
              if "parameters" in cell.metadata.get("tags", [])]
    (at,) = tagged
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))


def execute(path: Path, out: Path | None = None, html: Path | None = None,
            parameters: dict | None = None) -> float:
    """Runs one notebook in notebooks/, keeps the executed copy; returns the seconds.

    Raises nbclient's CellExecutionError with the failing cell; what was run until then is kept.
    """
    began = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    inject(notebook, parameters or {})
    client = nbclient.NotebookClient(
        notebook, timeout=None, extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    finally:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, out / path.name)
        if html is not None:
            write_page(notebook, html / f"{path.stem}.html")
    return time.monotonic() - began


def write_page(notebook, path: Path):
    """The executed notebook as one page, without widgets and without the names of our folders.

    Formulas are MathML, which a browser draws by itself, without a network.
    """
    notebook.metadata.pop("widgets", None)
    formulas = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for kept in map(without_widgets, cell.outputs) if kept]
        if cell.cell_type == "markdown":
            cell.source = take_formulas(cell.source, formulas)
    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="")
    page, _ = exporter.from_notebook_node(notebook)
    for i, formula in enumerate(formulas):
        page = page.replace(f"FORMULA-{i}.", formula)
    page = page.replace(f"{ROOT}/", "").replace(str(ROOT), "this one")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def take_formulas(markdown: str, formulas: list[str]) -> str:
    """Markdown with names in the places of its formulas, which are added to the list as MathML.

    Put in before the export they would not survive it: its parser closes MathML's tags at once.
    """
    def taken(found):
        block, inline = found.groups()
        display = "block" if block else "inline"
        formulas.append(latex2mathml.converter.convert(block or inline, display=display))
        return f"FORMULA-{len(formulas) - 1}."
    return re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", taken, markdown, flags=re.DOTALL)


def without_widgets(output):
    """A remark in the place of the panel, nothing in that of a progress bar."""
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" not in data:
        return output
    if not data["text/plain"].startswith("VBox"):
        return None
    remark = "<p><i>Here a live notebook shows the panel.</i></p>"
    return nbformat.v4.new_output("display_data", data={"text/html": remark})


def literal(text: str):
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=lambda p: Path(p).absolute())
    parser.add_argument("--html", type=lambda p: Path(p).absolute())
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("names", nargs="*", help="parts of notebooks' names; none for all")
    args = parser.parse_args()
    html = args.html
    if html is None and os.environ.get("TRAIN") == "no":
        html = ROOT / "report/notebooks"
    parameters = {name: literal(value) for name, value in args.p}
    for path in NOTEBOOKS:
        if args.names and not any(name in path.name for name in args.names):
            continue
        print(f"{path.name} ...", end=" ", flush=True)
        print(f"{execute(path, args.out, html, parameters):.0f} s", flush=True)


if __name__ == "__main__":
    main()
