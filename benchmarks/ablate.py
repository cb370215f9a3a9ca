"""What each part of the objective does: `python benchmarks/ablate.py`, resumable.

Every variant post-trains the small base on the demo's data, with 3 seeds, and is scored on held-out
generated scenes (i2d, affine). Compute is equal: steps are the same, except that a run without the
teacher gets as many more as the teacher's forward costs. Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from mofo.evaluation.lines import read_lines
from mofo.evaluation.origin import origin
from mofo.evaluation.pictures import main_metric

STEPS, BATCH = 120, 16
# A step with the teacher takes about this much longer; the demo's two runs measured 1.14.
TEACHER_COST = 1.12
VARIANTS = {
    "as is": [],
    "no mode mix": ["objective.i2d_probability=0", "objective.d2i_probability=0"],
    "mean fill": ["objective.fill=mean"],
    "noise fill": ["objective.fill=noise"],
    "no teacher": [
        "objective.teacher_weight_noisy=0",
        "objective.teacher_weight_clean=0",
        f"trainer.max_steps={round(STEPS * TEACHER_COST)}",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (3)")
    parser.add_argument("--limit", type=int, default=128, help="held-out scenes scored (128)")
    args = parser.parse_args()
    exports = {}
    for seed in range(args.seeds):
        for variant, overrides in VARIANTS.items():
            name = f"ablate_{variant.replace(' ', '_')}_{seed}"
            exports[f"{variant} {seed}"] = f"runs/{name}/export"
            command = ["train.py", "experiment=demo", f"name={name}", f"seed={seed}"]
            start(*command, f"data.batch_size={BATCH}", f"trainer.max_steps={STEPS}", *overrides)
    labels = list(exports)
    also = ", ".join(f"{label}: {exports[label]}" for label in labels[1:])
    start(
        "evaluate.py",
        "name=ablate",
        f"label={labels[0]}",
        f"model={exports[labels[0]]}",
        f"also={{{also}}}",
        f"limit={args.limit}",
        "captions=[]",
    )
    text = table(args.seeds)
    print(text)
    made_by = origin()
    with Path("benchmarks/RESULTS.md").open("a") as results:
        results.write("\n## Ablation of the objective\n\n`python benchmarks/ablate.py`, ")
        results.write(f"commit {made_by.commit}, {made_by.machine}\n\n{text}\n")


def start(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def table(num_seeds: int) -> str:
    """Mean and standard deviation over seeds, of means over images."""
    lines = [line for line in read_lines("runs/eval/ablate") if "scenes" in line["set"]]
    rows = ["| variant | AbsRel | delta1 |", "|---|---|---|"]
    for variant in VARIANTS:
        scores = []
        for seed in range(num_seeds):
            own = [line for line in lines if line["predictor"] == f"{variant} {seed}"]
            scores.append(
                [np.mean([main_metric(line, k) for line in own]) for k in ("absrel", "delta1")]
            )
        (absrel, delta), (absrel_spread, delta_spread) = np.mean(scores, 0), np.std(scores, 0)
        rows.append(
            f"| {variant} | {absrel:.4f} ± {absrel_spread:.4f} | {delta:.3f} ± {delta_spread:.3f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
