"""A sweep on two nodes of a Ray cluster on this machine, of which one is killed, beside the same sweep without Ray.

    python benchmarks/lost_node.py --out DIR

Needs the package ray. Prints for every run how often it was begun, and its return. Ends
with status 1 where a run is missing or was made twice, or where one that was not cut off has another return than here.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from agent.runtime import PROJECT

RUNS = 8
TASK = ("toy:cue5", "--preset", "debug", "--no-video", "--device", "cpu")


def command(folder: Path, *words: str) -> list[str]:
    seeds = ",".join(map(str, range(RUNS)))
    program = [sys.executable, str(PROJECT / "train_agent.py"), *TASK, "--sweep", f"seed={seeds}"]
    return [*program, *words, "--run-dir", str(folder)]


def facts(folder: Path) -> list[dict[str, object]]:
    """Of every run: whether it has finished, the commands that it took, its final return and its evaluations."""
    rows = []
    for seed in range(RUNS):
        run = folder / f"seed={seed}"
        meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
        with (run / "eval.csv").open(encoding="utf-8") as file:
            episodes = [(row["step"], row["episode"]) for row in csv.DictReader(file)]
        rows.append(
            {
                "seed": seed,
                "finished": bool(meta.get("finished")),
                "begun": len(meta["commands"]),
                "episodes": len(episodes),
                "twice": len(episodes) - len(set(episodes)),
                "return": round(meta["results"]["final"]["mean"], 6),
            }
        )
    return rows


def on_two_nodes(folder: Path, seconds: float) -> None:
    """Kill the second node after so many seconds, and bring another one ten seconds later."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    start, sweep = time.monotonic(), subprocess.Popen(command(folder, "--on", "ray"), env=env)
    killed = False
    while sweep.poll() is None:
        time.sleep(0.5)
        if not killed and time.monotonic() - start > seconds:
            print(f"-- a node is killed after {seconds:.0f} s", flush=True)
            cluster.remove_node(second, allow_graceful=False)
            killed = True
            time.sleep(10.0)
            cluster.add_node(num_cpus=1)
    print(f"-- status {sweep.returncode} after {time.monotonic() - start:.0f} s", flush=True)
    cluster.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; must not be there")
    parser.add_argument("--seconds", type=float, default=25.0, help="after which the node is killed")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    on_two_nodes(args.out / "ray", args.seconds)
    subprocess.run(command(args.out / "here", "--jobs", "2"), check=False)
    ray, here = facts(args.out / "ray"), facts(args.out / "here")
    with (args.out / "lost-node.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["place", *ray[0]])
        writer.writeheader()
        writer.writerows({"place": place, **row} for place, rows in (("ray", ray), ("here", here)) for row in rows)
    good = True
    for one, other in zip(ray, here, strict=True):
        same = one["return"] == other["return"] or one["begun"] != 1
        good &= bool(one["finished"] and other["finished"] and not one["twice"] and same)
        print(f"seed {one['seed']}: begun {one['begun']} times on Ray, return {one['return']}; here {other['return']}")
    print("all finished, none twice" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
