"""`python -m bench.report [RESULTS.json ...]`: results as markdown tables and SVG plots, beside the results.

`--readme` also puts a short table into README.md, between its two bench marks. `--verified GPU_CHECK.json` also writes
lgkernels/core/verified.json: which backends passed the GPU tests, and where.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from .timing import slug

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
REFERENCE = "lgkernels reference"
MARKS = "<!-- bench: begin -->\n", "<!-- bench: end -->"
VERIFIED = ROOT / "lgkernels" / "core" / "verified.json"
TITLES = {
    "lls_loss": "`lls_loss`, forward and backward",
    "lls_block": "Fused block: forward, local loss and all gradients",
    "norm_act_pool": "`norm_act_pool`: one pass over memory",
    "grad_preactivation_": "`grad_preactivation_`: one pass over memory, in place",
    "vgg8_step": "VGG8 training step",
    "feedback_linear": "Feedback in a linear layer, forward and backward",
    "feedback_conv2d": "Feedback in a 3x3 convolution, forward and backward",
    "feedback_product": "The product with the feedback matrix alone",
    "feedback_step": "Linear layer: forward, backward and SGD with momentum",
    "dfa_step": "VGG8 training step with direct feedback",
    "local_cross_entropy": "Local classifier: pool, linear, cross entropy; forward and backward, h not a leaf",
    "local_goodness": "Forward-Forward's goodness, forward and backward",
    "local_similarity": "Similarity matching, forward and backward",
    "offset_step": "SGD with momentum and an offset, one step over all parameters",
    "lokr_linear": "LoKr adapter around a frozen linear layer, forward and backward",
}


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def merge(path, environment, ceilings, rows):
    """Put rows into a results file; a row replaces the one of the same case, provider and page size."""
    path = Path(path) if path else RESULTS / f"{slug(environment['device'])}.json"
    data = json.loads(path.read_text()) if path.exists() else {"rows": []}
    key = lambda row: (row["case"], row["provider"], row["huge_pages"])  # noqa: E731
    merged = {key(row): row for row in data["rows"]}
    merged.update({key(row): row for row in rows})
    write_json(path, {"environment": environment, "ceilings": ceilings, "rows": list(merged.values())})


def _shape(row):
    size = [row[k] for k in ("batch", "channels", "out_channels") if row[k]] + [row["size"]] * bool(row["size"])
    notes = [f"P={row['pool']}", f"{row['classes']} classes"] if row["op"] != "vgg8_step" else []
    notes = [row["rule"]] if row.get("rule") else notes
    notes += [row["modulation"]] * bool(row["modulation"]) + ["max-pool"] * row["max_pool"]
    notes += [row["dtype"]] * (row["dtype"] != "float32") + ["channels_last"] * row["channels_last"]
    return ", ".join(["(" + ", ".join(map(str, size)) + ")", *notes])


def _number(value):
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def cases(rows):
    """{case name: {provider: row}} in the order of the file."""
    grouped = {}
    for row in rows:
        grouped.setdefault(row["case"], {})[row["provider"]] = row
    return grouped


def losses(rows):
    """Cases in which another provider is faster than our fastest, or needs less memory than our leanest."""
    found = []
    for providers in cases(rows).values():
        ours = [r for name, r in providers.items() if name.startswith("lgkernels") and name != REFERENCE]
        others = [r for name, r in providers.items() if not name.startswith(("lgkernels", "floor"))]
        for field, unit, scale in (("median_ms", "ms", 1), ("peak_bytes", "MB", 1e-6)):
            if ours and others:
                best, rival = (min(group, key=lambda r: r[field]) for group in (ours, others))
                if rival[field] < best[field]:
                    found.append(
                        f"{TITLES[best['op']]}, {_shape(best)}: {rival['provider']} takes "
                        f"{_number(rival[field] * scale)} {unit}, {best['provider']} "
                        f"{_number(best[field] * scale)} {unit}."
                    )
    return found


def rates(row):
    parts = []
    if "gb_s" in row:
        parts.append(f"{row['gb_s']:.0f} GB/s, {100 * row['fraction_of_copy']:.0f} % of copy")
    if "tflop_s" in row:
        parts.append(f"{row['tflop_s']:.3g} TFLOP/s, {100 * row['fraction_of_matmul']:.0f} % of matmul")
    return "; ".join(parts)


def markdown(data):
    environment, ceilings = data["environment"], data["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in environment.items() if k != "device" and v is not None)
    lines = [
        f"# {environment['device']}",
        "",
        versions + f"; copy {ceilings['copy_gb_s']:.0f} GB/s, matmul "
        f"{ceilings['matmul_tflop_s']:.3g} TFLOP/s ({ceilings['matmul_dtype']}).",
        "",
        "Medians over interleaved rounds; a ratio is the median over the rounds of a provider's time divided by "
        "the baseline's in the same round. Peak memory is what a call holds beyond its inputs and parameters.",
    ]
    plain = [row for row in data["rows"] if not row["huge_pages"]]
    huge = cases(row for row in data["rows"] if row["huge_pages"])
    for op, title in TITLES.items():
        selected = cases(row for row in plain if row["op"] == op)
        if not selected:
            continue
        lines += ["", f"## {title}"]
        for name, providers in selected.items():
            baseline = next(iter(providers.values()))["baseline"]
            pages = huge.get(name, {})
            header = ["provider", "ms", f"/ {baseline}", "rate", "peak MB"]
            header += ["ms, huge pages", f"/ {baseline}"] if pages else []
            lines += [
                "",
                f"**{_shape(next(iter(providers.values())))}**",
                "",
                "| " + " | ".join(header) + " |",
                "|" + " --- |" * len(header),
            ]
            for provider, row in sorted(providers.items(), key=lambda item: item[1]["median_ms"]):
                cells = [
                    provider,
                    _number(row["median_ms"]),
                    f"{row['ratio']:.2f}",
                    rates(row),
                    _number(row["peak_bytes"] / 1e6),
                ]
                if pages:
                    other = pages.get(provider)
                    cells += [_number(other["median_ms"]), f"{other['ratio']:.2f}"] if other else ["", ""]
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Where we lose", ""] + ([f"- {line}" for line in losses(plain)] or ["Nowhere in these cases."])
    return "\n".join(lines) + "\n"


def summary(data):
    """One row a case: our fastest provider, and the ratios to the baseline of its rivals."""
    groups = {
        "lean torch": ("lean torch",),
        "torch.compile": ("lean torch.compile", "torch.compile"),
        "eager, BioTorch": ("eager, basis cached", "eager LLS, basis cached", "BioTorch", "eager", "add, SGD foreach"),
        "BP": ("bp layer", "bp", "nn.Linear", "nn.Conv2d", "torch.mm with W"),
    }
    lines = [
        f"{data['environment']['device']}, torch {data['environment']['torch']}. Time / baseline:",
        "",
        "| case | baseline | lgkernels | " + " | ".join(groups) + " | MB: lgkernels, eager, BP |",
        "|---|---|---|" + "---|" * (len(groups) + 1),
    ]
    for providers in cases(row for row in data["rows"] if not row["huge_pages"]).values():
        # a channels_last row is left out: its own floor is another one, and stands in the full table
        ours = [
            row
            for name, row in providers.items()
            if name.startswith("lgkernels")
            and name != REFERENCE
            and not name.endswith((", channels_last", "bfloat16 offsets"))
        ]
        if not ours and "frozen nn.Linear" in providers:  # adapters have no other
            ours = [providers[REFERENCE]]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["median_ms"])
        rivals = [next((providers[name] for name in names if name in providers), None) for names in groups.values()]
        memory = [_number(row["peak_bytes"] / 1e6) if row else "" for row in (best, *rivals[2:])]
        lines.append(
            f"| {TITLES[best['op']].split(',')[0].split(':')[0]} {_shape(best)} | {best['baseline']} | "
            f"**{best['ratio']:.2f}** ({_number(best['median_ms'])} ms) | "
            + " | ".join(f"{row['ratio']:.2f}" if row else "" for row in rivals)
            + f" | {', '.join(filter(None, memory))} |"
        )
    return "\n".join(lines) + "\n"


def plot(data, path):
    """Horizontal bars: time relative to the baseline, one panel a case; the reference, no rival, is left out."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same results give the same file
    selected = cases(row for row in data["rows"] if not row["huge_pages"] and row["provider"] != REFERENCE)
    heights = [len(providers) + 1.5 for providers in selected.values()]
    figure, axes = plt.subplots(
        len(selected),
        1,
        figsize=(8, 0.28 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for axis, providers in zip(axes[:, 0], selected.values()):
        ordered = sorted(providers.values(), key=lambda row: -row["ratio"])
        colours = ["#1f77b4" if row["provider"].startswith("lgkernels") else "#bbbbbb" for row in ordered]
        bars = axis.barh([row["provider"] for row in ordered], [row["ratio"] for row in ordered], color=colours)
        axis.bar_label(
            bars, [f"{row['ratio']:.2f}  ({_number(row['median_ms'])} ms)" for row in ordered], padding=3, fontsize=7
        )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{TITLES[ordered[0]['op']]}: {_shape(ordered[0])}".replace("`", ""), fontsize=8, loc="left")
        axis.set_xlim(0, 1.25 * ordered[0]["ratio"])
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{data['environment']['device']}: time / baseline", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_verified(check, results):
    """Merge the outcome of the GPU tests into verified.json; on each architecture the faster backend comes first."""
    architecture = check["environment"]["capability"]
    passed = {op: backends for part in check.values() for op, backends in part.get("passed", {}).items()}
    table = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {}
    for op, backends in passed.items():

        def milliseconds(backend, op=op):
            times = [
                row["median_ms"] / providers["floor"]["median_ms"]
                for providers in cases(results["rows"]).values()
                if "floor" in providers
                for row in [providers.get(f"lgkernels {backend}")]
                if row and row["op"] == op
            ]
            return sum(times) / len(times) if times else float("inf")

        table.setdefault(op, {})[architecture] = sorted(backends, key=milliseconds)
    write_json(VERIFIED, table)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: all of bench/results")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="write the files, print nothing")
    parser.add_argument("--verified", type=Path, metavar="GPU_CHECK.json")
    options = parser.parse_args(arguments)
    paths = options.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        print(f"no results in {RESULTS}: run python -m pytest bench -q --save", file=sys.stderr)
        return 1
    tables = []
    for path in paths:
        data = json.loads(path.read_text())
        text = markdown(data)
        if not options.no_plots:
            plot(data, path.with_suffix(".svg"))
            text += f"\n![time relative to the baseline]({path.stem}.svg)\n"
        path.with_suffix(".md").write_text(text)
        if not options.quiet:
            print(text)
        tables.append(summary(data))
        if options.verified:
            write_verified(json.loads(options.verified.read_text()), data)
    if options.readme:
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        readme.write_text(before + MARKS[0] + "\n".join(tables) + MARKS[1] + rest.split(MARKS[1], 1)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
