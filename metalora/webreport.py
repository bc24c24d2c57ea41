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
COLOURS = ("#4f46e5", "#d97706", "#059669", "#db2777", "#0891b2", "#65a30d")


def html_report(summary: dict[str, Any], sheet: Image.Image) -> str:
    """The whole page; everything it shows is inside it."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    methods = summary["methods"]
    domains = sorted({domain for m in methods.values() for domain in m.get("by_domain", {})})
    by_domain = [(f"Domain {d}", {name: m["by_domain"][d] | {"steps": m["steps"]} for name, m in methods.items() if d in m.get("by_domain", {})}) for d in domains]
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template).render(
        **summary, tables=[("Everybody", methods), *by_domain], columns=[c for c in COLUMNS if all(c[1] in m for m in methods.values())], curves=curves(methods),
        sheet=f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}",
    )  # fmt: skip


def curves(methods: dict[str, dict[str, Any]]) -> str:
    """SVG: each score over the steps, a line with its interval for each method that was run with several numbers of steps.

    What takes no steps, such as the unadapted base, is a dashed line across. Empty where no method has two points.
    """
    from matplotlib.figure import Figure

    families: dict[str, list[dict[str, Any]]] = {}
    for name, m in methods.items():
        families.setdefault(name.split("@")[0], []).append(m)
    lines = {name: sorted(points, key=lambda m: m["steps"]) for name, points in families.items() if len(points) > 1}
    if not lines:
        return ""
    level = {name: points[0] for name, points in families.items() if points[0]["steps"] == 0}
    figure = Figure(figsize=(13, 3.1), layout="constrained")
    for axes, (head, key, _) in zip(figure.subplots(1, len(CURVES)), CURVES):
        for (name, points), colour in zip(lines.items(), COLOURS * len(lines)):
            known = [m for m in points if m[key]["mean"] is not None]
            steps = [m["steps"] for m in known]
            axes.plot(steps, [m[key]["mean"] for m in known], marker="o", markersize=3, color=colour, label=name)
            axes.fill_between(steps, [m[key]["low"] for m in known], [m[key]["high"] for m in known], color=colour, alpha=0.15, linewidth=0)
        for (name, m), dashes in zip(level.items(), ("--", ":", "-.") * len(level)):
            if m[key]["mean"] is not None:
                axes.axhline(m[key]["mean"], color="#6b7280", linestyle=dashes, linewidth=1, label=name)
        axes.set_title(head, fontsize=10)
        axes.set_xlabel("steps", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
