"""A zip of all that Overleaf needs: python -m report.overleaf writes report/overleaf.zip.

Its files lie flat, but for tables/ and figures/; the main document is report.tex.
"""
import re
import sys
import zipfile
from pathlib import Path

from report.claims import REPORT
from utils import ROOT

SOURCES = ("report.tex", "macros.tex", "abstract.tex", "text.tex", "numbers.tex",
           "references.bib")
LONG_AGO = (1980, 1, 1, 0, 0, 0)   # one date for all files: the same bytes from the same files


def files() -> dict[str, Path]:
    """{place in the zip: file}; of the figures those that the text shows and that are drawn."""
    found = {name: REPORT / name for name in SOURCES}
    for table in sorted((REPORT / "tables").glob("*.tex")):
        found[f"tables/{table.name}"] = table
    numbers = (REPORT / "numbers.tex").read_text(encoding="utf-8")
    part = re.search(r"\\setsetting\{figures\}\{(.*?)\}", numbers)
    drawn = ROOT / "figures" / (part[1] if part else "")
    text = (REPORT / "text.tex").read_text(encoding="utf-8")
    for name in re.findall(r"\\plot(?:\[figure\*\])?\{(\w+)\}", text):
        figure = drawn / f"{name}.pdf"
        if figure.is_file():
            found[f"figures/{name}.pdf"] = figure
    return found


def make_zip(target: Path):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for place, file in files().items():
            archive.writestr(zipfile.ZipInfo(place, LONG_AGO), file.read_bytes())


def main():
    target = REPORT / "overleaf.zip"
    make_zip(target)
    print(f"{target}: upload it to Overleaf as a new project")


if __name__ == "__main__":
    sys.exit(main())
