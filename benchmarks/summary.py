"""The stored ratios that a user asks for, as a table: benchmarks/README.md holds it.

    python benchmarks/summary.py
"""
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

# (file, its row): what the table calls it
ROWS = {
    ("sparse_cpu", "round, least_sensitive"): "a round, least sensitive tenth, over all weights",
    ("sparse_cpu", "peak memory, least_sensitive"): "its peak memory, over all weights",
    ("sparse_cpu", "round, random"): "a round, random tenth, over all weights",
    ("sparse_cpu", "peak memory, random"): "its peak memory, over all weights",
    ("sparse_cpu", "round, gradients of all"):
        "a round, least sensitive tenth, gradients of all weights computed, over all weights",
    ("workers_cpu", "4 runs in 2 processes, over one"): "a grid of runs by two workers, over one",
    ("round_cost_cpu", "round"): "a round, over its local steps alone",
    ("round_cost_cpu", "calibration"): "calibration, over a forward and backward pass a sample",
    ("against_naive_cpu", "round"): "a round, over a plain loop of deep copies",
    ("against_naive_cpu", "peak memory"): "its peak memory, over a plain loop",
    ("gpu_gpu", "round: fp16 over bf16"): "on the GPU, a round in fp16, over bf16",
    ("gpu_gpu", "round: float32 over bf16"): "on the GPU, a round in float32, over bf16",
    ("against_flower_cpu", "round"):
        "a round in two processes, over Flower's simulation engine in two",
    ("against_flower_cpu", "peak memory"):
        "peak memory of a lighter round in one process, over Flower's simulation engine in two",
}


def table() -> str:
    """Markdown: a row a comparison, the median ratio with its quartiles by model and image size."""
    lines = ["| what | model | ratio | quartiles |", "|---|---|---|---|"]
    for (file, what), words in ROWS.items():
        content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        for row in content["rows"]:
            if row["what"] != what:
                continue
            quartiles = ""
            if "q1" in row:
                quartiles = f"{row['q1']:.2f} to {row['q3']:.2f}"
            model = {"mini": "small ViT"}.get(row["model"], row["model"])
            cells = [words, f"{model}, {row['px']} px", f"{row['ratio']:.2f}", quartiles]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
