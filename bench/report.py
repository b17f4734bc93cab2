"""`python -m bench.report [RESULTS.json ...]`: results as markdown tables and SVG plots, beside the results.

`--readme` also puts a short table into README.md, between its two bench marks. `--faster` also writes
lgkernels/core/faster.json: which backend of an op is the fastest on which architecture.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from .timing import slug

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
MARKS = "<!-- bench: begin -->\n", "<!-- bench: end -->"
FASTER = ROOT / "lgkernels" / "core" / "faster.json"
RIVALS = "lean", "compiled", "eager", "peer", "bp"  # roles of those that we can lose to


# -- files ------------------------------------------------------------


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def read(path):
    data = json.loads(path.read_text())
    if any("role" not in row for row in data["rows"]):
        raise ValueError(f"{path} has rows without a role, of an older bench: measure them again into a new file")
    return data


def merge(path, environment, ceilings, rows):
    """Put rows into a results file; a row replaces the one of the same case, contestant and page size."""
    path = Path(path) if path else RESULTS / f"{slug(environment['device'])}.json"
    before = read(path)["rows"] if path.exists() else []
    merged = {(row["case"], row["provider"], row["huge_pages"]): row for row in [*before, *rows]}
    write_json(path, {"environment": environment, "ceilings": ceilings, "rows": list(merged.values())})


# -- rows ------------------------------------------------------------


def cases(rows):
    """{case: {contestant: row}}: the ops in the order of the file, and so the cases of an op."""
    by_op = {}
    for row in rows:
        by_op.setdefault(row["op"], {}).setdefault(row["case"], {})[row["provider"]] = row
    return {case: contestants for of_op in by_op.values() for case, contestants in of_op.items()}


def in_roles(contestants, roles):
    """Rows of these roles, on the case's own terms."""
    return [row for row in contestants.values() if row["role"] in roles and not row["variant"]]


def short_title(row):
    return row["title"].split(",")[0].split(":")[0]


def number(value):
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def milliseconds(row):
    return f"{number(row['median_ms'])} ms"


def megabytes(row):
    return f"{peak(row)} MB"


def peak(row):
    """Megabytes, where torch has counted them."""
    return "?" if row["peak_bytes"] is None else number(row["peak_bytes"] / 1e6)


def rates(row):
    parts = []
    if "gb_s" in row:
        parts.append(f"{row['gb_s']:.0f} GB/s, {100 * row['fraction_of_copy']:.0f} % of copy")
    if "tflop_s" in row:
        parts.append(f"{row['tflop_s']:.3g} TFLOP/s, {100 * row['fraction_of_matmul']:.0f} % of matmul")
    return "; ".join(parts)


# -- the full tables ------------------------------------------------------------


def losses(rows):
    """Cases in which a rival is faster than our fastest, or needs less memory than our leanest."""
    found = []
    for contestants in cases(rows).values():
        ours, rivals = in_roles(contestants, ["ours"]), in_roles(contestants, RIVALS)
        if not ours or not rivals:
            continue
        for field, text in (("median_ms", milliseconds), ("peak_bytes", megabytes)):
            known = [[row for row in group if row[field] is not None] for group in (ours, rivals)]
            if not all(known):
                continue
            best, rival = (min(group, key=lambda row: row[field]) for group in known)
            if rival[field] < best[field]:
                found.append(
                    f"{best['title']}, {best['label']}: {rival['provider']} takes {text(rival)}, "
                    f"{best['provider']} {text(best)}."
                )
    return found


def table(header, lines):
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]


def case_table(contestants, huge):
    """Contestants of a case, the fastest first; `huge`: their rows with huge pages, if there are any."""
    baseline = next(iter(contestants.values()))["baseline"]
    header = ["provider", "ms", f"/ {baseline}", "rate", "peak MB"]
    header += ["ms, huge pages", f"/ {baseline}"] if huge else []
    lines = []
    for name, row in sorted(contestants.items(), key=lambda item: item[1]["median_ms"]):
        times = [number(row["median_ms"]), f"{row['ratio']:.2f}"]
        line = [name, *times, rates(row), peak(row)]
        if huge:
            other = huge.get(name)
            line += [number(other["median_ms"]), f"{other['ratio']:.2f}"] if other else ["", ""]
        lines.append(line)
    return table(header, lines)


def heading(data):
    environment, ceilings = data["environment"], data["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in environment.items() if k != "device" and v is not None)
    return [
        f"# {environment['device']}",
        "",
        f"{versions}; copy {ceilings['copy_gb_s']:.0f} GB/s, matmul "
        f"{ceilings['matmul_tflop_s']:.3g} TFLOP/s ({ceilings['matmul_dtype']}).",
        "",
        "Medians over interleaved rounds; a ratio is the median over the rounds of a provider's time divided by "
        "the baseline's in the same round. Peak memory is what a call holds beyond its inputs and parameters.",
    ]


def markdown(data):
    lines, title = heading(data), None
    plain = [row for row in data["rows"] if not row["huge_pages"]]
    huge = cases(row for row in data["rows"] if row["huge_pages"])
    for name, contestants in cases(plain).items():
        first = next(iter(contestants.values()))
        if first["title"] != title:
            title = first["title"]
            lines += ["", f"## {title}"]
        lines += ["", f"**{first['label']}**", "", *case_table(contestants, huge.get(name, {}))]
    lines += ["", "## Where we lose", "", *([f"- {line}" for line in losses(plain)] or ["Nowhere in these cases."])]
    return "\n".join(lines) + "\n"


# -- README's table ------------------------------------------------------------


def fastest(contestants, roles):
    return min(in_roles(contestants, roles), key=lambda row: row["ratio"], default=None)


def summary_cell(contestants):
    """Of one case on one device: our fastest contestant, then the fastest rival, the faster of both in bold."""
    ours, rival = fastest(contestants, ["ours"]), fastest(contestants, RIVALS)
    if ours is None:
        return ""
    own, time = f"{ours['ratio']:.2f}", milliseconds(ours)
    if rival is None:
        return f"**{own}** ({time})"
    other = f"{rival['ratio']:.2f}"
    if ours["ratio"] <= rival["ratio"]:
        return f"**{own}** ({time}); {other} {rival['provider']}"
    return f"{own} ({time}); **{other}** {rival['provider']}"


def summary(all_results):
    """One table for all devices, side by side: a line for every case that one of them has."""
    by_device = [cases(row for row in data["rows"] if not row["huge_pages"]) for data in all_results]
    environments = [data["environment"] for data in all_results]
    header = ["case", "baseline", *(environment["device"] for environment in environments)]
    lines = []
    for case in dict.fromkeys(case for of_device in by_device for case in of_device):
        found = [of_device.get(case, {}) for of_device in by_device]
        contestants = max((c for c in found if fastest(c, ["ours"])), key=len, default=None)
        if contestants is None:
            continue
        ours = fastest(contestants, ["ours"])
        memory = [ours, *filter(None, (fastest(contestants, roles) for roles in (["eager", "peer"], ["bp"])))]
        cells = [summary_cell(contestants) for contestants in found]
        megabytes_each = ", ".join(map(peak, memory))
        lines.append([f"{short_title(ours)} {ours['label']}", ours["baseline"], *cells, megabytes_each])
    torches = "; ".join(f"{e['device']}: torch {e['torch']}" for e in environments)
    about = f"Time / baseline: ours; the fastest rival's. The faster in bold. {torches}."
    return "\n".join([about, "", *table([*header, "MB: lgkernels, eager, BP"], lines)]) + "\n"


def put_into_readme(text):
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    readme.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1], 1)[1])


# -- plots ------------------------------------------------------------


def plot(data, path):
    """Horizontal bars: time relative to the baseline, one panel a case; the reference, no rival, is left out."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same results give the same file
    selected = cases(row for row in data["rows"] if not row["huge_pages"] and row["role"] != "reference")
    heights = [len(contestants) + 1.5 for contestants in selected.values()]
    figure, axes = plt.subplots(
        len(selected),
        1,
        figsize=(8, 0.28 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for axis, contestants in zip(axes[:, 0], selected.values()):
        plot_case(axis, sorted(contestants.values(), key=lambda row: -row["ratio"]))
    figure.suptitle(f"{data['environment']['device']}: time / baseline", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_case(axis, rows):
    names, ratios = [row["provider"] for row in rows], [row["ratio"] for row in rows]
    colours = ["#1f77b4" if row["role"] == "ours" else "#bbbbbb" for row in rows]
    bars = axis.barh(names, ratios, color=colours)
    axis.bar_label(bars, [f"{row['ratio']:.2f}  ({milliseconds(row)})" for row in rows], padding=3, fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_title(f"{rows[0]['title']}: {rows[0]['label']}".replace("`", ""), fontsize=8, loc="left")
    axis.set_xlim(0, 1.25 * ratios[0])
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


# -- which backend is the fastest ------------------------------------------------------------


def mean_ratios(rows):
    """{op: {GPU backend: mean of its times relative to the baselines, over the cases that measure this op}}."""
    found = {}
    for row in rows:
        if row["backend"] in ("triton", "cuda") and not row["variant"]:
            found.setdefault(row["registered_op"], {}).setdefault(row["backend"], []).append(row["ratio"])
    return {op: {b: statistics.fmean(ratios) for b, ratios in backends.items()} for op, backends in found.items()}


def write_faster(all_results):
    """Merge {op: {architecture: [backends, fastest first]}} into faster.json (core/dispatch.py), from GPUs' results."""
    found = json.loads(FASTER.read_text()) if FASTER.exists() else {}
    measured = False
    for results in all_results:
        architecture = results["environment"].get("capability")
        for op, ratios in mean_ratios(results["rows"] if architecture else []).items():
            found.setdefault(op, {})[architecture] = sorted(ratios, key=ratios.__getitem__)
            measured = True
    if measured:
        write_json(FASTER, found)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: all of bench/results")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="write the files, print nothing")
    parser.add_argument("--faster", action="store_true", help="write lgkernels/core/faster.json from those of GPUs")
    options = parser.parse_args(arguments)
    paths = options.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        print(f"no results in {RESULTS}: run python -m pytest bench -q --save", file=sys.stderr)
        return 1
    all_results = [read(path) for path in paths]
    for path, data in zip(paths, all_results):
        text = markdown(data)
        if not options.no_plots:
            plot(data, path.with_suffix(".svg"))
            text += f"\n![time relative to the baseline]({path.stem}.svg)\n"
        path.with_suffix(".md").write_text(text)
        if not options.quiet:
            print(text)
    if options.faster:
        write_faster(all_results)
    if options.readme:
        put_into_readme(summary(all_results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
