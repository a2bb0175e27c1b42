"""Replay buffer of arrival rows.

Row t is what the agent knows on arrival at observation t; nothing is shifted when it is sampled.

    time          0        1        2        3 (last)   4 (=reset)   5
    obs          o0       o1       o2       o3         o0'          o1'
    prev_action   0       a0       a1       a2          0           a0'
    reward        0       r1       r2       r3          0           r1'
    is_first      1        0        0        0          1            0
    is_last       0        0        0        1          0            0       terminated or truncated
    is_terminal   0        0        0    terminated     0            0       -> continue target = 1 - is_terminal

This is what Gymnasium vector environments give with NEXT_STEP autoreset. Each environment has its own ring.
Every row also holds the latent state inferred on arrival, in half precision: a sampled sequence starts from
the latent of the row before it, and the trained latents are written back (DreamerV3's replay context).

Vectors are saved with the checkpoint. Images are not: they lie in a memory-mapped file of the run (`image_store.py`).

Symbols: E environments, L rows per ring, B sequences, T rows of a sequence, N latent tokens, D their width,
S groups, K classes, A dimensions of the policy's action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.data.image_store import DeviceImages, ImageStore
from world_model import Batch, LatentState, ObsSize

FLAGS = ("is_first", "is_last", "is_terminal")
DERIVED = ("deter", "stoch", "priority")
"""Columns that are no experience: what the agent made of it."""
RECENT = 0.1
"""Share of the rows that are recent: half of the sequences are drawn from them."""
CANDIDATES, POWER = 8, 0.6
"""With priorities so many times the sequences are drawn evenly, and of these some by priority^POWER."""
FADING = 0.99
"""Factor per update of the running maximum of errors: the priority of rows that were never learned from."""
NEVER = -1.0
"""Marks these rows."""


class ReplayBuffer:
    """Rings of `capacity // envs` rows for each of `envs` environments.

    obs_sizes {name: O, or (H, W, C)}, action_size A, and the latent's shapes deter (N, D), stoch (S, K). onehot: each
    group of a stoch is told by its class.

    sampling, see `TrainConfig`, says which sequences are drawn: all evenly; half of them from the newest tenth; or
    more often those whose last error was large, of the world model (KL of posterior from prior) or of the critic.
    """

    def __init__(
        self,
        capacity: int,
        envs: int,
        obs_sizes: Mapping[str, ObsSize],
        action_size: int,
        deter: tuple[int, int],
        stoch: tuple[int, int],
        seed: int = 0,
        sampling: str = "uniform",
        onehot: bool = True,
    ):
        self.onehot = onehot
        self.sampling = sampling
        self.length, self.envs, self.classes = max(2, capacity // envs), envs, stoch[1]
        self.obs_names = tuple(obs_sizes)
        shape = (envs, self.length)
        self.rows: dict[str, np.ndarray] = {
            **{
                f"obs/{name}": np.zeros((*shape, size), np.float32)
                for name, size in obs_sizes.items()
                if isinstance(size, int)
            },
            "prev_action": np.zeros((*shape, action_size), np.float32),
            "reward": np.zeros(shape, np.float32),
            **{name: np.zeros(shape, bool) for name in FLAGS},
            "deter": np.zeros((*shape, *deter), np.float16),
            "stoch": np.zeros((*shape, stoch[0]), np.uint8) if onehot else np.zeros((*shape, *stoch), np.float16),
        }
        if self.prioritised:
            self.rows["priority"] = np.zeros(shape, np.float32)
        self.highest = 1.0
        self.image_sizes = {f"obs/{name}": size for name, size in obs_sizes.items() if not isinstance(size, int)}
        self.images: dict[str, ImageStore] = {}
        self.device_images: dict[str, DeviceImages] | None = None  # None: not tried yet
        self.count = 0  # rows ever written, per environment
        self.first_intact = 0  # number of the first row whose images were not overwritten after a checkpoint
        self.rng = np.random.default_rng(seed)

    # ---------------------------------------------------------------------- images

    def open_image_store(
        self, folder: Path | None, exists: bool = False, first: int = 0, rings: int | None = None
    ) -> None:
        """Keep the images in files of `folder`, or in memory where it is None, as without this call.

        Call it before the first row. exists: continue the files of an earlier run; ValueError where they are missing
        or of another size. first, rings: number of our first ring in files that other ranks share, and all rings there.
        """
        for name, size in self.image_sizes.items():
            path = folder / f"{name.removeprefix('obs/')}.images" if folder else None
            mine = slice(first, first + self.envs)
            self.images[name] = ImageStore(path, (rings or self.envs, self.length, *size), exists, mine)
            self.rows[name] = self.images[name].values

    def copy_images_to(self, device: torch.device) -> None:
        """Keep a copy of the images on this device from now on, as far as its memory suffices."""
        self.device_images = {}
        for name, store in self.images.items():
            with contextlib.suppress(MemoryError):
                self.device_images[name] = DeviceImages(store.values, self.count, device)

    # ---------------------------------------------------------------------- writing

    @property
    def oldest(self) -> int:
        """Number of the oldest row held."""
        return max(0, self.count - self.length, self.first_intact)

    @property
    def held(self) -> int:
        """Rows held of each environment."""
        return self.count - self.oldest

    def __len__(self) -> int:
        """Rows held, over all environments."""
        return self.held * self.envs

    def add(self, row: Mapping[str, np.ndarray], state: LatentState) -> None:
        """Append one row per environment: every value (E, ...), observations under "obs/NAME"."""
        at = self.count % self.length
        if self.image_sizes and not self.images:
            self.open_image_store(None)
        for name, store in self.images.items():  # images first: where the disk is full, no other value changes
            store.write(self.count, row[name])
            if self.device_images and name in self.device_images:
                try:
                    self.device_images[name].write(at, row[name])
                except MemoryError:
                    del self.device_images[name]
        for name, value in row.items():
            if name not in self.images:
                self.rows[name][:, at] = value
        self.rows["deter"][:, at] = state.deter.numpy(force=True)
        self.rows["stoch"][:, at] = self.encode_stoch(state.stoch)
        if self.prioritised:
            self.rows["priority"][:, at] = NEVER
        self.count += 1

    def encode_stoch(self, stoch: torch.Tensor) -> np.ndarray:
        """(..., S, K) as the buffer holds it: the classes (..., S), or the numbers."""
        return (stoch.argmax(-1) if self.onehot else stoch).numpy(force=True)

    def fill(self, rows: Mapping[str, np.ndarray], state: LatentState) -> None:
        """Put the rows (L, ...) of a fixed data set into an empty buffer of one environment and capacity L.

        state (L, ...): the latents to start from, until training writes better ones back.
        """
        if self.image_sizes and not self.images:
            self.open_image_store(None)
        self.device_images = None
        for name, value in rows.items():
            self.rows[name][0] = value
        self.rows["deter"][0] = state.deter.numpy(force=True)
        self.rows["stoch"][0] = self.encode_stoch(state.stoch)
        if self.prioritised:
            self.rows["priority"][0] = NEVER
        self.count = self.length

    def write_back(self, where: np.ndarray, states: LatentState, errors: torch.Tensor) -> None:
        """Store freshly inferred latents (B, T, ...) at the positions that `sample` returned, (2, B, T).

        errors (B, 2): of each sequence, the world model's and the critic's.
        """
        self.rows["deter"][where[0], where[1]] = states.deter.numpy(force=True)
        self.rows["stoch"][where[0], where[1]] = self.encode_stoch(states.stoch)
        if self.prioritised:
            priority = errors[:, int(self.sampling == "value-error")].numpy(force=True)
            self.rows["priority"][where[0], where[1]] = priority[:, None]
            self.highest = max(FADING * self.highest, float(priority.max()))

    # ---------------------------------------------------------------------- sampling

    def sample(self, batch_size: int, length: int, device: torch.device | str = "cpu") -> tuple[Batch, np.ndarray]:
        """`batch_size` sequences of `length` consecutive rows, each with the latent of the row before.

        Sequences may cross episodes (is_first marks it) and never the write pointer. Returns the batch and the
        (2, B, T) ring positions (environment, row) for `write_back`. Raises ValueError with too few rows.
        """
        if self.held < length + 1:
            raise ValueError(f"replay holds {self.held} rows per environment, a sequence needs {length + 1}")
        env, first = self.draw(batch_size, length)
        at = (first[:, None] + np.arange(-1, length)) % self.length  # (B, 1 + T), the context row first
        where = (env[:, None], at[:, 1:])

        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and self.device_images is None:
            self.copy_images_to(torch.device(device))
        copies = {name: copy for name, copy in (self.device_images or {}).items() if on_gpu == copy.values.is_cuda}

        def tensor(name: str, index: tuple[np.ndarray, np.ndarray] = where) -> torch.Tensor:
            if name in copies:
                return copies[name].gather(*index)
            values = torch.from_numpy(np.asarray(self.rows[name][index]))
            return (values.pin_memory() if on_gpu else values).to(device, non_blocking=True)

        context = env, at[:, 0]  # (B,) each
        stoch = tensor("stoch", context)
        if self.onehot:
            stoch = torch.nn.functional.one_hot(stoch.long(), self.classes)  # (B, S) -> (B, S, K)
        start = LatentState(tensor("deter", context).float(), stoch.float())
        batch = Batch(
            obs={name: tensor(f"obs/{name}") for name in self.obs_names},
            prev_action=tensor("prev_action"),
            reward=tensor("reward"),
            **{name: tensor(name) for name in FLAGS},
            start=start,
        )
        return batch, np.stack(np.broadcast_arrays(*where))

    @property
    def prioritised(self) -> bool:
        """Whether sequences are drawn by their errors."""
        return self.sampling.endswith("-error")

    def draw(self, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Environments and numbers of the first rows of `size` sequences, (B,) each, by the rule of sampling."""
        low: int | np.ndarray = self.oldest + 1
        high = self.count - length + 1  # one more than the last that is possible
        if self.sampling == "recent":
            newest = max(self.oldest + 1, high - 1 - int(RECENT * self.held))
            low = np.where(self.rng.random(size) < 0.5, newest, self.oldest + 1)
        if not self.prioritised:
            first = self.rng.integers(low, high, size)
            return self.rng.integers(0, self.envs, size), first
        first = self.rng.integers(low, high, CANDIDATES * size)
        env = self.rng.integers(0, self.envs, CANDIDATES * size)
        known = self.rows["priority"][env, (first + length // 2) % self.length]
        priority = np.where(known == NEVER, self.highest, known)
        # The largest of log p + Gumbel noise are a draw without replacement in proportion to p.
        score = POWER * np.log(priority + 1e-6) + self.rng.gumbel(size=len(first))
        chosen = np.argpartition(-score, size - 1)[:size]
        return env[chosen], first[chosen]

    # ---------------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """The rows held and the sampling state, as tensors and plain values (loads with weights_only).

        Images are not in it: see `with_images`.
        """
        held = min(self.count, self.length)
        kept = self.rows.keys() - self.images.keys()
        rows = {name: torch.from_numpy(value[:, :held]) for name, value in self.rows.items() if name in kept}
        rng = self.rng.bit_generator.state
        counts = {"count": self.count, "first_intact": self.first_intact, "highest": self.highest}
        return {"rows": rows, "rng": rng, **counts}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore `state_dict`; raises ValueError when the shapes are those of another task or model."""
        if saved["rows"].keys() != self.rows.keys() - self.images.keys():
            raise ValueError(f"the saved replay does not fit: it holds {sorted(saved['rows'])}")
        for name, value in saved["rows"].items():
            own = self.rows[name]
            if own.shape[0] != value.shape[0] or own.shape[2:] != tuple(value.shape[2:]):
                raise ValueError(f"the saved replay does not fit: {name} has shape {tuple(value.shape)}")
            if value.shape[1] > self.length or (saved["count"] > value.shape[1] != self.length):
                raise ValueError("the saved replay has another capacity: keep --train.replay_rows as it was")
        for name, value in saved["rows"].items():
            self.rows[name][:, : value.shape[1]] = value.numpy()
        self.count, self.highest = saved["count"], saved.get("highest", 1.0)  # not in checkpoints of earlier versions
        self.device_images = None
        if self.images:
            written = [int(store.written[0]) for store in self.images.values()]
            self.first_intact = first_intact_row(saved, written, self.length)
        self.rng.bit_generator.state = saved["rng"]


def first_intact_row(saved: Mapping[str, Any], written: list[int], length: int) -> int:
    """Number of the oldest row whose images are still those of its checkpoint, in rings of `length` rows.

    written: rows ever written to each file. Rows written after the checkpoint have overwritten the oldest ones.
    Raises ValueError where a file lacks rows of the checkpoint.
    """
    if min(written) < saved["count"]:
        raise ValueError("the images of the replay are missing: they lie in the run's folder, in replay/")
    return max(saved["first_intact"], min(saved["count"], max(written) - length))


def with_images(saved: Mapping[str, Any], obs: Mapping[str, ObsSize], folder: Path) -> dict[str, Any]:
    """`state_dict` with the images in the files of `folder`. Raises ValueError where they are missing."""
    envs, held = saved["rows"]["reward"].shape
    rows, written, length = dict(saved["rows"]), [], held
    for name, size in obs.items():
        if isinstance(size, int):
            continue
        path = folder / f"{name}.images"
        if not path.exists() or not path.with_suffix(".count").exists():
            raise ValueError(f"the images of the replay are missing: {path}")
        values = np.memmap(path, np.uint8, "r").reshape(envs, -1, *size)  # (E, L, H, W, C)
        rows[f"obs/{name}"], length = values[:, :held], values.shape[1]
        written.append(int(np.fromfile(path.with_suffix(".count"), np.int64)[0]))
    first_intact = first_intact_row(saved, written, length) if written else saved["first_intact"]
    return {**saved, "rows": rows, "first_intact": first_intact}
