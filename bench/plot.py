"""A bar chart on a logarithmic scale, as SVG that reads on light and on dark. No library draws so little so well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

ROW, LEFT, WIDTH, RIGHT, TOP = 22, 190, 430, 130, 44
OURS, THEIRS, FLOOR = "#2f855a", "#718096", "#c05621"


def bars(title: str, unit: str, rows: Sequence[tuple[str, float, float, str]]) -> str:
    """``rows``: name, median, the longer end (p99 or max), its colour. A thin line reaches from the one to the other."""
    values = [v for _, low, high, _ in rows for v in (low, high) if v > 0]
    least = 10 ** math.floor(math.log10(min(values)))
    most = 10 ** math.ceil(math.log10(max(values) * 1.0001))
    span = math.log10(most / least) or 1.0

    def x(value: float) -> float:
        return LEFT + WIDTH * max(0.0, math.log10(max(value, least) / least)) / span

    height = TOP + ROW * len(rows) + 26
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        "<style>text{fill:#2d3748}@media (prefers-color-scheme: dark){text{fill:#e2e8f0}}</style>",
        f'<text x="0" y="18" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    mark = least
    while mark <= most * 1.001:
        at = x(mark)
        out.append(
            f'<line x1="{at:.1f}" y1="{TOP - 8}" x2="{at:.1f}" y2="{height - 20}" stroke="#a0aec0" stroke-width=".5"/>'
        )
        out.append(f'<text x="{at:.1f}" y="{height - 6}" text-anchor="middle">{_number(mark)}</text>')
        mark *= 10
    out.append(f'<text x="{LEFT + WIDTH + 24}" y="{height - 6}">{escape(unit)}</text>')
    for n, (name, low, high, colour) in enumerate(rows):
        y = TOP + ROW * n
        weight = ' font-weight="600"' if colour == OURS else ""
        out.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end"{weight}>{escape(name)}</text>')
        out.append(
            f'<rect x="{LEFT}" y="{y + 2}" width="{max(1.0, x(low) - LEFT):.1f}" height="13" rx="2" fill="{colour}"/>'
        )
        if high > low:
            out.append(
                f'<line x1="{x(low):.1f}" y1="{y + 8.5}" x2="{x(high):.1f}" y2="{y + 8.5}" stroke="{colour}" stroke-width="2"/>'
            )
        out.append(f'<text x="{x(max(low, high)) + 6:.1f}" y="{y + 12}">{_number(low)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _number(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}".rstrip("0").rstrip(".") if value >= 1 else f"{value:.2g}"
