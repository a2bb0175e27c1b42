"""Names that were meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str], suite: str, example: str) -> str:
    """Suggest the names nearest to `name`, or else say how names of the suite look."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    suggestion = did_you_mean([f"{suite}:{by_lower[match]}" for match in matches]).rstrip()
    return suggestion or f"tasks of this suite look like {example}"


def did_you_mean(names: list[str]) -> str:
    """A question with a space behind it; nothing where there are no names."""
    return f"did you mean {' or '.join(names)}? " if names else ""
