"""The README's glossary and options stay true."""

import json
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GLOSSARY = README.split("## Metrics")[1].split("## ")[0]


def test_every_metric_is_in_the_glossary_and_no_other(finished):
    lines = (finished[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    emitted = {name for line in lines for name in json.loads(line)} - {"step", "wall"}
    emitted = {"time/NAME" if name.startswith("time/") else name for name in emitted}
    emitted = {re.sub(r"^(stability/\w+?)_\d+$", r"\1_K", name) for name in emitted}
    described = set(re.findall(r"`(\w+/\w+)`", GLOSSARY))
    assert emitted == described


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:world_model|agent|benchmarks)/\w+\.py|\w+\.py)`", README):
        assert (ROOT / name).exists(), name
