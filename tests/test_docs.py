"""README, docs/ and results/ stay true: commands parse, options, files and links exist, generated parts are new."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from conftest import ROOT

import evaluate
from agent.runs.cli import parse_cli
from agent.runs.config import Config
from agent.settings import names
from docs import configuration
from docs.census import READING_PATH, census, lines
from envs import TaskId

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "results").rglob("*.md"))
PAGES = [README, *DOCS]
TEXTS = {page: page.read_text(encoding="utf-8") for page in [*PAGES, *RESULTS]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def name_of(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def blocks(language, pages=PAGES):
    """The fenced blocks of a language; "" for those that name none."""
    return [text for page in pages for kind, text in FENCE.findall(TEXTS[page]) if kind == language]


# ---------------------------------------------------------------------- generated and counted


def test_the_configuration_page_is_that_of_the_code():
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page(), "run: python -m docs.configuration"


def test_every_metric_is_in_the_glossary_and_no_other(finished):
    written = (finished[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    emitted = {name for line in written for name in json.loads(line)} - {"step", "wall"}
    emitted = {"time/NAME" if name.startswith("time/") else name for name in emitted}
    emitted = {re.sub(r"^(stability/\w+?)_\d+$", r"\1_K", name) for name in emitted}
    glossary = TEXTS[ROOT / "docs" / "metrics.md"].split("## In every run")[1].split("\n## ")[0]
    assert emitted == set(re.findall(r"`(\w+/\w+)`", glossary))


def test_both_reading_paths_are_the_counted_one():
    numbered = re.findall(r"^\d\. `([\w./]+)`", TEXTS[README], re.M)
    table = re.findall(r"^\| \d \| `([\w./]+)`", TEXTS[ROOT / "docs" / "architecture.md"], re.M)
    assert tuple(numbered) == tuple(table) == READING_PATH


def test_the_reading_path_is_short():
    assert len(READING_PATH) <= 9
    assert sum(map(lines, READING_PATH)) <= 1300, "\n".join(census())


def test_the_configuration_is_small():
    assert len(list(names(Config))) <= 70


def test_the_readme_is_short():
    rows = TEXTS[README].splitlines()
    assert len(rows) <= 150
    assert [row for row in rows if len(row) > 120] == []


# ---------------------------------------------------------------------- names and links

FILE = re.compile(
    r"`((?:agent|world_model|envs|experiments|benchmarks|docs|tests|results)/[\w./-]*"
    r"|[\w-]+\.py|Makefile|mkdocs\.yml|requirements[\w-]*\.txt)`"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    made = {f"{name}.py" for name in modules_of_blocks()}
    missing = [name for name in FILE.findall(TEXTS[page]) if name not in made and not (ROOT / name).exists()]
    assert missing == []


def anchors(page):
    """The anchors of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[page])):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


OPTION = re.compile(r"--(?:[a-z]+\.)+[a-z][a-z-]*[a-z](?![a-z-]|\.[a-z*])")


@pytest.mark.parametrize("page", [page for page in PAGES if page != configuration.PAGE], ids=name_of)
def test_options_that_are_named_exist(page):
    known = {"--" + name.replace("_", "-") for name in names(Config)}
    named = {re.sub(r"\.no-(?=[a-z-]+$)", ".", option) for option in OPTION.findall(TEXTS[page])}
    assert named - known == set()


# ---------------------------------------------------------------------- commands

PROGRAM = re.compile(r"^(?:PYTHONPATH=\. )?(python train_agent\.py|python evaluate\.py|make)(?: |$)(.*)")
SPAN = re.compile(r"`((?:PYTHONPATH=\. )?(?:python (?:train_agent|evaluate)\.py|make) [^`]+)`")
LOOP = re.compile(r"^until (.*?) \|\|.*")


def documented():
    """(program, its words) of all commands; those that stand for several, with an ellipsis, and --help are left out."""
    commands = set()
    for page in PAGES:
        rows = [row for block in blocks("", [page]) for row in block.replace("\\\n", " ").splitlines()]
        rows += SPAN.findall(FENCE.sub("", TEXTS[page]))
        for row in rows:
            match = PROGRAM.match(LOOP.sub(r"\1", row.strip()))
            words = shlex.split(match[2], comments=True) if match else []
            if match and not {"...", "--help"} & set(words):
                commands.add((match[1], shlex.join(words)))
    return sorted(commands)


COMMANDS = documented()
TRAIN = [words for program, words in COMMANDS if program == "python train_agent.py"]
EVALUATE = [words for program, words in COMMANDS if program == "python evaluate.py"]
MAKE = [words for program, words in COMMANDS if program == "make"]


def modules_of_blocks():
    """{module: source} of the Python blocks that name a file in their first line."""
    modules = {}
    for block in blocks("python"):
        if match := re.match(r"# (\w+)\.py\n", block):
            modules[match[1]] = modules.get(match[1], "") + block
    return modules


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    """The modules that the pages let the reader write, ready to be imported."""
    folder = tmp_path_factory.mktemp("own")
    for name, source in modules_of_blocks().items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    specs = gymnasium.registry.items()  # other tests look at what is registered
    made = [name for name, spec in specs if getattr(spec.entry_point, "__module__", None) in modules_of_blocks()]
    for name in made:
        del gymnasium.registry[name]
    sys.path.remove(str(folder))
    for name in modules_of_blocks():
        sys.modules.pop(name, None)


def filled(words, run):
    """The words of a command, with RUN and FILE replaced by the folder of a finished run and its config.yaml.

    Other names in capitals (DIR, FOLDER) stay: they are new folders. That run has ended, so --resume is given more
    steps where the command names none. A file that takes what is printed is left out.
    """
    words = [re.sub(r"^RUN\b", str(run), word) for word in shlex.split(words.partition("'>'")[0])]
    words = [str(run / "config.yaml") if word == "FILE" else word for word in words]
    words = ["toy:cue5" if word == "TASK" else word for word in words]
    return [*words, "--steps", "1200"] if "--resume" in words and "--steps" not in words else words


def check_train(words):
    """Raises UsageError or SystemExit where the command would be refused."""
    config, _ = parse_cli(words, TaskId.shows_images)
    TaskId.parse(config.task)


def test_the_pages_hold_commands():
    assert len(TRAIN) > 20
    assert len(EVALUATE) > 10
    assert len(MAKE) > 4


@pytest.mark.parametrize("words", [words for words in TRAIN if "--sweep" not in words])
def test_training_commands_are_understood(words, finished, own_modules):
    check_train(filled(words, finished[0]))


@pytest.mark.parametrize("words", [words for words in TRAIN if "--sweep" in words])
def test_sweep_commands_are_understood(words, finished, script):
    words = filled(words, finished[0])
    done = script("train_agent.py", *words, *([] if "--commands" in words else ["--commands"]))
    assert done.returncode == 0, done.stderr
    runs = [row for row in done.stdout.splitlines() if "train_agent.py" in row]
    assert len(runs) > 1


@pytest.mark.parametrize("words", EVALUATE)
def test_evaluation_commands_are_understood(words, finished, monkeypatch):
    read = []
    commands = {name: (kind, lambda args, write: read.append(args)) for name, (kind, _) in evaluate.COMMANDS.items()}
    monkeypatch.setattr(evaluate, "COMMANDS", commands)
    monkeypatch.chdir(finished[0])
    assert evaluate.main(filled(words, finished[0])) == 0
    assert len(read) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("words", MAKE)
def test_make_commands_are_understood(words, own_modules):
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(["make", "-n", *shlex.split(words)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    if words.startswith("train"):
        check_train(shlex.split(last.partition("train_agent.py")[2]))


def test_an_option_that_is_not_there_would_fail():
    with pytest.raises(SystemExit):
        check_train(["dmc:walker_walk", "--model.loop.no-such-option", "1"])


@pytest.mark.parametrize("words", [words for words in TRAIN if "--preset debug" in words and "--sweep" not in words])
def test_debug_commands_train(words, own_modules, script):
    done = script("train_agent.py", *shlex.split(words), "--no-video")
    assert done.returncode == 0, done.stderr
    assert "final evaluation: return" in done.stdout


def test_an_evaluation_command_evaluates(finished, script):
    words = next(words for words in EVALUATE if "--exit fixed" in words)
    done = script("evaluate.py", *filled(words, finished[0]))
    assert done.returncode == 0, done.stderr
    assert "over 10 episodes" in done.stdout


@pytest.mark.parametrize("source", [block for block in blocks("python") if '"RUN"' in block])
def test_python_examples_run(source, finished):
    exec(source.replace("RUN", str(finished[0])).replace("dmc:walker_walk", "toy:cue5"), {})


def test_benchmarks_know_their_options():
    used = [row.split() for block in blocks("") for row in block.splitlines() if row.startswith("python benchmarks/")]
    assert used
    for _, file, *words in used:
        source = (ROOT / file).read_text(encoding="utf-8")
        given = words[: words.index("#")] if "#" in words else words
        assert [word for word in given if word.startswith("--") and f'"{word}"' not in source] == [], file


# ---------------------------------------------------------------------- the site


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="needs requirements-docs.txt, which `make docs` installs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    outside = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//')
    for page in (tmp_path / "site").rglob("*.html"):
        assert not outside.search(page.read_text(encoding="utf-8")), page
