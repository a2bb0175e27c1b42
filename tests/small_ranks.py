"""Ranks as threads of one process: messages are real, and nothing has to be imported anew."""

import threading

import torch.distributed as dist

from agent.execution.ranks import local_ranks

SEED = threading.Lock()
"""Held while an agent is made: PyTorch's generator is that of all threads."""


def together(size, work):
    """work(ranks) of `size` ranks, each in a thread; the results by rank, errors among them."""
    store, results = dist.HashStore(), [None] * size

    def live(rank):
        try:
            results[rank] = work(local_ranks(store, rank, size))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400.0)  # the machine may be busy
        assert not thread.is_alive(), "a rank hangs"
    return results
