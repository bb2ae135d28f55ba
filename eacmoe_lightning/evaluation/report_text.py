"""The report as text: a few lines for the terminal, and `report.md`."""

from __future__ import annotations

import math
from typing import Any

from eacmoe_lightning.calibration.blocks import PHASES
from eacmoe_lightning.evaluation.coverage import coverage_lines
from eacmoe_lightning.evaluation.divergence_table import COLUMNS, divergence_rows
from eacmoe_lightning.routers.expert_shift import RATES
from eacmoe_lightning.run.files import first_of

NO_PERPLEXITY = "no held-out text was evaluated"


def summary(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    bits, size, shift = report["bits"], report["size_bytes"], report["expert_shift"]["mean"]
    stored = f" in {report['model']['stored']}" if "stored" in report["model"] else ""
    lines = [
        "",
        f"{report['model']['name_or_path']}: {report['model']['blocks']} blocks, {report['model']['experts']} experts, "
        f"top {report['model']['top_k']}, router {report['router']['method']}",
        f"bits {bits['nominal']:.2f} nominal, {bits['true']:.2f} with scales and zero points; "
        f"{size['original'] / 1e6:.1f} MB{stored} -> {size['compressed'] / 1e6:.1f} MB",
    ]
    if allocation := report.get("allocation"):
        asked = ", ".join(f"{name} {value:g}" for name, value in allocation["asked"].items())
        parts = ", ".join(f"{part} {nats:.4f}" for part, nats in allocation["predicted_by_part"].items() if nats)
        lines.append(
            f"bits chosen for {asked}; predicted for GPTQ alone, on calibration text: KL divergence "
            f"{allocation['predicted']:.4f} ({parts})"
        )
    if unquantized := report.get("unquantized"):
        lines.append(f"unquantized (report.md says why): {first_of(list(unquantized), 'linear')}")
    if uncalibrated := report["router"].get("uncalibrated"):
        blocks = ", ".join(map(str, uncalibrated))
        lines.append(f"routers that stay as they are, because they are no single product: those of blocks {blocks}")
    if pruning := report.get("pruning"):
        lines.append(
            f"{pruning['removed']} of {pruning['experts']} experts removed ({pruning['rule']['criterion']}), to which "
            f"{pruning['removed_selections']:.2%} of the selections went"
        )
        if pruning["below_alpha"]:
            lines.append(
                f"{pruning['below_alpha']} experts are below alpha and stay: a token selects {report['model']['top_k']}"
            )
    texts = (report.get("divergence") or {}).get("texts", {})
    for text, values in report["perplexity"].items():
        line = f"perplexity {text:10s} {values['original']:8.3f} -> {values['compressed']:8.3f}"
        if figures := texts.get(text, {}).get("compressed"):
            kl = figures["kl"]
            line += f"; KL divergence {kl['mean']:.4f} ± {kl['error']:.4f}, same top token {figures['same_top']:.1%}"
        lines.append(line)
    if not report["perplexity"]:
        lines.append(f"{NO_PERPLEXITY}; changed selections are those on the calibration text")
    for rate in RATES:
        rates = " -> ".join(f"{shift[when][rate]:.2%}" for when in ("before", "after") if when in shift)
        lines.append(f"tokens with {rate:4s} selections changed: {rates}")
    lines += coverage_lines(report)
    for name, text in report.get("sampled", {}).items():
        lines.append(
            f"{name}: {text['tokens']} tokens written by {text['model']}, {text['documents']} documents of "
            f"{text['document_tokens']:.0f} tokens in the mean; {_largest(text['languages'])}"
        )
    cost = report["cost"]
    starved = f"{report['experts']['starved']} starved experts; " if "experts" in report else ""
    lines.append(f"{starved}{cost['total_seconds']:.0f} s in total")
    if calibration := sum(cost[phase]["seconds"] for phase in (*PHASES, "joint") if phase in cost):
        stages = {"router per block": "router", "block stage": "block", "joint stage": "joint"}
        shares = [f"{k} {cost[phase]['seconds'] / calibration:.1%}" for k, phase in stages.items() if phase in cost]
        if shares:
            lines.append(f"shares of the {calibration:.0f} s of calibration: " + ", ".join(shares))
    return "\n".join(lines)


def evaluation_summary(result: dict[str, Any], size_bytes: dict[str, int]) -> str:
    """The output of `validate` and `test`: perplexity per text and change rates per block."""
    streams = list(next(iter(result["perplexity"].values())))
    lines = ["", "size: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in size_bytes.items())]
    lines.append(f"{'perplexity':12s} " + " ".join(f"{name:>16s}" for name in streams))
    lines += [
        f"{text:12s} " + " ".join(f"{values[name]:16.3f}" for name in streams)
        for text, values in result["perplexity"].items()
    ]
    if divergence := result["divergence"]:
        streams = list(divergence["mean"])
        lines.append(f"{'KL':12s} " + " ".join(f"{name:>16s}" for name in streams))
        lines += [
            f"{text:12s} " + " ".join(f"{values[n]['kl']['mean'] if values[n] else math.nan:16.5f}" for n in streams)
            for text, values in divergence["texts"].items()
        ]
        lines.append(f"{'same top':12s} " + " ".join(f"{name:>16s}" for name in streams))
        lines += [
            f"{text:12s} " + " ".join(f"{values[n]['same_top'] if values[n] else math.nan:16.2%}" for n in streams)
            for text, values in divergence["texts"].items()
        ]
    if shift := result["expert_shift"]:
        rates = list(shift["mean"])
        lines.append(f"{'changed':12s} " + " ".join(f"{rate:>16s}" for rate in rates))
        rows = [(f"block {row['block']}", row) for row in shift["blocks"]] + [("mean", shift["mean"])]
        lines += [f"{name:12s} " + " ".join(f"{row[rate]:16.2%}" for rate in rates) for name, row in rows]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    shift, cost = report["expert_shift"], report["cost"]
    parts = [
        f"# {report['model']['name_or_path']} at {report['bits']['nominal']:.2f} bits",
        f"```\n{summary(report).strip()}\n```",
        f"Command: `{report['command']}`  \nCommit: {report['commit']}  \nSeed: {report['seed']}  \n"
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f"  \n{report['machine']['processor']}, {report['machine']['threads']} threads",
        f"## Perplexity on held-out text\n\n{_perplexity_table(report['perplexity'])}",
        *([_divergence_table(report)] if report.get("divergence") else []),
        _size_table(report),
        *([_allocation_table(report)] if "allocation" in report else []),
        "## Expert-shift per block\n\nShare of tokens with any, at least half, or all selections changed. Weighted: "
        "how far changed selections alone move the experts' output, relative to it, mean over all tokens; empty where "
        "no known rule gives the router's weights.\n\n"
        + _table(
            ["block", "text", *(f"{r} {w}" for r in (*RATES, "weighted") for w in ("before", "after"))],
            [
                [
                    row["block"],
                    text,
                    *(
                        f"{row[text][when][rate]:.2%}" if rate in row[text].get(when, {}) else ""
                        for rate in (*RATES, "weighted")
                        for when in ("before", "after")
                    ),
                ]
                for row in shift["blocks"]
                for text in ("calibration", "heldout")
                if text in row
            ],
        ),
        *([_sampled_table(report["sampled"])] if "sampled" in report else []),
        *([_unquantized_list(report["unquantized"])] if report.get("unquantized") else []),
        *([_starved_list(report["experts"])] if "experts" in report else []),
        *([_pruning_table(report["pruning"])] if "pruning" in report else []),
        "## Cost\n\n"
        + _table(["phase", "seconds", "share", "peak MB", "from disk MB", "to disk MB"], [
            [p, f"{c['seconds']:.1f}", f"{c['share']:.1%}",
             *(f"{c[size] / 2**20:.0f}" for size in ("peak_bytes", "read_bytes", "written_bytes"))]
            for p, c in cost.items() if isinstance(c, dict)
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _perplexity_table(texts: dict[str, dict[str, float]]) -> str:
    if not texts:
        return f"None: {NO_PERPLEXITY}."
    streams = [stream for stream in ("original", "before", "compressed") if stream in next(iter(texts.values()))]
    return "`original`: the original model. `before`: the compressed model with the original's routers.\n\n" + _table(
        ["text", *streams], [[text, *(f"{values[s]:.3f}" for s in streams)] for text, values in texts.items()]
    )


def _divergence_table(report: dict[str, Any]) -> str:
    divergence = report["divergence"]
    distances = [[row["block"], *(f"{row[s]:.2%}" for s in row if s != "block")] for row in divergence["blocks"]]
    return (
        "## Divergence from the original\n\nNames and formulas of llama.cpp's `--kl-divergence`; nats per token. "
        "± is one standard error, as if tokens were independent. Noise floor: the original with its activations "
        "rounded to bfloat16 after each block.\n\n"
        + _table(["text", *COLUMNS], divergence_rows(report))
        + "\n\nMean KL divergence by the original's highest probability, with the share of tokens:\n\n"
        + _by_confidence(divergence["texts"])
        + "\n\nDistance of the hidden states after each block from the original's, relative to their length:\n\n"
        + _table(["block", *(s.replace("_", " ") for s in divergence["blocks"][0] if s != "block")], distances)
    )


def _by_confidence(texts: dict[str, Any]) -> str:
    rows = {text: streams["compressed"]["by_confidence"] for text, streams in texts.items() if streams["compressed"]}
    bins = [f"{row['from']:g} to {row['to']:g}" for row in next(iter(rows.values()), [])]
    cells = [
        [text, *("" if b["kl"] is None else f"{b['kl']:.4f} ({b['share']:.0%})" for b in bins_of)]
        for text, bins_of in rows.items()
    ]
    return _table(["text", *bins], cells)


def _size_table(report: dict[str, Any]) -> str:
    bits, size = report["bits"], report["size_bytes"]
    rows = [
        ["files of weights", f"{size['original'] / 1e6:.1f} MB", f"{size['compressed'] / 1e6:.1f} MB"],
        ["bits per weight, all weights and everything stored", f"{bits['original']:.2f}", f"{bits['all']:.2f}"],
        ["bits per quantized weight, with scales and zero points", "", f"{bits['true']:.2f}"],
        ["bits per quantized weight, codes alone", "", f"{bits['nominal']:.2f}"],
    ]
    if "head" in bits:
        what = "bits per weight of the output head, and of an embedding quantized with it, which these leave out"
        rows.append([what, "", f"{bits['head']:.2f}"])
    return "## Size\n\n" + _table(["", "original", "compressed"], rows)


def _allocation_table(report: dict[str, Any]) -> str:
    allocation = report["allocation"]
    asked = ", ".join(f"{name} {value:g}" for name, value in allocation["asked"].items())
    texts = (report.get("divergence") or {}).get("texts", {})
    measured = ", ".join(f"{text} {streams['compressed']['kl']['mean']:.4f}" for text, streams in texts.items())
    rows = [[f"{row['bits']:.3f}", f"{row['nbytes'] / 1e9:.4g}", f"{row['damage']:.4f}"] for row in allocation["curve"]]
    return (
        f"## Bits chosen by size\n\nFor {asked}: {allocation['bits']:.4f} bits a weight, for which a divergence of "
        f"{allocation['predicted']:.4f} was predicted (GPTQ alone, calibration text)"
        + (f"; measured on held-out text: {measured}" if measured else "")
        + ". Other sizes:\n\n"
        + _table(["bits", "GB of quantized weights", "predicted divergence"], rows)
    )


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _largest(shares: dict[str, float], number: int = 4) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:number])


def _sampled_table(sampled: dict[str, Any]) -> str:
    head = ["text", "written by", "windows", "tokens", "chosen", "documents", "mean length", "languages", "scripts"]
    rows = [
        [
            name,
            text["model"],
            *(text[key] for key in ("windows", "tokens", "chosen", "documents")),
            f"{text['document_tokens']:.0f}",
            _largest(text["languages"]),
            _largest(text["scripts"]),
        ]
        for name, text in sampled.items()
    ]
    return (
        "## Sampled calibration text\n\nChosen: tokens that the model was not given. Languages: shares of the windows, "
        "told by frequent words; other: code, tables and the like. Scripts: shares of the letters.\n\n"
        + _table(head, rows)
    )


def _unquantized_list(unquantized: dict[str, str]) -> str:
    return "## Linears that stay unquantized\n\n" + "\n".join(f"- {n}: {reason}" for n, reason in unquantized.items())


def _starved_list(experts: dict[str, Any]) -> str:
    lines = [f"- block {block}: starved experts {numbers}" for block, numbers in experts["starved_by_block"].items()]
    return "## Experts\n\n" + ("\n".join(lines) or "No expert was starved of calibration tokens.")


def _pruning_table(pruning: dict[str, Any]) -> str:
    rule = ", ".join(f"{name} {value}" for name, value in pruning["rule"].items() if value is not None)
    rows = [
        [
            block,
            len(s["kept"]),
            " ".join(map(str, s["removed"])) or "none",
            f"{s['removed_selections']:.2%}",
            " ".join(map(str, s["below_alpha"])) or "none",
        ]
        for block, s in pruning["blocks"].items()
    ]
    return (
        f"## Removed experts\n\nRule: {rule}. Selections: the share on the calibration text that went to them. Below "
        "alpha: experts that stay because a token selects top_k.\n\n"
        + _table(["block", "stay", "removed", "selections", "below alpha"], rows)
    )
