"""Draw the log of a training run as an SVG: `python docs/draw_curve.py LOG.jsonl OUT.svg`."""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 52, 16, 16, 44


def draw(lines: list[dict[str, float]]) -> str:
    """Loss over steps: as logged pale, the running mean, what is held out."""
    held = [(line["step"], line[name]) for line in lines for name in ("held_out_loss", "eval_loss") if name in line]
    lines = [line for line in lines if "loss" in line]
    high, low, end = max(line["loss"] for line in lines), min(line["loss"] for line in lines), lines[-1]["step"]
    low, high = int(low), int(high) + 1
    tick = next(size for size in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if end < 10 * size)
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * step / end
    y = lambda loss: TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)
    path = lambda points, style: f'<polyline fill="none" {style} points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'
    mean = []
    for i in range(len(lines)):
        near = lines[max(0, i - 5) : i + 6]
        mean.append((lines[i]["step"], sum(line["loss"] for line in near) / len(near)))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(low, high + 1):
        out.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    out += [
        *(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>' for step in range(0, end + 1, tick)),
        path([(line["step"], line["loss"]) for line in lines], 'stroke="#9ecae1"'),
        path(mean, 'stroke="#2171b5" stroke-width="2"'),
        path(held, 'stroke="#d94801" stroke-width="2"'),
        f'<text x="{WIDTH - 250}" y="{TOP + 20}" fill="#2171b5">training loss (batches; mean of 11)</text>',
        f'<text x="{WIDTH - 250}" y="{TOP + 38}" fill="#d94801">held-out loss, {held[-1][1]:.3f} at the end</text>',
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>',
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">loss, nats</text>',
        "</svg>",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw([json.loads(line) for line in source.read_text().splitlines()]))
