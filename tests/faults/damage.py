"""Files damaged at random: bytes of any file, the content of checkpoints, settings and tables."""

import copy
import io
import json
import math
import os
import struct
import zipfile

WORDS = ("", "--", "nan", "-inf", "1e400", "-1", "0", "9" * 40, "1e-99", "true", "None", "null", "../..", ".", "~", "-",
         "/proc/self/mem", "/proc/nothing", "ü ✓", "😀" * 30, "a" * 300, "two words", "[]", "{}", "0x10", "1,2", "1_0",
         "½", "\n", "%s", "$HOME", "*", "1e3k", "٣", "\u202e", "0.1", "1e9", "2.5", "-0", "+1", " 1 ", "1e", "'", '"',
         "\\", "cpu", "cuda:9", "gru", "toy:cue", "\udcff")  # fmt: skip
"""What people, scripts and shells put in place of a value."""
VALUES = (None, "", "text", -1, 0, 10**30, 1e300, math.nan, math.inf, True, [], {}, [1, "a"], {"a": 1}, "ü" * 300, 0.5)
"""What a file may hold in place of a value."""


# ---------------------------------------------------------------------- bytes


def damage_bytes(rng, path):
    """Damage a file's bytes; says how."""
    data = bytearray(path.read_bytes())
    how = rng.choice(("flipped", "flipped", "zeroed", "cut off", "extended", "emptied", "replaced", "doubled"))
    if how == "flipped":
        first, last = rng.choice(regions(path, data))
        for _ in range(rng.choice((1, 1, 4, 64))):
            at = rng.randrange(first, max(first + 1, last))
            if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
        how = f"flipped in {first}-{last}"
    elif how == "zeroed":
        at = rng.randrange(len(data) + 1)
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif how == "cut off":
        del data[rng.randrange(len(data) + 1) :]
    elif how == "extended":
        data += rng.randbytes(rng.choice((1, 100, 5000)))
    elif how == "emptied":
        data.clear()
    elif how == "replaced":
        data = bytearray(rng.randbytes(rng.choice((1, 64, 4096))))
    else:
        data.extend(bytes(data))
    path.write_bytes(data)
    return how


def regions(path, data):
    """(first, last) byte of the parts of a file: of a zip file its headers, entries and directory."""
    parts = [(0, len(data))]
    if not zipfile.is_zipfile(path):
        return parts
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            parts.append((entry.header_offset, entry.header_offset + 30))
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", data[entry.header_offset + 26 :][:4]))
            parts.append((start, start + entry.compress_size))
        parts += [(file.start_dir, len(data)), (len(data) - 22, len(data))]
    names = [(first, last) for first, last in parts if last > first]
    return names + names[-2:] * 3


def damage_entry(rng, folder, name):
    """Damage a file of a folder as a whole; says how."""
    path = folder / name
    how = rng.choice(("bytes", "bytes", "bytes", "deleted", "a folder", "not readable text", "a link to nothing"))
    if how == "bytes":
        return f"{name} {damage_bytes(rng, path)}"
    if how == "not readable text":
        path.write_bytes(b"\xff\xfe\x00 \x80" * 20)
        return f"{name}: {how}"
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a link to nothing":
        os.symlink(folder / "nowhere", path)
    return f"{name}: {how}"


# ---------------------------------------------------------------------- content


def change_tree(rng, tree, path=""):
    """Change one value somewhere in nested dictionaries and lists, in place; says which and how."""
    if isinstance(tree, dict) and tree and rng.random() < 0.97:
        key = rng.choice(list(tree))
        inner = isinstance(tree[key], dict | list) and len(tree[key]) > 0
        if inner and rng.random() < 0.85:
            return change_tree(rng, tree[key], f"{path}.{key}")
        if rng.random() < 0.25:
            del tree[key]
            return f"{path}.{key} deleted"
        if rng.random() < 0.1:
            tree[f"{key}x"] = tree.pop(key)
            return f"{path}.{key} renamed"
        tree[key] = other(rng, tree[key])
        return f"{path}.{key} is {shown(tree[key])}"
    if isinstance(tree, list) and tree:
        at = rng.randrange(len(tree))
        tree[at] = other(rng, tree[at])
        return f"{path}[{at}] is {shown(tree[at])}"
    if isinstance(tree, dict):
        tree["surprise"] = rng.choice(VALUES)
        return f"{path}.surprise is new"
    return "nothing"


def other(rng, value):
    """Another value in place of one: of tensors also other shapes, types and values."""
    if hasattr(value, "dtype") and rng.random() < 0.8:
        import torch

        if value.is_floating_point() and value.numel() and rng.random() < 0.4:
            value = value.clone()
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((math.nan, math.inf, 1e30))
            return value
        return rng.choice((value[..., :0] if value.ndim else value[None], value[None], value.double().flatten(),
                           value.to(torch.complex64), value.to(torch.int8), torch.zeros(3)))  # fmt: skip
    return copy.deepcopy(rng.choice(VALUES))


def shown(value):
    """A value in a few characters."""
    text = f"a tensor {tuple(value.shape)} {value.dtype}" if hasattr(value, "dtype") else repr(value)
    return text[:60]


def change_checkpoint(rng, path):
    """Change the content of a checkpoint and write it whole; says how. Call it in a fork: it uses PyTorch."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if rng.random() < 0.06:
        content = copy.deepcopy(rng.choice(VALUES))
        torch.save(content, path)
        return f"{path.name} holds {shown(content)}"
    said = [change_tree(rng, content) for _ in range(rng.choice((1, 1, 1, 3)))]
    torch.save(content, path)
    return f"{path.name}: " + ", ".join(said)


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hostile_checkpoint(path, mark):
    """A checkpoint that would run a command, were it unpickled."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    torch.save({**content, "step": Hostile(mark)}, path)
    return f"{path.name} would run a command"


def change_json(rng, path):
    """Change one value of a JSON file."""
    content = json.loads(path.read_text())
    said = change_tree(rng, content)
    path.write_text(json.dumps(content))
    return f"{path.name}: {said}"


def change_lines(rng, path):
    """Change the lines of a table or a log."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    how = rng.choice(("doubled", "torn", "swapped", "shorter", "longer", "a word", "a number", "deleted", "empty"))
    if how == "doubled":
        lines.insert(at, lines[at])
    elif how == "torn":
        lines[at] = lines[at][: len(lines[at]) // 2]
    elif how == "swapped":
        lines.reverse()
    elif how == "shorter":
        lines[at] = lines[at].rpartition(",")[0]
    elif how == "longer":
        lines[at] += ",1,2"
    elif how in ("a word", "a number"):
        value = rng.choice(WORDS) if how == "a word" else rng.choice(("-1", "1e30", "nan", "0"))
        words = lines[at].split(",")
        words[rng.randrange(len(words))] = value.replace("\n", " ").replace("\udcff", "?")
        lines[at] = ",".join(words)
    elif how == "deleted":
        del lines[at]
    else:
        lines[at] = ""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return f"{path.name}: line {at} {how}"


def change_arrays(rng, path, mark):
    """Change the arrays of an .npz file."""
    import numpy as np

    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    how = rng.choice(("deleted", "shorter", "nan", "complex", "texts", "objects", "another shape", "empty", "booleans"))
    value = arrays.pop(name)
    changed = {
        "shorter": lambda: value[: len(value) // 2], "nan": lambda: np.full(value.shape, np.nan, np.float32),
        "complex": lambda: value.astype(complex), "texts": lambda: value.astype(str), "empty": lambda: value[:0],
        "objects": lambda: np.array([Hostile(mark)] * len(value), object), "another shape": lambda: value[..., None],
        "booleans": lambda: value.astype(bool),
    }  # fmt: skip
    if how != "deleted":
        arrays[name] = changed[how]()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    return f"{path.name}: {name} {how}"
