"""The report of an evaluation as one HTML file that opens offline: tables, curves over the steps, the contact sheet."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

COLUMNS = (  # head, key in the summary, what it is
    ("identified", "identification", "how often the right person is the nearest in the gallery"),
    ("R-FaceSim", "r_facesim", "mean cosine between the face and other photos of the person, never the one learnt from"),
    ("to photo", "similarity", "the same to the photo learnt from"),
    ("copying", "copying", "the latter minus the former; high where the photo itself comes back"),
    ("CLIP-T", "clip_t", "how well the picture fits its prompt"),
    ("CLIP-I", "clip_i", "how like the picture is to the photo learnt from, as a picture"),
    ("DINO", "dino", "the same with the features of a DINO model"),
    ("faces", "faces_found", "share of pictures in which a face was found"),
)
CURVES = COLUMNS[:5]
Methods = dict[str, dict[str, Any]]  # name → its part of the summary
Lines = dict[str, list[tuple[float, dict[str, Any]]]]  # name → points: where on the axis, and the summary there
COLOURS = ("#4f46e5", "#d97706", "#059669", "#db2777", "#0891b2", "#65a30d")


def html_report(summary: dict[str, Any], drawn: str, sheet: Image.Image, worse: Image.Image | None = None) -> str:
    """The whole page; everything it shows is inside it. `drawn` are the summary's `curves`, `worse` shows what photos became that were made worse."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    methods = summary["methods"]
    domains = sorted({domain for m in methods.values() for domain in m.get("by_domain", {})})
    by_domain = [(f"Domain {d}", {name: m["by_domain"][d] | {"steps": m["steps"]} for name, m in methods.items() if d in m.get("by_domain", {})}) for d in domains]
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template).render(
        **summary, tables=[("Everybody", methods), *by_domain], columns=[c for c in COLUMNS if all(c[1] in m for m in methods.values())],
        compared=[c for c in COLUMNS if all(c[1] in pair for pair in summary["paired"])],
        curves=drawn, kinds=degrade_curves(methods), sheet=_address(sheet), worse=worse and _address(worse),
    )  # fmt: skip


def _address(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curves(methods: Methods) -> str:
    """SVG: each score over the steps, a line with its interval for each method that was run with several numbers of steps.

    What takes no steps, such as the unadapted base, is a dashed line across. Empty where no method has two points.
    """
    families: Lines = {}
    for name, m in methods.items():
        if "degrade" not in m:
            families.setdefault(name.split("@")[0], []).append((m["steps"], m))
    lines = {name: sorted(points, key=lambda point: point[0]) for name, points in families.items() if len(points) > 1}
    return _panels(lines, _levels(methods), "steps") if lines else ""


def degrade_curves(methods: Methods) -> list[tuple[str, str]]:
    """For each kind of effect that made photos worse an SVG: each score over its strength, the photo as it is at 0."""
    kinds: dict[str, Lines] = {}
    for name, m in methods.items():
        if "degrade" in m:
            clean = name.rpartition("+")[0]
            line = kinds.setdefault(m["degrade"]["kind"], {}).setdefault(clean, [(0.0, methods[clean])] if clean in methods else [])
            line.append((m["degrade"]["strength"], m))
    ordered = {kind: {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()} for kind, lines in kinds.items()}
    return [(kind, _panels(lines, _levels(methods), f"strength of {kind}")) for kind, lines in ordered.items()]


def _levels(methods: Methods) -> Methods:
    """What takes no steps and learns from no photo."""
    return {name: m for name, m in methods.items() if m["steps"] == 0}


def _panels(lines: Lines, level: Methods, across: str) -> str:
    """SVG: a panel a score, with the lines, each with its interval, and the levels dashed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.1), layout="constrained")
    for axes, (head, key, _) in zip(figure.subplots(1, len(CURVES)), CURVES):
        for (name, points), colour in zip(lines.items(), COLOURS * len(lines)):
            known = [(x, m) for x, m in points if m[key]["mean"] is not None]
            places = [x for x, _ in known]
            axes.plot(places, [m[key]["mean"] for _, m in known], marker="o", markersize=3, color=colour, label=name)
            axes.fill_between(places, [m[key]["low"] for _, m in known], [m[key]["high"] for _, m in known], color=colour, alpha=0.15, linewidth=0)
        for (name, m), dashes in zip(level.items(), ("--", ":", "-.") * len(level)):
            if m[key]["mean"] is not None:
                axes.axhline(m[key]["mean"], color="#6b7280", linestyle=dashes, linewidth=1, label=name)
        axes.set_title(head, fontsize=10)
        axes.set_xlabel(across, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": across}):  # the same figures, the same page
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
